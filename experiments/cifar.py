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
import statistics
import sys

from common import claims, data, launch, networks, recipes
from common.claims import Claim, Finding, Rows
from common.errors import ExperimentError
from common.report import Report, mean_and_deviation
from common.training import Result, train

WARM_UP_FROM = 110  # layers
# Deeper networks that fit worse than shallower ones by more than this were not trained (points).
SLACK = 1.0


def parse(arguments: list[str]) -> argparse.Namespace:
    options = launch.parser(__doc__, "cifar")
    options.add_argument("--depths", type=int, nargs="+", help="6n+2: 20, 32, 44, 56, 110, ...")
    options.add_argument("--runs", type=int, help="of each depth, with seeds that follow")
    options.add_argument("--iterations", type=int)
    options.add_argument("--batch", type=int)
    options.add_argument("--learning-rate", type=float)
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    images = data.open_images(place.data, side=12, quick=place.quick, copies=4)
    if images.side is None:
        raise ExperimentError(
            f"--data {place.data} holds photographs of many sizes; experiments/imagenet.py "
            "trains on them."
        )
    depths, runs, iterations, batch, rate = launch.choose(
        options,
        images.kind,
        ("depths", "runs", "iterations", "batch", "learning_rate"),
        digits=([8, 14, 20], 3, 450, 64, 0.05),
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
    report(place, images, results, rate)


def report(
    place: launch.Launch, images: data.Images, results: dict[int, list[Result]], rate: float
) -> None:
    pages = Report(
        place,
        "The CIFAR-10 recipe",
        "Residual networks of section 4.2 with identity shortcuts (option A), trained by its "
        "recipe. On CIFAR-10 the paper's Table 6 gives test errors of 8.75 % (20 layers), 7.51 % "
        "(32), 7.17 % (44), 6.97 % (56) and 6.61 ± 0.16 % (110, five runs; the best 6.43 %).",
    )
    rows = [
        {
            "network": f"ResNet-{depth}",
            "layers": depth,
            "seed": seed,
            "parameters": networks.parameters(run.model),
            "training error (%)": run.training_error,
            "test error (%)": run.last["test_error"],
        }
        for depth, runs in results.items()
        for seed, run in enumerate(runs, place.seed)
    ]
    pages.table(
        "summary",
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
    pages.table("results", rows)
    if images.kind == "digits":
        pages.text(
            "On the digits as they are all depths mistake about 15 of 597 test images, too few to "
            "tell them apart. So the digits are placed on noisy canvases, several times each, at "
            "several sizes, and the depths are those that so few iterations train: networks of 56 "
            "layers only begin to learn in them. The recipe's milestones are in proportion to the "
            f"paper's and the batch is half as large; the rate is {rate:g} instead of 0.1; digits "
            "are not mirrored."
        )

    pages.curves(
        f"Training and test error on {images.name}, first seed.",
        {f"ResNet-{depth}": runs[0].history for depth, runs in results.items()},
    )
    pages.claims(CLAIMS, results=rows)
    pages.save(images, [run for runs in results.values() for run in runs])


def _deeper(rows: Rows) -> Finding:
    depths = sorted({float(row["layers"]) for row in rows})
    fits, tests = (
        [claims.column(rows, f"{error} error (%)", layers=depth) for depth in depths]
        for error in ("training", "test")
    )
    spread = claims.spread(tests[0], tests[-1])
    fit, test = ([statistics.mean(own) for own in errors] for errors in (fits, tests))
    text = ", ".join(
        f"{b:.2f} % ({d:.0f} layers, {a:.2f} % training error)"
        for d, a, b in zip(depths, fit, test, strict=True)
    )
    if spread is None or len(depths) < 2:
        return Finding(f"test errors are {text}; the rule needs two depths and two seeds.", None)
    if fit[-1] > fit[0] + SLACK:
        return Finding(
            f"test errors are {text}; the deepest network was not trained to the end, so its test "
            "error says nothing.",
            None,
            spread,
        )
    return Finding(f"mean test errors are {text}.", test[0] - test[-1] - spread, spread)


CLAIMS = (
    Claim(
        "Deeper residual networks are better",
        "Table 6",
        "test error falls from 8.75 % with 20 layers to 6.97 % with 56 and 6.43 % with 110.",
        "of the depths that were run, the mean test error of the deepest is below the shallowest's "
        "by at least the spread over seeds; nothing is said where the deepest one's training error "
        f"is more than {SLACK:g} point above the shallowest's; margin in points beyond the spread.",
        _deeper,
    ),
)


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
