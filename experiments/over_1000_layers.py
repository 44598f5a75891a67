"""Over 1000 layers: ResNet-1202 beside ResNet-110, with activation checkpointing. (Section 4.2)

    python experiments/over_1000_layers.py                 # embedded digits, minutes on two cores
    python experiments/over_1000_layers.py --data CIFAR    # the paper's

With checkpointing a run of blocks keeps its input only and computes the rest again in backward, so
that memory grows with the root of the depth. The report has it measured both ways.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

import torch
from common import data, launch, networks, recipes
from common.claims import Claim, Finding, Rows
from common.errors import ExperimentError
from common.report import Report
from common.training import Result, train

import resnet_fused

_END, _HALF = "training error (%)", "training error halfway (%)"
_DEEP, _TRAINED = 1000, 10.0


def _deepest(rows: Rows) -> tuple[Mapping[str, float | str], Mapping[str, float | str], str]:
    """The rows of the shallowest and the deepest network, and why nothing follows from them."""
    first, last = (pick(rows, key=lambda row: float(row["layers"])) for pick in (min, max))
    few = f"The deepest network here has {last['layers']:.0f} layers."
    return first, last, "" if float(last["layers"]) > _DEEP else few


def _trains(rows: Rows) -> Finding:
    _, last, why = _deepest(rows)
    if why:
        return Finding(why, None)
    half, end = float(last[_HALF]), float(last[_END])
    return Finding(
        f"With {last['layers']:.0f} layers the training error is {half:.2f} % before half of the "
        f"iterations and {end:.2f} % at their end.",
        min(_TRAINED - end, half - end),
    )


def _no_better(rows: Rows) -> Finding:
    first, last, why = _deepest(rows)
    if why or first is last:
        return Finding(why or "There is no shallower network.", None)
    if untrained := [row["network"] for row in (first, last) if float(row[_END]) > _TRAINED]:
        return Finding(f"{untrained} did not reach {_TRAINED:.0f} % training error.", None)
    errors = [float(row["test error (%)"]) for row in (first, last)]
    return Finding(
        f"The test error is {errors[0]:.2f} % with {first['layers']:.0f} layers and "
        f"{errors[1]:.2f} % with {last['layers']:.0f}.",
        errors[1] - errors[0],
    )


CLAIMS = (
    Claim(
        "Over 1000 layers can be trained",
        "4.2",
        "there is no difficulty in optimising 1202 layers, whose training error is under 0.1 %.",
        f"the training error of the network of more than {_DEEP} layers, over the last tenth of "
        f"the iterations, is below {_TRAINED:.0f} %, and has fallen since the tenth before half "
        "of them.",
        _trains,
    ),
    Claim(
        "They are no better than 110",
        "4.2, Table 6",
        "the test error is 7.93 % with 1202 layers and 6.43 % with 110, which have a similar "
        "training error: the larger network overfits.",
        f"both trained to {_TRAINED:.0f} % training error or less, the deepest network's test "
        "error is not below the shallowest's.",
        _no_better,
    ),
)


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
    options.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="compute again in backward what a run of blocks keeps; by default not on digits, "
        "whose activations are small",
    )
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    images = data.open_images(place.data, side=8, quick=place.quick)
    if images.side is None:
        raise ExperimentError(
            f"--data {place.data} holds photographs of many sizes; the network is for CIFAR-10."
        )
    depths, iterations, batch, identities, checkpointing = launch.choose(
        options,
        images.kind,
        ("depths", "iterations", "batch", "identities", "checkpointing"),
        digits=([110, 1202], 1000, 32, True, False),
        cifar=([110, 1202], 64_000, 128, False, True),
        quick=([8, 50], 6, 16, True, True),
    )
    if images.kind == "digits":
        recipe = recipes.cifar_in_short(images, iterations, batch)
    else:
        recipe = recipes.cifar(images, iterations, batch, warm_up=not identities)
    one = torch.zeros(1, 3, images.side, images.side)
    kept = {}
    for depth in depths:
        models = [networks.residual(images, depth, checkpoint=on)() for on in (False, True)]
        kept[depth] = [resnet_fused.kept_activation_bytes(m.train(), one).total for m in models]
    results = {}
    for depth in depths:
        build = networks.residual(
            images, depth, checkpoint=checkpointing, zero_init_residual=identities
        )
        results[depth] = train(f"resnet{depth}", build, images, recipe, place)
    report(place, images, results, kept, identities, checkpointing)


def report(
    place: launch.Launch,
    images: data.Images,
    results: dict[int, Result],
    kept: dict[int, list[int]],
    identities: bool,
    checkpointing: bool,
) -> None:
    pages = Report(
        place,
        "Over 1000 layers",
        "A residual network of over 1000 layers beside one of 110, by the recipe of 4.2. The paper "
        "finds no difficulty in optimising 1202 layers (training error under 0.1 %), and a test "
        "error of 7.93 %, worse than the 6.43 % of 110 layers, which it takes for overfitting.",
    )

    rows = [
        {
            "network": f"ResNet-{depth}",
            "layers": depth,
            "parameters": networks.parameters(result.model),
            _HALF: result.training_error_before(0.5),
            _END: result.training_error,
            "test error (%)": result.last["test_error"],
            "seconds an iteration": result.seconds / result.last["iteration"],
            "kept without checkpointing (MiB an image)": kept[depth][0] / 2**20,
            "kept with it (MiB an image)": kept[depth][1] / 2**20,
        }
        for depth, result in results.items()
    ]
    pages.table("results", rows)
    pages.text(
        "Kept is what the forward of one float32 image keeps for its backward; the networks are "
        f"trained {'with' if checkpointing else 'without'} checkpointing."
    )
    if images.kind == "digits":
        pages.text(recipes.CHANGED)
    if identities:
        pages.text(
            "Blocks began as identities (the weights of their last batch norm were zero). In the "
            "paper all weights begin at one, and a warm-up of hundreds of iterations brings the "
            "loss down first."
        )

    pages.curves(
        f"Training and test error on {images.name}.",
        {f"ResNet-{depth}": result.history for depth, result in results.items()},
    )
    if images.kind == "digits":
        pages.claims(CLAIMS, results=rows)
    pages.save(images, list(results.values()))


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
