"""Degradation: do deeper plain networks fit worse, and deeper residual ones not? (Fig. 1, 4, 6)

    python experiments/degradation.py                 # embedded digits, minutes on two cores
    python experiments/degradation.py --data CIFAR    # Fig. 1 and 6
    torchrun --nproc-per-node 8 experiments/degradation.py --data IMAGENET --workers 12   # Fig. 4

Small images go through the networks of section 4.2; ImageNet's through plain and residual nets of
18 and 34 layers, with option A (Table 2).
"""

from __future__ import annotations

import argparse
import sys
from statistics import mean
from typing import Any

from common import data, launch, networks, recipes
from common.claims import Claim, Finding, Rows, column, spread
from common.report import Report, error_curves, mean_and_deviation, over_seeds
from common.training import Result, train

KINDS = {"plain": networks.plain, "residual": networks.residual}


_TRAINING, _TEST = "training error (%)", "test error (%)"
# What the rules allow, in points of error: where residual networks do not degrade, and the least
# that plain ones have to.
_EQUAL, _WORSE = 1.0, 10.0
_SEEDS = 3


def _ends(rows: Rows, kind: str, error: str) -> tuple[str, list[float], list[float]]:
    """The `kind` network's errors at its least and its greatest depth, and a sentence on them."""
    depths = sorted({float(row["layers"]) for row in rows})
    first, last = (
        column(rows, error, network=kind, layers=depth) for depth in (depths[0], depths[-1])
    )
    text = (
        f"From {depths[0]:.0f} to {depths[-1]:.0f} layers the {kind} networks' {error[:-4]} goes "
        f"from {mean_and_deviation(first)} % to {mean_and_deviation(last)} %, over "
        f"{len(first)} seeds."
    )
    return text, first, last


def _plain_degrade(rows: Rows) -> Finding:
    text, first, last = _ends(rows, "plain", _TRAINING)
    if len(first) < _SEEDS:
        return Finding(f"{text} The rule needs {_SEEDS} seeds.", None)
    return Finding(text, mean(last) - mean(first) - _WORSE, spread(first, last))


def _residual_do_not(rows: Rows) -> Finding:
    text, first, last = _ends(rows, "residual", _TRAINING)
    if len(first) < _SEEDS:
        return Finding(f"{text} The rule needs {_SEEDS} seeds.", None)
    return Finding(text, mean(first) + _EQUAL - mean(last), spread(first, last))


def _depth_helps(rows: Rows) -> Finding:
    text, first, last = _ends(rows, "residual", _TEST)
    deviation, gain = spread(first, last), mean(first) - mean(last)
    if deviation is None or len(first) < _SEEDS:
        return Finding(f"{text} The rule needs {_SEEDS} seeds.", None)
    if abs(gain) <= deviation:
        return Finding(
            f"{text} The difference is within the spread over seeds ({deviation:.2f} points): "
            "these images leave a deeper network nothing to gain.",
            None,
            deviation,
        )
    return Finding(text, gain - deviation, deviation)


CLAIMS = (
    Claim(
        "Plain networks degrade with depth",
        "Fig. 1, 4 and 6",
        "the deeper plain networks have the higher training error; on CIFAR-10 it grows from 20 to "
        "56 layers throughout training.",
        f"the mean training error of the deepest plain network, over at least {_SEEDS} seeds, is "
        f"at least {_WORSE:.0f} points above that of the shallowest.",
        _plain_degrade,
    ),
    Claim(
        "Residual networks do not",
        "Fig. 4 and 6",
        "deeper residual networks have no higher training error.",
        f"the mean training error of the deepest residual network, over at least {_SEEDS} seeds, "
        f"is at most that of the shallowest plus {_EQUAL:.0f} point.",
        _residual_do_not,
    ),
    Claim(
        "Residual networks gain from depth",
        "Table 6",
        "the test error on CIFAR-10 falls from 8.75 % at 20 layers to 6.97 % at 56.",
        f"the mean test error of the deepest residual network, over at least {_SEEDS} seeds, is "
        "below that of the shallowest by more than the spread over seeds; not shown where they "
        "differ by no more than that.",
        _depth_helps,
    ),
)


def parse(arguments: list[str]) -> argparse.Namespace:
    options = launch.parser(__doc__, "degradation")
    options.add_argument("--depths", type=int, nargs="+")
    options.add_argument("--runs", type=int, help="of each network, with seeds that follow")
    options.add_argument("--iterations", type=int)
    options.add_argument("--batch", type=int)
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    images = data.open_images(place.data, side=8, quick=place.quick)
    depths, runs, iterations, batch = launch.choose(
        options,
        images.kind,
        ("depths", "runs", "iterations", "batch"),
        digits=([20, 56], 3, 1000, 64),
        cifar=([20, 32, 44, 56, 110], 1, 64_000, 128),
        imagenet=([18, 34], 1, 600_000, 256),
        quick=([18], 1, 2, 4) if images.side is None else ([8, 14], 2, 12, 16),
    )
    results: dict[tuple[str, int], list[Result]] = {}
    for kind, network in KINDS.items():
        for depth in depths:
            if images.kind == "digits":
                recipe = recipes.cifar_in_short(images, iterations, batch)
            else:
                warm_up = {"warm_up": True} if depth >= 110 else {}
                recipe = recipes.of_the_paper(images, iterations, batch, **warm_up)
            build = network(images, depth)
            results[kind, depth] = [
                train(f"{kind}{depth}-seed{seed}", build, images, recipe, place, seed)
                for seed in range(place.seed, place.seed + runs)
            ]
    report(place, images, results, depths)


def report(
    place: launch.Launch,
    images: data.Images,
    results: dict[tuple[str, int], list[Result]],
    depths: list[int],
) -> None:
    pages = Report(
        place,
        "Degradation",
        "Plain and residual networks of growing depth, trained alike (He et al., Fig. 1, 4 and 6). "
        "The paper finds that deeper plain networks have the higher *training* error, so that it "
        "is not overfitting, and that deeper residual networks do not.",
    )

    def draw(panels: list[Any]) -> None:
        for axes, kind in zip(panels, KINDS, strict=True):
            curves = {f"{kind}-{depth}": results[kind, depth][0].history for depth in depths}
            error_curves(axes, curves, kind)
        panels[0].sharey(panels[1])

    pages.plot("curves", f"Training and test error on {images.name}, first seed.", draw, panels=2)
    rows = [
        {
            "layers": depth,
            "network": kind,
            "seed": seed,
            "parameters": networks.parameters(run.model),
            _TRAINING: run.training_error,
            _TEST: run.last["test_error"],
        }
        for (kind, depth), runs in results.items()
        for seed, run in enumerate(runs, place.seed)
    ]
    pages.csv("results", rows)
    pages.table("summary", over_seeds(rows))
    seeds = len(rows) // len(results)
    if seeds > 1:
        pages.text(f"Mean ± standard deviation of {seeds} runs with different seeds.")
    if images.kind == "digits":
        pages.text(recipes.CHANGED)
        pages.claims(CLAIMS, results=rows)
    pages.save(images, [run for runs in results.values() for run in runs])


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
