"""The plans of a network: found by what they are for, recorded when it comes again, bounded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from types import ModuleType
from typing import Generic, TypeVar

from torch import Tensor

from .. import _extension
from ..backends import recording
from ..ops.dispatch import chosen_backend
from .arena import Arenas
from .record import Network, Plan, record
from .validity import may_serve, surroundings

_Plan = TypeVar("_Plan")

_PLANNED = ("cpu", "cuda")  # devices that the extension has kernels for
# Kinds of input, of one network, whose plans are kept.
_PLANS = 16
# Calls between two recordings at most: each that comes to nothing, or whose plan was soon invalid,
# doubles them.
_LONGEST_WAIT = 1024


class Entry(Generic[_Plan]):
    """The plan for one kind of input, or how many calls are to pass before one is recorded."""

    def __init__(self) -> None:
        self.plan: _Plan | None = None
        self.wait = 1
        self.left = 1

    def is_due(self) -> bool:
        """Whether a plan is to be recorded at this call, which has none."""
        self.left -= 1
        return self.left < 0

    def keep(self, plan: _Plan | None) -> None:
        """What was recorded; if that is nothing, it is tried again later."""
        self.plan = plan
        if plan is None:
            self.postpone()

    def postpone(self) -> None:
        self.plan = None
        self.wait = self.left = min(2 * self.wait, _LONGEST_WAIT)


class Entries(Generic[_Plan]):
    """Plans by kind of input, the least recently used of which goes first. Threads may share it."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, Entry[_Plan]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many plans there are."""
        return sum(entry.plan is not None for entry in self._entries.values())

    def find(self, kind: Hashable) -> Entry[_Plan]:
        """The entry of that kind, a new one if there is none."""
        with self._lock:
            entry = self._entries.get(kind)
            if entry is None:
                entry = self._entries[kind] = Entry()
                if len(self._entries) > _PLANS:
                    self._entries.popitem(last=False)
            else:
                self._entries.move_to_end(kind)
            return entry


class Plans(Entries[Plan]):
    """Plans of one network."""

    def __init__(self) -> None:
        super().__init__()
        self._arenas = Arenas()

    def run(self, network: Network, x: Tensor) -> Tensor | None:
        """The network's result, or None where the ordinary path has to compute it."""
        entry = self.find(surroundings(x))
        plan = entry.plan
        if plan is not None:
            out = plan.run(x, self._arenas) if plan.is_valid() else None
            if out is None or plan.outdated:
                entry.postpone()
            return out
        if not entry.is_due():
            return None
        extension = _extension_for()
        if extension is None or not x.numel() or recording.is_capturing(x):
            entry.postpone()
            return None
        out, plan = record(network, x, extension)
        entry.keep(plan)
        return out


def _extension_for() -> ModuleType | None:
    """The extension whose kernels the chosen backend launches."""
    extension = getattr(chosen_backend(), "extension", None)
    if extension is None and _extension.available() is None:
        extension = _extension.load()
    return extension


def run(network: Network, x: Tensor) -> Tensor | None:
    """`network(x)` by its plan, or None where the ordinary path has to compute it.

    So it is in training, where no plan may serve, and as long as none was recorded for such an `x`.
    """
    if network.training or not may_serve(x) or x.dim() != 4 or x.device.type not in _PLANNED:
        return None
    plans: Plans | None = getattr(network, "_plans", None)
    if plans is None:
        plans = network._plans = Plans()  # type: ignore[attr-defined]
    return plans.run(network, x)
