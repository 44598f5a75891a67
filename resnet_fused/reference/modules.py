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
    from ..models.resnet import ResNet


def residual_block(block: ResidualBlock, x: Tensor) -> Tensor:
    """relu(F(x) + shortcut(x)), F the block's convolutions with BN, and ReLU between (eq. 1, 2)."""
    *inner, (conv, bn) = block.layers()
    out = x
    for inner_conv, inner_bn in inner:
        out = block.relu(inner_bn(inner_conv(out)))
    out = bn(conv(out))
    out += x if block.downsample is None else block.downsample(x)
    return block.relu(out)


def stem(model: ResNet, x: Tensor) -> Tensor:
    """conv1, bn1, relu, maxpool."""
    return model.maxpool(model.relu(model.bn1(model.conv1(x))))


def head(model: ResNet, x: Tensor) -> Tensor:
    """avgpool, flatten, fc."""
    return model.fc(torch.flatten(model.avgpool(x), 1))


def resnet(model: ResNet, x: Tensor) -> Tensor:
    """The whole network, unfused."""
    x = stem(model, x)
    for block in model.blocks():
        x = residual_block(block, x)
    return head(model, x)
