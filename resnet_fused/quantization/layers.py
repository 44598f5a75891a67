"""The layers of a quantised network: tensors to compute with, and no parameters.

All that a layer is stands in its state: tensors, and its geometry as one more of them, so that a
state dict alone can be made a network again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.conv_bn import conv_bn
from ..ops.conv_bn_projection import conv_bn_projection
from ..ops.head import head
from ..ops.quantized_conv import quantized_conv
from ..ops.quantized_head import quantized_head
from ..ops.quantized_images import quantized_images
from ..ops.quantized_stem import quantized_stem
from ..parameters import (
    BatchNorm,
    ConvBn,
    Convolution,
    ImageQuantization,
    MaxPool,
    QuantizedLayer,
    QuantizedShortcut,
)
from ..reference.ops import nhwc
from ..reference.quantized import FLOAT8, of_image, quantize

_Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]


class Geometry(NamedTuple):
    """A layer but for its tensors.

    conv: stride, padding, dilation and groups; projection: the same of its shortcut's, or None.
    stride: every so manieth pixel of the shortcut is added, where it is not projected; 0 if there
        is none.
    pool: max pooling of the result, or None.
    dtype: of the result, uint8 or float8_e4m3fn.
    """

    conv: _Window
    projection: _Window | None = None
    stride: int = 0
    pool: MaxPool | None = None
    dtype: torch.dtype = torch.uint8

    def takes_shortcut(self) -> bool:
        return self.stride > 0 or self.projection is not None

    def projecting(self, weight: Tensor | None) -> Convolution | None:
        """The shortcut's projection by that weight, if there is one."""
        if weight is None or self.projection is None:
            return None
        return Convolution(weight, *self.projection)

    def sampled(self, shortcut: Tensor | None) -> Tensor | None:
        """The pixels of an unprojected shortcut that are added, a view."""
        if shortcut is None or self.stride <= 1:
            return shortcut
        return shortcut[:, :, :: self.stride, :: self.stride]

    def tensors(self, shortcut_scale: str) -> tuple[str, ...]:
        """The names of a layer's tensors that only some geometries need."""
        projected = self.projection is not None
        return (shortcut_scale,) * self.takes_shortcut() + ("projection_weight",) * projected

    def encode(self) -> Tensor:
        windows = [_encode(self.conv), _encode(self.projection)]
        pool = self.pool or (0, 0, 0)
        return torch.tensor([*windows[0], *windows[1], self.stride, *pool, self.dtype == FLOAT8])

    @classmethod
    def decode(cls, state: Tensor) -> Geometry:
        numbers = state.tolist()
        conv, projection = (_decode(numbers[i : i + 7]) for i in (0, 7))
        assert conv is not None
        pool = MaxPool(*numbers[15:18]) if numbers[15] else None
        return cls(conv, projection, numbers[14], pool, FLOAT8 if numbers[18] else torch.uint8)


def _encode(window: _Window | None) -> list[int]:
    if window is None:
        return [0] * 7
    stride, padding, dilation, groups = window
    return [*stride, *padding, *dilation, groups]


def _decode(numbers: Sequence[int]) -> _Window | None:
    a, b, c, d, e, f, groups = numbers
    return ((a, b), (c, d), (e, f), groups) if groups else None


class Frozen(nn.Module):
    """A module whose state is the tensors `names`, those of `optional`, absent ones None, and
    `geometry`."""

    names: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tensors: Mapping[str, Tensor | None], geometry: Any = None) -> None:
        super().__init__()
        self.geometry = geometry
        for name in (*self.names, *self.optional):
            tensor = tensors.get(name) if name in self.optional else tensors[name]
            # A copy of its own: safetensors refuses tensors that share memory.
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())

    def _load_from_state_dict(self, *arguments: Any) -> None:
        # Inference tensors count no edits, by which what is packed of weights is known.
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_inference():
                with torch.inference_mode(False):
                    self._buffers[name] = buffer.clone()
        super()._load_from_state_dict(*arguments)

    def get_extra_state(self) -> Tensor:
        return self.geometry.encode()

    def set_extra_state(self, state: Tensor) -> None:
        self.geometry = type(self.geometry).decode(state)

    def needed(self) -> tuple[str, ...]:
        """Those of `optional` without which this part of a quantised network is wrong."""
        return ()


class QuantizedConv(Frozen):
    """A convolution, its batch norm folded into it, with shortcut and ReLU: one op.

    Tensors as `resnet_fused.ops.quantized_conv` takes them; scale: (1,), the result's.
    """

    made_of_ops = True
    names = ("weight", "bias", "multiplier", "scale")
    optional = ("shortcut_scale", "projection_weight", "padding_value")
    geometry: Geometry
    weight: Tensor
    bias: Tensor
    multiplier: Tensor
    scale: Tensor
    shortcut_scale: Tensor | None
    projection_weight: Tensor | None
    padding_value: Tensor | None

    def needed(self) -> tuple[str, ...]:
        return self.geometry.tensors("shortcut_scale")

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """x, quantised (N, C, H, W), and the block's input -> (N, K, P, Q), quantised."""
        conv = Convolution(self.weight, *self.geometry.conv)
        layer = QuantizedLayer(conv, self.bias, self.multiplier, self.padding_value)
        if self.geometry.pool is not None:
            return quantized_stem(x, layer, self.geometry.pool)
        shortcut = self.geometry.sampled(shortcut)
        if shortcut is None:
            return quantized_conv(x, layer)
        assert self.shortcut_scale is not None
        projection = self.geometry.projecting(self.projection_weight)
        return quantized_conv(
            x, layer, QuantizedShortcut(shortcut, self.shortcut_scale, projection)
        )

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {str(self.weight.dtype)[6:]}"


