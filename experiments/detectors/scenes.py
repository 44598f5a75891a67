"""Images with boxes: PASCAL VOC, MS COCO and ImageNet's localization as published.

VOC: VOCdevkit/VOC2007 and VOC2012, each with JPEGImages, Annotations and ImageSets/Main. Where
2007's test images are there, the trainval images of every year train and they test (the paper's
"07+12"); else each year's train and val.
COCO: annotations/instances_train*.json and instances_val*.json, and the folders train* and val*.
ImageNet: ILSVRC/Data, Annotations and ImageSets, each with a folder CLS-LOC, as
ILSVRC2017_CLS-LOC.tar.gz unpacks; the images of train_loc.txt train, those of val.txt test.
"""

from __future__ import annotations

import contextlib
import io
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common.errors import DataError
from torch import Tensor
from torchvision import datasets

_YEARS = ("2007", "2012")
# In the order of the devkit, so that labels mean the same whatever a part of it holds.
_VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


@dataclass(frozen=True)
class Scene:
    """An image and its K objects.

    boxes: float (K, 4), left, top, right and bottom edges in pixels.
    labels: int64 (K,), from 1; 0 is the background.
    ignored: bool (K,), objects that neither train nor count: VOC's difficult ones, COCO's crowds.
    """

    image: Path
    boxes: Tensor
    labels: Tensor
    ignored: Tensor

    def target(self) -> dict[str, Tensor]:
        """What torchvision's detectors train with."""
        return {"boxes": self.boxes[~self.ignored], "labels": self.labels[~self.ignored]}


@dataclass(frozen=True)
class Scenes:
    """A set of images with boxes.

    kind: "voc", "coco" or "imagenet": its metric. train: only images that hold an object.
    classes: names of labels 1, 2, ... eleven_points: VOC's metric is that of 2007.
    mirrors: whether a mirrored image keeps its meaning.
    mean, std: of the channels, pixels from 0 to 1.
    """

    kind: str
    name: str
    description: str
    train: Sequence[Scene]
    test: Sequence[Scene]
    classes: Sequence[str]
    eleven_points: bool
    mirrors: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def first(self, train: int, test: int) -> Scenes:
        """Only the first images of both parts."""
        train, test = min(train, len(self.train)), min(test, len(self.test))
        return replace(
            self,
            train=self.train[:train],
            test=self.test[:test],
            description=f"{self.description}; of them the first {train} and {test}",
        )


def open_scenes(path: Path) -> Scenes:
    """The data set in `path`; raises DataError, naming the file, for what is missing or corrupt."""
    if not path.is_dir():
        raise DataError(f"--data {path}: there is no such folder.")
    if path.name == "VOCdevkit":
        return voc(path.parent)
    if (path / "VOCdevkit").is_dir():
        return voc(path)
    if (path / "annotations").is_dir():
        return coco(path)
    raise DataError(
        f"--data {path} holds no detection data that is known here: neither VOCdevkit/ (PASCAL "
        "VOC) nor annotations/ (MS COCO)."
    )


def voc(root: Path) -> Scenes:
    """PASCAL VOC in `root`/VOCdevkit; sets of other classes in the same format are taken too."""
    years = [year for year in _YEARS if (root / "VOCdevkit" / f"VOC{year}").is_dir()]
    if not years:
        raise DataError(f"{root}/VOCdevkit holds neither VOC2007 nor VOC2012; unpack one there.")
    tested = "2007" in years and _voc_list(root, "2007", "test").is_file()
    train_part, test_part = ("trainval", "test") if tested else ("train", "val")
    train = [file for year in years for file in _voc_files(root, year, train_part)]
    test = [
        file
        for year in (["2007"] if tested else years)
        for file in _voc_files(root, year, test_part)
    ]
    raw = [(image, *_read_voc(annotation)) for image, annotation in train + test]
    found = {name for _, names, _, _ in raw for name in names}
    classes = _VOC_CLASSES if found <= set(_VOC_CLASSES) else sorted(found)
    numbers = {name: i for i, name in enumerate(classes, 1)}
    scenes = [
        _scene(image, boxes, [numbers[name] for name in names], difficult)
        for image, names, boxes, difficult in raw
    ]
    name = "VOC " + "+".join(years)
    return _scenes(
        "voc", name, scenes[: len(train)], scenes[len(train) :], classes, eleven_points=tested
    )


def _voc_list(root: Path, year: str, part: str) -> Path:
    return root / "VOCdevkit" / f"VOC{year}" / "ImageSets" / "Main" / f"{part}.txt"


def _voc_files(root: Path, year: str, part: str) -> list[tuple[Path, Path]]:
    """(image, annotation) files of a part."""
    try:
        listed = datasets.VOCDetection(str(root), year, part)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{_voc_list(root, year, part)}: {error}") from error
    return [(Path(i), Path(a)) for i, a in zip(listed.images, listed.targets, strict=True)]


