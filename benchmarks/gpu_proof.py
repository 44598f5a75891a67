"""What only a GPU can show, in calls that fit where GPU time is lent by the minute.

    python benchmarks/gpu_proof.py first --out DIR       9 minutes that tell most
    python benchmarks/gpu_proof.py training --out DIR    a training step beside its peers
    python benchmarks/gpu_proof.py tuning --out DIR      choices of kernels, then every peer
    python benchmarks/gpu_proof.py checks --out DIR      every test that needs a GPU, sanitizer
    python benchmarks/gpu_proof.py first --list          the steps, their commands and seconds

Each call stands alone: its first step compiles the extension into the tree, for this GPU's
architecture only, which takes seconds where that is done already. A step is a child process with a
time limit of its own, which is stopped, with all that it started, when it is over; the call ends
when its seconds do. Results go to benchmarks/results/GPU/, each as soon as it stands, and after
each step, also when the call is stopped by a signal, they are packed into DIR/CALL.tar.gz, beside
DIR/call_CALL.json, which says what became of every step. --arch, --dtype, --batch and --peers
narrow or move what is measured; --steps takes some steps of a call, --skip leaves some out.

Works offline where torch, triton, nvcc, cmake, ninja, pybind11, pytest and pytest-xdist are
installed. `--rehearse` goes through the same steps without a GPU: on the simulator and small sizes,
skipping what needs hardware, into build/rehearsal/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
SECONDS = {"first": 540, "training": 570, "tuning": 570, "checks": 570}
_PRINTED = 4000  # characters of each command's output; the log has all
_SECONDS_TO_END = 8  # that a step has to keep what it has, before it is killed
_SECONDS_TO_PACK = 3


class Step(NamedTuple):
    """Commands that run one after the other in the root of the tree.

    estimate: seconds that they are expected to take on an H100; limit: that they may take.
    needs: programs and files of the tree, without one of which the step is skipped.
    """

    name: str
    estimate: int
    limit: int
    commands: list[list[str]]
    environment: dict[str, str] = {}  # noqa: RUF012  (never changed)
    needs: tuple[str, ...] = ()
    hardware: bool = False  # whether a rehearsal has to do without


class Gpu(NamedTuple):
    """The GPU's name as a folder's, and its architecture as nvcc calls it."""

    name: str
    architecture: str

    @property
    def model(self) -> str | None:
        """predict.py's name for it."""
        return next((chip for chip in ("h100", "h200") if chip in self.name), None)


REHEARSAL = Gpu("rehearsal", "90a")


def find_gpu() -> Gpu:
    """What nvidia-smi says of the first GPU; SystemExit where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
        name, capability = answer.stdout.splitlines()[0].rsplit(",", 1)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        raise SystemExit(f"no NVIDIA GPU found by nvidia-smi ({error}); see --rehearse") from error
    number = capability.strip().replace(".", "")
    # wgmma belongs to one architecture, not to later ones.
    architecture = number + "a" * (number == "90")
    name = re.sub(r"\W+", "_", name.lower().removeprefix("nvidia ")).strip("_")
    return Gpu(name, architecture)


def build(options: argparse.Namespace, gpu: Gpu) -> Step:
    """In the tree, so that whatever runs from its root finds it; with the simulator, which the
    primitives' tests hold against the hardware."""
    environment = {
        "RESNET_FUSED_CUDA": "on",
        "RESNET_FUSED_CUDA_ARCHS": gpu.architecture,
        "RESNET_FUSED_HOST_SIM": "on",
    }
    command = [PYTHON, "setup.py", "build_ext", "--inplace"]
    return Step("build", 90, 200, [command], environment)


def environment(options: argparse.Namespace, gpu: Gpu) -> Step:
    """What is installed, and the GPU's clocks and power as they are found."""
    commands = [[PYTHON, "-m", "resnet_fused.env"]]
    if not options.rehearse:
        commands.append(["nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE"])
    return Step("environment", 8, 40, commands)


_BY_HEURISTIC = {"RESNET_FUSED_TUNE": "off"}


