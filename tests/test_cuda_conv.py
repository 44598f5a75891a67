"""The CUDA convolution kernels: their machine code, their sources, and their results, simulated.

test_ops.py holds them to the contract with every backend; here are the cases that only they have.
"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import one_half
from machine_code import cuobjdump, kernels
from torch import Tensor

import resnet_fused
from resnet_fused import use_backend
from resnet_fused._extension import optional_tensor_arg, tensor_arg
from resnet_fused.backends import autotune, cuda, has_tensor_memory
from resnet_fused.backends.arguments import batch_norm_arg
from resnet_fused.backends.cuda import CudaBackend
from resnet_fused.backends.cuda_sim import SimulatedBackend
from resnet_fused.numerics import assert_contract, cast, check_op
from resnet_fused.parameters import BatchNorm, ConvBn, Convolution, MaxPool, QuantizedLayer
from resnet_fused.reference import ops as reference
from resnet_fused.reference.convolution import convolve
from resnet_fused.testing.cases import (
    CONV_CASES,
    ConvCase,
    generator,
    make_batch_norm,
    make_convolution,
    make_identity,
    make_integers,
    make_residual,
    randomise_statistics,
)
from resnet_fused.testing.on import On

ROOT = Path(__file__).resolve().parents[1]
TILES = ("m64n64", "m128n64", "m128n128")
# Per architecture: for each 16-bit type 3 tiles, 2 with projection, and 2 for single channels;
# for float32 both kinds of channels with and without projection; for TF32 2 tiles, 1 with
# projection.
EXACT_KERNELS = 4
TF32_KERNELS = 3
TF32_TILES = TILES[:2]
KERNELS = 2 * (3 + 2 + 2) + EXACT_KERNELS + TF32_KERNELS
# For sm_90a: for each 16-bit type every tile with and without projection.
SM90_TILES = (
    "m128n64_sm90",
    "m128n128_sm90",
    "m128n128_sm90_pingpong",
    "m128n256_sm90_cluster",
    "m256n128_sm90_cluster",
)
SM90_KERNELS = 2 * 2 * 2 * len(SM90_TILES)  # each with and without the result's signs
# Tiles whose K loop the blocks of a cluster share, by their number; each has a kernel for each
# 16-bit type, with and without projection.
SPLIT_TILES = {f"m64n64_sm90_split{n}": n for n in (2, 4, 8)}
SPLIT_KERNELS = 2 * 2 * len(SPLIT_TILES)
# Tiles of whole lines, by the widest one that they take.
LINE_TILES = {"m200n128_sm90_lines": 28, "m224n128_sm90_lines": 16}

NHWC = torch.channels_last


# Machine code


def test_nothing_spills(extension, architectures):
    usage = cuobjdump(extension, "--dump-resource-usage")
    found = re.findall(r"conv_bn_kernel\w*:\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert len(found) == KERNELS * len(architectures)
    assert {(stack, local) for _, stack, local in found} == {("0", "0")}


def test_tensor_core_kernels_use_their_instructions(extension, architectures):
    """Matrix products, matrix loads, asynchronous 16-byte copies; 16 bytes in each store."""
    bodies = kernels(extension, r"\w*conv_bn_kernelI(?!f)", *architectures)
    assert len(bodies) == (KERNELS - EXACT_KERNELS) * len(architectures)
    tf32 = [f for f in bodies if re.match(r"\w*conv_bn_kernelI\w*?4Tf32", f)]
    assert len(tf32) == TF32_KERNELS * len(architectures)
    for body in bodies:
        vectorised = re.match(r"\w*?conv_bn_kernelI\w*?EEELb(\d)E", body)
        assert vectorised is not None
        product = "HMMA.1688.F32.TF32" if body in tf32 else "HMMA.16816.F32"
        for instruction in (product, "LDSM.16.M88.4", "STG.E.128"):
            assert instruction in body
        assert ("LDGSTS.E.BYPASS" in body) == (vectorised[1] == "1")
        assert "LDL" not in body
        assert "STL" not in body


def test_stem_spills_nothing(extension, architectures):
    usage = cuobjdump(extension, "--dump-resource-usage")
    found = re.findall(r"stem_(?:sm90_)?kernel\w*:\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert len(found) == 4 * len(architectures) + 8 * ("90a" in architectures)
    for registers, stack, local in found:
        assert int(registers) <= 128  # two blocks of 256 threads
        assert (stack, local) == ("0", "0")


def test_sm90_kernels_spill_nothing(extension, architectures):
    if "90a" not in architectures:
        pytest.skip("built without sm_90a")
    usage = cuobjdump(extension, "--dump-resource-usage", "-arch=sm_90a")
    tile = r"TileILi(\d+)ELi(\d+)E"
    pattern = rf"conv_bn_sm90_kernel\w*?{tile}\w*:\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)"
    found = re.findall(pattern, usage)
    assert len(found) == SM90_KERNELS
    # The third number is what the kernels tell the simulator of registers at launch.
    assert set(found) == {
        ("128", "64", "80", "0", "0"),
        *((m, n, "168", "0", "0") for m, n in (("128", "128"), ("128", "256"), ("256", "128"))),
    }
    split = re.findall(
        r"conv_bn_sm90_split_kernel\w*:\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage
    )
    assert len(split) == SPLIT_KERNELS
    assert {(stack, local) for _, stack, local in split} == {("0", "0")}
    assert max(int(registers) for registers, *_ in split) <= 96
    lines = re.findall(
        r"conv_bn_sm90_lines_kernel\w*:\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage
    )
    assert lines == [("168", "0", "0")] * 2 * len(LINE_TILES)


def test_sm90_kernels_use_their_instructions(extension, architectures):
    """Products of a warpgroup, bulk copies in both modes, multicast in clusters, and back;
    registers handed over."""
    if "90a" not in architectures:
        pytest.skip("built without sm_90a")
    bodies = kernels(extension, r"\w*conv_bn_sm90_kernelI", "90a")
    assert len(bodies) == SM90_KERNELS
    for body in bodies:
        tile = re.match(r"\w*?TileI((?:L[ib]\d+E)+)E", body)
        assert tile is not None
        _, columns, _, _, _, cluster, *_ = re.findall(r"\d+", tile[1])
        assert (".MULTICAST" in body) == (cluster == "2")
        for instruction in (
            rf"HGMMA\.64x{columns}x16\.F32",
            r"UTMALDG\.2D",
            r"UTMALDG\.3D(\.MULTICAST)?\b",
            r"UTMALDG\.4D\.IM2COL",
            r"UTMASTG\.2D",
            r"USETMAXREG\.DEALLOC",
            r"USETMAXREG\.TRY_ALLOC",
        ):
            assert re.search(instruction, body), instruction
        assert not re.search(r"LDL|STL|HMMA|LDGSTS", body)
        # The next product starts before the last one has ended.
        assert "WARPGROUP.DEPBAR.LE gsb0, 0x1" in body


def test_split_kernels_use_their_instructions(extension, architectures):
    """Products, bulk copies, a barrier of the cluster, and 16-byte loads of its shared memory."""
    if "90a" not in architectures:
        pytest.skip("built without sm_90a")
    bodies = kernels(extension, r"\w*conv_bn_sm90_split_kernelI", "90a")
    assert len(bodies) == SPLIT_KERNELS
    for body in bodies:
        found = re.match(r"\w*?split_kernelI\w*?Li(\d)ELb([01])E", body)
        assert found is not None
        splits, projection = map(int, found.groups())
        for instruction in (
            r"HGMMA\.64x64x16\.F32",
            r"UTMALDG\.2D",
            r"UTMALDG\.3D",
            r"UTMALDG\.4D\.IM2COL",
            r"UCGABAR_ARV",
            r"UCGABAR_WAIT",
            r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1",
        ):
            assert re.search(instruction, body), instruction
        assert not re.search(r"LDL|STL|HMMA|LDGSTS|ATOM|RED\.", body)
        # Every block's part of what a thread adds up, of each product.
        assert len(re.findall(r"\bLD\.E\.128", body)) == 8 * (1 + projection), splits


def test_line_kernels_use_their_instructions(extension, architectures):
    """Wide products, the window's three lines without a copy between; bulk copies and stores."""
    if "90a" not in architectures:
        pytest.skip("built without sm_90a")
    bodies = kernels(extension, r"\w*conv_bn_sm90_lines_kernelI", "90a")
    assert len(bodies) == 2 * len(LINE_TILES)
    for body in bodies:
        positions = re.match(r"\w*?lines_kernelI\w*?Li(\d+)E", body)
        assert positions is not None
        # Three taps' four depths; that of the last one of a tile is waited for apart.
        assert len(re.findall(rf"HGMMA\.64x{positions[1]}x16\.F32", body)) == 12
        for instruction in (r"UTMALDG\.3D", r"UTMASTG\.4D", r"STSM\.16\.MT88\.4"):
            assert re.search(instruction, body), instruction
        assert len(re.findall(r"UTMALDG\.4D\.IM2COL", body)) == 1
        assert not re.search(r"LDL|STL|HMMA|LDGSTS", body)
        assert "WARPGROUP.DEPBAR.LE gsb0, 0x1" in body


