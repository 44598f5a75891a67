"""Triton's kernels compile with the oldest Triton that pyproject.toml allows, too.

Each Triton reads their Python in its own way: what the newest compiles may be an error in an older
one, which users would meet as a kernel family that is left out on their machine.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_training_compile import TELLING

from resnet_fused.testing.ahead_of_time import compiled_kernels

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def oldest_triton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import it from."""
    folder = tmp_path_factory.mktemp("triton")
    (version,) = re.findall(r'"triton>=([\d.]+);', (ROOT / "pyproject.toml").read_text())
    wanted = f"triton=={version}.*"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    result = subprocess.run([*command, wanted], capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip(f"pip could not install {wanted}: {result.stderr.strip()[-200:]}")
    return folder


@pytest.mark.network
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("worker", "arguments"),
    [
        pytest.param("test_triton_compile.py", ("bfloat16",), id="inference"),
        pytest.param("test_triton_compile.py", ("int8",), id="int8"),
        pytest.param("test_training_compile.py", ("bfloat16", *TELLING), id="training"),
    ],
)
def test_kernels_compile(oldest_triton: Path, worker: str, arguments: tuple[str, ...]) -> None:
    script = str(Path(__file__).with_name(worker))
    kernels = compiled_kernels(script, 90, *arguments, before=oldest_triton)
    used = [kernel["instructions"] for kernel in kernels]
    assert sum("mma.sync" in instructions for instructions in used) > 3
    # Its products of warp groups lack a fence (`resnet_fused.backends.fences_products`).
    assert not any("wgmma.mma_async" in instructions for instructions in used)
