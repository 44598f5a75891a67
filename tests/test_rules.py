"""The rules by which the experiments with CIFAR-10's, ImageNet's and deepened networks, of
gradients and of evaluation judge the paper's claims, on rows that are made here."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

pytest.importorskip("torchvision", reason="the experiments' data comes through torchvision")

from common.claims import Finding, parsed


def judge(experiment: str, name: str, rows: list[dict[str, Any]]) -> Finding:
    (claim,) = (c for c in importlib.import_module(experiment).CLAIMS if c.name.startswith(name))
    return claim.judge(parsed(rows))


def by_seed(values: tuple[float, ...], key: str, **row: Any) -> list[dict[str, Any]]:
    return [{**row, "seed": seed, key: value} for seed, value in enumerate(values)]


@pytest.mark.parametrize(
    ("deep", "training", "verdict", "margin"),
    [
        ((7.0, 7.0, 7.0), 5.0, "holds", 0.0),  # 2 points less the spread of 2
        ((6.5, 6.5, 6.5), 6.0, "holds", 0.5),
        ((7.5, 7.5, 7.5), 5.0, "does not hold", -0.5),
        ((6.5, 6.5, 6.5), 6.1, "not shown", None),
    ],
)
def test_deeper_is_better_by_more_than_the_spread(
    deep: tuple[float, ...], training: float, verdict: str, margin: float | None
) -> None:
    rows = [
        {**row, "training error (%)": error}
        for depth, errors, error in ((20, (7.0, 9.0, 11.0), 5.0), (56, deep, training))
        for row in by_seed(errors, "test error (%)", layers=depth)
    ]
    found = judge("cifar", "Deeper", rows)
    assert found.verdict == verdict
    assert found.margin == margin
    assert found.spread == 2.0


def ways(**errors: tuple[float, float]) -> list[dict[str, Any]]:
    names = {"shallow": "shallow", "deep": "deep from scratch", "deepened": "deepened"}
    names |= {"frozen": "deepened, frozen"}
    return [
        {"way": names[way], "training error (%)": training, "test error (%)": test}
        for way, (training, test) in errors.items()
    ]


@pytest.mark.parametrize(
    ("claim", "worse", "verdicts"),
    [
        # Each with one network worse in training error, in test error, and better in both.
        ("A network deepened", "deepened", ("does not hold", "holds", "holds")),
        ("Deepening ends", "deepened", ("does not hold", "does not hold", "does not hold")),
        ("The old layers", "frozen", ("does not hold", "does not hold", "holds")),
    ],
)
def test_deepened_networks_are_no_worse_within_a_point(
    claim: str, worse: str, verdicts: tuple[str, ...]
) -> None:
    level = dict.fromkeys(("shallow", "deep", "deepened", "frozen"), (2.0, 3.0))
    assert judge("progressive_deepening", claim, ways(**level)).margin == 1.0
    for errors, verdict in zip(((3.5, 3.0), (2.0, 4.5), (0.5, 1.5)), verdicts, strict=True):
        found = judge("progressive_deepening", claim, ways(**{**level, worse: errors}))
        assert found.verdict == verdict, errors
    untrained = dict.fromkeys(level, (6.0, 6.0))
    assert judge("progressive_deepening", claim, ways(**untrained)).verdict == "not shown"


def views(gains: tuple[float, ...], ensemble: float = 5.0) -> list[dict[str, Any]]:
    errors = {str(i): (10.0, 10.0 - gain) for i, gain in enumerate(gains)}
    errors["ensemble"] = (9.0, ensemble)
    return [
        {"network": network, "test": test, "top-1 error (%)": error}
        for network, pair in errors.items()
        for test, error in zip(("1 crop", "10 crops"), pair, strict=True)
    ]


def test_views_help_where_networks_agree() -> None:
    found = judge("evaluate", "Ten crops help", views((1.0, 2.0, 3.0)))
    assert found.margin == pytest.approx(2 - 2 / 3**0.5)
    assert found.spread == 1.0
    found = judge("evaluate", "Ten crops help", views((-3.0, 2.0, 3.0)))
    assert found.verdict == "does not hold"  # the mean is above 0, but within two standard errors
    assert judge("evaluate", "Ten crops help", views((1.0,))).verdict == "not shown"
    assert judge("evaluate", "Scales help more", views((1.0, 1.0))).verdict == "not shown"
    bad = [{**row, "top-1 error (%)": 90.0} for row in views((1.0, 1.0))]
    assert judge("evaluate", "Ten crops help", bad).verdict == "not shown"


def test_an_ensemble_is_to_beat_its_best_network_in_every_test() -> None:
    assert judge("evaluate", "Ensembles", views((1.0, 2.0), 7.75)).margin == 0.25
    assert judge("evaluate", "Ensembles", views((1.0, 2.0), 8.5)).margin == -0.5
    alone = [row for row in views((1.0, 2.0)) if row["network"] != "ensemble"]
    assert judge("evaluate", "Ensembles", alone).verdict == "not shown"


def test_recipes_are_judged_by_centre_crops() -> None:
    def rows(fit: float | None, paper: float, modern: float) -> list[dict[str, Any]]:
        key = "top-1 test error (%)"
        return [
            {"recipe": "paper", "of centre crops (%)": fit, key: paper},
            {"recipe": "modern", "of centre crops (%)": 9.0, key: modern},
        ]

    assert judge("imagenet", "The recipe", rows(1.5, 2.0, 3.5)).margin == 0.5
    assert judge("imagenet", "The recipe", rows(1.5, 5.5, 3.5)).margin == -0.5
    assert judge("imagenet", "The recipe", rows(2.5, 2.0, 3.5)).margin == -0.5
    assert judge("imagenet", "The recipe", rows(None, 2.0, 3.5)).verdict == "not shown"
    assert judge("imagenet", "A modern", rows(1.5, 2.0, 3.5)).margin == -0.5
    assert judge("imagenet", "A modern", rows(1.5, 2.0, 1.5)).margin == 1.5
    assert judge("imagenet", "A modern", rows(1.5, 2.0, 1.5)[:1]).verdict == "not shown"


# Claim -> network, batch norm, padding; decades of (median, first / last) at 56 layers where they
# are 0 at 8; the margin.
INITIALISED = [
    ("Batch norm keeps", ("plain", "yes", "zeros"), (2.0, 3.0), 1.0),
    ("Batch norm keeps", ("plain", "yes", "zeros"), (-2.0, 0.0), -1.0),
    ("Batch norm keeps", ("plain", "yes", "zeros"), (0.0, -2.0), -1.0),
    ("Plain networks'", ("plain", "yes", "zeros"), (0.0, 9.0), 1.0),  # no more than 34 layers count
    ("In deeper ones", ("plain", "yes", "zeros"), (0.0, 3.0), 2.0),
    ("In deeper ones", ("plain", "yes", "zeros"), (3.0, 0.0), -1.0),
    ("Without batch norm", ("plain", "no", "zeros"), (-4.0, 0.0), 3.0),
    ("Without batch norm", ("plain", "no", "zeros"), (4.0, 0.0), -5.0),
    ("With shortcuts", ("residual", "no", "zeros"), (4.0, -0.5), 0.5),
    ("With shortcuts", ("residual", "no", "zeros"), (-4.0, 0.0), -3.0),
]


def initialised(network: tuple[str, str, str], deep: tuple[float, float]) -> list[dict[str, Any]]:
    names = ("network", "batch norm", "padding")
    return [
        {
            **dict(zip(names, network, strict=True)),
            "layers": layers,
            "seed": seed,
            "median": 10**median,
            "first / last": 10**uneven,
        }
        for layers, (median, uneven) in ((8, (0.0, 0.0)), (56, deep))
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(("name", "network", "deep", "margin"), INITIALISED)
def test_gradients_of_initialised_networks(
    name: str, network: tuple[str, str, str], deep: tuple[float, float], margin: float
) -> None:
    found = judge("gradient_flow", name, initialised(network, deep))
    assert found.margin == pytest.approx(margin)
    assert found.spread == 0


def test_padding_is_the_cause_where_without_it_little_is_left() -> None:
    zeros = initialised(("plain", "no", "zeros"), (-6.0, 0.0))
    for circular, margin in ((-1.0, 2.0), (-5.0, -2.0), (5.0, -2.0)):
        rows = zeros + initialised(("plain", "no", "circular"), (circular, 0.0))
        assert judge("gradient_flow", "The small", rows).margin == pytest.approx(margin)


@pytest.mark.parametrize(
    ("scaled", "error", "margin"),
    [
        (0.5, 3.0, 0.699),
        (0.01, 3.0, -1.0),
        (1000.0, 3.0, -2.0),
        (0.5, 30.0, None),
        ("diverged", 3.0, None),
    ],
)
def test_gradients_in_training(scaled: float | str, error: float, margin: float | None) -> None:
    key = "training error (%)"
    same = {"layers": 56, "batch norm": "yes"}
    found = judge(
        "gradient_flow",
        "During training",
        [
            {"kind": "plain", **same, "scaled": scaled, key: 70.0},
            {"kind": "residual", **same, "scaled": 1.0, key: error},
        ],
    )
    assert found.margin == (None if margin is None else pytest.approx(margin, abs=1e-3))
