"""The launches of backend `cuda` on Hopper: which kernel, tile and grid its host code takes.

What the host code in csrc/kernels/cuda/ decides from sizes (tiles, grids, shared memory) is said
again here, in the same words.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.testing import machine_code

from . import cuda_int8, cuda_kernels, cuda_training
from .cuda_backend import STEP_BYTES, Block, Call, LinesTile, PersistentTile, Product
from .rates import Gpu
from .work import Work, bytes_of, resident_blocks


def step_cycles(m: int, n: int, rows: int) -> int:
    """Of a step of a tile, by which the host code chooses."""
    return max(m * n * 64 // 2048 * 9 // 8, m // 64 * (64 + n) + rows)


class Tile(PersistentTile):
    """Of conv_sm90.cu."""

    def cycles(
        self, rows: int, filters: int, steps: Sequence[int], residual: bool, sms: int
    ) -> int:
        """By which the host code chooses."""
        step = step_cycles(self.m, self.n, self.m + self.n)
        if self.cluster > 1:
            step = step * 9 // 8
        products = sum(steps) * step + 64 * self.n // self.blocks * (len(steps) > 1)
        epilogue = self.m * self.n // 64 * (9 if residual else 1)
        of_sm = math.ceil(self.tiles(rows, filters) / sms)
        seen = math.ceil(of_sm / 2) + 2 if self.ping_pong else math.ceil(of_sm / self.blocks)
        return of_sm * products + seen * epilogue


class Split(NamedTuple):
    """Of conv_sm90_split.cu: blocks of a cluster, which share the K loop of a tile of 64 × 64."""

    splits: int
    stage_bytes: int = (64 + 64) * STEP_BYTES
    partial_bytes: int = 64 * 64 * 4  # accumulators of a block

    def tiles(self, rows: int, filters: int) -> int:
        """Of all blocks."""
        return math.ceil(rows / 64) * math.ceil(filters / 64) * self.splits

    def shares(self, steps: Sequence[int]) -> list[int]:
        """A block's steps of each product."""
        return [math.ceil(n / self.splits) for n in steps]

    def cycles(
        self, rows: int, filters: int, steps: Sequence[int], residual: bool, sms: int
    ) -> int:
        of_block = sum(self.shares(steps)) * step_cycles(64, 64, 64 + 64) + 2500 * len(steps)
        return math.ceil(self.tiles(rows, filters) / sms) * of_block


