"""Which kernel families may run: those of which this machine's self-check has said so."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fused import _extension, backends, selfcheck, settings
from resnet_fused.backends import Candidate
from resnet_fused.backends.autotune import BUDGET_SECONDS, Tuner, families
from resnet_fused.backends.autotune.cache import Times
from resnet_fused.backends.autotune.families import FIRST_CALL_SECONDS, Verdicts, environment
from resnet_fused.selfcheck import Check, main
from resnet_fused.testing.selfcheck_cases import cases

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The name and driver of an imaginary GPU, and a cache folder of each test's own."""
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("RESNET_FUSED_SELFCHECK", "on")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary 1000")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    environment.cache_clear()
    yield
    environment.cache_clear()


class Child:
    """Stands for the process of the self-check: what it was asked, and what it records at once and,
    where it does not end by itself, until `end` is called."""

    def __init__(self, found: Times | None = None, ends: bool = True) -> None:
        self.found = found or {}
        self.commands: list[list[str]] = []
        self._has_ended = threading.Event()
        if ends:
            self._has_ended.set()

    def start(self, command: list[str], **options: Any) -> Any:
        assert options["start_new_session"]  # it outlives a Ctrl-C that ends the program
        self.commands.append(command)
        if self.found:
            families.record(self.found, GPU)
        return self

    def wait(self, seconds: float) -> int:
        if not self._has_ended.wait(min(seconds, 0.02)):
            raise subprocess.TimeoutExpired(self.commands[-1], seconds)
        return 0

    def end(self) -> None:
        self._has_ended.set()

    def verdicts(self) -> Verdicts:
        """As a new process has them."""
        return Verdicts(self.start)


def test_a_first_forward_has_fifteen_seconds() -> None:
    """Waiting for the self-check and measuring, and two seconds for the candidate that is under way
    when the budget ends, and for the forward itself. A sum of limits, which no GPU has shown."""
    assert FIRST_CALL_SECONDS + BUDGET_SECONDS + 2.0 <= 15.0


def test_an_untested_machine_is_checked_once(capfd: pytest.CaptureFixture[str]) -> None:
    child = Child({"cuda stem": 1.5, "cuda head": 0.5})
    verdicts = child.verdicts()
    for _ in range(2):
        assert verdicts.passed("cuda stem", GPU)
        assert verdicts.passed("cuda head", GPU)
    assert child.commands == [[sys.executable, "-m", "resnet_fused.selfcheck", "--record"]]
    assert "checking the kernels on Imaginary 1000" in capfd.readouterr().err
    another = Child()  # of a later process: the verdicts are in the file
    assert another.verdicts().passed("cuda stem", GPU)
    assert another.commands == []


def test_a_family_that_failed_is_left_out_with_one_warning() -> None:
    child = Child({"cuda stem": "crashed it died of SIGSEGV, in float16 64 channels"})
    verdicts = child.verdicts()
    with pytest.warns(UserWarning, match=r"'cuda stem' on this machine: crashed .*SIGSEGV") as said:
        found = [verdicts.passed("cuda stem", GPU) for _ in range(2)]
    assert found == [False, False]
    assert len(said) == 1
    assert "please report what it prints" in str(said[0].message)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FIRST_CALL_SECONDS", 0.1)


@pytest.mark.usefixtures("impatient")
def test_a_family_whose_check_goes_on_joins_when_it_has_passed(
    recwarn: pytest.WarningsRecorder,
) -> None:
    child = Child({"cuda stem": 1.5}, ends=False)
    verdicts = child.verdicts()
    heard = threading.Event()
    verdicts.listeners.append(heard.set)
    assert verdicts.passed("cuda stem", GPU)
    assert not verdicts.passed("cuda head", GPU)
    assert verdicts.are_awaited(GPU)
    assert not list(recwarn)
    heard.clear()
    families.record({"cuda head": 1.5}, GPU)  # as the check goes on
    assert heard.wait(10)
    assert verdicts.passed("cuda head", GPU)
    assert not verdicts.passed("cuda bottleneck", GPU)
    heard.clear()
    child.end()
    assert heard.wait(10)
    assert not verdicts.are_awaited(GPU)
    with pytest.warns(UserWarning, match="'cuda bottleneck'.*did not end"):
        assert not verdicts.passed("cuda bottleneck", GPU)
    assert len(child.commands) == 1


@pytest.mark.usefixtures("impatient")
def test_choices_made_while_a_check_goes_on_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the heuristic meanwhile, because what else runs on the GPU would be measured too."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    child = Child({"other": 1.5}, ends=False)
    verdicts = child.verdicts()
    measured: list[str] = []

    def measure(launch: Any, device: torch.device) -> float:
        measured.append("measured")
        return 1.0

    tuner = Tuner(
        measure,
        lambda family, device: verdicts.passed(family, GPU),
        lambda device: verdicts.are_awaited(GPU),
        device_type="cpu",
    )
    heard = threading.Event()
    verdicts.listeners += [tuner.forget, heard.set]
    ours, library = Candidate("ours", torch.neg, "cuda stem"), Candidate("library", torch.neg)
    arguments = [torch.ones(3)]

    def choose() -> str:
        return tuner.choose("op", arguments, lambda: [ours, library], torch.neg).name

    assert choose() == "library"
    heard.clear()
    families.record({"cuda stem": 1.5}, GPU)
    assert heard.wait(10)
    assert choose() == "ours"
    assert measured == []
    heard.clear()
    child.end()
    assert heard.wait(10)
    assert choose() in ("ours", "library")
    assert len(measured) == 2


def test_a_check_that_was_stopped_is_taken_up_by_the_next_process() -> None:
    families.record({"cuda stem": 1.5}, GPU)
    child = Child({"cuda head": 1.5})
    assert child.verdicts().passed("cuda head", GPU)
    assert len(child.commands) == 1


