"""The benchmark, end to end on a tiny input: what it records, and that its gate holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision", reason="the benchmark's peers are torchvision's models")
pytest.importorskip("skimage", reason="the benchmark's photographs come with scikit-image")

import baselines
import layers as layers_
import throughput
import torchvision
import training
from baselines import Baseline, Call, Task
from harness import inputs
from harness.comparison import Comparison, Entry, table
from harness.measure import Peaks, floor_seconds, in_turn, times_of
from harness.results import ROOT

from resnet_fused import complexity
from resnet_fused.complexity import Pass
from resnet_fused.numerics import relative_error

TINY = ["--arch", "resnet18", "--size", "64", "--device", "cpu", "--dtype", "float32"]
ROUNDS = 2


# Baselines of known merit; workers import them from here.


def build_exact(task: Task) -> Call:
    model = task.torchvision(torch.float64)
    return lambda: model(task.images.double()).float()


def build_wrong(task: Task) -> Call:
    model = task.torchvision()
    return lambda: model(task.images) * 1.001


def build_missing(task: Task) -> Call:
    raise baselines.UnavailableError("nobody wrote it; pip install it")


def build_broken(task: Task) -> Call:
    raise RuntimeError("it broke\nin two lines")


def build_dying(task: Task) -> Call:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def build_hanging(task: Task) -> Call:
    time.sleep(600)
    raise AssertionError("unreachable")


def build_telling_its_cache(task: Task) -> Call:
    raise baselines.UnavailableError(os.environ["RESNET_FUSED_CACHE_DIR"])


def build_int8(task: Task) -> Call:
    return baselines.int8(task)


EAGER = next(c for c in baselines.BASELINES if c.key == "eager")
EXACT = Baseline("exact", "exact", build_exact, ours=True)
WRONG = Baseline("wrong", "wrong", build_wrong, ours=True)
OTHERS = (
    Baseline("far-off", "far off", build_wrong),
    Baseline("int8", "in fewer bits", build_int8, bound=0.2),
    Baseline("too-few-bits", "in too few bits", build_int8, bound=1e-3),
    Baseline("missing", "missing", build_missing),
    Baseline("broken", "broken", build_broken),
    Baseline("dying", "dying", build_dying),
    Baseline("slow", "slow", build_exact, slow=True),
    Baseline("elsewhere", "elsewhere", build_exact, devices=("cuda",)),
)


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, dict[str, Any]]]]:
    """The whole record, and each comparison's entries by key."""
    record = json.loads(path.read_text())
    return record, [{e["key"]: e for e in c["entries"]} for c in record["comparisons"]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Exit code and folder of a run of every kind of baseline."""
    folder = tmp_path_factory.mktemp("benchmark")
    files = ["--json", str(folder / "out.json"), "--plot", str(folder / "plots" / "out.png")]
    arguments = [*TINY, "--batch", "2", "--rounds", str(ROUNDS), "--quick", "--new-batch", *files]
    return throughput.main(arguments, (EXACT, EAGER, *OTHERS)), folder


def test_record_holds_all_samples_and_what_follows_from_them(finished: tuple[int, Path]) -> None:
    code, folder = finished
    record, (entries,) = read(folder / "out.json")
    assert code == 0
    for key in ("exact", "eager"):
        entry = entries[key]
        assert entry["status"] == "measured"
        assert len(entry["rounds"]) == ROUNDS
        assert all(len(times) >= 2 and min(times) > 0 for times in entry["rounds"])
        rates = [2 * len(times) / sum(times) for times in entry["rounds"]]
        assert entry["rate"] == pytest.approx(sum(rates) / ROUNDS)  # the median of two
        assert min(rates) <= entry["rate_p10"] <= entry["rate_p90"] <= max(rates)
        assert entry["latency_p50"] <= entry["latency_p99"]
        assert entry["memory"] > 50e6
        assert entry["cold_start"] > 0
        assert entry["new_batch"] > 0
        floor = record["comparisons"][0]["floor"]
        assert entry["floor_share"] == pytest.approx(floor * entry["rate"] / 2)
    assert entries["eager"]["speedup"] == pytest.approx(
        entries["exact"]["rate"] / entries["eager"]["rate"]
    )
    assert entries["exact"]["error"] < entries["eager"]["error"] < 1e-4
    assert record["machine"]["cores"] >= 1
    assert record["versions"]["torch"]
    assert record["options"]["batch"] == [2]
    assert record["photographs"][0] == "chelsea"
    assert {"commit", "dirty", "date", "load_average"} <= record.keys()


def test_who_cannot_run_is_listed_with_the_reason(finished: tuple[int, Path]) -> None:
    record, (entries,) = read(finished[1] / "out.json")
    found = {key: (e["status"], e["reason"]) for key, e in entries.items() if e["rate"] is None}
    assert found.pop("far-off")[0] == "wrong"
    status, reason = found.pop("too-few-bits")
    assert status == "wrong"
    assert reason.endswith("allowed 1.00e-03")
    assert found == {
        "missing": ("unavailable", "nobody wrote it; pip install it"),
        "broken": ("failed", "RuntimeError: it broke in two lines"),
        "dying": ("failed", "process died of SIGKILL (out of memory?)"),
        "slow": ("unavailable", "takes long to build; not in --quick"),
    }
    comparison = record["comparisons"][0]
    rows = [Entry(**entry) for entry in comparison.pop("entries")]
    text = table(Comparison(entries=rows, **comparison))
    assert "failed: broken – RuntimeError: it broke in two lines" in text
    assert "1.00×" in text
    assert "in fewer bits: in fewer bits than float32, error up to 2.0e-01 allowed" in text


def test_what_computes_in_fewer_bits_has_its_own_bound_and_no_speedup(
    finished: tuple[int, Path],
) -> None:
    _, (entries,) = read(finished[1] / "out.json")
    int8 = entries["int8"]
    assert int8["status"] == "measured"
    assert 1e-3 < int8["error"] <= int8["bound"] == 0.2
    assert int8["rate"] > 0
    assert int8["speedup"] is None


@pytest.mark.parametrize(("bound", "speedup"), [(None, None), (0.2, 2.0)])
def test_speedups_over_fewer_bits_need_ours_to_have_them(
    bound: float | None, speedup: float | None
) -> None:
    ours = Entry("a", "ours", True, bound, "measured", rounds=[[1.0]])
    peer = Entry("b", "peer", False, 0.2, "measured", rounds=[[2.0]])
    Comparison("resnet50", "cpu", "float32", 1, 224, [ours, peer]).summarise()
    assert (ours.speedup, peer.speedup) == (1.0, speedup)


def test_chart_is_drawn(finished: tuple[int, Path]) -> None:
    from PIL import Image

    image = Image.open(finished[1] / "plots" / "out.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(2**24) or []}
    assert (0xD9, 0x48, 0x0F) in colours  # a bar of ours
    assert (0xAD, 0xB5, 0xBD) in colours  # a bar of a peer


def test_red_gate_states_no_speedup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = [*TINY, "--batch", "1", "--rounds", "1", "--json", str(out)]
    code = throughput.main(arguments, (WRONG, EXACT, EAGER))
    _, (entries,) = read(out)
    assert code == 1
    assert entries["wrong"]["status"] == "wrong"
    assert entries["wrong"]["error"] == pytest.approx(1e-3, rel=0.01)
    assert entries["wrong"]["rounds"] == entries["exact"]["rounds"] == []
    assert entries["eager"]["rate"] > 0
    assert all(entry["speedup"] is None for entry in entries.values())
    assert "RED GATE" in capsys.readouterr().out


def test_one_that_never_ends_costs_its_own_time_only(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = [*TINY, "--batch", "1", "--rounds", "1", "--answer-seconds", "20"]
    hanging = Baseline("hanging", "hanging", build_hanging)
    assert throughput.main([*arguments, "--json", str(out)], (EXACT, hanging)) == 0
    _, (entries,) = read(out)
    assert entries["exact"]["rate"] > 0
    assert entries["hanging"]["reason"] == "no answer within 20 s"


def test_each_is_timed_once_before_the_next_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who stops the run while a peer compiles finds ours measured."""
    build = throughput._Race._build

    def interrupted(race: throughput._Race, baseline: Baseline, *arguments: Any) -> None:
        if baseline.key == "eager":
            raise KeyboardInterrupt
        build(race, baseline, *arguments)

    monkeypatch.setattr(throughput._Race, "_build", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "out.json"
    arguments = [*TINY, "--batch", "1", "--rounds", "5", "--json", str(out)]
    try:
        assert throughput.main(arguments, (EXACT, EAGER)) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    _, (entries,) = read(out)
    assert entries["exact"]["rate"] > 0
    assert entries["eager"]["rate"] is None


@pytest.mark.parametrize("warm", [True, False])
def test_caches_are_empty_unless_asked_for(
    warm: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", "the machine's own")
    out = tmp_path / "out.json"
    teller = Baseline("teller", "teller", build_telling_its_cache)
    arguments = [*TINY, "--batch", "1", "--rounds", "1", "--json", str(out)]
    arguments += ["--ours", "exact"] + ["--warm"] * warm
    assert throughput.main(arguments, (EXACT, WRONG, teller)) == 0
    _, (entries,) = read(out)
    assert list(entries) == ["exact", "teller"]  # of ours, those that were asked for
    assert (entries["teller"]["reason"] == "the machine's own") == warm
    assert (entries["exact"]["cold_start"] is None) == warm


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.thorough)]
)
def test_interrupt_keeps_what_was_measured(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if run in the background
    out = tmp_path / "out.json"
    time_round = throughput._Race._time

    def interrupted(race: throughput._Race, entry: Entry) -> None:
        if entry.rounds:
            signal.raise_signal(number)
        time_round(race, entry)

    monkeypatch.setattr(throughput._Race, "_time", interrupted)
    arguments = [*TINY, "--batch", "1", "--rounds", "5", "--json", str(out)]
    try:
        assert throughput.main(arguments, (EXACT,)) == 130
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    record, (entries,) = read(out)
    assert record["interrupted"]
    assert len(entries["exact"]["rounds"]) == 1
    assert entries["exact"]["rate"] > 0


def test_program_measures_our_cpu_backend(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    program = [sys.executable, str(ROOT / "benchmarks/throughput.py"), *TINY]
    options = ["--batch", "1", "2", "--rounds", "1", "--peers", "none", "--json", str(out)]
    done = subprocess.run([*program, *options], capture_output=True, text=True)
    record, comparisons = read(out)
    # On so small a net whose rounding errors are smaller is chance; that the gate acts on it isn't.
    green = True
    for comparison, entries in zip(record["comparisons"], comparisons, strict=True):
        assert list(entries) == ["cpu", "cpu-frozen", "cpu-streams"]
        ours, frozen, streams = entries.values()
        assert ours["error"] is not None, ours["reason"]
        assert ours["error"] < 2 * comparison["eager_error"]
        assert frozen["error"] == ours["error"]
        if comparison["batch"] == 1:
            assert "one a core" in streams["reason"]
        else:
            assert streams["error"] == ours["error"]
        right = ours["error"] <= comparison["eager_error"]
        for entry in (ours, frozen):
            assert entry["status"] == ("measured" if right else "wrong")
            assert (entry["speedup"] is None) == (not right)
        if right:
            speedups = [entry["speedup"] for entry in entries.values()]
            assert min(speedup for speedup in speedups if speedup is not None) == 1.0
        green = green and right
    assert [comparison["batch"] for comparison in record["comparisons"]] == [1, 2]
    assert done.returncode == (0 if green else 1), done.stderr
    assert "resnet18 · float32 · batch 2 · 64×64 · cpu" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "nobody"], "invalid choice: 'nobody'"),
        (["--arch", "alexnet"], "invalid choice: 'alexnet'"),
        (["--arch", "ResNet"], "invalid choice: 'ResNet'"),
        (["--device", "tpu"], "'tpu' is neither cpu nor cuda"),
        (["--device", "cuda:77"], "'cuda:77' is no GPU that PyTorch sees"),
        (["--batch", "0"], "'0' is not a number from 1"),
        (["--rounds", "-1"], "'-1' is not a number from 1"),
    ],
)
def test_bad_options_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        throughput.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (layers_, ["--arch", "cifar"], "invalid choice: 'cifar'"),
        (layers_, ["--batch", "0"], "'0' is not a number from 1"),
        (layers_, ["--device", "cuda:77"], "'cuda:77' is no GPU that PyTorch sees"),
        (training, ["--model", "ResNet"], "invalid choice: 'ResNet'"),
        (training, ["--size", "-3"], "'-3' is not a number from 1"),
    ],
)
def test_so_do_the_other_benchmarks(
    command: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_jax_computes_torchvisions_network(name: str) -> None:
    jax = pytest.importorskip("jax", reason="JAX is a peer where it is installed")
    from baselines import jax_resnet

    torch.manual_seed(0)
    state = inputs.make_state(name, None, torch.randn(4, 3, 64, 64))
    model = getattr(torchvision.models, name)().eval()
    model.load_state_dict(state)
    images = torch.randn(2, 3, 65, 97)
    with torch.inference_mode():
        logits = jax_resnet.call(model, images, jax.devices("cpu")[0])()
        eager = model(images)
        truth = model.double()(images.double())
    assert relative_error(logits, truth) < 2 * relative_error(eager, truth)


def test_empty_image_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main([*TINY, "--images", str(tmp_path)]) == 2
    assert f"--images {tmp_path} holds no" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"no image", b"\x89PNG\r\n\x1a\n, cut off"])
