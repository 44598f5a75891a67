"""Quantised ops: their meaning beside integers counted one by one; backends, bit for bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import require
from torch import Tensor

from resnet_fused import ops, use_backend
from resnet_fused.backends import Candidate, Candidates
from resnet_fused.backends.autotune.verify import uninitialised_memory_is_nan
from resnet_fused.backends.reference import ReferenceBackend
from resnet_fused.ops import (
    Convolution,
    ImageQuantization,
    MaxPool,
    QuantizedLayer,
    QuantizedShortcut,
)
from resnet_fused.ops.registry import registered
from resnet_fused.reference import quantized as reference
from resnet_fused.reference.quantized import FLOAT8
from resnet_fused.testing.cases import CONV_CASES, ConvCase, generator
from resnet_fused.testing.quantized_cases import (
    SHORTCUTS,
    in_whole_numbers,
    make_quantized_conv,
    make_quantized_head,
    make_quantized_images,
    make_quantized_stem,
    random_quantized_conv,
)

Op = Callable[..., Tensor]


images_op = registered["quantized_images"]  # with the reference's signature


def counted(x: Tensor, conv: Convolution, padding: Tensor | None) -> np.ndarray:
    """Σ x · weight in Python's integers, window by window."""
    image, weight = x.numpy().astype(object), conv.weight.numpy().astype(object)
    (stride, _), (pad, _), (dilation, _), groups = conv[1:]
    n, c, h, w = image.shape
    border = np.zeros((n, c, h + 2 * pad, w + 2 * pad), object)
    if padding is not None:
        border += padding.numpy().astype(object)[:, None, None]
    border[:, :, pad : pad + h, pad : pad + w] = image
    k, per_group, r, s = weight.shape
    p, q = conv.output_size(h, w)
    out = np.zeros((n, k, p, q), object)
    for channel in range(k):
        first = channel // (k // groups) * per_group
        for i in range(p):
            for j in range(q):
                top, left = i * stride, j * stride
                window = border[
                    :,
                    first : first + per_group,
                    top : top + dilation * (r - 1) + 1 : dilation,
                    left : left + dilation * (s - 1) + 1 : dilation,
                ]
                out[:, channel, i, j] = (window * weight[channel]).sum((1, 2, 3))
    return out


def meaning(
    x: Tensor, layer: QuantizedLayer, shortcut: QuantizedShortcut | None, relu: bool
) -> np.ndarray:
    """The docstring of `reference.quantized`, of int8, written down again in NumPy's float32."""

    def per_channel(vector: Tensor) -> np.ndarray:
        return vector.numpy()[:, None, None]

    acc = counted(x, layer.conv, layer.padding_value) + per_channel(layer.bias).astype(object)
    if shortcut is not None:
        added = shortcut.x.numpy().astype(object)
        if shortcut.projection is not None:
            added = counted(shortcut.x, shortcut.projection, None)
        width = added.shape[1]
        scaled = added.astype(np.float32) * per_channel(shortcut.scale)[:width]
        acc[:, :width] += np.rint(scaled).astype(np.int64).astype(object)
    y = np.rint(acc.astype(np.float32) * per_channel(layer.multiplier))
    low, high = (0, 255) if relu else (-128, 127)
    return np.clip(y, low, high)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "signed"])
@pytest.mark.parametrize("padded", [False, True], ids=["zeros", "padding value"])
@pytest.mark.parametrize("name", ["3x3 strided", "grouped uneven", "3x3 dilated", "7x7 stem"])
def test_meaning_is_that_of_integers(name: str, padded: bool, relu: bool, shortcut: str) -> None:
    case = CONV_CASES[name]._replace(out_channels=6)
    dtype = torch.uint8 if relu else torch.int8
    arguments = make_quantized_conv(case, generator(), shortcut, dtype, padded, relu)
    found, expected = reference.quantized_conv(*arguments), meaning(*arguments)
    assert found.dtype == dtype
    assert np.array_equal(found.numpy().astype(np.float64), expected.astype(np.float64))
    ends = torch.iinfo(dtype)
    assert ends.min < expected.mean() < ends.max  # most are in range,
    assert {ends.min, ends.max} & {*expected.flatten()}  # and some clamped


