"""Quantised layers that every backend is tested with: fixed shapes, and random ones by number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..parameters import (
    Convolution,
    ImageQuantization,
    MaxPool,
    QuantizedLayer,
    QuantizedShortcut,
)
from ..reference.quantized import FLOAT8
from .cases import ConvCase, generator, rand, randint, randn

# What a layer adds: nothing, a tensor of its result's shape, shortcut option A's, a projection.
SHORTCUTS = ("none", "identity", "option A", "projection")


def make_integers(shape: Any, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Random numbers of the whole range of uint8 or int8 (of weights, -127 to 127), or normal ones
    in e4m3."""
    if dtype == FLOAT8:
        return randn(rng, *shape).to(dtype)
    low, high = (0, 256) if dtype == torch.uint8 else (-127, 128)
    return randint(rng, low, high, shape, dtype)


def make_quantized_conv(
    case: ConvCase,
    rng: torch.Generator,
    shortcut: str = "none",
    dtype: torch.dtype = torch.uint8,
    padding_value: bool = False,
    relu: bool = True,
    side_channels: int = 5,
) -> list[Any]:
    """The arguments of `reference.quantized.quantized_conv`, most of whose results are in range,
    some clamped at either end; dtype: of the input; side_channels: of what is projected."""
    weights = FLOAT8 if dtype == FLOAT8 else torch.int8
    channels = case.out_channels

    def conv_of(case: ConvCase) -> Convolution:
        shape = (case.out_channels, case.channels // case.groups, case.kernel, case.kernel)
        stride, padding, dilation = ((v, v) for v in (case.stride, case.padding, case.dilation))
        weight = make_integers(shape, weights, rng)
        return Convolution(weight, stride, padding, dilation, case.groups)

    def image(*shape: int) -> Tensor:
        made = make_integers(shape, dtype, rng)
        return made.view(torch.uint8).contiguous(memory_format=torch.channels_last).view(dtype)

    x, conv = image(*case[:4]), conv_of(case)
    # Of sums of so many products, the standard deviation.
    spread = conv.weight[0].numel() ** 0.5 * (1.0 if dtype == FLOAT8 else 128 * 74.0)
    bias = randn(rng, channels) * spread
    multiplier = (0.5 + rand(rng, channels)) * (2 if dtype == FLOAT8 else 80)
    added: QuantizedShortcut | None = None
    height, width = case.output_size
    if shortcut != "none":
        scale = (0.2 + rand(rng, channels)) * spread / 128
    if shortcut == "identity":
        added = QuantizedShortcut(image(*case.output_shape), scale)
    elif shortcut == "option A":
        narrow = max(1, channels // 2)
        whole = image(case.batch, narrow, 2 * height - 1, 2 * width - 1)
        added = QuantizedShortcut(whole[:, :, ::2, ::2], scale)
    elif shortcut == "projection":
        side = ConvCase(
            case.batch, side_channels, 2 * height - 1, 2 * width - 1, channels, stride=2
        )
        scale = scale / (12 * side_channels)
        added = QuantizedShortcut(image(*side[:4]), scale, conv_of(side))
    padded = make_integers((case.channels,), dtype, rng) if padding_value else None
    if dtype != FLOAT8:
        bias = bias.int()
    return [x, QuantizedLayer(conv, bias, multiplier / spread, padded), added, relu]


def make_quantized_images(
    shape: tuple[int, int, int, int],
    rng: torch.Generator,
    dtype: torch.dtype = torch.float32,
    float8: bool = False,
) -> list[Any]:
    """The arguments of `reference.quantized.quantized_images`, contiguous: of images of bytes or
    of that floating dtype, whose first and last element are clamped, and one of which is NaN where
    bytes are to come of them."""
    if dtype == torch.uint8:
        x = randint(rng, 0, 256, shape, dtype)
        normalization = tuple(20 + 80 * rand(rng, shape[1]) for _ in range(2))
    else:
        x, normalization = randn(rng, *shape).to(dtype), ()
        if not float8:
            x.view(-1)[x.numel() // 2] = torch.nan
        x.view(-1)[0], x.view(-1)[-1] = 1e4, -1e4
    scale = 0.01 + 0.01 * rand(rng, shape[1])
    zero = torch.zeros(shape[1]) if float8 else 100 + 30 * rand(rng, shape[1])
    return [x, ImageQuantization(scale, zero.round(), *normalization), float8]


def in_whole_numbers(arguments: list[Any]) -> list[Any]:
    """An e4m3 layer's operands rounded to integers, few of which are beyond 4, so that there is
    nothing to round in a kernel's sums: neither of 128 products to 14 bits nor, of two convolutions
    in either order, to float32."""
    x, layer, shortcut, relu = arguments

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.float().round().to(FLOAT8)

    def rounded_weight(conv: Convolution) -> Convolution:
        return conv._replace(weight=rounded(conv.weight))

    padding = None if layer.padding_value is None else rounded(layer.padding_value)
    layer = layer._replace(conv=rounded_weight(layer.conv), padding_value=padding)
    if shortcut is not None:
        shortcut = shortcut._replace(x=rounded(shortcut.x))
        if shortcut.projection is not None:
            layer = layer._replace(bias=layer.bias.round())
            shortcut = shortcut._replace(
                scale=shortcut.scale.log2().round().exp2(),
                projection=rounded_weight(shortcut.projection),
            )
    return [rounded(x), layer, shortcut, relu]


def make_quantized_stem(
    case: ConvCase, rng: torch.Generator, pool: MaxPool, **options: Any
) -> list[Any]:
    """The arguments of `reference.quantized.quantized_stem`; e4m3 ones in whole numbers."""
    arguments = make_quantized_conv(case, rng, **options)
    x, layer, *_ = in_whole_numbers(arguments) if arguments[0].dtype == FLOAT8 else arguments
    return [x, layer, pool]


def make_quantized_head(
    batch: int,
    channels: int,
    size: int,
    classes: int,
    rng: torch.Generator,
    dtype: torch.dtype = torch.uint8,
) -> list[Any]:
    """The arguments of `reference.quantized.quantized_head`."""
    x = make_integers((batch, channels, size, size + 1), dtype, rng).view(torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last).view(dtype)
    weight = make_integers((classes, channels), FLOAT8 if dtype == FLOAT8 else torch.int8, rng)
    multiplier = rand(rng, classes) * 1e-4
    return [x, weight, randn(rng, classes), multiplier]


def random_quantized_conv(seed: int) -> list[Any]:
    """A layer of a random kind and shape, small enough for an interpreter."""
    rng = generator(seed)

    def draw(*choices: Any) -> Any:
        return choices[int(randint(rng, 0, len(choices), ()))]

    def number(low: int, high: int) -> int:
        return int(randint(rng, low, high + 1, ()))

    groups = draw(1, 1, 1, 2, 4, 8)
    kernel, dilation = draw(1, 1, 3, 3, 5, 7), draw(1, 1, 2)
    case = ConvCase(
        number(1, 3),
        groups * number(1, 40 // groups),
        number(1, 12),
        number(1, 12),
        groups * number(1, 70 // groups),
        kernel,
        draw(1, 1, 2, 3),
        draw(0, kernel // 2 * dilation, number(0, 3)),
        dilation,
        groups,
    )
    if min(case.output_size) < 1:
        case = case._replace(height=case.height + 13, width=case.width + 13)
    return make_quantized_conv(
        case,
        rng,
        draw(*SHORTCUTS),
        draw(torch.uint8, torch.uint8, torch.uint8, torch.int8),
        draw(False, False, True),
        draw(True, True, True, False),
    )
