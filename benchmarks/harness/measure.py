"""How times are taken, in turns and the same way on CPU and GPU, and what they are held against.

The roofline floor is the least time that fusing layer by layer allows. Fusion is counted at the
level of `resnet_fused.ops` ("block ends" of `resnet_fused.complexity`): each convolution reads its
input and writes its result once, with BN, ReLU and addition in its epilogue. The end of a block
also reads the shortcut, and computes a projected one; the stem pools. Weights are read once a
batch. Batch norm's vectors (under 0.1%) are left out. Operations are those of direct convolution,
two a multiply-add: an algorithm that needs fewer (Winograd), or a cache that holds a whole
activation between two layers, can beat the floor.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.complexity import Pass

Result = TypeVar("Result")


def times_of(
    call: Callable[[], object], device: torch.device, iterations: int, rest: float = 0.0
) -> list[float]:
    """Seconds of each of `iterations` calls, on a CPU with `rest` idle seconds before each.

    On a GPU the calls are queued back to back and the gaps between CUDA events are read, so the
    host's share counts only where it holds the GPU up, as it does for a user.
    """
    if device.type == "cuda":
        return _times_on_gpu(call, device, iterations)
    times = []
    for _ in range(iterations):
        if rest:
            time.sleep(rest)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _times_on_gpu(call: Callable[[], object], device: torch.device, iterations: int) -> list[float]:
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
    milliseconds = (a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return [value / 1e3 for value in milliseconds]


def iterations_for(call: Callable[[], object], device: torch.device, seconds: float) -> int:
    """How many calls, two at least, fill about `seconds`, judged by two after one that warms up."""
    times_of(call, device, 1)
    fastest = max(min(times_of(call, device, 2)), 1e-6)
    return max(2, math.ceil(seconds / fastest))


def in_turn(entries: Sequence[Result], rounds: range) -> Iterator[Result]:
    """Every entry once a round, another one first each time, so that a drifting clock or a busy
    neighbour hits all of them alike."""
    for turn in rounds:
        for place in range(len(entries)):
            yield entries[(turn + place) % len(entries)]


def in_cuda_graph(call: Callable[[], Result]) -> Callable[[], Result]:
    """`call` captured once and replayed; its result is overwritten by each replay.

    What is returned holds `call` too: the graph holds the addresses of what it reads, not the
    tensors.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay(_owner: Callable[[], Result] = call) -> Result:
        graph.replay()
        return result

    return replay


class Peaks(NamedTuple):
    """What a machine reaches: memory traffic in bytes/s, arithmetic in operations/s."""

    bandwidth: float
    arithmetic: float

    def floor(self, moved: float, operations: float) -> float:
        """The least seconds for bytes moved and operations done side by side."""
        return max(moved / self.bandwidth, operations / self.arithmetic)


def floor_seconds(passes: Iterable[Pass], peaks: Peaks, element_size: int) -> float:
    """The least time for all passes, one after the other, elements of `element_size` bytes each."""
    return sum(peaks.floor(p.elements * element_size, 2 * p.multiply_adds) for p in passes)


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Copy bandwidth, and the best arithmetic rate of large products in `dtype`.

    The rate is the best over a matrix product and two large convolutions, since PyTorch may take
    them to different libraries. TF32 counts only as far as the caller's settings allow it.
    """
    with torch.inference_mode():
        return Peaks(_bandwidth(device), _arithmetic(device, dtype))


def _bandwidth(device: torch.device) -> float:
    # Many times any cache: 256 MiB beside a CPU's, 1 GiB beside a GPU's.
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def _arithmetic(device: torch.device, dtype: torch.dtype) -> float:
    gpu = device.type == "cuda"
    width = 8192 if gpu else 1536
    batch = 256 if gpu else 4

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    a, b = random(width, width), random(width, width)
    rates = [2 * width**3 / _best(lambda: a @ b, device)]
    image = random(batch, 256, 28, 28).to(memory_format=torch.channels_last)
    for kernel in (1, 3):
        weight = random(256, 256, kernel, kernel).to(memory_format=torch.channels_last)
        seconds = _best(lambda w=weight, p=kernel // 2: F.conv2d(image, w, padding=p), device)
        rates.append(2 * image.numel() * weight[0].numel() / seconds)
    return max(rates)


def _best(call: Any, device: torch.device, calls: int = 12) -> float:
    times_of(call, device, 2)
    return min(times_of(call, device, calls))


def reset_peak_memory() -> None:
    """Lets `peak_memory` start anew from what this process holds now, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Most bytes resident in this process since `reset_peak_memory`; None where unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
