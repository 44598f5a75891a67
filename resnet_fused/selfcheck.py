"""`python -m resnet_fused.selfcheck`: whether this machine's kernels compute what they should.

    python -m resnet_fused.selfcheck                      the backends with kernels for this GPU
    python -m resnet_fused.selfcheck --backend cuda --only stem head --json checks.json

Each kernel family of a backend (of `cuda`, each tile of its convolutions) is one check. Checks run
in child processes with a time limit, and one that crashes, hangs or fails takes its process along,
but no other check. The cases are those of `resnet_fused/testing/selfcheck_cases.py`; on a GPU each
runs many times, because a race is wrong only now and then. With --here they run in this process,
small ones and each once, as a sanitizer or debugger wants them:

    compute-sanitizer --tool racecheck python -m resnet_fused.selfcheck --backend cuda --here

With --record the verdicts are kept beside the tuning cache, where every process finds them before
it uses a kernel (`resnet_fused/backends/autotune/families.py`). The exit status is 1 if a check
failed. Backend `cuda_sim` and Triton's interpreter run it without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import fcntl
import json
import multiprocessing
import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import backends, env, settings
from .backends import Backend
from .backends.autotune import families
from .backends.cuda import CudaBackend
from .backends.reference import ReferenceBackend
from .testing.selfcheck_cases import CONVOLUTION, FAMILIES, QUANTIZED, TRAINING, cases, check_case

SIMULATED_SMS = 4
_REPEATS_ON_GPU = 20
_SECONDS_TO_DIE = 10.0
_SPINS = 2**22  # tries of a barrier, each of some hundred nanoseconds or more
_SECONDS_TO_START = 120.0
# What is checked is each kernel as it comes, not the one that a measurement prefers.
_AS_IT_COMES = {"RESNET_FUSED_TUNE": "off", "RESNET_FUSED_SELFCHECK": "off"}
# The candidates that the families of `cuda` are about, where an op has several, by what a family of
# its own adds to the op's name.
_KERNELS: dict[str, dict[str, str | None]] = {
    "bottleneck": {"": "cuda fused", " sm90": "cuda fused sm90"},
    "stem": {"": "cuda fused"},
    "image_stem": {"": "cuda fused"},
    "head": {"": "cuda linear"},
}


class Result(NamedTuple):
    """What a check found.

    status: passed; wrong (a result differs); error (an exception); crashed; timed out; no memory
    (which says nothing of the kernel, and is no verdict); or unavailable, where the kernel serves
    none of the cases on this machine.
    """

    check: str
    status: str
    seconds: float
    passed: list[str]  # cases
    skipped: list[str]  # cases that the kernel does not serve
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.status not in ("passed", "unavailable")


class Check(NamedTuple):
    """A kernel family of a backend; `run`, called in the process that is to check it, yields the
    name of each case, then whether it was served. It raises AssertionError where one is wrong."""

    name: str
    run: Callable[[], Iterator[tuple[str, bool | None]]]


def _run(
    backend: str, family: str, kernel: str | None, small: bool
) -> Iterator[tuple[str, bool | None]]:
    device = _device(backend)
    num_sms, repeats = SIMULATED_SMS, 1
    full = device == "cuda" and not small
    if full:
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        repeats = _REPEATS_ON_GPU
    implementation = backends.get(backend)
    # A sanitizer's instrumentation makes waits long, and ends what hangs itself.
    with _bounded_waits(implementation) if full else contextlib.nullcontext():
        for case in cases(family, implementation, device, num_sms, every_dtype=full):
            yield case.name, None
            yield case.name, check_case(implementation, case, kernel, repeats)


@contextlib.contextmanager
def _bounded_waits(backend: Backend) -> Iterator[None]:
    """Makes our CUDA kernels give up at a barrier after a while, and an error say at which."""
    if not isinstance(backend, CudaBackend):
        yield
        return
    extension = backend.extension
    extension.cuda_set_spin_limit(torch.cuda.current_device(), _SPINS)
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{error}\n{extension.cuda_stuck_barrier()}".rstrip()) from error


def _device(backend: str) -> str:
    on_gpu = backend in backends.PREFERENCE["cuda"] and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"


def checks(backend: str, small: bool = False) -> list[Check]:
    """Those of a backend, named as its candidates name their families; of the CUDA kernels one for
    each tile of a convolution. `small`: at the size of `SIMULATED_SMS`, each case once."""
    implementation = backends.get(backend)
    found = []
    for family in FAMILIES:
        if family == TRAINING and implementation.training is None:
            continue
        listed = {
            QUANTIZED: "quantized_conv",
            "squeeze_excite": family,
            "image_stem": family,
        }.get(family, "conv_bn")
        lists_kernels = getattr(type(implementation), listed) is not getattr(
            ReferenceBackend, listed
        )
        if family != TRAINING and not lists_kernels:
            continue
        kernels: dict[str, str | None] = {f"{backend} {family}": None}
        if isinstance(implementation, CudaBackend):
            named = _KERNELS.get(family, {"": None})
            kernels = {f"{backend} {family}{more}": kernel for more, kernel in named.items()}
            if family in (CONVOLUTION, QUANTIZED):
                quantized = family == QUANTIZED
                tiles = implementation.quantized_tiles if quantized else implementation.tiles
                kernels = {f"{backend} {family} {tile}": f"cuda {tile}" for tile in tiles}
            elif family == TRAINING:  # the pieces as they are chosen, then each tile
                tiles = implementation.training_tiles
                kernels |= {f"{backend} {family} {tile}": f"cuda {tile}" for tile in tiles}
        for name, kernel in kernels.items():
            found.append(Check(name, partial(_run, backend, family, kernel, small)))
    return found


def _messages(run: Callable[[], Iterator[tuple[str, bool | None]]]) -> Iterator[tuple[str, Any]]:
    """What a check yields, then how it ended: ("", True), or in a word that it did not, and why."""
    try:
        yield from run()
        yield "", True
    except AssertionError as error:
        yield "wrong", str(error)
    except torch.OutOfMemoryError as error:  # another program has it
        yield "no memory", str(error)
    except Exception as error:
        yield "error", f"{type(error).__name__}: {error}"


def _serve(connection: Connection) -> None:
    """Runs the checks that come in, in a child process, and tells what happens to each."""
    faulthandler.enable()
    os.environ.update(_AS_IT_COMES)
    connection.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            for message in _messages(connection.recv()):
                connection.send(message)


class _Progress:
    """What is known of a check that runs."""

    def __init__(self, check: Check) -> None:
        self.at = "its start"
        self._check = check
        self._start = time.monotonic()
        self._passed: list[str] = []
        self._skipped: list[str] = []

    def hear(self, name: str, outcome: bool | str | None) -> Result | None:
        """Takes one of its messages; gives the result where that was the last one."""
        if isinstance(outcome, str):
            return self.result(name, outcome if self.at in outcome else f"{self.at}: {outcome}")
        if not name:
            return self.result("passed" if self._passed else "unavailable")
        if outcome is None:
            self.at = name
        else:
            (self._passed if outcome else self._skipped).append(name)
        return None

    def result(self, status: str, detail: str = "") -> Result:
        taken = round(time.monotonic() - self._start, 2)
        return Result(self._check.name, status, taken, self._passed, self._skipped, detail)


def run_here(check: Check) -> Result:
    """The check's result, from this process, which it may take along."""
    progress = _Progress(check)
    heard = (progress.hear(*message) for message in _messages(check.run))
    return next(result for result in heard if result is not None)


