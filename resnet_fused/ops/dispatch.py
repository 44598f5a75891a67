"""Which backends an op chooses among: the one the user chose, else all that serve the tensor."""

from __future__ import annotations

import contextvars
import functools
import warnings
from types import TracebackType

import torch
from torch import Tensor

from .. import backends
from ..backends import Backend
from ..errors import BackendUnavailableError

_chosen: contextvars.ContextVar[Backend | None] = contextvars.ContextVar("backend", default=None)


class use_backend:  # noqa: N801  (reads as the function it is used as)
    """Run every op on one backend, from now on or within a `with` block.

    Args:
        backend: "reference", "cpu", "triton", "cuda", an object that implements
            `resnet_fused.backends.Backend`, or None, the default: for each op and shape the
            fastest kernel of all backends that serve the tensor.

    Like `torch.no_grad`, the choice holds for the thread (and the `contextvars` context) that makes
    it; a backward pass runs on the backend of its forward.

    Raises ValueError for an unknown name, TypeError for what is no backend, and
    BackendUnavailableError, with the reason and the fix, for a backend that this machine or build
    does not have.
    """

    def __init__(self, backend: str | Backend | None) -> None:
        if isinstance(backend, str):
            backend = backends.get(backend)
        elif backend is not None and not hasattr(backend, "conv_bn"):
            raise TypeError(
                f"backend must be a name, a backend or None, found {type(backend).__qualname__}."
            )
        self._previous = chosen_backend()
        _chosen.set(backend)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _chosen.set(self._previous)


def chosen_backend() -> Backend | None:
    """What `use_backend` chose here, or None."""
    return _chosen.get()


if torch.__version__ < "2.14":  # compared as versions
    # Dynamo reads a ContextVar from PyTorch 2.14, and compiles anew where its value changed.
    # Before, what a compiled function found when it was compiled holds for it.
    chosen_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def available_backends() -> list[str]:
    """Names of the backends that this machine and build can run, best first."""
    return [name for name in backends.NAMES if backends.unavailable(name) is None]


def serving(x: Tensor) -> tuple[Backend, ...]:
    """The backends that an op with main input `x` chooses among, PyTorch's ops last: the one that
    `use_backend` chose alone, else all that serve the tensor."""
    chosen = _chosen.get()
    if chosen is None:
        return _all_serving(x.device, x.dtype)
    if reason := chosen.unsupported(x.device, x.dtype):
        raise BackendUnavailableError(
            f"backend {chosen.name!r} was chosen with use_backend, but {reason}."
        )
    return (chosen,)


def _all_serving(device: torch.device, dtype: torch.dtype) -> tuple[Backend, ...]:
    available, unavailable = _available(device.type)
    reasons = [(backend.name, backend.unsupported(device, dtype)) for backend in available]
    found = tuple(b for b, (_, why) in zip(available, reasons, strict=True) if why is None)
    if len(found) == 1 and dtype in backends.ACCELERATED.get(device.type, ()):
        refused = [f"{name}: {why}" for name, why in reasons if why is not None]
        _say_once(device.type, dtype, "; ".join([*unavailable, *refused]))
    return found


@functools.cache
def _available(device: str) -> tuple[list[Backend], list[str]]:
    """The backends for that type of device that can run here, and why others cannot."""
    names = backends.PREFERENCE.get(device, ("reference",))
    missing = {name: why for name in names if (why := backends.unavailable(name)) is not None}
    found = [backends.get(name) for name in names if name not in missing]
    return found, [f"{name}: {why}" for name, why in missing.items()]


@functools.cache
def _say_once(device: str, dtype: torch.dtype, reasons: str) -> None:
    """Running on PyTorch's own ops where kernels exist must not pass unnoticed."""
    warnings.warn(
        f"resnet_fused runs {dtype} on {device} through PyTorch's own ops, unfused: {reasons} "
        '(resnet_fused.use_backend("reference") chooses this without the warning.)',
        stacklevel=2,
    )
