"""What a backend provides for training: the pieces between which a block's fusion runs.

Batch norm cannot normalise a convolution's result in the pass that makes it, so every piece works
across a convolution: normalisation, ReLU and their gradients are applied while operands are read,
and statistics are taken while results are written. Only raw (unnormalised) results reach memory.

Vectors of one layer of K channels, float32 (float64 where the activations are float64):
    moments (T, 3, K): mean, sum of squared deviations from it, and count, of T parts of the batch.
    terms (6, K): the rows named below; an activation is relu((raw - mean) · scale + shift).
    sums (T, 2, K): of g and of g · (raw - mean), g the gradient of the normalised result.
    slopes (4, K): a, b, d, mean; the gradient of the raw result is a·g + b·(raw - mean) + d.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..parameters import Convolution, MaxPool

MEAN, SCALE, SHIFT, INVSTD, UNBIASED_VAR, COUNT = range(6)


class Activation(NamedTuple):
    """relu((raw - mean) · scale + shift) of a raw convolution result (N, K, P, Q)."""

    raw: Tensor
    terms: Tensor


class RawGradient(NamedTuple):
    """The gradient of `raw`, unformed: a·grad + b·(raw - mean) + d, or a·grad if `frozen`."""

    grad: Tensor
    raw: Tensor | None  # None only where `frozen`
    slopes: Tensor
    frozen: bool


class TrainingKernels(Protocol):
    """The pieces. Activations are channels_last, sums are taken in float32 in a fixed order."""

    def conv_stats(
        self, x: Tensor | Activation, conv: Convolution, statistics: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The raw convolution of x, and the moments of the result as stored (rounded)."""

    def merge_moments(self, moments: Tensor) -> Tensor:
        """The (1, 3, K) moments of all parts together."""

    def bn_terms(self, moments: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Terms of the normalisation with the merged moments."""

    def bn_add_relu(self, main: Activation, shortcut: Tensor | Activation | None) -> Tensor:
        """relu(main's normalisation + shortcut, itself normalised if it has terms).

        A shortcut without terms has any strides, and may have fewer channels than the result:
        nothing is added to the others.
        """

    def relu_gradient(
        self, grad: Tensor, y: Tensor, branches: list[Activation]
    ) -> tuple[Tensor, list[Tensor]]:
        """g = grad where y > 0, else 0, and the sums of each branch's normalisation."""

    def merge_sums(self, sums: Tensor) -> Tensor:
        """The (1, 2, K) sums of all parts together."""

    def bn_slopes(
        self, sums: Tensor, total: Tensor, terms: Tensor, frozen: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Slopes (from the sums `total` of all ranks) and the gradients of the normalisation's
        weight and bias (from this rank's `sums`), float32."""

    def dgrad(
        self,
        gradient: RawGradient,
        conv: Convolution,
        shape: torch.Size,
        below: Activation | None,
        add: Tensor | None,
        add_stride: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient (+ add) of a convolution's input of the given shape.

        With `add_stride`, add (N, >= C, P, Q) belongs to every so manieth row and column, and its
        first C channels count: the gradient of a strided identity that was padded with channels.

        Where the input is the activation `below`, its ReLU's mask is applied and the sums of its
        normalisation are returned too.
        """

    def wgrad(self, gradient: RawGradient, x: Tensor | Activation, conv: Convolution) -> Tensor:
        """The gradient of the convolution's weight, summed in float32, of the weight's dtype."""

    def bn_relu_pool(self, x: Activation, pool: MaxPool) -> Tensor:
        """max_pool(activation)."""

    def pool_gradient(self, grad: Tensor, x: Activation, pool: MaxPool) -> tuple[Tensor, Tensor]:
        """The gradient of the normalised x, through ReLU and pooling (of equal values the first
        in the window takes it, as in PyTorch), and the sums of the normalisation."""
