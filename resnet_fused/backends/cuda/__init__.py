"""Backend `cuda`: our CUDA kernels, and torch's convolutions (cuDNN, NHWC) where those are ahead.

Each convolution runs with the fastest, as measured, of the tiles of our implicit GEMM and of cuDNN
followed by our normalisation kernel. The rule, where measuring is not allowed: our kernel takes
every convolution of whole 16-byte chunks on tensor cores (float16 and bfloat16, one group, channels
that are multiples of 8), cuDNN the others (small groups, float32 with or without TF32). The stem's
three channels have another kernel, with the pooling; a whole bottleneck of few inner channels has
one as well, which is measured against its layers. The head is our average pool, then our product
(by the rule, of few images) or cuBLAS's.

torch's fused `cudnn_convolution_relu` and `cudnn_convolution_add_relu` are no candidates: they add
a bias and cannot scale, so that batch norm would have to be folded into rounded weights.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _extension
from ...errors import BackendUnavailableError
from ...parameters import BatchNorm, ConvBn, Convolution, MaxPool
from .. import Backend, LayerByLayer
from ..tuning import Tuner, describe
from .launch import Launcher

_CUDNN = "cudnn"
_SEPARATE = "separate"
_FUSED = "fused"
_LINEAR = "linear"
_CUBLAS = "cublas"

# Of the rule: more images are work for tensor cores, which our product does without (head.cu).
_MOST_IMAGES_OF_LINEAR = 16

# Inner channels of a bottleneck that its kernel keeps in shared memory.
_WIDEST_INNER = 128


class CudaBackend(LayerByLayer):
    name = "cuda"
    training = None

    def __init__(self, extension: ModuleType, tile: Any = None) -> None:
        """`tile`: the ConvTile that every convolution takes; by default each has its own."""
        self.extension = extension
        self._launcher = self._make_launcher(extension)
        self._tile = tile
        self._tuner = Tuner(self.name)
        self._unloadable = functools.cache(self._check_device)

    def _make_launcher(self, extension: ModuleType) -> Launcher:
        return Launcher(extension)

    @property
    def tiles(self) -> list[str]:
        """The tiles of our convolutions, of all GPUs, as candidates are named."""
        return [name for name in self.extension.ConvTile.__members__ if name != "automatic"]

    @property
    def kernels(self) -> list[str]:
        """All of its candidates by name, of whatever op and GPU."""
        return [*self.tiles, _CUDNN, _FUSED, _SEPARATE, _LINEAR, _CUBLAS]

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
        if dtype not in self._launcher.dtypes:
            return f"it has no kernels for {dtype}; use float32, float16 or bfloat16"
        index = torch.cuda.current_device() if device.index is None else device.index
        return self._unloadable(index)

    def bn_add_relu(self, x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
        return self._launcher.bn_add_relu(x, bn, residual, relu)

    def _left_to_cudnn(self, x: Tensor, conv: Convolution) -> bool:
        return (
            x.dtype == torch.float32
            or conv.groups > 1
            or conv.weight.shape[0] % 8 > 0
            or conv.weight.shape[1] % 8 > 0
        )

    def conv_bn(self, x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool) -> Tensor:
        arguments = ((x, layer), None, residual, relu)

        def launch(kernel: str) -> Tensor:
            if kernel == _CUDNN:
                return self._conv_bn_of_cudnn(x, layer, residual, relu)
            return self._launcher.conv_bn(kernel, *arguments)

        return self._tuner.run(
            ("conv_bn", *describe(x, layer, residual, relu)),
            x.device,
            lambda: self._kernels(_CUDNN, self._left_to_cudnn(x, layer.conv), *arguments),
            launch,
        )

    def _conv_bn_of_cudnn(
        self, x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool
    ) -> Tensor:
        convolved = _convolve(x, layer.conv)
        return self._launcher.bn_add_relu(convolved, layer.bn, residual, relu, out=convolved)

    def _kernels(self, other: str, other_first: bool, *arguments: Any) -> list[str]:
        """Names of the ways to compute a convolution: our tiles, and `other`; the rule's first."""
        if self._tile is not None:
            return [self._tile.name]
        tiles = self._launcher.tiles(*arguments)
        return [other, *tiles] if other_first else ["automatic", *tiles, other]

    def conv_bn_projection(
        self, x: Tensor, layer: ConvBn, shortcut: Tensor, projection: ConvBn
    ) -> Tensor:
        arguments = ((x, layer), (shortcut, projection), None, True)
        conv, projected_conv = layer.conv, projection.conv

        def launch(kernel: str) -> Tensor:
            if kernel == _SEPARATE:
                projected = self.conv_bn(shortcut, projection, None, relu=False)
                return self.conv_bn(x, layer, projected, relu=True)
            return self._launcher.conv_bn(kernel, *arguments)

        if conv.groups * projected_conv.groups > 1:
            return launch(_SEPARATE)
        separate = self._left_to_cudnn(x, conv) or self._left_to_cudnn(shortcut, projected_conv)
        return self._tuner.run(
            ("conv_bn_projection", *describe(x, layer, shortcut, projection)),
            x.device,
            lambda: self._kernels(_SEPARATE, separate, *arguments),
            launch,
        )

    def bottleneck(
        self,
        x: Tensor,
        layer1: ConvBn,
        layer2: ConvBn,
        layer3: ConvBn,
        projection: ConvBn | None,
    ) -> Tensor:
        layers = [layer1, layer2, layer3, *([] if projection is None else [projection])]

        def launch(kernel: str) -> Tensor:
            if kernel == _FUSED:
                return self._launcher.bottleneck(x, layers)
            return LayerByLayer.bottleneck(self, x, layer1, layer2, layer3, projection)

        if not _resnet_bottleneck(x, [conv for conv, _ in layers]):
            return launch(_SEPARATE)
        return self._tuner.run(
            ("bottleneck", *describe(x, *layers)),
            x.device,
            lambda: self._bottleneck_kernels(x, layers),
            launch,
        )

    def _bottleneck_kernels(self, x: Tensor, layers: Sequence[ConvBn]) -> list[str]:
        """The ways to compute a bottleneck, the rule's first."""
        if not self._launcher.can_implement_bottleneck(x, layers):
            return [_SEPARATE]
        profitable = self._launcher.is_bottleneck_profitable(x, layers)
        return [_FUSED, _SEPARATE] if profitable else [_SEPARATE, _FUSED]

    def stem(self, x: Tensor, layer: ConvBn, pool: MaxPool) -> Tensor:
        def launch(kernel: str) -> Tensor:
            if kernel == _FUSED:
                return self._launcher.stem(x, layer, pool)
            out = F.max_pool2d(self.conv_bn(x, layer, None, relu=True), *pool)
            return out.contiguous(memory_format=torch.channels_last)

        if not _resnet_stem(x, layer.conv, pool):
            return launch(_SEPARATE)
        return self._tuner.run(
            ("stem", *describe(x, layer, pool)), x.device, lambda: [_FUSED, _SEPARATE], launch
        )

    def head(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        def launch(product: str) -> Tensor:
            if product == _CUBLAS:
                return F.linear(self._launcher.average_pool(x, x.dtype), weight, bias)
            return self._launcher.linear(
                self._launcher.average_pool(x, torch.float32), weight, bias
            )

        few = x.shape[0] <= _MOST_IMAGES_OF_LINEAR
        return self._tuner.run(
            ("head", *describe(x, weight, bias)),
            x.device,
            lambda: [_LINEAR, _CUBLAS] if few else [_CUBLAS, _LINEAR],
            launch,
        )


def _resnet_stem(x: Tensor, conv: Convolution, pool: MaxPool) -> bool:
    """Whether our stem's kernel computes this one."""
    return (
        x.dtype != torch.float32
        and conv.weight.shape[1:] == (3, 7, 7)
        and conv.weight.shape[0] % 8 == 0
        and tuple(map(tuple, conv[1:4])) == ((2, 2), (3, 3), (1, 1))
        and conv.groups == 1
        and pool == MaxPool(3, 2, 1)
    )


def _resnet_bottleneck(x: Tensor, convolutions: Sequence[Convolution]) -> bool:
    """Whether our kernel for a whole bottleneck may compute this one: 1×1, 3×3, 1×1, 16-bit."""
    stride = convolutions[1].stride[0]
    windows = [(1, 1, 0), (3, stride, 1), (1, 1, 0), (1, stride, 0)]
    return (
        x.dtype != torch.float32
        and convolutions[0].weight.shape[0] <= _WIDEST_INNER
        and all(
            tuple(conv.weight.shape[2:]) == (kernel, kernel)
            and tuple(map(tuple, conv[1:4])) == ((stride, stride), (padding, padding), (1, 1))
            and conv.groups == 1
            for conv, (kernel, stride, padding) in zip(convolutions, windows, strict=False)
        )
    )


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
