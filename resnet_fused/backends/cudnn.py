"""Backend `cudnn`: training by cuDNN's convolutions with our passes between them.

It keeps as few bytes for backward as backend `triton` and leaves the convolutions to the library.
For inference it lists nothing: there cuDNN's convolutions are candidates of backend `cuda`.
"""

from __future__ import annotations

import torch

from . import Backend, get
from .reference import ReferenceBackend
from .training import TrainingKernels


class CudnnBackend(ReferenceBackend):
    """Implements `resnet_fused.backends.Backend`."""

    name = "cudnn"

    def __init__(self, passes: Backend, training: TrainingKernels) -> None:
        """`passes`: the backend that serves what lies between convolutions."""
        self._passes = passes
        self.training = training

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return self._passes.unsupported(device, dtype)


def create() -> Backend:
    """The backend; BackendUnavailableError where Triton, whose passes it needs, cannot run."""
    passes = get("triton")
    from .triton.library_training import LibraryTraining

    return CudnnBackend(passes, LibraryTraining())
