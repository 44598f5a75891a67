"""A residual block in training: one op forward and one backward, whatever its layers.

Forward, each convolution takes its result's statistics while it writes; a pass applies its
normalisation and ReLU, and after the last one adds the shortcut.
Saved for backward: pre-BN outputs, the block's result, six numbers per channel. The pre-BN outputs
of 1×1 convolutions at the block's end (the widest of a Bottleneck, and its projection) are not even
saved: computing one again reads a quarter of what reading it back would. Where arithmetic is what
takes the time, on the CPU, they are (`TrainingKernels.saves_all`).
Where the kernels fold a block's end (`TrainingKernels.folded_ends`), these are never stored at all,
and the pre-BN output of a 1×1 convolution at the block's beginning is computed again, where its
input has few channels. Backward asks of the result which elements are positive; where the end
writes that as a bit each (`FoldedEnds.signs`), it is saved beside it, a sixteenth to read.
Backward forms activations again and the gradient of each pre-BN output, once for dgrad and wgrad.
dgrad applies the ReLU below it and takes that normalisation's sums; the first layer's adds the
shortcut's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.arguments import empty_signs
from ..backends.training import FoldedEnds, TrainingKernels
from ..parameters import Activation, Convolution, Folded, Layer, OperandTerm, PreBnGradient
from . import training_programs
from .checks import check_activation
from .registry import autocast_dtype, empty_result
from .training_layers import (
    LayerArguments,
    check_layer,
    convolutions,
    flatten,
    kernels,
    layer_backward_coefficients,
    layer_scale_shift,
)
from .training_op import Gradients, Kept, Results, TrainingOp, Wanted, empty_gradients

# "padded" is the identity at every shortcut_stride-th position, zero in the channels it lacks.
_SHORTCUTS = ("none", "identity", "padded", "projection")

# With 1, a ResNet-50's step would keep 0.454 of eager PyTorch's bytes, with 2 it is 0.42.
_WIDEST_AGAIN = 2


def _main_layers(layers: Sequence[object], shortcut: str) -> int:
    """The number of layers on the main path; a projection follows them."""
    return len(layers) - (shortcut == "projection")


def _is_saved(
    convs: Sequence[Convolution], shortcut: str, all_of_them: bool, folded: bool
) -> list[bool]:
    """Whether each layer's pre-BN output is saved, or computed again in backward.

    A 1×1 convolution at the block's end is cheap beside its result, and nothing follows it. One at
    the beginning reads what is saved anyway; where that has at most _WIDEST_AGAIN times the
    result's channels, it is computed again in the types that fold ends, for the sake of memory.
    """
    last = _main_layers(convs, shortcut) - 1

    def is_cheap(i: int, conv: Convolution) -> bool:
        filters, channels, *window = conv.weight.shape
        if window != [1, 1] or conv.groups > 1:
            return False
        return i >= last or (folded and i == 0 and channels <= _WIDEST_AGAIN * filters)

    return [all_of_them or not is_cheap(i, conv) for i, conv in enumerate(convs)]


def _folded(
    pieces: TrainingKernels, x: Tensor, convs: Sequence[Convolution], shortcut: str
) -> FoldedEnds | None:
    """What folds the convolutions at the block's end, whose results are summed, into it."""
    for conv in convs[_main_layers(convs, shortcut) - 1 :]:
        window = (*conv.weight.shape[2:], *conv.padding, *conv.dilation, conv.groups)
        if window != (1, 1, 0, 0, 1, 1, 1):
            return None
    return pieces.folded_ends(x.dtype)


def _identity(x: Tensor, shortcut: str, stride: int) -> Tensor:
    """The input as the shortcut takes it."""
    return x[:, :, ::stride, ::stride] if shortcut == "padded" else x


def _shapes(
    x: Tensor, layers: LayerArguments, shortcut: str, stride: int, sync_group: str
) -> list[tuple[int, int, int, int]]:
    """Checks everything; shapes of all layers' results."""
    check_activation("input", x)
    if shortcut not in _SHORTCUTS:
        raise ValueError(f"shortcut must be one of {_SHORTCUTS}, found {shortcut!r}.")
    if stride < 1:
        raise ValueError(f"padded_stride must be positive, found {stride}.")
    count = _main_layers(layers.weights, shortcut)
    shapes: list[tuple[int, int, int, int]] = []
    for i in range(len(layers.weights)):
        source = x.shape if i in (0, count) else shapes[i - 1]
        name = "projection" if i == count else f"layers[{i}]"
        shapes.append(check_layer(name, source, x, layers, i, sync_group))
    result = shapes[count - 1]
    other = tuple(_identity(x, shortcut, stride).shape)
    if shortcut == "padded":
        other = (other[0], max(other[1], result[1]), *other[2:])
    if shortcut == "projection":
        other = shapes[-1]
    if shortcut != "none" and other != result:
        raise ValueError(
            f"the shortcut has shape {tuple(other)} and the main path {tuple(result)}; their "
            "sizes, channels and strides must agree."
        )
    return shapes


