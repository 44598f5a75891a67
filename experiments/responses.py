"""Layer responses: how much each layer changes the signal, plain against residual. (Fig. 7)

    python experiments/responses.py                 # embedded digits, minutes on two cores
    python experiments/responses.py --data CIFAR    # Fig. 7
    torchrun --nproc-per-node 8 experiments/responses.py --data IMAGENET --workers 12

A response is a 3×3 layer's output after batch norm, before ReLU and addition; its standard
deviation is taken over the test images. The networks run fused while they are recorded.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import torch
from common import data, launch, networks, recipes
from common.claims import Claim, Finding, Rows
from common.report import Report
from common.training import Recipe, Result, evaluate, train
from torch import Tensor

from resnet_fused import record_responses

KINDS = {"plain": networks.plain, "residual": networks.residual}


_MEAN, _ERROR = "mean deviation", "training error (%)"
# On digits: 1,200 iterations at a mean rate of 0.05 times it make 0.30; the paper's 64k iterations,
# of which half are at 0.1 and the others at less, times 0.0001 make 0.34.
_WEIGHT_DECAY = 5e-3
# Above this training error, in percent, a network counts as not trained.
_TRAINED = 5.0


def _of(rows: Rows, kind: str) -> tuple[dict[int, float], dict[int, float]]:
    """The `kind` networks' mean deviations by depth: of the trained ones, and of the others."""
    trained: dict[int, float] = {}
    others: dict[int, float] = {}
    for row in sorted(rows, key=lambda row: float(row["layers"])):
        if row["kind"] == kind:
            fits = float(row[_ERROR]) <= _TRAINED
            (trained if fits else others)[int(float(row["layers"]))] = float(row[_MEAN])
    return trained, others


def _deeper_less(rows: Rows) -> Finding:
    trained, others = _of(rows, "residual")
    if others or len(trained) < 2:
        return Finding(
            f"Residual networks with more than {_TRAINED:.0f} % training error: "
            f"{list(others) or 'none'} layers; with less: {list(trained) or 'none'}.",
            None,
        )
    text = ", ".join(f"{value:.3f} with {depth}" for depth, value in trained.items())
    values = list(trained.values())
    falls = [a - b for a, b in itertools.pairwise(values)]
    return Finding(f"Mean deviation {text} layers, all trained.", min(falls))


def _residual_less(rows: Rows) -> Finding:
    (plain, untrained), (residual, _) = _of(rows, "plain"), _of(rows, "residual")
    said, differences = [], []
    for depth in sorted(plain.keys() & residual.keys()):
        differences.append(plain[depth] - residual[depth])
        said.append(
            f"With {depth} layers the mean deviation is {residual[depth]:.3f} in the residual "
            f"network and {plain[depth]:.3f} in the plain one, both trained."
        )
    for depth, deviation in untrained.items():
        said.append(
            f"The plain network of {depth} layers has more than {_TRAINED:.0f} % training error, "
            f"so that its mean deviation of {deviation:.3f} is compared with none."
        )
    return Finding(" ".join(said), min(differences, default=None))


CLAIMS = (
    Claim(
        "Deeper residual networks respond less",
        "4.2, Fig. 7",
        "with more layers, a layer of a residual network modifies the signal less, from 20 to 56 "
        "and 110 layers.",
        f"all residual networks, of two depths or more, have at most {_TRAINED:.0f} % training "
        "error, and the mean deviation over the layers falls from each depth to the next.",
        _deeper_less,
    ),
    Claim(
        "Residual networks respond less than plain ones",
        "4.2, Fig. 7",
        "residual networks generally have smaller responses than their plain counterparts of 20 "
        "and 56 layers.",
        "at each depth at which a plain and a residual network both have at most "
        f"{_TRAINED:.0f} % training error, and there is one, the residual network's mean deviation "
        "is the smaller.",
        _residual_less,
    ),
)


@dataclass
class Responses:
    """A trained network's standard deviations, by the name of the 3×3 layer."""

    kind: str
    depth: int
    result: Result
    deviations: dict[str, float]

    @property
    def title(self) -> str:
        return f"{self.kind}-{self.depth}"


