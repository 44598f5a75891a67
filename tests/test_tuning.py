"""The measured choice of kernel: what is chosen, what is kept, and that nothing is lost."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from resnet_fused.backends.tuning import Tuner, TuningCache, batch_bucket, describe, watch

from resnet_fused import settings
from resnet_fused.backends import tuning
from resnet_fused.parameters import BatchNorm, Convolution

FIRST = {"small": 2e-3, "large": 1e-3, "odd": None}
SECOND = {"small": 3e-3}
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


class Stopwatch:
    """Stands for the GPU and its clock: runs calls, and knows how long each candidate takes."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.runs: list[str] = []
        self.measured = 0

    def launch(self, candidate: str) -> str:
        self.runs.append(candidate)
        return f"by {candidate}"

    def measure(self, call: Callable[[], object], device: torch.device) -> float:
        assert device == GPU
        call()
        self.measured += 1
        return self.seconds[self.runs[-1]]

    def tuner(self) -> Tuner:
        return Tuner("tests", self.measure)

    def run(self, tuner: Tuner, *key: object, candidates: tuple[str, ...] = ()) -> str:
        """The candidate that the tuner runs for the key."""
        options = list(candidates or self.seconds)
        result = tuner.run(key, GPU, lambda: options, self.launch)
        assert result == f"by {self.runs[-1]}"
        return self.runs[-1]


def test_entries_survive_the_process(path: Path) -> None:
    cache = TuningCache(path)
    assert cache.get("a") is None
    cache.put("a", FIRST)
    cache.put("b", SECOND)
    assert TuningCache(path).get("a") == FIRST
    assert TuningCache(path).get("b") == SECOND
    assert TuningCache(path).get("c") is None


def test_a_writer_keeps_what_another_wrote_meanwhile(path: Path) -> None:
    first, second = TuningCache(path), TuningCache(path)
    assert first.get("x") is None
    assert second.get("x") is None
    first.put("a", FIRST)
    second.put("b", SECOND)
    fresh = TuningCache(path)
    assert (fresh.get("a"), fresh.get("b")) == (FIRST, SECOND)
    assert second.get("a") == FIRST


