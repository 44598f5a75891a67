"""Our layouts and coordinates for sm_90a, and the simulator's, against those of CUTLASS's headers.

`pip install --no-deps nvidia-cutlass` gives the headers for good; without it they are downloaded
for the test. All is compiled for the host: neither a GPU nor the built extension takes part. What
is compared stands in csrc/host_sim/tests/cutlass_oracle.cpp; test_layouts.py derives the same from
the PTX ISA.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
CUTLASS = "nvidia-cutlass==4.2.0.0"
INCLUDE = Path("cutlass_library", "source", "include")

pytestmark = pytest.mark.slow

# How many of each kind the program walks through, so that none is lost unnoticed.
CONFIGURATIONS = {
    "swizzles": 4,
    "descriptors": 8808,
    "transposed descriptors": 848,
    "boxes in shared memory": 48,
    "convolutions": 11952,
}


@pytest.fixture(scope="module")
def cutlass(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of CUTLASS's headers."""
    if found := importlib.util.find_spec("cutlass_library"):
        return Path(*found.submodule_search_locations).parent / INCLUDE
    folder = tmp_path_factory.mktemp("cutlass")
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder, CUTLASS]
    result = subprocess.run(download, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip(f"pip could not download {CUTLASS}: {result.stderr.strip()[-200:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if name.startswith(INCLUDE.as_posix())]
        wheel.extractall(folder, names)
    return folder / INCLUDE


@pytest.fixture(scope="module")
def oracle(cutlass: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that compares."""
    if shutil.which("nvcc") is None or shutil.which("g++") is None:
        pytest.skip("no g++, or no nvcc, which knows where CUDA's headers are, in PATH")
    folder = tmp_path_factory.mktemp("oracle")
    # CuTe encodes tensor maps only where it believes to be compiled by nvcc 12 or newer.
    theirs = ["-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL=1", "-D__CUDACC_VER_MAJOR__=12"]
    theirs += ["-D__CUDACC_VER_MINOR__=4", f"-I{cutlass}"]
    ours = ["-DRESNET_FUSED_HOST_SIM", f"-I{CSRC / 'host_sim' / 'include'}"]
    sources = {
        "host_sim/tests/cutlass_theirs.cpp": theirs,
        "host_sim/tests/cutlass_oracle.cpp": ours,
        "host_sim/layout.cpp": ours,
        "host_sim/driver.cpp": ours,
        "kernels/cuda/tensor_map.cpp": ours,
        "kernels/cuda/conv_sm90.cu": ours,
        "kernels/cuda/conv_sm90_lines.cu": ours,
        "kernels/cuda/conv_sm90_split.cu": ours,
    }
    objects = []
    for source, options in sources.items():
        objects.append(folder / f"{Path(source).name}.o")
        compiler = ["nvcc", "-Xcompiler=-w"] if options is theirs else ["g++", "-w"]
        command = [*compiler, "-x", "c++", "-std=c++17", "-O2", *options, f"-I{CSRC}"]
        subprocess.run([*command, "-c", CSRC / source, "-o", objects[-1]], check=True)
    # What the recorded thread never calls stays undefined.
    link = ["-static", "-Wl,--gc-sections", "-Wl,--unresolved-symbols=ignore-all"]
    subprocess.run(["g++", *objects, *link, "-o", folder / "oracle"], check=True)
    return folder / "oracle"


@pytest.mark.network
def test_cutlass_computes_the_same(oracle: Path) -> None:
    result = subprocess.run([oracle], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode >= 0, (
        f"stopped by signal {-result.returncode}: thread 0 of the kernel calls a function of "
        "host_sim for which cutlass_oracle.cpp has no stand-in"
    )
    line = re.compile(r"(.+): (\d+) configurations, (\d+) values, (\d+) differences")
    rows = [row.groups() for row in line.finditer(result.stdout)]
    assert {name: int(configurations) for name, configurations, _, _ in rows} == CONFIGURATIONS
    assert all(int(values) >= int(configurations) for _, configurations, values, _ in rows)
    assert [row for row in rows if row[3] != "0"] == [], result.stderr
    assert result.returncode == 0, result.stderr