# Sources


SOURCES = sorted((ROOT / "csrc" / "kernels").glob("*/*.c*"))
KERNEL_FILES = [path for path in SOURCES if path.suffix in (".cpp", ".cu")]


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_kernels_include_no_framework(path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folders = [ROOT / "csrc" / "host_sim" / "include", ROOT / "csrc"]
    command = [compiler, "-std=c++17", "-DRESNET_FUSED_HOST_SIM", "-M", "-xc++", path]
    command += [f"-I{folder}" for folder in folders]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    included = done.stdout.replace("\\\n", " ").split()[1:]
    assert str(path) in included
    for header in included:
        assert not re.search(r"torch|pybind11|Python\.h|/bindings/", header.removeprefix(str(ROOT)))


def test_assembly_stands_apart():
    holders = {
        path.name
        for path in (ROOT / "csrc" / "kernels" / "cuda").iterdir()
        if re.search(r"\basm\b", path.read_text())
    }
    assert holders == {"ptx.cuh", "ptx_bytes.cuh", "ptx_sm90.cuh"}


# Results


@pytest.fixture(params=TILES)
def tiled(request: pytest.FixtureRequest, simulator: ModuleType) -> On:
    """The backend with one tile for every convolution."""
    return On(SimulatedBackend(simulator, getattr(simulator.ConvTile, request.param)))


# Several tiles in each direction, tails in all of them, and the windows of ResNets.
TILE_CASES = {
    "pointwise": ConvCase(2, 72, 13, 11, 136),
    "pointwise strided": ConvCase(1, 64, 27, 23, 72, stride=2),
    "3x3": ConvCase(1, 40, 14, 13, 136, 3, 1, 1),
    "3x3 strided": ConvCase(2, 32, 21, 15, 64, 3, 2, 1),
    "uneven outputs": ConvCase(1, 16, 9, 17, 131, 3, 1, 1),
    "grouped": ConvCase(1, 48, 12, 12, 160, 3, 1, 1, groups=2),
}


def truth(*arguments: Any) -> Tensor:
    return reference.conv_bn(*cast(arguments, torch.float64))


@one_half
@pytest.mark.parametrize("name", TILE_CASES)
def test_tiles_are_exact_on_integers_and_free_of_bank_conflicts(simulator, tiled, half, name):
    case = TILE_CASES[name]
    rng = generator()
    x, layer = make_integers(case, rng, half)
    residual = make_residual(case, x, rng).round_()
    expected = truth(x, layer, residual, True)
    assert torch.equal(tiled.conv_bn(x, layer, residual, True).double(), expected)
    counts = simulator.take_statistics()
    assert counts["matrix_loads"] > 0
    assert counts["bank_conflicts"] == 0


# The residual's channels and stride: whole chunks, half a chunk, less than the first group's.
IDENTITIES = [
    ("pointwise", 72, 2),
    ("pointwise", 60, 1),
    ("3x3", 40, 2),
    ("uneven outputs", 16, 2),
    ("grouped", 96, 2),
    ("grouped", 8, 3),
]


@one_half
@pytest.mark.parametrize(("name", "channels", "stride"), IDENTITIES)
def test_tiles_read_a_narrower_strided_residual(tiled, half, name, channels, stride):
    rng = generator()
    x, layer = make_integers(TILE_CASES[name], rng, half)
    identity = make_identity(TILE_CASES[name], channels, stride, x, rng)
    expected = truth(x, layer, identity, True)
    assert torch.equal(tiled.conv_bn(x, layer, identity, True).double(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [19, 16, 3])
def test_batch_norm_pass_reads_a_narrower_strided_residual(simulator, dtype, channels):
    case = ConvCase(2, 24, 5, 3, 24)
    x, layer = make_integers(case, generator(), dtype)
    identity = make_identity(case, channels, 2, x, generator(1))
    backend = SimulatedBackend(simulator)
    expected = truth(x, layer, identity, True)
    by_cudnn = every_result(backend, "conv_bn", x, layer, identity, True)["cudnn"]
    assert torch.equal(by_cudnn.double(), expected)
    out = backend._launcher.bn_add_relu(convolve(x, layer.conv), layer.bn, identity, True)
    assert torch.equal(out.double(), expected)


@pytest.mark.parametrize("name", TILE_CASES)
def test_tiles_keep_the_contract(tiled, half, name):
    x, layer = make_convolution(TILE_CASES[name], generator(), half)
    check_op(tiled.conv_bn, reference.conv_bn, [x, layer, None, False])


# Windows that im2col mode must get right; more tiles than blocks, so that every ring turns over.
SM90_CASES = {
    **{name: TILE_CASES[name] for name in ("pointwise", "pointwise strided", "3x3", "3x3 strided")},
    "persistent": ConvCase(2, 72, 33, 35, 200),
    "dilated": ConvCase(3, 24, 21, 9, 64, 3, 1, 2, 2),
    "5x5 strided": ConvCase(3, 24, 9, 9, 64, 5, 2, 2),
    "few channels": ConvCase(2, 8, 6, 5, 8, 3, 1, 1),
}


@pytest.fixture(params=SM90_TILES)
def sm90(request: pytest.FixtureRequest, simulator: ModuleType) -> On:
    """The backend on a simulated Hopper GPU, with one of its tiles for every convolution."""
    tile = getattr(simulator.ConvTile, request.param)
    return On(SimulatedBackend(simulator, tile, capability=90))


@one_half
@pytest.mark.parametrize("name", SM90_CASES)
def test_sm90_tiles_are_exact_on_integers(simulator, sm90, half, name):
    case = SM90_CASES[name]
    rng = generator()
    x, layer = make_integers(case, rng, half)
    residual = make_residual(case, x, rng).round_()
    for added in (residual, None):
        expected = truth(x, layer, added, True)
        assert torch.equal(sm90.conv_bn(x, layer, added, True).double(), expected)
    counts = simulator.take_statistics()
    assert counts["products"] > 0
    assert counts["matrix_loads"] == 0


@one_half
@pytest.mark.parametrize(
    ("name", "channels", "stride"),
    [("pointwise", 72, 2), ("3x3", 136, 1), ("persistent", 104, 3), ("few channels", 8, 2)],
)
def test_sm90_tiles_read_a_narrower_strided_residual(sm90, half, name, channels, stride):
    rng = generator()
    x, layer = make_integers(SM90_CASES[name], rng, half)
    identity = make_identity(SM90_CASES[name], channels, stride, x, rng)
    expected = truth(x, layer, identity, True)
    assert torch.equal(sm90.conv_bn(x, layer, identity, True).double(), expected)


@pytest.mark.parametrize("channels", [24, 20])
def test_a_residual_that_no_tensor_map_can_express_is_read_by_the_other_kernel(
    simulator, half, channels
):
    """Of images of an odd number of lines every second is read: no whole number apart."""
    case = ConvCase(2, 32, 5, 4, 40, 3, 1, 1)
    rng = generator()
    x, layer = make_integers(case, rng, half)
    block_input = torch.randint(-9, 10, (2, channels, 9, 8), generator=rng).to(half)
    identity = block_input.contiguous(memory_format=torch.channels_last)[:, :, ::2, ::2]
    backend = On(SimulatedBackend(simulator, capability=90))
    expected = truth(x, layer, identity, True)
    assert torch.equal(backend.conv_bn(x, layer, identity, True).double(), expected)
    assert simulator.take_statistics()["bulk_copies"] == 0


@pytest.mark.parametrize("name", SM90_CASES)
def test_sm90_tiles_keep_the_contract(sm90, half, name):
    x, layer = make_convolution(SM90_CASES[name], generator(), half)
    check_op(sm90.conv_bn, reference.conv_bn, [x, layer, None, False])


def test_sm90_tells_height_from_width(sm90, half):
    """A window of 2 x 3 whose strides, paddings and dilations differ, too."""
    rng = generator()
    x = torch.randint(-3, 4, (2, 16, 11, 14), generator=rng).to(half)
    weight = torch.randint(-2, 3, (24, 16, 2, 3), generator=rng).to(half)
    conv = Convolution(weight, (1, 2), (2, 1), (3, 1))
    layer = ConvBn(conv, BatchNorm(torch.zeros(24), torch.full((24,), 0.75), None, None, 0.25))
    expected = truth(x, layer, None, False)
    assert torch.equal(sm90.conv_bn(x, layer, None, False).double(), expected)


@one_half
def test_sm90_projection_is_exact_on_integers(sm90, half):
    rng = generator()
    x, layer = make_integers(ConvCase(2, 40, 22, 23, 136), rng, half)
    shortcut, projection = make_integers(ConvCase(2, 72, 44, 45, 136, stride=2), rng, half)
    arguments = [x, layer, shortcut, projection]
    expected = reference.conv_bn_projection(*cast(arguments, torch.float64))
    assert torch.equal(sm90.conv_bn_projection(*arguments).double(), expected)


def test_sm90_projection_keeps_the_contract(sm90, half):
    rng = generator()
    x, layer = make_convolution(ConvCase(1, 40, 12, 13, 136), rng, half)
    shortcut, projection = make_convolution(ConvCase(1, 72, 24, 25, 136, stride=2), rng, half)
    arguments = [x, layer, shortcut, projection]
    check_op(sm90.conv_bn_projection, reference.conv_bn_projection, arguments)


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("of_projection", [False, True], ids=["conv", "projection"])
def test_sm90_projection_of_any_scales(sm90, half, of_projection, mean):
    """The kernel goes from one batch norm's scale to the other's by their ratio: scales that are
    zero (as trainings begin), tiny, large and negative, beside ordinary ones."""
    rng = generator()
    x, layer = make_convolution(ConvCase(1, 40, 12, 13, 136), rng, half)
    shortcut, projection = make_convolution(ConvCase(1, 72, 24, 25, 136, stride=2), rng, half)
    scales = torch.tensor([0.0, 1e-30, -1e-6, 1e-3, 300.0, -1.0, 0.0, 2.0])
    weight = scales.repeat(17).to(half)
    if of_projection:
        projection = projection._replace(bn=projection.bn._replace(weight=weight))
    else:
        layer = layer._replace(bn=layer.bn._replace(weight=weight))
    layer, projection = (
        each._replace(bn=each.bn._replace(mean=each.bn.mean + mean)) for each in (layer, projection)
    )
    arguments = [x, layer, shortcut, projection]
    check_op(sm90.conv_bn_projection, reference.conv_bn_projection, arguments)


def test_sm90_projection_where_both_scales_are_zero(sm90, half):
    rng = generator()
    x, layer = make_integers(ConvCase(1, 16, 8, 8, 24), rng, half)
    zero = layer._replace(bn=layer.bn._replace(weight=torch.zeros(24, dtype=half)))
    out = sm90.conv_bn_projection(x, zero, x, zero)
    assert torch.equal(out, torch.full_like(out, 2.0))  # both biases


# 9 steps and more: as many for each block, or not; tails of positions and channels; more tiles
# than the simulated GPU has SMs.
SPLIT_CASES = {
    **{name: SM90_CASES[name] for name in ("3x3", "3x3 strided", "dilated", "5x5 strided")},
    "pointwise": ConvCase(2, 584, 7, 7, 136),
    "pointwise strided": ConvCase(1, 512, 15, 13, 72, stride=2),
    "few channels": SM90_CASES["few channels"],
}


@pytest.fixture(params=SPLIT_TILES)
def split(request: pytest.FixtureRequest, simulator: ModuleType) -> On:
    """The backend on a simulated Hopper GPU, with one of the tiles that share a K loop."""
    tile = getattr(simulator.ConvTile, request.param)
    return On(SimulatedBackend(simulator, tile, capability=90))


@one_half
@pytest.mark.parametrize("name", SPLIT_CASES)
def test_split_tiles_are_exact_on_integers_and_free_of_bank_conflicts(simulator, split, half, name):
    case = SPLIT_CASES[name]
    rng = generator()
    x, layer = make_integers(case, rng, half)
    residual = make_residual(case, x, rng).round_()
    for added in (residual, None):
        expected = truth(x, layer, added, True)
        assert torch.equal(split.conv_bn(x, layer, added, True).double(), expected)
    counts = simulator.take_statistics()
    assert counts["products"] > 0
    assert counts["shared_requests"] > 0
    assert counts["shared_conflicts"] == 0
    assert counts["cluster_barriers"] == 2


@one_half
@pytest.mark.parametrize(("name", "channels", "stride"), [("pointwise", 72, 2), ("3x3", 136, 1)])
def test_split_tiles_read_a_narrower_strided_residual(split, half, name, channels, stride):
    rng = generator()
    x, layer = make_integers(SPLIT_CASES[name], rng, half)
    identity = make_identity(SPLIT_CASES[name], channels, stride, x, rng)
    expected = truth(x, layer, identity, True)
    assert torch.equal(split.conv_bn(x, layer, identity, True).double(), expected)


@pytest.mark.parametrize("name", SPLIT_CASES)
def test_split_tiles_keep_the_contract(split, half, name):
    x, layer = make_convolution(SPLIT_CASES[name], generator(), half)
    check_op(split.conv_bn, reference.conv_bn, [x, layer, None, False])


@pytest.mark.parametrize("make", [make_integers, make_convolution])
def test_split_projection(split, half, make):
    rng = generator()
    x, layer = make(ConvCase(1, 40, 8, 9, 136, 3, 1, 1), rng, half)
    shortcut, projection = make(ConvCase(1, 520, 16, 18, 136, stride=2), rng, half)
    arguments = [x, layer, shortcut, projection]
    if make is make_convolution:
        check_op(split.conv_bn_projection, reference.conv_bn_projection, arguments)
        return
    expected = reference.conv_bn_projection(*cast(arguments, torch.float64))
    assert torch.equal(split.conv_bn_projection(*arguments).double(), expected)


def test_split_tiles_need_a_step_for_each_block(simulator, half):
    backend = SimulatedBackend(simulator, capability=90)
    for channels in (64, 128, 256, 512):
        x, layer = make_integers(ConvCase(1, channels, 5, 5, 64), generator(), half)
        listed = {c.name.removeprefix("cuda ") for c in backend.conv_bn(x, layer, None, True)}
        expected = {name for name, n in SPLIT_TILES.items() if 64 * n <= channels}
        assert listed & set(SPLIT_TILES) == expected


# Whole images and parts of them, the last of fewer lines; several images in a tile, and more than
# there are; tails of channels; more tiles than the simulated GPU has SMs, so that every ring turns
# over.
LINE_CASES = {
    "whole": ConvCase(2, 72, 14, 14, 136, 3, 1, 1),
    "parts": ConvCase(2, 72, 29, 16, 200, 3, 1, 1),
    "several": ConvCase(9, 136, 7, 7, 264, 3, 1, 1),
    "apart": ConvCase(6, 24, 6, 5, 24, 3, 1, 1),
    "a column": ConvCase(3, 8, 21, 1, 8, 3, 1, 1),
}


@pytest.fixture(params=LINE_TILES)
def lines(request: pytest.FixtureRequest, simulator: ModuleType) -> On:
    """The backend on a simulated Hopper GPU, with one of the tiles of whole lines."""
    tile = getattr(simulator.ConvTile, request.param)
    return On(SimulatedBackend(simulator, tile, capability=90))


@one_half
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", LINE_CASES)
def test_line_tiles_are_exact_on_integers_and_free_of_bank_conflicts(
    simulator, lines, half, name, relu
):
    x, layer = make_integers(LINE_CASES[name], generator(), half)
    expected = truth(x, layer, None, relu)
    assert torch.equal(lines.conv_bn(x, layer, None, relu).double(), expected)
    counts = simulator.take_statistics()
    assert counts["products"] > 0
    assert counts["bank_conflicts"] == counts["shared_conflicts"] == 0


def test_line_tiles_copy_x_three_times(simulator, half):
    """Of 14 x 14 pixels a tile is an image: for 64 channels 3 copies of x and 9 of the weight; the
    result leaves by two stores."""
    backend = SimulatedBackend(simulator, simulator.ConvTile.m200n128_sm90_lines, capability=90)
    x, layer = make_integers(ConvCase(2, 128, 14, 14, 128, 3, 1, 1), generator(), half)
    simulator.take_statistics()
    On(backend).conv_bn(x, layer, None, True)
    assert simulator.take_statistics()["bulk_copies"] == 2 * (2 * (3 + 9) + 2)


@pytest.mark.parametrize("name", LINE_CASES)
def test_line_tiles_keep_the_contract(lines, half, name):
    x, layer = make_convolution(LINE_CASES[name], generator(), half)
    check_op(lines.conv_bn, reference.conv_bn, [x, layer, None, False])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_line_tiles_spread_what_is_not_finite_no_further_than_pytorch(lines, half, value):
    """Neither to the image beside it in a tile, nor to the positions that are no result's."""
    x, layer = make_integers(LINE_CASES["several"], generator(), half)
    x[1, 3, 6, 6] = x[2, 5, 0, 0] = x[4, 0, 3, 2] = value
    expected = truth(x, layer, None, True)
    out = lines.conv_bn(x, layer, None, True).double()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.to(half).double().nan_to_num())


def test_line_tiles_serve_single_steps_without_a_residual(simulator, half):
    backend = SimulatedBackend(simulator, capability=90)
    for case, widest in (
        *((ConvCase(1, 16, 9, width, 16, 3, 1, 1), width) for width in (16, 17, 28, 29)),
        (ConvCase(1, 16, 9, 9, 16, 3, 2, 1), 99),
        (ConvCase(1, 16, 9, 9, 16, 3, 1, 2), 99),
        (ConvCase(1, 16, 9, 9, 16, 3, 1, 2, 2), 99),
        (ConvCase(1, 16, 9, 9, 16), 99),
        (ConvCase(1, 16, 9, 9, 16, 5, 1, 1), 99),
    ):
        x, layer = make_integers(case, generator(), half)
        listed = {c.name.removeprefix("cuda ") for c in backend.conv_bn(x, layer, None, True)}
        assert listed & set(LINE_TILES) == {t for t, most in LINE_TILES.items() if widest <= most}
        residual = make_residual(case, x, generator())
        listed = {c.name.removeprefix("cuda ") for c in backend.conv_bn(x, layer, residual, True)}
        assert not listed & set(LINE_TILES)


@pytest.mark.parametrize("mistake", ["taller", "wider"])
def test_a_line_tile_that_is_told_of_too_large_an_image_is_caught(simulator, half, mistake):
    """A halo off by one reads beyond the image's memory."""
    x, layer = make_convolution(ConvCase(1, 16, 8, 8, 16, 3, 1, 1), generator(), half)
    size = (9, 8) if mistake == "taller" else (8, 9)
    larger, out = (
        torch.empty(1, 16, *size, dtype=half).contiguous(memory_format=NHWC) for _ in range(2)
    )
    read = [*((t.data_ptr(), t.nbytes, False) for t in (layer.conv.weight, *layer.bn[:4]))]
    short = (larger.data_ptr(), x.nbytes, False)
    simulator.set_buffers([*read, short, (out.data_ptr(), out.nbytes, True)])
    simulator.set_capability(90)
    with pytest.raises(simulator.Fault, match=r"reads .* out of bounds of global memory"):
        call(simulator, larger, layer, out, tile=simulator.ConvTile.m200n128_sm90_lines)


# What tensor maps cannot express, each by one thing only.
NOT_FOR_SM90 = {
    "channels": ConvCase(1, 12, 9, 9, 16),
    "out channels": ConvCase(1, 16, 9, 9, 12),
    "groups": ConvCase(1, 16, 9, 9, 16, groups=2),
    "stride": ConvCase(1, 16, 10, 10, 16, stride=9),
    "dilation": ConvCase(1, 8, 130, 130, 8, 2, 1, 0, 129),
    "padding": ConvCase(1, 8, 1, 1, 8, 1, 8, 129),
}


@pytest.mark.parametrize("name", NOT_FOR_SM90)
def test_sm90_leaves_the_rest_to_sm80(simulator, sm90, name):
    x, layer = make_integers(NOT_FOR_SM90[name], generator(), torch.float16)
    with pytest.raises(ValueError, match="tile"):
        sm90.conv_bn(x, layer, None, True)
    expected = truth(x, layer, None, True)
    simulator.take_statistics()
    out = On(SimulatedBackend(simulator, capability=90)).conv_bn(x, layer, None, True)
    assert torch.equal(out.double(), expected)
    assert simulator.take_statistics()["bulk_copies"] == 0


def test_capability_chooses_the_kernel(simulator, half):
    x, layer = make_convolution(ConvCase(1, 16, 8, 8, 16, 3, 1, 1), generator(), half)
    for capability in (80, 90, 100, 120):
        On(SimulatedBackend(simulator, capability=capability)).conv_bn(x, layer, None, True)
        assert (simulator.take_statistics()["bulk_copies"] > 0) == (capability == 90)
    tile = simulator.ConvTile.m128n64_sm90
    with pytest.raises(RuntimeError, match="invalid argument"):
        On(SimulatedBackend(simulator, tile, capability=80)).conv_bn(x, layer, None, True)


class WithCudnn(SimulatedBackend):
    """Prefers cuDNN where the backend for GPUs does."""

    _left_to_cudnn = CudaBackend._left_to_cudnn


def every_result(backend: SimulatedBackend, op: str, *arguments: Any) -> dict[str, Tensor]:
    """What each of the backend's candidates computes, by name, the heuristic's choice first."""
    return {c.name: c.launch(*arguments) for c in getattr(backend, op)(*arguments)}


def names(*tiles: str) -> list[str]:
    """On Hopper no candidate leaves the choice of one of its tiles to the extension, which knows
    nothing of the tiles' self-checks."""
    automatic = [] if set(tiles) & set(SM90_TILES) else ["automatic"]
    return [f"cuda {tile}" for tile in (*automatic, *tiles)]


def tiles_of(capability: int, lines: bool) -> list[str]:
    """Of a 3 x 3 convolution of some channels; `lines`: of one that adds nothing."""
    sm90 = (*SM90_TILES, *SPLIT_TILES, *(LINE_TILES if lines else ()))
    return [*TILES, *(sm90 if capability == 90 else ())]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("add", [False, True], ids=["plain", "residual"])
def test_all_candidates_of_a_convolution_agree(simulator, half, add, capability):
    case = ConvCase(2, 40, 9, 11, 72, 3, 1, 1)
    rng = generator()
    for make in (make_integers, make_convolution):
        x, layer = make(case, rng, half)
        residual = make_residual(case, x, rng).round_() if add else None
        arguments = (x, layer, residual, True)
        backend = SimulatedBackend(simulator, capability=capability)
        results = every_result(backend, "conv_bn", *arguments)
        assert set(results) == {*names(*tiles_of(capability, lines=not add)), "cudnn"}
        expected, eager = truth(*arguments), reference.conv_bn(*arguments)
        for name, result in results.items():
            if make is make_integers:
                assert torch.equal(result.double(), expected), name
            else:
                assert_contract(result, eager, expected, what=name)


@one_half
@pytest.mark.parametrize("capability", [80, 90])
def test_all_candidates_of_a_projection_agree(simulator, half, capability):
    rng = generator()
    arguments = [
        *make_integers(ConvCase(2, 40, 9, 7, 72), rng, half),
        *make_integers(ConvCase(2, 24, 17, 14, 72, stride=2), rng, half),
    ]
    backend = SimulatedBackend(simulator, capability=capability)
    results = every_result(backend, "conv_bn_projection", *arguments)
    tiles = [*TILES[:2], *(SM90_TILES if capability == 90 else ())]
    assert set(results) == set(names(*tiles))
    with autotune.tuner.prefer("separate"):
        results["separate"] = On(backend).conv_bn_projection(*arguments)
    expected = reference.conv_bn_projection(*cast(arguments, torch.float64))
    for name, result in results.items():
        assert torch.equal(result.double(), expected), name


@one_half
@pytest.mark.parametrize("capability", [80, 90])
def test_all_candidates_of_a_stem_agree(simulator, half, capability):
    x, layer = make_integers(ConvCase(1, 3, 30, 29, 64, 7, 2, 3), generator(), half)
    backend = SimulatedBackend(simulator, capability=capability)
    results = every_result(backend, "stem", x, layer, MaxPool())
    expected = reference.stem(*cast([x, layer], torch.float64), MaxPool())
    assert list(results) == ["cuda fused"]
    with autotune.tuner.prefer("separate"):
        results["separate"] = On(backend).stem(x, layer, MaxPool())
    for name, result in results.items():
        assert torch.equal(result.double(), expected), name


def test_tiles_are_offered_only_for_what_they_compute(simulator, half):
    backend = SimulatedBackend(simulator, capability=90)
    for case, dtype, tiles in (
        (ConvCase(1, 12, 9, 9, 16), half, TILES[:1]),
        (ConvCase(1, 16, 9, 9, 16, groups=2), half, TILES),
        (ConvCase(1, 16, 9, 9, 16), torch.float32, TILES[:1]),
    ):
        layer = make_integers(case, generator(), dtype)
        results = every_result(backend, "conv_bn", *layer, None, True)
        assert list(results) == [*names(*tiles), "cudnn"]


def test_what_the_heuristic_leaves_to_cudnn_may_be_ours_by_measurement(simulator, half):
    x, layer = make_integers(ConvCase(1, 12, 9, 9, 16), generator(), half)
    listed = WithCudnn(simulator, capability=80).conv_bn(x, layer, None, True)
    assert [candidate.name for candidate in listed] == ["cudnn", *names("m64n64")]
    assert listed[0].is_profitable


@pytest.mark.parametrize("major", [8, 9, 10, 12])
def test_tensor_memory_is_that_of_sm100(monkeypatch, major):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert has_tensor_memory.__wrapped__(torch.device("cuda")) == (major == 10)
    assert not has_tensor_memory.__wrapped__(torch.device("cpu"))


@pytest.mark.parametrize(
    ("capability", "triton", "left"),
    [
        (100, None, True),
        (100, "not installed", False),
        (100, "without fences", False),
        (120, None, False),
    ],
)
def test_convolutions_are_left_to_tritons_tcgen05(
    simulator, half, monkeypatch, capability, triton, left
):
    """Our kernels, which serve everywhere from sm_80, stay candidates, and are preferred again
    where there is no Triton."""
    monkeypatch.setattr(cuda, "has_tensor_memory", lambda device: capability == 100)
    monkeypatch.setattr(cuda, "fences_products", lambda: triton != "without fences")
    monkeypatch.setattr(cuda, "unavailable", lambda name: triton)
    backend, rng = WithCudnn(simulator, capability=capability), generator()
    x, layer = make_convolution(ConvCase(1, 64, 9, 9, 64), rng, half)
    _, expanding = make_convolution(ConvCase(1, 64, 9, 9, 256), rng, half)
    _, middle = make_convolution(ConvCase(1, 64, 9, 9, 64, 3, 1, 1), rng, half)
    quantized = QuantizedLayer(
        expanding.conv._replace(weight=torch.ones(256, 64, 1, 1, dtype=torch.int8)),
        torch.zeros(256, dtype=torch.int32),
        torch.ones(256),
    )
    bytes_ = torch.zeros(1, 64, 9, 9, dtype=torch.uint8)
    found = {
        "plain": backend.conv_bn(x, layer, None, True),
        "projection": backend.conv_bn_projection(x, expanding, x, expanding),
        "int8": backend.quantized_conv(bytes_, quantized, None, True),
    }
    for name, listed in found.items():
        assert listed, name
        assert all("sm90" not in candidate.name for candidate in listed), name
        assert [c.is_profitable for c in listed] == [not left] * len(listed), name
    (block,) = backend.bottleneck(x, layer, middle, expanding, expanding)
    assert not (left and block.is_profitable)


@pytest.mark.parametrize("tile", TILES[:2])
def test_projection_tiles_keep_the_contract(simulator, half, tile):
    backend = On(SimulatedBackend(simulator, getattr(simulator.ConvTile, tile)))
    rng = generator()
    x, layer = make_convolution(ConvCase(1, 40, 12, 13, 136), rng, half)
    shortcut, projection = make_convolution(ConvCase(1, 72, 24, 25, 136, stride=2), rng, half)
    arguments = [x, layer, shortcut, projection]
    check_op(backend.conv_bn_projection, reference.conv_bn_projection, arguments)


def test_projection_runs_in_one_kernel(simulator, half):
    """Two K loops of one step each, and no rounding of the shortcut between them."""
    x, layer = make_convolution(ConvCase(1, 64, 4, 4, 64), generator(), half)
    On("cuda_sim").conv_bn_projection(x, layer, x, layer)
    counts = simulator.take_statistics()
    assert counts["waits"] == 2
    assert counts["barriers"] == 2 * 2 + 1


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's settings allow TF32 in convolutions."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


def rounded(x: Tensor, layer: ConvBn) -> list[Any]:
    """x and weight to 10 bits behind the point, ties away from zero. PyTorch has no TF32 on the
    CPU: it gets operands that are rounded beforehand, and forms the same products."""

    def near(t: Tensor) -> Tensor:
        return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    conv = layer.conv._replace(weight=near(layer.conv.weight))
    return [near(x), layer._replace(conv=conv)]


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("tiled", TF32_TILES, indirect=True)
@pytest.mark.parametrize("name", TILE_CASES)
def test_tf32_keeps_the_contract_of_rounded_operands(simulator, tiled, name):
    layer = make_convolution(TILE_CASES[name], generator(), torch.float32)
    arguments = [*rounded(*layer), None, True]
    ours = tiled.conv_bn(*layer, None, True)
    assert_contract(ours, reference.conv_bn(*arguments), truth(*arguments))
    counts = simulator.take_statistics()
    assert counts["products"] > 0
    assert counts["bank_conflicts"] == 0


@pytest.mark.usefixtures("tf32")
def test_tf32_projection_keeps_the_contract_of_rounded_operands(simulator):
    rng = generator()
    main = make_convolution(ConvCase(1, 40, 12, 13, 136), rng, torch.float32)
    shortcut = make_convolution(ConvCase(1, 72, 24, 25, 136, stride=2), rng, torch.float32)
    arguments = [*rounded(*main), *rounded(*shortcut)]
    ours = On(SimulatedBackend(simulator)).conv_bn_projection(*main, *shortcut)
    expected = reference.conv_bn_projection(*cast(arguments, torch.float64))
    assert_contract(ours, reference.conv_bn_projection(*arguments), expected)
    assert simulator.take_statistics()["products"] > 0


@pytest.mark.usefixtures("tf32")
def test_single_channels_have_exact_products_where_tf32_is_allowed(simulator):
    layer = make_convolution(ConvCase(1, 10, 9, 9, 24, 3, 1, 1), generator(), torch.float32)
    check_op(On(SimulatedBackend(simulator)).conv_bn, reference.conv_bn, [*layer, None, True])
    assert simulator.take_statistics()["products"] == 0


@pytest.mark.usefixtures("tf32")
def test_tf32_is_a_candidate_that_the_heuristic_never_prefers(simulator):
    backend = WithCudnn(simulator, capability=90)
    layer = make_integers(ConvCase(1, 16, 9, 9, 16), generator(), torch.float32)
    listed = backend.conv_bn(*layer, None, True)
    assert [candidate.name for candidate in listed] == ["cudnn", *names(*TF32_TILES)]
    listed = backend.conv_bn_projection(*layer, *layer)
    assert [candidate.name for candidate in listed] == names(TF32_TILES[0])
    assert not any(candidate.is_profitable for candidate in listed)


# One block; several in each direction, with tails; channels beyond the tile.
STEMS = {
    "one tile": ConvCase(1, 3, 28, 28, 64, 7, 2, 3),
    "tails": ConvCase(2, 3, 61, 39, 64, 7, 2, 3),
    "channels": ConvCase(1, 3, 9, 34, 72, 7, 2, 3),
    "one pixel": ConvCase(2, 3, 1, 1, 8, 7, 2, 3),
}


# Of the kernel for sm_90a: a strip that is a whole image, several of them, down and across; more
# strips than blocks; channels beyond the tile, and few.
WIDE_STEMS = {
    "one line": ConvCase(1, 3, 3, 8, 64, 7, 2, 3),
    "one strip": ConvCase(17, 3, 12, 8, 8, 7, 2, 3),
    "lines": ConvCase(5, 3, 51, 16, 8, 7, 2, 3),
    "across": ConvCase(1, 3, 16, 456, 64, 7, 2, 3),
    "channels": ConvCase(1, 3, 12, 40, 136, 7, 2, 3),
}


@pytest.fixture
def on_sm90(simulator: ModuleType) -> On:
    return On(SimulatedBackend(simulator, capability=90))


@one_half
@pytest.mark.parametrize("layout", [NHWC, torch.contiguous_format])
@pytest.mark.parametrize("name", WIDE_STEMS)
def test_stem_of_sm90_is_exact_on_integers(simulator, on_sm90, half, name, layout):
    x, layer = make_integers(WIDE_STEMS[name], generator(), half)
    expected = reference.stem(*cast([x, layer], torch.float64), MaxPool())
    out = on_sm90.stem(x.contiguous(memory_format=layout), layer, MaxPool())
    assert torch.equal(out.double(), expected)
    counts = simulator.take_statistics()
    assert counts["mbarrier_waits"] > 0
    assert counts["matrix_loads"] == 0


@pytest.mark.parametrize("name", WIDE_STEMS)
def test_stem_of_sm90_keeps_the_contract(on_sm90, half, name):
    x, layer = make_convolution(WIDE_STEMS[name], generator(), half)
    check_op(on_sm90.stem, reference.stem, [x, layer, MaxPool()])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_stem_of_sm90_spreads_what_is_not_finite_no_further_than_pytorch(on_sm90, half, value):
    """The pixel before each window, which the products read, must not count."""
    x, layer = make_integers(WIDE_STEMS["across"], generator(), half)
    for column in (20, 221, 224):
        x[0, 1, 9, column] = value
    expected = reference.stem(*cast([x, layer], torch.float64), MaxPool())
    out = on_sm90.stem(x, layer, MaxPool()).double()
    assert expected.isnan().any() or expected.isinf().any()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.to(half).double().nan_to_num())


