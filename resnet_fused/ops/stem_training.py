"""The stem in training: max_pool(relu(bn(conv(x)))) with batch statistics, one op each way.

Saved for backward: the pre-BN output, where in its window each maximum stands (a byte), and six
numbers per channel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..parameters import Activation, Layer, MaxPool, PreBnGradient
from . import training_programs
from .checks import check_activation, pool_shape
from .registry import autocast_dtype, empty_result
from .training_layers import (
    LAYERS_SCHEMA,
    LayerArguments,
    check_layer,
    convolutions,
    define,
    differentiate,
    flatten,
    kernels,
    layer_backward_coefficients,
    layer_scale_shift,
)

_LARGEST_POOL = 16  # positions of a larger window are no uint8


def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layers, pool, sync_group = LayerArguments(*arguments[:8]), arguments[8:11], arguments[11]
    _shapes(x, layers, MaxPool(*pool), sync_group)
    pieces = kernels(x)
    (conv,) = convolutions(layers.weights, layers.windows)
    pre_bn, moments = pieces.conv_stats(x, conv, not layers.frozen[0])
    scale_shift = layer_scale_shift(pieces, layers, 0, moments, sync_group)
    pooled, argmax = pieces.bn_relu_pool(Activation(pre_bn, scale_shift), MaxPool(*pool))
    return pooled, pre_bn, argmax, scale_shift


def _shapes(
    x: Tensor, layers: LayerArguments, pool: MaxPool, sync_group: str
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Checks everything; shapes of the convolution's result and of the pooled one."""
    check_activation("input", x)
    shape = check_layer("conv", x.shape, x, layers, 0, sync_group)
    if pool.kernel > _LARGEST_POOL:
        raise ValueError(
            f"pool.kernel must be at most {_LARGEST_POOL}, found {pool.kernel}; run the modules."
        )
    return shape, pool_shape(shape, pool)


def _fake_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layers, pool, sync_group = LayerArguments(*arguments[:8]), arguments[8:11], arguments[11]
    pre_bn, pooled = _shapes(x, layers, MaxPool(*pool), sync_group)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        empty_result(x, pooled),
        empty_result(x, pre_bn),
        empty_result(x, pooled).to(torch.uint8),
        x.new_empty((6, pre_bn[1]), dtype=wide),
    )


def _backward(
    grad: Tensor,
    x: Tensor,
    pre_bn: Tensor,
    argmax: Tensor,
    scale_shift: Tensor,
    weight: Tensor,
    windows: list[int],
    frozen: bool,
    pool_kernel: int,
    pool_stride: int,
    pool_padding: int,
    sync_group: str,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pieces = kernels(grad)
    (conv,) = convolutions([weight], windows)
    pool = MaxPool(pool_kernel, pool_stride, pool_padding)
    g, sums = pieces.pool_gradient(grad, Activation(pre_bn, scale_shift), argmax, pool)
    coefficients, gamma, beta = layer_backward_coefficients(
        pieces, sums, scale_shift, frozen, sync_group, needs_x or needs_weight
    )
    x_grad = weight_grad = x.new_empty(0)
    if needs_x or needs_weight:
        g = pieces.pre_bn_gradient(PreBnGradient(g, pre_bn, coefficients, frozen, True))
    if needs_weight:
        weight_grad = pieces.wgrad(g, x, conv)
    if needs_x:
        x_grad, _ = pieces.dgrad(g, conv, x.shape, None, None)
    return x_grad, weight_grad, gamma, beta


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    pre_bn: Tensor,
    argmax: Tensor,
    scale_shift: Tensor,
    weight: Tensor,
    windows: list[int],
    frozen: bool,
    pool_kernel: int,
    pool_stride: int,
    pool_padding: int,
    sync_group: str,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_result(x, x.shape) if needs_x else x.new_empty(0),
        empty_result(weight, weight.shape) if needs_weight else x.new_empty(0),
        scale_shift.new_empty(scale_shift.shape[1]),
        scale_shift.new_empty(scale_shift.shape[1]),
    )


