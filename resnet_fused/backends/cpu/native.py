"""The package's own CPU kernels: where they apply, and their weights and arguments.

Packed weights are the weights in another order, or Winograd's transform of them; batch norm is read
live and applied in float32.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..._extension import optional_tensor_arg, tensor_arg
from ...parameters import BatchNorm, Convolution, Gate, GroupNorm, MaxPool, is_resnet_stem
from ..arguments import BatchNormArg, batch_norm_arg, empty_nhwc, nhwc, residual_arg
from ..recording import copied

_LANES = 16  # Winograd's channel counts that are no multiple of it leave vector lanes idle
_STEM_LANES = 32
_SAVES = 1.6  # the least number of direct products for one of Winograd's: its transforms take time
_READ_AS_THEY_ARE = (torch.float32, torch.bfloat16, torch.float64)


def vectors(bn: BatchNorm) -> BatchNormArg:
    """A batch norm as the kernels take it."""
    return batch_norm_arg(bn, _READ_AS_THEY_ARE)


def bn_add_relu(
    extension: ModuleType,
    x: Tensor,
    bn: BatchNorm,
    residual: Tensor | None,
    relu: bool,
    in_place: bool = False,
) -> Tensor:
    """relu?(bn(x) (+ residual)) in one pass; float32 and bfloat16, on every processor.

    in_place: overwrite `x`, which then is channels_last.
    """
    x = nhwc(x)
    out = x if in_place else torch.empty_like(x)
    extension.bn_add_relu(tensor_arg(out), tensor_arg(x), vectors(bn), residual_arg(residual), relu)
    return out


def group_norm_add_relu(
    extension: ModuleType, x: Tensor, norm: GroupNorm, residual: Tensor | None, relu: bool
) -> Tensor:
    """relu?(group_norm(x) (+ residual)); float32 and bfloat16, on every processor."""
    x = nhwc(x)
    out = torch.empty_like(x)
    weight, bias = (
        v if v is None or v.dtype in _READ_AS_THEY_ARE else copied(v, v.float())
        for v in (norm.weight, norm.bias)
    )
    extension.group_norm_add_relu(
        tensor_arg(out),
        tensor_arg(x),
        norm.groups,
        optional_tensor_arg(weight),
        optional_tensor_arg(bias),
        norm.eps,
        residual_arg(residual),
        relu,
    )
    return out


def head(extension: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(global_average_pool(x)), (N, C, H, W) -> (N, classes); on every processor."""
    if weight.stride(1) != 1:
        weight = copied(weight, weight.contiguous())
    if bias is not None:
        bias = copied(bias, bias.contiguous())
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    extension.head(
        tensor_arg(out), tensor_arg(nhwc(x)), tensor_arg(weight), optional_tensor_arg(bias)
    )
    return out


