"""relu?(bn(conv(x)) (+ residual)) and relu(bn(conv(x)) + bn(projection(shortcut))), fused.

Algorithm: implicit GEMM on NHWC activations and KRSC weights; a program computes BLOCK_M output
positions × BLOCK_N output channels, 16-byte asynchronous copies feeding tensor cores through
`num_stages` buffers. The epilogue normalises the float32 accumulator with live batch norm
parameters, adds, applies ReLU, rounds once and stores.
Tiles: 128×256, 256×128, 128×128 and smaller; BLOCK_C input channels a step (64 for 16-bit types).
Memory traffic: x once (again from L2 for each column tile and each tap), the weights from L2, the
residual once, in place where it is a strided view (shortcut option A), the result once. The
projected shortcut stays in registers.

Small groups (ResNeXt: 4 to 32 channels each) are packed so that one tile covers up to 32 channels:
its weights are block-diagonal. A NaN or infinity in x therefore reaches all channels of a pack,
where PyTorch confines it to its group.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...parameters import ConvBn, Convolution
from .. import Candidates
from ..arguments import empty_signs
from . import launching
from .launching import (
    Config,
    Image,
    Launch,
    Tile,
    Window,
    convolution_precision,
    dense_layer,
    empty_nhwc,
    is_wide,
    nhwc,
    planned,
    readable,
    strides_beside,
)
from .primitives import convolve, normalise, relu, strided_rows, tile_index

_FAMILY = "triton conv_bn"
_PACKED_CHANNELS = 32
SLICE = tl.constexpr(32)
# Channels of 8 bytes of signs, which one program has.
SIGNED = tl.constexpr(64)


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
    signs,
    place,
    first_column,
    RELU: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue: stores relu?(bn(acc) (+ other_bn(other_acc)) (+ residual)), and its signs
    (`resnet_fused.backends.training`) unless they are None.

    `residual_row`: where the residual's rows begin, of `residual_channels` channels each; None
    where it is laid out like the result.
    `place`: the tile's rows, which of them there are, the first channel of its groups, how many
    these have, and those of the result.
    Wide tiles are finished in slices, else scale and shift of all columns are live at once, which
    spills.
    """
    slice_n: tl.constexpr = SLICE if signs is None else SIGNED
    if slice_n < BLOCK_N:
        accs = halves(acc, BLOCK_M, BLOCK_N)
        other_accs = (None, None)
        if other_acc is not None:
            other_accs = halves(other_acc, BLOCK_M, BLOCK_N)
        for half in tl.static_range(2):
            finish(
                accs[half],
                bn,
                other_accs[half],
                other_bn,
                residual,
                residual_row,
                residual_channels,
                out,
                signs,
                place,
                first_column + half * (BLOCK_N // 2),
                RELU,
                EXACT,
                BLOCK_M,
                BLOCK_N // 2,
            )
    else:
        row, in_rows, first_channel, out_channels, filters = place
        column = first_column + tl.arange(0, BLOCK_N)
        channel = first_channel + column
        valid = column < out_channels
        value = normalise(acc, bn, channel, valid, EXACT)
        if other_acc is not None:
            value += normalise(other_acc, other_bn, channel, valid, EXACT)
        offset = row[:, None] * filters + channel[None, :]
        mask = in_rows[:, None] & valid[None, :]
        if residual is not None:
            source = offset
            present = mask
            if residual_row is not None:
                source = residual_row[:, None] + channel[None, :]
                present = mask & (channel < residual_channels)[None, :]
            value += tl.load(residual + source, present, other=0.0).to(tl.float32)
        if RELU:
            value = relu(value)
        value = value.to(out.dtype.element_ty)
        tl.store(out + offset, value, mask)
        if signs is not None:
            j = tl.arange(0, BLOCK_N // 8)
            positive = ((value > 0) & valid[None, :]).to(tl.int32)
            bits = tl.reshape(positive, (BLOCK_M, BLOCK_N // 8, 8)) << j[None, :, None]
            target = row[:, None] * (tl.cdiv(filters, SIGNED) * 8) + tl.arange(0, 8)[None, :]
            target += first_column // SIGNED * 8
            inside = (in_rows & (first_column < filters))[:, None]
            tl.store(signs + target, tl.sum(bits, 1).to(tl.uint8), inside)


@triton.jit
def conv_bn_kernel(
    x,
    weight,
    bn,
    shortcut,
    projection,
    projection_bn,
    out,
    signs,
    shortcut_image,
    shortcut_strides,
    gemm,
    image,
    result,
    RELU: tl.constexpr,
    WINDOW: tl.constexpr,
    PROJECTION_WINDOW: tl.constexpr,
    EVEN: tl.constexpr,
    SHORTCUT_EVEN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (tiles of rows × columns, packs). A pack (all channels where groups = 1) maps its
    `gemm.channels` to its `gemm.columns`. A shortcut is added as it is, or, where projection is not
    None, which takes one group, as a second product with its own normalisation. shortcut_image and
    shortcut_strides are None where there is no shortcut, and the strides where it is laid out like
    the result."""
    row, first_column = tile_index(gemm.rows, gemm.columns, TILE.m, TILE.n, TILE.is_wide)
    pack = tl.program_id(1)
    channels = gemm.channels
    if projection is not None:  # of one group, which spares the arithmetic of packs
        pack = 0
        channels = image.c
    column = first_column + tl.arange(0, TILE.n)
    column = pack * gemm.columns + tl.where(column < gemm.columns, column, 0)
    safe_row = tl.where(row < gemm.rows, row, 0)
    acc = convolve(
        x,
        weight,
        safe_row,
        column,
        pack * channels,
        image,
        result,
        channels,
        EVEN,
        WINDOW,
        TILE,
    )
    projected = None
    residual = None
    residual_row = None
    residual_channels = None
    if projection is not None:
        projected = convolve(
            shortcut,
            projection,
            safe_row,
            column,
            0,
            shortcut_image,
            result,
            shortcut_image.c,
            SHORTCUT_EVEN,
            PROJECTION_WINDOW,
            TILE,
        )
    else:
        residual = shortcut
        if shortcut_strides is not None:
            residual_row = strided_rows(row, result.h, result.w, shortcut_strides)
            residual_channels = shortcut_image.c
    finish(
        acc,
        bn,
        projected,
        projection_bn,
        residual,
        residual_row,
        residual_channels,
        out,
        signs,
        (row, row < gemm.rows, pack * gemm.columns, gemm.columns, result.c),
        first_column,
        RELU,
        out.dtype.element_ty == tl.float32 and TILE.precision == "ieee",
        TILE.m,
        TILE.n,
    )


class Gemm(NamedTuple):
    """The size of an implicit GEMM, as kernels take it."""

    rows: int
    columns: int
    channels: int  # of the inner dimension, for each tap


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


def _cut(
    blocks: tuple[int, ...], gemm: Gemm, itemsize: int, packs_groups: bool
) -> tuple[int, int, int]:
    """Tile sizes no larger than the problem's columns and channels ask for. Tensor cores take at
    least 32 bytes of the inner dimension, and a pack all its channels in one step."""
    block_m, block_n, block_c = blocks
    channels = max(16, 32 // itemsize, triton.next_power_of_2(gemm.channels))
    return (
        block_m,
        min(block_n, max(16, triton.next_power_of_2(gemm.columns))),
        channels if packs_groups else min(block_c, channels),
    )


def configurations(
    gemm: Gemm,
    like: Tensor,
    precision: str,
    taps: int = 1,
    packs: int = 1,
    accumulators: int = 1,
    packs_groups: bool = False,
) -> list[Config]:
    """Launch configurations worth measuring for `packs` GEMMs of operands like `like`, the
    heuristic's choice first. `packs_groups`: whether a pack is of several groups.

    The heuristic: rounds of programs over the SMs × the cost of a tile, which is its products plus
    its operands' traffic (64 products' worth for each row or column). Tiles over 128×128 fill an SM
    alone, so they are left to inner dimensions long enough to hide an epilogue. Where products are
    tcgen05's, which take half as long, a tile alone in an SM's memory copies one more step ahead.
    """
    limits, itemsize = launching.machine(like.device), like.element_size()
    if limits.interpreted:  # its time goes with the number of steps more than with their size
        block_m = min(128, max(16, triton.next_power_of_2(gemm.rows)))
        return [Config(_cut((block_m, 256, 128), gemm, itemsize, packs_groups), 4, 1)]
    fma = itemsize == 4 and precision == "ieee"
    if itemsize == 4:  # one step's sums, or TF32 operands that are rounded, take registers too
        accumulators += 1
    costs: dict[Config, float] = {}
    for (block_m, block_n, block_c), warps, stages in _FMA if fma else _TENSOR_CORE:
        if not fma:
            block_c = 2 * block_c // itemsize
        if accumulators * block_m * block_n > warps * 32 * 128:
            continue
        if block_m * block_n > 128 * 128 and taps * gemm.channels < 512:
            continue
        block_m, block_n, block_c = _cut((block_m, block_n, block_c), gemm, itemsize, packs_groups)
        step_bytes = (block_m + block_n) * block_c * itemsize
        if limits.tensor_memory and 2 * stages * step_bytes > limits.shared_bytes:
            stages += 1
        if stages * step_bytes > limits.shared_bytes:
            continue
        config = Config((block_m, block_n, block_c), warps, stages)
        rounds = triton.cdiv(config.tiles(gemm.rows, gemm.columns) * packs, limits.num_sms)
        costs.setdefault(config, rounds * (block_m * block_n + 64 * (block_m + block_n)))
    return sorted(costs, key=costs.__getitem__)[:_MEASURED]


def _groups_per_pack(groups: int, group_in: int, group_out: int) -> int:
    most = max(1, _PACKED_CHANNELS // max(group_in, group_out))
    return max(n for n in range(1, min(most, groups) + 1) if groups % n == 0)


def packed_window(conv: Convolution, packed: int, gemm: Gemm) -> Window:
    """The window of a convolution whose tiles pack so many groups."""
    window = Window.of(conv)
    if packed == 1:
        return window
    return window._replace(packed_in=conv.weight.shape[1], packed_out=gemm.columns // packed)


def result_shape(x: Tensor, conv: Convolution) -> tuple[int, int, int, int]:
    """The sizes (N, K, P, Q) of the convolution's result."""
    return (x.shape[0], len(conv.weight), *conv.output_size(*x.shape[2:]))


def packing(x: Tensor, conv: Convolution) -> tuple[int, Gemm]:
    """How many groups a tile packs, and the GEMM of a pack."""
    batch, filters, p, q = result_shape(x, conv)
    group_in, group_out = conv.weight.shape[1], filters // conv.groups
    packed = _groups_per_pack(conv.groups, group_in, group_out)
    return packed, Gemm(batch * p * q, packed * group_out, packed * group_in)


def list_conv_bn(x: Tensor, layer: ConvBn) -> Candidates:
    """Candidates of op `conv_bn`."""
    packed, gemm = packing(x, layer.conv)
    r, s = layer.conv.weight.shape[2:]
    precision = convolution_precision(x.dtype)
    packs = layer.conv.groups // packed
    configs = configurations(gemm, x, precision, r * s, packs, packs_groups=packed > 1)
    return launching.candidates(conv_bn, configs, _FAMILY)


def list_conv_bn_projection(x: Tensor, layer: ConvBn, projection: ConvBn) -> Candidates:
    """Candidates of op `conv_bn_projection`: for a plain strided 1×1 projection."""
    conv, other = layer.conv, projection.conv
    if conv.groups > 1 or other.groups > 1:
        return ()
    if tuple(other.weight.shape[2:]) != (1, 1) or tuple(other.padding) != (0, 0):
        return ()
    _, gemm = packing(x, layer.conv)
    r, s = conv.weight.shape[2:]
    configs = configurations(gemm, x, convolution_precision(x.dtype), r * s, accumulators=2)
    return launching.candidates(conv_bn_projection, configs, _FAMILY)


@planned
def plan_conv_bn(
    config: Config,
    x: Tensor,
    layer: ConvBn,
    shortcut: Tensor | None,
    projection: ConvBn | None,
    relu: bool,
    precision: str,
    signs: bool = False,
) -> tuple[tuple[int, ...], Launch]:
    """The result's shape, and the launch, of tensors as the kernel takes them; signs: whether it
    is given any to write."""
    conv, other = layer.conv, None if projection is None else projection.conv
    packed, gemm = packing(x, conv)
    shape = result_shape(x, conv)
    out = empty_nhwc(shape, x.new_empty(0, device="meta"))
    block_m, block_n, block_c = config.blocks
    wide = is_wide(x, conv.weight, out, shortcut, other and other.weight)
    return shape, Launch(
        conv_bn_kernel,
        (config.tiles(gemm.rows, gemm.columns), conv.groups // packed),
        config,
        x.device,
        shortcut_image=None if shortcut is None else Image.of(shortcut),
        shortcut_strides=None if other is not None else strides_beside(shortcut, out),
        gemm=gemm,
        image=Image.of(x),
        result=Image.of(out),
        RELU=relu,
        WINDOW=packed_window(conv, packed, gemm),
        PROJECTION_WINDOW=other and Window.of(other),
        EVEN=gemm.channels % block_c == 0,
        SHORTCUT_EVEN=shortcut is not None and shortcut.shape[1] % block_c == 0,
        TILE=Tile(block_m, block_n, block_c, wide, precision),
    )


def run_conv_bn(
    config: Config,
    x: Tensor,
    layer: ConvBn,
    shortcut: Tensor | None,
    projection: ConvBn | None,
    relu: bool,
    signs: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The result and, if they are asked for, its signs, of tensors as the kernel takes them."""
    precision = convolution_precision(x.dtype)
    shape, launch = plan_conv_bn(config, x, layer, shortcut, projection, relu, precision, signs)
    out, own = empty_nhwc(shape, x), empty_signs(shape, x) if signs else None
    weight, bn = (None, None) if projection is None else (projection.conv.weight, projection.bn)
    launch(x, layer.conv.weight, layer.bn, shortcut, weight, bn, out, own)
    return out, own


def conv_bn(
    config: Config, x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool
) -> Tensor:
    """relu?(bn(conv(x)) (+ residual)): see `resnet_fused.reference.ops.conv_bn`."""
    return run_conv_bn(config, nhwc(x), dense_layer(layer), readable(residual), None, relu)[0]


def conv_bn_projection(
    config: Config, x: Tensor, layer: ConvBn, shortcut: Tensor, projection: ConvBn
) -> Tensor:
    """relu(bn(conv(x)) + bn'(conv'(shortcut))) in one launch."""
    layer, projection = dense_layer(layer), dense_layer(projection)
    return run_conv_bn(config, nhwc(x), layer, nhwc(shortcut), projection, True)[0]
