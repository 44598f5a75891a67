"""Localization (appendix C): a box of its own for every class, by proposals that are per class.

The network ends as that of region proposals does, behind conv4 in two sibling 1×1 layers, but with
an output for each class: whether an anchor holds an object of the class, a logistic regression,
and the object's box with reference to the anchor. Trained on crops, eight anchors of each, half of
them on an object; tested on the centre crop, or on whole images at several scales. Of a class, the
box of the likeliest anchor counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from common.launch import Launch, seed_of, total
from common.training import autocast
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import box_iou, clip_boxes_to_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from resnet_fused import freeze_batch_norm
from resnet_fused.models.network import ResidualNetwork

from .model import C4Backbone
from .scenes import Scenes
from .training import read

# The side of the paper's crops, and the images' shorter sides in training for them (3.4).
CROP, SIDES = 224, (256, 480)
_ANCHORS = (1 / 4, 1 / 2, 1.0)  # sides as parts of the crop's
_RATIOS = (0.5, 1.0, 2.0)
_STRIDE = 16  # of conv4 at most
_SAMPLED = 8  # anchors of an image that train
_OVERLAP = 0.5  # from which a box is right


class Localizer(nn.Module):
    """conv1 to conv4 of a network, whose batch norm is frozen, and a box per class.

    crop: side of the images that train. sides: the least and the greatest shorter side of the
        images that crops are from, for crops of CROP; in proportion for others.
    mean, std: of the channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: ResidualNetwork,
        classes: int,
        crop: int,
        sides: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        freeze_batch_norm(network)
        self.backbone = C4Backbone(network)
        self.classes, self.crop, self.sides = classes, crop, sides
        anchors = tuple(round(part * crop) for part in _ANCHORS)
        self.anchors = AnchorGenerator((anchors,), (_RATIOS,))
        each = self.anchors.num_anchors_per_location()[0]
        self.head = RPNHead(self.backbone.out_channels, each * classes)
        self.matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
        self.sampler = BalancedPositiveNegativeSampler(_SAMPLED, 0.5)
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (N, 3, H, W), 0 to 1 -> logits (N, P, K), codes (N, P, K, 4), anchors (P, 4)."""
        # Whole positions only: the anchors' distance is the image's side over the map's.
        padding = [-images.shape[-1] % _STRIDE, -images.shape[-2] % _STRIDE]
        x = F.pad((images - self.mean) / self.std, [0, padding[0], 0, padding[1]])
        (features,) = self.backbone(x.contiguous(memory_format=torch.channels_last)).values()
        (logits,), (codes,) = self.head([features])
        sizes = [tuple(x.shape[-2:])] * len(x)
        anchors = self.anchors(ImageList(x, sizes), [features])[0]
        return self._by_anchor(logits, 1)[..., 0], self._by_anchor(codes, 4), anchors

    def _by_anchor(self, maps: Tensor, values: int) -> Tensor:
        """(N, A K values, H, W) -> (N, H W A, K, values), in the anchors' order."""
        count, _, height, width = maps.shape
        apart = maps.float().reshape(count, -1, self.classes * values, height, width)
        return apart.permute(0, 3, 4, 1, 2).reshape(count, -1, self.classes, values)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The losses of crops of one size. targets: "boxes" (R, 4), R >= 0, and "labels" (R,)."""
        logits, codes, anchors = self.predict(torch.stack(images))
        class_losses, box_losses = [], []
        for own, own_codes, target in zip(logits, codes, targets, strict=True):
            boxes = target["boxes"]
            matched = torch.full((len(anchors),), self.matcher.BELOW_LOW_THRESHOLD)
            if len(boxes):
                matched = self.matcher(box_iou(boxes, anchors))
            # 1 for an object, 0 for the background, -1 for neither.
            held = (matched >= 0).float() - (matched == self.matcher.BETWEEN_THRESHOLDS).float()
            positive, negative = (mask[0].bool() for mask in self.sampler([held]))
            chosen = positive | negative
            wanted = torch.zeros_like(own)
            if len(boxes):
                wanted[positive, target["labels"][0] - 1] = 1
                codes_ = own_codes[positive, target["labels"][0] - 1]
                exact = self.coder.encode_single(boxes[matched[positive]], anchors[positive])
                box_losses.append(F.smooth_l1_loss(codes_, exact, beta=1 / 9, reduction="sum"))
            losses = F.binary_cross_entropy_with_logits(
                own[chosen], wanted[chosen], reduction="sum"
            )
            class_losses.append(losses)
        count = _SAMPLED * len(images)
        # Where no crop holds an object, the boxes' layer still has its gradient, of zero.
        box_loss = torch.stack([codes.sum() * 0, *box_losses]).sum()
        return {"loss_class": torch.stack(class_losses).sum() / count, "loss_box": box_loss / count}


class Crops(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Random crops as in classification (3.4), with what they hold of the boxes."""

    def __init__(self, scenes: Scenes, crop: int, sides: tuple[int, int], seed: int) -> None:
        self.scenes, self.seed = scenes, seed
        low, high = (round(side * crop / CROP) for side in sides)
        mirror = [v2.RandomHorizontalFlip()] if scenes.mirrors else []
        self.transform = v2.Compose(
            [
                v2.RandomShortestSize(list(range(low, high + 1)), antialias=True),
                v2.RandomCrop(crop),
                *mirror,
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(labels_getter=None),
            ]
        )

    def __len__(self) -> int:
        return len(self.scenes.train)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        scene = self.scenes.train[key[1]]
        image = tv_tensors.Image(read(scene))
        boxes = tv_tensors.BoundingBoxes(
            scene.boxes, format="XYXY", canvas_size=tuple(image.shape[-2:])
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, "crop", *key))
            image, boxes = self.transform(image, boxes)
        kept = boxes.as_subclass(Tensor)
        target = {"boxes": kept, "labels": scene.labels[:1].expand(len(kept))}
        return image.as_subclass(Tensor), target


