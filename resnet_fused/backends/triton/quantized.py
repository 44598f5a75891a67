"""Quantised int8 convolutions: relu?(conv(x) + bias (+ shortcut)), requantised, and max pooling.

Algorithm: the implicit GEMM of `convolution.py` with int32 accumulators on int8 tensor cores. A
projected shortcut is a second accumulator of the same program. The epilogue is that of
`resnet_fused.reference.quantized`, bit for bit, hence no multiplication is fused with an addition.
Tiles: those of `convolution.py` with 128 input channels a step.
Memory traffic: a byte an element of x, of the weights (from L2), of the shortcut and of the result.
The stem's result crosses memory once more, on its way to the pool.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...parameters import Convolution, MaxPool
from .. import Candidates, recording
from . import launching
from .convolution import SLICE, configurations, halves, packed_window, packing, result_shape
from .launching import (
    Config,
    Image,
    Launch,
    Tile,
    Window,
    dense_convolution,
    is_wide,
    nhwc,
    planned,
    readable,
    strides_beside,
)
from .primitives import convolve, split_position, strided_rows, tile_index

_FEW_CHANNELS = 16  # below that, taps and channels make one inner dimension


@triton.jit
def _rounded(value):
    """The nearest integer of a float32 number, halves to even; from 2**23 on all are integers."""
    magnitude = tl.abs(value)
    nearest = (magnitude + 8388608.0) - 8388608.0
    nearest = tl.where(magnitude < 8388608.0, nearest, magnitude)
    return tl.where(value < 0, -nearest, nearest)


@triton.jit
def _finish(
    acc,
    bias,
    multiplier,
    projected,
    projected_offset,
    shortcut_scale,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue, in slices as in `convolution.finish`, whose arguments it has."""
    if BLOCK_N > SLICE:
        accs = halves(acc, BLOCK_M, BLOCK_N)
        others = (None, None)
        if projected is not None:
            others = halves(projected, BLOCK_M, BLOCK_N)
        for half in tl.static_range(2):
            _finish(
                accs[half],
                bias,
                multiplier,
                others[half],
                projected_offset,
                shortcut_scale,
                residual,
                residual_row,
                residual_channels,
                out,
                row,
                in_rows,
                first_column + half * (BLOCK_N // 2),
                first_channel,
                out_channels,
                K,
                RELU,
                BLOCK_M,
                BLOCK_N // 2,
            )
    else:
        column = first_column + tl.arange(0, BLOCK_N)
        channel = first_channel + column
        valid = column < out_channels
        offset = row[:, None] * K + channel[None, :]
        mask = in_rows[:, None] & valid[None, :]
        total = acc + tl.load(bias + channel, valid, other=0)[None, :]
        if shortcut_scale is not None:
            if projected is not None:
                added = projected + tl.load(projected_offset + channel, valid, other=0)[None, :]
            else:
                place = offset
                present = mask
                if residual_row is not None:
                    place = residual_row[:, None] + channel[None, :]
                    present = mask & (channel < residual_channels)[None, :]
                added = tl.load(residual + place, present, other=0)
            scale = tl.load(shortcut_scale + channel, valid, other=0.0)[None, :]
            total += _rounded(added.to(tl.float32) * scale).to(tl.int32)
        value = total.to(tl.float32) * tl.load(multiplier + channel, valid, other=0.0)[None, :]
        low = 0.0 if RELU else -128.0
        high = 255.0 if RELU else 127.0
        value = _rounded(tl.minimum(tl.maximum(value, low), high))
        tl.store(out + offset, value.to(tl.int32).to(out.dtype.element_ty), mask)


@triton.jit
def quantized_conv_kernel(
    x,
    weight,
    bias,
    multiplier,
    padding_value,
    shortcut,
    shortcut_scale,
    projection,
    projection_offset,
    out,
    gemm,
    image,
    result,
    shortcut_image,
    shortcut_strides,
    RELU: tl.constexpr,
    WINDOW: tl.constexpr,
    PROJECTION_WINDOW: tl.constexpr,
    EVEN: tl.constexpr,
    SHORTCUT_EVEN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (tiles of rows × columns, packs), as in `convolution.conv_bn_kernel`. bias and
    projection_offset hold what `convolve` leaves to add. shortcut_image and shortcut_strides are
    None where there is no shortcut, and where it is laid out like the result."""
    row, first_column = tile_index(gemm.rows, gemm.columns, TILE.m, TILE.n, TILE.is_wide)
    pack = tl.program_id(1)
    column = first_column + tl.arange(0, TILE.n)
    column = pack * gemm.columns + tl.where(column < gemm.columns, column, 0)
    safe_row = tl.where(row < gemm.rows, row, 0)
    acc = convolve(
        x,
        weight,
        safe_row,
        column,
        pack * gemm.channels,
        image,
        result,
        gemm.channels,
        EVEN,
        WINDOW,
        TILE,
        padding_value,
    )
    projected = None
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
    elif shortcut_strides is not None:
        residual_row = strided_rows(row, result.h, result.w, shortcut_strides)
        residual_channels = shortcut_image.c
    _finish(
        acc,
        bias,
        multiplier,
        projected,
        projection_offset,
        shortcut_scale,
        shortcut,
        residual_row,
        residual_channels,
        out,
        row,
        row < gemm.rows,
        first_column,
        pack * gemm.columns,
        gemm.columns,
        result.c,
        RELU,
        TILE.m,
        TILE.n,
    )


@triton.jit
def max_pool_kernel(
    x,
    out,
    positions,
    image,
    pooled,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of positions, blocks of channels). Of a uint8 map, in which no value is below
    the border's zero."""
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    if WIDE:
        position = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = (position < positions)[:, None] & (channel < image.c)[None, :]
    n, p, q = split_position(position, pooled.h, pooled.w)
    best = tl.zeros((BLOCK_P, BLOCK_C), tl.uint8)
    for tap in tl.static_range(SIZE * SIZE):
        h = p * STRIDE - PADDING + tap // SIZE
        w = q * STRIDE - PADDING + tap % SIZE
        inside = (h >= 0) & (h < image.h) & (w >= 0) & (w < image.w)
        place = ((n * image.h + h) * image.w + w) * image.c
        value = tl.load(x + place[:, None] + channel[None, :], inside[:, None] & valid, other=0)
        best = tl.maximum(best, value)
    tl.store(out + position[:, None] * image.c + channel[None, :], best, valid)


# What `convolve` takes off each input, by the weight; of frozen weights, so versions tell.
_OFFSETS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _offset(weight: Tensor, like: Tensor, bias: Tensor | None) -> Tensor:
    """(K,) int32: `bias`, and what is missing from sums of products with inputs like `like`."""
    key = (like.dtype, recording.version(weight), bias is not None and id(bias))
    if bias is not None:
        key += (recording.version(bias),)
    held = _OFFSETS.get(weight)
    if held is None or held[0] != key:
        lost = 128 if like.dtype == torch.uint8 else 0
        offset = lost * weight.sum((1, 2, 3), dtype=torch.int32)
        # The bias is held, so that its id stays its own.
        held = _OFFSETS[weight] = (key, offset if bias is None else bias + offset, bias)
    found: Tensor = held[1]
    return found


def list_quantized_conv(
    x: Tensor, conv: Convolution, shortcut: Tensor | None, projection: Convolution | None
) -> Candidates:
    """Candidates of op `quantized_conv`; none of fp8."""
    if conv.weight.dtype != torch.int8:
        return ()
    if projection is not None and (
        conv.groups > 1 or projection.groups > 1 or tuple(projection.padding) != (0, 0)
    ):
        return ()
    packed, gemm = packing(x, conv)
    taps = conv.weight[0, 0].numel()
    accumulators = 1 if projection is None else 2
    configs = configurations(gemm, x, "ieee", taps, conv.groups // packed, accumulators)
    return launching.candidates(quantized_conv, configs, "triton quantized_conv")


@planned
def _plan(
    config: Config,
    x: Tensor,
    conv: Convolution,
    shortcut: Tensor | None,
    projection: Convolution | None,
    relu: bool,
) -> Launch:
    packed, gemm = packing(x, conv)
    shape = result_shape(x, conv)
    out = x.new_empty(shape, device="meta").contiguous(memory_format=torch.channels_last)
    window = packed_window(conv, packed, gemm)
    if conv.groups == 1 and gemm.channels < _FEW_CHANNELS:
        window = window._replace(is_flat=True, is_pointwise=False)
    block_m, block_n, block_c = config.blocks
    if window.is_flat:
        block_c = 32
    tiles = triton.cdiv(gemm.rows, block_m) * triton.cdiv(gemm.columns, block_n)
    is_added = shortcut is not None and projection is None
    tensors = (x, conv.weight, out, shortcut)
    return Launch(
        quantized_conv_kernel,
        (tiles, conv.groups // packed),
        config,
        x.device,
        fuses=False,
        gemm=gemm,
        image=Image.of(x),
        result=Image.of(out),
        shortcut_image=None if shortcut is None else Image.of(shortcut),
        shortcut_strides=strides_beside(shortcut, out) if is_added else None,
        RELU=relu,
        WINDOW=window,
        PROJECTION_WINDOW=None if projection is None else Window.of(projection),
        EVEN=gemm.channels % block_c == 0,
        SHORTCUT_EVEN=shortcut is not None and shortcut.shape[1] % block_c == 0,
        TILE=Tile(block_m, block_n, block_c, is_wide(*tensors), "ieee"),
    )


def quantized_conv(
    config: Config,
    x: Tensor,
    conv: Convolution,
    bias: Tensor,
    multiplier: Tensor,
    shortcut: Tensor | None,
    shortcut_scale: Tensor | None,
    projection: Convolution | None,
    padding_value: Tensor | None,
    relu: bool,
) -> Tensor:
    """One convolution with what follows it: see `resnet_fused.reference.quantized`."""
    x, offset = nhwc(x), _offset(conv.weight, x, bias)
    conv = dense_convolution(conv, torch.int8)
    projected_offset = weight = None
    if projection is not None:
        assert shortcut is not None
        shortcut = nhwc(shortcut)
        projected_offset = _offset(projection.weight, shortcut, None)
        projection = dense_convolution(projection, torch.int8)
        weight = projection.weight
    shortcut = readable(shortcut)
    out = torch.empty(
        result_shape(x, conv),
        dtype=torch.uint8 if relu else torch.int8,
        device=x.device,
        memory_format=torch.channels_last,
    )
    vectors = (multiplier, padding_value)
    added = (shortcut, shortcut_scale, weight, projected_offset)
    _plan(config, x, conv, shortcut, projection, relu)(x, conv.weight, offset, *vectors, *added, out)
    return out


def list_quantized_stem(x: Tensor, conv: Convolution, pool: MaxPool) -> Candidates:
    """Candidates of op `quantized_stem`; none of fp8."""
    if conv.weight.dtype != torch.int8:
        return ()
    packed, gemm = packing(x, conv)
    taps = conv.weight[0, 0].numel()
    configs = configurations(gemm, x, "ieee", taps, conv.groups // packed)
    return launching.candidates(quantized_stem, configs, "triton quantized_stem")


_POOL = Config((32, 64), 4, 1)


@planned
def _plan_pool(x: Tensor, pool: MaxPool) -> Launch:
    image = Image.of(x)
    pooled = Image(*pool.output_size(image.h, image.w), image.c)
    positions = x.shape[0] * pooled.h * pooled.w
    block_p, block_c = _POOL.blocks
    return Launch(
        max_pool_kernel,
        (triton.cdiv(positions, block_p), triton.cdiv(image.c, block_c)),
        _POOL,
        x.device,
        positions=positions,
        image=image,
        pooled=pooled,
        SIZE=pool.kernel,
        STRIDE=pool.stride,
        PADDING=pool.padding,
        WIDE=is_wide(x),
        BLOCK_P=block_p,
        BLOCK_C=block_c,
    )


def quantized_stem(
    config: Config,
    x: Tensor,
    conv: Convolution,
    bias: Tensor,
    multiplier: Tensor,
    padding_value: Tensor | None,
    pool: MaxPool,
) -> Tensor:
    """max_pool(relu(conv)): see `resnet_fused.reference.quantized`."""
    y = quantized_conv(config, x, conv, bias, multiplier, None, None, None, padding_value, True)
    shape = (*y.shape[:2], *pool.output_size(*y.shape[2:]))
    out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    _plan_pool(y, pool)(y, out)
    return out
