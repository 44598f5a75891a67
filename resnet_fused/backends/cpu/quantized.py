"""The CPU's quantised kernels: where they apply, and their weights and arguments.

They equal `resnet_fused.reference.quantized` bit for bit in int8, with any number of threads.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import settings
from ..._extension import optional_tensor_arg, tensor_arg
from ...parameters import (
    Convolution,
    MaxPool,
    QuantizedLayer,
    QuantizedShortcut,
    is_resnet_stem,
)
from ...reference.quantized import quantized_dtype
from .. import Candidate, Candidates
from ..arguments import empty_nhwc, nhwc, shortcut_args
from ..live_cache import LiveCache
from ..reference import ReferenceBackend
from .native import pack

_MOST_CHANNELS = 65536  # of the head
_MOST_PIXELS = 2**23


class PackedQuantizedWeight(NamedTuple):
    packed: Tensor  # under the name by which plans find it


class QuantizedKernels:
    """Each quantised op by the extension, for arguments that its `serves` accepted."""

    def __init__(self, extension: ModuleType, isa: str = "") -> None:
        """isa: one of `cpu_quantized_isas()`, or "" for the best."""
        self._extension = extension
        self._isa = isa
        self._weights: LiveCache[PackedQuantizedWeight] = LiveCache(extension, frozen=True)

    def conv(
        self, x: Tensor, layer: QuantizedLayer, shortcut: QuantizedShortcut | None, relu: bool
    ) -> Tensor:
        conv, bias, multiplier, padding_value = layer
        size = conv.output_size(*x.shape[2:])
        out = empty_nhwc(x, conv.weight.shape[0], *size, quantized_dtype(layer, relu))
        self._extension.quantized_conv(
            tensor_arg(out),
            self._layer(x, conv),
            tensor_arg(bias),
            tensor_arg(multiplier),
            *shortcut_args(shortcut, self._layer),
            optional_tensor_arg(padding_value),
            self._isa,
        )
        return out

    def stem(self, x: Tensor, layer: QuantizedLayer, pool: MaxPool) -> Tensor:
        conv, bias, multiplier, padding_value = layer
        height, width = x.shape[2:]
        # Halved twice, rounded up.
        pooled = (height + 3) // 4, (width + 3) // 4
        out = empty_nhwc(x, conv.weight.shape[0], *pooled, torch.uint8)
        self._extension.quantized_stem(
            tensor_arg(out),
            tensor_arg(x),
            tensor_arg(self._packed("stem", conv.weight)),
            tensor_arg(bias),
            tensor_arg(multiplier),
            optional_tensor_arg(padding_value),
            self._isa,
        )
        return out

    def head(self, x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor) -> Tensor:
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32)
        self._extension.quantized_head(
            tensor_arg(out),
            tensor_arg(nhwc(x)),
            tensor_arg(self._packed("head", weight)),
            tensor_arg(bias),
            tensor_arg(multiplier),
            self._isa,
        )
        return out

    def _packed(self, form: str, weight: Tensor, *groups: int) -> Tensor:
        def packed() -> PackedQuantizedWeight:
            return PackedQuantizedWeight(
                pack(self._extension, f"quantized_{form}", weight, *groups)
            )

        return self._weights.get(weight, (form, *groups), packed).packed

    def _layer(self, x: Tensor, conv: Convolution) -> tuple[Any, ...]:
        window = (conv.weight.shape[2:], *conv[1:])
        packed = self._packed("conv", conv.weight, conv.groups)
        return tensor_arg(nhwc(x)), tensor_arg(packed), window


class QuantizedCpuBackend(ReferenceBackend):
    """The quantised ops of backend `cpu`; int8, where the processor has AVX2."""

    def __init__(self, extension: ModuleType) -> None:
        isas = extension.cpu_quantized_isas()
        self._quantized = bool(isas)
        tiles = "amx" in isas and settings.amx_enabled()
        self._kernels = QuantizedKernels(extension, "amx" if tiles else "")

    def _serves(self, weight: Tensor) -> bool:
        return self._quantized and weight.dtype == torch.int8

    def quantized_conv(
        self, x: Tensor, layer: QuantizedLayer, shortcut: QuantizedShortcut | None, relu: bool
    ) -> Candidates:
        conv, projection = layer.conv, shortcut and shortcut.projection
        served = self._serves(conv.weight) and (
            projection is None
            or (projection.padding == (0, 0) and conv.groups == projection.groups == 1)
        )
        return (Candidate("cpu", self._kernels.conv),) if served else ()

    def quantized_stem(self, x: Tensor, layer: QuantizedLayer, pool: MaxPool) -> Candidates:
        served = self._serves(layer.conv.weight) and is_resnet_stem(layer.conv, pool)
        return (Candidate("cpu", self._kernels.stem),) if served else ()

    def quantized_head(
        self, x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor
    ) -> Candidates:
        served = (
            self._serves(weight)
            and x.shape[1] <= _MOST_CHANNELS
            and x.shape[2] * x.shape[3] <= _MOST_PIXELS
        )
        return (Candidate("cpu", self._kernels.head),) if served else ()
