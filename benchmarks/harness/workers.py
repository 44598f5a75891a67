"""A process for each implementation, so that none warms or starves what another one uses.

Workers are forked from a server that has loaded PyTorch once and has done nothing else: it runs no
thread of PyTorch and has looked at no GPU. A worker starts, waits, builds its implementation,
answers with the logits, then times a round whenever it is asked to. Between requests it sleeps in a
read from its pipe. Whatever goes wrong in it comes back as a reason; the parent neither hangs on it
nor dies with it.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from baselines import Baseline, Call, Task, UnavailableError
from numpy.typing import NDArray

from resnet_fused.backends.autotune import families
from resnet_fused.env import cores
from resnet_fused.errors import BackendUnavailableError
from resnet_fused.settings import cache_directory

from .measure import (
    Peaks,
    iterations_for,
    measure_peaks,
    peak_memory,
    reset_peak_memory,
    times_of,
)

ANSWER_SECONDS = 1200  # max-autotune on a large batch takes minutes
_PRELOAD = ["torchvision", __name__]  # and through these torch and resnet_fused
# Threads of whose turn is over go on looking for work for a while, on the next one's cores: ONNX
# Runtime's for 30 ms, libgomp's for 8 ms. In turns the next one is always the same one.
_PAUSE_SECONDS = 0.1


class FailedError(Exception):
    """A worker could not do what it was asked; the message is one line for a table."""


class Job(NamedTuple):
    """A comparison's input by file, as it travels to the workers.

    state: a state dict in `dtype`; images: an array (N, 3, H, W) of which `batch` are taken.
    """

    architecture: str
    state: Path
    images: Path
    batch: int
    dtype: torch.dtype
    device: torch.device

    def task(self) -> Task:
        images = torch.load(self.images, weights_only=True)[: self.batch]
        return Task(self.architecture, self.state, images.to(self.device, self.dtype))


class Built(NamedTuple):
    """An implementation's logits (float32, on the CPU), and seconds until it had them.

    cold_start: with every cache of compiled or tuned kernels empty. new_batch: for a batch size
    that is one less (two for one image), once it was built for the first; None if not asked for.
    """

    logits: NDArray[np.float32]
    cold_start: float
    new_batch: float | None


class Runner:
    """Lives in a worker: builds an implementation and times it."""

    def build(self, baseline: Baseline, job: Job, round_seconds: float, new_batch: bool) -> Built:
        """Builds, checks and calibrates. A start is building plus the first call, with PyTorch
        loaded; each builds its model, so reading the weights counts too."""
        task = job.task()
        self._device = job.device
        self._free = _free_on_gpu(job.device)
        self._call, logits, cold_start = _start(baseline, task)
        other = None
        if new_batch:
            images = task.images[1:] if len(task.images) > 1 else task.images.repeat(2, 1, 1, 1)
            *_, other = _start(baseline, task._replace(images=images))
        del task
        self._iterations = iterations_for(self._call, job.device, round_seconds)
        gc.collect()
        if self._free is None:
            reset_peak_memory()
        else:
            torch.cuda.empty_cache()
        return Built(logits, cold_start, other)

    def time(self, rest: float = 0.0) -> list[float]:
        """Seconds of each call of one round, after one that brings the caches back; with `rest`
        idle seconds before each."""
        if self._device.type == "cpu":
            time.sleep(_PAUSE_SECONDS)
        times_of(self._call, self._device, 1)
        return times_of(self._call, self._device, self._iterations, rest)

    def memory(self) -> int | None:
        """Bytes: on a GPU what building and running took from the device, whoever allocated it;
        on the CPU the process's peak while it was timed, Python and libraries included."""
        if self._free is None:
            return peak_memory()
        return self._free - (_free_on_gpu(self._device) or 0)


def _start(baseline: Baseline, task: Task) -> tuple[Call, NDArray[np.float32], float]:
    """The built call, its first result, and the seconds that both took."""
    start = time.perf_counter()
    call = baseline.build(task)
    logits = call().float().cpu().numpy().copy()
    return call, logits, time.perf_counter() - start