def parse(arguments: list[str]) -> argparse.Namespace:
    options = launch.parser(__doc__, "responses")
    options.add_argument("--plain", type=int, nargs="+", help="depths of plain networks")
    options.add_argument("--residual", type=int, nargs="+", help="depths of residual networks")
    options.add_argument("--iterations", type=int)
    options.add_argument("--batch", type=int)
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    images = data.open_images(place.data, side=8, quick=place.quick)
    plain, residual, iterations, batch = launch.choose(
        options,
        images.kind,
        ("plain", "residual", "iterations", "batch"),
        digits=([20, 56], [20, 56, 110], 1200, 64),
        cifar=([20, 56], [20, 56, 110], 64_000, 128),
        imagenet=([18, 34], [18, 34, 50], 600_000, 256),
        quick=([8], [8, 14], 12, 16),
    )
    found = []
    for kind, depths in (("plain", plain), ("residual", residual)):
        for depth in depths:
            if images.kind == "digits":
                recipe = recipes.cifar_in_short(images, iterations, batch, _WEIGHT_DECAY)
            else:
                warm_up = {"warm_up": True} if depth >= 110 and images.side is not None else {}
                recipe = recipes.of_the_paper(images, iterations, batch, **warm_up)
            result = train(f"{kind}{depth}", KINDS[kind](images, depth), images, recipe, place)
            found.append(Responses(kind, depth, result, measure(result, images, recipe, place)))
    report(place, images, found)


def _sums(response: Tensor) -> Tensor:
    """Sum, sum of squares, count: what a standard deviation over batches and processes needs."""
    wide = response.double()
    return torch.stack([wide.sum(), wide.square().sum(), wide.new_tensor(wide.numel())])


def measure(
    result: Result, images: data.Images, recipe: Recipe, place: launch.Launch
) -> dict[str, float]:
    """Each 3×3 layer's standard deviation over the test images, in the order of the layers."""
    with record_responses(result.model, _sums) as recorded:
        evaluate(result.model, images.test, recipe.view, place)
    deviations = {}
    for name, batches in recorded.items():
        if result.model.get_submodule(name).kernel_size == (3, 3):
            first, second, count = launch.total(torch.stack(batches).sum(0)).tolist()
            deviations[name] = max(second / count - (first / count) ** 2, 0.0) ** 0.5
    return deviations


def report(place: launch.Launch, images: data.Images, found: list[Responses]) -> None:
    pages = Report(
        place,
        "Layer responses",
        "Standard deviations of the 3×3 layers' responses after batch norm, before ReLU and "
        "addition, over the test images (He et al., Fig. 7). The paper finds that residual "
        "networks respond less than plain ones, and the deeper the less, and takes it as support "
        "for its motivation: residual functions lie nearer to zero.",
    )

    def draw(panels: list[Any]) -> None:
        for responses in found:
            values = list(responses.deviations.values())
            style = "--" if responses.kind == "plain" else "-"
            for axes, ordered in zip(panels, (values, sorted(values, reverse=True)), strict=True):
                axes.plot(range(1, len(ordered) + 1), ordered, style, label=responses.title)
        for axes, order in zip(panels, ("in order", "by magnitude"), strict=True):
            axes.set(title=f"layers {order}", xlabel="3×3 layer", ylim=(0, None))
            axes.grid(alpha=0.3)
        panels[0].set(ylabel="standard deviation")
        panels[1].legend(fontsize=8)

    pages.plot("responses", f"Responses on {images.name}.", draw, panels=2)
    rows = [
        {
            "network": responses.title,
            "kind": responses.kind,
            "layers": responses.depth,
            "3×3 layers": len(responses.deviations),
            _MEAN: statistics.mean(responses.deviations.values()),
            "median": statistics.median(responses.deviations.values()),
            "largest": max(responses.deviations.values()),
            _ERROR: responses.result.training_error,
            "test error (%)": responses.result.last["test_error"],
        }
        for responses in found
    ]
    pages.table("results", rows)
    by_title = {responses.title: responses for responses in found}
    for responses in found:
        other = by_title.get(f"residual-{responses.depth}")
        if responses.kind == "plain" and other is not None:
            mine, its = (statistics.mean(r.deviations.values()) for r in (responses, other))
            pages.text(
                f"With {responses.depth} layers the residual network's mean deviation is "
                f"{its / mine:.2f} of the plain one's."
            )
    pages.csv(
        "responses",
        [
            {"network": r.title, "layer": index, "name": name, "deviation": deviation}
            for r in found
            for index, (name, deviation) in enumerate(r.deviations.items(), 1)
        ],
    )
    if images.kind == "digits":
        pages.text(recipes.CHANGED)
        pages.text(
            f"The weight decay is {_WEIGHT_DECAY} and not 0.0001. Batch norm begins with responses "
            "of deviation 1, and it is weight decay that shrinks those that the loss does not "
            "need, as far as its product with the rate goes, summed over the iterations. That is "
            "0.34 in the paper's run; in one of 1,200 iterations it would be 0.006, and with the "
            "larger decay it is 0.30."
        )
        pages.claims(CLAIMS, results=rows)
    results = [responses.result for responses in found]
    pages.save(images, results)


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
