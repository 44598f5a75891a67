"""Training's convolutions on Hopper: tiles and ranges that their host code takes, and their loops.

What csrc/kernels/cuda/conv_training_sm90.cu, conv_training_sm90_lines.cu and wgrad_sm90.cu decide
from sizes is said again here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .cuda_backend import STEP_BYTES, Call, LinesTile, PersistentTile, Product
from .rates import Gpu
from .work import Work, bytes_of

_PANEL = 64  # channels


class Tile(PersistentTile):
    """Of conv_training_sm90.cu."""

    def tiles(self, rows: int, channels: int, classes: int = 1) -> int:
        """Of all blocks; each is of rows of one of as many classes."""
        return classes * super().tiles(rows // classes, channels)

    def cycles(self, rows: int, channels: int, steps: int, sms: int, classes: int = 1) -> int:
        """By which the host code chooses; steps of a tile of each class together."""
        step = max(self.m * self.n * 64 // 2048, self.asked_rows * STEP_BYTES // 64)
        end, of_sm = self.m * self.n // 8, math.ceil(self.tiles(rows, channels, classes) / sms)
        products = steps * step // classes
        if self.ping_pong:
            return of_sm * max(products, (products + end) // 2) + end
        return of_sm * (products + end)


TILES = {
    "m128n64": Tile(128, 64, 6, 1, ping_pong=True),
    "m128n128": Tile(128, 128, 4, 1, ping_pong=True),
    "m256n128_cluster": Tile(256, 128, 3, 1, 2),
}


class Lines(LinesTile):
    """Of conv_training_sm90_lines.cu."""

    def can_take(self, image: Sequence[int]) -> bool:
        width = image[1]
        return width >= 7 and width < self.positions <= self.rows - 2 * (width + 2)

    def cycles(self, batch: int, image: Sequence[int], channels: int, steps: int, sms: int) -> int:
        """By which the host code chooses."""
        products, end = steps * self.positions * 2, self.positions * 8
        of_sm = math.ceil(self.tiles(batch, image, channels) / sms)
        return (of_sm * max(products, (products + end) // 2) + end) * 3 // 4


LINES = {f"m{n}n64_lines": Lines(n, _PANEL, gap=1, rows=368) for n in (216, 248)}


def tiles_in_order(
    rows: int,
    channels: int,
    steps: int,
    sms: int,
    classes: int = 1,
    images: tuple[int, tuple[int, int]] | None = None,
) -> list[str]:
    """The tiles, the one that the heuristic takes first; images: how many of what size, where
    tiles of whole lines may take them."""
    cycles = {name: of.cycles(rows, channels, steps, sms, classes) for name, of in TILES.items()}
    if images is not None:
        batch, size = images
        for name, lines in LINES.items():
            if lines.can_take(size):
                cycles[name] = lines.cycles(batch, size, channels, steps, sms)
    return sorted(cycles, key=cycles.__getitem__)


def takes_lines(window: Sequence[Any], kernel: Sequence[int]) -> bool:
    """Whether lines of a result are those of what it is made from, under a 3 × 3 window."""
    return tuple(kernel) == (3, 3) and all(tuple(of) == (1, 1) for of in window)


def parts(name: str, out: Any, classes: int = 1) -> int:
    """Of a result's statistics or sums."""
    batch, _, *image = out[2]
    if name in LINES:
        return LINES[name].parts(batch, image)
    return classes * math.ceil(batch * math.prod(image) // classes / 128)


class Wgrad(NamedTuple):
    """What wgrad_sm90.cu is told of a weight's gradient."""

    positions: int
    channels: int
    filters: int
    window: tuple[int, int]
    sms: int

    @classmethod
    def of(cls, out: Any, grad: Any, sms: int) -> Wgrad:
        """From the descriptions that the binding takes."""
        filters, channels, *window = out[2]
        batch, _, *image = grad[2]
        return cls(batch * math.prod(image), channels, filters, tuple(window), sms)

    @property
    def panels(self) -> int:
        return math.prod(self.window) * math.ceil(self.channels / _PANEL)

    @property
    def steps(self) -> int:
        return math.ceil(self.positions / 64)

    def tiles(self, width: int) -> int:
        """Of `width` output channels."""
        return math.ceil(self.panels / 4) * math.ceil(self.filters / width)

    def plan(self, width: int) -> tuple[int, int]:
        """Cycles, and the number of ranges of positions with which they are the fewest."""
        elements = self.filters * self.channels * math.prod(self.window)
        step = max(256 * width * 64 // 2048, (256 + width) * STEP_BYTES // 48)
        plans = []
        for count in range(1, min(64, self.steps) + 1):
            of_part = math.ceil(self.steps / count)
            if math.ceil(self.steps / of_part) == count:
                waves = math.ceil(self.tiles(width) * count / self.sms)
                moved = 8 * elements * count // (14 * self.sms)
                plans.append((waves * (of_part * step + 1500) + moved, count))
        return min(plans)


WIDTHS = {"m256n64": 64, "m256n128": 128}


def wgrads_in_order(of: Wgrad) -> list[str]:
    """The tiles, the one that the heuristic takes first."""
    return sorted(WIDTHS, key=lambda name: of.plan(WIDTHS[name])[0])


def _convolution(
    name: str,
    shape: str,
    rows: int,
    channels: int,
    inner: int,
    taps: int,
    ending: int,
    moved: int,
    operand: int = 0,
    classes: int = 1,
) -> tuple[Work, str]:
    """operand: channels of a second product, which is multiplied first; taps: of all classes of
    rows, each of which meets others."""
    tile = TILES[name]
    of_products = [math.ceil(operand / _PANEL), taps / classes * math.ceil(inner / _PANEL)]
    steps = sum(of_products)
    tiles = tile.tiles(rows, channels, classes)
    # What is beyond the inner channels, if those are few, is asked of nobody.
    asked = tile.asked_rows * 2 * min(inner, _PANEL)
    work = tile.work(
        "conv_training_sm90_kernel",
        shape=shape,
        tiles=tiles,
        trips=(1, *of_products[operand == 0 :]),
        dram_bytes=moved,
        l2_bytes=int(tiles * steps) * asked + moved,
        multiply_adds=rows * channels * (inner * taps + classes * operand) // classes,
    )
    sizes = rf"ILi{tile.m}ELi{tile.n}ELi{tile.stages}E"
    return work, rf"conv_training_sm90_kernelIT\w*Tile{sizes}\w*EndingE{ending}E"


def _lines(
    name: str, shape: str, out: Tensor, inner: int, gradient: bool, moved: int
) -> tuple[Work, str]:
    """Of whole lines, for a result of `out`'s sizes."""
    lines, (batch, channels, *image) = LINES[name], out.shape
    chunks, tiles = math.ceil(inner / _PANEL), lines.tiles(batch, image, channels)
    resident = max(inner, channels) <= _PANEL
    # Of three taps, a trip of the innermost loop.
    x_bytes, weight_bytes = lines.part(image)[2] * STEP_BYTES // 3, 3 * _PANEL * STEP_BYTES
    step_bytes = x_bytes + weight_bytes * (not resident)
    below = bytes_of(out) * gradient
    work = Work(
        kernel="conv_training_sm90_lines_kernel",
        config=f"{lines.positions}×64×64, lines" + ", resident" * resident,
        shape=shape,
        tiles=tiles,
        # Warpgroups that take turns are two blocks on an SM, as far as a tile's time goes.
        warps=4,
        blocks_per_sm=2,
        trips=(1, chunks, 3 * chunks),  # a tile; the products
        dram_bytes=moved,
        l2_bytes=tiles * 3 * chunks * step_bytes + below + bytes_of(out),
        multiply_adds=batch * math.prod(image) * channels * inner * 9,
        persistent=True,
        bulk_bytes=step_bytes,
        resident_bytes=3 * weight_bytes * resident,
    )
    sizes = rf"ILi{lines.positions}E"
    return work, rf"conv_training_sm90_lines_kernelIT\w*Tile{sizes}\w*Lb{int(gradient)}E"


def conv_stats(call: Call, gpu: Gpu) -> tuple[Work, str]:
    """Forward, with statistics unless they are of no use."""
    x, weight, window, moments, tile = call.arguments
    batch, filters, *image = call.out.shape
    product = Product.of(x, weight, window)
    shape = product.title()
    moved = int(bytes_of(x) * product.read_share) + bytes_of(weight, moments, call.out)
    rows, (_, inner, *kernel) = batch * math.prod(image), weight[2]
    if tile in LINES:
        return _lines(tile, shape, call.out, inner, False, moved)
    return _convolution(tile, shape, rows, filters, inner, math.prod(kernel), 0, moved)


def dgrad(call: Call, gpu: Gpu) -> tuple[Work, str]:
    """The gradient of a convolution's input."""
    grad, weight, window, below, scale_shift, sums, add, term, tile = call.arguments
    batch, channels, *image = call.out.shape
    described = (0, 0, tuple(call.out.shape))
    filters, _, *kernel = weight[2]
    shape = Product.of(described, weight, window).title()
    shape += ", masks" * (below is not None) + ", adds" * (add is not None)
    shape += ", folded" * (term is not None)
    moved = bytes_of(grad, weight, below, scale_shift, sums, add, *(term or ()), call.out)
    if tile in LINES:
        return _lines(tile, shape, call.out, filters, True, moved)
    rows, ending = batch * math.prod(image), 1 if below is not None else 2
    operand = 0
    if term is not None:
        operand, ending = channels, 3 if below is not None else 4
    taps, classes = math.prod(kernel), math.prod(window[0])
    return _convolution(tile, shape, rows, channels, filters, taps, ending, moved, operand, classes)


def wgrad(call: Call, gpu: Gpu) -> tuple[Work, str]:
    """The sums of all ranges of positions; `sum_parts` has the rest."""
    grad, x, window, parts, tile = call.arguments
    described = (0, 0, tuple(call.out.shape))
    of, width = Wgrad.of(described, grad, gpu.sms), WIDTHS[tile]
    product = Product.of(x, described, window)
    count = parts[2][0]
    steps = math.ceil(of.steps / count)
    blocks = of.tiles(width) * count
    # What is there of panels of x and of grad, of a step of all blocks of a range.
    asked = of.panels * math.ceil(of.filters / width) * 2 * min(of.channels, _PANEL)
    asked += math.ceil(of.panels / 4) * 2 * of.filters
    moved = int(bytes_of(x) * product.read_share) + bytes_of(grad, parts)
    work = Work(
        kernel="wgrad_sm90_kernel",
        config=f"256×{width}×64×{count}",
        shape=product.title(),
        tiles=blocks,
        warps=8,
        blocks_per_sm=1,
        # The products; another warp copies.
        trips=(steps, steps / 8),
        beside=(1,),
        dram_bytes=moved,
        l2_bytes=asked * of.steps * _PANEL + bytes_of(parts),
        multiply_adds=of.positions * of.filters * of.channels * math.prod(of.window),
        bulk_bytes=(256 + width) * STEP_BYTES,
        shared_bytes=(5 if width == _PANEL else 4) * (256 + width) * STEP_BYTES,
    )
    return work, rf"wgrad_sm90_kernelIT\w*TileILi{width}E"


def sum_parts(call: Call, gpu: Gpu) -> tuple[Work, str]:
    """What adds the ranges of `wgrad`, as a launch of its own."""
    parts = call.arguments[3]
    count, elements = parts[2]
    unrolled, rest = divmod(count - 1, 4)
    moved = bytes_of(parts, call.out)
    work = Work(
        kernel="sum_parts_kernel",
        config="1024",
        shape=f"{count} parts of {elements}",
        tiles=math.ceil(elements / 1024),
        warps=8,
        trips=(unrolled, rest),
        dram_bytes=moved,
        l2_bytes=moved,
        multiply_adds=0,
    )
    return work, "sum_parts_kernelIfE" if call.out.element_size() == 4 else "sum_parts_kernelIT"


def window_rows(call: Call, gpu: Gpu) -> tuple[Work, str]:
    """The lines of a window of few channels, side by side."""
    (x, *_), row = call.arguments, call.out.shape[1]
    moved = bytes_of(x, call.out)
    return Work(
        kernel="window_rows_kernel",
        config="256",
        shape=f"{x[2][1]}→{row} at {x[2][2]}×{x[2][3]}",
        tiles=math.ceil(call.out.numel() / 8 / 256),
        warps=8,
        trips=(),
        dram_bytes=moved,
        l2_bytes=moved,
        multiply_adds=0,
    ), "window_rows_kernel"
