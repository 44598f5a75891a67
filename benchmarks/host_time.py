"""Host time and Python calls of a forward and of a training step, whose kernels do not run.

    TRITON_INTERPRET=1 python benchmarks/host_time.py --json benchmarks/results/host_time.json

What a forward costs before any kernel has worked: the ordinary path, layer by layer, beside the
plan that is recorded from it. `cpu` are the CPU's kernels, `cuda_sim` the bindings of the CUDA
kernels over tensors in main memory, where stream and device need no look-up. Of the calls, Python's
and those of C functions from Python are counted (`sys.setprofile`), as they are on every machine.

And what a training step costs, forward and backward, launch by launch and by recorded programs: of
the CPU's kernels and of Triton's, whose launches then end where Triton's own code would begin.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from harness import results
from torch import Tensor, nn

import resnet_fused
from resnet_fused import _extension, backends, plan, use_backend
from resnet_fused.ops import training_programs

_MODULES = {"cpu": "_C", "cuda_sim": "_C_sim"}
_TRAINED = ("cpu", "triton")
_DTYPES = {"cpu": torch.float32, "cuda_sim": torch.float16}
# The first forwards choose, pack and record.
_WARM_UP = 4


def _nothing(*arguments: Any) -> None:
    return None


@contextlib.contextmanager
def stubbed(extension: ModuleType) -> Iterator[None]:
    """The extension's kernels do not run."""
    extension.stub_kernels(True)
    try:
        yield
    finally:
        extension.stub_kernels(False)


@contextlib.contextmanager
def stubbed_triton() -> Iterator[None]:
    """Triton's launches do nothing, and are recorded as on a GPU."""
    from resnet_fused.backends.triton import launching
    from resnet_fused.backends.triton.training import TritonReplays

    training: Any = backends.get("triton").training
    changed: list[tuple[Any, str, Any]] = [
        (launching.Launch, "_start", _nothing),
        (launching.Launch, "replay", _nothing),
        (launching, "machine", lambda _: launching.Machine(132, 227 * 1024)),
        (training, "replays", TritonReplays(_extension.load())),
        (training_programs, "same_bits", lambda a, b: True),  # of memory that nobody wrote
    ]
    with contextlib.ExitStack() as stack:
        for place, name, value in changed:
            stack.enter_context(mock.patch.object(place, name, value))
        yield


def without_plans() -> AbstractContextManager[object]:
    """Within it every forward takes the ordinary path."""
    return mock.patch.object(plan, "run", _nothing)


def without_programs() -> AbstractContextManager[object]:
    """Within it training ops launch kernel by kernel."""
    return mock.patch.object(training_programs, "bind", _nothing)


def count_calls(model: Callable[[Tensor], object], x: Tensor) -> int:
    """Calls of Python and C functions in one forward, or in a training step."""
    calls = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    threading.setprofile(see)  # autograd's threads too
    sys.setprofile(see)
    try:
        model(x)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls - 1  # setprofile itself


def measure(model: Callable[[Tensor], object], x: Tensor, rounds: int) -> dict[str, Any]:
    """Calls, and the median and quartiles of host time in milliseconds."""
    for _ in range(_WARM_UP):
        model(x)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        model(x)
        times.append(1e3 * (time.perf_counter() - start))
    low, middle, high = statistics.quantiles(times, n=4)
    return {"calls": count_calls(model, x), "ms": middle, "ms_quartiles": [low, high]}


def rows(
    networks: Sequence[str], backends: Sequence[str], size: int, rounds: int
) -> list[dict[str, Any]]:
    """One row a network and backend, whose extension is built."""
    found = []
    for name in networks:
        for backend in backends:
            if _extension.available(_MODULES[backend]):
                continue
            dtype = _DTYPES[backend]
            model = getattr(resnet_fused, name)().eval().to(dtype)
            model = model.to(memory_format=torch.channels_last)
            x = torch.zeros(1, 3, size, size, dtype=dtype)
            x = x.contiguous(memory_format=torch.channels_last)
            extension = _extension.load(_MODULES[backend])
            with torch.no_grad(), use_backend(backend), stubbed(extension):
                with without_plans():
                    ordinary = measure(model, x, rounds)
                planned = measure(model, x, rounds)
            row = {"network": name, "backend": backend, "dtype": str(dtype)[6:]}
            found.append({**row, "ordinary": ordinary, "planned": planned})
    return found


def training_rows(
    networks: Sequence[str], backend_names: Sequence[str], size: int, rounds: int
) -> list[dict[str, Any]]:
    """One row a network and backend that runs here, for a batch of 2."""
    found = []
    for name in networks:
        for backend in backend_names:
            if backends.unavailable(backend):
                continue
            # With few classes, as PyTorch's own kernels run: the head's.
            model = getattr(resnet_fused, name)(num_classes=10).train()
            model = model.to(memory_format=torch.channels_last)
            x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)

            def step(x: Tensor, model: nn.Module = model) -> None:
                model.zero_grad()
                model(x).sum().backward()

            with contextlib.ExitStack() as stack:
                stack.enter_context(use_backend(backend))
                if backend == "triton":
                    stack.enter_context(stubbed_triton())
                step(x)  # records, from kernels that run where there are any
                if backend != "triton":
                    stack.enter_context(stubbed(_extension.load(_MODULES[backend])))
                planned = measure(step, x, rounds)
                with without_programs():
                    ordinary = measure(step, x, rounds)
            row = {"network": name, "backend": backend, "dtype": "float32", "training": True}
            found.append({**row, "ordinary": ordinary, "planned": planned})
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    head = ("network", "backend", "calls", "calls, planned", "host ms", "host ms, planned")
    lines = [
        (
            row["network"] + (", training" if row.get("training") else ""),
            row["backend"],
            *(str(row[path]["calls"]) for path in ("ordinary", "planned")),
            *(f"{row[path]['ms']:.3f}" for path in ("ordinary", "planned")),
        )
        for row in found
    ]
    return results.markdown([head, *lines])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = results.parser(__doc__, "json")
    parser.add_argument("--network", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--backend", nargs="+", choices=_MODULES, default=list(_MODULES))
    parser.add_argument(
        "--training", nargs="*", choices=_TRAINED, default=list(_TRAINED), metavar="BACKEND"
    )
    parser.add_argument("--size", type=results.positive, default=224)
    parser.add_argument("--rounds", type=results.positive, default=200)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    found = rows(options.network, options.backend, options.size, options.rounds)
    found += training_rows(options.network, options.training, 64, options.rounds)
    print(table(found))
    facts = results.facts(torch.device("cpu"), "torch", options=options)
    results.write(options.json, {**facts, "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
