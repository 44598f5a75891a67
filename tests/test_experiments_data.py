"""Data sets in their published formats, damaged ones, augmentations and learning rates."""

from __future__ import annotations

import csv
import importlib
import pickle
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision", reason="the experiments' data comes through torchvision")
pytest.importorskip("sklearn", reason="the experiments' digits come with scikit-learn")
from common import augmentation, data, networks, recipes, schedules
from common.errors import DataError, ExperimentError
from PIL import Image

from resnet_fused import env

BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


def write_cifar(root: Path, rows: int = 8) -> Path:
    """CIFAR-10 as it is published, with few images. Class k is of brightness 25 k."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*BATCHES, "test_batch"):
        labels = [int(label) for label in rng.integers(0, 10, rows)]
        noise = rng.integers(0, 20, (rows, 3072))
        images = (np.array(labels)[:, None] * 25 + noise).clip(0, 255).astype(np.uint8)
        content = {
            "batch_label": f"batch {name}",
            "labels": labels,
            "data": images,
            "filenames": [f"{i}.png" for i in range(rows)],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    meta = {"label_names": [f"class {k}" for k in range(10)], "num_cases_per_batch": rows}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    return root


def write_folders(root: Path, each: int = 12) -> Path:
    """Photographs as JPEG files of several sizes, one folder per class, in train/ and val/."""
    rng = np.random.default_rng(0)
    for part, count in (("train", each), ("val", 4)):
        for k, label in enumerate(("n01440764", "n01443537", "n01484850")):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(40, 90, 2)
                pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
                pixels[..., k] += 150
                Image.fromarray(pixels).save(folder / f"{part}_{i}.JPEG")
    # ImageNet holds some of other modes.
    grey = Image.new("L", (50, 60), 128)
    grey.save(root / "train" / "n01440764" / "train_0.JPEG")
    return root


def write_official(root: Path) -> Path:
    """The same as torchvision leaves ImageNet's archives once it has unpacked them."""
    write_folders(root)
    names = {label: (f"name of {label}",) for label in ("n01440764", "n01443537", "n01484850")}
    torch.save((names, list(names)), root / "meta.bin")
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"not read again")
    return root


def last_rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "history.csv").open(encoding="utf-8") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_cifar_recipe_on_the_published_format(tmp_path: Path) -> None:
    root, out = write_cifar(tmp_path / "data"), tmp_path / "out"
    given = ["--quick", "--device", "cpu", "--depths", "8", "--runs", "1", "--iterations", "40"]
    main = importlib.import_module("cifar").main
    assert main([*given, "--data", str(root), "--out", str(out)]) == 0
    row = last_rows(out)["resnet8-seed0"]
    assert float(row["training_error"]) < 60  # chance is 90 %: the images reach their labels
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "CIFAR-10's format, 40 to train and 8 to test" in report


@pytest.mark.parametrize(
    ("write", "name"), [(write_folders, "image folders"), (write_official, "ImageNet")]
)
def test_imagenet_recipe_on_the_published_formats(
    write: Callable[[Path], Path], name: str, tmp_path: Path
) -> None:
    root, out = write(tmp_path / "data"), tmp_path / "out"
    given = ["--quick", "--device", "cpu", "--epochs", "6", "--batch", "12", "--recipes", "paper"]
    main = importlib.import_module("imagenet").main
    assert main([*given, "--data", str(root), "--out", str(out)]) == 0
    row = last_rows(out)["resnet18-paper"]
    assert float(row["training_error"]) < 40  # chance is 67 %
    report = (out / "report.md").read_text(encoding="utf-8")
    assert f"{name}, 36 to train and 12 to test, 3 classes" in report


def test_cifar_images_and_labels_stay_together(tmp_path: Path) -> None:
    images = data.open_images(write_cifar(tmp_path), side=12)
    assert (images.kind, images.side, images.mirrors, images.classes) == ("cifar", 32, True, 10)
    assert (data.size(images.train), data.size(images.test)) == (40, 8)
    for pairs in (images.train, images.test):
        for index in range(data.size(pairs)):
            image, label = pairs[index]
            assert image.shape == (3, 32, 32)
            assert abs(float(image.float().mean()) - min(label * 25 + 9.5, 255)) < 3
    # The folder itself may be given too.
    assert data.size(data.open_images(tmp_path / "cifar-10-batches-py", 12).train) == 40


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2000])


def wrong_shape(file: Path) -> None:
    content = {"data": np.zeros((4, 3000), np.uint8), "labels": [0] * 4}
    file.write_bytes(pickle.dumps(content, protocol=2))


def wrong_label(file: Path) -> None:
    content = {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 10]}
    file.write_bytes(pickle.dumps(content, protocol=2))


