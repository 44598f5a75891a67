"""Backend `cuda` on tensors without memory: what it would ask of the extension, recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from resnet_fused.backends.cuda import CudaBackend
from resnet_fused.backends.cuda.launch import Launcher

from .rates import Gpu
from .work import Work

if TYPE_CHECKING:
    from typing_extensions import Self

STEP_BYTES = 128  # of a row of an operand


class PersistentTile(NamedTuple):
    """A tile of a kernel with persistent blocks for sm_90a: positions, channels, stages, blocks of
    an SM and of a cluster; whether warpgroups take turns at tiles."""

    m: int
    n: int
    stages: int
    blocks: int
    cluster: int = 1
    ping_pong: bool = False

    @property
    def stage_bytes(self) -> int:
        return (self.m + self.n) * STEP_BYTES

    @property
    def asked_rows(self) -> int:
        """Of L2, for a step: a cluster's blocks share the weights."""
        return self.m + self.n // self.cluster

    def tiles(self, rows: int, filters: int) -> int:
        """Of all blocks, the one that computes zeros beside an odd number of tiles included."""
        return (
            math.ceil(rows / (self.cluster * self.m)) * self.cluster * math.ceil(filters / self.n)
        )

    def work(self, kernel: str, operand_bytes: int = 2, **others: Any) -> Work:
        """A launch with this tile; `others` are the fields of `Work` that the tile leaves open."""
        return Work(
            kernel=kernel,
            config=f"{self.m}×{self.n}×{STEP_BYTES // operand_bytes}, {self.stages} stages"
            + ", cluster" * (self.cluster > 1)
            + ", ping-pong" * self.ping_pong,
            # Warpgroups that take turns are two blocks on an SM, as far as a tile's time goes.
            warps=4 if self.ping_pong else 8,
            blocks_per_sm=2 if self.ping_pong else self.blocks,
            operand_bytes=operand_bytes,
            persistent=True,
            bulk_bytes=self.stage_bytes,
            **others,
        )


