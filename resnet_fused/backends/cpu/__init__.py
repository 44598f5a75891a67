"""Backend `cpu`: oneDNN's fused convolutions on prepacked weights, in float32 and bfloat16."""

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
from .onednn import OPERATORS, FoldedConvolution


class CpuBackend:
    name = "cpu"

    def __init__(self) -> None:
        self._extension = None if _extension.available() else _extension.load()
        self._folded: LiveCache[FoldedConvolution] = LiveCache(self._extension)
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
        folded = self._fold(conv, bn)
        return folded(x, relu) if residual is None else folded.add(x, residual, relu)

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
        projected = self._fold(projection, projection_bn)(shortcut, False)
        return self._fold(conv, bn).add_into(x, projected, True)

    def stem(self, x: Tensor, conv: Convolution, bn: BatchNorm, pool: MaxPool) -> Tensor:
        return F.max_pool2d(self.conv_bn(x, conv, bn, None, True), *pool)

    def head(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.head(x, weight, bias)

    def _fold(self, conv: Convolution, bn: BatchNorm) -> FoldedConvolution:
        return self._folded.get(
            (conv.weight, *bn[:4]),
            (*map(tuple, conv[1:4]), conv.groups, bn.eps),
            lambda: FoldedConvolution(conv, bn),
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