def full_size(file: Path) -> None:
    content = {"data": np.zeros((10_000, 3072), np.uint8), "labels": [0] * 10_000}
    file.write_bytes(pickle.dumps(content, protocol=2))


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("ran"),)  # type: ignore[return-value]


def harmful(file: Path) -> None:
    file.write_bytes(pickle.dumps({"data": Harmful(), "labels": []}, protocol=2))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "is missing; unpack cifar-10-python.tar.gz"),
        (truncate, "is corrupt"),
        (wrong_shape, r"uint8 of shape \(4, 3000\) beside 4 labels"),
        (wrong_label, "labels 0 to 9 belong"),
        (full_size, "its MD5 is not the published one"),
        (harmful, "which no image file needs"),
    ],
)
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_a_damaged_cifar_file_is_named(
    damage: Callable[[Path], None],
    message: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_cifar(tmp_path) / "cifar-10-batches-py" / name
    damage(file)
    with pytest.raises(DataError, match=message) as raised:
        data.open_images(tmp_path, side=12)
    assert str(file) in str(raised.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", [remove, truncate, harmful])
def test_damaged_class_names_are_named(
    damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_cifar(tmp_path) / "cifar-10-batches-py" / "batches.meta"
    damage(file)
    with pytest.raises(DataError, match=r"batches\.meta"):
        data.open_images(tmp_path, side=12)
    assert not (tmp_path / "ran").exists()


def test_folders_without_a_data_set_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        data.open_images(tmp_path / "nowhere", 12)
    with pytest.raises(DataError, match="holds no data set that is known here"):
        data.open_images(tmp_path, 12)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="still packed; unpack it: tar -C"):
        data.open_images(tmp_path, 12)


def test_an_error_ends_the_program_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module("cifar").main
    assert main(["--quick", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err == f"error: --data {tmp_path}/nowhere: there is no such folder.\n"
    )


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_damaged_photograph_is_named(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_folders(tmp_path / "data")
    file = root / part / "n01443537" / f"{part}_1.JPEG"
    file.write_bytes(file.read_bytes()[:-300])
    main = importlib.import_module("imagenet").main
    given = ["--quick", "--device", "cpu", "--epochs", "1", "--batch", "36", "--recipes", "paper"]
    assert main([*given, "--data", str(root), "--out", str(tmp_path / "out")]) == 2
    assert f"{file} is no whole image" in capsys.readouterr().err


def test_networks_suit_the_images(tmp_path: Path) -> None:
    photographs = data.open_images(write_folders(tmp_path, 1), 12)
    found = {
        "plain34": networks.plain(photographs, 34)(),
        "A34": networks.residual(photographs, 34)(),
        "B34": networks.residual(photographs, 34, "B")(),
        "digits": networks.residual(data.digits(8), 20, "C")(),
    }
    # Options A and "none" have no parameters; B has three projections with batch norm.
    counts = {name: networks.parameters(model) for name, model in found.items()}
    projections = sum(2 * c * c + 2 * 2 * c for c in (64, 128, 256))
    assert counts["A34"] == counts["plain34"] == counts["B34"] - projections
    assert found["A34"].fc.out_features == 3
    assert found["digits"].conv1.stride == (1, 1)
    with pytest.raises(ExperimentError, match="no plain network of 50 layers for photographs"):
        networks.plain(photographs, 50)


def test_missing_and_differing_folders_are_named(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    for file in (root / "val" / "n01484850").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="n01484850"):
        data.open_images(root, 12)
    (root / "val" / "n01484850").rmdir()
    with pytest.raises(DataError, match="different classes: n01484850 is in only one"):
        data.open_images(root, 12)


def test_official_imagenet_without_its_archives_is_explained(tmp_path: Path) -> None:
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"cut off")
    with pytest.raises(DataError, match=r"ILSVRC2012_devkit_t12\.tar\.gz"):
        data.open_images(tmp_path, 12)


def test_digits_are_split_once_and_for_all() -> None:
    images = data.digits(16)
    assert (data.size(images.train), data.size(images.test)) == (1200, 597)
    assert not images.mirrors
    train, test = (
        {pair[0].numpy().tobytes() for pair in (pairs[i] for i in range(data.size(pairs)))}
        for pairs in (images.train, images.test)
    )
    assert len(train & test) <= 1  # scikit-learn's set has next to no equal images
    counts = np.bincount([images.test[i][1] for i in range(597)])
    assert counts.min() >= 57  # every class has its share
    again = data.digits(16)
    assert all(torch.equal(images.train[i][0], again.train[i][0]) for i in range(0, 1200, 100))


def test_placed_digits_are_the_digits_smaller_and_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noisy = data.digits(16, copies=2)
    assert (data.size(noisy.train), data.size(noisy.test)) == (2400, 1194)
    again = data.digits(16, copies=2)
    assert all(torch.equal(noisy.test[i][0], again.test[i][0]) for i in range(0, 1194, 100))
    monkeypatch.setattr(data, "_PLACED_NOISE", 0.0)
    whole, placed = data.digits(16), data.digits(16, copies=2)
    columns = torch.arange(16.0)
    places = []
    for i in range(0, 1194, 10):
        (small, label), (image, placed_label) = whole.test[i % 597], placed.test[i]
        assert placed_label == label
        # All of the ink is there, on a share of the canvas; noise adds to it.
        ink = image.float().mean() / small.float().mean()
        assert 0.9 * 0.6**2 < ink < 1.1 * 0.9**2
        assert noisy.test[i][0].float().mean() > image.float().mean()
        places.append(float((image[0].float().sum(0) @ columns) / image[0].float().sum()))
    assert min(places) < 6
    assert max(places) > 9  # the middle is 7.5


def test_processes_share_each_batch_whenever_they_start() -> None:
    def keys(start: int, rank: int, world: int) -> list[list[tuple[int, int]]]:
        return list(data.TrainingBatches(50, 12, start, 9, seed=5, rank=rank, world=world))

    whole = keys(0, 0, 1)
    assert keys(6, 0, 1) == whole[6:]
    for start in (0, 6):
        shares = [keys(start, rank, 3) for rank in range(3)]
        for batch, parts in zip(whole[start:], zip(*shares, strict=True), strict=True):
            assert {len(part) for part in parts} == {4}
            assert sorted(chain(*parts)) == sorted(batch)
    # Four batches an epoch, in which no image comes twice; epochs have orders of their own.
    epochs = [list(chain(*whole[i : i + 4])) for i in (0, 4)]
    for number, epoch in enumerate(epochs):
        assert {key[0] for key in epoch} == {number}
        assert len({key[1] for key in epoch}) == 48
    assert [key[1] for key in epochs[0]] != [key[1] for key in epochs[1]]


def test_augmentation_follows_from_seed_epoch_and_index() -> None:
    images = data.digits(16)
    transformed = data.Transformed(images.train, augmentation.padded_crops(images), seed=1)
    torch.manual_seed(0)
    first = transformed[0, 7][0]
    state = torch.get_rng_state()
    transformed[3, 9]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(transformed[0, 7][0], first)
    others = [transformed[epoch, 7][0] for epoch in range(1, 6)]
    assert not all(torch.equal(first, other) for other in others)
    other_seed = data.Transformed(images.train, augmentation.padded_crops(images), seed=2)
    assert not all(torch.equal(other_seed[e, 7][0], transformed[e, 7][0]) for e in range(5))


def marked(mirrors: bool) -> data.Images:
    """One image whose top left pixel is white."""
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    pixels[0, :, 0, 0] = 255
    pairs = data.InMemory(pixels, [0])
    mean, std = torch.full((3, 32, 32), 0.25), torch.full((3, 1, 1), 0.5)
    colours = (torch.zeros(3), torch.eye(3))
    return data.Images("cifar", "", "", pairs, pairs, 10, 32, mirrors, mean, std, *colours)


@pytest.mark.parametrize("mirrors", [False, True])
def test_padded_crops_shift_by_four_pixels_and_mirror_where_allowed(mirrors: bool) -> None:
    images = marked(mirrors)
    crop = augmentation.padded_crops(images)
    places, paddings = set(), set()
    torch.manual_seed(0)
    for _ in range(600):
        out = crop(images.train[0][0])
        assert out.shape == (3, 32, 32)
        white = (out[0] == 1.5).nonzero()  # (1 - 0.25) / 0.5
        places.update(tuple(place) for place in white.tolist())
        paddings.update(out[0].unique().tolist())
    assert paddings == {-0.5, 0.0, 1.5}  # padded with the mean
    right = {(y, x) for y in range(5) for x in range(27, 32)}
    left = {(y, x) for y in range(5) for x in range(5)}
    assert places == (left | right if mirrors else left)


def test_scaled_crops_see_scales_from_256_to_480() -> None:
    # A ramp of 0 to 1 over the width: its slope in a crop tells the scale.
    ramp = torch.linspace(0, 255, 600).round().to(torch.uint8).expand(3, 300, 600)
    images = marked(False)
    crop = augmentation.scaled_crops(images, 224)
    sides = []
    torch.manual_seed(0)
    for _ in range(60):
        out = crop(ramp)
        assert out.shape == (3, 224, 224)
        row = (out[0, 112] * 0.5).double()
        sides.append(float(1 / ((row[-10] - row[10]) / 203) / 2))  # half of the width
    assert 250 < min(sides) < 285
    assert 445 < max(sides) < 490


def test_colours_are_shifted_along_their_components() -> None:
    images = data.digits(16)  # grey: the only component of any size is grey
    assert images.eigenvalues[:2].abs().max() < 1e-5
    pixels = torch.stack([images.train[i][0] for i in range(1200)]).double() / 255
    # Equal channels of variance v have the one eigenvalue 3 v.
    assert float(images.eigenvalues[2]) == pytest.approx(3 * float(pixels[:, 0].var()), rel=1e-4)
    colour = augmentation.PcaColour(images)
    torch.manual_seed(0)
    shifts = torch.stack([colour(torch.zeros(3, 2, 2)) for _ in range(2000)])
    assert torch.allclose(shifts, shifts[:, :1, :1, :1], atol=1e-6)
    expected = 0.1 * float(images.eigenvalues[2]) / 3**0.5
    assert float(shifts[:, 0, 0, 0].std()) == pytest.approx(expected, rel=0.05)


def test_colours_of_photographs_have_the_published_covariance() -> None:
    """0.1² Σ λ² p pᵀ over the components p, which are rows (Krizhevsky et al. 2012, 4.1)."""
    images = replace(
        data.digits(8),
        eigenvalues=torch.tensor(data._IMAGENET_EIGENVALUES),
        eigenvectors=torch.tensor(data._IMAGENET_EIGENVECTORS),
    )
    torch.manual_seed(0)
    colour = augmentation.PcaColour(images)
    shifts = torch.stack([colour(torch.zeros(3, 1, 1))[:, 0, 0] for _ in range(4000)])
    expected = torch.zeros(3, 3)
    for value, component in zip(
        data._IMAGENET_EIGENVALUES, data._IMAGENET_EIGENVECTORS, strict=True
    ):
        part = torch.tensor(component)
        expected += (0.1 * value) ** 2 * torch.outer(part, part)
    assert float((shifts.T.cov() - expected).norm() / expected.norm()) < 0.05


def optimizer(rate: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], rate)


def rates(
    make: Callable[[torch.optim.Optimizer], schedules.Schedule],
    errors: list[tuple[float | None, float | None]],
    stop_after: int,
) -> list[float]:
    """The rate of each iteration; after `stop_after` of them all goes on from its state."""
    sgd = optimizer()
    schedule = make(sgd)
    found = []
    for i, pair in enumerate(errors):
        if i == stop_after:
            states = schedule.state_dict(), sgd.state_dict()
            sgd = optimizer()
            schedule = make(sgd)
            sgd.load_state_dict(states[1])
            schedule.load_state_dict(states[0])
        found.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.after_iteration(*pair)
    return found


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_rates_by_hand(stop_after: int) -> None:
    none = [(None, None)] * 6
    milestones = rates(lambda o: schedules.Milestones(o, (2, 4)), none, stop_after)
    assert milestones == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    training = [(90.0, None), (81.0, None), (79.0, None), (85.0, None), (None, None), (1.0, None)]
    warm = rates(lambda o: schedules.Milestones(o, (5,), 0.01), training, stop_after)
    assert warm == pytest.approx([0.01, 0.01, 0.01, 0.1, 0.1, 0.01])
    tests = [(None, e) for e in (50.0, 40.0, 41.0, 40.0, 30.0, 30.0)]
    plateau = rates(lambda o: schedules.Plateau(o, patience=1), tests, stop_after)
    assert plateau == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.01, 0.01])
    cosine = rates(lambda o: schedules.Cosine(o, 6, 2), none, stop_after)
    fall = [0.05 * (1 + np.cos(np.pi * k / 4)) for k in range(4)]
    assert cosine == pytest.approx([0.001, 0.0505, *fall])


@pytest.mark.parametrize(("epochs", "patient"), [(120, 5), (60, 5), (20, 2), (8, 1)])
def test_patience_shrinks_with_the_run(epochs: int, patient: int) -> None:
    recipe = recipes.imagenet(data.digits(8), 8, 10, epochs * 10, 16)
    same = [(None, 50.0)] * (patient + 3)
    found = rates(recipe.schedule, same, stop_after=len(same))
    assert found == pytest.approx([0.1] * (patient + 2) + [0.01])


def test_results_are_no_change_of_the_code(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True)

    files = [tmp_path / "experiments" / name for name in ("reports/report.md", "code.py")]
    files[0].parent.mkdir(parents=True)
    for file in files:
        file.write_text("before")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    for file, dirty in zip(files, (False, True), strict=True):
        file.write_text("after")
        assert env.commit(tmp_path / "experiments", "experiments/reports")["dirty"] is dirty


def test_sources_without_git_are_of_the_commit_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert env.commit(tmp_path) == {"commit": None, "dirty": None}
    monkeypatch.setenv("RESNET_FUSED_COMMIT", "0123abc")
    assert env.commit(tmp_path) == {"commit": "0123abc", "dirty": None}
