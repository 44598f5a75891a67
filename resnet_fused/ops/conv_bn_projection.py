"""relu(bn(conv(x)) + bn'(conv'(shortcut))): the end of a block that projects."""

from __future__ import annotations

from torch import Tensor

from ..backends import Candidate
from ..parameters import ConvBn
from ..reference import ops as reference
from .checks import check_like, conv_bn_shape
from .conv_bn import op as conv_bn
from .registry import Op


def _output_shape(
    x: Tensor, layer: ConvBn, shortcut: Tensor, projection: ConvBn
) -> tuple[int, ...]:
    shape = conv_bn_shape("layer", x, layer)
    check_like("shortcut", shortcut, x)
    projected = conv_bn_shape("projection", shortcut, projection)
    if projected != shape:
        raise ValueError(
            f"the projected shortcut has shape {tuple(projected)} and the main path "
            f"{tuple(shape)}; their sizes, channels and strides must agree."
        )
    return shape


def _separate(x: Tensor, layer: ConvBn, shortcut: Tensor, projection: ConvBn) -> Tensor:
    return conv_bn.compute(x, layer, conv_bn.compute(shortcut, projection, None, False), True)


op = Op(
    reference.conv_bn_projection,
    _output_shape,
    lambda backend: backend.conv_bn_projection,
    Candidate("separate", _separate),
)


def conv_bn_projection(x: Tensor, layer: ConvBn, shortcut: Tensor, projection: ConvBn) -> Tensor:
    """relu(bn(conv(x)) + bn'(conv'(shortcut))): eq. 2 of the paper, fused.

    The projected shortcut never reaches memory where the backend has the kernel for it.

    Args:
        x: (N, C, H, W), the main path before its last convolution.
        layer: that convolution (K output channels) and its normalisation.
        shortcut: (N, D, H', W'), the block's input, of x's dtype and device.
        projection: the shortcut's convolution, usually 1×1 and strided, and its normalisation; the
            result must have the main path's shape.

    Returns (N, K, P, Q), channels_last, of x's dtype. Raises ValueError for shapes and devices
    that disagree and TypeError for dtypes that do.
    """
    return op(x, layer, shortcut, projection)
