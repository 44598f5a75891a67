"""The ops as one backend computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..backends import Backend
from ..ops import use_backend
from ..ops.registry import registered


class On:
    """The ops by name, with the signatures of their references, run by a backend.

    backend: a name or an object that implements `resnet_fused.backends.Backend`.
    """

    def __init__(self, backend: str | Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        if name not in registered:
            raise AttributeError(name)

        def run(*arguments: Any) -> Tensor:
            with use_backend(self._backend):
                return registered[name](*arguments)

        return run
