"""How an experiment starts: its options, its device and its processes.

    python experiments/NAME.py                          one process
    torchrun --nproc-per-node 8 experiments/NAME.py     one per GPU, or gloo processes on a CPU

Processes share the batch, so a run is the same experiment on any number of them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import results
from torch import Tensor, nn

from .errors import ExperimentError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Launch:
    """Where and how an experiment runs.

    data: folder of the data set, None for the embedded digits.
    out: folder of the checkpoints and the report.
    dtype: of autocast; float32 means none.
    workers: processes that load images, for each process that trains.
    checkpoint_seconds: time between two checkpoints.
    rank, world: this process among the `world` that train together.
    """

    data: Path | None
    out: Path
    device: torch.device
    dtype: torch.dtype
    seed: int
    workers: int
    quick: bool
    checkpoint_seconds: float
    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """The options that all experiments have. `name` is the report's folder in runs/."""
    options = argparse.ArgumentParser(
        description=description.strip().splitlines()[0],
        epilog=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument(
        "--data",
        type=Path,
        help="folder of CIFAR-10 or ImageNet as published; without it the embedded digits",
    )
    options.add_argument("--out", type=Path, default=Path("runs") / name, help="results go here")
    options.add_argument("--quick", action="store_true", help="a few iterations, to try it out")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    options.add_argument("--device", type=results.device, default=here)
    options.add_argument(
        "--dtype", choices=_DTYPES, help="of autocast; bfloat16 on a GPU and float32 on a CPU"
    )
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--workers", type=int, default=0, help="processes that load images")
    options.add_argument(
        "--checkpoint-seconds", type=float, default=30.0, help="time between two checkpoints"
    )
    return options


def choose(
    options: argparse.Namespace, kind: str, names: Sequence[str], **defaults: Sequence[Any]
) -> list[Any]:
    """The values of the options `names`: as given on the command line, else the default for the
    data's `kind`, or "quick" with --quick."""
    chosen = defaults["quick" if options.quick else kind]
    given = (getattr(options, name) for name in names)
    return [d if g is None else g for g, d in zip(given, chosen, strict=True)]


def run(
    experiment: Callable[[Launch, argparse.Namespace], None], options: argparse.Namespace
) -> int:
    """Runs `experiment`; the exit code. The same command goes on after a stop of any kind."""
    try:
        with _started(options) as launch:
            experiment(launch, options)
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def _started(options: argparse.Namespace) -> Iterator[Launch]:
    # Read by cuBLAS when CUDA starts; deterministic products need it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = options.device
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    default = "bfloat16" if device.type == "cuda" else "float32"
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield Launch(
            options.data,
            options.out,
            device,
            _DTYPES[options.dtype or default],
            options.seed,
            options.workers,
            options.quick,
            options.checkpoint_seconds,
            int(os.environ.get("RANK", "0")),
            world,
        )
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        if world > 1:
            dist.destroy_process_group()


def seed_of(*parts: object) -> int:
    """A seed that is a function of `parts` alone, and unrelated for any two of them."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def total(values: Tensor) -> Tensor:
    """The sum of `values` over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


class _Summed(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return total(values.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return total(grad.clone())


def _summed(values: Tensor) -> Tensor:
    summed: Tensor = _Summed.apply(values)
    return summed


class _CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over all processes' batches, of equal sizes, on the CPU.

    There `nn.SyncBatchNorm` refuses to run, and `DistributedDataParallel` refuses to hold it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        world = dist.get_world_size()
        axes = (0, 2, 3)
        wide = x.double()  # as PyTorch's batch norm sums on the CPU
        mean = _summed(wide.mean(axes)) / world
        centred = wide - mean[:, None, None]
        var = _summed(centred.square().mean(axes)) / world
        if self.track_running_stats:
            self._track(mean.detach(), var.detach(), world * x.numel() // x.shape[1])
        scale = (var + self.eps).rsqrt() * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        if self.num_batches_tracked is not None:  # taken away while a run is computed again
            self.num_batches_tracked.add_(1)
        unbiased = var * (count / max(count - 1, 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


def synchronise_batch_norm(model: nn.Module, launch: Launch) -> nn.Module:
    """`model` with batch statistics taken over all processes; itself where there is one."""
    if launch.world == 1:
        return model
    for name, module in list(model.named_modules()):
        if type(module) is not nn.BatchNorm2d:  # frozen ones are of another type
            continue
        if launch.device.type == "cuda":
            model.set_submodule(name, nn.SyncBatchNorm.convert_sync_batchnorm(module))
        else:
            module.__class__ = _CpuSyncBatchNorm  # same parameters, buffers and keys
    return model


def share(batch: int, launch: Launch) -> int:
    """This process's part of a batch; raises ExperimentError where it does not divide."""
    if batch % launch.world:
        fits = math.ceil(batch / launch.world) * launch.world
        raise ExperimentError(
            f"a batch of {batch} does not divide among {launch.world} processes; "
            f"give --batch {fits}, for example"
        )
    return batch // launch.world
