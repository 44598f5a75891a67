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
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _extension
from ..errors import BackendUnavailableError
from ..parameters import BatchNorm, Convolution, MaxPool
from . import Backend, LayerByLayer, tf32_in_convolutions
from .residual import readable, residual_argument
from .tuning import Tuner, describe

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
        self._extension = extension
        self._tile = tile
        self._tuner = Tuner(self.name)
        self._dtypes = {
            torch.float32: extension.DType.float32,
            torch.float16: extension.DType.float16,
            torch.bfloat16: extension.DType.bfloat16,
        }
        self._unloadable = functools.cache(self._check_device)

    @property
    def tiles(self) -> list[str]:
        """The tiles of our convolutions, of all GPUs, as candidates are named."""
        return [name for name in self._extension.ConvTile.__members__ if name != "automatic"]

    @property
    def kernels(self) -> list[str]:
        """All of its candidates by name, of whatever op and GPU."""
        return [*self.tiles, _CUDNN, _FUSED, _SEPARATE, _LINEAR, _CUBLAS]

    def _check_device(self, index: int) -> str | None:
        with torch.cuda.device(index):
            try:
                self._extension.cuda_check_device(index)
            except RuntimeError as error:
                return str(error)
        return None

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"it serves CUDA tensors and the input is on {device}; use backend 'cpu'"
        if dtype not in self._dtypes:
            return f"it has no kernels for {dtype}; use float32, float16 or bfloat16"
        index = torch.cuda.current_device() if device.index is None else device.index
        return self._unloadable(index)

    def bn_add_relu(self, x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
        return self._bn_add_relu(x, bn, residual, relu, out=None)

    def _bn_add_relu(
        self, x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool, out: Tensor | None
    ) -> Tensor:
        """`out` may be `x`, to overwrite a convolution's result that nobody else holds."""
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:  # of which this kernel reads rows, but of any number of channels
            residual = residual.contiguous(memory_format=torch.channels_last)
        if out is None:
            out = torch.empty_like(x, memory_format=torch.channels_last)
        vectors = self._vectors(bn)
        self._run(
            self._extension.cuda_bn_add_relu,
            out,
            [x, residual, *vectors],
            out.data_ptr(),
            x.data_ptr(),
            residual_argument(residual),
            self._dtypes[x.dtype],
            x.shape[0],
            tuple(x.shape[2:]),
            x.shape[1],
            *map(self._typed_address, vectors),
            bn.eps,
            relu,
        )
        return out

    def _run(
        self,
        kernel: Callable[..., None],
        out: Tensor,
        read: Sequence[Tensor | None],
        *arguments: Any,
    ) -> None:
        """Queues `kernel(*arguments)` on the current stream of the tensors' device.

        The arguments are bare addresses; `out` and `read` are the tensors behind them, which the
        caller thus keeps alive until the kernel is queued.
        """
        with torch.cuda.device(out.device):
            stream = torch.cuda.current_stream(out.device).cuda_stream
            kernel(*arguments, out.device.index, stream)

    def _vectors(self, bn: BatchNorm) -> list[Tensor | None]:
        """Dense, and in types that the kernels read (a float64 parameter is rounded)."""
        return [
            None if v is None else (v if v.dtype in self._dtypes else v.float()).contiguous()
            for v in bn[:4]
        ]

    def _typed_address(self, vector: Tensor | None) -> tuple[int, Any] | None:
        return None if vector is None else (vector.data_ptr(), self._dtypes[vector.dtype])

    def _left_to_cudnn(self, x: Tensor, conv: Convolution) -> bool:
        return (
            x.dtype == torch.float32
            or conv.groups > 1
            or conv.weight.shape[0] % 8 > 0
            or conv.weight.shape[1] % 8 > 0
        )

    def conv_bn(
        self, x: Tensor, conv: Convolution, bn: BatchNorm, residual: Tensor | None, relu: bool
    ) -> Tensor:
        arguments = ((x, conv, bn), None, residual, relu)

        def launch(kernel: str) -> Tensor:
            if kernel == _CUDNN:
                return self._conv_bn_of_cudnn(x, conv, bn, residual, relu)
            return self._conv_bn(kernel, *arguments)

        return self._tuner.run(
            ("conv_bn", *describe(x, conv, residual, relu)),
            x.device,
            lambda: self._kernels(_CUDNN, self._left_to_cudnn(x, conv), *arguments),
            launch,
        )

    def _conv_bn_of_cudnn(
        self, x: Tensor, conv: Convolution, bn: BatchNorm, residual: Tensor | None, relu: bool
    ) -> Tensor:
        convolved = _convolve(x, conv)
        return self._bn_add_relu(convolved, bn, residual, relu, out=convolved)

    def _kernels(self, other: str, other_first: bool, *arguments: Any) -> list[str]:
        """Names of the ways to compute a convolution: our tiles, and `other`; the rule's first."""
        if self._tile is not None:
            return [self._tile.name]
        out, _, call = self._conv_bn_call(*arguments)
        tiles = [t.name for t in self._extension.cuda_conv_bn_tiles(*call, self._place(out.device))]
        return [other, *tiles] if other_first else ["automatic", *tiles, other]

    def _conv_bn(self, tile: str, *arguments: Any) -> Tensor:
        out, read, call = self._conv_bn_call(*arguments)
        tile = getattr(self._extension.ConvTile, tile)
        self._run(self._extension.cuda_conv_bn, out, read, *call, tile)
        return out

    def _conv_bn_call(
        self,
        main: tuple[Tensor, Convolution, BatchNorm],
        projection: tuple[Tensor, Convolution, BatchNorm] | None,
        residual: Tensor | None,
        relu: bool,
    ) -> tuple[Tensor, list[Tensor | None], tuple[Any, ...]]:
        """The result to be, the tensors that are read, and the kernel's arguments."""
        x, conv, _ = main
        residual = readable(residual)
        image = conv.output_size(*x.shape[2:])
        out = torch.empty(
            (x.shape[0], conv.weight.shape[0], *image),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        product, read = self._product(*main)
        projected, also_read = (None, []) if projection is None else self._product(*projection)
        call = (
            out.data_ptr(),
            residual_argument(residual),
            self._dtypes[x.dtype],
            out.shape[0],
            image,
            out.shape[1],
            conv.groups,
            product,
            projected,
            relu,
            tf32_in_convolutions(),
        )
        return out, [residual, *read, *also_read], call

    def _product(
        self, x: Tensor, conv: Convolution, bn: BatchNorm
    ) -> tuple[Any, list[Tensor | None]]:
        """The kernel's description of one convolution, and the tensors it refers to."""
        x = x.contiguous(memory_format=torch.channels_last)
        weight = conv.weight.contiguous(memory_format=torch.channels_last)
        vectors = self._vectors(bn)
        product = self._extension.ConvolutionBn(
            x.data_ptr(),
            weight.data_ptr(),
            tuple(x.shape[2:]),
            x.shape[1],
            tuple(weight.shape[2:]),
            *conv[1:4],
            *map(self._typed_address, vectors),
            bn.eps,
        )
        return product, [x, weight, *vectors]

    def conv_bn_projection(
        self,
        x: Tensor,
        conv: Convolution,
        bn: BatchNorm,
        shortcut: Tensor,
        projection: Convolution,
        projection_bn: BatchNorm,
    ) -> Tensor:
        arguments = ((x, conv, bn), (shortcut, projection, projection_bn), None, True)

        def launch(kernel: str) -> Tensor:
            if kernel == _SEPARATE:
                projected = self.conv_bn(shortcut, projection, projection_bn, None, relu=False)
                return self.conv_bn(x, conv, bn, projected, relu=True)
            return self._conv_bn(kernel, *arguments)

        if conv.groups * projection.groups > 1:
            return launch(_SEPARATE)
        separate = self._left_to_cudnn(x, conv) or self._left_to_cudnn(shortcut, projection)
        return self._tuner.run(
            ("conv_bn_projection", *describe(x, conv, shortcut, projection)),
            x.device,
            lambda: self._kernels(_SEPARATE, separate, *arguments),
            launch,
        )

    def bottleneck(self, x: Tensor, *layers: Any) -> Tensor:
        pairs = [p for p in zip(layers[::2], layers[1::2], strict=True) if p[0] is not None]

        def launch(kernel: str) -> Tensor:
            if kernel == _FUSED:
                return self._whole_bottleneck(x, pairs)
            return LayerByLayer.bottleneck(self, x, *layers)

        if not _resnet_bottleneck(x, [conv for conv, _ in pairs]):
            return launch(_SEPARATE)
        return self._tuner.run(
            ("bottleneck", *describe(x, *layers)),
            x.device,
            lambda: self._bottleneck_kernels(x, pairs),
            launch,
        )

    def _bottleneck_kernels(
        self, x: Tensor, layers: Sequence[tuple[Convolution, BatchNorm]]
    ) -> list[str]:
        """The ways to compute a bottleneck, the rule's first."""
        block, _ = self._block(x, layers)
        device = self._place(x.device)
        if not block.offered(device):
            return [_SEPARATE]
        return [_FUSED, _SEPARATE] if block.pays(device) else [_SEPARATE, _FUSED]

    def _whole_bottleneck(
        self, x: Tensor, layers: Sequence[tuple[Convolution, BatchNorm]]
    ) -> Tensor:
        block, read = self._block(x, layers)
        image = layers[1][0].output_size(*x.shape[2:])
        out = torch.empty(
            (x.shape[0], layers[2][0].weight.shape[0], *image),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        self._run(self._extension.cuda_bottleneck, out, read, out.data_ptr(), block)
        return out

    def _place(self, device: torch.device) -> int:
        """The number that CUDA has for the device."""
        return torch.cuda.current_device() if device.index is None else device.index

    def _block(
        self, x: Tensor, layers: Sequence[tuple[Convolution, BatchNorm]]
    ) -> tuple[Any, list[Tensor | None]]:
        """The kernel's description of a bottleneck, and the tensors it refers to."""
        x = x.contiguous(memory_format=torch.channels_last)
        read: list[Tensor | None] = [x]
        described = []
        for conv, bn in layers:
            weight = conv.weight.contiguous(memory_format=torch.channels_last)
            vectors = self._vectors(bn)
            read += [weight, *vectors]
            described.append((weight.data_ptr(), *map(self._typed_address, vectors), bn.eps))
        block = self._extension.Bottleneck(
            x.data_ptr(),
            self._dtypes[x.dtype],
            x.shape[0],
            tuple(x.shape[2:]),
            x.shape[1],
            layers[0][0].weight.shape[0],
            layers[2][0].weight.shape[0],
            layers[1][0].stride[0],
            described[:3],
            described[3] if len(described) > 3 else None,
        )
        return block, read

    def stem(self, x: Tensor, conv: Convolution, bn: BatchNorm, pool: MaxPool) -> Tensor:
        def launch(kernel: str) -> Tensor:
            if kernel == _FUSED:
                return self._stem(x, conv, bn, pool)
            out = F.max_pool2d(self.conv_bn(x, conv, bn, None, relu=True), *pool)
            return out.contiguous(memory_format=torch.channels_last)

        if not _resnet_stem(x, conv, pool):
            return launch(_SEPARATE)
        return self._tuner.run(
            ("stem", *describe(x, conv, pool)), x.device, lambda: [_FUSED, _SEPARATE], launch
        )

    def _stem(self, x: Tensor, conv: Convolution, bn: BatchNorm, pool: MaxPool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        weight = conv.weight.contiguous(memory_format=torch.channels_last)
        vectors = self._vectors(bn)
        height, width = (-(-size // 2) for size in x.shape[2:])
        out = torch.empty(
            (x.shape[0], weight.shape[0], *pool.output_size(height, width)),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        self._run(
            self._extension.cuda_stem,
            out,
            [x, weight, *vectors],
            out.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            self._dtypes[x.dtype],
            x.shape[0],
            tuple(x.shape[2:]),
            weight.shape[0],
            *map(self._typed_address, vectors),
            bn.eps,
        )
        return out

    def head(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        def launch(product: str) -> Tensor:
            if product == _CUBLAS:
                return F.linear(self._average_pool(x, x.dtype), weight, bias)
            return self._linear(self._average_pool(x, torch.float32), weight, bias)

        few = x.shape[0] <= _MOST_IMAGES_OF_LINEAR
        return self._tuner.run(
            ("head", *describe(x, weight, bias)),
            x.device,
            lambda: [_LINEAR, _CUBLAS] if few else [_CUBLAS, _LINEAR],
            launch,
        )

    def _linear(self, means: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        out = means.new_empty((means.shape[0], weight.shape[0]), dtype=weight.dtype)
        self._run(
            self._extension.cuda_linear,
            out,
            [means, weight, bias],
            out.data_ptr(),
            means.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            self._dtypes[weight.dtype],
            *means.shape,
            weight.shape[0],
        )
        return out

    def _average_pool(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The means over all positions, (N, C) of x's type or, not rounded, of float32."""
        x = x.contiguous(memory_format=torch.channels_last)
        out = torch.empty(x.shape[:2], dtype=dtype, device=x.device)
        self._run(
            self._extension.cuda_average_pool,
            out,
            [x],
            out.data_ptr(),
            self._dtypes[dtype],
            x.data_ptr(),
            self._dtypes[x.dtype],
            x.shape[0],
            x.shape[2] * x.shape[3],
            x.shape[1],
        )
        return out


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
