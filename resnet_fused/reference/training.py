"""The plain PyTorch meaning of the training pieces (`resnet_fused.backends.training`).

Float64 inputs give the truth. Any device and floating dtype; also what serves synchronised batch
norm on the CPU, where `nn.SyncBatchNorm` itself refuses to run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ..backends.training import MEAN, SCALE, SHIFT, Activation, RawGradient
from ..parameters import Convolution, MaxPool
from .convolution import convolve
from .ops import pad_channels


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows(x: Tensor) -> Tensor:
    """(positions, channels) in float64, in which PyTorch's batch norm sums on the CPU."""
    return x.double().movedim(1, -1).flatten(0, 2)


def _like_channels(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def _normalised(x: Activation) -> Tensor:
    mean, scale, shift = (_like_channels(x.terms[i]) for i in (MEAN, SCALE, SHIFT))
    return (_wide(x.raw) - mean) * scale + shift


def _value(x: Tensor | Activation) -> Tensor:
    return x if isinstance(x, Tensor) else F.relu(_normalised(x)).to(x.raw.dtype)


def moments(raw: Tensor) -> Tensor:
    """The (1, 3, K) moments of raw (N, K, P, Q), all zero for an empty one."""
    rows = _rows(raw)
    mean = rows.mean(0) if len(rows) else rows.sum(0)
    squares = (rows - mean).square().sum(0)
    found = torch.stack([mean, squares, torch.full_like(mean, len(rows))])[None]
    return found.to(_wide(raw).dtype)


def normalise(x: Activation) -> Tensor:
    """(raw - mean) · scale + shift, channels_last, of raw's dtype."""
    out = _normalised(x).to(x.raw.dtype)
    return out.contiguous(memory_format=torch.channels_last)


def sums(g: Tensor, x: Activation) -> Tensor:
    """The (1, 2, K) sums of the gradient `g` of x's normalisation."""
    rows = _rows(g)
    found = torch.stack([rows.sum(0), (rows * (_rows(x.raw) - x.terms[MEAN])).sum(0)])[None]
    return found.to(x.terms.dtype)


def raw_gradient(gradient: RawGradient) -> Tensor:
    """The gradient of a raw result, formed; of the dtype of `gradient.grad`."""
    a, b, d, mean = (_like_channels(v) for v in gradient.slopes)
    out = a * _wide(gradient.grad)
    if not gradient.frozen:
        assert gradient.raw is not None
        out = out + b * (_wide(gradient.raw) - mean) + d
    return out.to(gradient.grad.dtype)


class ReferenceTraining:
    """Implements `resnet_fused.backends.training.TrainingKernels`."""

    def conv_stats(
        self, x: Tensor | Activation, conv: Convolution, statistics: bool
    ) -> tuple[Tensor, Tensor | None]:
        value = _value(x)
        raw = convolve(value, conv._replace(weight=conv.weight.to(value.dtype)))
        raw = raw.contiguous(memory_format=torch.channels_last)
        if not statistics:
            return raw, None
        return raw, moments(raw)

    def merge_moments(self, moments: Tensor) -> Tensor:
        mean, squares, count = moments.double().unbind(1)
        total = count.sum(0)
        # Deviations from the first part's mean, not from zero: large means would cancel.
        merged = mean[0] + (count * (mean - mean[0])).sum(0) / total
        squares = squares.sum(0) + (count * (mean - merged).square()).sum(0)
        return torch.stack([merged, squares, total])[None].to(moments.dtype)

    def bn_terms(self, moments: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        mean, squares, count = self.merge_moments(moments.double())[0].unbind(0)
        invstd = (squares / count + eps).rsqrt()
        unbiased = squares / (count - 1).clamp(min=1)
        terms = [mean, weight.double() * invstd, bias.double(), invstd, unbiased, count]
        return torch.stack(terms).to(moments.dtype)

    def bn_add_relu(self, main: Activation, shortcut: Tensor | Activation | None) -> Tensor:
        out = _normalised(main)
        if shortcut is not None:
            if isinstance(shortcut, Tensor):
                shortcut = pad_channels(shortcut, out.shape[1])
            out = out + (shortcut if isinstance(shortcut, Tensor) else _normalised(shortcut))
        return F.relu(out).to(main.raw.dtype)

    def relu_gradient(
        self, grad: Tensor, y: Tensor, branches: list[Activation]
    ) -> tuple[Tensor, list[Tensor]]:
        g = torch.where(y > 0, grad, 0).contiguous(memory_format=torch.channels_last)
        return g, [sums(g, branch) for branch in branches]

    def merge_sums(self, sums: Tensor) -> Tensor:
        return sums.sum(0, keepdim=True)

    def bn_slopes(
        self, sums: Tensor, total: Tensor, terms: Tensor, frozen: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        sum_g, sum_centred = sums.double().sum(0).unbind(0)
        total_g, total_centred = total.double().sum(0).unbind(0)
        mean, scale, _, invstd, _, count = terms.double().unbind(0)
        b = -scale * invstd.square() * total_centred / count
        d = -scale * total_g / count
        if frozen:
            b, d = torch.zeros_like(b), torch.zeros_like(d)
        slopes = torch.stack([scale, b, d, mean]).to(terms.dtype)
        return slopes, (invstd * sum_centred).to(terms.dtype), sum_g.to(terms.dtype)

    def dgrad(
        self,
        gradient: RawGradient,
        conv: Convolution,
        shape: torch.Size,
        below: Activation | None,
        add: Tensor | None,
        add_stride: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        dc = raw_gradient(gradient)
        out = conv2d_input(shape, conv.weight.to(dc.dtype), dc, *conv[1:])
        if add is not None and add_stride is None:
            out = out + add
        elif add is not None:
            out[:, :, ::add_stride, ::add_stride] += add[:, : shape[1]]
        if below is not None:
            out = torch.where(_normalised(below) > 0, out, 0)
        out = out.contiguous(memory_format=torch.channels_last)
        return out, None if below is None else sums(out, below)

    def wgrad(self, gradient: RawGradient, x: Tensor | Activation, conv: Convolution) -> Tensor:
        dc, value = raw_gradient(gradient), _value(x)
        out = conv2d_weight(_wide(value), conv.weight.shape, _wide(dc), *conv[1:])
        return out.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)

    def bn_relu_pool(self, x: Activation, pool: MaxPool) -> Tensor:
        out = F.max_pool2d(_value(x), *pool)
        return out.contiguous(memory_format=torch.channels_last)

    def pool_gradient(self, grad: Tensor, x: Activation, pool: MaxPool) -> tuple[Tensor, Tensor]:
        value = _wide(_value(x))
        _, indices = F.max_pool2d(value, *pool, return_indices=True)
        window = [[size, size] for size in (*pool, 1)]
        g = torch.ops.aten.max_pool2d_with_indices_backward(
            _wide(grad), value, *window, False, indices
        ).to(grad.dtype)
        g = torch.where(value > 0, g, 0).contiguous(memory_format=torch.channels_last)
        return g, sums(g, x)
