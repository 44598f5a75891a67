"""Threads of the CPU kernels: every task once, whatever the number of threads and who else runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused
from resnet_fused import _extension

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ["none", "thread", "address,undefined"]


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_team_does_every_task_once_and_waits_for_it(sanitizer: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler in PATH")
    program = tmp_path / "team"
    command = [compiler, "-std=c++17", "-O1", "-g", "-pthread", f"-I{ROOT / 'csrc'}"]
    if sanitizer != "none":
        command += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    built = subprocess.run(
        [*command, str(ROOT / "tests" / "team.cpp"), "-o", str(program)],
        capture_output=True,
        text=True,
    )
    if built.returncode != 0 and sanitizer != "none":
        pytest.skip(f"this compiler has no sanitizer {sanitizer}: {built.stderr[-300:]}")
    assert built.returncode == 0, built.stderr
    # A thread that is not woken, or a barrier that nobody reaches, ends here.
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's layout of memory")
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]


def _forward(model: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(x)
    return out


def _model() -> tuple[Any, Tensor]:
    if reason := _extension.available():
        pytest.skip(reason)
    torch.manual_seed(0)
    model = resnet_fused.resnet18(num_classes=10).eval()
    return model, torch.randn(2, 3, 64, 64)


def test_bits_do_not_depend_on_the_number_of_threads(threads: None) -> None:
    model, x = _model()
    results = []
    for count in (1, 2, 3, 8, 2):
        torch.set_num_threads(count)
        results += [_forward(model, x) for _ in range(4)]
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_forwards_of_several_threads_at_a_time(threads: None) -> None:
    model, x = _model()
    inputs = [x + i for i in range(3)]
    expected = [_forward(model, image) for image in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        torch.set_num_threads(1 + i)
        for _ in range(15):
            if not torch.equal(_forward(model, inputs[i]), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins no threads")
def test_threads_keep_the_cores_that_they_were_given() -> None:
    model, x = _model()

    def allowed() -> dict[str, set[int]]:
        return {task: os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")}

    for _ in range(3):
        _forward(model, x)
    before = allowed()
    for _ in range(30):
        _forward(model, x)
    after = allowed()
    assert {task: after[task] for task in before if task in after} == before


def test_a_forked_process_computes_with_one_thread(threads: None) -> None:
    """OpenMP's threads do not follow a fork; a child with one thread asks for none."""
    model, x = _model()
    expected = [_forward(model, x) for _ in range(3)][-1]
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(_forward(model, x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
