"""Evaluation: one crop, ten crops, many scales fully convolutionally, and ensembles (Table 3 to 5).

    python experiments/evaluate.py               # embedded digits, minutes on two cores
    python experiments/evaluate.py --data CIFAR --models cifar.resnet56=WEIGHTS
    python experiments/evaluate.py --data IMAGENET --models resnet50=IMAGENET1K_V1
    torchrun --nproc-per-node 8 experiments/evaluate.py --data IMAGENET --workers 12 \\
        --models resnet34=runs/imagenet/checkpoints/resnet34-paper.pt resnet101=IMAGENET1K_V2

Every test is a list of views of an image, and its score of a class is the mean, over the views and
the models, of the posterior (softmax). In a view larger than the crop the network is fully
convolutional: average pooling slides over the last feature map in a window of the size that it has
for one crop, the classifier is applied at each position, and the posteriors are averaged over all.

1 crop: the centre, of an image whose shorter side is 256 (for crops of 224).
10 crops: the corners and the centre of that image, and of its mirror image.
multi-scale: the whole image and its mirror image at shorter sides 224, 256, 384, 480, 640 (4.1).
For other crops the sides are in proportion. Digits are not mirrored, so that ten crops are five.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import data, launch, networks, recipes
from common.checkpoint import Checkpoint, read_weights
from common.claims import Claim, Finding, Rows
from common.errors import ExperimentError
from common.report import Report
from common.training import Result, autocast, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from resnet_fused.models.network import ResidualNetwork

CROP, SIDE, SCALES = 224, 256, (224, 256, 384, 480, 640)
ENSEMBLE = "ensemble"
UNTRAINED = 50.0  # percent of errors above which nothing follows from a network
EPOCHS, RATE = 7, 0.05  # of the networks that learn the digits here


def parse(arguments: list[str]) -> argparse.Namespace:
    options = launch.parser(__doc__, "evaluate")
    options.add_argument(
        "--models",
        nargs="+",
        metavar="NAME=WEIGHTS",
        help="networks of resnet_fused (resnet50, cifar.resnet56, ...); weights are a file, a "
        "checkpoint of the experiments, or a name of torchvision's. Several make an ensemble",
    )
    options.add_argument("--tests", nargs="+", choices=TESTS)
    options.add_argument("--crop", type=int, help="height and width that the networks learned on")
    options.add_argument("--batch", type=int, help="images at a time")
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    images = data.open_images(
        place.data, side=24, quick=place.quick, train=place.data is None, copies=3
    )
    published = [f"resnet{depth}=IMAGENET1K_V1" for depth in (34, 50, 101, 152)]
    photographs = (published, list(TESTS), CROP, 32)
    names, chosen, crop, batch = launch.choose(
        options,
        images.kind,
        ("models", "tests", "crop", "batch"),
        digits=(["cifar.resnet20"] * 4, list(TESTS), 16, 64),
        cifar=(["cifar.resnet20", "cifar.resnet56"], list(TESTS), 32, 64),
        imagenet=photographs,
        quick=(["cifar.resnet20", "cifar.resnet20"], list(TESTS), 16, 64)
        if place.data is None
        else photographs,
    )
    models, trained = _models(place, images, names, crop)
    rows = [row for test in chosen for row in _test(place, images, models, test, crop, batch)]
    report(place, images, rows, trained)


def _models(
    place: launch.Launch, images: data.Images, names: Sequence[str], crop: int
) -> tuple[dict[str, ResidualNetwork], list[Result]]:
    """The networks, each by its name, and the trainings that took place for it."""
    models: dict[str, ResidualNetwork] = {}
    trained = []
    for i, name in enumerate(names):
        kind, _, weights = name.partition("=")
        make = networks.named(kind)
        if weights:
            try:
                path = Path(weights).expanduser()
                model = make(weights=read_weights(path) if path.is_file() else weights)
            except (ValueError, RuntimeError) as error:
                raise ExperimentError(f"--models {name}: {error}") from error
        elif place.data is None:
            build = partial(make, num_classes=images.classes)
            trained.append(_train(place, images, f"{kind}-{i}", build, crop, i))
            model = trained[-1].model
        else:
            raise ExperimentError(f"--models {name}: give its weights, {name}=WEIGHTS.")
        if (classes := _classifier(model).out_features) != images.classes:
            raise ExperimentError(
                f"--models {name} tells {classes} classes apart, and {images.name} has "
                f"{images.classes}."
            )
        label = name if name not in models else f"{name} ({i + 1})"
        models[label] = model.to(place.device, memory_format=torch.channels_last).eval()
    return models, trained


def _classifier(model: ResidualNetwork) -> nn.Linear:
    assert isinstance(model.fc, nn.Linear)
    return model.fc


def _train(
    place: launch.Launch,
    images: data.Images,
    name: str,
    build: Callable[[], nn.Module],
    crop: int,
    index: int,
) -> Result:
    """A network trained on the digits by the recipe of 3.4: crops of many scales."""
    batch = 64
    epoch = max(1, data.size(images.train) // batch)
    iterations = (1 if place.quick else EPOCHS) * epoch
    cuts = (iterations // 2, iterations * 3 // 4)  # so few epochs come to no plateau
    recipe = recipes.imagenet(images, crop, epoch, iterations, batch, RATE, cuts)
    seed = launch.seed_of(place.seed, "model", index)
    return train(name, build, images, recipe, place, seed)


def one_crop(image: Tensor, crop: int, mirrors: bool) -> list[Tensor]:
    """The centre of `image` (3, H, W) where the shorter side is 256, for crops of 224."""
    resized = transforms.resize(image, [round(SIDE * crop / CROP)], antialias=True)
    return [transforms.center_crop(resized, [crop, crop])]


def ten_crops(image: Tensor, crop: int, mirrors: bool) -> list[Tensor]:
    """The corners and the centre of the same image, and of its mirror image where that is right."""
    resized = transforms.resize(image, [round(SIDE * crop / CROP)], antialias=True)
    return _with_mirrored(list(transforms.five_crop(resized, [crop, crop])), mirrors)


def scales(image: Tensor, crop: int, mirrors: bool) -> list[Tensor]:
    """The whole image at each scale, and its mirror image where that is right."""
    sides = [round(scale * crop / CROP) for scale in SCALES]
    resized = [transforms.resize(image, [side], antialias=True) for side in sides]
    return _with_mirrored(resized, mirrors)


def _with_mirrored(views: list[Tensor], mirrors: bool) -> list[Tensor]:
    return views + [view.flip(-1) for view in views] if mirrors else views


TESTS: dict[str, Callable[[Tensor, int, bool], list[Tensor]]] = {
    "1 crop": one_crop,
    "10 crops": ten_crops,
    "multi-scale": scales,
}


class _Views(Dataset[tuple[list[Tensor], int]]):
    """The views of each test image, standardised, and its label."""

    def __init__(self, images: data.Images, test: str, crop: int) -> None:
        self.images, self.views, self.crop = images, TESTS[test], crop
        self.mean = images.mean.mean((1, 2), keepdim=True)  # crops know no mean of each pixel

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        image, label = self.images.test[index]
        pixels = transforms.to_dtype(transforms.to_image(image), torch.float32, scale=True)
        views = self.views(pixels.as_subclass(Tensor), self.crop, self.images.mirrors)
        return [(view - self.mean) / self.images.std for view in views], label


def posteriors(model: ResidualNetwork, views: Sequence[Sequence[Tensor]], crop: int) -> Tensor:
    """Scores (N, classes) of N images, each given by its views (3, H, W), standardised.

    The window is the last feature map of a `crop`; in smaller views it is theirs.
    """
    by_shape: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    for i, own in enumerate(views):
        for view in own:
            by_shape.setdefault(tuple(view.shape), []).append((i, view))
    classifier = _classifier(model)
    device = classifier.weight.device
    scores = torch.zeros(len(views), classifier.out_features, device=device)
    side = model.features(torch.zeros(1, 3, crop, crop, device=device))[-1].shape[-1]
    for same in by_shape.values():
        owners = torch.tensor([i for i, _ in same], device=device)
        batch = torch.stack([view for _, view in same])
        batch = batch.to(device, memory_format=torch.channels_last)
        scores.index_add_(0, owners, _dense(model, batch, side))
    return scores / torch.tensor([len(own) for own in views], device=device)[:, None]


def _dense(model: ResidualNetwork, batch: Tensor, side: int) -> Tensor:
    """Mean posteriors (N, classes) over all positions of a window of that side."""
    maps = model.features(batch)[-1]
    window = [min(side, length) for length in maps.shape[-2:]]
    pooled = F.avg_pool2d(maps, window, stride=1)
    return _classifier(model)(pooled.permute(0, 2, 3, 1)).float().softmax(-1).mean((1, 2))


@torch.inference_mode()
def _test(
    place: launch.Launch,
    images: data.Images,
    models: dict[str, ResidualNetwork],
    test: str,
    crop: int,
    batch: int,
) -> list[dict[str, Any]]:
    """Top-1 and top-5 errors of each network, and of all together where there are several."""
    names = [*models, ENSEMBLE] if len(models) > 1 else [*models]
    checkpoint = Checkpoint(
        place.out / "checkpoints" / f"{test.replace(' ', '-')}.pt",
        {},
        {
            "data": images.description,
            "models": names,
            "weights": [
                sum(float(p.sum()) for p in model.parameters()) for model in models.values()
            ],
            "crop": crop,
            "dtype": str(place.dtype),
        },
    )
    progress = checkpoint.load() or {"images": 0, "wrong": [[0, 0] for _ in names]}
    wrong = torch.tensor(progress["wrong"], device=place.device)
    count, together = data.size(images.test), batch * place.world
    starts = range(progress["images"], count, together)
    loader = DataLoader(
        _Views(images, test, crop),
        batch_sampler=[
            list(range(start + place.rank, min(start + together, count), place.world))
            for start in starts
        ],
        collate_fn=_apart,
        num_workers=place.workers,
    )
    saved = time.monotonic()
    bar = tqdm(loader, desc=test, disable=not place.leads)
    for start, (views, labels) in zip(starts, bar, strict=True):
        with autocast(place):
            scores = torch.stack([posteriors(model, views, crop) for model in models.values()])
        if len(models) > 1:
            scores = torch.cat([scores, scores.mean(0, keepdim=True)])
        best = scores.topk(min(5, images.classes)).indices
        right = best == torch.tensor(labels, device=place.device)[:, None]
        misses = [(~right[..., :few].any(-1)).sum(1) for few in (1, 5)]
        wrong += launch.total(torch.stack(misses, 1))
        done = min(start + together, count)
        if place.leads and (done == count or time.monotonic() - saved >= place.checkpoint_seconds):
            checkpoint.save({"images": done, "wrong": wrong.tolist()})
            saved = time.monotonic()
    errors = (100 * wrong / count).tolist()
    return [
        {"network": name, "test": test, "top-1 error (%)": top1, "top-5 error (%)": top5}
        for name, (top1, top5) in zip(names, errors, strict=True)
    ]


def _apart(pairs: list[tuple[list[Tensor], int]]) -> tuple[list[list[Tensor]], list[int]]:
    """Views have sizes of their own, so they are no one tensor."""
    return [views for views, _ in pairs], [label for _, label in pairs]


def report(
    place: launch.Launch,
    images: data.Images,
    rows: Sequence[dict[str, Any]],
    trained: Sequence[Result],
) -> None:
    pages = Report(
        place,
        "Evaluation",
        "Errors by how an image is viewed, and by how many networks vote. On ImageNet's validation "
        "images the paper has, for ResNet-152, a top-5 error of 5.71 % with ten crops (Table 3), "
        "4.49 % over five scales (Table 4), and on the test images 3.57 % with six networks "
        "(Table 5).",
    )
    if not images.mirrors:
        pages.text("Mirrored digits are no digits: nothing is mirrored, and ten crops are five.")
    if trained:
        pages.text(
            "Networks were trained here by the recipe of 3.4, but at a rate of "
            f"{RATE:g} that is divided by 10 after half and three quarters of the iterations, "
            "since so few epochs come to no plateau; they differ in their seeds alone. The digits "
            "are placed on canvases at several sizes, so that how they are viewed can matter, and "
            "several times each, so that an image is less than a tenth of a point. As in the "
            "paper the largest scale, 640, is beyond those that networks learn from, up to 480; "
            "there a crop's window sees an eighth of the image."
        )
    pages.table("results", rows)

    def draw(axes: Any) -> None:
        names = list(dict.fromkeys(row["network"] for row in rows))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            own = [row for row in rows if row["network"] == name]
            places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(own))]
            axes.bar(places, [row["top-1 error (%)"] for row in own], width, label=name)
        axes.set_xticks(range(len(own)), [row["test"] for row in own])
        axes.set(ylabel="top-1 error (%)")
        axes.legend(fontsize=8)

    pages.plot("errors", f"Top-1 error on {images.name}.", draw)
    pages.claims(CLAIMS, results=rows)
    pages.save(images, trained)


def _gains(rows: Rows, test: str, against: str) -> Finding:
    """By how many points `test` is better than `against`, network by network."""
    errors: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["network"] != ENSEMBLE:
            own = errors.setdefault(str(row["network"]), {})
            own[str(row["test"])] = float(row["top-1 error (%)"])
    both = [own for own in errors.values() if test in own and against in own]
    if len(both) < 2:
        return Finding(f"{len(both)} network(s) have both tests; the rule needs two.", None)
    gains = [own[against] - own[test] for own in both]
    gain, spread = statistics.mean(gains), statistics.stdev(gains)
    first, second = (statistics.mean(own[name] for own in both) for name in (against, test))
    if first > UNTRAINED:
        return Finding(f"the networks were not trained: {first:.1f} % errors.", None)
    return Finding(
        f"{second:.2f} % against {first:.2f} % top-1 error, means over {len(both)} networks; "
        + ", ".join(f"{points:+.2f}" for points in gains)
        + " points better network by network.",
        gain - 2 * spread / math.sqrt(len(gains)),
        spread,
    )


def _together(rows: Rows) -> Finding:
    tests = list(dict.fromkeys(str(row["test"]) for row in rows))
    found, margins, spreads = [], [], []
    for test in tests:
        own = [row for row in rows if row["test"] == test]
        alone = [float(r["top-1 error (%)"]) for r in own if r["network"] != ENSEMBLE]
        voted = [float(r["top-1 error (%)"]) for r in own if r["network"] == ENSEMBLE]
        if not voted:
            return Finding("a single network was tested.", None)
        if min(alone) > UNTRAINED:
            return Finding(f"the networks were not trained: {min(alone):.1f} % errors.", None)
        found.append(f"{voted[0]:.2f} % against {min(alone):.2f} to {max(alone):.2f} % ({test})")
        margins.append(min(alone) - voted[0])
        spreads.append(statistics.stdev(alone))
    return Finding(
        "the ensemble's top-1 error, against those of its networks, is " + ", ".join(found) + ".",
        min(margins),
        max(spreads),
    )


def _rule(test: str, against: str) -> str:
    return (
        f"over the networks, the mean difference of top-1 errors, {against} minus {test}, is at "
        "least two of its standard errors; margin in points beyond them. The spread is that of the "
        "difference."
    )


CLAIMS = (
    Claim(
        "Ten crops help",
        "3.4, Table 3",
        "adopts the standard 10-crop testing for comparison, and says nothing of one crop. Digits "
        "have five.",
        _rule("10 crops", "1 crop"),
        lambda rows: _gains(rows, "10 crops", "1 crop"),
    ),
    Claim(
        "Scales help",
        "3.4, Table 4",
        "for the best results it adopts the fully convolutional form at many scales.",
        _rule("multi-scale", "1 crop"),
        lambda rows: _gains(rows, "multi-scale", "1 crop"),
    ),
    Claim(
        "Scales help more than ten crops",
        "Table 3, 4",
        "ResNet-152 has a top-1 error of 21.43 % with ten crops, and 19.38 % over five scales.",
        _rule("multi-scale", "10 crops"),
        lambda rows: _gains(rows, "multi-scale", "10 crops"),
    ),
    Claim(
        "Ensembles help",
        "4.1, Table 5",
        "six models of different depth have 3.57 % top-5 test error; the best single one 4.49 % on "
        "the validation images.",
        "in every test the ensemble's top-1 error is no higher than its best network's.",
        _together,
    ),
)


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
