"""How long a GPU takes for a call."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

# Written between two calls: more than any L2 cache holds, and long enough in the writing for the
# host to queue the next call meanwhile, so that the host's time is not measured.
_FLUSHED_BYTES = 2**28
_MILLISECONDS = 20  # of calls, for each candidate


def measure(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds that `device` takes for `call`, its caches cold."""
    with torch.cuda.device(device):
        cache = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device)

        def milliseconds(calls: int) -> float:
            spans = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(calls)]
            for start, end in spans:
                cache.zero_()
                start.record()
                call()
                end.record()
            torch.cuda.synchronize()
            return statistics.median(start.elapsed_time(end) for start, end in spans)

        call()
        rough = milliseconds(3)
        return milliseconds(min(50, max(5, round(_MILLISECONDS / max(rough, 1e-3))))) / 1e3
