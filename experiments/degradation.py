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
from typing import Any

from common import data, launch, networks, recipes
from common.report import Report, error_curves
from common.training import Result, train

KINDS = {"plain": networks.plain, "residual": networks.residual}


def parse(arguments: list[str]) -> argparse.Namespace:
    options = launch.parser(__doc__, "degradation")
    options.add_argument("--depths", type=int, nargs="+")
    options.add_argument("--iterations", type=int)
    options.add_argument("--batch", type=int)
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    images = data.open_images(place.data, side=12, quick=place.quick)
    depths, iterations, batch = launch.choose(
        options,
        images.kind,
        ("depths", "iterations", "batch"),
        digits=([20, 32, 56], 240, 64),
        cifar=([20, 32, 44, 56, 110], 64_000, 128),
        imagenet=([18, 34], 600_000, 256),
        quick=([18], 2, 4) if images.side is None else ([8, 14], 12, 16),
    )
    results = {}
    for kind, network in KINDS.items():
        for depth in depths:
            warm_up = {"warm_up": True} if depth >= 110 else {}
            recipe = recipes.of_the_paper(images, iterations, batch, **warm_up)
            name = f"{kind}{depth}"
            results[kind, depth] = train(name, network(images, depth), images, recipe, place)
    report(place, images, results, depths)


def report(
    place: launch.Launch,
    images: data.Images,
    results: dict[tuple[str, int], Result],
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
            curves = {f"{kind}-{depth}": results[kind, depth].history for depth in depths}
            error_curves(axes, curves, kind)
        panels[0].sharey(panels[1])

    pages.plot("curves", f"Training and test error on {images.name}.", draw, panels=2)
    pages.table(
        "results",
        [
            {
                "layers": depth,
                "network": kind,
                "parameters": networks.parameters(result.model),
                "training error (%)": result.training_error,
                "test error (%)": result.last["test_error"],
            }
            for (kind, depth), result in results.items()
        ],
    )
    for kind in KINDS:
        first, last = (results[kind, depth] for depth in (depths[0], depths[-1]))
        pages.text(
            f"From {depths[0]} to {depths[-1]} layers the {kind} network's training error goes "
            f"from {first.training_error:.2f} % to {last.training_error:.2f} %, its test "
            f"error from {first.last['test_error']:.2f} % to {last.last['test_error']:.2f} %."
        )
    pages.save(images, list(results.values()))


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
