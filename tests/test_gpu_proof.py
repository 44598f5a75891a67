"""The calls for a GPU machine, as far as a machine without one can try them."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision", reason="the benchmarks' peers are torchvision's models")
pytest.importorskip("skimage", reason="the benchmark's photographs come with scikit-image")

import baselines
import gpu_proof
import layers
import predict
import throughput
import training
from gpu_proof import CALLS, Gpu, Proof, Step, find_gpu, steps_of

from resnet_fused import selfcheck, tune
from resnet_fused.backends import cuda

ROOT = Path(__file__).resolve().parents[1]
H100 = Gpu("h100_80gb_hbm3", "90a")


def options(*arguments: str, gpu: Gpu = H100) -> argparse.Namespace:
    parsed = gpu_proof.parse(arguments)
    parsed.results = f"benchmarks/results/{gpu.name}"
    return parsed


def steps(*arguments: str) -> list[Step]:
    return steps_of(options(*arguments), H100)


# What would run


@pytest.mark.parametrize("call", CALLS)
def test_each_call_fits_its_seconds(call: str) -> None:
    found = steps(call)
    assert sum(step.estimate for step in found) <= gpu_proof.SECONDS[call]
    assert gpu_proof.SECONDS[call] <= (540 if call == "first" else 570)
    for step in found:
        assert 0 < step.estimate < step.limit <= 300


def test_no_step_writes_what_another_one_wrote() -> None:
    """Nor the call's own record."""
    for call in CALLS:
        written = [f"benchmarks/results/{H100.name}/call_{call}.json"]
        for step in steps(call):
            for command in step.commands:
                written += [command[i + 1] for i, word in enumerate(command) if word == "--json"]
        assert len(written) == len(set(written)) > 1


def check_python(command: list[str]) -> None:
    """That the program takes these arguments; a failure where it is not known how to tell."""
    program, given = command[0], command[1:]
    if program == "-m":
        program, given = command[1], command[2:]
    if program == "pytest":
        files = [word for word in given if word.startswith("tests")]
        assert files
        assert all((ROOT / file).exists() for file in files)
        return
    parsers: dict[str, Any] = {
        "benchmarks/throughput.py": lambda a: throughput.parse(a, baselines.BASELINES),
        "benchmarks/layers.py": layers.parse,
        "benchmarks/training.py": training.parse,
        "benchmarks/predict.py": predict.parse,
        "resnet_fused.selfcheck": selfcheck._options,
        "resnet_fused.tune": tune._options,
        "resnet_fused.env": lambda a: not a or pytest.fail(f"{a}"),
        "setup.py": lambda a: a == ["build_ext", "--inplace"] or pytest.fail(f"{a}"),
    }
    parsers[program](given)


@pytest.mark.parametrize("rehearse", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_every_command_is_one_that_its_program_takes(
    call: str, rehearse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not rehearse)
    seen = 0
    for step in steps(call, *(["--rehearse"] if rehearse else [])):
        for command in step.commands:
            if gpu_proof.PYTHON in command:
                check_python(command[command.index(gpu_proof.PYTHON) + 1 :])
            else:
                assert command[0] in ("nvcc", "nvidia-smi") or command[0].endswith("/peaks")
                # The GPU's settings are read, never changed.
                assert command[0] != "nvidia-smi" or command[1] == "-q"
            seen += 1
    assert seen >= 4


def test_the_first_call_holds_what_tells_most() -> None:
    commands = {step.name: step.commands for step in steps("first")}
    (measured,) = commands["throughput"]
    arguments = ["cpu" if argument == "cuda" else argument for argument in measured[2:]]
    found = throughput.parse(arguments, baselines.BASELINES)
    assert found.batch == [256, 1]
    assert (found.ours, found.peers) == (["cuda-graph"], ["cudnn-graph", "compile-reduce-overhead"])
    (profiled,) = commands["profile"]
    assert profiled[:3] == ["ncu", "--clock-control", "none"]
    assert profiled[-len(gpu_proof.PROFILED) :] == [*gpu_proof.PROFILED]
    (built,) = [step for step in steps("first") if step.name == "build"]
    assert built.environment["RESNET_FUSED_CUDA_ARCHS"] == "90a"


def test_what_is_profiled_is_in_a_network(simulator: Any) -> None:
    found = layers.record("resnet50", torch.zeros(1, 3, 224, 224))
    titles = {layer.title() for layer in found}
    kernels = {f"cuda {tile}" for tile in simulator.ConvTile.__members__}
    kernels |= {name for name, *_ in cuda._BOTTLENECKS}
    for call in gpu_proof.PROFILED:
        title, kernel = call.split(", ")
        assert title in titles
        assert kernel in kernels


def test_the_sanitizer_sees_every_kernel_under_every_tool() -> None:
    (step,) = [step for step in steps("checks") if step.name == "sanitizer"]
    assert [c[2] for c in step.commands] == ["memcheck", "racecheck", "initcheck", "synccheck"]
    for command in step.commands:
        options = selfcheck._options(command[command.index("resnet_fused.selfcheck") + 1 :])
        assert (options.backend, options.here, options.only) == (["cuda"], True, None)


def test_sizes_and_peers_can_be_narrowed() -> None:
    (step,) = steps(
        *("tuning", "--steps", "peers", "--arch", "resnet18", "--dtype", "float16"),
        *("--batch", "8", "--peers", "jax"),
    )
    (command,) = step.commands
    assert command[2:8] == ["--arch", "resnet18", "--dtype", "float16", "--batch", "8"]
    assert command[-2:] == ["--peers", "jax"]
    assert [s.name for s in steps("checks", "--skip", "build", "sanitizer")] == [
        *("environment", "selfcheck", "tests"),
    ]
    with pytest.raises(SystemExit):
        options("first", "--steps", "tune")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("NVIDIA H100 80GB HBM3, 9.0", Gpu("h100_80gb_hbm3", "90a")),
        ("NVIDIA H200, 9.0\nNVIDIA H200, 9.0", Gpu("h200", "90a")),
        ("NVIDIA A100-SXM4-40GB, 8.0", Gpu("a100_sxm4_40gb", "80")),
        ("NVIDIA GeForce RTX 4090, 8.9", Gpu("geforce_rtx_4090", "89")),
        ("NVIDIA B200, 10.0", Gpu("b200", "100")),
    ],
)
def test_results_and_architecture_follow_the_gpu(answer: str, expected: Gpu, tools: Path) -> None:
    program(tools / "nvidia-smi", f"echo '{answer}'")
    assert find_gpu() == expected


