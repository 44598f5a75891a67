"""relu?(bn(x) (+ residual)): what follows a convolution that some library already computed."""

from __future__ import annotations

from torch import Tensor

from ..parameters import BatchNorm
from ..reference import ops as reference
from .checks import check_activation, check_batch_norm, check_residual
from .registry import Op


def _output_shape(x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool) -> tuple[int, ...]:
    check_activation("input", x)
    check_batch_norm("bn", bn, x.shape[1], x)
    check_residual(residual, tuple(x.shape), x)
    return tuple(x.shape)


_op = Op(
    reference.bn_add_relu,
    _output_shape,
    lambda backend: backend.bn_add_relu,
)


def bn_add_relu(
    x: Tensor, bn: BatchNorm, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    """relu?(bn(x) (+ residual)) in one pass over memory.

    Args:
        x: (N, C, H, W), floating; NHWC memory (channels_last) is used as it is, others converted.
        bn: statistics and affine parameters of C channels, read live, applied in float32.
        residual: added after the normalisation; like x in shape, dtype and device.
        relu: whether to clamp at zero.

    Returns a channels_last tensor like x. Raises ValueError for shapes and devices that disagree
    and TypeError for dtypes that do.
    """
    return _op(x, bn, residual, relu)
