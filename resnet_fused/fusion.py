"""Reads live modules as op arguments, and says which of them an op can stand for.

A fused op replaces the calls of several modules. That is only right where nobody could tell: where
each module is exactly the layer it looks like, its call is PyTorch's own and nobody has hooked on
to it, and where no mode, transform or tracer watches the calls. The ops of inference also need
frozen statistics to normalise with. Everything else gets None here and runs module by module, as in
plain PyTorch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .ops.modes import is_plain, is_recorded, is_transformed
from .ops.sync_batch_norm import sync_batch_norm
from .ops.training_layers import batch_statistics
from .parameters import BatchNorm, ConvBn, Convolution, GroupNorm, Layer, MaxPool
from .training import FrozenBatchNorm2d

FUSED = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Linear,
    nn.Identity,
    nn.Sequential,
    FrozenBatchNorm2d,
)


def _methods() -> tuple[Any, ...]:
    """The methods that calls of those modules consist of."""
    return (
        *[(kind.__call__, kind._call_impl, kind.forward) for kind in FUSED],
        nn.Conv2d._conv_forward,
    )


_PYTORCHS = _methods()
# Replaced before this package was imported, they are never PyTorch's.
_REPLACED_BEFORE = not all(
    method.__module__.startswith(("torch.", __package__))
    for method in (*itertools.chain(*_PYTORCHS[:-1]), _PYTORCHS[-1])
)


def _is_replaced() -> bool:
    """Whether a method of one of those classes is no longer the one that PyTorch or we defined."""
    return _REPLACED_BEFORE or _methods() != _PYTORCHS


_is_replaced._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in ops.modes


def must_call_modules(x: object) -> bool:
    """Whether every module has to be called for itself, whatever it is, to compute with `x`.

    So it is inside modes, transforms and tracers (`resnet_fused.ops.modes`), for a tensor of a type
    of its own or without strides (sparse, oneDNN's), under global module hooks, and where a class's
    call was replaced.
    """
    if torch.compiler.is_compiling():  # which traces tensors of any type and honours global hooks
        return is_transformed() or _is_replaced()
    return (
        not is_plain(x)
        or cast("Tensor", x).layout is not torch.strided
        or is_transformed()
        or is_recorded()
        or bool(_has_any_global_hook())
        or _is_replaced()
    )


def untouched(*modules: nn.Module) -> bool:
    """Whether calling the modules is what their class says: nothing is hooked on to them, replaced
    in them or compiled by itself."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return False
        own = module.__dict__
        if (
            "forward" in own
            or "_call_impl" in own
            or "_conv_forward" in own
            or own.get("_compiled_call_impl") is not None
        ):
            return False
    return True


def is_identity(module: nn.Module | None) -> bool:
    """Whether `module` does nothing, or is not there."""
    return module is None or (type(module) is nn.Identity and untouched(module))


def is_relu(module: nn.Module) -> bool:
    """Whether `module` is a plain ReLU."""
    return type(module) is nn.ReLU and untouched(module)


def is_sigmoid(module: nn.Module | None) -> bool:
    """Whether `module` is a sigmoid, PyTorch's or timm's."""
    if module is None:
        return False
    kind = type(module)
    known = kind is nn.Sigmoid or _is_from(kind, "Sigmoid", "timm.layers.activations")
    return known and untouched(module)


# Told at a glance; others are looked for by name.
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def _is_from(kind: type[nn.Module], name: str, module: str) -> bool:
    # By name, as its package need not be there; another class of that name may mean another thing.
    return kind.__name__ == name and kind.__module__ == kind.forward.__module__ == module


def _is_torchvisions_frozen(kind: type[nn.Module]) -> bool:
    return _is_from(kind, "FrozenBatchNorm2d", "torchvision.ops.misc")


def _is_timms(kind: type[nn.Module]) -> bool:
    return _is_from(kind, "BatchNormAct2d", "timm.layers.norm_act")


def _is_timms_group_norm_act(kind: type[nn.Module]) -> bool:
    return _is_from(kind, "GroupNormAct", "timm.layers.norm_act")


def behind_norm(module: nn.Module) -> list[nn.Module]:
    """What timm's `BatchNormAct2d` and `GroupNormAct` apply to their normalisation's result; [] for
    other modules."""
    kind = type(module)
    if kind in _NORMS or not (_is_timms(kind) or _is_timms_group_norm_act(kind)):
        return []
    behind = (module._modules.get("drop"), module._modules.get("act"))
    return [m for m in behind if m is not None and not is_identity(m)]


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """A parameter, or the tensor in its place, which replicas of `nn.DataParallel` have.

    Looked up where they are kept, because a module's attributes are slow.
    """
    found = module._parameters.get(name)
    return module.__dict__.get(name) if found is None else found


def convolution(module: nn.Module) -> Convolution | None:
    """The argument group of a bias-free, zero-padded `nn.Conv2d`, else None."""
    if (
        type(module) is not nn.Conv2d
        or module.padding_mode != "zeros"
        or isinstance(module.padding, str)
        or not untouched(module)
    ):
        return None
    weight = _parameter(module, "weight")
    if not is_plain(weight) or _parameter(module, "bias") is not None:
        return None
    return Convolution(
        cast("Tensor", weight),
        cast("tuple[int, int]", module.stride),
        cast("tuple[int, int]", module.padding),
        cast("tuple[int, int]", module.dilation),
        module.groups,
    )


def pointwise(module: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
    """Weight (K, C) and bias of an `nn.Conv2d` that is a linear layer at each pixel, else None."""
    if type(module) is not nn.Conv2d or not untouched(module):
        return None
    weight, bias = _parameter(module, "weight"), _parameter(module, "bias")
    if (
        not is_plain(weight)
        or (module.kernel_size, module.stride, module.groups) != ((1, 1), (1, 1), 1)
        or module.padding not in (0, (0, 0), "valid")
    ):
        return None
    return cast("Tensor", weight).flatten(1), bias


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a batch norm of a kind that ops compute, in some mode."""
    kind = type(module)
    return kind in _NORMS or _is_timms(kind) or _is_torchvisions_frozen(kind)


def normalisation(module: nn.Module) -> BatchNorm | None:
    """The argument group of a normalisation with frozen statistics, whatever follows in it.

    That is `nn.BatchNorm2d` or `nn.SyncBatchNorm` in eval mode with running statistics, timm's
    `BatchNormAct2d` in that mode, and frozen batch norm, ours and torchvision's.
    """
    buffers, kind = module._buffers, type(module)
    if kind in _NORMS or _is_timms(kind):
        if module.training:
            return None
        weight, bias = _parameter(module, "weight"), _parameter(module, "bias")
    elif _is_torchvisions_frozen(kind):
        weight, bias = buffers["weight"], buffers["bias"]
    else:
        return None
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    if mean is None or var is None or not untouched(module):
        return None
    return BatchNorm(mean, var, weight, bias, cast("float", module.eps))


def is_group_norm(module: nn.Module) -> bool:
    """Whether `module` is a group norm, PyTorch's or timm's, in some mode."""
    kind = type(module)
    if kind is nn.GroupNorm or kind in _NORMS:
        return kind is nn.GroupNorm
    names = ("GroupNorm", "GroupNorm1")
    known = any(_is_from(kind, name, "timm.layers.norm") for name in names)
    # timm's fast ones compute in autocast's dtype.
    return (known or _is_timms_group_norm_act(kind)) and not module._fast_norm


def group_norm(module: nn.Module) -> GroupNorm | None:
    """The argument group of a group norm in eval mode, whatever follows in it, else None.

    In training mode it means the same, but there PyTorch's own modules, which keep what backward
    needs, are faster than an op that computes it again.
    """
    if module.training or not is_group_norm(module) or not untouched(module):
        return None
    norm = cast("nn.GroupNorm", module)
    weight, bias = _parameter(norm, "weight"), _parameter(norm, "bias")
    return GroupNorm(norm.num_groups, weight, bias, norm.eps)


def batch_norm(module: nn.Module) -> BatchNorm | None:
    """The argument group of a module that is a normalisation with frozen statistics and nothing
    else, else None."""
    if type(module) not in _NORMS and behind_norm(module):
        return None
    return normalisation(module)


def conv_bn(conv: nn.Module, bn: nn.Module) -> ConvBn | None:
    """The argument group of a convolution and its normalisation, or None if they cannot fuse."""
    convolution_ = convolution(conv)
    batch_norm_ = batch_norm(bn)
    if convolution_ is None or batch_norm_ is None:
        return None
    return ConvBn(convolution_, batch_norm_)


def conv_group_norm(conv: nn.Module, norm: nn.Module) -> tuple[Convolution, GroupNorm] | None:
    """The argument groups of a convolution and a group norm that nothing else is in, else None."""
    convolution_ = convolution(conv)
    group_norm_ = None if behind_norm(norm) else group_norm(norm)
    if convolution_ is None or group_norm_ is None:
        return None
    return convolution_, group_norm_


def projection_modules(module: nn.Module) -> tuple[nn.Module, ...] | None:
    """The modules of a Sequential(..., convolution, normalisation) shortcut, else None.

    Those before the convolution, usually pooling, are called for themselves; identities are left
    out.
    """
    if type(module) is not nn.Sequential or not untouched(module):
        return None
    modules = [m for m in module._modules.values() if m is not None and not is_identity(m)]
    return tuple(modules) if len(modules) >= 2 else None


class TrainingPlan(NamedTuple):
    """Layers as the training ops take them; `sync_group` is "" where statistics stay local."""

    layers: list[Layer]
    sync_group: str

    def needs_gradients(self, x: Tensor) -> bool:
        """Whether a backward through these layers, applied to x, would have anything to compute."""
        if not torch.is_grad_enabled():
            return False
        own = (t for layer in self.layers for t in (layer.conv.weight, layer.weight, layer.bias))
        return x.requires_grad or any(t.requires_grad for t in own)

    def is_frozen(self) -> bool:
        """Whether every layer normalises with frozen statistics."""
        return all(layer.frozen is not None for layer in self.layers)


def training_plan(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> TrainingPlan | None:
    """What the training ops need of (convolution, normalisation) pairs, else None.

    Each normalisation takes the batch's statistics, those of a process group's batches
    (`nn.SyncBatchNorm`; one group for all), or frozen ones (`batch_norm`).
    """
    layers: list[Layer] = []
    groups: set[str] = set()
    for conv, bn in pairs:
        convolution_ = convolution(conv)
        frozen = batch_norm(bn)
        if convolution_ is None:
            return None
        if frozen is None:
            if type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm) or not untouched(bn):
                return None
            groups.add(_sync_group(bn) if type(bn) is nn.SyncBatchNorm else "")
        weight, bias = cast("Tensor | None", bn.weight), cast("Tensor | None", bn.bias)
        if weight is None or bias is None:  # affine=False
            ones = torch.ones(len(convolution_.weight), device=convolution_.weight.device)
            weight = ones if weight is None else weight
            bias = torch.zeros_like(ones) if bias is None else bias
        layers.append(
            Layer(
                convolution_,
                weight,
                bias,
                cast("float", bn.eps),
                None if frozen is None else (frozen.mean, frozen.var),
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


def run_unfused(forward: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Tensor:
    """`forward(x)`, in which the synchronised norms in `module` exchange what the fused ops would.

    Ranks then may differ in what they fuse: one has a hook somewhere or an empty batch, and all
    still meet in the same collectives, in the same order. PyTorch's own are others, and refuse
    tensors on the CPU. A layer whose `forward` somebody replaced keeps that.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return forward(x)
    changed: list[nn.Module] = []
    try:
        for bn in module.modules():
            if (group := _sync_group(bn)) and "forward" not in bn.__dict__:
                bn.__dict__["forward"] = functools.partial(_forward_synchronised, bn, group)
                changed.append(bn)
        return forward(x)
    finally:
        for bn in changed:
            del bn.__dict__["forward"]


def _forward_synchronised(bn: nn.Module, group: str, x: Tensor) -> Tensor:
    assert isinstance(bn, nn.SyncBatchNorm)
    out, scale_shift = sync_batch_norm(x, bn.weight, bn.bias, bn.eps, group)
    track_statistics([bn], [scale_shift])
    return out


@torch.no_grad()
def track_statistics(norms: Sequence[nn.Module], scale_shifts: Sequence[Tensor]) -> None:
    """Updates running statistics after a training op, as `nn.BatchNorm2d` does in its forward.

    scale_shifts: the layers' (6, K) `scale_shift` from the op.
    """
    by_weight: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    counters: list[Tensor] = []
    for bn, scale_shift in zip(norms, scale_shifts, strict=True):
        if not isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm)) or not bn.training:
            continue
        if not bn.track_running_stats:
            continue
        buffers = bn._buffers  # a module's attributes are slow
        count = buffers["num_batches_tracked"]
        if count is not None:
            counters.append(count)
        old_mean, old_var = buffers["running_mean"], buffers["running_var"]
        if old_mean is None or old_var is None:
            continue
        mean, var = batch_statistics(scale_shift)
        pairs = ((old_mean, mean), (old_var, var))
        if bn.momentum is None and count is not None:
            # The average of all batches; their count stays on the device.
            for running, new in pairs:
                running.lerp_(new.to(running.dtype), (count.to(running.dtype) + 1) ** -1)
            continue
        # Nothing to average by: PyTorch then lets the statistics stand.
        weight = 0.0 if bn.momentum is None else bn.momentum
        olds, news = by_weight.setdefault(weight, ([], []))
        for running, new in pairs:
            olds.append(running)
            news.append(new if new.dtype == running.dtype else new.to(running.dtype))
    if counters:
        torch._foreach_add_(counters, 1)
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


def head(pool: nn.Module, linear: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of the linear layer behind a global average pooling, else None."""
    if type(pool) is not nn.AdaptiveAvgPool2d or pool.output_size not in (1, (1, 1)):
        return None
    if type(linear) is not nn.Linear or not is_plain(linear.weight):
        return None
    return (linear.weight, linear.bias) if untouched(pool, linear) else None
