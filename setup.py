"""Builds resnet_fused._C with CMake and ninja. Torch and a GPU are unused.

RESNET_FUSED_EXTENSION=off builds nothing; else a C++ compiler is needed (see build_backend.py).
The CUDA part follows RESNET_FUSED_CUDA (see build_backend.py). RESNET_FUSED_CUDA_ARCHS lists the
architectures to compile, as in "80;90a"; PTX of the oldest and the newest portable one is added,
so that a GPU between or above them runs too. The machine's own GPU is never looked at.
RESNET_FUSED_HOST_SIM=on adds resnet_fused._C_sim, in which tests run the CUDA kernels' source on
the host; it needs no CUDA, but x86-64 Linux.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from build_backend import (  # noqa: E402  (the folder is not always on the path)
    choice,
    cuda_mode,
    extension_wanted,
    find_cxx,
    find_nvcc,
    require_cxx,
)

# Code of sm_86 serves sm_87 and sm_89 too, for which ptxas writes the same; that of sm_100 and
# sm_120 serves what shares their major version.
DEFAULT_ARCHITECTURES = "80;86;90a;100;120"
OLDEST_CUDA = (12, 5)  # whose CCCL spells the barriers and copies of sm_90a (cuda::ptx)


class Cuda(NamedTuple):
    """What the CUDA part is built with, or why it is left out (`nvcc` is None)."""

    nvcc: Path | None
    version: str = ""
    real: tuple[str, ...] = ()
    ptx: tuple[str, ...] = ()
    note: str = ""


def _number(architecture: str) -> int:
    return int(architecture.rstrip("af"))


def choose_cuda() -> Cuda:
    """Compiler and architectures, from the environment and what nvcc says about itself."""
    mode = cuda_mode()
    if mode == "off":
        return Cuda(None, note="RESNET_FUSED_CUDA=off when it was built")
    nvcc = find_nvcc()
    if nvcc is None:
        missing = "no CUDA compiler was found in CUDACXX, CUDA_HOME or PATH when it was built"
        if mode == "on":
            raise SystemExit(
                f"RESNET_FUSED_CUDA=on, but {missing}. Point CUDACXX at nvcc, or build without "
                "--no-build-isolation so that pip fetches the compiler (Linux on x86_64 or "
                "aarch64), or set RESNET_FUSED_CUDA=off."
            )
        return Cuda(None, note=missing)

    def ask(option: str) -> str:
        try:
            return subprocess.check_output([nvcc, option], text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"{nvcc} {option} failed ({error}). Point CUDACXX at a working nvcc, "
                "or set RESNET_FUSED_CUDA=off."
            ) from error

    found = re.search(r"V(\d+)\.(\d+)\.(\d+)", ask("--version"))
    if found is None or tuple(map(int, found.groups()[:2])) < OLDEST_CUDA:
        raise SystemExit(
            f"{nvcc} is {found[0] if found else 'of unknown version'}; CUDA 12.5 or newer is "
            "needed. Point CUDACXX at a newer nvcc, or set RESNET_FUSED_CUDA=off."
        )
    known = {int(n) for n in re.findall(r"compute_(\d+)", ask("--list-gpu-arch"))}
    chosen = os.environ.get("RESNET_FUSED_CUDA_ARCHS")
    real = [a for a in re.split(r"[;,\s]+", chosen or DEFAULT_ARCHITECTURES) if a]
    if not chosen:
        real = [a for a in real if _number(a) in known]
    wrong = [a for a in real if not re.fullmatch(r"\d+[af]?", a) or _number(a) not in known]
    if wrong or not real:
        raise SystemExit(
            f"RESNET_FUSED_CUDA_ARCHS={chosen!r}: {wrong or 'nothing'} is not among the "
            f"architectures of nvcc {found[0]} ({', '.join(map(str, sorted(known)))}, each with an "
            'optional "a"); write them like "80;90a".'
        )
    portable = sorted({int(a) for a in real if a.isdigit()})
    ptx = tuple(str(a) for a in dict.fromkeys((portable[0], portable[-1]))) if portable else ()
    return Cuda(nvcc, found[0][1:], tuple(real), ptx, f"nvcc {found[0][1:]}")


def host_simulator_wanted() -> bool:
    """RESNET_FUSED_HOST_SIM: whether resnet_fused._C_sim is built beside resnet_fused._C."""
    return choice("RESNET_FUSED_HOST_SIM", "off", "on") == "on"


_SIMULATOR = "resnet_fused._C_sim"


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt; the module lands where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == _SIMULATOR:
            return  # one CMake run builds both
        require_cxx()
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        version = self.distribution.get_version()
        cuda = choose_cuda()
        compiled = f"CUDA {cuda.version}: sm_{', sm_'.join(cuda.real)}; PTX {', '.join(cuda.ptx)}"
        print(
            f"resnet_fused {version} builds for CPU and {compiled}"
            if cuda.nvcc
            else f"resnet_fused {version} builds for CPU, without CUDA: {cuda.note}",
            flush=True,
        )
        options = [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DRESNET_FUSED_VERSION={version}",
            f"-DRESNET_FUSED_CUDA_NOTE={cuda.note}",
            f"-DRESNET_FUSED_CUDA={'ON' if cuda.nvcc else 'OFF'}",
            f"-DRESNET_FUSED_HOST_SIM={'ON' if host_simulator_wanted() else 'OFF'}",
        ]
        cxx = find_cxx() or []
        environment = {**os.environ, "CXX": shlex.join(cxx)}
        if cuda.nvcc:
            architectures = [f"{a}-real" for a in cuda.real] + [f"{a}-virtual" for a in cuda.ptx]
            options += [
                f"-DCMAKE_CUDA_COMPILER={cuda.nvcc}",
                f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(architectures)}",
                f"-DRESNET_FUSED_CUDA_REAL={' '.join(cuda.real)}",
                f"-DRESNET_FUSED_CUDA_PTX={' '.join(cuda.ptx)}",
            ]
            if len(cxx) == 1:  # not one with options or behind a launcher
                environment.setdefault("CUDAHOSTCXX", cxx[0])
            # nvcc from PyPI looks for the runtime in lib64; its wheels have lib.
            library = cuda.nvcc.resolve().parent.parent / "lib"
            if (library / "libcudart_static.a").exists():
                paths = [str(library), *environment.get("LIBRARY_PATH", "").split(os.pathsep)]
                environment["LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
        if not host_simulator_wanted():
            for outdated in target.parent.glob("_C_sim*"):  # of an earlier build in this folder
                outdated.unlink()
        self._run(folder, options, environment)

    def _run(self, folder: Path, options: list[str], environment: dict[str, str]) -> None:
        # Isolated builds bring CMake, ninja and nvcc at a new place each time, which CMake's cache
        # does not survive; with the same ones, the folder is kept and the build is incremental.
        tools = [shutil.which("cmake") or "cmake", shutil.which("ninja") or "ninja"]
        recorded = "\n".join([*tools, environment["CXX"], *options])
        record = folder / "configured_with.txt"
        if not record.exists() or record.read_text() != recorded:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        try:
            subprocess.run(
                ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options],
                env=environment,
                check=True,
            )
            record.write_text(recorded)
            subprocess.run(["cmake", "--build", folder], env=environment, check=True)
        except FileNotFoundError as error:
            raise SystemExit("cmake was not found; pip install cmake ninja pybind11") from error
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"building resnet_fused failed ({error}). The compiler's messages are above; "
                "if they are nvcc's, RESNET_FUSED_CUDA=off builds without CUDA."
            ) from error


_NAMES = ["resnet_fused._C"] + ([_SIMULATOR] if host_simulator_wanted() else [])
if not extension_wanted():
    _NAMES = []

setup(
    ext_modules=[Extension(name, sources=[]) for name in _NAMES],
    cmdclass={"build_ext": CMakeBuild},
)
