"""The arguments that every op shares, grouped as a layer groups them.

The fields stand in the order of the op schemas, so `*conv, *bn` is a valid argument list.
"""

from __future__ import annotations

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


class BatchNorm(NamedTuple):
    """Batch normalisation with given statistics: (x - mean) / sqrt(var + eps) * weight + bias.

    Each vector is (channels,) of any floating dtype; `weight` and `bias` may be None (1 and 0).
    Kernels read them live and compute in float32; nothing is folded or cached.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float = 1e-5


class MaxPool(NamedTuple):
    """Max pooling with implicit -inf padding, square window, floor rounding."""

    kernel: int = 3
    stride: int = 2
    padding: int = 1
