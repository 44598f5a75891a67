"""Which tile shape a kernel runs with: measured once per shape class, remembered on disk.

The cache is one JSON file. Writers merge under a lock and replace the file in one step, so readers
never see half of it and processes do not lose each other's entries. A file that cannot be
understood is set aside as `*.corrupt` with a warning, and its entries are measured again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.testing import do_bench

from ... import settings

_FILE = "triton-tuning-v1.json"  # the number is that of the format


class Config(NamedTuple):
    """How a kernel is launched: its tile sizes (their meaning is the kernel's), warps, stages."""

    blocks: tuple[int, ...]
    warps: int
    stages: int


def batch_bucket(batch: int) -> int:
    """Batches that share one measurement: the next power of two."""
    return 1 << (batch - 1).bit_length()


class TuningCache:
    """Measured choices in one file: `get` and `put` by key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Config] | None = None

    def get(self, key: str) -> Config | None:
        """The stored choice, or None."""
        if self._entries is None:
            self._entries = self._read()
        return self._entries.get(key)

    def put(self, key: str, config: Config) -> None:
        """Stores a choice; where the folder cannot be written, warns and keeps it in memory."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self._path.with_suffix(".lock")):
                self._entries = {**(self._entries or {}), **self._read(), key: config}
                self._write(self._entries)
        except OSError as error:
            self._entries = {**(self._entries or {}), key: config}
            warnings.warn(
                f"the tuning cache {self._path} cannot be written ({error}); kernels are measured "
                "again in the next process. Set RESNET_FUSED_CACHE_DIR to a writable folder.",
                stacklevel=2,
            )

    def _read(self) -> dict[str, Config]:
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

    def _write(self, entries: dict[str, Config]) -> None:
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.stem)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"entries": entries}, file, indent=1, sort_keys=True)
            os.replace(name, self._path)
        except BaseException:
            os.unlink(name)
            raise


def _parse(value: Any) -> Config:
    blocks, warps, stages = value
    if not all(type(number) is int and number > 0 for number in (*blocks, warps, stages)):
        raise ValueError(f"{value!r} is not a launch configuration")
    return Config(tuple(blocks), warps, stages)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # POSIX only, as Triton is

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Tuner:
    """Chooses a Config per key: from memory, from the cache, by measuring, or by rule.

    The rule (each kernel's own first candidate) decides where measuring is switched off
    (`RESNET_FUSED_TUNE=off`), has no meaning (the interpreter) or is not allowed (while a CUDA
    graph is being captured).
    """

    def __init__(self) -> None:
        self._measured: dict[Hashable, Config] = {}
        self._ruled: dict[Hashable, Config] = {}
        self._cache: TuningCache | None = None
        self._lock = threading.Lock()

    def choose(
        self,
        key: tuple[Hashable, ...],
        device: torch.device,
        candidates: Callable[[], Sequence[Config]],
        launch: Callable[[Config], object],
    ) -> Config:
        """The configuration for `key` on `device`; `launch` runs the kernel with a candidate.

        `candidates` lists them, the rule's choice first.
        """
        place = (device, *key)
        measuring = device.type == "cuda" and settings.tuning_enabled()
        known = self._measured if measuring else self._ruled
        if (config := known.get(place)) is not None:
            return config
        options = candidates()
        if not measuring:
            return known.setdefault(place, options[0])
        if torch.cuda.is_current_stream_capturing():
            return options[0]
        with self._lock:
            if place not in known:
                try:
                    known[place] = self._look_up_or_measure(key, device, options, launch)
                except torch.OutOfMemoryError:
                    return options[0]  # the op may fit where measuring does not
            return known[place]

    def _look_up_or_measure(
        self,
        key: tuple[Hashable, ...],
        device: torch.device,
        options: Sequence[Config],
        launch: Callable[[Config], object],
    ) -> Config:
        if self._cache is None:
            self._cache = TuningCache(settings.cache_directory() / _FILE)
        name = "|".join(
            [
                torch.cuda.get_device_name(device),
                f"triton {triton.__version__}",
                f"torch {torch.__version__}",
                *map(str, key),
            ]
        )
        stored = self._cache.get(name)
        if stored is not None and stored in options:  # not from a version with other candidates
            return stored
        measured = fastest(options, launch)
        self._cache.put(name, measured)
        return measured


def fastest(options: Sequence[Config], launch: Callable[[Config], object]) -> Config:
    """The candidate with the least median time, caches cold; the first if none can be launched."""
    best, least = options[0], float("inf")
    for config in options:
        try:
            time = do_bench(
                functools.partial(launch, config), warmup=5, rep=20, return_mode="median"
            )
        except triton.TritonError:
            continue  # more shared memory or registers than this GPU has, or a compiler's fault
        if time < least:
            best, least = config, time
    return best
