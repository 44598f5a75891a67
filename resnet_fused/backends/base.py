"""What a backend is: for each op, the ways in which it can compute it on one kind of machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..parameters import (
    BatchNorm,
    ConvBn,
    Convolution,
    Gate,
    GroupNorm,
    ImageQuantization,
    MaxPool,
    Normalization,
    QuantizedLayer,
    QuantizedShortcut,
)
from .training import TrainingKernels


class Candidate(NamedTuple):
    """One way to compute an op: a kernel in one configuration, or a library's.

    name: unique among all candidates of the op, as the tuning cache and reports name it:
        "cuda m128n128_sm90", "triton 128x128x64 w8 s3", "cudnn", "pytorch".
    launch: takes the op's arguments, any of the signature it was listed for, and returns a new
        channels_last result.
    family: the kernel family whose self-check must have passed on this machine before the candidate
        runs; "" for what needs none, PyTorch's own ops.
    is_profitable: whether it is expected to be faster than the candidates listed after it, where
        nothing has been measured.
    """

    name: str
    launch: Callable[..., Any]
    family: str = ""
    is_profitable: bool = True


Candidates = Sequence[Candidate]


class Backend(Protocol):
    """Lists candidates for each op, the expected fastest first; none where it cannot implement it,
    as here.

    Arguments have been checked: shapes, dtypes and devices agree, no dimension of the result is
    zero. Meanings: `resnet_fused.reference.ops` and, of the quantised ops,
    `resnet_fused.reference.quantized`, same signatures.
    """

    name: str

    @property
    def training(self) -> TrainingKernels | None:
        """The pieces of fused training, or None where it has none."""
        return None

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why tensors of this device and dtype cannot be served, or None."""
        return None

    def bn_add_relu(
        self, x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool
    ) -> Candidates:
        return ()

    def group_norm_add_relu(
        self, x: Tensor, norm: GroupNorm, residual: Tensor | None, relu: bool
    ) -> Candidates:
        return ()

    def conv(self, x: Tensor, conv: Convolution) -> Candidates:
        return ()

    def conv_bn(self, x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool) -> Candidates:
        return ()

    def conv_bn_projection(
        self, x: Tensor, layer: ConvBn, shortcut: Tensor, projection: ConvBn
    ) -> Candidates:
        return ()

    def bottleneck(
        self,
        x: Tensor,
        layer1: ConvBn,
        layer2: ConvBn,
        layer3: ConvBn,
        projection: ConvBn | None,
    ) -> Candidates:
        return ()

    def stem(self, x: Tensor, layer: ConvBn, pool: MaxPool) -> Candidates:
        return ()

    def image_stem(
        self, images: Tensor, layer: ConvBn, pool: MaxPool, normalization: Normalization
    ) -> Candidates:
        return ()

    def squeeze_excite(
        self, x: Tensor, gate: Gate, residual: Tensor | None, relu: bool
    ) -> Candidates:
        return ()

    def head(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Candidates:
        return ()

    def quantized_images(
        self, x: Tensor, quantization: ImageQuantization, float8: bool
    ) -> Candidates:
        return ()

    def quantized_conv(
        self, x: Tensor, layer: QuantizedLayer, shortcut: QuantizedShortcut | None, relu: bool
    ) -> Candidates:
        return ()

    def quantized_stem(self, x: Tensor, layer: QuantizedLayer, pool: MaxPool) -> Candidates:
        return ()

    def quantized_head(
        self, x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor
    ) -> Candidates:
        return ()
