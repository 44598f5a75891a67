"""Networks that end with their stages: what `features_only=True` makes, as timm's does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from .network import ResidualNetwork


class Level(NamedTuple):
    """One result of a `FeatureNetwork`."""

    name: str  # the module's that makes it
    channels: int
    reduction: int  # pixels of the image to one of the result, along a side


class FeatureInfo(list[Level]):
    """What each of a `FeatureNetwork`'s results is, in their order."""

    def channels(self) -> list[int]:
        """Channels of each result."""
        return [level.channels for level in self]

    def reduction(self) -> list[int]:
        """Pixels of the image to one of each result, along a side."""
        return [level.reduction for level in self]


class FeatureNetwork(ResidualNetwork):
    """The stem and stages of a network, as far as they are asked for, and the results on the way.

    Submodule names and `state_dict` keys are the network's, without those of what is left out. The
    network itself is used up: both would share their modules.

    Args:
        network: any network of this package.
        out_indices: which results, as in `ResidualNetwork.features`; all, the stem's too, if None.

    Attributes:
        out_indices: those numbers, none of them negative.
        feature_info: a `Level` for each; its `channels()` and `reduction()` are what detectors ask.

    Raises ValueError for other indices.
    """

    def __init__(self, network: ResidualNetwork, out_indices: Sequence[int] | None = None) -> None:
        nn.Module.__init__(self)
        vars(self).update(network.__getstate__())
        wanted = range(len(self._stages) + 1) if out_indices is None else out_indices
        self.out_indices = self.feature_indices(wanted)
        levels = list(_levels(self))
        self.feature_info = FeatureInfo(levels[i] for i in self.out_indices)
        for name in ("avgpool", "fc", *self._stages[self.out_indices[-1] :]):
            delattr(self, name)
        self._stages = self._stages[: self.out_indices[-1]]
        self.num_classes = 0

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Results (N, C, H, W) for images x, one for each of `out_indices`, by fused ops."""
        return self.features(x, self.out_indices)


def _levels(network: ResidualNetwork) -> Iterable[Level]:
    """Every result that the network has, the stem's first."""
    stem = [m for m in network.conv1.modules() if isinstance(m, nn.Conv2d)]
    reduction = _stride(stem)
    yield Level("relu", stem[-1].out_channels, reduction)
    if network.maxpool is not None:
        reduction *= cast("int", network.maxpool.stride)
    for name, stage in zip(network._stages, network.stages(), strict=True):
        convolutions: list[nn.Module] = []
        for block in cast("Any", stage):
            convolutions += [conv for conv, _ in block.layers()]
        reduction *= _stride(convolutions)
        yield Level(name, cast("nn.Conv2d", convolutions[-1]).out_channels, reduction)


def _stride(convolutions: Iterable[nn.Module]) -> int:
    stride = 1
    for conv in convolutions:
        stride *= cast("tuple[int, int]", conv.stride)[0]
    return stride
