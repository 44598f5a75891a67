"""The one state dict that every implementation in a comparison loads."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn

import resnet_fused


def make_state(architecture: str, weights: str | None, images: Tensor) -> dict[str, Tensor]:
    """A float32 state dict: that of `weights` (torchvision's name or a file), else a random one.

    The random one stands in for a trained network: seeded weights, batch norms with random scale
    and shift, and the running statistics that `images` (N, 3, H, W) really have in it, so that
    activations keep the range of a trained network's, in float16 too.
    """
    if weights is not None:
        state = getattr(resnet_fused, architecture)(weights=weights).state_dict()
        return {
            name: value.float() if value.is_floating_point() else value
            for name, value in state.items()
        }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(torchvision.models, architecture)()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.normal_(module.bias, 0.0, 0.1)
                module.momentum = None  # running statistics become those of the one batch below
    with torch.no_grad():
        model.train()(images)
    return dict(model.state_dict())


def labels(architecture: str, weights: str | None) -> list[str] | None:
    """The class names that go with `weights`, None for random weights or another data set."""
    if weights is None:
        return None
    entries = torchvision.models.get_model_weights(architecture)
    return list(entries.DEFAULT.meta["categories"])