def test_ties_go_to_even_and_big_sums_round_once() -> None:
    """x · 1/2 for x from 0 to 9, and an accumulator that float32 cannot hold."""
    x = torch.arange(10, dtype=torch.uint8).view(1, 1, 1, 10)
    conv = Convolution(torch.ones(1, 1, 1, 1, dtype=torch.int8))
    half = torch.full((1,), 0.5)
    layer = QuantizedLayer(conv, torch.zeros(1, dtype=torch.int32), half)
    found = ops.quantized_conv(x, layer).flatten().tolist()
    assert found == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4]
    bias = torch.tensor([2**30 + 32], dtype=torch.int32)  # a tie of float32, whose even is below
    large = QuantizedLayer(conv, bias, torch.full((1,), 2.0**-24))
    big = ops.quantized_conv(x, large, relu=False)
    assert big.flatten().tolist() == [64] * 10
    shortcut = torch.tensor([1, 3], dtype=torch.uint8).view(1, 1, 1, 2)
    layer = layer._replace(multiplier=2 * half)
    added = ops.quantized_conv(x[..., :2], layer, QuantizedShortcut(shortcut, half))
    assert added.flatten().tolist() == [0, 1 + 2]


def test_float8_rounds_where_the_contract_says() -> None:
    """Beside the exact sum in float64: one rounding to float32 each, one to e4m3."""
    arguments = make_quantized_conv(CONV_CASES["3x3"], generator(), "identity", FLOAT8)
    x, (conv, bias, multiplier, _), (shortcut, scale, _), _ = arguments
    exact = reference.accumulate(x, conv).numpy().astype(np.float32)
    vectors = [v.numpy()[:, None, None] for v in (bias, multiplier, scale)]
    acc = exact + vectors[0] + shortcut.float().numpy() * vectors[2]
    y = torch.from_numpy(np.maximum(acc * vectors[1], 0)).clamp(max=448).to(FLOAT8)
    found = ops.quantized_conv(*arguments)
    assert found.dtype == FLOAT8
    assert torch.equal(found.float(), y.float())
    huge = ops.quantized_conv(x, QuantizedLayer(conv, bias, multiplier * 1e6))
    assert huge.float().max() == 448  # saturates, and is no NaN


class Broken(ReferenceBackend):
    """Computes the reference's result, and one fault."""

    def __init__(self, fault: Op) -> None:
        self.name = "broken"
        self._fault = fault

    def quantized_conv(self, *arguments: Any) -> Candidates:  # type: ignore[override]
        return (Candidate("broken", lambda *a: self._fault(reference.quantized_conv(*a))),)


def differences(backend: Any, op: Op, expected: Op, arguments: list[Any]) -> int:
    """How many elements of the backend's result are not the reference's bits."""
    with use_backend(backend), uninitialised_memory_is_nan():
        found = op(*arguments)
    truth = expected(*arguments)
    assert (found.dtype, found.shape) == (truth.dtype, truth.shape)
    if found.dim() == 2 or (op is images_op and not channels_last(arguments[0])):
        assert found.is_contiguous()
    else:
        assert channels_last(found)
    bits = torch.int32 if truth.dtype == torch.float32 else torch.uint8
    unlike = found.view(bits) != truth.view(bits)
    return int((unlike & ~(found.isnan() & truth.isnan())).sum())  # NaNs have many bits


def channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def off_by_one(y: Tensor) -> Tensor:
    y[-1, -1, -1, -1] += 1
    return y


def test_a_planted_fault_shows() -> None:
    arguments = make_quantized_conv(CONV_CASES["3x3"], generator())
    compared = ops.quantized_conv, reference.quantized_conv, arguments
    assert differences(Broken(lambda y: y), *compared) == 0
    assert differences(Broken(off_by_one), *compared) == 1


@pytest.fixture
def triton() -> str:
    """The backend whose kernels take e4m3 numbers on every GPU."""
    require("triton", "cpu", FLOAT8)
    return "triton"


