"""Every environment variable the package reads, parsed in this one place.

Values are read when they are asked for, so a test or a notebook can change them at run time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Variable(NamedTuple):
    """One environment variable, as `python -m resnet_fused.env` and the docs list it."""

    name: str
    default: str
    meaning: str
    allowed: tuple[str, ...] = ()  # none where anything is

    def value(self) -> str:
        """What it is set to, or the default; ValueError for what is not allowed."""
        value = os.environ.get(self.name, self.default)
        if self.allowed:
            value = value.strip().lower()
            if value not in self.allowed:
                raise ValueError(
                    f"{self.name}={value!r} is not understood; set it to "
                    f"{' or '.join(self.allowed)}."
                )
        return value


VARIABLES = (
    Variable(
        "RESNET_FUSED_EXTENSION",
        "on",
        "build: off compiles nothing; Triton's kernels and plain PyTorch remain",
        ("on", "off"),
    ),
    Variable(
        "RESNET_FUSED_CUDA",
        "auto",
        "build: auto, on or off; `on` fails without nvcc",
        ("auto", "on", "off"),
    ),
    Variable(
        "RESNET_FUSED_CUDA_ARCHS",
        "80;86;90a;100;120",
        "build: CUDA architectures, separated by semicolons; PTX of the oldest and newest is added",
    ),
    Variable(
        "RESNET_FUSED_HOST_SIM",
        "off",
        "build: on adds the simulator that tests the CUDA kernels without a GPU",
        ("on", "off"),
    ),
    Variable(
        "RESNET_FUSED_HOST_SIM_CAPABILITY",
        "80",
        "run: the compute capability, 80 or 90, of the GPU that backend cuda_sim stands for",
        ("80", "90"),
    ),
    Variable(
        "RESNET_FUSED_TUNE",
        "on",
        "run: on lets a process measure kernels for a few seconds, off leaves the choice to "
        "heuristics; `python -m resnet_fused.tune` measures ahead",
        ("on", "off"),
    ),
    Variable(
        "RESNET_FUSED_TRAINING",
        "speed",
        "run: speed trains each block by what was measured fastest, memory by the fused ops, which "
        "keep less than 0.6 of the bytes for backward",
        ("speed", "memory"),
    ),
    Variable(
        "RESNET_FUSED_SELFCHECK",
        "on",
        "run: on checks the kernels in a child process before their first use on a machine",
        ("on", "off"),
    ),
    Variable(
        "RESNET_FUSED_CPU_AMX",
        "off",
        "run: on convolves in tiles (AMX) by kernels of our own, which so far ran under an "
        "emulation only; off leaves bfloat16 to oneDNN's and int8 to our vector kernels",
        ("on", "off"),
    ),
    Variable(
        "RESNET_FUSED_CACHE_DIR",
        "~/.cache/resnet_fused",
        "run: folder of measured times and self-checks ($XDG_CACHE_HOME is honoured)",
    ),
    Variable(
        "RESNET_FUSED_COMMIT",
        "",
        "run: the commit that result files name, of sources whose git does not know it",
    ),
)


_BY_NAME = {variable.name: variable for variable in VARIABLES}


def tuning_enabled() -> bool:
    """Whether kernel candidates may be measured (`RESNET_FUSED_TUNE`)."""
    return _BY_NAME["RESNET_FUSED_TUNE"].value() == "on"


def training_saves_memory() -> bool:
    """Whether blocks train by ops that keep fewer bytes (`RESNET_FUSED_TRAINING`)."""
    return _BY_NAME["RESNET_FUSED_TRAINING"].value() == "memory"


def selfcheck_enabled() -> bool:
    """Whether kernels have to pass the self-check first (`RESNET_FUSED_SELFCHECK`)."""
    return _BY_NAME["RESNET_FUSED_SELFCHECK"].value() == "on"


def amx_enabled() -> bool:
    """Whether our own kernels may use AMX (`RESNET_FUSED_CPU_AMX`)."""
    return _BY_NAME["RESNET_FUSED_CPU_AMX"].value() == "on"


def host_sim_capability() -> int:
    """Ten times the simulated compute capability (`RESNET_FUSED_HOST_SIM_CAPABILITY`)."""
    return int(_BY_NAME["RESNET_FUSED_HOST_SIM_CAPABILITY"].value())


def commit() -> str | None:
    """The commit of sources that are no git checkout (`RESNET_FUSED_COMMIT`)."""
    return os.environ.get("RESNET_FUSED_COMMIT") or None


def cache_directory() -> Path:
    """Folder of measured times and self-checks (`RESNET_FUSED_CACHE_DIR`); it need not exist."""
    if path := os.environ.get("RESNET_FUSED_CACHE_DIR"):
        return Path(path).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "resnet_fused"
