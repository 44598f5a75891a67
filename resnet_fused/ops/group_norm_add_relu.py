"""relu?(group_norm(x) (+ residual)): what follows a convolution in networks with group norm."""

from __future__ import annotations

from torch import Tensor

from ..parameters import GroupNorm
from ..reference import ops as reference
from .checks import check_activation, check_group_norm, check_residual
from .registry import Op


def _output_shape(
    x: Tensor, norm: GroupNorm, residual: Tensor | None, relu: bool
) -> tuple[int, ...]:
    check_activation("input", x)
    check_group_norm(norm, x)
    check_residual(residual, tuple(x.shape), x)
    return tuple(x.shape)


_op = Op(
    reference.group_norm_add_relu,
    _output_shape,
    lambda backend: backend.group_norm_add_relu,
)


def group_norm_add_relu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """relu?(group_norm(x) (+ residual)), x read from memory once (arXiv:1803.08494).

    Args:
        x: (N, C, H, W), floating; NHWC memory (channels_last) is used as it is, others converted.
        num_groups: groups of neighbouring channels, a divisor of C; each is normalised by its own
            mean and variance in each image, taken in float32 or better.
        weight: (C,) of any floating dtype, read live; None for 1.
        bias: the same; None for 0.
        eps: added to the variance.
        residual: added after the normalisation; like x in shape, dtype and device.
        relu: whether to clamp at zero.

    Returns a channels_last tensor like x. Raises ValueError for shapes and devices that disagree
    and TypeError for dtypes that do.
    """
    return _op(x, GroupNorm(num_groups, weight, bias, eps), residual, relu)
