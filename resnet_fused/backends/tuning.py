"""Which kernel, or which tile shape of one, serves a call: measured once per shape, kept on disk.

What is chosen among is any list of candidates whose `str` names them. The cache is one JSON file
with every candidate's time. Writers merge under a lock and replace the file in one step, so readers
never see half of it and processes do not lose each other's entries. A file that cannot be
understood is set aside as `*.corrupt` with a warning, and its entries are measured again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import tempfile
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import __version__, settings
from ..parameters import BatchNorm, ConvBn, Convolution

_FILE = "tuning-v2.json"  # the number is that of the format
_WIDE = 2**31  # elements, from which on batches are measured one by one
_VECTOR_BYTES = 16
# Written between two calls: more than any L2 cache holds, and long enough in the writing for the
# host to queue the next call meanwhile, so that the host's time is not measured.
_FLUSHED_BYTES = 2**28
_MILLISECONDS = 20  # of calls, for each candidate

Seconds = Mapping[str, float | None]  # of a call, by candidate; None for one that cannot run
_Candidate = TypeVar("_Candidate")
_Result = TypeVar("_Result")


def batch_bucket(batch: int) -> int:
    """Batches that share one measurement: the next power of two."""
    return 1 << (batch - 1).bit_length()


class Operand(NamedTuple):
    """What a kernel's time depends on in a tensor: logical sizes, and whether it lies well."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...] | None  # of an activation that is not dense in channels_last memory
    aligned: bool

    def __str__(self) -> str:
        text = "×".join(map(str, self.sizes))
        if self.strides is not None:
            text += f" strides {','.join(map(str, self.strides))}"
        return text if self.aligned else f"{text} unaligned"


class Window(NamedTuple):
    """The same of a convolution."""

    weight: Operand
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __str__(self) -> str:
        text = str(self.weight)
        for name, usual in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1))):
            if (value := getattr(self, name)) != usual:
                text += f" {name} {value[0]},{value[1]}"
        return text if self.groups == 1 else f"{text} groups {self.groups}"