def test_stem_of_sm90_leaves_other_sizes_to_the_one_for_sm80(simulator, on_sm90, half):
    """Lines that are no whole 8 pixels, and an odd number of the convolution's lines."""
    for height, width in ((12, 20), (10, 16)):
        case = ConvCase(1, 3, height, width, 64, 7, 2, 3)
        x, layer = make_integers(case, generator(), half)
        expected = reference.stem(*cast([x, layer], torch.float64), MaxPool())
        assert torch.equal(on_sm90.stem(x, layer, MaxPool()).double(), expected)
        assert simulator.take_statistics()["matrix_loads"] > 0


def test_stem_of_sm90_pools_in_registers(simulator, on_sm90, half):
    """Two lines of the convolution, and two barriers, make a pooled line of a strip."""
    x, layer = make_convolution(ConvCase(8, 3, 12, 8, 8, 7, 2, 3), generator(), half)
    on_sm90.stem(x, layer, MaxPool())
    counts = simulator.take_statistics()
    lines = 8 * 3
    assert counts["products"] == lines * 2 * 7 * 2
    assert counts["named_barriers"] == 2 * 3  # of a block


@one_half
@pytest.mark.parametrize("name", STEMS)
def test_stem_is_exact_on_integers_and_free_of_bank_conflicts(simulator, half, name):
    x, layer = make_integers(STEMS[name], generator(), half)
    expected = reference.stem(*cast([x, layer], torch.float64), MaxPool())
    out = On("cuda_sim").stem(x, layer, MaxPool())
    assert torch.equal(out.double(), expected)
    counts = simulator.take_statistics()
    assert counts["matrix_loads"] > 0
    assert counts["bank_conflicts"] == 0


