"""Localization: ImageNet's format, the boxes per class, the errors, whole runs, the claims."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("torchvision", reason="the localizer's parts are torchvision's")
pytest.importorskip("sklearn", reason="the default images are of scikit-learn's digits")

import localization
from common.claims import parsed
from common.errors import DataError
from common.launch import Launch
from detectors import digits, localizer, training
from detectors.scenes import Scene, Scenes, imagenet
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as transforms

# By image: the class, and boxes whose pixels count from 0 and whose ends both belong to them.
TRAIN = {
    "n01440764/n01440764_10": ("n01440764", [(8, 10, 29, 39)]),
    "n01440764/n01440764_27": ("n01440764", [(0, 0, 59, 19), (4, 20, 40, 47)]),
    "n01443537/n01443537_2": ("n01443537", [(4, 5, 43, 37)]),
    "n01443537/n01443537_9": ("n01443537", [(20, 8, 63, 30)]),
}
VAL = {"ILSVRC2012_val_00000001": ("n01443537", [(20, 2, 62, 47)])}


def write_imagenet(root: Path) -> Path:
    """ILSVRC/ as ILSVRC2017_CLS-LOC.tar.gz unpacks, with four images to train and one to test."""
    random = torch.Generator().manual_seed(0)
    for part, listed, images in (("train", "train_loc", TRAIN), ("val", "val", VAL)):
        for name, (label, boxes) in images.items():
            picture = root / "ILSVRC" / "Data" / "CLS-LOC" / part / f"{name}.JPEG"
            description = root / "ILSVRC" / "Annotations" / "CLS-LOC" / part / f"{name}.xml"
            for file in (picture, description):
                file.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (48, 64, 3), generator=random).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(picture, format="JPEG")
            objects = "".join(
                f"<object><name>{label}</name><pose>Unspecified</pose><truncated>0</truncated>"
                f"<difficult>0</difficult><bndbox><xmin>{left}</xmin><ymin>{top}</ymin>"
                f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
                for left, top, right, bottom in boxes
            )
            description.write_text(
                f"<annotation><folder>{part}</folder><filename>{picture.stem}</filename><size>"
                f"<width>64</width><height>48</height><depth>3</depth></size>{objects}"
                "</annotation>"
            )
        sets = root / "ILSVRC" / "ImageSets" / "CLS-LOC"
        sets.mkdir(parents=True, exist_ok=True)
        lines = [f"{name} {i}" for i, name in enumerate(images, 1)]
        (sets / f"{listed}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_imagenets_localization_is_read_as_published(tmp_path: Path) -> None:
    scenes = imagenet(write_imagenet(tmp_path))
    assert (scenes.kind, list(scenes.classes)) == ("imagenet", ["n01440764", "n01443537"])
    assert [scene.image.stem for scene in scenes.train] == [name.split("/")[1] for name in TRAIN]
    assert scenes.train[1].boxes.tolist() == [[0, 0, 60, 20], [4, 20, 41, 48]]
    assert [scene.labels.tolist() for scene in scenes.train] == [[1], [1, 1], [2], [2]]
    assert scenes.test[0].boxes.tolist() == [[20, 2, 63, 48]]
    assert scenes.test[0].labels.tolist() == [2]


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (file,) = root.rglob(name)
        file.write_text(file.read_text().replace(old, new, 1))

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: next(root.rglob(name)).unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (remove("train_loc.txt"), "unpack ILSVRC2017_CLS-LOC.tar.gz"),
        (remove("n01443537_2.xml"), "n01443537_2.xml is missing"),
        (remove("n01443537_2.JPEG"), "n01443537_2.JPEG is missing"),
        (edit("n01443537_2.xml", "</annotation>", ""), "n01443537_2.xml is corrupt"),
        (edit("n01440764_27.xml", "n01440764<", "n01443537<"), "boxes of 2 classes"),
        (edit("n01440764_10.xml", "object>", "thing>"), "is corrupt"),
    ],
)
def test_damaged_data_is_named(tmp_path: Path, damage: Callable[[Path], None], named: str) -> None:
    damage(write_imagenet(tmp_path))
    with pytest.raises(DataError, match=re.escape(named)):
        imagenet(tmp_path)


def test_digits_are_written_as_they_are_painted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On black an image is ink, 0.6 to 1, times what a digit covers, a quarter at a box's ends."""
    monkeypatch.setattr(digits, "_background", lambda size, random: torch.zeros(3, *size))
    digits.write_single(tmp_path, 20, 10, seed=3)
    scenes = imagenet(tmp_path)
    assert [len(scenes.train), len(scenes.test)] == [20, 10]
    lost = 0.03  # by JPEG
    for scene in [*scenes.train, *scenes.test]:
        ((left, top, right, bottom),) = scene.boxes.int().tolist()
        image = training.read(scene).amax(0)
        inside = image[top:bottom, left:right].clone()
        image[top:bottom, left:right] = 0
        assert image.max() < 0.25 + lost
        assert inside.max() > 0.6 - lost
        for end in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert end.max() >= 0.6 * 0.25 - lost


