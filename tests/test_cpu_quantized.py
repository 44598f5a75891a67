"""The CPU's int8 kernels by themselves: every instruction set, any number of threads, the ends of
every range, and what the bindings refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused
from resnet_fused import _extension, ops, use_backend
from resnet_fused._extension import tensor_arg
from resnet_fused.backends.cpu.native import pack
from resnet_fused.backends.cpu.quantized import QuantizedKernels
from resnet_fused.ops import Convolution, MaxPool
from resnet_fused.parameters import QuantizedLayer, QuantizedShortcut
from resnet_fused.reference import quantized as reference
from resnet_fused.testing.cases import ConvCase, generator
from resnet_fused.testing.quantized_cases import (
    make_integers,
    make_quantized_conv,
    make_quantized_head,
    make_quantized_stem,
    random_quantized_conv,
)

if reason := _extension.available():
    pytest.skip(reason, allow_module_level=True)
_C = _extension.load()

ISAS = ("avx512vnni", "avxvnni", "avx2", "amx")
NHWC = torch.channels_last
STEM = ConvCase(2, 3, 37, 41, 64, 7, 2, 3)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in _C.cpu_quantized_isas():
        pytest.skip(f"this processor has {_C.cpu_quantized_isas() or 'no AVX2'}")
    return request.param


@pytest.fixture
def kernels(isa: str) -> QuantizedKernels:
    return QuantizedKernels(_C, isa)


def same(found: Tensor, expected: Tensor) -> bool:
    layout = NHWC if found.dim() == 4 else torch.contiguous_format
    return (
        found.dtype == expected.dtype
        and found.is_contiguous(memory_format=layout)
        and torch.equal(found, expected)
    )


def served(arguments: list[Any]) -> bool:
    """Whether the kernel takes such a projection: beside convolutions of one group."""
    _, layer, shortcut, _ = arguments
    return shortcut is None or shortcut.projection is None or layer.conv.groups == 1


def image(values: list[int], dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.tensor(values, dtype=dtype).view(1, 1, 1, -1).contiguous(memory_format=NHWC)


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_layers(kernels: QuantizedKernels, threads: None, first: int) -> None:
    compared = 0
    for seed in range(10_000 + first, 10_000 + first + 50):
        arguments = random_quantized_conv(seed)
        if not served(arguments):
            continue
        torch.set_num_threads(1 + seed % 5)
        found, expected = kernels.conv(*arguments), reference.quantized_conv(*arguments)
        assert same(found, expected), f"seed {seed}: x {tuple(arguments[0].shape)}"
        compared += 1
    assert compared > 30


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_random_layers(kernels: QuantizedKernels, threads: None) -> None:
    for first in range(300, 2300, 50):
        test_random_layers(kernels, threads, first)


# A ResNet's layers: whole tiles and strips, several tasks, and a last tile of every height.
LAYERS = {
    "reduce": ConvCase(1, 256, 14, 15, 64),
    "expand": ConvCase(1, 64, 14, 15, 256),
    "3x3": ConvCase(2, 64, 9, 10, 64, 3, 1, 1),
    "3x3 of 7": ConvCase(3, 64, 7, 7, 128, 3, 1, 1),
    "3x3 strided": ConvCase(1, 64, 15, 14, 128, 3, 2, 1),
    "grouped": ConvCase(1, 128, 7, 9, 128, 3, 1, 1, 1, 32),
    "depthwise": ConvCase(1, 64, 9, 7, 64, 3, 1, 1, 1, 64),
}


@pytest.mark.parametrize("shortcut", ["none", "identity", "option A", "projection"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_a_resnet(
    kernels: QuantizedKernels, threads: None, name: str, shortcut: str
) -> None:
    arguments = make_quantized_conv(LAYERS[name], generator(), shortcut)
    if not served(arguments):
        pytest.skip("a projection beside groups is the reference's")
    expected = reference.quantized_conv(*arguments)
    for count in range(1, 6):
        torch.set_num_threads(count)
        assert same(kernels.conv(*arguments), expected), f"{count} threads"


@pytest.mark.parametrize("height", range(1, 8))
@pytest.mark.parametrize("width", range(1, 14, 3))
def test_every_border(kernels: QuantizedKernels, height: int, width: int) -> None:
    for dtype, padded in ((torch.uint8, False), (torch.uint8, True), (torch.int8, True)):
        for window in ((3, 1, 1), (3, 2, 1), (5, 1, 4), (3, 3, 2)):
            case = ConvCase(2, 8, height, width, 20, *window)
            if min(case.output_size) < 1:
                continue
            arguments = make_quantized_conv(case, generator(), "identity", dtype, padded)
            expected = reference.quantized_conv(*arguments)
            assert same(kernels.conv(*arguments), expected), (dtype, padded, window)


@pytest.mark.parametrize("size", [(8, 8), (11, 14), (14, 13)])
def test_winograds_borders(kernels: QuantizedKernels, threads: None, size: tuple[int, int]) -> None:
    """Maps that AVX2 computes by Winograd's transforms, whose last tiles may be partial, with each
    kind of padding; few tiles, for which tasks divide the columns, and more than a task takes."""
    for dtype, padded in ((torch.uint8, False), (torch.uint8, True), (torch.int8, True)):
        for batch in (1, 4):
            for shortcut in ("none", "identity"):
                torch.set_num_threads(batch)
                case = ConvCase(batch, 64, *size, 80, 3, 1, 1)
                relu = shortcut == "identity"
                arguments = make_quantized_conv(case, generator(), shortcut, dtype, padded, relu)
                expected = reference.quantized_conv(*arguments)
                assert same(kernels.conv(*arguments), expected), (dtype, padded, batch, shortcut)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("size", [(5, 5), (8, 11)])  # direct, and by Winograd's transforms
def test_the_largest_sums(
    kernels: QuantizedKernels, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    """Of 1024 channels, where a single unit shows."""
    x = torch.full((1, 1024, *size), torch.iinfo(dtype).max, dtype=dtype)
    x = x.contiguous(memory_format=NHWC)
    weight = torch.full((16, 1024, 3, 3), -128, dtype=torch.int8)
    weight[::2] = 127
    middle = int(x[0, 0, 0, 0]) * weight.sum((1, 2, 3), dtype=torch.int32)
    layer = QuantizedLayer(Convolution(weight, (1, 1), (1, 1)), 100 - middle, torch.ones(16))
    expected = reference.quantized_conv(x, layer, None, True)
    assert (expected[0, :, 2, 2] == 100).all()
    assert same(kernels.conv(x, layer, None, True), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("size", [(5, 5), (8, 11)])  # direct, and by Winograd's transforms
def test_the_ends_of_the_ranges(
    kernels: QuantizedKernels, dtype: torch.dtype, relu: bool, size: tuple[int, int]
) -> None:
    """Activations and weights of the largest magnitudes, which VPMADDUBSW would saturate, and
    results far outside int32."""
    ends = torch.iinfo(dtype)
    x = make_integers((2, 64, *size), torch.uint8, generator()) % 2
    x = torch.where(x > 0, ends.max, ends.min).to(dtype).contiguous(memory_format=NHWC)
    weight = torch.full((64, 64, 3, 3), 127, dtype=torch.int8)
    weight[::2] = -127
    weight[::3, ::2] = -128
    conv = Convolution(weight, (1, 1), (1, 1))
    bias = torch.arange(64, dtype=torch.int32) * 1000 - 32_000
    # Two columns of sums at the ends of int32, which a multiplier of magnitude 1 takes beyond them.
    weight[5:7] = 0
    bias[5:7] = torch.tensor([2**31 - 1, -(2**31)])
    for multiplier in (1e-4, 1 - 2**-24, 1.0, -1.0, 1e6):
        layer = QuantizedLayer(conv, bias, torch.full((64,), multiplier))
        arguments = (x, layer, None, relu)
        assert same(kernels.conv(*arguments), reference.quantized_conv(*arguments))


@pytest.mark.parametrize("column", [0, 7, 8, 15, 40])
def test_one_pair_beyond_16_bits(kernels: QuantizedKernels, column: int) -> None:
    """Without VPDPBUSD, words in which no pair of weights of one sign exceeds 128 are multiplied by
    VPMADDUBSW as they are, and others are not: pairs at that limit and next to it, and words of
    either kind beside each other, at the border too."""
    x = make_integers((2, 64, 5, 6), torch.uint8, generator()) // 128 * 255
    x = x.contiguous(memory_format=NHWC)
    x[0] = 255
    quiet = torch.randint(-64, 65, (64, 64, 3, 3), generator=generator(1), dtype=torch.int8)
    bias = torch.arange(64, dtype=torch.int32) * 100
    pairs = [(64, 64), (65, 64), (127, 1), (127, 2), (-64, -64), (-64, -65), (-128, 0), (-128, -1)]
    for first, second in [*pairs, (-128, 127), (-128, -128), (127, 127)]:
        weight = quiet.clone()
        weight[column, 6:8, 1, 1] = torch.tensor([first, second])
        weight[column, 40:42, 0, 2] = torch.tensor([second, first])
        conv = Convolution(weight, (1, 1), (1, 1))
        # The sum of the first image's middle comes to 100, so that a single unit shows.
        middle = 255 * weight[column].sum(dtype=torch.int32)
        bias[column] = 100 - middle
        arguments = (x, QuantizedLayer(conv, bias, torch.ones(64)), None, True)
        expected = reference.quantized_conv(*arguments)
        assert expected[0, column, 2, 2] == 100
        assert same(kernels.conv(*arguments), expected), (first, second)


def test_halves_go_to_even(kernels: QuantizedKernels) -> None:
    """In the result, in what a residual adds and in what a projection adds."""
    values = list(range(256))
    one = Convolution(torch.ones(64, 1, 1, 1, dtype=torch.int8))
    zero = torch.zeros(64, dtype=torch.int32)
    halves, ones = torch.full((64,), 0.5), torch.ones(64)
    even = torch.tensor([round(v / 2) for v in values], dtype=torch.uint8)
    x = image(values)
    found = kernels.conv(x, QuantizedLayer(one, zero, halves), None, True)
    assert torch.equal(found[0, 5, 0], even)
    none = torch.zeros_like(x)
    residual = x.expand(1, 64, 1, 256).contiguous(memory_format=NHWC)
    for shortcut, projection in ((residual, None), (x, one)):
        added = kernels.conv(
            none,
            QuantizedLayer(one, zero, ones),
            QuantizedShortcut(shortcut, halves, projection),
            True,
        )
        assert torch.equal(added[0, 5, 0], even)


def test_nothing_is_clamped_before_the_end(kernels: QuantizedKernels) -> None:
    """A negative sum and one above 255 come back into the range by their shortcuts."""
    conv = Convolution(torch.full((64, 1, 1, 1), -2, dtype=torch.int8))
    x = image([200, 0])
    residual = image([255, 100]).expand(1, 64, 1, 2).contiguous(memory_format=NHWC)
    bias = torch.full((64,), 300, dtype=torch.int32)
    scale, half = torch.full((64,), 1.0), torch.full((64,), 0.5)
    layer = QuantizedLayer(conv, bias, half)
    found = kernels.conv(x, layer, QuantizedShortcut(residual, scale), True)
    assert found[0, 9, 0].tolist() == [78, 200]  # (300 - 400 + 255) / 2 = 77.5, (300 + 100) / 2


@pytest.mark.parametrize("height", [1, 2, 5, 8, 31, 64])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_stems(kernels: QuantizedKernels, threads: None, height: int, dtype: torch.dtype) -> None:
    for width, channels in ((1, 64), (13, 20), (30, 96), (75, 64)):
        for padded, layout in ((False, NHWC), (True, torch.contiguous_format)):
            case = STEM._replace(height=height, width=width, out_channels=channels)
            arguments = make_quantized_stem(
                case, generator(), MaxPool(), dtype=dtype, padding_value=padded
            )
            arguments[0] = arguments[0].contiguous(memory_format=layout)
            expected = reference.quantized_stem(*arguments)
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                assert same(kernels.stem(*arguments), expected), (width, channels, padded, count)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_heads(kernels: QuantizedKernels, threads: None, dtype: torch.dtype) -> None:
    for seed, (batch, channels, size, classes) in enumerate(
        [(1, 1, 1, 1), (2, 512, 1, 10), (3, 2048, 7, 130), (1, 19, 3, 5), (7, 600, 20, 65)]
    ):
        arguments = make_quantized_head(batch, channels, size, classes, generator(seed), dtype)
        arguments[0] = arguments[0].contiguous(memory_format=NHWC)
        arguments[3] *= 1.7  # quotients of it and the pixels are rounded
        expected = reference.quantized_head(*arguments)
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert same(kernels.head(*arguments), expected), (batch, channels, size, classes)


def test_a_head_of_many_pixels(kernels: QuantizedKernels) -> None:
    """Sums over pixels that need three bytes, and products with them that need 64 bits."""
    x = torch.full((1, 64, 300, 300), 255, dtype=torch.uint8).contiguous(memory_format=NHWC)
    weight = torch.full((2, 64), 127, dtype=torch.int8)
    weight[1] = -128
    arguments = [x, weight, torch.zeros(2), torch.full((2,), 1e-3)]
    assert same(kernels.head(*arguments), reference.quantized_head(*arguments))


def test_ops_run_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of the package's ops are the kernels', not the reference's."""
    called: list[str] = []
    for name in ("conv", "stem", "head"):
        real = getattr(QuantizedKernels, name)

        def spy(self: Any, *arguments: Any, name: str = name, real: Any = real) -> Tensor:
            called.append(name)
            return real(self, *arguments)

        monkeypatch.setattr(QuantizedKernels, name, spy)
    from resnet_fused.backends.cpu import create

    backend = create()
    with use_backend(backend):
        ops.quantized_conv(*make_quantized_conv(LAYERS["3x3"], generator()))
        ops.quantized_stem(*make_quantized_stem(STEM, generator(), MaxPool()))
        ops.quantized_head(*make_quantized_head(1, 8, 3, 5, generator()))
        # Not a ResNet's stem, and a projection with padding: the reference's.
        ops.quantized_stem(*make_quantized_stem(STEM, generator(), MaxPool(2, 2, 0)))
        arguments = make_quantized_conv(LAYERS["grouped"], generator(), "projection")
        ops.quantized_conv(*arguments)
    assert called == ["conv", "stem", "head"]


