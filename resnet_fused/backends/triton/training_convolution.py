"""conv(relu(bn(x))) with the statistics of its result: the forward convolution of training.

Algorithm: implicit GEMM on NHWC activations and KRSC weights. The prologue applies normalisation
and ReLU to the operand between its load and the tensor cores (zero where the window hangs over the
edge, which is outside the activation, not outside the pre-BN output). The epilogue rounds the
float32 accumulator to the result's dtype, stores it, and takes mean and squared deviations of the
rounded tile: what later passes normalise is the rounded tensor, so that its statistics centre it
exactly.
Tiles: BLOCK_M positions × BLOCK_N channels, BLOCK_C of the inner dimension a step, which runs over
taps and blocks of channels, or, for few channels, over both as one index (FLAT).
Memory traffic: x once (again from L2 for each column tile and tap), the result once, and 12 bytes
per tile and channel of statistics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...parameters import Convolution
from ..training import Activation
from ..tuning import Tuner, describe
from .convolution import Gemm, candidates, window
from .launching import Config, convolution_precision, empty_nhwc, is_wide, launch, machine, nhwc
from .primitives import is_inside, next_step, rectify, split_position, tile_index

FLAT_CHANNELS = 16  # below which taps and channels are one inner index


@triton.jit
def channel_scale_shift(scale_shift, channels, channel, mask):
    """Float32 (mean, scale, shift) of the given channels of a layer."""
    mean = tl.load(scale_shift + channel, mask, other=0.0)
    scale = tl.load(scale_shift + channels + channel, mask, other=0.0)
    shift = tl.load(scale_shift + 2 * channels + channel, mask, other=0.0)
    return mean, scale, shift


@triton.jit
def affine(pre_bn, mean, scale, shift):
    """Float32 (pre_bn - mean) · scale + shift of (rows, channels). Every pass forms the same bits,
    so that all agree on a ReLU's sign."""
    return tl.fma(pre_bn.to(tl.float32) - mean[None, :], scale[None, :], shift[None, :])


@triton.jit
def for_sums(values):
    """`values` in the type that their sums are taken in: float32 sums lose nothing beside the
    rounding of 16-bit tensors, but would be the largest error of float32 ones."""
    if values.dtype == tl.float32:
        return values.to(tl.float64)
    else:
        return values.to(tl.float32)


@triton.jit
def tile_moments(tile, in_rows, count):
    """Mean and sum of squared deviations of a (rows, channels) tile's columns; `count` of its
    rows are `in_rows`. Two passes over registers, the second correcting the first one's mean."""
    tile = for_sums(tile)
    mean = tl.sum(tl.where(in_rows[:, None], tile, 0.0), 0) / count
    deviation = tl.where(in_rows[:, None], tile - mean[None, :], 0.0)
    rest = tl.sum(deviation, 0)
    return mean + rest / count, tl.sum(deviation * deviation, 0) - rest * rest / count


