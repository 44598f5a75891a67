"""Training ops as programs: what an op launches for a signature, recorded once, then replayed.

A residual block makes a dozen launches forward and two dozen backward; choosing, checking and
describing each of them anew costs a small network more than what is then computed. Forward and
backward are functions of tensors that consist of launches alone, so for one kind of tensors they
are recorded (`Recorder` of the extension) and replayed by one call, on the CPU within one parallel
region. Intermediate tensors lie in an arena that ends with the call, what backward needs in one
workspace.

A program is used only where replaying it gave the bits of the ordinary path, and where PyTorch's
ops took no part in that. Under whatever watches or transforms what is called, and where processes
wait for one another, the op goes through PyTorch's dispatcher, launch by launch.
"""

from __future__ import annotations

import contextvars
import itertools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._extension import tensor_arg, types
from ..backends import Backend, recording
from ..backends.arguments import nhwc
from ..backends.bounded import Bounded
from ..backends.training import Replays
from .dispatch import chosen_backend, use_backend
from .modes import PLAIN, is_transformed
from .training_layers import LayerArguments, kernels
from .training_op import Gradients, Kept, TrainingOp, Wanted

_ALIGNMENT = 256  # bytes; of tensors in arena and workspace
_dtype = operator.attrgetter("dtype")
_COMPUTES_NOTHING = ("aten::empty", "aten::new_empty", "aten::set_")


class _Form(NamedTuple):
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


class _Part(NamedTuple):
    """A link without its tensors."""

    op: TrainingOp
    windows: list[int]
    frozen: list[bool]
    settings: tuple[Any, ...]
    saved: int  # tensors that its backward takes


