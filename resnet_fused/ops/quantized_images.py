"""Images as a quantised network's first layer takes them, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..parameters import ImageQuantization
from ..reference import quantized as reference
from ..reference.quantized import FLOAT8
from .checks import check_vector
from .dispatch import chosen_backend
from .registry import Op


def _output_shape(x: Tensor, quantization: ImageQuantization, float8: bool) -> tuple[int, ...]:
    if x.dim() != 4 or not (x.is_floating_point() or x.dtype == torch.uint8):
        raise TypeError(
            "input must be a uint8 or floating point tensor of shape (N, C, H, W), found "
            f"{x.dtype} of shape {tuple(x.shape)}."
        )
    if (x.dtype == torch.uint8) != (quantization.mean is not None):
        raise ValueError("mean and std go with images of bytes, and only with those.")
    for name, vector in zip(quantization._fields, quantization, strict=True):
        if vector is not None:
            check_vector(name, vector, x.shape[1], torch.float32, x)
    return tuple(x.shape)


_op = Op(
    reference.quantized_images,
    _output_shape,
    lambda backend: backend.quantized_images,
    result_dtype=lambda x, quantization, float8: FLOAT8 if float8 else torch.uint8,
    keeps_layout=True,
)


def quantized_images(
    x: Tensor, quantization: ImageQuantization, dtype: torch.dtype = torch.uint8
) -> Tensor:
    """x / scale + zero, rounded and clamped, as `resnet_fused.reference.quantized` says.

    Args:
        x: (N, C, H, W), floating point, or uint8.
        quantization: scale and zero of the C channels, and of bytes, mean and std.
        dtype: of the result, uint8 or float8_e4m3fn.

    Returns (N, C, H, W), channels_last if x is and contiguous otherwise. Raises ValueError for
    shapes and devices that disagree, TypeError for dtypes.
    """
    if dtype not in (torch.uint8, FLOAT8):
        raise TypeError(f"dtype must be uint8 or float8_e4m3fn, found {dtype}.")
    arguments = (x, quantization, dtype == FLOAT8)
    if x.device.type == "cpu" and chosen_backend() is None:
        # PyTorch's ops are all there is, and take less time than an op's way to them.
        _output_shape(*arguments)
        return reference.quantized_images(*arguments)
    return _op(*arguments)