def describe(x: Tensor, *others: Any) -> tuple[Hashable, ...]:
    """What a kernel's time depends on in an op's arguments, for use in a key.

    `others` are what ops take beside x: activations, whose batches are rounded up as x's is,
    convolutions, batch norms (which have no say), other tensors and plain values.
    """
    parts: list[Hashable] = [x.dtype, _activation(x)]
    if x.dtype == torch.float32:
        convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        parts.append((convolutions.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
    for other in others:
        if isinstance(other, Tensor):
            parts.append(_activation(other) if other.dim() == 4 else _operand(other))
        elif isinstance(other, (ConvBn, Convolution)):
            other = other.conv if isinstance(other, ConvBn) else other
            stride, padding, dilation = map(tuple, other[1:4])
            parts.append(Window(_operand(other.weight), stride, padding, dilation, other.groups))
        elif not isinstance(other, BatchNorm):
            parts.append(other)
    return tuple(parts)


def _activation(x: Tensor) -> Operand:
    batch = x.shape[0] if x.numel() >= _WIDE else batch_bucket(x.shape[0])
    dense = x.is_contiguous(memory_format=torch.channels_last)
    strides = None if dense else x.stride()
    return Operand((batch, *x.shape[1:]), strides, x.data_ptr() % _VECTOR_BYTES == 0)


def _operand(x: Tensor) -> Operand:
    return Operand(tuple(x.shape), None, x.data_ptr() % _VECTOR_BYTES == 0)


def measure(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds that `device` takes for `call`, its caches cold."""
    with torch.cuda.device(device):
        cache = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device)
        call()  # compiles, and measures where the call has candidates of its own

        def milliseconds(calls: int) -> float:
            spans = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(calls)]
            for start, end in spans:
                cache.zero_()
                start.record()
                call()
                end.record()
            torch.cuda.synchronize()
            return statistics.median(start.elapsed_time(end) for start, end in spans)

        rough = milliseconds(3)
        return milliseconds(min(50, max(5, round(_MILLISECONDS / max(rough, 1e-3))))) / 1e3


class TuningCache:
    """Measured times in one file: `get` and `put` by key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Seconds] | None = None

    def get(self, key: str) -> Seconds | None:
        """The stored times, or None."""
        if self._entries is None:
            self._entries = self._read()
        return self._entries.get(key)

    def put(self, key: str, seconds: Seconds) -> None:
        """Stores times; where the folder cannot be written, warns and keeps them in memory."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self._path.with_suffix(".lock")):
                self._entries = {**(self._entries or {}), **self._read(), key: seconds}
                self._write(self._entries)
        except OSError as error:
            self._entries = {**(self._entries or {}), key: seconds}
            warnings.warn(
                f"the tuning cache {self._path} cannot be written ({error}); kernels are measured "
                "again in the next process. Set RESNET_FUSED_CACHE_DIR to a writable folder.",
                stacklevel=2,
            )

    def _read(self) -> dict[str, Seconds]:
        try:
            text = self._path.read_bytes()
        except OSError:
            return {}
        try:
            return {key: _parse(value) for key, value in json.loads(text)["entries"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            aside = self._path.with_suffix(".corrupt")
            with contextlib.suppress(OSError):
                os.replace(self._path, aside)
            warnings.warn(
                f"the tuning cache {self._path} is corrupt ({type(error).__name__}: {error}); it "
                f"is kept as {aside.name} and kernels are measured again.",
                stacklevel=4,
            )
            return {}

    def _write(self, entries: Mapping[str, Seconds]) -> None:
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.stem)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"entries": entries}, file, indent=1, sort_keys=True)
            os.replace(name, self._path)
        except BaseException:
            os.unlink(name)
            raise


def _parse(value: Any) -> Seconds:
    for seconds in value.values():
        if seconds is not None and not (isinstance(seconds, float) and 0 <= seconds < float("inf")):
            raise ValueError(f"{seconds!r} is not a time")
    return dict(value)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # POSIX only, as Triton is

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass
class Decision:
    """What a tuner chose for a call, and what was chosen for the calls within."""

    tuner: str
    key: tuple[Hashable, ...]
    choice: str
    seconds: Seconds  # empty where the rule decided
    parts: list[Decision] = field(default_factory=list)


_watched: list[list[Decision]] = []


@contextlib.contextmanager
def watch() -> Iterator[list[Decision]]:
    """Collects the decisions of all tuners of the process within the block, in order.

    Meant for calls that were made before: where candidates have yet to be measured, the decisions
    within those are collected too.
    """
    decisions: list[Decision] = []
    _watched.append(decisions)
    try:
        yield decisions
    finally:
        _watched.pop()


_preferred: list[str] = []


@contextlib.contextmanager
def prefer(name: str) -> Iterator[None]:
    """Within the block all tuners of the process take their candidate of that name unmeasured;
    those that have none choose as ever. `watch` says which ran."""
    _preferred.append(name)
    try:
        yield
    finally:
        _preferred.pop()


class _Choice(NamedTuple):
    candidate: Any
    seconds: Seconds


class Tuner:
    """Chooses a candidate per key, from memory, from the cache, by measuring or by rule; runs it.

    The rule (the first candidate) decides where measuring is switched off
    (`RESNET_FUSED_TUNE=off`), has no meaning (the interpreter), is not allowed (while a CUDA graph
    is being captured), or where PyTorch is asked to be deterministic, because kernels and tiles
    differ in the order of their sums, and a new measurement may decide for others.
    """

    def __init__(
        self,
        name: str,
        measure: Callable[[Callable[[], object], torch.device], float] = measure,
    ) -> None:
        """`name`: whose candidates they are. `measure`: seconds of a call on a device."""
        self.name = name
        self._measure = measure
        self._measured: dict[Hashable, _Choice] = {}
        self._ruled: dict[Hashable, _Choice] = {}
        self._cache: TuningCache | None = None
        self._lock = threading.RLock()  # a candidate may come back with a choice of its own

    def run(
        self,
        key: tuple[Hashable, ...],
        device: torch.device,
        candidates: Callable[[], Sequence[_Candidate]],
        launch: Callable[[_Candidate], _Result],
    ) -> _Result:
        """`launch` of the candidate chosen for `key` on `device`.

        `candidates` lists them, the rule's choice first; it is called once per key. Their names,
        by `str`, differ. A candidate that raises while it is measured is never chosen.
        """
        choice = self._choose(key, device, candidates, launch)
        if not _watched:
            return launch(choice.candidate)
        decision = Decision(self.name, key, str(choice.candidate), choice.seconds)
        _watched[-1].append(decision)
        _watched.append(decision.parts)
        try:
            return launch(choice.candidate)
        finally:
            _watched.pop()

    def _choose(
        self,
        key: tuple[Hashable, ...],
        device: torch.device,
        candidates: Callable[[], Sequence[Any]],
        launch: Callable[[Any], object],
    ) -> _Choice:
        if _preferred:
            for option in candidates():
                if str(option) == _preferred[-1]:
                    return _Choice(option, {})
        place = (device, *key)
        measuring = (
            device.type == "cuda"
            and settings.tuning_enabled()
            and not torch.are_deterministic_algorithms_enabled()
        )
        known = self._measured if measuring else self._ruled
        if (choice := known.get(place)) is not None:
            return choice
        options = candidates()
        by_rule = _Choice(options[0], {})
        if not measuring or len(options) == 1:
            return known.setdefault(place, by_rule)
        if torch.cuda.is_current_stream_capturing():
            return by_rule
        with self._lock:
            if place not in known:
                try:
                    known[place] = self._look_up_or_measure(key, device, options, launch)
                except torch.OutOfMemoryError:
                    # The op may fit where measuring does not, and trying again takes long.
                    known[place] = by_rule
            return known[place]

    def _look_up_or_measure(
        self,
        key: tuple[Hashable, ...],
        device: torch.device,
        options: Sequence[Any],
        launch: Callable[[Any], object],
    ) -> _Choice:
        if self._cache is None:
            self._cache = TuningCache(settings.cache_directory() / _FILE)
        named = {str(option): option for option in options}
        title = "|".join(map(str, (*_environment(device), self.name, *key)))
        seconds = self._cache.get(title)
        if seconds is None or not named.keys() <= seconds.keys():  # as with a new candidate
            seconds = self._measure_all(title, named, device, launch)
            if any(time is not None for time in seconds.values()):
                self._cache.put(title, seconds)
        times = {name: time for name in named if (time := seconds[name]) is not None}
        # Where none can run, the first one's error is what the caller has to see.
        best = min(times, key=times.__getitem__, default=str(options[0]))
        return _Choice(named[best], seconds)

    def _measure_all(
        self,
        title: str,
        named: Mapping[str, Any],
        device: torch.device,
        launch: Callable[[Any], object],
    ) -> Seconds:
        seconds: dict[str, float | None] = {}
        for name, option in named.items():
            try:
                seconds[name] = self._measure(functools.partial(launch, option), device)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # It asks for more than this GPU has, or a compiler or library fails.
                seconds[name] = None
                warnings.warn(
                    f"candidate {name!r} for {title} cannot run and is passed over: "
                    f"{type(error).__name__}: {error}",
                    stacklevel=2,
                )
        return seconds


def _environment(device: torch.device) -> tuple[str, ...]:
    """What measured times are true for."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return (
        torch.cuda.get_device_name(device),
        f"resnet_fused {__version__}",
        f"torch {torch.__version__}",
        f"triton {triton}",
    )
