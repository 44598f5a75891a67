"""The training ops at PyTorch's speed, on any device and in any floating dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .. import backends
from ..ops.dispatch import use_backend
from ..reference.training import ReferenceTraining


@contextlib.contextmanager
def training_ops_in_pytorch() -> Iterator[None]:
    """Within it, models train through the training ops, whose pieces are PyTorch's own ops.

    It shows what the ops compute and keep without a GPU; it is no way to be fast.
    """
    backend = backends.get("reference")
    before = backend.training
    backend.training = ReferenceTraining()  # type: ignore[misc]
    try:
        with use_backend("reference"):
            yield
    finally:
        backend.training = before  # type: ignore[misc]