@pytest.mark.parametrize("name", STEMS)
def test_stem_keeps_the_contract(simulator, half, name):
    x, layer = make_convolution(STEMS[name], generator(), half)
    check_op(On("cuda_sim").stem, reference.stem, [x, layer, MaxPool()])


def test_stem_keeps_the_convolution_on_the_chip(simulator, half):
    """One launch of one block: pixels, products, maximum, and three barriers."""
    x, layer = make_convolution(STEMS["one tile"], generator(), half)
    On("cuda_sim").stem(x, layer, MaxPool())
    counts = simulator.take_statistics()
    assert counts["barriers"] == 3
    assert counts["products"] == 8 * 7 * 2 * 2 * 8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stem_spreads_what_is_not_finite_no_further_than_pytorch(simulator, half, value):
    """The eighth pixel that the products read beside each window must not count."""
    x, layer = make_integers(STEMS["tails"], generator(), half)
    x[0, 1, 20, 17] = value
    expected = reference.stem(*cast([x, layer], torch.float64), MaxPool())
    out = On("cuda_sim").stem(x, layer, MaxPool()).double()
    assert expected.isnan().any() or expected.isinf().any()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.to(half).double().nan_to_num())


def changed(argument: tuple[Any, ...], **changes: Any) -> tuple[Any, ...]:
    """A tensor's description with other fields."""
    fields = dict(zip(("address", "type", "sizes", "strides", "tensor"), argument, strict=True))
    return tuple({**fields, **changes}.values())


