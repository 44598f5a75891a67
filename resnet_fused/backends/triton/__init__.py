"""Backend `triton`: every op as Triton kernels, on NVIDIA GPUs and in Triton's interpreter."""

from __future__ import annotations

import importlib.util

import torch

from ...errors import BackendUnavailableError
from .. import Backend


def create() -> Backend:
    """The backend; BackendUnavailableError where Triton or a GPU to run it on is missing."""
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailableError(
            "backend 'triton' needs the package triton, which is not installed; "
            "run `pip install triton` (Linux) or use another backend."
        )
    from .backend import INTERPRETED, TritonBackend, interpreter_fault

    if INTERPRETED and (fault := interpreter_fault()):
        raise BackendUnavailableError(
            "backend 'triton' was asked to run in Triton's interpreter, which fails here "
            f"({fault}); install a newer Triton or an older NumPy, or unset TRITON_INTERPRET."
        )
    if not INTERPRETED and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "backend 'triton' needs a CUDA GPU and PyTorch finds none; use backend 'cpu', or set "
            "TRITON_INTERPRET=1 before the first import of triton to run its kernels, slowly, "
            "on the CPU."
        )
    return TritonBackend()
