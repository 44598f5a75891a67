"""What trains: ours and torchvision's networks, and what is done to each before its first step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
import torchvision
from torch import fx, nn

import resnet_fused
from resnet_fused.ops.dispatch import serving
from resnet_fused.testing.plain import training_ops_in_pytorch
from resnet_fused.tune import ARCHITECTURES

MODELS = [n for n in ARCHITECTURES if n.startswith("cifar.") or hasattr(torchvision.models, n)]


def network(library: Any, name: str, **arguments: Any) -> nn.Module:
    """The library's network. torchvision has none for CIFAR: its modules are ours, called one by
    one in the order of torch.fx's graph, with nothing of ours in between."""
    if not name.startswith("cifar."):
        model: nn.Module = getattr(library, name)(**arguments)
        return model
    model = ARCHITECTURES[name](**arguments)
    if library is resnet_fused:
        return model
    graph = fx.symbolic_trace(model).graph
    graph.set_codegen(fx.graph.CodeGen())  # ours would fuse
    return fx.GraphModule(model, graph)


def eager(model: nn.Module) -> nn.Module:
    return model


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def compiled(model: nn.Module, mode: str | None = None) -> nn.Module:
    return torch.compile(channels_last(model), mode=mode)  # type: ignore[return-value]


def fused(device: torch.device) -> AbstractContextManager[None]:
    """Within it ours trains by its fused ops: on a GPU Triton's, on a CPU those that serve it, in
    plain PyTorch where none does."""
    if device.type == "cuda":
        return resnet_fused.use_backend("triton")
    served = any(backend.training is not None for backend in serving(torch.empty(0, device=device)))
    return contextlib.nullcontext() if served else training_ops_in_pytorch()


class Trained(NamedTuple):
    """The library that makes the model, what is done to it, within what it is trained, and whether
    a step is one CUDA graph."""

    library: Any
    prepare: Callable[[nn.Module], nn.Module] = channels_last
    within: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    graph: bool = False


PLAIN = "training ops in PyTorch"  # what ours saves for backward can be read off it anywhere
_CUDA = Trained(resnet_fused, within=partial(resnet_fused.use_backend, "cuda"))
PROFILED = ("resnet_fused", "resnet_fused cuda", "resnet_fused triton", PLAIN)
ALL = {
    "resnet_fused": Trained(resnet_fused),  # block by block what was measured fastest
    "resnet_fused cuda": _CUDA,
    "resnet_fused cuda, graph": _CUDA._replace(graph=True),
    "resnet_fused triton": Trained(
        resnet_fused, within=partial(resnet_fused.use_backend, "triton")
    ),
    PLAIN: Trained(resnet_fused, eager, training_ops_in_pytorch),
    "eager NCHW": Trained(torchvision.models, eager),
    "eager channels_last": Trained(torchvision.models),
    "torch.compile": Trained(torchvision.models, compiled),
    "resnet_fused compiled": Trained(resnet_fused, compiled),
    "torch.compile max-autotune": Trained(
        torchvision.models, partial(compiled, mode="max-autotune")
    ),
}