def nhwc(*shape: int, dtype: torch.dtype = torch.float16) -> tuple[Any, ...]:
    return tensor_arg(torch.zeros(shape, dtype=dtype).contiguous(memory_format=NHWC))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("out", {"address": 0}, "out is a null pointer"),
        ("x", {"address": 0}, "x is a null pointer"),
        ("weight", {"address": 0}, "weight is a null pointer"),
        ("x", {"address": 1}, "x is not aligned"),
        ("x", {"type": 2}, "x must be float16, found bfloat16"),
        ("mean", {"sizes": (9,)}, r"mean must be of size \(8\), found \(9\)"),
        ("mean", {"strides": (2,)}, "mean must be contiguous"),
        ("mean", {"type": 3}, "mean must be float32, float16 or bfloat16, found float64"),
        ("weight", {"sizes": (8, 3, 7, 5)}, "weight must be dense"),
        ("x", {"sizes": (1, 3, 8, 8), "strides": (384, 128, 16, 1)}, "x must be dense"),
        ("x", {"sizes": (-1, 3, 8, 8)}, "negative size of -1"),
    ],
)
def test_stem_binding_refuses(simulator, name, value, message):
    vector = tensor_arg(torch.ones(8))
    tensors = {"out": nhwc(1, 8, 2, 2), "x": nhwc(1, 3, 8, 8), "weight": nhwc(8, 3, 7, 7)}
    tensors["mean"] = vector
    tensors[name] = changed(tensors[name], **value)
    mean = tensors.pop("mean")
    with pytest.raises(ValueError, match=message):
        simulator.cuda_stem(
            **tensors, bn=(mean, vector, None, None, 0.0), bytes=None, device=0, stream=0
        )


