"""relu?(bn(x) (+ residual)), NHWC: one pass over memory.

A program handles BLOCK_M positions × BLOCK_C channels, so batch norm parameters are read once per
tile and every access is a run of channels (16 bytes a thread where alignment allows).
Memory traffic: x and the residual once, the result once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...parameters import BatchNorm
from .. import Candidate, Candidates
from .launching import Config, Launch, dense, empty_nhwc, is_wide, nhwc, planned
from .primitives import normalise, relu, tile_index

_ELEMENTS = 4096  # of a tile
_CONFIG = Config((), warps=4, stages=1)


@triton.jit
def bn_add_relu_kernel(
    x,
    bn,
    residual,
    out,
    rows,
    C,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of rows × C,)."""
    row, channel = tile_index(rows, C, BLOCK_M, BLOCK_C, WIDE)
    channel += tl.arange(0, BLOCK_C)
    offset = row[:, None] * C + channel[None, :]
    mask = (row < rows)[:, None] & (channel < C)[None, :]
    value = tl.load(x + offset, mask, other=0.0).to(tl.float32)
    value = normalise(value, bn, channel, channel < C, out.dtype.element_ty == tl.float32)
    if residual is not None:
        value += tl.load(residual + offset, mask, other=0.0).to(tl.float32)
    if RELU:
        value = relu(value)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask)


def list_bn_add_relu() -> Candidates:
    """The one candidate of op `bn_add_relu`: its tile follows the channels."""
    return (Candidate("triton", bn_add_relu, "triton bn_add_relu"),)


@planned
def _plan(x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool) -> Launch:
    channels = x.shape[1]
    rows = x.numel() // channels
    # All channels of a row up to 512.
    block_c = min(512, triton.next_power_of_2(channels))
    block_m = min(_ELEMENTS // block_c, triton.next_power_of_2(rows))
    return Launch(
        bn_add_relu_kernel,
        (triton.cdiv(rows, block_m) * triton.cdiv(channels, block_c),),
        _CONFIG,
        x.device,
        rows=rows,
        C=channels,
        RELU=relu,
        WIDE=is_wide(x),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
    )


def bn_add_relu(x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
    """relu?(bn(x) (+ residual)): see `resnet_fused.reference.ops.bn_add_relu`."""
    x, bn = nhwc(x), dense(bn)
    residual = None if residual is None else nhwc(residual)
    out = empty_nhwc(x.shape, x)
    _plan(x, bn, residual, relu)(x, bn, residual, out)
    return out
