"""What every network here is: a stem, stages of blocks, average pooling and a classifier."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from .. import fusion, plan, sequence, traced
from ..blocks import (
    BasicBlock,
    Bottleneck,
    NormLayer,
    PaddedIdentity,
    ResidualBlock,
    conv1x1,
)
from ..ops.checks import check_images, check_is_tensor
from ..ops.head import head
from ..parameters import Normalization
from ..reference import ops as reference


class StageShape(NamedTuple):
    """`blocks` blocks of `planes` channels (times the block's expansion), the first strided."""

    planes: int
    blocks: int
    stride: int = 1
    dilate: bool = False  # instead of striding


class Stage(nn.Sequential):
    """Residual blocks in a row; `run` > 0 checkpoints every so many of them.

    Of a checkpointed run only the input is kept for backward, where the run is computed again.
    """

    __slots__ = ("_plans",)  # as of the network below
    if TYPE_CHECKING:  # TorchScript reads a class's annotations
        _plans: plan.TrainingPlans
    run = 0

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> the last block's result."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            for block in self:
                x = block(x)
            return x
        else:
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if not self.run or not torch.is_grad_enabled():
            planned = plan.train(self, x)
            return _in_turn(self, x) if planned is None else planned
        blocks = list(self)
        for start in range(0, len(blocks), self.run):
            part = blocks[start : start + self.run]
            x = checkpoint(
                _in_turn,
                part,
                x,
                use_reentrant=False,
                context_fn=partial(_forward_and_again, part),
            )
        return x


def _in_turn(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def _forward_and_again(
    blocks: Sequence[nn.Module],
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), _untracked(blocks)


@contextlib.contextmanager
def _untracked(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While the blocks are computed again, their running statistics stay what they are.

    They are still passed on, so that as many tensors are saved as in the first forward.
    """
    norms: list[Any] = [
        module
        for block in blocks
        for module in block.modules()
        if getattr(module, "track_running_stats", False) and module.training
    ]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


# The methods that a network's forward consists of.
_PIECES = ("_forward", "_stem", "_image_stem", "_stem_unfused", "_head", "stages")


class ResidualNetwork(nn.Module):
    """A stem, stages `layer1`, `layer2`, ..., average pooling and a fully connected layer.

    Submodule names are torchvision's. Arguments, beside those of `resnet_fused.ResNet`:
        stem: `conv1`, a convolution or several in an `nn.Sequential` that ends with one.
        pool: `maxpool` behind it, or None.
        stages: what each stage is made of.

    Attributes, beside torchvision's:
        normalization: what `forward` does with images of bytes, a `resnet_fused.ops.Normalization`
            (mean and standard deviation of each channel); None, at first: they are refused.
    """

    # In a slot, not among the attributes: plans are of one object and do not travel with a copy.
    __slots__ = ("_plans",)
    if TYPE_CHECKING:  # TorchScript reads a class's annotations
        _plans: plan.Plans
        normalization: Normalization | None
        conv1: nn.Module
        bn1: nn.Module
        relu: nn.Module
        maxpool: nn.Module | None
        layer1: nn.Module
        layer2: nn.Module
        layer3: nn.Module
        layer4: nn.Module
        avgpool: nn.Module
        fc: nn.Module
    else:
        normalization = None

    def __init__(
        self,
        stem: nn.Conv2d | nn.Sequential,
        pool: nn.MaxPool2d | None,
        block: type[BasicBlock | Bottleneck],
        stages: Sequence[StageShape],
        num_classes: int,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        norm_layer: NormLayer | None = None,
        shortcut: str = "B",
        stride_in: str = "3x3",
        checkpoint: bool = False,
        avg_down: bool = False,
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B", "C"):
            raise ValueError(f'shortcut must be "A", "B" or "C", found {shortcut!r}.')
        if stride_in != "3x3" and issubclass(block, BasicBlock):
            raise ValueError(
                f"stride_in={stride_in!r} needs bottleneck blocks (ResNet-50 and deeper): "
                f"{block.__name__} has 3×3 convolutions only."
            )
        if avg_down and shortcut == "A":
            raise ValueError(
                'avg_down pools before a projection, of which shortcut="A" has none; use one of '
                "them."
            )
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self._shortcut = shortcut
        self._avg_down = avg_down
        first, last = (stem, stem) if isinstance(stem, nn.Conv2d) else (stem[0], stem[-1])
        self.in_chans, self.inplanes = (
            cast("Any", first).in_channels,
            cast("Any", last).out_channels,
        )
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = stem
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = pool
        placement: dict[str, Any] = {} if stride_in == "3x3" else {"stride_in": stride_in}
        self._stages = [f"layer{i}" for i in range(1, len(stages) + 1)]
        for name, shape in zip(self._stages, stages, strict=True):
            setattr(self, name, self._make_layer(block, shape, placement))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.num_features, self.num_classes = self.inplanes, num_classes
        self.fc = nn.Linear(self.num_features, num_classes)
        self._initialise(zero_init_residual)
        if checkpoint:
            self.set_grad_checkpointing()

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        shape: StageShape,
        placement: dict[str, Any],
    ) -> Stage:
        first_dilation, stride = self.dilation, shape.stride
        if shape.dilate:
            self.dilation *= stride
            stride = 1
        outplanes = shape.planes * block.expansion
        sizes = (self.groups, self.base_width)
        stage: list[nn.Module] = []
        for i in range(shape.blocks):
            stride, dilation = (1, self.dilation) if i else (stride, first_dilation)
            downsample = self._make_shortcut(outplanes, stride) if block.has_shortcut else None
            stage.append(
                block(
                    self.inplanes,
                    shape.planes,
                    stride,
                    downsample,
                    *sizes,
                    dilation,
                    self._norm_layer,
                    **placement,
                )
            )
            self.inplanes = outplanes
        return Stage(*stage)

    def _make_shortcut(self, outplanes: int, stride: int) -> nn.Module | None:
        """The module between a block's input and its addition, None for the identity."""
        if stride == 1 and self.inplanes == outplanes and self._shortcut != "C":
            return None
        if self._shortcut == "A":
            return PaddedIdentity(self.inplanes, outplanes, stride)
        if self._avg_down:  # ResNet-D (arXiv 1812.01187, Fig. 2c): the projection sees every pixel
            pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
            return nn.Sequential(
                nn.Identity() if stride == 1 else pool,
                conv1x1(self.inplanes, outplanes),
                self._norm_layer(outplanes),
            )
        return nn.Sequential(conv1x1(self.inplanes, outplanes, stride), self._norm_layer(outplanes))

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

    def stages(self) -> Iterator[Stage]:
        """The stages, from the input to the output."""
        for name in self._stages:
            yield getattr(self, name)

    def blocks(self) -> Iterator[ResidualBlock]:
        """Every residual block, from the input to the output."""
        for stage in self.stages():
            yield from cast("Iterator[ResidualBlock]", stage)

    def forward_scripted(self, x: Tensor) -> Tensor:
        """`forward` as TorchScript compiles it, which cannot go through a list of stages."""
        raise NotImplementedError

    @traced.annotated
    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images x (N, 3, H, W) of the weights' dtype and device, or of
        uint8 where `normalization` says how they become numbers: those of (x / 255 - mean) / std,
        without that tensor in memory where a kernel of the stem reads bytes.

        Any memory layout and any H, W that leave at least one pixel per stage. In eval mode the
        layers run as fused ops, in training mode the stem and each block, where the backend trains
        fused; raises ValueError or TypeError for an input that does not fit.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.forward_scripted(x)
        else:
            return self._forward(x)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def _forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and (planned := plan.run(self, x)) is not None:
            return planned
        x = self._stem(x)
        for stage in self.stages():
            x = stage(x)
        return self._head(x)

    def parts(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        """The network in pieces, by name: the stem, every block and the head, each to be applied to
        the result of the one before."""
        yield "stem", self._stem
        for name, stage in zip(self._stages, self.stages(), strict=True):
            for i, block in enumerate(stage):
                yield f"{name}.{i}", block
        yield "head", self._head

    def plannable_parts(self) -> Iterator[plan.Part]:
        """The same pieces as far as a plan may stand for them: a stage that somebody hooked or
        replaced is one, and has to be called."""
        own = not plan.shadows(self) and all(
            getattr(type(self), name) is getattr(ResidualNetwork, name) for name in _PIECES
        )
        pool = [] if self.maxpool is None else [self.maxpool]
        yield plan.part(self._stem, [*self.conv1.modules(), self.bn1, self.relu, *pool], own)
        for stage in self.stages():
            if own and type(stage) is Stage and fusion.untouched(stage):
                for block in stage:
                    yield plan.part(block, list(block.modules()), own)
            else:
                yield plan.Part(stage, None)
        yield plan.part(self._head, [self.avgpool, self.fc], own)

    def features(self, x: Tensor, out_indices: Sequence[int] | None = None) -> list[Tensor]:
        """Results (N, C, H / its stride, W / its stride) on the way, for x as in `forward`.

        out_indices: which, in ascending order, counted as timm does: 0 is the stem's before its
            pooling, i what stage `layer{i}` makes. Negative ones count from the end. All stages' if
            None.

        Differentiable, and fused as in `forward`: what detectors and dense predictions build on.
        A stage may be replaced, by `nn.Identity` for example. Raises ValueError for other indices.
        """
        wanted = range(1, len(self._stages) + 1) if out_indices is None else out_indices
        indices = self.feature_indices(wanted)
        found = []
        if indices[0] == 0:
            x = sequence.run([self.conv1, self.bn1, self.relu], x)
            found.append(x)
            x = x if self.maxpool is None else self.maxpool(x)
        else:
            x = self._stem(x)
        for i, stage in zip(range(1, indices[-1] + 1), self.stages(), strict=False):
            x = stage(x)
            if i in indices:
                found.append(x)
        return found

    def feature_indices(self, wanted: Sequence[int]) -> list[int]:
        """The `out_indices` of `features` counted from the beginning; ValueError for wrong ones."""
        count = len(self._stages) + 1
        indices = [i + count if i < 0 else i for i in wanted]
        if (
            not indices
            or sorted({*indices}) != indices
            or not 0 <= indices[0] <= indices[-1] < count
        ):
            raise ValueError(
                f"out_indices must be ascending and lie within 0 to {count - 1}, "
                f"found {tuple(wanted)}."
            )
        return indices

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's result, before the pooling. As timm's, like the methods below."""
        x = self._stem(x)
        for stage in self.stages():
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the last stage's result x, or what the classifier is applied to."""
        return torch.flatten(self.avgpool(x), 1) if pre_logits else self._head(x)

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The classifier, or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Gives the network a new classifier, none for 0 classes: it then returns pooled features.

        global_pool: None or "avg", which it has; ValueError for others.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(
                f'global_pool must be "avg" or None, found {global_pool!r}; '
                "replace `avgpool` for another pooling."
            )
        self.num_classes = num_classes
        if num_classes:
            like = next(self.parameters())
            fc: nn.Module = nn.Linear(
                self.num_features, num_classes, device=like.device, dtype=like.dtype
            )
        else:
            fc = nn.Identity()
        self.fc = fc.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep less for backward and compute it again there: of n blocks every √n-th one's input
        stays in memory. Not to be called where a stage was replaced."""
        blocks = sum(len(stage) for stage in self.stages())
        for stage in self.stages():
            stage.run = max(math.isqrt(blocks), 1) if enable else 0

    def _stem(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            traced.fuse(x.tracer.graph)
        else:
            check_is_tensor(x)
        if self.normalization is not None and isinstance(x, Tensor) and x.dtype == torch.uint8:
            return self._image_stem(x, self.normalization)
        if fusion.must_call_modules(x):
            return fusion.run_unfused(self._stem_unfused, self, x)
        if isinstance(self.conv1, nn.Sequential):
            pool = [] if self.maxpool is None else [self.maxpool]
            return sequence.run([self.conv1, self.bn1, self.relu, *pool], x)
        out = sequence.fused(x, self.conv1, self.bn1, self.relu, self.maxpool)
        if out is None:
            # As the fused ops leave it, and faster than what PyTorch makes of NCHW.
            x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
            out = fusion.run_unfused(self._stem_unfused, self, x)
        return out

    def _image_stem(self, images: Tensor, normalization: Normalization) -> Tensor:
        out = None
        if not fusion.must_call_modules(images):
            layers = self.conv1, self.bn1, self.relu, self.maxpool
            out = sequence.stem_of_images(images, normalization, *layers)
        if out is None:
            check_images(images, normalization)
            dtype = next(self.conv1.parameters()).dtype
            out = self._stem(reference.normalise(images, normalization, dtype))
        return out

    def _stem_unfused(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        if self.maxpool is not None:
            x = self.maxpool(x)
        return x

    def _head(self, x: Tensor) -> Tensor:
        arguments = None
        if not self.training and not fusion.must_call_modules(x):
            arguments = fusion.head(self.avgpool, self.fc)
        if arguments is None:
            return self.fc(torch.flatten(self.avgpool(x), 1))
        return head(x, *arguments)
