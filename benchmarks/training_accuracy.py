"""Does a model trained through the training ops learn as torchvision's does?

    python benchmarks/training_accuracy.py --json benchmarks/results/training_accuracy.json \
        --plot benchmarks/results/training_accuracy.png

ResNet-18 on scikit-learn's 1,797 handwritten digits, upsampled to 32×32: 200 steps of SGD, whose
learning rate falls to zero along a cosine, from each of five seeds, the same initial weights and
batches for both. On the CPU ours runs the training ops with their plain PyTorch pieces, on a GPU
with its kernels. The means of the test accuracies may differ by no more than either's spread
(standard deviation) over seeds; else the exit code is 1.

Training amplifies rounding: weights that differ in their last bit end in models that differ by
several test images. So each seed is trained from as it is and from two copies whose initial weights
are moved by one unit in the last place, which takes most of that noise out of the means; the spread
stays that of single runs. How far rounding alone moves a run is reported beside it.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from baselines.training import fused
from harness import results as files
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm
from training import nudge

import resnet_fused

STEPS, BATCH, SEEDS, COPIES, TEST = 200, 32, 5, 3, 397
Results = dict[str, list[list[float]]]  # accuracies of each seed's copies, by library


def digits(device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) in [-1, 1] and labels, shuffled once."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 8 - 1
    images = F.interpolate(images, scale_factor=4, mode="bilinear").expand(-1, 3, -1, -1)
    return images.contiguous().to(device), torch.tensor(data.target)[order].to(device)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, seed: int, name: str) -> float:
    """Test accuracy of `model` after 200 steps on all but the first 397 images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    rng = torch.Generator().manual_seed(seed)
    model.train()
    for _ in tqdm(range(STEPS), desc=f"{name}, seed {seed}", mininterval=5):
        chosen = torch.randint(TEST, len(labels), (BATCH,), generator=rng).to(labels.device)
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        found = model(images[:TEST]).argmax(1)
    return float((found == labels[:TEST]).float().mean())


def _deviation(samples: Iterable[Sequence[float]]) -> float:
    """Standard deviation within samples, pooled over them."""
    return statistics.fmean(map(statistics.variance, samples)) ** 0.5


def compare(results: Results) -> dict[str, Any]:
    """Whether the means differ by no more than the smaller standard deviation over seeds."""
    means = {name: statistics.fmean(itertools.chain(*runs)) for name, runs in results.items()}
    spread = {name: _deviation(zip(*runs, strict=True)) for name, runs in results.items()}
    difference = means["resnet_fused"] - means["torchvision"]
    return {
        "accuracy": results,
        "mean": means,
        "spread over seeds": spread,
        "spread by rounding": {name: _deviation(runs) for name, runs in results.items()},
        "difference": difference,
        "same": abs(difference) <= min(spread.values()),
    }


def plot(results: Results, path: Path) -> None:
    """Each run's accuracy, in columns of seeds, and the mean, ours beside torchvision's."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.5, 3.5), layout="constrained")
    for place, seeds in enumerate(results.values()):
        columns = [place + 0.08 * (i - (len(seeds) - 1) / 2) for i in range(len(seeds))]
        (points, *_) = axes.plot(columns, seeds, "o", color=f"C{place}", alpha=0.6)
        mean = statistics.fmean(itertools.chain(*seeds))
        axes.plot([place - 0.3, place + 0.3], [mean, mean], color=points.get_color())
    axes.set_xticks(range(len(results)), list(results))
    axes.set_xlim(-0.5, len(results) - 0.5)
    axes.set_ylabel(f"test accuracy after {STEPS} steps")
    figure.savefig(path, dpi=150)


def main() -> int:
    """Trains, compares, writes."""
    options = files.parser(__doc__, "device", "json", "plot").parse_args()
    device = options.device
    pieces = "PyTorch" if device.type == "cpu" else "kernels"
    images, labels = digits(device)
    results: Results = {
        name: [[] for _ in range(SEEDS)] for name in ("resnet_fused", "torchvision")
    }
    for seed, copy in itertools.product(range(SEEDS), range(COPIES)):
        torch.manual_seed(seed)
        theirs = torchvision.models.resnet18(num_classes=10)
        if copy:
            nudge(theirs, copy)
        ours = resnet_fused.resnet18(num_classes=10)
        ours.load_state_dict(theirs.state_dict())
        for name, model in (("resnet_fused", ours), ("torchvision", theirs)):
            with fused(device):
                found = accuracy(model.to(device), images, labels, seed, name)
            results[name][seed].append(found)
    summary = compare(results)
    print(json.dumps(summary, indent=1))
    facts = files.facts(device, "torch", "torchvision", "triton", "scikit-learn")
    facts |= {"pieces of the training ops": pieces, "steps": STEPS, "batch": BATCH}
    files.write(options.json, {**facts, **summary})
    if options.plot:
        plot(results, options.plot)
    return 0 if summary["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
