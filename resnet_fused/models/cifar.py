"""The paper's networks for CIFAR-10 (section 4.2, Table 6): 6n+2 layers, residual and plain.

A 3×3 convolution, three stages of n blocks with 16, 32 and 64 channels on maps of 32, 16 and 8
pixels, average pooling, and a fully connected layer. Shortcuts are option A's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import BasicBlock, Bottleneck, NormLayer, PlainBlock
from .build import build
from .network import ResidualNetwork, StageShape
from .weights import WeightsSource


class CifarResNet(ResidualNetwork):
    """A residual or plain network for small images (paper, section 4.2).

    Args:
        block: BasicBlock or PlainBlock.
        layers: number of blocks in each of the three stages.

    The other arguments are those of `resnet_fused.ResNet`; the shortcuts are option A's by default.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 10,
        zero_init_residual: bool = False,
        norm_layer: NormLayer | None = None,
        shortcut: str = "A",
        checkpoint: bool = False,
    ) -> None:
        super().__init__(
            nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False),
            None,
            block,
            [StageShape(16, layers[0]), StageShape(32, layers[1], 2), StageShape(64, layers[2], 2)],
            num_classes,
            zero_init_residual,
            norm_layer=norm_layer,
            shortcut=shortcut,
            checkpoint=checkpoint,
        )

    def forward_scripted(self, x: Tensor) -> Tensor:
        x = self._stem_unfused(x)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _cifar(
    kind: str,
    block: type[BasicBlock],
    depth: int,
    weights: WeightsSource,
    progress: bool,
    **kwargs: Any,
) -> CifarResNet:
    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        below = max(8, depth - rest)
        raise ValueError(
            f"depth must be 6n+2 with n >= 1 (8, 14, 20, ...), found {depth}; "
            f"the nearest are {below} and {below + 6}."
        )
    return build(
        CifarResNet, f"cifar.{kind}{depth}", block, (blocks,) * 3, weights, progress, **kwargs
    )


def resnet(
    depth: int, weights: WeightsSource = None, progress: bool = True, **kwargs: Any
) -> CifarResNet:
    """The residual network of `depth` = 6n+2 layers; other arguments as for the fixed depths.

    Raises ValueError for another depth.
    """
    return _cifar("resnet", BasicBlock, depth, weights, progress, **kwargs)


def plain(
    depth: int, weights: WeightsSource = None, progress: bool = True, **kwargs: Any
) -> CifarResNet:
    """The plain network of `depth` = 6n+2 layers: `resnet(depth)` without its shortcuts."""
    return _cifar("plain", PlainBlock, depth, weights, progress, **kwargs)


def resnet20(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for CIFAR-10 (paper, Table 6)."""
    return resnet(20, weights, progress, **kwargs)


def resnet32(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-32 for CIFAR-10 (paper, Table 6)."""
    return resnet(32, weights, progress, **kwargs)


def resnet44(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-44 for CIFAR-10 (paper, Table 6)."""
    return resnet(44, weights, progress, **kwargs)


def resnet56(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for CIFAR-10 (paper, Table 6)."""
    return resnet(56, weights, progress, **kwargs)


def resnet110(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-110 for CIFAR-10 (paper, Table 6)."""
    return resnet(110, weights, progress, **kwargs)


def resnet1202(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-1202 for CIFAR-10 (paper, Table 6)."""
    return resnet(1202, weights, progress, **kwargs)


def plain20(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """The plain network of 20 layers for CIFAR-10 (paper, Fig. 6)."""
    return plain(20, weights, progress, **kwargs)


def plain32(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """The plain network of 32 layers for CIFAR-10 (paper, Fig. 6)."""
    return plain(32, weights, progress, **kwargs)


def plain44(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """The plain network of 44 layers for CIFAR-10 (paper, Fig. 6)."""
    return plain(44, weights, progress, **kwargs)


def plain56(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """The plain network of 56 layers for CIFAR-10 (paper, Fig. 6)."""
    return plain(56, weights, progress, **kwargs)


def plain110(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """The plain network of 110 layers for CIFAR-10 (paper, Fig. 6)."""
    return plain(110, weights, progress, **kwargs)
