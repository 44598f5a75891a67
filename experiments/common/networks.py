"""The networks that suit a data set, by the names of the paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import resnet_fused
from resnet_fused import cifar

from .data import Images


def plain(images: Images, depth: int, **arguments: Any) -> Callable[[], nn.Module]:
    """Makes a network without shortcuts: of 3.3 for photographs, of 4.2 for small images."""
    if images.side is None:
        make = getattr(resnet_fused, f"plain{depth}")
        return lambda: make(num_classes=images.classes, **arguments)
    return lambda: cifar.plain(depth, num_classes=images.classes, **arguments)


def residual(
    images: Images, depth: int, shortcut: str = "A", **arguments: Any
) -> Callable[[], nn.Module]:
    """Makes a residual network: of Table 1 for photographs, of 4.2 for small images."""
    arguments.update(num_classes=images.classes, shortcut=shortcut)
    if images.side is None:
        make = getattr(resnet_fused, f"resnet{depth}")
        return lambda: make(**arguments)
    return lambda: cifar.resnet(depth, **arguments)


def parameters(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())
