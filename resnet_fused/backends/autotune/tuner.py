"""The choice of a kernel: one look-up by op and signature among all candidates of all backends.

A candidate is chosen by measurement where there is one, else by the heuristic: the first one
listed as profitable. Only what has passed may be chosen: the self-check of its kernel family, made
once on each machine in a child process, and, before a measurement counts, a comparison with the
reference on the same inputs. What fails is excluded for this GPU, driver and build.

Measuring takes a few seconds of a process at most (`BUDGET_SECONDS`), so that a first forward
answers soon; `resnet_fused.tune` measures everything ahead. What is chosen for a signature stays
chosen, so that its results keep their bits, but for two cases: on a new machine choices are made
again as families pass their check, and where sizes never repeat all are forgotten, after thousands,
and made anew from the times that were measured.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import settings
from ..base import Candidate, Candidates
from ..bounded import Bounded
from . import families
from .cache import FILE, Times, TuningCache
from .measure import measure
from .signature import describe, signature
from .verify import Check

BUDGET_SECONDS = 5.0


class NotListedError(LookupError):
    """A call has no candidate of the only name that is wanted."""


class Decision(NamedTuple):
    """What was chosen for a call, whose arguments are `described`; `times` of all candidates, empty
    where the heuristic decided."""

    op: str
    described: tuple[object, ...]
    candidate: Candidate
    times: Times

    def seconds(self) -> float | None:
        """Of the chosen candidate; None where it was not measured."""
        found = self.times.get(self.candidate.name)
        return found if isinstance(found, float) else None


class _Call(NamedTuple):
    """A call to choose for, and what tells its choice from others (`Tuner.choose`)."""

    op: str
    arguments: Sequence[Any]
    reference: Callable[..., Any]
    per_image: bool
    device: torch.device
    place: Hashable


class Tuner:
    """Keeps and makes choices. There is one for the process; tests make others."""

    def __init__(
        self,
        measure: Callable[[Callable[[], object], torch.device], float] = measure,
        passed: Callable[[str, torch.device], bool] = families.passed,
        are_awaited: Callable[[torch.device], bool] = families.verdicts.are_awaited,
        environment: Callable[[torch.device], tuple[str, ...]] = families.environment,
        clock: Callable[[], float] = time.monotonic,
        device_type: str = "cuda",
    ) -> None:
        """measure: seconds of a call on a device. passed: whether a kernel family may run.
        are_awaited: whether a device's families are being checked. environment: what a measured
        time is true for. clock: seconds, for the budget. device_type: of the tensors whose calls
        are measured.
        """
        self.generation = 0  # another one means that calls may be computed otherwise
        self._measure = measure
        self._passed = passed
        self._are_awaited = are_awaited
        self._environment = environment
        self._clock = clock
        self._device_type = device_type
        self._chosen: Bounded[Hashable, Decision] = Bounded()
        self._cache: TuningCache | None = None
        self._spent = 0.0  # seconds, apart from those since `_since`
        self._since: float | None = None  # when the measuring began that is going on
        self._unlimited = False
        self._share: tuple[int, int] | None = None
        self._lock = threading.RLock()  # a candidate may be made of ops that choose in turn
        self._watchers: list[list[Decision]] = []
        self._preferred: list[str] = []
        self._only: set[str] = set()  # of the preferred

    def choose(
        self,
        op: str,
        arguments: Sequence[Any],
        candidates: Callable[[], Candidates],
        reference: Callable[..., Any],
        among: Hashable = None,
        per_image: bool = False,
    ) -> Candidate:
        """The candidate by which to compute `op(*arguments)`.

        candidates: lists them, the heuristic's order first to last; called once for a signature.
        reference: what `op` means, and what runs where no candidate may.
        among: tells apart calls that choose among other candidates.
        per_image: see `Check`.
        """
        device = _device(arguments)
        measuring = self._may_measure(device)
        place = (op, device, signature(arguments), among, measuring)
        decision = None if self._preferred else self._chosen.get(place)
        if decision is None:
            call = _Call(op, arguments, reference, per_image, device, place)
            decision = self._decide(call, candidates(), measuring)
        for watcher in self._watchers:
            watcher.append(decision)
        return decision.candidate

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[Decision]]:
        """Collects all decisions within the block, those remembered from earlier calls too."""
        decisions: list[Decision] = []
        self._watchers.append(decisions)
        try:
            yield decisions
        finally:
            self._watchers.remove(decisions)

    @contextlib.contextmanager
    def prefer(self, name: str, only: bool = False) -> Iterator[None]:
        """Within the block the candidate of that name is taken, unmeasured and whether or not its
        family has passed, wherever it is listed; with `only`, NotListedError is raised elsewhere.
        """
        self._preferred.append(name)
        self._only |= {name} if only else set()
        self.generation += 1
        try:
            yield
        finally:
            self._preferred.pop()
            self._only.discard(name)
            self.generation += 1

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """Within the block everything is measured, however long it takes."""
        before, self._unlimited = self._unlimited, True
        self.forget()
        try:
            yield
        finally:
            self._unlimited = before

    @contextlib.contextmanager
    def compile_share(self, share: int, of: int) -> Iterator[None]:
        """Within the block every `of`-th candidate of a call, from number `share` on, runs once and
        none is measured: so that several processes compile what one of them measures later."""
        self._share = (share, of)
        self.forget()
        try:
            yield
        finally:
            self._share = None
            self.forget()

    def forget(self) -> None:
        """Makes every choice anew, from what is kept on disk or by measuring."""
        with self._lock:
            self._chosen.clear()
            self.generation += 1

    def _may_measure(self, device: torch.device) -> bool:
        """Whether choices are by measurement: on a GPU, unless it is switched off
        (`RESNET_FUSED_TUNE`), the self-check keeps the GPU busy, or PyTorch is asked to be
        deterministic, because candidates differ in the order of their sums."""
        return (
            device.type == self._device_type
            and settings.tuning_enabled()
            and not torch.are_deterministic_algorithms_enabled()
            and not self._are_awaited(device)
        )

    def _decide(self, call: _Call, listed: Candidates, measuring: bool) -> Decision:
        described = tuple(describe(call.arguments))
        if self._preferred:
            for candidate in listed:
                if candidate.name == self._preferred[-1]:
                    return Decision(call.op, described, candidate, {})
            if self._preferred[-1] in self._only:
                raise NotListedError(f"{call.op} has no candidate {self._preferred[-1]!r}.")
        generation = self.generation
        options = [c for c in listed if not c.family or self._passed(c.family, call.device)]
        options = options or [Candidate("pytorch", call.reference)]
        times: Times = {}
        if self._share is not None:
            share, of = self._share
            for candidate in options[share::of]:
                with contextlib.suppress(Exception):  # which the process that measures reports
                    candidate.launch(*call.arguments)
            measuring = False
        with self._lock:
            if call.place in self._chosen and not self._preferred:
                return self._chosen[call.place]
            if measuring and len(options) > 1:
                times = self._times(call, described, options)
            decision = Decision(call.op, described, _best(options, times), times)
            capturing = measuring and torch.cuda.is_current_stream_capturing()
            if not self._preferred and not capturing and generation == self.generation:
                self._chosen[call.place] = decision
        return decision

    def _times(
        self, call: _Call, described: tuple[object, ...], options: Sequence[Candidate]
    ) -> Times:
        """What is known of the options, from the cache or measured now, as far as time allows."""
        check = Check(call.reference, call.arguments, call.per_image)
        if self._cache is None:
            self._cache = TuningCache(settings.cache_directory() / FILE)
        title = "|".join(map(str, (*self._environment(call.device), call.op, *described)))
        known = dict(self._cache.get(title) or {})
        # Where time is short, what would run anyway and what it has to beat come first.
        first = [_best(options, {}), options[-1]]
        missing = [c for c in [*first, *options] if c.name not in known]
        found: dict[str, float | str] = {}
        with self._spending():
            for candidate in dict.fromkeys(missing):
                if not (self._unlimited or (self._has_time() and _may_take_time())):
                    break
                try:
                    if not check.is_possible():
                        break
                    found[candidate.name] = self._try(candidate, check, call, title)
                except torch.OutOfMemoryError:
                    break  # the op may fit where measuring does not, and trying again takes long
        if found:
            self._cache.put(title, found)
        return {c.name: times[c.name] for c in options if c.name in (times := {**known, **found})}

    @contextlib.contextmanager
    def _spending(self) -> Iterator[None]:
        """Counts the seconds of the block; those of measurements within measurements once."""
        if self._since is not None or self._unlimited:
            yield
            return
        self._since = self._clock()
        try:
            yield
        finally:
            self._spent += self._clock() - self._since
            self._since = None

    def _has_time(self) -> bool:
        running = 0.0 if self._since is None else self._clock() - self._since
        return self._spent + running < BUDGET_SECONDS

    def _try(self, candidate: Candidate, check: Check, call: _Call, title: str) -> float | str:
        """Seconds of a call, or why the candidate is excluded, of which the user is told."""
        try:
            fault = check.fault(candidate.launch) if candidate.family else None
            if fault is None:
                launch = functools.partial(candidate.launch, *call.arguments)
                return self._measure(launch, call.device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # it asks for more than this GPU has, or a compiler fails
            fault = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"resnet_fused: candidate {candidate.name!r} is excluded on this machine: {fault}, for "
            f"{title}. Results stay right, by another candidate; please report this line.",
            stacklevel=2,
        )
        return fault


def _best(options: Sequence[Candidate], times: Mapping[str, float | str]) -> Candidate:
    """The fastest of those measured, if there is a choice; else the first profitable one."""
    allowed = [c for c in options if not isinstance(times.get(c.name), str)] or [options[-1]]
    measured = [c for c in allowed if c.name in times]
    if len(measured) > 1 or len(measured) == len(allowed):
        return min(measured, key=lambda c: times[c.name])
    return next((c for c in allowed if c.is_profitable), allowed[-1])


def _device(arguments: Sequence[Any]) -> torch.device:
    first: Any = arguments
    while not isinstance(first, Tensor):
        first = first[0]
    return first.device


def _may_take_time() -> bool:
    """Whether an ordinary call may measure: not while a graph is captured, nor where other
    processes wait for this one, as in data-parallel training."""
    distributed = torch.distributed
    several = (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
    return not several and not torch.cuda.is_current_stream_capturing()
