"""Localization: one box an image, by a regression for each class (appendix C, Table 13).

    python experiments/localization.py                          # digits on backgrounds, minutes
    torchrun --nproc-per-node 8 experiments/localization.py --data IMAGENET

IMAGENET is the folder that holds ILSVRC/, as ILSVRC2017_CLS-LOC.tar.gz unpacks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from common import launch, networks
from common.claims import Claim, Finding, Rows, column, spread
from common.report import Report, measured
from common.training import Result
from detectors import digits
from detectors.localizer import (
    CROP,
    SIDES,
    Crops,
    Localizer,
    classify,
    errors,
    locate,
    usual_box,
)
from detectors.scenes import Scenes, imagenet
from detectors.training import Recipe, train
from torch import Tensor

# Rules, written before the run that they judge.
_BOUND = 25.0  # percent
_CLASSIFICATION = 5.0  # points: what five predicted classes cost at most
_LEAST_FALL = 1.0  # points
# A larger image would leave too little of a digit in a crop.
_DIGIT_SIDES = (256, 320)


def parse(arguments: list[str]) -> argparse.Namespace:
    options = launch.parser(__doc__, "localization")
    options.add_argument("--model", help="a network of resnet_fused: resnet101, for example")
    options.add_argument(
        "--weights", help="what it begins with: a file, or a name of torchvision's"
    )
    options.add_argument("--crop", type=int, help="side of the crops in pixels")
    options.add_argument("--runs", type=int, help="seeds")
    options.add_argument("--iterations", type=int)
    options.add_argument("--batch", type=int)
    options.add_argument("--learning-rate", type=float)
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    names = ("model", "weights", "crop", "runs", "iterations", "batch", "learning_rate")
    model, weights, crop, runs, iterations, batch, rate = launch.choose(
        options,
        "imagenet" if place.data else "digits",
        names,
        digits=(None, None, 64, 3, 600, 32, 0.02),
        imagenet=("resnet101", "DEFAULT", 224, 1, 60_000, 256, 0.01),
        quick=(None, None, 64, 1, 4, 4, 0.01),
    )
    scenes = _scenes(place)
    classes = len(scenes.classes)
    sides = _DIGIT_SIDES if place.data is None else SIDES
    make = partial(digits.network if model is None else networks.named(model), num_classes=classes)
    first: list[Result] = []
    if weights is None and place.data is None:
        first.append(digits.classifier(place, make))
        weights = {k: value.clone() for k, value in first[0].model.state_dict().items()}
    classifier = make(weights=weights).to(place.device).eval()
    labels = partial(classify, classifier, scenes=scenes, side=sides[0] * crop / CROP)

    def tested(localizer: Any, dense: bool) -> dict[str, float]:
        localizer.eval()
        return errors(scenes, place, partial(locate, localizer, dense=dense), labels)

    usual = usual_box(scenes).to(place.device)
    fixed = errors(scenes, place, partial(_same_box, usual, classes), labels)
    recipe = Recipe(
        iterations, batch, rate, max(1, iterations // 50), evaluate_every=max(1, iterations // 4)
    )
    results, rows = [], []
    for seed in range(place.seed, place.seed + runs):
        own = replace(place, seed=seed)
        result = train(
            f"seed{seed}",
            lambda: Localizer(make(weights=weights), classes, crop, sides, scenes.mean, scenes.std),
            scenes,
            recipe,
            own,
            Crops(scenes, crop, sides, seed),
            partial(tested, dense=False),
        )
        results.append(result)
        rows += [
            {"boxes": "the usual box", "testing": "none", "seed": seed, **fixed},
            {
                "boxes": "per class",
                "testing": "1-crop",
                "seed": seed,
                **tested(result.model, False),
            },
            {"boxes": "per class", "testing": "dense", "seed": seed, **tested(result.model, True)},
        ]
    report(place, scenes, results, rows, first, model or "a ResNet-18 of a quarter of its width")


def _same_box(parts: Tensor, classes: int, image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    return (parts * parts.new_tensor([width, height, width, height])).expand(classes, 4)


def _scenes(place: launch.Launch) -> Scenes:
    if place.data is not None:
        scenes = imagenet(place.data)
        return scenes.first(16, 8) if place.quick else scenes
    counts = (16, 8) if place.quick else (1200, 200)
    root = place.out / f"images-{counts[0]}-{counts[1]}-{place.seed}"
    return digits.open_or_write_single(root, *counts, place)


def _localizes(rows: Rows) -> Finding:
    usual = column(rows, "true class error", testing="none")
    found = column(rows, "true class error", testing="dense")
    error = statistics.mean(found)
    margin = min(statistics.mean(usual) / 2, _BOUND) - error
    text = (
        f"{error:.1f} % on the true class where the usual box has {statistics.mean(usual):.1f} %."
    )
    return Finding(text, margin, spread(found))


def _dense_helps(rows: Rows) -> Finding:
    crop, dense = (
        column(rows, "true class error", testing=testing) for testing in ("1-crop", "dense")
    )
    gains = [a - b for a, b in zip(crop, dense, strict=True)]
    text = (
        f"{statistics.mean(crop):.1f} % on the centre crop, {statistics.mean(dense):.1f} % on "
        "whole images at three scales."
    )
    deviation = spread(gains)
    return Finding(text, statistics.mean(gains) - max(_LEAST_FALL, deviation or 0.0), deviation)


def _predicted_classes(rows: Rows) -> Finding:
    true, top5, top1 = (
        column(rows, name, testing="dense")
        for name in ("true class error", "top-5 error", "top-1 error")
    )
    costs = [a - b for a, b in zip(top5, true, strict=True)]
    text = (
        f"{statistics.mean(top5):.1f} % with five predicted classes, {statistics.mean(top1):.1f} % "
        f"with one, {statistics.mean(true):.1f} % with the true class."
    )
    cost = statistics.mean(costs)
    margin = _CLASSIFICATION - max(cost, statistics.mean(top5) - _BOUND)
    return Finding(text, margin, spread(costs))


CLAIMS = (
    Claim(
        "A box per class localizes",
        "C, Table 13",
        "an error of 13.3 % on the true class on the centre crop and 11.7 % densely, against VGG's "
        "33.1 %.",
        f"tested densely, the mean error on the true class is at most {_BOUND:g} %, and at most "
        "half of the error of one box for all images, the median of the training objects'.",
        _localizes,
    ),
    Claim(
        "Dense testing helps",
        "C, Table 13",
        "11.7 % densely, over the whole image at several scales, against 13.3 % on the centre "
        "crop, on the true class.",
        f"the error falls from the centre crop to dense testing by at least {_LEAST_FALL:g} point "
        "and by the standard deviation of that fall over seeds.",
        _dense_helps,
    ),
    Claim(
        "Predicted classes cost little",
        "C, Table 13",
        "14.4 % with the five classes that ResNet-101 predicts, against 11.7 % with the true one.",
        f"with five predicted classes the error is at most {_CLASSIFICATION:g} points above that "
        f"with the true class, and at most {_BOUND + _CLASSIFICATION:g} %.",
        _predicted_classes,
    ),
)


def report(
    place: launch.Launch,
    scenes: Scenes,
    results: Sequence[Result],
    rows: Sequence[dict[str, Any]],
    first: Sequence[Result],
    model: str,
) -> None:
    pages = Report(
        place,
        "Localization",
        f"One box an image by {model} with frozen batch norm (He et al., appendix C): two sibling "
        "layers behind conv4 say for every class and anchor whether it holds an object, and "
        "where. Errors in percent: an image is right where the box of its class overlaps an object "
        "by half and, with predicted classes, where the class is the likeliest (top-1) or among "
        "five (top-5). 1-crop is the centre crop, dense the whole image at three scales. The usual "
        "box is the median of the training objects' boxes, the same for all images. The paper's "
        "second step, R-CNN on the boxes found so, is not here.",
    )
    if first:
        last = first[0].last
        pages.text(
            "The network begins as a classifier of single digits on backgrounds, which predicts "
            f"the classes; its test error is {last['test_error']:.2f} %."
        )
    pages.table("results", rows)

    def draw(panels: list[Any]) -> None:
        for result in results:
            panels[0].plot(*measured(result.history, "training_loss"), label=result.name)
            panels[1].plot(*measured(result.history, "true class error"), "o-", label=result.name)
        names = ("training loss", "error on the true class, 1-crop (%)")
        for axes, name in zip(panels, names, strict=True):
            axes.set(xlabel="iteration", ylabel=name, ylim=(0, None))
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)

    pages.plot("curves", f"Training on {scenes.name}.", draw, panels=2)
    pages.claims(CLAIMS, results=rows)
    pages.save(scenes, [*first, *results])


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