def _forward(
    x: Tensor, layers: LayerArguments, shortcut: str, stride: int, sync_group: str
) -> Results:
    _shapes(x, layers, shortcut, stride, sync_group)
    pieces = kernels(x)
    convs = convolutions(layers.weights, layers.windows)
    count = _main_layers(convs, shortcut)
    folded = _folded(pieces, x, convs, shortcut)
    keeps = _is_saved(convs, shortcut, pieces.saves_all() and folded is None, folded is not None)
    saved: list[Tensor] = []
    scale_shifts: list[Tensor] = []

    def normalised(i: int, operand: Tensor) -> Activation:
        pre_bn, moments = pieces.conv_stats(operand, convs[i], not layers.frozen[i])
        scale_shifts.append(layer_scale_shift(pieces, layers, i, moments, sync_group))
        if keeps[i]:
            saved.append(pre_bn)
        return Activation(pre_bn, scale_shifts[i])

    operand = x
    for i in range(count - 1):
        operand = pieces.bn_add_relu(normalised(i, operand), None)
    identity = None if shortcut in ("none", "projection") else _identity(x, shortcut, stride)
    if folded is None:
        main = normalised(count - 1, operand)
        other = normalised(count, x) if shortcut == "projection" else identity
        return pieces.bn_add_relu(main, other), saved, scale_shifts
    ends: list[Folded] = []
    for i, end_operand in zip(range(count - 1, len(convs)), (operand, x), strict=False):
        moments = None
        if not layers.frozen[i]:
            moments, products = folded.operand_moments(end_operand, convs[i])
            saved.append(products)
        scale_shifts.append(layer_scale_shift(pieces, layers, i, moments, sync_group))
        ends.append(Folded(end_operand, convs[i], scale_shifts[i]))
    added = ends[1] if shortcut == "projection" else identity
    y, signs = folded.folded_end(ends[0], added, folded.signs)
    if signs is not None:
        saved.append(signs)
    return y, saved, scale_shifts


def _fake_forward(
    x: Tensor, layers: LayerArguments, shortcut: str, stride: int, sync_group: str
) -> Results:
    shapes = _shapes(x, layers, shortcut, stride, sync_group)
    convs = convolutions(layers.weights, layers.windows)
    wide = torch.promote_types(x.dtype, torch.float32)
    pieces, count = kernels(x), _main_layers(convs, shortcut)
    folded = _folded(pieces, x, convs, shortcut)
    saved = []
    keeps = _is_saved(convs, shortcut, pieces.saves_all() and folded is None, folded is not None)
    for i, keep in enumerate(keeps):
        if keep:
            saved.append(empty_result(x, shapes[i]))
        elif folded is not None and i >= count - 1 and not layers.frozen[i]:
            saved.append(x.new_empty((shapes[i][1] + 1, layers.weights[i].shape[1]), dtype=wide))
    if folded is not None and folded.signs:
        saved.append(empty_signs(shapes[count - 1], x))
    return (
        empty_result(x, shapes[count - 1]),
        saved,
        [x.new_empty((6, shape[1]), dtype=wide) for shape in shapes],
    )


class _Gradient(NamedTuple):
    """What a layer's dgrad convolves, by which convolution, and what is added."""

    g: Tensor
    conv: Convolution
    term: OperandTerm | None = None

    def compact(self) -> _Gradient:
        """Of a strided 1×1 convolution as if there were only the positions that it reads."""
        term, stride = self.term, self.conv.stride[0]
        if term is not None:
            term = term._replace(x=term.x[:, :, ::stride, ::stride])
        return _Gradient(self.g, self.conv._replace(stride=(1, 1)), term)


