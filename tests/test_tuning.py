"""The tuning cache of the Triton backend: what it keeps, and that nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from resnet_fused import settings
from resnet_fused.backends.triton import convolution, tuning
from resnet_fused.backends.triton.launching import Machine
from resnet_fused.backends.triton.tuning import Config, Tuner, TuningCache, batch_bucket

SMALL = Config((16, 32, 64), 4, 2)
LARGE = Config((128, 256, 64), 8, 3)
GPU = torch.device("cuda", 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "tuning.json"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a Tuner believe in a GPU, without launching anything on it."""
    monkeypatch.setenv("RESNET_FUSED_TUNE", "on")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary 1000")


def timed(times: dict[Config, float], runs: list[Config]) -> Callable[..., float]:
    """A stand-in for `do_bench` that knows each candidate's time and notes what ran."""

    def do_bench(run: Callable[[], object], **options: object) -> float:
        run()
        return times[runs[-1]]

    return do_bench


def test_entries_survive_the_process(path: Path) -> None:
    cache = TuningCache(path)
    assert cache.get("a") is None
    cache.put("a", SMALL)
    cache.put("b", LARGE)
    assert TuningCache(path).get("a") == SMALL
    assert TuningCache(path).get("b") == LARGE
    assert TuningCache(path).get("c") is None


def test_a_writer_keeps_what_another_wrote_meanwhile(path: Path) -> None:
    first, second = TuningCache(path), TuningCache(path)
    assert first.get("x") is None
    assert second.get("x") is None
    first.put("a", SMALL)
    second.put("b", LARGE)
    fresh = TuningCache(path)
    assert (fresh.get("a"), fresh.get("b")) == (SMALL, LARGE)
    assert second.get("a") == SMALL


def _write_many(path: Path, writer: int) -> None:
    cache = TuningCache(path)
    for entry in range(20):
        cache.put(f"{writer}-{entry}", Config((writer + 1, entry + 1), 4, 2))


