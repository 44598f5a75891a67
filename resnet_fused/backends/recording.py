"""What backends tell a plan that is being recorded, beside the launches that the extension sees.

A launch may read memory that Python made from a parameter: packed weights, verified by content at
each use, and copies in another type or layout, made anew at each use. A plan has to do the same.
"""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor


class Packed(NamedTuple):
    """What was packed from a weight while its content had that fingerprint, or, where it is frozen,
    that version."""

    weight: Tensor
    fingerprint: int
    packed: Any


class Notes:
    """What was noted while a plan was recorded."""

    def __init__(self) -> None:
        self.packed: list[Packed] = []
        self.frozen: list[Packed] = []
        self.copies: list[tuple[Tensor, Tensor]] = []  # (source, copy)


current: contextvars.ContextVar[Notes | None] = contextvars.ContextVar("notes", default=None)
# Whether the parameters of what runs are promised to stay as they are (`resnet_fused.freeze`).
frozen: contextvars.ContextVar[bool] = contextvars.ContextVar("frozen", default=False)
# In training, what stands for a weight, by its id, in the launches that are recorded.
weights: contextvars.ContextVar[Mapping[int, Tensor]] = contextvars.ContextVar(
    "weights", default=MappingProxyType({})
)
# The extension's `Recorder` that is to be told of launches which Python makes, in training.
recorder: contextvars.ContextVar[Any] = contextvars.ContextVar("recorder", default=None)


def copied(source: Tensor, copy: Tensor) -> Tensor:
    """`copy`, noted as one of `source` unless it is `source` itself."""
    if copy is not source and (notes := current.get()) is not None:
        notes.copies.append((source, copy))
    return copy


def version(tensor: Tensor) -> int:
    """Moves with every edit in place that PyTorch sees; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version
