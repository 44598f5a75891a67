"""The default scenes: handwritten digits at random places, in PASCAL VOC's or ImageNet's format.

Real digits (scikit-learn's), each enlarged, tinted, and laid on a dim, noisy background. A box
is exact: the pixels where the digit covers at least a quarter of the background.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import recipes
from common.data import Images, InMemory, Pairs, digits
from common.launch import Launch
from common.training import Result
from common.training import train as train_classifier
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_iou

from resnet_fused.blocks import BasicBlock
from resnet_fused.models.network import ResidualNetwork, StageShape
from resnet_fused.models.weights import WeightsSource, load_weights

from .scenes import Scenes, imagenet, voc

_SHORT, _LONG = 128, 160  # sides of a scene in pixels
_SIDES = (32, 80)  # of an enlarged digit
_SINGLE_SIDES = (64, 120)  # of the only one in an image
_MOST = 3  # digits in a scene
_TRIES = 20  # to find room for a digit
# Of the channels, pixels from 0 to 1: round numbers, near enough.
_MEAN, _STD = (0.25, 0.25, 0.25), (0.2, 0.2, 0.2)
_NAME = "scikit-learn's handwritten digits on backgrounds"


def open_or_write(root: Path, train: int, test: int, place: Launch) -> Scenes:
    """The scenes in `root`, which are written there if they are not yet."""
    lists = root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    if place.leads and not (lists / "test.txt").is_file():
        write_scenes(root, train, test, place.seed)
    if place.world > 1:
        dist.barrier()
    return _described(voc(root), f"at random places, written in VOC's format: {train:,} images")


def open_or_write_single(root: Path, train: int, test: int, place: Launch) -> Scenes:
    """Scenes of one digit each in `root`, which are written there if they are not yet."""
    if place.leads and not (root / "ILSVRC" / "ImageSets" / "CLS-LOC" / "val.txt").is_file():
        write_single(root, train, test, place.seed)
    if place.world > 1:
        dist.barrier()
    return _described(
        imagenet(root), f"one an image, written in ImageNet's format: {train:,} images"
    )


def _described(scenes: Scenes, how: str) -> Scenes:
    test, classes = len(scenes.test), len(scenes.classes)
    return replace(
        scenes,
        name=_NAME,
        description=f"{_NAME} {how} to train and {test:,} to test, {classes} classes",
        mirrors=False,
        mean=_MEAN,
        std=_STD,
    )


def write_scenes(root: Path, train: int, test: int, seed: int) -> None:
    """Writes `root`/VOCdevkit/VOC2007; what trains and what tests shares no digit."""
    folder = root / "VOCdevkit" / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    found = digits(8)
    random = torch.Generator().manual_seed(seed)
    number = 0
    for part, pairs, count in (("trainval", found.train, train), ("test", found.test, test)):
        assert isinstance(pairs, InMemory)
        names = []
        for _ in range(count):
            number += 1
            names.append(f"{number:06d}")
            painted = _paint(pairs, _size(number), _SIDES, _MOST, random)
            _write(
                folder / "JPEGImages" / f"{names[-1]}.jpg",
                folder / "Annotations" / f"{names[-1]}.xml",
                *painted,
                counts_from=1,
            )
        # Last, so that a list never names a file that is not there.
        list_ = folder / "ImageSets" / "Main" / f"{part}.txt"
        list_.write_text("".join(f"{name}\n" for name in names))


def write_single(root: Path, train: int, test: int, seed: int) -> None:
    """Writes `root`/ILSVRC, one large digit an image, as many of each class.

    What trains and what tests shares no digit.
    """
    folder = root / "ILSVRC"
    found = digits(8)
    random = torch.Generator().manual_seed(seed)
    for name, pairs, count in (("train_loc", found.train, train), ("val", found.test, test)):
        assert isinstance(pairs, InMemory)
        part = name.partition("_")[0]
        names = []
        for number in range(1, count + 1):
            label = number % 10
            alike = torch.tensor(pairs.labels) == label
            own_pairs = InMemory(pairs.images[alike], [label] * int(alike.sum()))
            painted = _paint(own_pairs, _size(number), _SINGLE_SIDES, 1, random)
            own = f"{label}/{label}_{number}" if part == "train" else f"ILSVRC2012_val_{number:08d}"
            picture, description = (
                folder / kind / "CLS-LOC" / part / f"{own}.{suffix}"
                for kind, suffix in (("Data", "JPEG"), ("Annotations", "xml"))
            )
            for file in (picture, description):
                file.parent.mkdir(parents=True, exist_ok=True)
            _write(picture, description, *painted, counts_from=0)
            names.append(own)
        list_ = folder / "ImageSets" / "CLS-LOC" / f"{name}.txt"
        list_.parent.mkdir(parents=True, exist_ok=True)
        list_.write_text("".join(f"{own} {i}\n" for i, own in enumerate(names, 1)))


def _size(number: int) -> tuple[int, int]:
    """Height and width of a scene: every other one is upright."""
    return (_SHORT, _LONG) if number % 2 else (_LONG, _SHORT)


def _write(
    file: Path, description: Path, image: Tensor, boxes: Tensor, labels: Tensor, counts_from: int
) -> None:
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="JPEG", quality=95)
    height, width = image.shape[1:]
    annotation = _annotation(file.name, (height, width), boxes, labels, counts_from)
    ET.ElementTree(annotation).write(description)


def classifier(place: Launch, network: Callable[..., nn.Module]) -> Result:
    """A trained classifier of single digits: what ImageNet's is to the paper's detectors.

    network: its constructor.
    """
    images = patches(64, *((64, 32) if place.quick else (3000, 500)), seed=place.seed)
    recipe = recipes.cifar(images, *((4, 16) if place.quick else (300, 48)), learning_rate=0.05)
    return train_classifier(
        "classifier", lambda: network(num_classes=images.classes), images, recipe, place
    )


def patches(side: int, train: int, test: int, seed: int) -> Images:
    """One digit on a background each, for the classifier that a detector starts from."""
    found = digits(8)
    random = torch.Generator().manual_seed(seed)
    return replace(
        found,
        name=_NAME,
        description=f"{_NAME}, {train:,} to train and {test:,} to test, {side}×{side}",
        train=_patches(found.train, side, train, random),
        test=_patches(found.test, side, test, random),
        side=side,
        mean=torch.tensor(_MEAN)[:, None, None],
        std=torch.tensor(_STD)[:, None, None],
    )


def _patches(pairs: Pairs, side: int, count: int, random: torch.Generator) -> InMemory:
    assert isinstance(pairs, InMemory)
    painted = [_paint(pairs, (side, side), (side // 3, side), 1, random) for _ in range(count)]
    images = torch.stack([image for image, _, _ in painted])
    return InMemory(images, [int(labels[0]) for _, _, labels in painted])


def network(
    num_classes: int = 10, weights: WeightsSource = None, zero_init_residual: bool = False
) -> ResidualNetwork:
    """ResNet-18 with a quarter of the channels."""
    made = ResidualNetwork(
        nn.Conv2d(3, 16, kernel_size=7, stride=2, padding=3, bias=False),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        BasicBlock,
        [StageShape(16, 2), StageShape(32, 2, 2), StageShape(64, 2, 2), StageShape(128, 2, 2)],
        num_classes,
        zero_init_residual,
    )
    if (state := load_weights("resnet18", weights)) is not None:
        made.load_state_dict(state)
    return made


def _paint(
    pairs: InMemory,
    size: tuple[int, int],
    sides: tuple[int, int],
    most: int,
    random: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """An image uint8 (3, H, W) with 1 to `most` digits, their boxes (K, 4) and classes (K,)."""
    image = _background(size, random)
    boxes = torch.empty(0, 4)
    labels: list[int] = []
    wanted = _draw(1, most, random)
    for _ in range(_TRIES):
        if len(labels) == wanted:
            break
        index = _draw(0, len(pairs) - 1, random)
        side = _draw(*sides, random)
        grey = pairs.images[index, :1].float() / 255
        cover = F.interpolate(grey[None], (side, side), mode="bilinear", align_corners=False)[0, 0]
        top, left = (_draw(0, length - side, random) for length in size)
        rows, columns = (torch.nonzero((cover >= 0.25).any(axis))[:, 0] for axis in (1, 0))
        box = torch.tensor(
            [[left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1]]
        )
        if box_iou(box, boxes).gt(0).any():
            continue
        place = image[:, top : top + side, left : left + side]
        ink = 0.6 + 0.4 * torch.rand(3, 1, 1, generator=random)
        place += (ink - place) * cover
        boxes = torch.cat([boxes, box])
        labels.append(pairs.labels[index])
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), boxes, torch.tensor(labels)


def _draw(low: int, high: int, random: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=random))


def _background(size: tuple[int, int], random: torch.Generator) -> Tensor:
    """Nine dim colours shading into one another, and noise."""
    colours = 0.4 * torch.rand(1, 3, 3, 3, generator=random)
    shades = F.interpolate(colours, size, mode="bilinear", align_corners=True)[0]
    return shades + torch.randn(3, *size, generator=random) * 0.04


def _annotation(
    name: str, size: tuple[int, int], boxes: Tensor, labels: Tensor, counts_from: int
) -> ET.Element:
    """VOC's and ImageNet's description: both ends belong to the box.

    counts_from: the number of the first row and column, 1 for VOC and 0 for ImageNet.
    """
    root = ET.Element("annotation")
    ET.SubElement(root, "filename").text = name
    shape = ET.SubElement(root, "size")
    for key, value in zip(("height", "width", "depth"), (*size, 3), strict=True):
        ET.SubElement(shape, key).text = str(value)
    for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
        found = ET.SubElement(root, "object")
        ET.SubElement(found, "name").text = str(label)
        ET.SubElement(found, "difficult").text = "0"
        edges = ET.SubElement(found, "bndbox")
        # The far edges are one past the last row and column.
        for key, edge, past in zip(
            ("xmin", "ymin", "xmax", "ymax"), box, (0, 0, 1, 1), strict=True
        ):
            ET.SubElement(edges, key).text = str(int(edge) - past + counts_from)
    return root