class Worker:
    """A child process that runs one check after the other, and a new one after it died."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Any = None

    def run(self, check: Check, seconds: float) -> Result:
        """The check's result; the process is killed after `seconds`."""
        progress = _Progress(check)
        healthy = False
        try:
            if self._process is None:
                self._start()
            progress = _Progress(check)  # the start does not count
            end = time.monotonic() + seconds
            self._connection.send(check.run)
            while self._connection.poll(max(0.0, end - time.monotonic())):
                if (result := progress.hear(*self._connection.recv())) is not None:
                    healthy = result.status != "error"  # a GPU's context may be lost after one
                    return result
            return progress.result("timed out", f"no end within {seconds:.0f} s, in {progress.at}")
        except (EOFError, OSError):
            self._process.join(_SECONDS_TO_DIE)
            return progress.result("crashed", f"{_death(self._process.exitcode)}, in {progress.at}")
        finally:
            if not healthy:
                self.stop()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        if self._connection.poll(_SECONDS_TO_START):
            self._connection.recv()

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join(_SECONDS_TO_DIE)  # a GPU may take its time to stop a kernel
            self._connection.close()
            self._process = None


def _death(code: int | None) -> str:
    if code is None or code >= 0:
        return f"it ended with exit status {code}"
    return f"it died of {signal.Signals(-code).name}"


