"""Shortcut options A, B and C: identity, projection where shapes change, projection everywhere.
(Table 3)

    python experiments/shortcuts.py                 # embedded digits, minutes on two cores
    python experiments/shortcuts.py --data CIFAR
    torchrun --nproc-per-node 8 experiments/shortcuts.py --data IMAGENET --workers 12   # Table 3

On ImageNet ResNet-34 beside plain-34, as in the table; on small images networks of section 4.2.
"""

from __future__ import annotations

import argparse
import sys
from statistics import mean

from common import data, launch, networks, recipes
from common.claims import Claim, Finding, Rows, column, spread
from common.report import Report, mean_and_deviation, over_seeds
from common.training import Result, train

OPTIONS = ("plain", "A", "B", "C")


_ERROR = "top-1 error (%)"
# How far apart the means of A, B and C may be, in points of error.
_NEAR = 1.0
_SEEDS = 3


def _errors(rows: Rows, *options: str) -> tuple[str, list[list[float]]]:
    """The test errors of each of `options`, and a sentence on them."""
    errors = [column(rows, _ERROR, shortcuts=option) for option in options]
    said = ", ".join(
        f"{option} {mean_and_deviation(of)} %" for option, of in zip(options, errors, strict=True)
    )
    return f"Top-1 error over {len(errors[0])} seeds: {said}.", errors


def _alike(rows: Rows) -> Finding:
    text, errors = _errors(rows, "A", "B", "C")
    if len(errors[0]) < _SEEDS:
        return Finding(f"{text} The rule needs {_SEEDS} seeds.", None)
    means = [mean(of) for of in errors]
    return Finding(text, _NEAR - (max(means) - min(means)), spread(*errors))


def _better_than_plain(rows: Rows) -> Finding:
    text, errors = _errors(rows, *OPTIONS)
    deviation = spread(*errors)
    if deviation is None or len(errors[0]) < _SEEDS:
        return Finding(f"{text} The rule needs {_SEEDS} seeds.", None)
    plain, *others = (mean(of) for of in errors)
    return Finding(text, plain - max(others) - deviation, deviation)


def _in_order(rows: Rows) -> Finding:
    text, errors = _errors(rows, "A", "B", "C")
    deviation = spread(*errors)
    if deviation is None or len(errors[0]) < _SEEDS:
        return Finding(f"{text} The rule needs {_SEEDS} seeds.", None)
    a, b, c = (mean(of) for of in errors)
    least = min(a - b, b - c)
    if abs(least) <= deviation:
        return Finding(
            f"{text} Neighbours differ by no more than the spread over seeds "
            f"({deviation:.2f} points), and the paper's differences of 0.2 to 0.5 points are less "
            "than these few test images and seeds can show.",
            None,
            deviation,
        )
    return Finding(text, least - deviation, deviation)


CLAIMS = (
    Claim(
        "Projections are not essential",
        "Table 3",
        "the top-1 errors of ResNet-34 A, B and C on ImageNet are 25.03, 24.52 and 24.19 %, so "
        "small differences indicate that projections do not decide.",
        f"the mean top-1 errors of A, B and C, over at least {_SEEDS} seeds, lie within "
        f"{_NEAR:.0f} point.",
        _alike,
    ),
    Claim(
        "Every shortcut is better than none",
        "Table 3",
        "all three options are considerably better than the plain network, whose top-1 error is "
        "28.54 %.",
        f"the mean top-1 error of each of A, B and C, over at least {_SEEDS} seeds, is below the "
        "plain network's by more than the largest spread over seeds of the four.",
        _better_than_plain,
    ),
    Claim(
        "B is slightly better than A, C marginally better than B",
        "Table 3",
        "24.52 against 25.03 %, and 24.19 against 24.52 %.",
        f"the mean top-1 error of B is below A's, and C's below B's, over at least {_SEEDS} seeds, "
        "by more than the largest spread over seeds of the three; not shown where the lesser of "
        "the two differences is within it.",
        _in_order,
    ),
)


def parse(arguments: list[str]) -> argparse.Namespace:
    options = launch.parser(__doc__, "shortcuts")
    options.add_argument("--depth", type=int)
    options.add_argument("--runs", type=int, help="of each option, with seeds that follow")
    options.add_argument("--iterations", type=int)
    options.add_argument("--batch", type=int)
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    images = data.open_images(place.data, side=8, quick=place.quick)
    depth, runs, iterations, batch = launch.choose(
        options,
        images.kind,
        ("depth", "runs", "iterations", "batch"),
        digits=(32, 3, 700, 64),
        cifar=(56, 5, 64_000, 128),
        imagenet=(34, 1, 600_000, 256),
        quick=(18, 1, 2, 4) if images.side is None else (8, 2, 10, 16),
    )
    if images.kind == "digits":
        recipe = recipes.cifar_in_short(images, iterations, batch)
    else:
        recipe = recipes.of_the_paper(images, iterations, batch)
    results: dict[str, list[Result]] = {option: [] for option in OPTIONS}
    for seed in range(place.seed, place.seed + runs):
        for option in OPTIONS:
            build = (
                networks.plain(images, depth)
                if option == "plain"
                else networks.residual(images, depth, option)
            )
            name = f"{option}-{depth}-seed{seed}"
            results[option].append(train(name, build, images, recipe, place, seed))
    report(place, images, depth, results)


def report(
    place: launch.Launch, images: data.Images, depth: int, results: dict[str, list[Result]]
) -> None:
    pages = Report(
        place,
        "Shortcut options",
        f"Networks of {depth} layers whose shortcuts are A: identities, padded with zero channels; "
        "B: projections where the number of channels changes; C: projections everywhere; and one "
        "without shortcuts (He et al., Table 3). The paper finds B slightly better than A and C "
        "marginally better than B, all far better than the plain network, and concludes that "
        "projections are not essential.",
    )
    rows = [
        {
            "shortcuts": option,
            "seed": seed,
            "parameters": networks.parameters(run.model),
            "training error (%)": run.training_error,
            _ERROR: run.last["test_error"],
            "top-5 error (%)": run.last["test_top5_error"],
        }
        for option, runs in results.items()
        for seed, run in enumerate(runs, place.seed)
    ]
    pages.csv("results", rows)
    pages.table("summary", over_seeds(rows))
    if len(results["A"]) > 1:
        pages.text(f"Mean ± standard deviation of {len(results['A'])} runs with different seeds.")

    pages.curves(
        f"Training and test error on {images.name}, first seed.",
        {option: runs[0].history for option, runs in results.items()},
    )
    if images.kind == "digits":
        pages.text(recipes.CHANGED)
        pages.claims(CLAIMS, results=rows)
    pages.save(images, [run for runs in results.values() for run in runs])


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
