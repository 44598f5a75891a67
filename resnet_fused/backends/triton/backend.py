"""Backend `triton`: the kernels and launch configurations that serve each call of an op."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...parameters import ConvBn, MaxPool, QuantizedLayer, QuantizedShortcut
from .. import Candidates
from ..reference import ReferenceBackend
from .convolution import list_conv_bn, list_conv_bn_projection
from .elementwise import list_bn_add_relu, list_squeeze_excite
from .head import list_head
from .quantized import list_quantized_conv, list_quantized_stem
from .quantized_head import list_quantized_head
from .quantized_images import list_quantized_images
from .stem import list_stem
from .training import TritonTraining

# Decided when the kernels are defined, that is, when this module is imported.
INTERPRETED = triton.knobs.runtime.interpret
_QUANTIZED = (torch.uint8, torch.int8, torch.float8_e4m3fn)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, *_QUANTIZED)


@triton.jit
def _counting_kernel(out, n):
    for i in range(0, n):
        tl.store(out + i, i)


def interpreter_fault() -> str | None:
    """Why Triton's interpreter cannot run loops here, or None where it can.

    That of Triton 3.5 and 3.6 converts arrays to numbers in a way that NumPy refuses from 2.4.
    """
    try:
        _counting_kernel[(1,)](torch.empty(2, dtype=torch.int32), 2)
    except Exception as error:  # whatever Triton makes of it
        return f"{type(error).__name__}: {error}"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class TritonBackend(ReferenceBackend):
    """Implements `resnet_fused.backends.Backend`."""

    name = "triton"
    training = TritonTraining()

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in _DTYPES:
            return (
                f"its kernels take float32, float16, bfloat16, bytes and float8_e4m3fn, not {dtype}"
            )
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

    def bn_add_relu(self, *_: Any) -> Candidates:
        return list_bn_add_relu()

    def conv_bn(self, x: Tensor, layer: ConvBn, *_: Any) -> Candidates:
        return list_conv_bn(x, layer)

    def conv_bn_projection(
        self, x: Tensor, layer: ConvBn, shortcut: Tensor, projection: ConvBn
    ) -> Candidates:
        return list_conv_bn_projection(x, layer, projection)

    def stem(self, x: Tensor, layer: ConvBn, pool: MaxPool) -> Candidates:
        return list_stem(x, layer, pool)

    def squeeze_excite(self, *_: Any) -> Candidates:
        return list_squeeze_excite()

    def head(self, x: Tensor, weight: Tensor, *_: Any) -> Candidates:
        return list_head(x, weight)

    def quantized_images(self, *_: Any) -> Candidates:
        return list_quantized_images()

    def quantized_conv(
        self, x: Tensor, layer: QuantizedLayer, shortcut: QuantizedShortcut | None, relu: bool
    ) -> Candidates:
        return list_quantized_conv(x, layer.conv, shortcut and shortcut.projection)

    def quantized_stem(self, x: Tensor, layer: QuantizedLayer, pool: MaxPool) -> Candidates:
        return list_quantized_stem(x, layer.conv)

    def quantized_head(self, x: Tensor, weight: Tensor, *_: Any) -> Candidates:
        return list_quantized_head(x, weight)
