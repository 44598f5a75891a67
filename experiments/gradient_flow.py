"""Gradient flow: do gradients vanish in deep plain networks, and what does batch norm do about it?

    python experiments/gradient_flow.py                 # embedded digits, minutes on two cores
    python experiments/gradient_flow.py --data CIFAR
    torchrun --nproc-per-node 8 experiments/gradient_flow.py --data CIFAR

The norm of the loss's gradient by each layer's weights, for plain and residual networks with and
without batch norm: in networks as they are initialised, at many depths and with several seeds, and
in some of them during training. Section 4.1 holds that vanishing gradients are not what makes plain
networks hard to train: batch norm keeps the forward signals' variances from zero, and the gradients
are healthy.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import claims, data, launch, networks, recipes
from common.claims import Claim, Finding, Rows
from common.errors import DivergedError, ExperimentError
from common.report import Report
from common.training import Recipe, Result, Row, to_device, train
from torch import nn

# A training that ends above it is no base for a finding (percent).
TRAINED = 5.0
# The paper's own plain networks for ImageNet have 18 and 34 layers.
PAPERS_DEPTH = 34
SEEDS = 3  # of the networks that are only initialised
KINDS = {"plain": networks.plain, "residual": networks.residual}
# Of a layer: the keys in the history's rows are these and its name.
GRADIENT, WEIGHT = "gradient ", "weight "


@dataclass
class Run:
    """One network's history, until it ended or its loss was no longer finite."""

    kind: str
    depth: int
    normalised: bool
    seed: int
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
        "--initialised", type=int, nargs="+", help="depths of networks that are not trained"
    )
    options.add_argument("--learning-rate", type=float, help="with batch norm")
    options.add_argument("--learning-rate-without-bn", type=float, default=0.01)
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    images = data.open_images(place.data, side=8, quick=place.quick)
    if images.side is None:
        raise ExperimentError(
            f"--data {place.data} holds photographs of many sizes; this experiment is for "
            "CIFAR-10 and the digits."
        )
    depths, initialised, iterations, batch, rate = launch.choose(
        options,
        images.kind,
        ("depths", "initialised", "iterations", "batch", "learning_rate"),
        digits=([20, 56], [8, 20, 32, 56, 110], 300, 64, 0.05),
        cifar=([20, 56, 110], [8, 20, 32, 56, 110], 4_000, 128, 0.1),
        quick=([8, 14], [8, 14], 8, 16, 0.1),
    )
    runs = []
    for normalised in (True, False):
        own_rate = rate if normalised else options.learning_rate_without_bn
        recipe = recipes.cifar(images, iterations, batch, learning_rate=own_rate)
        arguments: dict[str, Any] = {} if normalised else {"norm_layer": nn.Identity}
        for kind, network in KINDS.items():
            for depth in depths:
                name = f"{kind}{depth}" + ("" if normalised else "-no-bn")
                build = network(images, depth, **arguments)
                try:
                    result = train(name, build, images, recipe, place, probe=gradients)
                    runs.append(Run(kind, depth, normalised, place.seed, result.history, result))
                except DivergedError as error:
                    runs.append(Run(kind, depth, normalised, place.seed, error.history, None))
    untrained = initialisation(place, images, initialised, recipe)
    report(place, images, runs, untrained, depths[-1], rate, options.learning_rate_without_bn)


def initialisation(
    place: launch.Launch, images: data.Images, depths: list[int], recipe: Recipe
) -> list[dict[str, Any]]:
    """The norms of gradients in networks as they are initialised, by the loss of one batch.

    Without batch norm also with circular padding, which keeps a small map's variance where zeros
    take a part of it.
    """
    chosen = [images.train[i] for i in range(recipe.batch)]
    batch = to_device(torch.stack([recipe.view(image) for image, _ in chosen]), place)
    labels = torch.tensor([label for _, label in chosen], device=place.device)
    rows = []
    for normalised, padding in ((True, "zeros"), (False, "zeros"), (False, "circular")):
        arguments: dict[str, Any] = {} if normalised else {"norm_layer": nn.Identity}
        for kind, network in KINDS.items():
            for depth in depths:
                for seed in range(place.seed, place.seed + SEEDS):
                    torch.manual_seed(launch.seed_of(seed, "weights"))
                    model = network(images, depth, **arguments)()
                    if padding == "circular":
                        pad_circularly(model)
                    model.to(place.device).to(memory_format=torch.channels_last).train()
                    F.cross_entropy(model(batch), labels).backward()
                    rows.append(
                        {
                            "network": kind,
                            "layers": depth,
                            "batch norm": "yes" if normalised else "no",
                            "padding": padding,
                            "seed": seed,
                            **at_start(gradients(model, 0)),
                        }
                    )
    return rows


