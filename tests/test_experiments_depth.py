"""The rules of the experiments on depth, on rows whose verdicts are known."""

from __future__ import annotations

from typing import Any

import degradation
import over_1000_layers
import pytest
import responses
import shortcuts
from common.claims import Claim, parsed

SEEDS = (0, 1, 2)


def verdicts(claims: tuple[Claim, ...], rows: list[dict[str, Any]]) -> list[str]:
    return [claim.judge(parsed(rows)).verdict for claim in claims]


def margins(claims: tuple[Claim, ...], rows: list[dict[str, Any]]) -> list[float | None]:
    return [claim.judge(parsed(rows)).margin for claim in claims]


def degraded(
    plain: float, residual: float, test: float, seeds: Any = SEEDS
) -> list[dict[str, Any]]:
    """Rows of 20 and 56 layers: those of 20 have 1 % training and 4 % test error."""
    ends = {("plain", 20): 1.0, ("residual", 20): 1.0, ("plain", 56): plain}
    ends["residual", 56] = residual
    return [
        {
            "layers": depth,
            "network": kind,
            "seed": seed,
            "training error (%)": error + (seed - 1) * 0.5,
            "test error (%)": (test if depth == 56 else 4.0) + (seed - 1) * 0.5,
        }
        for (kind, depth), error in ends.items()
        for seed in seeds
    ]


@pytest.mark.parametrize(
    ("plain", "residual", "test", "expected"),
    [
        (11.0, 2.0, 3.0, ["holds", "holds", "holds"]),
        (10.9, 2.1, 3.6, ["does not hold", "does not hold", "not shown"]),
        (60.0, 0.5, 5.0, ["holds", "holds", "does not hold"]),
    ],
)
def test_degradation(plain: float, residual: float, test: float, expected: list[str]) -> None:
    rows = degraded(plain, residual, test)
    assert verdicts(degradation.CLAIMS, rows) == expected
    found = degradation.CLAIMS[0].judge(parsed(rows))
    assert found.margin == pytest.approx(plain - 11.0)
    assert found.spread == pytest.approx(0.5)


def test_degradation_needs_three_seeds() -> None:
    assert set(verdicts(degradation.CLAIMS, degraded(60.0, 1.0, 2.0, (0, 1)))) == {"not shown"}


@pytest.mark.parametrize(
    ("plain", "a", "b", "c", "expected"),
    [
        (8.0, 4.0, 3.6, 3.2, ["holds", "holds", "holds"]),
        (4.2, 4.0, 3.5, 2.9, ["does not hold", "does not hold", "holds"]),
        (8.0, 4.0, 3.9, 3.9, ["holds", "holds", "not shown"]),
        (8.0, 3.0, 3.5, 3.9, ["holds", "holds", "does not hold"]),
    ],
)
def test_shortcuts(plain: float, a: float, b: float, c: float, expected: list[str]) -> None:
    rows = [
        {"shortcuts": option, "seed": seed, "top-1 error (%)": error + (seed - 1) * 0.3}
        for option, error in zip(("plain", "A", "B", "C"), (plain, a, b, c), strict=True)
        for seed in SEEDS
    ]
    assert verdicts(shortcuts.CLAIMS, rows) == expected
    assert margins(shortcuts.CLAIMS, rows)[1] == pytest.approx(plain - max(a, b, c) - 0.3)
    fewer = [row for row in rows if row["seed"] < 2]
    assert set(verdicts(shortcuts.CLAIMS, fewer)) == {"not shown"}


@pytest.mark.parametrize(
    ("layers", "half", "end", "test", "expected"),
    [
        (1202, 20.0, 9.0, 6.0, ["holds", "holds"]),
        (1202, 20.0, 9.0, 4.0, ["holds", "does not hold"]),
        (1202, 20.0, 10.5, 6.0, ["does not hold", "not shown"]),
        (1202, 5.0, 6.0, 6.0, ["does not hold", "holds"]),
        (920, 20.0, 9.0, 6.0, ["not shown", "not shown"]),
    ],
)
def test_over_1000_layers(
    layers: int, half: float, end: float, test: float, expected: list[str]
) -> None:
    keys = (
        "network",
        "layers",
        "training error halfway (%)",
        "training error (%)",
        "test error (%)",
    )
    values = (("ResNet-110", 110, 9.0, 1.0, 5.0), (f"ResNet-{layers}", layers, half, end, test))
    rows = [dict(zip(keys, row, strict=True)) for row in values]
    assert verdicts(over_1000_layers.CLAIMS, rows) == expected
    assert verdicts(over_1000_layers.CLAIMS, rows[1:])[1] == "not shown"


@pytest.mark.parametrize(
    ("residual", "plain", "untrained", "expected"),
    [
        ((0.5, 0.4, 0.3), (0.6, 0.5), (), ["holds", "holds"]),
        ((0.5, 0.4, 0.41), (0.6, 0.3), (), ["does not hold", "does not hold"]),
        ((0.5, 0.4, 0.3), (0.6, 0.3), ("plain-56",), ["holds", "holds"]),
        ((0.5, 0.4, 0.3), (0.6, 0.5), ("residual-110",), ["not shown", "holds"]),
        ((0.5, 0.4, 0.3), (0.6, 0.5), ("plain-20", "plain-56"), ["holds", "not shown"]),
    ],
)
def test_responses(
    residual: tuple[float, ...],
    plain: tuple[float, ...],
    untrained: tuple[str, ...],
    expected: list[str],
) -> None:
    rows = [
        {
            "kind": kind,
            "layers": depth,
            "mean deviation": deviation,
            "training error (%)": 5.1 if f"{kind}-{depth}" in untrained else 5.0,
        }
        for kind, deviations in (("plain", plain), ("residual", residual))
        for depth, deviation in zip((20, 56, 110), deviations, strict=False)
    ]
    assert verdicts(responses.CLAIMS, rows) == expected