def test_crops_keep_their_boxes(tmp_path: Path) -> None:
    """What a crop holds of a white rectangle on black is the box that comes with it."""
    pixels = torch.zeros(100, 140, 3, dtype=torch.uint8)
    pixels[30:70, 40:90] = 255
    Image.fromarray(pixels.numpy()).save(tmp_path / "white.png")
    box = torch.tensor([[40.0, 30, 90, 70]])
    scene = Scene(tmp_path / "white.png", box, torch.tensor([7]), torch.tensor([False]))
    scenes = Scenes("imagenet", "", "", [scene], [scene], "abcdefghij", False)
    crops = localizer.Crops(scenes, 48, localizer.SIDES, seed=0)
    cut = 0
    for epoch in range(40):
        image, target = crops[epoch, 0]
        assert image.shape == (3, 48, 48)
        assert torch.equal(crops[epoch, 0][0], image)
        bright = (image[0] > 0.5).nonzero()
        assert target["labels"].tolist() == [7] * len(target["boxes"])
        if not len(target["boxes"]):
            assert len(bright) < 48
            continue
        found = torch.cat([bright.amin(0).flip(0), bright.amax(0).flip(0) + 1])
        assert (found - target["boxes"][0]).abs().max() <= 1
        cut += bool((found == 0).any() or (found == 48).any())
    assert 5 < cut < 40
    # Mirror images come along: the rectangle is not in the middle of the image.
    assert len({crops[epoch, 0][1]["boxes"].flatten().tolist()[0] for epoch in range(8)}) > 2


def small(classes: int = 3, crop: int = 64) -> localizer.Localizer:
    torch.manual_seed(0)
    network = digits.network()
    return localizer.Localizer(network, classes, crop, localizer.SIDES, [0.5] * 3, [0.25] * 3)


