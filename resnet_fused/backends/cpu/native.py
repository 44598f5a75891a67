"""The package's own CPU kernels: where they apply, and their weights and arguments.

Packed weights are the weights in another order, or Winograd's transform of them; batch norm is read
live and applied in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...parameters import BatchNorm, Convolution, MaxPool
from ..residual import readable, residual_argument

_LANES = 16  # Winograd's channel counts that are no multiple of it leave vector lanes idle
_STEM_LANES = 32
_SMALLEST = 2  # of Winograd's maps: a single pixel wants one tap of nine
_READ_AS_THEY_ARE = (torch.float32, torch.bfloat16, torch.float64)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    # Dispatched through PyTorch, the schema's int[2] arrive as lists.
    return values[0], values[1]


class Vectors:
    """A batch norm as the kernels take it; keeps alive what they point to."""

    def __init__(self, bn: BatchNorm) -> None:
        self._kept = [v if v is None or v.dtype in _READ_AS_THEY_ARE else v.float() for v in bn[:4]]
        self.arguments = (
            *(None if v is None else (v.data_ptr(), v.stride(0), v.itemsize) for v in self._kept),
            bn.eps,
        )


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    return torch.empty(
        (x.shape[0], channels, height, width), dtype=x.dtype, memory_format=torch.channels_last
    )


def bn_add_relu(
    extension: ModuleType,
    x: Tensor,
    bn: BatchNorm,
    residual: Tensor | None,
    relu: bool,
    in_place: bool = False,
) -> Tensor:
    """relu?(bn(x) (+ residual)) in one pass; float32 and bfloat16, on every processor.

    in_place: overwrite `x`, which then is channels_last.
    """
    x, vectors = _nhwc(x), Vectors(bn)
    out = x if in_place else torch.empty_like(x)
    residual = readable(residual)
    batch, channels, height, width = x.shape
    extension.bn_add_relu(
        x.data_ptr(),
        vectors.arguments,
        residual_argument(residual),
        out.data_ptr(),
        batch,
        height,
        width,
        channels,
        relu,
        x.dtype == torch.bfloat16,
    )
    return out


def head(extension: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(global_average_pool(x)), (N, C, H, W) -> (N, classes); on every processor."""
    x = _nhwc(x)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    batch, channels, height, width = x.shape
    out = torch.empty((batch, weight.shape[0]), dtype=x.dtype)
    extension.head(
        x.data_ptr(),
        weight.data_ptr(),
        weight.stride(0),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        batch,
        height * width,
        channels,
        weight.shape[0],
        x.dtype == torch.bfloat16,
    )
    return out


