"""The self-check: candidates of known faults are found, and take no other check with them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused import selfcheck
from resnet_fused.backends import Candidate
from resnet_fused.backends.cuda_sim import SimulatedBackend
from resnet_fused.backends.reference import ReferenceBackend
from resnet_fused.numerics import cast
from resnet_fused.reference import ops as reference
from resnet_fused.reference import quantized
from resnet_fused.reference.training import ReferenceTraining
from resnet_fused.selfcheck import Check, Result, Worker, main, supervise
from resnet_fused.testing.cases import ConvCase, generator, make_gated_integers, make_integers
from resnet_fused.testing.selfcheck_cases import FAMILIES, cases, check_case

# Checks of known outcome, which child processes import from here.


def right() -> Iterator[tuple[str, bool | None]]:
    for name in ("first", "second"):
        yield name, None
        yield name, True


def serves_nothing() -> Iterator[tuple[str, bool | None]]:
    yield "first", None
    yield "first", False


def wrong() -> Iterator[tuple[str, bool | None]]:
    yield from right()
    yield "third", None
    raise AssertionError("third: 1 of 9 elements differ")


def raises() -> Iterator[tuple[str, bool | None]]:
    yield "first", None
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def crashes() -> Iterator[tuple[str, bool | None]]:
    yield from right()
    yield "third", None
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves() -> Iterator[tuple[str, bool | None]]:
    yield "first", None
    os._exit(3)


def hangs() -> Iterator[tuple[str, bool | None]]:
    yield "first", None
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)


LIMIT = 25.0  # of a check; the child that imports torch first has longer


def test_faults_are_found_and_stay_where_they_are() -> None:
    """Whatever a check does, those after it run, in the same two workers or in new ones."""
    functions = (right, wrong, raises, right, crashes, right, leaves, serves_nothing, right)
    checks = [Check(f"{f.__name__} {i}", f) for i, f in enumerate(functions)]
    seen: list[Result] = []
    results = supervise(checks, LIMIT, 2, seen.append)
    assert seen == results
    found = {r.check: (r.status, r.detail, r.passed) for r in results}
    passed = ("passed", "", ["first", "second"])
    assert found == {
        "right 0": passed,
        "wrong 1": ("wrong", "third: 1 of 9 elements differ", ["first", "second"]),
        "raises 2": (
            "error",
            "first: RuntimeError: CUDA error: an illegal memory access was encountered",
            [],
        ),
        "right 3": passed,
        "crashes 4": ("crashed", "it died of SIGSEGV, in third", ["first", "second"]),
        "right 5": passed,
        "leaves 6": ("crashed", "it ended with exit status 3, in first", []),
        "serves_nothing 7": ("unavailable", "", []),
        "right 8": passed,
    }
    assert {r.check for r in results if r.failed} == {
        "wrong 1",
        "raises 2",
        "crashes 4",
        "leaves 6",
    }


def test_a_hanging_check_costs_its_own_limit_only() -> None:
    worker = Worker()
    try:
        assert worker.run(Check("right", right), LIMIT).status == "passed"  # torch is imported
        start = time.monotonic()
        result = worker.run(Check("hangs", hangs), 2.0)
        assert 2.0 <= time.monotonic() - start < 2.0 + 8.0
        assert (result.status, result.detail) == ("timed out", "no end within 2 s, in first")
        assert result.seconds >= 2.0
        assert worker.run(Check("right", right), LIMIT).status == "passed"
    finally:
        worker.stop()


def _own_process() -> Iterator[tuple[str, bool | None]]:
    yield f"{os.getpid()}", None
    yield f"{os.getpid()}", True


def test_a_worker_is_kept_for_what_is_harmless_only() -> None:
    """After a wrong result it goes on; after an exception a GPU's context may be lost."""
    worker = Worker()

    def process() -> str:
        return worker.run(Check("own process", _own_process), LIMIT).passed[0]

    try:
        first = process()
        worker.run(Check("wrong", wrong), LIMIT)
        assert process() == first
        worker.run(Check("raises", raises), LIMIT)
        assert process() != first
    finally:
        worker.stop()


