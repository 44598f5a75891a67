"""The CPU's kernels in tile registers (AMX), compiled against an emulation of the instructions.

No processor with AMX has run them yet. What the compiler makes of the real intrinsics is looked at
in the machine code.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused import _extension, parameters
from resnet_fused.backends.cpu.native import pack
from resnet_fused.numerics import cast, check_op
from resnet_fused.ops import Convolution
from resnet_fused.parameters import ConvBn
from resnet_fused.reference import ops as reference
from resnet_fused.reference import quantized as quantized_reference
from resnet_fused.testing.cases import (
    CONV_CASES,
    ConvCase,
    generator,
    make_convolution,
    make_integers,
    make_residual,
)
from resnet_fused.testing.quantized_cases import make_quantized_conv, random_quantized_conv

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "csrc/kernels/cpu"
NHWC = torch.channels_last
COMPILER = shutil.which("g++")

if COMPILER is None:
    pytest.skip("g++ is not installed", allow_module_level=True)
if reason := _extension.available():
    pytest.skip(reason, allow_module_level=True)


class Layer(ctypes.Structure):
    """A convolution and its batch norm, as tests/cpu_tiles.cpp takes them."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "mean", "var", "scale", "shift")),
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels", "out")),
        ("window", ctypes.c_int64 * 8),
        ("eps", ctypes.c_double),
    )


