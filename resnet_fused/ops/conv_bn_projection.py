"""relu(bn(conv(x)) + projection_bn(projection(shortcut))): the end of a block that projects."""

from __future__ import annotations

from torch import Tensor

from ..parameters import BatchNorm, Convolution
from ..reference import ops as reference
from .checks import check_batch_norm, check_like, convolution_shape
from .registry import Op


def _output_shape(
    x: Tensor,
    conv: Convolution,
    bn: BatchNorm,
    shortcut: Tensor,
    projection: Convolution,
    projection_bn: BatchNorm,
) -> tuple[int, ...]:
    shape = convolution_shape("conv", x, conv)
    check_like("shortcut", shortcut, x)
    projected = convolution_shape("projection", shortcut, projection)
    if projected != shape:
        raise ValueError(
            f"the projected shortcut has shape {tuple(projected)} and the main path "
            f"{tuple(shape)}; their sizes, channels and strides must agree."
        )
    check_batch_norm("bn", bn, shape[1], x)
    check_batch_norm("projection_bn", projection_bn, shape[1], x)
    return shape


_op = Op(
    "conv_bn_projection",
    {
        "x": Tensor,
        "conv": Convolution,
        "bn": BatchNorm,
        "shortcut": Tensor,
        "projection": Convolution,
        "projection_bn": BatchNorm,
    },
    _output_shape,
    reference.conv_bn_projection,
)


def conv_bn_projection(
    x: Tensor,
    conv: Convolution,
    bn: BatchNorm,
    shortcut: Tensor,
    projection: Convolution,
    projection_bn: BatchNorm,
) -> Tensor:
    """relu(bn(conv(x)) + projection_bn(projection(shortcut))): eq. 2 of the paper, fused.

    The projected shortcut never reaches memory where the backend has the kernel for it.

    Args:
        x: (N, C, H, W), the main path before its last convolution.
        conv, bn: that convolution (K output channels) and its normalisation.
        shortcut: (N, D, H', W'), the block's input, of x's dtype and device.
        projection, projection_bn: the shortcut's convolution, usually 1×1 and strided, and its
            normalisation; the result must have the main path's shape.

    Returns (N, K, P, Q), channels_last, of x's dtype. Raises ValueError for shapes and devices
    that disagree and TypeError for dtypes that do.
    """
    return _op(x, conv, bn, shortcut, projection, projection_bn)
