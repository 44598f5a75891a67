"""The stem's end, max_pool(relu(bn(pre_bn))), and its gradient.

Algorithm: forward, a program normalises, applies ReLU and pools a tile of pooled positions, and
notes in a byte where in its window each maximum stands, the first of equal ones, as in PyTorch
(of a window without a positive value its first position, all being zero after the ReLU).
Backward, a program owns a tile of cells of stride × stride positions, reads the windows that cover
any of them once, and adds up for each position the gradients of those that have their maximum
there.
Tiles: BLOCK_M pooled positions, or cells, × BLOCK_C channels.
Memory traffic: the pre-BN output once, in either direction (windows overlap in the caches), the
pooled tensor and its bytes once, in backward the result once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...parameters import Activation, MaxPool
from .launching import Config, Image, Launch, empty_nhwc, launch_pass, nhwc, planned
from .primitives import (
    affine,
    for_sums,
    is_inside,
    load_scale_shift,
    relu,
    split_position,
    tile_index,
)

_BYTES = 4096  # of a tile


@triton.jit
def bn_relu_pool_kernel(
    pre_bn,
    scale_shift,
    out,
    argmax,
    rows,
    image,
    result,
    POOL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of pooled positions × K,). NaN wins, as in PyTorch."""
    row, first_channel = tile_index(rows, image.c, BLOCK_M, BLOCK_C, WIDE)
    channel = first_channel + tl.arange(0, BLOCK_C)
    valid = channel < image.c
    mean, scale, shift = load_scale_shift(scale_shift, image.c, channel, valid)
    n, p, q = split_position(row, result.h, result.w)
    h = p * POOL.stride - POOL.padding
    w = q * POOL.stride - POOL.padding
    kernel: tl.constexpr = POOL.kernel  # as static_range takes it in Triton 3.5
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    for i in tl.static_range(kernel):
        for j in tl.static_range(kernel):
            inside = (row < rows) & is_inside(h + i, image.h) & is_inside(w + j, image.w)
            position = (n * image.h + h + i) * image.w + w + j
            mask = inside[:, None] & valid[None, :]
            value = tl.load(
                pre_bn + position[:, None] * image.c + channel[None, :], mask, other=0.0
            )
            value = affine(value, mean, scale, shift)
            better = (value > best) | (value != value)
            better &= inside[:, None]
            best = tl.where(better, value, best)
            where = tl.where(better, i * kernel + j, where)
    first = tl.maximum(-h, 0) * kernel + tl.maximum(-w, 0)
    where = tl.where(best <= 0, first[:, None], where)
    mask = (row < rows)[:, None] & valid[None, :]
    place = row[:, None] * image.c + channel[None, :]
    tl.store(out + place, relu(best).to(out.dtype.element_ty), mask)
    tl.store(argmax + place, where.to(tl.uint8), mask)