def test_threads_wait_for_one_child() -> None:
    child = Child({"cuda stem": 1.5})
    verdicts = child.verdicts()
    barrier = threading.Barrier(8)
    found: list[bool] = []

    def run() -> None:
        barrier.wait()
        found.append(verdicts.passed("cuda stem", GPU))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    assert len(child.commands) == 1


@pytest.mark.parametrize("part", ["GPU", "driver", "package", "build", "torch", "triton"])
def test_what_was_found_elsewhere_does_not_count(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    families.record({"cuda stem": 1.5}, GPU)
    environment.cache_clear()
    place, name, value = {
        "GPU": (torch.cuda, "get_device_name", lambda device: "Imaginary 2000"),
        "driver": (torch._C, "_cuda_getDriverVersion", lambda: 13010),
        "package": (families, "__version__", "9.9"),
        "build": (_extension, "available", lambda *module: "not built"),
        "torch": (torch, "__version__", "9.9"),
        "triton": (families.metadata, "version", lambda package: "9.9"),
    }[part]
    if part == "build" and _extension.available() is not None:
        pytest.skip("there is no build to tell from none")
    monkeypatch.setattr(place, name, value)
    child = Child({"cuda stem": "wrong"})
    with pytest.warns(UserWarning, match="'cuda stem'"):
        assert not child.verdicts().passed("cuda stem", GPU)
    assert len(child.commands) == 1


@pytest.mark.parametrize("reason", ["off", "the CPU"])
def test_nothing_is_checked_where_nothing_has_to_be(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "off":
        monkeypatch.setenv("RESNET_FUSED_SELFCHECK", "off")
    child = Child()
    device = torch.device("cpu") if reason == "the CPU" else GPU
    assert child.verdicts().passed("cuda stem", device)
    assert child.commands == []
    assert not settings.cache_directory().exists()


def test_importing_and_cpu_tensors_start_no_process(tmp_path: Path) -> None:
    script = """
import os, subprocess, torch
subprocess.Popen = os.fork = None  # whatever would be started fails
import resnet_fused
with torch.inference_mode():
    resnet_fused.resnet18(num_classes=3).eval()(torch.randn(1, 3, 32, 32))
assert not os.path.exists(os.environ["RESNET_FUSED_CACHE_DIR"])
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# What the command records


def right() -> Iterator[tuple[str, bool | None]]:
    yield "first", None
    yield "first", True


def wrong() -> Iterator[tuple[str, bool | None]]:
    yield "first", None
    raise AssertionError("first: 1 of 9 elements differ")


def starved() -> Iterator[tuple[str, bool | None]]:
    yield "first", None
    raise torch.OutOfMemoryError("CUDA out of memory")


def never() -> Iterator[tuple[str, bool | None]]:
    yield "first", None
    raise RuntimeError("this check had a verdict already")


def test_verdicts_that_the_command_records_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = [Check("cuda stem", right), Check("cuda head", wrong), Check("cuda old", never)]
    monkeypatch.setattr(selfcheck, "checks", lambda backend, small: planted)
    families.record({"cuda old": 2.0}, torch.device("cpu"))
    assert main(["--backend", "reference", "--record", "--seconds", "60"]) == 1
    child = Child()
    verdicts = child.verdicts()
    with pytest.warns(UserWarning, match="'cuda head' on this machine: wrong first: 1 of 9"):
        found = [verdicts.passed(f"cuda {name}", GPU) for name in ("stem", "head", "old")]
    assert found == [True, False, True]
    assert child.commands == []
    monkeypatch.setattr(
        selfcheck, "checks", lambda *_: [Check("cuda stem", never), Check("cuda head", right)]
    )
    assert main(["--backend", "reference", "--record"]) == 0  # only what has not passed runs again
    assert child.verdicts().passed("cuda head", GPU)
    entries = json.loads((settings.cache_directory() / families.FILE).read_text())["entries"]
    assert len(entries) == 1


def test_too_little_memory_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which another program's tensors would give to every kernel, for good."""
    monkeypatch.setattr(selfcheck, "checks", lambda *_: [Check("cuda stem", starved)])
    assert main(["--backend", "reference", "--record", "--seconds", "60"]) == 1
    assert "no memory    cuda stem" in capsys.readouterr().out
    assert families.recorded(torch.device("cpu")) == {}


def test_a_second_process_waits_for_the_first_and_repeats_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second one is started while the first holds the lock, and finds its verdict."""
    import fcntl

    monkeypatch.setattr(selfcheck, "checks", lambda *_: [Check("cuda stem", never)])
    folder = settings.cache_directory()
    folder.mkdir(parents=True)
    codes: list[int] = []
    second = threading.Thread(
        target=lambda: codes.append(main(["--backend", "reference", "--record", "--seconds", "60"]))
    )
    with open(folder / "selfcheck.running", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second.start()
        second.join(1.0)
        assert second.is_alive()
        families.record({"cuda stem": 1.5}, torch.device("cpu"))
    second.join(60)
    assert codes == [0]


def test_every_family_that_a_candidate_names_has_a_check(simulator: Any) -> None:
    """A family that nothing checks would be left out everywhere."""
    checked = {check.name.replace("cuda_sim", "cuda") for check in selfcheck.checks("cuda_sim")}
    backend = backends.get("cuda_sim")
    named: set[str] = set()
    for family in selfcheck.FAMILIES:
        for case in cases(family, backend, "cpu", 1):
            if "." not in case.op:
                named |= {c.family for c in getattr(backend, case.op)(*case.arguments)}
    assert len(named) > 5
    assert named <= checked
