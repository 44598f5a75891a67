"""The stem's end, max_pool(relu(bn(pre_bn))), and its gradient.

Algorithm: forward, a program normalises, rectifies and pools a tile of pooled positions. Backward,
a program owns a tile of positions and looks, for each window that covers one, whether the window's
maximum stands there. Maxima are found again from the pre-BN values by their order, which the
normalisation keeps or reverses per channel: no rounding can make two programs disagree. Of equal
values the first in the window takes the gradient, as in PyTorch.
Tiles: BLOCK_M positions × BLOCK_C channels.
Memory traffic: the pre-BN output once (windows overlap in the caches), the result once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...parameters import MaxPool
from ..training import Activation
from .launching import Config, empty_nhwc, is_wide, launch, nhwc
from .primitives import is_inside, rectify, split_position, tile_index
from .training_convolution import affine, channel_scale_shift, for_sums

_BYTES = 4096  # of a tile


@triton.jit
def bn_relu_pool_kernel(
    pre_bn,
    scale_shift,
    out,
    rows,
    H,
    W,
    K,
    P,
    Q,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of pooled positions × K,). NaN wins, as in PyTorch."""
    row, first_channel = tile_index(rows, K, BLOCK_M, BLOCK_C, WIDE)
    channel = first_channel + tl.arange(0, BLOCK_C)
    valid = channel < K
    mean, scale, shift = channel_scale_shift(scale_shift, K, channel, valid)
    image, p, q = split_position(row, P, Q)
    h = p * STRIDE - PADDING
    w = q * STRIDE - PADDING
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
    for i in tl.static_range(KERNEL):
        for j in tl.static_range(KERNEL):
            inside = (row < rows) & is_inside(h + i, H) & is_inside(w + j, W)
            position = (image * H + h + i) * W + w + j
            mask = inside[:, None] & valid[None, :]
            value = tl.load(pre_bn + position[:, None] * K + channel[None, :], mask, other=0.0)
            value = affine(value, mean, scale, shift)
            better = (value > best) | (value != value)
            best = tl.where(inside[:, None] & better, value, best)
    mask = (row < rows)[:, None] & valid[None, :]
    tl.store(
        out + row[:, None] * K + channel[None, :], rectify(best).to(out.dtype.element_ty), mask
    )


@triton.jit
def pool_gradient_kernel(
    grad,
    pre_bn,
    scale_shift,
    out,
    sums,
    rows,
    H,
    W,
    K,
    P,
    Q,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of positions × K,). sums: (row tiles, 2, K)."""
    row, first_channel = tile_index(rows, K, BLOCK_M, BLOCK_C, WIDE)
    channel = first_channel + tl.arange(0, BLOCK_C)
    valid = channel < K
    mean, scale, shift = channel_scale_shift(scale_shift, K, channel, valid)
    # An activation grows with pre_bn · sign.
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))[None, :]
    image, h, w = split_position(row, H, W)
    in_rows = row < rows
    here = row[:, None] * K + channel[None, :]
    mask = in_rows[:, None] & valid[None, :]
    own = tl.load(pre_bn + here, mask, other=0.0)
    key = own.to(tl.float32) * sign
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    # The windows that cover h begin at p · STRIDE - PADDING, the last at or before h.
    last_p = (h + PADDING) // STRIDE
    last_q = (w + PADDING) // STRIDE
    for back_p in tl.static_range((KERNEL - 1) // STRIDE + 1):
        for back_q in tl.static_range((KERNEL - 1) // STRIDE + 1):
            p = last_p - back_p
            q = last_q - back_q
            top = p * STRIDE - PADDING
            left = q * STRIDE - PADDING
            covers = in_rows & is_inside(p, P) & is_inside(q, Q)
            covers &= (h - top < KERNEL) & (w - left < KERNEL)
            wins = covers[:, None] & valid[None, :]
            for i in tl.static_range(KERNEL):
                for j in tl.static_range(KERNEL):
                    inside = covers & is_inside(top + i, H) & is_inside(left + j, W)
                    position = (image * H + top + i) * W + left + j
                    other = tl.load(
                        pre_bn + position[:, None] * K + channel[None, :],
                        inside[:, None] & valid[None, :],
                        other=0.0,
                    )
                    other = other.to(tl.float32) * sign
                    earlier = (top + i < h) | ((top + i == h) & (left + j < w))
                    beaten = (other > key) | (earlier[:, None] & (other == key))
                    wins &= ~(inside[:, None] & beaten)
            window = (image * P + p) * Q + q
            acc += tl.load(grad + window[:, None] * K + channel[None, :], wins, other=0.0).to(
                tl.float32
            )
    acc = tl.where(mask & (affine(own, mean, scale, shift) > 0), acc, 0.0)
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + here, rounded, mask)
    g = for_sums(rounded)
    place = sums + tl.program_id(0) // tl.cdiv(K, BLOCK_C) * 2 * K + channel
    tl.store(place, tl.sum(g, 0), valid)
    tl.store(place + K, tl.sum(g * (for_sums(own) - mean[None, :]), 0), valid)


def _tile(pre_bn: Tensor) -> Config:
    block_c = min(triton.next_power_of_2(pre_bn.shape[1]), 64)
    return Config((_BYTES // pre_bn.element_size() // block_c, block_c), 4, 1)


def bn_relu_pool(x: Activation, pool: MaxPool) -> Tensor:
    """See `resnet_fused.backends.training.TrainingKernels.bn_relu_pool`."""
    pre_bn = nhwc(x.pre_bn)
    batch, channels, height, width = pre_bn.shape
    p, q = pool.output_size(height, width)
    out = empty_nhwc((batch, channels, p, q), pre_bn)
    config = _tile(pre_bn)
    block_m, block_c = config.blocks
    rows = batch * p * q
    launch(
        bn_relu_pool_kernel, (triton.cdiv(rows, block_m) * triton.cdiv(channels, block_c),), config,
        pre_bn, x.scale_shift, out, rows, height, width, channels, p, q,
        KERNEL=pool.kernel, STRIDE=pool.stride, PADDING=pool.padding,
        WIDE=is_wide(pre_bn), BLOCK_M=block_m, BLOCK_C=block_c,
    )  # fmt: skip
    return out


def pool_gradient(grad: Tensor, x: Activation, pool: MaxPool) -> tuple[Tensor, Tensor]:
    """See `resnet_fused.backends.training.TrainingKernels.pool_gradient`."""
    grad, pre_bn = nhwc(grad), nhwc(x.pre_bn)
    batch, channels, height, width = pre_bn.shape
    p, q = grad.shape[2:]
    out = empty_nhwc(tuple(pre_bn.shape), pre_bn)
    config = _tile(pre_bn)
    block_m, block_c = config.blocks
    rows = batch * height * width
    tiles_m = triton.cdiv(rows, block_m)
    sums = pre_bn.new_empty((tiles_m, 2, channels), dtype=torch.float32)
    launch(
        pool_gradient_kernel, (tiles_m * triton.cdiv(channels, block_c),), config,
        grad, pre_bn, x.scale_shift, out, sums, rows, height, width, channels, p, q,
        KERNEL=pool.kernel, STRIDE=pool.stride, PADDING=pool.padding,
        WIDE=is_wide(pre_bn), BLOCK_M=block_m, BLOCK_C=block_c,
    )  # fmt: skip
    return out, sums
