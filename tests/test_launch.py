"""Launches without PyTorch, simulated, and the machine code of the program that measures peaks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import launch
import numpy as np
import pytest
from machine_code import cuobjdump

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def simulated(simulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The simulator's module, which a process can load only once, as what `load` gives."""
    monkeypatch.setattr(launch, "load", lambda name: simulator)
    return simulator


def test_the_process_holds_no_torch(simulator: ModuleType) -> None:
    program = "import sys, launch\nlaunch.load('_C_sim')\nassert 'torch' not in sys.modules\n"
    # Beside nothing but what stands in the folder of the program.
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=ROOT / "benchmarks", check=True, timeout=60)


def test_every_kernel_gives_what_numpy_gives(simulated: ModuleType, capsys: Any) -> None:
    assert launch.main(["small", "--simulate", "--images", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.endswith("done, as NumPy has it") for line in lines)
    tiles = [name for name in simulated.ConvTile.__members__ if name != "automatic"]
    for name in (
        *tiles,
        *(f"int8 {name}" for name in simulated.QuantizedTile.__members__),
        "bottleneck 64/2 projection",
        "bottleneck_sm90 64/1",
        "stem",
        "stem bytes",
        "head",
        "bn_add_relu",
    ):
        assert any(line.startswith(name) for line in lines), name


def test_a_wrong_element_is_found(simulated: ModuleType, monkeypatch: Any, capsys: Any) -> None:
    get = launch.Simulator.get

    def off_by_one(self: launch.Simulator, address: int, array: launch.Array) -> None:
        get(self, address, array)
        array.flat[-1] += 1

    monkeypatch.setattr(launch.Simulator, "get", off_by_one)
    assert launch.main(["small", "--simulate", "--images", "1", "--only", "stem", "head"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"of \d+", "of N", line) for line in lines] == [
        f"{name}: FAILED: 1 of N elements differ from NumPy's"
        for name in ("stem", "stem bytes", "head")
    ]


def test_what_the_simulator_finds_is_no_success(simulated: ModuleType, capsys: Any) -> None:
    simulated.plant({"skipped_barrier": 1})
    try:
        assert launch.main(["small", "--simulate", "--images", "1", "--only", "stem"]) == 1
    finally:
        simulated.plant()
    assert "FAILED" in capsys.readouterr().out


def test_kernels_that_begin_early_wait_before_they_read(simulated: ModuleType, capsys: Any) -> None:
    """On sm_90 they may begin before the kernel that makes their input has ended."""
    kernels = ("sm90", "stem", "head")
    simulated.plant({"skipped_kernel_wait": 0})
    try:
        command = ["small", "--simulate", "--images", "1", "--only", *kernels]
        assert launch.main(command) == 1
    finally:
        simulated.plant()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10
    assert all("before it has waited for the kernel before this one" in line for line in lines)


def test_no_launch_is_no_success(simulated: ModuleType, capsys: Any) -> None:
    assert launch.main(["small", "--simulate", "--only", "nothing"]) == 1
    assert "no such launch" in capsys.readouterr().err


class FakeDriver:
    """libcuda.so.1's calls that launch.py makes, over the host's memory."""

    def __init__(self) -> None:
        self.held: dict[int, np.ndarray[Any, Any]] = {}
        self.synchronised = 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    cuDeviceGet = cuDevicePrimaryCtxRetain = lambda self, where, what: 0  # noqa: N815
    cuCtxSetCurrent = lambda self, context: 0  # noqa: E731, N815

    def cuCtxSynchronize(self) -> int:  # noqa: N802
        self.synchronised += 1
        return 0

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:  # noqa: N802
        memory = np.zeros(size.value, np.uint8)
        address._obj.value = memory.ctypes.data
        self.held[memory.ctypes.data] = memory
        return 0

    def cuMemcpyHtoD_v2(self, to: Any, source: Any, size: Any) -> int:  # noqa: N802
        launch.ctypes.memmove(to.value, source.value, size.value)
        return 0

    def cuMemcpyDtoH_v2(self, to: Any, source: Any, size: Any) -> int:  # noqa: N802
        launch.ctypes.memmove(to.value, source.value, size.value)
        return 0

    def cuMemFree_v2(self, address: Any) -> int:  # noqa: N802
        del self.held[address.value]
        return 0


def test_memory_of_the_driver_goes_there_and_back(monkeypatch: Any) -> None:
    driver = FakeDriver()
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: driver)
    memory = launch.Driver()
    values = np.arange(12, dtype=np.float16)
    address = memory.put(values)
    back = np.zeros_like(values)
    memory.get(address, back)
    assert driver.synchronised == 1
    assert np.array_equal(back, values)
    memory.free()
    assert not driver.held


def test_an_error_of_the_driver_is_named(monkeypatch: Any) -> None:
    driver = FakeDriver()
    monkeypatch.setattr(driver, "cuInit", lambda flags: 100)
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: driver)
    with pytest.raises(RuntimeError, match="cuInit failed with CUDA error 100"):
        launch.Driver()


# The microbenchmark


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
    listing = cuobjdump(SimpleNamespace(__file__=str(program)), "--dump-sass")  # type: ignore[arg-type]
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
