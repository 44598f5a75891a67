"""The package's own CPU kernels: where they apply, and their weights and arguments.

BN's scale and shift are applied in float32 to float32 sums, so nothing is folded.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ...parameters import BatchNorm, Convolution, MaxPool
from .onednn import scale_and_shift

_LANES = 16  # channel counts that are no multiple of it leave vector lanes idle
_STEM_LANES = 32
_SMALLEST = 2  # a single pixel wants one tap of nine


def _pair(values: tuple[int, int]) -> tuple[int, int]:
    # Dispatched through PyTorch, the schema's int[2] arrive as lists.
    return values[0], values[1]


def _float_scale_and_shift(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    scale, shift = scale_and_shift(bn)
    return scale.float(), shift.float()


class WinogradConvolution:
    """relu?(conv3×3(x) * scale + shift (+ residual)) by Winograd's F(2×2, 3×3), float32."""

    def __init__(self, extension: ModuleType, conv: Convolution, bn: BatchNorm) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._run = extension.winograd_conv
            self._out_channels, self._in_channels = conv.weight.shape[:2]
            self._scale, self._shift = _float_scale_and_shift(bn)
            channels = (self._in_channels, self._out_channels)
            self._packed = torch.empty(extension.winograd_weight_floats(*channels))
            extension.winograd_transform_weights(
                conv.weight.data_ptr(), conv.weight.stride(), self._packed.data_ptr(), *channels
            )

    @staticmethod
    def serves(x: Tensor, conv: Convolution) -> bool:
        """Whether it computes this convolution, and faster and more exactly than oneDNN."""
        weight = conv.weight
        return (
            weight.dtype == torch.float32
            and weight.shape[2:] == (3, 3)
            and all(_pair(pair) == (1, 1) for pair in conv[1:4])
            and conv.groups == 1
            and weight.shape[0] % _LANES == 0
            and weight.shape[1] % _LANES == 0
            and min(x.shape[2:]) >= _SMALLEST
        )

    def __call__(self, x: Tensor, relu: bool) -> Tensor:
        """(N, C, H, W) -> a new (N, K, H, W), channels_last."""
        return self._into(self._empty(x), x, 0, relu)

    def add(self, x: Tensor, residual: Tensor, relu: bool) -> Tensor:
        """With `residual` added before the activation, a new tensor."""
        residual = residual.contiguous(memory_format=torch.channels_last)
        return self._into(self._empty(x), x, residual.data_ptr(), relu)

    def add_into(self, x: Tensor, residual: Tensor, relu: bool) -> Tensor:
        """The same in the memory of `residual`, which is channels_last."""
        return self._into(residual, x, residual.data_ptr(), relu)

    def _empty(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], self._out_channels, *x.shape[2:])
        return torch.empty(shape, memory_format=torch.channels_last)

    def _into(self, out: Tensor, x: Tensor, residual: int, relu: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        self._run(
            x.data_ptr(),
            self._packed.data_ptr(),
            self._scale.data_ptr(),
            self._shift.data_ptr(),
            residual,
            out.data_ptr(),
            x.shape[0],
            *x.shape[2:],
            self._in_channels,
            self._out_channels,
            relu,
        )
        return out


class PooledStem:
    """max_pool(relu(conv7×7(x) * scale + shift)) in one pass, float32 and bfloat16."""

    def __init__(self, extension: ModuleType, conv: Convolution, bn: BatchNorm) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._run = extension.stem_conv_pool
            self._out_channels = conv.weight.shape[0]
            self._bfloat16 = conv.weight.dtype == torch.bfloat16
            self._scale, self._shift = _float_scale_and_shift(bn)
            size = extension.stem_weight_bytes(self._out_channels, self._bfloat16)
            self._packed = torch.empty(size, dtype=torch.uint8)
            extension.stem_transform_weights(
                conv.weight.data_ptr(),
                conv.weight.stride(),
                self._packed.data_ptr(),
                self._out_channels,
                self._bfloat16,
            )

    @staticmethod
    def serves(extension: ModuleType, conv: Convolution, pool: MaxPool) -> bool:
        """Whether it computes this stem: a ResNet's, on this processor."""
        weight = conv.weight
        return (
            weight.shape[1:] == (3, 7, 7)
            and tuple(map(_pair, conv[1:4])) == ((2, 2), (3, 3), (1, 1))
            and conv.groups == 1
            and weight.shape[0] % _STEM_LANES == 0
            and tuple(pool) == (3, 2, 1)
            and (weight.dtype == torch.float32 or extension.stem_supports_bf16())
        )

    def __call__(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, K, P, Q), channels_last."""
        x = x.contiguous(memory_format=torch.channels_last)
        batch, _, height, width = x.shape
        pooled = ((height + 3) // 4, (width + 3) // 4)  # halved twice, rounded up
        out = torch.empty(
            (batch, self._out_channels, *pooled),
            dtype=x.dtype,
            memory_format=torch.channels_last,
        )
        self._run(
            x.data_ptr(),
            self._packed.data_ptr(),
            self._scale.data_ptr(),
            self._shift.data_ptr(),
            out.data_ptr(),
            batch,
            height,
            width,
            self._out_channels,
            self._bfloat16,
        )
        return out
