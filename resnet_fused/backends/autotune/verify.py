"""Whether a candidate computes what the reference does, on the inputs it is to be measured with.

Truth is the reference in float64, the yardstick PyTorch's own error in the inputs' dtype, as in the
numerics contract (`resnet_fused.numerics`), and beside it PyTorch's worst element, because
one wrong element among millions does not show in a norm. Memory that a candidate gets for its
result is filled with NaN, so that an element which nobody writes shows.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...numerics import cast, relative_error, rounding_floor

CHUNK_ELEMENTS = 2**25  # of the main input, in float64 at a time
# Two results of one rounding each have the same error but for chance, and the worst of their
# elements up to a few times that of the other's. The norm of n independent errors deviates by
# 1/√(2n) of itself, the ratio of two such by 1/√n: three times that is allowed on top, which counts
# where a result is a few sums of a channel each.
_NOISE = 1.1
_DEVIATIONS = 3
_NOISE_OF_WORST = 2.0
# Of batch norm in float32 (`resnet_fused.numerics.bn_add_relu_roundings`), with a residual.
_ROUNDINGS = 6


class _Expected(NamedTuple):
    """What a result has to be like: its dtype, the error in the norm and that of any element."""

    truth: Tensor
    dtype: torch.dtype
    error: float
    worst: float


class Check:
    """The truth of one call, computed when it is first asked for."""

    def __init__(
        self, reference: Callable[..., Any], arguments: Sequence[Any], per_image: bool
    ) -> None:
        """`per_image`: the result's images depend on those of the 4-dimensional arguments one by
        one, so that truth can be computed a few images at a time."""
        self._reference = reference
        self._arguments = arguments
        self._per_image = per_image

    @functools.cached_property
    def _truth(self) -> list[Tensor]:
        x = self._arguments[0]
        if not self._per_image:
            return _tensors(self._reference(*cast(list(self._arguments), torch.float64)))
        images = len(x)
        step = max(1, CHUNK_ELEMENTS * images // x.numel())
        parts = []
        for first in range(0, images, step):
            chunk = [
                v[first : first + step] if isinstance(v, Tensor) and v.dim() == 4 else v
                for v in self._arguments
            ]
            parts.append(self._reference(*cast(chunk, torch.float64)))
        return [torch.cat(parts)]

    @functools.cached_property
    def _expected(self) -> list[_Expected]:
        found = []
        for eager, truth in zip(
            _tensors(self._reference(*self._arguments)), self._truth, strict=True
        ):
            noise = _NOISE * (1 + _DEVIATIONS / max(truth.numel(), 1) ** 0.5)
            error = noise * relative_error(eager, truth)
            worst = _NOISE_OF_WORST * _worst(eager, truth)
            rounding = torch.finfo(torch.float32).eps / 2
            found.append(
                _Expected(
                    truth,
                    eager.dtype,
                    max(error, rounding_floor(_ROUNDINGS, torch.float32)),
                    max(worst, _ROUNDINGS * rounding * truth.abs().max().item()),
                )
            )
        return found

    def is_possible(self) -> bool:
        """Whether there is anything to hold a result against: not where inputs hold NaN."""
        return all(bool(torch.isfinite(truth).all()) for truth in self._truth)

    def fault(self, launch: Callable[..., Any]) -> str | None:
        """What is wrong with the result of `launch(*arguments)`, or None."""
        with uninitialised_memory_is_nan():
            results = _tensors(launch(*self._arguments))
        for i, (own, expected) in enumerate(zip(results, self._expected, strict=True)):
            if fault := _fault(own, expected):
                return f"result {i} {fault}"
        return None


def _fault(own: Tensor, expected: _Expected) -> str | None:
    truth = expected.truth
    if (own.shape, own.dtype) != (truth.shape, expected.dtype):
        return (
            f"is {own.dtype} of shape {tuple(own.shape)} instead of {expected.dtype} of shape "
            f"{tuple(truth.shape)}"
        )
    if unwritten := int(own.isnan().sum()):
        return f"has {unwritten} of {own.numel()} elements that are NaN or unwritten"
    if (error := relative_error(own, truth)) > expected.error:
        return f"has an error of {error:.3e} where {expected.error:.3e} is allowed"
    if (worst := _worst(own, truth)) > expected.worst:
        return f"has an element that is {worst:.3e} off where {expected.worst:.3e} is allowed"
    return None


def _worst(own: Tensor, truth: Tensor) -> float:
    return (own.double() - truth).abs().max().item()


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Within the block, PyTorch fills what `torch.empty` returns, as it does in its deterministic
    mode. That mode's warnings are for those who asked for it."""
    # torch.use_deterministic_algorithms would import Inductor, which takes seconds.
    set_mode: Callable[..., None] = torch._C._set_deterministic_algorithms
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    set_mode(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(deterministic impl|Deterministic behavior)")
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        set_mode(deterministic, warn_only=warn_only)
