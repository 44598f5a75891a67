"""The choice of a kernel: what is chosen, what is measured and kept, and what it may cost.

What excludes a candidate is in test_verify.py, which kernel families may run in test_families.py.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused import resnet50, settings, use_backend
from resnet_fused.backends import Candidate, autotune
from resnet_fused.backends.autotune import BUDGET_SECONDS, Tuner, batch_bucket, describe, signature
from resnet_fused.backends.autotune import measure as measure_module
from resnet_fused.backends.autotune.cache import FILE, Times, TuningCache
from resnet_fused.backends.bounded import Bounded
from resnet_fused.backends.reference import ReferenceBackend
from resnet_fused.parameters import BatchNorm, ConvBn, Convolution
from resnet_fused.reference import ops as reference

FIRST: Times = {"small": 2e-3, "large": 1e-3, "odd": "RuntimeError: too large"}
SECOND = {"small": 3e-3}
GPU = torch.device("cuda", 0)
MACHINE = ("Imaginary 1000", "driver 1", "build 1")


# The file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "tuning.json"


def test_entries_survive_the_process(path: Path) -> None:
    cache = TuningCache(path)
    assert cache.get("a") is None
    cache.put("a", FIRST)
    cache.put("b", SECOND)
    assert TuningCache(path).get("a") == FIRST
    assert TuningCache(path).get("b") == SECOND
    assert TuningCache(path).get("c") is None


def test_times_are_added_to_those_of_other_candidates(path: Path) -> None:
    TuningCache(path).put("a", FIRST)
    TuningCache(path).put("a", {"middle": 4e-3, "small": 5e-3})
    assert TuningCache(path).get("a") == {**FIRST, "middle": 4e-3, "small": 5e-3}


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
        cache.put("shared", {f"candidate {writer}": float(entry)})


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
    assert cache.get("shared") == {f"candidate {i}": 19.0 for i in range(4)}
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".lock"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"entries": {"a": [[16, 32',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'{"version": 7}',
        b'{"entries": {"a": {"small": null}}}',
        b'{"entries": {"a": {"small": -1.0}}}',
        b'{"entries": {"a": {"small": NaN}}}',
        b'{"entries": {"a": 5}}',
    ],
    ids=["empty", "cut", "binary", "list", "other format", "null", "negative", "nan", "number"],
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


# The key


def test_batches_share_a_bucket_up_to_a_power_of_two() -> None:
    assert [batch_bucket(n) for n in (1, 2, 3, 4, 5, 200, 256, 257)] == [
        1, 2, 4, 4, 8, 256, 256, 512,
    ]  # fmt: skip


def images(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last)


def batch_norm(mean: float = 0.0) -> BatchNorm:
    return BatchNorm(torch.full((16,), mean), torch.ones(16), None, None)


def layer_of(weight: Tensor, **window: Any) -> ConvBn:
    return ConvBn(Convolution(weight, **window), batch_norm())


X, WEIGHT = images(5, 8, 6, 7), images(16, 8, 1, 1)
LAYER = layer_of(WEIGHT)
RESIDUAL = images(5, 16, 6, 7)
SAME = {
    "the same again": (images(5, 8, 6, 7), layer_of(images(16, 8, 1, 1)), None, True),
    "the batch's bucket": (images(8, 8, 6, 7), LAYER, None, True),
    "batch norm's numbers": (X, LAYER._replace(bn=batch_norm(3.0)), None, True),
    "window as lists": (X, layer_of(WEIGHT, stride=[1, 1], padding=[0, 0]), None, True),
}
OTHERS = {
    "another bucket": (images(9, 8, 6, 7), LAYER, None, True),
    "another map": (images(5, 8, 7, 6), LAYER, None, True),
    "NCHW": (X.contiguous(), LAYER, None, True),
    "every second channel": (images(5, 16, 6, 7)[:, ::2], LAYER, None, True),
    "half the channels": (images(5, 16, 6, 7)[:, :8], LAYER, None, True),
    "a third of the channels": (images(5, 24, 6, 7)[:, :8], LAYER, None, True),
    "unaligned": (
        torch.zeros(1681, dtype=torch.float16)[1:].view(5, 6, 7, 8).permute(0, 3, 1, 2),
        LAYER,
        None,
        True,
    ),
    "more filters": (X, layer_of(images(24, 8, 1, 1)), None, True),
    "unaligned weight": (
        X,
        layer_of(torch.zeros(16 * 8 + 1, dtype=torch.float16)[1:].view(16, 8, 1, 1)),
        None,
        True,
    ),
    "stride": (X, layer_of(WEIGHT, stride=(2, 2)), None, True),
    "padding": (X, layer_of(WEIGHT, padding=(1, 1)), None, True),
    "dilation": (X, layer_of(WEIGHT, dilation=(2, 2)), None, True),
    "groups": (X, layer_of(images(16, 8, 1, 1), groups=2), None, True),
    "no ReLU": (X, LAYER, None, False),
    "residual": (X, LAYER, RESIDUAL, True),
    "strided residual": (X, LAYER, images(5, 16, 12, 14)[:, :, ::2, ::2], True),
    "a residual of another type": (X, LAYER, RESIDUAL.float(), True),
    "padded residual": (X, LAYER, images(5, 8, 6, 7), True),
    "bfloat16": (X.bfloat16(), layer_of(WEIGHT.bfloat16()), None, True),
    "float32": (X.float(), layer_of(WEIGHT.float()), None, True),
}
BASE = (X, LAYER, None, True)


def keys(arguments: Sequence[Any]) -> tuple[object, str]:
    """The key in this process, and that in the file."""
    return signature(arguments), "|".join(map(str, describe(arguments)))


@pytest.mark.parametrize("what", SAME)
def test_calls_that_take_a_kernel_the_same_time_share_a_key(what: str) -> None:
    assert keys(SAME[what]) == keys(BASE)


def test_calls_that_differ_for_a_kernel_have_keys_of_their_own() -> None:
    for found in zip(*map(keys, (BASE, *OTHERS.values())), strict=True):
        assert len(set(found)) == 1 + len(OTHERS)


def test_batches_too_large_for_32_bits_have_keys_of_their_own() -> None:
    meta = [torch.empty(n, 2**20, 32, 32, dtype=torch.float16, device="meta") for n in (3, 4)]
    assert meta[0].numel() >= 2**31
    assert len({keys((x, None)) for x in meta}) == 2


@pytest.mark.parametrize(
    "place",
    [torch.backends.cudnn.conv, torch.backends.cuda.matmul],
    ids=["convolutions", "products"],
)
def test_settings_of_tf32_count_for_float32_only(place: Any) -> None:
    before = place.fp32_precision
    try:
        place.fp32_precision = "ieee"
        half, single = keys(BASE), keys(OTHERS["float32"])
        place.fp32_precision = "tf32"
        assert keys(BASE) == half
        assert all(new != old for new, old in zip(keys(OTHERS["float32"]), single, strict=True))
    finally:
        place.fp32_precision = before


# The choice


class Machine:
    """A device on which each candidate takes the seconds that it is told to, on a clock that
    nothing else moves; CPU tensors count as lying there."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.ran: list[str] = []
        self.measured: list[str] = []
        self.environment: tuple[str, ...] = MACHINE
        self.refused: set[str] = set()  # families

    def tuner(self) -> Tuner:
        """As a new process has it."""
        return Tuner(
            measure=self.measure,
            passed=lambda family, device: family not in self.refused,
            environment=lambda device: self.environment,
            clock=lambda: self.now,
            device_type="cpu",
        )

    def launch(self, name: str) -> Callable[..., Tensor]:
        def run(x: Tensor, *others: Any) -> Tensor:
            self.ran.append(name)
            return x + 1

        return run

    def measure(self, call: Callable[[], object], device: torch.device) -> float:
        assert device == torch.device("cpu")
        call()
        name = self.ran[-1]
        self.measured.append(name)
        self.now += 1.0  # a compiler's, say
        return self.seconds[name]

    def candidates(self, *names: str) -> list[Candidate]:
        return [Candidate(name, self.launch(name)) for name in names or self.seconds]

    def choose(self, tuner: Tuner, x: Tensor | None = None, *names: str, op: str = "op") -> str:
        x = torch.ones(2, 3) if x is None else x
        listed = self.candidates(*names)
        return tuner.choose(op, (x,), lambda: listed, lambda x: x + 1).name


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("RESNET_FUSED_TUNE", "on")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def test_the_fastest_candidate_is_measured_once_and_remembered() -> None:
    machine = Machine(small=2.0, large=1.0)
    tuner = machine.tuner()
    for _ in range(2):
        assert machine.choose(tuner) == "large"
    assert machine.choose(machine.tuner()) == "large"  # another process: from the file
    assert machine.measured == ["small", "large"]
    machine.choose(machine.tuner(), torch.ones(2, 4))
    machine.choose(machine.tuner(), op="another")
    assert len(machine.measured) == 6
    entries = json.loads((settings.cache_directory() / FILE).read_text())["entries"]
    (title,) = [key for key in entries if "|op|torch.float32|2×3|" in key]
    assert title.startswith("Imaginary 1000|driver 1|build 1|op|")
    assert entries[title] == {"small": 2.0, "large": 1.0}