def pad_circularly(model: nn.Module) -> None:
    """Lets `model`'s convolutions see the map's other side beyond its edge, instead of zeros."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.padding == (1, 1):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [1, 1, 1, 1]


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


def at_start(row: Row) -> dict[str, float]:
    """Three layers' norms, and the ratio of the first and the last one."""
    found = norms(row)
    return {
        "first layer": found[0],
        "median": statistics.median(found),
        "last layer": found[-1],
        "first / last": ratio(row),
    }


def report(
    place: launch.Launch,
    images: data.Images,
    runs: list[Run],
    untrained: list[dict[str, Any]],
    deepest: int,
    rate: float,
    rate_without_bn: float,
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
    results = [summary(run) for run in runs]
    pages.table("summary", [printed(row) for row in results])
    pages.csv("results", results)
    assert images.side is not None
    pages.text(
        "First, median and last layer's norm at initialisation; first / last is 1 where gradients "
        "are even, small where they vanish towards the input, large where they explode. Scaled: "
        "each gradient's norm times its weights' norm, since batch norm takes the weights' scale "
        "out, and the gradient of a layer whose weights have grown k times is k times smaller, "
        "which changes nothing of what the network learns. During training: the median over the "
        f"recorded iterations. The rate is {rate:g}, and {rate_without_bn:g} without batch norm; "
        "the paper's is 0.1, with which networks of 56 layers do not come to train in so few "
        "iterations."
    )
    for run in shown:
        pages.text(verdict(run))
    pages.text("## By depth, as initialised")

    def draw_depths(axes: Any) -> None:
        for line in lines(untrained):
            style = "-" if line[0]["network"] == "residual" else "--"
            colour = {"yes": "#1971c2", "no": "#e8590c"}[line[0]["batch norm"]]
            if line[0]["padding"] != "zeros":
                colour = "#2f9e44"
            depths = [row["layers"] for row in line]
            axes.plot(
                depths, [row["median"] for row in line], style, color=colour, label=name(line[0])
            )
        axes.set(yscale="log", xlabel="layers", ylabel="median norm of a layer's gradient")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)

    pages.plot(
        "initialisation", f"Median over {SEEDS} seeds of networks on {images.name}.", draw_depths
    )
    pages.table("by_depth", [printed(row) for line in lines(untrained) for row in line])
    pages.csv("initialisation", untrained)
    taps = [(1 - 2 / (3 * side)) for side in (images.side, images.side // 2, images.side // 4)]
    pages.text(
        "Without batch norm and shortcuts a signal is multiplied by a factor at every layer. He's "
        "initialisation makes it 1 where all nine taps of a convolution see the map; zeros beyond "
        "the edge leave a mean share of ((3n - 2) / 3n)² of them on maps of n×n pixels, which here "
        f"multiplies a signal by about {taps[0]:.2f}, {taps[1]:.2f} and {taps[2]:.2f} a layer in "
        "the three stages. With circular padding every tap sees the map. With shortcuts but "
        "without batch norm signals grow instead: a block adds a branch as large as its input, and "
        "is near an identity only where something makes the branch small."
    )
    pages.csv("gradients", [row for run in runs for row in by_layer(run)])
    pages.claims(CLAIMS, results=results, initialisation=untrained)
    trained = [run.result for run in runs if run.result is not None]
    pages.save(images, trained, history=[row for run in runs for row in losses(run)])


def name(row: dict[str, Any]) -> str:
    """What a row of the initialised networks is about, without its depth."""
    normalised = "" if row["batch norm"] == "yes" else ", no BN"
    return f"{row['network']}{normalised}" + (
        "" if row["padding"] == "zeros" else f", {row['padding']} padding"
    )


def lines(untrained: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each kind of network its depths, each with the medians over its seeds."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in untrained:
        found.setdefault(name(row), {}).setdefault(row["layers"], []).append(row)
    return [
        [
            {
                key: statistics.median(row[key] for row in same)
                if isinstance(value, float)
                else value
                for key, value in same[0].items()
                if key != "seed"
            }
            for same in depths.values()
        ]
        for depths in found.values()
    ]


def printed(row: dict[str, Any]) -> dict[str, Any]:
    """The row with two digits of each number but the error."""
    return {
        key: f"{value:.2g}" if isinstance(value, float) and "error" not in key else value
        for key, value in row.items()
    }


def summary(run: Run) -> dict[str, Any]:
    """A row of the table."""
    return {
        "network": run.title,
        "kind": run.kind,
        "layers": run.depth,
        "batch norm": "yes" if run.normalised else "no",
        "seed": run.seed,
        **at_start(run.history[0]),
        "first / last, during training": during(run, ratio),
        "scaled": during(run, scaled_ratio),
        "training error (%)": None if run.result is None else run.result.training_error,
    }


def during(run: Run, measure: Callable[[Row], float]) -> float | str:
    """The median over the rows after the first."""
    if run.result is None:
        return "diverged"
    return statistics.median(measure(row) for row in run.history[1:])


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


def _decades(rows: Rows, key: str, layers: float, **where: str) -> list[float]:
    """log10 of column `key`, one for each seed."""
    found = claims.column(rows, key, layers=layers, **where)
    return [math.log10(value) if value > 0 else -math.inf for value in found]


def _depths(rows: Rows) -> list[float]:
    return sorted({float(row["layers"]) for row in rows})


PLAIN_BN = {"network": "plain", "batch norm": "yes", "padding": "zeros"}
PLAIN, RESIDUAL = ({"network": kind, "batch norm": "no", "padding": "zeros"} for kind in KINDS)
CIRCULAR = {**PLAIN, "padding": "circular"}


def _compared(rows: Rows, **where: str) -> tuple[float, float | None, str]:
    """How many decades the median norm rises from the shallowest to the deepest network, the
    spread, and a text."""
    depths = _depths(rows)
    shallow, deep = (_decades(rows, "median", depth, **where) for depth in (depths[0], depths[-1]))
    first, last = statistics.mean(shallow), statistics.mean(deep)
    text = f"{10**first:.2g} with {depths[0]:.0f} layers, {10**last:.2g} with {depths[-1]:.0f}"
    return last - first, claims.spread(shallow, deep), text


def _not_vanishing(rows: Rows) -> Finding:
    rise, spread, text = _compared(rows, **PLAIN_BN)
    uneven = {d: _decades(rows, "first / last", d, **PLAIN_BN) for d in _depths(rows)}
    least = min(statistics.mean(own) for own in uneven.values())
    return Finding(
        f"a layer's median norm is {text}; the first layer's is at least {10**least:.2g} times the "
        "last one's.",
        min(rise, least) + 1,
        spread,
    )


def _even_in_training(rows: Rows) -> Finding:
    deep = _depths(rows)[-1]
    own: dict[str, float | str] = {"batch norm": "yes", "layers": deep}

    def values(kind: str, key: str) -> list[float]:
        return claims.column(rows, key, kind=kind, **own)

    try:
        fits = values("residual", "training error (%)")
        ratios = [math.log10(value) for value in values("plain", "scaled")]
        error = statistics.mean(values("plain", "training error (%)"))
    except ValueError:
        return Finding(f"a network of {deep:.0f} layers with BN diverged.", None)
    if statistics.mean(fits) > TRAINED:
        return Finding(
            f"residual-{deep:.0f} was not trained: it ends at {statistics.mean(fits):.1f} %.", None
        )
    return Finding(
        f"plain-{deep:.0f}'s first layer has {10 ** statistics.mean(ratios):.2g} times the last "
        f"one's scaled norm, while its training error ends at {error:.1f} % and "
        f"residual-{deep:.0f}'s at {statistics.mean(fits):.1f} %.",
        1 - abs(statistics.mean(ratios)),
        claims.spread(ratios),
    )


def _healthy(rows: Rows) -> Finding:
    depths = [depth for depth in _depths(rows) if depth <= PAPERS_DEPTH]
    if not depths:
        return Finding(f"no network here has {PAPERS_DEPTH} layers or fewer.", None)
    uneven = {d: _decades(rows, "first / last", d, **PLAIN_BN) for d in depths}
    worst = max(abs(statistics.mean(own)) for own in uneven.values())
    ratios = ", ".join(f"{10 ** statistics.mean(v):.2g} with {d:.0f}" for d, v in uneven.items())
    return Finding(f"first / last is {ratios} layers.", 1 - worst, claims.spread(*uneven.values()))


def _exploding(rows: Rows) -> Finding:
    uneven = {d: _decades(rows, "first / last", d, **PLAIN_BN) for d in _depths(rows)}
    ratios = ", ".join(f"{10 ** statistics.mean(v):.2g} with {d:.0f}" for d, v in uneven.items())
    (_, shallow), *_, (_, deep) = uneven.items()
    rise = statistics.mean(deep) - statistics.mean(shallow)
    return Finding(f"first / last is {ratios} layers.", rise - 1, claims.spread(shallow, deep))


def _product(rows: Rows) -> Finding:
    rise, spread, text = _compared(rows, **PLAIN)
    return Finding(f"a layer's median norm is {text}.", -rise - 1, spread)


def _padding(rows: Rows) -> Finding:
    zeros, spread, text = _compared(rows, **PLAIN)
    circular, other, kept = _compared(rows, **CIRCULAR)
    spreads = [value for value in (spread, other) if value is not None]
    return Finding(
        f"a layer's median norm is {text} with zeros, and {kept} with circular padding.",
        abs(zeros) / 2 - abs(circular),
        max(spreads, default=None),
    )


def _shortcuts(rows: Rows) -> Finding:
    rise, spread, text = _compared(rows, **RESIDUAL)
    least = min(
        statistics.mean(_decades(rows, "first / last", d, **RESIDUAL)) for d in _depths(rows)
    )
    return Finding(
        f"a layer's median norm is {text}; the first layer's is at least {10**least:.2g} times the "
        "last one's.",
        min(rise, least) + 1,
        spread,
    )


_NOTES = "the field's notes on 4.1"
CLAIMS = (
    Claim(
        "Batch norm keeps plain networks' gradients from vanishing at initialisation",
        "4.1",
        "the difficulty of plain networks is unlikely to be caused by vanishing gradients; they "
        "are trained with BN, and forward or backward signals do not vanish.",
        "of plain networks with BN, the median norm of the deepest is at least a tenth of the "
        "shallowest's, and at each depth the first layer's is at least a tenth of the last one's; "
        "margin in powers of ten.",
        _not_vanishing,
        "initialisation",
    ),
    Claim(
        "During training they neither vanish nor explode",
        "4.1",
        "gradients are healthy, and a plain network's difficulty is another, perhaps exponentially "
        "low convergence rates.",
        "the deepest plain network's scaled first / last, the median over training, is within a "
        "factor of 10 of 1, where the residual network of its depth, trained alike, ends at "
        f"{TRAINED:g} % training error or less; margin in powers of ten.",
        _even_in_training,
    ),
    Claim(
        "Plain networks' gradients are healthy from the first iteration",
        "4.1",
        "the backward propagated gradients exhibit healthy norms with BN; its plain networks have "
        "18 and 34 layers.",
        f"in plain networks with BN of at most {PAPERS_DEPTH} layers, as they are initialised, the "
        "first layer's norm is within a factor of 10 of the last one's; margin in powers of ten.",
        _healthy,
        "initialisation",
    ),
    Claim(
        "In deeper ones they explode at initialisation",
        "Yang et al., arXiv 1902.08129, not the paper",
        "batch norm makes gradients explode with depth in networks without shortcuts.",
        "in plain networks with BN, first / last grows at least tenfold from the shallowest to the "
        "deepest; margin in powers of ten.",
        _exploding,
        "initialisation",
    ),
    Claim(
        "Without batch norm and shortcuts the product of many small factors vanishes",
        _NOTES,
        "without BN (and without shortcuts) gradients do vanish with depth.",
        "in plain networks without BN, the median norm falls at least tenfold from the shallowest "
        "to the deepest; margin in powers of ten.",
        _product,
        "initialisation",
    ),
    Claim(
        "The small factors come from zero padding on small maps",
        "this repository",
        "says nothing of it: its smallest maps are 7 pixels wide, and here the last stage's are 2.",
        "with circular padding instead, the change from the shallowest to the deepest has at most "
        "half as many powers of ten; margin in powers of ten.",
        _padding,
        "initialisation",
    ),
    Claim(
        "With shortcuts gradients do not vanish even without batch norm",
        f"3.1 and {_NOTES}",
        "an identity shortcut hands a signal on as it is, so that a block is near an identity.",
        "in residual networks without BN, the median norm of the deepest is at least a tenth of "
        "the shallowest's, and at each depth the first layer's is at least a tenth of the last "
        "one's; margin in powers of ten.",
        _shortcuts,
        "initialisation",
    ),
)


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
