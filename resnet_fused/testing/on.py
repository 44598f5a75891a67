"""The ops as one backend computes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops
from ..backends import Backend
from ..ops import BatchNorm, ConvBn, Convolution, GroupNorm, MaxPool, Normalization, use_backend


class On:
    """The ops with the signatures of their references, run by a backend.

    backend: a name or an object that implements `resnet_fused.backends.Backend`.
    """

    def __init__(self, backend: str | Backend) -> None:
        self._backend = backend

    def bn_add_relu(self, x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
        with use_backend(self._backend):
            return ops.bn_add_relu(x, bn, residual, relu)

    def group_norm_add_relu(
        self, x: Tensor, norm: GroupNorm, residual: Tensor | None, relu: bool
    ) -> Tensor:
        with use_backend(self._backend):
            return ops.group_norm_add_relu(x, *norm, residual, relu)

    def conv(self, x: Tensor, conv: Convolution) -> Tensor:
        with use_backend(self._backend):
            return ops.conv(x, conv)

    def conv_bn(self, x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool) -> Tensor:
        with use_backend(self._backend):
            return ops.conv_bn(x, layer, residual, relu, pad_residual=True)

    def conv_bn_projection(
        self, x: Tensor, layer: ConvBn, shortcut: Tensor, projection: ConvBn
    ) -> Tensor:
        with use_backend(self._backend):
            return ops.conv_bn_projection(x, layer, shortcut, projection)

    def bottleneck(
        self,
        x: Tensor,
        layer1: ConvBn,
        layer2: ConvBn,
        layer3: ConvBn,
        projection: ConvBn | None,
    ) -> Tensor:
        with use_backend(self._backend):
            return ops.bottleneck(x, (layer1, layer2, layer3), projection)

    def stem(self, x: Tensor, layer: ConvBn, pool: MaxPool) -> Tensor:
        with use_backend(self._backend):
            return ops.stem(x, layer, pool)

    def image_stem(
        self, images: Tensor, layer: ConvBn, pool: MaxPool, normalization: Normalization
    ) -> Tensor:
        with use_backend(self._backend):
            return ops.image_stem(images, layer, normalization, pool)

    def squeeze_excite(self, x: Tensor, *arguments: Any) -> Tensor:
        with use_backend(self._backend):
            return ops.squeeze_excite(x, *arguments)

    def head(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with use_backend(self._backend):
            return ops.head(x, weight, bias)

    def quantized_conv(self, *arguments: Any) -> Tensor:
        with use_backend(self._backend):
            return ops.quantized_conv(*arguments)

    def quantized_stem(self, *arguments: Any) -> Tensor:
        with use_backend(self._backend):
            return ops.quantized_stem(*arguments)
