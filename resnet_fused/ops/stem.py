"""max_pool(relu(bn(conv(x)))): the first layers of a ResNet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..backends import Candidate
from ..parameters import ConvBn, MaxPool
from ..reference import ops as reference
from .checks import conv_bn_shape, pool_shape
from .conv_bn import op as conv_bn
from .registry import Op


def _output_shape(x: Tensor, layer: ConvBn, pool: MaxPool) -> tuple[int, ...]:
    return pool_shape(conv_bn_shape("layer", x, layer), pool)


def _separate(x: Tensor, layer: ConvBn, pool: MaxPool) -> Tensor:
    return reference.nhwc(F.max_pool2d(conv_bn.compute(x, layer, None, True), *pool))


op = Op(
    reference.stem,
    _output_shape,
    lambda backend: backend.stem,
    Candidate("separate", _separate),
)


def stem(x: Tensor, layer: ConvBn, pool: MaxPool | None = None) -> Tensor:
    """max_pool(relu(bn(conv(x)))): conv1 and the pooling of the paper's Table 1, fused.

    Args:
        x: (N, C, H, W), floating, any layout (images usually arrive as NCHW).
        layer: a convolution of weight (K, C/groups, R, S) and x's dtype, 7×7 with stride 2 in a
            ResNet, and the statistics and affine parameters of its K channels, read live and
            applied in float32.
        pool: the pooling window; 3×3, stride 2, padding 1 if None.

    Returns the pooled (N, K, P, Q), channels_last, of x's dtype. Raises ValueError for shapes and
    devices that disagree and TypeError for dtypes that do.
    """
    return op(x, layer, MaxPool() if pool is None else pool)
