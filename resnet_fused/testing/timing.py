"""Time per call, the same way on CPU and GPU: many single times, summarised by quantiles."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


def times_of(call: Callable[[], object], device: torch.device, iterations: int) -> list[float]:
    """Seconds of each of `iterations` consecutive calls.

    On a GPU the calls are queued back to back and the gaps between CUDA events are read, so the
    host's share counts only where it holds the GPU up, as it does for a user.
    """
    if device.type == "cuda":
        return _times_on_gpu(call, device, iterations)
    times = []
    for _ in range(iterations):
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


def iterations_for(
    call: Callable[[], object], device: torch.device, seconds: float, at_least: int = 2
) -> int:
    """How many calls fill about `seconds`, judged by two calls after one that warms up."""
    times_of(call, device, 1)
    fastest = max(min(times_of(call, device, 2)), 1e-6)
    return max(at_least, math.ceil(seconds / fastest))


def quantile(values: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` (0 to 1) of `values` lie, interpolated linearly.

    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("values must not be empty.")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


class Summary(NamedTuple):
    """What rounds of times say. Rates in images per second, latencies in seconds per call.

    A round's rate is its images over its whole time; median and 10th to 90th percentile run over
    the rounds. The latencies' percentiles run over all single calls.
    """

    rate: float
    rate_low: float
    rate_high: float
    latency_p50: float
    latency_p99: float


def summarise(rounds: Sequence[Sequence[float]], batch: int) -> Summary:
    """The summary of rounds of single times (seconds) of calls on `batch` images each."""
    rates = [batch * len(times) / sum(times) for times in rounds]
    singles = [time for times in rounds for time in times]
    return Summary(
        statistics.median(rates),
        quantile(rates, 0.1),
        quantile(rates, 0.9),
        quantile(singles, 0.5),
        quantile(singles, 0.99),
    )
