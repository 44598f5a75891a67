"""The host simulator itself: its primitives worked out from the PTX ISA, and mistakes to be caught.

The kernels' results over it are in test_cuda_conv.py, and with other backends' in test_ops.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from resnet_fused.backends.cuda_sim import SimulatedBackend
from resnet_fused.parameters import ConvBn, Convolution, MaxPool
from resnet_fused.testing.cases import BlockCase, generator, make_batch_norm, make_bottleneck
from resnet_fused.testing.on import On

pytestmark = pytest.mark.simulator

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
UNTOUCHED = 0xFFFFFFFF


def words(tensor: Tensor) -> list[int]:
    """The tensor's memory as unsigned 32-bit words."""
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return list(struct.unpack(f"<{len(raw) // 4}I", raw))


def floats(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(torch.int32).view(torch.float32)


# What each primitive does


def test_ldmatrix_hands_row_elements_to_lanes(simulator):
    """PTX ISA, ldmatrix: lane l gets elements 2 (l % 4) and the next of row l / 4, matrix after
    matrix; lanes 8 m to 8 m + 7 name the rows of matrix m."""
    memory = [1000 + i for i in range(256)]
    rows = [16 * ((5 * lane + 3) % 64) for lane in range(32)]
    out = simulator.run_primitive("ldmatrix", rows + memory, 128)
    for lane in range(32):
        for matrix in range(4):
            row = rows[8 * matrix + lane // 4]
            assert out[4 * lane + matrix] == memory[row // 4 + lane % 4]


@pytest.mark.parametrize(("name", "count"), [("two", 2), ("four", 4)])
def test_matrices_are_transposed_on_their_way(simulator, name, count):
    """PTX ISA, ldmatrix and stmatrix, .trans: lane l holds elements l / 4 of rows 2 (l % 4) and the
    next, matrix after matrix; what is stored so lies as it lay before."""
    elements = torch.arange(32 * 8, dtype=torch.int16).view(4, 8, 8)
    out = simulator.run_primitive(f"{name} transposed matrices", words(elements), 64 * count)
    stored, held = out[: 32 * count], out[32 * count :]
    assert stored == words(elements[:count])
    assert held == words(elements[:count].transpose(1, 2).contiguous())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_max_of_pairs_passes_nan_and_shuffles(simulator, dtype):
    values = torch.randn(2, 64, generator=generator()).to(dtype)
    values[0, 3] = values[1, 6] = float("nan")
    values[:, 9] = torch.tensor([-0.0, 0.0])
    name = f"max of pairs {'f16' if dtype == torch.float16 else 'bf16'}"
    out = torch.tensor(simulator.run_primitive(name, words(values), 64)).to(torch.int32)
    larger, reversed_lanes = out.view(2, 32)
    expected = torch.maximum(*values)
    assert torch.equal(larger.view(dtype).isnan(), expected.isnan())
    assert torch.equal(larger.view(dtype).nan_to_num(), expected.nan_to_num())
    assert not larger.view(dtype)[9].signbit()
    assert torch.equal(reversed_lanes, torch.tensor(words(values[0])).to(torch.int32).flip(0))


def test_shuffle_exchanges_lanes(simulator):
    """PTX ISA, shfl.sync, .bfly: a lane receives from the lane whose number differs by the mask."""
    numbers = words(torch.arange(32.0))
    out = simulator.run_primitive("shuffle", numbers, 5 * 32)
    assert out == [numbers[lane ^ mask] for mask in (1, 2, 4, 8, 16) for lane in range(32)]


def a_elements(lane: int) -> list[tuple[int, int]]:
    """PTX ISA, fragments of mma.m16n8k16 for .f16 and .bf16: (row, column) of a0..a7."""
    group, member = lane // 4, lane % 4
    return [
        (group + (0 if i in (0, 1, 4, 5) else 8), member * 2 + (i & 1) + (8 if i >= 4 else 0))
        for i in range(8)
    ]


def b_elements(lane: int) -> list[tuple[int, int]]:
    group, member = lane // 4, lane % 4
    return [(member * 2 + (i & 1) + (8 if i >= 2 else 0), group) for i in range(4)]


def c_elements(lane: int) -> list[tuple[int, int]]:
    group, member = lane // 4, lane % 4
    return [(group + (8 if i >= 2 else 0), member * 2 + (i & 1)) for i in range(4)]


def mma(simulator: ModuleType, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    kind = "bf16" if a.dtype == torch.bfloat16 else "f16"
    registers = []
    for lane in range(32):
        for matrix, elements in ((a, a_elements), (b, b_elements), (c, c_elements)):
            registers += words(torch.stack([matrix[at] for at in elements(lane)]))
    values = floats(simulator.run_primitive(f"mma {kind}", registers, 128))
    d = torch.full((16, 8), float("nan"))
    for lane in range(32):
        for i, at in enumerate(c_elements(lane)):
            d[at] = values[4 * lane + i]
    return d


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_mma_multiplies_integers_exactly(simulator, dtype):
    rng = generator()
    a, b, c = (
        torch.randint(-9, 10, shape, generator=rng).float()
        for shape in ((16, 16), (16, 8), (16, 8))
    )
    assert torch.equal(mma(simulator, a.to(dtype), b.to(dtype), c), a @ b + c)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_mma_accumulates_in_float32(simulator, dtype):
    rng = generator()
    a, b = (torch.randn(shape, generator=rng).to(dtype) for shape in ((16, 16), (16, 8)))
    c = torch.randn(16, 8, generator=rng)
    truth = a.double() @ b.double() + c.double()
    magnitude = a.double().abs() @ b.double().abs() + c.double().abs()
    # 16 additions, each off by at most half a unit in the last place of a partial sum.
    assert ((mma(simulator, a, b, c).double() - truth).abs() <= 16 * 2**-24 * magnitude).all()


def tf32_registers(a: Tensor, b: Tensor, c: Tensor) -> list[int]:
    """PTX ISA, fragments of mma.m16n8k8 for .tf32: a (16, 8), b (8, 8) and c (16, 8), by lanes."""
    registers = []
    for lane in range(32):
        group, member = lane // 4, lane % 4
        rows = [(group + 8 * (i % 2), member + 4 * (i // 2)) for i in range(4)]
        depths = [(member + 4 * i, group) for i in range(2)]
        for matrix, elements in ((a, rows), (b, depths), (c, c_elements(lane))):
            registers += words(torch.stack([matrix[at] for at in elements]))
    return registers


def test_tf32_mma_multiplies_integers_exactly(simulator):
    rng = generator()
    a, b, c = (
        torch.randint(-999, 1000, shape, generator=rng).float()
        for shape in ((16, 8), (8, 8), (16, 8))
    )
    values = floats(simulator.run_primitive("mma tf32", tf32_registers(a, b, c), 128))
    d = torch.full((16, 8), float("nan"))
    for lane in range(32):
        for i, at in enumerate(c_elements(lane)):
            d[at] = values[4 * lane + i]
    assert torch.equal(d, a @ b + c)


def test_tf32_rounds_to_nearest_and_ties_away(simulator):
    """PTX ISA, cvt.rna.tf32: 10 bits behind the point are kept, so 13 are cut off."""
    given = [0x3F800000, 0x3F800FFF, 0x3F801000, 0xBF801000, 0x3F803000, 0x3FFFF000, 0x7F7FFFFF]
    given += [0x7F800000, 0xFF800000, 0x00000001, 0x00001000, 0x80000000, 0x7FC00000]
    expected = [0x3F800000, 0x3F800000, 0x3F802000, 0xBF802000, 0x3F804000, 0x40000000, 0x7F800000]
    expected += [0x7F800000, 0xFF800000, 0x00000000, 0x00002000, 0x80000000, 0x7FFFFFFF]
    padding = [0] * (32 - len(given))
    assert simulator.run_primitive("round to tf32", given + padding, 32) == expected + padding


def convert(simulator: ModuleType, values: Tensor) -> Tensor:
    """(values, 4): the bits of binary16 and bfloat16, and of both as float32 again."""
    rows = []
    for chunk in values.split(1024):
        padded = torch.zeros(1024)
        padded[: len(chunk)] = chunk
        out = simulator.run_primitive("convert", words(padded), 4096)
        rows.append(torch.tensor(out).view(1024, 4)[: len(chunk)])
    return torch.cat(rows)


def check_conversions(simulator: ModuleType, values: Tensor) -> None:
    out = convert(simulator, values)
    for column, dtype in enumerate((torch.float16, torch.bfloat16)):
        expected = values.to(dtype)
        bits = out[:, column].to(torch.int16).view(dtype)
        assert torch.equal(bits.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(bits[number].view(torch.int16), expected[number].view(torch.int16))
        back = out[:, 2 + column].to(torch.int32).view(torch.float32)
        assert torch.equal(back[number], expected[number].float())


def test_every_16_bit_number_converts_there_and_back(simulator):
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        check_conversions(simulator, every.view(dtype).float())


def test_conversion_rounds_to_nearest_even(simulator):
    """Around every boundary between neighbouring binary16 numbers, which holds bfloat16's too."""
    below = torch.arange(0, 0x7C00).to(torch.int16).view(torch.float16).float()
    above = torch.arange(1, 0x7C01).to(torch.int16).view(torch.float16).float()
    above[-1] = 65536.0  # what infinity stands for in the last interval
    middle = (below + above) / 2
    beside = [torch.nextafter(middle, torch.full_like(middle, to)) for to in (0.0, 1e9)]
    check_conversions(simulator, torch.cat([middle, *beside, -middle]))
    check_conversions(simulator, torch.tensor([1e-45, 3e38, -3.4e38, 2.0**-25, 1.1754944e-38]))


def test_copies_land_at_the_wait_for_their_group(simulator):
    out = simulator.run_primitive("copy groups", list(range(10, 18)), 3)
    assert out == [10, 0, 17]


def test_barrier_shows_every_write(simulator):
    numbers = list(range(96))
    assert simulator.run_primitive("reverse", numbers, 96) == numbers[::-1]


def test_barrier_does_not_wait_for_threads_that_left(simulator):
    out = simulator.run_primitive("barrier of the others", [0], 96)
    assert out == list(range(31, -1, -1)) + [UNTOUCHED] * 64


def test_halo_reads_within_bounds(simulator):
    out = simulator.run_primitive("halo", list(range(96)), 96)
    assert out == [1, *(2 * i for i in range(1, 95)), 94]


def test_shared_memory_starts_as_nan(simulator):
    assert floats(simulator.run_primitive("read uninitialised", [0], 1)).isnan()


# The same for what only sm_90a has


def halves(values: list[int], dtype: torch.dtype = torch.float16) -> Tensor:
    """The elements in 32-bit words, two in each."""
    return torch.tensor(values, dtype=torch.int64).to(torch.int32).view(dtype)


def unswizzled(values: list[int], rows: int) -> Tensor:
    """(rows, 64) elements of 128-byte rows whose 16-byte chunks were permuted: PTX ISA, swizzling
    modes, 128 bytes: chunk c of row r lies where chunk c xor (r mod 8) would."""
    chunks = halves(values).view(rows, 8, 8)
    order = torch.tensor([[chunk ^ row % 8 for chunk in range(8)] for row in range(rows)])
    return torch.stack([chunks[row][order[row]].flatten() for row in range(rows)])


def signed(value: int) -> int:
    return value % 2**32


def test_mbarrier_phases_hand_words_over(simulator):
    """Two mbarriers of 32 arrivals, waited for by alternating parity."""
    numbers = list(range(128))
    expected = [32 * turn + 31 - lane for turn in range(4) for lane in range(32)]
    assert simulator.run_primitive("mbarrier", numbers, 128) == expected


@pytest.mark.parametrize("first", [(0, 0), (8, 3), (-8, -2), (16, 7), (24, 0), (0, 10)])
def test_tiles_land_swizzled_with_zeros_around(simulator, first):
    matrix = torch.arange(1, 241).half().view(10, 24)
    column, row = first
    out = simulator.run_primitive(
        "tile", [signed(column), signed(row), 0, 0, *words(matrix)], 8 * 32
    )
    around = torch.zeros(40, 160).half()
    around[10:20, 48:72] = matrix
    expected = around[10 + row : 18 + row, 48 + column : 112 + column]
    assert torch.equal(unswizzled(out, 8), expected)


# Channel, width, height and batch of the first pixel, and the offsets of a tap: (0, 0) to (1, 2).
PIXELS = [
    (0, -1, -2, 0, 0, 0),
    (8, 3, 1, 0, 1, 2),
    (0, 5, 3, 1, 0, 1),
    (-8, 1, 5, 2, 1, 0),
]


@pytest.mark.parametrize("first", PIXELS)
def test_pixels_are_those_of_a_convolution(simulator, first):
    """A window of 2 x 3 with steps 2 and 1 over 7 x 6 pixels, padded by 1 and 2 (width x height).

    The expected column comes from padding and slicing: the pixels under the tap, in the order of
    the output positions, from the first one on, and zeros after the last image.
    """
    channel, w, h, n, offset_w, offset_h = first
    image = torch.arange(1, 3 * 6 * 7 * 16 + 1).bfloat16().view(torch.float16).view(3, 6, 7, 16)
    padded = torch.zeros(3, 6 + 4, 7 + 2, 16).half()
    padded[:, 2:8, 1:8] = image
    under_tap = padded[:, offset_h : offset_h + 8, offset_w : offset_w + 8 : 2].reshape(-1, 16)
    start = (n * 8 + h + 2) * 4 + (w + 1) // 2
    column = torch.zeros(40, 80).half()
    taken = under_tap[start : start + 40]
    column[: len(taken), 8:24] = taken
    given = [*(signed(v) for v in first), 0, 0, *words(image)]
    out = simulator.run_primitive("pixels", given, 40 * 32)
    assert torch.equal(unswizzled(out, 40), column[:, 8 + channel : 72 + channel])


@pytest.mark.parametrize("first", [(0, 0), (8, 2), (-8, -3)])
def test_stores_write_what_lies_within_the_tensor(simulator, first):
    box = torch.arange(1, 513).half().view(8, 64)
    column, row = first
    out = simulator.run_primitive("store", [signed(column), signed(row), 0, 0, *words(box)], 6 * 12)
    expected = halves([UNTOUCHED] * 6 * 200).view(24, 100).clone()
    expected[8 + row : 16 + row, 8 + column : 72 + column] = box
    expected = expected[8:14, 8:32]
    got = halves(out).view(6, 24)
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


def wgmma_d(values: list[int], columns: int) -> Tensor:
    """PTX ISA, D fragment of wgmma.m64nNk16: value i of a thread of the warpgroup."""
    numbers = floats(values).view(128, columns // 2)
    d = torch.full((64, columns), float("nan"))
    for thread in range(128):
        for i in range(columns // 2):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
            d[row, 8 * (i // 4) + thread % 4 * 2 + i % 2] = numbers[thread, i]
    return d


# Type, columns, and whether the product is added to what the registers held: their numbers.
WGMMA = {
    "wgmma f16 n64": (torch.float16, 64, False),
    "wgmma f16 n128": (torch.float16, 128, True),
    "wgmma bf16 n64": (torch.bfloat16, 64, True),
    "wgmma bf16 n128": (torch.bfloat16, 128, False),
}


@pytest.mark.parametrize("name", WGMMA)
def test_wgmma_multiplies_integers_exactly(simulator, name):
    dtype, columns, adds = WGMMA[name]
    rng = generator()
    a, b = (torch.randint(-9, 10, (rows, 64), generator=rng).to(dtype) for rows in (64, columns))
    out = simulator.run_primitive(name, words(torch.cat([a, b])), 128 * columns // 2)
    expected = a.float() @ b.float().T
    if adds:
        held = words(torch.arange(columns // 2).float().repeat(128))
        expected += wgmma_d(held, columns)
    assert torch.equal(wgmma_d(out, columns), expected)


def test_wgmma_reads_the_order_that_threads_wrote(simulator):
    """Rows of 16 of 64 elements, their chunks permuted by hand; and in no such order."""
    rng = generator()
    a, b = (torch.randint(-9, 10, (64, 64), generator=rng).half() for _ in range(2))
    given = words(torch.cat([a, b]))
    expected = a[:, :16].float() @ b[:, :16].float().T
    out = simulator.run_primitive("wgmma of written operands", given, 128 * 32)
    assert torch.equal(wgmma_d(out, 64), expected)
    out = simulator.run_primitive("wgmma of operands without swizzle", given, 128 * 32)
    assert not torch.equal(wgmma_d(out, 64), expected)


def product_of_e4m3(simulator, a: Tensor, b: Tensor) -> Tensor:
    """Of the first 32 columns of a and b (64, 128), a · bᵀ."""
    given = words(torch.cat([a, b]).to(torch.float8_e4m3fn))
    return wgmma_d(simulator.run_primitive("wgmma of e4m3 operands", given, 128 * 32), 64)


def test_wgmma_multiplies_e4m3_and_cuts_the_sum(simulator):
    """Integers exactly; of 1 and what is added to it, 13 bits behind the point."""
    a, b = torch.randint(-4, 5, (2, 64, 128), generator=generator()).float()
    assert torch.equal(product_of_e4m3(simulator, a, b), a[:, :32] @ b[:, :32].T)
    a, b = torch.zeros(2, 64, 128)
    a[:, 0] = b[:, 0] = 1
    a[:, 1:32] = 2.0**-7
    b[0, 1], b[1, 1:32], b[2, 1:32] = 2.0**-6, 2.0**-7, -(2.0**-7)
    b[3, 0], b[3, 1] = 2.0**-9, 448
    expected = [1 + 2.0**-13, 1, 1, 3.5 + 2.0**-9]  # but for the cut 1 + 31/2¹⁴ and 1 - 31/2¹⁴
    assert product_of_e4m3(simulator, a, b)[:, :4].unique(dim=0).tolist() == [expected]


@pytest.mark.parametrize("row_bytes", [64, 32])
def test_wgmma_reads_narrower_rows(simulator, row_bytes):
    """Rows of 32 or 16 elements under the swizzle of as many bytes."""
    a, b = (torch.randint(-9, 10, (64, row_bytes // 2), generator=generator()).half(),) * 2
    name = f"wgmma of rows of {row_bytes} bytes"
    out = simulator.run_primitive(name, words(torch.cat([a, b])), 128 * 32)
    assert torch.equal(wgmma_d(out, 64), a.float() @ b.float().T)


def overlapping_rows_input() -> tuple[Tensor, Tensor]:
    """a (64, 16), and 66 chunks of 8 elements, of which b has rows of two neighbours."""
    rng = generator()
    shapes = ((64, 16), (66 * 8,))
    a, chunks = (torch.randint(-9, 10, shape, generator=rng).half() for shape in shapes)
    return a, chunks


def overlapping_rows_words() -> list[int]:
    a, chunks = overlapping_rows_input()
    return words(torch.cat([a.view(64, 2, 8).transpose(0, 1).flatten(), chunks]))


def test_wgmma_reads_rows_that_overlap(simulator):
    """Windows in a line of pixels, without a matrix of them; and by a wrong distance of chunks."""
    a, chunks = overlapping_rows_input()
    expected = a.float() @ chunks.float().unfold(0, 16, 8)[:64].T
    given = overlapping_rows_words()
    out = simulator.run_primitive("wgmma of overlapping rows", given, 128 * 32)
    assert torch.equal(wgmma_d(out, 64), expected)
    out = simulator.run_primitive("wgmma of rows that overlap less", given, 128 * 32)
    assert not torch.equal(wgmma_d(out, 64), expected)


def test_wgmma_counts_the_swizzle_from_the_base_offset(simulator):
    """Operands from the third 128-byte row behind a multiple of 1024 on, permuted from there."""
    rng = generator()
    a, b = (torch.randint(-9, 10, (64, 64), generator=rng).half() for _ in range(2))
    given = words(torch.cat([a, b]))
    expected = a.float() @ b.float().T
    out = simulator.run_primitive("wgmma at a base offset", given, 128 * 32)
    assert torch.equal(wgmma_d(out, 64), expected)
    for mistake in ("wgmma at a wrong base offset", "wgmma at a forgotten base offset"):
        out = simulator.run_primitive(mistake, given, 128 * 32)
        assert not torch.equal(wgmma_d(out, 64), expected)


def test_named_barriers_order_their_own_threads(simulator):
    numbers = list(range(128))
    expected = [*range(63, -1, -1), *range(127, 63, -1)]
    assert simulator.run_primitive("named barriers", numbers, 128) == expected


def test_registers_go_from_warpgroup_to_warpgroup(simulator):
    """PTX ISA, setmaxnreg: claims wait for what the block's pool lacks. At launch each of three
    warpgroups has 80 a thread; the last one keeps 56, whose other 24 are the 8 and 16 claimed."""
    assert simulator.run_primitive("registers", [0], 384) == list(range(384))


# The same primitives on hardware


def compile_primitives(folder: Path, architecture: str, *sources: str) -> ctypes.CDLL:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc in PATH")
    csrc = Path(__file__).resolve().parents[1] / "csrc"
    library = folder / "primitives.so"
    command = [nvcc, "-std=c++17", "-shared", "-Xcompiler=-fPIC", f"-I{csrc}", "-o", library]
    files = [csrc / "host_sim" / "tests" / "primitives.cu", *(csrc / source for source in sources)]
    definitions = ["-DRESNET_FUSED_SM90"] if sources else []
    subprocess.run([*command, *definitions, architecture, *files], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The primitives as nvcc compiles them, for this machine's GPU or for any of compute 8.0."""
    architecture = "-arch=native" if torch.cuda.is_available() else "-arch=sm_80"
    return compile_primitives(tmp_path_factory.mktemp("primitives"), architecture)


@pytest.fixture(scope="module")
def compiled_sm90(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """With those that only sm_90a has."""
    names = ("primitives_cluster.cu", "primitives_schedule.cu", "primitives_sm90.cu")
    sources = [*(f"host_sim/tests/{name}" for name in names), "kernels/cuda/tensor_map.cpp"]
    architecture = "-gencode=arch=compute_90a,code=sm_90a"
    return compile_primitives(tmp_path_factory.mktemp("primitives"), architecture, *sources)


def random_words(count: int) -> list[int]:
    return torch.randint(0, 2**32, (count,), generator=generator()).tolist()


def ldmatrix_input() -> list[int]:
    return [16 * row for row in torch.randperm(64, generator=generator())[:32].tolist()] + (
        random_words(256)
    )


def mma_input(dtype: torch.dtype) -> list[int]:
    """Integers, as the ISA leaves the order of additions open."""
    rng = generator()
    registers = []
    for _ in range(32):
        halves = torch.randint(-9, 10, (12,), generator=rng).to(dtype)
        registers += words(halves) + words(torch.randint(-99, 100, (4,), generator=rng).float())
    return registers


CONFORMANCE = {
    "ldmatrix": (ldmatrix_input, 128),
    "shuffle": (lambda: words(torch.randn(32, generator=generator())), 5 * 32),
    "max of pairs f16": (lambda: random_words(64), 64),
    "max of pairs bf16": (lambda: random_words(64), 64),
    "mma f16": (lambda: mma_input(torch.float16), 128),
    "mma bf16": (lambda: mma_input(torch.bfloat16), 128),
    "mma tf32": (lambda: words(torch.randint(-9, 10, (320,), generator=generator()).float()), 128),
    "round to tf32": (lambda: words(torch.randn(32, generator=generator())), 32),
    "convert": (lambda: words(torch.randn(1024, generator=generator()) * 1e-4), 4096),
    "copy groups": (lambda: random_words(8), 3),
    "reverse": (lambda: random_words(96), 96),
    "barrier of the others": (lambda: [0], 96),
    "swizzle": (lambda: random_words(128), 128),
    "halo": (lambda: random_words(96), 96),
}


def wgmma_input(name: str) -> list[int]:
    dtype, columns, _ = WGMMA[name]
    return words(torch.randint(-9, 10, (64 + columns, 64), generator=generator()).to(dtype))


def rows_input(row_bytes: int) -> list[int]:
    """Two operands of 64 rows, of small integers."""
    return words(torch.randint(-9, 10, (128, row_bytes // 2), generator=generator()).half())


CONFORMANCE_SM90 = {
    "mbarrier": (lambda: random_words(128), 128),
    "tile": (lambda: [8, signed(-3), 0, 0, *random_words(120)], 8 * 32),
    "pixels": (lambda: [8, 3, 1, 0, 1, 2, 0, 0, *random_words(3 * 6 * 7 * 8)], 40 * 32),
    "store": (lambda: [signed(-8), 2, 0, 0, *random_words(256)], 6 * 12),
    "two transposed matrices": (lambda: random_words(128), 128),
    "four transposed matrices": (lambda: random_words(128), 256),
    "wgmma f16 n64": (lambda: wgmma_input("wgmma f16 n64"), 128 * 32),
    "wgmma f16 n128": (lambda: wgmma_input("wgmma f16 n128"), 128 * 64),
    "wgmma bf16 n64": (lambda: wgmma_input("wgmma bf16 n64"), 128 * 32),
    "wgmma bf16 n128": (lambda: wgmma_input("wgmma bf16 n128"), 128 * 64),
    "wgmma of written operands": (lambda: wgmma_input("wgmma f16 n64"), 128 * 32),
    "wgmma of rows of 64 bytes": (lambda: rows_input(64), 128 * 32),
    "wgmma of rows of 32 bytes": (lambda: rows_input(32), 128 * 32),
    "wgmma of overlapping rows": (overlapping_rows_words, 128 * 32),
    "wgmma at a base offset": (lambda: rows_input(128), 128 * 32),
    "named barriers": (lambda: random_words(128), 128),
    "registers": (lambda: [0], 384),
    "cluster ranks": (lambda: [0], 256),
    "cluster read": (lambda: random_words(128), 128),
    "cluster write": (lambda: random_words(512), 512),
    "cluster arrivals": (lambda: random_words(128), 64),
    "multicast": (lambda: random_words(512), 1024),
    "multicast of pixels": (lambda: random_words(72 * 32), 4 * 640),
    "two producers": (lambda: random_words(1536), 192),
    "two consumers": (lambda: random_words(1536), 192),
    "two copies": (lambda: random_words(1536), 64),
    "two barriers": (lambda: random_words(128), 128),
}


def test_primitives_compile_for_a_gpu(compiled):
    assert compiled.run_primitive


def test_sm90_primitives_compile(compiled_sm90):
    assert compiled_sm90.run_primitive


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFORMANCE)
def test_hardware_gives_the_same_bits(simulator, compiled, name):
    compare_with_hardware(simulator, compiled, name, *CONFORMANCE[name])


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="only GPUs of compute capability 9.0 have these instructions",
)
@pytest.mark.parametrize("name", CONFORMANCE_SM90)
def test_hopper_gives_the_same_bits(simulator, compiled_sm90, name):
    compare_with_hardware(simulator, compiled_sm90, name, *CONFORMANCE_SM90[name])


def compare_with_hardware(
    simulator: ModuleType,
    compiled: ctypes.CDLL,
    name: str,
    make: Callable[[], list[int]],
    outputs: int,
) -> None:
    given = make()
    out = (ctypes.c_uint32 * outputs)()
    status = compiled.run_primitive(
        name.encode(),
        (ctypes.c_uint32 * len(given))(*given),
        ctypes.c_size_t(len(given)),
        out,
        ctypes.c_size_t(outputs),
    )
    assert status == 0, f"CUDA error {status}"
    assert list(out) == simulator.run_primitive(name, given, outputs)


# Bank conflicts


def test_swizzle_finds_every_word_without_conflicts(simulator):
    expected = simulator.run_primitive("no swizzle", list(range(128)), 128)
    conflicts = simulator.take_statistics()
    # Rows of 64 bytes: of 8 rows, every other one starts in the same bank.
    assert conflicts["matrix_loads"] == 4
    assert conflicts["bank_conflicts"] == 4 * 6
    assert simulator.run_primitive("swizzle", list(range(128)), 128) == expected
    assert simulator.take_statistics()["bank_conflicts"] == 0


# Turns that one request of a warp takes beyond the first of each part, worked out by hand: 32 banks
# of 4 bytes; parts of 32, 16 and 8 lanes for 4, 8 and 16 bytes a lane.
BANKS = {
    "neighbouring words": 0,
    "one word": 0,
    "neighbouring halves": 0,  # two lanes a word
    "every other word": 1,  # lane 16 is back at bank 0
    "a column of words": 31,  # all in bank 0
    "a padded column of words": 0,  # of 33 words a row
    "a column of words, by every fourth lane": 7,
    "neighbours of 8 bytes": 0,
    "every other one of 8 bytes": 2,  # lane 8 of each half is back at bank 0
    "neighbours of 16 bytes": 0,
    "every other one of 16 bytes": 4,  # lane 4 of each quarter is back at bank 0
    "a column of 16 bytes": 4 * 7,
    "a written column of words": 31,
}


@pytest.mark.parametrize("name", BANKS)
def test_bank_conflicts_of_ordinary_accesses_are_counted(simulator, name):
    simulator.run_primitive(f"banks: {name}", [0], 32)
    counts = simulator.take_statistics()
    assert (counts["shared_requests"], counts["shared_conflicts"]) == (1, BANKS[name])


def test_bank_conflicts_are_counted_turn_by_turn_of_a_loop(simulator):
    """Even lanes turn once, odd ones twice: 32 lanes in 16 x 2 banks, then 16 lanes in 8 x 2."""
    simulator.run_primitive("banks: every other word, again by odd lanes", [0], 32)
    counts = simulator.take_statistics()
    assert (counts["shared_requests"], counts["shared_conflicts"]) == (2, 1 + 1)


def test_swizzle_forgotten_by_the_reader_shows(simulator):
    expected = simulator.run_primitive("swizzle", list(range(128)), 128)
    assert simulator.run_primitive("swizzle forgotten by the reader", list(range(128)), 128) != (
        expected
    )


# Mistakes that must not pass

FAULTS = {
    "reverse without barrier": r"thread .* races for byte \d+ .*it writes what thread \d+ read",
    "overwrite too early": r"races for byte \d+ .*writes what thread \d+ read",
    "copy read one group early": r"reads byte 16 .* asynchronous copy of thread 0 .* in flight",
    "copy never awaited": r"exits with 1 asynchronous copies that it never waited for",
    "copy of another thread": r"in flight|races",
    "barrier that one lane misses": r"deadlock .*threads 0-6 wait at __syncthreads; threads 7-7 "
    r"wait at ldmatrix; threads 8-63 wait at __syncthreads",
    "diverged": r"is at mma.m16n8k16.f16 while other lanes of its warp are at ldmatrix",
    "mma of what is no tf32": r"multiplies 00000001, which is no TF32 number",
    "halo off by one": r"thread \(95, 0, 0\) of block \(0, 0, 0\) reads 4 bytes out of bounds",
    "shared out of bounds": r"writes 4 bytes at 1024 of shared memory, which has 1024",
    "shared misaligned": r"writes 16 bytes at 8 of shared memory, which is no multiple",
    "write the input": r"writes 4 bytes out of bounds .*read-only",
}

# The same for what only sm_90a has, with the number of words that the kernels are given.
FAULTS_SM90 = {
    "mbarrier not waited for": (128, r"races for byte \d+ .*(writes|reads) what thread \d+"),
    "mbarrier used too early": (128, "no mbarrier|thread 0 initialised with no barrier between"),
    "tile not waited for": (
        124,
        "has an asynchronous operation write what thread .* read|in flight",
    ),
    "tile never waited for": (124, "a block ends with 1 bulk copies that nobody waited for"),
    "tile of more bytes than expected": (
        124,
        r"deadlock .*threads 0-63 wait at the mbarrier at \d+ \(phase 0, 0 arrivals and 0 bytes "
        r"missing; more bytes than expected have come\)",
    ),
    "tile of fewer bytes than expected": (124, r"deadlock .*0 arrivals and 16 bytes missing\)"),
    "tile announced twice": (124, r"arrives at the mbarrier .*, whose arrivals are complete"),
    "tile counted by an unfenced mbarrier": (124, "with no fence.mbarrier_init"),
    "tile off by one": (124, "reads 16 bytes out of bounds of global memory"),
    "store unfenced": (
        260,
        r"has an asynchronous operation read byte \d+ of shared memory, which thread \d+ wrote, "
        "with no fence.proxy.async between",
    ),
    "store overwritten": (
        260,
        r"writes byte 0 .* while a bulk store of thread 0 from it is in flight",
    ),
    "store not waited for": (260, r"writes byte 0 .* while a bulk store of thread 0 from it is in"),
    "wgmma of operands not waited for": (4096, r"read byte 0 .* while a bulk copy .* to it is in"),
    "wgmma unfenced": (4096, "registers that it has used since the last wgmma.fence"),
    "wgmma overwritten": (4096, r"writes byte \d+ .* while wgmma of threads 0-127 from it is in"),
    "wgmma not waited for": (4096, "exits with wgmma that it never waited for"),
    "wgmma of unfenced operands": (4096, r"thread \d+ wrote, with no fence.proxy.async between"),
    "registers of nobody": (
        1,
        r"deadlock .*threads 128-255 wait at setmaxnreg.inc to 104 \(which takes 3072 registers, "
        r"and 2048 are free\)",
    ),
    "registers not released by a warp": (
        1,
        r"deadlock .*threads 0-127 wait at setmaxnreg.inc to 88 .*256-351 wait at setmaxnreg.dec",
    ),
    "registers released that are not there": (1, "releases all but 88 registers and has 80"),
    "registers claimed that are there": (1, "claims 72 registers and has 80"),
    "registers of an unknown number": (1, "registers, whose number at launch is not known"),
    "named barriers for too many": (128, "deadlock .*wait at bar.sync 1; .*wait at bar.sync 2"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_reported(simulator, name):
    with pytest.raises(simulator.Fault, match=FAULTS[name]):
        simulator.run_primitive(name, list(range(96)), 96)


@pytest.mark.parametrize("name", FAULTS_SM90)
def test_fault_in_what_sm90_has_is_reported(simulator, name):
    count, message = FAULTS_SM90[name]
    given = [0, 4, *range(count - 2)] if "tile" in name else list(range(count))
    with pytest.raises(simulator.Fault, match=message):
        simulator.run_primitive(name, given, 4096)


def test_simulator_goes_on_after_a_fault(simulator):
    for name in FAULTS:
        with pytest.raises(simulator.Fault):
            simulator.run_primitive(name, list(range(96)), 96)
        assert simulator.run_primitive("reverse", list(range(96)), 96) == list(range(95, -1, -1))


def test_unknown_kernel_is_refused(simulator):
    with pytest.raises(IndexError):
        simulator.run_primitive("nothing", [0], 1)


Runner = Callable[[], Tensor]

# Tile, dtype, channels and width of the window: several steps, the last of which has its operands
# where the epilogue or the projection writes next, so that the barrier between them is needed.
BLOCKS = {
    "m64n64": ("m64n64", torch.bfloat16, 64, 4),
    "m128n64": ("m128n64", torch.bfloat16, 64, 3),
    "m128n128": ("m128n128", torch.float16, 64, 3),
    "projection": ("m64n64", torch.bfloat16, 64, 4),
    "float32": ("m64n64", torch.float32, 24, 3),
    "tf32": ("m128n64", torch.float32, 32, 3),
}


@pytest.fixture(params=BLOCKS)
def one_block(
    request: pytest.FixtureRequest, simulator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Runner:
    """A convolution that one block of the kernel computes."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", request.param == "tf32")
    tile, dtype, channels, width = BLOCKS[request.param]
    backend = On(SimulatedBackend(simulator, getattr(simulator.ConvTile, tile)))
    rng = generator()
    x = torch.randn(1, channels, 5, 8, generator=rng).to(dtype)
    conv = Convolution(torch.randn(24, channels, 1, width, generator=rng).to(dtype))
    layer = ConvBn(conv, make_batch_norm(24, rng))
    if request.param == "projection":
        return lambda: backend.conv_bn_projection(x, layer, x, layer)
    return lambda: backend.conv_bn(x, layer, None, False)


def test_every_barrier_of_a_convolution_is_needed(simulator, one_block):
    one_block()
    barriers = simulator.take_statistics()["barriers"]
    assert barriers >= 6
    for skipped in range(barriers):
        simulator.plant({"skipped_barrier": skipped})
        with pytest.raises(simulator.Fault, match=r"races|in flight"):
            one_block()


@pytest.mark.parametrize("tile", ["m64n64", "m128n64", "m128n128"])
def test_convolution_has_no_bank_conflicts(simulator, tile, half):
    """Of 128 channels, so that the epilogue's rows are as wide as its tile."""
    rng = generator()
    x = torch.randn(1, 64, 5, 32, generator=rng).to(half)
    conv = Convolution(torch.randn(128, 64, 1, 3, generator=rng).to(half))
    backend = On(SimulatedBackend(simulator, getattr(simulator.ConvTile, tile)))
    backend.conv_bn(x, ConvBn(conv, make_batch_norm(128, rng)), None, True)
    counts = simulator.take_statistics()
    assert counts["shared_requests"] > 0
    assert (counts["shared_conflicts"], counts["bank_conflicts"]) == (0, 0)


def test_every_wait_of_the_stem_of_sm90_is_needed(simulator):
    """Two strips of a block, of four pooled lines and six groups of lines each, so that its four
    places for groups are used again."""
    backend = On(SimulatedBackend(simulator, capability=90))
    rng = generator()
    x = torch.randn(9, 3, 16, 8, generator=rng).half()
    conv = Convolution(torch.randn(8, 3, 7, 7, generator=rng).half(), (2, 2), (3, 3))
    layer = ConvBn(conv, make_batch_norm(8, rng))

    def run() -> torch.Tensor:
        return backend.stem(x, layer, MaxPool())

    expected = run()
    counts = simulator.take_statistics()
    groups = 2 * (4 + 2)
    assert counts["mbarrier_waits"] == groups
    check_needed(simulator, run, "skipped_mbarrier_wait", range(groups))
    # A strip's first products await three groups: the third one's fence is also one for the first
    # two, and for the weights, whose fence comes before all.
    fences = set(range(1 + groups))
    assert counts["proxy_fences"] == len(fences)
    check_needed(simulator, run, "skipped_proxy_fence", fences - {0, 1, 2, 7, 8})
    # Before the first line, none has to be read.
    check_needed(simulator, run, "skipped_named_barrier", range(1, counts["named_barriers"]))
    check_needed(simulator, run, "skipped_register_release", [0])
    check_needed(simulator, run, "skipped_arrival", range(groups))
    for wait in range(counts["product_waits"]):  # the registers still hold NaN
        simulator.plant({"skipped_product_wait": wait})
        with contextlib.suppress(simulator.Fault):
            assert not torch.equal(run(), expected)


def test_every_barrier_of_the_stem_is_needed(simulator):
    rng = generator()
    x = torch.randn(1, 3, 28, 28, generator=rng).half()
    conv = Convolution(torch.randn(64, 3, 7, 7, generator=rng).half(), (2, 2), (3, 3))
    layer = ConvBn(conv, make_batch_norm(64, rng))
    for skipped in range(3):
        simulator.plant({"skipped_barrier": skipped})
        with pytest.raises(simulator.Fault, match="races"):
            On(SimulatedBackend(simulator)).stem(x, layer, MaxPool())


@pytest.mark.parametrize("stride", [1, 2])
def test_every_barrier_and_wait_of_a_bottleneck_is_needed(simulator, stride):
    """Three steps of conv1, nine of conv2, two slices of three and one, the latter of conv3."""
    case = BlockCase(1, 72, 14, 14, 64, 64, stride, projection=True)
    x, *layers = make_bottleneck(case, generator(), torch.bfloat16)
    run = partial(SimulatedBackend(simulator)._launcher.bottleneck, "cuda_bottleneck", x, layers)
    run()
    counts = simulator.take_statistics()
    steps = 3 + 9 + 2 * (3 + 1)
    barriers = steps + 2 + 2 * 2 - 1  # behind conv1, conv2, and both parts of a slice but the last
    assert (counts["waits"], counts["barriers"]) == (steps, barriers)
    for mistake, number in (("skipped_wait", steps), ("skipped_barrier", barriers)):
        for skipped in range(number):
            simulator.plant({mistake: skipped})
            with pytest.raises(simulator.Fault, match=r"races|in flight"):
                run()


def test_every_wait_of_a_convolution_is_needed(simulator, one_block):
    one_block()
    waits = simulator.take_statistics()["waits"]
    assert waits >= 4
    for skipped in range(waits):
        simulator.plant({"skipped_wait": skipped})
        with pytest.raises(simulator.Fault, match="in flight"):
            one_block()


# Rows of 128 positions: 18 tiles of 128 x 64, or 9 of 128 x 128, three to a row, for the 8 or 4
# blocks that the simulated GPU holds, so that the first blocks meet three of them and use each
# buffer again, with other channels: scale and shift that a buffer holds already are not written
# anew. In clusters of two 3 pairs of 256 x 128, the last of which is half empty, for 2.
@pytest.fixture(
    params=["m128n64_sm90", "m128n128_sm90", "m128n128_sm90_pingpong", "m256n128_sm90_cluster"]
)
def sm90_tile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sm90_blocks(sm90_tile: str, simulator: ModuleType) -> dict[str, Runner]:
    """Convolutions for which each block of the kernel for sm_90a computes several tiles."""
    tile = getattr(simulator.ConvTile, sm90_tile)
    backend = On(SimulatedBackend(simulator, tile, capability=90))
    rng = generator()
    channels, lines = {"m128n64_sm90": (192, 6), "m256n128_sm90_cluster": (128, 9)}.get(
        sm90_tile, (384, 3)
    )
    x = torch.randn(1, 72, lines, 128, generator=rng).half()
    conv = Convolution(torch.randn(channels, 72, 1, 1, generator=rng).half())
    layer = ConvBn(conv, make_batch_norm(channels, rng))
    residual = torch.randn(1, channels, lines, 128, generator=rng).half()
    return {
        "plain": lambda: backend.conv_bn(x, layer, None, False),
        "residual": lambda: backend.conv_bn(x, layer, residual, False),
        "projection": lambda: backend.conv_bn_projection(x, layer, x, layer),
    }


@pytest.fixture(params=["plain", "residual", "projection"])
def sm90_run(request: pytest.FixtureRequest, sm90_blocks: dict[str, Runner]) -> tuple[str, Runner]:
    """One of them, by name."""
    return request.param, sm90_blocks[request.param]


def test_sm90_epilogue_has_no_bank_conflicts(simulator, sm90_run):
    sm90_run[1]()
    counts = simulator.take_statistics()
    assert counts["shared_requests"] > 0
    assert counts["shared_conflicts"] == 0


def check_needed(simulator: ModuleType, run: Runner, mistake: str, which: Iterable[int]) -> None:
    for number in which:
        simulator.plant({mistake: number})
        with pytest.raises(simulator.Fault):
            run()


def test_every_wait_of_the_sm90_kernel_is_needed(simulator, sm90_run, sm90_tile):
    """But for those for what is there anyway. A skipped wait that passes would change no result
    here and yet be a race on hardware."""
    name, run = sm90_run
    run()
    counts = simulator.take_statistics()
    steps = 4 if name == "projection" else 2
    of_tile = steps + 2  # a consumer's waits: steps, scale and shift, the result's place
    waits = set(range(counts["mbarrier_waits"]))
    # The last ones of tiles are for the result's place, free from the start where there is no
    # residual, as often as there are such places.
    free = set() if name == "residual" else {steps + 1}
    if sm90_tile == "m128n128_sm90_pingpong":
        # The first consumer has two of three tiles, each with a place of its own, and waits for its
        # second turn. With two steps it could tell the phases of its stages apart without.
        assert len(waits) == 2 * of_tile + 1
        free |= {of_tile} if steps < 4 else set()
    elif sm90_tile == "m256n128_sm90_cluster":
        assert len(waits) == 2 * of_tile
    else:
        assert len(waits) == 3 * of_tile
        free |= set() if name == "residual" else {2 * of_tile - 1}
    check_needed(simulator, run, "skipped_mbarrier_wait", waits - free)
    check_needed(simulator, run, "skipped_named_barrier", range(counts["named_barriers"]))
    check_needed(simulator, run, "skipped_proxy_fence", range(counts["proxy_fences"]))
    # Of the first tile: before step 1 and at the end; before step 0, no product is under way.
    check_needed(simulator, run, "skipped_product_wait", (1, 2))
    stores = 2 if "cluster" in sm90_tile else 3
    assert counts["store_waits"] == stores
    check_needed(simulator, run, "skipped_store_wait", range(stores))
    clustered = counts["cluster_barriers"] > 0
    assert counts["cluster_barriers"] == 2 * clustered
    check_needed(simulator, run, "skipped_cluster_barrier", range(2 * clustered))


@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize("splits", [2, 4, 8])
def test_every_wait_of_the_split_kernel_is_needed(simulator, splits, projects):
    """Of blocks that share a K loop of 18 steps, nine or more each where they are two, so that
    every stage is used again."""
    tile = getattr(simulator.ConvTile, f"m64n64_sm90_split{splits}")
    backend = On(SimulatedBackend(simulator, tile, capability=90))
    rng = generator()
    x = torch.randn(1, 72, 8, 9, generator=rng).half()
    conv = Convolution(torch.randn(72, 72, 3, 3, generator=rng).half(), (1, 1), (1, 1))
    layer = ConvBn(conv, make_batch_norm(72, rng))

    def run() -> torch.Tensor:
        if projects:
            return backend.conv_bn_projection(x, layer, x, layer)
        return backend.conv_bn(x, layer, None, False)

    expected = run()
    counts = simulator.take_statistics()
    steps = -(-18 // splits)
    assert counts["mbarrier_waits"] == steps * (1 + projects)
    check_needed(simulator, run, "skipped_mbarrier_wait", range(counts["mbarrier_waits"]))
    check_needed(simulator, run, "skipped_cluster_barrier", range(2))
    check_needed(simulator, run, "bytes_not_expected", [128])
    # Behind the first product's last step: its registers still hold NaN.
    simulator.plant({"skipped_product_wait": steps})
    with contextlib.suppress(simulator.Fault):
        assert not torch.equal(run(), expected)


def test_sm90_kernel_must_release_registers(simulator, sm90_blocks):
    simulator.plant({"skipped_register_release": 0})
    with pytest.raises(simulator.Fault, match=r"deadlock .*-383 wait at setmaxnreg.inc"):
        sm90_blocks["plain"]()


def test_sm90_kernel_expects_all_its_bytes(simulator, sm90_blocks):
    simulator.plant({"bytes_not_expected": 128})
    with pytest.raises(simulator.Fault, match=r"deadlock .* more bytes than expected have come"):
        sm90_blocks["residual"]()


@pytest.fixture
def limited(simulator: ModuleType) -> Iterator[ModuleType]:
    """The simulator with a limit on waits for mbarriers."""
    simulator.set_spin_limit(1000)
    yield simulator
    simulator.set_spin_limit()


def test_sm90_kernel_names_the_barrier_that_it_gives_up_at(limited, sm90_blocks):
    """Thread 0 announces nothing of the first stage, which nobody can use then. It fills the others
    and waits for that one again, in its block's second or third tile, eight or four tiles further
    on, or two pairs."""
    limited.plant({"skipped_arrival": 0})
    message = (
        "traps: conv_bn_sm90 gave up: block 0 at tile [248] waited too long for the "
        '"empty" barrier of stage 0 of its pipeline of operands'
    )
    with pytest.raises(limited.Fault, match=message):
        sm90_blocks["residual"]()
    limited.set_spin_limit()
    with pytest.raises(limited.Fault, match="deadlock"):
        sm90_blocks["residual"]()


def test_a_limit_changes_nothing_where_no_barrier_is_stuck(limited, sm90_blocks):
    result = sm90_blocks["residual"]()
    limited.set_spin_limit()
    assert torch.equal(result, sm90_blocks["residual"]())