def test_stem_binding_refuses_other_types_and_channels(simulator):
    for out_channels, dtype in ((12, torch.float16), (8, torch.float32)):
        vector = tensor_arg(torch.ones(out_channels))
        sizes = ((1, out_channels, 2, 2), (1, 3, 8, 8), (out_channels, 3, 7, 7))
        tensors = [nhwc(*size, dtype=dtype) for size in sizes]
        with pytest.raises(ValueError, match="multiple of 8"):
            simulator.cuda_stem(*tensors, (vector, vector, None, None, 0.0), None, 0, 0)


def test_simulator_and_extension_load_into_one_process(simulator, extension):
    """Both bind the same C++ types, which pybind11 would by default register once a process."""
    assert simulator.ConvTile is not extension.ConvTile
    assert simulator.Program is not extension.Program


def test_larger_tiles_refuse_what_they_do_not_compute(simulator):
    x, layer = make_convolution(CONV_CASES["channel tails"], generator(), torch.float16)
    for name in TILES[1:]:
        backend = On(SimulatedBackend(simulator, getattr(simulator.ConvTile, name)))
        with pytest.raises(ValueError, match="tile"):
            backend.conv_bn(x, layer, None, False)


def call(simulator: ModuleType, x: Tensor, layer: ConvBn, out: Tensor, /, **changes: Any) -> None:
    """The binding itself: no residual and an automatic tile, unless `changes` say otherwise."""
    conv, bn = layer
    types = (torch.float32, torch.float16, torch.bfloat16)
    described = {
        "x": tensor_arg(x),
        "weight": tensor_arg(conv.weight),
        "window": conv[1:4],
        "bn": batch_norm_arg(bn, types),
    }
    for key in [k for k in changes if k in described]:
        described[key] = changes.pop(key)
    arguments = {
        "out": tensor_arg(out),
        "layer": tuple(described.values()),
        "projection": None,
        "residual": None,
        "groups": conv.groups,
        "relu": True,
        "tf32": False,
        "signs": None,
        "tile": simulator.ConvTile.automatic,
        "device": 0,
        "stream": 0,
    }
    simulator.cuda_conv_bn(**{**arguments, **changes})


