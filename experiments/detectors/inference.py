"""Testing a detector as appendix B does: over several scales, and with refined boxes.

Box refinement: the regions' boxes, as regressed, are regions once more; both rounds' predictions
are united, suppressed by NMS, and what remains votes (Gidaris and Komodakis, arXiv 1505.01749).
Multi-scale testing: proposals come from the usual scale. Each region is pooled from the two
adjacent scales at which it is nearest to 224 pixels, both go through the layers behind, and the
larger of the two numbers is taken, feature by feature (maxout; Ren et al., arXiv 1504.06066).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

# The paper's scales as parts of the usual one: {200, 400, 600, 800, 1000} / 600.
SCALES = (1 / 3, 2 / 3, 1.0, 4 / 3, 5 / 3)
_REGION = 224 / 600  # the side that regions should have, as a part of the usual scale's
_VOTES = 0.5  # the overlap from which a box votes


class _Level(NamedTuple):
    """Feature maps of the image at one scale."""

    images: ImageList
    maps: dict[str, Tensor]

    @property
    def size(self) -> tuple[int, int]:
        return self.images.image_sizes[0]


@torch.no_grad()
def detect(
    model: FasterRCNN, image: Tensor, scales: Sequence[float] = (1.0,), refine: bool = False
) -> dict[str, Tensor]:
    """Objects in `image` (3, H, W), 0 to 1: boxes (M, 4) in its pixels, scores and labels (M,).

    model: in eval mode. scales: of the shorter side, as parts of the model's own, ascending.
    refine: refine boxes, and let them vote.

    With the defaults the result is `model([image])[0]`.
    """
    usual = _level(model, image, 1.0)
    levels = [usual if scale == 1.0 else _level(model, image, scale) for scale in scales]
    proposals, _ = model.rpn(usual.images, usual.maps)
    regions: Tensor = proposals[0]
    scores, boxes = _predict(model, usual, levels, regions)
    if refine:
        best = scores[:, 1:].argmax(1) + 1
        again = boxes[torch.arange(len(boxes), device=boxes.device), best]
        more_scores, more_boxes = _predict(model, usual, levels, again)
        scores, boxes = torch.cat([scores, more_scores]), torch.cat([boxes, more_boxes])
    found = _select(model, scores, boxes, vote=refine)
    found["boxes"] = resize_boxes(found["boxes"], list(usual.size), list(image.shape[-2:]))
    return found


def _level(model: FasterRCNN, image: Tensor, scale: float) -> _Level:
    transform = copy.copy(model.transform)
    transform.min_size = (round(model.transform.min_size[-1] * scale),)
    transform.max_size = round(model.transform.max_size * scale)
    images, _ = transform([image])
    return _Level(images, model.backbone(images.tensors))


def _predict(
    model: FasterRCNN, usual: _Level, levels: Sequence[_Level], regions: Tensor
) -> tuple[Tensor, Tensor]:
    """Posteriors (R, C) and boxes (R, C, 4) of all classes for regions in usual coordinates."""
    heads = model.roi_heads
    features = _features(model, usual, levels, regions)
    logits, regression = heads.box_predictor(features)
    boxes = heads.box_coder.decode(regression, [regions])
    return F.softmax(logits, -1), clip_boxes_to_image(boxes, usual.size)


def _features(
    model: FasterRCNN, usual: _Level, levels: Sequence[_Level], regions: Tensor
) -> Tensor:
    """Of each region, the largest over the levels that it is pooled from (R, C)."""
    heads = model.roi_heads
    uses = _levels_used(regions, usual, levels, _REGION * model.transform.min_size[-1])
    merged: Tensor | None = None
    for level, used in zip(levels, uses.T, strict=True):
        boxes = resize_boxes(regions[used], list(usual.size), list(level.size))
        pooled = heads.box_roi_pool(level.maps, [boxes], level.images.image_sizes)
        features = heads.box_head(pooled)
        if merged is None:
            merged = features.new_full((len(regions), features.shape[1]), -torch.inf)
        merged[used] = torch.maximum(merged[used], features)
    assert merged is not None
    return merged


def _levels_used(regions: Tensor, usual: _Level, levels: Sequence[_Level], side: float) -> Tensor:
    """Bool (R, levels): the two adjacent levels at which a region's side is nearest to `side`.

    Nearest is the least |log side - log level side|, summed over the two.
    """
    if len(levels) == 1:
        return torch.ones(len(regions), 1, dtype=torch.bool, device=regions.device)
    own = (regions[:, 2:] - regions[:, :2]).clamp(min=1e-3).log().mean(1, keepdim=True)
    factors = regions.new_tensor([level.size[0] / usual.size[0] for level in levels])
    distance = (own + (factors / side).log()).abs()
    first = (distance[:, :-1] + distance[:, 1:]).argmin(1, keepdim=True)
    place = torch.arange(len(levels), device=regions.device)
    return (place == first) | (place == first + 1)


def _select(model: FasterRCNN, scores: Tensor, boxes: Tensor, vote: bool) -> dict[str, Tensor]:
    """What remains of the predictions after NMS, the highest score first."""
    heads = model.roi_heads
    labels = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    flat = boxes[:, 1:].reshape(-1, 4), scores[:, 1:].reshape(-1), labels[:, 1:].reshape(-1)
    likely = flat[1] > heads.score_thresh
    boxes, scores, labels = (values[likely] for values in flat)
    whole = remove_small_boxes(boxes, 1e-2)
    boxes, scores, labels = boxes[whole], scores[whole], labels[whole]
    kept = batched_nms(boxes, scores, labels, heads.nms_thresh)[: heads.detections_per_img]
    chosen = boxes[kept]
    if vote:
        chosen = voted(chosen, labels[kept], boxes, scores, labels)
    return {"boxes": chosen, "scores": scores[kept], "labels": labels[kept]}


def voted(
    chosen: Tensor, chosen_labels: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor
) -> Tensor:
    """Each chosen box as the mean of the boxes of its class that overlap it by half, weighted by
    their scores."""
    weights = (box_iou(chosen, boxes) >= _VOTES) & (chosen_labels[:, None] == labels)
    weighted = weights * scores
    return weighted @ boxes / weighted.sum(1, keepdim=True)
