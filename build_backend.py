"""PEP 517 backend: setuptools, plus NVIDIA's compiler from PyPI where the machine has none.

Also the one place that decides whether and with which nvcc the build compiles CUDA; setup.py
imports it. Configured by the environment:

RESNET_FUSED_CUDA        auto (default): with CUDA where a compiler is found or can be had;
                         on: fail without one; off: without CUDA.
RESNET_FUSED_CUDA_ARCHS  for example "80;90a": see setup.py.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# One minor version throughout: a newer nvvm writes PTX that an older ptxas rejects. The lowest one
# of its major version, because the statically linked runtime then runs on the oldest driver.
COMPILER_WHEELS = [
    f"nvidia-{part}==13.0.*"
    for part in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")
]
_WHEEL_ROOT = Path("nvidia", "cu13")


def cuda_mode() -> str:
    """RESNET_FUSED_CUDA as auto, on or off; ValueError for anything else."""
    mode = os.environ.get("RESNET_FUSED_CUDA", "auto").strip().lower()
    if mode not in ("auto", "on", "off"):
        raise ValueError(f"RESNET_FUSED_CUDA={mode!r} is not understood; set it to auto, on or off")
    return mode


def find_nvcc() -> Path | None:
    """nvcc from CUDACXX, CUDA_HOME, PATH or the PyPI wheels, in that order."""
    if named := os.environ.get("CUDACXX"):
        found = shutil.which(named)
        if found is None:
            raise FileNotFoundError(f"CUDACXX={named!r} is no program; correct or unset it")
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


def get_requires_for_build_wheel(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _compiler_wheels()


def get_requires_for_build_editable(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _compiler_wheels()
