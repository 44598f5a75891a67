"""Memory for the intermediate tensors of programs on the CPU, kept from one forward to the next.

An allocator returns large blocks to the system when they are freed, and every page of the next one
costs a fault and its clearing. (On a GPU, PyTorch's keeps them.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Arenas:
    """As many arenas as programs run at a time, each as large as it was needed.

    They are freed with this object, which belongs to a network.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []  # its append and pop are atomic

    @contextmanager
    def borrow(self, size: int) -> Iterator[Tensor]:
        """At least `size` bytes for one program, with anything in them."""
        try:
            arena = self._free.pop()
        except IndexError:
            arena = torch.empty(0, dtype=torch.uint8)
        if arena.numel() < size:
            arena = torch.empty(size, dtype=torch.uint8)
        try:
            yield arena
        finally:
            self._free.append(arena)