@pytest.fixture(params=["reference", "cpu", "triton", "cuda_sim"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Those that serve quantised tensors here."""
    require(request.param, "cpu", torch.uint8)
    monkeypatch.setenv("RESNET_FUSED_HOST_SIM_CAPABILITY", "90")  # which has a kernel for them
    return request.param


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("name", CONV_CASES)
def test_backends_equal_the_reference(backend: str, name: str, shortcut: str) -> None:
    arguments = make_quantized_conv(CONV_CASES[name], generator(), shortcut)
    assert differences(backend, ops.quantized_conv, reference.quantized_conv, arguments) == 0


STEMS = {
    "resnet": (ConvCase(2, 3, 37, 41, 64, 7, 2, 3), MaxPool()),
    "narrow": (ConvCase(1, 3, 9, 7, 20, 3, 1, 1), MaxPool(2, 2, 0)),
    "one pixel": (ConvCase(1, 3, 1, 1, 64, 7, 2, 3), MaxPool()),
}


@pytest.mark.parametrize("padded", [False, True], ids=["zeros", "padding value"])
@pytest.mark.parametrize("name", STEMS)
def test_stems_equal_the_reference(backend: str, name: str, padded: bool) -> None:
    case, pool = STEMS[name]
    arguments = make_quantized_stem(case, generator(), pool, padding_value=padded)
    arguments[0] = arguments[0].contiguous()  # images usually are NCHW
    assert differences(backend, ops.quantized_stem, reference.quantized_stem, arguments) == 0


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("name", CONV_CASES)
def test_whole_numbers_in_e4m3(triton: str, name: str, shortcut: str) -> None:
    arguments = make_quantized_conv(CONV_CASES[name], generator(), shortcut, FLOAT8)
    arguments = in_whole_numbers(arguments)
    assert differences(triton, ops.quantized_conv, reference.quantized_conv, arguments) == 0
    arguments[-1] = False
    assert differences(triton, ops.quantized_conv, reference.quantized_conv, arguments) == 0


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_any_numbers_in_e4m3(triton: str, shortcut: str) -> None:
    """What sums in float32 lose shows where it makes another e4m3 number, which is the next one."""
    case = CONV_CASES["3x3"]
    arguments = make_quantized_conv(case, generator(), shortcut, FLOAT8, True)
    with use_backend(triton):
        found = ops.quantized_conv(*arguments)
    truth = reference.quantized_conv(*arguments)
    far = (found.view(torch.uint8).int() - truth.view(torch.uint8).int()).abs()
    assert far.max() <= 1
    assert far.float().mean() < 1e-3


@pytest.mark.parametrize("padded", [False, True], ids=["zeros", "padding value"])
@pytest.mark.parametrize("name", STEMS)
def test_stems_in_e4m3(triton: str, name: str, padded: bool) -> None:
    case, pool = STEMS[name]
    arguments = make_quantized_stem(case, generator(), pool, dtype=FLOAT8, padding_value=padded)
    assert differences(triton, ops.quantized_stem, reference.quantized_stem, arguments) == 0
    planar = [arguments[0].view(torch.uint8).contiguous().view(FLOAT8), *arguments[1:]]
    assert differences(triton, ops.quantized_stem, reference.quantized_stem, planar) == 0


IMAGES = {"odd": (2, 3, 37, 41), "long": (3, 4, 48, 56), "one pixel": (1, 1, 1, 1)}


@pytest.mark.parametrize("float8", [False, True], ids=["uint8", "e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
@pytest.mark.parametrize("name", IMAGES)
def test_images_equal_the_reference(
    triton: str, name: str, layout: str, dtype: torch.dtype, float8: bool
) -> None:
    arguments = make_quantized_images(IMAGES[name], generator(), dtype, float8)
    x = arguments[0]
    if layout == "channels_last":
        arguments[0] = x.contiguous(memory_format=torch.channels_last)
    elif layout == "cropped":
        arguments[0] = torch.cat([x, x], 3)[..., : x.shape[3]]
    assert differences(triton, images_op, reference.quantized_images, arguments) == 0
    found = reference.quantized_images(*arguments)
    if dtype != torch.uint8 and x.numel() > 1:
        ends = reference.LIMITS[found.dtype]
        assert (found.float().min(), found.float().max()) == ends


def test_images_are_rounded_as_by_hand() -> None:
    """Halves to even, behind a division and an addition in float32 each; the ends."""
    x = torch.tensor([0.5, 1.5, 2.5, -1000.0, 1000.0, torch.nan]).view(1, 1, 1, 6)
    one, ten = torch.ones(1), torch.full((1,), 10.0)
    whole, thirds = ImageQuantization(one, ten), ImageQuantization(ten / 3, ten)
    assert ops.quantized_images(x, whole).flatten().tolist() == [10, 12, 12, 0, 255, 0]
    assert ops.quantized_images(x, thirds).flatten().tolist() == [10, 10, 11, 0, 255, 0]
    levels = torch.tensor([0, 100, 101], dtype=torch.uint8).view(1, 1, 1, 3)
    mean, std = 100 * one, 2 * one
    of_bytes = ImageQuantization(one, 0 * one, mean, std)
    found = ops.quantized_images(levels, of_bytes, FLOAT8)
    assert found.flatten().tolist() == [-48.0, 0.0, 0.5]  # -50 lies between -48 and -52
    with pytest.raises(ValueError, match="mean and std go with images of bytes"):
        ops.quantized_images(levels, whole)
    with pytest.raises(ValueError, match=r"scale must have shape \(2,\)"):
        ops.quantized_images(x.expand(1, 2, 1, 6), whole)
    with pytest.raises(TypeError, match=r"found torch\.int32"):
        ops.quantized_images(x.int(), whole)
    with pytest.raises(TypeError, match="dtype must be uint8 or float8_e4m3fn"):
        ops.quantized_images(x, whole, dtype=torch.int8)


def test_nan_stays_one_in_e4m3(triton: str) -> None:
    """In an image, a layer and the logits. Of the stem, whose window rows are filled up with zero
    weights, it may reach windows beside it, but no other image."""
    images = make_quantized_images((2, 3, 9, 7), generator(), float8=True)
    images[0][1, 2, 3, 3] = torch.nan
    assert differences(triton, images_op, reference.quantized_images, images) == 0
    case = ConvCase(2, 3, 9, 7, 20, 3, 1, 1)
    stem = make_quantized_stem(case, generator(), MaxPool(), dtype=FLOAT8)
    stem[0] = reference.quantized_images(*images).float().round().to(FLOAT8)
    pooled = reference.quantized_stem(*stem)
    with use_backend(triton):
        found = ops.quantized_stem(*stem)
    assert 0 < pooled[1].isnan().sum() <= found[1].isnan().sum() < found[1].numel()
    assert not found[0].isnan().any()
    assert torch.equal(found.float()[~found.isnan()], pooled.float()[~found.isnan()])
    case = ConvCase(2, 20, 5, 4, 16, 3, 1, 1)
    layer = in_whole_numbers(make_quantized_conv(case, generator(), dtype=FLOAT8))
    layer[0] = pooled.float().round().to(FLOAT8)
    assert differences(triton, ops.quantized_conv, reference.quantized_conv, layer) == 0
    head = [pooled, *make_quantized_head(2, 20, 3, 5, generator(), FLOAT8)[1:]]
    assert differences(triton, ops.quantized_head, reference.quantized_head, head) == 0
    assert reference.quantized_head(*head).isnan().all(1).tolist() == [False, True]


HEADS = [(2, 512, 1, 10), (3, 2048, 7, 33), (1, 19, 3, 5), (2, 70, 12, 65)]


@pytest.mark.parametrize(("batch", "channels", "size", "classes"), HEADS)
def test_heads_in_e4m3(triton: str, batch: int, channels: int, size: int, classes: int) -> None:
    """Bit for bit, as the sums of integers that they are."""
    arguments = make_quantized_head(batch, channels, size, classes, generator(), FLOAT8)
    assert differences(triton, ops.quantized_head, reference.quantized_head, arguments) == 0


def test_heads_of_the_largest_e4m3_numbers(triton: str) -> None:
    """Sums of 24 bits times 18 bits, 2048 of them, which no float32 sum holds."""
    x = torch.full((1, 2048, 7, 7), 448.0).to(FLOAT8)
    x.view(torch.uint8)[:, ::2] = 0xC0 - 1  # -1.875
    x.view(torch.uint8)[:, 1, 0, 0] = 1  # the smallest, 2**-9
    weight = torch.full((2, 2048), -448.0).to(FLOAT8)
    weight.view(torch.uint8)[1, ::3] = 1
    arguments = [x, weight, torch.zeros(2), torch.ones(2)]
    assert differences(triton, ops.quantized_head, reference.quantized_head, arguments) == 0


@pytest.mark.parametrize("dtype", [torch.uint8, FLOAT8], ids=["uint8", "e4m3"])
def test_64_bit_offsets_change_nothing(
    triton: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resnet_fused.backends.triton import launching

    monkeypatch.setattr(launching, "_NARROW_ELEMENTS", 0)
    monkeypatch.setattr(launching, "_plans", {})
    float8 = dtype == FLOAT8
    images = make_quantized_images((2, 3, 37, 41), generator(), torch.float32, float8)
    assert differences(triton, images_op, reference.quantized_images, images) == 0
    stem = make_quantized_stem(*STEMS["resnet"][:1], generator(), MaxPool(), dtype=dtype)
    assert differences(triton, ops.quantized_stem, reference.quantized_stem, stem) == 0
    head = make_quantized_head(2, 70, 12, 65, generator(), dtype)
    assert differences(triton, ops.quantized_head, reference.quantized_head, head) == 0


def test_every_e4m3_number_and_every_kind_of_rounding(triton: str) -> None:
    """What a 1×1 layer of the weight 1 reads, and what it writes of float32 numbers: ties, their
    neighbours, subnormal numbers, the ends. Interpreted, and on a GPU before sm_89, by integer
    instructions; Triton's interpreter rounds subnormal e4m3 numbers otherwise by itself."""
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).view(FLOAT8)
    one, zero = torch.ones(1), torch.zeros(1)
    layer = QuantizedLayer(Convolution(one.to(FLOAT8).view(1, 1, 1, 1)), zero, one)
    assert (
        differences(triton, ops.quantized_conv, reference.quantized_conv, [x, layer, None, False])
        == 0
    )
    values = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()
    ties = (values[1:] + values[:-1]) / 2
    near = [torch.nextafter(ties, torch.tensor(end)) for end in (0.0, 1000.0)]
    positive = torch.cat([ties, *near, torch.tensor([2.0**-11, 1e-40, 1e30, torch.inf])])
    bias = torch.cat([positive, -positive, torch.tensor([torch.nan])])
    weight = torch.zeros(len(bias), 1, 1, 1).to(FLOAT8)
    layer = QuantizedLayer(Convolution(weight), bias, torch.ones(len(bias)))
    for relu in (False, True):
        arguments = [torch.ones(1, 1, 1, 1).to(FLOAT8), layer, None, relu]
        assert differences(triton, ops.quantized_conv, reference.quantized_conv, arguments) == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=["uint8", "int8"])
