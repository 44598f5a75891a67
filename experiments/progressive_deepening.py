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
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common import claims, data, launch, networks, recipes
from common.claims import Claim, Finding, Rows
from common.errors import ExperimentError
from common.report import Report, error_curves, mean_and_deviation
from common.training import Recipe, Result, Row, train
from torch import nn

import resnet_fused

STAGES = ("layer1", "layer2", "layer3")
# A training that ends above it is no base for a finding (percent); and what counts as no worse
# (points).
TRAINED, SLACK = 5.0, 1.0
SHALLOW, DEEP, DEEPENED, FROZEN = "shallow", "deep from scratch", "deepened", "deepened, frozen"


@dataclass(frozen=True)
class Way:
    """One way to a trained network: `first` (None if it has one part) comes before `last`."""

    kind: str
    title: str
    seed: int
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
    options.add_argument("--learning-rate", type=float)
    options.add_argument("--runs", type=int, help="of each way, with seeds that follow")
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    images = data.open_images(place.data, side=8, quick=place.quick)
    if images.side is None:
        raise ExperimentError(
            f"--data {place.data} holds photographs of many sizes; this experiment is for "
            "CIFAR-10 and the digits."
        )
    (shallow, deep), iterations, batch, rate, runs = launch.choose(
        options,
        images.kind,
        ("depths", "iterations", "batch", "learning_rate", "runs"),
        digits=([20, 44], 400, 64, 0.05, 3),
        cifar=([20, 56], 64_000, 128, 0.1, 1),
        quick=([8, 14], 16, 16, 0.1, 1),
    )
    if deep <= shallow:
        raise ExperimentError(f"--depths {shallow} {deep}: the second must be the deeper one.")
    half = iterations // 2
    # At the full rate until three quarters, so that new blocks have a time of it too.
    cuts = (iterations * 3 // 4, iterations * 7 // 8)
    later = [cut - half for cut in cuts]
    once = recipes.cifar(images, iterations, batch, rate, milestones=cuts)
    before = recipes.cifar(images, half, batch, rate, milestones=())
    after = recipes.cifar(images, iterations - half, batch, rate, milestones=later)
    small, large = (networks.residual(images, depth) for depth in (shallow, deep))

    def ways(seed: int) -> list[Way]:
        def trained(name: str, build: Callable[[], nn.Module], recipe: Recipe) -> Result:
            return train(f"{name}-seed{seed}", build, images, recipe, place, seed)

        base = trained(f"resnet{shallow}-first-half", small, before)

        def deepened(freeze: bool) -> Callable[[], nn.Module]:
            return lambda: deepen(base.model, large(), freeze)

        grown = f"{shallow} → {deep} layers"
        free, frozen = (
            trained(f"resnet{shallow}-to-{deep}{'-frozen' * freeze}", deepened(freeze), after)
            for freeze in (False, True)
        )
        at_once = [
            Way(SHALLOW, f"ResNet-{shallow}", seed, None, trained(f"resnet{shallow}", small, once)),
            Way(
                DEEP,
                f"ResNet-{deep} from scratch",
                seed,
                None,
                trained(f"resnet{deep}", large, once),
            ),
        ]
        return [
            *at_once,
            Way(DEEPENED, grown, seed, base, free),
            Way(FROZEN, f"{grown}, old ones frozen", seed, base, frozen),
        ]

    by_seed = [ways(seed) for seed in range(place.seed, place.seed + runs)]
    report(place, images, by_seed, half, rate)


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


def report(
    place: launch.Launch, images: data.Images, by_seed: list[list[Way]], half: int, rate: float
) -> None:
    pages = Report(
        place,
        "Progressive deepening",
        f"New blocks that begin as identities are inserted into a trained network after {half:,} "
        "iterations; does it end as well as a network that was deep from the start? The notes on "
        "the paper ask it, since the paper argues that a deeper network should fit no worse than a "
        "shallower one because identities would make them equal.",
    )
    rows = [
        {
            "way": way.kind,
            "network": way.title,
            "seed": way.seed,
            "parameters": networks.parameters(way.last.model),
            "training error (%)": way.last.training_error,
            "test error (%)": way.last.last["test_error"],
            "seconds of training": way.seconds,
        }
        for ways in by_seed
        for way in ways
    ]
    pages.table(
        "summary",
        [
            {
                "network": same[0].title,
                "parameters": networks.parameters(same[0].last.model),
                "runs": len(same),
                "training error (%)": mean_and_deviation([w.last.training_error for w in same]),
                "test error (%)": mean_and_deviation([w.last.last["test_error"] for w in same]),
            }
            for same in zip(*by_seed, strict=True)
        ],
    )
    first_seed = by_seed[0]

    def draw(axes: Any) -> None:
        error_curves(axes, {way.title: way.history for way in first_seed})
        axes.axvline(half, color="#adb5bd", linewidth=0.8, linestyle=":")

    pages.plot(
        "curves",
        f"Training and test error on {images.name}, first seed; dotted: where blocks are inserted.",
        draw,
    )
    pages.text(
        f"The rate is {rate:g}, divided by 10 after three quarters and seven eighths of the "
        "iterations, so that inserted blocks see the full rate too. The paper's is 0.1, with which "
        "the deep network does not come to train in hundreds of iterations. Frozen: everything old "
        "but the classifier, batch norm's running statistics too."
    )
    pages.table("results", rows)
    pages.claims(CLAIMS, results=rows)
    bases = [way.first for ways in by_seed for way in ways if way.kind == FROZEN]
    results = [way.last for ways in by_seed for way in ways]
    pages.save(images, [*(base for base in bases if base is not None), *results])


def _worse(rows: Rows, way: str, than: str, *errors: str, both: bool = False) -> Finding:
    """By how much at most the mean errors of `way` are above those of `than`, or with `both` away
    from them, against SLACK. Nothing can be said where `than` was not trained."""
    compared = {
        e: [claims.column(rows, f"{e} error (%)", way=w) for w in (way, than)] for e in errors
    }
    text = " and ".join(
        f"{statistics.mean(own):.2f} % against {statistics.mean(other):.2f} % {error} error"
        for error, (own, other) in compared.items()
    )
    reached = statistics.mean(claims.column(rows, "training error (%)", way=than))
    if reached > TRAINED:
        return Finding(
            f"{way}, against {than}, has {text}; but {than} was not trained, with {reached:.1f} % "
            "training error.",
            None,
        )
    apart = [statistics.mean(own) - statistics.mean(other) for own, other in compared.values()]
    most = max(abs(points) if both else points for points in apart)
    groups = [group for pair in compared.values() for group in pair]
    return Finding(f"{way}, against {than}, has {text}.", SLACK - most, claims.spread(*groups))


_READY = f"(nothing is said where that one's training error is above {TRAINED:g} %)"
CLAIMS = (
    Claim(
        "A network deepened by identities fits no worse than the shallower one",
        "1, 3.1",
        "a deeper model should have no higher training error than its shallower counterpart, since "
        "there is a solution by construction: added layers are identities, the others are copied.",
        "the mean training error of the deepened network is at most "
        f"{SLACK:g} point above that of the shallow one, trained for as many iterations {_READY}.",
        lambda rows: _worse(rows, DEEPENED, SHALLOW, "training"),
    ),
    Claim(
        "Deepening ends where training at once does",
        "a reader's question",
        "does not try it.",
        "the mean training and test errors of the deepened network are within "
        f"{SLACK:g} point of those of the network that was deep from the start {_READY}.",
        lambda rows: _worse(rows, DEEPENED, DEEP, "training", "test", both=True),
    ),
    Claim(
        "The old layers may stay frozen",
        "a reader's question",
        "does not try it.",
        "with old layers frozen the mean training and test errors are at most "
        f"{SLACK:g} point above those without {_READY}.",
        lambda rows: _worse(rows, FROZEN, DEEPENED, "training", "test"),
    ),
)


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
