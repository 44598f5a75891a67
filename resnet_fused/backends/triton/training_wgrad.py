"""The gradient of a convolution's weight.

Algorithm: a GEMM of output channels × (taps × input channels) whose inner dimension runs over all
output positions; operands are zero where the window hangs over the edge. Positions are split among
programs, each of which writes a float32 part; a second kernel sums the parts in order, so that the
same inputs give the same bits.
Tiles: BLOCK_M output channels × BLOCK_N columns (tap, input channel), BLOCK_C positions a step.
Memory traffic: each operand once per tile of the other, 4 bytes per part and weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...parameters import Convolution
from . import launching
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
    positions,
)
from .primitives import is_inside, multiply, split_position

_SUM = Config((1024,), 4, 1)
_TENSOR_CORE = (
    Config((128, 128, 64), 8, 3),
    Config((128, 64, 64), 4, 3),
    Config((64, 128, 64), 4, 3),
    Config((64, 64, 64), 4, 3),
    Config((32, 32, 32), 4, 3),
    Config((16, 16, 32), 4, 3),
)
_FMA = (
    Config((64, 64, 16), 4, 2),
    Config((32, 32, 32), 4, 2),
    Config((16, 16, 32), 4, 2),
)
_LEAST_POSITIONS = 1024  # of a part, else the parts cost more than they bring


@triton.jit
def wgrad_kernel(
    grad,
    x,
    out,
    rows,
    rows_per_part,
    image,
    result,
    group_in,
    group_out,
    WINDOW: tl.constexpr,
    ONE_TAP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (tiles of group_out × R·S·group_in, parts, groups). out: (parts, K, R·S·group_in)
    float32. ONE_TAP: TILE.n divides group_in."""
    columns = WINDOW.r * WINDOW.s * group_in
    tiles_n = tl.cdiv(columns, TILE.n)
    group = tl.program_id(2)
    filter_index = (tl.program_id(0) // tiles_n) * TILE.m + tl.arange(0, TILE.m)
    in_filters = filter_index < group_out
    filter_channel = group * group_out + filter_index
    first_column = (tl.program_id(0) % tiles_n) * TILE.n
    column = first_column + tl.arange(0, TILE.n)
    in_columns = column < columns
    if ONE_TAP:
        tap = first_column // group_in
        tap_h = tap // WINDOW.s * WINDOW.dilation_h - WINDOW.pad_h
        tap_w = tap % WINDOW.s * WINDOW.dilation_w - WINDOW.pad_w
        channel = group * group_in + column - tap * group_in
    else:
        taps = column // group_in
        tap_h = (taps // WINDOW.s * WINDOW.dilation_h - WINDOW.pad_h)[None, :]
        tap_w = (taps % WINDOW.s * WINDOW.dilation_w - WINDOW.pad_w)[None, :]
        channel = group * group_in + column - taps * group_in

    part = tl.program_id(1)
    first_row = part * rows_per_part
    if TILE.is_wide:
        first_row = part.to(tl.int64) * rows_per_part
    last_row = tl.minimum(first_row + rows_per_part, rows)
    block_m: tl.constexpr = TILE.m
    block_n: tl.constexpr = TILE.n
    acc = tl.zeros((block_m, block_n), tl.float32)
    for start in range(first_row, last_row, TILE.c):
        row = start + tl.arange(0, TILE.c)
        in_rows = (row < last_row)[:, None]
        offset = row[:, None] * result.c + filter_channel[None, :]
        mask = in_rows & in_filters[None, :]
        g = tl.load(grad + offset, mask, other=0.0)
        if WINDOW.is_pointwise:
            position = row[:, None]
            inside = in_rows
        else:
            n, p, q = split_position(row, result.h, result.w)
            h = p[:, None] * WINDOW.stride_h + tap_h
            w = q[:, None] * WINDOW.stride_w + tap_w
            inside = in_rows & is_inside(h, image.h) & is_inside(w, image.w)
            position = (n[:, None] * image.h + h) * image.w + w
        place = x + position * image.c + channel[None, :]
        b = tl.load(place, inside & in_columns[None, :], other=0.0)
        acc = multiply(tl.trans(g), b, acc, tl.constexpr(TILE.precision))

    place = (part * result.c + filter_channel)[:, None] * columns + column[None, :]
    tl.store(out + place, acc, in_filters[:, None] & in_columns[None, :])


@triton.jit
def sum_parts_kernel(parts, out, count, elements, BLOCK: tl.constexpr):
    """Grid: (blocks of elements,). out[i] = sum over parts[:, i], in order."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        total += tl.load(parts + part * elements + index, mask, other=0.0)
    tl.store(out + index, total.to(out.dtype.element_ty), mask)


def wgrad_configs(g: Tensor, conv: Convolution) -> list[Config]:
    """Launch configurations, the heuristic's choice first; the fourth block is the number of
    parts. The heuristic is the convolutions': rounds of programs × the cost of a tile."""
    limits = launching.machine(g.device)
    filters, columns = len(conv.weight) // conv.groups, conv.weight[0].numel()
    rows = positions(g)
    fma = g.element_size() == 4 and convolution_precision(g.dtype) == "ieee"
    costs: dict[Config, float] = {}
    most = max(1, rows // _LEAST_POSITIONS)
    for (block_m, block_n, block_c), warps, stages in _FMA if fma else _TENSOR_CORE:
        block_m = min(block_m, max(16, triton.next_power_of_2(filters)))
        block_n = min(block_n, max(16, triton.next_power_of_2(columns)))
        if g.element_size() == 4 and not fma:
            block_c //= 2
        tiles = triton.cdiv(filters, block_m) * triton.cdiv(columns, block_n) * conv.groups
        parts = min(most, max(1, 2 * limits.num_sms // tiles), 64)
        cost = triton.cdiv(tiles * parts, limits.num_sms) * (
            (block_m * block_n + 64 * (block_m + block_n)) * triton.cdiv(rows, parts)
        )
        costs.setdefault(Config((block_m, block_n, block_c, parts), warps, stages), cost)
    return sorted(costs, key=costs.__getitem__)


class _Plan(NamedTuple):
    """Both launches, and the shape of what passes between them."""

    parts: tuple[int, int]
    launch: Launch
    sum_parts: Launch


@planned
def _plan(
    config: Config,
    g: Tensor,
    x: Tensor,
    conv: Convolution,
    precision: str,
) -> _Plan:
    weight = conv.weight
    group_in, r, s = weight.shape[1:]
    columns, group_out = r * s * group_in, len(weight) // conv.groups
    rows = positions(g)
    block_m, block_n, block_c, parts = config.blocks
    rows_per_part = triton.cdiv(triton.cdiv(rows, parts), block_c) * block_c
    parts = triton.cdiv(rows, rows_per_part)
    (block,) = _SUM.blocks
    return _Plan(
        (parts, weight.numel()),
        Launch(
            wgrad_kernel,
            (config.tiles(group_out, columns), parts, conv.groups),
            config,
            g.device,
            rows=rows,
            rows_per_part=rows_per_part,
            image=Image.of(x),
            result=Image.of(g),
            group_in=group_in,
            group_out=group_out,
            WINDOW=Window.of(conv),
            ONE_TAP=group_in % block_n == 0,
            TILE=Tile(block_m, block_n, block_c, is_wide(g, x, weight), precision),
        ),
        Launch(
            sum_parts_kernel,
            (triton.cdiv(weight.numel(), block),),
            _SUM,
            g.device,
            count=parts,
            elements=weight.numel(),
            BLOCK=block,
        ),
    )


def wgrad(config: Config, g: Tensor, x: Tensor, conv: Convolution) -> Tensor:
    """See `resnet_fused.backends.training.TrainingKernels.wgrad`."""
    g, x = nhwc(g), nhwc(x)
    plan = _plan(config, g, x, conv, convolution_precision(x.dtype))
    parts = x.new_empty(plan.parts, dtype=torch.float32)
    plan.launch(g, x, parts)
    out = empty_nhwc(conv.weight.shape, conv.weight)
    plan.sum_parts(parts, out)
    return out
