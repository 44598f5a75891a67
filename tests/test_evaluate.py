"""Evaluation by views: what each test computes, written out plainly, and whole runs on JPEGs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import resnet_fused

pytest.importorskip("torchvision", reason="the experiments' data comes through torchvision")
pytest.importorskip("sklearn", reason="the experiments' digits come with scikit-learn")

import evaluate
from common import data
from common.errors import DataError
from torchvision.transforms.v2 import functional as transforms

CROP = 32


@pytest.fixture(scope="module")
def network() -> resnet_fused.ResNet:
    torch.manual_seed(0)
    return resnet_fused.resnet18(num_classes=6).eval()


def resized(image: Tensor, side: int) -> Tensor:
    return transforms.resize(image, [side], antialias=True)


@torch.no_grad()
def test_one_crop_is_the_centre(network: resnet_fused.ResNet) -> None:
    image = torch.rand(3, 50, 70)
    small = resized(image, 37)  # 256 / 224 of the crop
    top, left = round((37 - CROP) / 2), round((small.shape[-1] - CROP) / 2)
    crop = small[:, top : top + CROP, left : left + CROP]
    scores = evaluate.posteriors(network, [evaluate.one_crop(image, CROP, True)], CROP)
    torch.testing.assert_close(scores[0], network(crop[None])[0].softmax(0))


@torch.no_grad()
@pytest.mark.parametrize("mirrors", [True, False])
def test_ten_crops_are_corners_centre_and_mirror_images(
    network: resnet_fused.ResNet, mirrors: bool
) -> None:
    image = torch.rand(3, 50, 70)
    small = resized(image, 37)
    height, width = small.shape[1:]
    places = [(0, 0), (0, width - CROP), (height - CROP, 0), (height - CROP, width - CROP)]
    places.append((round((height - CROP) / 2), round((width - CROP) / 2)))
    sums, count = torch.zeros(6), 0
    for top, left in places:
        crop = small[:, top : top + CROP, left : left + CROP]
        for view in (crop, crop.flip(-1)) if mirrors else (crop,):
            sums += network(view[None])[0].softmax(0)
            count += 1
    assert count == (10 if mirrors else 5)
    scores = evaluate.posteriors(network, [evaluate.ten_crops(image, CROP, mirrors)], CROP)
    torch.testing.assert_close(scores[0], sums / count)


@torch.no_grad()
def test_scales_slide_the_pooling_window(network: resnet_fused.ResNet) -> None:
    """For crops of 64 the window is 2×2; sides are {224, 256, 384, 480, 640} × 64/224."""
    image = torch.rand(3, 70, 95)
    sums = torch.zeros(6)
    for side in (64, 73, 110, 137, 183):
        for view in (resized(image, side), resized(image, side).flip(-1)):
            maps = network.features(view[None])[-1]
            places = [
                network.fc(maps[0, :, i : i + 2, j : j + 2].mean((1, 2))).softmax(0)
                for i in range(maps.shape[2] - 1)
                for j in range(maps.shape[3] - 1)
            ]
            sums += torch.stack(places).mean(0)
    own, other = (evaluate.scales(x, 64, True) for x in (image, torch.rand(3, 80, 80)))
    scores = evaluate.posteriors(network, [other, own], 64)
    torch.testing.assert_close(scores[1], sums / 10)


@torch.no_grad()
def test_the_window_is_the_map_that_this_network_makes_of_a_crop() -> None:
    """4×4 for crops of 16 and the networks of 4.2, whose last map has a stride of 4."""
    torch.manual_seed(0)
    model, view = resnet_fused.cifar.resnet20().eval(), torch.rand(3, 24, 28)
    maps = model.features(view[None])[-1][0]
    assert maps.shape[1:] == (6, 7)
    places = [
        model.fc(maps[:, i : i + 4, j : j + 4].mean((1, 2))).softmax(0)
        for i in range(3)
        for j in range(4)
    ]
    scores = evaluate.posteriors(model, [[view]], 16)
    torch.testing.assert_close(scores[0], torch.stack(places).mean(0))


def write_images(root: Path) -> dict[str, list[Tensor]]:
    """val/ with three classes of four JPEGs each, of different sizes; their pixels as read back."""
    random = torch.Generator().manual_seed(1)
    found: dict[str, list[Tensor]] = {}
    for name in ("n01", "n02", "n03"):
        (root / "val" / name).mkdir(parents=True)
        for i in range(4):
            pixels = torch.randint(0, 256, (40 + 3 * i, 52, 3), generator=random)
            file = root / "val" / name / f"{i}.JPEG"
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(file)
            image = transforms.pil_to_tensor(data.open_image(str(file)))
            found.setdefault(name, []).append(image.float() / 255)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, dict[str, list[Tensor]]]:
    return tmp_path / "images", write_images(tmp_path / "images")


def save_networks(folder: Path) -> list[resnet_fused.ResNet]:
    networks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        networks.append(resnet_fused.resnet18(num_classes=3).eval())
        torch.save(networks[-1].state_dict(), folder / f"{seed}.pt")
    return networks


def arguments(tmp_path: Path, folder: Path) -> list[str]:
    models = [f"resnet18={tmp_path / str(seed)}.pt" for seed in (1, 2)]
    places = ["--data", str(folder), "--out", str(tmp_path / "out")]
    return [*places, "--crop", "32", "--batch", "5", "--models", *models]


@torch.no_grad()
def test_image_folder_and_ensemble(
    tmp_path: Path, folder: tuple[Path, dict[str, list[Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of single crops, counted here one by one; only val/ is there. Killed in between."""
    networks = save_networks(tmp_path)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    wrong = [0, 0, 0]
    for label, images in enumerate(folder[1].values()):
        for image in images:
            (view,) = evaluate.one_crop(image, CROP, True)
            view = (view - mean) / std
            scores = [model(view[None])[0].softmax(0) for model in networks]
            for i, score in enumerate([*scores, scores[0] + scores[1]]):
                wrong[i] += int(score.argmax() != label)
    run = [*arguments(tmp_path, folder[0]), "--checkpoint-seconds", "0"]
    seen: list[int] = []
    views = evaluate.posteriors

    def dies(model: resnet_fused.ResNet, batch: list[list[Tensor]], crop: int) -> Tensor:
        seen.append(len(batch))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return views(model, batch, crop)

    monkeypatch.setattr(evaluate, "posteriors", dies)
    assert evaluate.main(run) == 130
    assert evaluate.main(run) == 0
    assert seen[:8] == [5, 5, 5, 5, 5, 5, 2, 2]  # of 12 images the first five were not seen again
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    single = [float(row["top-1 error (%)"]) for row in rows if row["test"] == "1 crop"]
    assert single == pytest.approx([100 * count / 12 for count in wrong])
    assert {row["test"] for row in rows} == set(evaluate.TESTS)
    assert all(float(row["top-5 error (%)"]) == 0 for row in rows)  # of three classes
    assert "ensemble" in (tmp_path / "out" / "report.md").read_text()


