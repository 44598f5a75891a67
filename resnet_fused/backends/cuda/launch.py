"""Calls of the extension's CUDA kernels: tensors in, a queued kernel's result out.

`Launcher` describes tensors to the bindings and queues kernels on the tensors' device; which kernel
serves what is decided in `resnet_fused.backends.cuda`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...parameters import BatchNorm, ConvBn, MaxPool
from .. import tf32_in_convolutions
from ..residual import readable, residual_argument


class Launcher:
    """Every kernel of the extension as a function of tensors."""

    def __init__(self, extension: ModuleType) -> None:
        self.extension = extension
        self.dtypes = {
            torch.float32: extension.DType.float32,
            torch.float16: extension.DType.float16,
            torch.bfloat16: extension.DType.bfloat16,
        }

    def bn_add_relu(
        self,
        x: Tensor,
        bn: BatchNorm,
        residual: Tensor | None,
        relu: bool,
        out: Tensor | None = None,
    ) -> Tensor:
        """`out` may be `x`, to overwrite a convolution's result that nobody else holds."""
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:  # of which this kernel reads rows, but of any number of channels
            residual = residual.contiguous(memory_format=torch.channels_last)
        if out is None:
            out = torch.empty_like(x, memory_format=torch.channels_last)
        vectors = self._vectors(bn)
        self.run(
            self.extension.cuda_bn_add_relu,
            out,
            [x, residual, *vectors],
            out.data_ptr(),
            x.data_ptr(),
            residual_argument(residual),
            self.dtypes[x.dtype],
            x.shape[0],
            tuple(x.shape[2:]),
            x.shape[1],
            *map(self._typed_address, vectors),
            bn.eps,
            relu,
        )
        return out

    def run(
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
            None if v is None else (v if v.dtype in self.dtypes else v.float()).contiguous()
            for v in bn[:4]
        ]

    def _typed_address(self, vector: Tensor | None) -> tuple[int, Any] | None:
        return None if vector is None else (vector.data_ptr(), self.dtypes[vector.dtype])

    def conv_bn(self, tile: str, *arguments: Any) -> Tensor:
        out, read, call = self.conv_bn_call(*arguments)
        tile = getattr(self.extension.ConvTile, tile)
        self.run(self.extension.cuda_conv_bn, out, read, *call, tile)
        return out

    def conv_bn_call(
        self,
        main: tuple[Tensor, ConvBn],
        projection: tuple[Tensor, ConvBn] | None,
        residual: Tensor | None,
        relu: bool,
    ) -> tuple[Tensor, list[Tensor | None], tuple[Any, ...]]:
        """The result to be, the tensors that are read, and the kernel's arguments."""
        x, (conv, _) = main
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
            self.dtypes[x.dtype],
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

    def _product(self, x: Tensor, layer: ConvBn) -> tuple[Any, list[Tensor | None]]:
        """The kernel's description of one convolution, and the tensors it refers to."""
        conv, bn = layer
        x = x.contiguous(memory_format=torch.channels_last)
        weight = conv.weight.contiguous(memory_format=torch.channels_last)
        vectors = self._vectors(bn)
        product = self.extension.ConvolutionBn(
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

    def bottleneck(self, x: Tensor, layers: Sequence[ConvBn]) -> Tensor:
        block, read = self.block(x, layers)
        image = layers[1].conv.output_size(*x.shape[2:])
        out = torch.empty(
            (x.shape[0], layers[2].conv.weight.shape[0], *image),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        self.run(self.extension.cuda_bottleneck, out, read, out.data_ptr(), block)
        return out

    def block(self, x: Tensor, layers: Sequence[ConvBn]) -> tuple[Any, list[Tensor | None]]:
        """The kernel's description of a bottleneck, and the tensors it refers to."""
        x = x.contiguous(memory_format=torch.channels_last)
        read: list[Tensor | None] = [x]
        described = []
        for conv, bn in layers:
            weight = conv.weight.contiguous(memory_format=torch.channels_last)
            vectors = self._vectors(bn)
            read += [weight, *vectors]
            described.append((weight.data_ptr(), *map(self._typed_address, vectors), bn.eps))
        block = self.extension.Bottleneck(
            x.data_ptr(),
            self.dtypes[x.dtype],
            x.shape[0],
            tuple(x.shape[2:]),
            x.shape[1],
            layers[0].conv.weight.shape[0],
            layers[2].conv.weight.shape[0],
            layers[1].conv.stride[0],
            described[:3],
            described[3] if len(described) > 3 else None,
        )
        return block, read

    def stem(self, x: Tensor, layer: ConvBn, pool: MaxPool) -> Tensor:
        conv, bn = layer
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
        self.run(
            self.extension.cuda_stem,
            out,
            [x, weight, *vectors],
            out.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            self.dtypes[x.dtype],
            x.shape[0],
            tuple(x.shape[2:]),
            weight.shape[0],
            *map(self._typed_address, vectors),
            bn.eps,
        )
        return out

    def linear(self, means: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        out = means.new_empty((means.shape[0], weight.shape[0]), dtype=weight.dtype)
        self.run(
            self.extension.cuda_linear,
            out,
            [means, weight, bias],
            out.data_ptr(),
            means.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            self.dtypes[weight.dtype],
            *means.shape,
            weight.shape[0],
        )
        return out

    def average_pool(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The means over all positions, (N, C) of x's type or, not rounded, of float32."""
        x = x.contiguous(memory_format=torch.channels_last)
        out = torch.empty(x.shape[:2], dtype=dtype, device=x.device)
        self.run(
            self.extension.cuda_average_pool,
            out,
            [x],
            out.data_ptr(),
            self.dtypes[dtype],
            x.data_ptr(),
            self.dtypes[x.dtype],
            x.shape[0],
            x.shape[2] * x.shape[3],
            x.shape[1],
        )
        return out

    def place(self, device: torch.device) -> int:
        """The number that CUDA has for the device."""
        return torch.cuda.current_device() if device.index is None else device.index
