"""The training pieces of backend `cuda`: convolutions by our kernels for Hopper, as candidates
beside Triton's, and Triton's passes between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import Candidate
from ..triton.training import TritonTraining


class CudaTraining(TritonTraining):
    """Implements `resnet_fused.backends.training.TrainingKernels`."""

    among = "cuda"
    signs = True

    def __init__(self, listed: Callable[[str, tuple[Any, ...]], list[Candidate]]) -> None:
        """`listed`: our candidates for a piece and its arguments."""
        super().__init__()
        self._listed = listed

    def more(self, piece: str, arguments: tuple[Any, ...]) -> list[Candidate]:
        return self._listed(piece, arguments)
