"""Backend `cuda`: torch's convolutions (cuDNN, NHWC), our CUDA kernels for what follows them."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _extension
from ..errors import BackendUnavailableError
from ..parameters import BatchNorm, Convolution, MaxPool
from . import Backend


class CudaBackend:
    name = "cuda"

    def __init__(self, extension: ModuleType) -> None:
        self._extension = extension
        self._dtypes = {
            torch.float32: extension.DType.float32,
            torch.float16: extension.DType.float16,
            torch.bfloat16: extension.DType.bfloat16,
        }
        self._unloadable = functools.cache(self._check_device)

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
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        if out is None:
            out = torch.empty_like(x, memory_format=torch.channels_last)
        # Held in a list, as the kernel's arguments are bare addresses.
        vectors = [None if v is None else self._vector(v) for v in bn[:4]]
        with torch.cuda.device(x.device):
            self._extension.cuda_bn_add_relu(
                out.data_ptr(),
                x.data_ptr(),
                0 if residual is None else residual.data_ptr(),
                self._dtypes[x.dtype],
                x.numel() // x.shape[1],
                x.shape[1],
                *(None if v is None else (v.data_ptr(), self._dtypes[v.dtype]) for v in vectors),
                bn.eps,
                relu,
                x.device.index,
                torch.cuda.current_stream(x.device).cuda_stream,
            )
        return out

    def _vector(self, v: Tensor) -> Tensor:
        """Dense, and in a type that the kernel reads (a float64 parameter is rounded)."""
        return (v if v.dtype in self._dtypes else v.float()).contiguous()

    def conv_bn(
        self, x: Tensor, conv: Convolution, bn: BatchNorm, residual: Tensor | None, relu: bool
    ) -> Tensor:
        convolved = _convolve(x, conv)
        return self._bn_add_relu(convolved, bn, residual, relu, out=convolved)

    def conv_bn_projection(
        self,
        x: Tensor,
        conv: Convolution,
        bn: BatchNorm,
        shortcut: Tensor,
        projection: Convolution,
        projection_bn: BatchNorm,
    ) -> Tensor:
        projected = self.conv_bn(shortcut, projection, projection_bn, None, relu=False)
        return self.conv_bn(x, conv, bn, projected, relu=True)

    def stem(self, x: Tensor, conv: Convolution, bn: BatchNorm, pool: MaxPool) -> Tensor:
        out = F.max_pool2d(self.conv_bn(x, conv, bn, None, relu=True), *pool)
        return out.contiguous(memory_format=torch.channels_last)

    def head(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x.mean((2, 3)), weight, bias)


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
