"""The numerics contract: truth is float64, and PyTorch's own error is the yardstick.

For inputs already rounded to the tested dtype, ‖out - truth‖ / ‖truth‖ of a fused result may not
exceed that of PyTorch's unfused ops in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..parameters import BatchNorm, Convolution


def relative_error(out: Tensor, truth: Tensor) -> float:
    """‖out - truth‖ / ‖truth‖ in float64; inf where `out` holds a NaN or an infinity.

    Raises ValueError if the shapes differ: broadcasting would hide a wrong result.
    """
    if out.shape != truth.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, truth {tuple(truth.shape)}.")
    out, truth = out.detach().double().cpu(), truth.detach().double().cpu()
    if not torch.isfinite(out).all():
        return float("inf")
    difference, norm = (out - truth).norm().item(), truth.norm().item()
    return difference / norm if norm else difference


def assert_contract(
    ours: Tensor, eager: Tensor, truth: Tensor, *, noise: float = 1.0, what: str = "result"
) -> None:
    """Asserts that our error is at most `noise` times PyTorch's own.

    `noise` is 1.1 at most, for tensors so small that the comparison itself is noisy.
    """
    if not 1.0 <= noise <= 1.1:
        raise ValueError(f"noise must lie in [1, 1.1], found {noise}.")
    if ours.dtype != eager.dtype:
        raise AssertionError(f"{what} is {ours.dtype}, PyTorch's is {eager.dtype}.")
    error, allowed = relative_error(ours, truth), relative_error(eager, truth)
    if error > noise * allowed:
        raise AssertionError(
            f"{what}: error {error:.3e} exceeds {noise} × PyTorch's own, {allowed:.3e} "
            f"({ours.dtype}, shape {tuple(ours.shape)})."
        )


def cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating tensor in it converted: tensors, parameter groups, containers."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (Convolution, BatchNorm)):
        return type(value)(*(cast(v, dtype) for v in value))
    if isinstance(value, Mapping):
        return {key: cast(item, dtype) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        return type(value)(cast(v, dtype) for v in value)
    return value


def check_op(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    arguments: Iterable[Any],
    *,
    noise: float = 1.0,
    what: str = "result",
) -> Tensor:
    """Holds `op(*arguments)` against `reference` by the contract and returns it."""
    arguments = list(arguments)
    with torch.no_grad():
        ours = op(*arguments)
        eager = reference(*arguments)
        truth = reference(*(cast(argument, torch.float64) for argument in arguments))
    assert_contract(ours, eager, truth, noise=noise, what=what)
    return ours