def test_concurrent_processes_lose_nothing(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, i)) for i in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            json.loads(path.read_text())  # a reader never sees half a file
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    cache = TuningCache(path)
    for i in range(4):
        for entry in range(20):
            assert cache.get(f"{i}-{entry}") == Config((i + 1, entry + 1), 4, 2)
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".lock"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"entries": {"a": [[16, 32',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'{"version": 7}',
        b'{"entries": {"a": [[16, "32"], 4, 2]}}',
        b'{"entries": {"a": [[16, -32], 4, 2]}}',
        b'{"entries": {"a": 5}}',
    ],
    ids=["empty", "cut", "binary", "list", "other format", "text", "negative", "number"],
)
def test_a_corrupt_file_is_set_aside_with_one_warning(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    cache = TuningCache(path)
    with pytest.warns(UserWarning, match=r"tuning\.corrupt") as caught:
        assert cache.get("a") is None
    assert len(caught) == 1
    assert path.with_suffix(".corrupt").read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put("a", SMALL)
        assert TuningCache(path).get("a") == SMALL


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = TuningCache(tmp_path / "file" / "tuning.json")
    with pytest.warns(UserWarning, match="RESNET_FUSED_CACHE_DIR"):
        cache.put("a", SMALL)
    assert cache.get("a") == SMALL


def test_an_interrupted_write_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TuningCache(path)
    cache.put("a", SMALL)

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dump", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.put("b", LARGE)
    monkeypatch.undo()
    assert TuningCache(path).get("a") == SMALL
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".lock"]


@pytest.mark.usefixtures("gpu")
def test_the_fastest_candidate_is_measured_once_and_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs: list[Config] = []
    monkeypatch.setattr(tuning, "do_bench", timed({SMALL: 2.0, LARGE: 1.0}, runs))

    def choose(tuner: Tuner, *key: object) -> Config:
        return tuner.choose(key, GPU, lambda: [SMALL, LARGE], runs.append)

    tuner = Tuner()
    assert choose(tuner, "conv", 1) == LARGE
    assert runs == [SMALL, LARGE]
    assert choose(tuner, "conv", 1) == LARGE
    assert choose(Tuner(), "conv", 1) == LARGE  # another process: from the file
    assert runs == [SMALL, LARGE]
    choose(tuner, "conv", 2)
    assert len(runs) == 4
    (file,) = settings.cache_directory().glob("*.json")
    assert "Imaginary 1000|triton " in file.read_text()


@pytest.mark.usefixtures("gpu")
def test_a_stored_choice_that_is_no_candidate_any_more_is_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs: list[Config] = []
    monkeypatch.setattr(tuning, "do_bench", timed({SMALL: 2.0, LARGE: 1.0}, runs))
    key = ("renewed",)
    assert Tuner().choose(key, GPU, lambda: [LARGE], runs.append) == LARGE
    assert Tuner().choose(key, GPU, lambda: [SMALL], runs.append) == SMALL
    assert runs == [LARGE, SMALL]


@pytest.mark.usefixtures("gpu")
def test_candidates_that_do_not_fit_the_gpu_are_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime.errors import OutOfResources

    def do_bench(run: Callable[[], object], **options: object) -> float:
        run()
        return 1.0

    def launch(config: Config) -> None:
        if config == LARGE:
            raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(tuning, "do_bench", do_bench)
    assert tuning.fastest([LARGE, SMALL], launch) == SMALL


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("reason", ["off", "capturing", "out of memory"])
def test_the_rule_decides_where_measuring_cannot(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def do_bench(run: Callable[[], object], **options: object) -> float:
        if reason == "out of memory":
            raise torch.OutOfMemoryError
        raise AssertionError("measured")

    monkeypatch.setattr(tuning, "do_bench", do_bench)
    if reason == "off":
        monkeypatch.setenv("RESNET_FUSED_TUNE", "off")
    if reason == "capturing":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tuner = Tuner()
    for _ in range(2):
        chosen = tuner.choose((reason,), GPU, lambda: [SMALL, LARGE], lambda config: None)
        assert chosen == SMALL
    if reason != "off":  # nothing was recorded: once it can be, it is measured
        monkeypatch.undo()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(settings, "tuning_enabled", lambda: True)
        monkeypatch.setattr(tuner, "_look_up_or_measure", lambda *arguments: LARGE)
        assert tuner.choose((reason,), GPU, lambda: [SMALL, LARGE], lambda c: None) == LARGE


def test_batches_share_a_bucket_up_to_a_power_of_two() -> None:
    assert [batch_bucket(n) for n in (1, 2, 3, 4, 5, 200, 256, 257)] == [
        1, 2, 4, 4, 8, 256, 256, 512,
    ]  # fmt: skip


H200 = Machine(132, 227 * 1024)


def test_candidates_fit_the_machine_and_the_shape() -> None:
    gemm = convolution.Gemm(rows=256 * 56 * 56, columns=64, channels=64, taps=9)
    small = Machine(20, 99 * 1024)
    for limits in (H200, small):
        found = convolution.candidates(gemm, 2, "ieee", limits)
        assert len(found) > 1
        assert len(set(found)) == len(found)
        for (block_m, block_n, block_c), _, stages in found:
            assert block_n <= 64
            assert block_c <= 64
            assert stages * (block_m + block_n) * block_c * 2 <= limits.shared_bytes


def test_the_rule_spreads_small_problems_over_the_processors() -> None:
    gemm = convolution.Gemm(rows=49, columns=2048, channels=512)
    (block_m, block_n, _), _, _ = convolution.candidates(gemm, 2, "ieee", H200)[0]
    assert -(-49 // block_m) * -(-2048 // block_n) >= 64


def test_the_rule_takes_large_tiles_for_large_problems() -> None:
    gemm = convolution.Gemm(rows=256 * 14 * 14, columns=256, channels=256, taps=9)
    assert convolution.candidates(gemm, 2, "ieee", H200)[0] == LARGE