def test_an_edited_weight_is_packed_anew() -> None:
    arguments = make_quantized_conv(LAYERS["3x3"], generator())
    weight = arguments[1].conv.weight
    with use_backend("cpu"):
        before = ops.quantized_conv(*arguments)
        weight.neg_()
        after = ops.quantized_conv(*arguments)
    assert not torch.equal(before, after)
    assert torch.equal(after, reference.quantized_conv(*arguments))


@pytest.fixture(scope="module")
def network() -> resnet_fused.quantization.QuantizedNetwork:
    torch.manual_seed(0)
    model = resnet_fused.resnet50(num_classes=10).eval()
    images = torch.randint(0, 256, (4, 3, 64, 64), generator=generator(), dtype=torch.uint8)
    normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return resnet_fused.quantization.quantize(
        model, [images], normalization=normalization, progress=False
    )


@pytest.mark.parametrize("size", [64, 75])
def test_a_network_is_replayed_and_equals_the_reference(network: Any, size: int) -> None:
    x = torch.randint(0, 256, (2, 3, size, size), generator=generator(), dtype=torch.uint8)
    with use_backend("reference"):
        expected = network(x)
    with use_backend("cpu"):
        for _ in range(4):  # recorded on the way
            assert torch.equal(network(x), expected)
        steps = [entry.plan.steps for entry in network._plans._entries.values() if entry.plan]
        assert [len(plan) for plan in steps][-1] == 1  # one program, from the stem to the head