def supervise(
    wanted: Sequence[Check], seconds: float, jobs: int, report: Callable[[Result], None]
) -> list[Result]:
    """Runs the checks in `jobs` processes; `report` is given each result as it stands."""
    waiting: queue.SimpleQueue[Check] = queue.SimpleQueue()
    for check in wanted:
        waiting.put(check)
    results: queue.SimpleQueue[Result | None] = queue.SimpleQueue()

    def work() -> None:
        worker = Worker()
        try:
            while True:
                results.put(worker.run(waiting.get_nowait(), seconds))
        except queue.Empty:
            pass
        finally:
            worker.stop()
            results.put(None)

    found = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work) for _ in range(jobs)]
        running = jobs
        while running:
            result = results.get()
            if result is None:
                running -= 1
                continue
            found.append(result)
            report(result)
        for future in futures:
            future.result()
    return found


@contextlib.contextmanager
def _alone(record: bool) -> Iterator[None]:
    """Lets one process of the machine record at a time."""
    if not record:
        yield
        return
    folder = settings.cache_directory()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "selfcheck.running", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m resnet_fused.selfcheck",
        description="Holds every kernel family against the reference, in child processes.",
    )
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=backends.NAMES,
        help="those with kernels that can run here: cuda, triton, cudnn; cpu",
    )
    parser.add_argument("--only", nargs="+", metavar="WORD", help="checks whose name has the word")
    parser.add_argument("--seconds", type=float, default=120.0, help="for one check (%(default)s)")
    parser.add_argument("--jobs", type=int, help="checks at a time (on a GPU 4, else 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument(
        "--record",
        action="store_true",
        help="keep the verdicts; check what has not passed",
    )
    parser.add_argument(
        "--here", action="store_true", help="in this process, small and once, for a sanitizer"
    )
    options = parser.parse_args(arguments)
    if options.here and options.record:
        parser.error("--here checks less than --record has to; use one of them")
    gpu = torch.cuda.is_available()
    options.jobs = options.jobs or (4 if gpu else 1)
    options.backend = options.backend or (["cuda", "triton", "cudnn"] if gpu else ["cpu"])
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if every check passed that this machine can run."""
    options = _options(arguments)
    wanted: list[Check] = []
    unavailable = {name: backends.unavailable(name) for name in options.backend}
    for name in options.backend:
        if unavailable[name] is None:
            wanted += checks(name, options.here)
    if options.only:
        wanted = [c for c in wanted if any(word in c.name.split() for word in options.only)]
    device = torch.device(_device(options.backend[0]))
    done: list[Result] = []

    def report(result: Result) -> None:
        done.append(result)
        count = f"{len(result.passed)} of {len(result.passed) + len(result.skipped)} cases"
        line = f"{result.status:12} {result.check:32} {result.seconds:6.1f} s  {count}"
        print(f"{line}  {result.detail}".rstrip(), flush=True)
        if options.record and result.status != "no memory":
            passed = result.status == "passed"
            verdict = result.seconds if passed else f"{result.status} {result.detail}".rstrip()
            families.record({result.check: verdict}, device)
        if options.json:
            record = {
                "machine": env.machine(device),
                "versions": env.versions("resnet-fused", "torch", "triton"),
                **env.commit(Path(__file__).parent),
                "unavailable": {name: why for name, why in unavailable.items() if why},
                "checks": [result._asdict() for result in done],
            }
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n")

    for name, reason in unavailable.items():
        if reason is not None:
            print(f"{'unavailable':12} {name}: {reason}")
    if not wanted:
        print("There is nothing to check; see python -m resnet_fused.env.", file=sys.stderr)
        return 1
    with _alone(options.record):
        known = families.recorded(device) if options.record else {}
        passed = {name for name, verdict in known.items() if isinstance(verdict, float)}
        wanted = [check for check in wanted if check.name not in passed]
        if options.here:
            os.environ.update(_AS_IT_COMES)
            for check in wanted:
                report(run_here(check))
        else:
            supervise(wanted, options.seconds, options.jobs, report)
    return int(any(result.failed for result in done) or any(unavailable.values()))


if __name__ == "__main__":
    sys.exit(main())
