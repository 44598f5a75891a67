"""Records a network's forward, part by part, as programs of the extension."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import fusion
from .._extension import TensorArg, tensor_arg, types
from ..backends import recording
from ..backends.arguments import nhwc
from ..backends.autotune import generation
from ..backends.live_cache import dense
from ..blocks import BasicBlock, Bottleneck, PaddedIdentity, PlainBlock
from ..ops.training_programs import same_bits
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
            image, form = x, Form.of(x)
            if form != step.input and type(x) is Tensor:
                image = _laid_out(x)
                form = Form.of(image)
            # What ran in between may have changed anything.
            if form == step.input and (fresh or (may_serve(x) and self.is_valid())):
                out = _replay(step, image, arenas)
                if out is not None:
                    x = out
                    continue
                self.outdated = True
            for call in step.calls:
                x = call(x)
            fresh = False
        return x


def _laid_out(x: Tensor) -> Tensor:
    return nhwc(x) if x.dim() == 4 else x


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


class _Run(NamedTuple):
    """A part's call, and which of the launches are its."""

    input: Tensor
    output: Tensor
    first: int
    last: int  # the one behind them
    notes: recording.Notes
    is_complete: bool  # launches are all that was done


class _Recording:
    """The launches of parts, one after the other, and programs made of them."""

    def __init__(self, extension: ModuleType, snapshot: Snapshot) -> None:
        self._extension = extension
        self._recorder = extension.Recorder()
        self._parameters = _described(snapshot.tensors)

    def call(self, piece: Part, x: Tensor) -> _Run:
        first, notes, watch = len(self._recorder), recording.Notes(), _Watch()
        if piece.modules is None:
            return _Run(x, piece.call(x), first, first, notes, False)
        token = recording.current.set(notes)
        self._recorder.start()
        try:
            with watch:
                out = piece.call(x)
        finally:
            self._recorder.stop()
            recording.current.reset(token)
        run = _Run(x, out, first, len(self._recorder), notes, not watch.wrote)
        return run._replace(is_complete=run.is_complete and self.program([run]) is not None)

    def program(self, runs: Sequence[_Run]) -> Any:
        """The launches of calls in a row; None where they are not all that these did."""
        x, out = runs[0].input, runs[-1].output
        if not {x.dtype, out.dtype} <= types().keys():
            return None
        made = [tensor for run in runs for tensor in _made(run.notes)]
        return self._recorder.program(
            runs[0].first,
            runs[-1].last,
            [tensor_arg(x)],
            [tensor_arg(out)],
            [*self._parameters, *_described(made)],
            _ALIGNMENT[x.device.type],
        )

    def contents(self, runs: Sequence[_Run]) -> Any:
        """Of the weights that these calls read in a packed form."""
        if not hasattr(self._extension, "Contents"):  # the simulator, which packs nothing
            return None
        used = [note for run in runs for note in run.notes.packed]
        packed = {id(note.weight): note for note in used if hasattr(note.packed, "packed")}
        weights = [note.weight for note in packed.values()]
        return self._extension.Contents(
            [tensor_arg(weight) for weight in weights],
            [note.fingerprint for note in packed.values()],
            bool(weights) and not any(weight.is_pinned() for weight in weights),
        )


def _described(tensors: Iterable[Tensor]) -> list[TensorArg]:
    return [tensor_arg(tensor) for tensor in tensors if tensor.dtype in types()]


def _made(notes: recording.Notes) -> list[Tensor]:
    """What was made of parameters."""
    noted = (*notes.packed, *notes.frozen)
    packed = [note.packed.packed for note in noted if hasattr(note.packed, "packed")]
    return [*packed, *(copy for _, copy in notes.copies)]


def record(network: Network, x: Tensor, extension: ModuleType) -> tuple[Tensor, Plan | None]:
    """The network's result for `x`, and the plan, or None where there is nothing to be gained."""
    pieces = list(network.plannable_parts())
    watched: list[Any] = [network, *network.stages()]
    watched += [m for piece in pieces if piece.modules is not None for m in piece.modules]
    snapshot = Snapshot(extension, list(dict.fromkeys(watched)))
    promised = snapshot.is_frozen  # by a FrozenNetwork, which watches its version counters
    before = generation()
    recorded, runs, out = _Recording(extension, snapshot), [], x
    for piece in pieces:
        run = recorded.call(piece, out)
        laid_out = _laid_out(out)
        if piece.modules is not None and not run.is_complete and laid_out is not out:
            # No kernel reads that layout: the copy has to be made before the program runs.
            again = recorded.call(piece, laid_out)
            if again.is_complete and same_bits(again.output, run.output):
                run = again
        runs.append(run)
        out = run.output
    known = {id(tensor) for tensor in snapshot.tensors}
    notes = [run.notes for run in runs]
    packed = [note for each in notes for note in each.packed]
    frozen = [note for each in notes for note in each.frozen]
    copies = [copy for each in notes for copy in each.copies]
    # Then copies of parameters are as good as packed weights, once they are there for all streams.
    if promised and all(recording.may_keep(source) for source, _ in copies):
        made = (
            recording.Packed(source, recording.version(source), copy) for source, copy in copies
        )
        copies, frozen = [], [*frozen, *made]
    made_from = [*(note.weight for note in (*packed, *frozen)), *(source for source, _ in copies)]
    if (
        not snapshot.is_complete()
        or generation() != before
        or any(id(tensor) not in known for tensor in made_from)
        or any(dense(note.weight) is not note.weight for note in packed)
    ):
        return out, None
    steps: list[Segment | Callable[[Tensor], Tensor]] = []
    first = 0
    while first < len(runs):
        last = first
        while (
            last < len(runs)
            and runs[last].is_complete
            and (last == first or runs[last].input is runs[last - 1].output)
        ):
            last += 1
        if last == first:
            steps.append(pieces[first].call)
            first += 1
            continue
        part = runs[first:last]
        calls = [piece.call for piece in pieces[first:last]]
        forms = Form.of(part[0].input), Form.of(part[-1].output)
        steps.append(Segment(recorded.program(part), recorded.contents(part), calls, *forms))
        first = last
    if not any(isinstance(step, Segment) for step in steps):
        return out, None
    kept = [*snapshot.tensors, *(tensor for each in notes for tensor in _made(each)), notes]
    return out, Plan(snapshot, steps, [] if promised else frozen, copies, kept)
