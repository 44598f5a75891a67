"""Images per second of timm's and torchvision's networks, before and after `resnet_fused.fuse`.

    python benchmarks/fuse.py                                every network, batch 8, this machine's
    python benchmarks/fuse.py --models resnet50 --dtype bfloat16 --json out.json

Both are the library's own network in channels_last, with the same random weights and statistics,
each in a process of its own; they take turns, round after round. A correctness gate comes first:
the fused network may not be further from float64 than the unfused one is in its worse layout, else
it is not timed and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torchvision
from harness import results
from harness.comparison import Comparison, Entry, table
from harness.measure import in_turn, iterations_for, times_of
from harness.workers import FailedError, Worker
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import resnet_fused
from resnet_fused.numerics import relative_error
from resnet_fused.testing.cases import generator, randomise_statistics

_PACKAGES = ("resnet-fused", "torch", "torchvision", "timm")


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(32, channels)


def _torchvision(name: str) -> nn.Module:
    if name == "resnet50_group_norm":
        return torchvision.models.resnet50(norm_layer=_group_norm)
    found = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    assert isinstance(found, nn.Module)
    return found


MODELS: dict[str, Callable[[str], nn.Module]] = {
    "resnet18": _timm,
    "resnet50": _timm,
    "resnet50d": _timm,
    "resnet101d": _timm,
    "seresnet50": _timm,
    "resnext50_32x4d": _timm,
    "wide_resnet50_2": _timm,
    "regnety_008": _timm,
    "resnet50_group_norm": _torchvision,
    "deeplabv3_resnet50": _torchvision,
    "fasterrcnn_resnet50_fpn": _torchvision,
}


class Job(NamedTuple):
    """A network and its input, as they travel to the workers."""

    model: str
    batch: int
    size: int
    dtype: torch.dtype
    device: torch.device

    def build(self, layout: torch.memory_format, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
        """The network in eval mode, and the images, values as rounded to the job's dtype."""
        torch.manual_seed(0)
        model = randomise_statistics(MODELS[self.model](self.model)).to(self.dtype).eval()
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator())
        images = images.to(self.dtype)
        images = images.to(self.device, dtype, memory_format=layout)
        return model.to(self.device, dtype).to(memory_format=layout), images


def _result(model: nn.Module, images: Tensor) -> Tensor:
    """What is held against float64: of a detector its features, as it picks boxes by them."""
    out = getattr(model, "backbone", model)(images) if _detects(model) else model(images)
    return torch.cat([t.flatten() for t in tree_leaves(out)]).cpu()


def _detects(model: nn.Module) -> bool:
    return hasattr(model, "roi_heads")


class Side:
    """Lives in a worker: the network as it was, or fused."""

    def build(self, job: Job, fused: bool, seconds: float) -> tuple[Tensor, str]:
        """Its result, and what `fuse` reports."""
        model, images = job.build(torch.channels_last, job.dtype)
        report = str(resnet_fused.fuse(model)) if fused else ""
        self._device = job.device
        inputs = list(images) if _detects(model) else images
        self._call = lambda: model(inputs)
        result = _result(model, images)
        self._iterations = iterations_for(self._call, job.device, seconds)
        return result, report

    def time(self) -> list[float]:
        """Seconds of each call of one round, after one that brings the caches back."""
        times_of(self._call, self._device, 1)
        return times_of(self._call, self._device, self._iterations)

    def judge(self, job: Job) -> tuple[Tensor, float]:
        """The result in float64, and the larger of the unfused network's errors by layout."""
        truth = _result(*job.build(torch.contiguous_format, torch.float64))
        layouts = (torch.contiguous_format, torch.channels_last)
        return truth, max(
            relative_error(_result(*job.build(layout, job.dtype)), truth) for layout in layouts
        )


def compare(job: Job, dtype: str, rounds: int, seconds: float) -> tuple[Comparison, str]:
    """Both networks in turns, and the report of `fuse`."""
    entries = [Entry("fused", "fused", True), Entry("eager", "eager channels_last", False)]
    names = (job.model, str(job.device), dtype, job.batch, job.size)
    comparison = Comparison(*names, entries)
    workers = {entry.key: Worker(Side) for entry in entries}
    report = ""
    try:
        truth, comparison.eager_error = workers["eager"].ask("judge", job)
        for entry in entries:
            result, said = workers[entry.key].ask("build", job, entry.ours, seconds)
            report = report or said
            entry.error, entry.status = relative_error(result, truth), "measured"
            if entry.error > comparison.eager_error:
                entry.status = "wrong"
                entry.reason = f"error {entry.error:.2e}, allowed {comparison.eager_error:.2e}"
        if not comparison.gate_is_red():
            for entry in in_turn(entries, range(rounds)):
                entry.rounds.append(workers[entry.key].ask("time"))
    finally:
        for worker in workers.values():
            worker.stop()
    comparison.summarise()
    return comparison, report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 if a fused network is wrong, 2 if one cannot be run."""
    parser = results.parser(__doc__, "device", "size", "json")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--batch", type=results.positive, default=8)
    parser.add_argument("--dtype", nargs="+", choices=results.DTYPES, default=["float32"])
    parser.add_argument("--rounds", type=results.positive, default=6)
    parser.add_argument("--seconds", type=float, default=0.6, help="a round's (%(default)s)")
    options: argparse.Namespace = parser.parse_args(arguments)
    record = results.facts(options.device, *_PACKAGES, options=options)
    results.warn_if_busy(record)
    comparisons: list[dict[str, Any]] = []
    reports: dict[str, str] = {}
    wrong = False
    for dtype in options.dtype:
        for model in options.models:
            job = Job(model, options.batch, options.size, results.DTYPES[dtype], options.device)
            try:
                comparison, report = compare(job, dtype, options.rounds, options.seconds)
            except FailedError as error:
                print(f"fuse.py: {model}: {error}", file=sys.stderr)
                return 2
            print(f"\n{table(comparison)}\n{report}", flush=True)
            wrong |= comparison.gate_is_red()
            comparisons.append(asdict(comparison))
            reports[model] = report
            results.write(options.json, {**record, "comparisons": comparisons, "reports": reports})
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
