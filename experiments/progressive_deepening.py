"""Progressive deepening: a trained network is given new blocks that begin as identities.

    python experiments/progressive_deepening.py                 # embedded digits, minutes
    python experiments/progressive_deepening.py --data CIFAR

A residual block whose last batch norm has weight 0 adds nothing, and its ReLU leaves what a ReLU
gave; so the deepened network computes at first what the shallow one did. It trains on as a whole,
or with everything old frozen but the classifier, beside a network as deep from scratch and a
shallow one that is not deepened, all for as many iterations and with the same rates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common import data, launch, networks, recipes
from common.errors import ExperimentError
from common.report import Report, error_curves
from common.training import Result, Row, train
from torch import nn

import resnet_fused

STAGES = ("layer1", "layer2", "layer3")


@dataclass(frozen=True)
class Way:
    """One way to a trained network: `first` (None if it has one part) comes before `last`."""

    title: str
    first: Result | None
    last: Result

    @property
    def history(self) -> list[Row]:
        """Rows of both parts, the iterations counted through."""
        if self.first is None:
            return self.last.history
        done = self.first.last["iteration"]
        later = [{**row, "iteration": row["iteration"] + done} for row in self.last.history]
        return [*self.first.history, *later]

    @property
    def seconds(self) -> float:
        return self.last.seconds + (self.first.seconds if self.first else 0.0)


def parse(arguments: list[str]) -> argparse.Namespace:
    options = launch.parser(__doc__, "progressive_deepening")
    options.add_argument("--depths", type=int, nargs=2, metavar=("SHALLOW", "DEEP"), help="6n+2")
    options.add_argument("--iterations", type=int, help="blocks are inserted after half of them")
    options.add_argument("--batch", type=int)
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    images = data.open_images(place.data, side=12, quick=place.quick)
    if images.side is None:
        raise ExperimentError(
            f"--data {place.data} holds photographs of many sizes; this experiment is for "
            "CIFAR-10 and the digits."
        )
    (shallow, deep), iterations, batch = launch.choose(
        options,
        images.kind,
        ("depths", "iterations", "batch"),
        digits=([20, 44], 240, 64),
        cifar=([20, 56], 64_000, 128),
        quick=([8, 14], 16, 16),
    )
    if deep <= shallow:
        raise ExperimentError(f"--depths {shallow} {deep}: the second must be the deeper one.")
    half = iterations // 2
    # At the full rate until three quarters, so that new blocks have a time of it too.
    cuts = (iterations * 3 // 4, iterations * 7 // 8)
    once = recipes.cifar(images, iterations, batch, milestones=cuts)
    before = recipes.cifar(images, half, batch, milestones=())
    after = recipes.cifar(images, iterations - half, batch, milestones=[cut - half for cut in cuts])
    small, large = (networks.residual(images, depth) for depth in (shallow, deep))
    base = train(f"resnet{shallow}-first-half", small, images, before, place)

    def deepened(freeze: bool) -> Callable[[], nn.Module]:
        return lambda: deepen(base.model, large(), freeze)

    ways = [
        Way(
            f"ResNet-{shallow}",
            None,
            train(f"resnet{shallow}", small, images, once, place),
        ),
        Way(
            f"ResNet-{deep} from scratch",
            None,
            train(f"resnet{deep}", large, images, once, place),
        ),
        Way(
            f"{shallow} → {deep} layers",
            base,
            train(f"resnet{shallow}-to-{deep}", deepened(False), images, after, place),
        ),
        Way(
            f"{shallow} → {deep} layers, old ones frozen",
            base,
            train(f"resnet{shallow}-to-{deep}-frozen", deepened(True), images, after, place),
        ),
    ]
    report(place, images, ways, half)


def deepen(shallow: nn.Module, deep: nn.Module, freeze: bool) -> nn.Module:
    """`deep` with `shallow`'s weights and its further blocks made identities: equal functions.

    The new blocks stand at the end of each stage. `freeze` leaves only them and the classifier
    to be trained; the other layers keep weights and statistics.
    """
    deep.load_state_dict(shallow.state_dict(), strict=False)
    for stage in STAGES:
        old = len(shallow.get_submodule(stage))  # type: ignore[arg-type]
        for index, block in enumerate(deep.get_submodule(stage).children()):
            if index >= old:
                nn.init.zeros_(block.get_submodule("bn2").weight)  # type: ignore[arg-type]
            elif freeze:
                _freeze(block)
    if freeze:
        _freeze(deep.get_submodule("conv1"))
        deep.register_module("bn1", _freeze(deep.get_submodule("bn1")))
    return deep


def _freeze(module: nn.Module) -> nn.Module:
    return resnet_fused.freeze_batch_norm(module.requires_grad_(False))


def report(place: launch.Launch, images: data.Images, ways: list[Way], half: int) -> None:
    pages = Report(
        place,
        "Progressive deepening",
        f"New blocks that begin as identities are inserted into a trained network after {half:,} "
        "iterations; does it end as well as a network that was deep from the start? The notes on "
        "the paper ask it, since the paper argues that a deeper network should fit no worse than a "
        "shallower one because identities would make them equal.",
    )
    pages.table(
        "results",
        [
            {
                "way": way.title,
                "parameters": networks.parameters(way.last.model),
                "training error (%)": way.last.training_error,
                "test error (%)": way.last.last["test_error"],
                "seconds of training": way.seconds,
            }
            for way in ways
        ],
    )

    def draw(axes: Any) -> None:
        error_curves(axes, {way.title: way.history for way in ways})
        axes.axvline(half, color="#adb5bd", linewidth=0.8, linestyle=":")

    pages.plot(
        "curves",
        f"Training and test error on {images.name}; dotted: where blocks are inserted.",
        draw,
    )
    results = [way.last for way in ways]
    first = ways[-1].first
    assert first is not None
    pages.save(images, [first, *results])


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
