"""A block's end folded into its operand's moments (`resnet_fused.backends.training`).

Algorithm: products of the operand's deviations, channel by channel, are summed over positions as a
weight's gradient is, in parts; deviations are from the first position, so that a mean that is large
beside them loses nothing, and are centred in float64 once the parts are merged. What follows are
products of the small matrices: W·C forward, Wᵀ·b·W backward, and their diagonals. These move next
to no bytes: what takes time is loads that wait for one another, so a program takes few steps, of as
much as it can hold, and there are programs for all SMs.
Tiles: BLOCK_M × BLOCK_N channels of C, BLOCK_C positions a step; of the small products
64 × 64 and 32 × 32; of rows of matrices 2048 elements a step.
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
from ..arguments import dense_convolution, given_scale
from . import launching
from .convolution import SIGNED, configurations, packing, run_conv_bn
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
from .primitives import multiply, round_to_tf32, split_position
from .training_batch_norm import few_sums, merged_sums

_SMALL = Config((64, 64, 64), 4, 3)  # of up to 64 channels
_LARGE = Config((128, 128, 64), 8, 3)
_LEAST_POSITIONS = 1024  # of a part
_ELEMENTS = 2048  # of a step of what goes through rows or parts
_MOST_PARTS = 64  # of a step of merge_gram
_PRODUCTS = Config((64, 64), 4, 2)  # filters × channels
_MATRIX = Config((32, 64), 4, 2)  # channels, both; filters a step
_VECTOR = Config((16, 256), 8, 1)  # channels × filters


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
    """Grid: (C, blocks of C), STEP parts at a time. gram (2, C, C): the sum of products of
    deviations from the mean, as much as TF32 keeps of it, and the rest. The mean is the last row of
    products (K + 1, C), float32. first_position (C,): of the operand."""
    left = tl.program_id(0)
    right = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = right < C
    total = tl.zeros((STEP, BLOCK), tl.float64)
    right_sum = total
    left_sum = tl.zeros((STEP,), tl.float64)
    for first in range(0, count, STEP):
        part = first + tl.arange(0, STEP)
        in_parts = part < count
        mask = in_parts[:, None] & valid[None, :]
        row = part * C
        place = ((row + left) * C)[:, None] + right[None, :]
        total += tl.load(parts + place, mask, other=0.0)
        right_sum += tl.load(sums + row[:, None] + right[None, :], mask, other=0.0)
        left_sum += tl.load(sums + row + left, in_parts, other=0.0)
    left_mean = tl.sum(left_sum, 0) / rows
    centred = (tl.sum(total, 0) - left_mean * tl.sum(right_sum, 0)).to(tl.float32)
    kept = (centred.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    tl.store(gram + left * C + right, kept, valid)
    tl.store(gram + (C + left) * C + right, centred - kept, valid)
    if tl.program_id(1) == 0:
        tl.store(products + K * C + left, tl.load(first_position + left).to(tl.float64) + left_mean)


@triton.jit
def end_products_kernel(weight, gram, products, K, C, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Grid: (blocks of K, blocks of C). products[:K] = W·gram, which is symmetric, by both of its
    parts; of a 16-bit weight TF32 loses nothing."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_k = (k < K)[:, None]
    in_columns = (column < C)[:, None]
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        in_inner = (c < C)[None, :]
        w = tl.load(weight + k[:, None] * C + c[None, :], in_k & in_inner, other=0.0)
        place = gram + column[:, None] * C + c[None, :]
        kept = tl.load(place, in_columns & in_inner, other=0.0)
        rest = tl.load(place + C * C, in_columns & in_inner, other=0.0)
        w = w.to(tl.float32)
        acc = tl.dot(w, tl.trans(rest), acc, input_precision="tf32")
        acc = tl.dot(w, tl.trans(kept), acc, input_precision="tf32")
    tl.store(products + k[:, None] * C + column[None, :], acc, in_k & (column < C)[None, :])


@triton.jit
def end_moments_kernel(
    weight, products, moments, rows, K, C, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Grid: (blocks of K,). moments: (3, K), from products (K + 1, C)."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    squares = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    mean = squares
    for first in range(0, C, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        mask = in_k[:, None] & (column < C)[None, :]
        place = k[:, None] * C + column[None, :]
        w = tl.load(weight + place, mask, other=0.0).to(tl.float32)
        squares += w * tl.load(products + place, mask, other=0.0)
        mean += w * tl.load(products + K * C + column, column < C, other=0.0)[None, :]
    total = tl.sum(squares, 1)
    tl.store(moments + k, tl.sum(mean, 1), in_k)
    # Rounding may take a variance of nothing below zero; NaN is to pass.
    tl.store(moments + K + k, tl.where(total < 0, 0.0, total), in_k)
    tl.store(moments + 2 * K + k, tl.zeros_like(total) + rows, in_k)


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
    """Grid: (blocks of K,). out (2, K) from sums (parts, 2, K) of g, BLOCK_C parts at a time, and
    gradient P (K, C)."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    sum_g, _ = merged_sums(sums, 0, parts, K, k, in_k, BLOCK_C)
    product = tl.zeros((BLOCK_K, BLOCK_C), tl.float64)
    for c in range(0, C, BLOCK_C):
        column = c + tl.arange(0, BLOCK_C)
        mask = in_k[:, None] & (column < C)[None, :]
        place = k[:, None] * C + column[None, :]
        p = tl.load(gradient + place, mask, other=0.0).to(tl.float64)
        product += p * tl.load(weight + place, mask, other=0.0).to(tl.float64)
    mean = tl.load(scale_shift + k, in_k, other=0.0).to(tl.float64)
    tl.store(out + k, sum_g, in_k)
    tl.store(out + K + k, tl.sum(product, 1) - mean * sum_g, in_k)


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
        mean = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
        for c in range(0, C, BLOCK_C):
            column = c + tl.arange(0, BLOCK_C)
            mask = in_k[:, None] & (column < C)[None, :]
            w = tl.load(weight + k[:, None] * C + column[None, :], mask, other=0.0)
            operand = tl.load(products + K * C + column, column < C, other=0.0)
            mean += w.to(tl.float32) * operand[None, :]
        shift = b * (tl.sum(mean, 1) - tl.load(coefficients + 3 * K + k, in_k, other=0.0))
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
    """Grid: (blocks of C, blocks of C). matrix (C, C) = Wᵀ·b·W, which is symmetric: programs at its
    diagonal and below write both halves."""
    if tl.program_id(0) < tl.program_id(1):
        return
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
        # Finer than the type that the matrix is rounded to, and of the weight nothing is lost.
        b_tile = round_to_tf32(w.to(tl.float32) * b)
        acc = tl.dot(tl.trans(a).to(tl.float32), b_tile, acc, input_precision="tf32")
    mask = (left < C)[:, None] & in_right
    found = acc.to(matrix.dtype.element_ty)
    tl.store(matrix + left[:, None] * C + right[None, :], found, mask)
    # At the diagonal the halves are both here, of sums that are rounded differently.
    if tl.program_id(0) > tl.program_id(1):
        tl.store(matrix + right[None, :] * C + left[:, None], found, mask)


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
        g = tl.load(sums + k, in_k, other=0.0).to(tl.float64) / rows
        # Of each filter: what its weight and what its rounded weight is multiplied by.
        of_weight = tl.load(coefficients + k, in_k, other=0.0) * g
        of_weight += tl.load(rest + k, in_k, other=0.0)
        total += w * of_weight[:, None] - rounded * g[:, None]
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
    products: Launch
    moments: Launch


