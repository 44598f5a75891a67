"""The numerics contract: truth is float64, and PyTorch's own error is the yardstick.

For inputs already rounded to the tested dtype, ‖out - truth‖ / ‖truth‖ of a fused result may not
exceed that of PyTorch's unfused ops in the same dtype.

An elementwise op is a few roundings away from exact, and so is PyTorch: how many depends on its
version and on the processor's fused multiply-adds, so that the yardstick itself moves. There the
caller states how many roundings the op must make, and `rounding_floor` of them is always allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def relative_error(out: Tensor, truth: Tensor) -> float:
    """‖out - truth‖ / ‖truth‖ in float64; inf where `out` holds a NaN or an infinity.

    Raises ValueError if the shapes differ: broadcasting would hide a wrong result.
    """
    if out.shape != truth.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, truth {tuple(truth.shape)}.")
    out, truth = out.detach().double(), truth.detach().double().to(out.device)
    if not torch.isfinite(out).all():
        return float("inf")
    difference, norm = (out - truth).norm().item(), truth.norm().item()
    return difference / norm if norm else difference


def rounding_floor(roundings: int, dtype: torch.dtype) -> float:
    """The relative error, in the norm, of a result that so many roundings in `dtype` lie behind.

    A rounding to nearest of v, 2^e <= |v| < 2^(e+1), errs by at most u 2^e, u half of eps (Higham,
    Accuracy and Stability of Numerical Algorithms, 2nd ed., 2.2), and evenly in between: by
    u 2^e / √3 <= u |v| / √3 in the root mean square. Errors of independent roundings add as their
    squares do (2.8 there), k of them to √(k/3) u, where the values rounded are of the result's
    size.
    """
    return math.sqrt(roundings / 3) * torch.finfo(dtype).eps / 2


def assert_contract(
    ours: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    noise: float = 1.0,
    roundings: int = 0,
    what: str = "result",
) -> None:
    """Asserts that our error is at most `noise` times PyTorch's own.

    `noise` is 1.1 at most, for tensors so small that the comparison itself is noisy.
    `roundings`: those the op cannot do without on the way to an element, for elementwise ops in the
    dtype they compute in; where PyTorch's error is less than theirs, theirs is allowed.
    """
    if not 1.0 <= noise <= 1.1:
        raise ValueError(f"noise must lie in [1, 1.1], found {noise}.")
    if ours.dtype != eager.dtype:
        raise AssertionError(f"{what} is {ours.dtype}, PyTorch's is {eager.dtype}.")
    error, yardstick = relative_error(ours, truth), relative_error(eager, truth)
    floor = rounding_floor(roundings, ours.dtype)
    if error > max(noise * yardstick, floor):
        raise AssertionError(
            f"{what}: error {error:.3e} exceeds {noise} × PyTorch's own, {yardstick:.3e}, and "
            f"{floor:.3e} of {roundings} roundings ({ours.dtype}, shape {tuple(ours.shape)})."
        )


def bn_add_relu_roundings(dtype: torch.dtype, add: bool) -> int:
    """Those of batch norm alone in float32, which nothing outweighs: var + eps, its inverse root,
    times weight; x - mean, times that and plus bias at once; plus the residual."""
    return 5 + add if dtype == torch.float32 else 0


def cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating tensor in it converted: tensors, parameter groups, containers."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast(v, dtype) for v in value))
    if isinstance(value, Mapping):
        return {key: cast(item, dtype) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(cast(v, dtype) for v in value)
    return value


def check_op(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    arguments: Iterable[Any],
    *,
    noise: float = 1.0,
    roundings: int = 0,
    what: str = "result",
) -> Tensor:
    """Holds `op(*arguments)` against `reference` by the contract and returns it."""
    arguments = list(arguments)
    with torch.no_grad():
        ours = op(*arguments)
        eager = reference(*arguments)
        truth = reference(*(cast(argument, torch.float64) for argument in arguments))
    assert_contract(ours, eager, truth, noise=noise, roundings=roundings, what=what)
    return ours