@pytest.mark.parametrize("part", range(len(MACHINE)))
def test_what_was_measured_on_another_machine_does_not_count(part: int) -> None:
    machine = Machine(small=2.0, large=1.0)
    assert machine.choose(machine.tuner()) == "large"
    machine.seconds["small"] = 0.5
    machine.environment = (*MACHINE[:part], "other", *MACHINE[part + 1 :])
    assert machine.choose(machine.tuner()) == "small"
    machine.environment = MACHINE
    assert machine.choose(machine.tuner()) == "large"


def test_a_new_candidate_is_measured_and_a_lost_one_is_not_chosen() -> None:
    machine = Machine(small=2.0, middle=3.0, large=1.0)
    x = torch.ones(2, 3)
    assert machine.choose(machine.tuner(), x, "small", "middle") == "small"
    assert machine.choose(machine.tuner()) == "large"
    assert machine.measured == ["small", "middle", "large"]
    assert machine.choose(machine.tuner(), x, "small", "middle") == "small"
    assert machine.choose(machine.tuner(), x, "middle") == "middle"
    assert len(machine.measured) == 3


def test_each_device_has_its_own_choice() -> None:
    tuner = Tuner()
    for device in ("cpu", "meta", "cpu"):
        x = torch.ones(2, 3, device=device)
        found = tuner.choose("op", (x,), lambda: [Candidate(device, abs)], abs)  # noqa: B023
        assert found.name == device


