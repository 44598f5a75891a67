"""Logits of quantised activations: linear(sum over pixels), exact to the last bit.

Algorithm: a first kernel sums each channel's pixels as integers (of e4m3 numbers, in units of their
smallest, 2**-9) and writes the sum as signed digits to the base of 128, a plane of bytes each. A
second one multiplies digits with weights, which are one digit or, of e4m3, three, on int8 tensor
cores: every pair of digits is a product of its own in int32, and their sum, shifted, is int64. So
one rounding to float32 gives the reference's bits, which float64 would too, at a fraction of the
rate and on few GPUs.
Tiles: 16 positions × 128 channels; 16 to 64 images × 64 classes, 128 channels a step.
Memory traffic: x from DRAM once; digits and weights, a few MiB, from L2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference.quantized import FLOAT8
from .. import Candidates
from . import launching
from .launching import Config, Launch, for_kernels, is_wide, made_of, nhwc, planned
from .primitives import from_e4m3, tile_index

_DIGIT = tl.constexpr(7)  # bits
_LARGEST = {torch.uint8: 255, torch.int8: 128, FLOAT8: 448 * 512}
_SMALLEST = 2.0**-9  # e4m3 numbers are multiples of it
_MOST_CHANNELS = 2**16  # of products of digits in int32


@triton.jit
def pixel_sums_kernel(
    x,
    digits,
    poison,
    images,
    positions,
    C,
    FLOAT8: tl.constexpr,
    DIGITS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (images × blocks of channels,). x: (images, positions, C); digits: (DIGITS, images, C),
    the least one first. poison, of e4m3: (images, blocks of channels) float32, 0 or NaN, which
    digits cannot express."""
    blocks = tl.cdiv(C, BLOCK_C)
    image = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    position = tl.arange(0, BLOCK_P)
    in_channels = channel < C
    first_of_image = image
    if WIDE:
        first_of_image = image.to(tl.int64)
    tile = x + first_of_image * positions * C + position[:, None] * C + channel[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.int32)
    unreal = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, positions, BLOCK_P):
        in_map = position < positions - first
        values = tl.load(tile + first * C, in_map[:, None] & in_channels[None, :], other=0.0)
        if FLOAT8:
            number = from_e4m3(values).to(tl.float32) * 512.0
            unreal += number - number
            total += tl.where(number == number, number, 0.0).to(tl.int32)
        else:
            total += values.to(tl.int32)
    rest = tl.sum(total, 0)
    place = digits + first_of_image * C + channel
    for digit in tl.static_range(DIGITS):
        value = rest
        if digit < DIGITS - 1:
            value = rest & (2**_DIGIT - 1)
        tl.store(place, value.to(tl.int8), in_channels)
        rest = rest >> _DIGIT
        place += images * C
    if FLOAT8:
        tl.store(poison + image * blocks + block, tl.sum(tl.sum(unreal, 0), 0))


