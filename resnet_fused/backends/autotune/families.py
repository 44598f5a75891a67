"""Which kernel families run on this machine: those that its self-check has passed.

The check is made once for each GPU model, driver, torch, Triton and build, by
`python -m resnet_fused.selfcheck --record` in a process of its own, because a kernel that nobody
has seen run on this hardware may crash or hang it. What it finds is kept beside the tuning cache.
The first call on a new machine waits for it for a few seconds. Families that have no verdict by
then are left out until they have one: a thread looks for it, and tells those that choose kernels.
"""

from __future__ import annotations

import contextlib
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
_SECONDS_BETWEEN_LOOKS = 1.0

_Machine = tuple[str, ...]


class Verdicts:
    """What the self-check found, as far as this process knows. It has one; tests make others.

    Attributes:
        listeners: called, from a thread, when families have passed that had been left out.
    """

    def __init__(self, start: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen) -> None:
        """`start`: how the child process is begun."""
        self.listeners: list[Callable[[], object]] = []
        self._start = start
        self._found: dict[_Machine, Times] = {}
        self._until: dict[_Machine, float] = {}  # when calls stop waiting, of machines checked
        self._checking: set[_Machine] = set()
        self._warned: set[str] = set()
        self._news = threading.Condition()

    def passed(self, family: str, device: torch.device) -> bool:
        """Whether kernels of the family may run on the device; warns, once, of one that may not."""
        if device.type != "cuda" or not settings.selfcheck_enabled():
            return True
        machine = environment(device)
        with self._news:
            if family not in self._found.setdefault(machine, _recorded(machine)):
                self._wait(family, machine)  # nobody has, or was stopped before this family
            verdict = self._found[machine].get(family)
            if isinstance(verdict, float):
                return True
            if verdict is None and machine in self._checking:
                return False  # for now
            is_new = family not in self._warned
            self._warned.add(family)
        if is_new:
            warnings.warn(
                f"resnet_fused leaves out its kernels {family!r} on this machine: "
                f"{verdict or 'its self-check did not end'}. "
                "Results stay right, by other kernels. `python -m resnet_fused.selfcheck --record` "
                "repeats the check; please report what it prints.",
                stacklevel=2,
            )
        return False

    def are_awaited(self, device: torch.device) -> bool:
        """Whether a self-check of the device goes on, beside which nothing should be measured."""
        return bool(self._checking) and environment(device) in self._checking

    def _wait(self, family: str, machine: _Machine) -> None:
        """Starts the check, once in a process, and waits a while for its verdict on the family."""
        if machine not in self._until:
            self._begin(machine)
        elif machine not in self._checking:
            return
        self._news.wait_for(
            lambda: family in self._found[machine] or machine not in self._checking,
            max(0.0, self._until[machine] - time.monotonic()),
        )

    def _begin(self, machine: _Machine) -> None:
        print(
            f"resnet_fused: checking the kernels on {machine[0]}, once on each machine; those not "
            f"checked within {FIRST_CALL_SECONDS:.0f} s join later (RESNET_FUSED_SELFCHECK=off "
            "skips the check) ...",
            file=sys.stderr,
        )
        command = [sys.executable, "-m", "resnet_fused.selfcheck", "--record"]
        # Not on a terminal, its lines would be noise in somebody's log.
        output = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
        self._until[machine] = time.monotonic() + FIRST_CALL_SECONDS
        self._checking.add(machine)
        child = self._start(command, stdout=output, stderr=output, start_new_session=True)
        threading.Thread(target=self._watch, args=(child, machine), daemon=True).start()

    def _watch(self, child: subprocess.Popen[bytes], machine: _Machine) -> None:
        """Takes up what the check records, until it has ended."""
        start = time.monotonic()
        has_ended = False
        while not has_ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_SECONDS_BETWEEN_LOOKS)
                has_ended = True
            found = _recorded(machine)
            with self._news:
                is_news = found != self._found[machine]
                self._found[machine] = found
                if has_ended:
                    self._checking.discard(machine)
                self._news.notify_all()
            if is_news or has_ended:
                for listener in self.listeners:
                    listener()
        taken = time.monotonic() - start
        with contextlib.suppress(OSError, ValueError):  # the program may be about to end
            print(f"resnet_fused: {len(found)} families checked in {taken:.0f} s.", file=sys.stderr)


def record(found: Times, device: torch.device) -> None:
    """Keeps what a self-check found: by family, the seconds it took or what failed."""
    _file().put("|".join(environment(device)), found)


def recorded(device: torch.device) -> Times:
    """What is kept for this machine."""
    return _recorded(environment(device))


def _recorded(machine: _Machine) -> Times:
    return _file().get("|".join(machine)) or {}


def _file() -> TuningCache:
    return TuningCache(settings.cache_directory() / FILE)


@functools.cache
def environment(device: torch.device) -> _Machine:
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


verdicts = Verdicts()
passed = verdicts.passed
