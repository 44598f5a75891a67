"""The gradient of a convolution's weight.

Algorithm: a GEMM of output channels × (taps × input channels) whose inner dimension runs over all
output positions. Both operands are formed between load and tensor cores: batch norm's gradient
a·g + b·(pre_bn - mean) + d, and the activation relu((pre_bn - mean)·scale + shift), zero where
the window hangs over the edge. Positions are split among programs, each of which writes a float32
part; a second kernel sums the parts in order, so that the same inputs give the same bits.
Tiles: BLOCK_M output channels × BLOCK_N columns (tap, input channel), BLOCK_C positions a step.
Memory traffic: each operand once per tile of the other, 4 bytes per part and weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...parameters import Convolution
from ..training import Activation, PreBnGradient
from ..tuning import Tuner, describe
from .convolution import window
from .launching import Config, Machine, convolution_precision, is_wide, launch, machine, nhwc
from .primitives import is_inside, rectify, split_position
from .training_convolution import affine, channel_scale_shift
from .training_dgrad import pre_bn_gradient

_SUM = Config((1024,), 4, 1)
_TENSOR_CORE = (
    Config((128, 128, 32), 8, 3),
    Config((128, 64, 32), 4, 3),
    Config((64, 128, 32), 4, 3),
    Config((64, 64, 32), 4, 3),
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
    pre_bn,
    coefficients,
    x,
    scale_shift,
    out,
    rows,
    rows_per_part,
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
    ONE_TAP: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of group_out × R·S·group_in, parts, groups). out: (parts, K, R·S·group_in)
    float32. pre_bn and scale_shift as in the other kernels. ONE_TAP: BLOCK_N divides group_in."""
    columns = R * S * group_in
    tiles_n = tl.cdiv(columns, BLOCK_N)
    group = tl.program_id(2)
    filter_index = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_filters = filter_index < group_out
    filter_channel = group * group_out + filter_index
    first_column = (tl.program_id(0) % tiles_n) * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    in_columns = column < columns
    if ONE_TAP:
        tap = first_column // group_in
        tap_h = tap // S * DILATION_H - PAD_H
        tap_w = tap % S * DILATION_W - PAD_W
        channel = group * group_in + column - tap * group_in
    else:
        taps = column // group_in
        tap_h = (taps // S * DILATION_H - PAD_H)[None, :]
        tap_w = (taps % S * DILATION_W - PAD_W)[None, :]
        channel = group * group_in + column - taps * group_in
    if scale_shift is not None:
        mean, scale, shift = channel_scale_shift(scale_shift, C, channel, in_columns)

    part = tl.program_id(1)
    first_row = part * rows_per_part
    if WIDE:
        first_row = part.to(tl.int64) * rows_per_part
    last_row = tl.minimum(first_row + rows_per_part, rows)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first_row, last_row, BLOCK_C):
        row = start + tl.arange(0, BLOCK_C)
        in_rows = (row < last_row)[:, None]
        offset = row[:, None] * K + filter_channel[None, :]
        mask = in_rows & in_filters[None, :]
        g = tl.load(grad + offset, mask, other=0.0)
        value = None
        if pre_bn is not None:
            value = tl.load(pre_bn + offset, mask, other=0.0)
        dc = pre_bn_gradient(g, value, coefficients, K, filter_channel, in_filters)
        dc = tl.where(in_rows, dc, 0.0).to(grad.dtype.element_ty)
        if POINTWISE:
            position = row[:, None]
            inside = in_rows
        else:
            image, p, q = split_position(row, P, Q)
            h = p[:, None] * STRIDE_H + tap_h
            w = q[:, None] * STRIDE_W + tap_w
            inside = in_rows & is_inside(h, H) & is_inside(w, W)
            position = (image[:, None] * H + h) * W + w
        b = tl.load(x + position * C + channel[None, :], inside & in_columns[None, :], other=0.0)
        if scale_shift is not None:
            active = rectify(affine(b, mean, scale, shift))
            b = tl.where(inside, active, 0.0).to(x.dtype.element_ty)
        acc = tl.dot(tl.trans(dc), b, acc, input_precision=PRECISION)

    place = (part * K + filter_channel)[:, None] * columns + column[None, :]
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


def candidates(
    filters: int, columns: int, groups: int, rows: int, fma: bool, itemsize: int, limits: Machine
) -> list[Config]:
    """Launch configurations worth measuring, the best by rule first; the fourth block is the
    number of parts. The rule is the convolutions': rounds of programs × the cost of a tile."""
    fitting: dict[Config, float] = {}
    most = max(1, rows // _LEAST_POSITIONS)
    for (block_m, block_n, block_c), warps, stages in _FMA if fma else _TENSOR_CORE:
        block_m = min(block_m, max(16, triton.next_power_of_2(filters)))
        block_n = min(block_n, max(16, triton.next_power_of_2(columns)))
        if itemsize == 4 and not fma:
            block_c //= 2
        tiles = triton.cdiv(filters, block_m) * triton.cdiv(columns, block_n) * groups
        parts = min(most, max(1, 2 * limits.processors // tiles), 64)
        cost = triton.cdiv(tiles * parts, limits.processors) * (
            (block_m * block_n + 64 * (block_m + block_n)) * triton.cdiv(rows, parts)
        )
        fitting.setdefault(Config((block_m, block_n, block_c, parts), warps, stages), cost)
    return sorted(fitting, key=fitting.__getitem__)


def wgrad(
    tuner: Tuner, gradient: PreBnGradient, x: Tensor | Activation, conv: Convolution
) -> Tensor:
    """See `resnet_fused.backends.training.TrainingKernels.wgrad`."""
    g = nhwc(gradient.grad)
    pre_bn = None if gradient.frozen or gradient.pre_bn is None else nhwc(gradient.pre_bn)
    value, scale_shift = x if isinstance(x, Activation) else (x, None)
    value = nhwc(value)
    batch, channels, height, width = value.shape
    _, filters, p, q = g.shape
    group_in, r, s = conv.weight.shape[1:]
    columns, group_out, rows = r * s * group_in, filters // conv.groups, batch * p * q
    out = nhwc(conv.weight.new_empty(conv.weight.shape))
    wide = is_wide(g, value, out)
    precision = convolution_precision(g.dtype)

    def run(config: Config) -> Tensor:
        block_m, block_n, block_c, parts = config.blocks
        rows_per_part = triton.cdiv(triton.cdiv(rows, parts), block_c) * block_c
        parts = triton.cdiv(rows, rows_per_part)
        partial = g.new_empty((parts, filters * columns), dtype=torch.float32)
        launch(
            wgrad_kernel,
            (triton.cdiv(group_out, block_m) * triton.cdiv(columns, block_n), parts, conv.groups),
            config, g, pre_bn, gradient.coefficients, value, scale_shift, partial,
            rows, rows_per_part,
            height, width, channels, p, q, filters, group_in, group_out,
            **window(conv), ONE_TAP=group_in % block_n == 0,
            WIDE=wide, PRECISION=precision, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c,
        )  # fmt: skip
        return partial

    partial = tuner.run(
        ("wgrad", *describe(g, conv, pre_bn is None, scale_shift is None), height, width, wide),
        g.device,
        lambda: candidates(
            group_out, columns, conv.groups, rows,
            g.element_size() == 4 and precision == "ieee", g.element_size(), machine(g.device),
        ),
        run,
    )  # fmt: skip
    elements = filters * columns
    (block,) = _SUM.blocks
    launch(
        sum_parts_kernel, (triton.cdiv(elements, block),), _SUM,
        partial, out, partial.shape[0], elements, BLOCK=block,
    )  # fmt: skip
    return out
