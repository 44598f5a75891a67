"""Images as a quantised network's first layer takes them: x / scale + zero, rounded, in one pass.

Algorithm: element by element, each step rounded as in `resnet_fused.reference.quantized`, whose
bits these are; divisions are IEEE's. A program has a part of one plane of contiguous images, and so
one channel, or of all of channels_last ones.
Tiles: 1024 elements.
Memory traffic: the images once, a byte an element of the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...parameters import ImageQuantization
from ...reference.quantized import FLOAT8
from .. import Candidates
from . import launching
from .launching import Config, Launch, for_kernels, is_wide, planned
from .primitives import to_byte, to_e4m3


@triton.jit
def quantized_images_kernel(
    x,
    scale,
    zero,
    mean,
    std,
    out,
    length,
    CHANNELS: tl.constexpr,
    PLANAR: tl.constexpr,
    WIDE: tl.constexpr,
    FLOAT8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (planes × blocks of each,), or of the whole where images are not PLANAR. length: of a
    plane, or of the whole."""
    blocks = tl.cdiv(length, BLOCK)
    plane = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks
    if WIDE:
        first = first.to(tl.int64)
        start = plane.to(tl.int64) * length
    else:
        start = plane * length
    place = first * BLOCK + tl.arange(0, BLOCK)
    valid = place < length
    channel = plane % CHANNELS if PLANAR else place % CHANNELS
    values = tl.load(x + start + place, valid, other=0).to(tl.float32)
    if mean is not None:
        values = tl.div_rn(
            values - tl.load(mean + channel), tl.load(std + channel) + tl.zeros_like(values)
        )
    values = tl.div_rn(values, tl.load(scale + channel) + tl.zeros_like(values))
    values += tl.load(zero + channel)
    if FLOAT8:
        quantized = to_e4m3(values, -448.0, out.dtype.element_ty == tl.uint8)
    else:
        quantized = to_byte(values, 0.0).to(tl.uint8)
    tl.store(out + start + place, quantized, valid)


_CONFIG = Config((1024,), 4, 1)


def list_quantized_images() -> Candidates:
    """Candidates of op `quantized_images`."""
    return launching.candidates(quantized_images, [_CONFIG], "triton quantized")


@planned
def _plan(config: Config, x: Tensor, quantization: ImageQuantization, float8: bool) -> Launch:
    (block,) = config.blocks
    planes, channels = x.shape[0] * x.shape[1], x.shape[1]
    planar = x.is_contiguous()
    length = x.shape[2] * x.shape[3] if planar else x.numel()
    return Launch(
        quantized_images_kernel,
        (triton.cdiv(length, block) * (planes if planar else 1),),
        config,
        x.device,
        fuses=False,
        length=length,
        CHANNELS=channels,
        PLANAR=planar,
        WIDE=is_wide(x),
        FLOAT8=float8,
        BLOCK=block,
    )


def quantized_images(
    config: Config, x: Tensor, quantization: ImageQuantization, float8: bool
) -> Tensor:
    """x / scale + zero, rounded: see `resnet_fused.reference.quantized`."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    out = torch.empty_like(x, dtype=FLOAT8 if float8 else torch.uint8)
    _plan(config, x, quantization, float8)(x, *quantization, for_kernels(out))
    return out
