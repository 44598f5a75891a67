"""The quantised convolutions: their machine code, and their results, simulated, bit for bit.

test_quantized_ops.py holds every backend to the reference; here are the cases that only these
kernels have. Of e4m3 numbers, operands are small integers where results are to be the reference's
bits: of those the tensor cores and float32 round nothing away.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import pytest
import torch
from machine_code import cuobjdump, kernels
from torch import Tensor

import resnet_fused
from resnet_fused import ops, use_backend
from resnet_fused._extension import tensor_arg
from resnet_fused.backends import autotune
from resnet_fused.backends.cuda_sim import SimulatedBackend
from resnet_fused.parameters import Convolution, QuantizedLayer, QuantizedShortcut
from resnet_fused.quantization import quantize
from resnet_fused.reference import quantized as reference
from resnet_fused.reference.quantized import FLOAT8
from resnet_fused.testing.cases import ConvCase, generator, randomise_statistics
from resnet_fused.testing.quantized_cases import (
    in_whole_numbers,
    make_integers,
    make_quantized_conv,
)

SM90_TILES = ("m128n64", "m128n128", "m128n128_cluster", "m128n256_cluster")
SM80_TILES = ("m64n64_sm80", "m128n128_sm80")
TILES = SM90_TILES + SM80_TILES
FLOAT8_TILES = SM90_TILES[:3]
OF_TILE = 3  # kernels for each type: without shortcut, with a residual, with a projection
Runner = Callable[[], Tensor]


# Machine code


def test_nothing_spills(extension, architectures):
    if "90a" not in architectures:
        pytest.skip("built without sm_90a")
    usage = cuobjdump(extension, "--dump-resource-usage", "-arch=sm_90a")
    pattern = (
        r"quantized_conv_sm90_kernel\w*?TileILi(\d+)E\w*:\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)"
    )
    found = re.findall(pattern, usage)
    assert len(found) == OF_TILE * (2 * len(SM90_TILES) + len(FLOAT8_TILES))
    # The second number is what the kernels tell the simulator of registers at launch.
    assert set(found) == {
        ("64", "80", "0", "0"),
        *((columns, "168", "0", "0") for columns in ("128", "256")),
    }


def test_kernels_use_their_instructions(extension, architectures):
    """Products of bytes, bulk copies in both modes, multicast in clusters, and back; bytes packed
    and limited in one instruction; e4m3's sums of a step added in float32, with no multiplication
    fused."""
    if "90a" not in architectures:
        pytest.skip("built without sm_90a")
    bodies = kernels(extension, r"\w*quantized_conv_sm90_kernelI", "90a")
    assert len(bodies) == OF_TILE * (2 * len(SM90_TILES) + len(FLOAT8_TILES))
    pattern = r"\w*?quantized_conv_sm90_kernelI(h|a|13__nv_fp8_e4m3)NS\w*?TileI((?:L[ib]\d+E)+)E"
    for body in bodies:
        found = re.match(pattern, body)
        assert found is not None
        columns, _, _, cluster, *_ = re.findall(r"\d+", found[2])
        floats = found[1] not in "ha"
        first = "U8" if found[1] == "h" else "S8"
        assert (".MULTICAST" in body) == (cluster == "2")
        for instruction in (
            rf"QGMMA\.64x{columns}x32\.F32\.E4M3\.E4M3"
            if floats
            else rf"IGMMA\.64x{columns}x32\.{first}\.S8",
            r"UTMALDG\.2D",
            r"UTMALDG\.3D(\.MULTICAST)?\b",
            r"UTMALDG\.4D\.IM2COL",
            r"UTMASTG\.2D",
            r"USETMAXREG\.DEALLOC",
            r"USETMAXREG\.TRY_ALLOC",
            *([r"F2FP\.SATFINITE\.E4M3"] if floats else [r"F2IP\.U8\.F32", r"F2IP\.S8\.F32"]),
        ):
            assert re.search(instruction, body), instruction
        assert not re.search(r"LDL|STL|IMMA|LDGSTS|FFMA", body)
        if floats:  # a sum of each product's columns, and the bias
            assert len(re.findall("FADD", body)) >= int(columns)
        else:  # the next product starts before the last one has ended
            assert "WARPGROUP.DEPBAR.LE gsb0, 0x1" in body


def test_the_kernel_for_sm80_spills_nothing_and_uses_its_instructions(extension, architectures):
    if "80" not in architectures:
        pytest.skip("built without sm_80")
    usage = cuobjdump(extension, "--dump-resource-usage", "-arch=sm_80")
    found = re.findall(r"quantized_conv_kernelI\w*:\s+REG:\d+ STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert found == [("0", "0")] * 2 * OF_TILE * len(SM80_TILES)
    bodies = kernels(extension, r"\w*quantized_conv_kernelI", "80")
    assert len(bodies) == 2 * OF_TILE * len(SM80_TILES)
    for body in bodies:
        first = "U8" if "quantized_conv_kernelIh" in body else "S8"
        for instruction in (
            rf"IMMA\.16832\.{first}\.S8",
            r"LDSM\.16\.M88\.4",
            r"LDGSTS\.E\.BYPASS(\.LTC128B)?\.128",
            r"STG\.E\.128",
        ):
            assert re.search(instruction, body), instruction
        assert not re.search(r"LDL|STL|FFMA", body)


# Results


@pytest.fixture(params=TILES)
def tile(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.uint8, torch.int8], ids=["uint8", "int8"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def run(simulator: ModuleType, tile: str, arguments: list[Any]) -> Tensor:
    backend = SimulatedBackend(simulator, capability=80 if tile in SM80_TILES else 90)
    (candidate,) = (c for c in backend.quantized_conv(*arguments) if c.name == f"cuda {tile}")
    return candidate.launch(*arguments)


def check(simulator: ModuleType, tile: str, arguments: list[Any]) -> Tensor:
    """Holds the kernel against the reference, whose result this is."""
    expected = reference.quantized_conv(*arguments)
    found = run(simulator, tile, arguments)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    return expected


# Several tiles in each direction, tails in all of them, the windows of ResNets and others that
# im2col mode must get right, and more tiles than blocks, so that every ring turns over.
CASES = {
    "pointwise": ConvCase(2, 80, 13, 11, 144),
    "pointwise strided": ConvCase(1, 64, 27, 23, 80, stride=2),
    "3x3": ConvCase(1, 48, 14, 13, 144, 3, 1, 1),
    "3x3 strided": ConvCase(2, 32, 21, 15, 64, 3, 2, 1),
    "persistent": ConvCase(2, 144, 33, 35, 208),
    "dilated": ConvCase(3, 32, 21, 9, 64, 3, 1, 2, 2),
    "5x5 strided": ConvCase(3, 48, 9, 9, 64, 5, 2, 2),
    "few channels": ConvCase(2, 16, 6, 5, 16, 3, 1, 1),
}


def signed_shortcut(case: ConvCase, rng: torch.Generator, channels: int, stride: int) -> Tensor:
    """Of whole lines, of which every `stride`-th is added, and of int8."""
    height, width = case.output_size
    shape = (case.batch, channels, stride * height, stride * width)
    made = make_integers(shape, torch.int8, rng).contiguous(memory_format=torch.channels_last)
    return made[:, :, ::stride, ::stride]


@pytest.mark.parametrize("name", CASES)
def test_results_are_the_references_and_free_of_bank_conflicts(simulator, tile, dtype, name):
    for shortcut in ("none", "identity"):
        for relu in (True, False):
            arguments = make_quantized_conv(CASES[name], generator(), shortcut, dtype, relu=relu)
            expected = check(simulator, tile, arguments)
            low, high = (0, 255) if relu else (-128, 127)
            assert {low, high} <= {*expected.flatten().tolist()}  # clamped at either end
    counts = simulator.take_statistics()
    assert counts["products"] > 0
    assert (counts["bulk_copies"] > 0) == (tile in SM90_TILES)
    assert (counts["shared_requests"] > 0, counts["shared_conflicts"]) == (True, 0)


@pytest.mark.parametrize(
    ("name", "channels", "stride"),
    [("pointwise", 80, 2), ("3x3", 144, 1), ("persistent", 112, 3), ("few channels", 16, 2)],
)
def test_a_signed_strided_narrower_shortcut_is_added(
    simulator, tile, dtype, name, channels, stride
):
    rng = generator()
    arguments = make_quantized_conv(CASES[name], rng, "identity", dtype)
    unsigned = arguments[2]
    arguments[2] = unsigned._replace(x=signed_shortcut(CASES[name], rng, channels, stride))
    expected = check(simulator, tile, arguments)
    arguments[2] = unsigned
    assert not torch.equal(expected, reference.quantized_conv(*arguments))


@pytest.mark.parametrize("name", ["pointwise", "3x3", "persistent"])
def test_projections(simulator, tile, dtype, name):
    for side_channels in (48, 144):
        for relu in (True, False):
            arguments = make_quantized_conv(
                CASES[name],
                generator(),
                "projection",
                dtype,
                relu=relu,
                side_channels=side_channels,
            )
            check(simulator, tile, arguments)


def test_random_layers(simulator, tile):
    for seed in range(8):
        rng = generator(seed)

        def number(low: int, high: int, rng: torch.Generator = rng) -> int:
            return int(torch.randint(low, high + 1, (), generator=rng))

        kernel, dilation = (1, 3, 1, 3, 5)[number(0, 4)], number(1, 2)
        side = number(9, 20)
        case = ConvCase(
            number(1, 3),
            16 * number(1, 20),
            side,
            side + number(0, 5),
            16 * number(1, 20),
            kernel,
            number(1, 3),
            number(0, kernel // 2 * dilation),
            dilation,
        )
        if min(case.output_size) < 1:
            case = case._replace(height=side + 13, width=side + 13)
        arguments = make_quantized_conv(
            case,
            rng,
            ("none", "identity", "projection")[number(0, 2)],
            (torch.uint8, torch.int8)[number(0, 1)],
            relu=bool(number(0, 1)),
            side_channels=16 * number(1, 12),
        )
        check(simulator, tile, arguments)


# e4m3


@pytest.fixture(params=FLOAT8_TILES)
def float8_tile(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    ("name", "shortcut", "relu"),
    [
        ("3x3 strided", "none", True),
        ("pointwise strided", "identity", False),
        ("dilated", "identity", True),
        ("persistent", "projection", True),
        ("few channels", "projection", False),
    ],
)
def test_whole_numbers_in_e4m3(simulator, float8_tile, name, shortcut, relu):
    arguments = make_quantized_conv(CASES[name], generator(), shortcut, FLOAT8, relu=relu)
    if shortcut == "projection":
        rng = generator(1)
        height, width = CASES[name].output_size
        shape = (CASES[name].batch, 48, 2 * height - 1, 2 * width - 1)
        x = make_integers(shape, FLOAT8, rng)
        weight = make_integers((CASES[name].out_channels, 48, 1, 1), FLOAT8, rng)
        projection = arguments[2].projection._replace(weight=weight)
        arguments[2] = arguments[2]._replace(x=x, projection=projection)
    layer = arguments[1]
    arguments[1] = layer._replace(multiplier=layer.multiplier * 100)  # some beyond 448
    expected = check(simulator, float8_tile, in_whole_numbers(arguments)).float()
    assert expected.max() == 448
    assert expected.min() == (0 if relu else -448)
    counts = simulator.take_statistics()
    assert counts["shared_requests"] > 0
    assert counts["shared_conflicts"] == 0


@pytest.mark.parametrize("shortcut", ["none", "identity", "projection"])
def test_any_numbers_in_e4m3(simulator, float8_tile, shortcut):
    """Within what the tensor cores cut off, a 200th of the sums' standard deviation, which
    decides of a few results how they are rounded."""
    arguments = make_quantized_conv(
        CASES["3x3"], generator(), shortcut, FLOAT8, relu=False, side_channels=48
    )
    found = run(simulator, float8_tile, arguments).float()
    x, layer, *others = arguments
    error = 0.005 * layer.conv.weight[0].numel() ** 0.5
    low, high = (
        reference.quantized_conv(x, layer._replace(bias=layer.bias + sign * error), *others).float()
        for sign in (-1, 1)
    )
    assert ((low <= found) & (found <= high)).all()
    assert (low == high).float().mean() > 0.7


def test_sums_in_e4m3_are_of_float32(simulator, float8_tile):
    """Of 128 products of 9/8 · 9/8 the tensor cores cut nothing off; of all 18 · 128 they would cut
    a hundredth."""
    rng = generator()
    x = torch.full((1, 256, 9, 9), 1.125).to(FLOAT8).contiguous(memory_format=torch.channels_last)
    conv = Convolution(torch.full((32, 256, 3, 3), 1.125).to(FLOAT8), (1, 1), (1, 1))
    vectors = torch.zeros(32), 0.01 + 0.1 * torch.rand(32, generator=rng)
    check(simulator, float8_tile, [x, QuantizedLayer(conv, *vectors), None, True])


def test_waits_for_products_in_e4m3_are_needed(simulator):
    """As `test_every_wait_is_needed`; here each step waits for its own products, and its sums are
    used."""
    case = ConvCase(1, 144, 9, 128, 128)
    arguments = in_whole_numbers(make_quantized_conv(case, generator(), "none", FLOAT8))

    def launch() -> Tensor:
        return run(simulator, "m128n128", arguments)

    expected = launch()
    check_needed(simulator, launch, "skipped_mbarrier_wait", range(2))
    for wait in (1, 3):  # behind each of both steps' commits; those in between wait for less
        simulator.plant({"skipped_product_wait": wait})
        with contextlib.suppress(simulator.Fault):
            assert not torch.equal(launch().view(torch.uint8), expected.view(torch.uint8))
    simulator.plant()


def test_a_whole_network_in_e4m3(simulator, monkeypatch):
    """Its convolutions behind the first one; logits no farther from the reference's than two
    networks are whose roundings have nothing in common."""
    monkeypatch.setenv("RESNET_FUSED_HOST_SIM_CAPABILITY", "90")
    torch.manual_seed(0)
    model = randomise_statistics(resnet_fused.cifar.resnet20()).eval()
    images = torch.rand(2, 3, 16, 16, generator=generator()) * 4 - 1.5
    quantized = quantize(model, [images], FLOAT8, progress=False)
    with torch.no_grad(), use_backend("reference"):
        floats, expected = model(images), quantized(images)
    with torch.no_grad(), use_backend("cuda_sim"), autotune.tuner.watch() as decisions:
        found = quantized(images)
    chosen = [d.candidate.family for d in decisions if d.op == "quantized_conv"]
    assert (len(chosen), chosen.count("")) == (19, 1)  # the first one has three channels
    assert {*chosen} <= {"", *(f"cuda quantized {tile}" for tile in FLOAT8_TILES)}
    assert (found - expected).norm() < 2**0.5 * (expected - floats).norm()


def test_e4m3_is_for_sm_90a(simulator):
    arguments = make_quantized_conv(CASES["3x3"], generator(), "none", FLOAT8)
    assert {*listed(simulator, arguments)} == {f"cuda {name}" for name in FLOAT8_TILES}
    assert listed(simulator, arguments, capability=80) == []


def extremes(x: int, weight: int, dtype: torch.dtype, relu: bool) -> list[Any]:
    """The largest sums, of both signs by turns of the output channels, and a residual."""
    image = torch.full((1, 144, 9, 9), x, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weights = torch.full((64, 144, 3, 3), weight, dtype=torch.int8)
    weights[::2] = -weight
    residual = torch.full((1, 64, 9, 9), -128, dtype=torch.int8)
    residual = residual.contiguous(memory_format=torch.channels_last)
    bias = torch.arange(64, dtype=torch.int32) * 1000 - 32000
    multiplier = torch.logspace(-7, 3, 64)
    scale = torch.linspace(-3, 1000, 64)
    layer = QuantizedLayer(Convolution(weights, (1, 1), (1, 1)), bias, multiplier)
    return [image, layer, QuantizedShortcut(residual, scale), relu]


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "signed"])
@pytest.mark.parametrize(
    ("x", "weight", "dtype"),
    [(255, 127, torch.uint8), (255, -127, torch.uint8), (-128, -127, torch.int8)],
)
def test_extreme_values(simulator, tile, x, weight, dtype, relu):
    """Sums times multipliers reach beyond int32, too."""
    arguments = extremes(x, weight, dtype, relu)
    low, high = (0, 255) if relu else (-128, 127)
    assert {low, high} <= {*check(simulator, tile, arguments).flatten().tolist()}
    image, layer, *_ = arguments
    product = reference.accumulate(image, layer.conv).abs().amax((0, 2, 3)) * layer.multiplier
    assert product.max() > 2**32


def test_ties_go_to_even_and_big_sums_round_once(simulator, tile):
    """x / 2 for x from 0 to 15, and an accumulator that float32 cannot hold."""
    x = torch.zeros(1, 16, 1, 16, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0] = torch.arange(16)
    conv = Convolution(torch.zeros(16, 16, 1, 1, dtype=torch.int8))
    conv.weight[:, 0] = 1
    zero, half = torch.zeros(16, dtype=torch.int32), torch.full((16,), 0.5)
    found = check(simulator, tile, [x, QuantizedLayer(conv, zero, half), None, True])
    assert found[0, 3, 0].tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7, 8]
    bias, small = torch.full_like(zero, 2**30 + 32), torch.full((16,), 2.0**-24)
    found = check(simulator, tile, [x, QuantizedLayer(conv, bias, small), None, False])
    assert found[0, 15, 0].tolist() == [64] * 16
    shortcut = QuantizedShortcut(x.clone(), half)
    added = check(simulator, tile, [x, QuantizedLayer(conv, zero, 2 * half), shortcut, True])
    assert added[0, 0, 0, :4].tolist() == [0, 1, 2 + 1, 3 + 2]


def test_height_is_told_from_width(simulator, tile, dtype):
    """A window of 2 x 3 whose strides, paddings and dilations differ, too."""
    arguments = make_quantized_conv(ConvCase(2, 16, 11, 14, 32), generator(), "none", dtype)
    weight = make_integers((32, 16, 2, 3), torch.int8, generator(1))
    arguments[1] = arguments[1]._replace(conv=Convolution(weight, (1, 2), (2, 1), (3, 1)))
    check(simulator, tile, arguments)


def test_bytes_of_the_other_sign_give_other_results(simulator, tile):
    """So a kernel that took the one for the other would not pass."""
    arguments = make_quantized_conv(CASES["3x3"], generator(), "identity")
    expected = reference.quantized_conv(*arguments)
    x, layer, shortcut, relu = arguments
    for other in (
        [x.view(torch.int8), layer, shortcut, relu],
        [x, layer, shortcut._replace(x=shortcut.x.view(torch.int8)), relu],
    ):
        assert not torch.equal(run(simulator, tile, other), expected)


def test_a_missing_clamp_would_show():
    """Unlimited, the same values end in other bytes."""
    for relu in (True, False):
        x, layer, *_ = make_quantized_conv(CASES["3x3"], generator(), relu=relu)
        acc = reference.accumulate(x, layer.conv) + layer.bias[:, None, None]
        y = (acc.float() * layer.multiplier[:, None, None]).round().long()
        expected = reference.quantized_conv(x, layer, None, relu)
        wrapped = y.to(torch.uint8) if relu else y.to(torch.int8)
        assert not torch.equal(wrapped, expected)


# What the kernel leaves to others


def listed(simulator: ModuleType, arguments: list[Any], capability: int = 90) -> list[str]:
    backend = SimulatedBackend(simulator, capability=capability)
    return [candidate.name for candidate in backend.quantized_conv(*arguments)]


NOT_SERVED = {
    "channels": ConvCase(1, 24, 9, 9, 16),
    "out channels": ConvCase(1, 16, 9, 9, 24),
    "groups": ConvCase(1, 32, 9, 9, 32, groups=2),
}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_is_not_whole_chunks_is_not_served(simulator, name):
    arguments = make_quantized_conv(NOT_SERVED[name], generator())
    assert listed(simulator, arguments) == []
    check_served_anyway(simulator, arguments)


def check_served_anyway(simulator: ModuleType, arguments: list[Any]) -> None:
    with use_backend(SimulatedBackend(simulator, capability=90)):
        found = ops.quantized_conv(*arguments)
    assert torch.equal(found, reference.quantized_conv(*arguments))


# The second adds every second line, of images of an odd number of lines.
@pytest.mark.parametrize("name", ["stride", "dilation", "shortcut"])
def test_what_tensor_maps_cannot_express_is_left_to_the_kernel_for_sm80(simulator, name):
    case = {
        "stride": ConvCase(1, 16, 10, 10, 16, stride=9),
        "dilation": ConvCase(1, 16, 130, 130, 16, 2, 1, 0, 129),
        "shortcut": ConvCase(2, 32, 8, 8, 32, 3, 1, 1),
    }[name]
    arguments = make_quantized_conv(case, generator(), "option A" if name == "shortcut" else "none")
    assert {*listed(simulator, arguments)} == {f"cuda {name}" for name in SM80_TILES}
    check_served_anyway(simulator, arguments)


def test_other_gpus_and_layers_are_not_served(simulator):
    case = ConvCase(1, 32, 8, 8, 32, 3, 1, 1)
    plain = make_quantized_conv(case, generator())
    assert {*listed(simulator, plain)} == {f"cuda {name}" for name in TILES}
    assert {*listed(simulator, plain, capability=80)} == {f"cuda {name}" for name in SM80_TILES}
    assert listed(simulator, make_quantized_conv(case, generator(), padding_value=True)) == []
    projected = make_quantized_conv(case, generator(), "projection", side_channels=32)
    assert listed(simulator, projected)
    x, layer, shortcut, relu = projected
    mixed = shortcut._replace(x=shortcut.x.view(torch.int8))
    assert listed(simulator, [x, layer, mixed, relu]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": torch.zeros(32)}, "bias must be int32"),
        ({"relu": False}, "out must be int8, found uint8"),
        ({"multiplier": torch.zeros(31)}, r"multiplier must be of size \(32\)"),
        ({"shortcut_scale": torch.zeros(32)}, "shortcut_scale goes with a residual"),
        ({"out": torch.zeros(1, 32, 8, 8)}, "out must be uint8, found float32"),
        ({"residual": torch.zeros(1, 32, 8, 8)}, "shortcut_scale goes with a residual"),
    ],
)
def test_binding_refuses(simulator, changes, message):
    def nhwc(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    x = nhwc(torch.zeros(1, 32, 8, 8, dtype=torch.uint8))
    weight = nhwc(torch.zeros(32, 32, 1, 1, dtype=torch.int8))
    arguments = {
        "out": torch.zeros_like(x),
        "layer": None,
        "bias": torch.zeros(32, dtype=torch.int32),
        "multiplier": torch.zeros(32),
        "shortcut_scale": None,
        "residual": None,
        "projection": None,
        **changes,
    }
    relu = arguments.pop("relu", True)
    described = {k: None if v is None else tensor_arg(nhwc(v)) for k, v in arguments.items()}
    described["layer"] = (tensor_arg(x), tensor_arg(weight), ((1, 1), (0, 0), (1, 1)))
    with pytest.raises(ValueError, match=message):
        simulator.cuda_quantized_conv(
            **described, relu=relu, tile=simulator.QuantizedTile.m128n64, device=0, stream=0
        )


# Synchronisation


# Rows of 128 positions, as in test_host_sim.py: 18 tiles of 128 x 64, or 9 of 128 x 128, for 8 or 4
# blocks, so that the first blocks meet three of them and use each buffer again.
@pytest.fixture(params=SM90_TILES[:3])
def blocks(request: pytest.FixtureRequest, simulator: ModuleType) -> dict[str, Runner]:
    """Convolutions for which each block computes several tiles, of two steps."""
    case = ConvCase(1, 144, 9, 128, 128)

    def made(shortcut: str) -> Runner:
        arguments = make_quantized_conv(case, generator(), shortcut)
        if shortcut == "projection":
            x, layer, added, _ = arguments
            arguments[2] = added._replace(x=x, projection=layer.conv)
        return lambda: run(simulator, request.param, arguments)

    return {name: made(name) for name in ("none", "identity", "projection")}


@pytest.fixture
def takes_turns(request: pytest.FixtureRequest, blocks: dict[str, Runner]) -> bool:
    return request.node.callspec.params["blocks"] != "m128n64"


def check_needed(simulator: ModuleType, run: Runner, mistake: str, which: Iterable[int]) -> None:
    for number in which:
        simulator.plant({mistake: number})
        with pytest.raises(simulator.Fault):
            run()
    simulator.plant()


@pytest.mark.parametrize("name", ["none", "identity", "projection"])
def test_every_wait_is_needed(simulator, blocks, takes_turns, name):
    """But for those for what is there anyway: a skipped wait that passes would change no result
    here and yet be a race on hardware."""
    run = blocks[name]
    expected = run()
    counts = simulator.take_statistics()
    steps = 4 if name == "projection" else 2
    of_tile = steps + 2  # a consumer's waits: steps, vectors, the result's place
    waits = set(range(counts["mbarrier_waits"]))
    # The last ones of tiles are for the result's place, free from the start where there is no
    # residual, as often as there are such places.
    free = set() if name == "identity" else {steps + 1}
    if takes_turns:
        # The first consumer has two of three tiles, each with a place of its own, and waits for its
        # second turn. With two steps it could tell the phases of its stages apart without.
        assert len(waits) == 2 * of_tile + 1
        free |= {of_tile}
    else:
        assert len(waits) == 3 * of_tile
        free |= set() if name == "identity" else {2 * of_tile - 1}
    check_needed(simulator, run, "skipped_mbarrier_wait", waits - free)
    check_needed(simulator, run, "skipped_named_barrier", range(counts["named_barriers"]))
    check_needed(simulator, run, "skipped_proxy_fence", range(counts["proxy_fences"]))
    # Of the first tile: before step 1, a race where its stage is filled again, and at the end, when
    # the registers still hold what stands for no number.
    for wait in (1, 2):
        simulator.plant({"skipped_product_wait": wait})
        with contextlib.suppress(simulator.Fault):
            assert not torch.equal(run(), expected)
    assert counts["store_waits"] == 3
    check_needed(simulator, run, "skipped_store_wait", range(3))
    check_needed(simulator, run, "skipped_register_release", [0])
    check_needed(simulator, run, "bytes_not_expected", [128])
    clustered = counts["cluster_barriers"] > 0
    check_needed(simulator, run, "skipped_cluster_barrier", range(2 * clustered))


@pytest.mark.parametrize("name", ["identity", "projection"])
def test_results_are_the_same_in_every_order(simulator, blocks, name):
    expected = blocks[name]()
    for seed in range(1, 5):
        simulator.set_schedule(seed)
        assert torch.equal(blocks[name](), expected)


def test_the_kernel_names_the_barrier_that_it_gives_up_at(simulator, blocks):
    simulator.set_spin_limit(1000)
    try:
        simulator.plant({"skipped_arrival": 0})
        with pytest.raises(
            simulator.Fault, match=r"traps: quantized_conv_sm90 gave up: .* operands"
        ):
            blocks["identity"]()
    finally:
        simulator.set_spin_limit()


# Whole networks; test_quantization.py has the others


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize(("name", "convolutions"), [("resnet18", 16), ("resnet50", 48)])
def test_a_whole_network_equals_the_reference(
    simulator, monkeypatch, name, convolutions, capability
):
    monkeypatch.setenv("RESNET_FUSED_HOST_SIM_CAPABILITY", capability)
    torch.manual_seed(0)
    model = randomise_statistics(getattr(resnet_fused, name)(num_classes=10)).eval()
    images = torch.rand(2, 3, 33, 33, generator=generator()) * 4 - 1.5
    quantized = quantize(model, [images], progress=False)
    with torch.no_grad(), use_backend("reference"):
        expected = quantized(images)
    simulator.take_statistics()
    with torch.no_grad(), use_backend("cuda_sim"), autotune.tuner.watch() as decisions:
        found = quantized(images)
    assert expected.std() > 0
    assert torch.equal(found, expected)
    chosen = [d.candidate.family for d in decisions if d.op == "quantized_conv"]
    assert len(chosen) == convolutions  # three or four of them with their projections
    tiles = SM80_TILES if capability == "80" else SM90_TILES
    assert {*chosen} <= {f"cuda quantized {tile}" for tile in tiles}
    counts = simulator.take_statistics()
    assert counts["products"] > 0
    assert (counts["bulk_copies"] > 0) == (capability == "90")