def test_a_plan_sees_an_edited_weight(network: Any) -> None:
    x = torch.randint(0, 256, (1, 3, 64, 64), generator=generator(), dtype=torch.uint8)
    weight = network.blocks[1][1].weight
    with use_backend("cpu"):
        for _ in range(4):
            before = network(x)
        weight.neg_()
        try:
            after = network(x)
            with use_backend("reference"):
                expected = network(x)
        finally:
            weight.neg_()
        assert torch.equal(after, expected)
        assert not torch.equal(after, before)


def chain(residuals: dict[int, int]) -> tuple[Any, list[Any], list[Tensor]]:
    """A program of five layers of one shape in a row, in which layer i adds the result number
    residuals[i] (0: the input); its layers, as the reference takes them; and its values."""
    case = ConvCase(2, 64, 7, 9, 64)
    x, *_ = make_quantized_conv(case, generator())
    layers, values, packed = [], [x], []
    scale = torch.full((64,), 3.0)
    recorder = _C.Recorder()
    for i in range(5):
        _, layer, *_ = make_quantized_conv(case, generator(i))
        packed.append(pack(_C, "quantized_conv", layer.conv.weight, 1))
        layers.append(layer)
        values.append(torch.empty_like(x))
        added = values[residuals[i]] if i in residuals else None
        recorder.start()
        _C.quantized_conv(
            tensor_arg(values[-1]),
            (tensor_arg(values[-2]), tensor_arg(packed[-1]), ((1, 1), (1, 1), (0, 0), (1, 1), 1)),
            tensor_arg(layer.bias),
            tensor_arg(layer.multiplier),
            None if added is None else tensor_arg(scale),
            None if added is None else tensor_arg(added),
        )
        recorder.stop()
    constants = [*packed, scale, *(tensor for layer in layers for tensor in layer[1:3])]
    ends = [tensor_arg(values[0])], [tensor_arg(values[-1])]
    program = recorder.program(0, 5, *ends, list(map(tensor_arg, constants)), 64)
    return program, layers, [scale, *constants]


