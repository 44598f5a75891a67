"""relu(F(x) + shortcut(x)), F three convolutions: a whole bottleneck block."""

from __future__ import annotations

from torch import Tensor

from ..parameters import BatchNorm, Convolution
from ..reference import ops as reference
from .checks import check_batch_norm, convolution_shape
from .registry import Op, OptionalBatchNorm, OptionalConvolution


def _output_shape(
    x: Tensor,
    conv1: Convolution,
    bn1: BatchNorm,
    conv2: Convolution,
    bn2: BatchNorm,
    conv3: Convolution,
    bn3: BatchNorm,
    projection: Convolution | None,
    projection_bn: BatchNorm | None,
) -> tuple[int, ...]:
    shape = None
    for i, (conv, bn) in enumerate(((conv1, bn1), (conv2, bn2), (conv3, bn3)), 1):
        shape = convolution_shape(f"conv{i}", x, conv, shape)
        check_batch_norm(f"bn{i}", bn, shape[1], x)
    assert shape is not None
    if (projection is None) != (projection_bn is None):
        raise ValueError("projection and projection_bn belong together: give both or neither.")
    if projection is None or projection_bn is None:
        added, name = tuple(x.shape), "input, which is the shortcut,"
    else:
        added, name = convolution_shape("projection", x, projection), "projected shortcut"
        check_batch_norm("projection_bn", projection_bn, added[1], x)
    if added != shape:
        raise ValueError(
            f"the {name} has shape {added} and the main path {shape}; their sizes, channels and "
            "strides must agree."
        )
    return shape


_op = Op(
    "bottleneck",
    {
        "x": Tensor,
        "conv1": Convolution,
        "bn1": BatchNorm,
        "conv2": Convolution,
        "bn2": BatchNorm,
        "conv3": Convolution,
        "bn3": BatchNorm,
        "projection": OptionalConvolution,
        "projection_bn": OptionalBatchNorm,
    },
    _output_shape,
    reference.bottleneck,
)


def bottleneck(
    x: Tensor,
    conv1: Convolution,
    bn1: BatchNorm,
    conv2: Convolution,
    bn2: BatchNorm,
    conv3: Convolution,
    bn3: BatchNorm,
    projection: Convolution | None = None,
    projection_bn: BatchNorm | None = None,
) -> Tensor:
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut): Fig. 5 of the paper.

    In one kernel where the backend has one and it pays, else one for each convolution. What a
    kernel keeps to itself is rounded to x's dtype as it would be in memory.

    Args:
        x: (N, C, H, W), floating; NHWC memory (channels_last) is used as it is, others converted.
        conv1, bn1, conv2, bn2, conv3, bn3: convolutions of any window, in a ResNet 1×1, 3×3 and
            1×1, and the statistics and affine parameters of their normalisation, applied in
            float32; weights are of x's dtype.
        projection, projection_bn: the shortcut's convolution, usually 1×1 and strided, and its
            normalisation; the result must have the main path's shape. Without them x is added.

    Returns (N, K, P, Q), channels_last, of x's dtype. Raises ValueError for shapes and devices
    that disagree and TypeError for dtypes that do.
    """
    return _op(x, conv1, bn1, conv2, bn2, conv3, bn3, projection, projection_bn)
