"""The numerics contract itself: what it lets through, and planted errors that it must not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from resnet_fused.numerics import (
    assert_contract,
    bn_add_relu_roundings,
    cast,
    relative_error,
    rounding_floor,
)
from resnet_fused.reference import ops as reference
from resnet_fused.testing.cases import generator, make_batch_norm

INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
MOST_ROUNDINGS = bn_add_relu_roundings(torch.float32, add=True)


def exact(shape: tuple[int, ...] = (4, 64, 16, 16)) -> Tensor:
    """float64, of magnitudes over several powers of two, none of them small enough to underflow."""
    out = torch.randn(shape, generator=generator(), dtype=torch.float64)
    return out + out.sign() * 2**-6


def moved(values: Tensor, steps: Tensor | int) -> Tensor:
    """Each value's magnitude moved by so many units in the last place."""
    return (values.view(INTEGERS[values.dtype]) + steps).view(values.dtype)


def systematic(shape: torch.Size) -> Tensor | int:
    return 2


def random(shape: torch.Size) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator(1)).to(torch.int16) * 4 - 2


@pytest.mark.parametrize("plant", [systematic, random])
def test_two_units_in_the_last_place_are_too_many(
    plant: Callable[[torch.Size], Tensor | int], dtype: torch.dtype
) -> None:
    truth = exact()
    eager = truth.to(dtype)
    assert_contract(eager, eager, truth, roundings=MOST_ROUNDINGS)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_contract(moved(eager, plant(eager.shape)), eager, truth, roundings=MOST_ROUNDINGS)


@pytest.mark.parametrize("roundings", range(1, MOST_ROUNDINGS + 1))
def test_the_floor_is_of_the_size_of_that_many_roundings(
    roundings: int, dtype: torch.dtype
) -> None:
    """Sums with ever new errors of half a unit: the floor covers them, and not twice over."""
    truth = exact()
    out = truth.clone()
    for seed in range(roundings):
        spacing = (moved(truth.to(dtype), 1).double() - truth.to(dtype).double()).abs()
        noise = torch.rand(truth.shape, generator=generator(seed), dtype=torch.float64) - 0.5
        out += spacing * noise
    error, floor = relative_error(out, truth), rounding_floor(roundings, dtype)
    assert floor / 2 < error < floor


def test_no_roundings_stated_allow_none() -> None:
    truth = exact()
    eager = truth.float()
    random_unit = moved(eager, torch.randint(0, 2, eager.shape, generator=generator(1)).int())
    assert_contract(random_unit, eager, truth, roundings=MOST_ROUNDINGS)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_contract(random_unit, eager, truth, noise=1.1)


@pytest.mark.parametrize("add", [False, True])
def test_batch_norm_needs_the_roundings_it_is_given(add: bool) -> None:
    """Step by step in float32, against a yardstick that is exact but for the last rounding."""
    rng = generator()
    x = torch.randn(4, 64, 16, 16, generator=rng)
    residual = torch.randn(x.shape, generator=rng) if add else None
    bn = make_batch_norm(64, rng)
    truth = reference.bn_add_relu(*cast([x, bn, residual], torch.float64), True)
    mean, var, weight, bias = (v[:, None, None] for v in bn[:4])
    scale = weight * (var + bn.eps).rsqrt()
    out = ((x - mean).double() * scale + bias).float()
    out = (out if residual is None else out + residual).relu()
    roundings = bn_add_relu_roundings(torch.float32, add)
    assert_contract(out, truth.float(), truth, roundings=roundings)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_contract(out, truth.float(), truth, noise=1.1)
    approximate = scale.bfloat16().float()
    out = ((x - mean).double() * approximate + bias).float()
    out = (out if residual is None else out + residual).relu()
    with pytest.raises(AssertionError, match="exceeds"):
        assert_contract(out, truth.float(), truth, roundings=roundings)


def test_what_is_halves_is_held_to_pytorchs_error_alone() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert bn_add_relu_roundings(dtype, add=True) == 0
