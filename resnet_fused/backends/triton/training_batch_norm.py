"""Batch norm between the convolutions of training: statistics merged, scale and shift and the
backward coefficients computed, the block's end, and the gradient that enters the block there.

Algorithm: every reduction is a sum over parts in a fixed order, so that the same inputs give the
same bits. Moments merge in float64 as deviations from the first part's mean: with d a part's, n its
count and S its squares, the mean moves by m = Σn·d / N and the squares are Σ(S + n·d²) - N·m²
(Chan, Golub and LeVeque, 1979). What cancels there is the first part's own deviation alone: of 16
digits at most as many as the number of parts has. Vectors are short, so what takes time is waiting:
a program loads all that it merges at once or in two steps, of few channels, so that many SMs wait
side by side. Where there are very many parts, a first launch merges chunks of them.
Tiles: merging (256 parts × 8 channels, few parts 16 × 32); the passes over activations
(BLOCK_M × BLOCK_C).
Memory traffic: the passes read and write each tensor once; vectors are negligible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...parameters import Activation, PreBnGradient
from .launching import (
    Config,
    Image,
    Launch,
    empty_nhwc,
    is_wide,
    launch_pass,
    nhwc,
    planned,
    positions,
    readable,
    strides_beside,
)
from .primitives import (
    affine,
    for_sums,
    load_scale_shift,
    relu,
    strided_rows,
    tile_index,
)

_FEW = Config((16, 32), 4, 1)  # parts × channels
_MANY = Config((256, 8), 8, 1)
_CHUNK = _MANY.blocks[0]  # parts that one program merges in a first launch
_DIRECT = 2 * _CHUNK  # parts that the last merge takes without a first one
_ELEMENTS = 4096  # of a tile of the passes over activations
_TILES = 4  # row tiles that one program of a reducing pass goes through


@triton.jit
def merged_moments(moments, first, last, K, channel, valid, PARTS: tl.constexpr):
    """Float64 moments of the parts first..last-1 of (parts, 3, K) together, per channel; PARTS of
    them at a time."""
    part = tl.arange(0, PARTS)
    origin = tl.load(moments + first * 3 * K + channel, valid, other=0.0).to(tl.float64)
    count = tl.zeros((PARTS, channel.shape[0]), tl.float64)
    shift = count
    squares = count
    for start in range(first, last, PARTS):
        mask = (start + part < last)[:, None] & valid[None, :]
        place = moments + (start + part)[:, None] * (3 * K) + channel[None, :]
        n = tl.load(place + 2 * K, mask, other=0.0)
        deviation = tl.load(place, mask, other=0.0).to(tl.float64) - origin[None, :]
        moved = n * deviation
        count += n
        shift += moved
        squares += tl.load(place + K, mask, other=0.0) + moved * deviation
    total = tl.sum(count, 0)
    sum_shift = tl.sum(shift, 0)
    mean_shift = sum_shift / tl.maximum(total, 1.0)
    merged = tl.sum(squares, 0) - sum_shift * mean_shift
    # Rounding may take squares of nothing below zero; NaN is to pass.
    return origin + mean_shift, tl.where(merged < 0, 0.0, merged), total


@triton.jit
def merged_sums(sums, first, last, K, channel, valid, PARTS: tl.constexpr):
    """Both sums, in float64, of the parts first..last-1 of (parts, 2, K), per channel; PARTS of
    them at a time."""
    part = tl.arange(0, PARTS)
    sum_g = tl.zeros((PARTS, channel.shape[0]), tl.float64)
    sum_centred = sum_g
    for start in range(first, last, PARTS):
        mask = (start + part < last)[:, None] & valid[None, :]
        place = sums + (start + part)[:, None] * (2 * K) + channel[None, :]
        sum_g += tl.load(place, mask, other=0.0)
        sum_centred += tl.load(place + K, mask, other=0.0)
    return tl.sum(sum_g, 0), tl.sum(sum_centred, 0)


@triton.jit
def merge_moments_kernel(moments, out, parts, K, CHUNK, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Grid: (chunks, blocks of K). out: (chunks, 3, K)."""
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < K
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, parts)
    mean, squares, count = merged_moments(moments, first, last, K, channel, valid, PARTS)
    place = out + chunk * 3 * K + channel
    tl.store(place, mean, valid)
    tl.store(place + K, squares, valid)
    tl.store(place + 2 * K, count, valid)


