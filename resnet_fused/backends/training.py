"""What a backend provides for training: the pieces that a residual block's step is made of.

Batch norm cannot normalise a convolution's result in the pass that makes it. So convolutions take
statistics while they write, and in backward apply the ReLU below and take its normalisation's sums;
activations and gradients of pre-BN outputs are formed in one pass each, once for all that read
them.

Vectors of one layer of K channels, float32 (float64 where the activations are float64):
    moments (T, 3, K): mean, sum of squared deviations from it, and count, of T parts of the batch.
    scale_shift (6, K): the rows named below, of which an activation, relu((pre_bn - mean) · scale
        + shift), takes the first three.
    sums (T, 2, K): of g and of g · (pre_bn - mean), g the gradient of the normalised result.
    coefficients (4, K): a, b, d, mean; the gradient of the pre-BN output is
        a·g + b·(pre_bn - mean) + d.

The 1×1 convolutions at a block's end have the widest results, four times their operands. Where
ends are folded, these results h·Wᵀ are never stored. With m and C the mean and the sum of squared
deviations (a matrix) of the operand h, their mean is W·m and their squared deviations are the
diagonal of W·C·Wᵀ, so that the forward pass is that of inference. Backward, with P = Σ g·hᵀ:
    sums: Σ g and the diagonal of W·Pᵀ, less mean · Σ g;
    the weight's gradient: a·P + b·W·C + v·Σhᵀ with v = b·(W·m - mean) + d;
    the operand's: (Wᵀ·a)·g + M·h + c with M = Wᵀ·b·W, c = Wᵀ·v - M·m.
Of h between forward and backward a layer keeps `products` (K + 1, C): W·C, and m.
Of the block's result such an end may write the signs too, a bit an element, which backward then
reads in the result's place:
    signs (N, 8·⌈K / 64⌉, P, Q), uint8, channels_last: in bit j of a position's byte 8·i + b,
        whether the result is positive (NaN is not) in channel 64·i + 8·j + b. Channels lie so in
        what tensor cores leave to a thread, and 8 neighbours have one bit of 8 neighbouring bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..parameters import (
    Activation,
    Convolution,
    Folded,
    Layer,
    MaxPool,
    OperandTerm,
    PreBnGradient,
)


class Replays(Protocol):
    """How launches of the pieces are recorded and run again."""

    extension: ModuleType  # whose `Recorder` sees the launches

    def state(self) -> Hashable:
        """All that decides, beside the pieces and their arguments, what they launch."""

    def operands(self, weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The weights as launches for activations of that type read them, which PyTorch makes at
        each use (`backends.recording.weights`); themselves where they read any."""

    def allocator(
        self,
        device: torch.device,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
    ) -> Callable[[], Tensor]:
        """Makes uninitialised tensors without gaps, where results of a step lie."""

    def replay(self, program: Any, device: torch.device, tensors: list[int]) -> None:
        """Runs recorded launches on the tensors at these addresses (`Program.run`)."""


