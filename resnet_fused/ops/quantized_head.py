"""linear(global_average_pool(x)) of quantised activations: the last layers of a ResNet."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import quantized as reference
from .checks import check_quantized, check_vector
from .registry import Op


def _output_shape(x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor) -> tuple[int, ...]:
    check_quantized("input", x, weight)
    if 0 in x.shape[2:]:
        raise ValueError(f"input must have at least one pixel, found shape {tuple(x.shape)}.")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must have shape (classes, {x.shape[1]}), found {tuple(weight.shape)}."
        )
    for name, vector in (("bias", bias), ("multiplier", multiplier)):
        check_vector(name, vector, weight.shape[0], torch.float32, x)
    return x.shape[0], weight.shape[0]


_op = Op(
    reference.quantized_head,
    _output_shape,
    lambda backend: backend.quantized_head,
    result_dtype=lambda *_: torch.float32,
)


def quantized_head(x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor) -> Tensor:
    """Logits of quantised activations, as `resnet_fused.reference.quantized` says.

    Args:
        x: (N, C, H, W), uint8 or int8, or float8_e4m3fn.
        weight: (classes, C), int8, or float8_e4m3fn as x is.
        bias: (classes,) float32.
        multiplier: (classes,) float32, input's scale × weight's scale.

    Returns (N, classes), contiguous, float32. Raises ValueError for shapes and devices that
    disagree, TypeError for dtypes.
    """
    return _op(x, weight, bias, multiplier)
