"""Swizzles, matrix descriptors and boxes of tensor maps, derived a second time from the PTX ISA.

The first derivation is the kernels' and the simulator's (csrc/host_sim/layout.h). This one follows
the ISA's text and tables in another form: tables instead of formulae, lists of pixels instead of
carries. test_cutlass_oracle.py holds both against CUTLASS.
"""

from __future__ import annotations

import itertools

import pytest

pytestmark = pytest.mark.simulator

# "Swizzling modes": where the eight 16-byte chunks of a 128-byte line lie, line after line, until
# the pattern repeats.
PATTERNS = {
    128: [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 3, 2, 5, 4, 7, 6],
        [2, 3, 0, 1, 6, 7, 4, 5],
        [3, 2, 1, 0, 7, 6, 5, 4],
        [4, 5, 6, 7, 0, 1, 2, 3],
        [5, 4, 7, 6, 1, 0, 3, 2],
        [6, 7, 4, 5, 2, 3, 0, 1],
        [7, 6, 5, 4, 3, 2, 1, 0],
    ],
    64: [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 3, 2, 5, 4, 7, 6],
        [2, 3, 0, 1, 6, 7, 4, 5],
        [3, 2, 1, 0, 7, 6, 5, 4],
    ],
    32: [[0, 1, 2, 3, 4, 5, 6, 7], [1, 0, 3, 2, 5, 4, 7, 6]],
    16: [[0, 1, 2, 3, 4, 5, 6, 7]],  # no swizzle
}
BITS = {128: 3, 64: 2, 32: 1, 16: 0}
MODES = {128: 1, 64: 2, 32: 3}  # "Matrix descriptor format", bits 63-62


def place(row_bytes: int, line: int, chunk: int) -> int:
    """The byte where a chunk of a 128-byte line lies, lines counted from the pattern's start."""
    pattern = PATTERNS[row_bytes]
    return 128 * line + 16 * pattern[line % len(pattern)][chunk]


@pytest.mark.parametrize("row_bytes", PATTERNS)
def test_swizzles_follow_the_tables(simulator, row_bytes):
    for line, chunk in itertools.product(range(227 * 8), range(8)):
        address = 128 * line + 16 * chunk
        assert simulator.swizzled(address, BITS[row_bytes]) == place(row_bytes, line, chunk)


def field(descriptor: int, first: int, last: int) -> int:
    return descriptor >> first & 2 ** (last - first + 1) - 1


@pytest.mark.parametrize("row_bytes", MODES)
def test_descriptors_have_the_fields_of_the_table(simulator, row_bytes):
    """Addresses and offsets as (x & 0x3ffff) >> 4, whatever the address of a block in a cluster
    has above them; bits that the table does not name are 0."""
    for offset in range(0, 227 * 1024, 32):
        for base in range(8):
            descriptor = simulator.matrix_descriptor(offset, row_bytes, base)
            assert field(descriptor, 0, 13) == offset // 16
            assert field(descriptor, 14, 15) == 0
            assert field(descriptor, 16, 29) == 1  # unused with a swizzle
            assert field(descriptor, 30, 31) == 0
            assert field(descriptor, 32, 45) == 8 * row_bytes // 16
            assert field(descriptor, 46, 48) == 0
            assert field(descriptor, 49, 51) == base
            assert field(descriptor, 52, 61) == 0
            assert field(descriptor, 62, 63) == MODES[row_bytes]


