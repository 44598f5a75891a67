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

from common import data, launch, networks, recipes
from common.report import Report, mean_and_deviation
from common.training import Result, train

OPTIONS = ("plain", "A", "B", "C")


def parse(arguments: list[str]) -> argparse.Namespace:
    options = launch.parser(__doc__, "shortcuts")
    options.add_argument("--depth", type=int)
    options.add_argument("--runs", type=int, help="of each option, with seeds that follow")
    options.add_argument("--iterations", type=int)
    options.add_argument("--batch", type=int)
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    images = data.open_images(place.data, side=12, quick=place.quick)
    depth, runs, iterations, batch = launch.choose(
        options,
        images.kind,
        ("depth", "runs", "iterations", "batch"),
        digits=(20, 3, 150, 64),
        cifar=(56, 5, 64_000, 128),
        imagenet=(34, 1, 600_000, 256),
        quick=(18, 1, 2, 4) if images.side is None else (8, 2, 10, 16),
    )
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
    rows = []
    for option, runs in results.items():
        rows.append(
            {
                "shortcuts": option,
                "parameters": networks.parameters(runs[0].model),
                "training error (%)": mean_and_deviation([r.training_error for r in runs]),
                "top-1 error (%)": mean_and_deviation([r.last["test_error"] for r in runs]),
                "top-5 error (%)": mean_and_deviation([r.last["test_top5_error"] for r in runs]),
            }
        )
    pages.table("results", rows)
    if len(results["A"]) > 1:
        pages.text(f"Mean ± standard deviation of {len(results['A'])} runs with different seeds.")

    pages.curves(
        f"Training and test error on {images.name}, first seed.",
        {option: runs[0].history for option, runs in results.items()},
    )
    pages.save(images, [run for runs in results.values() for run in runs])


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
