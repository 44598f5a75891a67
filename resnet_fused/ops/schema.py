"""An op's parameters as its schema lists them: a group gives way to its fields, in their order.

A group is a named tuple of `resnet_fused.parameters`, whose fields may be groups themselves. Of one
that is absent, where it is annotated `| None`, all fields are None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Any, get_args, get_type_hints

from torch import Tensor

_TYPES = {
    Tensor: "Tensor",
    bool: "bool",
    int: "int",
    float: "float",
    tuple[int, int]: "int[2]",
    Sequence[float]: "float[]",
}


class Parameter:
    """A parameter of that name, annotated as `kind`; `fields` is what stands for it."""

    def __init__(self, name: str, kind: Any) -> None:
        # Looked up once, as Dynamo of PyTorch 2.9 cannot hash a union under Python 3.10.
        self._optional = isinstance(kind, UnionType)
        if self._optional:
            kind = get_args(kind)[0]
        self._group = kind if hasattr(kind, "_fields") else None
        self._parts: list[Parameter] = []
        if self._group is None:
            self.fields = [f"{_TYPES[kind]}{'?' if self._optional else ''} {name}"]
        else:
            hints = {f"{name}_{field}": hint for field, hint in get_type_hints(kind).items()}
            self._parts = [
                Parameter(field, hint | None if self._optional else hint)
                for field, hint in hints.items()
            ]
            self.fields = [field for part in self._parts for field in part.fields]
        self._holds_groups = len(self.fields) > len(self._parts) > 0

    def flatten(self, argument: Any, flat: list[Any]) -> None:
        """Adds the argument's fields to `flat`."""
        if self._group is None:
            flat.append(argument)
        elif argument is None:
            flat += [None] * len(self.fields)
        elif not self._holds_groups:
            flat += (*argument,)  # Dynamo of PyTorch 2.11 adds no named tuple to a list
        else:
            for part, value in zip(self._parts, argument, strict=True):
                part.flatten(value, flat)

    def group(self, flat: Iterator[Any]) -> Any:
        """The argument whose fields come next in `flat`."""
        if self._group is None:
            value = next(flat)
            # Dispatched through PyTorch, tuples of numbers arrive as lists.
            return tuple(value) if isinstance(value, list) else value
        values = [part.group(flat) for part in self._parts]
        return None if self._optional and values[0] is None else self._group(*values)
