"""A cache of packed weights that is never stale: every use verifies the content packed from.

Version counters cannot tell: `p.data.mul_()`, as moving-average code writes it, and edits through
a numpy view move none, and inference tensors have none. So each look-up hashes the weight itself
(64 bits, one pass at the speed of memory).

An entry belongs to one weight tensor, is found by that object's identity, and goes when it goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .._extension import tensor_arg
from . import recording

Packed = TypeVar("Packed")


def _dense(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it where its elements do not fill one span of memory."""
    if tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        return tensor
    return tensor.contiguous()


def _identity(weight: Tensor) -> tuple[Any, ...]:
    address = weight.data_ptr()
    return weight.dtype, weight.shape, weight.stride(), address, recording.version(weight)


class _Slot(Generic[Packed]):
    """What was packed from one weight tensor, which it does not keep alive."""

    def __init__(self, owner: weakref.ref[Tensor]) -> None:
        self.owner = owner
        self.packed: dict[Hashable, tuple[Any, Packed]] = {}


class LiveCache(Generic[Packed]):
    """Packed forms of weights, each verified against the weight it was made from.

    frozen: nobody is to edit the weights, a quantised network's, nor those of a forward in which
        `recording.frozen` is set. Hashing them would take a good part of a forward of one image, so
        that only version counters and addresses are compared, and their content is read once. That
        misses what moves neither, `p.data.mul_()`.

    Threads may share it: entries are replaced whole, so a race costs at most a second packing.
    """

    def __init__(self, extension: ModuleType, frozen: bool = False) -> None:
        self._extension = extension
        self._frozen = frozen
        self._slots: dict[int, _Slot[Packed]] = {}

    def __len__(self) -> int:
        """How many weight tensors have packed forms."""
        return len(self._slots)

    def get(self, weight: Tensor, form: Hashable, pack: Callable[[], Packed]) -> Packed:
        """The packed `form` of `weight`, made by `pack` if there is none for its content."""
        slot = self._slots.get(id(weight))
        if slot is None or slot.owner() is not weight:
            slot = self._open(weight)
        frozen = self._frozen or recording.frozen.get()
        # Taken before packing: an edit during it is then seen by the next look-up.
        content = _identity(weight) if frozen else self._content(weight)
        entry = slot.packed.get(form)
        if entry is None or entry[0] != content:
            entry = slot.packed[form] = (content, pack())
        packed = entry[1]
        if (notes := recording.current.get()) is not None:
            noted = notes.frozen if frozen else notes.packed
            noted.append(recording.Packed(weight, content[-1], packed))
        return packed

    def _content(self, weight: Tensor) -> tuple[Any, ...]:
        dense = _dense(weight)
        (hashed,) = self._extension.fingerprints([tensor_arg(dense)])
        return weight.dtype, weight.shape, weight.stride(), hashed

    def _open(self, weight: Tensor) -> _Slot[Packed]:
        key, slots = id(weight), self._slots

        def drop(owner: weakref.ref[Tensor]) -> None:
            # The id may already belong to a new tensor with a slot of its own.
            slot = slots.get(key)
            if slot is not None and slot.owner is owner:
                slots.pop(key, None)

        slots[key] = slot = _Slot[Packed](weakref.ref(weight, drop))
        return slot