class FoldedEnds(Protocol):
    """The pieces of a block whose end is folded, beside those of `TrainingKernels`."""

    @property
    def signs(self) -> bool:
        """Whether backward is to read signs: not where writing them takes as long as that saves."""

    def operand_moments(self, x: Tensor, conv: Convolution) -> tuple[Tensor, Tensor]:
        """The (1, 3, K) moments of a 1×1 convolution's result, from those of its operand x; and
        its `products`. Deviations are taken from x's first position before they are multiplied,
        so that a large mean loses nothing."""

    def folded_end(
        self, main: Folded, shortcut: Tensor | Folded | None, signs: bool
    ) -> tuple[Tensor, Tensor | None]:
        """relu(main + shortcut), rounded once, and its signs if they are asked for; a shortcut as
        in `bn_add_relu`."""

    def relu_gradient_sum(
        self, grad: Tensor, y: Tensor | None, signs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """g = grad where y > 0, else 0, and sums of which the second row is zero; by y's signs, or
        by y where they are None."""

    def folded_sums(self, sums: Tensor, gradient: Tensor, end: Folded) -> Tensor:
        """The (1, 2, K) sums of a folded normalisation, from those of g and P, (K, C, 1, 1)."""

    def folded_gradients(
        self,
        gradient: Tensor | None,
        products: Tensor | None,
        sums: Tensor,
        coefficients: Tensor,
        end: Folded,
        frozen: bool,
    ) -> tuple[Tensor | None, Convolution, OperandTerm | None]:
        """The gradient of the convolution's weight, of its dtype, from P, unless that is None; and
        what to take x's gradient by: the convolution that is scaled by a, and, unless frozen, the
        rest."""


class TrainingKernels(Protocol):
    """The pieces. Activations are channels_last, sums are taken in float32 in a fixed order."""

    @property
    def replays(self) -> Replays | None:
        """None where the pieces do not consist of recorded launches."""

    def saves_all(self) -> bool:
        """Whether a block saves each layer's pre-BN output, also one that could be computed again
        by reading less than it takes to read it back."""

    def is_profitable(self, layers: Sequence[Layer]) -> bool:
        """Whether a block of these layers is expected to train faster by the pieces than module by
        module, where nothing was measured."""

    def folded_ends(self, dtype: torch.dtype) -> FoldedEnds | None:
        """What folds 1×1 convolutions at the end of a block of that dtype into it, if anything."""

    def conv_stats(
        self, x: Tensor, conv: Convolution, statistics: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The convolution of x, and the moments of the result as stored (rounded)."""

    def merge_moments(self, moments: Tensor) -> Tensor:
        """The (1, 3, K) moments of all parts together."""

    def bn_scale_shift(self, moments: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """`scale_shift` of the normalisation with the merged moments."""

    def bn_add_relu(self, main: Activation, shortcut: Tensor | Activation | None) -> Tensor:
        """relu(main's normalisation + shortcut, itself normalised if it is an `Activation`).

        A shortcut that is a tensor has any strides, and may have fewer channels than the result:
        nothing is added to the others. Without a shortcut it forms the activation `main`.
        """

    def relu_gradient(
        self, grad: Tensor, y: Tensor, branches: list[Activation]
    ) -> tuple[Tensor, list[Tensor]]:
        """g = grad where y > 0, else 0, and the sums of each branch's normalisation."""

    def merge_sums(self, sums: Tensor) -> Tensor:
        """The (1, 2, K) sums of all parts together."""

    def bn_backward_coefficients(
        self, sums: Tensor, total: Tensor, scale_shift: Tensor, frozen: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """BN-backward coefficients (from the sums `total` of all ranks) and the gradients of the
        normalisation's weight and bias (from this rank's `sums`), float32."""

    def pre_bn_gradient(self, gradient: PreBnGradient) -> Tensor:
        """The gradient, formed; of the dtype of `gradient.grad`."""

    def dgrad(
        self,
        g: Tensor,
        conv: Convolution,
        shape: torch.Size,
        below: Activation | None,
        add: Tensor | None,
        add_stride: int | None = None,
        term: OperandTerm | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient (+ add) of a convolution's input of that shape, g being its result's.

        With `add_stride`, add (N, >= C, P, Q) belongs to every `add_stride`-th row and column, and
        its first C channels count: the gradient of a strided identity that was padded with
        channels.

        Where the input is the activation `below`, its ReLU's mask is applied and the sums of its
        normalisation are returned too.

        `term` is what a folded end adds (`FoldedEnds.folded_gradients`).
        """

    def wgrad(self, g: Tensor, x: Tensor, conv: Convolution) -> Tensor:
        """The gradient of the convolution's weight, g being its result's; summed in float32, of
        the weight's dtype."""

    def bn_relu_pool(self, x: Activation, pool: MaxPool) -> tuple[Tensor, Tensor]:
        """max_pool(activation), and where in its window each maximum stands: row · kernel + column,
        uint8; of equal values the first, as in PyTorch."""

    def pool_gradient(
        self, grad: Tensor, x: Activation, argmax: Tensor, pool: MaxPool
    ) -> tuple[Tensor, Tensor]:
        """The gradient of the normalised x, through ReLU and pooling, and the sums of the
        normalisation."""
