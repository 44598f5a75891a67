"""What the blocks of a stage run in training, on a CPU: one program each way for all of them.

Where images are small, the time that a block takes from its modules to its launches shows beside
that of the launches. So once the blocks have run as one op each, those ops are bound together
(`ops/training_programs.py`), as one node of autograd. It serves for as long as nobody could tell,
as the plans of inference do, with which it shares what is compared. On a GPU, where launches wait
in a queue, a whole step is captured instead (`graphed_step`).
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from .. import _extension, fusion, settings
from ..backends import Backend
from ..backends.arguments import nhwc
from ..blocks import BasicBlock, Bottleneck, PlainBlock, ResidualBlock
from ..ops import training_programs
from ..ops.dispatch import use_backend
from ..ops.registry import autocast_dtype
from ..ops.training_programs import same_bits
from .record import shadows
from .store import Entries
from .validity import Snapshot, surroundings

_BLOCKS = (BasicBlock, PlainBlock, Bottleneck)
# Elements of the input, times blocks. Beyond, nothing would be gained, and recording, which keeps
# every intermediate tensor, would take gigabytes.
_MOST_ELEMENTS = 2**25


class _TrainingPlan(NamedTuple):
    """The ops that stand for the blocks, bound for one kind of input."""

    snapshot: Snapshot
    bound: training_programs.Bound
    norms: list[nn.Module]

    def run(self, x: Tensor) -> Tensor:
        out, scale_shifts = self.bound.replay(x)
        fusion.track_statistics(self.norms, scale_shifts)
        return out


TrainingPlans = Entries[_TrainingPlan]


class Blocks(Protocol):
    """What plans need to know of a stage, which is a sequence of blocks."""

    training: bool
    _modules: dict[str, nn.Module]


def train(stage: Blocks, x: Tensor) -> Tensor | None:
    """The blocks of `stage` applied to `x` in turn, or None where each has to be called."""
    if (
        not stage.training
        or not torch.is_grad_enabled()
        or not training_programs.may_replay(x)
        or x.device.type != "cpu"
        or x.numel() * len(stage._modules) > _MOST_ELEMENTS
        or fusion.must_call_modules(x)
        # Checkpoints expect as many saved tensors from a stage that is computed again.
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    ):
        return None
    plans: TrainingPlans | None = getattr(stage, "_plans", None)
    if plans is None:
        plans = stage._plans = TrainingPlans()  # type: ignore[attr-defined]
    x = nhwc(x.to(autocast_dtype(x)))
    entry = plans.find(_kind(x))
    if entry.plan is not None:
        if entry.plan.snapshot.holds():
            return entry.plan.run(x)
        entry.postpone()
        return None
    if not entry.is_due():
        return None
    out, plan = _record(stage, x)
    entry.keep(plan)
    return out


def _kind(x: Tensor) -> Hashable:
    return surroundings(x), x.stride(), x.data_ptr() % 16, settings.training_saves_memory()


def _record(stage: Blocks, x: Tensor) -> tuple[Tensor, _TrainingPlan | None]:
    """The result of the blocks, called in turn, and the plan, or None where there is none."""
    blocks = list(stage._modules.values())
    seen: list[tuple[training_programs.Link, Backend | None]] = []
    token = training_programs.seen.set(seen)
    out = x
    try:
        for block in blocks:
            out = block(out)
    finally:
        training_programs.seen.reset(token)
    links, backends = [link for link, _ in seen], {backend for _, backend in seen}
    norms: list[nn.Module] = []
    for block in blocks:
        if type(block) not in _BLOCKS or not fusion.untouched(block) or shadows(block):
            return out, None
        norms += [bn for _, bn in cast("ResidualBlock", block).training_pairs() or ()]
    if len(links) != len(blocks) or len(backends) != 1:
        return out, None
    modules = [cast("nn.Module", stage), *(m for block in blocks for m in block.modules())]
    snapshot = Snapshot(_extension.load(), list(dict.fromkeys(modules)))
    with use_backend(backends.pop()), torch.no_grad():
        bound = training_programs.bind(links, x)
        if bound is None or not snapshot.is_complete():
            return out, None
        # Launches that read copies of weights need them made anew each time.
        reads_weights = all(map(operator.is_, bound.read, bound.inputs))
        # Somebody may have put something of their own between the ops.
        if not reads_weights or not same_bits(bound.replay(x)[0], out):
            return out, None
    return out, _TrainingPlan(snapshot, bound, norms)
