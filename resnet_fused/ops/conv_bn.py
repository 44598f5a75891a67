"""relu?(bn(conv(x)) (+ residual)): the op most of a ResNet consists of."""

from __future__ import annotations

from torch import Tensor

from ..parameters import ConvBn
from ..reference import ops as reference
from .checks import check_residual, conv_bn_shape
from .registry import Op


def _output_shape(x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool) -> tuple[int, ...]:
    shape = conv_bn_shape("layer", x, layer)
    check_residual(residual, shape, x, narrow=True)
    return shape


op = Op(
    reference.conv_bn,
    _output_shape,
    lambda backend: backend.conv_bn,
)


def conv_bn(
    x: Tensor,
    layer: ConvBn,
    residual: Tensor | None = None,
    relu: bool = False,
    pad_residual: bool = False,
) -> Tensor:
    """relu?(bn(conv(x)) (+ residual)) in one kernel where the backend has one.

    Args:
        x: (N, C, H, W), floating; NHWC memory (channels_last) is used as it is, others converted.
        layer: a convolution of weight (K, C/groups, R, S) and x's dtype, of any kernel size,
            stride, padding, dilation and number of groups; and the statistics and affine
            parameters of its K channels, read live and applied in float32.
        residual: (N, K, P, Q), added after the normalisation; x's dtype and device. Any strides:
            `block_input[:, :, ::2, ::2]` is read in place by backends that fuse it.
        relu: whether to clamp at zero.
        pad_residual: accept a residual of fewer channels, (N, D, P, Q), and add nothing to those
            from D on (the paper's shortcut option A, section 3.3).

    Returns (N, K, P, Q), channels_last, of x's dtype. Raises ValueError for shapes and devices
    that disagree and TypeError for dtypes that do.
    """
    if residual is not None and not pad_residual and residual.shape[1] < layer.conv.weight.shape[0]:
        raise ValueError(
            f"residual has {residual.shape[1]} channels and the result "
            f"{layer.conv.weight.shape[0]}; "
            "pad_residual=True adds nothing to the others."
        )
    return op(x, layer, residual, relu)
