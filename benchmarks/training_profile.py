"""Where the time of a training step goes: every kernel beside the floor of what it computes.

`benchmarks/training.py` puts this into its result file. Kernels and their times are
`torch.profiler`'s. The floors are those of the pieces that `resnet_fused.backends.training` lists:
each tensor that a piece takes or gives moved once, each product computed at the peak, the pieces
one after the other. A piece's floor stands at the kernel of its name; kernels that merge its parts
have none, nor has what is not ours (loss, head, optimizer).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from harness.measure import Peaks
from harness.results import markdown
from torch import Tensor
from torch.utils._pytree import tree_leaves

from resnet_fused.ops.dispatch import serving, use_backend
from resnet_fused.parameters import Convolution

_NAMESPACES = "resnet_fused::(anonymous namespace)::"  # of our kernels, which their names repeat


class _Counted:
    """Training pieces that add up their floors, by name, while they run."""

    replays = None

    def __init__(self, pieces: Any, peaks: Peaks) -> None:
        self.floors: dict[str, float] = {}
        self._pieces, self._peaks = pieces, peaks

    def __getattr__(self, name: str) -> Callable[..., Any]:
        piece = getattr(self._pieces, name)

        def run(*arguments: Any) -> Any:
            result = piece(*arguments)
            seconds = self._peaks.floor(
                _bytes(arguments, result), _operations(name, arguments, result)
            )
            self.floors[name] = self.floors.get(name, 0.0) + seconds
            return result

        return run


def _bytes(*values: Any) -> int:
    tensors = {id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _operations(piece: str, arguments: tuple[Any, ...], result: Any) -> int:
    """Two a multiply-add of the piece's convolution, if it has one."""
    conv = next((value for value in arguments if isinstance(value, Convolution)), None)
    if conv is None:
        return 0
    outputs = result[0] if piece == "conv_stats" else arguments[0]  # that or its gradient
    return int(2 * outputs.numel() * conv.weight[0].numel())


def floors(step: Callable[[], object], x: Tensor, peaks: Peaks) -> dict[str, float]:
    """Seconds of floor of each piece in one training step on `x`; none where it trains unfused."""
    backend = next((b for b in serving(x) if b.training is not None), None)
    if backend is None:
        return {}
    counted = _Counted(backend.training, peaks)
    counting = copy.copy(backend)
    counting.training = counted  # type: ignore[misc]
    with use_backend(counting):
        step()
    return counted.floors


def profile(step: Callable[[], object], x: Tensor, peaks: Peaks) -> list[dict[str, Any]]:
    """One step's kernels (on the CPU: ops), the longest first.

    Each with its calls, seconds, share of all kernels' time and floor in seconds or None.
    """
    least = floors(step, x, peaks)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if x.is_cuda:
        kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        step()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
    found: list[dict[str, Any]] = [
        {"kernel": name.replace(_NAMESPACES, "")[:120], "calls": calls, "seconds": seconds}
        for name, (calls, seconds) in _times(profiler, x.is_cuda).items()
    ]
    total = sum(row["seconds"] for row in found)
    for row in found:
        row["share"] = row["seconds"] / total
        row["floor"] = least.get(row["kernel"].removesuffix("_kernel"))
    found = [row for row in found if row["seconds"] > 0]
    return sorted(found, key=lambda row: row["seconds"], reverse=True)


def _times(profiler: Any, gpu: bool) -> dict[str, tuple[int, float]]:
    """Calls and seconds of each kernel, or op, by name.

    A kernel may start before the one that it waits for has ended: what it spends beside earlier
    ones is theirs, so that all kernels together take as long as the GPU worked.
    """
    if not gpu:
        entries = profiler.key_averages()
        return {e.key: (e.count, 1e-6 * e.self_cpu_time_total) for e in entries}
    ran = [e for e in profiler.events() if e.device_type.name == "CUDA"]
    times: dict[str, tuple[int, float]] = {}
    free = -math.inf
    for event in sorted(ran, key=lambda e: e.time_range.start):
        start, end = event.time_range.start, event.time_range.end
        calls, seconds = times.get(event.name, (0, 0.0))
        times[event.name] = (calls + 1, seconds + 1e-6 * max(0.0, end - max(start, free)))
        free = max(free, end)
    return times


def table(rows: list[dict[str, Any]]) -> str:
    """The kernels that take a hundredth of the time or more, for people."""
    cells = [
        [
            *(row["kernel"][:60], str(row["calls"]), f"{1e3 * row['seconds']:.3f}"),
            f"{100 * row['share']:.1f}%",
            "–" if row["floor"] is None else f"{1e3 * row['floor']:.3f}",
        ]
        for row in rows
        if row["share"] >= 0.01
    ]
    return markdown([["kernel", "calls", "ms", "share", "floor ms"], *cells])
