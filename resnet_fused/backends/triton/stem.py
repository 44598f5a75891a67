"""max_pool(relu(bn(conv(x)))) with a 3×3, stride 2, padding 1 pool: the stem in one kernel.

Algorithm: a program computes a TILE_H × TILE_W patch of the convolution's output for BLOCK_N
channels as an implicit GEMM, applies batch norm and ReLU in registers, and pools it to
(TILE_H/2 − 1) × (TILE_W/2 − 1) results. The inner dimension is one window row at a time: its S·C
inputs, 21 in a ResNet, padded to 32; for NHWC images they are one contiguous run.
Tiles: 16×16 convolution outputs to 7×7 results, so 1.3 times the convolution's arithmetic.
Memory traffic: the image from DRAM once, in any layout; the pooled result once. The convolution's
output, the largest tensor of a ResNet, never exists.

Pooling without shared-memory code: rows (and columns) come in even/odd pairs; a 3-wide window is a
pair and the next pair's even element, so each direction is one split, one shift, two maxima.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...parameters import ConvBn, MaxPool
from .. import Candidates
from . import launching
from .launching import (
    Config,
    Image,
    Launch,
    Strides,
    Window,
    convolution_precision,
    dense,
    empty_nhwc,
    is_wide,
    planned,
)
from .primitives import multiply, normalise, relu

_FUSED_POOL = MaxPool(3, 2, 1)
_MOST_INNER = 64  # inputs of one window row that fit a step


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pool_pairs(even, odd, AXIS: tl.constexpr):
    """Maxima of (even[i], odd[i], even[i + 1]) along AXIS; the last one lacks its third member."""
    size: tl.constexpr = even.shape[AXIS]
    index = tl.arange(0, size) + 1
    index = tl.where(index < size, index, 0)
    index = index[:, None, None] if AXIS == 0 else index[None, :, None]
    index = tl.broadcast_to(index, even.shape)
    return _max(_max(even, odd), tl.gather(even, index, AXIS))


@triton.jit
def stem_kernel(
    x,
    weight,
    bn,
    out,
    image,
    convolved,
    pooled,
    x_strides,
    weight_strides,
    WINDOW: tl.constexpr,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid: (images × patches × tiles of K,). `convolved`, the convolution's output, is never
    stored. weight_strides are of (K, C, R, S) under the names of (N, C, H, W)."""
    filters = pooled.c
    tiles_n = tl.cdiv(filters, BLOCK_N)
    patches_w = tl.cdiv(pooled.w, TILE_W // 2 - 1)
    patches_h = tl.cdiv(pooled.h, TILE_H // 2 - 1)
    patch = tl.program_id(0) // tiles_n
    column = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pooled_w = patch % patches_w * (TILE_W // 2 - 1)
    pooled_h = patch // patches_w % patches_h * (TILE_H // 2 - 1)
    n = patch // patches_w // patches_h
    if WIDE:
        n = n.to(tl.int64)

    row = tl.arange(0, TILE_H * TILE_W)
    p = pooled_h * 2 - 1 + row // TILE_W
    q = pooled_w * 2 - 1 + row % TILE_W
    h = p * WINDOW.stride_h - WINDOW.pad_h
    w = q * WINDOW.stride_w - WINDOW.pad_w
    if WIDE:
        h = h.to(tl.int64)
        w = w.to(tl.int64)

    # Channels follow each other in either layout, so that the order of sums is the same.
    t = tl.arange(0, BLOCK_T)
    s = t // C
    c = t % C
    w_tap = w[:, None] + s[None, :] * WINDOW.dilation_w
    used = t < WINDOW.s * C
    in_row = used[None, :] & (w_tap >= 0) & (w_tap < image.w)
    # Offsets rather than pointers: half the registers.
    x_image = x + n * x_strides.n
    x_offset = h[:, None] * x_strides.h + w_tap * x_strides.w + c[None, :] * x_strides.c
    weight_row = (s * weight_strides.w + c * weight_strides.c)[:, None]
    weight_offset = column[None, :] * weight_strides.n + weight_row
    weight_mask = used[:, None] & (column < filters)[None, :]

    acc = tl.zeros((TILE_H * TILE_W, BLOCK_N), tl.float32)
    for r in range(WINDOW.r):
        h_tap = h + r * WINDOW.dilation_h
        in_image = in_row & ((h_tap >= 0) & (h_tap < image.h))[:, None]
        a = tl.load(x_image + (x_offset + r * WINDOW.dilation_h * x_strides.h), in_image, other=0.0)
        b = tl.load(weight + (weight_offset + r * weight_strides.h), weight_mask, other=0.0)
        acc = multiply(a, b, acc, PRECISION)

    exact: tl.constexpr = out.dtype.element_ty == tl.float32 and PRECISION == "ieee"
    value = relu(normalise(acc, bn, column, column < filters, exact))
    # Positions outside the convolution's output are the pool's padding. Rounding commutes with max.
    exists = (p >= 0) & (p < convolved.h) & (q >= 0) & (q < convolved.w)
    value = tl.where(exists[:, None], value, float("-inf")).to(out.dtype.element_ty)

    value = tl.reshape(value, (TILE_H, TILE_W // 2, 2, BLOCK_N))
    even, odd = tl.split(tl.permute(value, (0, 1, 3, 2)))
    value = _pool_pairs(even, odd, 1)
    value = tl.reshape(value, (TILE_H // 2, 2, TILE_W // 2, BLOCK_N))
    even, odd = tl.split(tl.permute(value, (0, 2, 3, 1)))
    value = _pool_pairs(even, odd, 0)

    i = tl.arange(0, TILE_H // 2)
    j = tl.arange(0, TILE_W // 2)
    keep_h = (i < TILE_H // 2 - 1) & (pooled_h + i < pooled.h)
    keep_w = (j < TILE_W // 2 - 1) & (pooled_w + j < pooled.w)
    position = (n * pooled.h + pooled_h + i)[:, None] * pooled.w + (pooled_w + j)[None, :]
    tl.store(
        out + position[:, :, None] * filters + column[None, None, :],
        value,
        (keep_h[:, None] & keep_w[None, :])[:, :, None] & (column < filters)[None, None, :],
    )


# Blocks: TILE_H, TILE_W, BLOCK_N.
_TENSOR_CORE = (
    Config((16, 16, 64), 8, 2),
    Config((16, 16, 64), 4, 2),
    Config((8, 32, 64), 8, 2),
    Config((16, 16, 32), 4, 2),
    Config((32, 16, 64), 8, 2),
)
_FMA = (Config((16, 16, 16), 8, 1), Config((8, 16, 32), 8, 1))


def list_stem(x: Tensor, layer: ConvBn, pool: MaxPool) -> Candidates:
    """Candidates of op `stem`: none for other pools and for wide window rows."""
    weight = layer.conv.weight
    if pool != _FUSED_POOL or layer.conv.groups != 1 or weight[0, :, 0].numel() > _MOST_INNER:
        return ()
    fma = x.dtype == torch.float32 and convolution_precision(x.dtype) == "ieee"
    fma = fma and not launching.machine(x.device).interpreted
    return launching.candidates(stem, _FMA if fma else _TENSOR_CORE, "triton stem")


@planned
def _plan(
    config: Config, x: Tensor, layer: ConvBn, pool: MaxPool, precision: str
) -> tuple[tuple[int, ...], Launch]:
    conv, _ = layer
    filters, channels, _, s = conv.weight.shape
    convolved = Image(*conv.output_size(*x.shape[2:]), filters)
    pooled = Image(*pool.output_size(convolved.h, convolved.w), filters)
    shape = (x.shape[0], filters, pooled.h, pooled.w)
    tile_h, tile_w, block_n = config.blocks
    patches = triton.cdiv(pooled.h, tile_h // 2 - 1) * triton.cdiv(pooled.w, tile_w // 2 - 1)
    return shape, Launch(
        stem_kernel,
        (x.shape[0] * patches * triton.cdiv(filters, block_n),),
        config,
        x.device,
        image=Image.of(x),
        convolved=convolved,
        pooled=pooled,
        x_strides=Strides(*x.stride()),
        weight_strides=Strides(*conv.weight.stride()),
        WINDOW=Window.of(conv),
        C=channels,
        WIDE=is_wide(x, x.new_empty(shape, device="meta")),
        PRECISION=precision,
        TILE_H=tile_h,
        TILE_W=tile_w,
        BLOCK_N=block_n,
        BLOCK_T=max(16, triton.next_power_of_2(s * channels)),
    )


def stem(config: Config, x: Tensor, layer: ConvBn, pool: MaxPool) -> Tensor:
    """max_pool(relu(bn(conv(x)))): see `resnet_fused.reference.ops.stem`."""
    layer = ConvBn(layer.conv, dense(layer.bn))
    shape, launch = _plan(config, x, layer, pool, convolution_precision(x.dtype))
    out = empty_nhwc(shape, x)
    launch(x, layer.conv.weight, layer.bn, out)
    return out
