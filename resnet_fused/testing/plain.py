"""Ours in plain PyTorch, on any device and in any floating dtype: what the fused ops stand for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from ..backends.reference import ReferenceBackend
from ..ops.dispatch import use_backend
from ..reference.training import ReferenceTraining

Result = TypeVar("Result")


class _Plain(ReferenceBackend):
    training = ReferenceTraining()


@contextlib.contextmanager
def training_ops_in_pytorch() -> Iterator[None]:
    """Within it, models train through the training ops, whose pieces are PyTorch's own ops.

    It shows what the ops compute and keep without a GPU; it is no way to be fast.
    """
    with use_backend(_Plain()):
        yield


def run_modules(model: Callable[[Tensor], Result], x: Tensor) -> Result:
    """`model(x)`, each module called for itself and none of them fused: what the model means."""
    # A hook on all modules has to see all of them.
    hook = register_module_forward_hook(lambda module, inputs, output: None)
    try:
        return model(x)
    finally:
        hook.remove()