def test_models_of_the_prediction() -> None:
    assert [Gpu(name, "90a").model for name in ("h100_pcie", "h200", "l4")] == [
        "h100",
        "h200",
        None,
    ]


def test_without_a_gpu_it_says_so(tools: Path) -> None:
    program(tools / "nvidia-smi", "exit 9")
    with pytest.raises(SystemExit, match="no NVIDIA GPU found"):
        find_gpu()


# A run, on a stub GPU


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first in PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def tree(tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An outline of the tree on a machine whose programs do nothing but note their calls."""
    folder = tmp_path / "tree"
    (folder / "benchmarks").mkdir(parents=True)
    (folder / "tests").mkdir()
    for test in (ROOT / "tests").glob("test_*.py"):
        (folder / "tests" / test.name).touch()
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    note = 'echo "$(basename "$0") $*" >> "$CALLS"; echo "output of $1"'
    for name in ("python", "nvcc", "ncu", "compute-sanitizer"):
        program(tools / name, note)
    program(tools / "nvidia-smi", "echo NVIDIA H200, 9.0")
    monkeypatch.setattr(gpu_proof, "ROOT", folder)
    monkeypatch.setattr(gpu_proof, "PYTHON", str(tools / "python"))
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield folder
    for number, handler in handlers.items():
        signal.signal(number, handler)


def packed(out: Path, call: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The record beside the pack, and the packed files."""
    with tarfile.open(out / f"{call}.tar.gz") as archive:
        files = {
            member.name: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive.getmembers()
        }
    return json.loads((out / f"call_{call}.json").read_text()), files


@pytest.mark.parametrize("call", CALLS)
def test_a_call_on_a_stub_gpu_is_packed(call: str, tree: Path, tmp_path: Path) -> None:
    results = tree / "benchmarks" / "results" / "h200"
    results.mkdir(parents=True)
    program(results / "peaks", 'echo measured > "$1"')
    out = tmp_path / "out"
    assert gpu_proof.main([call, "--out", str(out)]) == 0
    record, files = packed(out, call)
    assert (record["gpu"], record["call"], record["rehearsal"]) == ("h200", call, False)
    outcomes = {step["name"]: step for step in record["steps"]}
    assert list(outcomes) == [make.__name__ for make in CALLS[call]]
    for name, outcome in outcomes.items():
        if name == "prediction":
            assert outcome["reason"] == "there is no benchmarks/predict.py here"
            continue
        assert outcome["status"] == "passed"
        assert b"output of" in files[f"h200/{name}.log"]
    assert json.loads(files[f"h200/call_{call}.json"]) == record
    assert ("h200/peaks.json" in files) == (call == "first")
    assert "h200/peaks" not in files  # a program, compiled anew where it is needed
    assert len(list(out.iterdir())) == 2
    ran = (tmp_path / "calls").read_text()
    assert "python setup.py build_ext --inplace" in ran


def proof(tree: Path, seconds: int = 60) -> tuple[Proof, Path]:
    out = tree / "out"
    made = options("first", "--out", str(out), "--seconds", str(seconds))
    return Proof(made, H100), out


def shell(name: str, script: str, limit: int = 20, **others: Any) -> Step:
    return Step(name, 1, limit, [["sh", "-c", script]], **others)


def test_a_step_that_hangs_or_fails_costs_itself_only(tree: Path, tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    hang = f"trap '' TERM; echo begun; while :; do sleep 1; touch {mark}; done"
    run, out = proof(tree)
    start = time.monotonic()
    code = run.run([
        shell("fails", "echo why; exit 3"),
        shell("hangs", hang, limit=1),
        shell("wants", "true", needs=("no-such-program",)),
        shell("passes", "echo $RESNET_FUSED_TUNE", environment={"RESNET_FUSED_TUNE": "off"}),
    ])  # fmt: skip
    assert code == 1
    assert time.monotonic() - start < 20
    record, files = packed(out, "first")
    found = [(step["name"], step["status"], step["reason"]) for step in record["steps"]]
    assert found == [
        ("fails", "failed", "exit status 3 of sh -c 'echo why; exit 3'"),
        ("hangs", "timed out", "stopped after 1 s"),
        ("wants", "skipped", "there is no no-such-program here"),
        ("passes", "passed", ""),
    ]
    folder = f"{H100.name}/"
    assert files[folder + "passes.log"].endswith(b"\noff\n")
    assert b"begun" in files[folder + "hangs.log"]
    mark.unlink()
    time.sleep(2)
    assert not mark.exists()


def test_a_log_names_no_place_of_the_machine(tree: Path) -> None:
    """It is committed with the results."""
    run, out = proof(tree)
    assert run.run([shell("says", f"echo {gpu_proof.ROOT}/file {gpu_proof.PYTHON}")]) == 0
    _, files = packed(out, "first")
    log = files[f"{H100.name}/says.log"]
    assert log.endswith(b"\nfile python\n")
    assert str(gpu_proof.ROOT).encode() not in log


def test_what_a_step_leaves_running_ends_with_it(tree: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    run, _ = proof(tree)
    assert run.run([shell("leaves", f"(sleep 2; touch {mark}) & exit 0")]) == 0
    time.sleep(3)
    assert not mark.exists()


def test_steps_beyond_the_calls_seconds_are_left_out(tree: Path) -> None:
    run, out = proof(tree, seconds=gpu_proof._SECONDS_TO_END + gpu_proof._SECONDS_TO_PACK + 3)
    assert run.run([shell("long", "sleep 60"), shell("next", "true")]) == 1
    record, _ = packed(out, "first")
    assert [step["status"] for step in record["steps"]] == ["timed out", "skipped"]
    assert record["steps"][1]["reason"] == "the call's seconds had run out"


def test_a_stopped_call_packs_what_the_step_had(tmp_path: Path) -> None:
    """SIGTERM, as from `timeout`: the step is asked to end and keeps what it has measured."""
    out, folder = tmp_path / "out", tmp_path / "tree"
    folder.mkdir()
    keeps = "trap 'echo kept > $RESULTS/partial.json; exit 1' TERM; echo $$; "
    keeps += "while :; do sleep 0.1; done"
    script = f"""
import sys
import gpu_proof
from pathlib import Path
gpu_proof.ROOT = Path({str(folder)!r})
steps = [
    gpu_proof.Step("short", 1, 20, [["true"]]),
    gpu_proof.Step("long", 1, 60, [["sh", "-c", {keeps!r}]], {{"RESULTS": "build/rehearsal"}}),
    gpu_proof.Step("never", 1, 60, [["true"]]),
]
gpu_proof.steps_of = lambda options, gpu: steps
sys.exit(gpu_proof.main(["first", "--rehearse", "--out", {str(out)!r}]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    running = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        log = folder / "build" / "rehearsal" / "long.log"
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().count("\n") >= 2):
            assert time.monotonic() < deadline, "the step did not begin"
            time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 1
    finally:
        running.kill()
    record, files = packed(out, "first")
    assert [(step["name"], step["status"]) for step in record["steps"]] == [
        ("short", "passed"),
        ("long", "stopped"),
        ("never", "stopped"),
    ]
    assert record["steps"][1]["reason"] == "the call was stopped by SIGTERM"
    assert files["rehearsal/partial.json"] == b"kept\n"
    process = int(log.read_text().splitlines()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_stopped_tests_say_what_failed(tmp_path: Path) -> None:
    test = tmp_path / "test_two.py"
    test.write_text(
        "import time\ndef test_wrong(): assert 1 + 1 == 3\ndef test_long(): time.sleep(60)\n"
    )
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    with open(tmp_path / "log", "w+") as log:
        run = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdout=log,
        )
        while "F" not in (tmp_path / "log").read_text():
            assert run.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        time.sleep(0.5)
        run.terminate()
        run.wait(120)
    assert "test_two.py::test_wrong - assert (1 + 1) == 3" in (tmp_path / "log").read_text()
