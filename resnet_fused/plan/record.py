"""Records a network's forward, part by part, as programs of the extension."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import fusion
from .._extension import tensor_arg, types
from ..backends import recording
from ..backends.arguments import nhwc
from ..backends.autotune import generation
from ..backends.live_cache import dense
from ..blocks import BasicBlock, Bottleneck, PaddedIdentity, PlainBlock
from .arena import Arenas
from .validity import Snapshot, may_serve

# Types whose calls consist of nothing but ops, where those stand for them.
_PLANNED = (*fusion.FUSED, PaddedIdentity, BasicBlock, PlainBlock, Bottleneck)
# Bytes that an intermediate tensor starts at a multiple of, as PyTorch's allocators have it.
_ALIGNMENT = {"cpu": 64, "cuda": 256}
# What an input's address must have in common with the recorded one's: kernels that read 16 bytes at
# a time serve no other.
_INPUT_ALIGNMENT = 16


class Part(NamedTuple):
    """A piece of the network, to be applied to the result of the one before it."""

    call: Callable[[Tensor], Tensor]
    modules: list[nn.Module] | None  # all that it consists of; None where it has to be called


class Network(Protocol):
    """What plans need to know of a network, which is a module."""

    training: bool

    def stages(self) -> Iterable[nn.Module]:
        """The containers of its blocks."""

    def plannable_parts(self) -> Iterable[Part]:
        """The network in pieces, each to be applied to the result of the one before."""


class Form(NamedTuple):
    """What kernels were launched for: the shape, strides and alignment of a tensor."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int

    @classmethod
    def of(cls, x: Tensor) -> Form:
        offset = x.data_ptr() % _INPUT_ALIGNMENT
        return cls(x.shape, x.stride(), x.dtype, x.device, offset)


class Segment(NamedTuple):
    """Parts in a row that one program runs."""

    program: Any
    contents: Any  # of the weights that the program reads in a packed form
    calls: list[Callable[[Tensor], Tensor]]
    input: Form
    output: Form


class Plan:
    """What a network runs for one kind of input.

    Every part that was not recorded is called as ever, between the programs. Weights that were
    packed are verified while a program runs; where one has changed, its parts are called instead.
    Frozen weights are known by their version counters, before any program runs.

    Attributes:
        outdated: whether weights were found that have changed since they were packed.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        steps: Sequence[Segment | Callable[[Tensor], Tensor]],
        frozen: Sequence[recording.Packed],
        copies: Sequence[tuple[Tensor, Tensor]],
        kept: Sequence[object],
    ) -> None:
        self.steps = steps
        self._snapshot = snapshot
        self._frozen = frozen
        self._sources = [source for source, _ in copies]
        self._copies = [copy for _, copy in copies]
        self._kept = kept  # programs hold addresses only
        self.outdated = False

    def is_valid(self) -> bool:
        """Whether the programs launch what the ordinary forward would."""
        return (
            not self.outdated
            and self._snapshot.holds()
            and all(recording.version(note.weight) == note.fingerprint for note in self._frozen)
        )

    def run(self, x: Tensor, arenas: Arenas) -> Tensor:
        """The network's result; `is_valid` was asked just before."""
        fresh = True
        if self._copies:
            torch._foreach_copy_(self._copies, self._sources)
        for step in self.steps:
            if not isinstance(step, Segment):
                x, fresh = step(x), False
                continue
            image = nhwc(x) if type(x) is Tensor and x.dim() == 4 else x
            # What ran in between may have changed anything.
            if Form.of(image) == step.input and (fresh or (may_serve(x) and self.is_valid())):
                out = _replay(step, image, arenas)
                if out is not None:
                    x = out
                    continue
                self.outdated = True
            for call in step.calls:
                x = call(x)
            fresh = False
        return x


def _replay(segment: Segment, x: Tensor, arenas: Arenas) -> Tensor | None:
    """The program's result, or None where weights are no longer those that were packed."""
    program, form = segment.program, segment.output
    out = torch.empty_strided(form.shape, form.strides, dtype=form.dtype, device=form.device)
    if form.device.type == "cuda":
        arena = torch.empty(program.arena_bytes, dtype=torch.uint8, device=form.device)
        with torch.cuda.device(form.device):
            stream = torch.cuda.current_stream(form.device).cuda_stream
            program.run([x.data_ptr(), out.data_ptr()], arena.data_ptr(), stream)
        return out
    with arenas.borrow(program.arena_bytes) as arena:
        memory = [x.data_ptr(), out.data_ptr()], arena.data_ptr()
        if segment.contents is None:
            program.run(*memory)
        elif not segment.contents.run(program, *memory):
            return None
    return out


