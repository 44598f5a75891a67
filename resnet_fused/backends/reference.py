"""Backend `reference`: every op by its plain PyTorch meaning, on any device and in any dtype.

It lists no kernels, because that meaning stands behind every op anyway; other backends inherit that
for the ops that they have no kernels for.
"""

from __future__ import annotations

from typing import Any

import torch

from .base import Backend, Candidates
from .training import TrainingKernels


class ReferenceBackend:
    """Implements `resnet_fused.backends.Backend`."""

    name = "reference"
    training: TrainingKernels | None = None

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def _nothing(self, *_: Any) -> Candidates:
        return ()

    bn_add_relu = group_norm_add_relu = _nothing
    conv = conv_bn = conv_bn_projection = bottleneck = stem = image_stem = _nothing
    squeeze_excite = head = quantized_conv = quantized_stem = quantized_head = _nothing


def create() -> Backend:
    return ReferenceBackend()
