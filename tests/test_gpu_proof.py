"""The command for a GPU machine, as far as a machine without one can try it: what it would run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision", reason="the benchmarks' peers are torchvision's models")

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import contestants  # noqa: E402
import throughput  # noqa: E402
import training  # noqa: E402

from resnet_fused import tune  # noqa: E402

TIMEOUT = """#!/bin/sh
shift 2  # -k 15
echo "$1" >> "$CALLS.seconds"
shift
exec "$@"
"""
RECORDER = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
"""


def calls(tmp_path: Path, *parts: str) -> list[list[str]]:
    """The commands that gpu_proof.sh runs for `parts`, in a copy of the tree's outline."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("python", "pytest", "pip", "compute-sanitizer"):
        (tools / name).write_text(RECORDER)
    (tools / "timeout").write_text(TIMEOUT)
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA H200\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    script = tmp_path / "benchmarks" / "gpu_proof.sh"
    script.parent.mkdir()
    script.write_text((ROOT / "benchmarks/gpu_proof.sh").read_text())
    (tmp_path / "tests").mkdir()
    for test in (ROOT / "tests").glob("test_*.py"):
        (tmp_path / "tests" / test.name).touch()
    log = tmp_path / "calls"
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(log)}
    subprocess.run(["bash", str(script), *parts], env=environment, check=True, timeout=60)
    assert (tmp_path / "benchmarks/results/h200").is_dir()
    return [shlex.split(line) for line in log.read_text().splitlines()]


def options_of(commands: list[list[str]], *program: str) -> list[list[str]]:
    length = len(program)
    return [command[length:] for command in commands if command[:length] == list(program)]


def test_every_command_is_one_that_the_programs_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    commands = calls(tmp_path)
    (measured,) = options_of(commands, "python", "benchmarks/throughput.py")
    assert throughput.parse(measured, contestants.CONTESTANTS).batch == [256, 1, 32]
    trained = options_of(commands, "python", "benchmarks/training.py")
    assert {64, 128, 256} <= set(training.parse(trained[0]).batch)
    (tuned,) = options_of(commands, "python", "-m", "resnet_fused.tune")
    assert tune._options(tuned).batch
    assert len(options_of(commands, "python", "benchmarks/layers.py")) == 2
    tools = [command[2] for command in commands if command[0] == "compute-sanitizer"]
    assert tools == ["memcheck", "racecheck", "initcheck"]
    for command in commands:
        for word in command:
            if word.startswith("tests/"):
                assert (ROOT / word).exists(), word


@pytest.mark.parametrize("part", ["cuda", "training", "throughput", "layers", "networks", "tuning"])
def test_no_part_takes_more_than_eight_minutes(part: str, tmp_path: Path) -> None:
    assert calls(tmp_path, part)
    seconds = (tmp_path / "calls.seconds").read_text().split()
    assert 0 < sum(map(int, seconds)) <= 8 * 60


def test_the_grid_covers_every_network_dtype_and_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    runs = options_of(calls(tmp_path, "every"), "python", "benchmarks/throughput.py")
    found = set()
    for run in runs:
        options = throughput.parse(run, contestants.CONTESTANTS)
        found |= {(options.arch, *options.dtype, batch) for batch in options.batch}
    assert found == {
        (f"resnet{depth}", dtype, batch)
        for depth in (18, 34, 50, 101, 152)
        for dtype in ("bfloat16", "float16")
        for batch in (1, 8, 32, 64, 128, 256, 512)
    }


def test_one_part_of_the_grid(tmp_path: Path) -> None:
    (command,) = calls(tmp_path, "inference-resnet34-float16-1,8")
    assert command[1:] == shlex.split(
        "benchmarks/throughput.py --device cuda --arch resnet34 --dtype float16 --quick --rounds 5 "
        "--batch 1 8 --json benchmarks/results/h200/inference_resnet34_float16_1_8.json "
        "--plot benchmarks/results/h200/inference_resnet34_float16_1_8.png"
    )
