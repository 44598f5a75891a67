"""Learning rates: divided at milestones (4.2), on a plateau (3.4), along a cosine.

A schedule belongs to an optimizer. `after_iteration` is called once an iteration, with the errors
in percent where they were measured just now and None otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    MultiStepLR,
    ReduceLROnPlateau,
    SequentialLR,
)


class Schedule(Protocol):
    def after_iteration(self, training_error: float | None, test_error: float | None) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Milestones:
    """The rate divided by 10 at each milestone, counted in iterations.

    warm_up: a rate to begin with, until the training error is under 80 % (4.2: 0.01, for 110
    layers); the milestones do not move.
    """

    _ENOUGH = 80.0

    def __init__(
        self, optimizer: Optimizer, milestones: Sequence[int], warm_up: float | None = None
    ) -> None:
        self._optimizer = optimizer
        self._full = optimizer.param_groups[0]["lr"]
        self._divided = MultiStepLR(optimizer, list(milestones), gamma=0.1)
        self._warming = warm_up is not None
        if warm_up is not None:
            self._set(warm_up)

    def _set(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def after_iteration(self, training_error: float | None, test_error: float | None) -> None:
        if self._warming and training_error is not None and training_error < self._ENOUGH:
            self._warming = False
            self._set(self._full)
        self._divided.step()

    def state_dict(self) -> dict[str, Any]:
        return {"divided": self._divided.state_dict(), "warming": self._warming}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._divided.load_state_dict(state["divided"])
        self._warming = state["warming"]


class Plateau:
    """The rate divided by 10 when more than `patience` measurements saw no lower test error."""

    def __init__(self, optimizer: Optimizer, patience: int) -> None:
        self._plateau = ReduceLROnPlateau(optimizer, factor=0.1, patience=patience)

    def after_iteration(self, training_error: float | None, test_error: float | None) -> None:
        if test_error is not None:
            self._plateau.step(test_error)

    def state_dict(self) -> dict[str, Any]:
        return self._plateau.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._plateau.load_state_dict(state)


class Cosine:
    """A linear rise over `warm_up` iterations, then half a cosine down to 0 at `iterations`."""

    def __init__(self, optimizer: Optimizer, iterations: int, warm_up: int) -> None:
        rise = LinearLR(optimizer, 0.01, total_iters=warm_up)
        fall = CosineAnnealingLR(optimizer, iterations - warm_up)
        self._both = SequentialLR(optimizer, [rise, fall], [warm_up])

    def after_iteration(self, training_error: float | None, test_error: float | None) -> None:
        self._both.step()

    def state_dict(self) -> dict[str, Any]:
        return self._both.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._both.load_state_dict(state)
