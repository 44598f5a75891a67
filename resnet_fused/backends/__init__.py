"""Backends: each implements every op for one kind of machine. Loaded when first asked for.

What a backend is, `backends/base.py` says. To add one, write a module with a function
`create() -> Backend` (raising BackendUnavailableError where it cannot run) and name it below.
"""

from __future__ import annotations

import functools
import importlib
import re
from importlib import metadata

import torch

from ..errors import BackendUnavailableError
from .base import Backend, Candidate, Candidates

NAMES = ("cuda", "triton", "cudnn", "cpu", "cuda_sim", "reference")
# For each type of device, those that an op chooses among, the heuristic's first one first.
PREFERENCE = {"cuda": ("cuda", "triton", "cudnn", "reference"), "cpu": ("cpu", "reference")}
# What each type of device has kernels for, where they are built and its processor is not too old.
ACCELERATED = {
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
    "cpu": (torch.float32, torch.bfloat16),
}

__all__ = [
    "ACCELERATED",
    "NAMES",
    "PREFERENCE",
    "Backend",
    "Candidate",
    "Candidates",
    "fences_products",
    "get",
    "has_tensor_memory",
    "tf32_in_convolutions",
    "unavailable",
]


@functools.cache
def _load(name: str) -> Backend | BackendUnavailableError:
    module = importlib.import_module(f".{name}", __name__)
    try:
        return module.create()
    except BackendUnavailableError as error:
        return error


def get(name: str) -> Backend:
    """The backend of that name; ValueError if unknown, BackendUnavailableError if it cannot run."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(sorted(NAMES))}.")
    backend = _load(name)
    if isinstance(backend, BackendUnavailableError):
        raise BackendUnavailableError(str(backend))
    return backend


def unavailable(name: str) -> str | None:
    """Why the backend of that name cannot run here, or None when it can."""
    backend = _load(name)
    return str(backend) if isinstance(backend, BackendUnavailableError) else None


@functools.cache
def has_tensor_memory(device: torch.device) -> bool:
    """Whether its products are tcgen05's, whose accumulators stand in a memory of their own (PTX
    ISA: sm_100 and its variants, not sm_120).

    Triton compiles for them. They are twice as fast as Hopper's (CUTLASS, "Blackwell SM100 GEMMs"),
    of which mma.sync, all that our kernels for sm_80 have, reaches 62% there (arXiv 2402.13499).
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


@functools.cache
def fences_products() -> bool:
    """Whether Triton fences what asynchronous copies have written to shared memory before products
    of warp groups (wgmma, tcgen05) read it, as the PTX ISA asks for ("Async proxy").

    It does so from 3.7.1 on (triton #9610, pytorch #181248).
    """
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return False
    return tuple(map(int, re.findall(r"\d+", version)[:3])) >= (3, 7, 1)


def tf32_in_convolutions() -> bool:
    """Whether PyTorch's settings for cuDNN let convolutions round float32 operands to TF32 (this
    getter reflects `cudnn.allow_tf32` too)."""
    setting = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # replaces its module
    return setting.fp32_precision == "tf32"
