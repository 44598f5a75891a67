"""`python -m resnet_fused.selfcheck`: whether this machine's kernels compute what they should.

    python -m resnet_fused.selfcheck                      the backends with kernels for this GPU
    python -m resnet_fused.selfcheck --backend cuda --only stem head --json checks.json

Each kernel family of a backend (of `cuda`, each tile of its convolutions) is one check, in a child
process with a time limit, so that one that crashes or hangs takes no other with it. Sizes follow
the GPU: at least three tiles for each multiprocessor, so that persistent blocks go round and rings
of buffers wrap; tails in every direction; residuals, projections, strides. Values are integers (the
head's means whole 64ths), of which every correct kernel gives the same bits as float64. On a GPU
each case runs many times, because a race is wrong only now and then.

The exit status is 1 if a check failed. Backend `cuda_sim` and Triton's interpreter run it without
a GPU.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from . import backends
from .backends import Backend, LayerByLayer, tuning
from .backends.training import INVSTD, MEAN, SCALE, Activation, RawGradient
from .parameters import MaxPool
from .reference import ops as reference
from .reference.training import ReferenceTraining
from .testing import machine
from .testing.cases import (
    BlockCase,
    ConvCase,
    generator,
    make_bottleneck,
    make_identity,
    make_integers,
    make_residual,
)

SIMULATED_MULTIPROCESSORS = 4
_REPEATS_ON_GPU = 20
_SECONDS_TO_DIE = 10.0
_CONVOLUTION = "conv_bn"
# The candidate that a family's cases are for, where a backend has a choice.
_KERNELS = {"bottleneck": "fused", "stem": "fused", "head": "linear"}
# Of bottlenecks: inner channels, stride, and whether there is a projection.
_BLOCKS = ((64, 1, False), (64, 1, True), (64, 2, True), (128, 1, False), (128, 2, True))
_TRAINING = "training"
FAMILIES = (_CONVOLUTION, "bn_add_relu", *_KERNELS, _TRAINING)


class Result(NamedTuple):
    """What a check found.

    status: passed; wrong (a result differs); error (an exception); crashed; timed out; or
    unavailable, where the kernel serves none of the cases on this machine.
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


class Case(NamedTuple):
    """A call of a backend's op, or of a piece of its training; `results`: how many of those that it
    gives are exact, first ones first."""

    name: str
    op: str
    arguments: list[Any]
    results: int = 9


class _Rounded(LayerByLayer):
    """The reference in float64, each op's result rounded once, as a chain of kernels rounds it."""

    training = ReferenceTraining()

    def __getattr__(self, op: str) -> Callable[..., Tensor]:
        def run(x: Tensor, *others: Any) -> Tensor:
            out: Tensor = getattr(reference, op)(*_wide((x, *others)))
            # To the 64ths that there can be: float64 convolutions may be off by 1e-12.
            return (64 * out).round().div(64).to(x.dtype)

        return run


def _wide(values: Any) -> Any:
    """With every floating tensor in float64."""
    return tree_map(
        lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, values
    )


def _expected(case: Case) -> list[Tensor]:
    arguments = _wide(case.arguments) if case.op.startswith(_TRAINING) else case.arguments
    return tree_leaves(attrgetter(case.op)(_Rounded())(*arguments))[: case.results]


def check_case(backend: Backend, case: Case, kernel: str | None = None, repeats: int = 1) -> bool:
    """Holds a backend's result against the reference; False where `kernel` does not serve the case.

    kernel: the candidate to take; None for the one that the backend chooses.
    Raises AssertionError where the result is wrong.
    """
    op = attrgetter(case.op)(backend)
    expected = _expected(case)
    for turn in range(repeats):
        # What torch.empty returns next: an element that nobody writes shows.
        torch.full_like(expected[0], float("nan"))
        with torch.no_grad(), tuning.watch() as decisions, tuning.prefer(kernel or ""):
            out = tree_leaves(op(*case.arguments))
        if kernel is not None and all(decision.choice != kernel for decision in decisions):
            return False
        for ours, right in zip(out, expected, strict=False):
            _compare(ours, right, f"{case.name}, run {turn}")
    return True