def selfcheck(options: argparse.Namespace, gpu: Gpu) -> Step:
    """Every kernel family and every tile, exact on integers, at sizes that fill the GPU. What has
    not passed is left out of all later steps, as it is for users."""
    command = [
        PYTHON,
        "-m",
        "resnet_fused.selfcheck",
        "--json",
        f"{options.results}/selfcheck.json",
    ]
    if options.rehearse:
        command += ["--backend", "cuda_sim", "--only", "m128n64_sm90", "stem", "head"]
        return Step("selfcheck", 50, 120, [command], {"RESNET_FUSED_HOST_SIM_CAPABILITY": "90"})
    command += ["--record", "--seconds", "120", "--jobs", "12"]
    return Step("selfcheck", 60, 150, [command])


def primitives(options: argparse.Namespace, gpu: Gpu) -> Step:
    """In one process, which compiles them once."""
    command = [PYTHON, "-m", "pytest", "-q", "-m", "gpu", "tests/test_host_sim.py"]
    return Step("primitives", 40, 90, [command], needs=("nvcc",), hardware=True)


def peaks(options: argparse.Namespace, gpu: Gpu) -> Step:
    """Compiled and run: L2, DRAM, mma.sync and wgmma, whose numbers feed the model of time."""
    source, program = "benchmarks/microbenchmarks/peaks.cu", f"{options.results}/peaks"
    code = f"arch=compute_{gpu.architecture},code=sm_{gpu.architecture}"
    compile_ = ["nvcc", "-std=c++17", "-O3", "-Icsrc", "-gencode", code, source, "-o", program]
    run = [program, f"{options.results}/peaks.json"]
    return Step("peaks", 15, 60, [compile_, run], needs=("nvcc",), hardware=True)


def layers(options: argparse.Namespace, gpu: Gpu) -> Step:
    batch = max(options.batch or [256])
    command = [PYTHON, "benchmarks/layers.py", "--arch", options.arch, "--dtype", options.dtype]
    command += ["--batch", str(batch), "--json", f"{options.results}/layers_{batch}.json"]
    if options.rehearse:
        command += ["--device", "cpu", "--size", "32", "--rounds", "1"]
    else:
        command += ["--backends", "cuda", "--kernels", "--rounds", "3"]
    return Step("layers", 60, 110, [command], _BY_HEURISTIC)


def throughput(options: argparse.Namespace, gpu: Gpu) -> Step:
    """CUDA graphs: ours by the heuristics, cuDNN's fused ops, torch.compile."""
    command = _throughput(options, "throughput", options.batch or [256, 1])
    if options.rehearse:
        command += ["--peers", *(options.peers or ["eager"]), "--quick"]
    else:
        command += ["--ours", "cuda-graph", "--rounds", "5", "--answer-seconds", "90"]
        command += ["--peers", *(options.peers or ["cudnn-graph", "compile-reduce-overhead"])]
    return Step("throughput", 150, 200, [command], _BY_HEURISTIC)


def _throughput(options: argparse.Namespace, name: str, batch: Sequence[int]) -> list[str]:
    command = [PYTHON, "benchmarks/throughput.py", "--arch", options.arch, "--dtype", options.dtype]
    command += ["--batch", *map(str, batch), "--json", f"{options.results}/{name}.json"]
    command += ["--plot", f"{options.results}/{name}.png"]
    if options.rehearse:
        return [*command, "--device", "cpu", "--size", "32"]
    return [*command, "--device", "cuda"]


# Kernels of a ResNet-50, each bound by something else.
PROFILED = (
    "conv_bn 3×3/1 64→64 on 56×56, cuda m128n64_sm90",
    "conv_bn 1×1/1 64→256 on 56×56 + shortcut, cuda m128n128_sm90",
    "conv_bn 3×3/1 256→256 on 14×14, cuda m128n128_sm90",
    "conv_bn 3×3/1 256→256 on 14×14, cuda m200n128_sm90_lines",
    "conv_bn 3×3/1 256→256 on 14×14, cuda m128n128",
    "bottleneck/1 256→64→256 on 56×56, cuda fused sm90",
    "stem 7×7/2 3→64 on 224×224, cuda fused",
)


def profile(options: argparse.Namespace, gpu: Gpu) -> Step:
    """Some launches under Nsight Compute, which leaves the clocks alone and sees our kernels."""
    command = ["ncu", "--clock-control", "none", "--set", "full", "--page", "raw", "--csv"]
    command += ["--kernel-name-base", "demangled", "--kernel-name", "regex:resnet_fused"]
    command += ["--log-file", f"{options.results}/ncu.csv", PYTHON, "benchmarks/layers.py"]
    command += ["--dtype", options.dtype, "--batch", "256", "--backends", "cuda"]
    command += ["--once", *PROFILED]
    return Step("profile", 60, 110, [command], _BY_HEURISTIC, needs=("ncu",), hardware=True)


