"""BasicBlock and Bottleneck (paper, Fig. 5): which ops, in which order.

Constructor arguments, submodule names and numerics are torchvision's, so weights move freely.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import fusion, reference
from .ops.block_training import residual_block_training
from .ops.conv_bn import conv_bn
from .ops.conv_bn_projection import conv_bn_projection
from .ops.training_layers import trains_fused

# torch.fx records the ops as they are called here instead of tracing into them.
torch.fx.wrap("conv_bn")
torch.fx.wrap("conv_bn_projection")

NormLayer = Callable[[int], nn.Module]


def conv3x3(
    inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """3×3 convolution without bias, padded to keep the size at stride 1."""
    return nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """1×1 convolution without bias."""
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)


class ResidualBlock(nn.Module):
    """relu(F(x) + shortcut(x)); F is `layers()`, each convolution with its BN, ReLU between.

    Where all of F normalises with given statistics (eval mode, frozen BN), each layer is one fused
    op and the last takes the shortcut with it: the identity, or a strided projection accumulated
    in the same kernel. In training mode the block is one op, where the backend trains fused.
    Otherwise the modules run one by one.
    """

    relu: nn.Module
    downsample: nn.Module | None

    def layers(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        """The (convolution, normalisation) pairs of F, in order."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x (N, inplanes, H, W) -> (N, planes × expansion, P, Q)."""
        if self.training and (out := self._train(x)) is not None:
            return out
        layers = [fusion.conv_bn(conv, bn) for conv, bn in self.layers()]
        fused = [layer for layer in layers if layer is not None]
        if len(fused) < len(layers) or not fusion.is_relu(self.relu):
            return reference.modules.residual_block(self, x)
        *inner, (conv, bn) = fused
        out = x
        for inner_conv, inner_bn in inner:
            out = conv_bn(out, inner_conv, inner_bn, relu=True)
        if self.downsample is None:
            return conv_bn(out, conv, bn, residual=x, relu=True)
        projection = fusion.projection(self.downsample)
        if projection is None:
            return conv_bn(out, conv, bn, residual=self.downsample(x), relu=True)
        return conv_bn_projection(out, conv, bn, x, *projection)

    def _train(self, x: Tensor) -> Tensor | None:
        """The block as one op, forward and backward, or None where it has to run by modules."""
        pairs = list(self.layers())
        if self.downsample is not None:
            projection = fusion.projection_modules(self.downsample)
            if projection is None:
                return None
            pairs.append(projection)
        plan = fusion.training_plan(pairs)
        if plan is None or not fusion.is_relu(self.relu) or not trains_fused(x, plan.sync_group):
            return None
        layers, shortcut = plan.layers, None
        if self.downsample is not None:
            *layers, shortcut = layers
        out, terms = residual_block_training(x, layers, shortcut, sync_group=plan.sync_group)
        fusion.track_statistics([bn for _, bn in pairs], terms)
        return out


class BasicBlock(ResidualBlock):
    """3×3, 3×3: the block of ResNet-18 and ResNet-34 (paper, Fig. 5 left)."""

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"BasicBlock has groups=1 and base_width=64 only, found groups={groups} and "
                f"base_width={base_width}; use Bottleneck."
            )
        if dilation > 1:
            raise NotImplementedError(
                f"BasicBlock has dilation=1 only, found {dilation}; use Bottleneck."
            )
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def layers(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2)


class Bottleneck(ResidualBlock):
    """1×1, 3×3, 1×1: the block of ResNet-50 and deeper (paper, Fig. 5 right).

    The stride stands on the 3×3, as in torchvision ("v1.5"); the paper puts it on the first 1×1.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def layers(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)
