"""Does a model trained through the training ops learn as torchvision's does?

    python benchmarks/training_accuracy.py --json benchmarks/results/training_accuracy.json

ResNet-18 on scikit-learn's 1,797 handwritten digits, upsampled to 16×16: 200 steps of SGD from each
of five seeds, the same initial weights and batches for both. On the CPU ours runs the training ops
with their plain PyTorch pieces, on a GPU with its kernels. The means of the test accuracies may
differ by no more than the larger spread (standard deviation) over seeds; else the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout runs uninstalled too

import resnet_fused
from resnet_fused import backends
from resnet_fused.reference.training import ReferenceTraining
from resnet_fused.testing import machine

STEPS, BATCH, SEEDS, TEST = 200, 32, 5, 397


def digits(device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 16, 16) in [-1, 1] and labels, shuffled once."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 8 - 1
    images = F.interpolate(images, scale_factor=2, mode="bilinear").expand(-1, 3, -1, -1)
    return images.contiguous().to(device), torch.tensor(data.target)[order].to(device)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, seed: int, name: str) -> float:
    """Test accuracy of `model` after 200 steps on all but the first 397 images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    rng = torch.Generator().manual_seed(seed)
    model.train()
    for _ in tqdm(range(STEPS), desc=f"{name}, seed {seed}", mininterval=5):
        chosen = torch.randint(TEST, len(labels), (BATCH,), generator=rng).to(labels.device)
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        found = model(images[:TEST]).argmax(1)
    return float((found == labels[:TEST]).float().mean())


def main() -> int:
    """Trains, compares, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        reference = backends.get("reference")
        reference.training = ReferenceTraining()  # type: ignore[misc]
        resnet_fused.use_backend("reference")
    images, labels = digits(device)
    results: dict[str, list[float]] = {"resnet_fused": [], "torchvision": []}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        theirs = torchvision.models.resnet18(num_classes=10)
        ours = resnet_fused.resnet18(num_classes=10)
        ours.load_state_dict(theirs.state_dict())
        for name, model in (("resnet_fused", ours), ("torchvision", theirs)):
            results[name].append(accuracy(model.to(device), images, labels, seed, name))
    means = {name: statistics.mean(values) for name, values in results.items()}
    spread = max(statistics.stdev(values) for values in results.values())
    same = abs(means["resnet_fused"] - means["torchvision"]) <= spread
    summary = {"accuracy": results, "mean": means, "spread": spread, "same": same}
    print(json.dumps(summary, indent=1))
    if options.json:
        facts = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine.describe(device),
            "versions": machine.versions("torch", "torchvision", "triton", "scikit-learn"),
            **machine.commit(Path(__file__).parent),
            "steps": STEPS,
            "batch": BATCH,
        }
        options.json.write_text(json.dumps({**facts, **summary}, indent=1) + "\n")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
