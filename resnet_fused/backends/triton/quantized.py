"""Quantised convolutions: relu?(conv(x) + bias (+ shortcut)), requantised; pooled, the stem.

Algorithm: the implicit GEMM of `convolution.py` with int32 accumulators on int8 tensor cores; of
e4m3 numbers, made float16 on their way from shared memory, with float32 ones on those of float16,
which every GPU has. A projected shortcut is a second accumulator of the same program. The epilogue
is that of `resnet_fused.reference.quantized`, bit for bit, hence no multiplication is fused with an
addition.
Images of few channels are first written with their border and 4 (8, …) channels a pixel, so that a
window row is one run of memory and the inner dimension of a step, filled up with zero weights.
Tiles: those of `convolution.py`, of int8 with 128 input channels a step.
Memory traffic: a byte an element of x, of the weights (from L2; of e4m3 two), of the shortcut and
of the result; of images also that of their copy, and the stem's result once more, on its way to the
pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ...parameters import Convolution, MaxPool, QuantizedLayer, QuantizedShortcut
from ...reference.quantized import FLOAT8, quantized_dtype
from .. import Candidates, recording
from . import launching
from .convolution import SLICE, configurations, halves, packed_window, packing, result_shape
from .launching import (
    Config,
    Image,
    Launch,
    Strides,
    Tile,
    Window,
    for_kernels,
    is_wide,
    made_of,
    nhwc,
    planned,
    readable,
    strides_beside,
)
from .primitives import (
    convolve,
    from_e4m3,
    is_inside,
    split_position,
    strided_rows,
    tile_index,
    to_byte,
    to_e4m3,
)

_FAMILY = "triton quantized"
_MOST_RUN = 64  # channels of a window row, if it is to be a step's inner dimension
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _rounded(value):
    """The nearest integer, halves to even, of float32 numbers within int32."""
    if _INTERPRETED:  # which has no functions of libdevice
        magnitude = tl.abs(value)
        nearest = (magnitude + 8388608.0) - 8388608.0
        nearest = tl.where(magnitude < 8388608.0, nearest, magnitude)
        return tl.where(value < 0, -nearest, nearest).to(tl.int32)
    else:
        return libdevice.float2int_rn(value)


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
    place,
    first_column,
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
                place,
                first_column + half * (BLOCK_N // 2),
                RELU,
                BLOCK_M,
                BLOCK_N // 2,
            )
    else:
        row, in_rows, first_channel, out_channels, filters = place
        column = first_column + tl.arange(0, BLOCK_N)
        channel = first_channel + column
        valid = column < out_channels
        offset = row[:, None] * filters + channel[None, :]
        mask = in_rows[:, None] & valid[None, :]
        exact: tl.constexpr = acc.dtype == tl.int32
        total = acc + tl.load(bias + channel, valid, other=0)[None, :]
        if shortcut_scale is not None:
            if projected is not None:
                added = projected
                if exact:
                    added += tl.load(projected_offset + channel, valid, other=0)[None, :]
            else:
                source = offset
                present = mask
                if residual_row is not None:
                    source = residual_row[:, None] + channel[None, :]
                    present = mask & (channel < residual_channels)[None, :]
                added = tl.load(residual + source, present, other=0.0)
                if not exact:
                    added = from_e4m3(added)
            scale = tl.load(shortcut_scale + channel, valid, other=0.0)[None, :]
            scaled = added.to(tl.float32) * scale
            if exact:
                total += _rounded(scaled)
            else:
                total += scaled
        value = total.to(tl.float32) * tl.load(multiplier + channel, valid, other=0.0)[None, :]
        if exact:
            quantized = to_byte(value, 0.0 if RELU else -128.0).to(out.dtype.element_ty)
        else:
            low: tl.constexpr = 0.0 if RELU else -448.0
            quantized = to_e4m3(value, low, out.dtype.element_ty == tl.uint8)
        tl.store(out + offset, quantized, mask)


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
    projection_offset hold what `convolve` leaves to add, the latter of int8 alone. shortcut_image
    and shortcut_strides are None where there is no shortcut, and where it is laid out like the
    result."""
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
        (row, row < gemm.rows, pack * gemm.columns, gemm.columns, result.c),
        first_column,
        RELU,
        TILE.m,
        TILE.n,
    )


