"""What every network costs, beside the paper's Table 1 and its comparison with VGG-19.

    python benchmarks/complexity.py --json benchmarks/results/complexity.json

Nothing is measured: layers, parameters and multiply-adds follow from the architectures, and bytes
from what one pass over memory reads and writes at each level of fusion (`resnet_fused.complexity`).
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from harness import results
from torch import nn

import resnet_fused
from resnet_fused import complexity
from resnet_fused.models import cifar

SIZE = 224
CIFAR_SIZE = 32
_FAMILY = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
)
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


def networks() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """Every network by name, with its images' size."""
    made: dict[str, Callable[[], nn.Module]] = {
        "plain18": resnet_fused.plain18,
        "plain34": resnet_fused.plain34,
    }
    for name in _FAMILY:
        made[name] = getattr(resnet_fused, name)
    for option in ("A", "C"):
        for name in ("resnet34", "resnet50"):
            made[f"{name} {option}"] = partial(getattr(resnet_fused, name), shortcut=option)
    for depth in (50, 101, 152):
        build = getattr(resnet_fused, f"resnet{depth}")
        made[f"resnet{depth} 1x1"] = partial(build, stride_in="1x1")
    made["vgg19"] = torchvision.models.vgg19
    sized = {name: (build, SIZE) for name, build in made.items()}
    for depth in (20, 32, 44, 56, 110, 1202):
        sized[f"cifar.resnet{depth}"] = (partial(cifar.resnet, depth), CIFAR_SIZE)
        if depth <= 110:
            sized[f"cifar.plain{depth}"] = (partial(cifar.plain, depth), CIFAR_SIZE)
    return sized


def rows(names: Sequence[str], batch: int, element_size: int) -> list[dict[str, Any]]:
    """One row a network."""
    found = []
    for name in names:
        build, size = networks()[name]
        with torch.device("meta"):
            model = build().eval()
        cost = complexity.count(model, size, batch, element_size)
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


def table(found: Sequence[dict[str, Any]], batch: int) -> str:
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
    return "\n".join(
        [
            results.markdown(lines),
            "",
            *(f"{key}: {what}." for key, what in complexity.FUSION.items()),
        ]
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = results.parser(__doc__, "json")
    parser.add_argument("--network", nargs="+", choices=networks(), default=list(networks()))
    positive = results.positive
    parser.add_argument("--batch", type=positive, default=32, help="images that share weights")
    parser.add_argument("--element-size", type=positive, default=2, help="bytes of a number")
    parser.add_argument("--csv", type=Path, help="write the rows")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    found = rows(options.network, options.batch, options.element_size)
    print(
        f"One image; bytes of {options.element_size} a number, weights shared by a batch of ",
        end="",
    )
    print(f"{options.batch}.\n\n{table(found, options.batch)}")
    record = {
        **results.facts(None, "torch", "torchvision"),
        "options": {"batch": options.batch, "element_size": options.element_size},
        "networks": found,
    }
    results.write(options.json, record)
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
