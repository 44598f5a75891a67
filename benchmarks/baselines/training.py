"""What trains: ours and torchvision's networks, and what is done to each before its first step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
import torchvision
from torch import nn

import resnet_fused
from resnet_fused.testing.plain import training_ops_in_pytorch


def eager(model: nn.Module) -> nn.Module:
    return model


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def compiled(model: nn.Module, mode: str | None = None) -> nn.Module:
    return torch.compile(channels_last(model), mode=mode)  # type: ignore[return-value]


def fused(device: torch.device) -> AbstractContextManager[None]:
    """Within it ours trains by its fused ops: on a GPU Triton's, elsewhere in plain PyTorch."""
    gpu = device.type == "cuda"
    return resnet_fused.use_backend("triton") if gpu else training_ops_in_pytorch()


class Trained(NamedTuple):
    """The library that makes the model, what is done to it, and within what it is trained."""

    library: Any
    prepare: Callable[[nn.Module], nn.Module] = channels_last
    within: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext


PLAIN = "training ops in PyTorch"  # what ours saves for backward can be read off it anywhere
PROFILED = ("resnet_fused", "resnet_fused triton", PLAIN)
ALL = {
    "resnet_fused": Trained(resnet_fused),  # block by block what was measured fastest
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