@torch.no_grad()
def locate(model: Localizer, image: Tensor, dense: bool) -> Tensor:
    """A box for every class, (K, 4), in pixels of `image` (3, H, W), 0 to 1.

    dense: on the whole image at several scales, instead of on its centre crop.
    """
    all_scores, all_boxes = [], []
    classes = torch.arange(model.classes, device=image.device)
    low, high = model.sides
    for side in (low, (low + high) / 2, high) if dense else (low,):
        scaled = transforms.resize(image, [round(side * model.crop / CROP)], antialias=True)
        size = list(scaled.shape[-2:])
        top, left = (0, 0) if dense else ((length - model.crop) // 2 for length in size)
        view = scaled if dense else scaled[:, top : top + model.crop, left : left + model.crop]
        logits, codes, anchors = model.predict(view[None])
        scores, places = logits[0].max(0)
        boxes = model.coder.decode_single(codes[0, places, classes], anchors[places])
        boxes = boxes + boxes.new_tensor([left, top, left, top])
        boxes = resize_boxes(clip_boxes_to_image(boxes, size), size, list(image.shape[-2:]))
        all_scores.append(scores)
        all_boxes.append(boxes)
    best = torch.stack(all_scores).argmax(0)
    return torch.stack(all_boxes)[best, classes]


def classify(model: nn.Module, image: Tensor, scenes: Scenes, side: float) -> Tensor:
    """The five likeliest labels, by a classifier on the whole image of that shorter side."""
    scaled = transforms.resize(image, [round(side)], antialias=True)
    view = transforms.normalize(scaled, list(scenes.mean), list(scenes.std))
    logits: Tensor = model(view[None].contiguous(memory_format=torch.channels_last))[0]
    return logits.topk(min(5, len(logits))).indices + 1


def usual_box(scenes: Scenes) -> Tensor:
    """The median of the training objects' boxes, as parts of the images' sides."""
    parts = []
    for scene in scenes.train:
        width, height = Image.open(scene.image).size  # its header alone
        parts.append(scene.boxes / torch.tensor([width, height, width, height]))
    return torch.cat(parts).median(0).values


@torch.no_grad()
def errors(
    scenes: Scenes,
    launch: Launch,
    boxes: Callable[[Tensor], Tensor],
    labels: Callable[[Tensor], Tensor],
    progress: str = "",
) -> dict[str, float]:
    """Localization errors on the test images in percent.

    boxes: of an image for every class, (K, 4). labels: the five likeliest, the likeliest first.

    An image counts as right where the box of its class overlaps an object by half ("true class"),
    and where besides the class is the likeliest or among five ("top-1", "top-5").
    """
    sums = torch.zeros(4, dtype=torch.float64, device=launch.device)
    mine = scenes.test[launch.rank :: launch.world]
    for scene in tqdm(mine, desc=progress, disable=not (progress and launch.leads)):
        image = read(scene).to(launch.device)
        label = int(scene.labels[0])
        with autocast(launch):
            box, likeliest = boxes(image)[label - 1].cpu(), labels(image).tolist()
        hit = bool((box_iou(box[None], scene.boxes) >= _OVERLAP).any())
        right = [hit, hit and label == likeliest[0], hit and label in likeliest, True]
        sums += torch.tensor(right, device=sums.device)
    true, top1, top5, count = total(sums).tolist()
    return {
        "true class error": 100 * (1 - true / count),
        "top-1 error": 100 * (1 - top1 / count),
        "top-5 error": 100 * (1 - top5 / count),
    }
