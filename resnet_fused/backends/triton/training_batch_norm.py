"""Batch norm between the convolutions of training: statistics merged, scale and shift and the
backward coefficients computed, the block's end, and the gradient that enters the block there.

Algorithm: every reduction is a sum over parts in a fixed order, so that the same inputs give the
same bits. Moments merge stably: first the mean of all parts, as a deviation from the first part's,
then the squared deviations from it (Chan, Golub and LeVeque, 1979); nothing large is subtracted
from something large. Vectors are short, so they are computed in float64 and rounded once. Where
there are many, a first launch merges chunks of them side by side.
Tiles: merging (32 parts × 32 channels); the passes over activations (BLOCK_M × BLOCK_C).
Memory traffic: the passes read and write each tensor once; vectors are negligible.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..training import Activation
from .launching import Config, empty_nhwc, is_wide, launch, nhwc, strided_operand
from .primitives import rectify, strided_rows, tile_index
from .training_convolution import affine, channel_scale_shift, for_sums

_CHUNK = 64  # parts that one program merges where there are many
_DIRECT = 256  # parts that the last merge takes without a first one
_BLOCK_C = 32
_MERGE = Config((_BLOCK_C,), 4, 1)
_STEP = tl.constexpr(32)
_ELEMENTS = 4096  # of a tile of the passes over activations
_TILES = 4  # row tiles that one program of a reducing pass goes through


@triton.jit
def merged_moments(moments, first, last, K, channel, valid):
    """Float64 moments of the parts first..last-1 of (parts, 3, K) together, per channel."""
    part = tl.arange(0, _STEP)
    origin = tl.load(moments + first * 3 * K + channel, valid, other=0.0)
    count = tl.zeros((_STEP, channel.shape[0]), tl.float64)
    shift = count
    for start in range(first, last, _STEP):
        mask = (start + part < last)[:, None] & valid[None, :]
        place = moments + (start + part)[:, None] * (3 * K) + channel[None, :]
        n = tl.load(place + 2 * K, mask, other=0.0)
        count += n
        shift += n * (tl.load(place, mask, other=0.0) - origin[None, :]).to(tl.float64)
    total = tl.sum(count, 0)
    mean = origin + tl.sum(shift, 0) / tl.maximum(total, 1.0)
    squares = tl.zeros((_STEP, channel.shape[0]), tl.float64)
    for start in range(first, last, _STEP):
        mask = (start + part < last)[:, None] & valid[None, :]
        place = moments + (start + part)[:, None] * (3 * K) + channel[None, :]
        deviation = tl.load(place, mask, other=0.0) - mean[None, :]
        n = tl.load(place + 2 * K, mask, other=0.0)
        squares += tl.load(place + K, mask, other=0.0) + n * deviation * deviation
    return mean, tl.sum(squares, 0), total


@triton.jit
def merged_sums(sums, first, last, K, channel, valid):
    """Both sums, in float64, of the parts first..last-1 of (parts, 2, K), per channel."""
    part = tl.arange(0, _STEP)
    sum_g = tl.zeros((_STEP, channel.shape[0]), tl.float64)
    sum_centred = sum_g
    for start in range(first, last, _STEP):
        mask = (start + part < last)[:, None] & valid[None, :]
        place = sums + (start + part)[:, None] * (2 * K) + channel[None, :]
        sum_g += tl.load(place, mask, other=0.0)
        sum_centred += tl.load(place + K, mask, other=0.0)
    return tl.sum(sum_g, 0), tl.sum(sum_centred, 0)


@triton.jit
def merge_moments_kernel(moments, out, parts, K, CHUNK, BLOCK_C: tl.constexpr):
    """Grid: (chunks, blocks of K). out: (chunks, 3, K)."""
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < K
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, parts)
    mean, squares, count = merged_moments(moments, first, last, K, channel, valid)
    place = out + chunk * 3 * K + channel
    tl.store(place, mean, valid)
    tl.store(place + K, squares, valid)
    tl.store(place + 2 * K, count, valid)


@triton.jit
def merge_sums_kernel(sums, out, parts, K, CHUNK, BLOCK_C: tl.constexpr):
    """Grid: (chunks, blocks of K). out: (chunks, 2, K)."""
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < K
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, parts)
    sum_g, sum_centred = merged_sums(sums, first, last, K, channel, valid)
    place = out + chunk * 2 * K + channel
    tl.store(place, sum_g, valid)
    tl.store(place + K, sum_centred, valid)


@triton.jit
def bn_terms_kernel(moments, gamma, beta, out, eps, parts, K, BLOCK_C: tl.constexpr):
    """Grid: (blocks of K,). out: the (6, K) `scale_shift` of `resnet_fused.backends.training`."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < K
    mean, squares, count = merged_moments(moments, 0, parts, K, channel, valid)
    invstd = 1.0 / tl.sqrt(squares / tl.maximum(count, 1.0) + eps)
    place = out + channel
    tl.store(place, mean, valid)
    tl.store(place + K, tl.load(gamma + channel, valid, other=0.0).to(tl.float64) * invstd, valid)
    tl.store(place + 2 * K, tl.load(beta + channel, valid, other=0.0).to(tl.float32), valid)
    tl.store(place + 3 * K, invstd, valid)
    tl.store(place + 4 * K, squares / tl.maximum(count - 1.0, 1.0), valid)
    tl.store(place + 5 * K, count, valid)


