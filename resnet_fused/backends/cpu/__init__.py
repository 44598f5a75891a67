"""Backend `cpu`: float32 and bfloat16 on x86 and Arm.

Convolutions run as oneDNN's fused primitives on prepacked weights, everywhere; where the compiled
extension is there and faster, as its own kernels: Winograd for 3×3 in float32, and the stem.
"""

from __future__ import annotations

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


class CpuBackend:
    name = "cpu"

    def __init__(self) -> None:
        extension = None if _extension.available() else _extension.load()
        self._convolutions: LiveCache[FoldedConvolution | WinogradConvolution]
        self._convolutions = LiveCache(extension)
        self._stems: LiveCache[PooledStem] = LiveCache(extension)
        self._kernels = extension if extension is not None and extension.cpu_isa() else None
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
        if x.numel() == 0:
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
        if x.numel() == 0 or shortcut.numel() == 0:
            return reference.conv_bn_projection(x, conv, bn, shortcut, projection, projection_bn)
        projected = self._pack(shortcut, projection, projection_bn)(shortcut, False)
        return self._pack(x, conv, bn).add_into(x, projected, True)

    def stem(self, x: Tensor, conv: Convolution, bn: BatchNorm, pool: MaxPool) -> Tensor:
        kernels = self._kernels
        if kernels is None or not PooledStem.serves(kernels, conv, pool):
            return F.max_pool2d(self.conv_bn(x, conv, bn, None, True), *pool)
        keep_freed_memory()
        packed = self._stems.get(
            (conv.weight, *bn[:4]), bn.eps, lambda: PooledStem(kernels, conv, bn)
        )
        return packed(x)

    def head(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.head(x, weight, bias)

    def _pack(
        self, x: Tensor, conv: Convolution, bn: BatchNorm
    ) -> FoldedConvolution | WinogradConvolution:
        keep_freed_memory()
        kernels = self._kernels

        def pack() -> FoldedConvolution | WinogradConvolution:
            if kernels is not None and winograd:
                return WinogradConvolution(kernels, conv, bn)
            return FoldedConvolution(conv, bn)

        winograd = kernels is not None and WinogradConvolution.serves(x, conv)
        form = (winograd, *map(tuple, conv[1:4]), conv.groups, bn.eps)
        return self._convolutions.get((conv.weight, *bn[:4]), form, pack)


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
