"""A quantised convolution with bias, shortcut, ReLU and requantisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..parameters import QuantizedLayer, QuantizedShortcut
from ..reference import quantized as reference
from .checks import check_quantized, check_vector, quantized_layer_shape, window_shape
from .registry import Op


def _output_shape(
    x: Tensor, layer: QuantizedLayer, shortcut: QuantizedShortcut | None, relu: bool
) -> tuple[int, ...]:
    shape = quantized_layer_shape(x, layer)
    if shortcut is None:
        return shape
    added, scale, projection = shortcut
    check_vector("shortcut.scale", scale, shape[1], torch.float32, x)
    check_quantized("shortcut", added, layer.conv.weight)
    found: tuple[int, ...] = tuple(added.shape)
    if projection is not None:
        check_quantized("shortcut", added, projection.weight)
        found = window_shape("projection", found, projection)
    narrow = projection is None and 0 < found[1] <= shape[1]
    if (found[0], shape[1] if narrow else found[1], *found[2:]) != shape:
        raise ValueError(
            f"the shortcut must have shape {shape}"
            f"{' or fewer channels' if projection is None else ' when projected'}, found {found}."
        )
    return shape


_op = Op(
    reference.quantized_conv,
    _output_shape,
    lambda backend: backend.quantized_conv,
    result_dtype=lambda x, layer, shortcut, relu: reference.quantized_dtype(layer, relu),
)


def quantized_conv(
    x: Tensor, layer: QuantizedLayer, shortcut: QuantizedShortcut | None = None, relu: bool = True
) -> Tensor:
    """relu?(conv(x) + bias (+ shortcut)), requantised, as `resnet_fused.reference.quantized` says.

    Args:
        x: (N, C, H, W), uint8 or int8, or float8_e4m3fn.
        layer: the convolution, and how its sums become the result's.
        shortcut: what is added to the sums.
        relu: whether to clamp at zero.

    Returns (N, K, P, Q), channels_last: uint8 with a ReLU, int8 without, or float8_e4m3fn. It has
    no gradient. Raises ValueError for shapes and devices that disagree, TypeError for dtypes.
    """
    return _op(x, layer, shortcut, relu)
