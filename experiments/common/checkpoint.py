"""Checkpoints: what a run goes on from after a stop."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from .errors import ExperimentError


class Stateful(Protocol):
    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> object: ...


class Checkpoint:
    """One file with the states of `parts`, and `facts` that say of which run it is."""

    def __init__(
        self, path: Path, parts: Mapping[str, Stateful], facts: Mapping[str, object]
    ) -> None:
        self._path, self._parts, self._facts = path, parts, facts

    def save(self, progress: Mapping[str, Any]) -> None:
        """Replaces the file; whoever is killed meanwhile leaves a whole one."""
        states = {name: part.state_dict() for name, part in self._parts.items()}
        contents = {"facts": dict(self._facts), "progress": dict(progress), **states}
        write_whole(self._path, lambda file: torch.save(contents, file))

    def load(self) -> dict[str, Any] | None:
        """Puts the parts into their saved states, and gives the progress; None without a file.

        Raises ExperimentError for a file that is of another run or cannot be read.
        """
        if not self._path.exists():
            return None
        advice = "delete it to begin anew, or give another --out."
        try:
            state = torch.load(self._path, map_location="cpu", weights_only=True)
            found, progress = state["facts"], dict(state["progress"])
        except Exception as error:  # damaged files raise anything
            raise ExperimentError(f"{self._path} cannot be read ({error}); {advice}") from error
        for key, expected in self._facts.items():
            if found.get(key) != expected:
                raise ExperimentError(
                    f"{self._path} is of another run: its {key} is {found.get(key)!r}, here it is "
                    f"{expected!r}; {advice}"
                )
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        return progress


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make the file beside `path`, then puts it there in one step.

    Whoever reads `path`, whenever this process is killed, finds the old file or the new one whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    write(part)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    with contextlib.suppress(OSError):  # the folder's entry too, where the system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_weights(path: Path) -> dict[str, Any]:
    """The network's state in a checkpoint, its moving average where it has one; or else the file.

    Raises ExperimentError for a file that cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise anything
        raise ExperimentError(f"{path} cannot be read as weights ({error}).") from error
    if "average" in state:
        prefix = "module."
        average = state["average"].items()
        return {k.removeprefix(prefix): v for k, v in average if k.startswith(prefix)}
    return state.get("model", state)
