"""How an op is made: schema, checks, fake, choice of backend, autograd and autocast, in one place.

An op is described by its plain PyTorch meaning, whose name and signature are the op's, and by the
function that checks its arguments and gives the result's shape. An argument is annotated as
`Tensor`, `bool` or one of the groups of `resnet_fused.parameters`, each of which may be absent
(`| None`); `schema.py` says how the op's schema lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..backends import Backend, Candidate, Candidates, autotune
from ..parameters import ConvBn, Convolution, Gate
from .checks import check_is_tensor
from .dispatch import serving
from .modes import is_recorded, is_transformed, refuse_tangents
from .schema import Parameter

_LIBRARY = "reference"  # the backend that has no kernels of its own

library = torch.library.Library("resnet_fused", "DEF")
registered: dict[str, Op] = {}


class Op:
    """A registered operator; calling it with grouped arguments runs it.

    Inside transforms, tracers and modes (`resnet_fused.ops.modes`) its reference runs in its place.
    """

    def __init__(
        self,
        reference: Callable[..., Tensor],
        output_shape: Callable[..., Sequence[int]],
        listed: Callable[[Backend], Callable[..., Candidates]],
        composition: Candidate | None = None,
        result_dtype: Callable[..., torch.dtype] | None = None,
        keeps_layout: bool = False,
    ) -> None:
        """`listed`: a backend's method that lists this op's candidates. `composition`: the op made
        of other ops, each of which makes its own choice. `result_dtype`: of a quantised op, which
        has no gradient and which autocast does not concern; others give what they take.
        `keeps_layout`: the result is channels_last if the main input is, else contiguous."""
        self.name = name = reference.__name__
        registered[name] = self
        self._listed = listed
        self._composition = composition
        self._result_dtype = result_dtype
        self._keeps_layout = keeps_layout
        kinds = get_type_hints(reference)
        del kinds["return"]
        self._parameters = [Parameter(name, kind) for name, kind in kinds.items()]
        self._output_shape = output_shape
        self._reference = reference
        fields = [field for parameter in self._parameters for field in parameter.fields]
        self._statistics = [field.endswith(("_mean", "_var")) for field in fields]
        arguments = ", ".join(fields)
        library.define(f"{name}({arguments}) -> Tensor")
        library.impl(name, self._run, "CompositeExplicitAutograd")
        qualified = f"resnet_fused::{name}"
        torch.library.register_fake(qualified, self._fake, lib=library)
        if result_dtype is None:
            torch.library.register_autograd(
                qualified, self._backward, setup_context=self._save, lib=library
            )
        self._overload = getattr(torch.ops.resnet_fused, name).default

    def __call__(self, *arguments: Any) -> Tensor:
        check_is_tensor(arguments[0])
        device = arguments[0].device.type
        if self._result_dtype is None and autocasts(device):
            dtype = torch.get_autocast_dtype(device)
            arguments = tuple(_autocast(argument, dtype) for argument in arguments)
        # Dynamo records the op whole, whatever modes are around its own work.
        if is_transformed() or (not torch.compiler.is_compiling() and is_recorded()):
            self._output_shape(*arguments)
            with torch.autocast(device, enabled=False):
                return self._reference(*arguments)
        return self._overload(*self._flatten(arguments))

    def _flatten(self, arguments: Sequence[Any]) -> list[Any]:
        """Arguments as the schema takes them."""
        flat: list[Any] = []
        for parameter, argument in zip(self._parameters, arguments, strict=True):
            parameter.flatten(argument, flat)
        return flat

    def _group(self, flat: Sequence[Any]) -> list[Any]:
        """Arguments as the reference takes them."""
        fields = iter(flat)
        return [parameter.group(fields) for parameter in self._parameters]

    def _fake(self, *flat: Any) -> Tensor:
        arguments = self._group(flat)
        return self._empty(arguments, self._output_shape(*arguments))

    def _empty(self, arguments: Sequence[Any], shape: Sequence[int]) -> Tensor:
        x = arguments[0]
        dtype = None if self._result_dtype is None else self._result_dtype(*arguments)
        if self._keeps_layout and not x.is_contiguous(memory_format=torch.channels_last):
            return torch.empty(shape, dtype=dtype, device=x.device)
        return empty_result(x, shape, dtype)

    def _run(self, *flat: Any) -> Tensor:
        refuse_tangents(self.name, flat)
        arguments = self._group(flat)
        shape = self._output_shape(*arguments)
        if 0 in shape:
            return self._empty(arguments, shape)
        return self.compute(*arguments)

    def compute(self, *arguments: Any) -> Tensor:
        """The result for checked arguments, none of it empty, by the candidate that is chosen."""
        among = serving(arguments[0])
        candidate = autotune.choose(
            self.name,
            arguments,
            lambda: self._candidates(among, arguments),
            self._reference,
            among=among,
            per_image=True,
        )
        result: Tensor = candidate.launch(*arguments)
        return result

    def _candidates(self, among: Sequence[Backend], arguments: Sequence[Any]) -> Candidates:
        """The backends' kernels, then the op as a composition of others, then PyTorch's own."""
        found = [c for backend in among for c in self._listed(backend)(*arguments)]
        if self._composition is not None and among[0].name != _LIBRARY:
            found.append(self._composition)
        if among[-1].name == _LIBRARY or not found:
            found.append(Candidate("pytorch", self._reference))
        return found

    def _save(self, ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        # Statistics are copied: a forward in training mode changes them, and the gradient is to be
        # that of what was computed. PyTorch's own kernels change them unseen by version counters.
        inputs = tuple(
            v.clone() if statistic and isinstance(v, Tensor) else v
            for v, statistic in zip(inputs, self._statistics, strict=True)
        )
        ctx.save_for_backward(*(v for v in inputs if isinstance(v, Tensor)))
        ctx.others = tuple(None if isinstance(v, Tensor) else (v,) for v in inputs)

    def _backward(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The vector-Jacobian product of the reference, recomputed from the saved inputs.

        Only inputs are kept, so a fused forward holds no intermediate; the aliases keep the graph
        of the saved tensors, which makes the product differentiable again.
        """
        tensors = iter(ctx.saved_tensors)
        flat = [next(tensors) if other is None else other[0] for other in ctx.others]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[: len(flat)]) if needed]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            for i in wanted:
                flat[i] = flat[i].view_as(flat[i])
            output = self._reference(*self._group(flat))
            found = torch.autograd.grad(
                output,
                [flat[i] for i in wanted],
                grad,
                create_graph=create_graph,
                allow_unused=True,
            )
        gradients: list[Tensor | None] = [None] * len(flat)
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
        return tuple(gradients)


def empty_result(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised result of that shape, channels_last if it is an image, else like `like`."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def autocasts(device: str) -> bool:
    # Not is_autocast_available(device), which torch.compile of PyTorch 2.9 cannot trace.
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's where it is on."""
    if x.dtype == torch.float64 or not autocasts(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def _autocast(argument: Any, dtype: torch.dtype) -> Any:
    """Tensors and weights in autocast's dtype; parameters of normalisations stay as they are."""
    if isinstance(argument, ConvBn):
        return argument._replace(conv=_autocast(argument.conv, dtype))
    if isinstance(argument, Convolution):
        return argument._replace(weight=argument.weight.to(dtype))
    if isinstance(argument, Gate):
        return Gate(*(_autocast(field, dtype) for field in argument))
    if (
        isinstance(argument, Tensor)
        and argument.is_floating_point()
        and argument.dtype != torch.float64
    ):
        return argument.to(dtype)
    return argument