@triton.jit
def pool_gradient_kernel(
    grad,
    pre_bn,
    scale_shift,
    argmax,
    out,
    sums,
    rows,
    image,
    result,
    cells,
    POOL: tl.constexpr,
    WINDOWS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of cells × K,). sums: (cell tiles, 2, K). A cell is as many rows and columns as
    the windows move by; `cells`: how many there are down and across. The windows over one of its
    positions are those that begin in it or in the WINDOWS - 1 cells before it."""
    row, first_channel = tile_index(rows, image.c, BLOCK_M, BLOCK_C, WIDE)
    channel = first_channel + tl.arange(0, BLOCK_C)
    valid = channel < image.c
    mean, scale, shift = load_scale_shift(scale_shift, image.c, channel, valid)
    n, p, q = split_position(row, cells.h, cells.w)
    in_rows = row < rows
    grads = ()
    places = ()
    for back_p in tl.static_range(WINDOWS):
        for back_q in tl.static_range(WINDOWS):
            inside = is_inside(p - back_p, result.h) & is_inside(q - back_q, result.w)
            mask = (in_rows & inside)[:, None] & valid[None, :]
            window = (n * result.h + p - back_p) * result.w + q - back_q
            place = window[:, None] * image.c + channel[None, :]
            grads += (tl.load(grad + place, mask, other=0.0).to(tl.float32),)  # type: ignore[assignment]
            places += (tl.load(argmax + place, mask, other=255).to(tl.int32),)  # type: ignore[assignment]
    total = for_sums(tl.zeros((BLOCK_M, BLOCK_C), pre_bn.dtype.element_ty))
    centred = total
    stride: tl.constexpr = POOL.stride  # as static_range takes it in Triton 3.5
    for i in tl.static_range(stride):
        for j in tl.static_range(stride):
            h = p * POOL.stride - POOL.padding + i
            w = q * POOL.stride - POOL.padding + j
            inside = in_rows & is_inside(h, image.h) & is_inside(w, image.w)
            mask = inside[:, None] & valid[None, :]
            here = ((n * image.h + h) * image.w + w)[:, None] * image.c + channel[None, :]
            own = tl.load(pre_bn + here, mask, other=0.0)
            acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
            for back_p in tl.static_range(WINDOWS):
                for back_q in tl.static_range(WINDOWS):
                    down = i + back_p * POOL.stride  # constants, as their loops are unrolled
                    across = j + back_q * POOL.stride
                    if down < POOL.kernel and across < POOL.kernel:
                        wins = places[back_p * WINDOWS + back_q] == down * POOL.kernel + across
                        acc += tl.where(wins, grads[back_p * WINDOWS + back_q], 0.0)
            acc = tl.where(mask & (affine(own, mean, scale, shift) > 0), acc, 0.0)
            rounded = acc.to(out.dtype.element_ty)
            tl.store(out + here, rounded, mask)
            g = for_sums(rounded)
            total += g
            centred += g * (for_sums(own) - mean[None, :])
    place = sums + tl.program_id(0) // tl.cdiv(image.c, BLOCK_C) * 2 * image.c + channel
    tl.store(place, tl.sum(total, 0), valid)
    tl.store(place + image.c, tl.sum(centred, 0), valid)


def _tile(pre_bn: Tensor, size: int = _BYTES) -> Config:
    block_c = min(triton.next_power_of_2(pre_bn.shape[1]), 64)
    return Config((size // pre_bn.element_size() // block_c, block_c), 4, 1)


@planned
def _plan_bn_relu_pool(x: Activation, pool: MaxPool) -> Launch:
    image = Image.of(x.pre_bn)
    result = Image(*pool.output_size(image.h, image.w), image.c)
    rows = len(x.pre_bn) * result.h * result.w
    return launch_pass(
        bn_relu_pool_kernel,
        _tile(x.pre_bn),
        rows,
        x.pre_bn,
        image=image,
        result=result,
        POOL=pool,
    )


def bn_relu_pool(x: Activation, pool: MaxPool) -> tuple[Tensor, Tensor]:
    """See `resnet_fused.backends.training.TrainingKernels.bn_relu_pool`."""
    x = Activation(nhwc(x.pre_bn), x.scale_shift)
    launch = _plan_bn_relu_pool(x, pool)
    batch, channels, height, width = x.pre_bn.shape
    out = empty_nhwc((batch, channels, *pool.output_size(height, width)), x.pre_bn)
    argmax = torch.empty_like(out, dtype=torch.uint8)
    launch(*x, out, argmax)
    return out, argmax


@planned
def _plan_pool_gradient(grad: Tensor, x: Activation, pool: MaxPool) -> tuple[int, Launch]:
    """The number of row tiles, and the launch."""
    image = Image.of(x.pre_bn)
    config = _tile(x.pre_bn, _BYTES // 2)  # of cells, each of several positions
    down, across = ((size - 1 + pool.padding) // pool.stride + 1 for size in image[:2])
    rows = len(grad) * down * across
    return triton.cdiv(rows, config.blocks[0]), launch_pass(
        pool_gradient_kernel,
        config,
        rows,
        x.pre_bn,
        image=image,
        result=Image.of(grad),
        cells=Image(down, across, image.c),
        POOL=pool,
        WINDOWS=(pool.kernel - 1) // pool.stride + 1,
    )


def pool_gradient(
    grad: Tensor, x: Activation, argmax: Tensor, pool: MaxPool
) -> tuple[Tensor, Tensor]:
    """See `resnet_fused.backends.training.TrainingKernels.pool_gradient`."""
    grad, x = nhwc(grad), Activation(nhwc(x.pre_bn), x.scale_shift)
    tiles_m, launch = _plan_pool_gradient(grad, x, pool)
    out = empty_nhwc(x.pre_bn.shape, x.pre_bn)
    sums = grad.new_empty((tiles_m, 2, grad.shape[1]), dtype=torch.float32)
    launch(grad, *x, nhwc(argmax), out, sums)
    return out, sums
