"""benchmarks/training.py: a gate that can turn red, and result files of stopped runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import training_profile
from baselines.training import PLAIN
from harness.measure import Peaks
from torch import Tensor, nn

import resnet_fused
from resnet_fused import BasicBlock
from resnet_fused.models import resnet18
from resnet_fused.reference.training import ReferenceTraining
from resnet_fused.testing.plain import training_ops_in_pytorch

CPU = torch.device("cpu")


def _other_eps(num_classes: int) -> nn.Module:
    model = resnet18(num_classes=num_classes)
    model.layer3[0].bn1.eps = 1e-4
    return model


def _scaled_wgrad(wgrad: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`wgrad` with a thousandth added to the gradient of one layer of ResNet-18."""

    def scaled(*arguments: Any) -> Tensor:
        grad = wgrad(*arguments)
        return 1.001 * grad if grad.shape == (128, 64, 3, 3) else grad

    return scaled


@pytest.mark.parametrize(
    "fault", [None, pytest.param("eps", marks=pytest.mark.thorough), "gradient"]
)
def test_gate(fault: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "GATE_STEPS", 3)
    monkeypatch.setattr(training, "GATE_NUDGES", 3)
    if fault == "eps":
        monkeypatch.setattr(resnet_fused, "resnet18", _other_eps)
    if fault == "gradient":
        monkeypatch.setattr(ReferenceTraining, "wgrad", _scaled_wgrad(ReferenceTraining.wgrad))
    with training_ops_in_pytorch():
        found = training.gate("resnet18", CPU)
    assert found["green"] == (fault is None), found["errors"]
    assert len(found["losses"]["ours"]) == 3


def test_a_stopped_run_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "gate", lambda *_: {"green": True})
    monkeypatch.setattr(training.measure, "measure_peaks", lambda *_: Peaks(1, 1))
    measured: list[str] = []
    stopped: list[str] = []

    class Contestant:
        def __init__(self, row: training.Row, *_: object) -> None:
            if row.batch == 2 and row.name == "eager NCHW":
                raise KeyboardInterrupt
            measured.append(row.name)
            self.row = row
            self.time()

        def time(self) -> None:
            self.row.step = 0.5 if self.row.name == "resnet_fused" else 1.0
            self.row.rounds.append(self.row.step)
            self.row.images_per_second = self.row.batch / self.row.step

        def stop(self) -> None:
            stopped.append(self.row.name)

    monkeypatch.setattr(training, "Apart", Contestant)
    result, chart = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--batch", "1", "2", "--only", "resnet_fused", "eager NCHW"]
    code = training.main([*options, "--json", str(result), "--plot", str(chart)])
    assert code == 130
    record = json.loads(result.read_text())
    assert [row["name"] for row in record["rows"]] == measured == [
        "resnet_fused", "eager NCHW", "resnet_fused",
    ]  # fmt: skip
    assert stopped == measured
    assert [row["speedup_over"] for row in record["rows"]] == [1.0, 2.0, 1.0]
    assert [len(row["rounds"]) for row in record["rows"]] == [5, 5, 1]
    assert {"commit", "dirty", "machine", "versions", "tuning"} <= set(record)
    assert chart.stat().st_size > 0


def test_nothing_is_timed_on_a_red_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "gate", lambda *_: {"green": False})
    monkeypatch.setattr(training, "Apart", lambda *_: pytest.fail("timed"))
    assert training.main([]) == 1


def test_each_trains_and_says_what_it_kept() -> None:
    kept = {}
    for name in (PLAIN, "eager channels_last"):
        row = training.Row("cifar.resnet20", 2, name)
        found = training.contestant(row, 32, CPU, torch.bfloat16, 0.01, Peaks(1, 1))
        assert isinstance(found, training.Apart), row.failure
        found.time()
        found.stop()
        assert row.step
        assert len(row.rounds) == 2
        assert row.kept_bytes is not None
        kept[name] = row.kept_bytes
    assert kept[PLAIN] < 0.8 * kept["eager channels_last"]


def test_one_that_cannot_run_says_why() -> None:
    row = training.Row("resnet0", 2, "eager NCHW")
    assert training.contestant(row, 32, CPU, torch.bfloat16, 0.01, Peaks(1, 1)) is None
    assert row.failure == "AttributeError: module 'torchvision.models' has no attribute 'resnet0'"


def test_accuracies_are_compared_by_the_spread_over_seeds() -> None:
    accuracy = pytest.importorskip("training_accuracy", reason="needs scikit-learn")
    theirs = [[0.90, 0.92], [0.94, 0.90], [0.92, 0.94]]  # over seeds, both copies deviate by 0.02
    found = accuracy.compare({"resnet_fused": theirs, "torchvision": theirs})
    assert found["same"]
    assert found["spread over seeds"]["torchvision"] == pytest.approx(0.02)
    for shift, same in ((0.015, True), (-0.025, False), (0.025, False)):
        ours = [[value + shift for value in runs] for runs in theirs]
        found = accuracy.compare({"resnet_fused": ours, "torchvision": theirs})
        assert found["same"] == same
        assert found["difference"] == pytest.approx(shift)


def test_a_nudge_is_one_unit_in_the_last_place() -> None:
    model = nn.Linear(8, 8)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert training.nudge(model, 1) is model
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(torch.nextafter(old, new), new)
        assert (old != new).all()


def test_profile_puts_kernels_beside_their_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Floors of one block's pieces, counted by hand; ops' times add up to all."""
    block = BasicBlock(4, 4).train()
    x = torch.randn(2, 4, 6, 6)

    def step() -> None:
        block(x).sum().backward()

    peaks = Peaks(bandwidth=1.0, arithmetic=1e30)
    image, weight, terms = 4 * x.numel(), 4 * 4 * 4 * 9, 4 * 6 * 4
    with training_ops_in_pytorch():
        floors = training_profile.floors(step, x, peaks)
        rows = training_profile.profile(step, x, peaks)
        slow = training_profile.floors(step, x, peaks._replace(bandwidth=1e30, arithmetic=1.0))
    # One activation, formed forward and backward, and the block's end.
    assert floors["bn_add_relu"] == 2 * (2 * image + terms) + 3 * image + terms
    moments = 4 * 3 * 4
    assert floors["conv_stats"] == 4 * image + 2 * (weight + moments)
    assert slow["conv_stats"] == slow["wgrad"] == 2 * 2 * x.numel() * 4 * 9
    assert slow["dgrad"] == slow["wgrad"] / 2  # the input needs no gradient
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert "aten::" in training_profile.table(rows)
    with resnet_fused.use_backend("reference"):
        assert training_profile.floors(step, x, peaks) == {}