_op = define(
    "stem_training",
    f"(Tensor x, {LAYERS_SCHEMA}, int pool_kernel, int pool_stride, int pool_padding, "
    "str sync_group) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_backward_op = define(
    "stem_training_backward",
    "(Tensor grad, Tensor x, Tensor pre_bn, Tensor argmax, Tensor scale_shift, Tensor weight, "
    "int[] windows, bool frozen, int pool_kernel, int pool_stride, int pool_padding, "
    "str sync_group, bool needs_x, bool needs_weight) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *arguments = inputs
    layers = LayerArguments(*arguments[:8])
    _, pre_bn, argmax, scale_shift = output
    ctx.mark_non_differentiable(pre_bn, argmax, scale_shift)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, pre_bn, argmax, scale_shift, layers.weights[0])
    ctx.rest = layers.windows, layers.frozen[0], *arguments[8:]
    ctx.dtypes = layers.bn_weights[0].dtype, layers.bn_biases[0].dtype
    ctx.frozen_layers = len(layers.frozen_means)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    no_gradient, rest = [None] * ctx.frozen_layers, (None,) * 7
    if grad is None:
        return (None, [None], [None], [None], no_gradient, list(no_gradient), *rest)
    needs_x, needs_weight, needs_gamma, needs_beta = ctx.needs_input_grad[:4]
    x_grad, weight, gamma, beta = _backward_op(
        grad, *ctx.saved_tensors, *ctx.rest, needs_x, needs_weight[0]
    )
    return (
        x_grad if needs_x else None,
        [weight if needs_weight[0] else None],
        [gamma.to(ctx.dtypes[0]) if needs_gamma[0] else None],
        [beta.to(ctx.dtypes[1]) if needs_beta[0] else None],
        no_gradient,
        list(no_gradient),
        *rest,
    )


def _programmed_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    pooled, pre_bn, argmax, scale_shift = _forward(x, *arguments)
    return pooled, [pre_bn, argmax], [scale_shift]


def _programmed(
    backward: Callable[..., tuple[Tensor, ...]],
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weights: list[Tensor],
    saved: list[Tensor],
    scale_shifts: list[Tensor],
    windows: list[int],
    frozen: list[bool],
    *rest: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    *pool_and_group, needs_x, needs_weights, _ = rest
    x_grad, weight, gamma, beta = backward(
        *(grad, x, *saved, *scale_shifts, *weights, windows, frozen[0], *pool_and_group),
        *(needs_x, needs_weights[0]),
    )
    return x_grad, [weight], [gamma], [beta]


_PROGRAMMED = training_programs.ProgrammedOp(
    _programmed_forward,
    functools.partial(_programmed, _backward),
    functools.partial(_programmed, _backward_op),
)

differentiate("stem_training", _save, _differentiate, "stem_training_backward")


def stem_training(
    x: Tensor, layer: Layer, pool: MaxPool | None = None, sync_group: str = ""
) -> tuple[Tensor, Tensor]:
    """max_pool(relu(bn(conv(x)))) with batch statistics, differentiable.

    Args:
        x: (N, C, H, W), floating, any layout.
        layer: the convolution and its normalisation.
        pool: the pooling window; 3×3, stride 2, padding 1 if None.
        sync_group: name of the process group over which statistics are taken; "" for this
            process alone.

    Autocast, the result and errors are those of `residual_block_training`: the pooled (N, K, P, Q)
    and the layer's (6, K) `scale_shift`. Of equal values in a window, the first takes the gradient.
    """
    x = x.to(autocast_dtype(x)) if isinstance(x, Tensor) and x.is_floating_point() else x
    arguments, rest = flatten([layer]), (*(pool or MaxPool()), sync_group)
    replayed = training_programs.run(_PROGRAMMED, x, arguments, rest)
    if replayed is not None:
        y, (scale_shift,) = replayed
        return y, scale_shift
    y, _, _, scale_shift = _op(x, *arguments, *rest)
    return y, scale_shift
