"""Backend `cpu`: float32 and bfloat16 on x86 and Arm.

Convolutions run as oneDNN's fused primitives on prepacked weights, everywhere; where the compiled
extension is there and faster, as its own kernels: Winograd for 3×3 in float32, and the stem.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _extension
from ...errors import BackendUnavailableError
from ...parameters import BatchNorm, Convolution, MaxPool
from ...reference import ops as reference
from .. import Backend
from .live_cache import LiveCache
from .memory import keep_freed_memory
from .native import PooledStem, WinogradConvolution
from .onednn import OPERATORS, FoldedConvolution

PackedConvolution = FoldedConvolution | WinogradConvolution

# Layers below both run as PyTorch's own ops: what fusion saves there is no more than its overhead,
# and with few weights the rounding of folded ones is a single draw, not an average.
_SMALL_RESULT = 1 << 14
_SMALL_WEIGHT = 1 << 16


def _is_small(x: Tensor, conv: Convolution) -> bool:
    if x.numel() == 0:
        return True
    (_, _, height, width), (out_channels, *_) = x.shape, conv.weight.shape
    result = x.shape[0] * out_channels * (height // conv.stride[0]) * (width // conv.stride[1])
    return result < _SMALL_RESULT and conv.weight.numel() < _SMALL_WEIGHT


class CpuBackend:
    name = "cpu"

    def __init__(self) -> None:
        extension = None if _extension.available() else _extension.load()
        self._convolutions: LiveCache[PackedConvolution] = LiveCache(extension)
        self._stems: LiveCache[PooledStem] = LiveCache(extension)
        kernels = extension if extension is not None and extension.cpu_isa() else None
        self._kernels = kernels
        self._winograd = functools.partial(WinogradConvolution, kernels) if kernels else None
        self._bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it serves tensors in main memory, not on {device}"
        if dtype == torch.bfloat16 and not self._bfloat16:
            return "oneDNN's bfloat16 needs a processor with AVX-512 or its successors"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it serves float32 and bfloat16, not {dtype}"
        if not torch.backends.mkldnn.enabled:
            return "torch.backends.mkldnn.enabled is False; set it to True"
        return None

    def bn_add_relu(self, x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
        return reference.bn_add_relu(x, bn, residual, relu)

    def conv_bn(
        self, x: Tensor, conv: Convolution, bn: BatchNorm, residual: Tensor | None, relu: bool
    ) -> Tensor:
        if _is_small(x, conv):
            return reference.conv_bn(x, conv, bn, residual, relu)
        packed = self._pack(x, conv, bn)
        return packed(x, relu) if residual is None else packed.add(x, residual, relu)

    def conv_bn_projection(
        self,
        x: Tensor,
        conv: Convolution,
        bn: BatchNorm,
        shortcut: Tensor,
        projection: Convolution,
        projection_bn: BatchNorm,
    ) -> Tensor:
        if _is_small(x, conv) or shortcut.numel() == 0:
            return reference.conv_bn_projection(x, conv, bn, shortcut, projection, projection_bn)
        projected = self._pack(shortcut, projection, projection_bn)(shortcut, False)
        return self._pack(x, conv, bn).add_into(x, projected, True)

    def stem(self, x: Tensor, conv: Convolution, bn: BatchNorm, pool: MaxPool) -> Tensor:
        kernels = self._kernels
        if kernels is None or not PooledStem.serves(kernels, conv, pool) or _is_small(x, conv):
            return F.max_pool2d(self.conv_bn(x, conv, bn, None, True), *pool)
        keep_freed_memory()
        packed = self._stems.get(
            (conv.weight, *bn[:4]), bn.eps, lambda: PooledStem(kernels, conv, bn)
        )
        return packed(x)

    def head(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.head(x, weight, bias)

    def _pack(self, x: Tensor, conv: Convolution, bn: BatchNorm) -> PackedConvolution:
        keep_freed_memory()
        kind: Callable[[Convolution, BatchNorm], PackedConvolution] = FoldedConvolution
        if self._winograd is not None and WinogradConvolution.serves(x, conv):
            kind = self._winograd
        return self._convolutions.get(
            (conv.weight, *bn[:4]),
            (kind, *map(tuple, conv[1:4]), conv.groups, bn.eps),
            lambda: kind(conv, bn),
        )


def create() -> Backend:
    if not torch.backends.mkldnn.is_available():
        raise BackendUnavailableError(
            "backend 'cpu' needs oneDNN (MKL-DNN), which this build of PyTorch lacks; install one "
            "of the official builds, or use backend 'reference'."
        )
    missing = [name for name in OPERATORS if not hasattr(torch.ops.mkldnn, name)]
    if missing:
        raise BackendUnavailableError(
            f"backend 'cpu' needs PyTorch's operators mkldnn::{', mkldnn::'.join(missing)}, which "
            f"version {torch.__version__} lacks; install torch>=2.9, or use backend 'reference'."
        )
    return CpuBackend()