@triton.jit
def conv_stats_kernel(
    x,
    scale_shift,
    weight,
    out,
    moments,
    rows,
    H,
    W,
    C,
    P,
    Q,
    K,
    group_in,
    group_out,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    POINTWISE: tl.constexpr,
    PADDED: tl.constexpr,
    FLAT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of rows × group_out, groups). scale_shift: of x's layer, or None where x is no
    pre-BN output. moments: (row tiles, 3, K) or None. EVEN: BLOCK_C divides group_in."""
    row, first_column = tile_index(rows, group_out, BLOCK_M, BLOCK_N, WIDE)
    group = tl.program_id(1)
    column = first_column + tl.arange(0, BLOCK_N)
    in_columns = column < group_out
    channel = group * group_out + column
    in_rows = row < rows
    safe_row = tl.where(in_rows, row, 0)
    inner = tl.arange(0, BLOCK_C)
    first_channel = group * group_in
    if POINTWISE:
        h = tl.zeros_like(safe_row)
        w = h
        x_row = safe_row * C
    else:
        image, p, q = split_position(safe_row, P, Q)
        h = p * STRIDE_H - PAD_H
        w = q * STRIDE_W - PAD_W
        x_row = ((image * H + h) * W + w) * C
    x_row += first_channel
    weight_column = tl.where(in_columns, channel, 0)
    if WIDE:
        weight_column = weight_column.to(tl.int64)
    weight_column *= R * S * group_in

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    r = 0
    s = 0
    c = 0
    steps = tl.cdiv(R * S * group_in, BLOCK_C) if FLAT else R * S * tl.cdiv(group_in, BLOCK_C)
    for step in range(steps):
        if FLAT:
            index = step * BLOCK_C + inner
            tap = index // group_in
            inner_channel = index - tap * group_in
            tap_h = tap // S * DILATION_H
            tap_w = tap % S * DILATION_W
            in_inner = index < R * S * group_in
            in_image = is_inside(h[:, None] + tap_h[None, :], H) & is_inside(
                w[:, None] + tap_w[None, :], W
            )
            x_step = (tap_h * W + tap_w) * C + inner_channel
            a = tl.load(
                x + x_row[:, None] + x_step[None, :], in_image & in_inner[None, :], other=0.0
            )
            weight_step = index
        else:
            inner_channel = c + inner
            in_inner = inner_channel < group_in
            in_image = (is_inside(h + r * DILATION_H, H) & is_inside(w + s * DILATION_W, W))[
                :, None
            ]
            x_step = (r * DILATION_H * W + s * DILATION_W) * C + inner_channel
            x_tile = x + x_row[:, None] + x_step[None, :]
            if EVEN and not PADDED:
                a = tl.load(x_tile)
            elif EVEN:
                a = tl.load(x_tile, in_image, other=0.0)
            elif PADDED:
                a = tl.load(x_tile, in_image & in_inner[None, :], other=0.0)
            else:
                a = tl.load(x_tile, in_inner[None, :], other=0.0)
            weight_step = (r * S + s) * group_in + inner_channel
        if scale_shift is not None:
            mean, scale, shift = channel_scale_shift(
                scale_shift, C, first_channel + inner_channel, in_inner
            )
            active = rectify(affine(a, mean, scale, shift))
            if PADDED:
                active = tl.where(in_image, active, 0.0)
            a = active.to(x.dtype.element_ty)
        b_tile = weight + weight_column[None, :] + weight_step[:, None]
        b = tl.load(b_tile) if EVEN and not FLAT else tl.load(b_tile, in_inner[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if not FLAT:
            r, s, c = next_step(r, s, c, group_in, 0, R, S, 1, 1, BLOCK_C)

    mask = in_rows[:, None] & in_columns[None, :]
    place = out + row[:, None] * K + channel[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask)
    if moments is not None:
        # Read back in the layout of memory: summing columns in that of the tensor cores' results
        # takes several times the shuffles between threads.
        tl.debug_barrier()
        stored = tl.load(place, mask, other=0.0)
        tile = tl.program_id(0) // tl.cdiv(group_out, BLOCK_N)
        count = tl.sum(in_rows.to(tl.float32), 0)
        mean, squares = tile_moments(stored, in_rows, count)
        place = moments + tile * 3 * K + channel
        tl.store(place, mean, in_columns)
        tl.store(place + K, squares, in_columns)
        tl.store(place + 2 * K, tl.zeros_like(mean) + count, in_columns)


def conv_stats(
    tuner: Tuner, x: Tensor | Activation, conv: Convolution, statistics: bool
) -> tuple[Tensor, Tensor | None]:
    """See `resnet_fused.backends.training.TrainingKernels.conv_stats`."""
    pre_bn, scale_shift = x if isinstance(x, Activation) else (x, None)
    pre_bn, weight = nhwc(pre_bn), nhwc(conv.weight.to(pre_bn.dtype))
    batch, channels, height, width = pre_bn.shape
    filters, group_in, r, s = weight.shape
    p, q = conv.output_size(height, width)
    out = empty_nhwc((batch, filters, p, q), pre_bn)
    group_out = filters // conv.groups
    flat = group_in < FLAT_CHANNELS and r * s > 1
    rows = batch * p * q
    taps, inner = (1, r * s * group_in) if flat else (r * s, group_in)
    gemm = Gemm(rows, group_out, inner, taps, conv.groups, accumulators=2)
    wide = is_wide(pre_bn, weight, out)
    precision = convolution_precision(pre_bn.dtype)

    def run(config: Config) -> Tensor | None:
        block_m, block_n, block_c = config.blocks
        tiles_m = triton.cdiv(rows, block_m)
        moments = (
            pre_bn.new_empty((tiles_m, 3, filters), dtype=torch.float32) if statistics else None
        )
        launch(
            conv_stats_kernel, (tiles_m * triton.cdiv(group_out, block_n), conv.groups), config,
            pre_bn, scale_shift, weight, out, moments, rows, height, width, channels, p, q, filters,
            group_in, group_out, **window(conv), PADDED=max(conv.padding) > 0, FLAT=flat,
            EVEN=group_in % block_c == 0, WIDE=wide, PRECISION=precision,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c,
        )  # fmt: skip
        return moments

    # Statistics are no part of the key: backward repeats the forward's convolution, bit for bit.
    moments = tuner.run(
        ("conv_stats", *describe(pre_bn, conv), scale_shift is not None, wide),
        pre_bn.device,
        lambda: candidates(gemm, pre_bn.element_size(), precision, machine(pre_bn.device)),
        run,
    )
    return out, moments
