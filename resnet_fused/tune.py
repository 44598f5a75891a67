"""`python -m resnet_fused.tune`: measures a network's kernels ahead of time, and says which won.

    python -m resnet_fused.tune --arch resnet50 --batch 256 --dtype bfloat16

Every part of the network runs with random weights and images in every batch size, so that each
choice of kernel is made and kept (`resnet_fused/backends/autotune/`); a batch size stands for all
down to half of it. Kernels without a verdict are checked first (`resnet_fused.selfcheck`), then
candidates are compiled by several processes. What was measured before is
not measured again, so the table is printed at once the second time. With --training the kernels of
a training step are measured too.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, models, settings
from .backends import autotune
from .backends.autotune import Decision, Operand
from .models.network import ResidualNetwork

_NOT_NETWORKS = ("ResNet", "cifar")
_WITH_KERNELS = ("cuda", "triton")
_COMPOSITIONS = ("layers", "separate")
ARCHITECTURES = {
    **{name: getattr(models, name) for name in models.__all__ if name not in _NOT_NETWORKS},
    **{f"cifar.{n}": f for n, f in vars(models.cifar).items() if re.fullmatch(r"[a-z]+\d+", n)},
}
DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


class Row(NamedTuple):
    """A choice of kernel: the parts of the network that it was made for, one for each call."""

    parts: list[str]
    decision: Decision

    def seconds(self) -> float | None:
        """Of all calls; None where nothing was measured."""
        time = self.decision.seconds()
        return None if time is None else len(self.parts) * time


def runner_up(decision: Decision) -> str:
    """The next candidate, and by how much it is slower."""
    best = decision.seconds()
    times = {
        name: time
        for name, time in decision.times.items()
        if isinstance(time, float) and name != decision.candidate.name
    }
    if not times or not best:
        return "-"
    name = min(times, key=times.__getitem__)
    return f"{name} +{times[name] / best - 1:.0%}"


def table(rows: Iterable[Row]) -> str:
    """The rows as text, those that take longest first, with each one's share of all their time."""
    rows = sorted(rows, key=lambda row: row.seconds() or 0.0, reverse=True)
    total = sum(row.seconds() or 0.0 for row in rows)
    lines = [("layer", "op", "shape", "winner", "µs", "runner-up", "share")]
    for parts, decision in rows:
        time, taken = decision.seconds(), Row(parts, decision).seconds()
        more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        lines.append(
            (
                parts[0] + more,
                decision.op,
                ", ".join(part for part in decision.described if isinstance(part, Operand)),
                decision.candidate.name,
                "-" if time is None else f"{time * 1e6:.1f}",
                runner_up(decision),
                "-" if taken is None else f"{taken / total:.1%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def tune(
    network: ResidualNetwork,
    images: Tensor,
    training: bool = False,
    progress: Callable[[list[str]], Iterable[str]] = iter,
) -> list[Row]:
    """Makes every choice of kernel that the network asks for on `images` (N, 3, H, W).

    The network is left in eval mode, or in training mode if `training`, which measures backward
    too. `progress` goes through the names of the network's parts as they are measured.
    """
    network.train(training)
    parts = dict(network.parts())
    rows: dict[tuple[object, ...], Row] = {}
    x = images
    with autotune.tuner.ahead():
        for name in progress(list(parts)):
            _step(parts[name], x, training)
            with autotune.tuner.watch() as decisions:
                out = _step(parts[name], x, training)
            for decision in decisions:
                if decision.candidate.name in _COMPOSITIONS:  # its parts have rows of their own
                    continue
                row = rows.setdefault((decision.op, *decision.described), Row([], decision))
                row.parts.append(name)
            x = out.requires_grad_(training)
    return list(rows.values())


def compile_share(
    network: ResidualNetwork, images: Tensor, training: bool, share: int, of: int
) -> None:
    """Compiles one of so many shares of the candidates, in the order in which `tune` finds them."""
    network.train(training)
    with autotune.tuner.compile_share(share, of):
        x = images
        for _, part in network.parts():
            x = _step(part, x, training).requires_grad_(training)


def _compile(arguments: Sequence[str], jobs: int) -> None:
    """Runs `compile_share` in so many processes."""
    print(f"compiling in {jobs} processes", file=sys.stderr)
    command = [sys.executable, "-m", "resnet_fused.tune", *arguments]
    children = [
        subprocess.Popen([*command, "--share", str(share), str(jobs)]) for share in range(jobs)
    ]
    statuses = [child.wait() for child in children]
    if any(statuses):
        print("a compiling process failed; what it left is compiled below", file=sys.stderr)


def _step(part: Callable[[Tensor], Tensor], x: Tensor, training: bool) -> Tensor:
    """The part's result; with backward, to x too unless it is the images, if `training`."""
    with torch.set_grad_enabled(training):
        out = part(x.detach().requires_grad_(x.requires_grad))
        if training:
            with torch.autocast(x.device.type, enabled=False):
                out.backward(torch.randn_like(out))
    return out.detach()


def _progress(names: list[str]) -> Iterable[str]:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        print("measuring; `pip install tqdm` for a progress bar", file=sys.stderr)
        return names
    bar: Iterable[str] = tqdm(names, unit="part")
    return bar


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m resnet_fused.tune",
        description="Measures a network's kernels on this GPU, and prints which won.",
    )
    parser.add_argument("--arch", default="resnet50", choices=ARCHITECTURES, metavar="NETWORK",
                        help=f"one of {', '.join(ARCHITECTURES)}")  # fmt: skip
    parser.add_argument("--batch", type=int, nargs="+", default=[256], help="images per call")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--size", type=int, help="rows and columns of an image: 224, CIFAR's 32")
    parser.add_argument("--training", action="store_true", help="a training step's kernels too")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1),
                        help="processes that compile (%(default)s)")  # fmt: skip
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.size is None:
        options.size = 32 if options.arch.startswith("cifar.") else 224
    if min(*options.batch, options.size) < 1:
        parser.error("--batch and --size must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Exits with a message where nothing can be measured."""
    options = _options(arguments)
    if not torch.cuda.is_available():
        sys.exit(
            "Kernels are measured on an NVIDIA GPU, and PyTorch finds none: run this on the "
            "machine that will run the network. `python -m resnet_fused.env` says what is here."
        )
    if not settings.tuning_enabled():
        sys.exit("RESNET_FUSED_TUNE=off forbids measuring: unset it, or set it to on.")
    device, dtype = torch.device("cuda"), DTYPES[options.dtype]
    reasons = [
        backends.unavailable(name) or backends.get(name).unsupported(device, dtype)
        for name in _WITH_KERNELS
    ]
    if None not in reasons:
        sys.exit(f"There is nothing to choose among on this GPU: {' '.join(map(str, reasons))}")
    if options.share is None and settings.selfcheck_enabled():
        from . import selfcheck  # and every backend with it

        selfcheck.main(["--record"])  # what has not passed yet is no candidate
    if options.share is None and options.jobs > 1:
        _compile(sys.argv[1:] if arguments is None else arguments, options.jobs)
    network = ARCHITECTURES[options.arch]().to(device)
    for batch in options.batch:
        for training in (False, True)[: 1 + options.training]:
            mode = "training" if training else "inference"
            title = f"{options.arch}, {mode}, batch {batch}, {options.size}², {options.dtype}"
            try:
                images = torch.randn(batch, 3, options.size, options.size, device=device)
                with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                    if options.share is not None:
                        compile_share(network, images, training, *options.share)
                        continue
                    print(title)
                    print(table(tune(network, images, training, _progress)))
            except torch.OutOfMemoryError:
                sys.exit(f"{batch} images do not fit this GPU's memory: give --batch less of them.")


if __name__ == "__main__":
    main()
