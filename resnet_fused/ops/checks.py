"""Argument checks and shape rules that the ops share. Each raises before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..parameters import (
    BatchNorm,
    ConvBn,
    Convolution,
    GroupNorm,
    MaxPool,
    Normalization,
    QuantizedLayer,
)


def check_is_tensor(x: object) -> None:
    """The op's main input must be a tensor."""
    if not isinstance(x, Tensor):
        kind = type(x)
        raise TypeError(
            "input must be a torch.Tensor of shape (N, C, H, W), found "
            f"{kind.__module__}.{kind.__qualname__}; convert it, for example with torch.as_tensor."
        )


def check_is_module(model: object) -> None:
    """What functions of a model take."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, found {type(model).__qualname__}.")


def check_activation(name: str, x: Tensor) -> None:
    """`x` must be a floating (N, C, H, W) tensor."""
    if x.dim() != 4:
        raise ValueError(
            f"{name} must be 4-dimensional (N, C, H, W), found shape {tuple(x.shape)}"
            + ("; add a batch dimension with x.unsqueeze(0)." if x.dim() == 3 else ".")
        )
    if not x.dtype.is_floating_point:
        raise TypeError(
            f"{name} must be floating point, found {x.dtype}; convert it, or set "
            "`model.normalization`, with which a network of this package takes image bytes."
        )


def check_images(images: Tensor, normalization: Normalization) -> None:
    """`images` must be bytes (N, C, H, W), and `normalization` for as many channels."""
    if images.dim() != 4 or images.dtype != torch.uint8:
        raise TypeError(
            "images must be a uint8 tensor of shape (N, C, H, W), found "
            f"{images.dtype} of shape {tuple(images.shape)}; stem takes floating images."
        )
    for name, values in zip(Normalization._fields, normalization, strict=True):
        if len(values) != images.shape[1] or (name == "std" and min(values) <= 0):
            raise ValueError(
                f"normalization.{name} must hold a {'positive ' * (name == 'std')}number for each "
                f"of the {images.shape[1]} channels, found {tuple(values)}."
            )


def check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    """`tensor` must share the dtype and device of the op's main input `x`."""
    if tensor.device != x.device:
        raise ValueError(
            f"{name} is on {tensor.device} and the input on {x.device}; move one of them."
        )
    if tensor.dtype != x.dtype:
        raise TypeError(
            f"{name} is {tensor.dtype} and the input {x.dtype}; "
            "convert one of them (model.to(dtype) or x.to(dtype)) or use torch.autocast."
        )


def check_residual(
    residual: Tensor | None, shape: tuple[int, ...], x: Tensor, narrow: bool = False
) -> None:
    """`residual` must be shaped (`narrow`: or have fewer channels), typed and placed like the
    result."""
    if residual is None:
        return
    check_like("residual", residual, x)
    found = tuple(residual.shape)
    if narrow and len(found) == 4 and 0 < found[1] <= shape[1]:
        found = (found[0], shape[1], *found[2:])
    if found != tuple(shape):
        raise ValueError(
            f"residual must have shape {tuple(shape)}"
            f"{' or fewer channels' if narrow else ''}, found {tuple(residual.shape)}."
        )


def check_batch_norm(name: str, bn: BatchNorm, channels: int, x: Tensor) -> None:
    """Every vector of `bn` must be floating, of length `channels`, on the input's device."""
    for field, vector in zip(BatchNorm._fields, bn[:4], strict=False):
        _check_parameter(f"{name}.{field}", vector, channels, x)


def check_group_norm(norm: GroupNorm, x: Tensor) -> None:
    """The groups must divide the input's channels; weight and bias are as in batch norm."""
    channels = x.shape[1]
    if norm.groups < 1 or channels % norm.groups:
        raise ValueError(
            f"num_groups={norm.groups} must divide the {channels} channels of the input."
        )
    if x.numel() == norm.groups:  # which PyTorch refuses too
        raise ValueError(
            f"input of shape {tuple(x.shape)} has one value in each of the {norm.groups} groups, "
            "which has no variance; use fewer groups."
        )
    _check_parameter("weight", norm.weight, channels, x)
    _check_parameter("bias", norm.bias, channels, x)


def _check_parameter(name: str, vector: Tensor | None, channels: int, x: Tensor) -> None:
    if vector is None:
        return
    if vector.device != x.device:
        raise ValueError(
            f"{name} is on {vector.device} and the input on {x.device}; move one of them."
        )
    if not vector.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, found {vector.dtype}.")
    if tuple(vector.shape) != (channels,):
        raise ValueError(f"{name} must have shape ({channels},), found {tuple(vector.shape)}.")


def convolution_shape(
    name: str, x: Tensor, conv: Convolution, shape: tuple[int, ...] | None = None
) -> tuple[int, int, int, int]:
    """Checks the convolution `name` of `x` and returns its (N, K, P, Q).

    shape: of what it is applied to, where that is not x itself but computed from it.
    """
    if shape is None:
        check_activation(name if name == "projection" else "input", x)
        shape = x.shape
    weight = conv.weight
    check_like(f"{name}.weight", weight, x)
    return window_shape(name, shape, conv)


