"""The ops of backend `triton`: which kernel serves which call, on the tensor's own device."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...parameters import BatchNorm, ConvBn, MaxPool
from .. import LayerByLayer
from ..tuning import Tuner
from . import convolution, elementwise, stem
from .head import head
from .training import TritonTraining

# Decided when the kernels are defined, that is, when this module is imported.
INTERPRETED = triton.knobs.runtime.interpret
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _counting_kernel(out, n):
    for i in range(0, n):
        tl.store(out + i, i)


def interpreter_fault() -> str | None:
    """Why Triton's interpreter cannot run loops here, or None where it can.

    That of Triton 3.5 converts arrays to numbers in a way that newer versions of NumPy refuse.
    """
    try:
        _counting_kernel[(1,)](torch.empty(2, dtype=torch.int32), 2)
    except Exception as error:  # whatever Triton makes of it
        return f"{type(error).__name__}: {error}"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device's current stream: make it the tensor's device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


class TritonBackend(LayerByLayer):
    """Implements `resnet_fused.backends.Backend`; keeps the launch configurations it chose."""

    name = "triton"

    def __init__(self) -> None:
        self._tuner = Tuner("triton")
        self.training = TritonTraining(self._tuner)

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in _DTYPES:
            return f"its kernels take float32, float16 and bfloat16, and the input is {dtype}"
        if INTERPRETED:
            if device.type != "cpu":
                return f"TRITON_INTERPRET=1 interprets CPU tensors, and the input is on {device}"
            if dtype == torch.bfloat16:
                return "Triton's interpreter (TRITON_INTERPRET=1) has no bfloat16 arithmetic"
            return None
        if device.type != "cuda":
            return (
                f"the input is on {device} and Triton compiles for CUDA GPUs; move it to one, or "
                "set TRITON_INTERPRET=1 before the first import of triton"
            )
        if _capability(device) < (8, 0):
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability "
                f"{'.'.join(map(str, _capability(device)))} and the kernels need 8.0"
            )
        return None

    def bn_add_relu(self, x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
        with _on(x.device):
            return elementwise.bn_add_relu(x, bn, residual, relu)

    def conv_bn(self, x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool) -> Tensor:
        with _on(x.device):
            return convolution.conv_bn(self._tuner, x, layer, residual, relu)

    def conv_bn_projection(
        self, x: Tensor, layer: ConvBn, shortcut: Tensor, projection: ConvBn
    ) -> Tensor:
        with _on(x.device):
            return convolution.conv_bn_projection(self._tuner, x, layer, shortcut, projection)

    def stem(self, x: Tensor, layer: ConvBn, pool: MaxPool) -> Tensor:
        with _on(x.device):
            return stem.stem(self._tuner, x, layer, pool)

    def head(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with _on(x.device):
            return head(self._tuner, x, weight, bias)