@triton.jit
def bn_slopes_kernel(
    sums,
    total,
    scale_shift,
    coefficients,
    gamma_grad,
    beta_grad,
    parts,
    total_parts,
    K,
    FROZEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of K,). Coefficients from `total`, parameter gradients from `sums`."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < K
    sum_g, sum_centred = merged_sums(sums, 0, parts, K, channel, valid)
    mean = tl.load(scale_shift + channel, valid, other=0.0)
    scale = tl.load(scale_shift + K + channel, valid, other=0.0)
    invstd = tl.load(scale_shift + 3 * K + channel, valid, other=0.0)
    tl.store(gamma_grad + channel, invstd * sum_centred, valid)
    tl.store(beta_grad + channel, sum_g, valid)
    b = tl.zeros((BLOCK_C,), tl.float64)
    d = b
    if not FROZEN:
        count = tl.load(scale_shift + 5 * K + channel, valid, other=1.0)
        total_g, total_centred = merged_sums(total, 0, total_parts, K, channel, valid)
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
    shortcut_channels,
    shortcut_n,
    shortcut_h,
    shortcut_w,
    out,
    rows,
    P,
    Q,
    K,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of rows × K,). shortcut may be None; shortcut_scale_shift None: added as it is.
    shortcut_channels and its strides are None where it is laid out like the result."""
    row, first_channel = tile_index(rows, K, BLOCK_M, BLOCK_C, WIDE)
    channel = first_channel + tl.arange(0, BLOCK_C)
    valid = channel < K
    offset = row[:, None] * K + channel[None, :]
    mask = (row < rows)[:, None] & valid[None, :]
    mean, scale, shift = channel_scale_shift(scale_shift, K, channel, valid)
    value = affine(tl.load(pre_bn + offset, mask, other=0.0), mean, scale, shift)
    if shortcut is not None:
        place = offset
        present = mask
        if shortcut_channels is not None:
            place = strided_rows(row, P, Q, shortcut_n, shortcut_h, shortcut_w)[:, None]
            place = place + channel[None, :]
            present = mask & (channel < shortcut_channels)[None, :]
        other = tl.load(shortcut + place, present, other=0.0)
        if shortcut_scale_shift is not None:
            mean, scale, shift = channel_scale_shift(shortcut_scale_shift, K, channel, valid)
            other = affine(other, mean, scale, shift)
        value += other.to(tl.float32)
    tl.store(out + offset, rectify(value).to(out.dtype.element_ty), mask)


@triton.jit
def relu_gradient_kernel(
    grad,
    y,
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
    """Grid: (blocks of TILES·BLOCK_M rows × K,). sums: (row blocks, 2, K); other_*: of the
    projection, or None."""
    tiles_n = tl.cdiv(K, BLOCK_C)
    block = tl.program_id(0) // tiles_n
    first_row = block * (TILES * BLOCK_M)
    if WIDE:
        first_row = block.to(tl.int64) * (TILES * BLOCK_M)
    channel = (tl.program_id(0) % tiles_n) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < K
    mean = tl.load(scale_shift + channel, valid, other=0.0)
    other_mean = mean
    if other_pre_bn is not None:
        other_mean = tl.load(other_scale_shift + channel, valid, other=0.0)
    sum_g = for_sums(tl.zeros((BLOCK_M, BLOCK_C), grad.dtype.element_ty))
    centred = sum_g
    other_centred = sum_g
    for tile in range(TILES):
        row = first_row + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        offset = row[:, None] * K + channel[None, :]
        mask = (row < rows)[:, None] & valid[None, :]
        passes = tl.load(y + offset, mask, other=0.0) > 0
        g = tl.where(passes, tl.load(grad + offset, mask, other=0.0), 0.0)
        tl.store(out + offset, g, mask)
        g = for_sums(g)
        sum_g += g
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


def _tile(channels: int) -> Config:
    block_c = min(triton.next_power_of_2(channels), 128)
    return Config((_ELEMENTS // block_c, block_c), 8, 1)


def _reduce(parts: Tensor, kernel: triton.runtime.KernelInterface, chunk: int) -> Tensor:
    count, kinds, channels = parts.shape
    out = parts.new_empty((triton.cdiv(count, chunk), kinds, channels))
    grid = (out.shape[0], triton.cdiv(channels, _BLOCK_C))
    launch(kernel, grid, _MERGE, parts, out, count, channels, chunk, BLOCK_C=_BLOCK_C)
    return out


def _few(parts: Tensor, kernel: triton.runtime.KernelInterface) -> Tensor:
    while parts.shape[0] > _DIRECT:
        parts = _reduce(parts, kernel, _CHUNK)
    return parts


def merge_moments(moments: Tensor) -> Tensor:
    """See `TrainingKernels.merge_moments`."""
    moments = _few(moments, merge_moments_kernel)
    return _reduce(moments, merge_moments_kernel, moments.shape[0])


def merge_sums(sums: Tensor) -> Tensor:
    """See `TrainingKernels.merge_sums`."""
    sums = _few(sums, merge_sums_kernel)
    return _reduce(sums, merge_sums_kernel, sums.shape[0])


def bn_scale_shift(moments: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `TrainingKernels.bn_scale_shift`."""
    moments = _few(moments, merge_moments_kernel)
    parts, _, channels = moments.shape
    out = moments.new_empty((6, channels))
    launch(
        bn_terms_kernel, (triton.cdiv(channels, _BLOCK_C),), _MERGE,
        moments, weight, bias, out, eps, parts, channels, BLOCK_C=_BLOCK_C,
    )  # fmt: skip
    return out