def prediction(options: argparse.Namespace, gpu: Gpu) -> Step:
    """What the model of time says of this build, beside what was measured."""
    predict, results = "benchmarks/predict.py", options.results
    batch = max(options.batch or [256])
    command = [PYTHON, predict, "--arch", options.arch, "--batch", str(batch)]
    command += ["--dtype", options.dtype, "--gpu", gpu.model or "h100"]
    command += ["--json", f"{results}/predicted.json"]
    command += ["--measured", f"{results}/throughput.json", f"{results}/layers_{batch}.json"]
    return Step("prediction", 30, 90, [command], needs=(predict,))


def training(options: argparse.Namespace, gpu: Gpu) -> Step:
    peers = options.peers or ["eager channels_last", "torch.compile"]
    command = _training(options, "training")
    ours = ["resnet_fused cuda", "resnet_fused cuda, graph", "resnet_fused triton"]
    only = ["--only", *ours, *peers]
    return Step("training", 170, 230, [[*command, *only]], _BY_HEURISTIC)


def training_tuned(options: argparse.Namespace, gpu: Gpu) -> Step:
    """The kernels measured; the cache keeps what a stopped run has measured."""
    command = [*_training(options, "training_tuned"), "--only", "resnet_fused"]
    return Step("training_tuned", 120, 170, [command], hardware=True)


def _training(options: argparse.Namespace, name: str) -> list[str]:
    command = [PYTHON, "benchmarks/training.py", "--model", options.arch, "--seconds", "0.5"]
    command += ["--dtype", options.dtype, "--json", f"{options.results}/{name}.json"]
    if options.rehearse:
        return [*command, "--device", "cpu", "--size", "32", "--batch", "2"]
    return [*command, "--batch", *map(str, options.batch or [256])]


def tune(options: argparse.Namespace, gpu: Gpu) -> Step:
    """The cache, which lies among the results, keeps what a stopped run has measured."""
    command = [PYTHON, "-m", "resnet_fused.tune", "--arch", options.arch, "--dtype", options.dtype]
    command += ["--batch", *map(str, options.batch or [256, 1])]
    return Step("tune", 180, 240, [command], hardware=True)


def peers(options: argparse.Namespace, gpu: Gpu) -> Step:
    """Ours with the choices that were made, beside every peer; what compiles for minutes last."""
    command = _throughput(options, "throughput_tuned", options.batch or [256, 1])
    command += ["--warm", "--quick", "--rounds", "5", "--answer-seconds", "60"]
    if not options.rehearse:
        command += ["--ours", "resnet_fused-graph", "cuda-graph", "triton-graph"]
    command += ["--peers", *(options.peers or ["all"])]
    return Step("peers", 230, 300, [command])


def sanitizer(options: argparse.Namespace, gpu: Gpu) -> Step:
    """The cases of the self-check, small, under each tool; every tensor in memory of its own, so
    that what lies beyond it is nobody's."""
    check = [PYTHON, "-m", "resnet_fused.selfcheck", "--here", "--backend"]
    if options.rehearse:
        command = [*check, "cuda_sim", "--only", "m128n64_sm90", "stem"]
        return Step("sanitizer", 60, 180, [command], {"RESNET_FUSED_HOST_SIM_CAPABILITY": "90"})
    tools = ("memcheck", "racecheck", "initcheck", "synccheck")
    commands = [
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *check, "cuda"]
        for tool in tools
    ]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step("sanitizer", 110, 240, commands, environment, needs=("compute-sanitizer",))


def tests(options: argparse.Namespace, gpu: Gpu) -> Step:
    """All that need a GPU but the primitives', a process for each core; Triton's kernels compile
    once, into a cache on disk. Stopped, pytest still names what has failed."""
    command = [PYTHON, "-m", "pytest", "-q", "-m", "gpu", "-n", "auto", "--timeout", "120"]
    command += ["tests", "--ignore", "tests/test_host_sim.py"]
    return Step("tests", 130, 260, [command], _BY_HEURISTIC, hardware=True)


