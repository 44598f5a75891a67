"""The machine code of the program that measures a GPU's peaks."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from machine_code import cuobjdump

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def machine_code_of_peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """SASS by kernel."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc in PATH")
    program = tmp_path_factory.mktemp("peaks") / "peaks"
    source = ROOT / "benchmarks" / "microbenchmarks" / "peaks.cu"
    command = [nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-o", program, source]
    subprocess.run([*command, "-gencode", "arch=compute_90a,code=sm_90a"], check=True)
    listing = cuobjdump(program, "--dump-sass")
    return {
        re.sub(r"\w*?peaks_cu\w*?\d+([a-z]+_kernel)(?:ILi(\d+)E)?\w*", r"\1\2", name): body
        for name, body in (part.split("\n", 1) for part in listing.split("Function : ")[1:])
    }


@pytest.mark.parametrize(
    ("kernel", "instruction", "number"),
    [
        ("wgmma_kernel64", r"HGMMA\.64x64x16\.F32\.BF16", 4),
        ("wgmma_kernel128", r"HGMMA\.64x128x16\.F32\.BF16", 4),
        ("mma_kernel", r"HMMA\.16816\.F32\.BF16", 8),
    ],
)
def test_peaks_multiply_in_one_loop(
    machine_code_of_peaks: dict[str, str], kernel: str, instruction: str, number: int
) -> None:
    """All of a step's products, none left out, none elsewhere, and little beside them."""
    body = machine_code_of_peaks[kernel]
    assert len(re.findall(instruction, body)) == number
    assert not re.search(r"\b(LDL|STL)\b", body)
    lines = [line for line in body.splitlines() if re.search(r"/\*[0-9a-f]{4}\*/", line)]
    places = [i for i, line in enumerate(lines) if re.search(instruction, line)]
    assert places[-1] - places[0] < 4 * number


def test_peaks_read_sixteen_bytes_past_l1_many_at_a_time(
    machine_code_of_peaks: dict[str, str],
) -> None:
    body = machine_code_of_peaks["read_kernel"]
    loads = [line for line in body.splitlines() if "LDG" in line]
    assert len(loads) % 4 == 0
    assert all("LDG.E.128.STRONG.GPU" in line for line in loads)
    # None is used before the last of its four is asked for.
    lines = body.splitlines()
    places = [i for i, line in enumerate(lines) if "LDG" in line]
    for group in zip(*[iter(places)] * 4, strict=True):
        loaded = {re.search(r"GPU (R\d+),", lines[i])[1] for i in group}  # type: ignore[index]
        between = [lines[i] for i in range(group[0], group[-1]) if i not in group]
        assert len(loaded) == 4
        assert not any(re.search(rf"\b{name}\b", line) for name in loaded for line in between)
