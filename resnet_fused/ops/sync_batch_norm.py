"""Synchronised batch norm by itself, in the collectives of the fused training ops.

For layers that run module by module on one rank while another rank fuses them: both then exchange
the same tensors in the same order. Its arithmetic is the reference's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..parameters import Activation, BatchNorm, PreBnGradient
from ..reference import training
from ..reference.ops import nhwc
from .checks import check_activation, check_batch_norm
from .registry import empty_result
from .training_layers import define, differentiate, gather

_pieces = training.ReferenceTraining()


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, sync_group: str
) -> tuple[Tensor, Tensor]:
    moments = gather(training.moments(x), sync_group)
    scale_shift = _pieces.bn_scale_shift(moments, weight, bias, eps)
    return training.normalise(Activation(x, scale_shift)), scale_shift


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, sync_group: str
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return empty_result(x, x.shape), x.new_empty((6, x.shape[1]), dtype=wide)


def _backward(
    grad: Tensor, x: Tensor, scale_shift: Tensor, sync_group: str, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    sums = training.sums(grad, Activation(x, scale_shift))
    # As in a fused block: nobody gathers for a layer whose input needs no gradient.
    total = gather(sums, sync_group) if needs_x else sums
    coefficients, gamma, beta = _pieces.bn_backward_coefficients(sums, total, scale_shift, False)
    x_grad = x.new_empty(0)
    if needs_x:
        x_grad = nhwc(training.pre_bn_gradient(PreBnGradient(grad, x, coefficients, False)))
    return x_grad, gamma, beta


def _fake_backward(
    grad: Tensor, x: Tensor, scale_shift: Tensor, sync_group: str, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    vector = scale_shift.new_empty(scale_shift.shape[1])
    return empty_result(x, x.shape) if needs_x else x.new_empty(0), vector, vector.clone()


_op = define(
    "sync_batch_norm",
    "(Tensor x, Tensor weight, Tensor bias, float eps, str sync_group) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_backward_op = define(
    "sync_batch_norm_backward",
    "(Tensor grad, Tensor x, Tensor scale_shift, str sync_group, bool needs_x) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.sync_group = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1])
    ctx.dtypes = weight.dtype, bias.dtype


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 5
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    x_grad, gamma, beta = _backward_op(grad, *ctx.saved_tensors, ctx.sync_group, needs_x)
    return (
        x_grad if needs_x else None,
        gamma.to(ctx.dtypes[0]) if needs_weight else None,
        beta.to(ctx.dtypes[1]) if needs_bias else None,
        None,
        None,
    )


differentiate("sync_batch_norm", _save, _differentiate, "sync_batch_norm_backward")


def sync_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, sync_group: str
) -> tuple[Tensor, Tensor]:
    """Batch norm with the statistics of all ranks' batches, differentiable; any device.

    Args:
        x: (N, C, H, W), floating; N may be 0, and differ from rank to rank.
        weight: (C,) of any floating dtype, or None for 1.
        bias: (C,) of any floating dtype, or None for 0.
        sync_group: name of the process group; "" for this process alone.

    Returns (N, C, H, W), channels_last, of x's dtype, and the (6, C) `scale_shift` (rows:
    `resnet_fused.backends.training`), not differentiable. Raises ValueError for shapes and devices
    that disagree and TypeError for dtypes.
    """
    check_activation("input", x)
    channels = x.new_ones(x.shape[1], dtype=torch.float32)
    weight = channels if weight is None else weight
    bias = torch.zeros_like(channels) if bias is None else bias
    check_batch_norm("bn", BatchNorm(channels, channels, weight, bias), x.shape[1], x)
    return _op(x, weight, bias, eps, sync_group)
