"""Training with the library's convolutions (cuDNN) and Triton's passes between them.

Algorithm: what our convolutions do in their epilogues, statistics forward, mask and sums backward,
happens in passes of its own.
Tiles: passes over (BLOCK_M × BLOCK_C); the one that takes moments goes through TILES of them.
Memory traffic: each pass reads and writes each tensor once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...parameters import Activation, Convolution, OperandTerm
from ...reference.convolution import convolution_backward, convolve
from .launching import Launch, launch_pass, nhwc, planned, positions
from .primitives import tile_index
from .training import TritonTraining
from .training_batch_norm import pass_tile
from .training_convolution import tile_moments


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


@planned
def _plan_moments(pre_bn: Tensor) -> tuple[int, Launch]:
    """The number of row tiles, and the launch."""
    channels, rows = pre_bn.shape[1], positions(pre_bn)
    config = pass_tile(channels)
    tiles = triton.cdiv(rows, config.blocks[0])
    return tiles, launch_pass(moments_kernel, config, rows, pre_bn, K=channels)


def moments(pre_bn: Tensor) -> Tensor:
    """The (T, 3, K) moments of a channels_last tensor, as `TrainingKernels` has them."""
    tiles, launch = _plan_moments(pre_bn)
    out = pre_bn.new_empty((tiles, 3, pre_bn.shape[1]), dtype=torch.float32)
    launch(pre_bn, out)
    return out


class LibraryTraining(TritonTraining):
    """`TrainingKernels` whose convolutions, forward and backward, are PyTorch's."""

    def __init__(self) -> None:
        self.replays = None  # nothing records those

    def folded_ends(self, dtype: torch.dtype) -> None:
        """None: cuDNN rounds the products of gradients and operands, of which sums are taken."""

    def conv_stats(
        self, x: Tensor, conv: Convolution, statistics: bool
    ) -> tuple[Tensor, Tensor | None]:
        pre_bn = nhwc(convolve(x, conv._replace(weight=conv.weight.to(x.dtype))))
        return pre_bn, moments(pre_bn) if statistics else None

    def dgrad(
        self,
        g: Tensor,
        conv: Convolution,
        shape: torch.Size,
        below: Activation | None,
        add: Tensor | None,
        add_stride: int | None = None,
        term: OperandTerm | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        assert term is None  # no ends are folded
        x = g.new_empty(1).expand(shape)  # of which only the sizes count
        out = convolution_backward(nhwc(g), x, conv, 0)
        if add is not None and add_stride is None:
            out = out + add
        elif add is not None:
            out[:, :, ::add_stride, ::add_stride] += add[:, : shape[1]]
        if below is None:
            return nhwc(out), None
        out, (sums,) = self.relu_gradient(out, self.bn_add_relu(below, None), [below])
        return out, sums

    def wgrad(self, g: Tensor, x: Tensor, conv: Convolution) -> Tensor:
        return nhwc(convolution_backward(nhwc(g), x, conv, 1).to(conv.weight.dtype))
