"""`python -m resnet_fused.env`: what this machine, installation and build offer, and why not more.

Each part is found out on its own; one that cannot be is printed with the reason, so the report is
always complete and the exit status always 0, PyTorch missing or broken included.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import settings

if TYPE_CHECKING:
    import torch

# CPU features that decide which kernels a library picks.
_TELLING_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_fp16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


def versions(*packages: str) -> dict[str, str | None]:
    """The installed version of each package, None where it is absent; and Python's own."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def cores() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine(device: torch.device) -> dict[str, Any]:
    """Facts about the machine, ready for JSON: CPU, memory, system, and the GPU if it is one."""
    present = set((_cpu_info("flags") or _cpu_info("Features")).split())
    facts: dict[str, Any] = {
        "cpu": _cpu_info("model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "cpu_flags": [flag for flag in _TELLING_FLAGS if flag in present],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        import torch

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


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"
    return answer.stdout.split("\n", 1)[0].strip()


def commit(folder: Path, *apart_from: str) -> dict[str, Any]:
    """The git commit that `folder` stands at and whether tracked files differ from it.

    Changes in the folders `apart_from`, named from the checkout's root, do not count. Where
    `RESNET_FUSED_COMMIT` names the commit, git is not asked: a copy's git may know another one.
    """
    if named := settings.commit():
        return {"commit": named, "dirty": None}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return answer.stdout.strip()

    try:
        others = [f":(top,exclude){name}" for name in apart_from]
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *others)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _versions() -> Iterator[tuple[str, str]]:
    for package, version in versions("resnet_fused", "torch", "torchvision", "triton").items():
        yield package, version or "not installed"


def _processor() -> Iterator[tuple[str, str]]:
    import torch

    facts = machine(torch.device("cpu"))
    yield "system", facts["system"]
    yield "CPU", f"{facts['cpu']}, {facts['cores']} cores: {' '.join(facts['cpu_flags'])}"


def _gpus() -> Iterator[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        yield "GPU", f"none that torch can use (torch is built for CUDA {torch.version.cuda})"
        return
    for index in range(torch.cuda.device_count()):
        facts = machine(torch.device("cuda", index))
        yield (
            f"GPU {index}",
            f"{facts['gpu']}, compute capability {facts['gpu_capability']}, "
            f"driver {facts['gpu_driver']}",
        )


def _extension() -> Iterator[tuple[str, str]]:
    from . import _extension

    if reason := _extension.available():
        yield "extension", f"not usable: {reason}"
        return
    info = _extension.load().build_info()
    threads = "with OpenMP" if info["openmp"] else "without OpenMP (single-threaded)"
    yield "extension", f"{info['version']}, built by {info['compiler']}, {threads}"
    yield "", str(_extension.load().__file__)
    yield "CPU kernels", _instructions(_extension.load())
    if not info["cuda"]:
        yield "CUDA part", f"left out: {info['cuda_note']}"
        return
    names = " ".join(f"sm_{a}" for a in info["cuda_architectures"].split())
    yield "CUDA part", f"{info['cuda_note']}; {names}; PTX {info['cuda_ptx'] or 'none'}"


def _instructions(extension: ModuleType) -> str:
    """The instruction sets that the CPU kernels use here, by dtype."""
    bfloat16 = extension.cpu_isa() if extension.cpu_convolves_bf16() else ""
    if extension.cpu_has_amx_bf16():
        bfloat16 = "amx" if settings.amx_enabled() else "oneDNN's, with AMX"
    int8 = extension.cpu_quantized_isas()
    if settings.amx_enabled() and "amx" in int8:
        int8 = ["amx"]
    found = {"float32": extension.cpu_isa(), "bfloat16": bfloat16, "int8": "".join(int8[:1])}
    return ", ".join(f"{dtype}: {isa or 'none'}" for dtype, isa in found.items())


def _backends() -> Iterator[tuple[str, str]]:
    from . import backends

    for name in backends.NAMES:
        try:
            reason = backends.unavailable(name) or _unserved(name)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        yield name, "available" if reason is None else f"unavailable: {reason}"


def _unserved(name: str) -> str | None:
    """Why a backend that can be loaded does not serve the current GPU, if there is one."""
    import torch

    from . import backends

    if name not in backends.PREFERENCE["cuda"] or not torch.cuda.is_available():
        return None
    return backends.get(name).unsupported(torch.device("cuda"), torch.float32)


def _variables() -> Iterator[tuple[str, str]]:
    for variable in settings.VARIABLES:
        value = os.environ.get(variable.name)
        shown = f"{variable.default} (default)" if value is None else value
        try:
            variable.value()
        except ValueError as error:
            shown = f"wrong: {error}"
        yield variable.name, f"{shown}\n{variable.meaning}"


PROBES: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "versions": _versions,
    "machine": _processor,
    "GPUs": _gpus,
    "build": _extension,
    "backends": _backends,
    "environment variables": _variables,
}


def report() -> str:
    """The report as text; never raises."""
    lines = []
    for title, probe in PROBES.items():
        lines.append(title)
        try:
            for name, value in probe():
                first, *others = value.split("\n")
                lines.append(f"  {name:<24} {first}")
                lines += [f"  {'':<24} {other}" for other in others]
        except Exception as error:  # a report that stops at the broken part helps nobody
            lines.append(f"  could not be found out: {type(error).__name__}: {error}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    argparse.ArgumentParser(
        prog="python -m resnet_fused.env",
        description="What this machine, installation and build offer, and why not more.",
    ).parse_args(arguments)
    print(report())


if __name__ == "__main__":
    main()
