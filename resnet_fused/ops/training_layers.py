"""What the training ops share: layers, their checks, statistics, and synchronisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.training import TrainingKernels
from ..parameters import MEAN, UNBIASED_VAR, BatchNorm, Convolution, Layer
from ..reference.training import ReferenceTraining
from .checks import check_batch_norm, convolution_shape
from .dispatch import chosen_backend, serving, use_backend
from .modes import refuse_tangents
from .registry import library

_WINDOW = 7  # integers that describe a convolution: stride, padding, dilation, groups

LAYERS_SCHEMA = (
    "Tensor[] weights, Tensor[] bn_weights, Tensor[] bn_biases, Tensor[] frozen_means, "
    "Tensor[] frozen_vars, int[] windows, bool[] frozen, float[] eps"
)


class LayerArguments(NamedTuple):
    """Layers as the op schemas take them (`LAYERS_SCHEMA`)."""

    weights: list[Tensor]
    bn_weights: list[Tensor]
    bn_biases: list[Tensor]
    frozen_means: list[Tensor]
    frozen_vars: list[Tensor]
    windows: list[int]
    frozen: list[bool]
    eps: list[float]


def flatten(layers: Sequence[Layer]) -> LayerArguments:
    """Schema arguments of layers."""
    flat = LayerArguments([], [], [], [], [], [], [], [])
    for conv, weight, bias, eps, frozen in layers:
        flat.weights.append(conv.weight)
        flat.bn_weights.append(weight)
        flat.bn_biases.append(bias)
        if frozen is not None:
            flat.frozen_means.append(frozen[0])
            flat.frozen_vars.append(frozen[1])
        windows = (*conv.stride, *conv.padding, *conv.dilation, conv.groups)
        flat.windows.extend(map(int, windows))
        flat.frozen.append(frozen is not None)
        flat.eps.append(eps)
    return flat


def convolutions(weights: Sequence[Tensor], windows: Sequence[int]) -> list[Convolution]:
    """The convolutions of flattened layers."""
    found = []
    for i, weight in enumerate(weights):
        w = windows[i * _WINDOW : (i + 1) * _WINDOW]
        found.append(Convolution(weight, (w[0], w[1]), (w[2], w[3]), (w[4], w[5]), w[6]))
    return found


def check_layer(
    name: str, shape: Sequence[int], x: Tensor, layers: LayerArguments, i: int, sync_group: str
) -> tuple[int, int, int, int]:
    """Checks layer `i` for an input of the given shape that is like `x`; its result's shape."""
    conv = convolutions(layers.weights, layers.windows)[i]
    if conv.weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{name}.weight is {conv.weight.dtype} and the input {x.dtype}; convert one of them "
            "(model.to(dtype) or x.to(dtype)) or use torch.autocast."
        )
    if conv.weight.device != x.device:
        raise ValueError(
            f"{name}.weight is on {conv.weight.device} and the input on {x.device}; "
            "move one of them."
        )
    like = torch.empty(shape, dtype=conv.weight.dtype, device="meta")
    result = convolution_shape(name, like, conv._replace(weight=conv.weight.to("meta")))
    vectors = [layers.bn_weights[i], layers.bn_biases[i]]
    if layers.frozen[i]:
        index = sum(layers.frozen[:i])
        vectors += [layers.frozen_means[index], layers.frozen_vars[index]]
    for weight, bias in zip(vectors[::2], vectors[1::2], strict=True):
        check_batch_norm(f"{name}.bn", BatchNorm(weight, bias, None, None), result[1], x)
    if not layers.frozen[i] and not sync_group and result[0] * result[2] * result[3] == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{list(result)}; use a larger batch or image, or freeze the normalisation."
        )
    return result


def kernels(x: Tensor) -> TrainingKernels:
    """The training pieces of the backend chosen for `x`, else of the first that has any, else the
    plain PyTorch ones."""
    found = (backend.training for backend in serving(x))
    return next((kernels for kernels in found if kernels is not None), ReferenceTraining())


def gather(parts: Tensor, sync_group: str) -> Tensor:
    """One part of each rank, in rank order, which is the same on all ranks; this rank's for ""."""
    if not sync_group:
        return parts
    from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
        _resolve_process_group,
    )

    group = _resolve_process_group(sync_group)  # type: ignore[arg-type]
    parts = parts.contiguous()
    ranks = [torch.empty_like(parts) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, parts, group=group)
    return torch.cat(ranks)


def layer_scale_shift(
    pieces: TrainingKernels,
    layers: LayerArguments,
    i: int,
    moments: Tensor | None,
    sync_group: str,
) -> Tensor:
    """Layer `i`'s scale and shift from frozen statistics, the batch's, or all ranks' batches'."""
    if moments is None:
        index = sum(layers.frozen[:i])
        mean, var = layers.frozen_means[index], layers.frozen_vars[index]
        mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
        moments = torch.stack([mean, var.to(mean.dtype), torch.ones_like(mean)])[None]
    elif sync_group:
        moments = gather(pieces.merge_moments(moments), sync_group)
    return pieces.bn_scale_shift(moments, layers.bn_weights[i], layers.bn_biases[i], layers.eps[i])


def batch_statistics(scale_shift: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance (K,) of a layer: what running statistics take in."""
    return scale_shift[MEAN], scale_shift[UNBIASED_VAR]


def layer_backward_coefficients(
    pieces: TrainingKernels,
    sums: Tensor,
    scale_shift: Tensor,
    frozen: bool,
    sync_group: str,
    goes_on: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """BN-backward coefficients over all ranks, and this rank's gradients of bn weight and bias.

    goes_on: whether the coefficients are wanted, because the convolution or what is below it needs
    a gradient; if not, no rank waits for the others.
    """
    total = sums
    if sync_group and not frozen and goes_on:
        sums = pieces.merge_sums(sums)
        total = gather(sums, sync_group)
    return pieces.bn_backward_coefficients(sums, total, scale_shift, frozen)


def define(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers an op with its own schema and returns it; it runs on its input's device."""

    def run_there(x: Tensor, *arguments: Any) -> Any:
        refuse_tangents(name, (x, arguments))
        with torch.cuda.device_of(x):
            return run(x, *arguments)

    library.define(name + schema)
    library.impl(name, run_there, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_fused::{name}", fake, lib=library)
    op: Callable[..., Any] = getattr(torch.ops.resnet_fused, name).default
    return op


def differentiate(
    name: str,
    setup: Callable[..., None],
    backward: Callable[..., tuple[Any, ...]],
    backward_name: str,
) -> None:
    """Registers the gradient of an op, itself an op, and that there is no second one."""

    def refuse(*_: Any) -> None:
        raise NotImplementedError(
            f"resnet_fused.{name} has no second derivative; run the model with "
            'resnet_fused.use_backend("reference") for gradients of gradients.'
        )

    def setup_here(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = chosen_backend()
        setup(ctx, inputs, output)

    def backward_there(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        with use_backend(ctx.backend):  # autograd may run it in a thread of its own
            return backward(ctx, *grads)

    torch.library.register_autograd(
        f"resnet_fused::{name}", backward_there, setup_context=setup_here, lib=library
    )
    torch.library.register_autograd(f"resnet_fused::{backward_name}", refuse, lib=library)