def test_a_file_that_is_no_image_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "cat.png").write_bytes(content)
    assert throughput.main([*TINY, "--images", str(tmp_path)]) == 2
    assert f"{tmp_path / 'cat.png'} cannot be read as an image" in capsys.readouterr().err


def test_weights_out_of_reach_name_their_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: Any, *arguments: Any, **options: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    assert throughput.main([*TINY, "--weights", "DEFAULT"]) == 2
    said = capsys.readouterr().err
    url = torchvision.models.ResNet18_Weights.DEFAULT.value.url
    assert f"cannot be had from {url} (URLError: <urlopen error no network>)" in said
    assert "pass its path" in said


def test_photographs_are_distinct_and_reproducible() -> None:
    def batch(size: int) -> torch.Tensor:
        preset = torchvision.models.ResNet50_Weights.DEFAULT.transforms()
        return inputs.preprocess(inputs.find(None), size, 64, preset).images

    images = batch(12)
    assert images.shape == (12, 3, 64, 64)
    assert torch.equal(images[:7], batch(7))
    distances = torch.pdist(images.flatten(1))
    assert distances.min() > 1
    assert -3 < images.min() < images.max() < 3  # normalised


def test_work_of_resnet50_by_hand() -> None:
    with torch.device("meta"):
        work = {found.name: found for found in complexity.passes(_resnet50(), 256, 224)}
    multiply_adds = sum(found.multiply_adds for found in work.values()) / 256
    assert multiply_adds == pytest.approx(4.089e9, rel=1e-4)
    traffic = 2 * sum(found.elements for found in work.values()) / 256
    weights = 2 * sum(p.numel() for p in _resnet50().parameters() if p.dim() > 1) / 256
    pooled = 2 * (49 + 1) * 2048  # average pool
    # 50.6 MB with the stem's convolution written and read, and strided projections reading all.
    stem = 2 * 2 * 112**2 * 64
    skipped = 2 * 0.75 * (56**2 * 256 + 28**2 * 512 + 14**2 * 1024)
    assert traffic - weights - pooled == pytest.approx(50.6e6 - stem - skipped, rel=1e-3)
    # 1×1, 64 -> 256 at 56×56, and the projection 64 -> 256 of the block's input beside it.
    pixels = 256 * 56 * 56
    assert work["layer1.0.conv3"] == Pass(
        "layer1.0.conv3",
        pixels * (64 + 64) * 256,
        pixels * (64 + 64 + 256),
        (64 + 64) * 256,
    )
    # 3×3 with stride 2, 128 -> 128, and an identity block's end, which reads its shortcut.
    assert work["layer2.0.conv2"].elements == 256 * 128 * (56**2 + 28**2) + 9 * 128**2
    assert work["layer2.1.conv3"].elements == 256 * 28**2 * (128 + 512 + 512) + 128 * 512
    assert "layer2.0.downsample.0" not in work


