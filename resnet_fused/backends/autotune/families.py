"""Which kernel families run on this machine: those that its self-check has passed.

The check is made once for each GPU model, driver, torch, Triton and build, by
`python -m resnet_fused.selfcheck --record` in a process of its own, because a kernel that nobody
has seen run on this hardware may crash or hang it. What it finds is kept beside the tuning cache.
The first call on a new machine waits for it for a few seconds; families that have no verdict by
then are left out as long as the process lives, while the check goes on for the next one.
"""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from ... import _extension, settings
from ..._version import __version__
from .cache import Times, TuningCache

FILE = "selfcheck-v1.json"
FIRST_CALL_SECONDS = 8.0


class Verdicts:
    """What the self-check found, as far as this process knows. It has one; tests make others."""

    def __init__(self, start: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen) -> None:
        """`start`: how the child process is begun."""
        self._start = start
        self._found: dict[tuple[str, ...], Times] = {}
        self._checked: set[tuple[str, ...]] = set()
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def passed(self, family: str, device: torch.device) -> bool:
        """Whether kernels of the family may run on the device; warns, once, of one that may not."""
        if device.type != "cuda" or not settings.selfcheck_enabled():
            return True
        machine = environment(device)
        with self._lock:
            if family not in self._found.setdefault(machine, recorded(device)):
                self._check(machine, device)  # nobody has, or was stopped before this family
            verdict = self._found[machine].get(family, "its self-check has not ended yet")
            if isinstance(verdict, float):
                return True
            is_new = family not in self._warned
            self._warned.add(family)
        if is_new:
            warnings.warn(
                f"resnet_fused leaves out its kernels {family!r} on this machine: {verdict}. "
                "Results stay right, by other kernels. `python -m resnet_fused.selfcheck --record` "
                "repeats the check; please report what it prints.",
                stacklevel=2,
            )
        return False

    def _check(self, machine: tuple[str, ...], device: torch.device) -> None:
        """Waits a while for the check of what has no verdict yet, once in a process."""
        if machine in self._checked:
            return
        self._checked.add(machine)
        print(
            f"resnet_fused: checking the kernels on {machine[0]}, once on each machine "
            "(RESNET_FUSED_SELFCHECK=off skips it) ...",
            file=sys.stderr,
        )
        command = [sys.executable, "-m", "resnet_fused.selfcheck", "--record"]
        # Not on a terminal, its lines would be noise in somebody's log.
        output = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
        start = time.monotonic()
        child = self._start(command, stdout=output, stderr=output, start_new_session=True)
        try:
            child.wait(FIRST_CALL_SECONDS)
        except subprocess.TimeoutExpired:
            print("resnet_fused: the check goes on beside this program.", file=sys.stderr)
        found = self._found[machine] = recorded(device)
        taken = time.monotonic() - start
        print(f"resnet_fused: {len(found)} families checked in {taken:.0f} s.", file=sys.stderr)


def record(found: Times, device: torch.device) -> None:
    """Keeps what a self-check found: by family, the seconds it took or what failed."""
    _file().put("|".join(environment(device)), found)


def recorded(device: torch.device) -> Times:
    """What is kept for this machine."""
    return _file().get("|".join(environment(device))) or {}


def _file() -> TuningCache:
    return TuningCache(settings.cache_directory() / FILE)


@functools.cache
def environment(device: torch.device) -> tuple[str, ...]:
    """What measured times and verdicts are true for."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return (
        torch.cuda.get_device_name(device),
        f"driver {_driver()}",
        f"resnet_fused {__version__} {_build()}",
        f"torch {torch.__version__}",
        f"triton {triton}",
    )


def _build() -> str:
    """The compiled extension, by its content."""
    if _extension.available() is not None:
        return "without extension"
    file = _extension.load().__file__
    return "build " + hashlib.sha1(Path(str(file)).read_bytes()).hexdigest()[:10]


def _driver() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
        return words[words.index("Module") + 1].strip()
    except (OSError, ValueError, IndexError):
        version: Callable[[], int] = torch._C._cuda_getDriverVersion  # type: ignore[attr-defined]
        return f"for CUDA {version()}"


passed = Verdicts().passed