def _read_voc(file: Path) -> tuple[list[str], list[list[float]], list[bool]]:
    """Names, boxes and difficulty of the objects in an annotation."""
    names, boxes, difficult = [], [], []
    try:
        for found in ET.parse(file).getroot().iter("object"):
            # Pixels count from 1 and both ends belong to the box: its edges are one less, and x.
            left, top, right, bottom = (
                float(_text(found, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            names.append(_text(found, "name").strip())
            boxes.append([left - 1, top - 1, right, bottom])
            difficult.append(found.findtext("difficult", "0").strip() == "1")
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing, though an image list names it.") from error
    except (ET.ParseError, ValueError, OSError) as error:
        raise DataError(f"{file} is corrupt ({error}); unpack it again.") from error
    for name, (left, top, right, bottom) in zip(names, boxes, strict=True):
        if not (left < right and top < bottom):
            raise DataError(
                f"{file} is corrupt: the box of a {name} from ({left + 1:g}, {top + 1:g}) to "
                f"({right:g}, {bottom:g}) is empty."
            )
    return names, boxes, difficult


def _text(element: ET.Element, path: str) -> str:
    text = element.findtext(path)
    if not text:
        raise ValueError(f"an object has no {path}")
    return text


def imagenet(root: Path) -> Scenes:
    """ImageNet's localization in `root`/ILSVRC: in each image, objects of one class.

    Sets of other classes in the same format are taken too. Raises DataError, as `open_scenes` does.
    """
    train, test = (_imagenet_files(root, name) for name in ("train_loc", "val"))
    raw = [(image, *_read_voc(annotation)) for image, annotation in train + test]
    # torchvision's order of ImageNet's classes too.
    classes = sorted({name for _, names, _, _ in raw for name in names})
    numbers = {name: i for i, name in enumerate(classes, 1)}
    scenes = []
    for image, names, boxes, _ in raw:
        if len(set(names)) != 1:
            raise DataError(f"{image} has boxes of {len(set(names))} classes instead of one.")
        # ILSVRC's pixels count from 0, where VOC's count from 1.
        edges = [[edge + 1 for edge in box] for box in boxes]
        scenes.append(_scene(image, edges, [numbers[name] for name in names], [False] * len(names)))
    return _scenes(
        "imagenet",
        "ImageNet's localization",
        scenes[: len(train)],
        scenes[len(train) :],
        classes,
        eleven_points=False,
    )


def _imagenet_files(root: Path, name: str) -> list[tuple[Path, Path]]:
    """(image, annotation) files of a part."""
    folder, part = root / "ILSVRC", name.partition("_")[0]
    listed = folder / "ImageSets" / "CLS-LOC" / f"{name}.txt"
    try:
        names = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{listed} cannot be read ({error}); unpack ILSVRC2017_CLS-LOC.tar.gz into {root}."
        ) from error
    images, boxes = (folder / kind / "CLS-LOC" / part for kind in ("Data", "Annotations"))
    return [(images / f"{name}.JPEG", boxes / f"{name}.xml") for name in names]


def coco(root: Path) -> Scenes:
    """MS COCO in `root`, of whatever year."""
    train, test = (_coco_part(root, part) for part in ("train", "val"))
    if train.classes != test.classes:
        raise DataError(f"{train.file} and {test.file} have different categories.")
    name = f"COCO {train.file.stem.removeprefix('instances_train')}".strip()
    return _scenes("coco", name, train.scenes, test.scenes, train.classes, eleven_points=False)


@dataclass
class _CocoPart:
    file: Path
    scenes: list[Scene]
    classes: list[str]


def _coco_part(root: Path, part: str) -> _CocoPart:
    files = sorted((root / "annotations").glob(f"instances_{part}*.json"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise DataError(
            f"{root}/annotations must hold one instances_{part}*.json, found {found}; leave the "
            "year to be used there."
        )
    folder = root / files[0].stem.removeprefix("instances_")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress
            index = datasets.CocoDetection(str(folder), str(files[0])).coco
        categories = sorted(index.cats.values(), key=lambda category: category["id"])
        numbers = {category["id"]: i for i, category in enumerate(categories, 1)}
        scenes = [
            _coco_scene(folder / image["file_name"], index.imgToAnns[key], numbers)
            for key, image in sorted(index.imgs.items())
        ]
        return _CocoPart(files[0], scenes, [category["name"] for category in categories])
    except ModuleNotFoundError as error:
        raise DataError(f"{error}; run `pip install pycocotools`.") from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, OSError) as error:
        raise DataError(
            f"{files[0]} is corrupt ({type(error).__name__}: {error}); unpack it again."
        ) from error


def _coco_scene(image: Path, objects: Iterable[Any], numbers: dict[int, int]) -> Scene:
    boxes, labels, ignored = [], [], []
    for found in objects:
        left, top, width, height = found["bbox"]
        boxes.append([left, top, left + width, top + height])
        labels.append(numbers[found["category_id"]])
        # A few published boxes have no width or no height: nothing can be learned from them.
        ignored.append(bool(found["iscrowd"]) or width <= 0 or height <= 0)
    return _scene(image, boxes, labels, ignored)


def _scene(
    image: Path, boxes: Sequence[Sequence[float]], labels: Sequence[int], ignored: Sequence[bool]
) -> Scene:
    return Scene(
        image,
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(ignored, dtype=torch.bool),
    )


def _scenes(
    kind: str,
    name: str,
    train: Sequence[Scene],
    test: Sequence[Scene],
    classes: Sequence[str],
    eleven_points: bool,
) -> Scenes:
    for scene in (*train, *test):
        if not scene.image.is_file():
            raise DataError(f"{scene.image} is missing; unpack the images of {name} again.")
    holding = [scene for scene in train if not scene.ignored.all()]
    if not holding or not test:
        raise DataError(f"{name} has no image to {'test' if holding else 'train'} with.")
    description = (
        f"{name}, {len(holding):,} images to train and {len(test):,} to test, "
        f"{len(classes)} classes"
    )
    return Scenes(kind, name, description, holding, test, classes, eleven_points)