def _write_many(path: Path, writer: int) -> None:
    cache = TuningCache(path)
    for entry in range(20):
        cache.put(f"{writer}-{entry}", {f"candidate {writer}": float(entry)})


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
            assert cache.get(f"{i}-{entry}") == {f"candidate {i}": float(entry)}
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".lock"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"entries": {"a": [[16, 32',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'{"version": 7}',
        b'{"entries": {"a": {"small": "32"}}}',
        b'{"entries": {"a": {"small": -1.0}}}',
        b'{"entries": {"a": {"small": NaN}}}',
        b'{"entries": {"a": 5}}',
    ],
    ids=["empty", "cut", "binary", "list", "other format", "text", "negative", "nan", "number"],
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
        cache.put("a", FIRST)
        assert TuningCache(path).get("a") == FIRST


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = TuningCache(tmp_path / "file" / "tuning.json")
    with pytest.warns(UserWarning, match="RESNET_FUSED_CACHE_DIR"):
        cache.put("a", FIRST)
    assert cache.get("a") == FIRST


def test_an_interrupted_write_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TuningCache(path)
    cache.put("a", FIRST)

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dump", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.put("b", SECOND)
    monkeypatch.undo()
    assert TuningCache(path).get("a") == FIRST
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".lock"]


@pytest.mark.usefixtures("gpu")
def test_the_fastest_candidate_is_measured_once_and_remembered() -> None:
    clock = Stopwatch(small=2.0, large=1.0)
    tuner = clock.tuner()
    assert clock.run(tuner, "conv", 1) == "large"
    assert clock.runs == ["small", "large", "large"]
    assert clock.run(tuner, "conv", 1) == "large"
    assert clock.run(clock.tuner(), "conv", 1) == "large"  # another process: from the file
    assert clock.measured == 2
    clock.run(tuner, "conv", 2)
    assert clock.measured == 4
    (file,) = settings.cache_directory().glob("*.json")
    (key, *_) = [k for k in json.loads(file.read_text())["entries"] if k.endswith("tests|conv|1")]
    assert key.startswith(f"Imaginary 1000|resnet_fused 0.1.0|torch {torch.__version__}|triton ")


@pytest.mark.usefixtures("gpu")
def test_what_was_measured_on_another_machine_or_by_another_version_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Stopwatch(small=2.0, large=1.0)
    assert clock.run(clock.tuner(), "moved") == "large"
    clock.seconds["small"] = 0.5
    assert clock.run(clock.tuner(), "moved") == "large"
    for place, name, value in (
        (torch.cuda, "get_device_name", lambda device: "Imaginary 2000"),
        (tuning, "__version__", "9.9"),
        (torch, "__version__", "9.9"),
        (tuning.metadata, "version", lambda package: "9.9"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            assert clock.run(clock.tuner(), "moved") == "small"
    assert clock.measured == 2 * 5
    assert clock.run(Tuner("another", clock.measure), "moved") == "small"


@pytest.mark.usefixtures("gpu")
def test_a_new_candidate_is_measured_and_a_lost_one_is_not_chosen() -> None:
    clock = Stopwatch(small=2.0, middle=3.0, large=1.0)
    assert clock.run(clock.tuner(), "renewed", candidates=("small", "middle")) == "small"
    assert clock.run(clock.tuner(), "renewed") == "large"
    assert clock.measured == 2 + 3
    assert clock.run(clock.tuner(), "renewed", candidates=("small", "middle")) == "small"
    assert clock.run(clock.tuner(), "alone", candidates=("middle",)) == "middle"
    assert clock.measured == 2 + 3


@pytest.mark.usefixtures("gpu")
def test_candidates_that_cannot_run_are_passed_over() -> None:
    def launch(candidate: str) -> str:
        if candidate != "small":
            raise RuntimeError(f"{candidate} asks for too much shared memory")
        return candidate

    def measure(call: Callable[[], object], device: torch.device) -> float:
        call()
        return 1.0

    tuner = Tuner("tests", measure)
    with pytest.warns(UserWarning, match=r"'large' .* too much shared memory"):
        chosen = tuner.run(("too large",), GPU, lambda: ["large", "small"], launch)
    assert chosen == "small"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neither now nor from the file is it tried again
        again = Tuner("tests", measure)
        assert again.run(("too large",), GPU, lambda: ["large", "small"], launch) == "small"
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(RuntimeError, match=r"^huge asks"),
    ):
        tuner.run(("far too large",), GPU, lambda: ["huge", "large"], launch)
    (file,) = settings.cache_directory().glob("*.json")
    assert "far too large" not in file.read_text()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("reason", ["off", "deterministic", "capturing"])
def test_the_rule_decides_where_measuring_cannot(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Stopwatch(small=2.0, large=1.0)
    tuner = clock.tuner()
    with monkeypatch.context() as patch:
        if reason == "off":
            patch.setenv("RESNET_FUSED_TUNE", "off")
        if reason == "deterministic":
            patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        if reason == "capturing":
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for _ in range(2):
            assert clock.run(tuner, reason) == "small"
        assert clock.measured == 0
    assert clock.run(tuner, reason) == "large"  # nothing was recorded: once it can be
    with monkeypatch.context() as patch:
        if reason == "capturing":
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            assert clock.run(tuner, reason) == "large"  # what is known needs no measuring


@pytest.mark.usefixtures("gpu")
def test_the_rule_decides_for_this_process_where_memory_runs_out() -> None:
    clock = Stopwatch(small=2.0, large=1.0)
    attempts = []

    def measure(call: Callable[[], object], device: torch.device) -> float:
        attempts.append(call)
        raise torch.OutOfMemoryError

    tuner = Tuner("tests", measure)
    for _ in range(3):
        assert clock.run(tuner, "out of memory") == "small"
    assert len(attempts) == 1
    assert clock.run(clock.tuner(), "out of memory") == "large"


def test_on_the_cpu_the_rule_decides() -> None:
    tuner = Tuner("tests", lambda call, device: pytest.fail("measured"))
    for _ in range(2):
        chosen = tuner.run(("x",), torch.device("cpu"), lambda: [1, 2], lambda option: option)
        assert chosen == 1


@pytest.mark.timeout(60)  # where it waits for itself
@pytest.mark.usefixtures("gpu")
def test_a_candidate_may_have_a_choice_of_its_own() -> None:
    clock = Stopwatch(small=2.0, large=1.0, theirs=3.0)
    tuner = clock.tuner()

    def launch(candidate: str) -> str:
        if candidate == "ours":
            return clock.run(tuner, "within", candidates=("small", "large"))
        return clock.launch(candidate)

    def run() -> str:
        return tuner.run(("around",), GPU, lambda: ["ours", "theirs"], launch)

    assert run() == "large"
    with watch() as decisions:
        assert run() == "large"
    assert clock.measured == 4
    (decision,) = decisions
    assert (decision.key, decision.choice) == (("around",), "ours")
    assert decision.seconds == {"ours": 1.0, "theirs": 3.0}  # its own best choice made
    (part,) = decision.parts
    assert (part.key, part.choice) == (("within",), "large")
    assert part.parts == []
    run()
    assert decisions == [decision]


@pytest.mark.parametrize(("milliseconds", "calls"), [(4.0, 5), (1.0, 20), (0.001, 50)])
def test_a_measurement_is_the_median_of_calls_each_on_cold_caches(
    milliseconds: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU of events only, whose every third call takes ten times as long as the others."""
    events: list[str] = []
    now = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            events.append("event")
            self.time = now[0]

        def elapsed_time(self, end: Event) -> float:
            assert events[-1] == "wait"
            return end.time - self.time

    def call() -> None:
        events.append("call")
        now[0] += milliseconds * (10 if events.count("call") % 3 == 0 else 1)

    class Cache:
        def zero_(self) -> None:
            events.append("flush")
            now[0] += 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(tuning.torch, "empty", lambda *shape, **options: Cache())
    assert tuning.measure(call, GPU) == pytest.approx(milliseconds / 1e3)
    span = ["flush", "event", "call", "event"]
    assert events == ["call", *3 * span, "wait", *calls * span, "wait"]


def test_batches_share_a_bucket_up_to_a_power_of_two() -> None:
    assert [batch_bucket(n) for n in (1, 2, 3, 4, 5, 200, 256, 257)] == [
        1, 2, 4, 4, 8, 256, 256, 512,
    ]  # fmt: skip


def test_a_description_tells_apart_what_kernels_tell_apart() -> None:
    def images(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last)

    def of(x: torch.Tensor, weight: torch.Tensor, stride: int = 1, *others: object) -> object:
        return describe(x, Convolution(weight, (stride, stride)), *others)

    x, weight = images(5, 8, 6, 7), images(16, 8, 1, 1)
    same = of(x, weight)
    assert of(images(8, 8, 6, 7), weight) == same  # the batch's bucket
    bn = BatchNorm(torch.zeros(16), torch.ones(16), None, None)
    assert of(x, weight, 1, bn) == same
    odd = torch.zeros(16 * 8 + 1, dtype=torch.float16)[1:].view(16, 8, 1, 1)
    others = [
        of(images(9, 8, 6, 7), weight),
        of(images(5, 8, 7, 6), weight),
        of(x.contiguous(), weight),
        of(images(5, 16, 6, 7)[:, ::2], weight),
        of(images(5, 16, 6, 7)[:, :8], weight),
        of(images(5, 24, 6, 7)[:, :8], weight),
        of(x, images(24, 8, 1, 1)),
        of(x, odd),
        of(x, weight, 2),
        of(x, weight, 1, None),
        of(x, weight, 1, images(5, 16, 6, 7)),
        of(x.bfloat16(), weight.bfloat16()),
        of(x.float(), weight.float()),
    ]
    assert len({same, *others}) == 1 + len(others)
    titles = {"|".join(map(str, key)) for key in (same, *others)}  # as in the file
    assert len(titles) == 1 + len(others)
