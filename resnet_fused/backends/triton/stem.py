"""max_pool(relu(bn(conv(x)))) with a 3×3, stride 2, padding 1 pool: the stem in one kernel.

Algorithm: a program computes a TILE_H × TILE_W patch of the convolution's output for BLOCK_N
channels as an implicit GEMM, normalises and rectifies it in registers, and pools it to
(TILE_H/2 − 1) × (TILE_W/2 − 1) results. The inner dimension is one window row at a time: its S·C
inputs, 21 in a ResNet, padded to 32; for NHWC images they are one contiguous run.
Tiles: 16×16 convolution outputs to 7×7 results, so 1.3 times the convolution's arithmetic.
Memory traffic: the image from DRAM once, in any layout; the pooled result once. The convolution's
output, the largest tensor of a ResNet, never exists.

Pooling without shared-memory code: rows (and columns) come in even/odd pairs; a 3-wide window is a
pair and the next pair's even element, so each direction is one split, one shift, two maxima.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...parameters import ConvBn, MaxPool
from ..tuning import Tuner, describe
from .convolution import conv_bn
from .elementwise import max_pool
from .launching import Config, convolution_precision, dense, empty_nhwc, is_wide, launch, machine
from .primitives import normalise, rectify

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
    mean,
    var,
    gamma,
    beta,
    out,
    eps,
    H,
    W,
    P,
    Q,
    K,
    POOLED_H,
    POOLED_W,
    x_n,
    x_c,
    x_h,
    x_w,
    weight_k,
    weight_c,
    weight_r,
    weight_s,
    R: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PLANAR: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid: (images × patches × tiles of K,). (P, Q) is the convolution's output, never stored;
    PLANAR says that the image's columns, not its channels, are neighbours in memory."""
    tiles_n = tl.cdiv(K, BLOCK_N)
    patches_w = tl.cdiv(POOLED_W, TILE_W // 2 - 1)
    patches_h = tl.cdiv(POOLED_H, TILE_H // 2 - 1)
    patch = tl.program_id(0) // tiles_n
    column = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pooled_w = patch % patches_w * (TILE_W // 2 - 1)
    pooled_h = patch // patches_w % patches_h * (TILE_H // 2 - 1)
    image = patch // patches_w // patches_h
    if WIDE:
        image = image.to(tl.int64)

    row = tl.arange(0, TILE_H * TILE_W)
    p = pooled_h * 2 - 1 + row // TILE_W
    q = pooled_w * 2 - 1 + row % TILE_W
    h = p * STRIDE_H - PAD_H
    w = q * STRIDE_W - PAD_W
    if WIDE:
        h = h.to(tl.int64)
        w = w.to(tl.int64)

    # The order of a window row's inputs is free; follow memory.
    t = tl.arange(0, BLOCK_T)
    if PLANAR:
        s = t % S
        c = t // S
    else:
        s = t // C
        c = t % C
    w_tap = w[:, None] + s[None, :] * DILATION_W
    used = t < S * C
    in_row = used[None, :] & (w_tap >= 0) & (w_tap < W)
    # Offsets rather than pointers: half the registers.
    x_image = x + image * x_n
    x_offset = h[:, None] * x_h + w_tap * x_w + c[None, :] * x_c
    weight_offset = column[None, :] * weight_k + (s * weight_s + c * weight_c)[:, None]
    weight_mask = used[:, None] & (column < K)[None, :]

    acc = tl.zeros((TILE_H * TILE_W, BLOCK_N), tl.float32)
    for r in range(R):
        h_tap = h + r * DILATION_H
        in_image = in_row & ((h_tap >= 0) & (h_tap < H))[:, None]
        a = tl.load(x_image + (x_offset + r * DILATION_H * x_h), in_image, other=0.0)
        b = tl.load(weight + (weight_offset + r * weight_r), weight_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    exact: tl.constexpr = out.dtype.element_ty == tl.float32 and PRECISION == "ieee"
    bn = (mean, var, gamma, beta, eps)
    value = rectify(normalise(acc, bn, column, column < K, exact))
    # Positions outside the convolution's output are the pool's padding. Rounding commutes with max.
    exists = (p >= 0) & (p < P) & (q >= 0) & (q < Q)
    value = tl.where(exists[:, None], value, float("-inf")).to(out.dtype.element_ty)

    value = tl.reshape(value, (TILE_H, TILE_W // 2, 2, BLOCK_N))
    even, odd = tl.split(tl.permute(value, (0, 1, 3, 2)))
    value = _pool_pairs(even, odd, 1)
    value = tl.reshape(value, (TILE_H // 2, 2, TILE_W // 2, BLOCK_N))
    even, odd = tl.split(tl.permute(value, (0, 2, 3, 1)))
    value = _pool_pairs(even, odd, 0)

    i = tl.arange(0, TILE_H // 2)
    j = tl.arange(0, TILE_W // 2)
    keep_h = (i < TILE_H // 2 - 1) & (pooled_h + i < POOLED_H)
    keep_w = (j < TILE_W // 2 - 1) & (pooled_w + j < POOLED_W)
    position = (image * POOLED_H + pooled_h + i)[:, None] * POOLED_W + (pooled_w + j)[None, :]
    tl.store(
        out + position[:, :, None] * K + column[None, None, :],
        value,
        (keep_h[:, None] & keep_w[None, :])[:, :, None] & (column < K)[None, None, :],
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


def stem(tuner: Tuner, x: Tensor, layer: ConvBn, pool: MaxPool) -> Tensor:
    """max_pool(relu(bn(conv(x)))); two launches for other pools and for wide window rows."""
    conv, bn = layer
    weight = conv.weight
    filters, channels, r, s = weight.shape
    if pool != _FUSED_POOL or conv.groups != 1 or s * channels > _MOST_INNER:
        return max_pool(conv_bn(tuner, x, layer, None, True), pool)

    batch, _, height, width = x.shape
    p, q = conv.output_size(height, width)
    pooled_h, pooled_w = pool.output_size(p, q)
    out = empty_nhwc((batch, filters, pooled_h, pooled_w), x)
    precision = convolution_precision(x.dtype)
    wide = is_wide(x, out)
    planar = x.stride(3) < x.stride(1)

    def run(config: Config) -> None:
        tile_h, tile_w, block_n = config.blocks
        patches = triton.cdiv(pooled_h, tile_h // 2 - 1) * triton.cdiv(pooled_w, tile_w // 2 - 1)
        launch(
            stem_kernel, (batch * patches * triton.cdiv(filters, block_n),), config,
            x, weight, *dense(bn), out, bn.eps, height, width, p, q, filters, pooled_h, pooled_w,
            *x.stride(), *weight.stride(),
            R=r, S=s, C=channels, STRIDE_H=conv.stride[0], STRIDE_W=conv.stride[1],
            PAD_H=conv.padding[0], PAD_W=conv.padding[1],
            DILATION_H=conv.dilation[0], DILATION_W=conv.dilation[1],
            PLANAR=planar, WIDE=wide, PRECISION=precision,
            TILE_H=tile_h, TILE_W=tile_w, BLOCK_N=block_n,
            BLOCK_T=max(16, triton.next_power_of_2(s * channels)),
        )  # fmt: skip

    fma = x.element_size() == 4 and precision == "ieee" and not machine(x.device).interpreted
    tuner.run(
        ("stem", *describe(x, conv), planar, wide),
        x.device,
        lambda: _FMA if fma else _TENSOR_CORE,
        run,
    )
    return out
