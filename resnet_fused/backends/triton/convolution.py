"""relu?(bn(conv(x)) (+ residual)) and relu(bn(conv(x)) + bn(projection(shortcut))), fused.

Algorithm: implicit GEMM on NHWC activations and KRSC weights; a program computes BLOCK_M output
positions × BLOCK_N output channels, 16-byte asynchronous copies feeding tensor cores through
`num_stages` buffers. The epilogue normalises the float32 accumulator with live batch norm
parameters, adds, rectifies, rounds once and stores.
Tiles: 128×256, 256×128, 128×128 and smaller; BLOCK_C input channels a step (64 for 16-bit types).
Memory traffic: x once (again from L2 for each column tile and each tap), the weights from L2, the
residual once, in place where it is a strided view (shortcut option A), the result once. The
projected shortcut stays in registers.

Small groups (ResNeXt: 4 to 32 channels each) are packed so that one tile covers up to 32 channels:
its weights are block-diagonal. A NaN or infinity in x therefore reaches all channels of a pack,
where PyTorch confines it to its group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...parameters import ConvBn, Convolution
from ..tuning import Tuner, describe
from .launching import (
    Config,
    Machine,
    convolution_precision,
    dense,
    empty_nhwc,
    is_wide,
    launch,
    machine,
    nhwc,
    strided_operand,
)
from .primitives import convolve, normalise, rectify, strided_rows, tile_index

_PACKED_CHANNELS = 32
SLICE = tl.constexpr(32)


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and right half of a (BLOCK_M, BLOCK_N) tile."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def finish(
    acc,
    bn,
    other_acc,
    other_bn,
    residual,
    residual_row,
    residual_channels,
    out,
    row,
    in_rows,
    first_column,
    first_channel,
    out_channels,
    K,
    RELU: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue: stores relu?(bn(acc) (+ other_bn(other_acc)) (+ residual)).

    `residual_row`: where the residual's rows begin, of `residual_channels` channels each; None
    where it is laid out like the result.
    Wide tiles are finished in slices, else the terms of all columns are live at once and spill.
    """
    if BLOCK_N > SLICE:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        other_left = None
        other_right = None
        if other_acc is not None:
            other_left, other_right = halves(other_acc, BLOCK_M, BLOCK_N)
        finish(
            left, bn, other_left, other_bn, residual, residual_row, residual_channels,
            out, row, in_rows, first_column, first_channel, out_channels, K, RELU,
            EXACT, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        finish(
            right, bn, other_right, other_bn, residual, residual_row, residual_channels,
            out, row, in_rows, first_column + BLOCK_N // 2, first_channel, out_channels, K, RELU,
            EXACT, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
    else:
        column = first_column + tl.arange(0, BLOCK_N)
        channel = first_channel + column
        valid = column < out_channels
        value = normalise(acc, bn, channel, valid, EXACT)
        if other_acc is not None:
            value += normalise(other_acc, other_bn, channel, valid, EXACT)
        offset = row[:, None] * K + channel[None, :]
        mask = in_rows[:, None] & valid[None, :]
        if residual is not None:
            place = offset
            present = mask
            if residual_row is not None:
                place = residual_row[:, None] + channel[None, :]
                present = mask & (channel < residual_channels)[None, :]
            value += tl.load(residual + place, present, other=0.0).to(tl.float32)
        if RELU:
            value = rectify(value)
        tl.store(out + offset, value.to(out.dtype.element_ty), mask)


@triton.jit
def conv_bn_kernel(
    x,
    weight,
    mean,
    var,
    gamma,
    beta,
    residual,
    residual_channels,
    residual_n,
    residual_h,
    residual_w,
    out,
    eps,
    rows,
    H,
    W,
    C,
    P,
    Q,
    K,
    in_channels,
    out_channels,
    RELU: tl.constexpr,
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
    GROUP_IN: tl.constexpr,
    GROUP_OUT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of rows × out_channels, packs). A pack (all channels where groups = 1) maps its
    `in_channels` to its `out_channels`; C and K count the channels of all packs. residual_channels
    and the residual's strides are None where it is laid out like the result."""
    row, first_column = tile_index(rows, out_channels, BLOCK_M, BLOCK_N, WIDE)
    pack = tl.program_id(1)
    column = first_column + tl.arange(0, BLOCK_N)
    column = pack * out_channels + tl.where(column < out_channels, column, 0)
    acc = convolve(
        x, weight, tl.where(row < rows, row, 0), column, pack * in_channels,
        H, W, C, P, Q, in_channels,
        R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W,
        POINTWISE, PADDED, GROUP_IN, GROUP_OUT, EVEN, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    residual_row = None
    if residual_channels is not None:
        residual_row = strided_rows(row, P, Q, residual_n, residual_h, residual_w)
    finish(
        acc, (mean, var, gamma, beta, eps), None, None, residual, residual_row, residual_channels,
        out, row, row < rows, first_column, pack * out_channels, out_channels, K, RELU,
        out.dtype.element_ty == tl.float32 and PRECISION == "ieee", BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def conv_bn_projection_kernel(
    x,
    weight,
    mean,
    var,
    gamma,
    beta,
    shortcut,
    projection,
    projection_mean,
    projection_var,
    projection_gamma,
    projection_beta,
    out,
    eps,
    projection_eps,
    rows,
    H,
    W,
    C,
    P,
    Q,
    K,
    SHORTCUT_H,
    SHORTCUT_W,
    SHORTCUT_C,
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
    PROJECTION_STRIDE_H: tl.constexpr,
    PROJECTION_STRIDE_W: tl.constexpr,
    EVEN: tl.constexpr,
    SHORTCUT_EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of rows × K,). Two products, each normalised by its own terms, one store."""
    row, first_column = tile_index(rows, K, BLOCK_M, BLOCK_N, WIDE)
    column = first_column + tl.arange(0, BLOCK_N)
    column = tl.where(column < K, column, 0)
    safe_row = tl.where(row < rows, row, 0)
    acc = convolve(
        x, weight, safe_row, column, 0, H, W, C, P, Q, C,
        R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W,
        POINTWISE, PADDED, 0, 0, EVEN, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    projected = convolve(
        shortcut, projection, safe_row, column, 0,
        SHORTCUT_H, SHORTCUT_W, SHORTCUT_C, P, Q, SHORTCUT_C,
        1, 1, PROJECTION_STRIDE_H, PROJECTION_STRIDE_W, 0, 0, 1, 1,
        PROJECTION_STRIDE_H == 1 and PROJECTION_STRIDE_W == 1, False, 0, 0,
        SHORTCUT_EVEN, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    finish(
        acc, (mean, var, gamma, beta, eps), projected,
        (projection_mean, projection_var, projection_gamma, projection_beta, projection_eps),
        None, None, None, out, row, row < rows, first_column, 0, K, K, True,
        out.dtype.element_ty == tl.float32 and PRECISION == "ieee", BLOCK_M, BLOCK_N,
    )  # fmt: skip


class Gemm(NamedTuple):
    """The size of an implicit GEMM, repeated `packs` times."""

    rows: int
    columns: int
    channels: int
    taps: int = 1
    packs: int = 1
    accumulators: int = 1


_TENSOR_CORE = (
    Config((128, 256, 64), 8, 3),
    Config((256, 128, 64), 8, 3),
    Config((128, 128, 64), 8, 3),
    Config((128, 128, 64), 4, 4),
    Config((256, 64, 64), 8, 3),
    Config((128, 64, 64), 4, 4),
    Config((64, 128, 64), 4, 4),
    Config((64, 64, 64), 4, 4),
    Config((128, 32, 64), 4, 4),
    Config((32, 64, 64), 4, 4),
    Config((16, 64, 64), 4, 4),
    Config((16, 32, 64), 4, 4),
)
# Float32 on the ordinary cores: operands and accumulator live in registers, so tiles are small.
_FMA = (
    Config((128, 128, 16), 8, 2),
    Config((128, 64, 16), 8, 2),
    Config((64, 64, 16), 4, 2),
    Config((64, 64, 32), 8, 2),
    Config((32, 32, 32), 4, 2),
    Config((16, 32, 32), 4, 2),
)
_MEASURED = 7


def _cut(blocks: tuple[int, ...], gemm: Gemm) -> tuple[int, int, int]:
    """Tile sizes no larger than the problem's columns and channels ask for."""
    block_m, block_n, block_c = blocks
    return (
        block_m,
        min(block_n, max(16, triton.next_power_of_2(gemm.columns))),
        min(block_c, max(16, triton.next_power_of_2(gemm.channels))),
    )


def candidates(gemm: Gemm, itemsize: int, precision: str, limits: Machine) -> list[Config]:
    """Launch configurations worth measuring, the best by rule first.

    The rule: rounds of programs over the processors × the cost of a tile, which is its products
    plus its operands' traffic (64 products' worth for each row or column). Tiles over 128×128
    fill a processor alone, so they are left to inner dimensions long enough to hide an epilogue.
    """
    if limits.interpreted:  # its time goes with the number of steps more than with their size
        block_m = min(128, max(16, triton.next_power_of_2(gemm.rows)))
        return [Config(_cut((block_m, 256, 128), gemm), 4, 1)]
    fma = itemsize == 4 and precision == "ieee"
    fitting: dict[Config, float] = {}
    for (block_m, block_n, block_c), warps, stages in _FMA if fma else _TENSOR_CORE:
        if itemsize == 4 and not fma:
            block_c //= 2
        if gemm.accumulators * block_m * block_n > warps * 32 * 128:
            continue
        if block_m * block_n > 128 * 128 and gemm.taps * gemm.channels < 512:
            continue
        block_m, block_n, block_c = _cut((block_m, block_n, block_c), gemm)
        if stages * (block_m + block_n) * block_c * itemsize > limits.shared_bytes:
            continue
        tiles = triton.cdiv(gemm.rows, block_m) * triton.cdiv(gemm.columns, block_n) * gemm.packs
        cost = triton.cdiv(tiles, limits.processors) * (
            block_m * block_n + 64 * (block_m + block_n)
        )
        fitting.setdefault(Config((block_m, block_n, block_c), warps, stages), cost)
    return sorted(fitting, key=fitting.__getitem__)[:_MEASURED]


def _groups_per_pack(groups: int, group_in: int, group_out: int) -> int:
    most = max(1, _PACKED_CHANNELS // max(group_in, group_out))
    return max(n for n in range(1, min(most, groups) + 1) if groups % n == 0)


def window(conv: Convolution) -> dict[str, Any]:
    """The compile-time description of a convolution's window."""
    return {
        "R": conv.weight.shape[2],
        "S": conv.weight.shape[3],
        "STRIDE_H": conv.stride[0],
        "STRIDE_W": conv.stride[1],
        "PAD_H": conv.padding[0],
        "PAD_W": conv.padding[1],
        "DILATION_H": conv.dilation[0],
        "DILATION_W": conv.dilation[1],
        "POINTWISE": conv.is_pointwise(),
    }


def conv_bn(tuner: Tuner, x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool) -> Tensor:
    """relu?(bn(conv(x)) (+ residual)): see `resnet_fused.reference.ops.conv_bn`."""
    conv, bn = layer
    x, weight = nhwc(x), nhwc(conv.weight)
    batch, channels, height, width = x.shape
    filters, group_in, r, s = weight.shape
    p, q = conv.output_size(height, width)
    out = empty_nhwc((batch, filters, p, q), x)
    residual, layout = strided_operand(residual, out)
    group_out = filters // conv.groups
    packed = _groups_per_pack(conv.groups, group_in, group_out)
    packs = conv.groups // packed
    gemm = Gemm(batch * p * q, packed * group_out, packed * group_in, r * s, packs)
    wide = is_wide(x, weight, out, *([] if residual is None else [residual]))
    precision = convolution_precision(x.dtype)

    def run(config: Config) -> None:
        block_m, block_n, block_c = config.blocks
        tiles = triton.cdiv(gemm.rows, block_m) * triton.cdiv(gemm.columns, block_n)
        launch(
            conv_bn_kernel, (tiles, packs), config,
            x, weight, *dense(bn), residual, *layout, out, bn.eps,
            gemm.rows, height, width, channels, p, q, filters, gemm.channels, gemm.columns,
            RELU=relu, **window(conv), PADDED=max(conv.padding) > 0,
            GROUP_IN=group_in if packed > 1 else 0, GROUP_OUT=group_out if packed > 1 else 0,
            EVEN=gemm.channels % block_c == 0, WIDE=wide, PRECISION=precision,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c,
        )  # fmt: skip

    tuner.run(
        ("conv_bn", *describe(x, conv, residual), wide),
        x.device,
        lambda: candidates(gemm, x.element_size(), precision, machine(x.device)),
        run,
    )
    return out


def is_projection(conv: Convolution, projection: Convolution) -> bool:
    """Whether `conv_bn_projection` has a kernel for this pair of convolutions."""
    return (
        conv.groups == 1
        and projection.groups == 1
        and tuple(projection.weight.shape[2:]) == (1, 1)
        and tuple(projection.padding) == (0, 0)
    )


def conv_bn_projection(
    tuner: Tuner, x: Tensor, layer: ConvBn, shortcut: Tensor, projection_layer: ConvBn
) -> Tensor:
    """relu(bn(conv(x)) + bn'(conv'(shortcut))); two launches where the projection is not a plain
    strided 1×1 convolution."""
    (conv, bn), (projection, projection_bn) = layer, projection_layer
    if not is_projection(conv, projection):
        residual = conv_bn(tuner, shortcut, projection_layer, None, False)
        return conv_bn(tuner, x, layer, residual, True)

    x, weight = nhwc(x), nhwc(conv.weight)
    shortcut, projection_weight = nhwc(shortcut), nhwc(projection.weight)
    batch, channels, height, width = x.shape
    shortcut_channels, shortcut_height, shortcut_width = shortcut.shape[1:]
    filters, _, r, s = weight.shape
    p, q = conv.output_size(height, width)
    out = empty_nhwc((batch, filters, p, q), x)
    gemm = Gemm(batch * p * q, filters, channels, r * s, accumulators=2)
    wide = is_wide(x, weight, shortcut, projection_weight, out)
    precision = convolution_precision(x.dtype)

    def run(config: Config) -> None:
        block_m, block_n, block_c = config.blocks
        tiles = triton.cdiv(gemm.rows, block_m) * triton.cdiv(gemm.columns, block_n)
        launch(
            conv_bn_projection_kernel, (tiles,), config,
            x, weight, *dense(bn), shortcut, projection_weight, *dense(projection_bn), out,
            bn.eps, projection_bn.eps, gemm.rows, height, width, channels, p, q, filters,
            shortcut_height, shortcut_width, shortcut_channels,
            **window(conv), PADDED=max(conv.padding) > 0,
            PROJECTION_STRIDE_H=projection.stride[0], PROJECTION_STRIDE_W=projection.stride[1],
            EVEN=channels % block_c == 0, SHORTCUT_EVEN=shortcut_channels % block_c == 0,
            WIDE=wide, PRECISION=precision,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c,
        )  # fmt: skip

    tuner.run(
        ("conv_bn_projection", *describe(x, conv, shortcut, projection), wide),
        x.device,
        lambda: candidates(gemm, x.element_size(), precision, machine(x.device)),
        run,
    )
    return out