def test_the_command_writes_what_it_found(
    simulator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("RESNET_FUSED_HOST_SIM_CAPABILITY", "90")
    file = tmp_path / "checks.json"
    arguments = ["--backend", "cuda_sim", "--only", "m128n64_sm90", "head", "--json", str(file)]
    assert main(arguments) == 0
    record = json.loads(file.read_text())
    tile, head = record["checks"]
    assert (tile["check"], tile["status"]) == ("cuda_sim conv_bn m128n64_sm90", "passed")
    assert len(tile["passed"]) == 11
    assert tile["skipped"] == ["bfloat16 grouped", "bfloat16 small groups"]
    assert (head["check"], head["status"]) == ("cuda_sim head", "passed")
    assert "passed       cuda_sim conv_bn m128n64_sm90" in capsys.readouterr().out


@pytest.fixture
def here(simulator: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command in this process, on the simulator's Hopper."""
    monkeypatch.setenv("RESNET_FUSED_HOST_SIM_CAPABILITY", "90")
    for name in selfcheck._AS_IT_COMES:  # which the command changes
        monkeypatch.setenv(name, "off")
    return lambda *only: main(["--backend", "cuda_sim", "--here", "--only", *only])


def test_checks_run_here(here: Callable[..., int], capsys: Any) -> None:
    assert here("stem", "m128n64_sm90") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["passed", "cuda_sim", "conv_bn", "m128n64_sm90"],
        ["passed", "cuda_sim", "stem", lines[1].split()[3]],
    ]


def test_a_fault_that_is_found_here_is_no_success(
    simulator: Any, here: Callable[..., int], capsys: Any
) -> None:
    simulator.plant({"skipped_barrier": 1})
    try:
        assert here("stem") == 1
    finally:
        simulator.plant()
    assert capsys.readouterr().out.startswith("error        cuda_sim stem")


def test_kernels_that_begin_early_wait_before_they_read(
    simulator: Any, here: Callable[..., int], capsys: Any
) -> None:
    """On sm_90 they may begin before the kernel that makes their input has ended."""
    hopper = [name for name in simulator.ConvTile.__members__ if "sm90" in name]
    simulator.plant({"skipped_kernel_wait": 0})
    try:
        assert here(*hopper, "sm90", "stem", "head") == 1
    finally:
        simulator.plant()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(hopper) + 3
    assert all("before it has waited for the kernel before this one" in line for line in lines)


def test_what_is_kept_is_not_of_small_cases() -> None:
    with pytest.raises(SystemExit):
        main(["--here", "--record"])


def test_every_tile_and_family_of_the_cuda_kernels_has_its_check(simulator: Any) -> None:
    names = {check.name.removeprefix("cuda_sim ") for check in selfcheck.checks("cuda_sim")}
    assert names == {
        *(f"conv_bn {tile}" for tile in simulator.ConvTile.__members__),
        *(f"quantized {tile}" for tile in simulator.QuantizedTile.__members__),
        *(f"training {tile}" for tile in simulator.TrainingTile.__members__),
        *(f"training {tile}" for tile in simulator.WgradTile.__members__),
        *("bn_add_relu", "bottleneck", "bottleneck sm90", "stem", "image_stem"),
        *("head", "training"),
    }


class TrainingOffByOne:
    """The pieces of training, each with a wrong element in what it gives first."""

    def __getattr__(self, piece: str) -> Callable[..., Any]:
        if piece.startswith("__"):  # Python asks classes whether what they hold is abstract
            raise AttributeError(piece)

        def run(*arguments: Any) -> Any:
            out = getattr(ReferenceTraining(), piece)(*arguments)
            first = out if isinstance(out, Tensor) else out[0]
            place = (-1, -1, 0, 0)[: first.dim()]
            first[place] += first[place].abs() + 1  # beyond the rounding of large ones
            return out

        return run

    def folded_ends(self, dtype: torch.dtype) -> TrainingOffByOne:
        return self


class OffByOne(ReferenceBackend):
    """Kernels for every op that are the reference, but for a wrong element in the last image."""

    name = "off by one"
    training = TrainingOffByOne()  # type: ignore[assignment]

    def __getattribute__(self, name: str) -> Any:
        meaning = getattr(reference, name, None) or getattr(quantized, name, None)
        if meaning is None:
            return super().__getattribute__(name)

        def launch(*arguments: Any) -> Tensor:
            out: Tensor = meaning(*arguments)
            out[-1, -1] += 1
            return out

        return lambda *arguments: [Candidate("off by one", launch)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_finds_one_wrong_element(family: str) -> None:
    backend = OffByOne()
    found = 0
    for case in cases(family, backend, "cpu", 1):
        with pytest.raises(AssertionError, match="differ"):
            check_case(backend, case)
        found += 1
    assert found >= 2


class PartlyWritten(ReferenceBackend):
    """A convolution whose last row is not written, in memory that was the right
    result's before."""

    name = "partly written"

    def conv_bn(self, *arguments: Any) -> list[Candidate]:
        def launch(*arguments: Any) -> Tensor:
            right = reference.conv_bn(*arguments)
            freed = right.clone()
            del freed
            out = torch.empty_like(right)
            out[:, :, :-1] = right[:, :, :-1]
            return out

        return [Candidate("partly written", launch)]


def test_an_element_that_nobody_writes_is_found() -> None:
    backend = PartlyWritten()
    with pytest.raises(AssertionError, match="differ"):
        check_case(backend, next(cases("conv_bn", backend, "cpu", 1)))


def test_a_kernel_that_does_not_serve_a_case_is_not_passed_by_another() -> None:
    backend = OffByOne()
    case = next(cases("conv_bn", backend, "cpu", 1))
    assert not check_case(backend, case, "missing")


@pytest.mark.parametrize("mistake", ["skipped_mbarrier_wait", "skipped_proxy_fence"])
def test_a_planted_race_is_found(simulator: Any, mistake: str) -> None:
    backend = SimulatedBackend(simulator, capability=90)
    case = next(cases("conv_bn", backend, "cpu", selfcheck.SIMULATED_SMS))
    assert check_case(backend, case, "cuda m128n64_sm90")
    simulator.plant({mistake: 1})
    try:
        with pytest.raises(simulator.Fault):
            check_case(backend, case, "cuda m128n64_sm90")
    finally:
        simulator.plant()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gates_of_integers_are_exact_in_every_type(dtype: torch.dtype) -> None:
    """As the self-check has them, of PyTorch's own ops: what these round, no kernel gets right."""
    rng = generator()
    x, _ = make_integers(ConvCase(3 * 132, 512, 8, 8, 512), rng, dtype)
    arguments = make_gated_integers(x, 32, rng)
    found = reference.squeeze_excite(*arguments)
    expected = reference.squeeze_excite(*cast(arguments, torch.float64))
    assert torch.equal(found.double(), (64 * expected).round() / 64)


def test_persistent_blocks_go_round_three_times_on_each_sm(simulator: Any) -> None:
    """So that the rings of their buffers wrap: counted from shapes, for the largest tile and for
    the smaller one, of which two share an SM."""
    backend = SimulatedBackend(simulator, capability=90)
    for case in cases("conv_bn", backend, "cpu", 132):
        if case.name.endswith(("tails", "groups")):  # which no persistent kernel serves
            continue
        x, (conv, _) = case.arguments[:2]
        height, width = conv.output_size(*x.shape[2:])
        channels = conv.weight.shape[0] // conv.groups
        rows = -(-x.shape[0] * height * width // 128)
        assert rows * -(-channels // 128) >= 3 * 132
        assert rows * -(-channels // 64) >= 3 * 2 * 132


def test_nothing_to_check_is_no_success(capsys: Any) -> None:
    assert main(["--backend", "cpu", "--only", "nothing"]) == 1
    assert "nothing to check" in capsys.readouterr().err
