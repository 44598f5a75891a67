"""What every network costs, beside the paper's Table 1 and its comparisons with VGG.

    python benchmarks/complexity.py --json benchmarks/results/complexity.json

Nothing is measured: layers, parameters and multiply-adds follow from the architectures, and bytes
from what one pass over memory reads and writes at each level of fusion (`resnet_fused.complexity`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torchvision
from harness import results
from torch import nn

from resnet_fused import complexity
from resnet_fused.tune import ARCHITECTURES

# Table 1 and section 3.3: billions of multiply-adds, which the paper calls FLOPs; section 4.2's
# Table 6: millions of parameters.
PAPER_MULTIPLY_ADDS = {
    "plain18": 1.8,
    "resnet18": 1.8,
    "plain34": 3.6,
    "resnet34 A": 3.6,
    "resnet50 1x1": 3.8,
    "resnet101 1x1": 7.6,
    "resnet152 1x1": 11.3,
    "vgg19": 19.6,
}
PAPER_PARAMETERS = {
    **{f"cifar.resnet{d}": p for d, p in ((20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85))},
    "cifar.resnet110": 1.7,
    "cifar.resnet1202": 19.4,
}


def networks() -> dict[str, Callable[[], nn.Module]]:
    """Every network by name."""
    found = dict(ARCHITECTURES)
    for option in ("A", "C"):
        for name in ("resnet34", "resnet50"):
            found[f"{name} {option}"] = partial(ARCHITECTURES[name], shortcut=option)
    for name in ("resnet50", "resnet101", "resnet152"):
        found[f"{name} 1x1"] = partial(ARCHITECTURES[name], stride_in="1x1")
    return {**found, "vgg16": torchvision.models.vgg16, "vgg19": torchvision.models.vgg19}


def rows(names: Sequence[str], batch: int) -> list[dict[str, Any]]:
    """One row a network."""
    found = []
    for name in names:
        size = 32 if name.startswith("cifar.") else 224
        with torch.device("meta"):
            model = networks()[name]().eval()
        cost = complexity.count(model, size, batch)
        found.append(
            {
                "network": name,
                "size": size,
                "layers": cost.layers,
                "parameters": cost.parameters,
                "paper_parameters": PAPER_PARAMETERS.get(name),
                "multiply_adds": cost.multiply_adds,
                "paper_multiply_adds": PAPER_MULTIPLY_ADDS.get(name),
                "activations": cost.activations,
                **{f"passes, {level}": count for level, count in cost.passes.items()},
                **{f"bytes, {level}": moved for level, moved in cost.bytes.items()},
            }
        )
    return found


def _paper(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def table(found: Sequence[dict[str, Any]]) -> str:
    """A Markdown table for people."""
    head = [
        *("network", "layers", "parameters, M", "paper", "multiply-adds, G", "paper"),
        *("activations, M", *(f"MB, {level}" for level in complexity.FUSION)),
    ]
    lines = [head]
    for row in found:
        lines.append(
            [
                row["network"],
                str(row["layers"]),
                f"{row['parameters'] / 1e6:.2f}",
                _paper(row["paper_parameters"]),
                f"{row['multiply_adds'] / 1e9:.3g}",
                _paper(row["paper_multiply_adds"]),
                f"{row['activations'] / 1e6:.2f}",
                *(f"{row[f'bytes, {level}'] / 1e6:.3g}" for level in complexity.FUSION),
            ]
        )
    return results.markdown(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = results.parser(__doc__, "json")
    parser.add_argument("--network", nargs="+", choices=networks(), default=list(networks()))
    parser.add_argument(
        "--batch", type=results.positive, default=32, help="images that share weights"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    found = rows(options.network, options.batch)
    print("One image, numbers of 2 bytes; weights shared by a batch of ", end="")
    print(f"{options.batch}.\n\n{table(found)}\n")
    for level, what in complexity.FUSION.items():
        print(f"{level}: {what}.")
    record = {
        **results.facts(None, "torch", "torchvision"),
        "options": {"batch": options.batch},
        "networks": found,
    }
    results.write(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
