"""relu(F(x) + shortcut(x)), F three convolutions: a whole bottleneck block."""

from __future__ import annotations

from torch import Tensor

from ..backends import Candidate
from ..parameters import ConvBn
from ..reference import ops as reference
from .checks import conv_bn_shape
from .conv_bn import op as conv_bn
from .conv_bn_projection import op as conv_bn_projection
from .registry import Op


def _output_shape(
    x: Tensor, layer1: ConvBn, layer2: ConvBn, layer3: ConvBn, projection: ConvBn | None
) -> tuple[int, ...]:
    shape = conv_bn_shape("layer1", x, layer1)
    shape = conv_bn_shape("layer2", x, layer2, shape)
    shape = conv_bn_shape("layer3", x, layer3, shape)
    if projection is None:
        added, name = tuple(x.shape), "input, which is the shortcut,"
    else:
        added, name = conv_bn_shape("projection", x, projection), "projected shortcut"
    if added != shape:
        raise ValueError(
            f"the {name} has shape {added} and the main path {shape}; their sizes, channels and "
            "strides must agree."
        )
    return shape


def _by_layers(
    x: Tensor, layer1: ConvBn, layer2: ConvBn, layer3: ConvBn, projection: ConvBn | None
) -> Tensor:
    out = conv_bn.compute(x, layer1, None, True)
    out = conv_bn.compute(out, layer2, None, True)
    if projection is None:
        return conv_bn.compute(out, layer3, x, True)
    return conv_bn_projection.compute(out, layer3, x, projection)


_op = Op(
    reference.bottleneck,
    _output_shape,
    lambda backend: backend.bottleneck,
    Candidate("layers", _by_layers),
)


def bottleneck(
    x: Tensor, layers: tuple[ConvBn, ConvBn, ConvBn], projection: ConvBn | None = None
) -> Tensor:
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut): Fig. 5 of the paper.

    In one kernel where the backend has a profitable one, else one for each convolution. What a
    kernel keeps to itself is rounded to x's dtype as it would be in memory.

    Args:
        x: (N, C, H, W), floating; NHWC memory (channels_last) is used as it is, others converted.
        layers: three convolutions of any window, in a ResNet 1×1, 3×3 and 1×1, and the statistics
            and affine parameters of their normalisation, applied in float32; weights are of x's
            dtype.
        projection: the shortcut's convolution, usually 1×1 and strided, and its normalisation; the
            result must have the main path's shape. Without it x is added.

    Returns (N, K, P, Q), channels_last, of x's dtype. Raises ValueError for shapes and devices
    that disagree and TypeError for dtypes that do.
    """
    return _op(x, *layers, projection)
