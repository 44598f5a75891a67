"""Gradient flow: do gradients vanish in deep plain networks, and what does batch norm do about it?

    python experiments/gradient_flow.py                 # embedded digits, minutes on two cores
    python experiments/gradient_flow.py --data CIFAR
    torchrun --nproc-per-node 8 experiments/gradient_flow.py --data CIFAR

The norm of the loss's gradient by each layer's weights, in the first iteration (the network as it
was initialised) and during training, for plain and residual networks with and without batch norm.
Section 4.1 holds that vanishing gradients are not what makes plain networks hard to train: batch
norm keeps the forward signals' variances from zero, and the gradients are healthy.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common import data, launch, networks, recipes
from common.errors import DivergedError, ExperimentError
from common.report import Report
from common.training import Result, Row, train
from torch import nn

KINDS = {"plain": networks.plain, "residual": networks.residual}
# Of a layer: the keys in the history's rows are these and its name.
GRADIENT, WEIGHT = "gradient ", "weight "


@dataclass
class Run:
    """One network's history, until it ended or its loss was no longer finite."""

    kind: str
    depth: int
    normalised: bool
    history: list[Row]
    result: Result | None

    @property
    def title(self) -> str:
        return f"{self.kind}-{self.depth}" + ("" if self.normalised else ", no BN")


def parse(arguments: list[str]) -> argparse.Namespace:
    options = launch.parser(__doc__, "gradient_flow")
    options.add_argument("--depths", type=int, nargs="+", help="6n+2")
    options.add_argument("--iterations", type=int)
    options.add_argument("--batch", type=int)
    options.add_argument(
        "--learning-rate-without-bn", type=float, default=0.01, help="with it, it is 0.1"
    )
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    images = data.open_images(place.data, side=8, quick=place.quick)
    if images.side is None:
        raise ExperimentError(
            f"--data {place.data} holds photographs of many sizes; this experiment is for "
            "CIFAR-10 and the digits."
        )
    depths, iterations, batch = launch.choose(
        options,
        images.kind,
        ("depths", "iterations", "batch"),
        digits=([20, 56], 150, 64),
        cifar=([20, 56, 110], 4_000, 128),
        quick=([8, 14], 8, 16),
    )
    runs = []
    for normalised in (True, False):
        rate = 0.1 if normalised else options.learning_rate_without_bn
        recipe = recipes.cifar(images, iterations, batch, learning_rate=rate)
        arguments: dict[str, Any] = {} if normalised else {"norm_layer": nn.Identity}
        for kind, network in KINDS.items():
            for depth in depths:
                name = f"{kind}{depth}" + ("" if normalised else "-no-bn")
                build = network(images, depth, **arguments)
                try:
                    result = train(name, build, images, recipe, place, probe=gradients)
                    runs.append(Run(kind, depth, normalised, result.history, result))
                except DivergedError as error:
                    runs.append(Run(kind, depth, normalised, error.history, None))
    report(place, images, runs, depths[-1], options.learning_rate_without_bn)


def gradients(model: nn.Module, iteration: int) -> dict[str, float]:
    """Euclidean norms of the convolutions' weights and of the gradients by them, in order."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4 and parameter.grad is not None:
            layer = name.removesuffix(".weight")
            found[GRADIENT + layer] = parameter.grad.norm().item()
            found[WEIGHT + layer] = parameter.detach().norm().item()
    return found


def norms(row: Row, kind: str = GRADIENT) -> list[float]:
    """The layers' norms, from the input to the output."""
    return [value for key, value in row.items() if key.startswith(kind)]


def ratio(row: Row) -> float:
    """The first layer's norm over the last one's: 1 is even, small vanishes, large explodes."""
    found = norms(row)
    return found[0] / found[-1] if found[-1] else float("nan")


def scaled_ratio(row: Row) -> float:
    """The ratio of gradient norm times weight norm, which under batch norm does not depend on the
    weights' scale: one that has grown makes its gradient small and changes nothing else."""
    weights = norms(row, WEIGHT)
    return ratio(row) * weights[0] / weights[-1] if weights[-1] else float("nan")


