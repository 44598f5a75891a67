"""Backend `cpu`: float32 and bfloat16 (AVX2, AVX-512, NEON), with the compiled extension.

Convolutions run as its kernels: direct for one group and for several, Winograd for 3×3 in float32,
and the stem with its pooling. What those do not serve, bfloat16 on some processors, runs as
oneDNN's convolution and one pass of ours; dilated windows that reach far, as in atrous pyramids,
are left to PyTorch. Quantised ops have kernels of their own, in int8.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import _extension, settings
from ...errors import BackendUnavailableError
from ...parameters import BatchNorm, ConvBn, Convolution, Gate, GroupNorm, MaxPool
from .. import Backend, Candidate, Candidates
from ..live_cache import LiveCache
from ..training import TrainingKernels
from .native import (
    PackedConvolution,
    PooledStem,
    bn_add_relu,
    group_norm_add_relu,
    head,
    squeeze_excite,
    suits_winograd,
)
from .onednn import OPERATORS, OneDnnConvolution
from .quantized import QuantizedCpuBackend
from .training import CpuTraining

_MOST_COPIED = 4 << 20  # bytes: beyond a core's caches, where zeros are most of what is copied


class CpuBackend(QuantizedCpuBackend):
    """Implements `resnet_fused.backends.Backend`."""

    name = "cpu"

    def __init__(self) -> None:
        extension = _extension.load()
        super().__init__(extension)
        self.extension = extension
        self._convolutions: LiveCache[PackedConvolution | OneDnnConvolution] = LiveCache(extension)
        self._stems: LiveCache[PooledStem] = LiveCache(extension)
        self._own = set()  # dtypes that our kernels convolve, and as fast as any
        if extension.cpu_isa():
            self._own.add(torch.float32)
        has_tiles = extension.cpu_has_amx_bf16()
        tiles = has_tiles and settings.amx_enabled()
        if extension.cpu_convolves_bf16() and (tiles or not has_tiles):
            self._own.add(torch.bfloat16)
        self._bfloat16_isa = "amx" if tiles else ""
        # Grouped convolutions, in either dtype, and gradients are written for x86's vectors.
        self._groups = extension.cpu_isa() in ("avx2", "avx512")
        trained = self._own - ({torch.bfloat16} if has_tiles else set())
        self.training: TrainingKernels = CpuTraining(extension, trained if self._groups else set())
        self._bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it serves tensors in main memory, not on {device}"
        if dtype == torch.float32 and dtype not in self._own:
            return "its float32 kernels need AArch64, or an x86 processor with AVX2 or AVX-512"
        if dtype == torch.bfloat16 and not (self._bfloat16 or dtype in self._own):
            return "its bfloat16 kernels need an x86 processor with AVX2, or Arm's FEAT_BF16"
        if dtype in (torch.uint8, torch.int8):
            return None if self._quantized else "its int8 kernels need an x86 processor with AVX2"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it serves float32, bfloat16 and int8, not {dtype}"
        if not torch.backends.mkldnn.enabled:
            return "torch.backends.mkldnn.enabled is False; set it to True"
        return None

    def bn_add_relu(
        self, x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool
    ) -> Candidates:
        return (Candidate("cpu", functools.partial(bn_add_relu, self.extension)),)

    def group_norm_add_relu(
        self, x: Tensor, norm: GroupNorm, residual: Tensor | None, relu: bool
    ) -> Candidates:
        return (Candidate("cpu", functools.partial(group_norm_add_relu, self.extension)),)

    def conv(self, x: Tensor, conv: Convolution) -> Candidates:
        return (Candidate("cpu", self._conv),) if self._computes(x, conv) else ()

    def conv_bn(self, x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool) -> Candidates:
        return (Candidate("cpu", self._conv_bn),) if self._computes(x, layer.conv) else ()

    def conv_bn_projection(
        self, x: Tensor, layer: ConvBn, shortcut: Tensor, projection: ConvBn
    ) -> Candidates:
        if not (self._computes(x, layer.conv) and self._computes(shortcut, projection.conv)):
            return ()
        return (Candidate("cpu", self._conv_bn_projection),)

    def stem(self, x: Tensor, layer: ConvBn, pool: MaxPool) -> Candidates:
        if layer.conv.weight.dtype not in self._own or not PooledStem.serves(layer.conv, pool):
            return ()
        return (Candidate("cpu", self._stem),)

    def squeeze_excite(
        self, x: Tensor, gate: Gate, residual: Tensor | None, relu: bool
    ) -> Candidates:
        return (Candidate("cpu", functools.partial(squeeze_excite, self.extension)),)

    def head(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Candidates:
        return (Candidate("cpu", functools.partial(head, self.extension)),)

    def _computes(self, x: Tensor, conv: Convolution) -> bool:
        # Several groups are not oneDNN's: see reference/convolution.py.
        return (conv.groups == 1 or self._groups) and not _reaches_far(x, conv)

    def _conv(self, x: Tensor, conv: Convolution) -> Tensor:
        return self._pack(x, conv)(x, None, None, False)

    def _conv_bn(self, x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool) -> Tensor:
        return self._pack(x, layer.conv)(x, layer.bn, residual, relu)

    def _conv_bn_projection(
        self, x: Tensor, layer: ConvBn, shortcut: Tensor, projection: ConvBn
    ) -> Tensor:
        main, side = self._pack(x, layer.conv), self._pack(shortcut, projection.conv)
        if (
            isinstance(main, PackedConvolution)
            and isinstance(side, PackedConvolution)
            and main.adds_projection(side)
        ):
            return main.with_projection(x, layer.bn, shortcut, side, projection.bn)
        residual = side(shortcut, projection.bn, None, False)
        return main(x, layer.bn, residual, True, in_place=True)

    def _stem(self, x: Tensor, layer: ConvBn, pool: MaxPool) -> Tensor:
        conv, bn = layer
        packed = self._stems.get(conv.weight, None, lambda: PooledStem(self.extension, conv))
        return packed(x, bn)

    def _pack(self, x: Tensor, conv: Convolution) -> PackedConvolution | OneDnnConvolution:
        own = conv.groups > 1 or conv.weight.dtype in self._own
        winograd = own and suits_winograd(x, conv)
        form = (own, winograd, *conv[1:])

        def pack() -> PackedConvolution | OneDnnConvolution:
            if own:
                return PackedConvolution(self.extension, conv, winograd, self._bfloat16_isa)
            return OneDnnConvolution(self.extension, conv)

        return self._convolutions.get(conv.weight, form, pack)


def _reaches_far(x: Tensor, conv: Convolution) -> bool:
    """Whether a dilated window of one group has more lines than a task of ours should copy."""
    rows, columns = ((n - 1) * d for n, d in zip(conv.weight.shape[2:], conv.dilation, strict=True))
    lines = (rows + 1) * (x.shape[3] + columns) * x.shape[1] * x.element_size()
    return conv.groups == 1 and max(conv.dilation) > 1 and lines > _MOST_COPIED


def create() -> Backend:
    if reason := _extension.available():
        raise BackendUnavailableError(
            f"backend 'cpu' needs the compiled extension: {reason}. Until then tensors in main "
            "memory are served by PyTorch's own ops (backend 'reference'), as exact, but slower."
        )
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