def window_shape(name: str, shape: Sequence[int], conv: Convolution) -> tuple[int, int, int, int]:
    """Checks the geometry of the convolution `name` of a tensor of that shape (N, C, H, W)."""
    weight = conv.weight
    if weight.dim() != 4:
        raise ValueError(
            f"{name}.weight must be 4-dimensional (K, C/groups, R, S), "
            f"found shape {tuple(weight.shape)}."
        )
    for field in ("stride", "dilation"):
        if min(getattr(conv, field)) < 1:
            raise ValueError(f"{name}.{field} must be positive, found {getattr(conv, field)}.")
    if min(conv.padding) < 0:
        raise ValueError(f"{name}.padding must not be negative, found {conv.padding}.")
    if conv.groups < 1 or weight.shape[0] % conv.groups:
        raise ValueError(
            f"{name}.groups={conv.groups} must divide the {weight.shape[0]} output channels."
        )
    if shape[1] != weight.shape[1] * conv.groups:
        raise ValueError(
            f"input has {shape[1]} channels, but {name}.weight of shape "
            f"{tuple(weight.shape)} with groups={conv.groups} expects "
            f"{weight.shape[1] * conv.groups}."
        )
    height, width = conv.output_size(*shape[2:])
    if height < 1 or width < 1:
        raise ValueError(
            f"input of {shape[2]}×{shape[3]} is smaller than the window of {name} "
            f"({weight.shape[2]}×{weight.shape[3]}, dilation {tuple(conv.dilation)}, "
            f"padding {tuple(conv.padding)})."
        )
    return shape[0], weight.shape[0], height, width


def conv_bn_shape(
    name: str, x: Tensor, layer: ConvBn, shape: tuple[int, ...] | None = None
) -> tuple[int, int, int, int]:
    """`convolution_shape` of the layer `name`, whose normalisation is checked too."""
    result = convolution_shape(name, x, layer.conv, shape)
    check_batch_norm(f"{name}.bn", layer.bn, result[1], x)
    return result


def pool_shape(shape: tuple[int, int, int, int], pool: MaxPool) -> tuple[int, int, int, int]:
    """The shape after `pool`; ValueError where PyTorch's max pooling would refuse it."""
    if pool.kernel < 1 or pool.stride < 1 or not 0 <= 2 * pool.padding <= pool.kernel:
        raise ValueError(
            f"{pool} is not a pooling window: kernel and stride must be positive "
            "and padding at most half the kernel."
        )
    batch, channels = shape[:2]
    height, width = pool.output_size(*shape[2:])
    if height < 1 or width < 1:
        raise ValueError(f"a map of {shape[2]}×{shape[3]} is smaller than the window of {pool}.")
    return batch, channels, height, width


def head_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """Checks average pool + fully connected and returns (N, classes)."""
    check_activation("input", x)
    if 0 in x.shape[2:]:
        raise ValueError(f"input must have at least one pixel, found shape {tuple(x.shape)}.")
    check_like("weight", weight, x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must have shape (classes, {x.shape[1]}), found {tuple(weight.shape)}."
        )
    if bias is not None:
        check_like("bias", bias, x)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"bias must have shape ({weight.shape[0]},), found {tuple(bias.shape)}."
            )
    return x.shape[0], weight.shape[0]


_QUANTIZED = {
    torch.int8: (torch.uint8, torch.int8),
    torch.float8_e4m3fn: (torch.float8_e4m3fn,),
}


def check_quantized(name: str, x: Tensor, weight: Tensor) -> None:
    """`x` must be a quantised (N, C, H, W) tensor that goes with `weight`."""
    if weight.dtype not in _QUANTIZED:
        raise TypeError(f"weight must be int8 or float8_e4m3fn, found {weight.dtype}.")
    if x.dtype not in _QUANTIZED[weight.dtype]:
        allowed = " or ".join(str(dtype)[6:] for dtype in _QUANTIZED[weight.dtype])
        raise TypeError(
            f"{name} must be {allowed} where weights are {str(weight.dtype)[6:]}, found {x.dtype}."
        )
    if x.dim() != 4:
        raise ValueError(
            f"{name} must be 4-dimensional (N, C, H, W), found shape {tuple(x.shape)}."
        )
    if x.device != weight.device:
        raise ValueError(f"{name} is on {x.device} and weight on {weight.device}; move one.")


def check_vector(name: str, vector: Tensor, length: int, dtype: torch.dtype, x: Tensor) -> None:
    """`vector` must be contiguous, (length,), of that dtype and on x's device."""
    if vector.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype)[6:]}, found {vector.dtype}.")
    if tuple(vector.shape) != (length,):
        raise ValueError(f"{name} must have shape ({length},), found {tuple(vector.shape)}.")
    if not vector.is_contiguous() or vector.device != x.device:
        raise ValueError(f"{name} must be contiguous and on {x.device}, found {vector.device}.")


def quantized_layer_shape(x: Tensor, layer: QuantizedLayer) -> tuple[int, int, int, int]:
    """Checks a quantised convolution and what follows it, and returns its (N, K, P, Q)."""
    conv, bias, multiplier, padding_value = layer
    check_quantized("input", x, conv.weight)
    shape = window_shape("conv", x.shape, conv)
    exact = conv.weight.dtype == torch.int8
    check_vector("bias", bias, shape[1], torch.int32 if exact else torch.float32, x)
    check_vector("multiplier", multiplier, shape[1], torch.float32, x)
    if padding_value is not None:
        check_vector("padding_value", padding_value, x.shape[1], x.dtype, x)
    return shape