class PackedConvolution:
    """relu?(bn(conv(x)) (+ residual)) of one group, on weights packed for the kernel.

    The kernel is Winograd's F(2×2, 3×3) where `suits_winograd`, else the direct one.
    """

    def __init__(self, extension: ModuleType, conv: Convolution, winograd: bool) -> None:
        weight = conv.weight
        out_channels, channels, *kernel = weight.shape
        self._conv = conv._replace(weight=torch.empty_like(weight, device="meta"))
        self._window: tuple[tuple[int, int], ...] = ()
        self._format: tuple[bool, ...] = ()
        sizes: tuple[Any, ...] = (channels, out_channels)
        if winograd:
            self._kernel, pack = extension.winograd_conv, extension.winograd_transform_weights
            self._packed = torch.empty(extension.winograd_weight_floats(*sizes))
        else:
            self._window = (_pair(kernel), *map(_pair, conv[1:4]))
            self._format = (weight.dtype == torch.bfloat16,)
            sizes = (*sizes, self._window[0], *self._format)
            self._kernel, pack = extension.conv_bn, extension.conv_transform_weights
            self._packed = torch.empty(extension.conv_weight_bytes(*sizes), dtype=torch.uint8)
        pack(weight.data_ptr(), weight.stride(), self._packed.data_ptr(), *sizes)

    def __call__(
        self,
        x: Tensor,
        bn: BatchNorm,
        residual: Tensor | None,
        relu: bool,
        in_place: bool = False,
    ) -> Tensor:
        """(N, C, H, W) -> (N, K, P, Q), channels_last; residual (N, D, P, Q), D <= K.

        in_place: return the result in the memory of `residual`, which then is channels_last.
        """
        residual = readable(residual)
        out = residual if in_place else None
        return self._run(_nhwc(x), bn, relu, out, residual)

    def adds_projection(self, projection: PackedConvolution) -> bool:
        """Whether `with_projection` takes it: both by the direct kernel."""
        return bool(self._window and projection._window)

    def with_projection(
        self,
        x: Tensor,
        bn: BatchNorm,
        shortcut: Tensor,
        projection: PackedConvolution,
        projection_bn: BatchNorm,
    ) -> Tensor:
        """relu(bn(conv(x)) + bn(projection(shortcut))), one pass; the sum is rounded once."""
        shortcut, vectors = _nhwc(shortcut), Vectors(projection_bn)
        _, inplanes, *size = shortcut.shape
        projected = (
            *(shortcut.data_ptr(), projection._packed.data_ptr(), vectors.arguments),
            *(*size, inplanes, *projection._window),
        )
        return self._run(_nhwc(x), bn, relu=True, projection=projected)

    def _run(
        self,
        x: Tensor,
        bn: BatchNorm,
        relu: bool,
        out: Tensor | None = None,
        residual: Tensor | None = None,
        **projection: Any,
    ) -> Tensor:
        """Calls the kernel."""
        batch, channels, height, width = x.shape
        out_channels = self._conv.weight.shape[0]
        if out is None:
            out = _empty(x, out_channels, *self._conv.output_size(height, width))
        vectors = Vectors(bn)
        self._kernel(
            x.data_ptr(),
            self._packed.data_ptr(),
            vectors.arguments,
            residual_argument(residual),
            out.data_ptr(),
            batch,
            height,
            width,
            channels,
            out_channels,
            *self._window,
            relu,
            *self._format,
            **projection,
        )
        return out


def suits_winograd(x: Tensor, conv: Convolution) -> bool:
    """Whether Winograd's kernel computes this convolution, and faster than the direct one."""
    weight = conv.weight
    return (
        weight.dtype == torch.float32
        and weight.shape[2:] == (3, 3)
        and all(_pair(pair) == (1, 1) for pair in conv[1:4])
        and weight.shape[0] % _LANES == 0
        and weight.shape[1] % _LANES == 0
        and min(x.shape[2:]) >= _SMALLEST
    )


class PooledStem:
    """max_pool(relu(bn(conv7×7(x)))) in one pass, float32 and bfloat16."""

    def __init__(self, extension: ModuleType, conv: Convolution) -> None:
        weight = conv.weight
        self._kernel = extension.stem_conv_pool
        self._out_channels = weight.shape[0]
        self._bfloat16 = weight.dtype == torch.bfloat16
        sizes = (self._out_channels, self._bfloat16)
        self._packed = torch.empty(extension.stem_weight_bytes(*sizes), dtype=torch.uint8)
        extension.stem_transform_weights(
            weight.data_ptr(), weight.stride(), self._packed.data_ptr(), *sizes
        )

    @staticmethod
    def serves(conv: Convolution, pool: MaxPool) -> bool:
        """Whether it computes this stem: a ResNet's."""
        weight = conv.weight
        return (
            weight.shape[1:] == (3, 7, 7)
            and tuple(map(_pair, conv[1:4])) == ((2, 2), (3, 3), (1, 1))
            and conv.groups == 1
            and weight.shape[0] % _STEM_LANES == 0
            and tuple(pool) == (3, 2, 1)
        )

    def __call__(self, x: Tensor, bn: BatchNorm) -> Tensor:
        """(N, 3, H, W) -> (N, K, P, Q), channels_last."""
        x, vectors = _nhwc(x), Vectors(bn)
        batch, _, height, width = x.shape
        # Halved twice, rounded up.
        out = _empty(x, self._out_channels, (height + 3) // 4, (width + 3) // 4)
        self._kernel(
            x.data_ptr(),
            self._packed.data_ptr(),
            vectors.arguments,
            out.data_ptr(),
            batch,
            height,
            width,
            self._out_channels,
            self._bfloat16,
        )
        return out
