"""The ResNet, ResNeXt and Wide ResNet families, drop-in for `torchvision.models`, and plain nets.

Constructor arguments, `state_dict` keys, initialisation (bit for bit under the same seed) and
results are torchvision's. He et al., arXiv 1512.03385; Xie et al., 1611.05431; Zagoruyko and
Komodakis, 1605.07146.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import BasicBlock, Bottleneck, NormLayer, PlainBlock, conv3x3
from .build import build
from .network import ResidualNetwork, StageShape
from .weights import WeightsSource


class ResNet(ResidualNetwork):
    """A ResNet of four stages (paper, Table 1), or a plain network (section 3.3).

    Args:
        block: BasicBlock, Bottleneck or PlainBlock.
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the fully connected layer.
        zero_init_residual: start each block's last BN at zero, so that blocks begin as identities.
        groups: cardinality of Bottleneck's 3×3 (ResNeXt).
        width_per_group: width of Bottleneck's 3×3 (ResNeXt, Wide ResNet).
        replace_stride_with_dilation: for stages 2, 3 and 4, dilate instead of striding.
        norm_layer: makes the normalisation of a number of channels; `nn.BatchNorm2d` if None.
        shortcut: the paper's option "A" (identities, strided and zero-padded where dimensions
            change), "B" (projections there, torchvision's) or "C" (projections everywhere).
        stride_in: of bottlenecks, "3x3" (torchvision's) or "1x1" (the paper's, the first one).
        in_chans: channels of the images.
        stem: "7x7", or "deep", three 3×3 convolutions in its place (ResNet-C and -D, arXiv
            1812.01187; timm's "d" networks with `avg_down`).
        avg_down: average pooling before a strided projection, which then reads every pixel
            (ResNet-D); not with dilation in the stride's place, nor with option "A".
        checkpoint: keep less for backward and compute it again there: of n blocks only every
            √n-th one's input stays in memory.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        shortcut: str = "B",
        stride_in: str = "3x3",
        checkpoint: bool = False,
        in_chans: int = 3,
        stem: str = "7x7",
        avg_down: bool = False,
    ) -> None:
        if stem not in ("7x7", "deep"):
            raise ValueError(f'stem must be "7x7" or "deep", found {stem!r}.')
        dilate = (
            (False,) * 3 if replace_stride_with_dilation is None else replace_stride_with_dilation
        )
        if len(dilate) != 3:
            raise ValueError(
                "replace_stride_with_dilation must be None or three booleans, "
                f"found {replace_stride_with_dilation!r}."
            )
        if avg_down and any(dilate):
            raise ValueError(
                "avg_down pools where a stage strides, and replace_stride_with_dilation="
                f"{dilate!r} takes strides away; use one of them."
            )
        super().__init__(
            nn.Conv2d(in_chans, 64, kernel_size=7, stride=2, padding=3, bias=False)
            if stem == "7x7"
            else _deep_stem(in_chans, norm_layer or nn.BatchNorm2d),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            block,
            [
                StageShape(64, layers[0]),
                StageShape(128, layers[1], 2, dilate[0]),
                StageShape(256, layers[2], 2, dilate[1]),
                StageShape(512, layers[3], 2, dilate[2]),
            ],
            num_classes,
            zero_init_residual,
            groups,
            width_per_group,
            norm_layer,
            shortcut,
            stride_in,
            checkpoint,
            avg_down,
        )

    def forward_scripted(self, x: Tensor) -> Tensor:
        x = self._stem_unfused(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _deep_stem(in_chans: int, norm_layer: NormLayer) -> nn.Sequential:
    return nn.Sequential(
        conv3x3(in_chans, 32, stride=2),
        norm_layer(32),
        nn.ReLU(inplace=True),
        conv3x3(32, 32),
        norm_layer(32),
        nn.ReLU(inplace=True),
        conv3x3(32, 64),
    )


def resnet18(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18 (paper, Table 1)."""
    return build(ResNet, "resnet18", BasicBlock, (2, 2, 2, 2), weights, progress, **kwargs)


def resnet34(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34 (paper, Table 1)."""
    return build(ResNet, "resnet34", BasicBlock, (3, 4, 6, 3), weights, progress, **kwargs)


def resnet50(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 (paper, Table 1; stride on the 3×3)."""
    return build(ResNet, "resnet50", Bottleneck, (3, 4, 6, 3), weights, progress, **kwargs)


def resnet101(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 (paper, Table 1; stride on the 3×3)."""
    return build(ResNet, "resnet101", Bottleneck, (3, 4, 23, 3), weights, progress, **kwargs)


def resnet152(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152 (paper, Table 1; stride on the 3×3)."""
    return build(ResNet, "resnet152", Bottleneck, (3, 8, 36, 3), weights, progress, **kwargs)


def resnext50_32x4d(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50 32×4d (arXiv 1611.05431)."""
    return build(
        ResNet,
        "resnext50_32x4d",
        Bottleneck,
        (3, 4, 6, 3),
        weights,
        progress,
        groups=32,
        width_per_group=4,
        **kwargs,
    )


def resnext101_32x8d(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101 32×8d (arXiv 1611.05431)."""
    return build(
        ResNet,
        "resnext101_32x8d",
        Bottleneck,
        (3, 4, 23, 3),
        weights,
        progress,
        groups=32,
        width_per_group=8,
        **kwargs,
    )


def resnext101_64x4d(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101 64×4d (arXiv 1611.05431)."""
    return build(
        ResNet,
        "resnext101_64x4d",
        Bottleneck,
        (3, 4, 23, 3),
        weights,
        progress,
        groups=64,
        width_per_group=4,
        **kwargs,
    )


def wide_resnet50_2(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-50-2 (arXiv 1605.07146)."""
    return build(
        ResNet,
        "wide_resnet50_2",
        Bottleneck,
        (3, 4, 6, 3),
        weights,
        progress,
        width_per_group=128,
        **kwargs,
    )


def wide_resnet101_2(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-101-2 (arXiv 1605.07146)."""
    return build(
        ResNet,
        "wide_resnet101_2",
        Bottleneck,
        (3, 4, 23, 3),
        weights,
        progress,
        width_per_group=128,
        **kwargs,
    )


def plain18(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """The plain network of 18 layers: ResNet-18 without shortcuts (paper, section 3.3)."""
    return build(ResNet, "plain18", PlainBlock, (2, 2, 2, 2), weights, progress, **kwargs)


def plain34(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """The plain network of 34 layers: ResNet-34 without shortcuts (paper, Fig. 3 middle)."""
    return build(ResNet, "plain34", PlainBlock, (3, 4, 6, 3), weights, progress, **kwargs)
