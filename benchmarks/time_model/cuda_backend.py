"""Backend `cuda` on tensors without memory: what it would ask of the extension, recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends.cuda import CudaBackend

from .rates import Gpu

STEP_BYTES = 128  # of a row of an operand
_MOST_PER_ELEMENT = 128  # multiply-adds for which a whole block pays (bottleneck.cu)


class Product(NamedTuple):
    """What the extension is told of a convolution; addresses and BN vectors play no part."""

    image: tuple[int, int]
    channels: int
    window: tuple[int, int]
    stride: tuple[int, int]

    @property
    def steps(self) -> int:
        return math.prod(self.window) * math.ceil(2 * self.channels / STEP_BYTES)

    @property
    def read_share(self) -> float:
        """Of x, what the windows touch."""
        return min(1.0, math.prod(self.window) / math.prod(self.stride))


class Block(NamedTuple):
    """What the extension is told of a bottleneck."""

    batch: int
    image: tuple[int, int]
    channels: int
    inner: int
    out_channels: int
    stride: int
    projects: bool
    sms: int

    @property
    def side(self) -> int:
        return 14 // self.stride

    @property
    def tiles(self) -> int:
        return self.batch * math.prod(
            math.ceil(math.ceil(n / self.stride) / self.side) for n in self.image
        )

    def offered(self, device: int) -> bool:
        return self.inner <= 128

    @property
    def products(self) -> int:
        """Multiply-adds that a tile computes."""
        width = 64 if self.inner <= 64 else 128
        ends = (width + self.projects * self.channels) * self.out_channels
        return 256 * self.channels * width + (16 // self.stride) ** 2 * (9 * width**2 + ends)

    def pays(self, device: int) -> bool:
        pixels = self.batch * math.prod(self.image)
        positions = self.batch * math.prod(math.ceil(n / self.stride) for n in self.image)
        moved = pixels * (self.channels + 2 * self.inner) + positions * (
            2 * self.inner + self.channels + self.out_channels
        )
        return self.tiles >= self.sms and self.products * self.tiles <= _MOST_PER_ELEMENT * moved


@dataclass
class Call:
    kernel: str
    out: Tensor
    read: list[Tensor]
    arguments: tuple[Any, ...]


class RecordingBackend(CudaBackend):
    """The CUDA backend over an extension that only remembers what it was asked for."""

    def __init__(self, gpu: Gpu) -> None:
        def product(x: int, weight: int, image: Any, channels: int, window: Any, *rest: Any) -> Any:
            return Product(image, channels, window, rest[0])

        def block(
            x: int,
            dtype: int,
            batch: int,
            image: Any,
            channels: int,
            inner: int,
            out: int,
            stride: int,
            layers: Any,
            projection: Any,
        ) -> Block:
            projects = projection is not None
            return Block(batch, image, channels, inner, out, stride, projects, gpu.sms)

        kernels = ("conv_bn", "bn_add_relu", "bottleneck", "stem", "linear", "average_pool")
        super().__init__(
            SimpleNamespace(  # type: ignore[arg-type]
                DType=SimpleNamespace(float32=4, float16=2, bfloat16=2),
                ConvTile=SimpleNamespace(automatic="automatic"),
                ConvolutionBn=product,
                Bottleneck=block,
                cuda_conv_bn_tiles=lambda *_: [],
                **{f"cuda_{name}": partial(str, name) for name in kernels},
            )
        )
        self.calls: list[Call] = []

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def _place(self, device: torch.device) -> int:
        return 0

    def _run(
        self,
        kernel: Callable[..., Any],
        out: Tensor,
        read: Sequence[Tensor | None],
        *arguments: Any,
    ) -> None:
        self.calls.append(Call(kernel(), out, [t for t in read if t is not None], arguments))