class QuantizedLayer(ctypes.Structure):
    """A quantised convolution, likewise."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "packed", "padding_value")),
        *((name, ctypes.c_int64) for name in ("is_signed", "batch", "height", "width")),
        *((name, ctypes.c_int64) for name in ("channels", "out_channels", "groups")),
        ("window", ctypes.c_int64 * 8),
    )


def compiles(*arguments: str | Path) -> None:
    command: list[Any] = [
        COMPILER,
        "-std=gnu++17",
        "-fopenmp",
        "-fPIC",
        "-I",
        ROOT / "csrc",
        *arguments,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    extension = _extension.load()
    if extension.cpu_isa() != "avx512" or not extension.cpu_convolves_bf16():
        pytest.skip("the rest of these kernels needs AVX512_BF16")
    folder = tmp_path_factory.mktemp("tiles")
    emulation = ("-O1", "-include", ROOT / "tests/amx_emulation.h", "-mfma")
    exact = ("-ffp-contract=off", KERNELS / "quantized_conv.cpp")  # as in CMakeLists.txt
    compiles(*emulation, *exact, "-c", "-o", folder / "quantized.o")
    sources = [KERNELS / f"{name}.cpp" for name in ("batch_norm", "conv", "parallel")]
    sources += [ROOT / "tests/cpu_tiles.cpp", folder / "quantized.o"]
    compiles(*emulation, "-shared", *sources, "-o", folder / "tiles.so")
    return ctypes.CDLL(str(folder / "tiles.so"))


def layer_of(x: Tensor, layer: ConvBn, alive: list[Tensor]) -> Layer:
    conv, bn = layer
    tensors = [x.contiguous(memory_format=NHWC), conv.weight.contiguous()]
    tensors += [v.float().contiguous() for v in bn[:4] if v is not None]
    alive += tensors
    window = [*conv.weight.shape[2:], *conv.stride, *conv.padding, *conv.dilation]
    batch, channels, height, width = x.shape
    return Layer(
        *(v.data_ptr() for v in tensors),
        *(batch, height, width, channels, len(conv.weight)),
        (ctypes.c_int64 * 8)(*window),
        bn.eps,
    )


def tiled(
    library: ctypes.CDLL,
    x: Tensor,
    layer: ConvBn,
    residual: Tensor | None = None,
    relu: bool = False,
    projection: tuple[Tensor, ConvBn] | None = None,
) -> Tensor:
    """relu?(bn(conv(x)) (+ residual or projection)), between other memory, all of it NaN before."""
    alive: list[Tensor] = []
    size = (len(layer.conv.weight), *layer.conv.output_size(*x.shape[2:]))
    whole = torch.full((len(x) + 2, *size), float("nan"), dtype=x.dtype)
    whole = whole.contiguous(memory_format=NHWC)
    side = None if projection is None else layer_of(*projection, alive)
    library.conv_bn(
        ctypes.byref(layer_of(x, layer, alive)),
        None if side is None else ctypes.byref(side),
        None if residual is None else ctypes.c_void_p(residual.data_ptr()),
        ctypes.c_void_p(whole[1:-1].data_ptr()),
        int(relu),
    )
    assert whole[0].isnan().all()
    assert whole[-1].isnan().all()
    return whole[1:-1]


# Beside those of all backends: lines of one, two and more halves, of equal and unequal length; taps
# of whole tiles of words, of less, and of both; strips that are not whole; equal lines of images.
CASES = {
    **{name: case for name, case in CONV_CASES.items() if case.groups == 1},
    "pixels that fill no tile": ConvCase(1, 64, 5, 5, 32),
    "two strips": ConvCase(2, 64, 14, 14, 64, 3, 1, 1),
    "a line of unequal halves": ConvCase(1, 32, 3, 35, 40, 3, 1, 1),
    "one and a half tiles a tap": ConvCase(1, 48, 9, 20, 33, 3, 2, 1),
    "an odd channel": ConvCase(2, 37, 8, 9, 32, 3, 1, 1),
    "many channels": ConvCase(1, 512, 7, 7, 32, 3, 1, 1),
    "all in the padding": ConvCase(1, 32, 1, 1, 16, 1, 2, 3),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("add", [True, False], ids=["residual", "plain"])
def test_convolutions_are_exact_on_integers(name: str, add: bool, emulated: ctypes.CDLL) -> None:
    rng = generator()
    x, layer = make_integers(CASES[name], rng, torch.bfloat16)
    residual = make_residual(CASES[name], x, rng).round_() if add else None
    arguments: list[Any] = [x, layer, residual, add]
    truth = reference.conv_bn(*cast(arguments, torch.float64))
    assert torch.equal(tiled(emulated, *arguments), truth.bfloat16())


@pytest.mark.parametrize("name", CASES)
def test_convolutions_are_as_accurate_as_eager(name: str, emulated: ctypes.CDLL) -> None:
    case = CASES[name]
    rng = generator(2)
    x, layer = make_convolution(case, rng, torch.bfloat16)
    # Of few results, or sums of few terms, it is chance which side errs less.
    tiny = case.channels * case.kernel**2 < 100 or torch.Size(case.output_shape).numel() < 1000
    check_op(
        lambda *arguments: tiled(emulated, *arguments),
        reference.conv_bn,
        [x.relu(), layer, make_residual(case, x, rng), True],
        noise=1.1 if tiny else 1.0,
    )


def test_a_projection_is_exact_on_integers(emulated: ctypes.CDLL) -> None:
    rng = generator()
    main = make_integers(ConvCase(2, 40, 9, 10, 72), rng, torch.bfloat16)
    side = make_integers(ConvCase(2, 33, 17, 20, 72, 1, 2), rng, torch.bfloat16)
    arguments: list[Any] = [*main, *side]
    truth = reference.conv_bn_projection(*cast(arguments, torch.float64))
    out = tiled(emulated, *main, relu=True, projection=side)
    assert torch.equal(out, truth.bfloat16())


def test_denormal_factors_count_as_zero(emulated: ctypes.CDLL) -> None:
    x, (conv, bn) = make_integers(ConvCase(1, 32, 4, 4, 32), generator(), torch.bfloat16)
    weight = torch.full_like(conv.weight, 2.0**-127)
    bn = bn._replace(mean=torch.zeros(32), bias=torch.zeros(32))
    layer = ConvBn(conv._replace(weight=weight), bn)
    out = tiled(emulated, x.fill_(2.0**100), layer)
    assert torch.equal(out, torch.zeros_like(out))


def quantized_layer_of(
    x: Tensor, conv: Convolution, padding_value: Tensor | None, alive: list[object]
) -> QuantizedLayer:
    packed = pack(_extension.load(), "quantized_conv", conv.weight, conv.groups)
    x = x.contiguous(memory_format=NHWC)
    alive += [x, packed]
    window = [*conv.weight.shape[2:], *conv.stride, *conv.padding, *conv.dilation]
    batch, channels, height, width = x.shape
    return QuantizedLayer(
        *(x.data_ptr(), packed.data_ptr()),
        None if padding_value is None else padding_value.data_ptr(),
        *(x.dtype == torch.int8, batch, height, width, channels, len(conv.weight), conv.groups),
        (ctypes.c_int64 * 8)(*window),
    )


def quantized_tiled(
    library: ctypes.CDLL,
    x: Tensor,
    layer: parameters.QuantizedLayer,
    shortcut: parameters.QuantizedShortcut | None,
    relu: bool,
) -> Tensor:
    """`quantized_conv` of the reference, between other memory."""
    conv, bias, multiplier, padding_value = layer
    added, scale, projection = shortcut or (None, None, None)
    alive: list[object] = []
    size = (len(conv.weight), *conv.output_size(*x.shape[2:]))
    whole = torch.full((len(x) + 2, *size), 77, dtype=torch.uint8 if relu else torch.int8)
    whole = whole.contiguous(memory_format=NHWC)
    side = residual = None
    if projection is not None:
        side = ctypes.byref(quantized_layer_of(added, projection, None, alive))
    elif added is not None:
        residual = added
        assert residual.shape[1] == 1 or residual.stride(1) == 1
    strides = [0, 0, 0] if residual is None else [residual.stride(i) for i in (0, 2, 3)]
    library.quantized_conv(
        ctypes.byref(quantized_layer_of(x, conv, padding_value, alive)),
        side,
        ctypes.c_void_p(bias.data_ptr()),
        ctypes.c_void_p(multiplier.data_ptr()),
        None if scale is None else ctypes.c_void_p(scale.data_ptr()),
        None if residual is None else ctypes.c_void_p(residual.data_ptr()),
        int(residual is not None and residual.dtype == torch.int8),
        ctypes.c_int64(0 if residual is None else residual.shape[1]),
        (ctypes.c_int64 * 3)(*strides),
        ctypes.c_void_p(whole[1:-1].data_ptr()),
        int(relu),
    )
    assert (whole[0] == 77).all()
    assert (whole[-1] == 77).all()
    return whole[1:-1]


def test_random_quantized_layers_equal_the_reference(emulated: ctypes.CDLL) -> None:
    compared = 0
    for seed in range(20_000, 20_100):
        arguments = random_quantized_conv(seed)
        _, layer, shortcut, _ = arguments
        if shortcut is not None and shortcut.projection is not None and layer.conv.groups > 1:
            continue  # the reference's
        found = quantized_tiled(emulated, *arguments)
        assert torch.equal(found, quantized_reference.quantized_conv(*arguments)), f"seed {seed}"
        compared += 1
    assert compared > 60


@pytest.mark.parametrize("shortcut", ["none", "identity", "option A", "projection"])
@pytest.mark.parametrize(
    "case",
    [
        ConvCase(1, 256, 7, 9, 64),
        ConvCase(1, 64, 7, 9, 208),
        ConvCase(2, 64, 9, 10, 64, 3, 1, 1),
        ConvCase(3, 64, 7, 7, 128, 3, 1, 1),
        ConvCase(1, 68, 15, 14, 80, 3, 2, 1),
    ],
    ids=["reduce", "expand", "3x3", "3x3 of 7", "3x3 strided"],
)
def test_quantized_layers_of_a_resnet(shortcut: str, case: ConvCase, emulated: ctypes.CDLL) -> None:
    arguments = make_quantized_conv(case, generator(), shortcut)
    expected = quantized_reference.quantized_conv(*arguments)
    assert torch.equal(quantized_tiled(emulated, *arguments), expected)


def body(listing: str, name: str) -> list[str]:
    """The instructions of the one function of this name in objdump's listing."""
    parts = re.split(r"^[0-9a-f]+ <(.*)>:\n", listing, flags=re.MULTILINE)
    named = [
        code
        for title, code in zip(parts[1::2], parts[2::2], strict=True)
        if f"{name}(" in title and ".cold" not in title
    ]
    assert len(named) == 1, f"{len(named)} functions are named {name}"
    return [line for line in named[0].splitlines() if re.match(r"\s*[0-9a-f]+:", line)]