class _Program:
    """Recorded launches from tensors to new ones, the last of which share one workspace."""

    def __init__(
        self, replays: Replays, launches: Any, results: Sequence[Tensor], own: int
    ) -> None:
        self.replays, self._launches = replays, launches
        forms = [_Form(t.shape, t.stride(), t.dtype) for t in results]
        self._shared = forms[own:]
        self._offsets = [0]
        for tensor in results[own:]:
            end = self._offsets[-1] + tensor.numel() * tensor.element_size()
            self._offsets.append(-(-end // _ALIGNMENT) * _ALIGNMENT)
        # Of bytes: whoever keeps saved tensors elsewhere in a smaller type does so with floats.
        workspace = _Form(torch.Size([self._offsets.pop()]), (1,), torch.uint8)
        device = results[0].device
        self._own = [replays.allocator(device, *form) for form in forms[:own]]
        self._workspace = replays.allocator(device, *workspace)
        self._device = device
        self.backward: dict[Hashable, _Program | None] = {}
        self.parts: list[_Part] = []  # of a forward

    def run(self, addresses: list[int]) -> tuple[list[Tensor], Tensor]:
        """The results with memory of their own, and the workspace; `addresses` of the inputs."""
        own = [allocate() for allocate in self._own]
        addresses += map(Tensor.data_ptr, own)
        workspace = self._workspace()
        addresses += self.shared_addresses(workspace)
        self.replays.replay(self._launches, self._device, addresses)
        return own, workspace

    def shared_addresses(self, workspace: Tensor) -> list[int]:
        start = workspace.data_ptr()
        return [start + offset for offset in self._offsets]

    def shared(self, workspace: Tensor, last: int | None = None) -> list[Tensor]:
        """The results in the workspace, or the last ones of them."""
        first = 0 if last is None else len(self._shared) - last
        found, memory = [], workspace
        for (shape, strides, dtype), offset in zip(
            self._shared[first:], self._offsets[first:], strict=True
        ):
            if memory.dtype != dtype:
                memory = workspace.view(dtype)
            found.append(memory.as_strided(shape, strides, offset // dtype.itemsize))
        return found


class _Watch(recording.Watch):
    """Sees whether PyTorch's ops compute anything, which no launch tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.computed |= not (
            func.is_view
            or func._schema.name.startswith(_COMPUTES_NOTHING)
            or (isinstance(result, Tensor) and result.is_meta)  # which checks of shapes make
        )
        return result


@torch.no_grad()
def _record(
    replays: Replays,
    function: Callable[[], Sequence[Tensor]],
    inputs: Sequence[Tensor],
    own: int,
    weights: Sequence[tuple[Tensor, Tensor]],
) -> _Program | None:
    """`function()` of `inputs` as a program, or None where it cannot be one.

    own: how many of the results, the first ones, get memory of their own. weights: which the
    function has, and what is among the inputs in their place.
    """
    places = {id(weight): operand for weight, operand in weights}
    try:
        function()  # which chooses kernels, measures and compiles
        recorder, watch = replays.extension.Recorder(), _Watch()
        recorder.start()
        token, placed = recording.recorder.set(recorder), recording.weights.set(places)
        try:
            with watch:
                results = function()
        finally:
            recording.recorder.reset(token)
            recording.weights.reset(placed)
            recorder.stop()
        if watch.computed or not {t.dtype for t in (*inputs, *results)} <= types().keys():
            return None
        described = [list(map(tensor_arg, tensors)) for tensors in (inputs, results)]
        launches = recorder.program(0, len(recorder), *described, [], _ALIGNMENT)
        if launches is None:
            return None
        program = _Program(replays, launches, results, own)
        found, workspace = program.run([t.data_ptr() for t in inputs])
        same = all(map(same_bits, results, [*found, *program.shared(workspace)]))
    except torch.OutOfMemoryError:  # recording keeps every intermediate tensor
        return None
    return program if same else None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether NaN and signed zeros agree too; both lie alike in memory."""
    flat = (t.as_strided((t.numel(),), (1,)).view(torch.uint8) for t in (a, b))
    return torch.equal(*flat)


def _described(tensors: Sequence[Tensor]) -> tuple[list[int], list[Hashable]]:
    """Addresses, and all else that a recorded launch depends on."""
    # One loop and few calls, because every op comes by here.
    addresses: list[int] = []
    forms: list[Hashable] = []
    for tensor in tensors:
        address = tensor.data_ptr()
        addresses.append(address)
        forms += (tensor.dtype, tensor.shape, tensor.stride(), address % 16, tensor.device)
    return addresses, forms


_programs: Bounded[Hashable, _Program | None] = Bounded()  # of all ops


def may_replay(x: Tensor) -> bool:
    """Whether nobody watches or transforms what is called, and `x` is an image."""
    return not (
        torch.compiler.is_compiling()
        or type(x) not in PLAIN
        or x.dim() != 4
        or not x.numel()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        or is_transformed()
    )


class Link(NamedTuple):
    """A call of a training op, on the result of the one before it."""

    op: TrainingOp
    layers: LayerArguments
    settings: tuple[Any, ...]


# Collects calls of training ops, and on which backend they ran, for those who want to know them.
seen: contextvars.ContextVar[list[tuple[Link, Backend | None]] | None] = contextvars.ContextVar(
    "seen", default=None
)


def run(
    op: TrainingOp, x: Tensor, layers: LayerArguments, *settings: Any
) -> tuple[Tensor, list[Tensor]]:
    """The op's result and each layer's `scale_shift`."""
    link = Link(op, layers, settings)
    if (links := seen.get()) is not None:
        links.append((link, chosen_backend()))
    if may_replay(x):
        x = nhwc(x)
        bound = bind([link], x)
        if bound is not None:
            return bound.replay(x)
    y, _, scale_shifts = op(x, layers, *settings)
    return y, scale_shifts


def bind(links: Sequence[Link], x: Tensor) -> Bound | None:
    """The calls in a row, the first one on `x`, as one program; None where there is none.

    x: channels_last, and one that programs may be replayed on (`may_replay`).
    """
    fields: tuple[list[Tensor], ...] = ([], [], [], [], [])
    called: list[object] = []
    for op, layers, settings in links:
        if settings[-1]:  # a group to synchronise with
            return None
        for field, tensors in zip(fields, layers[:5], strict=True):
            field += tensors
        # As many windows, flags and numbers as there are weights.
        called += (op, settings, *layers.windows, *layers.frozen, *layers.eps)
    weights, inputs = fields[0], [*itertools.chain(*fields)]
    if not PLAIN.issuperset(map(type, inputs)):
        return None
    pieces = kernels(x)
    replays = pieces.replays
    if replays is None:
        return None
    operands = replays.operands(weights, x.dtype)
    read = [x, *operands, *inputs[len(operands) :]]
    addresses, forms = _described(read)
    key = (pieces, replays.state(), *called, *map(_dtype, weights), *forms)
    try:
        program = _programs[key]
    except KeyError:
        if recording.is_capturing(x):
            return None
        parts: list[_Part] = []

        def forward() -> list[Tensor]:
            parts.clear()
            y, between, scale_shifts = x, [], []
            for op, layers, settings in links:
                between.append(y)
                y, saved, found = op.forward(y, layers, *settings)
                between += saved
                scale_shifts += found
                parts.append(_Part(op, layers.windows, layers.frozen, settings, len(saved)))
            return [y, *between[1:], *scale_shifts]

        program = _record(replays, forward, read, 1, list(zip(weights, operands, strict=True)))
        if program is not None:
            program.parts = parts
        _programs[key] = program
    if program is None:
        return None
    call = _Call(program, chosen_backend(), len(weights))
    return Bound(call, inputs, read[1:], addresses[1:])


class _Call(NamedTuple):
    program: _Program
    backend: Backend | None
    layers: int

    def backward(
        self,
        run: Callable[[TrainingOp], Callable[..., Gradients]],
        needs: Sequence[bool],
        grad: Tensor,
        x: Tensor,
        y: Tensor,
        weights: list[Tensor],
        shared: list[Tensor],
    ) -> list[Tensor]:
        """The gradients that `needs` asks for, of x, weights, gammas and betas: by `run(op)`, the
        last op first. `shared`: what the forward left in its workspace."""
        count, empty = self.layers, x.new_empty(0)
        of_weights, gammas, betas = (needs[1 + i * count : 1 + (i + 1) * count] for i in range(3))
        affine = [a or b for a, b in zip(gammas, betas, strict=True)]
        found = [[empty] * count for _ in range(3)]
        between, scale_shifts = [x, *shared[:-count]], shared[-count:]
        last = count
        for part in reversed(self.program.parts):
            first = last - len(part.frozen)
            rest = len(between) - part.saved
            source, saved = between[rest - 1], between[rest:]
            del between[rest - 1 :]
            below = needs[0] or any(of_weights[:first]) or any(affine[:first])
            here = slice(first, last)
            kept = Kept(
                grad, source, y, weights[here], saved, scale_shifts[here], part.windows, part.frozen
            )
            wanted = Wanted(below, list(of_weights[here]), affine[here])
            grad, *own = run(part.op)(kept, wanted, *part.settings)
            for all_, some in zip(found, own, strict=True):
                all_[here] = some
            if not below:
                break
            y, last = source, first
        return [grad, *found[0], *found[1], *found[2]]


class Bound(NamedTuple):
    """A program for tensors of x's form, with what the links have beside x, and what stands for
    that in the launches."""

    call: _Call
    inputs: list[Tensor]
    read: list[Tensor]
    addresses: list[int]  # of `read`

    def replay(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last op's result and each layer's `scale_shift`."""
        scale_shifts: list[Tensor] = []
        addresses = [x.data_ptr(), *self.addresses]
        y: Tensor = _Replayed.apply(self.call, addresses, scale_shifts, x, *self.inputs)
        return y, scale_shifts


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: _Call, addresses: list[int], scale_shifts: list[Tensor], *inputs: Tensor
    ) -> Tensor:
        """addresses: of the inputs. Appends to `scale_shifts`, which have no gradient."""
        (y,), workspace = call.program.run(addresses)
        count = call.layers
        scale_shifts += call.program.shared(workspace, count)
        ctx.call = call
        ctx.dtypes = [tensor.dtype for tensor in inputs[1 + count : 1 + 3 * count]]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: 1 + count], y, workspace)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:]
        if grad is None:
            return (None,) * (3 + len(needs))
        call: _Call = ctx.call
        program, count = call.program, call.layers
        x, *weights, y, workspace = ctx.saved_tensors

        def ordinary(run: Callable[[TrainingOp], Callable[..., Gradients]]) -> list[Tensor]:
            assert grad is not None
            return call.backward(run, needs, grad, x, y, weights, program.shared(workspace))

        if torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() > 0:
            with use_backend(call.backend):
                grads = ordinary(lambda op: op.registered_backward)
        else:
            grad, x, y = map(nhwc, (grad, x, y))
            operands = program.replays.operands(weights, x.dtype)
            inputs = [grad, x, y, *operands]
            addresses, forms = _described(inputs)
            key = (program.replays.state(), needs, *forms)
            try:
                found = program.backward[key]
            except KeyError:
                found = None
                if not recording.is_capturing(x):
                    with use_backend(call.backend):
                        every = [*inputs, *program.shared(workspace)]
                        found = _record(
                            program.replays,
                            lambda: ordinary(lambda op: op.backward),
                            every,
                            1 + 3 * count,
                            list(zip(weights, operands, strict=True)),
                        )
                    program.backward[key] = found
            if found is None:
                with use_backend(call.backend), torch.no_grad():
                    grads = ordinary(lambda op: op.backward)
            else:
                grads, _ = found.run(addresses + program.shared_addresses(workspace))
        for i, dtype in enumerate(ctx.dtypes, 1 + count):
            if grads[i].dtype != dtype:
                grads[i] = grads[i].to(dtype)
        wanted_grads = [g if n else None for g, n in zip(grads, needs, strict=False)]
        return (None, None, None, *wanted_grads, *(None,) * (len(needs) - len(grads)))
