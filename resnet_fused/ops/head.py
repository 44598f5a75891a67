"""linear(global_average_pool(x)): the last layers of a ResNet."""

from __future__ import annotations

from torch import Tensor

from ..reference import ops as reference
from .checks import head_shape
from .registry import Op

_op = Op(
    reference.head,
    head_shape,
    lambda backend: backend.head,
)


def head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear(global_average_pool(x)): average pool and fully connected layer in one kernel.

    Args:
        x: (N, C, H, W), floating; NHWC memory (channels_last) is used as it is, others converted.
        weight: (classes, C) of x's dtype.
        bias: (classes,) of x's dtype, or None.

    Returns (N, classes), contiguous, of x's dtype. Raises ValueError for shapes and devices that
    disagree and TypeError for dtypes that do.
    """
    return _op(x, weight, bias)
