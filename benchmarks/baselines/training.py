"""What trains: ours and torchvision's networks, and what is done to each before its first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn

import resnet_fused


def eager(model: nn.Module) -> nn.Module:
    return model


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def compiled(mode: str | None) -> Callable[[nn.Module], nn.Module]:
    def compile_model(model: nn.Module) -> nn.Module:
        return torch.compile(channels_last(model), mode=mode)  # type: ignore[return-value]

    return compile_model


PLAIN = "training ops in PyTorch"  # what ours keeps for backward can be read off it anywhere
PROFILED = ("resnet_fused", PLAIN)
# name -> (library, what is done to the model)
ALL: dict[str, tuple[Any, Callable[[nn.Module], nn.Module]]] = {
    "resnet_fused": (resnet_fused, channels_last),
    PLAIN: (resnet_fused, eager),
    "eager NCHW": (torchvision.models, eager),
    "eager channels_last": (torchvision.models, channels_last),
    "torch.compile": (torchvision.models, compiled(None)),
    "resnet_fused compiled": (resnet_fused, compiled(None)),
    "torch.compile max-autotune": (torchvision.models, compiled("max-autotune")),
}
