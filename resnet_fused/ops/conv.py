"""conv(x): the convolution in front of what no op computes with it, such as group norm."""

from __future__ import annotations

from torch import Tensor

from ..parameters import Convolution
from ..reference import ops as reference
from .checks import convolution_shape
from .registry import Op


def _output_shape(x: Tensor, conv: Convolution) -> tuple[int, ...]:
    return convolution_shape("conv", x, conv)


_op = Op(
    reference.conv,
    _output_shape,
    lambda backend: backend.conv,
)


def conv(x: Tensor, conv: Convolution) -> Tensor:
    """conv(x), without a bias.

    Args:
        x: (N, C, H, W), floating; NHWC memory (channels_last) is used as it is, others converted.
        conv: the convolution; its weight is of x's dtype and device.

    Returns a channels_last tensor (N, K, P, Q). Raises ValueError for shapes and devices that
    disagree and TypeError for dtypes that do.
    """
    return _op(x, conv)