def _by_rows(kernel: Any, conv: Convolution, device: torch.device, **settled: Any) -> Launch:
    """Of a kernel that goes through rows of (filters × channels)."""
    filters, channels = conv.weight.shape[:2]
    block_c = min(max(triton.next_power_of_2(channels), 16), 256)
    config = Config((_ELEMENTS // block_c, block_c), 4, 1)
    return Launch(
        kernel,
        (triton.cdiv(filters, config.blocks[0]),),
        config,
        device,
        K=filters,
        C=channels,
        BLOCK_K=config.blocks[0],
        BLOCK_C=block_c,
        **settled,
    )


@planned
def _plan_moments(x: Tensor, conv: Convolution) -> _Moments:
    filters, channels = conv.weight.shape[:2]
    result = Image(*conv.output_size(*x.shape[2:]), channels)
    rows = len(x) * result.h * result.w
    config = _SMALL if channels <= 64 else _LARGE
    block_m, block_n, block_c = config.blocks
    tiles = config.tiles(channels, channels)
    parts = max(1, min(rows // _LEAST_POSITIONS, 2 * launching.machine(x.device).num_sms // tiles))
    rows_per_part = triton.cdiv(triton.cdiv(rows, parts), block_c) * block_c
    parts = triton.cdiv(rows, rows_per_part)
    step = min(max(triton.next_power_of_2(parts), 4), _MOST_PARTS)
    merge = Config((step, _ELEMENTS // step), 4, 1)
    block_k, block_columns = _PRODUCTS.blocks
    sizes: dict[str, Any] = {"K": filters, "C": channels}
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
            (channels, triton.cdiv(channels, merge.blocks[1])),
            merge,
            x.device,
            count=parts,
            rows=rows,
            STEP=step,
            BLOCK=merge.blocks[1],
            **sizes,
        ),
        Launch(
            end_products_kernel,
            (triton.cdiv(filters, block_k), triton.cdiv(channels, block_columns)),
            _PRODUCTS,
            x.device,
            BLOCK_K=block_k,
            BLOCK_C=block_columns,
            **sizes,
        ),
        _by_rows(end_moments_kernel, conv, x.device, rows=rows),
    )


def operand_moments(x: Tensor, conv: Convolution) -> tuple[Tensor, Tensor]:
    """See `resnet_fused.backends.training.FoldedEnds.operand_moments`."""
    x, conv = nhwc(x), dense_convolution(conv, x.dtype)
    filters, channels = conv.weight.shape[:2]
    plan = _plan_moments(x, conv)

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    parts, sums = empty(plan.parts, channels, channels), empty(plan.parts, channels)
    gram, products = empty(2, channels, channels), empty(filters + 1, channels)
    moments = empty(1, 3, filters)
    plan.gram(x, parts, sums)
    plan.merge(x[0, :, 0, 0], parts, sums, gram, products)
    plan.products(conv.weight, gram, products)
    plan.moments(conv.weight, products, moments)
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
    if isinstance(shortcut, Folded):
        return run_conv_bn(config, *_layer(main), *_layer(shortcut), True, signs)
    return run_conv_bn(config, *_layer(main), readable(shortcut), None, True, signs)


def _layer(end: Folded) -> tuple[Tensor, Any]:
    """Operand and layer as the kernels of inference take them."""
    return nhwc(end.x), given_scale(dense_convolution(end.conv, end.x.dtype), end.scale_shift)


@planned
def _plan_sums(sums: Tensor, conv: Convolution) -> Launch:
    return _by_rows(end_sums_kernel, conv, sums.device, parts=len(sums))


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
def _plan_gradients(
    x: Tensor, conv: Convolution, own: Tensor | None, products: Tensor | None
) -> _Gradients:
    filters, channels = conv.weight.shape[:2]
    p, q = conv.output_size(*x.shape[2:])
    rows = len(x) * p * q
    block, step = _MATRIX.blocks
    blocks = triton.cdiv(channels, block)
    width, depth = _VECTOR.blocks
    sizes: dict[str, Any] = {"K": filters, "C": channels}
    return _Gradients(
        _by_rows(end_gradients_kernel, conv, x.device, rows=rows),
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
    scaled = empty_nhwc(conv.weight.shape, conv.weight)
    own = None if gradient is None else empty_nhwc(conv.weight.shape, end.conv.weight)
    plan = _plan_gradients(x, conv, own, None if frozen else products)
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
