"""The form that all training ops share: a forward and a backward, each an op, over layers.

    forward(x, layers, *settings) -> result, tensors saved for backward, `scale_shift` of each layer
    backward(kept, wanted, *settings) -> gradients of x, and of each layer's weight, gamma and beta

A gradient that is not wanted has no elements. The last of the settings is `sync_group`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .registry import empty_result
from .training_layers import LAYERS_SCHEMA, LayerArguments, define, differentiate

_KEPT_SCHEMA = (
    "Tensor grad, Tensor x, Tensor y, Tensor[] weights, Tensor[] saved, Tensor[] scale_shifts, "
    "int[] windows, bool[] frozen"
)
_WANTED_SCHEMA = "bool needs_x, bool[] needs_weights, bool[] needs_affine"

Results = tuple[Tensor, list[Tensor], list[Tensor]]
Gradients = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]


class Kept(NamedTuple):
    """What a backward takes: the result's gradient, and what is left of the forward."""

    grad: Tensor
    x: Tensor
    y: Tensor
    weights: list[Tensor]
    saved: list[Tensor]
    scale_shifts: list[Tensor]
    windows: list[int]
    frozen: list[bool]


class Wanted(NamedTuple):
    """Which gradients are wanted: x's, and of each layer the weight's, and gamma's or beta's."""

    x: bool
    weights: list[bool]
    affine: list[bool]


_LAYERS, _KEPT, _WANTED = (len(kind._fields) for kind in (LayerArguments, Kept, Wanted))


class TrainingOp:
    """A registered training op; calling it goes through PyTorch's dispatcher."""

    def __init__(
        self,
        name: str,
        settings: str,
        forward: Callable[..., Results],
        fake_forward: Callable[..., Results],
        backward: Callable[..., Gradients],
        fake_backward: Callable[..., Gradients],
    ) -> None:
        """settings: their part of the schema."""
        self.forward, self.backward = forward, backward

        def of_layers(run: Callable[..., Results]) -> Callable[..., Results]:
            return lambda x, *flat: run(x, LayerArguments(*flat[:_LAYERS]), *flat[_LAYERS:])

        def of_kept(run: Callable[..., Gradients]) -> Callable[..., Gradients]:
            return lambda *flat: run(
                Kept(*flat[:_KEPT]), Wanted(*flat[-_WANTED:]), *flat[_KEPT:-_WANTED]
            )

        self._forward_op = define(
            name,
            f"(Tensor x, {LAYERS_SCHEMA}, {settings}) -> (Tensor, Tensor[], Tensor[])",
            of_layers(forward),
            of_layers(fake_forward),
        )
        self._backward_op = define(
            f"{name}_backward",
            f"({_KEPT_SCHEMA}, {settings}, {_WANTED_SCHEMA}) "
            "-> (Tensor, Tensor[], Tensor[], Tensor[])",
            of_kept(backward),
            of_kept(fake_backward),
        )
        differentiate(name, _save, self._differentiate, f"{name}_backward")

    def __call__(self, x: Tensor, layers: LayerArguments, *settings: Any) -> Results:
        results: Results = self._forward_op(x, *layers, *settings)
        return results

    def registered_backward(self, kept: Kept, wanted: Wanted, *settings: Any) -> Gradients:
        """The backward through PyTorch's dispatcher, which has no second derivative."""
        gradients: Gradients = self._backward_op(*kept, *settings, *wanted)
        return gradients

    def _differentiate(self, ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        count, statistics = len(ctx.frozen), [None] * ctx.frozen_layers
        # Behind those: windows, frozen, eps and settings.
        no_gradients = (statistics, list(statistics), *(None,) * (3 + len(ctx.settings)))
        if grad is None:
            return (None, *([None] * count for _ in range(3)), *no_gradients)
        x, y, *tensors = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad[:4]
        affine = [a or b for a, b in zip(*needs[1:], strict=True)]
        saved = tensors[count:-count], tensors[-count:]
        kept = Kept(grad, x, y, tensors[:count], *saved, ctx.windows, ctx.frozen)
        wanted = Wanted(needs_x, list(needs[0]), affine)
        x_grad, *found = self.registered_backward(kept, wanted, *ctx.settings)
        return (
            x_grad if needs_x else None,
            *(
                [g.to(d) if n else None for g, n, d in zip(*parts, strict=True)]
                for parts in zip(found, needs, ctx.dtypes, strict=True)
            ),
            *no_gradients,
        )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    x, *flat = inputs
    layers = LayerArguments(*flat[:_LAYERS])
    y, saved, scale_shifts = output
    ctx.mark_non_differentiable(*saved, *scale_shifts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y, *layers.weights, *saved, *scale_shifts)
    ctx.settings = flat[_LAYERS:]
    ctx.dtypes = [[tensor.dtype for tensor in tensors] for tensors in layers[:3]]
    ctx.frozen_layers = len(layers.frozen_means)
    ctx.windows, ctx.frozen = layers.windows, layers.frozen


def empty_gradients(kept: Kept, wanted: Wanted, layers: Sequence[bool]) -> Gradients:
    """What a backward gives in shape; `layers`: whether each one's gamma and beta are computed."""
    x = kept.x

    def vectors() -> list[Tensor]:
        return [
            scale_shift.new_empty(scale_shift.shape[1]) if computed else x.new_empty(0)
            for scale_shift, computed in zip(kept.scale_shifts, layers, strict=True)
        ]

    return (
        empty_result(x, x.shape) if wanted.x else x.new_empty(0),
        [
            empty_result(weight, weight.shape) if needed else x.new_empty(0)
            for weight, needed in zip(kept.weights, wanted.weights, strict=True)
        ],
        vectors(),
        vectors(),
    )
