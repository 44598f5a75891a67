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

from resnet_fused import backends, selfcheck
from resnet_fused.backends.cuda_sim import SimulatedBackend
from resnet_fused.reference.training import ReferenceTraining
from resnet_fused.selfcheck import Check, Result, cases, check_case, main, run_check, supervise

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


LIMIT = 25.0  # a child imports torch first, on a machine that may be busy


def test_faults_are_found_and_stay_where_they_are() -> None:
    checks = [Check(f.__name__, f) for f in (right, wrong, raises, crashes, leaves, serves_nothing)]
    seen: list[Result] = []
    results = supervise(checks, LIMIT, 2, seen.append)
    assert seen == results
    found = {r.check: (r.status, r.detail, r.passed) for r in results}
    assert found == {
        "right": ("passed", "", ["first", "second"]),
        "wrong": ("wrong", "third: 1 of 9 elements differ", ["first", "second"]),
        "raises": (
            "error",
            "first: RuntimeError: CUDA error: an illegal memory access was encountered",
            [],
        ),
        "crashes": ("crashed", "it died of SIGSEGV, in third", ["first", "second"]),
        "leaves": ("crashed", "it ended with exit status 3, in first", []),
        "serves_nothing": ("unavailable", "", []),
    }
    assert [r.check for r in results if not r.failed] == ["right", "serves_nothing"]


def test_a_hanging_check_costs_its_own_limit_only() -> None:
    start = time.monotonic()
    result = run_check(Check("hangs", hangs), LIMIT)
    assert time.monotonic() - start < LIMIT + 8
    assert (result.status, result.detail) == ("timed out", "no end within 25 s, in first")


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
    assert len(tile["passed"]) == 9
    assert tile["skipped"] == ["bfloat16 grouped"]
    assert (head["check"], head["status"]) == ("cuda_sim head", "passed")
    assert "passed       cuda_sim conv_bn m128n64_sm90" in capsys.readouterr().out


def test_every_tile_and_family_of_the_cuda_kernels_has_its_check(simulator: Any) -> None:
    names = {check.name.removeprefix("cuda_sim ") for check in selfcheck.checks("cuda_sim")}
    tiles = {name for name in simulator.ConvTile.__members__ if name != "automatic"}
    assert names == {
        *(f"conv_bn {tile}" for tile in tiles),
        *("bn_add_relu", "bottleneck", "stem", "head"),
    }


class TrainingOffByOne:
    """The pieces of training, each with a wrong element in what it gives first."""

    def __getattr__(self, piece: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            out = getattr(ReferenceTraining(), piece)(*arguments)
            (out if isinstance(out, Tensor) else out[0])[-1, -1, 0, 0] += 1
            return out

        return run


class OffByOne:
    """The reference, but the last image has a wrong element."""

    name = "off by one"
    training = TrainingOffByOne()

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def __getattr__(self, op: str) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            out: Tensor = getattr(backends.get("cpu"), op)(*arguments)
            out[-1, -1] += 1
            return out

        return run


@pytest.mark.parametrize("family", selfcheck.FAMILIES)
def test_every_case_finds_one_wrong_element(family: str) -> None:
    backend: Any = OffByOne()
    found = 0
    for case in cases(family, backend, "cpu", 1):
        with pytest.raises(AssertionError, match="differ"):
            check_case(backend, case)
        found += 1
    assert found >= 2


@pytest.mark.parametrize("mistake", ["skipped_mbarrier_wait", "skipped_proxy_fence"])
def test_a_planted_race_is_found(simulator: Any, mistake: str) -> None:
    backend = SimulatedBackend(simulator, capability=90)
    case = next(cases("conv_bn", backend, "cpu", selfcheck.SIMULATED_MULTIPROCESSORS))
    assert check_case(backend, case, "m128n64_sm90")
    simulator.plant({mistake: 1})
    try:
        with pytest.raises(simulator.Fault):
            check_case(backend, case, "m128n64_sm90")
    finally:
        simulator.plant()


def test_tiles_go_round_three_times_on_each_multiprocessor(simulator: Any) -> None:
    """So that the rings of persistent blocks wrap: counted from shapes, for the largest tile and
    for the smaller one, of which two share a multiprocessor."""
    backend = SimulatedBackend(simulator, capability=90)
    for case in cases("conv_bn", backend, "cpu", 132):
        conv = case.arguments[1]
        images, _, height, width = (
            *case.arguments[0].shape[:2],
            *conv.output_size(*case.arguments[0].shape[2:]),
        )
        channels = conv.weight.shape[0] // conv.groups
        rows = -(-images * height * width // 128)
        if case.name.endswith("tails"):
            continue
        assert rows * -(-channels // 128) >= 3 * 132
        assert rows * -(-channels // 64) >= 3 * 2 * 132


def test_nothing_to_check_is_no_success(capsys: Any) -> None:
    assert main(["--backend", "cpu", "--only", "nothing"]) == 1
    assert "nothing to check" in capsys.readouterr().err
