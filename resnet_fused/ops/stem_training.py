"""The stem in training: max_pool(relu(bn(conv(x)))) with batch statistics, one op each way.

Saved for backward: the pre-BN output, where in its window each maximum stands (a byte), and six
numbers per channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..parameters import Activation, Layer, MaxPool, PreBnGradient
from . import training_programs
from .checks import check_activation, pool_shape
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

_LARGEST_POOL = 16  # positions of a larger window are no uint8


def _forward(x: Tensor, layers: LayerArguments, *settings: Any) -> Results:
    pool, sync_group = MaxPool(*settings[:3]), settings[3]
    _shapes(x, layers, pool, sync_group)
    pieces = kernels(x)
    (conv,) = convolutions(layers.weights, layers.windows)
    pre_bn, moments = pieces.conv_stats(x, conv, not layers.frozen[0])
    scale_shift = layer_scale_shift(pieces, layers, 0, moments, sync_group)
    pooled, argmax = pieces.bn_relu_pool(Activation(pre_bn, scale_shift), pool)
    return pooled, [pre_bn, argmax], [scale_shift]


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


def _fake_forward(x: Tensor, layers: LayerArguments, *settings: Any) -> Results:
    pre_bn, pooled = _shapes(x, layers, MaxPool(*settings[:3]), settings[3])
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        empty_result(x, pooled),
        [empty_result(x, pre_bn), empty_result(x, pooled).to(torch.uint8)],
        [x.new_empty((6, pre_bn[1]), dtype=wide)],
    )


def _backward(kept: Kept, wanted: Wanted, *settings: Any) -> Gradients:
    pool, sync_group = MaxPool(*settings[:3]), settings[3]
    grad, x, _, weights, (pre_bn, argmax), (scale_shift,), windows, (frozen,) = kept
    goes_on = wanted.x or wanted.weights[0]
    pieces = kernels(grad)
    (conv,) = convolutions(weights, windows)
    g, sums = pieces.pool_gradient(grad, Activation(pre_bn, scale_shift), argmax, pool)
    coefficients, gamma, beta = layer_backward_coefficients(
        pieces, sums, scale_shift, frozen, sync_group, goes_on
    )
    x_grad = weight_grad = x.new_empty(0)
    if goes_on:
        g = pieces.pre_bn_gradient(PreBnGradient(g, pre_bn, coefficients, frozen, True))
    if wanted.weights[0]:
        weight_grad = pieces.wgrad(g, x, conv)
    if wanted.x:
        x_grad, _ = pieces.dgrad(g, conv, x.shape, None, None)
    return x_grad, [weight_grad], [gamma], [beta]


def _fake_backward(kept: Kept, wanted: Wanted, *_: Any) -> Gradients:
    return empty_gradients(kept, wanted, [True])


_op = TrainingOp(
    "stem_training",
    "int pool_kernel, int pool_stride, int pool_padding, str sync_group",
    _forward,
    _fake_forward,
    _backward,
    _fake_backward,
)


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
    settings = (*(pool or MaxPool()), sync_group)
    y, (scale_shift,) = training_programs.run(_op, x, flatten([layer]), *settings)
    return y, scale_shift