@pytest.mark.parametrize("channels", [64, 19])
@pytest.mark.parametrize("capability", [80, 90])
def test_out_may_be_the_residual(simulator, half, channels, capability):
    simulator.set_capability(capability)
    case = ConvCase(2, 24, 9, 9, channels, 3, 1, 1)
    rng = generator()
    x, layer = make_integers(case, rng, half)
    both = make_residual(case, x, rng).round_()
    expected = truth(x, layer, both, True)
    call(simulator, x, layer, both, residual=optional_tensor_arg(both))
    assert torch.equal(both.double(), expected)


@pytest.mark.parametrize("shifted", ["x", "weight", "residual"])
def test_pointers_off_sixteen_bytes(simulator, half, shifted):
    def moved(tensor: Tensor) -> Tensor:
        storage = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:]
        return storage.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)

    case = TILE_CASES["3x3"]
    rng = generator()
    x, layer = make_integers(case, rng, half)
    residual = make_residual(case, x, rng).round_()
    expected = truth(x, layer, residual, True)
    if shifted == "x":
        x = moved(x)
    elif shifted == "weight":
        layer = layer._replace(conv=layer.conv._replace(weight=moved(layer.conv.weight)))
    else:
        residual = moved(residual)
    out = On("cuda_sim").conv_bn(x, layer, residual, True)
    assert torch.equal(out.double(), expected)


