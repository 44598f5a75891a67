"""oneDNN's convolution through PyTorch's `mkldnn` operators, on weights packed once.

For what our own kernel does not do, or not as fast: one group in bfloat16 where the processor lacks
its instructions or multiplies matrices in tiles (AMX). Nothing is folded into the weights: in
bfloat16 a folded weight's rounding is the same at every pixel, which the average pool does not
shrink as it shrinks the roundings of activations.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...parameters import BatchNorm, Convolution
from ...reference.convolution import well_posed
from ..arguments import nhwc
from ..bounded import Bounded
from .native import bn_add_relu

OPERATORS = (
    "_convolution_pointwise",
    "_reorder_convolution_weight",
    "_get_mkldnn_serialized_md",
)
_SIZES = 256  # that are remembered for a layer


class OneDnnConvolution:
    """relu?(bn(conv(x)) (+ residual)) of one group: oneDNN's convolution, then a pass in place.

    bn None: the convolution alone, without a residual or ReLU.
    """

    def __init__(self, extension: ModuleType, conv: Convolution) -> None:
        self._extension = extension
        # oneDNN picks the layout by the input's size; another layout is right too, yet far
        # slower. So: one copy for each layout, and which one each size wants.
        self._layouts: dict[bytes, Tensor] = {}
        self._by_size: Bounded[Any, Tensor] = Bounded(_SIZES)
        # Packed weights outlive the mode they were made in, and the weight's content.
        with torch.inference_mode(False), torch.no_grad():
            self._latest = conv.weight.detach().clone()
        self._conv = conv._replace(weight=torch.empty_like(conv.weight, device="meta"))

    def __call__(
        self,
        x: Tensor,
        bn: BatchNorm | None,
        residual: Tensor | None,
        relu: bool,
        in_place: bool = False,
    ) -> Tensor:
        """(N, C, H, W) -> a new (N, K, P, Q), channels_last; `in_place` is not made use of."""
        x, conv = well_posed(x, self._conv)
        geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        size = (x.shape, *conv.stride)
        packed = self._by_size.get(size)
        if packed is None:
            packed = self._by_size[size] = self._pack(x.shape, geometry)
        out = torch.ops.mkldnn._convolution_pointwise(x, packed, None, *geometry, "none", [], "")
        if bn is None:
            return nhwc(out)
        owned = out.is_contiguous(memory_format=torch.channels_last)
        return bn_add_relu(self._extension, out, bn, residual, relu, in_place=owned)

    def _pack(self, size: torch.Size, geometry: tuple[Any, ...]) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            weight = self._latest
            packed = torch.ops.mkldnn._reorder_convolution_weight(
                weight.to_dense() if weight.is_mkldnn else weight, *geometry, list(size)
            )
            layout = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy())
        self._latest = packed = self._layouts.setdefault(layout, packed)
        return packed