class _Watch(recording.Watch):
    """Sees whether PyTorch's own ops write to memory, which no launch tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.wrote = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.wrote |= func._schema.is_mutable
        return func(*args, **(kwargs or {}))


def part(call: Callable[[Tensor], Tensor], modules: list[nn.Module], plannable: bool) -> Part:
    """A piece that may be planned if `plannable` and every module is one that ops stand for."""
    for module in modules:
        plannable = (
            plannable
            and (
                type(module) in _PLANNED
                or vars(type(module)).get("made_of_ops", False)
                or fusion.is_sigmoid(module)
                or fusion.is_group_norm(module)
            )
            and fusion.untouched(module)
            and not shadows(module)
        )
    return Part(call, modules if plannable else None)


def shadows(module: nn.Module) -> bool:
    """Whether an attribute of the instance stands in the place of a method."""
    return any(callable(getattr(type(module), name, None)) for name in vars(module))


def record(network: Network, x: Tensor, extension: ModuleType) -> tuple[Tensor, Plan | None]:
    """The network's result for `x`, and the plan, or None where there is nothing to be gained."""
    pieces = list(network.plannable_parts())
    watched: list[Any] = [network, *network.stages()]
    watched += [m for piece in pieces if piece.modules is not None for m in piece.modules]
    snapshot = Snapshot(extension, list(dict.fromkeys(watched)))
    promised = snapshot.is_frozen  # by a FrozenNetwork, which watches its version counters
    before = generation()
    recorder, notes = extension.Recorder(), recording.Notes()
    values, ends, complete = [x], [0], []
    packs = [0]  # what was noted as packed, up to each end
    for piece in pieces:
        if piece.modules is None:
            values.append(piece.call(values[-1]))
            complete.append(False)
        else:
            values[-1] = nhwc(values[-1]) if values[-1].dim() == 4 else values[-1]
            watch = _Watch()
            token = recording.current.set(notes)
            recorder.start()
            try:
                with watch:
                    values.append(piece.call(values[-1]))
            finally:
                recorder.stop()
                recording.current.reset(token)
            complete.append(not watch.wrote)
        ends.append(len(recorder))
        packs.append(len(notes.packed))
    out = values[-1]
    known = {id(tensor) for tensor in snapshot.tensors}
    copies, frozen = notes.copies, notes.frozen
    # Then copies of parameters are as good as packed weights, once they are there for all streams.
    if promised and all(recording.may_keep(source) for source, _ in copies):
        made = (
            recording.Packed(source, recording.version(source), copy) for source, copy in copies
        )
        copies, frozen = [], [*frozen, *made]
    noted = [*notes.packed, *frozen]
    made_from = [*(note.weight for note in noted), *(source for source, _ in copies)]
    if (
        not snapshot.is_complete()
        or generation() != before
        or any(id(tensor) not in known for tensor in made_from)
        or any(dense(note.weight) is not note.weight for note in notes.packed)
    ):
        return out, None
    constants = [
        *snapshot.tensors,
        *(note.packed.packed for note in noted if hasattr(note.packed, "packed")),
        *(copy for _, copy in notes.copies),
    ]
    described = [tensor_arg(tensor) for tensor in constants if tensor.dtype in types()]

    def program(first: int, last: int) -> Any:
        if not {values[first].dtype, values[last].dtype} <= types().keys():
            return None
        return recorder.program(
            ends[first],
            ends[last],
            [tensor_arg(values[first])],
            [tensor_arg(values[last])],
            described,
            _ALIGNMENT[x.device.type],
        )

    def contents(first: int, last: int) -> Any:
        if not hasattr(extension, "Contents"):  # the simulator, which packs nothing
            return None
        used = notes.packed[packs[first] : packs[last]]
        packed = {id(note.weight): note for note in used if hasattr(note.packed, "packed")}
        weights = [note.weight for note in packed.values()]
        return extension.Contents(
            [tensor_arg(weight) for weight in weights],
            [note.fingerprint for note in packed.values()],
            bool(weights) and not any(weight.is_pinned() for weight in weights),
        )

    complete = [done and program(i, i + 1) is not None for i, done in enumerate(complete)]
    steps: list[Segment | Callable[[Tensor], Tensor]] = []
    first = 0
    while first < len(pieces):
        last = first
        while last < len(pieces) and complete[last]:
            last += 1
        if last == first:
            steps.append(pieces[first].call)
            first += 1
            continue
        calls = [piece.call for piece in pieces[first:last]]
        forms = Form.of(values[first]), Form.of(values[last])
        steps.append(Segment(program(first, last), contents(first, last), calls, *forms))
        first = last
    if not any(isinstance(step, Segment) for step in steps):
        return out, None
    return out, Plan(snapshot, steps, [] if promised else frozen, copies, [constants, notes])
