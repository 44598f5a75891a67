"""What a machine is, and what it reaches: facts and measured peaks to judge timings by."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import settings
from ..env import versions as versions
from .roofline import Peaks
from .timing import times_of

# CPU features that decide which kernels a library picks.
_TELLING_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "bf16", "sve", "sve2"),
)


def cores() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device(name: str) -> torch.device:
    """For a command's option: the device, or argparse's error for one that is not there."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise argparse.ArgumentTypeError(f"{name!r} is neither cpu nor cuda nor cuda:1 and so on")
    found = torch.device(name)
    beyond = found.index is not None and found.index >= torch.cuda.device_count()
    if found.type == "cuda" and (beyond or not torch.cuda.is_available()):
        raise argparse.ArgumentTypeError(
            f"{name!r} is no GPU that PyTorch sees; see python -m resnet_fused.env"
        )
    return found


def positive(text: str) -> int:
    """For a command's option: the number, or argparse's error for one below 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def describe(device: torch.device) -> dict[str, Any]:
    """Facts about the machine, ready for JSON: CPU, memory, system, and the GPU if it is one."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": cores(),
        "cpu_flags": _cpu_flags(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["gpu_capability"] = f"{properties.major}.{properties.minor}"
        facts["gpu_memory_bytes"] = properties.total_memory
        facts["gpu_driver"] = _driver()
    return facts


def _cpu_info(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    present = set((_cpu_info("flags") or _cpu_info("Features")).split())
    return [flag for flag in _TELLING_FLAGS if flag in present]


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"
    return answer.stdout.split("\n", 1)[0].strip()


_RESULTS = ("benchmarks/results", "experiments/reports")


def commit(folder: Path) -> dict[str, Any]:
    """The git commit that `folder` stands at and whether tracked files differ from it.

    Results do not count: one of several that are made in a row would call the next one's code
    changed. Where there is no git, `RESNET_FUSED_COMMIT` names the commit.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return answer.stdout.strip()

    try:
        others = [f":(top,exclude){results}" for results in _RESULTS]
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *others)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": settings.commit(), "dirty": None}


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
