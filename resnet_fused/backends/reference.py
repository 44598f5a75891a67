"""Backend `reference`: the plain PyTorch meaning of each op, on any device and floating dtype."""

from __future__ import annotations

import torch

from ..reference import ops
from . import Backend


class ReferenceBackend:
    name = "reference"
    training = None
    bn_add_relu = staticmethod(ops.bn_add_relu)
    conv_bn = staticmethod(ops.conv_bn)
    conv_bn_projection = staticmethod(ops.conv_bn_projection)
    bottleneck = staticmethod(ops.bottleneck)
    stem = staticmethod(ops.stem)
    head = staticmethod(ops.head)

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None


def create() -> Backend:
    return ReferenceBackend()
