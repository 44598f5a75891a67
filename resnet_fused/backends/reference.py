"""Backend `reference`: every op by its plain PyTorch meaning, on any device and in any dtype.

It lists no kernels, because that meaning stands behind every op anyway; other backends inherit that
for the ops that they have no kernels for.
"""

from __future__ import annotations

from .base import Backend
from .training import TrainingKernels


class ReferenceBackend(Backend):
    """Implements `resnet_fused.backends.Backend`, as that does by itself."""

    name = "reference"
    training: TrainingKernels | None = None


def create() -> Backend:
    return ReferenceBackend()
