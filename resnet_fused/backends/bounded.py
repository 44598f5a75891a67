"""What is remembered for each kind of input, in bounded memory."""

from __future__ import annotations

from typing import TypeVar

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Bounded(dict[_Key, _Value]):
    """A dictionary that is emptied where it would grow beyond its limit, because the sizes of
    images may never repeat; what is still in use is soon there again.

    Look-ups, which every call makes, are a dictionary's own. Threads may share it.
    """

    def __init__(self, limit: int = 4096) -> None:
        super().__init__()
        self._limit = limit

    def __setitem__(self, key: _Key, value: _Value) -> None:
        if len(self) >= self._limit:
            self.clear()
        super().__setitem__(key, value)
