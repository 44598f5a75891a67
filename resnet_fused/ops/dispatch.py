"""Which backend runs an op: the user's choice, else the best one for the tensor."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from .. import backends
from ..backends import Backend
from ..errors import BackendUnavailableError

_forced: Backend | None = None


class use_backend:  # noqa: N801  (reads as the function it is used as)
    """Run every op on the named backend, from now on or within a `with` block.

    `name` is "reference", "cpu", "triton", "cuda", "tuned", or None for the best available one for
    each tensor's device, which is the default; or a `Backend` of one's own. The choice holds for
    the whole process.

    Raises ValueError for an unknown name and BackendUnavailableError, with the reason and the fix,
    for a backend that this machine or build does not have.
    """

    def __init__(self, name: str | Backend | None) -> None:
        global _forced
        self._previous = _forced
        _forced = backends.get(name) if isinstance(name, str) else name

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _forced
        _forced = self._previous


def available_backends() -> list[str]:
    """Names of the backends that this machine and build can run, best first."""
    return [name for name in backends.NAMES if backends.unavailable(name) is None]


def choose(x: Tensor) -> Backend:
    """The backend for an op whose main input is `x`."""
    if _forced is not None:
        if reason := _forced.unsupported(x.device, x.dtype):
            raise BackendUnavailableError(
                f"backend {_forced.name!r} was chosen with use_backend, but {reason}."
            )
        return _forced
    return _best(x.device, x.dtype)


def _best(device: torch.device, dtype: torch.dtype) -> Backend:
    for name in backends.PREFERENCE.get(device.type, ("reference",)):
        if backends.unavailable(name) is None:
            backend = backends.get(name)
            if backend.unsupported(device, dtype) is None:
                return backend
    return backends.get("reference")