@triton.jit
def merge_sums_kernel(sums, out, parts, K, CHUNK, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Grid: (chunks, blocks of K). out: (1, 2, K), or of several chunks (2 · chunks, 2, K): what
    rounding took from a chunk's sums is a part as well."""
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < K
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, parts)
    sum_g, sum_centred = merged_sums(sums, first, last, K, channel, valid, PARTS)
    place = out + chunk * 2 * K + channel
    tl.store(place, sum_g, valid)
    tl.store(place + K, sum_centred, valid)
    chunks = tl.num_programs(0)
    if chunks > 1:
        place += chunks * 2 * K
        tl.store(place, sum_g - sum_g.to(tl.float32), valid)
        tl.store(place + K, sum_centred - sum_centred.to(tl.float32), valid)


@triton.jit
def bn_scale_shift_kernel(
    moments, weight, bias, out, eps, parts, K, PARTS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Grid: (blocks of K,). out: the (6, K) `scale_shift` of `resnet_fused.backends.training`."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < K
    mean, squares, count = merged_moments(moments, 0, parts, K, channel, valid, PARTS)
    invstd = 1.0 / tl.sqrt(squares / tl.maximum(count, 1.0) + eps)
    place = out + channel
    tl.store(place, mean, valid)
    tl.store(place + K, tl.load(weight + channel, valid, other=0.0).to(tl.float64) * invstd, valid)
    tl.store(place + 2 * K, tl.load(bias + channel, valid, other=0.0).to(tl.float32), valid)
    tl.store(place + 3 * K, invstd, valid)
    tl.store(place + 4 * K, squares / tl.maximum(count - 1.0, 1.0), valid)
    tl.store(place + 5 * K, count, valid)


@triton.jit
def bn_backward_coefficients_kernel(
    sums,
    total,
    scale_shift,
    coefficients,
    weight_grad,
    bias_grad,
    parts,
    total_parts,
    K,
    FROZEN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of K,). Coefficients from `total`, or from `sums` where that is None; parameter
    gradients from `sums`."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < K
    sum_g, sum_centred = merged_sums(sums, 0, parts, K, channel, valid, PARTS)
    mean = tl.load(scale_shift + channel, valid, other=0.0)
    scale = tl.load(scale_shift + K + channel, valid, other=0.0)
    invstd = tl.load(scale_shift + 3 * K + channel, valid, other=0.0)
    tl.store(weight_grad + channel, invstd * sum_centred, valid)
    tl.store(bias_grad + channel, sum_g, valid)
    b = tl.zeros((BLOCK_C,), tl.float64)
    d = b
    if not FROZEN:
        count = tl.load(scale_shift + 5 * K + channel, valid, other=1.0)
        total_g, total_centred = sum_g, sum_centred
        if total is not None:
            total_g, total_centred = merged_sums(total, 0, total_parts, K, channel, valid, PARTS)
        b = -scale.to(tl.float64) * invstd * invstd * (total_centred / count)
        d = -scale * (total_g / count)
    place = coefficients + channel
    tl.store(place, scale, valid)
    tl.store(place + K, b, valid)
    tl.store(place + 2 * K, d, valid)
    tl.store(place + 3 * K, mean, valid)


@triton.jit
def bn_add_relu_kernel(
    pre_bn,
    scale_shift,
    shortcut,
    shortcut_scale_shift,
    out,
    shortcut_channels,
    shortcut_strides,
    rows,
    result,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of rows × K,). shortcut may be None; shortcut_scale_shift None: added as it is.
    shortcut_strides is None where it is laid out like the result, of sizes `result`."""
    channels = result.c
    row, first_channel = tile_index(rows, channels, BLOCK_M, BLOCK_C, WIDE)
    channel = first_channel + tl.arange(0, BLOCK_C)
    valid = channel < channels
    offset = row[:, None] * channels + channel[None, :]
    mask = (row < rows)[:, None] & valid[None, :]
    mean, scale, shift = load_scale_shift(scale_shift, channels, channel, valid)
    value = affine(tl.load(pre_bn + offset, mask, other=0.0), mean, scale, shift)
    if shortcut is not None:
        place = offset
        present = mask
        if shortcut_strides is not None:
            place = strided_rows(row, result.h, result.w, shortcut_strides)[:, None]
            place = place + channel[None, :]
            present = mask & (channel < shortcut_channels)[None, :]
        other = tl.load(shortcut + place, present, other=0.0)
        if shortcut_scale_shift is not None:
            mean, scale, shift = load_scale_shift(shortcut_scale_shift, channels, channel, valid)
            other = affine(other, mean, scale, shift)
        value += other.to(tl.float32)
    tl.store(out + offset, relu(value).to(out.dtype.element_ty), mask)


@triton.jit
def relu_gradient_kernel(
    grad,
    y,
    signs,
    pre_bn,
    scale_shift,
    sums,
    other_pre_bn,
    other_scale_shift,
    other_sums,
    out,
    rows,
    K,
    TILES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of TILES·BLOCK_M rows × K,). sums: (row blocks, 2, K), of which the second row
    is zero where pre_bn is None; other_*: of the projection, or None. signs: of y, which then is
    None."""
    tiles_n = tl.cdiv(K, BLOCK_C)
    block = tl.program_id(0) // tiles_n
    first_row = block * (TILES * BLOCK_M)
    if WIDE:
        first_row = block.to(tl.int64) * (TILES * BLOCK_M)
    channel = (tl.program_id(0) % tiles_n) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < K
    if pre_bn is not None:
        mean = tl.load(scale_shift + channel, valid, other=0.0)
    if other_pre_bn is not None:
        other_mean = tl.load(other_scale_shift + channel, valid, other=0.0)
    sum_g = for_sums(tl.zeros((BLOCK_M, BLOCK_C), grad.dtype.element_ty))
    centred = sum_g
    other_centred = sum_g
    for tile in range(TILES):
        row = first_row + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        offset = row[:, None] * K + channel[None, :]
        mask = (row < rows)[:, None] & valid[None, :]
        if signs is not None:
            place = row[:, None] * (tl.cdiv(K, 64) * 8)
            place += (channel // 64 * 8 + channel % 8)[None, :]
            bits = tl.load(signs + place, mask, other=0).to(tl.int32)
            passes = (bits >> (channel // 8 % 8)[None, :]) & 1 != 0
        else:
            passes = tl.load(y + offset, mask, other=0.0) > 0
        g = tl.where(passes, tl.load(grad + offset, mask, other=0.0), 0.0)
        tl.store(out + offset, g, mask)
        g = for_sums(g)
        sum_g += g
        if pre_bn is not None:
            value = tl.load(pre_bn + offset, mask, other=0.0)
            centred += g * (for_sums(value) - mean[None, :])
        if other_pre_bn is not None:
            value = tl.load(other_pre_bn + offset, mask, other=0.0)
            other_centred += g * (for_sums(value) - other_mean[None, :])
    sum_g = tl.sum(sum_g, 0)
    place = block * 2 * K + channel
    tl.store(sums + place, sum_g, valid)
    tl.store(sums + place + K, tl.sum(centred, 0), valid)
    if other_pre_bn is not None:
        tl.store(other_sums + place, sum_g, valid)
        tl.store(other_sums + place + K, tl.sum(other_centred, 0), valid)


@triton.jit
def pre_bn_gradient_kernel(
    grad,
    pre_bn,
    coefficients,
    out,
    rows,
    K,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of rows × K,). out = a·grad + b·(pre_bn - mean) + d; where pre_bn is None, the
    normalisation being frozen, a·grad."""
    row, first_channel = tile_index(rows, K, BLOCK_M, BLOCK_C, WIDE)
    channel = first_channel + tl.arange(0, BLOCK_C)
    valid = channel < K
    offset = row[:, None] * K + channel[None, :]
    mask = (row < rows)[:, None] & valid[None, :]
    place = coefficients + channel
    a = tl.load(place, valid, other=0.0)[None, :]
    g = tl.load(grad + offset, mask, other=0.0).to(tl.float32)
    formed = g * a
    if pre_bn is not None:
        b = tl.load(place + K, valid, other=0.0)[None, :]
        d = tl.load(place + 2 * K, valid, other=0.0)[None, :]
        mean = tl.load(place + 3 * K, valid, other=0.0)[None, :]
        value = tl.load(pre_bn + offset, mask, other=0.0).to(tl.float32)
        formed = tl.fma(g, a, tl.fma(value - mean, b, d))
    tl.store(out + offset, formed.to(out.dtype.element_ty), mask)


def pass_tile(channels: int) -> Config:
    """Of a pass over activations: (rows × channels)."""
    block_c = min(triton.next_power_of_2(channels), 128)
    return Config((_ELEMENTS // block_c, block_c), 8, 1)


@planned
def _plan_merge(parts: Tensor, kernel: Any, chunk: int) -> Launch:
    count, _, channels = parts.shape
    step, block_c = _MANY.blocks
    return Launch(
        kernel,
        (triton.cdiv(count, chunk), triton.cdiv(channels, block_c)),
        _MANY,
        parts.device,
        parts=count,
        K=channels,
        CHUNK=chunk,
        PARTS=step,
        BLOCK_C=block_c,
    )


def _merge(parts: Tensor, kernel: Any, chunk: int) -> Tensor:
    launch = _plan_merge(parts, kernel, chunk)
    chunks = launch.grid[0]
    count = 2 * chunks if kernel is merge_sums_kernel and chunks > 1 else chunks
    out = parts.new_empty((count, *parts.shape[1:]))
    launch(parts, out)
    return out


def few_sums(sums: Tensor) -> Tensor:
    """Parts of sums, few enough to be merged by who reads them and more beside them."""
    return _few(sums, merge_sums_kernel, _CHUNK)


def _few(parts: Tensor, kernel: Any, most: int = _DIRECT) -> Tensor:
    while len(parts) > most:
        parts = _merge(parts, kernel, _CHUNK)
    return parts


def _launch_last(kernel: Any, parts: Tensor, **settled: Any) -> Launch:
    """Of a kernel that merges these parts and uses what that gives."""
    count, _, channels = parts.shape
    config = _FEW if count <= _FEW.blocks[0] else _MANY
    step, block_c = config.blocks
    return Launch(
        kernel,
        (triton.cdiv(channels, block_c),),
        config,
        parts.device,
        parts=count,
        K=channels,
        PARTS=step,
        BLOCK_C=block_c,
        **settled,
    )


def merge_moments(moments: Tensor) -> Tensor:
    """See `TrainingKernels.merge_moments`."""
    moments = _few(moments, merge_moments_kernel)
    return _merge(moments, merge_moments_kernel, len(moments))


def merge_sums(sums: Tensor) -> Tensor:
    """See `TrainingKernels.merge_sums`."""
    sums = _few(sums, merge_sums_kernel)
    return _merge(sums, merge_sums_kernel, len(sums))


@planned
def _plan_scale_shift(moments: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Launch:
    return _launch_last(bn_scale_shift_kernel, moments, eps=eps)


def bn_scale_shift(moments: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `TrainingKernels.bn_scale_shift`."""
    moments = _few(moments, merge_moments_kernel)
    out = moments.new_empty((6, moments.shape[2]))
    _plan_scale_shift(moments, weight, bias, eps)(moments, weight, bias, out)
    return out


@planned
def _plan_coefficients(
    sums: Tensor, total: Tensor | None, scale_shift: Tensor, frozen: bool
) -> Launch:
    total_parts = 0 if total is None else len(total)
    return _launch_last(
        bn_backward_coefficients_kernel, sums, total_parts=total_parts, FROZEN=frozen
    )


def bn_backward_coefficients(
    sums: Tensor, total: Tensor, scale_shift: Tensor, frozen: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `TrainingKernels.bn_backward_coefficients`."""
    few = _few(sums, merge_sums_kernel)
    others = None if total is sums else total
    channels = scale_shift.shape[1]
    coefficients = scale_shift.new_empty((4, channels))
    weight_grad, bias_grad = scale_shift.new_empty(channels), scale_shift.new_empty(channels)
    launch = _plan_coefficients(few, others, scale_shift, frozen)
    launch(few, others, scale_shift, coefficients, weight_grad, bias_grad)
    return coefficients, weight_grad, bias_grad


@planned
def _plan_bn_add_relu(main: Activation, shortcut: Tensor | None, normalised: bool) -> Launch:
    pre_bn = main.pre_bn
    return launch_pass(
        bn_add_relu_kernel,
        pass_tile(pre_bn.shape[1]),
        positions(pre_bn),
        pre_bn,
        shortcut,
        shortcut_channels=None if shortcut is None else shortcut.shape[1],
        shortcut_strides=strides_beside(shortcut, pre_bn),
        result=Image.of(pre_bn),
    )


def bn_add_relu(main: Activation, shortcut: Tensor | Activation | None) -> Tensor:
    """See `TrainingKernels.bn_add_relu`."""
    main = Activation(nhwc(main.pre_bn), main.scale_shift)
    other, other_scale_shift = shortcut if isinstance(shortcut, Activation) else (shortcut, None)
    other = readable(other)
    out = empty_nhwc(main.pre_bn.shape, main.pre_bn)
    launch = _plan_bn_add_relu(main, other, other_scale_shift is not None)
    launch(*main, other, other_scale_shift, out)
    return out


@planned
def _plan_relu_gradient(
    grad: Tensor,
    y: Tensor | None,
    signs: Tensor | None,
    branches: Sequence[tuple[Tensor | None, Tensor | None]],
) -> tuple[int, Launch]:
    """The number of row blocks, and the launch."""
    channels, rows = grad.shape[1], positions(grad)
    config = pass_tile(channels)
    block_m, block_c = config.blocks
    blocks = triton.cdiv(rows, _TILES * block_m)
    return blocks, Launch(
        relu_gradient_kernel,
        (blocks * triton.cdiv(channels, block_c),),
        config,
        grad.device,
        rows=rows,
        K=channels,
        TILES=_TILES,
        WIDE=is_wide(grad),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
    )


def relu_gradient(
    grad: Tensor, y: Tensor, branches: Sequence[Activation]
) -> tuple[Tensor, list[Tensor]]:
    """See `TrainingKernels.relu_gradient`; one or two branches."""
    return _relu_gradient(grad, nhwc(y), None, [(nhwc(b.pre_bn), b.scale_shift) for b in branches])


def relu_gradient_sum(
    grad: Tensor, y: Tensor | None, signs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `FoldedEnds.relu_gradient_sum`."""
    if signs is not None:
        y, signs = None, nhwc(signs)
    elif y is not None:
        y = nhwc(y)
    g, (sums,) = _relu_gradient(grad, y, signs, [(None, None)])
    return g, sums


def _relu_gradient(
    grad: Tensor,
    y: Tensor | None,
    signs: Tensor | None,
    branches: Sequence[tuple[Tensor | None, Tensor | None]],
) -> tuple[Tensor, list[Tensor]]:
    grad = nhwc(grad)
    blocks, launch = _plan_relu_gradient(grad, y, signs, branches)
    out = empty_nhwc(grad.shape, grad)
    sums: list[Tensor] = []
    vectors: list[Tensor | None] = []
    for branch in branches:
        sums.append(grad.new_empty((blocks, 2, grad.shape[1]), dtype=torch.float32))
        vectors += (*branch, sums[-1])
    vectors += [None] * (6 - len(vectors))
    launch(grad, y, signs, *vectors, out)
    return out, sums


@planned
def _plan_pre_bn_gradient(grad: Tensor, pre_bn: Tensor | None) -> Launch:
    channels = grad.shape[1]
    return launch_pass(
        pre_bn_gradient_kernel, pass_tile(channels), positions(grad), grad, K=channels
    )


def pre_bn_gradient(gradient: PreBnGradient) -> Tensor:
    """See `TrainingKernels.pre_bn_gradient`."""
    grad, pre_bn, coefficients, frozen, last_use = gradient
    grad = nhwc(grad)
    pre_bn = None if frozen or pre_bn is None else nhwc(pre_bn)
    out = grad if last_use else empty_nhwc(grad.shape, grad)
    _plan_pre_bn_gradient(grad, pre_bn)(grad, pre_bn, coefficients, out)
    return out
