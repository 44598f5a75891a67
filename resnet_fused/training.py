"""Helpers for training: frozen batch norm, and what a forward keeps for its backward.

Training itself needs no call: `model.train()` runs the stem and each block as fused ops wherever
the backend has training kernels. Synchronised statistics come from
`torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)`, which the fused ops honour.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from .ops.checks import check_is_module


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with fixed statistics in training mode too; keys are those of `nn.BatchNorm2d`.

    Differentiable in its input, and in weight and bias where they require gradients.
    """

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Stays in eval mode, whatever is asked for."""
        super().train(False)
        return self

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (its name there)
        """As in eval mode. A graph of torch.fx calls it whole, as it does PyTorch's modules."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._normalise(input)
        elif isinstance(input, Proxy):
            name = input.tracer.path_of_module(self)
            return input.tracer.create_proxy("call_module", name, (input,), {})
        else:
            return self._normalise(input)

    def _normalise(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


_FREEZABLE = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """Freezes every `nn.BatchNorm2d` and `nn.SyncBatchNorm` of `model`, in place, and returns it.

    Statistics stay what they are, under `model.train()` too, and weight and bias stop requiring
    gradients (`requires_grad_(True)` on them brings those back). Only the layers' class changes:
    parameters, buffers, `state_dict` keys and hooks are what they were.

    Raises ValueError, with nothing frozen, for a layer without running statistics and for one of a
    class derived from those, which may compute more; TypeError for what is no module.
    """
    check_is_module(model)
    found: list[nn.Module] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            continue
        if type(module) not in _FREEZABLE:
            raise ValueError(
                f"{name or 'the module'} is a {type(module).__qualname__}, which may do more than "
                "nn.BatchNorm2d; freeze it by its own means (timm.layers.freeze_batch_norm_2d)."
            )
        if module.running_mean is None:
            raise ValueError(
                f"{name or 'the module'} has no running statistics (track_running_stats=False) to "
                "freeze; train it with track_running_stats=True first."
            )
        found.append(module)
    for module in found:
        module.__class__ = FrozenBatchNorm2d
        module.requires_grad_(False).eval()
    return model


class KeptBytes(NamedTuple):
    """Bytes kept for backward: in all, and by layer ("" for what no block keeps: stem, head)."""

    total: int
    layers: dict[str, int]


def kept_activation_bytes(model: nn.Module, x: Tensor) -> KeptBytes:
    """What one forward of `model` on `x` keeps for its backward.

    Every storage counts once, where it is kept first; parameters and buffers do not count, the
    input does. Layers are the outermost modules of several others, such as residual blocks. Raises
    TypeError for what is no module.
    """
    check_is_module(model)
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}  # holds the storages, so that none is freed and its place reused
    layers: dict[str, int] = {}
    inside = [""]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = storage
            layers[inside[-1]] = layers.get(inside[-1], 0) + storage.nbytes()
        return tensor

    handles = []
    for name, module in _layers(model):
        handles.append(module.register_forward_pre_hook(partial(_enter, inside, name)))
        handles.append(module.register_forward_hook(partial(_leave, inside)))
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return KeptBytes(sum(layers.values()), layers)


def _enter(inside: list[str], name: str, *_: Any) -> None:
    inside.append(name)


def _leave(inside: list[str], *_: Any) -> None:
    inside.pop()


def _layers(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The outermost modules that have children and are not mere sequences."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential):
            found += _layers(child, f"{prefix}{name}.")
        elif next(child.children(), None) is not None:
            found.append((prefix + name, child))
    return found
