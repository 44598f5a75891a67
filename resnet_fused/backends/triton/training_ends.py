"""A block's end folded into its operand's moments (`resnet_fused.backends.training`).

Algorithm: products of the operand's deviations, channel by channel, are summed over positions as a
weight's gradient is, in parts; deviations are from the first position, so that a mean that is large
beside them loses nothing, and are centred in float64 once the parts are merged. What follows are
products of the small matrices: W·C forward, Wᵀ·b·W backward, and their diagonals.
Tiles: BLOCK_M × BLOCK_N channels of C, BLOCK_C positions a step; of the small products
16 × 64 and 32 × 64.
Memory traffic: the operand once for each tile of its channels, 4 bytes per part and pair of
channels; the matrices, of K × C at most, stay in L2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...parameters import Convolution, Folded, OperandTerm
from ..arguments import dense_convolution, empty_signs, given_scale
from . import launching
from .convolution import SIGNED, configurations, packing, plan_conv_bn, plan_conv_bn_projection
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
    readable,
)
from .primitives import multiply, split_position
from .training_batch_norm import few_sums, merged_sums

_SMALL = Config((64, 64, 64), 4, 3)  # of up to 64 channels
_LARGE = Config((128, 128, 64), 8, 3)
_LEAST_POSITIONS = 1024  # of a part
_MERGE = Config((16, 64), 4, 1)  # parts × pairs of channels
_ROWS = Config((16, 64), 4, 2)  # filters × channels
_MATRIX = Config((32, 64), 4, 2)
_VECTOR = Config((32, 64), 4, 1)


@triton.jit
def gram_kernel(
    x,
    parts,
    sums,
    rows,
    rows_per_part,
    image,
    result,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (tiles of C × C, parts). parts: (parts, C, C), sums: (parts, C), float32, of products
    of deviations from x's first position and of the deviations."""
    tiles_n = tl.cdiv(image.c, TILE.n)
    left = (tl.program_id(0) // tiles_n) * TILE.m + tl.arange(0, TILE.m)
    right = (tl.program_id(0) % tiles_n) * TILE.n + tl.arange(0, TILE.n)
    in_left = left < image.c
    in_right = right < image.c
    left_origin = tl.load(x + left, in_left, other=0.0).to(tl.float32)[None, :]
    right_origin = tl.load(x + right, in_right, other=0.0).to(tl.float32)[None, :]
    part = tl.program_id(1)
    first_row = part * rows_per_part
    if TILE.is_wide:
        first_row = part.to(tl.int64) * rows_per_part
    last_row = tl.minimum(first_row + rows_per_part, rows)
    block_m: tl.constexpr = TILE.m
    block_n: tl.constexpr = TILE.n
    block_c: tl.constexpr = TILE.c
    acc = tl.zeros((block_m, block_n), tl.float32)
    total = tl.zeros((block_c, block_m), tl.float32)
    for start in range(first_row, last_row, TILE.c):
        row = start + tl.arange(0, TILE.c)
        if WINDOW.is_pointwise:
            position = row
        else:
            n, p, q = split_position(row, result.h, result.w)
            position = (n * image.h + p * WINDOW.stride_h) * image.w + q * WINDOW.stride_w
        place = position[:, None] * image.c
        in_rows = (row < last_row)[:, None]
        a_mask = in_rows & in_left[None, :]
        b_mask = in_rows & in_right[None, :]
        a = tl.load(x + place + left[None, :], a_mask, other=0.0)
        b = tl.load(x + place + right[None, :], b_mask, other=0.0)
        a = tl.where(a_mask, a.to(tl.float32) - left_origin, 0.0).to(x.dtype.element_ty)
        b = tl.where(b_mask, b.to(tl.float32) - right_origin, 0.0).to(x.dtype.element_ty)
        acc = multiply(tl.trans(a), b, acc, tl.constexpr(TILE.precision))
        total += a.to(tl.float32)
    place = (part * image.c + left)[:, None] * image.c + right[None, :]
    tl.store(parts + place, acc, in_left[:, None] & in_right[None, :])
    if tl.program_id(0) % tiles_n == 0:
        tl.store(sums + part * image.c + left, tl.sum(total, 0), in_left)


@triton.jit
def merge_gram_kernel(
    first_position,
    parts,
    sums,
    gram,
    products,
    count,
    rows,
    K,
    C,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of C × C,), STEP parts at a time. gram (C, C): the sum of products of
    deviations from the mean, which is the last row of products (K + 1, C), float32.
    first_position (C,): of the operand."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_pairs = pair < C * C
    left = pair // C
    right = pair % C
    some = tl.arange(0, STEP)[:, None]
    total = tl.zeros((STEP, BLOCK), tl.float64)
    left_sum = total
    right_sum = total
    for first in range(0, count, STEP):
        mask = (first + some < count) & in_pairs[None, :]
        part = first + some
        total += tl.load(parts + part * C * C + pair[None, :], mask, other=0.0)
        left_sum += tl.load(sums + part * C + left[None, :], mask, other=0.0)
        right_sum += tl.load(sums + part * C + right[None, :], mask, other=0.0)
    left_mean = tl.sum(left_sum, 0) / rows
    centred = tl.sum(total, 0) - left_mean * tl.sum(right_sum, 0)
    tl.store(gram + pair, centred, in_pairs)
    origin = tl.load(first_position + left, in_pairs, other=0.0).to(tl.float64)
    tl.store(products + K * C + left, origin + left_mean, in_pairs & (right == 0))


@triton.jit
def end_moments_kernel(
    weight,
    gram,
    products,
    moments,
    rows,
    K,
    C,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of K,). products (K + 1, C): W·gram is written, the mean in the last row read;
    moments: (3, K)."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    squares = tl.zeros((BLOCK_K,), tl.float32)
    mean = squares
    inner = tl.arange(0, BLOCK_C)
    for first in range(0, C, BLOCK_C):
        column = first + inner
        in_columns = column < C
        acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
        for c in range(0, C, BLOCK_C):
            in_inner = c + inner < C
            mask = in_k[:, None] & in_inner[None, :]
            w = tl.load(weight + k[:, None] * C + (c + inner)[None, :], mask, other=0.0)
            place = gram + (c + inner)[:, None] * C + column[None, :]
            g = tl.load(place, in_inner[:, None] & in_columns[None, :], other=0.0)
            acc = multiply(w.to(tl.float32), g, acc, "ieee")
        mask = in_k[:, None] & in_columns[None, :]
        place = k[:, None] * C + column[None, :]
        tl.store(products + place, acc, mask)
        w = tl.load(weight + place, mask, other=0.0).to(tl.float32)
        squares += tl.sum(acc * w, 1)
        operand = tl.load(products + K * C + column, in_columns, other=0.0)
        mean += tl.sum(w * operand[None, :], 1)
    tl.store(moments + k, mean, in_k)
    # Rounding may take a variance of nothing below zero; NaN is to pass.
    tl.store(moments + K + k, tl.where(squares < 0, 0.0, squares), in_k)
    tl.store(moments + 2 * K + k, tl.zeros_like(mean) + rows, in_k)


@triton.jit
def end_sums_kernel(
    sums,
    gradient,
    weight,
    scale_shift,
    out,
    parts,
    K,
    C,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of K,). out (2, K) from sums (parts, 2, K) of g and gradient P (K, C)."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    sum_g, _ = merged_sums(sums, 0, parts, K, k, in_k)
    product = tl.zeros((BLOCK_K,), tl.float64)
    for c in range(0, C, BLOCK_C):
        column = c + tl.arange(0, BLOCK_C)
        mask = in_k[:, None] & (column < C)[None, :]
        place = k[:, None] * C + column[None, :]
        p = tl.load(gradient + place, mask, other=0.0).to(tl.float64)
        product += tl.sum(p * tl.load(weight + place, mask, other=0.0).to(tl.float64), 1)
    mean = tl.load(scale_shift + k, in_k, other=0.0).to(tl.float64)
    tl.store(out + k, sum_g, in_k)
    tl.store(out + K + k, product - mean * sum_g, in_k)


@triton.jit
def end_gradients_kernel(
    gradient,
    products,
    coefficients,
    weight,
    weight_gradient,
    scaled,
    rest,
    rows,
    K,
    C,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of K,). weight_gradient, scaled: (K, C); rest (K,): b·(W·m - mean) + d, or None
    where the normalisation is frozen, as products then are. gradient is None where the weight needs
    none."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    a = tl.load(coefficients + k, in_k, other=0.0)
    b = a
    shift = a
    if products is not None:
        b = tl.load(coefficients + K + k, in_k, other=0.0)
        mean = tl.zeros((BLOCK_K,), tl.float32)
        for c in range(0, C, BLOCK_C):
            column = c + tl.arange(0, BLOCK_C)
            mask = in_k[:, None] & (column < C)[None, :]
            w = tl.load(weight + k[:, None] * C + column[None, :], mask, other=0.0)
            operand = tl.load(products + K * C + column, column < C, other=0.0)
            mean += tl.sum(w.to(tl.float32) * operand[None, :], 1)
        shift = b * (mean - tl.load(coefficients + 3 * K + k, in_k, other=0.0))
        shift += tl.load(coefficients + 2 * K + k, in_k, other=0.0)
        tl.store(rest + k, shift, in_k)
    for c in range(0, C, BLOCK_C):
        column = c + tl.arange(0, BLOCK_C)
        mask = in_k[:, None] & (column < C)[None, :]
        place = k[:, None] * C + column[None, :]
        w = tl.load(weight + place, mask, other=0.0).to(tl.float32)
        tl.store(scaled + place, (a[:, None] * w).to(scaled.dtype.element_ty), mask)
        if gradient is not None:
            value = a[:, None] * tl.load(gradient + place, mask, other=0.0)
            if products is not None:
                value += b[:, None] * tl.load(products + place, mask, other=0.0)
                operand = tl.load(products + K * C + column, column < C, other=0.0)
                value += shift[:, None] * (operand * rows)[None, :]
            tl.store(weight_gradient + place, value.to(weight_gradient.dtype.element_ty), mask)


@triton.jit
def end_matrix_kernel(
    weight, coefficients, matrix, K, C, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Grid: (blocks of C, blocks of C). matrix (C, C) = Wᵀ·b·W."""
    left = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    right = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_left = (left < C)[None, :]
    in_right = (right < C)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        in_k = (k < K)[:, None]
        b = tl.load(coefficients + K + k, k < K, other=0.0)[:, None]
        a = tl.load(weight + k[:, None] * C + left[None, :], in_k & in_left, other=0.0)
        w = tl.load(weight + k[:, None] * C + right[None, :], in_k & in_right, other=0.0)
        # Finer than the type that the matrix is rounded to.
        acc = multiply(tl.trans(a).to(tl.float32), w.to(tl.float32) * b, acc, "tf32")
    place = matrix + left[:, None] * C + right[None, :]
    tl.store(place, acc.to(matrix.dtype.element_ty), (left < C)[:, None] & in_right)


@triton.jit
def end_offset_kernel(
    weight,
    scaled,
    coefficients,
    sums,
    rest,
    matrix,
    mean,
    offset,
    rows,
    K,
    C,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (blocks of C,). offset (C,) = Wᵀ·rest - matrix · mean, and what rounding took from the
    scaled weights times the mean of g: so what it did to both matrices acts on deviations from the
    mean alone, and the gradients' sums stay what they are."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < C
    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float64)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        in_k = k < K
        mask = in_k[:, None] & valid[None, :]
        place = k[:, None] * C + channel[None, :]
        w = tl.load(weight + place, mask, other=0.0).to(tl.float64)
        rounded = tl.load(scaled + place, mask, other=0.0).to(tl.float64)
        a = tl.load(coefficients + k, in_k, other=0.0).to(tl.float64)
        g = tl.load(sums + k, in_k, other=0.0).to(tl.float64) / rows
        total += w * tl.load(rest + k, in_k, other=0.0)[:, None]
        total += (w * a[:, None] - rounded) * g[:, None]
    for first in range(0, C, BLOCK_K):
        c = first + tl.arange(0, BLOCK_K)
        mask = (c < C)[:, None] & valid[None, :]
        m = tl.load(matrix + c[:, None] * C + channel[None, :], mask, other=0.0).to(tl.float64)
        total -= m * tl.load(mean + c, c < C, other=0.0)[:, None]
    tl.store(offset + channel, tl.sum(total, 0), valid)


class _Moments(NamedTuple):
    """The launches that lead to a folded end's moments, and how many parts the first one makes."""

    parts: int
    gram: Launch
    merge: Launch
    moments: Launch


@planned
def _plan_moments(x: Tensor, conv: Convolution) -> _Moments:
    filters, channels = conv.weight.shape[:2]
    result = Image(*conv.output_size(*x.shape[2:]), channels)
    rows = len(x) * result.h * result.w
    config = _SMALL if channels <= 64 else _LARGE
    block_m, block_n, block_c = config.blocks
    tiles = triton.cdiv(channels, block_m) * triton.cdiv(channels, block_n)
    parts = max(1, min(rows // _LEAST_POSITIONS, 2 * launching.machine(x.device).num_sms // tiles))
    rows_per_part = triton.cdiv(triton.cdiv(rows, parts), block_c) * block_c
    parts = triton.cdiv(rows, rows_per_part)
    step, block = _MERGE.blocks
    block_k, block_c_small = _ROWS.blocks
    return _Moments(
        parts,
        Launch(
            gram_kernel,
            (tiles, parts),
            config,
            x.device,
            rows=rows,
            rows_per_part=rows_per_part,
            image=Image.of(x),
            result=result,
            WINDOW=Window.of(conv),
            TILE=Tile(block_m, block_n, block_c, is_wide(x), convolution_precision(x.dtype)),
        ),
        Launch(
            merge_gram_kernel,
            (triton.cdiv(channels * channels, block),),
            _MERGE,
            x.device,
            count=parts,
            rows=rows,
            K=filters,
            C=channels,
            STEP=step,
            BLOCK=block,
        ),
        Launch(
            end_moments_kernel,
            (triton.cdiv(filters, block_k),),
            _ROWS,
            x.device,
            rows=rows,
            K=filters,
            C=channels,
            BLOCK_K=block_k,
            BLOCK_C=block_c_small,
        ),
    )


def operand_moments(x: Tensor, conv: Convolution) -> tuple[Tensor, Tensor]:
    """See `resnet_fused.backends.training.FoldedEnds.operand_moments`."""
    x, conv = nhwc(x), dense_convolution(conv, x.dtype)
    filters, channels = conv.weight.shape[:2]
    plan = _plan_moments(x, conv)

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    parts, sums = empty(plan.parts, channels, channels), empty(plan.parts, channels)
    gram, products = empty(channels, channels), empty(filters + 1, channels)
    moments = empty(1, 3, filters)
    plan.gram(x, parts, sums)
    plan.merge(x[0, :, 0, 0], parts, sums, gram, products)
    plan.moments(conv.weight, gram, products, moments)
    return moments, products


def folded_end_configs(main: Folded, shortcut: Tensor | Folded | None, signs: bool) -> list[Config]:
    """Launch configurations, the heuristic's choice first."""
    _, gemm = packing(main.x, main.conv)
    accumulators = 1 + isinstance(shortcut, Folded)
    precision = convolution_precision(main.x.dtype)
    found = configurations(gemm, main.x, precision, accumulators=accumulators)
    least = min(gemm.columns, SIGNED.value) if signs else 0
    return [c for c in found if c.blocks[1] >= least]


def folded_end(
    config: Config, main: Folded, shortcut: Tensor | Folded | None, signs: bool
) -> tuple[Tensor, Tensor | None]:
    """See `resnet_fused.backends.training.FoldedEnds.folded_end`."""
    x, layer = _layer(main)
    precision = convolution_precision(x.dtype)
    added: tuple[Any, ...]
    if isinstance(shortcut, Folded):
        other, projection = _layer(shortcut)
        shape, launch = plan_conv_bn_projection(
            config, x, layer, other, projection, precision, signs
        )
        added = (other, projection.conv.weight, projection.bn)
    else:
        residual = readable(shortcut)
        shape, launch = plan_conv_bn(config, x, layer, residual, True, precision, signs)
        added = (residual,)
    out, own = empty_nhwc(shape, x), empty_signs(shape, x) if signs else None
    launch(x, layer.conv.weight, layer.bn, *added, out, own)
    return out, own


def _layer(end: Folded) -> tuple[Tensor, Any]:
    """Operand and layer as the kernels of inference take them."""
    return nhwc(end.x), given_scale(dense_convolution(end.conv, end.x.dtype), end.scale_shift)


@planned
def _plan_sums(sums: Tensor, conv: Convolution) -> Launch:
    filters, channels = conv.weight.shape[:2]
    block_k, block_c = _ROWS.blocks
    return Launch(
        end_sums_kernel,
        (triton.cdiv(filters, block_k),),
        _ROWS,
        sums.device,
        parts=len(sums),
        K=filters,
        C=channels,
        BLOCK_K=block_k,
        BLOCK_C=block_c,
    )


def folded_sums(sums: Tensor, gradient: Tensor, end: Folded) -> Tensor:
    """See `resnet_fused.backends.training.FoldedEnds.folded_sums`."""
    conv = dense_convolution(end.conv, end.x.dtype)
    few = few_sums(sums)
    out = sums.new_empty((1, 2, len(conv.weight)))
    _plan_sums(few, conv)(few, gradient, conv.weight, end.scale_shift, out)
    return out


class _Gradients(NamedTuple):
    """The launches that form what a folded end's gradients need."""

    gradients: Launch
    matrix: Launch
    offset: Launch


@planned
def _plan_gradients(x: Tensor, conv: Convolution) -> _Gradients:
    filters, channels = conv.weight.shape[:2]
    p, q = conv.output_size(*x.shape[2:])
    rows = len(x) * p * q
    block_k, block_c = _ROWS.blocks
    block, step = _MATRIX.blocks
    blocks = triton.cdiv(channels, block)
    width, depth = _VECTOR.blocks
    sizes: dict[str, Any] = {"K": filters, "C": channels}
    return _Gradients(
        Launch(
            end_gradients_kernel,
            (triton.cdiv(filters, block_k),),
            _ROWS,
            x.device,
            rows=rows,
            BLOCK_K=block_k,
            BLOCK_C=block_c,
            **sizes,
        ),
        Launch(
            end_matrix_kernel,
            (blocks, blocks),
            _MATRIX,
            x.device,
            BLOCK=block,
            BLOCK_K=step,
            **sizes,
        ),
        Launch(
            end_offset_kernel,
            (triton.cdiv(channels, width),),
            _VECTOR,
            x.device,
            rows=rows,
            BLOCK_C=width,
            BLOCK_K=depth,
            **sizes,
        ),
    )


def folded_gradients(
    gradient: Tensor | None,
    products: Tensor | None,
    sums: Tensor,
    coefficients: Tensor,
    end: Folded,
    frozen: bool,
) -> tuple[Tensor | None, Convolution, OperandTerm | None]:
    """See `resnet_fused.backends.training.FoldedEnds.folded_gradients`."""
    x, conv = nhwc(end.x), dense_convolution(end.conv, end.x.dtype)
    filters, channels = conv.weight.shape[:2]
    plan = _plan_gradients(x, conv)
    scaled = empty_nhwc(conv.weight.shape, conv.weight)
    own = None if gradient is None else empty_nhwc(conv.weight.shape, end.conv.weight)
    if frozen:
        plan.gradients(gradient, None, coefficients, conv.weight, own, scaled, None)
        return own, conv._replace(weight=scaled), None
    assert products is not None
    rest = coefficients.new_empty(filters)
    matrix, offset = x.new_empty((channels, channels)), coefficients.new_empty(channels)
    plan.gradients(gradient, products, coefficients, conv.weight, own, scaled, rest)
    plan.matrix(conv.weight, coefficients, matrix)
    plan.offset(conv.weight, scaled, coefficients, sums, rest, matrix, products[-1], offset)
    return own, conv._replace(weight=scaled), OperandTerm(x, matrix, offset)