def squeeze_excite(
    extension: ModuleType,
    x: Tensor,
    gate: Gate,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """relu?(x · sigmoid(expand(relu(reduce(mean of x)))) (+ residual)); on every processor."""
    x = nhwc(x)
    out = torch.empty_like(x)
    layers = []
    for weight, bias in (gate[:2], gate[2:]):
        bias = None if bias is None else copied(bias, bias.contiguous())
        weight = copied(weight, weight.contiguous())
        layers.append((tensor_arg(weight), optional_tensor_arg(bias)))
    extension.squeeze_excite(tensor_arg(out), tensor_arg(x), *layers, residual_arg(residual), relu)
    return out


def pack(extension: ModuleType, form: str, weight: Tensor, *options: Any) -> Tensor:
    """The weight as the kernels of that form read it: "conv", "quantized_conv" and so on."""
    described = tensor_arg(weight)
    size = getattr(extension, f"{form}_packed_bytes")(described, *options)
    packed = torch.empty(size, dtype=torch.uint8)
    getattr(extension, f"{form}_pack")(described, tensor_arg(packed), *options)
    return packed


class PackedConvolution:
    """relu?(bn(conv(x)) (+ residual)) on weights packed for the kernel; bn None is none.

    The kernel is Winograd's F(2×2, 3×3) where `suits_winograd`, else the direct one, for one group
    or for several.
    """

    def __init__(
        self, extension: ModuleType, conv: Convolution, winograd: bool, bfloat16_isa: str = ""
    ) -> None:
        """bfloat16_isa: the instructions that multiply bfloat16 of one group; "": the best vector
        instructions."""
        weight = conv.weight
        self._conv = conv._replace(weight=torch.empty_like(weight, device="meta"))
        self._window = (weight.shape[2:], *conv[1:4])
        self._options: tuple[int, ...] = ()  # of kernel and packing, beside what all have
        if conv.groups > 1:
            form, self._kernel = "grouped", extension.grouped_conv_bn
            self._options = (conv.groups,)
        elif winograd:
            form, self._kernel = "winograd", extension.winograd_conv
        else:
            form, self._kernel = "conv", extension.conv_bn
            if bfloat16_isa and weight.dtype == torch.bfloat16:
                self._kernel = functools.partial(self._kernel, isa=bfloat16_isa)
        self._form = form
        self.packed = pack(extension, form, weight, *self._options)

    def __call__(
        self,
        x: Tensor,
        bn: BatchNorm | None,
        residual: Tensor | None,
        relu: bool,
        in_place: bool = False,
    ) -> Tensor:
        """(N, C, H, W) -> (N, K, P, Q), channels_last; residual (N, D, P, Q), D <= K.

        in_place: return the result in the memory of `residual`, which then is channels_last.
        """
        out = residual if in_place else None
        return self._run(x, bn, out, residual_arg(residual), relu)

    def adds_projection(self, projection: PackedConvolution) -> bool:
        """Whether `with_projection` takes it: both by the direct kernel for one group."""
        return self._form == projection._form == "conv"

    def with_projection(
        self,
        x: Tensor,
        bn: BatchNorm,
        shortcut: Tensor,
        projection: PackedConvolution,
        projection_bn: BatchNorm,
    ) -> Tensor:
        """relu(bn(conv(x)) + bn(projection(shortcut))), one pass; the sum is rounded once."""
        return self._run(x, bn, None, None, True, projection._layer(shortcut, projection_bn))

    def _layer(self, x: Tensor, bn: BatchNorm | None) -> tuple[Any, ...]:
        normalisation = None if bn is None else vectors(bn)
        return tensor_arg(nhwc(x)), tensor_arg(self.packed), self._window, normalisation

    def _run(self, x: Tensor, bn: BatchNorm | None, out: Tensor | None, *arguments: Any) -> Tensor:
        """Calls the kernel."""
        if out is None:
            image = self._conv.output_size(*x.shape[2:])
            out = empty_nhwc(x, self._conv.weight.shape[0], *image)
        self._kernel(tensor_arg(out), self._layer(x, bn), *self._options, *arguments)
        return out


def suits_winograd(x: Tensor, conv: Convolution) -> bool:
    """Whether Winograd's kernel computes this convolution, and faster than the direct one."""
    weight = conv.weight
    return (
        weight.dtype == torch.float32
        and weight.shape[2:] == (3, 3)
        and conv[1:] == ((1, 1), (1, 1), (1, 1), 1)
        and weight.shape[0] % _LANES == 0
        and weight.shape[1] % _LANES == 0
        and _products_saved(x.shape[2]) * _products_saved(x.shape[3]) >= _SAVES
    )


def _products_saved(size: int) -> float:
    """Taps of a window of 3 that lie in a line of `size`, to each of F(2, 3)'s products."""
    return (3 * size - 2) / (4 * ((size + 1) // 2))


class PooledStem:
    """max_pool(relu(bn(conv7×7(x)))) in one pass, float32 and bfloat16."""

    def __init__(self, extension: ModuleType, conv: Convolution) -> None:
        self._kernel = extension.stem_conv_pool
        self._out_channels = conv.weight.shape[0]
        self.packed = pack(extension, "stem", conv.weight)

    @staticmethod
    def serves(conv: Convolution, pool: MaxPool) -> bool:
        """Whether it computes this stem."""
        return is_resnet_stem(conv, pool) and conv.weight.shape[0] % _STEM_LANES == 0

    def __call__(self, x: Tensor, bn: BatchNorm) -> Tensor:
        """(N, 3, H, W) -> (N, K, P, Q), channels_last."""
        height, width = x.shape[2:]
        # Halved twice, rounded up.
        out = empty_nhwc(x, self._out_channels, (height + 3) // 4, (width + 3) // 4)
        self._kernel(tensor_arg(out), tensor_arg(nhwc(x)), tensor_arg(self.packed), vectors(bn))
        return out
