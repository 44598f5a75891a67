"""benchmarks/training.py: a gate that can turn red, and result files of stopped runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import training
import training_profile
from baselines.training import PLAIN
from harness.measure import Peaks
from harness.workers import Worker
from torch import Tensor, nn

import resnet_fused
from resnet_fused import BasicBlock
from resnet_fused.models import resnet18
from resnet_fused.models.cifar import CifarResNet
from resnet_fused.reference.training import ReferenceTraining
from resnet_fused.testing.plain import training_ops_in_pytorch

CPU = torch.device("cpu")


def _other_eps(num_classes: int) -> nn.Module:
    model = resnet18(num_classes=num_classes)
    model.layer3[0].bn1.eps = 1e-4
    return model


def _scaled_wgrad(wgrad: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`wgrad` with a ten-thousandth added to the gradient of one layer of ResNet-20."""

    def scaled(*arguments: Any) -> Tensor:
        grad = wgrad(*arguments)
        return 1.0001 * grad if grad.shape == (32, 16, 3, 3) else grad

    return scaled


def _other_variance(bn_scale_shift: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`bn_scale_shift` with a thousandth added to the variance that is kept of layers of 32."""

    def other(*arguments: Any) -> Tensor:
        found = bn_scale_shift(*arguments)
        if found.shape[1] == 32:
            found[4] *= 1.001
        return found

    return other


def _other_rate(training_step: Callable[..., Any]) -> Callable[..., Any]:
    """`training_step` that trains ours by a thousandth more: what single passes do not show."""

    def other(model: nn.Module, *arguments: Any, lr: float) -> Any:
        ours = isinstance(model, CifarResNet)
        return training_step(model, *arguments, lr=1.001 * lr if ours else lr)

    return other


@pytest.mark.parametrize(
    "fault",
    [None, pytest.param("eps", marks=pytest.mark.slow), "gradient", "variance", "losses"],
)
def test_gate(fault: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "GATE_STEPS", 3)
    monkeypatch.setattr(training, "GATE_PASSES", 3)  # fewer could not tell of 60 parameters
    monkeypatch.setattr(training, "GATE_NUDGES", 4)
    if fault == "eps":
        monkeypatch.setattr(resnet_fused, "resnet18", _other_eps)
    pieces = ReferenceTraining
    if fault == "gradient":
        monkeypatch.setattr(pieces, "wgrad", _scaled_wgrad(pieces.wgrad))
    if fault == "variance":
        monkeypatch.setattr(pieces, "bn_scale_shift", _other_variance(pieces.bn_scale_shift))
    if fault == "losses":
        monkeypatch.setattr(training, "training_step", _other_rate(training.training_step))
    with training_ops_in_pytorch():
        found = training.gate("resnet18" if fault == "eps" else "cifar.resnet20", CPU)
    assert found["green"] == (fault is None), (found["chance"], found["errors"])
    by_chance = {kind for kind, p in found["chance"].items() if p < training.GATE_CHANCE}
    beyond = {
        kind for kind, error in found["errors"].items() if error["ours"] > 1.1 * error["eager"]
    }
    shows = {
        "gradient": "gradient of layer2.0.conv1.weight",
        "variance": "statistics",
        "losses": "losses",
    }
    assert fault not in shows or shows[fault] in beyond
    if fault != "eps":
        assert by_chance == {"gradient": {"gradients"}, "losses": {"losses"}}.get(
            fault or "", set()
        )
    assert len(found["losses"]["ours"]) == 3


def test_losses_are_compared_by_all_pairs_of_runs() -> None:
    assert training.chance([1, 2], [3, 4]) == 1
    assert training.chance([3, 4], [1, 2]) == pytest.approx(1 / 6)
    assert training.chance([2, 4], [1, 3]) == pytest.approx(2 / 6)
    eight = [1.0 + i for i in range(8)]
    assert training.chance(eight, eight) > 0.5  # equal numbers count for neither
    assert training.chance([8 + i for i in eight], eight) < training.GATE_CHANCE
    # One run of ours beyond all of eager's is no more than chance.
    assert training.chance([*eight[:-1], 100.0], eight) > 0.5


def test_a_stopped_run_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "gate", lambda *_: {"green": True})
    monkeypatch.setattr(training.measure, "measure_peaks", lambda *_: Peaks(1, 1))
    measured: list[str] = []

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

    monkeypatch.setattr(training, "Apart", Contestant)
    result, chart = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--batch", "1", "2", "--only", "resnet_fused", "eager NCHW"]
    code = training.main([*options, "--json", str(result), "--plot", str(chart)])
    assert code == 130
    record = json.loads(result.read_text())
    assert [row["name"] for row in record["rows"]] == measured == [
        "resnet_fused", "eager NCHW", "resnet_fused",
    ]  # fmt: skip
    assert [row["speedup_over"] for row in record["rows"]] == [1.0, 2.0, 1.0]
    assert [len(row["rounds"]) for row in record["rows"]] == [5, 5, 1]
    assert {"commit", "dirty", "machine", "versions", "tuning"} <= set(record)
    assert chart.stat().st_size > 0


def test_nothing_is_timed_on_a_red_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "gate", lambda *_: {"green": False})
    monkeypatch.setattr(training, "Apart", lambda *_: pytest.fail("timed"))
    assert training.main([]) == 1


def test_each_trains_and_says_what_it_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round of it in a process of its own."""
    kept, workers = {}, []

    def started(*arguments: Any, **settings: Any) -> Any:
        workers.append(Worker(*arguments, **settings))
        return workers[-1]

    monkeypatch.setattr(training, "Worker", started)
    for name in (PLAIN, "eager channels_last"):
        row = training.Row("cifar.resnet20", 2, name)
        found = training.contestant(row, 32, CPU, torch.bfloat16, 0.01, Peaks(1, 1))
        assert isinstance(found, training.Apart), row.failure
        found.time()
        assert row.step
        assert len(row.rounds) == 2
        assert row.kept_bytes is not None
        kept[name] = row.kept_bytes
    assert len(workers) == 4
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


def test_kernels_that_overlap_take_together_as_long_as_the_gpu_worked() -> None:
    def event(name: str, start: int, end: int) -> SimpleNamespace:
        where = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(
            name=name, device_type=SimpleNamespace(name="CUDA"), time_range=where
        )

    ran = [event("a", 0, 10), event("b", 1, 12), event("c", 3, 5), event("a", 20, 30)]
    times = training_profile._times(SimpleNamespace(events=lambda: ran), gpu=True)
    assert times == {"a": (2, pytest.approx(20e-6)), "b": (1, pytest.approx(2e-6)), "c": (1, 0.0)}


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
