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
    def asked_bytes(self) -> int:
        """Of L2, for a step: a cluster's blocks share the weights."""
        return (self.m + self.n // self.cluster) * STEP_BYTES

    def tiles(self, rows: int, filters: int) -> int:
        """Of all blocks, the one that computes zeros beside an odd number of tiles included."""
        return (
            math.ceil(rows / (self.cluster * self.m)) * self.cluster * math.ceil(filters / self.n)
        )


class Product(NamedTuple):
    """What the extension is told of a convolution; BN vectors play no part."""

    image: tuple[int, int]
    channels: int
    window: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, layer: Any) -> Product:
        """From the description that the binding takes."""
        (_, _, (_, channels, *image), *_), (_, _, (_, _, *window), *_), moves, _ = layer
        stride, _, dilation = map(tuple, moves)
        return cls(tuple(image), channels, tuple(window), stride, dilation)

    @property
    def steps(self) -> int:
        return math.prod(self.window) * math.ceil(2 * self.channels / STEP_BYTES)

    @property
    def read_share(self) -> float:
        """Of x, what the windows touch."""
        return min(1.0, math.prod(self.window) / math.prod(self.stride))


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

        def int8_tiles(out: Any, layer: Any, *others: Any) -> list[Any]:
            (batch, filters, *image), (*_, residual, projection, _, _) = out[2], others
            products = cuda_int8.products_of(layer, projection)
            if filters % 16 or any(p.channels % 16 for p in products):
                return []
            steps, adds = [p.steps for p in products], residual is not None
            rows = batch * math.prod(image)
            names = cuda_int8.tiles_in_order(rows, filters, steps, adds, gpu.sms)
            return [SimpleNamespace(name=name) for name in names]

        def conv_bn_tiles(*arguments: Any) -> list[Any]:
            signs = arguments[-2]
            return [] if signs is None else [SimpleNamespace(name="automatic")]

        def training_tiles(
            result: Any, x: Any, weight: Any, lines: bool, operand: int = 0, classes: int = 1
        ) -> list[Any]:
            batch, channels, *image = result[2]
            steps = math.prod(weight[2][2:]) * math.ceil(x[2][1] / 64) + math.ceil(operand / 64)
            rows, images = batch * math.prod(image), (batch, (image[0], image[1]))
            names = training.tiles_in_order(
                rows, channels, steps, gpu.sms, classes, images if lines else None
            )
            return [SimpleNamespace(name=name) for name in names]

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
            names = training.wgrads_in_order(training.Wgrad.of(out, grad, gpu.sms))
            return [SimpleNamespace(name=name) for name in names]

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