def report(
    place: launch.Launch, images: data.Images, runs: list[Run], deepest: int, rate: float
) -> None:
    pages = Report(
        place,
        "Gradient flow",
        "The norm of the gradient by each layer's weights, in networks as they are initialised "
        "and during training, plain against residual, with and without batch norm. The paper "
        "(4.1) argues that plain networks are hard to train for another reason than vanishing "
        "gradients, since with batch norm they are healthy; others hold that shortcuts help "
        "because gradients would vanish without them.",
    )
    for run in runs:
        if run.result is None:
            finite = (
                f"until iteration {run.history[-1]['iteration']:.0f}" if run.history else "never"
            )
            pages.text(f"{run.title} diverged: its recorded loss was finite {finite}.")
    runs = [run for run in runs if run.history]
    shown = [run for run in runs if run.depth == deepest]

    def draw(panels: list[Any]) -> None:
        for run in shown:
            style = "--" if run.kind == "plain" else "-"
            colour = "#1971c2" if run.normalised else "#e8590c"
            first, last = (norms(run.history[i]) for i in (0, -1))
            places = range(1, len(first) + 1)
            panels[0].plot(places, first, style, color=colour, label=run.title)
            if run.result is not None:
                panels[1].plot(places, last, style, color=colour, label=run.title)
            steps = [row["iteration"] for row in run.history]
            ratios = [scaled_ratio(row) for row in run.history]
            panels[2].plot(steps, ratios, style, color=colour, label=run.title)
        for axes, title in zip(
            panels, ("at initialisation", "at the end", "first / last layer, scaled"), strict=True
        ):
            axes.set(title=title, yscale="log", xlabel="layer")
            axes.grid(alpha=0.3)
        panels[0].set(ylabel="norm of the gradient")
        panels[0].legend(fontsize=8)
        panels[2].set(xlabel="iteration")

    pages.plot("gradients", f"Networks of {deepest} layers on {images.name}.", draw, panels=3)
    pages.table("results", [summary(run) for run in runs])
    assert images.side is not None
    pages.text(
        "First, median and last layer's norm at initialisation; first / last is 1 where gradients "
        "are even, small where they vanish towards the input, large where they explode. Scaled: "
        "each gradient's norm times its weights' norm, since batch norm takes the weights' scale "
        "out, and the gradient of a layer whose weights have grown k times is k times smaller. "
        f"During training: the median. Without batch norm the learning rate is {rate:g} instead "
        "of 0.1. There, too, nothing restores what zero padding takes from small maps: He's "
        "initialisation keeps the variance where all nine taps see the image, and the last stage's "
        f"maps are {images.side // 4} pixels wide."
    )
    for run in shown:
        pages.text(verdict(run))
    pages.csv("gradients", [row for run in runs for row in by_layer(run)])
    results = [run.result for run in runs if run.result is not None]
    pages.save(images, results, history=[row for run in runs for row in losses(run)])


def summary(run: Run) -> dict[str, Any]:
    """A row of the table."""
    start = run.history[0]
    at_start = norms(start)
    found: dict[str, Any] = {
        "network": run.title,
        "first layer": f"{at_start[0]:.2g}",
        "median": f"{statistics.median(at_start):.2g}",
        "last layer": f"{at_start[-1]:.2g}",
        "first / last": f"{ratio(start):.2g}",
        "first / last, during training": during(run, ratio),
        "scaled": during(run, scaled_ratio),
        "training error (%)": None if run.result is None else run.result.training_error,
    }
    return found


def during(run: Run, measure: Callable[[Row], float]) -> str:
    """The median over the rows after the first."""
    if run.result is None:
        return "diverged"
    return f"{statistics.median(measure(row) for row in run.history[1:]):.2g}"


def verdict(run: Run) -> str:
    """What the ratio at initialisation says, in a sentence."""
    found = ratio(run.history[0])
    kind = (
        "vanish" if found < 0.1 else "explode" if found > 10 else "are even within a factor of 10"
    )
    return (
        f"{run.title}: at initialisation gradients {kind} towards the input ({found:.2g}); their "
        f"median is {statistics.median(norms(run.history[0])):.2g}."
    )


def by_layer(run: Run) -> list[dict[str, Any]]:
    """Every layer's norm at the beginning, in the middle and at the end."""
    middle = run.history[len(run.history) // 2]
    rows = {int(row["iteration"]): row for row in (run.history[0], middle, run.history[-1])}
    return [
        {
            "network": run.title,
            "iteration": iteration,
            "layer": key.removeprefix(GRADIENT),
            "norm": value,
            "norm of its weights": row[WEIGHT + key.removeprefix(GRADIENT)],
        }
        for iteration, row in rows.items()
        for key, value in row.items()
        if key.startswith(GRADIENT)
    ]


def losses(run: Run) -> list[dict[str, Any]]:
    """The history without the layers, and the ratio of the first and the last one."""
    return [
        {
            "network": run.title,
            "first / last": ratio(row),
            "first / last, scaled": scaled_ratio(row),
            **{k: v for k, v in row.items() if not k.startswith((GRADIENT, WEIGHT))},
        }
        for row in run.history
    ]


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
