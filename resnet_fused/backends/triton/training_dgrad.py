"""The gradient of a convolution's input, from the gradient before batch norm to that before the
previous one.

Algorithm: the transposed convolution as an implicit GEMM: rows are input positions, columns input
channels, and the inner dimension runs over taps and output channels. The prologue forms batch
norm's gradient a·g + b·(pre_bn - mean) + d, per channel, between load and tensor cores. The
epilogue adds another branch's gradient (that of a strided identity only where it was read), or
masks with the previous layer's ReLU (its sign computed again from that layer's pre-BN output) and
takes the two sums that the previous batch norm's gradient needs.
A strided convolution falls into stride² classes of positions that meet disjoint taps; a program
belongs to one class and runs over its taps only.
Tiles: BLOCK_M positions × BLOCK_N input channels, BLOCK_C output channels a step.
Memory traffic: g and pre_bn once (again from L2 for each column tile and tap), the previous pre-BN
output once, the result once, 8 bytes per tile and channel of sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...parameters import Convolution
from ..training import Activation, PreBnGradient
from ..tuning import Tuner, describe
from .convolution import Gemm, candidates, window
from .launching import Config, convolution_precision, empty_nhwc, is_wide, launch, machine, nhwc
from .primitives import is_inside, next_step, split_position, tile_index
from .training_convolution import affine, channel_scale_shift, for_sums


@triton.jit
def pre_bn_gradient(g, pre_bn, coefficients, channels, channel, mask):
    """a·g + b·(pre_bn - mean) + d in float32, (rows, channel); a·g where pre_bn is None."""
    a = tl.load(coefficients + channel, mask, other=0.0)
    g = g.to(tl.float32)
    out = g * a[None, :]
    if pre_bn is not None:
        b = tl.load(coefficients + channels + channel, mask, other=0.0)
        d = tl.load(coefficients + 2 * channels + channel, mask, other=0.0)
        mean = tl.load(coefficients + 3 * channels + channel, mask, other=0.0)
        rest = tl.fma(pre_bn.to(tl.float32) - mean[None, :], b[None, :], d[None, :])
        out = tl.fma(g, a[None, :], rest)
    return out


@triton.jit
def dgrad_kernel(
    grad,
    pre_bn,
    coefficients,
    weight,
    add,
    below,
    below_scale_shift,
    out,
    sums,
    batch,
    H,
    W,
    C,
    P,
    Q,
    K,
    group_in,
    group_out,
    tiles_m,
    add_p,
    add_q,
    add_channels,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CLASS_H: tl.constexpr,
    CLASS_W: tl.constexpr,
    ADD_STRIDE: tl.constexpr,
    POINTWISE: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles_m × tiles of group_in, groups, classes).

    CLASS_H, CLASS_W: the strides, or 1 where positions are not told apart (dilation) and taps that
    fall between outputs read as zero. pre_bn is None where the normalisation is frozen; add or
    below or both are None. sums: (classes × tiles_m, 2, C). EVEN: BLOCK_C divides group_out;
    EVEN_COLUMNS: BLOCK_N divides group_in.
    ADD_STRIDE: 0 where `add` is laid out like the result, else `add`, (add_p, add_q, add_channels),
    belongs to every `add_stride`-th row and column.
    """
    class_h = tl.program_id(2) // CLASS_W
    class_w = tl.program_id(2) % CLASS_W
    class_height = (H - class_h + CLASS_H - 1) // CLASS_H
    class_width = (W - class_w + CLASS_W - 1) // CLASS_W
    rows = batch * class_height * class_width
    row, first_column = tile_index(tiles_m * BLOCK_M, group_in, BLOCK_M, BLOCK_N, WIDE)
    in_rows = row < rows
    group = tl.program_id(1)
    column = first_column + tl.arange(0, BLOCK_N)
    in_columns = column < group_in
    channel = group * group_in + column
    inner = tl.arange(0, BLOCK_C)

    safe_row = tl.where(in_rows, row, 0)
    image, h, w = split_position(safe_row, tl.maximum(class_height, 1), tl.maximum(class_width, 1))
    h = h * CLASS_H + class_h
    w = w * CLASS_W + class_w
    position = (image * H + h) * W + w
    first_r = (class_h + PAD_H) % CLASS_H
    first_s = (class_w + PAD_W) % CLASS_W
    r_taps = (R - first_r + CLASS_H - 1) // CLASS_H
    s_taps = (S - first_s + CLASS_W - 1) // CLASS_W

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    r = first_r
    s = first_s
    k = 0
    for _ in range(r_taps * s_taps * tl.cdiv(group_out, BLOCK_C)):
        in_inner = k + inner < group_out
        inner_channel = group * group_out + k + inner
        if POINTWISE:
            source = position
            mask = in_rows[:, None]
        else:
            reach_h = h + PAD_H - r * DILATION_H
            reach_w = w + PAD_W - s * DILATION_W
            p = reach_h // STRIDE_H
            q = reach_w // STRIDE_W
            hit = in_rows & is_inside(p, P) & is_inside(q, Q)
            # Before the first output the quotient rounds towards zero: those must not count.
            hit &= (reach_h >= 0) & (reach_w >= 0)
            if CLASS_H < STRIDE_H:
                hit &= reach_h % STRIDE_H == 0
            if CLASS_W < STRIDE_W:
                hit &= reach_w % STRIDE_W == 0
            source = (image * P + p) * Q + q
            mask = hit[:, None]
        load_mask = mask if EVEN else mask & in_inner[None, :]
        offset = source[:, None] * K + inner_channel[None, :]
        g = tl.load(grad + offset, load_mask, other=0.0)
        value = None
        if pre_bn is not None:
            value = tl.load(pre_bn + offset, load_mask, other=0.0)
        a = pre_bn_gradient(g, value, coefficients, K, inner_channel, in_inner)
        a = tl.where(mask, a, 0.0).to(grad.dtype.element_ty)
        weight_row = inner_channel
        if WIDE:
            weight_row = inner_channel.to(tl.int64)
        # Columns as they are and, in whole tiles, no mask: else the compiler loses sight of what is
        # contiguous, and loads two bytes at a time.
        b_tile = (
            weight
            + weight_row[:, None] * (R * S * group_in)
            + (r * S + s) * group_in
            + column[None, :]
        )
        if EVEN and EVEN_COLUMNS:
            b = tl.load(b_tile)
        else:
            b = tl.load(b_tile, in_inner[:, None] & in_columns[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        r, s, k = next_step(r, s, k, group_out, first_s, R, S, CLASS_H, CLASS_W, BLOCK_C)

    place = position[:, None] * C + channel[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    if add is not None:
        if ADD_STRIDE == 0:
            acc += tl.load(add + place, mask, other=0.0).to(tl.float32)
        else:
            reached = (h % ADD_STRIDE == 0) & (w % ADD_STRIDE == 0)
            source = (image * add_p + h // ADD_STRIDE) * add_q + w // ADD_STRIDE
            acc += tl.load(
                add + source[:, None] * add_channels + channel[None, :],
                mask & reached[:, None],
                other=0.0,
            ).to(tl.float32)
    if below is not None:
        mean, scale, shift = channel_scale_shift(below_scale_shift, C, channel, in_columns)
        value = tl.load(below + place, mask, other=0.0)
        acc = tl.where(mask & (affine(value, mean, scale, shift) > 0), acc, 0.0)
        rounded = acc.to(out.dtype.element_ty)
        tl.store(out + place, rounded, mask)
        g = for_sums(rounded)
        deviation = for_sums(value) - mean[None, :]
        tile = tl.program_id(2) * tiles_m + tl.program_id(0) // tl.cdiv(group_in, BLOCK_N)
        tl.store(sums + tile * 2 * C + channel, tl.sum(g, 0), in_columns)
        tl.store(sums + (tile * 2 + 1) * C + channel, tl.sum(g * deviation, 0), in_columns)
    else:
        tl.store(out + place, acc.to(out.dtype.element_ty), mask)


def dgrad(
    tuner: Tuner,
    gradient: PreBnGradient,
    conv: Convolution,
    shape: torch.Size,
    below: Activation | None,
    add: Tensor | None,
    add_stride: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `resnet_fused.backends.training.TrainingKernels.dgrad`."""
    g = nhwc(gradient.grad)
    pre_bn = None if gradient.frozen or gradient.pre_bn is None else nhwc(gradient.pre_bn)
    weight = nhwc(conv.weight.to(g.dtype))
    batch, channels, height, width = shape
    _, filters, p, q = g.shape
    _, group_in, r, s = weight.shape
    group_out = filters // conv.groups
    out = empty_nhwc(tuple(shape), g)
    below_pre_bn = None if below is None else nhwc(below.pre_bn)
    below_scale_shift = None if below is None else below.scale_shift
    add = None if add is None else nhwc(add)
    add_shape = (1, 1, 1) if add is None else (*add.shape[2:], add.shape[1])
    class_h, class_w = (
        stride if dilation == 1 else 1
        for stride, dilation in zip(conv.stride, conv.dilation, strict=True)
    )
    rows = batch * triton.cdiv(height, class_h) * triton.cdiv(width, class_w)
    taps = triton.cdiv(r, class_h) * triton.cdiv(s, class_w)
    # Sums of float32 results are taken in float64: registers for a third accumulator.
    accumulators = 3 if below is not None and g.element_size() == 4 else 2
    packs = conv.groups * class_h * class_w
    gemm = Gemm(rows, group_in, group_out, taps, packs, accumulators)
    wide = is_wide(g, weight, out, *([] if add is None else [add]))
    precision = convolution_precision(g.dtype)

    def run(config: Config) -> Tensor | None:
        block_m, block_n, block_c = config.blocks
        tiles_m = triton.cdiv(rows, block_m)
        sums = None
        if below is not None:
            sums = g.new_empty((class_h * class_w * tiles_m, 2, channels), dtype=torch.float32)
        launch(
            dgrad_kernel,
            (tiles_m * triton.cdiv(group_in, block_n), conv.groups, class_h * class_w),
            config, g, pre_bn, gradient.coefficients, weight, add, below_pre_bn,
            below_scale_shift, out, sums,
            batch, height, width, channels, p, q, filters, group_in, group_out, tiles_m,
            *add_shape, **window(conv), CLASS_H=class_h, CLASS_W=class_w,
            ADD_STRIDE=add_stride or 0,
            EVEN=group_out % block_c == 0, EVEN_COLUMNS=group_in % block_n == 0,
            WIDE=wide, PRECISION=precision,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c,
        )  # fmt: skip
        return sums

    def options() -> list[Config]:
        """Two operands are held in registers while they are combined: higher tiles spill."""
        found = candidates(gemm, g.element_size(), precision, machine(g.device))
        return [option for option in found if option.blocks[0] <= 128]

    key = ("dgrad", *describe(g, conv, pre_bn is None, below is None, add is None, add_stride))
    sums = tuner.run((*key, height, width, wide), g.device, options, run)
    return out, sums
