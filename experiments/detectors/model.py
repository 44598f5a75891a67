"""Faster R-CNN on fused ResNets with frozen batch norm, through torchvision's detection package.

c4: the paper's arrangement (appendix A). conv1 to conv4 are shared by proposals and regions;
regions are pooled before conv5, which is the head, and two sibling layers follow. Pooling is
RoIAlign, torchvision's, where the paper rounds regions to whole positions.
fpn: a feature pyramid on conv2 to conv5 (Lin et al., arXiv 1612.03144).
context: each region's features are joined by those of the image's whole box (appendix B).

The mean and variance of each batch norm layer are fixed, and its scale and shift too: "the BN
layers become linear activations with constant offsets and scales" (appendix A).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import mul
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from resnet_fused import BasicBlock, Bottleneck, freeze_batch_norm
from resnet_fused.blocks import ResidualBlock
from resnet_fused.models.network import ResidualNetwork

ARRANGEMENTS = ("c4", "c4+context", "fpn", "fpn+context")
_RATIOS = (0.5, 1.0, 2.0)
_LONGEST = 1000 / 600  # the longer side at most, in shorter sides (Faster R-CNN)
# Sides of the anchors, c4: Faster R-CNN's for images whose shorter side is 600, and the smaller one
# that COCO's objects need; fpn: one for each level, eight times its stride, whatever the image's
# side, because a level's positions are too far apart to find smaller objects.
_C4_SIDE, _C4_ANCHORS = 600, (64, 128, 256, 512)
_FPN_ANCHORS = (32, 64, 128, 256, 512)


class C4Backbone(nn.Module):
    """conv1 to conv4: images (N, 3, H, W) -> {"0": (N, C, H/16, W/16)}."""

    def __init__(self, network: ResidualNetwork) -> None:
        super().__init__()
        self.out_channels = _channels(network)[2]
        network.layer4 = network.fc = nn.Identity()
        self.network = network

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"0": self.network.features(x)[-1]}


class Conv5Head(nn.Module):
    """conv5 on pooled regions (R, C, P, P), and average pooling: (R, C')."""

    def __init__(self, conv5: nn.Module) -> None:
        super().__init__()
        self.conv5 = conv5

    def forward(self, x: Tensor) -> Tensor:
        return self.conv5(x).mean((2, 3))


class ContextFeatures(nn.Module):
    """Regions' features, each joined by those of its image's whole box: (R, 2 C).

    It stands in the place of `pool`, and does the work of the `head` behind it too.
    """

    def __init__(self, pool: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.pool, self.head = pool, head

    def forward(
        self, maps: dict[str, Tensor], regions: list[Tensor], sizes: list[tuple[int, int]]
    ) -> Tensor:
        """maps: by level. regions: of each image (R, 4). sizes: of the images, height first."""
        boxes = [
            torch.cat([own, own.new_tensor([[0, 0, width, height]])])
            for own, (height, width) in zip(regions, sizes, strict=True)
        ]
        features = self.head(self.pool(maps, boxes, sizes))
        return torch.cat(
            [
                torch.cat([own[:-1], own[-1:].expand(len(own) - 1, -1)], 1)
                for own in features.split([len(own) for own in boxes])
            ]
        )


class FpnBackbone(nn.Module):
    """Images (N, 3, H, W) -> (N, channels, ...) at strides 4 to 32 ("0" to "3") and 64 ("pool")."""

    def __init__(self, network: ResidualNetwork, channels: int) -> None:
        super().__init__()
        self.out_channels = channels
        self.pyramid = FeaturePyramidNetwork(
            _channels(network), self.out_channels, LastLevelMaxPool()
        )
        network.fc = nn.Identity()
        self.network = network

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.pyramid({str(i): map_ for i, map_ in enumerate(self.network.features(x))})


def _channels(network: ResidualNetwork) -> list[int]:
    """Of the four stages' results."""
    lasts = [cast("ResidualBlock", stage[-1]).layers()[-1][0] for stage in network.stages()]
    return [cast("nn.Conv2d", convolution).out_channels for convolution in lasts]


def _strides(network: ResidualNetwork) -> list[int]:
    """Of the four stages' results on the image; the stem's is 4."""
    own = [cast("BasicBlock | Bottleneck", stage[0]).stride for stage in network.stages()]
    return list(itertools.accumulate(own, mul, initial=4))[1:]


def faster_rcnn(
    network: ResidualNetwork,
    arrangement: str,
    classes: int,
    side: int,
    mean: Sequence[float],
    std: Sequence[float],
    positions: int = 256,
    regions: int = 128,
    candidates: int = 2000,
    proposals: int = 300,
    pooled: int = 14,
    pyramid: int = 256,
) -> FasterRCNN:
    """Faster R-CNN on `network`, whose batch norm is frozen and whose classifier is dropped.

    arrangement: one of ARRANGEMENTS. classes: without the background.
    side: shorter side of the images, 600 in the paper; c4's anchors are in proportion to it.
    positions, regions: of each image, that train the proposals' layers and the head. Where few
        anchors fit an object, fewer positions leave those a larger part.
    candidates, proposals: boxes proposed in each image in training, among which regions are drawn,
        and in testing. They should be few among the anchors: else most regions in training hold
        nothing at all, and nobody learns that a box beside an object is wrong.
    pooled: side of c4's regions, which a strided conv5 halves; with a dilated one it is half.
    pyramid: channels of fpn.
    """
    freeze_batch_norm(network)
    strides = _strides(network)
    kind, _, context = arrangement.partition("+")
    if kind == "c4":
        *_, conv5 = network.stages()
        width = _channels(network)[-1]
        size = pooled if strides[3] > strides[2] else pooled // 2
        anchors = [[round(anchor * side / _C4_SIDE) for anchor in _C4_ANCHORS]]
        pool = _region_pool(strides[2:3], size)
        backbone: nn.Module = C4Backbone(network)
        head: dict[str, Any] = {
            "box_head": Conv5Head(conv5),
            "box_predictor": FastRCNNPredictor(width, classes + 1),
        }
    else:
        anchors = [[anchor] for anchor in _FPN_ANCHORS]
        pool = _region_pool(strides, 7)
        backbone = FpnBackbone(network, pyramid)
        head = {"num_classes": classes + 1}
    detector = FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(tuple(map(tuple, anchors)), (_RATIOS,) * len(anchors)),
        rpn_batch_size_per_image=positions,
        rpn_post_nms_top_n_train=candidates,
        rpn_post_nms_top_n_test=proposals,
        box_roi_pool=pool,
        box_batch_size_per_image=regions,
        box_nms_thresh=0.3,  # appendix B
        min_size=side,
        max_size=round(_LONGEST * side),
        image_mean=list(mean),
        image_std=list(std),
        **head,
    )
    if context:
        heads = detector.roi_heads
        heads.box_roi_pool = ContextFeatures(heads.box_roi_pool, heads.box_head)
        heads.box_head = nn.Identity()
        width = heads.box_predictor.cls_score.in_features
        heads.box_predictor = FastRCNNPredictor(2 * width, classes + 1)
    for module in (detector.rpn.head, detector.roi_heads.box_predictor):
        module.register_forward_hook(_in_float32)
    return detector


def _in_float32(_module: nn.Module, _inputs: object, results: tuple[Any, ...]) -> tuple[Any, ...]:
    """Boxes are decoded in the type of their codes; autocast's would move them by whole pixels."""
    return tuple([r.float() for r in x] if isinstance(x, list) else x.float() for x in results)


def _region_pool(strides: Sequence[int], size: int) -> MultiScaleRoIAlign:
    """Pools regions to `size`×`size` from maps of the given strides.

    It learns the strides from the first maps it sees, rounding to powers of two, which padding
    would mislead where images are small; so it first sees maps without any.
    """
    names = [str(i) for i in range(len(strides))]
    pool = MultiScaleRoIAlign(names, size, sampling_ratio=2)
    image = 32 * max(strides)
    maps = {
        name: torch.zeros(1, 1, image // stride, image // stride)
        for name, stride in zip(names, strides, strict=True)
    }
    pool(maps, [torch.tensor([[0.0, 0.0, 1.0, 1.0]])], [(image, image)])
    return pool