def bn_backward_coefficients(
    sums: Tensor, total: Tensor, scale_shift: Tensor, frozen: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `TrainingKernels.bn_backward_coefficients`."""
    few = _few(sums, merge_sums_kernel)
    total = few if total is sums else total
    channels = scale_shift.shape[1]
    coefficients = scale_shift.new_empty((4, channels))
    gamma_grad, beta_grad = scale_shift.new_empty(channels), scale_shift.new_empty(channels)
    launch(
        bn_slopes_kernel, (triton.cdiv(channels, _BLOCK_C),), _MERGE,
        few, total, scale_shift, coefficients, gamma_grad, beta_grad,
        few.shape[0], total.shape[0], channels,
        FROZEN=frozen, BLOCK_C=_BLOCK_C,
    )  # fmt: skip
    return coefficients, gamma_grad, beta_grad


def bn_add_relu(main: Activation, shortcut: Tensor | Activation | None) -> Tensor:
    """See `TrainingKernels.bn_add_relu`."""
    pre_bn = nhwc(main.pre_bn)
    other, other_scale_shift = shortcut if isinstance(shortcut, Activation) else (shortcut, None)
    out = empty_nhwc(tuple(pre_bn.shape), pre_bn)
    other, layout = strided_operand(other, out)
    channels, height, width = pre_bn.shape[1:]
    rows = pre_bn.numel() // channels
    config = _tile(channels)
    block_m, block_c = config.blocks
    launch(
        bn_add_relu_kernel, (triton.cdiv(rows, block_m) * triton.cdiv(channels, block_c),), config,
        pre_bn, main.scale_shift, other, other_scale_shift, *layout, out,
        rows, height, width, channels,
        WIDE=is_wide(pre_bn, *([] if other is None else [other])), BLOCK_M=block_m, BLOCK_C=block_c,
    )  # fmt: skip
    return out


def relu_gradient(
    grad: Tensor, y: Tensor, branches: Sequence[Activation]
) -> tuple[Tensor, list[Tensor]]:
    """See `TrainingKernels.relu_gradient`; one or two branches."""
    grad, y = nhwc(grad), nhwc(y)
    out = empty_nhwc(tuple(y.shape), y)
    channels = y.shape[1]
    rows = y.numel() // channels
    config = _tile(channels)
    block_m, block_c = config.blocks
    blocks = triton.cdiv(rows, _TILES * block_m)
    sums = [y.new_empty((blocks, 2, channels), dtype=torch.float32) for _ in branches]
    arguments: list[Tensor | None] = []
    for branch, branch_sums in zip(branches, sums, strict=True):
        arguments += [nhwc(branch.pre_bn), branch.scale_shift, branch_sums]
    arguments += [None] * (6 - len(arguments))
    launch(
        relu_gradient_kernel, (blocks * triton.cdiv(channels, block_c),), config,
        grad, y, *arguments, out, rows, channels,
        TILES=_TILES, WIDE=is_wide(y), BLOCK_M=block_m, BLOCK_C=block_c,
    )  # fmt: skip
    return out, sums
