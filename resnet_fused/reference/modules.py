"""What blocks and models mean, in plain PyTorch: each module called in turn.

This is what runs wherever fusion would not be right: in training, with other normalisation
layers, and around hooks and replaced modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..blocks import ResidualBlock
    from ..models.network import ResidualNetwork


def residual_block(block: ResidualBlock, x: Tensor) -> Tensor:
    """relu(F(x) (+ shortcut(x))), F the convolutions and BN with ReLU between (eq. 1, 2)."""
    out = x
    for i, (conv, bn) in enumerate(block.layers()):
        out = bn(conv(block.relu(out) if i else out))
        if block.on_response is not None:
            block.on_response(i, out)
    shortcut = block.shortcut(x)
    if shortcut is not None:
        out += shortcut
    return block.relu(out)


def stem(model: ResidualNetwork, x: Tensor) -> Tensor:
    """conv1, bn1, relu, maxpool where there is one."""
    out = model.bn1(model.conv1(x))
    if model.on_response is not None:
        model.on_response(0, out)
    out = model.relu(out)
    return out if model.maxpool is None else model.maxpool(out)


def head(model: ResidualNetwork, x: Tensor) -> Tensor:
    """avgpool, flatten, fc."""
    return model.fc(torch.flatten(model.avgpool(x), 1))


def network(model: ResidualNetwork, x: Tensor) -> Tensor:
    """The whole network, unfused."""
    x = stem(model, x)
    for block in model.blocks():
        x = residual_block(block, x)
    return head(model, x)