Maker = Callable[[argparse.Namespace, Gpu], Step]
# The most telling steps first: where the seconds run out, the last ones are left out.
CALLS: dict[str, tuple[Maker, ...]] = {
    "first": (
        *(build, environment, selfcheck, layers, throughput),
        *(profile, peaks, prediction, primitives),
    ),
    "training": (build, environment, selfcheck, training, training_tuned),
    "tuning": (build, environment, selfcheck, tune, peers),
    "checks": (build, environment, selfcheck, tests, sanitizer),
}


def steps_of(options: argparse.Namespace, gpu: Gpu) -> list[Step]:
    """The steps of the call that were asked for."""
    return [
        step
        for step in (make(options, gpu) for make in CALLS[options.call])
        if step.name not in options.skip and (not options.steps or step.name in options.steps)
    ]


class Outcome(NamedTuple):
    """What became of a step: passed, failed, timed out, skipped or stopped."""

    name: str
    status: str
    seconds: float
    estimate: int
    limit: int
    commands: list[str]
    reason: str = ""


class Stopped(BaseException):
    """A signal asked the call to end."""


class Proof:
    """One call: its steps run, its outcomes written and packed as it goes."""

    def __init__(self, options: argparse.Namespace, gpu: Gpu) -> None:
        self.options, self.gpu = options, gpu
        self.folder = ROOT / options.results
        self.folder.mkdir(parents=True, exist_ok=True)
        self.outcomes: list[Outcome] = []
        self.start = time.monotonic()
        self.date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "RESNET_FUSED_CACHE_DIR": str(self.folder / "tuning"),
        }
        if options.commit:
            self.environment["RESNET_FUSED_COMMIT"] = options.commit

    def run(self, steps: Sequence[Step]) -> int:
        """0 if every step passed or was skipped for want of something."""
        left = list(steps)
        try:
            while left:
                self._record(self._step(left[0]))
                del left[0]
        except Stopped as signalled:
            for step in left:
                self._record(_outcome(step, "stopped", 0.0, str(signalled)))
        print(self.table(), flush=True)
        return int(any(o.status not in ("passed", "skipped") for o in self.outcomes))

    def _step(self, step: Step) -> Outcome:
        if self.options.rehearse and step.hardware:
            return _outcome(step, "skipped", 0.0, "a rehearsal has no GPU")
        for need in step.needs:
            if shutil.which(need) is None and not (ROOT / need).exists():
                return _outcome(step, "skipped", 0.0, f"there is no {need} here")
        reserve = _SECONDS_TO_END + _SECONDS_TO_PACK
        seconds = min(step.limit, self.start + self.options.seconds - reserve - time.monotonic())
        if seconds < 1:
            return _outcome(step, "skipped", 0.0, "the call's seconds had run out")
        start = time.monotonic()
        status, reason = "passed", ""
        with open(self.folder / f"{step.name}.log", "wb") as log:
            for command in step.commands:
                print(f"== {step.name}: {shlex.join(command)}", flush=True)
                log.write(f"$ {shlex.join(command)}\n".encode())
                log.flush()
                left = start + seconds - time.monotonic()
                code = self._command(command, step.environment, left, log)
                if code is None:
                    status, reason = "timed out", f"stopped after {seconds:.0f} s"
                    break
                if code != 0:
                    status, reason = "failed", f"exit status {code} of {shlex.join(command)}"
        _forget_places(self.folder / f"{step.name}.log")
        return _outcome(step, status, time.monotonic() - start, reason)

    def _command(
        self, command: list[str], environment: dict[str, str], seconds: float, log: Any
    ) -> int | None:
        """The exit status; None where the time was over. Its output goes to the log and, at the
        end, to standard output, so that no reader holds it up."""
        begin = log.tell()
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return child.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            return None
        finally:  # also where it has ended: what it started ends with it
            _end(child)
            with open(log.name, "rb") as written:
                written.seek(begin)
                sys.stdout.write(written.read().decode(errors="replace")[-_PRINTED:])
            sys.stdout.flush()

    def _record(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(
            f"== {outcome.name}: {outcome.status} after {outcome.seconds:.0f} s"
            f"{': ' if outcome.reason else ''}{outcome.reason}",
            flush=True,
        )
        record = {
            "call": self.options.call,
            "date": self.date,
            "gpu": self.gpu.name,
            "architecture": self.gpu.architecture,
            "rehearsal": self.options.rehearse,
            "steps": [o._asdict() for o in self.outcomes],
        }
        text = json.dumps(record, indent=1) + "\n"
        _replace(self.folder / f"call_{self.options.call}.json", text)
        if self.options.out:
            self._pack(self.options.out)

    def _pack(self, out: Path) -> None:
        """All results of this GPU, in one file, which is replaced in one step."""
        out.mkdir(parents=True, exist_ok=True)
        name = f"call_{self.options.call}.json"
        _replace(out / name, (self.folder / name).read_text())
        part = out / f"{self.options.call}.part"
        with tarfile.open(part, "w:gz") as archive:
            for file in sorted(self.folder.rglob("*")):
                if file.is_file() and not os.access(file, os.X_OK):  # programs are built anew
                    archive.add(file, Path(self.gpu.name) / file.relative_to(self.folder))
        os.replace(part, out / f"{self.options.call}.tar.gz")

    def table(self) -> str:
        """The outcomes for people."""
        lines = [f"{'step':16}{'outcome':12}{'seconds':>8}{'estimate':>10}{'limit':>7}"]
        lines += [
            f"{o.name:16}{o.status:12}{o.seconds:8.0f}{o.estimate:10}{o.limit:7}  {o.reason[:120]}"
            for o in self.outcomes
        ]
        return "\n".join(lines)


def _outcome(step: Step, status: str, seconds: float, reason: str) -> Outcome:
    commands = [shlex.join(command) for command in step.commands]
    return Outcome(
        step.name, status, round(seconds, 1), step.estimate, step.limit, commands, reason
    )


def _forget_places(log: Path) -> None:
    """Leaves out of a log, which is committed, where the tree and Python lie on this machine."""
    text = log.read_text(errors="replace")
    log.write_text(text.replace(f"{ROOT}/", "").replace(PYTHON, "python"))


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends the child's session: asks first, so that it can keep what it has, then kills."""
    with contextlib.suppress(ProcessLookupError):
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_SECONDS_TO_END)
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_SECONDS_TO_PACK)  # a GPU may take its time to stop a kernel


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `results` is set once the GPU is known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("--out", type=Path, metavar="DIR", help="pack the results here")
    parser.add_argument("--steps", nargs="+", default=[], metavar="STEP", help="only these")
    parser.add_argument("--skip", nargs="+", default=[], metavar="STEP", help="all but these")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes, instead of each step's")
    parser.add_argument(
        "--peers", nargs="+", metavar="PEER", help="as the step's program names them"
    )
    parser.add_argument("--commit", help="of the sources, where the tree's git does not know it")
    parser.add_argument("--seconds", type=int, help="of the whole call (540; 570)")
    parser.add_argument("--rehearse", action="store_true", help="the same steps without a GPU")
    parser.add_argument("--list", action="store_true", help="print the steps and run none")
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or SECONDS[options.call]
    names = {make.__name__ for make in CALLS[options.call]}
    if unknown := {*options.steps, *options.skip} - names:
        parser.error(f"{options.call} has no step {', '.join(sorted(unknown))}")
    return options


def listing(steps: Sequence[Step]) -> Iterator[str]:
    """The steps, then their sum."""
    for step in steps:
        yield f"{step.name}: about {step.estimate} s, at most {step.limit} s"
        yield from (f"    {shlex.join(command)}" for command in step.commands)
    yield f"{sum(step.estimate for step in steps)} s in all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a call; 0 if no step failed, was stopped or ran out of its time."""
    options = parse(arguments)
    gpu = REHEARSAL if options.rehearse else find_gpu()
    options.results = "build/rehearsal" if options.rehearse else f"benchmarks/results/{gpu.name}"
    steps = steps_of(options, gpu)
    if options.list:
        print("\n".join(listing(steps)))
        return 0

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def stop(number: int, _frame: object) -> None:
        for other in signals:  # one is enough: what follows ends the step and packs
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(f"the call was stopped by {signal.Signals(number).name}")

    for number in signals:
        signal.signal(number, stop)
    return Proof(options, gpu).run(steps)


if __name__ == "__main__":
    sys.exit(main())
