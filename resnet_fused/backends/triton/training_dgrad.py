"""The gradient of a convolution's input.

Algorithm: the transposed convolution as an implicit GEMM: rows are input positions, columns input
channels, and the inner dimension runs over taps and output channels. A folded end adds a product of
the input itself (`resnet_fused.backends.training`). The epilogue adds another
branch's gradient (that of a strided identity only where it was read), or masks with the previous
layer's ReLU (its sign computed again from that layer's pre-BN output) and takes the two sums that
the previous batch norm's gradient needs.
A strided convolution falls into stride² classes of positions that meet disjoint taps; a program
belongs to one class and runs over its taps only.
Tiles: BLOCK_M positions × BLOCK_N input channels, BLOCK_C output channels a step.
Memory traffic: g once (again from L2 for each column tile and tap), the previous pre-BN output and
the result once, 8 bytes per tile and channel of sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...parameters import Activation, Convolution, OperandTerm
from ..arguments import dense_convolution
from .convolution import Gemm, configurations
from .launching import (
    Config,
    Image,
    Launch,
    Tile,
    Window,
    convolution_precision,
    empty_nhwc,
    is_wide,
    nhwc,
    planned,
    strides_beside,
)
from .primitives import (
    affine,
    for_sums,
    is_inside,
    load_scale_shift,
    multiply,
    next_step,
    split_position,
    tile_index,
)


@triton.jit
def dgrad_kernel(
    grad,
    weight,
    add,
    operand,
    operand_matrix,
    operand_offset,
    below,
    below_scale_shift,
    out,
    sums,
    batch,
    image,
    result,
    add_image,
    operand_strides,
    group_in,
    group_out,
    tiles_m,
    WINDOW: tl.constexpr,
    CLASS_H: tl.constexpr,
    CLASS_W: tl.constexpr,
    ADD_STRIDE: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_OPERAND: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (tiles_m × tiles of group_in, groups, classes).

    image: sizes of the convolution's input, whose gradient this is; result: of its output.
    CLASS_H, CLASS_W: the strides, or 1 where positions are not told apart (dilation) and taps that
    fall between outputs read as zero. add or below or both are None. sums: (classes × tiles_m, 2,
    C). EVEN: TILE.c divides group_out; EVEN_COLUMNS: TILE.n divides group_in.
    operand: the input of a 1×1 convolution, or None; operand_matrix · operand + operand_offset is
    added at the positions that it reads. operand_strides is None where the operand is laid out like
    the result. EVEN_OPERAND: TILE.c divides C.
    ADD_STRIDE: 0 where `add` is laid out like the result, else `add`, of sizes `add_image`, belongs
    to every ADD_STRIDE-th row and column.
    """
    class_h = tl.program_id(2) // CLASS_W
    class_w = tl.program_id(2) % CLASS_W
    class_height = (image.h - class_h + CLASS_H - 1) // CLASS_H
    class_width = (image.w - class_w + CLASS_W - 1) // CLASS_W
    rows = batch * class_height * class_width
    row, first_column = tile_index(tiles_m * TILE.m, group_in, TILE.m, TILE.n, TILE.is_wide)
    in_rows = row < rows
    group = tl.program_id(1)
    column = first_column + tl.arange(0, TILE.n)
    in_columns = column < group_in
    channel = group * group_in + column
    inner = tl.arange(0, TILE.c)

    safe_row = tl.where(in_rows, row, 0)
    n, h, w = split_position(safe_row, tl.maximum(class_height, 1), tl.maximum(class_width, 1))
    h = h * CLASS_H + class_h
    w = w * CLASS_W + class_w
    position = (n * image.h + h) * image.w + w
    first_r = (class_h + WINDOW.pad_h) % CLASS_H
    first_s = (class_w + WINDOW.pad_w) % CLASS_W
    r_taps = (WINDOW.r - first_r + CLASS_H - 1) // CLASS_H
    s_taps = (WINDOW.s - first_s + CLASS_W - 1) // CLASS_W

    block_m: tl.constexpr = TILE.m
    block_n: tl.constexpr = TILE.n
    acc = tl.zeros((block_m, block_n), tl.float32)
    r = first_r
    s = first_s
    k = 0
    for _ in range(r_taps * s_taps * tl.cdiv(group_out, TILE.c)):
        in_inner = k + inner < group_out
        inner_channel = group * group_out + k + inner
        if WINDOW.is_pointwise:
            source = position
            mask = in_rows[:, None]
        else:
            reach_h = h + WINDOW.pad_h - r * WINDOW.dilation_h
            reach_w = w + WINDOW.pad_w - s * WINDOW.dilation_w
            p = reach_h // WINDOW.stride_h
            q = reach_w // WINDOW.stride_w
            hit = in_rows & is_inside(p, result.h) & is_inside(q, result.w)
            # Before the first output the quotient rounds towards zero: those must not count.
            hit &= (reach_h >= 0) & (reach_w >= 0)
            if WINDOW.stride_h > CLASS_H:
                hit &= reach_h % WINDOW.stride_h == 0
            if WINDOW.stride_w > CLASS_W:
                hit &= reach_w % WINDOW.stride_w == 0
            source = (n * result.h + p) * result.w + q
            mask = hit[:, None]
        load_mask = mask if EVEN else mask & in_inner[None, :]
        offset = source[:, None] * result.c + inner_channel[None, :]
        a = tl.load(grad + offset, load_mask, other=0.0)
        weight_row = inner_channel
        if TILE.is_wide:
            weight_row = inner_channel.to(tl.int64)
        # Columns as they are and, in whole tiles, no mask: else the compiler loses sight of what is
        # contiguous, and loads two bytes at a time.
        b_tile = (
            weight
            + weight_row[:, None] * (WINDOW.r * WINDOW.s * group_in)
            + (r * WINDOW.s + s) * group_in
            + column[None, :]
        )
        if EVEN and EVEN_COLUMNS:
            b = tl.load(b_tile)
        else:
            b = tl.load(b_tile, in_inner[:, None] & in_columns[None, :], other=0.0)
        acc = multiply(a, b, acc, tl.constexpr(TILE.precision))
        r, s, k = next_step(
            r, s, k, group_out, first_s, WINDOW.r, WINDOW.s, CLASS_H, CLASS_W, TILE.c
        )

    place = position[:, None] * image.c + channel[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    if operand is not None and r_taps * s_taps > 0:
        begin = position * image.c
        if operand_strides is not None:
            begin = n * operand_strides.n + h * operand_strides.h + w * operand_strides.w
        for c in range(0, image.c, TILE.c):
            a_tile = operand + begin[:, None] + (c + inner)[None, :]
            b_tile = operand_matrix + (c + inner)[:, None] * image.c + column[None, :]
            if EVEN_OPERAND and EVEN_COLUMNS:
                a = tl.load(a_tile, in_rows[:, None], other=0.0)
                b = tl.load(b_tile)
            else:
                in_inner = c + inner < image.c
                a = tl.load(a_tile, in_rows[:, None] & in_inner[None, :], other=0.0)
                b = tl.load(b_tile, in_inner[:, None] & in_columns[None, :], other=0.0)
            acc = multiply(a, b, acc, tl.constexpr(TILE.precision))
        acc += tl.load(operand_offset + column, in_columns, other=0.0)[None, :]
    if add is not None:
        if ADD_STRIDE == 0:
            acc += tl.load(add + place, mask, other=0.0).to(tl.float32)
        else:
            reached = (h % ADD_STRIDE == 0) & (w % ADD_STRIDE == 0)
            source = (n * add_image.h + h // ADD_STRIDE) * add_image.w + w // ADD_STRIDE
            acc += tl.load(
                add + source[:, None] * add_image.c + channel[None, :],
                mask & reached[:, None],
                other=0.0,
            ).to(tl.float32)
    if below is not None:
        mean, scale, shift = load_scale_shift(below_scale_shift, image.c, channel, in_columns)
        value = tl.load(below + place, mask, other=0.0)
        acc = tl.where(mask & (affine(value, mean, scale, shift) > 0), acc, 0.0)
        rounded = acc.to(out.dtype.element_ty)
        tl.store(out + place, rounded, mask)
        g = for_sums(rounded)
        deviation = for_sums(value) - mean[None, :]
        tile = tl.program_id(2) * tiles_m + tl.program_id(0) // tl.cdiv(group_in, TILE.n)
        tl.store(sums + tile * 2 * image.c + channel, tl.sum(g, 0), in_columns)
        tl.store(sums + (tile * 2 + 1) * image.c + channel, tl.sum(g * deviation, 0), in_columns)
    else:
        tl.store(out + place, acc.to(out.dtype.element_ty), mask)


def _classes(conv: Convolution) -> tuple[int, int]:
    """Into how many classes rows and columns of the input fall."""
    class_h, class_w = (
        stride if dilation == 1 else 1
        for stride, dilation in zip(conv.stride, conv.dilation, strict=True)
    )
    return class_h, class_w


def _gemm(conv: Convolution, shape: torch.Size) -> Gemm:
    """That of a class and group; `channels` are those of one tap."""
    batch, _, height, width = shape
    class_h, class_w = _classes(conv)
    rows = batch * triton.cdiv(height, class_h) * triton.cdiv(width, class_w)
    filters, group_in = conv.weight.shape[:2]
    return Gemm(rows, group_in, filters // conv.groups)


def dgrad_configs(
    g: Tensor, conv: Convolution, shape: torch.Size, masks: bool, folded: bool
) -> list[Config]:
    """Launch configurations, the heuristic's choice first. masks: whether a ReLU is below."""
    class_h, class_w = _classes(conv)
    r, s = conv.weight.shape[2:]
    found = configurations(
        _gemm(conv, shape),
        g,
        convolution_precision(g.dtype),
        taps=triton.cdiv(r, class_h) * triton.cdiv(s, class_w),
        packs=conv.groups * class_h * class_w,
        # Sums of float32 results are taken in float64: registers for a third accumulator.
        accumulators=3 if masks and g.element_size() == 4 else 2,
    )
    # Higher tiles leave one program on a multiprocessor, and nothing beside its long epilogue; with
    # the second product of a folded end one as large as that has too few registers.
    largest = 128 * 64 if folded and masks else 128 * 128
    return [c for c in found if c.blocks[0] <= 128 and c.blocks[0] * c.blocks[1] <= largest]


@planned
def _plan(
    config: Config,
    g: Tensor,
    conv: Convolution,
    shape: torch.Size,
    below: Activation | None,
    add: Tensor | None,
    add_stride: int | None,
    term: OperandTerm | None,
    precision: str,
) -> tuple[tuple[int, ...], Launch]:
    """The shape of the sums, and the launch that writes them too."""
    weight = conv.weight
    gemm = _gemm(conv, shape)
    class_h, class_w = _classes(conv)
    out = empty_nhwc(shape, g.new_empty(0, device="meta"))
    operand = None if term is None else term.x
    block_m, block_n, block_c = config.blocks
    tiles_m = triton.cdiv(gemm.rows, block_m)
    return (class_h * class_w * tiles_m, 2, shape[1]), Launch(
        dgrad_kernel,
        (config.tiles(gemm.rows, gemm.columns), conv.groups, class_h * class_w),
        config,
        g.device,
        batch=shape[0],
        image=Image.of(out),
        result=Image.of(g),
        add_image=None if add is None else Image.of(add),
        operand_strides=strides_beside(operand, out),
        group_in=gemm.columns,
        group_out=gemm.channels,
        tiles_m=tiles_m,
        WINDOW=Window.of(conv),
        CLASS_H=class_h,
        CLASS_W=class_w,
        ADD_STRIDE=add_stride or 0,
        EVEN=gemm.channels % block_c == 0,
        EVEN_COLUMNS=gemm.columns % block_n == 0,
        EVEN_OPERAND=gemm.columns % block_c == 0,
        TILE=Tile(block_m, block_n, block_c, is_wide(g, weight, out, add, operand), precision),
    )


def dgrad(
    config: Config,
    g: Tensor,
    conv: Convolution,
    shape: torch.Size,
    below: Activation | None,
    add: Tensor | None,
    add_stride: int | None = None,
    term: OperandTerm | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `resnet_fused.backends.training.TrainingKernels.dgrad`."""
    g = nhwc(g)
    conv = dense_convolution(conv, g.dtype)
    below = None if below is None else Activation(nhwc(below.pre_bn), below.scale_shift)
    add = None if add is None else nhwc(add)
    if term is not None and term.x.stride(1) != 1:
        term = term._replace(x=nhwc(term.x))
    precision = convolution_precision(g.dtype)
    sums_shape, launch = _plan(config, g, conv, shape, below, add, add_stride, term, precision)
    out = empty_nhwc(shape, g)
    sums = None if below is None else g.new_empty(sums_shape, dtype=torch.float32)
    pre_bn, scale_shift = below or (None, None)
    launch(g, conv.weight, add, *(term or (None,) * 3), pre_bn, scale_shift, out, sums)
    return out, sums
