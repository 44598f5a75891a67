"""Calls of the extension's CUDA kernels: tensors in, a queued kernel's result out.

`Launcher` describes tensors to the bindings and queues kernels on the tensors' device; which kernel
serves what is decided in `resnet_fused.backends.cuda`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, channels_last

from ..._extension import optional_tensor_arg, tensor_arg
from ...parameters import (
    Activation,
    BatchNorm,
    ConvBn,
    Convolution,
    MaxPool,
    Normalization,
    OperandTerm,
    QuantizedLayer,
    QuantizedShortcut,
)
from ...reference.quantized import FLOAT8, quantized_dtype
from .. import tf32_in_convolutions
from ..arguments import (
    BatchNormArg,
    batch_norm_arg,
    dense_convolution,
    empty_nhwc,
    empty_signs,
    nhwc,
    residual_arg,
    shortcut_args,
)
from ..live_cache import LiveCache
from ..recording import copied

_LANES = 8  # elements of 16 bytes
_WIDEST_ROW = 64  # elements of a window's line, a step of the kernels


class _PackedQuantized(NamedTuple):
    """A quantised weight, which nobody edits, as the kernels read it."""

    packed: Tensor


def _pack_quantized(weight: Tensor) -> _PackedQuantized:
    """Each 16 output channels in the order that csrc/kernels/cuda/quantized_conv.h says."""
    in_order = weight.unflatten(0, (-1, 4, 2, 2)).transpose(1, 2).flatten(0, 3)
    return _PackedQuantized(nhwc(in_order))


class Launcher:
    """Every kernel of the extension as a function of tensors."""

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    quantized_dtypes = (torch.uint8, torch.int8, FLOAT8)

    def __init__(self, extension: ModuleType) -> None:
        self.extension = extension
        self._frozen: LiveCache[_PackedQuantized] = LiveCache(extension, frozen=True)

    def place(self, device: torch.device) -> int:
        """The number that CUDA has for the device."""
        return torch.cuda.current_device() if device.index is None else device.index

    def run(self, kernel: Callable[..., None], out: Tensor, *arguments: Any) -> Tensor:
        """Queues `kernel` on the current stream of the device of `out`, and returns that."""
        with torch.cuda.device(out.device):
            stream = torch.cuda.current_stream(out.device).cuda_stream
            kernel(tensor_arg(out), *arguments, out.device.index, stream)
        return out

    def bn_add_relu(
        self,
        x: Tensor,
        bn: BatchNorm,
        residual: Tensor | None,
        relu: bool,
        out: Tensor | None = None,
    ) -> Tensor:
        """`out` may be `x`, to overwrite a convolution's result that nobody else holds."""
        x = nhwc(x)
        if residual is not None:  # of which this kernel reads rows, but of any number of channels
            residual = nhwc(residual)
        return self.run(
            self.extension.cuda_bn_add_relu,
            torch.empty_like(x) if out is None else out,
            tensor_arg(x),
            self._vectors(bn),
            optional_tensor_arg(residual),
            relu,
        )

    def conv_bn(self, tile: str, *arguments: Any) -> Tensor:
        out, call = self._conv_bn_call(*arguments)
        named = getattr(self.extension.ConvTile, tile)
        return self.run(self.extension.cuda_conv_bn, out, *call, None, named)

    def conv_bn_signs(self, tile: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        """The same, with the result's signs (`resnet_fused.backends.training`)."""
        out, call = self._conv_bn_call(*arguments)
        signs, named = empty_signs(out.shape, out), getattr(self.extension.ConvTile, tile)
        return self.run(self.extension.cuda_conv_bn, out, *call, tensor_arg(signs), named), signs

    def tiles(self, *arguments: Any, signs: bool = False) -> list[str]:
        """Names of the tiles by which `conv_bn`, or `conv_bn_signs`, computes these arguments."""
        out, call = self._conv_bn_call(*arguments)
        of_signs = tensor_arg(empty_signs(out.shape, out)) if signs else None
        found = self.extension.cuda_conv_bn_tiles(
            tensor_arg(out), *call, of_signs, self.place(out.device)
        )
        return [tile.name for tile in found]

    def _conv_bn_call(
        self,
        main: tuple[Tensor, ConvBn],
        projection: tuple[Tensor, ConvBn] | None,
        residual: Tensor | None,
        relu: bool,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The result to be, and the kernel's other arguments."""
        x, (conv, _) = main
        image = conv.output_size(*x.shape[2:])
        call = (
            self._layer(*main),
            None if projection is None else self._layer(*projection),
            residual_arg(residual),
            conv.groups,
            relu,
            tf32_in_convolutions(),
        )
        return empty_nhwc(x, conv.weight.shape[0], *image), call

    def _layer(self, x: Tensor, layer: ConvBn) -> tuple[Any, ...]:
        conv, bn = layer
        weight = tensor_arg(_relaid(conv.weight))
        return tensor_arg(nhwc(x)), weight, conv[1:4], self._vectors(bn)

    def conv_stats(
        self, tile: str, x: Tensor, conv: Convolution, statistics: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See `resnet_fused.backends.training.TrainingKernels.conv_stats`."""
        out, call = self._conv_stats_call(x, conv)
        named = getattr(self.extension.TrainingTile, tile)
        moments = None
        if statistics:
            parts = self.extension.cuda_conv_stats_parts(tensor_arg(out), *call, None, named)
            moments = _parts(parts, 3, out)
        self.run(self.extension.cuda_conv_stats, out, *call, optional_tensor_arg(moments), named)
        return out, moments

    def conv_stats_tiles(self, x: Tensor, conv: Convolution) -> list[str]:
        """Names of the tiles by which `conv_stats` computes these arguments."""
        out, call = self._conv_stats_call(x, conv)
        place = self.place(x.device)
        found = self.extension.cuda_conv_stats_tiles(tensor_arg(out), *call, None, place)
        return [tile.name for tile in found]

    def _conv_stats_call(self, x: Tensor, conv: Convolution) -> tuple[Tensor, tuple[Any, ...]]:
        """The result to be, and the kernel's other arguments but for the moments."""
        x, conv = nhwc(x), dense_convolution(conv, x.dtype)
        if has_few_channels(conv):
            # A window as wide as the weight covers a line of it whole.
            lines = self._rows(conv.weight, 1, conv.weight.shape[3], 1, 0)
            x, conv = self._window_rows(x, conv)
            conv = conv._replace(weight=lines)
        out = empty_nhwc(x, len(conv.weight), *conv.output_size(*x.shape[2:]))
        return out, (tensor_arg(x), tensor_arg(conv.weight), _window(conv))

    def dgrad(
        self,
        tile: str,
        g: Tensor,
        conv: Convolution,
        shape: torch.Size,
        below: Activation | None,
        add: Tensor | None,
        add_stride: int | None = None,
        term: OperandTerm | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `resnet_fused.backends.training.TrainingKernels.dgrad`; there is no add_stride."""
        out, call, more = self._dgrad_call(g, conv, shape, below, add, term)
        named = getattr(self.extension.TrainingTile, tile)
        sums = None
        if below is not None:
            parts = self.extension.cuda_dgrad_parts(tensor_arg(out), *call, None, *more, named)
            sums = _parts(parts, 2, out)
        self.run(self.extension.cuda_dgrad, out, *call, optional_tensor_arg(sums), *more, named)
        return out, sums

    def dgrad_tiles(
        self,
        g: Tensor,
        conv: Convolution,
        shape: torch.Size,
        below: Activation | None,
        add: Tensor | None,
        term: OperandTerm | None = None,
    ) -> list[str]:
        """Names of the tiles by which `dgrad` computes these arguments."""
        out, call, more = self._dgrad_call(g, conv, shape, below, add, term)
        place = self.place(g.device)
        found = self.extension.cuda_dgrad_tiles(tensor_arg(out), *call, None, *more, place)
        return [tile.name for tile in found]

    def _dgrad_call(
        self,
        g: Tensor,
        conv: Convolution,
        shape: torch.Size,
        below: Activation | None,
        add: Tensor | None,
        term: OperandTerm | None,
    ) -> tuple[Tensor, tuple[Any, ...], tuple[Any, ...]]:
        """The result to be, and the kernel's other arguments before and behind the sums."""
        g, conv = nhwc(g), dense_convolution(conv, g.dtype)
        out = empty_nhwc(g, *shape[1:])
        pre_bn, scale_shift = (None, None) if below is None else below
        call = (
            tensor_arg(g),
            tensor_arg(conv.weight),
            _window(conv),
            None if pre_bn is None else tensor_arg(nhwc(pre_bn)),
            optional_tensor_arg(scale_shift),
        )
        more = (
            None if add is None else tensor_arg(nhwc(add)),
            None if term is None else (residual_arg(term.x), *map(tensor_arg, term[1:])),
        )
        return out, call, more

    def wgrad(self, tile: str, g: Tensor, x: Tensor, conv: Convolution) -> Tensor:
        """See `resnet_fused.backends.training.TrainingKernels.wgrad`."""
        if has_few_channels(conv):
            x, of_rows = self._window_rows(x, conv)
            return _from_rows(self.wgrad(tile, g, x, of_rows), conv)
        out, call = self._wgrad_call(g, x, conv)
        named = getattr(self.extension.WgradTile, tile)
        place = self.place(x.device)
        count = self.extension.cuda_wgrad_parts(tensor_arg(out), *call, named, place)
        parts = x.new_empty((count, out.numel()), dtype=torch.float32)
        return self.run(self.extension.cuda_wgrad, out, *call, tensor_arg(parts), named)

    def wgrad_tiles(self, g: Tensor, x: Tensor, conv: Convolution) -> list[str]:
        """Names of the tiles by which `wgrad` computes these arguments."""
        if has_few_channels(conv):
            x, conv = self._window_rows(x, conv)
        out, call = self._wgrad_call(g, x, conv)
        found = self.extension.cuda_wgrad_tiles(tensor_arg(out), *call, self.place(x.device))
        return [tile.name for tile in found]

    def _wgrad_call(
        self, g: Tensor, x: Tensor, conv: Convolution
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The result to be, and the kernel's other arguments but for its workspace."""
        out = torch.empty_like(conv.weight, device=x.device, memory_format=channels_last)
        return out, (tensor_arg(nhwc(g)), tensor_arg(nhwc(x)), _window(conv))

    def _window_rows(self, x: Tensor, conv: Convolution) -> tuple[Tensor, Convolution]:
        """A convolution of few channels as one of the window's lines: (R, 1) of S · C channels, of
        a weight that is not filled in."""
        height, width = conv.weight.shape[2:]
        _, out_width = conv.output_size(*x.shape[2:])
        rows = self._rows(nhwc(x), out_width, width, conv.stride[1], conv.padding[1])
        weight = empty_nhwc(conv.weight, rows.shape[1], height, 1)
        stride, padding, dilation = (pair[0] for pair in conv[1:4])
        return rows, Convolution(weight, (stride, 1), (padding, 0), (dilation, 1), 1)

    def _rows(self, x: Tensor, out_width: int, width: int, stride: int, padding: int) -> Tensor:
        """What a window covers of each line at each place; zeros up to whole chunks."""
        row = -(-width * x.shape[1] // _LANES) * _LANES
        out = empty_nhwc(x, row, x.shape[2], out_width)
        return self.run(self.extension.cuda_window_rows, out, tensor_arg(x), width, stride, padding)

    def quantized_conv(self, tile: str, *arguments: Any) -> Tensor:
        out, call = self._quantized_conv_call(*arguments)
        return self.run(
            self.extension.cuda_quantized_conv,
            out,
            *call,
            getattr(self.extension.QuantizedTile, tile),
        )

    def quantized_tiles(self, *arguments: Any) -> list[str]:
        """Names of the tiles by which `quantized_conv` computes these arguments."""
        out, call = self._quantized_conv_call(*arguments)
        found = self.extension.cuda_quantized_conv_tiles(
            tensor_arg(out), *call, self.place(out.device)
        )
        return [tile.name for tile in found]

    def _quantized_conv_call(
        self, x: Tensor, layer: QuantizedLayer, shortcut: QuantizedShortcut | None, relu: bool
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The result to be, and the kernel's other arguments; there is no padding_value."""
        conv, bias, multiplier, _ = layer
        call = (
            self._quantized_layer(x, conv),
            tensor_arg(bias),
            tensor_arg(multiplier),
            *shortcut_args(shortcut, self._quantized_layer),
            relu,
        )
        size = conv.output_size(*x.shape[2:])
        return empty_nhwc(x, conv.weight.shape[0], *size, quantized_dtype(layer, relu)), call

    def _quantized_layer(self, x: Tensor, conv: Convolution) -> tuple[Any, ...]:
        packed = self._frozen.get(conv.weight, "int8", lambda: _pack_quantized(conv.weight)).packed
        return tensor_arg(nhwc(x)), tensor_arg(packed), conv[1:4]

    def bottleneck(self, kernel: str, x: Tensor, layers: Sequence[ConvBn]) -> Tensor:
        """`kernel`: the extension's name of one that computes whole bottlenecks."""
        image = layers[1].conv.output_size(*x.shape[2:])
        return self.run(
            getattr(self.extension, kernel),
            empty_nhwc(x, layers[2].conv.weight.shape[0], *image),
            *self._bottleneck_call(x, layers),
        )

    def can_implement_bottleneck(self, kernel: str, x: Tensor, layers: Sequence[ConvBn]) -> bool:
        ask = getattr(self.extension, f"{kernel}_can_implement")
        return bool(ask(*self._bottleneck_call(x, layers), self.place(x.device)))

    def is_bottleneck_profitable(self, kernel: str, x: Tensor, layers: Sequence[ConvBn]) -> bool:
        """Whether that kernel is expected to be faster than one for each layer."""
        ask = getattr(self.extension, f"{kernel}_is_profitable")
        return bool(ask(*self._bottleneck_call(x, layers), self.place(x.device)))

    def _bottleneck_call(self, x: Tensor, layers: Sequence[ConvBn]) -> tuple[Any, ...]:
        described = [(tensor_arg(_relaid(conv.weight)), self._vectors(bn)) for conv, bn in layers]
        return tensor_arg(nhwc(x)), described, layers[1].conv.stride[0]

    def stem(self, x: Tensor, layer: ConvBn, pool: MaxPool) -> Tensor:
        return self._stem(x, layer, pool, None)

    def image_stem(
        self, images: Tensor, layer: ConvBn, pool: MaxPool, normalization: Normalization
    ) -> Tensor:
        scale = [1 / (255 * std) for std in normalization.std]
        shift = [-mean / std for mean, std in zip(*normalization, strict=True)]
        return self._stem(images, layer, pool, (scale, shift))

    def _stem(
        self,
        x: Tensor,
        layer: ConvBn,
        pool: MaxPool,
        bytes_: tuple[list[float], list[float]] | None,
    ) -> Tensor:
        conv, bn = layer
        height, width = (-(-size // 2) for size in x.shape[2:])
        image = pool.output_size(height, width)
        return self.run(
            self.extension.cuda_stem,
            empty_nhwc(x, conv.weight.shape[0], *image, conv.weight.dtype),
            tensor_arg(x if x.is_contiguous() else nhwc(x)),  # reads images in either layout
            tensor_arg(_relaid(conv.weight)),
            self._vectors(bn),
            bytes_,
        )

    def linear(self, means: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = copied(weight, weight.contiguous())
        if bias is not None:
            bias = copied(bias, bias.contiguous())
        return self.run(
            self.extension.cuda_linear,
            means.new_empty((means.shape[0], weight.shape[0]), dtype=weight.dtype),
            tensor_arg(means),
            tensor_arg(weight),
            optional_tensor_arg(bias),
        )

    def average_pool(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The means over all positions, (N, C) of x's type or, not rounded, of float32."""
        return self.run(
            self.extension.cuda_average_pool,
            torch.empty(x.shape[:2], dtype=dtype, device=x.device),
            tensor_arg(nhwc(x)),
        )

    def _vectors(self, bn: BatchNorm) -> BatchNormArg:
        vectors: list[Any] = [None if v is None else copied(v, v.contiguous()) for v in bn[:4]]
        mean, var, weight, bias = vectors
        return batch_norm_arg(BatchNorm(mean, var, weight, bias, bn.eps), self.dtypes)


def has_few_channels(conv: Convolution) -> bool:
    """Whether the window's lines are to be convolved, as channels are no whole 16 bytes."""
    channels, _, width = conv.weight.shape[1:]
    return (
        channels % _LANES > 0
        and channels * width <= _WIDEST_ROW
        and conv.groups * conv.dilation[1] == 1
    )


def _from_rows(grad: Tensor, conv: Convolution) -> Tensor:
    """The gradient of the weight from that of `Launcher._window_rows`."""
    filters, channels, height, width = conv.weight.shape
    lines = grad.permute(0, 2, 3, 1)[..., : width * channels]
    return nhwc(lines.reshape(filters, height, width, channels).permute(0, 3, 1, 2))


def _window(conv: Convolution) -> tuple[tuple[int, ...], ...]:
    """Stride, padding and dilation, as bindings take them."""
    return tuple(tuple(pair) for pair in conv[1:4])


def _parts(count: int, rows: int, result: Tensor) -> Tensor:
    """Statistics or sums of a result, for each channel, in so many parts."""
    return result.new_empty((count, rows, result.shape[1]), dtype=torch.float32)


def _relaid(weight: Tensor) -> Tensor:
    return copied(weight, weight.contiguous(memory_format=channels_last))