class Lines(LinesTile):
    """Of conv_sm90_lines.cu."""

    def can_take(self, image: Sequence[int]) -> bool:
        return 2 * image[1] + self.positions <= self.rows

    def cycles(self, batch: int, image: Sequence[int], filters: int, steps: int, sms: int) -> int:
        of_sm = math.ceil(self.tiles(batch, image, filters) / sms)
        copied = self.part(image)[2] // 3 + 128  # rows of a step
        step = step_cycles(128, self.positions, copied)
        return of_sm * (steps * step + self.positions * 128 // 64)


# Those that the heuristic knows, in its order.
SM90_TILES: dict[str, Tile | Split] = {
    "m128n64_sm90": Tile(128, 64, 3, 2),
    "m128n128_sm90": Tile(128, 128, 4, 1),
    "m128n128_sm90_pingpong": Tile(128, 128, 4, 1, ping_pong=True),
    "m256n128_sm90_cluster": Tile(256, 128, 3, 1, 2),
    "m64n64_sm90_split2": Split(2),
    "m64n64_sm90_split4": Split(4),
    "m64n64_sm90_split8": Split(8),
}


LINES = {f"m{n}n128_sm90_lines": Lines(n, 128, gap=0, rows=256) for n in (200, 224)}


def choose_tile(
    rows: int,
    filters: int,
    steps: Sequence[int],
    residual: bool,
    sms: int,
    images: tuple[int, tuple[int, int]] | None,
    signs: bool = False,
) -> str:
    """The name of the tile that the heuristic takes for products of so many steps each; images:
    how many of what size, where tiles of whole lines may take them (`takes_lines`); signs: whether
    the result's are written, which blocks that share a K loop do not."""
    cycles = {
        name: tile.cycles(rows, filters, steps, residual, sms)
        for name, tile in SM90_TILES.items()
        if not (isinstance(tile, Split) and (signs or min(steps) < tile.splits))
    }
    if images is not None:
        batch, size = images
        for name, lines in LINES.items():
            if lines.can_take(size):
                cycles[name] = lines.cycles(batch, size, filters, steps[0], sms)
    return min(cycles, key=cycles.__getitem__)


def takes_lines(products: Sequence[Product], residual: bool, image: Sequence[int]) -> bool:
    """Whether lines of a result of that size are those of x, under a 3 × 3 window."""
    (first, *others) = products
    return (
        not others
        and not residual
        and (first.window, first.stride, first.dilation) == ((3, 3), (1, 1), (1, 1))
        and first.image == tuple(image)
    )


@cache
def _resources(extension: Path) -> dict[str, machine_code.Resources]:
    """Of the kernels for sm_90a in the extension, by mangled name."""
    return machine_code.resources(
        machine_code.cuobjdump(extension, "--dump-resource-usage", "-arch=sm_90a")
    )


@cache
def _code(extension: Path, name: str) -> machine_code.Code:
    """Of the kernel with that mangled name."""
    options = ("--dump-sass", "-arch=sm_90a", f"--function={name}")
    (code,) = machine_code.disassembled(machine_code.cuobjdump(extension, *options))
    return code


def compiled(work: Work, symbol: str, extension: Path) -> Work:
    """`work` with the one kernel whose mangled name matches `symbol`."""
    used = _resources(extension)
    found = [name for name in used if re.search(symbol, name)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} kernels of the extension match {symbol}; expected one.")
    (name,) = found
    kernel = cuda_kernels.described(name)
    return replace(
        work,
        code=_code(extension, name),
        registers=used[name].registers,
        spilled=used[name].spilled,
        shared_bytes=work.shared_bytes if kernel is None else kernel.shared,
    )


def works(
    calls: Sequence[Call], name_of: Callable[[Sequence[Tensor]], str], gpu: Gpu, extension: Path
) -> Iterator[Work]:
    """What the recorded calls launch. name_of: the layer that some tensors are parameters of."""
    # A gradient of a weight is two launches.
    both = [[c, replace(c, kernel="sum_parts")] if c.kernel == "wgrad" else [c] for c in calls]
    for call in itertools.chain.from_iterable(both):
        work, symbol = _DESCRIBE[call.kernel](call, gpu)
        letter = {torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}
        dtype = next(
            (t.dtype for t in call.read if t.dim() == 4 and t.dtype in letter), call.out.dtype
        )
        if dtype in letter:  # else the symbol says it
            symbol = symbol.replace("T", letter[dtype], 1)
        work = compiled(work, symbol, extension)
        blocks = work.blocks_per_sm or resident_blocks(
            gpu.limits, work.registers, work.shared_bytes, work.warps
        )
        yield replace(work, layer=name_of(call.read), blocks_per_sm=blocks)


def _conv_bn(call: Call, gpu: Gpu) -> tuple[Work, str]:
    layer, projection, residual, _, _, _, signs, _ = call.arguments
    batch, filters, *image = call.out.shape
    rows = batch * math.prod(image)
    products = [Product.of(*one) for one in (layer, projection) if one is not None]
    steps = [p.steps for p in products]
    adds = residual is not None
    size = (image[0], image[1])
    images = (batch, size) if takes_lines(products, adds, size) else None
    name = choose_tile(rows, filters, steps, adds, gpu.sms, images, signs is not None)
    multiply_adds = rows * sum(p.weights for p in products)
    added = bytes_of(call.out) if adds else 0
    written = bytes_of(call.out) + bytes_of(signs)
    dram_bytes = int(sum(p.moved_bytes(batch) for p in products)) + added + written
    shape = " + ".join(p.title() for p in products) + ", residual" * bool(added)
    if name in LINES:
        lines = LINES[name]
        tiles, copied = lines.tiles(batch, size, filters), lines.part(size)[2]
        step_bytes = (copied + 3 * 128) * STEP_BYTES  # of x, and of three taps' weights
        work = Work(
            kernel="conv_bn_sm90_lines_kernel",
            config=f"{lines.positions}×128×64, lines",
            shape=shape,
            tiles=tiles,
            warps=8,
            blocks_per_sm=1,
            trips=(1, steps[0] // 3),  # a tile; three taps
            dram_bytes=dram_bytes,
            l2_bytes=tiles * steps[0] // 3 * step_bytes + bytes_of(call.out),
            multiply_adds=multiply_adds,
            persistent=True,
            bulk_bytes=step_bytes,
        )
        return work, rf"conv_bn_sm90_lines_kernelITLi{lines.positions}E"
    tile = SM90_TILES[name]
    tiles = tile.tiles(rows, filters)
    if isinstance(tile, Split):
        shares = tile.shares(steps)
        others = tile.partial_bytes * (tile.splits - 1) // tile.splits * len(products)
        # The copying thread's loops; scale and shift; the products.
        copying, terms = (0.0,) * (1 if len(products) == 1 else 3), 64 / tile.splits / 128
        trips = (*copying, *[terms] * len(products), *shares)
        work = Work(
            kernel="conv_bn_sm90_split_kernel",
            config=f"64×64×64, {tile.splits} blocks a tile",
            shape=shape,
            tiles=tiles,
            warps=4,
            blocks_per_sm=1,
            trips=trips,
            shared_loops=tuple(range(len(copying), len(copying) + len(products))),
            dram_bytes=dram_bytes,
            l2_bytes=tiles * (sum(shares) * tile.stage_bytes + others) + added + bytes_of(call.out),
            multiply_adds=multiply_adds,
            shared_bytes=6 * tile.stage_bytes
            + len(products) * (tile.partial_bytes + 64 * 16 // tile.splits),
            bulk_bytes=tile.stage_bytes,
            meetings=2,
        )
        return work, rf"conv_bn_sm90_split_kernelITLi{tile.splits}ELb{int(len(products) > 1)}E"
    work = tile.work(
        "conv_bn_sm90_kernel",
        shape=shape,
        tiles=tiles,
        # A tile; who takes turns has a loop that waits; the products.
        trips=(1, *[0.0] * tile.ping_pong, *steps),
        dram_bytes=dram_bytes,
        l2_bytes=tiles * sum(steps) * tile.asked_rows * STEP_BYTES + added + written,
        multiply_adds=multiply_adds,
    )
    sizes = rf"ILi{tile.m}ELi{tile.n}ELi{tile.stages}ELi\dELi{tile.blocks}ELi{tile.cluster}E"
    turns = rf"\w*Lb{int(tile.ping_pong)}EEE"
    ending = rf"Lb{int(len(products) > 1)}ELb{int(signs is not None)}E"
    return work, rf"conv_bn_sm90_kernelIT\w*Tile{sizes}{turns}{ending}"


def _bottleneck_sm90(call: Call, gpu: Gpu) -> tuple[Work, str]:
    x, layers, stride = call.arguments
    block = Block.of(x, layers, stride, gpu.sms)
    height, width = block.image
    depth, results = 1 if block.projects else 4, math.ceil(block.out_channels / 64)
    made = (block.lines + 2) / block.lines  # lines of conv1 for one of the result
    # The busiest block's lines, of all blocks.
    tiles = math.ceil(block.jobs / gpu.sms) * min(block.jobs, gpu.sms) * block.lines
    # A projection's weights, once a block; one thread copies lines, and one stores panels.
    job = 1 / block.lines
    copying = [*[0.0] * block.projects, job / 4, made / 4, *[made] * (not block.projects)]
    conv3, conv2, conv1 = (job, 1.0, results / 4), (job, 1.0), (job, made)
    trips = (*copying, *conv3, *conv2, *conv1)
    slowest = len(copying) + len(conv3)  # conv2's job, and its line
    panel = 56 * 128
    positions = block.batch * height * width
    ends = block.inner + block.projects * block.channels
    weights = block.channels * block.inner + 9 * block.inner**2 + ends * block.out_channels
    halo = 2 * block.strips * (block.strips > 1)
    read = made * (width + halo) / width  # of x
    work = Work(
        kernel="bottleneck_sm90_kernel",
        config=f"jobs of {block.lines} lines",
        shape=f"{block.channels}→{block.inner}→{block.out_channels} at {height}×{width}"
        + ", projection" * block.projects,
        tiles=tiles,
        warps=4,
        blocks_per_sm=1,
        trips=trips,
        beside=tuple(n for n in range(len(trips)) if n not in (slowest, slowest + 1)),
        dram_bytes=int(2 * (positions * (block.channels + block.out_channels) + weights)),
        l2_bytes=int(2 * positions * (block.channels * read + block.out_channels)),
        multiply_adds=positions * weights,
        persistent=True,
        bulk_bytes=int(panel * (made * depth + results) / (made + 2)),  # of the steps of products
        resident_bytes=2 * weights,
    )
    return work, rf"bottleneck_sm90_kernelITLb{int(block.projects)}E"


def _stem(call: Call, gpu: Gpu) -> tuple[Work, str]:
    batch, _, *image = call.read[0].shape
    filters, *pooled = call.out.shape[1:]
    conv = [math.ceil(n / 2) for n in image]
    if image[1] % 8 or conv[0] % 2:
        raise ValueError("the model knows the stem for sm_90a alone; describe the other's loops.")
    # Of stem_sm90.cu: strips of 56 columns, overlapping by one, of so many pooled lines.
    strips = batch * (1 if pooled[1] <= 56 else math.ceil((pooled[1] - 1) / 55))
    across = math.ceil(filters / 64)
    blocks = max(1, 2 * gpu.sms // across)
    lines = min(
        range(1, pooled[0] + 1),
        key=lambda n: (
            math.ceil(strips * math.ceil(pooled[0] / n) / blocks) * _strip_lines(n, pooled[0]),
            -n,
        ),
    )
    units = strips * math.ceil(pooled[0] / lines)
    blocks = min(units, blocks)
    steps = lines + (lines < pooled[0])
    images = call.read[0]
    x, x_type = bytes_of(images), "h" if images.dtype == torch.uint8 else "S2_"
    weights = blocks * 2 * 64 * 147
    work = Work(
        kernel="stem_sm90_kernel",
        config=f"strips of {lines} pooled lines",
        shape=f"7×7/2 3→{filters} at {image[0]}×{image[1]}, pooled",
        # As many as the blocks with the most strips have, of every block.
        tiles=math.ceil(units / blocks) * blocks * across,
        warps=4,
        # Weights and their places, of a block's 8 warps; strips, lines; groups of lines, by others.
        trips=(
            *(blocks / units * 2 * n / 256 for n in (64 * 147 / 8, 64 * 28)),
            1,
            steps,
            steps + 2,
        ),
        shared_loops=(0,),
        dram_bytes=x + bytes_of(call.out),
        l2_bytes=x * across + weights * across + bytes_of(call.out),
        multiply_adds=batch * math.prod(conv) * filters * 147,
        shared_bytes=2 * 16 * (30 * 64 + 16) + 28 * 64 * 16 + 56 * 128 + 128,
        persistent=True,
        beside=(4,),
    )
    return work, rf"stem_sm90_kernelIT{x_type}Lb0E"


def _strip_lines(lines: int, pooled: int) -> int:
    """What the host code expects a strip to cost, in pooled lines."""
    return lines + 2 + (lines < pooled)


def _average_pool(call: Call, gpu: Gpu) -> tuple[Work, str]:
    (x,) = call.read
    batch, channels, *image = x.shape
    positions = math.prod(image)
    longest = math.ceil(positions / 16)  # of 16 threads that share a chunk
    work = Work(
        kernel="average_pool_kernel",
        config="128 channels",
        shape=f"{channels} at {positions}",
        tiles=batch * math.ceil(channels / 128),
        warps=8,
        trips=(longest % 4, longest // 4),
        dram_bytes=bytes_of(x, call.out),
        l2_bytes=bytes_of(x, call.out),
        multiply_adds=0,
        shared_bytes=8192,
    )
    return work, r"average_pool_kernelITLi8E"


def _linear(call: Call, gpu: Gpu) -> tuple[Work, str]:
    (batch, channels), classes = call.read[0].shape, call.out.shape[1]
    images = 1 if batch == 1 else 4
    tiles = math.ceil(classes / 8) * math.ceil(batch / images)
    work = Work(
        kernel="linear_kernel",
        config=f"8 classes × {images} images",
        shape=f"{channels}→{classes}",
        tiles=tiles,
        warps=8,
        trips=(math.ceil(channels / 2048),),
        dram_bytes=bytes_of(*call.read, call.out),
        l2_bytes=tiles * channels * (8 * 2 + images * 4),
        multiply_adds=batch * channels * classes,
        shared_bytes=1024,
    )
    return work, rf"linear_kernelITLi8ELi{images}E"


_DESCRIBE: dict[str, Callable[[Call, Gpu], tuple[Work, str]]] = {
    "conv_bn": _conv_bn,
    "bottleneck_sm90": _bottleneck_sm90,
    "stem": _stem,
    "average_pool": _average_pool,
    "linear": _linear,
    "quantized_conv": cuda_int8.quantized_conv,
    "conv_stats": cuda_training.conv_stats,
    "dgrad": cuda_training.dgrad,
    "wgrad": cuda_training.wgrad,
    "sum_parts": cuda_training.sum_parts,
    "window_rows": cuda_training.window_rows,
}