def _free_on_gpu(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.mem_get_info(device)[0]


class Truth(NamedTuple):
    """float64 logits, and those of PyTorch's own unfused ops in the tested dtype, by layout."""

    logits: NDArray[np.float64]
    eager: list[NDArray[np.float32]]


class Referee:
    """Lives in a worker: says what is right and what the machine can reach."""

    def judge(self, job: Job) -> Truth:
        """The truth for weights and images as rounded to the job's dtype."""
        task = job.task()
        model = task.torchvision(torch.float64)
        # In slices: float64 activations of a large batch would not fit.
        truth = torch.cat([model(images.double()) for images in task.images.split(16)]).cpu()
        del model
        nhwc, images = task.nhwc()
        eager = (task.torchvision()(task.images), nhwc(images))
        return Truth(truth.numpy(), [logits.float().cpu().numpy() for logits in eager])

    def peaks(self, job: Job) -> Peaks:
        """The machine's peaks in the job's dtype."""
        return measure_peaks(job.device, job.dtype)


class Worker:
    """A process that holds one object, such as a Runner or Referee, and the line to it."""

    def __init__(
        self,
        kind: Callable[[], object],
        seconds: float = ANSWER_SECONDS,
        warm: bool = False,
    ) -> None:
        """seconds: for an answer. warm: with the machine's caches of compiled and tuned kernels,
        instead of empty ones."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._folder = tempfile.TemporaryDirectory(prefix="resnet_fused_benchmark_")
        self._connection, far_end = context.Pipe()
        self._seconds = seconds
        # A forked process has the server's environment, which may be older than this one's.
        arguments = (kind, far_end, self._folder.name, warm, dict(os.environ))
        self._process = context.Process(target=_main, args=arguments, daemon=True)
        self._process.start()
        far_end.close()
        self._started = False

    def wait_until_started(self) -> None:
        """Returns once the process has loaded its modules; whether it lives, `ask` will tell."""
        if not self._started:
            self._started = True
            with contextlib.suppress(EOFError, OSError):
                self._connection.recv()

    def ask(self, method: str, *arguments: Any) -> Any:
        """What the method returns; UnavailableError or FailedError with the reason if nothing."""
        self.wait_until_started()
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(self._seconds):
                self._process.kill()  # its late answer must not be taken for the next one
                raise FailedError(f"no answer within {self._seconds:.0f} s")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)
            raise FailedError(_cause_of_death(self._process.exitcode)) from error
        if isinstance(answer, (UnavailableError, FailedError)):
            raise answer
        return answer

    def stop(self) -> None:
        """Ends the process and removes its folder."""
        self._connection.close()
        self._process.join(5)
        self._process.kill()
        self._process.join()
        self._folder.cleanup()


def _cause_of_death(code: int | None) -> str:
    if code is None or code >= 0:
        return f"process ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"process died of {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _main(
    kind: Callable[[], Any],
    connection: Connection,
    folder: str,
    warm: bool,
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)
    # Ctrl-C is the parent's to handle. What libraries print would tear its progress bar apart.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log = os.open(Path(folder, "log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    verdicts = cache_directory() / families.FILE
    for variable in (
        () if warm else ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "RESNET_FUSED_CACHE_DIR")
    ):
        os.environ[variable] = folder
    if not verdicts.exists():  # a child process with a time limit, its logits held to the truth
        os.environ["RESNET_FUSED_SELFCHECK"] = "off"
    elif not warm:
        shutil.copy(verdicts, folder)
    torch.set_num_threads(cores())
    # float32 means float32, for everybody; and PyTorch may measure which convolution is fastest.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    worker = kind()
    connection.send("started")
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:  # the parent is gone
            return
        try:
            with torch.inference_mode():
                answer = getattr(worker, method)(*arguments)
        except (UnavailableError, BackendUnavailableError) as error:
            answer = UnavailableError(str(error))
        except Exception as error:
            traceback.print_exc()
            answer = FailedError(f"{type(error).__name__}: {' '.join(str(error).split())}"[:200])
        connection.send(answer)
