"""max_pool(relu(bn(conv(x)))): the first layers of a ResNet."""

from __future__ import annotations

from torch import Tensor

from ..parameters import BatchNorm, Convolution, MaxPool
from ..reference import ops as reference
from .checks import check_batch_norm, convolution_shape, pool_shape
from .registry import Op


def _output_shape(x: Tensor, conv: Convolution, bn: BatchNorm, pool: MaxPool) -> tuple[int, ...]:
    shape = convolution_shape("conv", x, conv)
    check_batch_norm("bn", bn, shape[1], x)
    return pool_shape(shape, pool)


_op = Op(
    "stem",
    {"x": Tensor, "conv": Convolution, "bn": BatchNorm, "pool": MaxPool},
    _output_shape,
    reference.stem,
)


def stem(x: Tensor, conv: Convolution, bn: BatchNorm, pool: MaxPool | None = None) -> Tensor:
    """max_pool(relu(bn(conv(x)))): conv1 and the pooling of the paper's Table 1, fused.

    Args:
        x: (N, C, H, W), floating, any layout (images usually arrive as NCHW).
        conv: weight (K, C/groups, R, S) of x's dtype; 7×7 with stride 2 in a ResNet.
        bn: statistics and affine parameters of K channels, read live, applied in float32.
        pool: the pooling window; 3×3, stride 2, padding 1 if None.

    Returns the pooled (N, K, P, Q), channels_last, of x's dtype. Raises ValueError for shapes and
    devices that disagree and TypeError for dtypes that do.
    """
    return _op(x, conv, bn, MaxPool() if pool is None else pool)