class HigherPrecisionConv(Frozen):
    """The same in float32, between quantised layers: what comes is dequantised, what goes is
    quantised.

    in_scale, shortcut_in_scale, scale: (1,), of the input, the block's input and the result; of
        images, which come as they are, in_scale has no meaning.
    """

    made_of_ops = True
    names = ("weight", "bias", "in_scale", "scale")
    optional = ("shortcut_in_scale", "projection_weight")
    geometry: Geometry
    weight: Tensor
    bias: Tensor
    in_scale: Tensor
    scale: Tensor
    shortcut_in_scale: Tensor | None
    projection_weight: Tensor | None

    def needed(self) -> tuple[str, ...]:
        return self.geometry.tensors("shortcut_in_scale")

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """As `QuantizedConv`; x may be a float32 image."""
        layer = ConvBn(Convolution(self.weight, *self.geometry.conv), self._norm(self.bias))
        x = dequantize(x, self.in_scale)
        if shortcut is not None:
            assert self.shortcut_in_scale is not None
            shortcut = dequantize(shortcut, self.shortcut_in_scale)
        projection = self.geometry.projecting(self.projection_weight)
        if shortcut is not None and projection is not None:
            y = conv_bn_projection(x, layer, shortcut, ConvBn(projection, self._norm(None)))
        else:
            shortcut = self.geometry.sampled(shortcut)
            y = conv_bn(x, layer, shortcut, relu=True, pad_residual=True)
        if self.geometry.pool is not None:
            y = F.max_pool2d(y, *self.geometry.pool)
        return nhwc(quantize(y / self.scale, self.geometry.dtype))

    def _norm(self, bias: Tensor | None) -> BatchNorm:
        """Nothing but a bias: variance + eps is 1, and eps positive, as PyTorch 2.11 demands."""
        zero = torch.zeros_like(self.bias)
        return BatchNorm(zero, zero + 0.75, None, bias, 0.25)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, float32"


class Head(Frozen):
    """Average pooling and the classifier: quantised, or in float32 behind quantised layers.

    weight: (classes, C); of float32 with the input's scale in it, and no multiplier.
    """

    made_of_ops = True
    names = ("weight", "bias")
    optional = ("multiplier",)
    weight: Tensor
    bias: Tensor
    multiplier: Tensor | None

    def needed(self) -> tuple[str, ...]:
        return () if self.weight.dtype == torch.float32 else ("multiplier",)

    def forward(self, x: Tensor) -> Tensor:
        """Quantised (N, C, H, W) -> float32 logits (N, classes)."""
        if self.multiplier is None:
            return head(x.float(), self.weight, self.bias)
        return quantized_head(x, self.weight, self.bias, self.multiplier)

    def get_extra_state(self) -> Tensor:
        return torch.zeros(0)

    def set_extra_state(self, state: Tensor) -> None:
        pass

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {str(self.weight.dtype)[6:]}"


class InputKind(NamedTuple):
    """What images are made: `dtype`, the quantised one or float32."""

    dtype: torch.dtype

    def encode(self) -> Tensor:
        return torch.tensor([_INPUTS.index(self.dtype)])

    @classmethod
    def decode(cls, state: Tensor) -> InputKind:
        return cls(_INPUTS[int(state)])


_INPUTS = (torch.uint8, FLOAT8, torch.float32)


class Images(Frozen):
    """Images as the first layer takes them.

    mean, std: (C,), of bytes from 0 to 255; the network was trained on (bytes - mean) / std.
        Without them it takes no bytes.
    scale, zero: (C,); the float v is (quantised - zero) · scale.
    """

    optional = ("mean", "std", "scale", "zero")
    geometry: InputKind
    mean: Tensor | None
    std: Tensor | None
    scale: Tensor
    zero: Tensor

    def needed(self) -> tuple[str, ...]:
        return "scale", "zero"

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W): bytes, or floats normalised as the float network takes them."""
        dtype = self.geometry.dtype
        if self.scale is not None and x.dim() == 4 and x.shape[1] != len(self.scale):
            raise ValueError(
                f"input has {x.shape[1]} channels, and this network takes {len(self.scale)}."
            )
        if x.dtype == torch.uint8:
            if self.mean is None or self.std is None:
                raise TypeError(
                    "input is uint8, and this network was quantised for normalised floats; pass "
                    "those, or quantise with normalization=(mean, std)."
                )
            if dtype == torch.uint8:
                return x
        elif not x.is_floating_point():
            raise TypeError(f"input must be floating point or uint8, found {x.dtype}.")
        if dtype != torch.float32:
            x = x.float() if x.dtype == torch.float64 else x  # which no kernel reads
            of_bytes = (self.mean, self.std) if x.dtype == torch.uint8 else ()
            return quantized_images(x, ImageQuantization(self.scale, self.zero, *of_bytes), dtype)
        if self.mean is not None and self.std is not None and x.dtype == torch.uint8:
            x = (x - of_image(self.mean)) / of_image(self.std)
        return x.float()

    def extra_repr(self) -> str:
        kind = "normalised floats" if self.mean is None else "bytes or normalised floats"
        return f"{kind} as {str(self.geometry.dtype)[6:]}"


def dequantize(x: Tensor, scale: Tensor) -> Tensor:
    """x · scale, of one tensor, in float32; floats are what they are."""
    return x if x.dtype == torch.float32 else x.float() * scale
