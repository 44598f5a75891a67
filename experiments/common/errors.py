"""Errors that end an experiment with a message instead of a traceback."""

from __future__ import annotations


class ExperimentError(Exception):
    """Something the user can mend; the message says what was found and what to do."""


class DataError(ExperimentError):
    """A data set is missing, incomplete or corrupt; the message names the file."""


class DivergedError(ExperimentError):
    """The loss is no longer finite; `history` holds the rows until then."""

    def __init__(self, message: str, history: list[dict[str, float]]) -> None:
        super().__init__(message)
        self.history = history