def test_more_than_two_to_the_31_elements(simulator):
    """Of 4.3 GB of zeros, which no page backs, the four corners are read."""
    side, channels = 2**14 + 1, 8
    memory = np.zeros((1, side, side, channels), np.int16)
    x = torch.from_numpy(memory).view(torch.bfloat16).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    corners = torch.randint(-9, 10, (1, channels, 2, 2), generator=generator()).bfloat16()
    stride = side - 1
    x[:, :, ::stride, ::stride] = corners
    conv = Convolution(
        torch.randint(-1, 2, (8, channels, 1, 1), generator=generator()).bfloat16(),
        (stride, stride),
    )
    bn = BatchNorm(torch.zeros(8), torch.full((8,), 0.75), None, None, 0.25)
    layer = ConvBn(conv, bn)
    out = On("cuda_sim").conv_bn(x, layer, None, False)
    expected = truth(corners, ConvBn(conv._replace(stride=(1, 1)), bn), None, False)
    assert torch.equal(out.double(), expected)


@pytest.mark.parametrize(
    ("channels", "capability"),
    [(16, 80), (19, 80), (16, 90)],
    ids=["copies", "one by one", "bulk copies"],
)
def test_halo_off_by_one_is_caught(simulator, half, channels, capability):
    """The kernel is told of a row more than the image has: it must not read it unnoticed."""
    simulator.set_capability(capability)
    case = ConvCase(1, channels, 8, 8, 16, 3, 1, 1)
    x, layer = make_convolution(case, generator(), half)
    taller = torch.empty(1, channels, 9, 8, dtype=half).contiguous(memory_format=NHWC)
    out = torch.empty(1, 16, 9, 8, dtype=half).contiguous(memory_format=NHWC)
    read = [*((t.data_ptr(), t.nbytes, False) for t in (layer.conv.weight, *layer.bn[:4]))]
    short = (taller.data_ptr(), x.nbytes, False)
    simulator.set_buffers([*read, short, (out.data_ptr(), out.nbytes, True)])
    with pytest.raises(simulator.Fault, match=r"reads .* out of bounds of global memory"):
        call(simulator, taller, layer, out)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("out", {"address": 0}, "out is a null pointer"),
        ("x", {"address": 0}, "x is a null pointer"),
        ("weight", {"address": 0}, "weight is a null pointer"),
        ("x", {"sizes": (1, 0, 8, 8), "strides": (0, 1, 0, 0)}, "channels must be at least 1"),
        ("out", {"sizes": (1, 16, 8, 9)}, "out must be dense"),
        (
            "x",
            {"sizes": (0, 16, 2**29, 8), "strides": (2**36, 1, 128, 16)},
            "height must be at least 0 and below 2",
        ),
        ("x", {"sizes": (2**20, 16, 2**20, 2**20)}, r"more than 2\^48 elements"),
        ("weight", {"sizes": (16, 8, 3, 3)}, "weight must be dense"),
        ("weight", {"type": 0}, "weight must be float16, found float32"),
    ],
)
def test_binding_refuses(simulator, name, value, message):
    case = ConvCase(1, 16, 8, 8, 16, 3, 1, 1)
    x, layer = make_convolution(case, generator(), torch.float16)
    out = torch.empty_like(x)
    tensors = {"x": x, "weight": layer.conv.weight, "out": out}
    with pytest.raises(ValueError, match=message):
        call(simulator, x, layer, out, **{name: changed(tensor_arg(tensors[name]), **value)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": ((0, 1), (1, 1), (1, 1))}, "vertical stride must be at least 1"),
        ({"window": ((1, 1), (0, -1), (1, 1))}, "horizontal padding must be at least 0"),
        ({"window": ((1, 1), (0, 0), (1, 1))}, r"out must be of size \(1, 16, 6, 6\)"),
        ({"groups": 3}, "groups must divide"),
        ({"groups": 2}, r"weight must be of size \(16, 8, 3, 3\)"),
    ],
)
def test_binding_refuses_windows_and_groups(simulator, changes, message):
    case = ConvCase(1, 16, 8, 8, 16, 3, 1, 1)
    x, layer = make_convolution(case, generator(), torch.float16)
    with pytest.raises(ValueError, match=message):
        call(simulator, x, layer, torch.empty_like(x), **changes)


def test_projection_excludes_residual_and_groups(simulator):
    x, (conv, bn) = make_convolution(ConvCase(1, 16, 8, 8, 16), generator(), torch.float16)
    projection = (tensor_arg(x), tensor_arg(conv.weight), conv[1:4], batch_norm_arg(bn, ()))
    halved = conv._replace(weight=conv.weight[:, :8].contiguous(memory_format=NHWC), groups=2)
    for layer, residual in ((ConvBn(conv, bn), tensor_arg(x)), (ConvBn(halved, bn), None)):
        out = torch.empty_like(x)
        with pytest.raises(ValueError, match="a projection needs groups = 1"):
            call(simulator, x, layer, out, projection=projection, residual=residual)


def test_all_of_resnet50_but_the_stem_is_ours(simulator, half):
    backend = WithCudnn(simulator)
    left = []
    for name, module in torchvision.models.resnet50().to(half).named_modules():
        if isinstance(module, torch.nn.Conv2d):
            x = torch.zeros(1, module.in_channels, 8, 8, dtype=half)
            conv = Convolution(module.weight, module.stride, module.padding)
            layer = ConvBn(conv, make_batch_norm(module.out_channels, generator()))
            if backend.conv_bn(x, layer, None, True)[0].name == "cudnn":
                left.append(name)
    assert left == ["conv1"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("name", "half"), [("resnet18", torch.float16), ("resnet50", torch.bfloat16)], ids=str
)
def test_whole_networks_keep_the_contract(simulator, half, name, capability, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_HOST_SIM_CAPABILITY", str(capability))
    torch.manual_seed(0)
    theirs = randomise_statistics(getattr(torchvision.models, name)()).eval()
    ours = getattr(resnet_fused, name)().eval()
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.to(half), theirs.to(half)
    x = torch.randn(2, 3, 33, 33, generator=generator()).to(half)
    with torch.no_grad(), use_backend("cuda_sim"):
        result = ours(x)
    counts = simulator.take_statistics()
    assert counts["bank_conflicts"] == 0
    assert (counts["bulk_copies"] > 0) == (capability == 90)
    with torch.no_grad():
        assert_contract(result, theirs(x), copy.deepcopy(theirs).double()(x.double()))
