"""What kernels of the extension read, as they take it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, channels_last

from .._extension import TensorArg, optional_tensor_arg, tensor_arg
from ..parameters import MEAN, SCALE, SHIFT, BatchNorm, ConvBn, Convolution, QuantizedShortcut
from . import recording
from .recording import copied

BatchNormArg = tuple[TensorArg, TensorArg | None, TensorArg | None, TensorArg | None, float]


def nhwc(x: Tensor) -> Tensor:
    """`x` (N, C, H, W), or a copy of it, in channels_last memory."""
    return x.contiguous(memory_format=channels_last)


def empty_nhwc(
    x: Tensor, channels: int, height: int, width: int, dtype: torch.dtype | None = None
) -> Tensor:
    """An uninitialised result (N, channels, height, width) of x's batch, device and, if None is
    given, type."""
    shape = (x.shape[0], channels, height, width)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=channels_last)


def empty_signs(y: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialised signs of a result of that shape (`resnet_fused.backends.training`)."""
    batch, channels, *image = y
    shape = (batch, -(-channels // 64) * 8, *image)
    return torch.empty(shape, dtype=torch.uint8, device=like.device, memory_format=channels_last)


def dense_convolution(conv: Convolution, dtype: torch.dtype) -> Convolution:
    """`conv` with a channels_last weight of that dtype."""
    weight, stride, padding, dilation, groups = conv
    weight = recording.weights.get().get(id(weight), weight)
    return Convolution(nhwc(weight.to(dtype)), stride, padding, dilation, groups)


def readable(residual: Tensor | None) -> Tensor | None:
    """The residual itself, or its channels_last copy where its channels are no neighbours.

    Kernels read it with any other strides and add nothing beyond its last channel, so that shortcut
    option A's `x[:, :, ::2, ::2]` is never copied.
    """
    if residual is None or residual.shape[1] == 1 or residual.stride(1) == 1:
        return residual
    return nhwc(residual)


def residual_arg(residual: Tensor | None) -> TensorArg | None:
    return optional_tensor_arg(readable(residual))


def shortcut_args(
    shortcut: QuantizedShortcut | None, layer_arg: Callable[[Tensor, Convolution], Any]
) -> tuple[TensorArg | None, TensorArg | None, Any]:
    """Its scale, and what is added as it is, or by `layer_arg` what is projected."""
    if shortcut is None:
        return None, None, None
    x, scale, projection = shortcut
    if projection is None:
        return tensor_arg(scale), residual_arg(x), None
    return tensor_arg(scale), None, layer_arg(x, projection)


def batch_norm_arg(bn: BatchNorm, types: Collection[torch.dtype]) -> BatchNormArg:
    """`bn`, its vectors rounded to float32 where they are none of the `types` that kernels read."""
    mean, var, weight, bias = (
        v if v is None or v.dtype in types else copied(v, v.float()) for v in bn[:4]
    )
    assert mean is not None
    return (
        tensor_arg(mean),
        optional_tensor_arg(var),
        optional_tensor_arg(weight),
        optional_tensor_arg(bias),
        bn.eps,
    )


class _GivenScale(NamedTuple):
    """A normalisation (x - mean) · weight + bias, for kernels beside `BatchNorm`, whose scale
    depends on a variance too."""

    mean: Tensor
    var: None
    weight: Tensor
    bias: Tensor
    eps: float = 0.0


def given_scale(conv: Convolution, scale_shift: Tensor) -> ConvBn:
    """`conv` with a normalisation of training's (`resnet_fused.backends.training`), which kernels
    take as they take a `ConvBn`."""
    mean, scale, shift = scale_shift[MEAN], scale_shift[SCALE], scale_shift[SHIFT]
    return ConvBn(conv, _GivenScale(mean, None, scale, shift))  # type: ignore[arg-type]
