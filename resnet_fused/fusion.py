"""Reads live modules as op arguments, and says which of them an op can stand for.

A fused op replaces the calls of several modules. That is only right where each is exactly the
layer it looks like and has nobody hooked on to it, and for the ops of inference only where it
normalises with given statistics; everything else gets None here and runs module by module, as in
plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ops.training_layers import Layer, batch_statistics
from .parameters import BatchNorm, Convolution, MaxPool


def untouched(*modules: nn.Module) -> bool:
    """Whether no hook would miss its module's call."""
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in modules
    )


def is_relu(module: nn.Module) -> bool:
    """Whether `module` is a plain ReLU."""
    return type(module) is nn.ReLU and untouched(module)


def convolution(module: nn.Module) -> Convolution | None:
    """The argument group of a bias-free, zero-padded `nn.Conv2d`, else None."""
    if (
        type(module) is not nn.Conv2d
        or module.bias is not None
        or module.padding_mode != "zeros"
        or isinstance(module.padding, str)
        or not untouched(module)
    ):
        return None
    return Convolution(
        module.weight,
        cast("tuple[int, int]", module.stride),
        cast("tuple[int, int]", module.padding),
        cast("tuple[int, int]", module.dilation),
        module.groups,
    )


def batch_norm(module: nn.Module) -> BatchNorm | None:
    """The argument group of a normalisation with given statistics, else None.

    That is `nn.BatchNorm2d` or `nn.SyncBatchNorm` in eval mode with running statistics, and
    torchvision's `FrozenBatchNorm2d` in any mode.
    """
    if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        if module.training or module.running_mean is None:
            return None
    elif type(module).__name__ != "FrozenBatchNorm2d":
        return None
    if not untouched(module):
        return None
    frozen = cast("nn.BatchNorm2d", module)  # the others have the same fields
    return BatchNorm(
        cast("Tensor", frozen.running_mean),
        cast("Tensor", frozen.running_var),
        frozen.weight,
        frozen.bias,
        frozen.eps,
    )


def conv_bn(conv: nn.Module, bn: nn.Module) -> tuple[Convolution, BatchNorm] | None:
    """Argument groups of a convolution and its normalisation, or None if they cannot fuse."""
    convolution_ = convolution(conv)
    batch_norm_ = batch_norm(bn)
    if convolution_ is None or batch_norm_ is None:
        return None
    return convolution_, batch_norm_


def projection_modules(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The two modules of a Sequential(convolution, normalisation) shortcut, else None."""
    if type(module) is not nn.Sequential or len(module) != 2 or not untouched(module):
        return None
    return module[0], module[1]


def projection(module: nn.Module) -> tuple[Convolution, BatchNorm] | None:
    """Argument groups of a Sequential(convolution, normalisation) shortcut, else None."""
    modules = projection_modules(module)
    return None if modules is None else conv_bn(*modules)


class TrainingPlan(NamedTuple):
    """Layers as the training ops take them; `sync_group` is "" where statistics stay local."""

    layers: list[Layer]
    sync_group: str


def training_plan(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> TrainingPlan | None:
    """What the training ops need of (convolution, normalisation) pairs, else None.

    Each normalisation, affine, takes the batch's statistics, those of a process group's batches
    (`nn.SyncBatchNorm`; one group for all), or given ones (`batch_norm`).
    """
    layers: list[Layer] = []
    groups: set[str] = set()
    for conv, bn in pairs:
        convolution_ = convolution(conv)
        weight = getattr(bn, "weight", None)  # nn.Identity has none
        if convolution_ is None or not isinstance(weight, Tensor):
            return None
        given = batch_norm(bn)
        if given is None:
            if type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm) or not untouched(bn):
                return None
            groups.add(_sync_group(bn))
        layers.append(
            Layer(
                convolution_,
                weight,
                cast("Tensor", bn.bias),
                cast("float", bn.eps),
                None if given is None else (given.mean, given.var),
            )
        )
    if len(groups) > 1:
        return None
    return TrainingPlan(layers, groups.pop() if groups else "")


def _sync_group(bn: nn.Module) -> str:
    """The process group that `bn` synchronises with, as PyTorch decides it; "" if none."""
    if type(bn) is not nn.SyncBatchNorm or not bn.training:
        return ""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    group = bn.process_group or dist.group.WORLD
    assert group is not None
    return str(group.group_name) if dist.get_world_size(group) > 1 else ""


@torch.no_grad()
def track_statistics(norms: Sequence[nn.Module], terms: Sequence[Tensor]) -> None:
    """Updates running statistics after a training op, as `nn.BatchNorm2d` does in its forward.

    terms: the layers' (6, K) terms from the op.
    """
    by_weight: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for bn, layer_terms in zip(norms, terms, strict=True):
        if not isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm)) or not bn.training:
            continue
        if not bn.track_running_stats or bn.running_mean is None or bn.running_var is None:
            continue
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
        mean, var = batch_statistics(layer_terms)
        pairs = ((bn.running_mean, mean), (bn.running_var, var))
        if bn.momentum is None:  # the average of all batches, its count on the device
            assert bn.num_batches_tracked is not None
            for running, new in pairs:
                running.lerp_(new.to(running.dtype), bn.num_batches_tracked.to(running.dtype) ** -1)
            continue
        olds, news = by_weight.setdefault(bn.momentum, ([], []))
        for running, new in pairs:
            olds.append(running)
            news.append(new.to(running.dtype))
    for weight, (olds, news) in by_weight.items():
        torch._foreach_lerp_(olds, news, weight)


def max_pool(module: nn.Module) -> MaxPool | None:
    """The argument group of a square, undilated, floor-rounding `nn.MaxPool2d`, else None."""
    if type(module) is not nn.MaxPool2d or not untouched(module):
        return None
    if module.return_indices or module.ceil_mode or module.dilation not in (1, (1, 1)):
        return None
    window = []
    for size in (module.kernel_size, module.stride, module.padding):
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            return None
        window.append(height)
    return MaxPool(*window)