def test_losses_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the sampled anchors count, each of them once a class; boxes for the true class only."""
    model = small()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    box = torch.tensor([[10.0, 8, 44, 40]])
    targets = [
        {"boxes": box, "labels": torch.tensor([2])},
        {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)},
    ]
    drawn: list[Tensor] = []
    sampler = model.sampler

    def watched(labels: list[Tensor]) -> Any:
        positive, negative = sampler(labels)
        drawn.extend((positive[0].bool(), negative[0].bool()))
        return positive, negative

    monkeypatch.setattr(model, "sampler", watched)
    losses = model(images, targets)
    with torch.no_grad():
        logits, codes, anchors = model.predict(torch.stack(images))
    # 4×4 positions, nine anchors each, three classes.
    assert (logits.shape, codes.shape) == ((2, 144, 3), (2, 144, 3, 4))
    overlap = box_iou(box, anchors)[0]
    class_loss, box_loss = 0.0, 0.0
    for i, (positive, negative) in enumerate((drawn[:2], drawn[2:])):
        assert int(positive.sum() + negative.sum()) == 8
        assert bool(positive.any()) == (i == 0)
        assert (overlap[negative] < 0.3).all() or i == 1
        for anchor in (positive | negative).nonzero()[:, 0].tolist():
            for label in range(3):
                p = float(logits[i, anchor, label].detach().sigmoid())
                right = bool(positive[anchor]) and label == 1
                class_loss -= float(torch.tensor(p if right else 1 - p).log())
            if positive[anchor]:
                width, height = (anchors[anchor, 2:] - anchors[anchor, :2]).tolist()
                centre = (anchors[anchor, :2] + anchors[anchor, 2:]) / 2
                wanted = torch.tensor(
                    [
                        (27 - float(centre[0])) / width,
                        (24 - float(centre[1])) / height,
                        float(torch.tensor(34 / width).log()),
                        float(torch.tensor(32 / height).log()),
                    ]
                )
                off = (codes[i, anchor, 1] - wanted).abs()
                box_loss += float(torch.where(off < 1 / 9, 4.5 * off**2, off - 1 / 18).sum())
    assert float(losses["loss_class"].detach()) == pytest.approx(class_loss / 16, rel=1e-4)
    assert float(losses["loss_box"].detach()) == pytest.approx(box_loss / 16, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dense", [False, True])
def test_the_likeliest_anchors_box_counts(dense: bool) -> None:
    """By hand, on the centre crop and on whole images at three scales."""
    model = small().eval()
    torch.nn.init.normal_(model.head.cls_logits.weight, std=0.5)
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.05)
    image = torch.rand(3, 128, 160)
    boxes = localizer.locate(model, image, dense)
    resize = transforms.resize
    if dense:
        views = [(resize(image, [side], antialias=True), 0, 0) for side in (73, 105, 137)]
    else:
        whole = resize(image, [73], antialias=True)
        views = [(whole[:, 4:68, 13:77], 4, 13)]
    for label in range(3):
        found: list[tuple[float, Tensor]] = []
        for view, top, left in views:
            logits, codes, anchors = model.predict(view[None])
            best = int(logits[0, :, label].argmax())
            box = model.coder.decode_single(codes[0, best, label][None], anchors[best][None])[0]
            box = box + torch.tensor([left, top, left, top])
            size = view.shape[-2:] if dense else whole.shape[-2:]
            scale = torch.tensor([160 / size[1], 128 / size[0]] * 2)
            box = (box.clamp(min=0) * scale).minimum(torch.tensor([160.0, 128, 160, 128]))
            found.append((float(logits[0, best, label]), box))
        wanted = max(found, key=lambda pair: pair[0])[1]
        torch.testing.assert_close(boxes[label], wanted, rtol=1e-4, atol=1e-2)


@pytest.fixture
def place(tmp_path: Path) -> Launch:
    return Launch(None, tmp_path, torch.device("cpu"), torch.float32, 0, 0, False, 1e9)


def test_errors_by_hand(place: Launch) -> None:
    """Four images: all right; the box wrong; the class second; the class not among five."""
    scenes = digits.open_or_write_single(place.out / "images", 1, 4, place)
    order = iter(range(4))
    images: list[int] = []

    def boxes(image: Tensor) -> Tensor:
        images.append(next(order))
        scene = scenes.test[images[-1]]
        all_ = torch.zeros(10, 4)
        label = int(scene.labels[0])
        left, top, right, bottom = scene.boxes[0].tolist()
        # 0.55 of the box overlaps by half, 0.45 does not.
        part = 0.45 if images[-1] == 1 else 0.55
        all_[label - 1] = torch.tensor([left, top, left + part * (right - left), bottom])
        return all_

    def labels(image: Tensor) -> Tensor:
        own = int(scenes.test[images[-1]].labels[0])
        others = [label for label in range(1, 11) if label != own]
        place_ = {0: 0, 1: 0, 2: 1}.get(images[-1])
        if place_ is not None:
            others.insert(place_, own)
        return torch.tensor(others[:5])

    classes = replace(scenes, classes=[str(i) for i in range(10)])
    found = localizer.errors(classes, place, boxes, labels)
    assert found == {"true class error": 25.0, "top-1 error": 75.0, "top-5 error": 50.0}


@pytest.mark.parametrize("write", [None, write_imagenet])
def test_quick_run(tmp_path: Path, write: Callable[[Path], Path] | None) -> None:
    data = [] if write is None else ["--data", str(write(tmp_path / "data"))]
    out = tmp_path / "out"
    assert localization.main([*data, "--quick", "--out", str(out)]) == 0
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["testing"] for row in rows] == ["none", "1-crop", "dense"]
    report = (out / "report.md").read_text()
    assert ("4 images to train and 1 to test, 2 classes" in report) == (write is not None)
    assert all(claim.name in report for claim in localization.CLAIMS)
    for file_ in ("history.csv", "curves.png"):
        assert (out / file_).stat().st_size > 0


def test_a_folder_without_imagenet_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--data", str(tmp_path), "--quick", "--out", str(tmp_path / "out")]
    assert localization.main(run) == 2
    assert "train_loc.txt cannot be read" in capsys.readouterr().err


def verdicts(usual: float, crop: tuple[float, float], dense: Any, top5: Any) -> list[str]:
    rows = []
    for seed in (0, 1):
        for testing, true, five in (
            ("none", usual, usual),
            ("1-crop", crop[seed], crop[seed]),
            ("dense", dense[seed], top5[seed]),
        ):
            numbers = {"true class error": true, "top-1 error": five, "top-5 error": five}
            rows.append({"testing": testing, "seed": seed, **numbers})
    return [claim.judge(parsed(rows)).verdict for claim in localization.CLAIMS]


def test_claims_follow_from_their_rows() -> None:
    held, fails = "holds", "does not hold"
    assert verdicts(90, (20, 22), (12, 14), (13, 16)) == [held, held, held]
    assert verdicts(90, (30, 32), (26, 28), (27, 29)) == [fails, held, held]  # above 25 %
    assert verdicts(20, (20, 22), (12, 14), (13, 16)) == [fails, held, held]  # not half of 20 %
    assert verdicts(90, (14, 20), (12, 12), (18, 18)) == [held, held, fails]
    assert verdicts(90, (14, 30), (12, 14), (13, 16))[1] == fails  # a spread of ten points
    assert verdicts(90, (99, 99), (99, 99), (99, 99)) == [fails, fails, fails]