@triton.jit
def quantized_head_kernel(
    digits,
    weight,
    bias,
    multiplier,
    poison,
    out,
    batch,
    C,
    classes,
    positions,
    poisons,
    UNIT: tl.constexpr,
    DIGITS: tl.constexpr,
    WEIGHT_DIGITS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of batch × classes,). weight: (WEIGHT_DIGITS, classes, C). UNIT: what an integer
    of the sums stands for. poisons: of an image, in `poison`."""
    row, column = tile_index(batch, classes, BLOCK_M, BLOCK_N, WIDE)
    column += tl.arange(0, BLOCK_N)
    safe_row = tl.where(row < batch, row, 0)
    valid = column < classes
    safe_column = tl.where(valid, column, 0)
    inner = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int64)
    for pair in range(DIGITS * WEIGHT_DIGITS):
        digit = pair // WEIGHT_DIGITS
        weight_digit = pair % WEIGHT_DIGITS
        a_tile = digits + (digit * batch + safe_row[:, None]) * C + inner[None, :]
        b_tile = weight + (weight_digit * classes + safe_column[None, :]) * C + inner[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for c in range(0, C, BLOCK_C):
            in_channels = inner < C - c
            a = tl.load(a_tile + c, in_channels[None, :], other=0)
            b = tl.load(b_tile + c, in_channels[:, None], other=0)
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        total += acc.to(tl.int64) << (_DIGIT * (digit + weight_digit))
    factor = tl.load(multiplier + column, valid, other=0.0)
    factor = tl.div_rn(factor, tl.zeros_like(factor) + positions)
    logits = total.to(tl.float32) * UNIT * factor[None, :]
    logits += tl.load(bias + column, valid, other=0.0)[None, :]
    if poison is not None:
        unreal = tl.zeros((BLOCK_M,), tl.float32)
        for i in range(poisons):
            unreal += tl.load(poison + safe_row * poisons + i)
        logits += unreal[:, None]
    place = out + row[:, None] * classes + column[None, :]
    tl.store(place, logits, (row < batch)[:, None] & valid[None, :])


_SUMS = Config((16, 128), 4, 1)


def _digits_of(largest: int) -> int:
    """How many hold integers up to `largest` and their negatives."""
    return math.ceil(largest.bit_length() / _DIGIT.value)


def list_quantized_head(x: Tensor, weight: Tensor) -> Candidates:
    """Candidates of op `quantized_head`: those with a tile for each SM, the largest first; then
    smaller ones. None where a sum might exceed int32."""
    batch, channels, height, width = x.shape
    if channels > _MOST_CHANNELS or _LARGEST[x.dtype] * height * width >= 2**31:
        return ()
    options = [Config((m, 64, 128), 4, 3) for m in (64, 32, 16)]
    if launching.machine(x.device).interpreted:
        options = options[1:2]
    configs = launching.filling_first(options, x.device, batch, len(weight))
    return launching.candidates(quantized_head, configs, "triton quantized")


@planned
def _plan_sums(x: Tensor) -> tuple[int, int, Launch]:
    """Digits of a sum, blocks of channels, and the launch."""
    batch, channels, height, width = x.shape
    digits = _digits_of(_LARGEST[x.dtype] * height * width)
    block_p, block_c = _SUMS.blocks
    blocks = triton.cdiv(channels, block_c)
    planes = x.new_empty((digits, batch, channels), device="meta")
    launch = Launch(
        pixel_sums_kernel,
        (batch * blocks,),
        _SUMS,
        x.device,
        images=batch,
        positions=height * width,
        C=channels,
        FLOAT8=x.dtype == FLOAT8,
        DIGITS=digits,
        WIDE=is_wide(x, planes),
        BLOCK_P=block_p,
        BLOCK_C=block_c,
    )
    return digits, blocks, launch


def _pixel_sums(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The digits of x (N, C, H, W) summed over its pixels, (digits, N, C), and of e4m3 `poison`."""
    count, blocks, launch = _plan_sums(x)
    digits = torch.empty((count, *x.shape[:2]), dtype=torch.int8, device=x.device)
    poison = torch.empty((len(x), blocks), device=x.device) if x.dtype == FLOAT8 else None
    launch(nhwc(for_kernels(x)), digits, poison)
    return digits, poison


@planned
def _plan(
    config: Config,
    positions: int,
    digits: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    poison: Tensor | None,
) -> Launch:
    """Of the tensors that the kernel takes, all of whose kinds it is compiled for."""
    _, batch, channels = digits.shape
    classes = weight.shape[1]
    block_m, block_n, block_c = config.blocks
    return Launch(
        quantized_head_kernel,
        (config.tiles(batch, classes),),
        config,
        digits.device,
        fuses=False,
        batch=batch,
        C=channels,
        classes=classes,
        positions=positions,
        poisons=0 if poison is None else poison.shape[1],
        UNIT=1.0 if poison is None else _SMALLEST**2,
        DIGITS=len(digits),
        WEIGHT_DIGITS=len(weight),
        WIDE=is_wide(digits, digits.new_empty((batch, classes), device="meta")),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
    )


def quantized_head(
    config: Config, x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor
) -> Tensor:
    """Logits of quantised activations: see `resnet_fused.reference.quantized`."""
    digits, poison = _pixel_sums(x)
    if weight.dtype == FLOAT8:  # its digits are the sums of images of one pixel
        factors = made_of(weight, (), lambda: _pixel_sums(weight[:, :, None, None])[0])
    else:
        factors = weight.contiguous()[None]
    out = torch.empty((len(x), len(weight)), device=x.device)
    tensors = (digits, factors, bias, multiplier, poison)
    _plan(config, x.shape[2] * x.shape[3], *tensors)(*tensors, out)
    return out
