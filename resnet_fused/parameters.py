"""The arguments that every op shares, grouped as a layer groups them.

The fields stand in the order of the op schemas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Convolution(NamedTuple):
    """A two-dimensional cross-correlation with zero padding and no bias.

    weight: (out_channels, in_channels / groups, kernel_height, kernel_width), any strides.
    """

    weight: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(P, Q) of the result for an image of that size; less than 1 where no window fits."""
        r, s = self.weight.shape[2:]
        return (
            _windows(height, r, self.stride[0], self.padding[0], self.dilation[0]),
            _windows(width, s, self.stride[1], self.padding[1], self.dilation[1]),
        )

    def is_pointwise(self) -> bool:
        """Whether it is a plain matrix product: 1×1, stride 1, no padding."""
        window = (*self.weight.shape[2:], *self.stride, *self.padding)
        return window == (1, 1, 1, 1, 0, 0)


class BatchNorm(NamedTuple):
    """Batch normalisation with running statistics: (x - mean) / sqrt(var + eps) * weight + bias.

    Each vector is (channels,) of any floating dtype; `weight` and `bias` may be None (1 and 0).
    Kernels read them live and compute in float32; nothing is folded or cached.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float = 1e-5


class GroupNorm(NamedTuple):
    """Normalisation by the statistics of each image's groups of channels (arXiv:1803.08494).

    groups: how many, of as many neighbouring channels each.
    weight, bias: (channels,) of any floating dtype, read live; None for 1 and 0.
    """

    groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float = 1e-5


class ConvBn(NamedTuple):
    """A convolution and the normalisation of its result."""

    conv: Convolution
    bn: BatchNorm


class Layer(NamedTuple):
    """A convolution and its normalisation, in training.

    conv: its weight is of the input's dtype or float32.
    weight, bias: (K,) of the normalisation, any floating dtype.
    frozen: mean and variance to normalise with (frozen batch norm), or None for the batch's own.
    """

    conv: Convolution
    weight: Tensor
    bias: Tensor
    eps: float = 1e-5
    frozen: tuple[Tensor, Tensor] | None = None


# Rows of `scale_shift`, the (6, K) vectors of a layer in training (`backends/training.py`).
MEAN, SCALE, SHIFT, INVSTD, UNBIASED_VAR, COUNT = range(6)


class Activation(NamedTuple):
    """relu((pre_bn - mean) · scale + shift) of a pre-BN output (N, K, P, Q)."""

    pre_bn: Tensor
    scale_shift: Tensor


class Folded(NamedTuple):
    """(conv(x) - mean) · scale + shift of a 1×1 convolution whose result is never stored."""

    x: Tensor
    conv: Convolution
    scale_shift: Tensor


class OperandTerm(NamedTuple):
    """What a normalisation by the batch's statistics adds to the gradient of a 1×1 convolution's
    input x: matrix · x + offset, at the positions that the convolution reads.

    matrix: (C, C), symmetric, of x's dtype; offset: (C,) float32.
    """

    x: Tensor
    matrix: Tensor
    offset: Tensor


class PreBnGradient(NamedTuple):
    """The gradient of `pre_bn`, unformed: a·grad + b·(pre_bn - mean) + d, or a·grad if `frozen`."""

    grad: Tensor
    pre_bn: Tensor | None  # None only where `frozen`
    coefficients: Tensor
    frozen: bool
    last_use: bool = False  # nobody reads `grad` afterwards: it may be overwritten


class Gate(NamedTuple):
    """Two linear layers that give each channel of an image a factor, sigmoid(expand(relu(reduce)))
    of the channels' means: weights (hidden, C) and (C, hidden), biases or None.
    """

    reduce: Tensor
    reduce_bias: Tensor | None
    expand: Tensor
    expand_bias: Tensor | None


class ImageQuantization(NamedTuple):
    """How images become quantised, channel by channel: x / scale + zero, rounded.

    scale, zero: (C,) float32; a float v is (quantised - zero) · scale.
    mean, std: (C,) float32, of images of bytes, from which (x - mean) / std is made first; None for
        floating ones.
    """

    scale: Tensor
    zero: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None


class QuantizedLayer(NamedTuple):
    """A convolution of quantised numbers, and how its sums become the result's
    (`resnet_fused.reference.quantized`).

    conv: its weight (K, C/groups, R, S) is int8, or float8_e4m3fn as the input then is.
    bias: (K,) in the accumulator's scale; int32, of fp8 float32.
    multiplier: (K,) float32, accumulator's scale / result's scale.
    padding_value: (C,) of the input's dtype, what pixels of the padding hold; zero if None.
    """

    conv: Convolution
    bias: Tensor
    multiplier: Tensor
    padding_value: Tensor | None = None


class QuantizedShortcut(NamedTuple):
    """What a quantised layer adds to its sums: x, or a projection of x, times a scale.

    x: a quantised tensor of the result's shape, (N, D, P, Q) with D <= K and any strides, or what
        `projection` is applied to.
    scale: (K,) float32, the scale of x, or of the projection's accumulator, / accumulator's scale.
    projection: a second convolution, whose result has the first one's shape.
    """

    x: Tensor
    scale: Tensor
    projection: Convolution | None = None


class MaxPool(NamedTuple):
    """Max pooling with implicit -inf padding, square window, floor rounding."""

    kernel: int = 3
    stride: int = 2
    padding: int = 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """The pooled size of a map of that size; less than 1 where no window fits."""
        return (
            _windows(height, self.kernel, self.stride, self.padding),
            _windows(width, self.kernel, self.stride, self.padding),
        )


def is_resnet_stem(conv: Convolution, pool: MaxPool) -> bool:
    """Whether they are a ResNet's first layers, for which backends have kernels of their own."""
    window = ((2, 2), (3, 3), (1, 1), 1)
    return conv.weight.shape[1:] == (3, 7, 7) and conv[1:] == window and pool == (3, 2, 1)


class Normalization(NamedTuple):
    """How an image of bytes becomes numbers: (x / 255 - mean) / std, channel by channel.

    mean, std: as many as there are channels, std positive.
    """

    mean: Sequence[float]
    std: Sequence[float]


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """How many windows fit along one dimension."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
