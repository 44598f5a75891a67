"""What every quantised op means, in plain PyTorch and exactly: backends equal it bit for bit.

A layer takes and gives quantised activations, one scale a tensor, and sums products of quantised
numbers in the accumulator's scale, input scale × weight scale of the output channel k:

    acc[k] = Σ x · weight[k] + bias[k]
    acc[k] += rne(float32(shortcut) · shortcut_scale[k])       a shortcut, if there is one
    y[k]   = rne(float32(acc[k]) · multiplier[k])              clamped to the result's range

`rne` rounds to the nearest integer, halves to even; float32() rounds an integer to the nearest
float32, halves to even. Each product of float32 numbers is rounded once, and nothing is added to
one, so that no fused multiply-add could make a difference. `shortcut` is a tensor, the identity or
shortcut option A (fewer channels, nothing is added to those it lacks), or the sum Σ of a second
convolution, the projection, whose bias is part of `bias`.

- **int8.** x is uint8 or int8, weights are int8 (-127 to 127), bias int32. acc is an integer; what
  `resnet_fused.quantize` accepts keeps every partial sum within int32 (|sum| < 2³¹), in any order.
  y is uint8 (0 to 255) behind a ReLU, else int8 (-128 to 127).
- **float8_e4m3fn.** x, weights and y are e4m3, bias is float32. Products are exact, and so is their
  sum, which float64 holds; it is rounded to float32 once, and what is added to it after every
  addition; nothing is rounded to an integer. y is clamped to ±448 and rounded to e4m3 once. A
  kernel that accumulates in float32 may differ by the roundings of its sum; tensor cores that
  accumulate in less add up to 128 products at a time, and float32 the rest.

Pixels of the padding hold `padding_value` (one a channel), or zero. Shapes are logical NCHW,
results channels_last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parameters import (
    Convolution,
    ImageQuantization,
    MaxPool,
    QuantizedLayer,
    QuantizedShortcut,
)
from .convolution import convolve
from .ops import nhwc, pad_channels

FLOAT8 = torch.float8_e4m3fn
LIMITS = {torch.uint8: (0, 255), torch.int8: (-128, 127), FLOAT8: (-448, 448)}


def quantize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, float32 and in units of the scale, as numbers of `dtype`: rounded to nearest, clamped."""
    return quantize_(x.clone(), dtype)


def quantize_(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`quantize` in the memory of x, which it changes."""
    if not dtype.is_floating_point:
        x.round_()
    return x.clamp_(*LIMITS.get(dtype, LIMITS[FLOAT8])).to(dtype)


def quantized_images(x: Tensor, quantization: ImageQuantization, float8: bool) -> Tensor:
    """x (N, C, H, W) / scale + zero, as uint8 or e4m3; of bytes (x - mean) / std in place of x.
    Every step is rounded to float32, which floating images are made first. NaN stays one in e4m3;
    no byte stands for it, and it becomes 0, the least one.

    The result is channels_last where x is, else contiguous.
    """
    scale, zero, mean, std = quantization
    if mean is not None and std is not None:
        x = (x - of_image(mean)) / of_image(std)
    x = x.float()
    if rows := x.is_contiguous(memory_format=torch.channels_last):
        # PyTorch is several times faster where the last axis is a long one.
        width = x.shape[3]
        x = x.permute(0, 2, 3, 1).flatten(2)
        scale, zero = scale.repeat(width), zero.repeat(width)
    else:
        x, scale, zero = x.contiguous(), of_image(scale), of_image(zero)
    # In place from here on: fresh memory costs more than the arithmetic.
    x = quantize_((x / scale).add_(zero), FLOAT8 if float8 else torch.uint8)
    return x.unflatten(2, (width, -1)).permute(0, 3, 1, 2) if rows else x


def of_image(vector: Tensor) -> Tensor:
    """(C,) as images (N, C, H, W) take it."""
    return vector[:, None, None]


def quantized_dtype(layer: QuantizedLayer, relu: bool) -> torch.dtype:
    """That of a layer's result. Of e4m3 numbers given in float64 it is float64: not rounded, what
    a result in e4m3 is held against."""
    if layer.conv.weight.dtype.is_floating_point:
        return layer.conv.weight.dtype
    return torch.uint8 if relu else torch.int8


def accumulate(x: Tensor, conv: Convolution, padding_value: Tensor | None = None) -> Tensor:
    """Σ x · weight (N, K, P, Q): exact in float64, whatever the order, below 2⁵³."""
    x = x.double()
    if padding_value is not None:
        value = of_image(padding_value.double())
        (height, width), conv = conv.padding, conv._replace(padding=(0, 0))
        x = F.pad(x - value, (width, width, height, height)) + value
    return convolve(x, conv._replace(weight=conv.weight.double()))


def quantized_conv(
    x: Tensor, layer: QuantizedLayer, shortcut: QuantizedShortcut | None, relu: bool
) -> Tensor:
    """One convolution with what follows it; x (N, C, H, W), shortcut.x (N, D, P, Q) with D <= K, or
    (N, D, H', W') before its projection."""
    conv, bias, multiplier, padding_value = layer
    acc = accumulate(x, conv, padding_value)
    exact = not conv.weight.is_floating_point()
    # Of integers every sum below is exact; of e4m3 numbers each is rounded to float32.
    acc = (acc if exact else acc.float()) + of_image(bias)
    if shortcut is not None:
        added, scale, projection = shortcut
        if projection is not None:
            added = accumulate(added, projection)
        added = pad_channels(added.float(), len(bias)) * of_image(scale)
        acc = acc + (added.round() if exact else added)
    y = acc.float() * of_image(multiplier)
    return nhwc(quantize(F.relu(y) if relu else y, quantized_dtype(layer, relu)))


def quantized_stem(x: Tensor, layer: QuantizedLayer, pool: MaxPool) -> Tensor:
    """max_pool(relu(conv)): `quantized_conv` with a ReLU, and the largest of each window."""
    out = quantized_conv(x, layer, None, True)
    return nhwc(F.max_pool2d(out.float(), *pool).to(out.dtype))


def quantized_head(x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor) -> Tensor:
    """float32 logits (N, classes) of x (N, C, H, W), weight (classes, C):

        acc[k]   = Σ x · weight[k]      over channels and pixels, exact, of any size
        logit[k] = float32(acc[k]) · (multiplier[k] / float32(H · W)) + bias[k]

    with bias and multiplier (classes,) in float32; the quotient, the product and the sum are each
    rounded to float32. acc may not fit in int32.
    """
    acc = F.linear(x.double().sum((2, 3)), weight.double())
    pixels = torch.full_like(multiplier, x.shape[2] * x.shape[3])
    return acc.float() * (multiplier / pixels) + bias
