"""The plain PyTorch meaning of the training pieces (`resnet_fused.backends.training`).

Float64 inputs give the truth. Any device and floating dtype; also what serves synchronised batch
norm on the CPU, where `nn.SyncBatchNorm` itself refuses to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ..parameters import (
    MEAN,
    SCALE,
    SHIFT,
    Activation,
    Convolution,
    Folded,
    Layer,
    MaxPool,
    OperandTerm,
    PreBnGradient,
)
from .convolution import convolve, well_posed
from .ops import nhwc, pad_channels

if TYPE_CHECKING:
    from ..backends.training import FoldedEnds


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows(x: Tensor) -> Tensor:
    """(positions, channels) in float64, in which PyTorch's batch norm sums on the CPU."""
    return x.double().movedim(1, -1).flatten(0, 2)


def _like_channels(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def _normalised(x: Activation | Folded) -> Tensor:
    mean, scale, shift = (_like_channels(x.scale_shift[i]) for i in (MEAN, SCALE, SHIFT))
    if isinstance(x, Folded):
        weight = _wide(x.conv.weight.to(x.x.dtype))
        return (convolve(_wide(x.x), x.conv._replace(weight=weight)) - mean) * scale + shift
    return (_wide(x.pre_bn) - mean) * scale + shift


def _matrix(conv: Convolution, dtype: torch.dtype) -> Tensor:
    """The weight (K, C) of a 1×1 convolution in float64, as it multiplies inputs of that dtype."""
    return conv.weight.to(dtype).flatten(1).double()


def _operand(x: Tensor, conv: Convolution) -> Tensor:
    """The positions of x that a 1×1 convolution without padding reads."""
    return x[:, :, :: conv.stride[0], :: conv.stride[1]]


def moments(pre_bn: Tensor) -> Tensor:
    """The (1, 3, K) moments of pre_bn (N, K, P, Q), all zero for an empty one."""
    rows = _rows(pre_bn)
    mean = rows.mean(0) if len(rows) else rows.sum(0)
    squares = (rows - mean).square().sum(0)
    found = torch.stack([mean, squares, torch.full_like(mean, len(rows))])[None]
    return found.to(_wide(pre_bn).dtype)


def normalise(x: Activation) -> Tensor:
    """(pre_bn - mean) · scale + shift, channels_last, of pre_bn's dtype."""
    out = _normalised(x).to(x.pre_bn.dtype)
    return out.contiguous(memory_format=torch.channels_last)


def sums(g: Tensor, x: Activation) -> Tensor:
    """The (1, 2, K) sums of the gradient `g` of x's normalisation."""
    rows = _rows(g)
    found = torch.stack([rows.sum(0), (rows * (_rows(x.pre_bn) - x.scale_shift[MEAN])).sum(0)])[
        None
    ]
    return found.to(x.scale_shift.dtype)


def signs_of(y: Tensor) -> Tensor:
    """Of which elements are positive, as `resnet_fused.backends.training` lays them out."""
    positive = F.pad(y > 0, (0, 0, 0, 0, 0, -y.shape[1] % 64)).unflatten(1, (-1, 8, 8))
    found = positive << _bits(y.device)
    return nhwc(found.sum(2, dtype=torch.uint8).flatten(1, 2))


def positive(signs: Tensor, channels: int) -> Tensor:
    """Which elements `signs` says are positive."""
    found = signs.unflatten(1, (-1, 1, 8)) >> _bits(signs.device) & 1
    return found.flatten(1, 3)[:, :channels].bool()


def _bits(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)[:, None, None, None]


def pre_bn_gradient(gradient: PreBnGradient) -> Tensor:
    """The gradient of a pre-BN output, formed; of the dtype of `gradient.grad`."""
    a, b, d, mean = (_like_channels(v) for v in gradient.coefficients)
    out = a * _wide(gradient.grad)
    if not gradient.frozen:
        assert gradient.pre_bn is not None
        out = out + b * (_wide(gradient.pre_bn) - mean) + d
    return out.to(gradient.grad.dtype)


class ReferenceTraining:
    """Implements `TrainingKernels` and `FoldedEnds` of `resnet_fused.backends.training`."""

    replays = None
    signs = True

    def saves_all(self) -> bool:
        return False

    def folded_ends(self, dtype: torch.dtype) -> FoldedEnds | None:
        return None

    def is_profitable(self, layers: Sequence[Layer]) -> bool:
        return False

    def operand_moments(self, x: Tensor, conv: Convolution) -> tuple[Tensor, Tensor]:
        rows, weight = _rows(_operand(x, conv)), _matrix(conv, x.dtype)
        mean = rows.mean(0)
        products = weight @ ((rows - mean).T @ (rows - mean))
        squares = (products * weight).sum(1).clamp(min=0)
        moments = torch.stack([weight @ mean, squares, torch.full_like(squares, len(rows))])[None]
        dtype = _wide(x).dtype
        return moments.to(dtype), torch.cat([products, mean[None]]).to(dtype)

    def folded_end(
        self, main: Folded, shortcut: Tensor | Folded | None, signs: bool
    ) -> tuple[Tensor, Tensor | None]:
        y = self._end(main, shortcut).to(main.x.dtype)
        return y, signs_of(y) if signs else None

    def conv_stats(
        self, x: Tensor, conv: Convolution, statistics: bool
    ) -> tuple[Tensor, Tensor | None]:
        pre_bn = convolve(x, conv._replace(weight=conv.weight.to(x.dtype)))
        pre_bn = pre_bn.contiguous(memory_format=torch.channels_last)
        if not statistics:
            return pre_bn, None
        return pre_bn, moments(pre_bn)

    def merge_moments(self, moments: Tensor) -> Tensor:
        mean, squares, count = moments.double().unbind(1)
        total = count.sum(0)
        # Deviations from the first part's mean, not from zero: large means would cancel.
        merged = mean[0] + (count * (mean - mean[0])).sum(0) / total
        squares = squares.sum(0) + (count * (mean - merged).square()).sum(0)
        return torch.stack([merged, squares, total])[None].to(moments.dtype)

    def bn_scale_shift(self, moments: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        mean, squares, count = self.merge_moments(moments.double())[0].unbind(0)
        invstd = (squares / count + eps).rsqrt()
        unbiased = squares / (count - 1).clamp(min=1)
        scale_shift = [mean, weight.double() * invstd, bias.double(), invstd, unbiased, count]
        return torch.stack(scale_shift).to(moments.dtype)

    def bn_add_relu(self, main: Activation, shortcut: Tensor | Activation | None) -> Tensor:
        return self._end(main, shortcut).to(main.pre_bn.dtype)

    def _end(
        self, main: Activation | Folded, shortcut: Tensor | Activation | Folded | None
    ) -> Tensor:
        out = _normalised(main)
        if isinstance(shortcut, Tensor):
            out = out + pad_channels(shortcut, out.shape[1])
        elif shortcut is not None:
            out = out + _normalised(shortcut)
        return nhwc(F.relu(out))

    def relu_gradient(
        self, grad: Tensor, y: Tensor, branches: list[Activation]
    ) -> tuple[Tensor, list[Tensor]]:
        g = nhwc(torch.where(y > 0, grad, 0))
        return g, [sums(g, branch) for branch in branches]

    def relu_gradient_sum(
        self, grad: Tensor, y: Tensor | None, signs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if signs is None:
            assert y is not None
            signs = signs_of(y)
        g = nhwc(torch.where(positive(signs, grad.shape[1]), grad, 0))
        total = _rows(g).sum(0)
        return g, torch.stack([total, torch.zeros_like(total)])[None].to(_wide(g).dtype)

    def folded_sums(self, sums: Tensor, gradient: Tensor, end: Folded) -> Tensor:
        total, weight = sums[:, 0].double().sum(0), _matrix(end.conv, end.x.dtype)
        centred = (weight * gradient.double().flatten(1)).sum(1) - end.scale_shift[MEAN] * total
        return torch.stack([total, centred])[None].to(sums.dtype)

    def folded_gradients(
        self,
        gradient: Tensor | None,
        products: Tensor | None,
        sums: Tensor,
        coefficients: Tensor,
        end: Folded,
        frozen: bool,
    ) -> tuple[Tensor | None, Convolution, OperandTerm | None]:
        (x, conv, _), (a, b, d, mean) = end, coefficients.double()[:, :, None]
        weight = _matrix(conv, x.dtype)
        scaled = conv._replace(weight=nhwc((a * weight).to(x.dtype).view(conv.weight.shape)))
        total = None if gradient is None else a * gradient.double().flatten(1)
        term = None
        if not frozen:
            assert total is not None
            assert products is not None
            own = products[-1].double()
            rest = b * ((weight @ own)[:, None] - mean) + d
            positions = _operand(x, conv)[:, 0].numel()
            total = total + b * products[:-1].double() + rest * own * positions
            matrix = (weight.T @ (b * weight)).to(x.dtype)
            # What rounding did to both matrices then acts on deviations from the mean alone.
            lost = a * weight - scaled.weight.flatten(1).double()
            means = sums[0, 0].double()[:, None] / positions
            offset = (weight * rest + lost * means).sum(0) - matrix.double() @ own
            term = OperandTerm(x, matrix, offset.to(coefficients.dtype))
        if total is None:
            return None, scaled, term
        return nhwc(total.to(conv.weight.dtype).view(conv.weight.shape)), scaled, term

    def merge_sums(self, sums: Tensor) -> Tensor:
        return sums.double().sum(0, keepdim=True).to(sums.dtype)

    def bn_backward_coefficients(
        self, sums: Tensor, total: Tensor, scale_shift: Tensor, frozen: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        sum_g, sum_centred = sums.double().sum(0).unbind(0)
        total_g, total_centred = total.double().sum(0).unbind(0)
        mean, scale, _, invstd, _, count = scale_shift.double().unbind(0)
        b = -scale * invstd.square() * total_centred / count
        d = -scale * total_g / count
        if frozen:
            b, d = torch.zeros_like(b), torch.zeros_like(d)
        coefficients = torch.stack([scale, b, d, mean]).to(scale_shift.dtype)
        return (
            coefficients,
            (invstd * sum_centred).to(scale_shift.dtype),
            sum_g.to(scale_shift.dtype),
        )

    def pre_bn_gradient(self, gradient: PreBnGradient) -> Tensor:
        return pre_bn_gradient(gradient)

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
        weight = conv.weight.to(g.dtype)
        if term is None:
            out = conv2d_input(shape, weight, g, *conv[1:])
        else:  # rounded once, behind the sum
            out = conv2d_input(shape, _wide(weight), _wide(g), *conv[1:])
            matrix = Convolution(_wide(term.matrix)[:, :, None, None])
            product = convolve(_wide(_operand(term.x, conv)), matrix)
            _operand(out, conv).add_(product + _like_channels(term.offset))
        if add is not None and add_stride is None:
            out = out + add
        elif add is not None:
            out[:, :, ::add_stride, ::add_stride] += add[:, : shape[1]]
        if below is not None:
            out = torch.where(_normalised(below) > 0, out, 0)
        out = nhwc(out.to(g.dtype))
        return out, None if below is None else sums(out, below)

    def wgrad(self, g: Tensor, x: Tensor, conv: Convolution) -> Tensor:
        x, posed = well_posed(_wide(x), conv)
        out = conv2d_weight(x, conv.weight.shape, _wide(g), *posed[1:])
        return out.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)

    def bn_relu_pool(self, x: Activation, pool: MaxPool) -> tuple[Tensor, Tensor]:
        value = self.bn_add_relu(x, None)
        out, index = F.max_pool2d(value, *pool, return_indices=True)
        rows, columns = (torch.arange(size, device=out.device) for size in out.shape[2:])
        height = index // value.shape[3] - (rows * pool.stride - pool.padding)[:, None]
        width = index % value.shape[3] - (columns * pool.stride - pool.padding)
        return nhwc(out), nhwc((height * pool.kernel + width).to(torch.uint8))

    def pool_gradient(
        self, grad: Tensor, x: Activation, argmax: Tensor, pool: MaxPool
    ) -> tuple[Tensor, Tensor]:
        value, place = _wide(self.bn_add_relu(x, None)), argmax.long()
        rows, columns = (torch.arange(size, device=grad.device) for size in grad.shape[2:])
        height = place // pool.kernel + (rows * pool.stride - pool.padding)[:, None]
        width = place % pool.kernel + (columns * pool.stride - pool.padding)
        window = [[size, size] for size in (*pool, 1)]
        g = torch.ops.aten.max_pool2d_with_indices_backward(
            _wide(grad), value, *window, False, height * value.shape[3] + width
        ).to(grad.dtype)
        g = nhwc(torch.where(value > 0, g, 0))
        return g, sums(g, x)


def residual_block(
    x: Tensor,
    layers: Sequence[Layer],
    projection: Layer | None,
    identity: bool,
    padded_stride: int | None,
    pool: MaxPool | None,
) -> Tensor:
    """What the training ops mean, in the order of their modules: relu(F(x) + shortcut(x)), or
    max_pool(relu(F(x))) where there is a pool."""

    def normalised(x: Tensor, layer: Layer) -> Tensor:
        conv, weight, bias, eps, frozen = layer
        mean, var = (None, None) if frozen is None else frozen
        out = convolve(x, conv)
        if x.dtype == torch.float64:
            weight, bias = weight.double(), bias.double()
        return F.batch_norm(out, mean, var, weight, bias, frozen is None, 0.0, eps)

    out = x
    for layer in layers[:-1]:
        out = F.relu(normalised(out, layer))
    out = normalised(out, layers[-1])
    if projection is not None:
        out = out + normalised(x, projection)
    elif identity:
        stride = padded_stride or 1
        out = out + pad_channels(x[:, :, ::stride, ::stride], out.shape[1])
    out = F.relu(out)
    return nhwc(out if pool is None else F.max_pool2d(out, *pool))