def test_truncated_image_is_named(
    tmp_path: Path,
    folder: tuple[Path, dict[str, list[Tensor]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_networks(tmp_path)
    file = folder[0] / "val" / "n02" / "1.JPEG"
    file.write_bytes(file.read_bytes()[:200])
    assert evaluate.main(arguments(tmp_path, folder[0])) == 2
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["resnet18"], "give its weights"),
        (["resnet19=x"], "resnet19: resnet_fused has no network"),
        (["ResNet=x"], "ResNet: resnet_fused has no network"),
        (["resnet18=missing.pt"], "neither a file nor weights"),
        (["resnet18={wide}"], "tells 7 classes apart"),
        (["resnet34={1}"], "Missing key"),
        (["resnet18={broken}"], "cannot be read"),
    ],
)
def test_mistakes_are_errors(
    tmp_path: Path,
    folder: tuple[Path, dict[str, list[Tensor]]],
    capsys: pytest.CaptureFixture[str],
    models: list[str],
    message: str,
) -> None:
    save_networks(tmp_path)
    torch.save(resnet_fused.resnet18(num_classes=7).state_dict(), tmp_path / "wide.pt")
    (tmp_path / "broken.pt").write_bytes(b"PK")
    named = {name: str(tmp_path / f"{name}.pt") for name in ("wide", "broken")}
    named["1"] = str(tmp_path / "1.pt")
    for name, path in named.items():
        models = [model.replace(f"{{{name}}}", path) for model in models]
    run = arguments(tmp_path, folder[0])
    assert evaluate.main([*run[: run.index("--models") + 1], *models]) == 2
    assert message in capsys.readouterr().err


def test_training_still_needs_train(tmp_path: Path) -> None:
    write_images(tmp_path)
    with pytest.raises(DataError, match="train"):
        data.open_images(tmp_path, side=32)


def test_quick_run(tmp_path: Path) -> None:
    assert evaluate.main(["--quick", "--out", str(tmp_path)]) == 0
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 3 * 3
