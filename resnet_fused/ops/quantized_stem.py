"""max_pool(relu(conv)) of quantised images: the first layers of a ResNet."""

from __future__ import annotations

from torch import Tensor

from ..parameters import MaxPool, QuantizedLayer
from ..reference import quantized as reference
from .checks import pool_shape, quantized_layer_shape
from .registry import Op


def _output_shape(x: Tensor, layer: QuantizedLayer, pool: MaxPool) -> tuple[int, ...]:
    return pool_shape(quantized_layer_shape(x, layer), pool)


_op = Op(
    reference.quantized_stem,
    _output_shape,
    lambda backend: backend.quantized_stem,
    result_dtype=lambda x, layer, pool: reference.quantized_dtype(layer, True),
)


def quantized_stem(x: Tensor, layer: QuantizedLayer, pool: MaxPool | None = None) -> Tensor:
    """max_pool(relu(conv(x) + bias)), requantised, as `resnet_fused.reference.quantized` says.

    Args:
        x: (N, C, H, W), uint8 or int8, or float8_e4m3fn; any layout (images usually are NCHW).
        layer: the convolution, and how its sums become the result's.
        pool: the pooling window; 3×3, stride 2, padding 1 if None.

    Returns the pooled (N, K, P, Q), channels_last, uint8 or float8_e4m3fn. Raises as
    `quantized_conv` does.
    """
    return _op(x, layer, MaxPool() if pool is None else pool)
