"""The experiments, end to end with --quick: what they leave behind, resuming, several processes."""

from __future__ import annotations

import csv
import importlib
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision", reason="the experiments' data comes through torchvision")
pytest.importorskip("sklearn", reason="the experiments' digits come with scikit-learn")

import progressive_deepening
from common import checkpoint, launch, report, training
from common.errors import ExperimentError

from resnet_fused import cifar

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"

# experiment -> (names of its runs, iterations of each, a label of its plot's legend)
QUICK = {
    "degradation": (
        [f"{kind}{d}-seed{s}" for kind in ("plain", "residual") for d in (8, 14) for s in (0, 1)],
        12,
    ),
    "shortcuts": ([f"{o}-8-seed{s}" for s in (0, 1) for o in ("plain", "A", "B", "C")], 10),
    "cifar": ([f"resnet{d}-seed{s}" for d in (8, 14) for s in (0, 1)], 12),
    "over_1000_layers": (["resnet8", "resnet50"], 6),
    "progressive_deepening": (
        [
            f"{name}-seed0"
            for name in (
                "resnet8-first-half",
                "resnet8",
                "resnet14",
                "resnet8-to-14",
                "resnet8-to-14-frozen",
            )
        ],
        None,
    ),
    "imagenet": (["resnet18-paper", "resnet18-modern"], 8),
}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def runs(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of history.csv, by run."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in table(folder / "history.csv"):
        found.setdefault(row["run"], []).append(row)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of finished quick runs, made when first asked for."""

    class Folders(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            folder = tmp_path_factory.mktemp(name)
            program = importlib.import_module(name)
            assert program.main(["--quick", "--device", "cpu", "--out", str(folder)]) == 0
            self[name] = folder
            return folder

    return Folders()


@pytest.mark.parametrize("name", QUICK)
def test_history_and_report_of_a_quick_run(name: str, finished: dict[str, Path]) -> None:
    expected, iterations = QUICK[name]
    folder = finished[name]
    history = runs(folder)
    assert sorted(history) == sorted(expected)
    for run, rows in history.items():
        counted = [int(row["iteration"]) for row in rows]
        assert counted == sorted(set(counted))
        assert counted[0] == 1
        if iterations is not None:
            assert counted[-1] == iterations, run
        for row in rows:
            assert 0 <= float(row["training_error"]) <= 100
            assert 0.1 < float(row["training_loss"]) < 20
        # Untrained networks of ten classes: near log 10, or the data never reached them.
        assert 1.8 < float(rows[0]["training_loss"]) < 4.5
        last = rows[-1]
        assert 0 <= float(last["test_top5_error"]) <= float(last["test_error"]) <= 100
        # 128 images are tested, so an error is a multiple of 1/128.
        assert float(last["test_error"]) * 1.28 == pytest.approx(
            round(float(last["test_error"]) * 1.28), abs=1e-9
        )
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# ")
    for fact in ("digits", f"torch {torch.__version__.split('+')[0]}", "cores", "commit: "):
        assert fact in report
    summary = folder / "summary.csv"  # where results.csv has a row for each seed
    for row in table(summary if summary.exists() else folder / "results.csv"):
        errors = [v for key, v in row.items() if key.endswith("error (%)") and "±" not in v]
        for value in errors:
            assert f"{float(value):.2f}" in report
        assert f"{int(row['parameters']):,}" in report


def test_the_command_in_a_report_does_not_say_where_it_was_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ["anywhere/experiments/cifar.py", "--depths", "20", "--out", "here", "--runs", "5"]
    monkeypatch.setattr(sys, "argv", given)
    assert report._command() == "python experiments/cifar.py --depths 20 --runs 5"


@pytest.mark.parametrize("name", QUICK)
def test_plot_shows_as_many_curves_as_there_are(name: str, finished: dict[str, Path]) -> None:
    from common.report import _COLOURS
    from PIL import Image

    image = Image.open(finished[name] / "curves.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(2**24) or []}
    curves = {"shortcuts": 4, "progressive_deepening": 4}.get(name, 2)
    for index, colour in enumerate(_COLOURS):
        drawn = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in colours
        assert drawn == (index < curves), colour


def test_results_are_those_of_the_history(finished: dict[str, Path]) -> None:
    history = runs(finished["degradation"])
    for row in table(finished["degradation"] / "results.csv"):
        rows = history[f"{row['network']}{row['layers']}-seed{row['seed']}"]
        assert float(row["test error (%)"]) == float(rows[-1]["test_error"])
        late = [float(r["training_error"]) for r in rows if int(r["iteration"]) > 0.9 * 12]
        assert float(row["training error (%)"]) == pytest.approx(statistics.mean(late))
    for experiment, key in (("degradation", "layers"), ("shortcuts", "shortcuts")):
        raw = table(finished[experiment] / "results.csv")
        for row in table(finished[experiment] / "summary.csv"):
            same = [r for r in raw if (r[key], r.get("network")) == (row[key], row.get("network"))]
            assert [int(r["seed"]) for r in same] == [0, 1]
            errors = [float(r["training error (%)"]) for r in same]
            assert row["training error (%)"] == (
                f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f}"
            )
    history = runs(finished["cifar"])
    results = table(finished["cifar"] / "results.csv")
    for row in table(finished["cifar"] / "summary.csv"):
        depth = row["network"].removeprefix("ResNet-")
        errors = [float(history[f"resnet{depth}-seed{s}"][-1]["test_error"]) for s in (0, 1)]
        own = [float(r["test error (%)"]) for r in results if r["network"] == row["network"]]
        assert own == errors
        assert row["test error (%)"] == (
            f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f}"
        )
        assert float(row["best test error (%)"]) == min(errors)
    assert errors[0] != errors[1]  # runs have seeds of their own


def test_parameters_are_those_of_the_networks(finished: dict[str, Path]) -> None:
    found = {r["network"]: int(r["parameters"]) for r in table(finished["cifar"] / "results.csv")}
    assert found == {
        f"ResNet-{depth}": sum(p.numel() for p in cifar.resnet(depth).parameters())
        for depth in (8, 14)
    }


def test_checkpointing_keeps_less(finished: dict[str, Path]) -> None:
    row = table(finished["over_1000_layers"] / "results.csv")[-1]
    without, with_it = (float(v) for k, v in row.items() if k.startswith("kept"))
    assert with_it < without / 3


def test_a_finished_run_is_not_trained_again(
    finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished["degradation"]
    before = (folder / "history.csv").read_bytes()
    monkeypatch.setattr(training._Training, "_step", None)
    main = importlib.import_module("degradation").main
    assert main(["--quick", "--device", "cpu", "--out", str(folder)]) == 0
    assert (folder / "history.csv").read_bytes() == before


def program(name: str, out: Path, *arguments: str, processes: int = 1) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    given = ["--quick", "--device", "cpu", "--out", str(out), *arguments]
    return [*start, str(EXPERIMENTS / f"{name}.py"), *given]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def finish(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def state(path: Path) -> dict[str, Any]:
    """All of a checkpoint but the time it took."""
    found = torch.load(path, weights_only=True)
    del found["progress"]["seconds"]
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two checkpoints are equal to the last bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize(
    ("name", "run", "arguments"),
    [
        ("cifar", "resnet8-seed0", ["--depths", "8", "--runs", "1", "--iterations", "60"]),
        pytest.param(
            *("imagenet", "resnet18-modern", ["--recipes", "modern", "--dtype", "bfloat16"]),
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(
    name: str, run: str, arguments: list[str], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(program(name, whole, *arguments), tmp_path)
    file = killed / "checkpoints" / f"{run}.pt"
    command = program(name, killed, *arguments, "--checkpoint-seconds", "0")
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # somewhere in a later iteration, or in the writing of its checkpoint
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "history.csv").exists(), "it had finished"
    stopped = state(file)["progress"]["iteration"]
    complete = state(whole / "checkpoints" / f"{run}.pt")
    assert 0 < stopped < complete["progress"]["iteration"]
    finish(program(name, killed, *arguments), tmp_path)
    assert same(state(file), complete)
    assert (killed / "history.csv").read_bytes() == (whole / "history.csv").read_bytes()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    arguments = ["--depths", "8", "--runs", "1", "--iterations", "8", "--batch", "64"]
    arguments += ["--seed", "3"]
    for processes in (1, 2):
        out = tmp_path / str(processes)
        finish(program("cifar", out, *arguments, processes=processes), tmp_path)
    one, two = (runs(tmp_path / folder)["resnet8-seed3"] for folder in ("1", "2"))
    assert [row["iteration"] for row in one] == ["1", "6", "8"]
    for a, b in zip(one, two, strict=True):
        assert (a["iteration"], a["training_error"]) == (b["iteration"], b["training_error"])
        # float32, summed in another order; steps at rate 0.1 amplify the difference.
        assert float(a["training_loss"]) == pytest.approx(float(b["training_loss"]), rel=1e-5)
    assert float(one[-1]["test_loss"]) == pytest.approx(float(two[-1]["test_loss"]), rel=1e-4)
    assert abs(float(one[0]["training_loss"]) - float(one[-1]["training_loss"])) > 0.01
    models = [
        torch.load(tmp_path / folder / "checkpoints" / "resnet8-seed3.pt", weights_only=True)
        for folder in ("1", "2")
    ]
    for key, value in models[0]["model"].items():
        torch.testing.assert_close(models[1]["model"][key], value, rtol=1e-4, atol=1e-4, msg=key)


def test_deepening_changes_no_result_and_freezing_no_weight() -> None:
    torch.manual_seed(0)
    shallow = cifar.resnet(8)
    x = torch.randn(16, 3, 12, 12)
    for _ in range(3):
        shallow(x)  # running statistics of their own
    shallow.eval()
    for freeze in (False, True):
        deep = progressive_deepening.deepen(shallow, cifar.resnet(20), freeze)
        with torch.no_grad():
            assert torch.equal(deep.eval()(x), shallow(x))
        old = {name for name, _ in shallow.named_parameters()} - {"fc.weight", "fc.bias"}
        trained = {name for name, p in deep.named_parameters() if p.requires_grad}
        assert trained.isdisjoint(old) == freeze
        before = {name: v.clone() for name, v in deep.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in deep.parameters() if p.requires_grad], 0.1)
        deep.train()(x).square().sum().backward()
        optimizer.step()
        changed = {n for n, v in deep.state_dict().items() if not torch.equal(v, before[n])}
        assert {"fc.weight", "layer1.1.bn2.weight", "layer3.2.bn2.running_var"} <= changed
        kept = {name for name in shallow.state_dict() if not name.startswith("fc.")}
        assert changed.isdisjoint(kept) == freeze


def test_frozen_layers_stay_frozen_while_training(finished: dict[str, Path]) -> None:
    folder = finished["progressive_deepening"] / "checkpoints"
    base, frozen, free = (
        torch.load(folder / f"{name}-seed0.pt", weights_only=True)["model"]
        for name in ("resnet8-first-half", "resnet8-to-14-frozen", "resnet8-to-14")
    )
    for key, value in base.items():
        if not key.startswith("fc."):
            assert torch.equal(frozen[key], value), key
    assert not torch.equal(free["conv1.weight"], base["conv1.weight"])


def test_a_deepened_run_is_the_first_half_and_the_second(finished: dict[str, Path]) -> None:
    history = runs(finished["progressive_deepening"])
    whole, first, second = (
        int(history[f"{name}-seed0"][-1]["iteration"])
        for name in ("resnet14", "resnet8-first-half", "resnet8-to-14")
    )
    assert whole == first + second


def place(out: Path, **changes: Any) -> launch.Launch:
    facts = {"data": None, "out": out, "device": torch.device("cpu"), "dtype": torch.float32}
    facts |= {"seed": 0, "workers": 0, "quick": True, "checkpoint_seconds": 30.0}
    return launch.Launch(**{**facts, **changes})


def test_evaluation_by_hand(tmp_path: Path) -> None:
    class Labels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """Ranks class k-th where the image's first pixel says k."""
            return -(x[:, 0, 0, :1] - torch.arange(10)).abs()

    # Labels 0 to 6; said is 0, so label k is ranked k-th.
    pairs = [(torch.zeros(3, 2, 2), label) for label in range(7)]
    found = training.evaluate(Labels(), pairs, lambda image: image, place(tmp_path), batch=3)
    assert found["test_error"] == pytest.approx(100 * 6 / 7)
    assert found["test_top5_error"] == pytest.approx(100 * 2 / 7)
    logits = -torch.arange(10.0).expand(7, 10)
    loss = nn.functional.cross_entropy(logits, torch.arange(7))
    assert found["test_loss"] == pytest.approx(float(loss))


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file"
    checkpoint.write_whole(path, lambda part: part.write_text("old"))

    def stop(part: Path) -> None:
        part.write_text("half of the ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_whole(path, stop)
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "degradation",
            ["--iterations", "13"],
            r"plain8-seed0.pt is of another run: its iterations is 12, here it is 13",
        ),
        # Its runs' names do not say their seed.
        (
            "over_1000_layers",
            ["--seed", "1"],
            r"its seed is 0, here it is 1; delete it to begin anew",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    name: str,
    arguments: list[str],
    message: str,
    finished: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = importlib.import_module(name).main
    given = ["--quick", "--device", "cpu", "--out", str(finished[name])]
    assert main([*given, *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_corrupt_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "checkpoints" / "plain8-seed0.pt"
    path.parent.mkdir()
    path.write_bytes(b"PK\x03\x04 cut off")
    main = importlib.import_module("degradation").main
    assert main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert f"{path} cannot be read" in message
    assert "delete it" in message


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x[:, :10] * torch.nan)
    main = importlib.import_module("degradation").main
    monkeypatch.setattr(cifar, "plain", lambda depth, **_: Bare())
    assert main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "plain8-seed0: the loss at iteration 1 is nan" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints" / "plain8-seed0.pt").exists()


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3)
        self.linear = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).mean((2, 3)))


def test_a_batch_must_divide_among_processes(tmp_path: Path) -> None:
    assert launch.share(12, place(tmp_path, world=4)) == 3
    with pytest.raises(ExperimentError, match="a batch of 10 does not divide among 4 processes"):
        launch.share(10, place(tmp_path, world=4))


@pytest.mark.parametrize("device", ["tpu", "cuda:77"])
def test_a_device_that_is_not_there_is_refused(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("cifar").main(["--quick", "--device", device])
    assert stopped.value.code == 2
    assert f"argument --device: '{device}' is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("imagenet", ["--model", "resnet19"], "resnet_fused has no network of that name"),
        ("imagenet", ["--model", "ResNet"], "resnet_fused has no network of that name"),
        ("progressive_deepening", ["--depths", "14", "8"], "the second must be the deeper one"),
        ("cifar", ["--depths", "21"], "6n+2 layers (8, 14, 20, ...), and 21 is not such a number"),
        ("cifar", ["--batch", "300"], "a batch of 300 needs as many images; there are 256"),
    ],
)
def test_bad_options_are_explained(
    name: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = importlib.import_module(name).main
    assert main(["--quick", "--device", "cpu", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
