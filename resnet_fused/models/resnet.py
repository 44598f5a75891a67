"""The ResNet, ResNeXt and Wide ResNet families, drop-in for `torchvision.models`.

Constructor arguments, `state_dict` keys, initialisation (bit for bit under the same seed) and
results are torchvision's. He et al., arXiv 1512.03385; Xie et al., 1611.05431; Zagoruyko and
Komodakis, 1605.07146.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import fusion, reference
from ..blocks import BasicBlock, Bottleneck, NormLayer, ResidualBlock, conv1x1
from ..ops.conv_bn import conv_bn
from ..ops.head import head
from ..ops.stem import stem
from ..ops.stem_training import stem_training
from ..ops.training_layers import trains_fused
from .weights import WeightsSource, load_weights

torch.fx.wrap("conv_bn")
torch.fx.wrap("head")
torch.fx.wrap("stem")


class ResNet(nn.Module):
    """A ResNet of four stages (paper, Table 1).

    Args:
        block: BasicBlock or Bottleneck.
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the fully connected layer.
        zero_init_residual: start each block's last BN at zero, so that blocks begin as identities.
        groups, width_per_group: cardinality and width of Bottleneck's 3×3 (ResNeXt, Wide ResNet).
        replace_stride_with_dilation: for stages 2, 3 and 4, dilate instead of striding.
        norm_layer: makes the normalisation of a number of channels; `nn.BatchNorm2d` if None.

    Convolution weights are laid out channels_last, which changes no value and no key.
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
    ) -> None:
        super().__init__()
        dilate = (
            (False,) * 3 if replace_stride_with_dilation is None else replace_stride_with_dilation
        )
        if len(dilate) != 3:
            raise ValueError(
                "replace_stride_with_dilation must be None or three booleans, "
                f"found {replace_stride_with_dilation!r}."
            )
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], 2, dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], 2, dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)
        self.to(memory_format=torch.channels_last)

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        outplanes = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != outplanes:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, outplanes, stride), self._norm_layer(outplanes)
            )
        shape = (self.groups, self.base_width)
        stage: list[ResidualBlock] = [
            block(
                self.inplanes, planes, stride, downsample, *shape, first_dilation, self._norm_layer
            )
        ]
        self.inplanes = outplanes
        stage.extend(
            block(outplanes, planes, 1, None, *shape, self.dilation, self._norm_layer)
            for _ in range(1, blocks)
        )
        return nn.Sequential(*stage)

    def _initialise(self, zero_init_residual: bool) -> None:
        """He initialisation of the convolutions (arXiv 1502.01852), BN at one and zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.affine:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        if zero_init_residual:
            for block in self.blocks():
                _, last_norm = block.layers()[-1]
                if isinstance(weight := getattr(last_norm, "weight", None), Tensor):
                    nn.init.zeros_(weight)

    def blocks(self) -> Iterator[ResidualBlock]:
        """Every residual block, from the input to the output."""
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            yield from cast("Iterator[ResidualBlock]", stage)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images x (N, 3, H, W) of the weights' dtype and device.

        Any memory layout and any H, W that leave at least one pixel per stage. In eval mode the
        layers run as fused ops, in training mode the stem and each block, where the backend trains
        fused; raises ValueError or TypeError for an input that does not fit.
        """
        x = self._stem(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self._head(x)

    def _stem(self, x: Tensor) -> Tensor:
        if self.training and (out := self._train_stem(x)) is not None:
            return out
        layer = fusion.conv_bn(self.conv1, self.bn1)
        if layer is None or not fusion.is_relu(self.relu):
            return reference.modules.stem(self, x)
        pool = fusion.max_pool(self.maxpool)
        if pool is None:
            return self.maxpool(conv_bn(x, *layer, relu=True))
        return stem(x, *layer, pool)

    def _train_stem(self, x: Tensor) -> Tensor | None:
        """The stem as one op, forward and backward, or None where it has to run by modules."""
        plan = fusion.training_plan([(self.conv1, self.bn1)])
        pool = fusion.max_pool(self.maxpool)
        if plan is None or pool is None or not fusion.is_relu(self.relu):
            return None
        if not trains_fused(x, plan.sync_group):
            return None
        out, terms = stem_training(x, plan.layers[0], pool, plan.sync_group)
        fusion.track_statistics([self.bn1], [terms])
        return out

    def _head(self, x: Tensor) -> Tensor:
        fused = (
            not self.training
            and type(self.avgpool) is nn.AdaptiveAvgPool2d
            and self.avgpool.output_size in (1, (1, 1))
            and type(self.fc) is nn.Linear
            and fusion.untouched(self.avgpool, self.fc)
        )
        if not fused:
            return reference.modules.head(self, x)
        return head(x, self.fc.weight, self.fc.bias)


def _resnet(
    name: str,
    block: type[BasicBlock | Bottleneck],
    layers: Sequence[int],
    weights: WeightsSource,
    progress: bool,
    **kwargs: Any,
) -> ResNet:
    """Builds a network and loads its weights.

    Every constructor below takes the same arguments:
        weights: None for random ones; a torchvision weights enum member or its name (the file is
            downloaded and its hash checked); the path of a checkpoint; or a state dict.
            `num_classes` follows the weights unless it is given.
        progress: whether a download shows its progress.
        **kwargs: arguments of `ResNet`.

    Raises ValueError for unknown names, CheckpointError for files that cannot be read and
    RuntimeError (from `load_state_dict`) for weights of another architecture.
    """
    state = load_weights(name, weights, progress)
    if state is not None and "fc.weight" in state:
        kwargs.setdefault("num_classes", state["fc.weight"].shape[0])
    model = ResNet(block, layers, **kwargs)
    if state is not None:
        model.load_state_dict(state)
    return model


def resnet18(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18 (paper, Table 1)."""
    return _resnet("resnet18", BasicBlock, (2, 2, 2, 2), weights, progress, **kwargs)


def resnet34(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34 (paper, Table 1)."""
    return _resnet("resnet34", BasicBlock, (3, 4, 6, 3), weights, progress, **kwargs)


def resnet50(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 (paper, Table 1; stride on the 3×3)."""
    return _resnet("resnet50", Bottleneck, (3, 4, 6, 3), weights, progress, **kwargs)


def resnet101(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 (paper, Table 1; stride on the 3×3)."""
    return _resnet("resnet101", Bottleneck, (3, 4, 23, 3), weights, progress, **kwargs)


def resnet152(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152 (paper, Table 1; stride on the 3×3)."""
    return _resnet("resnet152", Bottleneck, (3, 8, 36, 3), weights, progress, **kwargs)


def resnext50_32x4d(weights: WeightsSource = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50 32×4d (arXiv 1611.05431)."""
    return _resnet(
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
    return _resnet(
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
    return _resnet(
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
    return _resnet(
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
    return _resnet(
        "wide_resnet101_2",
        Bottleneck,
        (3, 4, 23, 3),
        weights,
        progress,
        width_per_group=128,
        **kwargs,
    )