class _Needs(NamedTuple):
    """Which gradients are wanted, by layer: the main path's, then the projection's."""

    x: bool
    weights: list[bool]
    affine: list[bool]
    layers: int  # of the main path

    def below(self, i: int) -> bool:
        """Whether the gradient of layer i's input is needed."""
        before = range(i) if i < self.layers else ()
        return self.x or any(self.weights[j] or self.affine[j] for j in before)

    def pre_bn(self, i: int) -> bool:
        """Whether the gradient of layer i's pre-BN output is needed."""
        return self.weights[i] or self.below(i)

    def layer(self, i: int) -> bool:
        """Whether anything is to be computed at layer i or before it."""
        return self.affine[i] or self.pre_bn(i)


def _backward(kept: Kept, wanted: Wanted, shortcut: str, stride: int, sync_group: str) -> Gradients:
    grad, x, y, weights, saved, scale_shifts, windows, frozen = kept
    pieces = kernels(x)
    convs = convolutions(weights, windows)
    count = _main_layers(convs, shortcut)
    needs = _Needs(*wanted, count)
    folded = _folded(pieces, x, convs, shortcut)
    stored = iter(saved)
    activations: list[Activation | None] = []
    operands: dict[int, Tensor] = {}

    def operand(i: int) -> Tensor:
        """What layer i convolves."""
        below = None if i in (0, count) else activations[i - 1]
        if below is None:
            return x
        if i not in operands:
            operands[i] = pieces.bn_add_relu(below, None)
        return operands[i]

    products: dict[int, Tensor] = {}  # of operands, where layers are folded
    for i, keep in enumerate(
        _is_saved(convs, shortcut, folded is None and len(saved) == len(convs), folded is not None)
    ):
        if folded is not None and i >= count - 1:
            if not frozen[i]:
                products[i] = next(stored)
            activations.append(None)
            continue
        pre_bn = next(stored) if keep else None
        # Of a layer before the end the next one takes its operand from it.
        if pre_bn is None and (
            i < count - 1 or needs.affine[i] or (needs.pre_bn(i) and not frozen[i])
        ):
            pre_bn, _ = pieces.conv_stats(operand(i), convs[i], False)
        activations.append(None if pre_bn is None else Activation(pre_bn, scale_shifts[i]))

    def unneeded() -> list[Tensor]:
        return [x.new_empty(0) for _ in convs]

    weight_grads, gammas, betas = unneeded(), unneeded(), unneeded()

    def unneeded_sums(i: int) -> Tensor:
        """Of a frozen layer whose weight and bias want no gradient."""
        return scale_shifts[i].new_zeros((1, 2, scale_shifts[i].shape[1]))

    def pre_bn_gradient(i: int, g: Tensor, sums: Tensor | None) -> Tensor | None:
        """None where nothing needs it."""
        if sums is None:
            sums = unneeded_sums(i)
        coefficients, gammas[i], betas[i] = layer_backward_coefficients(
            pieces, sums, scale_shifts[i], frozen[i], sync_group, needs.pre_bn(i)
        )
        if not needs.pre_bn(i):
            return None
        activation = activations[i]
        pre_bn = None if activation is None else activation.pre_bn
        # Of the block's end also the shortcut reads it: the identity, or before, the projection.
        last_use = i < count - 1 or (i == count - 1 and shortcut_grad is not g)
        return pieces.pre_bn_gradient(PreBnGradient(g, pre_bn, coefficients, frozen[i], last_use))

    ends = [i for i in range(count - 1, len(convs)) if needs.layer(i)]
    branches = {i: activation for i in ends if (activation := activations[i]) is not None}
    sums: dict[int, Tensor] = {}
    if folded is not None:
        g, g_sums = folded.relu_gradient_sum(grad, y, next(stored) if folded.signs else None)
    else:
        g, found = pieces.relu_gradient(grad, y, list(branches.values()))
        sums = dict(zip(branches, found, strict=True))

    def to_convolve(i: int, g: Tensor, sums: Tensor | None) -> _Gradient | None:
        """What layer i's dgrad convolves; its other gradients are done. None where nothing below
        needs it."""
        if folded is None or i < count - 1:
            gradient = pre_bn_gradient(i, g, sums)
            if gradient is not None and needs.weights[i]:
                weight_grads[i] = pieces.wgrad(gradient, operand(i), convs[i])
                operands.pop(i, None)
            return None if gradient is None else _Gradient(gradient, convs[i])
        end, own = Folded(operand(i), convs[i], scale_shifts[i]), None
        if needs.weights[i] or needs.affine[i] or not frozen[i]:
            like = torch.empty_like(convs[i].weight, dtype=scale_shifts[i].dtype)
            own = pieces.wgrad(g, end.x, convs[i]._replace(weight=like))
            total = folded.folded_sums(g_sums, own, end)
        else:
            total = unneeded_sums(i)
        coefficients, gammas[i], betas[i] = layer_backward_coefficients(
            pieces, total, scale_shifts[i], frozen[i], sync_group, needs.pre_bn(i)
        )
        if not needs.pre_bn(i):
            return None
        weight_grad, scaled, term = folded.folded_gradients(
            own, products.get(i), total, coefficients, end, frozen[i]
        )
        if weight_grad is not None and needs.weights[i]:
            weight_grads[i] = weight_grad
        operands.pop(i, None)
        return _Gradient(g, scaled, term)

    def dgrad(
        gradient: _Gradient,
        shape: torch.Size,
        below: Activation | None,
        add: Tensor | None,
        add_stride: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        above, conv, term = gradient
        return pieces.dgrad(above, conv, shape, below, add, add_stride, term)

    shortcut_grad = g if shortcut in ("identity", "padded") else None
    add_stride = stride if shortcut == "padded" else None
    # The projection first, as autograd goes through modules: ranks that run those gather alike.
    if count in ends:
        projected = to_convolve(count, g, sums.get(count))
        if projected is not None and needs.x:
            shape, apart = x.shape, convs[count].stride
            if folded is not None and apart == (apart[0],) * 2 and apart[0] > 1:
                # Of the positions that it reads alone: the others would be zeros, written and read.
                add_stride = apart[0]
                projected = projected.compact()
                shape = torch.Size((*x.shape[:2], *g.shape[2:]))
            shortcut_grad, _ = dgrad(projected, shape, None, None)
        del projected
    x_grad, layer_sums = x.new_empty(0), sums.get(count - 1)
    for i in reversed(range(count)):
        if not needs.layer(i):
            break
        gradient = to_convolve(i, g, layer_sums)
        if gradient is None or not needs.below(i):
            break
        below = None if i == 0 else activations[i - 1]
        if below is None:
            x_grad, _ = dgrad(gradient, x.shape, None, shortcut_grad, add_stride)
        else:
            g, layer_sums = dgrad(gradient, below.pre_bn.shape, below, None)
    return x_grad, weight_grads, gammas, betas


def _fake_backward(kept: Kept, wanted: Wanted, shortcut: str, *_: Any) -> Gradients:
    needs = _Needs(*wanted, _main_layers(kept.weights, shortcut))
    return empty_gradients(kept, wanted, [needs.layer(i) for i in range(len(kept.weights))])


_op = TrainingOp(
    "residual_block_training",
    "str shortcut, int shortcut_stride, str sync_group",
    _forward,
    _fake_forward,
    _backward,
    _fake_backward,
)


def residual_block_training(
    x: Tensor,
    layers: Sequence[Layer],
    projection: Layer | None = None,
    identity: bool = True,
    sync_group: str = "",
    padded_stride: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """relu(F(x) + shortcut(x)) with batch statistics, differentiable, saved bytes at a minimum.

    Args:
        x: (N, C, H, W), floating; NHWC memory (channels_last) is used as it is, others converted.
        layers: F, convolution and normalisation in turn, a ReLU after each but the last.
        projection: the shortcut's convolution and normalisation, or None.
        identity: without a projection, whether x itself is the shortcut, or there is none.
        sync_group: name of the process group over which statistics are taken; "" for this
            process alone.
        padded_stride: makes the identity the paper's option A: x at every `padded_stride`-th row
            and column, with nothing added to the channels that it lacks.

    Under autocast x is lowered to its dtype; float32 weights are lowered inside, and their
    gradients come back in float32 without having been rounded.

    Returns (N, K, P, Q), channels_last, of x's dtype, and for each layer, the projection last, its
    (6, K) `scale_shift` (rows: `resnet_fused.backends.training`), not differentiable. Raises
    ValueError for shapes and devices that disagree and where a channel has a single value,
    TypeError for dtypes.
    """
    shortcut = "none"
    if identity:
        shortcut = "identity" if padded_stride is None else "padded"
    if projection is not None:
        layers, shortcut = (*layers, projection), "projection"
    x = x.to(autocast_dtype(x)) if isinstance(x, Tensor) and x.is_floating_point() else x
    return training_programs.run(_op, x, flatten(layers), shortcut, padded_stride or 1, sync_group)
