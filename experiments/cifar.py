"""The CIFAR-10 recipe: residual networks of growing depth, mean ± deviation over runs.
(Section 4.2, Table 6)

    python experiments/cifar.py                     # embedded digits, minutes on two cores
    python experiments/cifar.py --data CIFAR        # Table 6
    python experiments/cifar.py --data CIFAR --depths 110 --runs 5

Four pixels of padding, random crops and mirror images (digits are not mirrored), batches of 128,
rate 0.1 divided by 10 after 32k and 48k of 64k iterations; networks of 110 layers begin at 0.01
until the training error is under 80 %.
"""

from __future__ import annotations

import argparse
import sys

from common import data, launch, networks, recipes
from common.errors import ExperimentError
from common.report import Report, mean_and_deviation
from common.training import Result, train

WARM_UP_FROM = 110  # layers


def parse(arguments: list[str]) -> argparse.Namespace:
    options = launch.parser(__doc__, "cifar")
    options.add_argument("--depths", type=int, nargs="+", help="6n+2: 20, 32, 44, 56, 110, ...")
    options.add_argument("--runs", type=int, help="of each depth, with seeds that follow")
    options.add_argument("--iterations", type=int)
    options.add_argument("--batch", type=int)
    options.add_argument("--learning-rate", type=float)
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    images = data.open_images(place.data, side=8, quick=place.quick)
    if images.side is None:
        raise ExperimentError(
            f"--data {place.data} holds photographs of many sizes; experiments/imagenet.py "
            "trains on them."
        )
    depths, runs, iterations, batch, rate = launch.choose(
        options,
        images.kind,
        ("depths", "runs", "iterations", "batch", "learning_rate"),
        digits=([20, 110], 3, 480, 32, 0.02),
        cifar=([20, 32, 44, 56, 110], 5, 64_000, 128, 0.1),
        quick=([8, 14], 2, 12, 16, 0.1),
    )
    results: dict[int, list[Result]] = {depth: [] for depth in depths}
    for depth in depths:
        recipe = recipes.cifar(images, iterations, batch, rate, depth >= WARM_UP_FROM)
        for seed in range(place.seed, place.seed + runs):
            build = networks.residual(images, depth)
            name = f"resnet{depth}-seed{seed}"
            results[depth].append(train(name, build, images, recipe, place, seed))
    report(place, images, results)


def report(place: launch.Launch, images: data.Images, results: dict[int, list[Result]]) -> None:
    pages = Report(
        place,
        "The CIFAR-10 recipe",
        "Residual networks of section 4.2 with identity shortcuts (option A), trained by its "
        "recipe. On CIFAR-10 the paper's Table 6 gives test errors of 8.75 % (20 layers), 7.51 % "
        "(32), 7.17 % (44), 6.97 % (56) and 6.61 ± 0.16 % (110, five runs; the best 6.43 %).",
    )
    pages.table(
        "results",
        [
            {
                "network": f"ResNet-{depth}",
                "parameters": networks.parameters(runs[0].model),
                "runs": len(runs),
                "training error (%)": mean_and_deviation([r.training_error for r in runs]),
                "test error (%)": mean_and_deviation([r.last["test_error"] for r in runs]),
                "best test error (%)": min(r.last["test_error"] for r in runs),
            }
            for depth, runs in results.items()
        ],
    )

    pages.curves(
        f"Training and test error on {images.name}, first seed.",
        {f"ResNet-{depth}": runs[0].history for depth, runs in results.items()},
    )
    pages.save(images, [run for runs in results.values() for run in runs])


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
