"""Training with the library's convolutions (cuDNN) and Triton's passes between them.

Algorithm: what the fused convolutions do to their operands and results while these are in registers
happens in passes of its own: normalisation and ReLU before a convolution, statistics after it, and
in backward the gradient of the pre-BN output, which is formed once for dgrad and wgrad together.
Tiles: passes over (BLOCK_M × BLOCK_C); the one that takes moments goes through TILES of them.
Memory traffic: each pass reads and writes each tensor once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...parameters import Convolution
from ...reference.convolution import convolve
from ..training import Activation, PreBnGradient
from .launching import Config, Launch, dense_gradient, empty_nhwc, is_wide, nhwc, planned
from .primitives import tile_index
from .training import TritonTraining
from .training_convolution import tile_moments

_ELEMENTS = 4096  # of a tile


@triton.jit
def moments_kernel(
    pre_bn, moments, rows, K, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Grid: (tiles of rows × K,). moments: (row tiles, 3, K)."""
    row, first_channel = tile_index(rows, K, BLOCK_M, BLOCK_C, WIDE)
    channel = first_channel + tl.arange(0, BLOCK_C)
    valid = channel < K
    in_rows = row < rows
    mask = in_rows[:, None] & valid[None, :]
    tile = tl.load(pre_bn + row[:, None] * K + channel[None, :], mask, other=0.0)
    count = tl.sum(in_rows.to(tl.float32), 0)
    mean, squares = tile_moments(tile, in_rows, count)
    place = moments + tl.program_id(0) // tl.cdiv(K, BLOCK_C) * 3 * K + channel
    tl.store(place, mean, valid)
    tl.store(place + K, squares, valid)
    tl.store(place + 2 * K, tl.zeros_like(mean) + count, valid)


@triton.jit
def pre_bn_gradient_kernel(
    grad,
    pre_bn,
    coefficients,
    out,
    rows,
    K,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of rows × K,). out = a·grad + b·(pre_bn - mean) + d; pre_bn None: a·grad."""
    row, first_channel = tile_index(rows, K, BLOCK_M, BLOCK_C, WIDE)
    channel = first_channel + tl.arange(0, BLOCK_C)
    valid = channel < K
    offset = row[:, None] * K + channel[None, :]
    mask = (row < rows)[:, None] & valid[None, :]
    place = coefficients + channel
    g = tl.load(grad + offset, mask, other=0.0).to(tl.float32)
    value = g * tl.load(place, valid, other=0.0)[None, :]
    if pre_bn is not None:
        centred = tl.load(pre_bn + offset, mask, other=0.0).to(tl.float32)
        centred -= tl.load(place + 3 * K, valid, other=0.0)[None, :]
        value += centred * tl.load(place + K, valid, other=0.0)[None, :]
        value += tl.load(place + 2 * K, valid, other=0.0)[None, :]
    tl.store(out + offset, value.to(out.dtype.element_ty), mask)


@planned
def _plan_moments(pre_bn: Tensor) -> tuple[int, Launch]:
    """The number of row tiles, and the launch."""
    return _plan_pass(moments_kernel, pre_bn)


@planned
def _plan_gradient(gradient: PreBnGradient) -> tuple[int, Launch]:
    return _plan_pass(pre_bn_gradient_kernel, gradient.grad)


def _plan_pass(kernel: object, tensor: Tensor) -> tuple[int, Launch]:
    channels = tensor.shape[1]
    rows = tensor.numel() // channels
    block_c = min(triton.next_power_of_2(channels), 128)
    block_m = _ELEMENTS // block_c
    tiles = triton.cdiv(rows, block_m)
    return tiles, Launch(
        kernel,
        (tiles * triton.cdiv(channels, block_c),),
        Config((block_m, block_c), 8, 1),
        tensor.device,
        rows=rows,
        K=channels,
        WIDE=is_wide(tensor),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
    )


def moments(pre_bn: Tensor) -> Tensor:
    """The (T, 3, K) moments of a channels_last tensor, as `TrainingKernels` has them."""
    tiles, launch = _plan_moments(pre_bn)
    out = pre_bn.new_empty((tiles, 3, pre_bn.shape[1]), dtype=torch.float32)
    launch(pre_bn, out)
    return out


def pre_bn_gradient(gradient: PreBnGradient) -> Tensor:
    """The gradient of a pre-BN output, formed; channels_last, of the dtype of `gradient.grad`."""
    gradient = dense_gradient(gradient)
    _, launch = _plan_gradient(gradient)
    out = empty_nhwc(gradient.grad.shape, gradient.grad)
    launch(gradient.grad, gradient.pre_bn, gradient.coefficients, out)
    return out


class LibraryTraining(TritonTraining):
    """`TrainingKernels` whose convolutions, forward and backward, are PyTorch's."""

    def __init__(self) -> None:
        # A layer's gradient as long as its coefficients live, which is its backward.
        self._formed = WeakIdKeyDictionary()

    def conv_stats(
        self, x: Tensor | Activation, conv: Convolution, statistics: bool
    ) -> tuple[Tensor, Tensor | None]:
        value = self._value(x)
        pre_bn = nhwc(convolve(value, conv._replace(weight=conv.weight.to(value.dtype))))
        return pre_bn, moments(pre_bn) if statistics else None

    def dgrad(
        self,
        gradient: PreBnGradient,
        conv: Convolution,
        shape: torch.Size,
        below: Activation | None,
        add: Tensor | None,
        add_stride: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        formed = self._form(gradient)
        x = formed.new_empty(1).expand(shape)  # of which only the sizes count
        out = _convolution_backward(formed, x, conv, formed.dtype, 0)
        if add is not None and add_stride is None:
            out = out + add
        elif add is not None:
            out[:, :, ::add_stride, ::add_stride] += add[:, : shape[1]]
        if below is None:
            return nhwc(out), None
        out, (sums,) = self.relu_gradient(out, self._value(below), [below])
        return out, sums

    def wgrad(self, gradient: PreBnGradient, x: Tensor | Activation, conv: Convolution) -> Tensor:
        formed = self._form(gradient)
        out = _convolution_backward(formed, self._value(x), conv, formed.dtype, 1)
        return nhwc(out.to(conv.weight.dtype))

    def _value(self, x: Tensor | Activation) -> Tensor:
        return nhwc(x) if isinstance(x, Tensor) else self.bn_add_relu(x, None)

    def _form(self, gradient: PreBnGradient) -> Tensor:
        formed: Tensor | None = self._formed.get(gradient.coefficients)
        if formed is None:
            formed = self._formed[gradient.coefficients] = pre_bn_gradient(gradient)
        return formed


def _convolution_backward(
    grad: Tensor, x: Tensor, conv: Convolution, dtype: torch.dtype, which: int
) -> Tensor:
    """The gradient of x (which = 0) or of the weight (1)."""
    weight, stride, padding, dilation, groups = conv
    found: Tensor = torch.ops.aten.convolution_backward(
        grad,
        x,
        nhwc(weight.to(dtype)),
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [which == 0, which == 1, False],
    )[which]
    return found