def _compare(out: Tensor, expected: Tensor, what: str) -> None:
    if out.dim() == 3:  # sums of parts of the batch, however many parts those are
        out, expected = out.sum(0), expected.sum(0)
    if out.shape != expected.shape:
        raise AssertionError(f"{what}: {tuple(out.shape)}, expected {tuple(expected.shape)}")
    expected = expected.to(out.dtype)
    if not torch.equal(out, expected):
        wrong = (out != expected).nonzero()
        first = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{what}: {len(wrong)} of {out.numel()} elements differ, the first at {first}: "
            f"{out[first].item()}, expected {expected[first].item()}"
        )


def _convolutions(dtype: torch.dtype, device: str, multiprocessors: int) -> Iterator[Case]:
    """For each multiprocessor 2 × 128 positions, and 136 channels: with tiles of 64 or 128
    channels, three or two tiles from each 128 positions, the last one all tail."""
    rng = generator()

    def integers(name: str, case: ConvCase) -> tuple[ConvCase, Any, Any]:
        """`case` with as many images as it takes."""
        height, width = case.output_size
        case = case._replace(batch=-(-2 * 128 * multiprocessors // (height * width)))
        return case, *make_integers(case, rng, dtype, device)

    def added(case: ConvCase, x: Tensor) -> Tensor:
        return make_residual(case, x, rng).round_()

    case, *main = integers("pointwise", ConvCase(1, 72, 23, 19, 136))
    yield Case("pointwise", _CONVOLUTION, [*main, None, False])
    yield Case("residual", _CONVOLUTION, [*main, added(case, main[0]), True])
    yield Case(
        "narrower strided residual",
        _CONVOLUTION,
        [*main, make_identity(case, 104, 2, main[0], rng), True],
    )
    shortcut, projection = make_integers(
        ConvCase(case.batch, 200, 46, 38, 136, stride=2), rng, dtype, device
    )
    yield Case("projection", "conv_bn_projection", [*main, shortcut, projection])
    for name, window in {
        "pointwise strided": ConvCase(1, 64, 45, 37, 136, stride=2),
        "3x3": ConvCase(1, 72, 23, 19, 136, 3, 1, 1),
        "3x3 strided": ConvCase(1, 136, 45, 37, 136, 3, 2, 1),
        "3x3 dilated": ConvCase(1, 24, 23, 19, 136, 3, 1, 2, 2),
        "grouped": ConvCase(1, 48, 23, 19, 272, 3, 1, 1, groups=2),
        "tails": ConvCase(1, 8, 3, 3, 8, 3, 1, 1),
    }.items():
        case, *main = integers(name, window)
        yield Case(name, _CONVOLUTION, [*main, added(case, main[0]), True])


def _others(family: str, dtype: torch.dtype, device: str, multiprocessors: int) -> Iterator[Case]:
    rng = generator()
    images = 3 * multiprocessors
    if family == "bn_add_relu":
        for channels in (64, 19):
            case = ConvCase(images, 8, 11, 7, channels)
            x, (_, bn) = make_integers(case._replace(channels=channels), rng, dtype, device)
            for name, residual in (("", None), (" residual", make_residual(case, x, rng).round_())):
                yield Case(f"{channels} channels{name}", family, [x, bn, residual, True])
    elif family == "bottleneck":  # blocks make 14 × 14 or, with stride 2, 7 × 7 positions
        for inner, stride, projection in _BLOCKS:
            out = 2 * inner if projection else inner
            block = BlockCase(images, inner, 15, 13, inner, out, stride, projection)
            shortcut = "projection" if projection else "identity"
            yield Case(
                f"{inner} inner channels, stride {stride}, {shortcut}",
                family,
                make_bottleneck(block, rng, dtype, device, make_integers),
            )
    elif family == "stem":
        for channels, height, width in ((64, 37, 30), (24, 9, 50)):
            case = ConvCase(images, 3, height, width, channels, 7, 2, 3)
            arguments = [*make_integers(case, rng, dtype, device), MaxPool(3, 2, 1)]
            yield Case(f"{channels} channels", family, arguments)
    elif family == "head":  # means of 64 and of 16 values
        for batch, channels, classes, side in ((3, 512, 1000, 8), (17, 264, 11, 4)):
            shape = ConvCase(batch, channels, side, side, classes)
            x, (conv, _) = make_integers(shape, rng, dtype, device)
            weight = conv.weight[:, :, 0, 0].contiguous()
            bias = torch.ones(classes, device=device, dtype=dtype)
            yield Case(f"{batch} images, {classes} classes", family, [x, weight, bias])


def _training(dtype: torch.dtype, device: str, multiprocessors: int) -> Iterator[Case]:
    """The pieces of a training step around a convolution, forward and backward; of the moments,
    which are no integers, nothing is said."""
    rng = generator()
    images = -(-128 * multiprocessors // 81)
    for name, case in {
        "1x1": ConvCase(images, 72, 9, 9, 136),
        "3x3": ConvCase(images, 40, 9, 9, 136, 3, 1, 1),
        "3x3 strided": ConvCase(images, 40, 18, 18, 72, 3, 2, 1),
    }.items():
        x, (conv, _) = make_integers(case, rng, dtype, device)
        grad, raw = (_integers_like(case, x, rng) for _ in range(2))
        below = Activation(x, _terms(case.channels, device))
        above = Activation(raw, _terms(case.out_channels, device))
        slopes = _terms(case.out_channels, device)[[SCALE, INVSTD, MEAN, MEAN]]
        gradient = RawGradient(grad, raw, slopes, False)
        add = _integers_like(
            case._replace(kernel=1, stride=1, padding=0, out_channels=case.channels), x, rng
        )
        y = torch.relu(raw)
        pooled = ConvCase(images, case.out_channels, *case.output_size, case.out_channels, 3, 2, 1)
        pieces: dict[str, list[Any]] = {
            "conv_stats": [below, conv, True],
            "bn_add_relu": [above, grad],
            "relu_gradient": [grad, y, [above]],
            "dgrad": [gradient, conv, x.shape, below, add],
            "wgrad": [gradient, below, conv],
            "bn_relu_pool": [above, MaxPool(3, 2, 1)],
            "pool_gradient": [_integers_like(pooled, x, rng), above, MaxPool(3, 2, 1)],
        }
        for piece, arguments in pieces.items():
            exact = 1 if piece == "conv_stats" else 9
            yield Case(f"{name} {piece}", f"{_TRAINING}.{piece}", arguments, exact)


def _integers_like(case: ConvCase, x: Tensor, rng: torch.Generator) -> Tensor:
    """Small integers of the shape of the case's result, like `x` otherwise."""
    return make_residual(case, x, rng).round_()


def _terms(channels: int, device: str) -> Tensor:
    """Means 1, scales 1 and -1, shifts 1, as `resnet_fused.backends.training` has them."""
    terms = torch.ones(6, channels, device=device)
    terms[SCALE, ::3] = -1
    return terms


def cases(family: str, backend: Backend, device: str, multiprocessors: int) -> Iterator[Case]:
    """A family's cases in every dtype that the backend serves; convolutions of float32 with and
    without TF32. Without a GPU, where all takes long, the first dtype has to do."""
    names = ["bfloat16", "float16", "float32", *(["TF32"] if family == _CONVOLUTION else [])]
    dtypes = {name: getattr(torch, name, torch.float32) for name in names}
    served = {
        name: dtype
        for name, dtype in dtypes.items()
        if backend.unsupported(torch.device(device), dtype) is None
    }
    for name in served if device == "cuda" else list(served)[:1]:
        torch.backends.cudnn.allow_tf32 = name == "TF32"
        make = {_CONVOLUTION: _convolutions, _TRAINING: _training}.get(
            family, partial(_others, family)
        )
        for case in make(served[name], device, multiprocessors):
            yield case._replace(name=f"{name} {case.name}")


class Check(NamedTuple):
    """A kernel family of a backend; `run` is called in the child process, and yields the name of
    each case, then whether it was served. It raises AssertionError where a result is wrong."""

    name: str
    run: Callable[[], Iterator[tuple[str, bool | None]]]


def _run(backend: str, family: str, kernel: str | None) -> Iterator[tuple[str, bool | None]]:
    device = _device(backend)
    multiprocessors, repeats = SIMULATED_MULTIPROCESSORS, 1
    if device == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        repeats = _REPEATS_ON_GPU
    implementation = backends.get(backend)
    for case in cases(family, implementation, device, multiprocessors):
        yield case.name, None
        yield case.name, check_case(implementation, case, kernel, repeats)


def _device(backend: str) -> str:
    on_gpu = backend in backends.PREFERENCE["cuda"] and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"


def checks(backend: str) -> list[Check]:
    """Those of a backend, by name; of the CUDA kernels one for each tile of a convolution."""
    implementation = backends.get(backend)
    tiles: Sequence[str | None] = getattr(implementation, "tiles", (None,))
    found = []
    for family in FAMILIES:
        if family == _TRAINING and implementation.training is None:
            continue
        kernels = tiles if family == _CONVOLUTION else (None,)
        if hasattr(implementation, "tiles") and family in _KERNELS:
            kernels = (_KERNELS[family],)
        for kernel in kernels:
            words = [backend, family, *([kernel] if kernel and family == _CONVOLUTION else [])]
            found.append(Check(" ".join(words), partial(_run, backend, family, kernel)))
    return found


def _child(check: Check, connection: Connection) -> None:
    faulthandler.enable()
    os.environ["RESNET_FUSED_TUNE"] = "off"
    try:
        for name, served in check.run():
            connection.send((name, served))
        connection.send(("", True))
    except AssertionError as error:
        connection.send(("wrong", str(error)))
    except Exception as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))


def run_check(check: Check, seconds: float) -> Result:
    """The check in a process of its own, which is killed after `seconds`."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(check, sender), daemon=True)
    start = time.monotonic()
    process.start()
    sender.close()
    passed: list[str] = []
    skipped: list[str] = []
    at = "its start"

    def result(status: str, detail: str = "") -> Result:
        taken = round(time.monotonic() - start, 2)
        return Result(check.name, status, taken, passed, skipped, detail)

    try:
        while receiver.poll(max(0.0, start + seconds - time.monotonic())):
            name, outcome = receiver.recv()
            if isinstance(outcome, str):
                return result(name, f"{at}: {outcome}" if at not in outcome else outcome)
            if not name:
                return result("passed" if passed else "unavailable")
            if outcome is None:
                at = name
            else:
                (passed if outcome else skipped).append(name)
        return result("timed out", f"no end within {seconds:.0f} s, in {at}")
    except (EOFError, OSError):
        process.join(_SECONDS_TO_DIE)
        return result("crashed", f"{_death(process.exitcode)}, in {at}")
    finally:
        process.kill()
        process.join(_SECONDS_TO_DIE)  # a GPU may take its time to stop a kernel


def _death(code: int | None) -> str:
    if code is None or code >= 0:
        return f"it ended with exit status {code}"
    return f"it died of {signal.Signals(-code).name}"


def supervise(
    wanted: Sequence[Check], seconds: float, jobs: int, report: Callable[[Result], None]
) -> list[Result]:
    """Runs the checks, `jobs` at a time; `report` is given each result as it stands."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_check, check, seconds) for check in wanted]
        results = []
        for future in futures:
            results.append(future.result())
            report(results[-1])
    return results


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m resnet_fused.selfcheck",
        description="Holds every kernel family against the reference, each in its own process.",
    )
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=backends.NAMES,
        help="those with kernels that can run here: cuda, triton; cpu",
    )
    parser.add_argument("--only", nargs="+", metavar="WORD", help="checks whose name has the word")
    parser.add_argument("--seconds", type=float, default=120.0, help="for one check (%(default)s)")
    parser.add_argument("--jobs", type=int, help="checks at a time (on a GPU 4, else 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    options.jobs = options.jobs or (4 if gpu else 1)
    options.backend = options.backend or (["cuda", "triton"] if gpu else ["cpu"])
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if every check passed that this machine can run."""
    options = _options(arguments)
    wanted: list[Check] = []
    unavailable = {name: backends.unavailable(name) for name in options.backend}
    for name in options.backend:
        if unavailable[name] is None:
            wanted += checks(name)
    if options.only:
        wanted = [c for c in wanted if any(word in c.name.split() for word in options.only)]
    done: list[Result] = []

    def report(result: Result) -> None:
        done.append(result)
        count = f"{len(result.passed)} of {len(result.passed) + len(result.skipped)} cases"
        line = f"{result.status:12} {result.check:32} {result.seconds:6.1f} s  {count}"
        print(f"{line}  {result.detail}".rstrip(), flush=True)
        if options.json:
            record = {
                "machine": machine.describe(torch.device(_device(options.backend[0]))),
                "versions": machine.versions("resnet-fused", "torch", "triton"),
                **machine.commit(Path(__file__).parent),
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
    results = supervise(wanted, options.seconds, options.jobs, report)
    return int(any(result.failed for result in results) or any(unavailable.values()))


if __name__ == "__main__":
    sys.exit(main())
