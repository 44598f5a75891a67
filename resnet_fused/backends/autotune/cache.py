"""Measured times of candidates in one JSON file.

Writers merge under a lock and replace the file in one step, so readers never see half of it and
processes do not lose each other's entries. A file that cannot be understood is set aside as
`*.corrupt` with a warning, and its entries are measured again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = "tuning-v3.json"  # the number is that of the format

# Of an entry, by candidate: seconds of a call, or why it is excluded.
Times = Mapping[str, float | str]


class TuningCache:
    """Measured times in one file: `get` and `put` by key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Times] | None = None

    def get(self, key: str) -> Times | None:
        """The stored times, or None."""
        if self._entries is None:
            self._entries = self._read()
        return self._entries.get(key)

    def put(self, key: str, times: Times) -> None:
        """Adds times to an entry; where the folder cannot be written, warns and keeps them in
        memory."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self._path.with_suffix(".lock")):
                self._add(key, times, self._read())
                self._write(self._entries or {})
        except OSError as error:
            self._add(key, times, {})
            warnings.warn(
                f"the tuning cache {self._path} cannot be written ({error}); kernels are measured "
                "again in the next process. Set RESNET_FUSED_CACHE_DIR to a writable folder.",
                stacklevel=2,
            )

    def _add(self, key: str, times: Times, read: Mapping[str, Times]) -> None:
        entries = {**(self._entries or {}), **read}
        entries[key] = {**entries.get(key, {}), **times}
        self._entries = entries

    def _read(self) -> dict[str, Times]:
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

    def _write(self, entries: Mapping[str, Times]) -> None:
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.stem)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"entries": entries}, file, indent=1, sort_keys=True)
            os.replace(name, self._path)
        except BaseException:
            os.unlink(name)
            raise


def _parse(value: Any) -> Times:
    for found in value.values():
        if not isinstance(found, str) and not (isinstance(found, float) and 0 <= found < math.inf):
            raise ValueError(f"{found!r} is neither a time nor a reason")
    return dict(value)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # POSIX only, as Triton is

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