def _resnet50() -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = torchvision.models.resnet50().eval()
    return model


def test_floor_takes_the_larger_of_memory_and_arithmetic() -> None:
    peaks = Peaks(bandwidth=100.0, arithmetic=1000.0)
    memory_bound, compute_bound = Pass("a", 5, 40, 10), Pass("b", 2500, 40, 10)
    assert floor_seconds([memory_bound], peaks, 2) == 1.0
    assert floor_seconds([compute_bound], peaks, 2) == 5.0
    assert floor_seconds([memory_bound, compute_bound], peaks, 2) == 6.0


def test_another_one_begins_each_round() -> None:
    assert "".join(in_turn("abc", range(1, 4))) == "bcacababc"


def test_summary_by_hand() -> None:
    entry = Entry("a", "a", ours=True, status="measured")
    entry.rounds = [[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]]
    Comparison("resnet18", "cpu", "float32", 8, 64, [entry], floor=0.5).summarise()
    assert entry.rate == 4.0
    assert entry.rate_p10 == pytest.approx(2.4)
    assert entry.rate_p90 == pytest.approx(7.2)
    assert entry.latency_p50 == 2.0
    assert entry.latency_p99 == 4.0
    assert entry.floor_share == 0.25


def test_a_rest_before_each_call_is_not_counted() -> None:
    start = time.perf_counter()
    times = times_of(lambda: None, torch.device("cpu"), 3, rest=0.05)
    assert time.perf_counter() - start > 0.15
    assert len(times) == 3
    assert min(times) < 0.05
