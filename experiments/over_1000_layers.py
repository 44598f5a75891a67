"""Over 1000 layers: ResNet-1202 beside ResNet-110, with activation checkpointing. (Section 4.2)

    python experiments/over_1000_layers.py                 # embedded digits, minutes on two cores
    python experiments/over_1000_layers.py --data CIFAR    # the paper's

With checkpointing a run of blocks keeps its input only and computes the rest again in backward, so
that memory grows with the root of the depth. The report has it measured both ways.
"""

from __future__ import annotations

import argparse
import sys

import torch
from common import data, launch, networks, recipes
from common.errors import ExperimentError
from common.report import Report
from common.training import Result, train

import resnet_fused


def parse(arguments: list[str]) -> argparse.Namespace:
    options = launch.parser(__doc__, "over_1000_layers")
    options.add_argument("--depths", type=int, nargs="+", help="6n+2")
    options.add_argument("--iterations", type=int)
    options.add_argument("--batch", type=int)
    options.add_argument(
        "--identities",
        action=argparse.BooleanOptionalAction,
        help="blocks begin as identities, with zero weights in their last batch norm; by default "
        "on digits only, whose few iterations are too few for the paper's initialisation",
    )
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    images = data.open_images(place.data, side=8, quick=place.quick)
    if images.side is None:
        raise ExperimentError(
            f"--data {place.data} holds photographs of many sizes; the network is for CIFAR-10."
        )
    depths, iterations, batch, identities = launch.choose(
        options,
        images.kind,
        ("depths", "iterations", "batch", "identities"),
        digits=([110, 1202], 60, 32, True),
        cifar=([110, 1202], 64_000, 128, False),
        quick=([8, 50], 6, 16, True),
    )
    recipe = recipes.cifar(images, iterations, batch, warm_up=not identities)
    one = torch.zeros(1, 3, images.side, images.side)
    kept = {}
    for depth in depths:
        models = [networks.residual(images, depth, checkpoint=on)() for on in (False, True)]
        kept[depth] = [resnet_fused.kept_activation_bytes(m.train(), one).total for m in models]
    results = {}
    for depth in depths:
        build = networks.residual(images, depth, checkpoint=True, zero_init_residual=identities)
        results[depth] = train(f"resnet{depth}", build, images, recipe, place)
    report(place, images, results, kept, identities)


def report(
    place: launch.Launch,
    images: data.Images,
    results: dict[int, Result],
    kept: dict[int, list[int]],
    identities: bool,
) -> None:
    pages = Report(
        place,
        "Over 1000 layers",
        "A residual network of over 1000 layers beside one of 110, by the recipe of 4.2. The paper "
        "finds no difficulty in optimising 1202 layers (training error under 0.1 %), and a test "
        "error of 7.93 %, worse than the 6.43 % of 110 layers, which it takes for overfitting.",
    )

    pages.table(
        "results",
        [
            {
                "network": f"ResNet-{depth}",
                "parameters": networks.parameters(result.model),
                "training error (%)": result.training_error,
                "test error (%)": result.last["test_error"],
                "seconds an iteration": result.seconds / result.last["iteration"],
                "kept without checkpointing (MiB an image)": kept[depth][0] / 2**20,
                "kept with it (MiB an image)": kept[depth][1] / 2**20,
            }
            for depth, result in results.items()
        ],
    )
    pages.text(
        "Kept is what the forward of one float32 image keeps for its backward; the networks are "
        "trained with checkpointing."
    )
    if identities:
        pages.text(
            "Blocks began as identities (the weights of their last batch norm were zero), without "
            "a warm-up. In the paper all weights begin at one, and a warm-up of hundreds of "
            "iterations brings the loss down first."
        )

    pages.curves(
        f"Training and test error on {images.name}.",
        {f"ResNet-{depth}": result.history for depth, result in results.items()},
    )
    pages.save(images, list(results.values()))


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