class LinesTile(NamedTuple):
    """A tile of whole lines, under a 3 × 3 window: positions, of which `gap` lie between two lines,
    and channels; rows of x that a stage has place for."""

    positions: int
    channels: int
    gap: int
    rows: int

    def part(self, image: Sequence[int]) -> tuple[int, int, int]:
        """Of images of (height, width): tiles of an image, images of a tile, rows of x copied."""
        height, pitch = image[0], image[1] + self.gap
        segments = math.ceil(height / (self.positions // pitch))
        stacks = segments == 1 and (height + 1) * pitch % 8 == 0
        images = (self.positions // pitch + 1) // (height + 1) if stacks else 1
        lines = images * (height + 1) + 1 if images > 1 else math.ceil(height / segments) + 2
        return segments, images, lines * pitch + self.gap

    def parts(self, batch: int, image: Sequence[int]) -> int:
        """Tiles of as many channels as one has."""
        segments, images, _ = self.part(image)
        return math.ceil(batch / images) * segments

    def tiles(self, batch: int, image: Sequence[int], filters: int) -> int:
        return self.parts(batch, image) * math.ceil(filters / self.channels)


class Product(NamedTuple):
    """What the extension is told of a convolution; BN vectors play no part."""

    image: tuple[int, int]
    channels: int
    filters: int
    window: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    operand_bytes: int

    @classmethod
    def of(cls, x: Any, weight: Any, moves: Any, *_: Any, operand_bytes: int = 2) -> Self:
        """From the descriptions that the binding takes of a layer."""
        (_, channels, *image), (filters, _, *window) = x[2], weight[2]
        stride, _, dilation = map(tuple, moves)
        sizes = tuple(image), channels, filters, tuple(window)
        return cls(*sizes, stride, dilation, operand_bytes)

    @property
    def steps(self) -> int:
        of_tap = math.ceil(self.operand_bytes * self.channels / STEP_BYTES)
        return math.prod(self.window) * of_tap

    @property
    def weights(self) -> int:
        return self.filters * self.channels * math.prod(self.window)

    @property
    def read_share(self) -> float:
        """Of x, what the windows touch."""
        return min(1.0, math.prod(self.window) / math.prod(self.stride))

    def moved_bytes(self, batch: int) -> float:
        """Of x, as far as it is read, and of the weights."""
        of_x = batch * math.prod(self.image) * self.channels * self.read_share
        return self.operand_bytes * (of_x + self.weights)

    def title(self) -> str:
        """For people."""
        (r, s), (height, width) = self.window, self.image
        stride = f"/{self.stride[0]}" if self.stride[0] > 1 else ""
        return f"{r}×{s}{stride} {self.channels}→{self.filters} at {height}×{width}"


class Block(NamedTuple):
    """What the extension is told of a bottleneck, and bottleneck_sm90.cu decides of it."""

    batch: int
    image: tuple[int, int]
    channels: int
    inner: int
    out_channels: int
    stride: int
    projects: bool
    sms: int

    @classmethod
    def of(cls, x: Any, layers: Sequence[Any], stride: int, sms: int) -> Self:
        """From the descriptions that the binding takes."""
        batch, channels, *image = x[2]
        inner, out_channels = (layers[i][0][2][0] for i in (0, 2))
        projects = len(layers) > 3
        return cls(batch, tuple(image), channels, inner, out_channels, stride, projects, sms)

    @property
    def strips(self) -> int:
        """Across an image: one has up to 56 columns, of several each has up to 54."""
        return 1 if self.image[1] <= 56 else math.ceil(self.image[1] / 54)

    @property
    def lines(self) -> int:
        """Of a job."""
        height = self.image[0]

        def made(lines: int) -> int:
            jobs = self.batch * self.strips * math.ceil(height / lines)
            return math.ceil(jobs / self.sms) * (lines + 2)

        return min((math.ceil(height / n) for n in range(1, height + 1)), key=made)

    @property
    def jobs(self) -> int:
        return self.batch * self.strips * math.ceil(self.image[0] / self.lines)

    def can_implement(self) -> bool:
        fits = self.channels <= 64 if self.projects else self.channels == self.out_channels
        return self.inner <= 64 and self.out_channels <= 256 and self.stride == 1 and fits


@dataclass
class Call:
    kernel: str
    out: Tensor
    arguments: tuple[Any, ...]  # the binding's, behind `out`

    @property
    def read(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(self.arguments) if isinstance(leaf, Tensor)]


class _RecordingLauncher(Launcher):
    def __init__(self, extension: Any) -> None:
        super().__init__(extension)
        self.calls: list[Call] = []

    def place(self, device: torch.device) -> int:
        return 0

    def run(self, kernel: Callable[..., Any], out: Tensor, *arguments: Any) -> Tensor:
        self.calls.append(Call(kernel(), out, arguments))
        return out


class RecordingBackend(CudaBackend):
    """The CUDA backend over an extension that only remembers what it was asked for."""

    def __init__(self, gpu: Gpu) -> None:
        def takes_block(x: Any, layers: Any, stride: int, _: int) -> bool:
            return Block.of(x, layers, stride, gpu.sms).can_implement()

        from . import cuda_int8  # which need what stands above
        from . import cuda_training as training

        def named(names: Sequence[str]) -> list[Any]:
            return [SimpleNamespace(name=name) for name in names]

        def int8_tiles(out: Any, layer: Any, *others: Any) -> list[Any]:
            (batch, filters, *image), (*_, residual, projection, _, _) = out[2], others
            products = cuda_int8.products_of(layer, projection)
            if filters % 16 or any(p.channels % 16 for p in products):
                return []
            steps, adds = [p.steps for p in products], residual is not None
            rows = batch * math.prod(image)
            return named(cuda_int8.tiles_in_order(rows, filters, steps, adds, gpu.sms))

        def conv_bn_tiles(*arguments: Any) -> list[Any]:
            signs = arguments[-2]
            return [] if signs is None else named(["automatic"])

        def training_tiles(
            result: Any, x: Any, weight: Any, lines: bool, operand: int = 0, classes: int = 1
        ) -> list[Any]:
            batch, channels, *image = result[2]
            steps = math.prod(weight[2][2:]) * math.ceil(x[2][1] / 64) + math.ceil(operand / 64)
            rows = batch * math.prod(image)
            images = (batch, (image[0], image[1])) if lines else None
            return named(training.tiles_in_order(rows, channels, steps, gpu.sms, classes, images))

        def dgrad_tiles(out: Any, grad: Any, weight: Any, window: Any, *more: Any) -> list[Any]:
            (stride, padding, dilation), kernel, image = window, weight[2][2:], out[2][2:]
            turns_round = stride in ((1, 1), (2, 2)) and math.prod(dilation) == 1
            turns_round &= all(
                max(p + 1, s) <= k and size % s == 0
                for p, s, k, size in zip(padding, stride, kernel, image, strict=True)
            )
            if not turns_round or weight[2][0] % 8 or weight[2][1] % 8:
                return []
            below, term = more[0], more[4]
            operand = 0 if term is None else out[2][1]
            lines = below is not None and term is None and training.takes_lines(window, kernel)
            return training_tiles(out, grad, weight, lines, operand, math.prod(stride))

        def conv_stats_tiles(out: Any, x: Any, weight: Any, window: Any, *_: Any) -> list[Any]:
            aligned = weight[2][0] % 8 == weight[2][1] % 8 == 0
            lines = training.takes_lines(window, weight[2][2:])
            return training_tiles(out, x, weight, lines) if aligned else []

        def conv_stats_parts(out: Any, *arguments: Any) -> int:
            return training.parts(arguments[-1], out)

        def dgrad_parts(out: Any, grad: Any, weight: Any, window: Any, *more: Any) -> int:
            return training.parts(more[-1], out, math.prod(window[0]))

        def wgrad_tiles(out: Any, grad: Any, *_: Any) -> list[Any]:
            if out[2][0] % 8 or out[2][1] % 8:
                return []
            return named(training.wgrads_in_order(training.Wgrad.of(out, grad, gpu.sms)))

        def wgrad_parts(out: Any, grad: Any, x: Any, window: Any, tile: str, _: int) -> int:
            plan = training.Wgrad.of(out, grad, gpu.sms).plan(training.WIDTHS[tile])
            return plan[1]

        kernels = (
            *("conv_bn", "bn_add_relu", "bottleneck_sm90", "stem", "linear"),
            *("average_pool", "conv_stats", "dgrad", "wgrad", "window_rows", "quantized_conv"),
        )
        super().__init__(
            SimpleNamespace(  # type: ignore[arg-type]
                ConvTile=SimpleNamespace(automatic="automatic"),
                cuda_conv_bn_tiles=conv_bn_tiles,
                TrainingTile=SimpleNamespace(
                    **{name: name for name in (*training.TILES, *training.LINES)}
                ),
                WgradTile=SimpleNamespace(**{name: name for name in training.WIDTHS}),
                QuantizedTile=SimpleNamespace(**{name: name for name in cuda_int8.TILES}),
                cuda_quantized_conv_tiles=int8_tiles,
                cuda_conv_stats_tiles=conv_stats_tiles,
                cuda_conv_stats_parts=conv_stats_parts,
                cuda_dgrad_tiles=dgrad_tiles,
                cuda_dgrad_parts=dgrad_parts,
                cuda_wgrad_tiles=wgrad_tiles,
                cuda_wgrad_parts=wgrad_parts,
                cuda_bottleneck_can_implement=lambda *_: False,
                cuda_bottleneck_sm90_can_implement=takes_block,
                cuda_bottleneck_sm90_is_profitable=takes_block,
                **{f"cuda_{name}": partial(str, name) for name in kernels},
            )
        )

    def _make_launcher(self, extension: Any) -> Launcher:
        self._recording = _RecordingLauncher(extension)
        return self._recording

    @property
    def calls(self) -> list[Call]:
        """What was asked for since they were cleared."""
        return self._recording.calls

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None
