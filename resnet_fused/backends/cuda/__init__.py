"""Backend `cuda`: our CUDA kernels, and torch's convolutions (cuDNN, NHWC) with our passes.

A convolution may run in each tile of our implicit GEMM that serves it, or as cuDNN's followed by
our normalisation kernel. The heuristic prefers our kernel for every convolution of whole 16-byte
chunks on tensor cores (float16 and bfloat16, one group, channels that are multiples of 8), and
cuDNN for the others (small groups, float32 with or without TF32). The stem's three channels have
another kernel, with the pooling; a whole bottleneck of few inner channels has one as well. The head
is our average pool, then our product (preferred for few images) or cuBLAS's. Quantised int8
convolutions have kernels too; what those leave out, other backends compute. Training's
convolutions have one beside Triton's.

torch's fused `cudnn_convolution_relu` and `cudnn_convolution_add_relu` are no candidates: they add
a bias and cannot scale, so that batch norm would have to be folded into rounded weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _extension
from ...errors import BackendUnavailableError
from ...parameters import (
    BatchNorm,
    ConvBn,
    Convolution,
    Folded,
    MaxPool,
    Normalization,
    QuantizedLayer,
    QuantizedShortcut,
    is_resnet_stem,
)
from ...reference.ops import pad_channels
from .. import Backend, Candidate, Candidates, fences_products, has_tensor_memory, unavailable
from ..arguments import dense_convolution, given_scale
from ..reference import ReferenceBackend
from ..training import TrainingKernels
from .launch import Launcher

# For the heuristic: more images are work for tensor cores, which head.cu does without.
_MOST_IMAGES_OF_LINEAR = 16

# Channels of a quantised convolution come in chunks of 16 bytes.
_CHUNK = 16

# Inner channels of a bottleneck that its kernel keeps in shared memory.
_WIDEST_INNER = 128

# The kernels for whole bottlenecks: the candidate's name, the extension's, the family's.
_BOTTLENECKS = (
    ("cuda fused sm90", "cuda_bottleneck_sm90", "cuda bottleneck sm90"),
    ("cuda fused", "cuda_bottleneck", "cuda bottleneck"),
)


class CudaBackend(ReferenceBackend):
    """Implements `resnet_fused.backends.Backend`."""

    name = "cuda"

    def __init__(self, extension: ModuleType, tile: Any = None) -> None:
        """`tile`: the ConvTile that every convolution takes; by default each has its own."""
        self.extension = extension
        self._launcher = self._make_launcher(extension)
        self._tile = tile
        self._unloadable = functools.cache(self._check_device)

    def _make_launcher(self, extension: ModuleType) -> Launcher:
        return Launcher(extension)

    @functools.cached_property
    def training(self) -> TrainingKernels | None:  # type: ignore[override]  # read-only
        """Where the build and the GPU have our convolutions, and Triton the passes between them."""
        architectures = self.extension.build_info()["cuda_architectures"].split()
        if "90a" not in architectures or torch.cuda.get_device_capability() != (9, 0):
            return None
        if unavailable("triton"):
            return None
        from .training import CudaTraining

        return CudaTraining(self.training_convolutions)

    def training_convolutions(self, piece: str, arguments: tuple[Any, ...]) -> list[Candidate]:
        """Our kernels for a piece of training, in each tile that computes it, the expected fastest
        first. Pieces and arguments are those of `resnet_fused.backends.training.TrainingKernels`.
        """
        if piece == "folded_end":
            main, shortcut, signs = arguments
            return self._tiles(self._folded_end, *_folded_layers(main, shortcut), True, signs)
        if piece not in ("conv_stats", "dgrad", "wgrad"):
            return []
        launcher, tensor = self._launcher, arguments[0]
        conv = next(argument for argument in arguments if isinstance(argument, Convolution))
        if tensor.dtype not in (torch.float16, torch.bfloat16) or conv.groups > 1:
            return []
        tiles: list[str] = []
        run: Callable[..., Any] = getattr(launcher, piece)
        if piece == "conv_stats":
            tiles = launcher.conv_stats_tiles(tensor, conv)
        elif piece == "wgrad" and conv.weight.dtype in (torch.float32, tensor.dtype):
            tiles = launcher.wgrad_tiles(*arguments)
        elif piece == "dgrad":
            below, add, add_stride, term = arguments[3:]
            if add_stride is None and (add is None or below is term is None):
                tiles = launcher.dgrad_tiles(*arguments[:5], *arguments[6:])
        return [
            Candidate(f"cuda {tile}", functools.partial(run, tile), f"cuda training {tile}")
            for tile in tiles
        ]

    def _folded_end(
        self, tile: str, main: Folded, shortcut: Tensor | Folded | None, signs: bool
    ) -> tuple[Tensor, Tensor | None]:
        layers = _folded_layers(main, shortcut)
        if signs:
            return self._launcher.conv_bn_signs(tile, *layers, True)
        return self._launcher.conv_bn(tile, *layers, True), None

    @property
    def training_tiles(self) -> list[str]:
        """The tiles of training's convolutions, as candidates and families name them."""
        extension = self.extension
        return [*extension.TrainingTile.__members__, *extension.WgradTile.__members__]

    @property
    def tiles(self) -> list[str]:
        """The tiles of our convolutions, of all GPUs, as candidates and families name them."""
        return list(self.extension.ConvTile.__members__)

    @property
    def quantized_tiles(self) -> list[str]:
        """Those of our quantised convolutions."""
        return list(self.extension.QuantizedTile.__members__)

    def _check_device(self, index: int) -> str | None:
        with torch.cuda.device(index):
            try:
                self.extension.cuda_check_device(index)
            except RuntimeError as error:
                return str(error)
        return None

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"it serves CUDA tensors and the input is on {device}; use backend 'cpu'"
        if dtype not in (*self._launcher.dtypes, *self._launcher.quantized_dtypes):
            return (
                f"it has no kernels for {dtype}; use float32, float16, bfloat16, uint8, int8 or "
                "float8_e4m3fn"
            )
        index = torch.cuda.current_device() if device.index is None else device.index
        return self._unloadable(index)

    def bn_add_relu(
        self, x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool
    ) -> Candidates:
        return (Candidate("cuda", self._launcher.bn_add_relu, "cuda bn_add_relu"),)

    def conv_bn(self, x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool) -> Candidates:
        tiles = self._tiles(self._conv_bn, (x, layer), None, residual, relu)
        if self._tile is not None:
            return tiles
        preferred = not _left_to_triton(x)
        cudnn = Candidate("cudnn", self._conv_bn_of_cudnn, "cuda bn_add_relu", preferred)
        return [cudnn, *tiles] if self._left_to_cudnn(x, layer.conv) else [*tiles, cudnn]

    def conv_bn_projection(
        self, x: Tensor, layer: ConvBn, shortcut: Tensor, projection: ConvBn
    ) -> Candidates:
        if layer.conv.groups * projection.conv.groups > 1:
            return ()
        left = self._left_to_cudnn(x, layer.conv) or self._left_to_cudnn(shortcut, projection.conv)
        tiles = self._tiles(
            self._conv_bn_projection, (x, layer), (shortcut, projection), None, True
        )
        return [tile._replace(is_profitable=tile.is_profitable and not left) for tile in tiles]

    def _tiles(
        self,
        launch: Callable[..., Any],
        main: tuple[Tensor, ConvBn],
        projection: tuple[Tensor, ConvBn] | None,
        residual: Tensor | None,
        relu: bool,
        signs: bool = False,
    ) -> list[Candidate]:
        """Our kernel in each tile that serves the convolution, the heuristic's choice first."""
        if self._tile is not None:
            names = [self._tile.name]
        else:
            names = self._launcher.tiles(main, projection, residual, relu, signs=signs)
            # On Hopper the first one is what `automatic` would take, by a self-check of its own.
            # Signs are written on Hopper alone.
            if not signs and not (names and "sm90" in names[0]):
                names = ["automatic", *names]
        preferred = not _left_to_triton(main[0])
        return [
            Candidate(
                f"cuda {name}", functools.partial(launch, name), f"cuda conv_bn {name}", preferred
            )
            for name in names
        ]

    def _conv_bn(
        self, tile: str, x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool
    ) -> Tensor:
        return self._launcher.conv_bn(tile, (x, layer), None, residual, relu)

    def _conv_bn_projection(
        self, tile: str, x: Tensor, layer: ConvBn, shortcut: Tensor, projection: ConvBn
    ) -> Tensor:
        return self._launcher.conv_bn(tile, (x, layer), (shortcut, projection), None, True)

    def _conv_bn_of_cudnn(
        self, x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool
    ) -> Tensor:
        convolved = _convolve(x, layer.conv)
        if residual is not None:
            residual = pad_channels(residual, convolved.shape[1])
        return self._launcher.bn_add_relu(convolved, layer.bn, residual, relu, out=convolved)

    def _left_to_cudnn(self, x: Tensor, conv: Convolution) -> bool:
        return (
            x.dtype == torch.float32
            or conv.groups > 1
            or conv.weight.shape[0] % 8 > 0
            or conv.weight.shape[1] % 8 > 0
        )

    def bottleneck(
        self,
        x: Tensor,
        layer1: ConvBn,
        layer2: ConvBn,
        layer3: ConvBn,
        projection: ConvBn | None,
    ) -> Candidates:
        layers = _present((layer1, layer2, layer3, projection))
        if not _resnet_bottleneck(x, [conv for conv, _ in layers]):
            return ()
        return [
            Candidate(
                name,
                functools.partial(self._bottleneck, kernel),
                family,
                not _left_to_triton(x)
                and self._launcher.is_bottleneck_profitable(kernel, x, layers),
            )
            for name, kernel, family in _BOTTLENECKS
            if self._launcher.can_implement_bottleneck(kernel, x, layers)
        ]

    def _bottleneck(self, kernel: str, x: Tensor, *layers: ConvBn | None) -> Tensor:
        return self._launcher.bottleneck(kernel, x, _present(layers))

    def stem(self, x: Tensor, layer: ConvBn, pool: MaxPool) -> Candidates:
        if not _resnet_stem(layer.conv, pool):
            return ()
        return (Candidate("cuda fused", self._launcher.stem, "cuda stem"),)

    def image_stem(
        self, images: Tensor, layer: ConvBn, pool: MaxPool, normalization: Normalization
    ) -> Candidates:
        if not _resnet_stem(layer.conv, pool):
            return ()
        return (Candidate("cuda fused", self._launcher.image_stem, "cuda image_stem"),)

    def quantized_conv(
        self, x: Tensor, layer: QuantizedLayer, shortcut: QuantizedShortcut | None, relu: bool
    ) -> Candidates:
        conv = layer.conv
        if (
            conv.weight.shape[0] % _CHUNK > 0
            or layer.padding_value is not None
            or conv.groups > 1
            or (shortcut is not None and not _can_add(x, shortcut))
        ):
            return ()
        return [
            Candidate(
                f"cuda {tile}",
                functools.partial(self._launcher.quantized_conv, tile),
                f"cuda quantized {tile}",
                not _left_to_triton(x),
            )
            for tile in self._launcher.quantized_tiles(x, layer, shortcut, relu)
        ]

    def head(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Candidates:
        linear = Candidate("cuda linear", self._linear, "cuda head")
        cublas = Candidate("cublas", self._cublas, "cuda head")
        return (linear, cublas) if x.shape[0] <= _MOST_IMAGES_OF_LINEAR else (cublas, linear)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        means = self._launcher.average_pool(x, torch.float32)
        return self._launcher.linear(means, weight, bias)

    def _cublas(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(self._launcher.average_pool(x, x.dtype), weight, bias)


def _folded_layers(
    main: Folded, shortcut: Tensor | Folded | None
) -> tuple[tuple[Tensor, ConvBn], tuple[Tensor, ConvBn] | None, Tensor | None]:
    """A folded end as the convolution of inference takes it: its layer, and the shortcut's layer or
    what it adds."""

    def layer(end: Folded) -> tuple[Tensor, ConvBn]:
        return end.x, given_scale(dense_convolution(end.conv, end.x.dtype), end.scale_shift)

    if isinstance(shortcut, Folded):
        return layer(main), layer(shortcut), None
    return layer(main), None, shortcut


def _resnet_stem(conv: Convolution, pool: MaxPool) -> bool:
    """Whether our stem's kernel computes this one."""
    dtype, filters = conv.weight.dtype, conv.weight.shape[0]
    served = dtype in (torch.float16, torch.bfloat16) and filters % 8 == 0
    return served and is_resnet_stem(conv, pool)


def _resnet_bottleneck(x: Tensor, convolutions: Sequence[Convolution]) -> bool:
    """Whether our kernel for a whole bottleneck may compute this one: 1×1, 3×3, 1×1, 16-bit."""
    stride = convolutions[1].stride[0]
    windows = [(1, 1, 0), (3, stride, 1), (1, 1, 0), (1, stride, 0)]
    return (
        x.dtype != torch.float32
        and convolutions[0].weight.shape[0] <= _WIDEST_INNER
        and all(
            tuple(conv.weight.shape[2:]) == (kernel, kernel)
            and conv[1:] == ((stride, stride), (padding, padding), (1, 1), 1)
            for conv, (kernel, stride, padding) in zip(convolutions, windows, strict=False)
        )
    )


def _left_to_triton(x: Tensor) -> bool:
    """Whether the heuristic prefers Triton's convolutions, which use tcgen05 where ours do not."""
    return has_tensor_memory(x.device) and fences_products() and not unavailable("triton")


def _present(layers: Sequence[ConvBn | None]) -> list[ConvBn]:
    return [layer for layer in layers if layer is not None]


def _can_add(x: Tensor, shortcut: QuantizedShortcut) -> bool:
    """Whether a kernel adds the shortcut: one that multiplies x multiplies only its like."""
    projection = shortcut.projection
    return projection is None or (projection.groups == 1 and shortcut.x.dtype == x.dtype)


def _convolve(x: Tensor, conv: Convolution) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    weight = conv.weight.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return out.contiguous(memory_format=torch.channels_last)


def create() -> Backend:
    if reason := _extension.available():
        raise BackendUnavailableError(f"backend 'cuda' cannot run: {reason}.")
    extension = _extension.load()
    info = extension.build_info()
    if not info["cuda"]:
        raise BackendUnavailableError(
            f"backend 'cuda' was left out of this build: {info['cuda_note']}; reinstall with nvcc "
            "in PATH or CUDACXX and RESNET_FUSED_CUDA=on."
        )
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise BackendUnavailableError(
            "backend 'cuda' needs an NVIDIA GPU, its driver and a torch built for CUDA; "
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no such GPU."
        )
    return CudaBackend(extension)
