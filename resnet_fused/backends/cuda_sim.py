"""Backend `cuda_sim`: the CUDA kernels' own source, run on the host over CPU tensors.

For tests: every op of the CUDA backend with its memory accesses, barriers and layouts checked (see
csrc/host_sim/simulator.h), far too slow for anything else. Built by RESNET_FUSED_HOST_SIM=on
and never chosen automatically.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _extension, settings
from .._extension import tensor_arg
from ..errors import BackendUnavailableError
from ..parameters import Convolution
from ..reference.training import ReferenceTraining
from . import Backend, Candidate, autotune
from .cuda import CudaBackend
from .cuda.launch import Launcher
from .training import TrainingKernels

_MODULE = "_C_sim"


class _SimulatedLauncher(Launcher):
    """Runs kernels in the simulator, which lets each touch the tensors among its arguments only."""

    capability: int | None = None

    def place(self, device: torch.device) -> int:
        self.extension.set_capability(self.capability or settings.host_sim_capability())
        return 0

    def run(self, kernel: Callable[..., None], out: Tensor, *arguments: Any) -> Tensor:
        kernel(tensor_arg(out), *arguments, self.place(out.device), 0)
        return out


class _SimulatedTraining(ReferenceTraining):
    """Training's convolutions simulated where there is a kernel for them, else plain PyTorch."""

    def __init__(self, listed: Callable[[str, tuple[Any, ...]], list[Candidate]]) -> None:
        self._listed = listed

    def _run(self, piece: str, plain: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        def listed() -> list[Candidate]:
            return [*self._listed(piece, arguments), Candidate("pytorch", plain)]

        return autotune.choose(piece, arguments, listed, plain, "cuda_sim").launch(*arguments)

    def conv_stats(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        found: tuple[Tensor, Tensor | None] = self._run("conv_stats", super().conv_stats, arguments)
        return found

    def dgrad(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        all_of_them = (*arguments, None, None)[:7]  # without add_stride and term
        found: tuple[Tensor, Tensor | None] = self._run("dgrad", super().dgrad, all_of_them)
        return found

    def wgrad(self, *arguments: Any) -> Tensor:
        found: Tensor = self._run("wgrad", super().wgrad, arguments)
        return found


class SimulatedBackend(CudaBackend):
    """The CUDA backend with a simulated GPU that leaves nothing to cuDNN.

    An error that the simulator finds in a kernel is raised as RuntimeError.
    """

    name = "cuda_sim"

    def __init__(
        self, extension: ModuleType, tile: Any = None, capability: int | None = None
    ) -> None:
        """`capability`: ten times the simulated GPU's; by default the setting's, at each call."""
        super().__init__(extension, tile)
        self._launcher.capability = capability  # type: ignore[attr-defined]

    def _make_launcher(self, extension: ModuleType) -> Launcher:
        return _SimulatedLauncher(extension)

    @functools.cached_property
    def training(self) -> TrainingKernels | None:  # type: ignore[override]  # read-only
        return _SimulatedTraining(self.training_convolutions)

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it simulates a GPU over CPU tensors and the input is on {device}"
        if dtype not in (*self._launcher.dtypes, *self._launcher.quantized_dtypes):
            return (
                f"the CUDA kernels do not serve {dtype}; use float32, float16, bfloat16, uint8, "
                "int8 or float8_e4m3fn"
            )
        return None

    def _left_to_cudnn(self, x: Tensor, conv: Convolution) -> bool:
        return False


def load() -> ModuleType:
    """The simulator's extension; BackendUnavailableError, with the fix, where it is not built."""
    if reason := _extension.available(_MODULE):
        raise BackendUnavailableError(
            f"backend 'cuda_sim', a developer's tool, cannot run: {reason}."
        )
    return _extension.load(_MODULE)


def create() -> Backend:
    return SimulatedBackend(load())
