"""Average precision: PASCAL VOC's at IoU 0.5, and MS COCO's."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from .scenes import Scene

# Per image: "boxes" (M, 4), "scores" (M,), "labels" (M,), on the CPU.
Detections = Sequence[dict[str, Tensor]]


def voc_precision(
    scenes: Sequence[Scene], found: Detections, classes: int, eleven_points: bool
) -> list[float]:
    """AP at IoU 0.5 of each class, in percent; NaN for classes that no image holds.

    As the development kit does it: detections in the order of their scores; each belongs to the
    object of its class that it overlaps most; it is right if that is by at least 0.5 and nobody
    came before. Difficult objects count for nothing. AP is the area under the precision, made
    monotone; with `eleven_points` its mean at recall 0, 0.1, ..., 1 (2007).
    """
    return [_voc_class(scenes, found, label, eleven_points) for label in range(1, classes + 1)]


def _voc_class(
    scenes: Sequence[Scene], found: Detections, label: int, eleven_points: bool
) -> float:
    objects, scores, right, wrong = 0, [], [], []
    for scene, detections in zip(scenes, found, strict=True):
        held = scene.labels == label
        boxes, ignored = scene.boxes[held], scene.ignored[held]
        objects += int((~ignored).sum())
        mine = detections["labels"] == label
        order = detections["scores"][mine].argsort(descending=True, stable=True)
        overlaps = box_iou(detections["boxes"][mine][order], boxes)
        taken = set()
        for score, overlap in zip(
            detections["scores"][mine][order].tolist(), overlaps, strict=True
        ):
            best = int(overlap.argmax()) if len(boxes) else -1
            hit = best >= 0 and float(overlap[best]) >= 0.5
            if hit and ignored[best]:
                continue
            scores.append(score)
            right.append(hit and best not in taken)
            wrong.append(not right[-1])
            if hit:
                taken.add(best)
    if not objects:
        return float("nan")
    order = torch.tensor(scores).argsort(descending=True, stable=True)
    hits = torch.tensor(right, dtype=torch.float64)[order].cumsum(0)
    misses = torch.tensor(wrong, dtype=torch.float64)[order].cumsum(0)
    recall, precision = hits / objects, hits / (hits + misses)
    # The best precision at this recall or a higher one.
    precision = precision.flip(0).cummax(0).values.flip(0) if len(precision) else precision
    if eleven_points:
        levels = [precision[recall >= level / 10 - 1e-12] for level in range(11)]
        return 100 * sum(float(above[0]) if len(above) else 0.0 for above in levels) / 11
    steps = recall.diff(prepend=torch.zeros(1, dtype=torch.float64))
    return 100 * float((steps * precision).sum())


def coco_precision(scenes: Sequence[Scene], found: Detections) -> dict[str, float]:
    """COCO's AP (mean over IoU 0.5, 0.55, ..., 0.95) and its AP at 0.5, in percent.

    By pycocotools. Ignored objects count as crowds.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    objects = [
        {
            "image_id": image,
            "category_id": int(label),
            "bbox": _corner_and_size(box),
            "area": float((box[2] - box[0]) * (box[3] - box[1])),
            "iscrowd": int(ignored),
        }
        for image, scene in enumerate(scenes)
        for box, label, ignored in zip(scene.boxes, scene.labels, scene.ignored, strict=True)
    ]
    results = [
        {
            "image_id": image,
            "category_id": int(label),
            "bbox": _corner_and_size(box),
            "score": float(score),
        }
        for image, detections in enumerate(found)
        for box, score, label in zip(
            detections["boxes"], detections["scores"], detections["labels"], strict=True
        )
    ]
    present = {int(label) for scene in scenes for label in scene.labels}
    if not results:
        return {"AP": 0.0, "AP50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": image} for image in range(len(scenes))],
            "annotations": [{"id": i, **entry} for i, entry in enumerate(objects, 1)],
            "categories": [{"id": label} for label in sorted(present)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"AP": 100 * float(evaluation.stats[0]), "AP50": 100 * float(evaluation.stats[1])}


def _corner_and_size(box: Tensor) -> list[float]:
    left, top, right, bottom = box.tolist()
    return [left, top, right - left, bottom - top]
