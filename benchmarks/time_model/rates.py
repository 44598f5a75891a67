"""What the model of time assumes of a GPU: limits that are documented, and rates with their range.

Rates were chosen before any of our kernels ran on a GPU; each says where it comes from. The range
of a prediction comes from their ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Limits(NamedTuple):
    """Of a streaming multiprocessor (SM), by the CUDA programming guide's specifications."""

    shared: int  # KiB
    warps: int
    blocks: int
    registers: int = 65536


LIMITS = {
    "80": Limits(164, 64, 32),
    "86": Limits(100, 48, 16),
    "90a": Limits(228, 64, 32),
    "100": Limits(228, 64, 32),
    "120": Limits(100, 48, 24),
}
RESERVED = 1024  # bytes of shared memory that the system takes per block, from sm_80 on


class Gpu(NamedTuple):
    name: str
    sms: int
    limits: Limits


GPUS = {name: Gpu(f"{name.upper()} SXM", 132, LIMITS["90a"]) for name in ("h100", "h200")}


class Assumption(NamedTuple):
    """A rate: the value that makes the prediction slow, the expected one, the one that makes it
    fast; the unit; where it comes from."""

    slow: float
    expected: float
    fast: float
    unit: str
    source: str


_COMMON = {
    "clock": Assumption(
        1.5,
        1.7,
        1.755,
        "GHz",
        "boost clock 1.98 GHz, 1.755 under load in NVIDIA's own figures; lowered further by power "
        "in dense products",
    ),
    "tensor": Assumption(
        1740,
        1900,
        2048,
        "multiply-adds / cycle / SM",
        "16-bit, dense: 2,048 by the H100 whitepaper (989 TFLOP/s at 1.83 GHz); wgmma reaches "
        "93 to 97% of it for 128 and more columns (arXiv 2402.13499); twice as many of int8",
    ),
    "mma_sync": Assumption(
        0.55,
        0.62,
        0.68,
        "of the tensor rate",
        "mma.sync against wgmma on Hopper (arXiv 2402.13499: 62% on average)",
    ),
    "issue": Assumption(
        0.6, 0.75, 0.9, "of 4 warp instructions / cycle / SM", "utilisation that kernels reach"
    ),
    "shared": Assumption(
        115, 128, 128, "bytes / cycle / SM", "32 banks of 4 bytes (CUDA programming guide)"
    ),
    "l2": Assumption(
        30,
        36,
        44,
        "bytes / cycle / SM",
        "assumed, about half of the 64 of an SM's port; for all, 8 TB/s",
    ),
    "latency": Assumption(
        800,
        500,
        350,
        "cycles",
        "a load from DRAM that nothing hides (arXiv 2402.13499: about 480 unloaded)",
    ),
    "l2_latency": Assumption(
        350, 270, 220, "cycles", "the same from L2 (arXiv 2402.13499: about 260 unloaded)"
    ),
    "synchronisation": Assumption(
        300, 200, 100, "cycles", "a step that waits for its own product, and its barrier"
    ),
    "overlap": Assumption(
        0.3,
        0.15,
        0.05,
        "of the second resource's time",
        "what of the less needed resource is not hidden behind the most needed one",
    ),
    "library": Assumption(
        0.5, 0.7, 0.85, "of the tensor rate", "cuBLAS at the head's shape, which is small"
    ),
    "launch": Assumption(2.0, 1.5, 1.0, "microseconds", "between two kernels of a CUDA graph"),
}
_DRAM = {
    "h100": Assumption(
        2.7, 3.0, 3.1, "TB/s", "3.35 by the data sheet; copies reach about 90% of it"
    ),
    "h200": Assumption(
        3.9, 4.25, 4.4, "TB/s", "4.8 by the data sheet; copies reach about 90% of it"
    ),
}


def assumptions(gpu: str) -> dict[str, Assumption]:
    """All rates of a GPU of `GPUS`, by name."""
    return {**_COMMON, "dram": _DRAM[gpu]}


class Rates(NamedTuple):
    """One choice of values; units as in the assumptions."""

    clock: float
    tensor: float
    mma_sync: float
    issue: float
    shared: float
    l2: float
    latency: float
    l2_latency: float
    synchronisation: float
    overlap: float
    library: float
    launch: float
    dram: float


def rates(gpu: str, choices: Mapping[str, str] | None = None) -> Rates:
    """The expected rates but for `choices`: a field of `Assumption` ("slow", "fast") by name."""
    choices = choices or {}
    return Rates(
        **{
            name: getattr(assumption, choices.get(name, "expected"))
            for name, assumption in assumptions(gpu).items()
        }
    )
