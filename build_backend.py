"""PEP 517 backend: setuptools, what it needs, and NVIDIA's compiler where the machine has none.

Also the one place that decides with which compilers the extension is built; setup.py imports it.
Needs nothing but Python itself until it has looked for a C++ compiler, so that a machine without
one is told before anything is fetched. Configured by the environment:

RESNET_FUSED_EXTENSION   on (default); off: installs Python only, for Triton and plain PyTorch.
RESNET_FUSED_CUDA        auto (default): with CUDA where a compiler is found or can be had;
                         on: fail without one; off: without CUDA.
RESNET_FUSED_CUDA_ARCHS  for example "80;90a": see setup.py.
CXX, CUDACXX             the compilers, where others than those on PATH are wanted.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

SETUPTOOLS = ["setuptools>=77"]
BUILD_TOOLS = ["cmake>=3.24", "ninja", "pybind11>=2.13"]
# One minor version throughout: a newer nvvm writes PTX that an older ptxas rejects. The lowest one
# of its major version, because the statically linked runtime then runs on the oldest driver.
COMPILER_WHEELS = [
    f"nvidia-{part}==13.0.*"
    for part in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")
]
_WHEEL_ROOT = Path("nvidia", "cu13")

_COMPILERS = ("c++", "g++", "clang++")
# What tells a compiler that is new enough for csrc/: C++17, conversions and choices between vectors
# and, last to come of all (GCC 10), AVX512_BF16, which the assembler has to know as well.
_OLDEST_COMPILERS = "GCC 10 or Clang 12"
_PROBE = """\
#include <optional>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
static_assert(__cplusplus >= 201703L, "C++17");
typedef unsigned Words __attribute__((vector_size(16)));
typedef unsigned short Halves __attribute__((vector_size(8)));
Halves narrow(Words a, Words b) { return __builtin_convertvector(a == b ? a : b >> 1, Halves); }
std::optional<int> none() { return std::nullopt; }
#if defined(__x86_64__)
bool here() { return __builtin_cpu_supports("avx512bf16"); }
__attribute__((target("avx512f,avx512bf16"))) __m512 multiply(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#endif
"""


def choice(name: str, *allowed: str) -> str:
    """The environment variable's value, the first by default; SystemExit for any other."""
    value = os.environ.get(name, allowed[0]).strip().lower()
    if value not in allowed:
        known = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
        raise SystemExit(f"{name}={value!r} is not understood; set it to {known}.")
    return value


def extension_wanted() -> bool:
    """RESNET_FUSED_EXTENSION: whether anything is compiled."""
    return choice("RESNET_FUSED_EXTENSION", "on", "off") == "on"


def cuda_mode() -> str:
    """RESNET_FUSED_CUDA as auto, on or off."""
    return choice("RESNET_FUSED_CUDA", "auto", "on", "off")


def find_cxx() -> list[str] | None:
    """The C++ compiler's command: CXX, which may hold options, or the first one on PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise SystemExit(f"CXX={os.environ['CXX']!r} is no program; correct or unset it.")
        return named
    return next(([found] for name in _COMPILERS if (found := shutil.which(name))), None)


class _Lack(NamedTuple):
    """Something that the build needs and this machine lacks.

    packages: what brings it, by package manager. cxx: the compiler in it, where CXX must name it.
    """

    what: str
    packages: dict[str, str]
    cxx: dict[str, str] = {}  # noqa: RUF012  (a NamedTuple's default)


def _lacks() -> Iterator[_Lack]:
    cxx = find_cxx()
    if cxx is None:
        yield _Lack(
            f"a C++ compiler, of which none is on PATH ({', '.join(_COMPILERS)})",
            {"apt-get": "g++", "dnf": "gcc-c++"},
        )
    elif failure := _failure(cxx):
        # The oldest systems that PyTorch runs on have an older one, and offer these beside it.
        yield _Lack(
            f"{_OLDEST_COMPILERS}, or newer, where {shlex.join(cxx)} gives up ({failure})",
            {"apt-get": "g++-10", "dnf": "gcc-toolset-12-gcc-c++"},
            {"apt-get": "g++-10", "dnf": "/opt/rh/gcc-toolset-12/root/usr/bin/g++"},
        )
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.is_file():
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        yield _Lack(
            f"Python's headers, of which {headers} is missing",
            {"apt-get": f"{python}-dev", "dnf": f"{python}-devel"},
        )


def _failure(cxx: list[str]) -> str | None:
    """Why the compiler cannot compile what csrc/ is made of, or None if it can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(_PROBE)
        command = [*cxx, "-std=c++17", "-c", str(source), "-o", str(source.with_suffix(".o"))]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    said = result.stderr.splitlines() or [f"exit code {result.returncode}"]
    return next((line for line in said if "error" in line), said[0]).strip()


def require_cxx() -> None:
    """SystemExit, in one sentence with the command that helps, where csrc/ cannot be compiled."""
    lacks = list(_lacks())
    if not lacks:
        return
    commands = {}
    for manager in ("apt-get", "dnf"):
        command = " ".join([manager, "install", *(lack.packages[manager] for lack in lacks)])
        settings = [f" and set CXX={lack.cxx[manager]}" for lack in lacks if lack.cxx]
        commands[manager] = f"run `{command}`" + "".join(settings)
    fitting = [advice for manager, advice in commands.items() if shutil.which(manager)]
    raise SystemExit(
        f"Building resnet_fused needs {' and '.join(lack.what for lack in lacks)}: "
        f"{' or '.join(fitting or commands.values())}, or set RESNET_FUSED_EXTENSION=off to "
        "install without the compiled extension, with Triton's kernels and plain PyTorch only."
    )


def find_nvcc() -> Path | None:
    """nvcc from CUDACXX, CUDA_HOME, PATH or the PyPI wheels, in that order."""
    if named := os.environ.get("CUDACXX"):
        found = shutil.which(named)
        if found is None:
            raise SystemExit(f"CUDACXX={named!r} is no program; correct or unset it.")
        return Path(found)
    folders = [Path(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    folders += [Path(entry) for entry in os.get_exec_path()]
    folders += [Path(entry) / _WHEEL_ROOT / "bin" for entry in sys.path]
    for folder in folders:
        if found := shutil.which("nvcc", path=str(folder)):
            return Path(found)
    return None


def _has_compiler_wheels() -> bool:
    return (
        sys.platform == "linux"
        and platform.machine() in ("x86_64", "aarch64")
        and platform.libc_ver()[0] == "glibc"
    )


def _compiler_wheels() -> list[str]:
    wanted = cuda_mode() != "off" and find_nvcc() is None and _has_compiler_wheels()
    return COMPILER_WHEELS if wanted else []


# The hooks. setuptools is imported in those that run once it is there.

Settings = Mapping[str, Any] | None


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return SETUPTOOLS


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    if not extension_wanted():
        return SETUPTOOLS
    require_cxx()
    return SETUPTOOLS + BUILD_TOOLS + _compiler_wheels()


get_requires_for_build_editable = get_requires_for_build_wheel


def prepare_metadata_for_build_wheel(folder: str, config_settings: Settings = None) -> str:
    from setuptools import build_meta

    if extension_wanted():  # without isolation nobody asks for the requirements first
        require_cxx()
    return build_meta.prepare_metadata_for_build_wheel(folder, config_settings)


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


def build_sdist(folder: str, config_settings: Settings = None) -> str:
    from setuptools import build_meta

    return build_meta.build_sdist(folder, config_settings)


def build_wheel(folder: str, config_settings: Settings = None, metadata: str | None = None) -> str:
    from setuptools import build_meta

    return build_meta.build_wheel(folder, config_settings, metadata)


def build_editable(
    folder: str, config_settings: Settings = None, metadata: str | None = None
) -> str:
    from setuptools import build_meta

    return build_meta.build_editable(folder, config_settings, metadata)
