"""linear(global_average_pool(x)) in one kernel.

Algorithm: a program computes BLOCK_M images × BLOCK_N classes. For each block of channels it
averages the map in float32 (a tree over 16 positions at a time) and multiplies the means with the
weights. For 16-bit types the mean enters the tensor cores as a sum of two 16-bit numbers, so it
is not rounded before the product as it is where pooling is an op of its own.
Tiles: 16 × 32 to 128 images × classes, 32 channels a step.
Memory traffic: x from DRAM once (class tiles of the same images run side by side and share it
in L2), the weights from L2, the result once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import Tuner, describe
from .launching import Config, is_wide, launch, machine, matmul_precision, nhwc
from .primitives import tile_index


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
        average = tl.div_rn(total, positions.to(tl.float32))
        b = tl.load(weight_tile + c * weight_c, in_channels[:, None] & valid[None, :], other=0.0)
        a = average.to(b.dtype)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if b.dtype != tl.float32:
            rest = (average - a.to(tl.float32)).to(b.dtype)
            acc = tl.dot(rest, b, acc)
    if bias is not None:
        acc += tl.load(bias + column, valid, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + row[:, None] * classes + column[None, :],
        acc.to(out.dtype.element_ty),
        (row < batch)[:, None] & valid[None, :],
    )


def _candidates(batch: int, classes: int, processors: int) -> list[Config]:
    """Wide class tiles read x less often, narrow ones occupy more processors."""
    options = [Config((16, n, 32), 4, 2) for n in (128, 64, 32)]
    busy = [
        c
        for c in options
        if triton.cdiv(batch, 16) * triton.cdiv(classes, c.blocks[1]) >= processors
    ]
    return [*busy, *(c for c in reversed(options) if c not in busy)]


def head(tuner: Tuner, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(global_average_pool(x)): see `resnet_fused.reference.ops.head`."""
    x = nhwc(x)
    bias = None if bias is None else bias.contiguous()
    batch, channels, height, width = x.shape
    classes = weight.shape[0]
    out = torch.empty((batch, classes), dtype=x.dtype, device=x.device)
    precision = matmul_precision(x.dtype)
    wide = is_wide(x, out)

    def run(config: Config) -> None:
        block_m, block_n, block_c = config.blocks
        launch(
            head_kernel, (triton.cdiv(batch, block_m) * triton.cdiv(classes, block_n),), config,
            x, weight, bias, out, batch, height * width, channels, classes, *weight.stride(),
            WIDE=wide, PRECISION=precision,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c, BLOCK_P=16,
        )  # fmt: skip

    tuner.run(
        ("head", *describe(x, weight, bias), wide),
        x.device,
        lambda: _candidates(batch, classes, machine(x.device).processors),
        run,
    )
    return out