def test_calls_that_choose_among_others_are_told_apart() -> None:
    tuner = Tuner()
    x = torch.ones(2, 3)
    for among in ("ours", "theirs", "ours"):
        found = tuner.choose("op", (x,), lambda: [Candidate(among, abs)], abs, among=among)  # noqa: B023
        assert found.name == among


def test_sizes_that_never_repeat_take_bounded_memory() -> None:
    machine = Machine(small=2.0, large=1.0)
    tuner, x = machine.tuner(), torch.ones(1, 1)
    assert isinstance(tuner._chosen, Bounded)
    tuner._chosen = Bounded(limit=3)
    with tuner.ahead():
        for size in (1, 2, 3, 4, 5, 1):
            assert machine.choose(tuner, x.expand(1, size)) == "large"
            assert len(tuner._chosen) <= 3
    assert machine.measured == ["small", "large"] * 5  # the first one was forgotten and is known


@pytest.mark.parametrize("reason", ["off", "deterministic", "the CPU"])
def test_the_heuristic_decides_where_measuring_may_not(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(small=2.0, large=1.0)
    tuner = Tuner(measure=machine.measure) if reason == "the CPU" else machine.tuner()
    with monkeypatch.context() as patch:
        if reason == "off":
            patch.setenv("RESNET_FUSED_TUNE", "off")
        if reason == "deterministic":
            patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        for _ in range(2):
            assert machine.choose(tuner) == "small"
        assert machine.choose(tuner, op="known") == "small"
        assert machine.measured == []
    if reason != "the CPU":
        assert machine.choose(tuner) == "large"  # nothing was kept: once it may


def test_what_is_measured_does_not_count_where_results_must_be_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(small=2.0, large=1.0)
    tuner = machine.tuner()
    assert machine.choose(tuner) == "large"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert machine.choose(tuner) == "small"


def test_the_heuristic_takes_the_first_profitable_candidate() -> None:
    def choose(*profitable: bool) -> str:
        listed = [Candidate(str(i), abs, "", yes) for i, yes in enumerate(profitable)]
        return Tuner().choose("op", (torch.ones(2, 3),), lambda: listed, abs).name

    assert choose(True, True) == "0"
    assert choose(False, True, True) == "1"
    assert choose(False, False) == "1"  # the last one is PyTorch


def test_candidates_of_a_family_that_has_not_passed_are_neither_measured_nor_chosen() -> None:
    machine = Machine(ours=1.0, theirs=2.0)
    machine.refused.add("bad")
    ours, theirs = machine.candidates()
    x = torch.ones(2, 3)
    refused = [ours._replace(family="bad"), theirs]
    found = machine.tuner().choose("op", (x,), lambda: refused, abs)
    assert (found.name, machine.ran) == ("theirs", [])
    alone = machine.tuner().choose("alone", (x,), lambda: refused[:1], torch.abs)
    assert (alone.name, alone.launch) == ("pytorch", torch.abs)


def test_a_graph_capture_goes_by_what_is_known_and_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(small=2.0, large=1.0)
    tuner = machine.tuner()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for _ in range(2):
            assert machine.choose(tuner) == "small"
        assert machine.measured == []
    assert machine.choose(tuner) == "large"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for known in (tuner, machine.tuner()):
            assert machine.choose(known) == "large"
    assert len(machine.measured) == 2


@pytest.mark.parametrize(("ranks", "measured"), [(1, 2), (2, 0)])
def test_ranks_that_wait_for_each_other_do_not_measure(
    ranks: int, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    machine = Machine(small=2.0, large=1.0)
    tuner = machine.tuner()
    assert machine.choose(tuner) == ("large" if measured else "small")
    assert len(machine.measured) == measured
    with tuner.ahead():  # asked for, `tune` measures there too
        assert machine.choose(tuner) == "large"


def test_a_preferred_candidate_is_taken_where_it_is_listed() -> None:
    machine = Machine(small=2.0, large=1.0, ours=5.0)
    machine.refused.add("bad")
    tuner = machine.tuner()
    x = torch.ones(2, 3)
    small, large, ours = machine.candidates()
    listed = [small, large, ours._replace(family="bad")]

    def choose() -> str:
        return tuner.choose("op", (x,), lambda: listed, abs).name

    generation = tuner.generation
    with tuner.prefer("ours"):
        assert tuner.generation > generation
        inside = tuner.generation
        assert choose() == "ours"
        with tuner.prefer("missing"):
            assert choose() == "large"
        assert choose() == "ours"
        with (
            tuner.prefer("missing", only=True),
            pytest.raises(autotune.NotListedError, match="op has no candidate 'missing'"),
        ):
            choose()
        with tuner.prefer("missing"):
            assert choose() == "large"
    assert tuner.generation > inside
    assert choose() == "large"
    with pytest.raises(ZeroDivisionError), tuner.prefer("ours"):
        raise ZeroDivisionError
    assert choose() == "large"
    assert "ours" not in machine.ran


def test_decisions_are_watched_whether_new_or_remembered() -> None:
    machine = Machine(small=2.0, large=1.0)
    tuner = machine.tuner()
    machine.choose(tuner, op="before")
    with tuner.watch() as outer:
        machine.choose(tuner)
        with tuner.watch() as inner:
            machine.choose(tuner)
            machine.choose(tuner, op="before")
    machine.choose(tuner)
    assert [decision.op for decision in inner] == ["op", "before"]
    assert [decision.op for decision in outer] == ["op", "op", "before"]
    decision = outer[0]
    assert (decision.candidate.name, decision.times) == ("large", machine.seconds)
    assert decision.seconds() == 1.0
    assert list(map(str, decision.described))[:2] == ["torch.float32", "2×3"]
    with tuner.watch() as preferred, tuner.prefer("small"):
        machine.choose(tuner)
    assert preferred[0].times == {}
    assert preferred[0].seconds() is None


def test_a_candidate_may_be_made_of_ops_that_choose_in_turn() -> None:
    machine = Machine(small=2.0, large=1.0, layers=3.0, fused=4.0)
    tuner = machine.tuner()
    x = torch.ones(2, 3)

    def by_layers(x: Tensor) -> Tensor:
        machine.choose(tuner, x, "small", "large", op="layer")
        return machine.launch("layers")(x)

    fused = machine.candidates("fused")[0]

    def choose() -> str:
        listed = [fused, Candidate("layers", by_layers)]
        return tuner.choose("block", (x,), lambda: listed, abs).name

    assert choose() == "layers"
    # The parts' choices are made by the time that the composition is measured.
    assert machine.measured == ["fused", "small", "large", "layers"]
    assert choose() == "layers"
    assert len(machine.measured) == 4


def test_memory_that_runs_out_while_measuring_leaves_the_heuristic_for_this_process() -> None:
    machine = Machine(small=2.0, large=1.0)
    attempts: list[object] = []

    def measure(call: Callable[[], object], device: torch.device) -> float:
        attempts.append(call)
        raise torch.OutOfMemoryError

    tuner = Tuner(measure, environment=lambda device: MACHINE, device_type="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is no candidate's fault
        for _ in range(3):
            assert machine.choose(tuner) == "small"
    assert len(attempts) == 1
    assert machine.choose(machine.tuner()) == "large"


def test_inputs_that_hold_nan_leave_nothing_to_measure_by() -> None:
    machine = Machine(small=2.0, large=1.0)
    assert machine.choose(machine.tuner(), torch.full((2, 3), torch.nan)) == "small"
    assert machine.measured == []
    assert machine.choose(machine.tuner()) == "large"


def test_threads_measure_once() -> None:
    machine = Machine(small=2.0, large=1.0)
    tuner = machine.tuner()
    barrier = threading.Barrier(8)
    found: list[str] = []
    launch = machine.launch

    def slow(name: str) -> Callable[..., Tensor]:
        time.sleep(0.02)  # another thread's turn
        return launch(name)

    def run() -> None:
        barrier.wait()
        listed = [Candidate(n, lambda x, n=n: slow(n)(x)) for n in machine.seconds]
        found.append(tuner.choose("op", (torch.ones(2, 3),), lambda: listed, abs).name)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["large"] * 8
    assert sorted(machine.measured) == ["large", "small"]


# What it costs


def test_a_process_measures_within_its_budget_what_matters_most_first() -> None:
    names = [f"candidate{i}" for i in range(500)]
    machine = Machine(**{name: 500.0 - i for i, name in enumerate(names)})
    tuner = machine.tuner()
    x = torch.ones(2, 3)
    listed = machine.candidates()
    listed[0] = listed[0]._replace(is_profitable=False)
    found = tuner.choose("op", (x,), lambda: listed, abs).name
    assert machine.measured[:2] == ["candidate1", "candidate499"]
    assert machine.measured[2:] == ["candidate0", "candidate2", "candidate3"]
    assert machine.now == BUDGET_SECONDS  # of a second for each
    assert found == "candidate499"
    assert machine.choose(tuner, op="later") == "candidate0"  # by the heuristic
    assert machine.now == BUDGET_SECONDS
    # A later process goes on where this one stopped.
    again = machine.tuner()
    assert again.choose("op", (x,), lambda: listed, abs).name == "candidate499"
    assert machine.measured[5:] == ["candidate4", "candidate5", "candidate6", "candidate7",
                                    "candidate8"]  # fmt: skip


def test_time_within_a_composition_is_spent_once() -> None:
    """Of five seconds a layer's two candidates take two and the composition itself one."""
    machine = Machine(small=2.0, large=1.0, layers=3.0, last=4.0)
    tuner = machine.tuner()

    def by_layers(x: Tensor) -> Tensor:
        machine.choose(tuner, x, "small", "large", op="layer")
        return machine.launch("layers")(x)

    block = [Candidate("layers", by_layers), *machine.candidates("last")]
    tuner.choose("block", (torch.ones(2, 3),), lambda: block, abs)
    assert machine.now == 4.0
    machine.choose(tuner, None, "small", "large", op="another")
    assert machine.now == 5.0
    assert machine.measured[4:] == ["small"]


def test_within_a_composition_the_budget_is_that_of_the_whole() -> None:
    machine = Machine(**{f"candidate{i}": 1.0 for i in range(500)}, layers=3.0, last=4.0)
    tuner = machine.tuner()

    def by_layers(x: Tensor) -> Tensor:
        machine.choose(tuner, x, *[f"candidate{i}" for i in range(500)], op="layer")
        return machine.launch("layers")(x)

    block = [*machine.candidates("last"), Candidate("layers", by_layers)]
    tuner.choose("block", (torch.ones(2, 3),), lambda: block, abs)
    # The first of the block, four within its layers, and the composition that was under way.
    assert machine.now == BUDGET_SECONDS + 1.0


def test_ahead_forgets_and_measures_everything() -> None:
    names = [f"candidate{i}" for i in range(20)]
    machine = Machine(**{name: 500.0 - i for i, name in enumerate(names)})
    machine.seconds["candidate10"] = 0.5
    tuner = machine.tuner()
    assert machine.choose(tuner) == "candidate19"
    generation = tuner.generation
    with tuner.ahead():
        assert tuner.generation > generation
        assert machine.choose(tuner) == "candidate10"
        assert machine.choose(tuner, op="another") == "candidate10"
    assert len(machine.measured) == 40  # none of them twice
    assert machine.choose(tuner) == "candidate10"


class SlowBackend(ReferenceBackend):
    """Has 500 candidates for each convolution."""

    name = "slow"

    def conv_bn(self, *arguments: Any) -> list[Candidate]:
        return [Candidate(f"slow {i}", reference.conv_bn) for i in range(500)]


def test_a_first_forward_measures_no_longer_than_its_budget_and_one_candidate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, seconds = [0.0], 2.0

    def measure(call: Callable[[], object], device: torch.device) -> float:
        now[0] += seconds
        return seconds

    tuner = Tuner(
        measure,
        environment=lambda device: MACHINE,
        clock=lambda: now[0],
        device_type="cpu",
    )
    monkeypatch.setattr(autotune, "choose", tuner.choose)
    model = resnet50(num_classes=3).eval()
    with torch.inference_mode(), use_backend(SlowBackend()):
        model(torch.randn(1, 3, 32, 32))
        first = now[0]
        model(torch.randn(1, 3, 32, 32))
    assert BUDGET_SECONDS <= first < BUDGET_SECONDS + seconds
    assert now[0] == first


# The measurement


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
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: Cache())
    assert measure_module.measure(call, GPU) == pytest.approx(milliseconds / 1e3)
    span = ["flush", "event", "call", "event"]
    assert events == ["call", *3 * span, "wait", *calls * span, "wait"]
