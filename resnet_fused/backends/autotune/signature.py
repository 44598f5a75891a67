"""What a kernel's time depends on in an op's arguments: the key under which a choice is kept."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...parameters import BatchNorm, ConvBn, Convolution

_WIDE = 2**31  # elements, from which on batches are measured one by one
_VECTOR_BYTES = 16


def batch_bucket(batch: int) -> int:
    """Batches that share one measurement: the next power of two."""
    return 1 << (batch - 1).bit_length()


class Operand(str):
    """A tensor or a convolution, in words: logical sizes, and what is unusual of it."""


def signature(arguments: Sequence[Any]) -> tuple[Hashable, ...]:
    """The key of `arguments`, the first of which is, or begins with, the op's main input.

    Batches are rounded up to a power of two. Batch norms have no say. Layers and other groups of
    arguments count by what they hold.
    """
    parts: list[Hashable] = []
    _add(arguments, parts)
    if parts[0] == torch.float32:
        parts += _precisions()
    return tuple(parts)


def _precisions() -> tuple[str, str]:
    """Of float32's convolutions and products on a GPU."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return convolutions.fp32_precision, torch.backends.cuda.matmul.fp32_precision


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
        parts.append(_precisions())
    return parts


def _describe(values: Iterable[Any], parts: list[object]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            if not parts:
                parts.append(value.dtype)
            operand = _operand(value, is_activation=value.dim() == 4)
            same = value.dtype == parts[0]  # as the main input's
            parts.append(operand if same else Operand(f"{operand} {value.dtype}"))
        elif isinstance(value, (Convolution, ConvBn)):
            parts.append(_window(value.conv if isinstance(value, ConvBn) else value))
        elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            if not isinstance(value, BatchNorm):
                _describe(value, parts)
        else:
            parts.append(value)


def _operand(x: Tensor, is_activation: bool = False) -> Operand:
    sizes, strides = list(x.shape), ""
    if is_activation:
        if x.numel() < _WIDE:
            sizes[0] = batch_bucket(sizes[0])
        if not x.is_contiguous(memory_format=torch.channels_last):
            strides = f" strides {','.join(map(str, x.stride()))}"
    unaligned = " unaligned" if x.data_ptr() % _VECTOR_BYTES else ""
    return Operand("×".join(map(str, sizes)) + strides + unaligned)


def _window(conv: Convolution) -> Operand:
    text: str = _operand(conv.weight)
    for name, usual in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1))):
        height, width = getattr(conv, name)
        if (height, width) != usual:
            text += f" {name} {height},{width}"
    return Operand(text if conv.groups == 1 else f"{text} groups {conv.groups}")
