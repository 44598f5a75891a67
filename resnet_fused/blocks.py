"""BasicBlock, Bottleneck and PlainBlock (paper, Fig. 5 and section 3.3): which ops, in which order.

Constructor arguments, submodule names and numerics are torchvision's, so weights move freely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from . import fusion, sequence, traced
from .ops.block_training import residual_block_training
from .ops.bottleneck import bottleneck
from .ops.conv_bn import conv_bn
from .ops.conv_bn_projection import conv_bn_projection
from .ops.training_choice import run_on, training_backend
from .parameters import ConvBn, Convolution, GroupNorm

NormLayer = Callable[[int], nn.Module]


def conv3x3(
    inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """3×3 convolution without bias, padded to keep the size at stride 1."""
    return nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """1×1 convolution without bias."""
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)


class PaddedIdentity(nn.Module):
    """Shortcut option A (paper, section 3.3): x at every stride-th position, channels zero-padded.

    It has no parameters. As a block's `downsample` it is fused: the block's last kernel reads x in
    place, and no padded copy is made.

    Args:
        inplanes: channels of x.
        outplanes: channels of the result, whose last ones are zero.
        stride: rows and columns from one sample to the next.

    Raises ValueError where channels would have to be dropped.
    """

    def __init__(self, inplanes: int, outplanes: int, stride: int = 1) -> None:
        super().__init__()
        if outplanes < inplanes:
            raise ValueError(
                f"shortcut option A pads channels and cannot drop any: {inplanes} come in and "
                f"outplanes is {outplanes}; use a projection (option B)."
            )
        self.inplanes, self.outplanes, self.stride = inplanes, outplanes, stride

    def sampled(self, x: Tensor) -> Tensor:
        """The positions that are read, a view (N, inplanes, P, Q)."""
        return x[:, :, :: self.stride, :: self.stride]

    def forward(self, x: Tensor) -> Tensor:
        """x (N, inplanes, H, W) -> (N, outplanes, ⌈H/stride⌉, ⌈W/stride⌉)."""
        # Sizes are the module's own: torch.fx cannot branch on a shape.
        return F.pad(self.sampled(x), (0, 0, 0, 0, 0, self.outplanes - self.inplanes))

    def extra_repr(self) -> str:
        return f"{self.inplanes}, {self.outplanes}, stride={self.stride}"


def _in_turn(x: Tensor, layers: Sequence[ConvBn]) -> Tensor:
    for layer in layers:
        x = conv_bn(x, layer, relu=True)
    return x


class ResidualBlock(nn.Module):
    """relu(F(x) + shortcut(x)); F is `layers()`, each convolution with its BN, ReLU between.

    `forward_unfused` says what a block means, module by module. In its place, where nobody could
    tell, run the fused ops: where all of F normalises with running statistics (eval mode, frozen),
    one op for each layer, the last of which takes the shortcut with it (the identity, read in place
    where it is strided and padded, or a strided projection accumulated in the same kernel), and one
    for a Bottleneck as a whole; in training one op for the block, where the backend trains fused.
    """

    # Whether anything is added to F(x); if so, downsample(x), or x itself where it is None.
    has_shortcut = True
    if TYPE_CHECKING:  # TorchScript reads a class's annotations
        relu: nn.Module
        downsample: nn.Module | None

    def layers(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        """The (convolution, normalisation) pairs of F, in order."""
        raise NotImplementedError

    def activations(self) -> tuple[nn.Module, ...]:
        """The activation behind each layer, the last one behind the addition."""
        return (self.relu,)

    def forward_unfused(self, x: Tensor) -> Tensor:
        """x (N, inplanes, H, W) -> (N, planes × expansion, P, Q), each module called in turn."""
        raise NotImplementedError

    @traced.annotated
    def forward(self, x: Tensor) -> Tensor:
        """x (N, inplanes, H, W) -> (N, planes × expansion, P, Q)."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.forward_unfused(x)
        else:
            out = self._forward_fused(x)
            return fusion.run_unfused(self.forward_unfused, self, x) if out is None else out

    def _forward_fused(self, x: Tensor) -> Tensor | None:
        """The block by fused ops, or None where its modules have to run."""
        if isinstance(x, Proxy):
            traced.fuse(x.tracer.graph)
            return None
        if fusion.must_call_modules(x) or not all(map(fusion.is_relu, self.activations())):
            return None
        if self.training:
            pairs, identity = self.training_pairs(), self._padded_identity()
            plan = None if pairs is None else fusion.training_plan(pairs)
            if pairs is None or plan is None:
                return None
            if not plan.is_frozen() or plan.needs_gradients(x):
                return self._train(x, pairs, plan, identity)
        layers = [fusion.conv_bn(conv, bn) for conv, bn in self.layers()]
        fused = [layer for layer in layers if layer is not None]
        if len(fused) == len(layers):
            return self._infer(x, fused)
        layers_by_groups = [fusion.conv_group_norm(conv, norm) for conv, norm in self.layers()]
        by_groups = [layer for layer in layers_by_groups if layer is not None]
        return self._infer_by_groups(x, by_groups) if len(by_groups) == len(layers) else None

    def _infer(self, x: Tensor, layers: list[ConvBn]) -> Tensor:
        """The block as one op, or each layer as one, the last with the shortcut."""
        if not self.has_shortcut:
            return _in_turn(x, layers)
        *inner, last = layers
        if (identity := self._padded_identity()) is not None:
            sampled, out = identity.sampled(x), _in_turn(x, inner)
            return conv_bn(out, last, residual=sampled, relu=True, pad_residual=True)
        before: Sequence[nn.Module] = ()
        projection = None
        if self.downsample is not None:
            modules = fusion.projection_modules(self.downsample)
            projection = None if modules is None else fusion.conv_bn(*modules[-2:])
            before = [self.downsample] if modules is None or projection is None else modules[:-2]
        if len(layers) == 3 and not before:
            first, second, third = layers
            return bottleneck(x, (first, second, third), projection)
        out, shortcut = _in_turn(x, inner), x
        for module in before:
            shortcut = module(shortcut)
        if projection is None:
            return conv_bn(out, last, residual=shortcut, relu=True)
        return conv_bn_projection(out, last, shortcut, projection)

    def _infer_by_groups(self, x: Tensor, layers: list[tuple[Convolution, GroupNorm]]) -> Tensor:
        """The block where groups of channels are normalised, the last op with the shortcut."""
        *inner, last = layers
        out, shortcut = x, None
        for layer in inner:
            out = sequence.conv_group_norm(out, layer, None, True)
        if self.has_shortcut:
            shortcut = x if self.downsample is None else sequence.run([self.downsample], x)
        return sequence.conv_group_norm(out, last, shortcut, True)

    def _padded_identity(self) -> PaddedIdentity | None:
        module = self.downsample
        if type(module) is PaddedIdentity and fusion.untouched(module):
            return module
        return None

    def training_pairs(self) -> list[tuple[nn.Module, nn.Module]] | None:
        """The pairs of F and then of the projection, or None for a shortcut of another kind."""
        pairs = list(self.layers())
        if not self.has_shortcut or self.downsample is None or self._padded_identity() is not None:
            return pairs
        projection = fusion.projection_modules(self.downsample)
        if projection is None or len(projection) > 2:
            return None
        return [*pairs, (projection[0], projection[1])]

    def _train(
        self,
        x: Tensor,
        pairs: list[tuple[nn.Module, nn.Module]],
        plan: fusion.TrainingPlan,
        identity: PaddedIdentity | None,
    ) -> Tensor | None:
        """The block as one op, forward and backward, or None where the backend has none."""
        layers, shortcut = plan.layers, None
        if len(layers) > len(self.layers()):
            *layers, shortcut = layers
        stride = None if identity is None else identity.stride
        block = (x, layers, shortcut, self.has_shortcut, plan.sync_group, stride)
        backend = training_backend(*block)
        if backend is None:
            return None
        out, scale_shifts = run_on(backend, residual_block_training, *block)
        fusion.track_statistics([bn for _, bn in pairs], scale_shifts)
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
        name = type(self).__name__
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"{name} has groups=1 and base_width=64 only, found groups={groups} and "
                f"base_width={base_width}; use Bottleneck."
            )
        if dilation > 1:
            raise NotImplementedError(
                f"{name} has dilation=1 only, found {dilation}; use Bottleneck."
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

    def forward_unfused(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        identity = x
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class PlainBlock(BasicBlock):
    """3×3, 3×3 without a shortcut: two layers of a plain network (paper, section 3.3)."""

    has_shortcut = False

    def forward_unfused(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


class Bottleneck(ResidualBlock):
    """1×1, 3×3, 1×1: the block of ResNet-50 and deeper (paper, Fig. 5 right).

    stride_in: "3x3", as in torchvision ("v1.5"), or "1x1", the paper's place for the stride.
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
        stride_in: str = "3x3",
    ) -> None:
        super().__init__()
        if stride_in not in ("3x3", "1x1"):
            raise ValueError(f'stride_in must be "3x3" or "1x1", found {stride_in!r}.')
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        first, middle = (stride, 1) if stride_in == "1x1" else (1, stride)
        self.conv1 = conv1x1(inplanes, width, first)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, middle, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def layers(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)

    def forward_unfused(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)
