"""A cache of packed weights that is never stale: every use verifies the content packed from.

Version counters cannot tell: `p.data.mul_()`, as moving-average code writes it, and edits through
a numpy view move none, and inference tensors have none. So each look-up hashes the weight itself
(64 bits, one pass at the speed of memory).

An entry belongs to a weight's memory, is found by it, and goes when it is freed. A reference to the
tensor itself, a weak one too, would make `torch.utils.swap_tensors` refuse it, by which modules are
moved where `torch.__future__.set_swap_module_params_on_conversion` asks for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, UntypedStorage

from .._extension import tensor_arg
from . import recording

Packed = TypeVar("Packed")


def dense(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it where its elements do not fill one span of memory."""
    if tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        return tensor
    return tensor.contiguous()


class _Slot(Generic[Packed]):
    """What was packed from the weights in one storage, which it does not keep alive."""

    def __init__(self, owner: weakref.ref[UntypedStorage]) -> None:
        self.owner = owner
        self.packed: dict[Hashable, tuple[Any, Packed]] = {}


class LiveCache(Generic[Packed]):
    """Packed forms of weights, each verified against the weight it was made from.

    frozen: nobody is to edit the weights, a quantised network's, as with those that
        `recording.frozen` has in a forward. Hashing them would take a good part of a forward of one
        image, so that only version counters and addresses are compared, and their content is read
        once. That misses what moves neither, `p.data.mul_()`.

    Threads may share it: entries are replaced whole, so a race costs at most a second packing.
    """

    def __init__(self, extension: ModuleType, frozen: bool = False) -> None:
        self._extension = extension
        self._frozen = frozen
        self._slots: dict[int, _Slot[Packed]] = {}

    def __len__(self) -> int:
        """How many storages hold weights that have packed forms."""
        return len(self._slots)

    def get(self, weight: Tensor, form: Hashable, pack: Callable[[], Packed]) -> Packed:
        """The packed `form` of `weight`, made by `pack` if there is none for its content."""
        storage = weight.untyped_storage()
        slot = self._slots.get(id(storage))
        if slot is None or slot.owner() is not storage:
            slot = self._open(storage)
        place = weight.storage_offset(), form
        frozen = self._frozen or id(weight) in recording.frozen.get()
        # Taken before packing: an edit during it is then seen by the next look-up.
        content = recording.identity(weight) if frozen else self._content(weight)
        entry = slot.packed.get(place)
        if entry is None or entry[0] != content:
            entry = content, pack()
            if recording.may_keep(weight):
                slot.packed[place] = entry
        packed = entry[1]
        if (notes := recording.current.get()) is not None:
            noted = notes.frozen if frozen else notes.packed
            noted.append(recording.Packed(weight, content[-1], packed))
        return packed

    def _content(self, weight: Tensor) -> tuple[Any, ...]:
        (hashed,) = self._extension.fingerprints([tensor_arg(dense(weight))])
        return weight.dtype, weight.shape, weight.stride(), hashed

    def _open(self, storage: UntypedStorage) -> _Slot[Packed]:
        key, slots = id(storage), self._slots

        def drop(owner: weakref.ref[UntypedStorage]) -> None:
            # The id may already belong to a new storage with a slot of its own.
            slot = slots.get(key)
            if slot is not None and slot.owner is owner:
                slots.pop(key, None)

        slots[key] = slot = _Slot[Packed](weakref.ref(storage, drop))
        return slot
