"""What quantising costs networks trained here, in points of top-1.

    python benchmarks/quantised_accuracy.py --json benchmarks/results/quantised_accuracy.json

ResNet-18 and the paper's ResNet-20 on scikit-learn's handwritten digits, trained as
training_accuracy.py trains, from each of three seeds; quantised with 256 training images in int8
and fp8 (e4m3, emulated by its reference); accuracy on the 397 test images. Of the seeds' mean int8
may lose 0.5 points and fp8 0.3; else the exit code is 1.

Beside it stands what 60 steps of quantisation-aware fine-tuning make of fp8, and of int8 calibrated
with images of a third of the contrast, whose scales clip most activations.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import results as files
from torch import Tensor, nn
from tqdm import tqdm
from training_accuracy import STEPS, TEST, accuracy, digits

import resnet_fused
from resnet_fused.quantization import METHODS, QuantizedNetwork, convert, prepare_qat

SEEDS, IMAGES, BATCH, TUNED = 3, 256, 64, 60
MOST = {"int8 mse": 0.5, "fp8 mse": 0.3}  # points
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet_fused.resnet18,
    "cifar.resnet20": resnet_fused.cifar.resnet20,
}


def score(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 on the test images, in per cent."""
    with torch.no_grad():
        found = torch.cat([network(batch).argmax(1) for batch in images[:TEST].split(BATCH)])
    return 100 * float((found == labels[:TEST]).double().mean())


def tuned(
    model: nn.Module,
    calibration: list[Tensor],
    dtype: torch.dtype,
    images: Tensor,
    labels: Tensor,
) -> list[float]:
    """Test accuracies before and after fine-tuning, with that calibration."""
    network = prepare_qat(model, calibration, dtype, progress=False)
    before = score(convert(network), images, labels)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0002, momentum=0.9)
    rng = torch.Generator().manual_seed(0)
    for _ in tqdm(range(TUNED), desc="fine-tuning", mininterval=5):
        chosen = torch.randint(TEST, len(labels), (32,), generator=rng)
        optimizer.zero_grad()
        F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return [before, score(convert(network), images, labels)]


def measure(name: str, seed: int, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracies of one trained network, and how it was quantised."""
    torch.manual_seed(seed)
    model = NETWORKS[name](num_classes=10)
    accuracy(model, images, labels, seed, name)
    calibration = list(images[TEST : TEST + IMAGES].split(BATCH))

    def quantized(dtype: torch.dtype, method: str) -> QuantizedNetwork:
        return resnet_fused.quantize(model, calibration, dtype, method=method, progress=False)

    found: dict[str, Any] = {"float32": score(model, images, labels)}
    for method in METHODS:
        found[f"int8 {method}"] = score(quantized(torch.int8, method), images, labels)
    network = quantized(torch.int8, "mse")
    found["report"] = str(network.report)
    fp8 = quantized(torch.float8_e4m3fn, "mse")
    found["fp8 mse"] = score(fp8, images, labels)
    found["fp8 report"] = str(fp8.report)
    _, found["fp8 fine-tuned"] = tuned(model, calibration, torch.float8_e4m3fn, images, labels)
    dim = [batch / 3 for batch in calibration]
    before, after = tuned(model, dim, torch.int8, images, labels)
    return found | {"int8 badly calibrated": before, "int8 badly calibrated, fine-tuned": after}


def main() -> int:
    """Trains, quantises, compares, writes."""
    options = files.parser(__doc__, "json").parse_args()
    images, labels = digits(torch.device("cpu"))
    networks: dict[str, Any] = {}
    losses: dict[str, float] = {}
    for name in NETWORKS:
        runs = [measure(name, seed, images, labels) for seed in range(SEEDS)]
        reports = {key: runs[0][key] for key in ("report", "fp8 report")}
        accuracies = {key: [run[key] for run in runs] for key in runs[0] if key not in reports}
        means = {key: statistics.fmean(values) for key, values in accuracies.items()}
        for kind in MOST:
            losses[f"{name} {kind}"] = means["float32"] - means[kind]
        networks[name] = {"accuracy": accuracies, "mean": means, **reports}
        print(name, means)
    passed = all(loss <= MOST[key.split(" ", 1)[1]] for key, loss in losses.items())
    print(losses, "within bounds" if passed else "TOO MUCH")
    facts = files.facts(torch.device("cpu"), "torch", "scikit-learn")
    facts |= {"steps": STEPS, "calibration images": IMAGES, "steps of fine-tuning": TUNED}
    files.write(options.json, {**facts, "networks": networks, "loss": losses, "passed": passed})
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