@pytest.mark.parametrize(("batch", "channels", "size", "classes"), HEADS)
def test_heads_equal_the_reference(
    backend: str, batch: int, channels: int, size: int, classes: int, dtype: torch.dtype
) -> None:
    arguments = make_quantized_head(batch, channels, size, classes, generator(), dtype)
    assert differences(backend, ops.quantized_head, reference.quantized_head, arguments) == 0


def test_heads_do_not_wrap(backend: str) -> None:
    """The largest sum of a ResNet-50's head, which int32 cannot hold, and its negative."""
    x = torch.full((1, 2048, 7, 7), 255, dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.full((2, 2048), 127, dtype=torch.int8)
    weight[1] = -127
    arguments = [x, weight, torch.zeros(2), torch.full((2,), 2.0**-20)]
    assert differences(backend, ops.quantized_head, reference.quantized_head, arguments) == 0
    assert reference.quantized_head(*arguments)[0, 0] > 0


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_random_layers_equal_the_reference(backend: str, first: int) -> None:
    for seed in range(first, first + 20):
        arguments = random_quantized_conv(seed)
        found = differences(backend, ops.quantized_conv, reference.quantized_conv, arguments)
        assert found == 0, f"seed {seed}: {arguments[1].conv[1:]}, x {tuple(arguments[0].shape)}"


def test_weights_are_not_kept_alive(backend: str) -> None:
    """A 1×1 weight is dense as it is: what is kept of it must not be the weight itself."""
    x, layer, *others = make_quantized_conv(ConvCase(1, 32, 4, 4, 32), generator())
    with use_backend(backend):
        ops.quantized_conv(x, layer, *others)
    gone = weakref.ref(layer.conv.weight)
    del layer
    gc.collect()
    assert gone() is None


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_random_layers_equal_the_reference(backend: str) -> None:
    for first in range(100, 2100, 20):
        test_random_layers_equal_the_reference(backend, first)


@pytest.mark.parametrize("name", ["none", "identity", "projection", "stem", "images", "head"])
def test_compiles_without_a_graph_break(name: str) -> None:
    torch.compiler.reset()
    op: Op = ops.quantized_conv
    if name == "stem":
        op, arguments = (
            ops.quantized_stem,
            make_quantized_stem(*STEMS["narrow"][:1], generator(), MaxPool()),
        )
    elif name == "images":
        op, arguments = images_op, make_quantized_images((2, 3, 5, 7), generator())
    elif name == "head":
        op, arguments = ops.quantized_head, make_quantized_head(2, 8, 3, 5, generator())
    else:
        arguments = make_quantized_conv(CONV_CASES["3x3"], generator(), name)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(compiled, op(*arguments))


def test_autocast_leaves_scales_alone() -> None:
    arguments = make_quantized_conv(CONV_CASES["3x3"], generator(), "identity")
    expected = ops.quantized_conv(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.quantized_conv(*arguments), expected)


def test_empty_batches_give_empty_results() -> None:
    x, *others = make_quantized_conv(CONV_CASES["3x3"], generator(), relu=False)
    assert ops.quantized_conv(x[:0], *others).shape == (0, 32, 8, 8)
    assert ops.quantized_conv(x[:0], *others).dtype == torch.int8
    head = make_quantized_head(1, 8, 3, 5, generator())
    assert ops.quantized_head(head[0][:0], *head[1:]).dtype == torch.float32
    images, *given = make_quantized_images((1, 3, 5, 7), generator())
    assert images_op(images[:0], *given).dtype == torch.uint8


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"x": lambda x: x.float()}, TypeError, "input must be uint8 or int8"),
        ({"x": lambda x: x[0]}, ValueError, "4-dimensional"),
        ({"x": lambda x: x[:, :3]}, ValueError, "input has 3 channels"),
        (
            {"conv": lambda c: c._replace(weight=c.weight.int())},
            TypeError,
            "weight must be int8",
        ),
        ({"bias": lambda b: b.float()}, TypeError, "bias must be int32"),
        ({"multiplier": lambda m: m[:3]}, ValueError, r"multiplier must have shape \(32,\)"),
        ({"multiplier": lambda m: m.double()}, TypeError, "multiplier must be float32"),
        ({"shortcut": lambda s: s[:, :, :2]}, ValueError, "shortcut must have shape"),
        ({"shortcut": lambda s: s.float()}, TypeError, "shortcut must be uint8 or int8"),
        ({"scale": lambda s: s[:3]}, ValueError, r"shortcut.scale must have shape \(32,\)"),
        (
            {"padding_value": lambda p: torch.zeros(3, dtype=torch.uint8)},
            ValueError,
            "padding_value",
        ),
    ],
)
def test_errors_name_the_argument(
    change: dict[str, Callable[[Any], Any]], error: type[Exception], said: str
) -> None:
    x, layer, shortcut, relu = make_quantized_conv(CONV_CASES["3x3"], generator(), "identity")
    given = {"x": x, "shortcut": shortcut.x, "scale": shortcut.scale, **layer._asdict()}
    x, added, scale, *fields = {
        name: change[name](value) if name in change else value for name, value in given.items()
    }.values()
    with pytest.raises(error, match=said):
        ops.quantized_conv(x, QuantizedLayer(*fields), QuantizedShortcut(added, scale), relu)
