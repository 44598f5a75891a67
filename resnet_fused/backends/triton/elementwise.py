"""relu?(bn(x) (+ residual)) and relu?(x · gate (+ residual)), NHWC: one pass over memory.

A program handles BLOCK_M positions × BLOCK_C channels, so batch norm parameters are read once per
tile and every access is a run of channels (16 bytes a thread where alignment allows).
Memory traffic: x and the residual once, the result once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...parameters import BatchNorm, Gate
from ...reference.ops import excitation
from .. import Candidate, Candidates
from .launching import Config, Launch, dense, empty_nhwc, launch_pass, nhwc, planned, positions
from .primitives import normalise, relu, tile_index

_ELEMENTS = 4096  # of a tile


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


def _tile(x: Tensor) -> Config:
    """All channels of a row up to 512."""
    block_c = min(512, triton.next_power_of_2(x.shape[1]))
    block_m = min(_ELEMENTS // block_c, triton.next_power_of_2(positions(x)))
    return Config((block_m, block_c), warps=4, stages=1)


@planned
def _plan(x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool) -> Launch:
    return launch_pass(bn_add_relu_kernel, _tile(x), positions(x), x, C=x.shape[1], RELU=relu)


def bn_add_relu(x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
    """relu?(bn(x) (+ residual)): see `resnet_fused.reference.ops.bn_add_relu`."""
    x, bn = nhwc(x), dense(bn)
    residual = None if residual is None else nhwc(residual)
    out = empty_nhwc(x.shape, x)
    _plan(x, bn, residual, relu)(x, bn, residual, out)
    return out


@triton.jit
def gate_add_relu_kernel(
    x,
    gate,
    residual,
    out,
    rows,
    pixels,
    C,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of rows × C,). gate: (images, C), of images of so many pixels each."""
    row, channel = tile_index(rows, C, BLOCK_M, BLOCK_C, WIDE)
    channel += tl.arange(0, BLOCK_C)
    offset = row[:, None] * C + channel[None, :]
    mask = (row < rows)[:, None] & (channel < C)[None, :]
    value = tl.load(x + offset, mask, other=0.0).to(tl.float32)
    image = (row // pixels)[:, None]
    value *= tl.load(gate + image * C + channel[None, :], mask, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + offset, mask, other=0.0).to(tl.float32)
    if RELU:
        value = relu(value)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask)


@planned
def _plan_gate(x: Tensor, gate: Tensor, residual: Tensor | None, relu: bool) -> Launch:
    batch, channels, height, width = x.shape
    pixels = height * width
    return launch_pass(
        gate_add_relu_kernel, _tile(x), batch * pixels, x, pixels=pixels, C=channels, RELU=relu
    )


def list_squeeze_excite() -> Candidates:
    """The one candidate of op `squeeze_excite`: the gates by PyTorch, a few numbers for each image
    from one reading of it, then the pass."""
    return (Candidate("triton", squeeze_excite, "triton squeeze_excite"),)


def squeeze_excite(x: Tensor, gate: Gate, residual: Tensor | None, relu: bool) -> Tensor:
    """See `resnet_fused.reference.ops.squeeze_excite`."""
    x = nhwc(x)
    residual = None if residual is None else nhwc(residual)
    factors = excitation(x, gate)
    out = empty_nhwc(x.shape, x)
    _plan_gate(x, factors, residual, relu)(x, factors, residual, out)
    return out
