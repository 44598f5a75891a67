"""Backends: each implements every op for one kind of machine. Loaded when first asked for.

A backend receives checked arguments (shapes, dtypes and devices agree, no dimension of the result
is zero) and returns a new channels_last tensor. To add one, write a module with a function
`create() -> Backend` (raising BackendUnavailableError where it cannot run) and name it below.
"""

from __future__ import annotations

import functools
import importlib
from typing import Protocol

import torch
from torch import Tensor

from ..errors import BackendUnavailableError
from ..parameters import BatchNorm, ConvBn, MaxPool
from .training import TrainingKernels

NAMES = ("tuned", "cuda", "triton", "cpu", "cuda_sim", "reference")
# Best first, for each type of device.
PREFERENCE = {"cuda": ("tuned", "triton", "cuda", "reference"), "cpu": ("cpu", "reference")}
# What each type of device has kernels for, where they are built and its processor is not too old.
ACCELERATED = {
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
    "cpu": (torch.float32, torch.bfloat16),
}


class Backend(Protocol):
    """One way to compute every op. Meanings: `resnet_fused.reference.ops`, same signatures."""

    name: str

    @property
    def training(self) -> TrainingKernels | None:
        """The pieces of fused training, or None where models train module by module."""

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why tensors of this device and dtype cannot be served, or None."""

    def bn_add_relu(
        self, x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool
    ) -> Tensor: ...

    def conv_bn(self, x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool) -> Tensor: ...

    def conv_bn_projection(
        self, x: Tensor, layer: ConvBn, shortcut: Tensor, projection: ConvBn
    ) -> Tensor: ...

    def bottleneck(
        self,
        x: Tensor,
        layer1: ConvBn,
        layer2: ConvBn,
        layer3: ConvBn,
        projection: ConvBn | None,
    ) -> Tensor: ...

    def stem(self, x: Tensor, layer: ConvBn, pool: MaxPool) -> Tensor: ...

    def head(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...


class LayerByLayer:
    """What backends have in common that have no kernel for a whole block, or not for every one."""

    def bottleneck(
        self: Backend,
        x: Tensor,
        layer1: ConvBn,
        layer2: ConvBn,
        layer3: ConvBn,
        projection: ConvBn | None,
    ) -> Tensor:
        out = self.conv_bn(x, layer1, None, True)
        out = self.conv_bn(out, layer2, None, True)
        if projection is None:
            return self.conv_bn(out, layer3, x, True)
        return self.conv_bn_projection(out, layer3, x, projection)


@functools.cache
def _load(name: str) -> Backend | BackendUnavailableError:
    module = importlib.import_module(f".{name}", __name__)
    try:
        return module.create()
    except BackendUnavailableError as error:
        return error


def get(name: str) -> Backend:
    """The backend of that name; ValueError if unknown, BackendUnavailableError if it cannot run."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(sorted(NAMES))}.")
    backend = _load(name)
    if isinstance(backend, BackendUnavailableError):
        raise BackendUnavailableError(str(backend))
    return backend


def unavailable(name: str) -> str | None:
    """Why the backend of that name cannot run here, or None when it can."""
    backend = _load(name)
    return str(backend) if isinstance(backend, BackendUnavailableError) else None


def tf32_in_convolutions() -> bool:
    """Whether PyTorch's settings for cuDNN let convolutions round float32 operands to TF32 (this
    getter reflects `cudnn.allow_tf32` too)."""
    setting = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # replaces its module
    return setting.fp32_precision == "tf32"
