"""Python calls of a training step on the host, with the launches of kernels stubbed.

Times depend on the machine, counts do not: a step of ResNet-50 makes no more calls than it did when
they were last looked at. Those of PyTorch's own code (modules, autograd, dispatch of custom ops)
are left out, as they differ from version to version.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
# Of a ResNet-50 step, batch 2 of 64²; in float16, under autocast, blocks fold their ends.
LAUNCHES = {"float32": 488, "float16": 592}
# By folder of resnet_fused; Python 3.12 inlines comprehensions and makes fewer.
FOLDERS = ("backends/triton", "backends/autotune", "")
BUDGETS = {"float32": (155, 20, 1730), "float16": (170, 20, 1730)}


@pytest.mark.parametrize("dtype", LAUNCHES)
def test_calls_of_a_training_step(dtype: str) -> None:
    """In a process of its own, in which nobody else runs and Triton's kernels are interpreted."""
    result = subprocess.run(
        [sys.executable, __file__, dtype],
        capture_output=True,
        text=True,
        env={
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "benchmarks"))),
            "TRITON_INTERPRET": "1",
            "PATH": "",
        },
    )
    assert result.returncode == 0, result.stderr
    launches, *counts = result.stdout.split()
    assert int(launches) == LAUNCHES[dtype]
    found = dict(zip(FOLDERS, map(int, counts), strict=True))
    allowed = dict(zip(FOLDERS, BUDGETS[dtype], strict=True))
    assert all(found[folder] <= allowed[folder] for folder in FOLDERS), found


def _worker(dtype: str) -> None:
    """Prints the number of launches of a step, and its Python calls by folder of resnet_fused, the
    rest of it last."""
    import host_time
    import torch

    import resnet_fused
    from resnet_fused.backends.triton import launching
    from resnet_fused.ops import training_programs
    from resnet_fused.plan import training

    training._MOST_ELEMENTS = 0  # a GPU's stages have no plans
    launches = 0

    def stub(*arguments: Any) -> None:
        nonlocal launches
        launches += 1

    model = resnet_fused.resnet50().to(memory_format=torch.channels_last).train()
    x = torch.zeros(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=dtype == "float16"):
            y = model(x)
        y.sum().backward()

    counts = Counter(dict.fromkeys(FOLDERS, 0))
    package = str(Path(resnet_fused.__file__).parent)

    def count(frame: FrameType, event: str, argument: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(package):
            counts[next(f for f in FOLDERS if file.startswith(f"{package}/{f}"))] += 1

    with resnet_fused.use_backend("triton"), host_time.stubbed_triton():
        launching.Launch._start = launching.Launch.replay = stub  # type: ignore
        step()
        programs = list(training_programs._programs.values())
        assert programs
        # Else the op's launches are chosen, checked and described anew in each step.
        assert all(program and all(program.backward.values()) for program in programs)
        launches = 0
        threading.setprofile(count)  # autograd's threads too
        sys.setprofile(count)
        step()
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    print(launches, *(counts[folder] for folder in FOLDERS))


if __name__ == "__main__":
    _worker(sys.argv[1])