@pytest.mark.parametrize(
    ("residuals", "kept"),
    [
        ({}, 2),
        ({2: 1}, 2),  # the last to read result 1 writes over it
        ({2: 1, 3: 1}, 3),  # result 1 lives on after the first
        ({3: 3}, 2),  # its own operand as well: no writing over it
        ({2: 0, 4: 1}, 3),  # neither the input nor the output is the arena's
    ],
)
def test_a_result_takes_the_memory_of_its_residual(residuals: dict[int, int], kept: int) -> None:
    program, layers, alive = chain(residuals)
    x = make_integers((2, 64, 7, 9), torch.uint8, generator(99)).contiguous(memory_format=NHWC)
    before = x.clone()
    expected = [x]
    for i, layer in enumerate(layers):
        shortcut = QuantizedShortcut(expected[residuals[i]], alive[0]) if i in residuals else None
        expected.append(reference.quantized_conv(expected[-1], layer, shortcut, True))
    out, arena = torch.empty_like(x), torch.empty(program.arena_bytes, dtype=torch.uint8)
    program.run([x.data_ptr(), out.data_ptr()], arena.data_ptr())
    assert torch.equal(out, expected[-1])
    assert torch.equal(x, before)
    size = -(-x.nbytes // 64) * 64
    assert (kept - 1) * size < program.arena_bytes <= kept * size


def conv_arguments(**changes: Any) -> dict[str, Any]:
    """What `quantized_conv` takes of a small layer with a residual."""
    x, layer, shortcut, relu = make_quantized_conv(
        ConvCase(1, 8, 5, 5, 16, 3, 1, 1), generator(), "identity"
    )
    packed = pack(_C, "quantized_conv", layer.conv.weight, 1)
    window = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    out = torch.empty_like(shortcut.x)
    arguments = {
        "out": tensor_arg(out),
        "layer": (tensor_arg(x), tensor_arg(packed), window),
        "bias": tensor_arg(layer.bias),
        "multiplier": tensor_arg(layer.multiplier),
        "shortcut_scale": tensor_arg(shortcut.scale),
        "residual": tensor_arg(shortcut.x),
    }
    _C.quantized_conv(**arguments)
    assert torch.equal(out, reference.quantized_conv(x, layer, shortcut, relu))
    for name, value in changes.items():
        part = arguments["layer"][:2] if name in ("x", "packed", "window") else None
        value = value(arguments[name]) if part is None and callable(value) else value
        if name == "x":
            value = (value(part[0]), part[1], window)
        elif name == "packed":
            value = (part[0], value(part[1]), window)
        elif name == "window":
            value = (*part, value)
        arguments["layer" if part else name] = value
    return arguments


def arg(shape: Any, dtype: torch.dtype) -> Any:
    tensor = torch.zeros(shape, dtype=dtype)
    return tensor_arg(tensor.contiguous(memory_format=NHWC) if tensor.dim() == 4 else tensor)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"out": arg((1, 16, 5, 5), torch.float32)}, "out must be uint8 or int8, found float32"),
        ({"out": arg((1, 16, 4, 5), torch.uint8)}, r"out must be of size \(1, 16, 5, 5\)"),
        ({"x": lambda x: arg((1, 8, 5, 5), torch.int32)}, "x must be uint8 or int8, found int32"),
        ({"x": lambda x: (*x[:3], (200, 25, 5, 1), x[4])}, "x must be dense and channels_last"),
        ({"packed": lambda p: arg((7,), torch.uint8)}, "packed must be of size"),
        ({"packed": lambda p: arg((7,), torch.float32)}, "packed must be uint8, found float32"),
        ({"window": ((3, 3), (0, 1), (1, 1), (1, 1), 1)}, "stride and dilation must be at least 1"),
        ({"window": ((3, 3), (1, 1), (1, 1), (1, 1), 3)}, "groups must divide 8 and 16 channels"),
        ({"bias": arg((16,), torch.float32)}, "bias must be int32, found float32"),
        ({"multiplier": arg((15,), torch.float32)}, r"multiplier must be of size \(16\)"),
        ({"multiplier": lambda m: (*m[:3], (2,), m[4])}, "multiplier must be contiguous"),
        ({"shortcut_scale": None}, "shortcut_scale goes with a residual or a projection"),
        ({"residual": None}, "shortcut_scale goes with a residual or a projection"),
        ({"residual": arg((1, 17, 5, 5), torch.uint8)}, "residual must have 1 to 16 channels"),
        ({"residual": arg((1, 16, 5, 5), torch.float32)}, "residual must be uint8 or int8"),
        ({"out": lambda o: None}, "incompatible function arguments"),
        ({"padding_value": arg((8,), torch.int8)}, "padding_value must be uint8, found int8"),
        ({"isa": "sse"}, 'isa must be "", "avx512vnni", "avxvnni", "avx2"'),
    ],
)
def test_the_bindings_refuse(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        _C.quantized_conv(**conv_arguments(**changes))


def test_a_projection_has_neither_padding_nor_groups() -> None:
    arguments = conv_arguments(residual=None)
    x, packed, window = arguments["layer"]
    with pytest.raises(ValueError, match="a projection has no padding"):
        _C.quantized_conv(**{**arguments, "projection": (x, packed, window)})


def test_weights_are_int8_and_not_empty() -> None:
    for shape, dtype, said in (
        ((4, 4, 1, 1), torch.uint8, "weight must be int8"),
        ((0, 4, 1, 1), torch.int8, "weight is empty"),
        ((4, 4, 1), torch.int8, "weight must have 4 dimensions"),
    ):
        with pytest.raises(ValueError, match=said):
            _C.quantized_conv_packed_bytes(tensor_arg(torch.zeros(shape, dtype=dtype)), 1)
    with pytest.raises(ValueError, match=r"weight must be of size \(64, 3, 7, 7\)"):
        _C.quantized_stem_packed_bytes(tensor_arg(torch.zeros(64, 3, 3, 3, dtype=torch.int8)))
