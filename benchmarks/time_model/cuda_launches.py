"""The launches of backend `cuda` on Hopper: which kernel, tile and grid its host code takes.

What the host code in csrc/kernels/cuda/ decides from sizes (tiles, grids, shared memory) is said
again here, in the same words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from resnet_fused.testing import machine_code

from . import cuda_kernels
from .cuda_backend import STEP_BYTES, Block, Call, Product
from .rates import Gpu
from .work import Work, resident_blocks

SM90_STAGES = {128: 4, 64: 3}  # by channels of a tile
SM90_ROWS = 128


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@cache
def codes(extension: Path) -> dict[str, tuple[machine_code.Code, machine_code.Resources]]:
    """The kernels for sm_90a in the extension, by mangled name."""
    options = ("-arch=sm_90a",)
    used = machine_code.resources(
        machine_code.cuobjdump(extension, "--dump-resource-usage", *options)
    )
    text = machine_code.cuobjdump(extension, "--dump-sass", *options)
    return {code.name: (code, used[code.name]) for code in machine_code.disassembled(text)}


def compiled(work: Work, symbol: str, extension: Path) -> Work:
    """`work` with the one kernel whose mangled name matches `symbol`."""
    found = [both for name, both in codes(extension).items() if re.search(symbol, name)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} kernels of the extension match {symbol}; expected one.")
    code, used = found[0]
    kernel = cuda_kernels.described(code.name)
    return replace(
        work,
        code=code,
        registers=used.registers,
        spilled=used.spilled,
        shared_bytes=work.shared_bytes if kernel is None else kernel.shared,
    )


def works(
    calls: Sequence[Call], name_of: Callable[[Sequence[Tensor]], str], gpu: Gpu, extension: Path
) -> Iterator[Work]:
    """What the recorded calls launch. name_of: the layer that some tensors are parameters of."""
    for call in calls:
        work, symbol = _DESCRIBE[call.kernel](call, gpu)
        letter = {torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}
        dtype = next((t.dtype for t in call.read if t.dim() == 4), call.out.dtype)
        work = compiled(work, symbol.replace("T", letter[dtype], 1), extension)
        blocks = work.blocks_per_sm or resident_blocks(
            gpu.limits, work.registers, work.shared_bytes, work.warps
        )
        yield replace(work, layer=name_of(call.read), blocks_per_sm=blocks)


def _conv_bn(call: Call, gpu: Gpu) -> tuple[Work, str]:
    layer, projection, residual, *_ = call.arguments
    batch, filters, *image = call.out.shape
    rows = batch * math.prod(image)
    products = [Product.of(one) for one in (layer, projection) if one is not None]

    def tiles(n: int) -> int:
        return math.ceil(rows / SM90_ROWS) * math.ceil(filters / n)

    n = 128 if 2 * filters > 128 and tiles(128) >= gpu.sms else 64
    blocks, stages = (1, 4) if n == 128 else (2, 3)
    steps = [p.steps for p in products]
    multiply_adds = sum(rows * filters * p.channels * math.prod(p.window) for p in products)
    stage_bytes = (SM90_ROWS + n) * STEP_BYTES
    added = _bytes(call.out) if residual is not None else 0
    x_bytes = sum(batch * math.prod(p.image) * p.channels * 2 * p.read_share for p in products)
    weights = sum(filters * p.channels * math.prod(p.window) * 2 for p in products)
    work = Work(
        layer="",
        kernel="conv_bn_sm90_kernel",
        config=f"128×{n}×64, {stages} stages",
        shape=" + ".join(_shape(p, filters) for p in products) + ", residual" * bool(added),
        tiles=tiles(n),
        warps=8,
        blocks_per_sm=blocks,
        trips=(1, *steps),
        dram_bytes=int(x_bytes + weights + added + _bytes(call.out)),
        l2_bytes=tiles(n) * sum(steps) * stage_bytes + added + _bytes(call.out),
        multiply_adds=multiply_adds,
        persistent=True,
        bulk_bytes=stage_bytes,
    )
    return work, rf"conv_bn_sm90_kernelIT\w*TileILi{n}E\w*Lb{int(len(products) > 1)}E"


def _shape(product: Product, filters: int) -> str:
    stride = f"/{product.stride[0]}" if product.stride[0] > 1 else ""
    r, s = product.window
    return f"{r}×{s}{stride} {product.channels}→{filters} at {product.image[0]}×{product.image[1]}"


def _bottleneck(call: Call, gpu: Gpu) -> tuple[Work, str]:
    x, layers, stride = call.arguments
    block = Block.of(x, layers, stride, gpu.sms)
    if block.projects or block.stride > 1:
        raise ValueError("the model knows no whole block with projection; describe its loops.")
    width = 64 if block.inner <= 64 else 128
    threads = 2 * width
    slices = math.ceil(block.out_channels / width)
    first, taps = math.ceil(block.channels / 32), 9 * width // 64
    inside = slices * (width // 64)
    positions = block.batch * math.prod(block.image)
    weights = block.channels * block.inner + 9 * block.inner**2 + block.inner * block.out_channels
    halo = 256 / block.side**2
    moved = 2 * positions * (block.channels * (halo + 1) + block.out_channels)
    work = Work(
        layer="",
        kernel="bottleneck_kernel",
        config=f"14×14 positions, {width} inner channels",
        shape=f"{block.channels}→{block.inner}→{block.out_channels} at {block.image[0]}×"
        f"{block.image[1]}",
        tiles=block.tiles,
        warps=threads // 32,
        blocks_per_sm=0,
        # Terms of bn1, bn2 and the first slice; the products; a slice, its products and terms.
        trips=(0.5, 0.5, first, taps, 0.5, slices, inside, (slices - 1) / 2),
        shared_loops=(0, 1, 4, 7),
        dram_bytes=int(2 * (positions * (block.channels + block.out_channels) + weights)),
        l2_bytes=int(moved) + 2 * block.tiles * weights,
        multiply_adds=positions * weights,
    )
    return work, rf"bottleneck_kernelIT\w*TileILi{width}ELi1ELb0E"


def _stem(call: Call, gpu: Gpu) -> tuple[Work, str]:
    batch, _, *image = call.read[0].shape
    filters, *pooled = call.out.shape[1:]
    tiles = batch * math.prod(math.ceil(n / 7) for n in pooled) * math.ceil(filters / 64)
    x = 2 * batch * math.prod(image) * 3
    work = Work(
        layer="",
        kernel="stem_kernel",
        config="7×7 pooled positions",
        shape=f"7×7/2 3→{filters} at {image[0]}×{image[1]}, pooled",
        tiles=tiles,
        warps=8,
        blocks_per_sm=0,
        # Pixels, weights, terms, products, pooled chunks of 256 threads.
        trips=(35 * 38 / 256, 64 * 49 / 256, 64 / 256, 7, 49 * 8 / 256),
        shared_loops=(1, 2),
        dram_bytes=x + _bytes(call.out),
        l2_bytes=tiles * 2 * (35 * 35 * 3 + 64 * 147) + _bytes(call.out),
        multiply_adds=batch * math.prod(math.ceil(n / 2) for n in image) * filters * 147,
        shared_bytes=35 * 38 * 8 + 64 * (7 * 64 + 16) + 64 * 16,
    )
    return work, r"stem_kernelIT"


def _average_pool(call: Call, gpu: Gpu) -> tuple[Work, str]:
    (x,) = call.read
    batch, channels, *image = x.shape
    positions = math.prod(image)
    longest = math.ceil(positions / 16)  # of 16 threads that share a chunk
    work = Work(
        layer="",
        kernel="average_pool_kernel",
        config="128 channels",
        shape=f"{channels} at {positions}",
        tiles=batch * math.ceil(channels / 128),
        warps=8,
        blocks_per_sm=0,
        trips=(longest % 4, longest // 4),
        dram_bytes=_bytes(x, call.out),
        l2_bytes=_bytes(x, call.out),
        multiply_adds=0,
        shared_bytes=8192,
    )
    return work, r"average_pool_kernelITLi8E"


def _linear(call: Call, gpu: Gpu) -> tuple[Work, str]:
    (batch, channels), classes = call.read[0].shape, call.out.shape[1]
    images = 1 if batch == 1 else 4
    tiles = math.ceil(classes / 8) * math.ceil(batch / images)
    work = Work(
        layer="",
        kernel="linear_kernel",
        config=f"8 classes × {images} images",
        shape=f"{channels}→{classes}",
        tiles=tiles,
        warps=8,
        blocks_per_sm=0,
        trips=(math.ceil(channels / 2048),),
        dram_bytes=_bytes(*call.read, call.out),
        l2_bytes=tiles * channels * (8 * 2 + images * 4),
        multiply_adds=batch * channels * classes,
        shared_bytes=1024,
    )
    return work, rf"linear_kernelITLi8ELi{images}E"


_DESCRIBE: dict[str, Callable[[Call, Gpu], tuple[Work, str]]] = {
    "conv_bn": _conv_bn,
    "bottleneck": _bottleneck,
    "stem": _stem,
    "average_pool": _average_pool,
    "linear": _linear,
}
