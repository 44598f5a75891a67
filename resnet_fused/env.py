"""`python -m resnet_fused.env`: what this machine, installation and build offer, and why not more.

Each part is found out on its own; one that cannot be is printed with the reason, so the report is
always complete and the exit status always 0, PyTorch missing or broken included.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata


def versions(*packages: str) -> dict[str, str | None]:
    """The installed version of each package, None where it is absent; and Python's own."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _versions() -> Iterator[tuple[str, str]]:
    for package, version in versions("resnet_fused", "torch", "torchvision", "triton").items():
        yield package, version or "not installed"


def _processor() -> Iterator[tuple[str, str]]:
    import torch

    from .testing.machine import describe

    facts = describe(torch.device("cpu"))
    yield "system", facts["system"]
    yield "CPU", f"{facts['cpu']}, {facts['cores']} cores: {' '.join(facts['cpu_flags'])}"


def _gpus() -> Iterator[tuple[str, str]]:
    import torch

    from .testing.machine import describe

    if not torch.cuda.is_available():
        yield "GPU", f"none that torch can use (torch is built for CUDA {torch.version.cuda})"
        return
    for index in range(torch.cuda.device_count()):
        facts = describe(torch.device("cuda", index))
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
    if not info["cuda"]:
        yield "CUDA part", f"left out: {info['cuda_note']}"
        return
    names = " ".join(f"sm_{a}" for a in info["cuda_architectures"].split())
    yield "CUDA part", f"{info['cuda_note']}; {names}; PTX {info['cuda_ptx'] or 'none'}"


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
    from .settings import VARIABLES

    for variable in VARIABLES:
        value = os.environ.get(variable.name)
        shown = f"{variable.default} (default)" if value is None else value
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


if __name__ == "__main__":
    print(report())
    sys.exit(0)
