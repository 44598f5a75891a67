"""The networks that suit a data set, by the names of the paper."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

import resnet_fused
from resnet_fused import cifar
from resnet_fused.tune import ARCHITECTURES

from .data import Images
from .errors import ExperimentError


def plain(images: Images, depth: int, **arguments: Any) -> Callable[[], nn.Module]:
    """Makes a network without shortcuts: of 3.3 for photographs, of 4.2 for small images.

    Raises ExperimentError for a depth that the paper's networks do not have; so does `residual`.
    """
    return _network("plain", images, depth, arguments)


def residual(
    images: Images, depth: int, shortcut: str = "A", **arguments: Any
) -> Callable[[], nn.Module]:
    """Makes a residual network: of Table 1 for photographs, of 4.2 for small images."""
    return _network("resnet", images, depth, {"shortcut": shortcut, **arguments})


def _network(
    kind: str, images: Images, depth: int, arguments: dict[str, Any]
) -> Callable[[], nn.Module]:
    if images.side is None:
        make = getattr(resnet_fused, f"{kind}{depth}", None)
        if make is None:
            raise ExperimentError(
                f"there is no {kind} network of {depth} layers for photographs; there are 18 and "
                "34, and residual ones of 50, 101 and 152."
            )
        return partial(make, num_classes=images.classes, **arguments)
    if depth < 8 or (depth - 2) % 6:
        raise ExperimentError(
            f"networks for small images have 6n+2 layers (8, 14, 20, ...), and {depth} is not such "
            "a number."
        )
    return partial(getattr(cifar, kind), depth, num_classes=images.classes, **arguments)


def named(name: str) -> Callable[..., Any]:
    """The constructor of resnet_fused's network of that name, as resnet50 or cifar.resnet56.

    Raises ExperimentError where there is none.
    """
    if name not in ARCHITECTURES:
        raise ExperimentError(
            f"--model {name}: resnet_fused has no network of that name; it has "
            f"{', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[name]


def parameters(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())