@triton.jit
def border_kernel(
    x,
    padding_value,
    out,
    pixels,
    image,
    bordered,
    strides,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Grid: (blocks of pixels,). out: (N, `bordered`), dense, of CHANNELS: x inside it,
    padding_value around it."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if WIDE:
        pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n, p, q = split_position(pixel, bordered.h, bordered.w)
    channel = tl.arange(0, CHANNELS)
    h = p - PAD_H
    w = q - PAD_W
    inside = is_inside(h, image.h) & is_inside(w, image.w)
    valid = (channel < image.c)[None, :] & (pixel < pixels)[:, None]
    place = n * strides.n + h * strides.h + w * strides.w
    border = 0
    if padding_value is not None:
        border = tl.load(padding_value + channel, channel < image.c, other=0)[None, :]
    value = tl.load(
        x + place[:, None] + channel[None, :] * strides.c, inside[:, None] & valid, other=border
    )
    tl.store(out + pixel[:, None] * CHANNELS + channel[None, :], value, (pixel < pixels)[:, None])


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
    """Grid: (blocks of positions, blocks of channels). Of a map of uint8, or of e4m3 as int8, whose
    order is the same; no value is below the border's zero."""
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    if WIDE:
        position = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = (position < positions)[:, None] & (channel < image.c)[None, :]
    n, p, q = split_position(position, pooled.h, pooled.w)
    best = tl.zeros((BLOCK_P, BLOCK_C), x.dtype.element_ty)
    for tap in tl.static_range(SIZE * SIZE):
        h = p * STRIDE - PADDING + tap // SIZE
        w = q * STRIDE - PADDING + tap % SIZE
        inside = (h >= 0) & (h < image.h) & (w >= 0) & (w < image.w)
        place = ((n * image.h + h) * image.w + w) * image.c
        value = tl.load(x + place[:, None] + channel[None, :], inside[:, None] & valid, other=0)
        best = tl.maximum(best, value)
    tl.store(out + position[:, None] * image.c + channel[None, :], best, valid)


_BORDER = Config((512,), 4, 1)
_POOL = Config((16, 64), 4, 1)


def _prepared(
    conv: Convolution, like: Tensor, bias: Tensor | None = None, pixel: int = 0
) -> tuple[Tensor, Tensor | None]:
    """`conv`'s weight as the kernel reads it, dense, of window rows where an image has that many
    channels a pixel; and (K,): the bias, and what `convolve` leaves to add for inputs of the type
    of `like`, or None of e4m3 without a bias."""
    weight = conv.weight

    def make() -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if weight.dtype == FLOAT8:
            dense, offset = nhwc(weight.half()), bias
        else:
            dense, offset = nhwc(weight), weight.sum((1, 2, 3), dtype=torch.int32)
            offset = offset * 128 if like.dtype == torch.uint8 else torch.zeros_like(offset)
            offset = offset if bias is None else offset + bias
        if pixel:
            channels, _, s = weight.shape[1:]
            runs = F.pad(dense.permute(0, 2, 3, 1), (0, pixel - channels, 0, _run(conv) - s))
            dense = nhwc(runs.flatten(2)[..., None].permute(0, 2, 1, 3))
        # The bias is held, so that its id stays its own.
        return None if dense is weight else dense, offset, bias

    key: tuple[Any, ...] = (like.dtype, pixel)
    if bias is not None:
        key += (id(bias), *recording.identity(bias))
    dense, offset, _ = made_of(weight, key, make)
    return weight if dense is None else dense, offset


def _pixel(conv: Convolution) -> int:
    """Channels a pixel of the bordered copy of an image of few channels; 0 where there is none."""
    _, channels, _, s = conv.weight.shape
    pixel = triton.next_power_of_2(channels)
    fits = conv.groups == conv.dilation[1] == 1 < s and s * pixel <= _MOST_RUN
    return pixel if channels < 16 and fits else 0


def _run(conv: Convolution) -> int:
    """Pixels of a window row, with those that fill a step."""
    pixel = _pixel(conv)
    return max(32, triton.next_power_of_2(conv.weight.shape[3] * pixel)) // pixel


def _bordered(x: Tensor, conv: Convolution, padding_value: Tensor | None) -> Tensor:
    """The image with its border; its last window reads beyond it."""
    (pad_h, pad_w), (height, width) = conv.padding, x.shape[2:]
    beyond = _run(conv) - conv.weight.shape[3]
    shape = (x.shape[0], _pixel(conv), height + 2 * pad_h, width + 2 * pad_w + beyond)
    out = _empty(shape, x.dtype, x)
    border = None if padding_value is None else padding_value.view(torch.uint8)
    x, copy = x.view(torch.uint8), out.view(torch.uint8)
    _plan_border(x, border, copy, (pad_h, pad_w))(x, border, copy)
    return out


def _empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


@planned
def _plan_border(x: Tensor, border: Tensor | None, out: Tensor, padding: tuple[int, int]) -> Launch:
    pixels = out.shape[0] * out.shape[2] * out.shape[3]
    (block,) = _BORDER.blocks
    return Launch(
        border_kernel,
        (triton.cdiv(pixels, block),),
        _BORDER,
        x.device,
        pixels=pixels,
        image=Image.of(x),
        bordered=Image.of(out),
        strides=Strides(*x.stride()),
        PAD_H=padding[0],
        PAD_W=padding[1],
        WIDE=is_wide(x, out),
        BLOCK=block,
        CHANNELS=out.shape[1],
    )


def list_quantized_conv(x: Tensor, conv: Convolution, projection: Convolution | None) -> Candidates:
    """Candidates of op `quantized_conv`."""
    if projection is not None and (
        conv.groups > 1 or projection.groups > 1 or tuple(projection.padding) != (0, 0)
    ):
        return ()
    return _listed(quantized_conv, x, conv, 1 if projection is None else 2)


def _listed(run: Callable[..., Tensor], x: Tensor, conv: Convolution, sums: int = 1) -> Candidates:
    """`run` in each configuration for so many accumulators."""
    packed, gemm = packing(x, conv)
    taps = conv.weight[0, 0].numel()
    # Of e4m3 it is float16 that is multiplied.
    like = x.new_empty(0, dtype=torch.float16) if x.dtype == FLOAT8 else x
    configs = configurations(gemm, like, "ieee", taps, conv.groups // packed, sums, packed > 1)
    return launching.candidates(run, configs, _FAMILY)


@planned
def _plan(
    config: Config,
    shape: tuple[int, int, int, int],
    x: Tensor,
    conv: Convolution,
    shortcut: Tensor | None,
    projection: Convolution | None,
    relu: bool,
    vectors: Sequence[Tensor | None],
) -> Launch:
    """x: bordered where conv, whose weight has window rows for channels, has few of them. vectors:
    what else the caller gives to the kernel."""
    packed, gemm = packing(x, conv)
    out = x.new_empty(shape, device="meta").contiguous(memory_format=torch.channels_last)
    window = packed_window(conv, packed, gemm)
    block_m, block_n, block_c = config.blocks
    if gemm.channels > x.shape[1]:
        block_c = gemm.channels
    gemm = gemm._replace(rows=shape[0] * shape[2] * shape[3])
    is_added = shortcut is not None and projection is None
    return Launch(
        quantized_conv_kernel,
        (config.tiles(gemm.rows, gemm.columns), conv.groups // packed),
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
        TILE=Tile(block_m, block_n, block_c, is_wide(x, conv.weight, out, shortcut), "ieee"),
    )


def quantized_conv(
    config: Config,
    x: Tensor,
    layer: QuantizedLayer,
    shortcut: QuantizedShortcut | None,
    relu: bool,
) -> Tensor:
    """One convolution with what follows it: see `resnet_fused.reference.quantized`."""
    conv, bias, multiplier, padding_value = layer
    shape = result_shape(x, conv)
    pixel = _pixel(conv)
    weight, offset = _prepared(conv, x, bias, pixel)
    if pixel:
        x, padding_value = _bordered(x, conv, padding_value), None
        conv = conv._replace(padding=(0, 0))
    x, conv = nhwc(for_kernels(x)), conv._replace(weight=weight)
    added, scale, projection = shortcut or (None, None, None)
    side: tuple[Tensor | None, Tensor | None] = (None, None)
    if added is not None:
        if projection is not None:
            side = other, _ = _prepared(projection, added)
            projection = projection._replace(weight=other)
            added = nhwc(added)
        added = readable(for_kernels(added))
    if padding_value is not None:
        padding_value = for_kernels(padding_value)
    out = _empty(shape, quantized_dtype(layer, relu), x)
    vectors = (offset, multiplier, padding_value, scale)
    plan = _plan(config, shape, x, conv, added, projection, relu, vectors)
    plan(x, conv.weight, offset, multiplier, padding_value, added, scale, *side, for_kernels(out))
    return out


def list_quantized_stem(x: Tensor, conv: Convolution) -> Candidates:
    """Candidates of op `quantized_stem`."""
    return _listed(quantized_stem, x, conv)


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


def quantized_stem(config: Config, x: Tensor, layer: QuantizedLayer, pool: MaxPool) -> Tensor:
    """max_pool(relu(conv)): see `resnet_fused.reference.quantized`."""
    y = quantized_conv(config, x, layer, None, True)
    out = _empty((*y.shape[:2], *pool.output_size(*y.shape[2:])), y.dtype, y)
    # As int8 no e4m3 number, a negative zero either, is above the border by its sign.
    read, written = (t.view(torch.int8) if t.dtype == FLOAT8 else t for t in (y, out))
    _plan_pool(read, pool)(read, written)
    return out
