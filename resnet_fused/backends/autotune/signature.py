"""What a kernel's time depends on in an op's arguments: the key under which a choice is kept."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...parameters import BatchNorm, ConvBn, Convolution

_WIDE = 2**31  # elements, from which on batches are measured one by one
_VECTOR_BYTES = 16


def batch_bucket(batch: int) -> int:
    """Batches that share one measurement: the next power of two."""
    return 1 << (batch - 1).bit_length()


class Operand(NamedTuple):
    """A tensor: logical sizes, and whether it lies well."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...] | None  # of an activation that is not dense in channels_last memory
    aligned: bool

    def __str__(self) -> str:
        text = "×".join(map(str, self.sizes))
        if self.strides is not None:
            text += f" strides {','.join(map(str, self.strides))}"
        return text if self.aligned else f"{text} unaligned"


class Window(NamedTuple):
    """A convolution."""

    weight: Operand
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __str__(self) -> str:
        text = str(self.weight)
        for name, usual in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1))):
            if (value := getattr(self, name)) != usual:
                text += f" {name} {value[0]},{value[1]}"
        return text if self.groups == 1 else f"{text} groups {self.groups}"


def signature(arguments: Sequence[Any]) -> tuple[Hashable, ...]:
    """The key of `arguments`, the first of which is, or begins with, the op's main input.

    Batches are rounded up to a power of two. Batch norms have no say. Layers and other groups of
    arguments count by what they hold.
    """
    parts: list[Hashable] = []
    _add(arguments, parts)
    if parts[0] == torch.float32:
        convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        parts += (convolutions.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    return tuple(parts)


def _add(values: Iterable[Any], parts: list[Hashable]) -> None:
    # In the path of every call that is not part of a plan, hence few calls and no objects.
    for value in values:
        if isinstance(value, Tensor):
            shape = value.shape
            parts.append(value.dtype)
            parts.append(value.data_ptr() % _VECTOR_BYTES)
            if len(shape) != 4:
                parts.append(shape)
                continue
            many = value.numel() >= _WIDE
            parts.append(shape[0] if many else 1 << (shape[0] - 1).bit_length())
            parts.append(shape[1:])
            dense = value.is_contiguous(memory_format=torch.channels_last)
            parts.append(None if dense else value.stride())
        elif isinstance(value, (Convolution, ConvBn)):
            conv = value.conv if isinstance(value, ConvBn) else value
            weight, stride, padding, dilation, groups = conv
            parts.append(weight.shape)
            parts.append(weight.data_ptr() % _VECTOR_BYTES)
            parts += (*stride, *padding, *dilation, groups)
        elif isinstance(value, (list, tuple)):
            if not isinstance(value, BatchNorm):
                _add(value, parts)
        else:
            parts.append(value)


def describe(arguments: Sequence[Any]) -> list[object]:
    """What `signature` tells apart, for people and for the file of measured times."""
    parts: list[object] = []
    _describe(arguments, parts)
    if parts[0] == torch.float32:
        convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        products = torch.backends.cuda.matmul
        parts.append((convolutions.fp32_precision, products.fp32_precision))
    return parts


def _describe(values: Iterable[Any], parts: list[object]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            if not parts:
                parts.append(value.dtype)
            parts.append(_activation(value) if value.dim() == 4 else _operand(value))
        elif isinstance(value, (Convolution, ConvBn)):
            conv = value.conv if isinstance(value, ConvBn) else value
            stride, padding, dilation = map(tuple, conv[1:4])
            parts.append(Window(_operand(conv.weight), stride, padding, dilation, conv.groups))
        elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            if not isinstance(value, BatchNorm):
                _describe(value, parts)
        else:
            parts.append(value)


def _activation(x: Tensor) -> Operand:
    batch = x.shape[0] if x.numel() >= _WIDE else batch_bucket(x.shape[0])
    dense = x.is_contiguous(memory_format=torch.channels_last)
    strides = None if dense else x.stride()
    return Operand((batch, *x.shape[1:]), strides, x.data_ptr() % _VECTOR_BYTES == 0)


def _operand(x: Tensor) -> Operand:
    return Operand(tuple(x.shape), None, x.data_ptr() % _VECTOR_BYTES == 0)
