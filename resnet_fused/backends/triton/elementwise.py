"""relu?(bn(x) (+ residual)) and max pooling, NHWC: one pass over memory each.

A program handles BLOCK_M positions × BLOCK_C channels, so batch norm parameters are read once per
tile and every access is a run of channels (16 bytes a thread where alignment allows).
Memory traffic: x and the residual once, the result once; pooling reads overlapping windows from
the caches.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...parameters import BatchNorm, MaxPool
from .launching import Config, dense, empty_nhwc, is_wide, launch, nhwc
from .primitives import normalise, rectify, split_position, tile_index

_ELEMENTS = 4096  # of a tile


@triton.jit
def bn_add_relu_kernel(
    x,
    mean,
    var,
    gamma,
    beta,
    residual,
    out,
    eps,
    rows,
    C,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of rows × C,)."""
    row, channel = tile_index(rows, C, BLOCK_M, BLOCK_C, WIDE)
    channel += tl.arange(0, BLOCK_C)
    offset = row[:, None] * C + channel[None, :]
    mask = (row < rows)[:, None] & (channel < C)[None, :]
    value = tl.load(x + offset, mask, other=0.0).to(tl.float32)
    bn = (mean, var, gamma, beta, eps)
    value = normalise(value, bn, channel, channel < C, out.dtype.element_ty == tl.float32)
    if residual is not None:
        value += tl.load(residual + offset, mask, other=0.0).to(tl.float32)
    if RELU:
        value = rectify(value)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask)


@triton.jit
def max_pool_kernel(
    x,
    out,
    rows,
    H,
    W,
    C,
    P,
    Q,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of rows × C,), rows being pooled positions. NaN wins, as in PyTorch."""
    row, channel = tile_index(rows, C, BLOCK_M, BLOCK_C, WIDE)
    channel += tl.arange(0, BLOCK_C)
    image, p, q = split_position(row, P, Q)
    h = p * STRIDE - PADDING
    w = q * STRIDE - PADDING
    window = ((image * H + h) * W + w) * C
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), x.dtype.element_ty)
    for i in range(KERNEL):
        for j in range(KERNEL):
            in_row = (h + i >= 0) & (h + i < H) & (w + j >= 0) & (w + j < W)
            value = tl.load(
                x + (window + (i * W + j) * C)[:, None] + channel[None, :],
                inside & in_row[:, None],
                other=float("-inf"),
            )
            best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row[:, None] * C + channel[None, :], best, inside)


def _tiles(rows: int, channels: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and tile of a pass over (rows, channels): all channels of a row up to 512."""
    block_c = min(512, triton.next_power_of_2(channels))
    block_m = min(_ELEMENTS // block_c, triton.next_power_of_2(rows))
    grid = (triton.cdiv(rows, block_m) * triton.cdiv(channels, block_c),)
    return grid, {"BLOCK_M": block_m, "BLOCK_C": block_c}


_CONFIG = Config((), warps=4, stages=1)


def bn_add_relu(x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
    """relu?(bn(x) (+ residual)): see `resnet_fused.reference.ops.bn_add_relu`."""
    x = nhwc(x)
    residual = None if residual is None else nhwc(residual)
    out = empty_nhwc(tuple(x.shape), x)
    channels = x.shape[1]
    rows = x.numel() // channels
    grid, blocks = _tiles(rows, channels)
    launch(
        bn_add_relu_kernel, grid, _CONFIG,
        x, *dense(bn), residual, out, bn.eps, rows, channels,
        RELU=relu, WIDE=is_wide(x), **blocks,
    )  # fmt: skip
    return out


def max_pool(x: Tensor, pool: MaxPool) -> Tensor:
    """`F.max_pool2d(x, *pool)`, channels_last."""
    x = nhwc(x)
    batch, channels, height, width = x.shape
    p, q = pool.output_size(height, width)
    out = empty_nhwc((batch, channels, p, q), x)
    rows = batch * p * q
    grid, blocks = _tiles(rows, channels)
    launch(
        max_pool_kernel, grid, _CONFIG,
        x, out, rows, height, width, channels, p, q,
        KERNEL=pool.kernel, STRIDE=pool.stride, PADDING=pool.padding, WIDE=is_wide(x, out),
        **blocks,
    )  # fmt: skip
    return out
