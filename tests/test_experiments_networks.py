"""The experiments that look into networks: layer responses and gradient flow, with --quick."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("torchvision", reason="the experiments' data comes through torchvision")
pytest.importorskip("sklearn", reason="the experiments' digits come with scikit-learn")

import gradient_flow
import responses
from common import data, launch, recipes
from common.training import Result

from resnet_fused import cifar
from resnet_fused.testing.cases import randomise_statistics

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_deviation_is_that_of_all_test_images() -> None:
    """Against hooks on an unfused copy, all images in one batch."""
    images = data.open_images(None, side=16, quick=True)
    recipe = recipes.cifar(images, 4, 16)
    torch.manual_seed(0)
    model = randomise_statistics(cifar.resnet(8)).eval()
    place = launch.Launch(None, Path("unused"), torch.device("cpu"), torch.float32, 0, 0, True, 1.0)
    found = responses.measure(Result("", model, [], 0.0), images, recipe, place)
    seen: dict[str, float] = {}

    def keep(name: str):
        return lambda module, inputs, out: seen.__setitem__(name, out.std(correction=0).item())

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(keep(name.replace("bn", "conv")))
    pixels = torch.stack([recipe.view(images.test[i][0]) for i in range(128)])
    with torch.no_grad():
        model(pixels)
    assert list(found) == list(seen)
    assert found == pytest.approx(seen, rel=1e-4)


def test_responses_of_a_quick_run(tmp_path: Path) -> None:
    assert responses.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = table(tmp_path / "responses.csv")
    counts = {"plain-8": 7, "residual-8": 7, "residual-14": 13}
    for row in table(tmp_path / "results.csv"):
        own = [float(r["deviation"]) for r in rows if r["network"] == row["network"]]
        assert len(own) == int(row["3×3 layers"]) == counts.pop(row["network"])
        assert float(row["mean deviation"]) == pytest.approx(sum(own) / len(own))
        assert min(own) > 0
    assert not counts
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "With 8 layers the residual network's mean deviation is" in report
    assert (tmp_path / "responses.png").stat().st_size > 10_000


def _loss(model: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(model(x), label)


def test_gradients_are_the_layers_own() -> None:
    torch.manual_seed(0)
    model = cifar.resnet(8, shortcut="A")
    x, label = torch.randn(4, 3, 8, 8), torch.arange(4)
    _loss(model, x, label).backward()
    found = gradient_flow.gradients(model, 1)
    assert len(found) == 14
    assert list(found)[:2] == ["gradient conv1", "weight conv1"]
    assert found["weight conv1"] == pytest.approx(model.conv1.weight.norm().item())
    # The change of the loss along the gradient is its norm squared.
    weight = model.layer2[0].conv1.weight
    norm = found["gradient layer2.0.conv1"]
    with torch.no_grad():
        step = 1e-3 * weight.grad / norm
        weight.sub_(step)
        before = _loss(model, x, label)
        weight.add_(2 * step)
        after = _loss(model, x, label)
    assert (after - before).item() / 2e-3 == pytest.approx(norm, rel=0.02)
    row = {"iteration": 1.0, "gradient a": 6.0, "gradient b": 1.0, "gradient c": 2.0}
    row |= {"weight a": 5.0, "weight b": 7.0, "weight c": 10.0}
    assert gradient_flow.norms(row) == [6.0, 1.0, 2.0]
    assert gradient_flow.ratio(row) == 3.0
    assert gradient_flow.scaled_ratio(row) == 1.5


@pytest.mark.parametrize(
    ("first", "word"), [(0.01, "vanish"), (2.0, "are even"), (200.0, "explode")]
)
def test_the_verdict_follows_the_ratio(first: float, word: str) -> None:
    rows = [{"iteration": 1.0, "gradient a": first, "gradient b": 1.0}]
    run = gradient_flow.Run("plain", 56, True, 0, rows, None)
    assert f"gradients {word}" in gradient_flow.verdict(run)


def test_gradient_flow_of_a_quick_run(tmp_path: Path) -> None:
    """One learning rate without batch norm is absurd: what diverges is reported, not lost."""
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--depths", "8", "14"]
    assert gradient_flow.main([*arguments, "--learning-rate-without-bn", "1e9"]) == 0
    results = table(tmp_path / "results.csv")
    names = [
        f"{kind}-{d}{bn}"
        for bn in ("", ", no BN")
        for kind in ("plain", "residual")
        for d in (8, 14)
    ]
    assert [row["network"] for row in results] == names
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    for row in results:
        diverged = "no BN" in row["network"]
        assert (row["first / last, during training"] == "diverged") == diverged
        assert (f"{row['network']} diverged" in report) == diverged
        assert math.isfinite(float(row["first / last"]))
    layers = table(tmp_path / "gradients.csv")
    for row in results:
        own = [r for r in layers if r["network"] == row["network"] and r["iteration"] == "1"]
        assert len(own) == int(row["network"].split("-")[1].split(",")[0]) - 1
        first, last = float(own[0]["norm"]), float(own[-1]["norm"])
        assert float(row["first / last"]) == pytest.approx(first / last, rel=0.05)
    history = table(tmp_path / "history.csv")
    assert not any(key.startswith(("gradient", "weight")) for key in history[0])
    assert {row["network"] for row in history} == set(names)

    untrained = table(tmp_path / "initialisation.csv")
    assert len(untrained) == 3 * 2 * 2 * gradient_flow.SEEDS
    assert len({row["median"] for row in untrained}) == len(untrained)  # none is another


def test_circular_padding_sees_no_edge() -> None:
    model = cifar.plain(8, norm_layer=nn.Identity)
    flat = torch.ones(1, 3, 8, 8)
    assert model.features(flat)[-1].std((2, 3)).max() > 1e-3
    gradient_flow.pad_circularly(model)
    assert model.features(flat)[-1].std((2, 3)).max() < 1e-6
    assert model.features(flat)[-1].max() > 1e-2


def test_gradient_flow_is_for_small_images(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from PIL import Image

    for part in ("train", "val"):
        (tmp_path / part / "n01").mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / part / "n01" / "a.jpg")
    assert gradient_flow.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "this experiment is for CIFAR-10" in capsys.readouterr().err