def inner_loop(lines: list[str], instruction: str) -> list[str]:
    """From the place a jump goes back to, to that jump: the least such with the instruction."""
    addresses = [int(line.split(":")[0], 16) for line in lines]
    loops = []
    for end, line in enumerate(lines):
        jump = re.search(r"\sj\w+\s+([0-9a-f]+) <", line)
        target = int(jump[1], 16) if jump else -1
        if target in addresses[: end + 1]:
            loop = lines[addresses.index(target) : end + 1]
            if any(instruction in inside for inside in loop):
                loops.append(loop)
    assert loops, f"no loop has {instruction}"
    return min(loops, key=len)


def count(lines: list[str], instruction: str) -> int:
    return sum(instruction in line for line in lines)


def assert_nothing_else_touches_memory(loop: list[str]) -> None:
    touching = [line for line in loop if "(" in line.split("<")[0]]
    assert all(re.search("tileload|prefetch|lea", line) for line in touching), touching


def machine_code(source: str, folder: Path) -> str:
    """The machine code of a kernel's source with the real intrinsics, as the build compiles it."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed")
    target = folder / f"{source}.o"
    compiles("-O3", "-c", KERNELS / f"{source}.cpp", "-o", target)
    command: list[Any] = [objdump, "-dC", "--no-show-raw-insn", target]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> str:
    return machine_code("conv", tmp_path_factory.mktemp("code"))


@pytest.fixture(scope="module")
def quantized_listing(tmp_path_factory: pytest.TempPathFactory) -> str:
    return machine_code("quantized_conv", tmp_path_factory.mktemp("code"))


@pytest.mark.parametrize("halves", [1, 2])
def test_the_inner_loop_is_of_tiles_and_spills_nothing(halves: int, listing: str) -> None:
    loop = inner_loop(body(listing, f"amx::multiply_steps<{halves}>"), "tdpbf16ps")
    assert count(loop, "tdpbf16ps") == 2 * halves
    assert count(loop, "tileload") == 2 + halves
    assert count(loop, "prefetch") == 32
    assert_nothing_else_touches_memory(loop)


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
def test_the_quantized_inner_loop_is_of_tiles_and_spills_nothing(
    vectors: int, quantized_listing: str
) -> None:
    code = body(quantized_listing, f"amx::multiply_steps<{vectors}>")
    loop = inner_loop(code, "tdpbusd")
    assert count(loop, "tdpbusd") == vectors
    assert count(loop, "tileload") == 1 + vectors
    assert_nothing_else_touches_memory(loop)


def test_a_task_configures_tiles_and_gives_them_back(listing: str, quantized_listing: str) -> None:
    tasks = body(listing, "amx::conv_task"), body(quantized_listing, "amx::quantized_conv_task")
    for task in tasks:
        assert count(task, "ldtilecfg") > 0
        assert count(task, "tilerelease") > 0
