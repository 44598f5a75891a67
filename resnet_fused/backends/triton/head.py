"""linear(global_average_pool(x)) in one kernel.

Algorithm: a program computes BLOCK_M images × BLOCK_N classes. For each block of channels it
averages the map in float32 (a tree over 16 positions at a time) and multiplies the means with the
weights. For 16-bit types the mean enters the tensor cores as a sum of two 16-bit numbers, so it
is not rounded before the product as it is where pooling is an op of its own. Exact float32
products are summed in chains of 8, and these sums by compensated summation, because one chain over
all channels errs further than PyTorch's short ones.
Tiles: 16 × 32 to 128 images × classes, 32 channels a step.
Memory traffic: x from DRAM once (class tiles of the same images run side by side and share it
in L2), the weights from L2, the result once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import Candidates
from . import launching
from .launching import Config, Launch, is_wide, matmul_precision, nhwc, planned
from .primitives import multiply, tile_index


@triton.jit
def _multiply_exactly(a, b):
    """a · b in float32, in chains of 8 products: zeros add nothing to the others' sum."""
    inner = tl.arange(0, a.shape[1])
    total = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    for part in range(a.shape[1] // 8):
        used = inner // 8 == part
        # Both, because zero times infinity is not zero.
        a_used = tl.where(used[None, :], a, 0.0)
        b_used = tl.where(used[:, None], b, 0.0)
        total = multiply(a_used, b_used, total, "ieee")
    return total


@triton.jit
def _two_sum(total, lost, step):
    """total + step, and `lost` with that sum's rounding error (Knuth, TAOCP 2, 4.2.2)."""
    result = total + step
    added = result - total
    return result, lost + ((total - (result - added)) + (step - added))


@triton.jit
def head_kernel(
    x,
    weight,
    bias,
    out,
    batch,
    positions,
    C,
    classes,
    weight_k,
    weight_c,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid: (tiles of batch × classes,). x: (batch, positions, C)."""
    row, column = tile_index(batch, classes, BLOCK_M, BLOCK_N, WIDE)
    column += tl.arange(0, BLOCK_N)
    safe_row = tl.where(row < batch, row, 0)
    valid = column < classes
    inner = tl.arange(0, BLOCK_C)
    position = tl.arange(0, BLOCK_P)
    x_tile = (
        x
        + safe_row[:, None, None] * positions * C
        + position[None, :, None] * C
        + inner[None, None, :]
    )
    weight_tile = weight + column[None, :] * weight_k + inner[:, None] * weight_c
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    lost = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in range(0, C, BLOCK_C):
        in_channels = inner < C - c
        total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for first in range(0, positions, BLOCK_P):
            in_map = position < positions - first
            values = tl.load(
                x_tile + (first * C + c),
                in_map[None, :, None] & in_channels[None, None, :],
                other=0.0,
            )
            total += tl.sum(values.to(tl.float32), 1)
        average = tl.div_rn(total, tl.zeros_like(total) + positions)
        b = tl.load(weight_tile + c * weight_c, in_channels[:, None] & valid[None, :], other=0.0)
        if b.dtype == tl.float32 and PRECISION == "ieee":
            acc, lost = _two_sum(acc, lost, _multiply_exactly(average, b))
        else:
            a = average.to(b.dtype)
            acc = multiply(a, b, acc, PRECISION)
            if b.dtype != tl.float32:
                lost = tl.dot((average - a.to(tl.float32)).to(b.dtype), b, lost)
    acc += tl.where(lost - lost == 0.0, lost, 0.0)  # what is lost of infinity is no number
    if bias is not None:
        acc += tl.load(bias + column, valid, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + row[:, None] * classes + column[None, :],
        acc.to(out.dtype.element_ty),
        (row < batch)[:, None] & valid[None, :],
    )


def list_head(x: Tensor, weight: Tensor) -> Candidates:
    """Candidates of op `head`: wide class tiles read x less often, narrow ones occupy more SMs."""
    options = [Config((16, n, 32), 4, 2) for n in (128, 64, 32)]
    configs = launching.filling_first(options, x.device, len(x), len(weight))
    return launching.candidates(head, configs, "triton head")


@planned
def _plan(config: Config, x: Tensor, weight: Tensor, bias: Tensor | None, precision: str) -> Launch:
    batch, channels, height, width = x.shape
    classes = len(weight)
    block_m, block_n, block_c = config.blocks
    return Launch(
        head_kernel,
        (config.tiles(batch, classes),),
        config,
        x.device,
        batch=batch,
        positions=height * width,
        C=channels,
        classes=classes,
        weight_k=weight.stride(0),
        weight_c=weight.stride(1),
        WIDE=is_wide(x) or is_wide(weight.new_empty((batch, classes), device="meta")),
        PRECISION=precision,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        BLOCK_P=16,
    )


def head(config: Config, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(global_average_pool(x)): see `resnet_fused.reference.ops.head`."""
    x = nhwc(x)
    bias = None if bias is None else bias.contiguous()
    out = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    _plan(config, x, weight, bias, matmul_precision(x.dtype))(x, weight, bias, out)
    return out