@pytest.mark.parametrize("row_bytes", MODES)
def test_products_read_the_canonical_layout(simulator, row_bytes):
    """The section "Canonical layouts", K-major, of 256 rows: every 16 elements of depth, from every
    multiple of the pattern's length on within 8 KiB."""
    length = 8 * row_bytes
    for start in range(0, 8192, length):
        for depth in range(row_bytes // 32):
            descriptor = simulator.matrix_descriptor(start + 32 * depth, row_bytes)
            for row, chunk in itertools.product(range(256), range(2)):
                line, at = divmod(row * row_bytes + 32 * depth + 16 * chunk, 128)
                expected = start + place(row_bytes, line, at // 16)
                assert simulator.chunk_address(descriptor, row, chunk) == expected


def test_products_without_a_swizzle_read_core_matrices(simulator):
    """Core matrices of 8 rows x 16 bytes in line: the leading offset from chunk to chunk, the
    stride offset from 8 rows to the next."""
    for start, leading, stride in itertools.product((0, 128, 4096), (128, 2048), (256, 384)):
        descriptor = start // 16 | leading // 16 << 16 | stride // 16 << 32
        for row, chunk in itertools.product(range(256), range(2)):
            expected = start + row // 8 * stride + row % 8 * 16 + chunk * leading
            assert simulator.chunk_address(descriptor, row, chunk) == expected


@pytest.mark.parametrize("row_bytes", MODES)
def test_base_offset_is_that_of_the_patterns_start(simulator, row_bytes):
    """The table's "base offset = (addr >> 7) & 7", of the address at which the pattern starts."""
    for start in range(0, 4096, 128):
        for depth in range(row_bytes // 32):
            descriptor = simulator.matrix_descriptor(start + 32 * depth, row_bytes, start >> 7 & 7)
            for row, chunk in itertools.product(range(64), range(2)):
                line, at = divmod(row * row_bytes + 32 * depth + 16 * chunk, 128)
                expected = start + place(row_bytes, line, at // 16)
                assert simulator.chunk_address(descriptor, row, chunk) == expected


BOXES = [((24, 10), (8, 4)), ((72, 5, 3), (64, 2, 2)), ((16, 3, 4, 2), (16, 2, 3, 2))]


@pytest.mark.parametrize(("size", "box"), BOXES)
def test_boxes_hold_the_tensor_and_zeros_around(simulator, size, box):
    """The section "Tiled mode": from every first element whose box touches the tensor or nearly."""
    strides = list(itertools.accumulate(size[:-1], lambda a, b: a * b, initial=2))[1:]
    row_bytes = 2 * box[0]
    swizzle = {128: 3, 64: 2, 32: 1, 16: 0}[row_bytes]
    firsts = [range(-8 * (box[0] // 8), size[0] + 8, 8)]
    firsts += [range(-b, s + 1) for s, b in zip(size[1:], box[1:], strict=True)]
    for first in itertools.product(*firsts):
        expected = []
        lines = itertools.product(*(range(b) for b in reversed(box[1:])))
        for number, index in enumerate(lines):
            at = [f + i for f, i in zip(first[1:], reversed(index), strict=True)]
            inside = all(0 <= a < s for a, s in zip(at, size[1:], strict=True))
            row = sum(a * s for a, s in zip(at, strides, strict=True))
            for chunk in range(row_bytes // 16):
                c = first[0] + 8 * chunk
                line, byte = divmod(number * row_bytes + 16 * chunk, 128)
                there = inside and 0 <= c < size[0]
                expected.append(
                    (
                        place(row_bytes, line, byte // 16) if swizzle else 128 * line + byte,
                        row + 2 * c if there else -1,
                        2 * min(8, size[0] - c) if there else 0,
                    )
                )
        assert simulator.tile_chunks(size, strides, box, swizzle, first, 0) == expected


def windows() -> list[tuple[int, ...]]:
    """Extent, taps, step, padding and dilation of one dimension, where any output is left."""
    every = itertools.product((1, 3, 4), (1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2))
    return [w for w in every if w[0] + 2 * w[3] > w[4] * (w[1] - 1)]


def test_pixels_are_listed_through_the_bounding_box(simulator):
    """The section "Im2col mode": the bounding box's pixels, every step-th, width first, then
    height, then image; a copy takes so many from its first one on, and adds the tap's offset to
    each. Every window in width with every eighth in height and the reverse, from every third pixel
    on, under the last tap."""
    channels, batch, count = 72, 2, 7
    pairs = [(a, b) for i, a in enumerate(windows()) for b in windows()[i % 8 :: 8]]
    compared = 0
    for width, height in pairs + [(b, a) for a, b in pairs]:
        axes = []
        for extent, taps, step, padding, dilation in (width, height):
            lower, upper = -padding, padding - dilation * (taps - 1)
            axes.append((extent, lower, upper, step, dilation * (taps - 1)))
        box = [range(lower, extent + upper, step) for extent, lower, upper, step, _ in axes]
        listed = [(n, h, w) for n in range(batch + 1) for h in box[1] for w in box[0]]
        size = (channels, axes[0][0], axes[1][0], batch)
        lower, upper, step, offsets = (tuple(axis[k] for axis in axes) for k in (1, 2, 3, 4))
        for first in range(0, len(listed) * batch // (batch + 1), 3):
            n, h, w = listed[first]
            chunks = simulator.pixel_chunks(size, lower, upper, step, count, (8, w, h, n), offsets)
            expected = []
            for number in range(count):
                inside = first + number < len(listed)
                n, h, w = listed[first + number] if inside else (batch, 0, 0)
                x, y = w + offsets[0], h + offsets[1]
                inside = n < batch and 0 <= x < size[1] and 0 <= y < size[2]
                pixel = ((n * size[2] + y) * size[1] + x) * channels
                for chunk in range(8):
                    c = 8 + 8 * chunk
                    there = inside and c < channels
                    expected.append(
                        (
                            place(128, number, chunk),
                            2 * (pixel + c) if there else -1,
                            16 if there else 0,
                        )
                    )
            assert chunks == expected
            compared += 1
    assert compared > 10_000


def test_pixels_outside_the_bounding_box_are_refused(simulator):
    size, lower, upper = (64, 5, 5, 1), (-1, -1), (-1, -1)
    for w, h in itertools.product(range(-3, 6), repeat=2):
        inside = -1 <= w <= 3 and -1 <= h <= 3
        chunks = simulator.pixel_chunks(size, lower, upper, (1, 1), 4, (0, w, h, 0), (0, 0))
        assert (chunks is not None) == inside
