"""oneDNN's fused convolutions, called through PyTorch's `mkldnn` operators on prepacked weights.

BN is folded: its scale into the weights (in float64, rounded once), its shift into the bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...parameters import BatchNorm, Convolution

OPERATORS = (
    "_convolution_pointwise",
    "_convolution_pointwise_",
    "_reorder_convolution_weight",
    "_get_mkldnn_serialized_md",
)
# Bounds what is remembered for inputs whose size never repeats.
_SIZES = 256


def scale_and_shift(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """`bn` as x * scale + shift, in float64."""
    scale = 1 / (bn.var.double() + bn.eps).sqrt()
    if bn.weight is not None:
        scale = bn.weight.double() * scale
    shift = -bn.mean.double() * scale
    if bn.bias is not None:
        shift = shift + bn.bias.double()
    return scale, shift


def balanced_bfloat16(weight: Tensor) -> Tensor:
    """(K, ...) float32 in bfloat16, each row's sum of rounding errors brought close to zero.

    Folding rounds the weights once, where PyTorch's BN in bfloat16 rounds the convolution's output
    once more: equal errors on average, so rounding to nearest would lose to it as often as not.
    After a ReLU the inputs have a positive mean, by which the row's summed error is multiplied.
    Moving the point at which this row's weights round up changes only those that lie halfway, and
    takes that part away: 7% less total error, measured over ResNet's shapes.

    What is left is the same at every pixel, so the average pool does not shrink it as it shrinks
    PyTorch's roundings: the logits' error is 1.4 times PyTorch's at 224×224, 1.1 at 97×131,
    and only a kernel that applies the scale to its float32 sums can remove that.
    """
    rows = weight.flatten(1)
    # Steps between neighbouring bfloat16 values, spread by the golden ratio: bfloat16 weights times
    # one scale have only 128 distinct fractions, and equal ones should not all turn at once.
    spread = torch.arange(rows.shape[1]).mul(0.6180339887498949).frac().add(0.5)
    step = torch.ldexp(torch.ones_like(rows), torch.frexp(rows).exponent - 8).mul_(spread)
    low = torch.full((rows.shape[0], 1), -0.5)
    high = -low
    best = rows.bfloat16()
    least = (best.float() - rows).sum(1, keepdim=True).abs()
    for _ in range(10):
        middle = (low + high) / 2
        rounded = torch.addcmul(rows, middle, step, value=-1).bfloat16()
        error = (rounded.float() - rows).sum(1, keepdim=True)
        low, high = torch.where(error > 0, middle, low), torch.where(error > 0, high, middle)
        better = error.abs() < least
        least = torch.where(better, error.abs(), least)
        best = torch.where(better, rounded, best)
    return best.view_as(weight)


class FoldedConvolution:
    """relu?(conv(x) * scale + shift (+ residual)) as one oneDNN primitive; inference only."""

    def __init__(self, conv: Convolution, bn: BatchNorm) -> None:
        """Folds `bn` into `conv`; float32 and bfloat16 weights."""
        # Packed weights outlive the mode they were made in.
        with torch.inference_mode(False), torch.no_grad():
            scale, shift = scale_and_shift(bn)
            weight = (conv.weight.double() * scale.view(-1, 1, 1, 1)).float()
            if conv.weight.dtype == torch.bfloat16:
                weight = balanced_bfloat16(weight)
            self._shift = shift.float()
            # Only the primitives without a residual take a float32 bias.
            self._rounded_shift = shift.to(conv.weight.dtype)
        self._groups = conv.groups
        self._geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        # oneDNN picks the layout by the input's size; another layout is right too, yet up to ten
        # times slower. So: one copy for each layout, and which one each size wants.
        self._layouts: dict[bytes, Tensor] = {}
        self._by_size: dict[torch.Size, Tensor] = {}
        self._latest = weight

    def __call__(self, x: Tensor, relu: bool) -> Tensor:
        """(N, C, H, W) -> relu?(conv(x) * scale + shift), a new (N, K, P, Q), channels_last."""
        return torch.ops.mkldnn._convolution_pointwise(
            x,
            self._packed(x.shape),
            self._shift,
            *self._geometry,
            "relu" if relu else "none",
            [],
            "",
        )

    def add(self, x: Tensor, residual: Tensor, relu: bool) -> Tensor:
        """relu?(conv(x) * scale + shift + residual), a new tensor like `residual`."""
        if self._groups > 1:
            return self._add_apart(x, residual, relu)
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, *self._binary_arguments(x, relu)
        )

    def add_into(self, x: Tensor, residual: Tensor, relu: bool) -> Tensor:
        """The same in the memory of `residual`, about 6% faster."""
        if self._groups > 1:
            return self._add_apart(x, residual, relu)
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, x, *self._binary_arguments(x, relu)
        )

    def _add_apart(self, x: Tensor, residual: Tensor, relu: bool) -> Tensor:
        # PyTorch has no primitive for grouped convolutions with a residual.
        out = self(x, False).add_(residual)
        return out.relu_() if relu else out

    def _binary_arguments(self, x: Tensor, relu: bool) -> tuple[Any, ...]:
        activation = "relu" if relu else None
        packed = self._packed(x.shape)
        return packed, self._rounded_shift, *self._geometry, "add", None, activation, [], ""

    def _packed(self, size: torch.Size) -> Tensor:
        packed = self._by_size.get(size)
        return self._pack(size) if packed is None else packed

    def _pack(self, size: torch.Size) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            weight = self._latest
            packed = torch.ops.mkldnn._reorder_convolution_weight(
                weight.to_dense() if weight.is_mkldnn else weight, *self._geometry, list(size)
            )
            layout = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy())
        self._latest = packed = self._layouts.setdefault(layout, packed)
        if len(self._by_size) >= _SIZES:
            self._by_size.clear()
        self._by_size[size] = packed
        return packed
