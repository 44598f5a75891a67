"""A convolution with the statistics of its result: the forward pass of training.

Algorithm: implicit GEMM on NHWC activations and KRSC weights. The epilogue rounds the float32
accumulator to the result's dtype, stores it, and takes mean and squared deviations of the rounded
tile: what later passes normalise is the rounded tensor, so that its statistics centre it exactly.
Tiles: BLOCK_M positions × BLOCK_N channels, BLOCK_C of the inner dimension a step, which runs over
taps and blocks of channels, or, for few channels, over both as one index (FLAT).
Memory traffic: x once (again from L2 for each column tile and tap), the result once, and 12 bytes
per tile and channel of statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...parameters import Convolution
from ..arguments import dense_convolution
from .convolution import Gemm, configurations
from .launching import (
    Config,
    Image,
    Launch,
    Tile,
    Window,
    convolution_precision,
    empty_nhwc,
    is_wide,
    nhwc,
    planned,
)
from .primitives import convolve, for_sums, tile_index

FLAT_CHANNELS = 16  # below which taps and channels are one inner index


@triton.jit
def tile_moments(tile, in_rows, count):
    """Mean and sum of squared deviations of a (rows, channels) tile's columns; `count` of its
    rows are `in_rows`. Two passes over registers, the second correcting the first one's mean."""
    tile = for_sums(tile)
    share = 1.0 / count  # close enough for the correction
    mean = tl.sum(tl.where(in_rows[:, None], tile, 0.0), 0) / count
    deviation = tl.where(in_rows[:, None], tile - mean[None, :], 0.0)
    rest = tl.sum(deviation, 0) * share
    return mean + rest, tl.sum(deviation * deviation, 0) - rest * rest * count


@triton.jit
def conv_stats_kernel(
    x,
    weight,
    out,
    moments,
    image,
    result,
    gemm,
    WINDOW: tl.constexpr,
    EVEN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (tiles of rows × columns, groups); `gemm` is a group's. moments: (row tiles, 3, K) or
    None."""
    row, first_column = tile_index(gemm.rows, gemm.columns, TILE.m, TILE.n, TILE.is_wide)
    group = tl.program_id(1)
    column = first_column + tl.arange(0, TILE.n)
    in_columns = column < gemm.columns
    channel = group * gemm.columns + column
    in_rows = row < gemm.rows
    acc = convolve(
        x,
        weight,
        tl.where(in_rows, row, 0),
        tl.where(in_columns, channel, 0),
        group * gemm.channels,
        image,
        result,
        gemm.channels,
        EVEN,
        WINDOW,
        TILE,
    )
    channels = result.c
    mask = in_rows[:, None] & in_columns[None, :]
    place = out + row[:, None] * channels + channel[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask)
    if moments is not None:
        # Read back in the layout of memory: summing columns in that of the tensor cores' results
        # takes several times the shuffles between threads.
        tl.debug_barrier()
        stored = tl.load(place, mask, other=0.0)
        tile = tl.program_id(0) // tl.cdiv(gemm.columns, TILE.n)
        count = tl.sum(in_rows.to(tl.float32), 0)
        mean, squares = tile_moments(stored, in_rows, count)
        place = moments + tile * 3 * channels + channel
        tl.store(place, mean, in_columns)
        tl.store(place + channels, squares, in_columns)
        tl.store(place + 2 * channels, tl.zeros_like(mean) + count, in_columns)


def _gemm(value: Tensor, conv: Convolution) -> Gemm:
    """That of a group; `channels` are those of one tap."""
    p, q = conv.output_size(*value.shape[2:])
    filters, group_in = conv.weight.shape[:2]
    return Gemm(value.shape[0] * p * q, filters // conv.groups, group_in)


def _is_flat(conv: Convolution) -> bool:
    group_in, r, s = conv.weight.shape[1:]
    return group_in < FLAT_CHANNELS and r * s > 1


def conv_stats_configs(value: Tensor, conv: Convolution) -> list[Config]:
    """Launch configurations for a convolution of `value`, the heuristic's choice first."""
    gemm = _gemm(value, conv)
    r, s = conv.weight.shape[2:]
    taps = r * s
    if _is_flat(conv):
        gemm, taps = gemm._replace(channels=taps * gemm.channels), 1
    precision = convolution_precision(value.dtype)
    return configurations(gemm, value, precision, taps, conv.groups, accumulators=2)


class _Plan(NamedTuple):
    """A launch, and the shapes of what it writes."""

    shape: tuple[int, int, int, int]
    moments: tuple[int, int, int]
    launch: Launch


@planned
def _plan(
    config: Config,
    value: Tensor,
    conv: Convolution,
    precision: str,
    statistics: bool,
) -> _Plan:
    gemm = _gemm(value, conv)
    filters = len(conv.weight)
    result = Image(*conv.output_size(*value.shape[2:]), filters)
    shape = (value.shape[0], filters, result.h, result.w)
    block_m, block_n, block_c = config.blocks
    wide = is_wide(value, conv.weight, value.new_empty(shape, device="meta"))
    return _Plan(
        shape,
        (triton.cdiv(gemm.rows, block_m), 3, filters),
        Launch(
            conv_stats_kernel,
            (config.tiles(gemm.rows, gemm.columns), conv.groups),
            config,
            value.device,
            image=Image.of(value),
            result=result,
            gemm=gemm,
            WINDOW=Window.of(conv)._replace(is_flat=_is_flat(conv)),
            EVEN=gemm.channels % block_c == 0,
            TILE=Tile(block_m, block_n, block_c, wide, precision),
        ),
    )


def conv_stats(
    config: Config, x: Tensor, conv: Convolution, statistics: bool
) -> tuple[Tensor, Tensor | None]:
    """See `resnet_fused.backends.training.TrainingKernels.conv_stats`."""
    x = nhwc(x)
    conv = dense_convolution(conv, x.dtype)
    plan = _plan(config, x, conv, convolution_precision(x.dtype), statistics)
    out = empty_nhwc(plan.shape, x)
    moments = x.new_empty(plan.moments, dtype=torch.float32) if statistics else None
    plan.launch(x, conv.weight, out, moments)
    return out, moments
