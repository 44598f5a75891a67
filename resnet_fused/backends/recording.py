"""What backends tell a plan that is being recorded, beside the launches that the extension sees.

A launch may read memory that Python made from a parameter: packed weights, verified by content at
each use, and copies in another type or layout, made anew at each use. A plan has to do the same.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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


class Watch(TorchDispatchMode):
    """Sees PyTorch's own ops, of which no launch tells, in one thread at a time.

    PyTorch keeps one flag a process that says whether it is inside such a mode. Threads that enter
    and leave theirs in turns would leave it set for ever, and `torch.compile` then compiles nothing
    any more, without a word.
    """

    sees_fused_ops = True
    _alone = threading.RLock()

    def __enter__(self) -> Watch:
        self._alone.acquire()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            super().__exit__(*exception)
        finally:
            self._alone.release()


current: contextvars.ContextVar[Notes | None] = contextvars.ContextVar("notes", default=None)
# Tensors, by their ids, that are promised to stay as they are (`resnet_fused.freeze`).
frozen: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar(
    "frozen", default=frozenset()
)
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


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which nothing is computed yet."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def may_keep(source: Tensor) -> bool:
    """Whether what was made of `source` just now may serve later calls as well. They may be on
    other streams, which do not wait for this one, so it waits here until all is computed; while a
    CUDA graph is captured nothing is, and memory made then is the graph's."""
    if is_capturing(source):
        return False
    if source.is_cuda:
        torch.cuda.current_stream(source.device).synchronize()
    return True


def version(tensor: Tensor) -> int:
    """Moves with every edit in place that PyTorch sees; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Differs after every edit that PyTorch sees, and where `tensor.data` is another's."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr(), version(tensor)
