"""CUDA graphs: a network's forward, or a whole training step, as one launch.

A graph replays what was captured, on the memory that it was captured on. What may have changed
since is looked for at each call, and answered by another capture; what a graph cannot do is an
error that says so.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import _extension
from ..ops.checks import check_is_module
from ..ops.modes import is_recorded, is_transformed
from .validity import Snapshot, surroundings

# Passes before a capture: kernels are compiled and chosen, and memory is found, outside of it.
_WARM_UP = 3
# What PyTorch's optimizers begin at 0 in the state of a parameter.
_FROM_ZERO = {
    *("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg"),
    *("acc_delta", "momentum_buffer", "ax", "prev"),
}
_Loss = Callable[[Tensor, Tensor], Tensor]


def _check_cuda(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.device.type != "cuda":
        found = tensor.device if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(
            f"{name} must be a CUDA tensor, as only GPUs have graphs; found {found}. On the CPU "
            "call the model itself, whose plans do the same."
        )


def _check_same(name: str, found: Tensor, captured: Tensor) -> None:
    for attribute in ("shape", "dtype", "device"):
        here, there = getattr(found, attribute), getattr(captured, attribute)
        if here != there:
            raise ValueError(
                f"{name} has {attribute} {here}, and the graph was captured for {there}; make "
                "another one with such an example."
            )


def _check_unwatched(model: nn.Module) -> None:
    """That every call may be replaced by a replay, which calls no Python code."""
    for name, module in model.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            if getattr(module, kind):
                raise ValueError(
                    f"{name or 'the model'} has {kind[1:].replace('_', ' ')}, which a graph's "
                    "replay would not call; remove them, or call the model itself."
                )
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ValueError(f"{name} has a hook on its gradient, which a replay would not call.")


def _own(example: Tensor) -> Tensor:
    """A copy that stays where it is, and may be written to in any mode."""
    with torch.inference_mode(False), torch.no_grad():
        return example.detach().clone()


def _check_plain_call() -> None:
    if is_transformed() or is_recorded() or torch.compiler.is_compiling():
        raise RuntimeError(
            "a captured graph cannot be replayed inside a transform, tracer or mode, which would "
            "see none of its ops; call the model itself there."
        )
    if _has_any_global_hook():
        raise RuntimeError(
            "there are hooks of all modules, which a graph's replay would not call; remove them, "
            "or call the model itself."
        )


def _warm_up(step: Callable[[], object]) -> None:
    """Runs it on another stream, as a capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def _surroundings(x: Tensor) -> Hashable:
    """What a capture depends on beside the network: as a plan does, and, as it holds the last
    layer's product in any case, on how float32's are computed."""
    return surroundings(x), torch.backends.cuda.matmul.fp32_precision


def _snapshot(*called: object) -> Snapshot:
    """Of the modules among what a capture calls."""
    found = [m for one in called if isinstance(one, nn.Module) for m in one.modules()]
    snapshot = Snapshot(_extension.load(), found)
    if not snapshot.is_complete():
        raise RuntimeError(
            "this Python cannot tell whether the model's classes have changed (it ran out of type "
            "versions); call the model itself."
        )
    return snapshot


class Graphed:
    """A model's forward for inputs of one shape, made by `graphed`."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        check_is_module(model)
        _check_cuda("example", example)
        self._model = model
        self._input = _own(example)
        self._capture()

    def __call__(self, x: Tensor) -> Tensor:
        """The model's result for `x`, in a new tensor; raises as `graphed` does."""
        _check_cuda("input", x)
        _check_same("input", x, self._input)
        _check_plain_call()
        if not (self._snapshot.holds() and _surroundings(self._input) == self._surroundings):
            self._capture()
        with torch.no_grad():
            self._input.copy_(x)
            self._graph.replay()
            return self._output.clone()

    def _capture(self) -> None:
        if self._model.training:
            raise ValueError(
                "the model is in training mode, whose forward changes its statistics; call "
                "model.eval() first, or capture a whole step with resnet_fused.graphed_step."
            )
        _check_unwatched(self._model)
        self._snapshot = _snapshot(self._model)
        with torch.cuda.device(self._input.device), torch.no_grad():
            _warm_up(lambda: self._model(self._input))
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = self._model(self._input)
        # After the warm-up, which may have chosen kernels.
        self._surroundings = _surroundings(self._input)


def graphed(model: nn.Module, example: Tensor) -> Graphed:
    """The model's forward as a CUDA graph: one launch in place of the host's work at each layer.

    Args:
        model: in eval mode, on the GPU; without hooks.
        example: an input (N, C, H, W) on the GPU; the graph serves its shape, dtype and device.

    Returns a function of an input that gives a new tensor, without gradients. Parameters and
    statistics are read as they are at each call. Where the model is no longer the one that was
    captured (other modules, replaced or moved parameters, another backend, other choices of
    kernels), the call captures anew first.

    Raises TypeError for what is no module, ValueError for tensors that are not on a GPU, inputs of
    another shape or dtype, a model in training mode or with hooks, and RuntimeError inside
    transforms and modes.
    """
    return Graphed(model, example)


class GraphedStep:
    """A training step for batches of one shape, made by `graphed_step`."""

    def __init__(
        self,
        model: nn.Module,
        loss: _Loss,
        optimizer: torch.optim.Optimizer,
        example_input: Tensor,
        example_target: Tensor,
        autocast: torch.dtype | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        check_is_module(model)
        _check_cuda("example_input", example_input)
        _check_cuda("example_target", example_target)
        self._model, self._loss, self._optimizer = model, loss, optimizer
        self._autocast, self._scaler = autocast, scaler
        self._input, self._target = _own(example_input), _own(example_target)
        self._capture()

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """One step on the batch; its loss, in a new tensor. Raises as `graphed_step` does."""
        for name, found, captured in (("input", x, self._input), ("target", target, self._target)):
            _check_cuda(name, found)
            _check_same(name, found, captured)
        _check_plain_call()
        if not (
            self._snapshot.holds()
            and self._trained == _trained(self._snapshot)
            and _surroundings(self._input) == self._surroundings
        ):
            raise RuntimeError(
                "the model, the loss, or what surrounds them, is not what it was when the step was "
                "captured: modules, attributes, moved or frozen parameters, hooks on gradients, "
                "the backend or its choices of kernels; make another step with "
                "resnet_fused.graphed_step."
            )
        held = _held(self._optimizer)
        if len(held) != len(self._held) or not all(map(operator.is_, held, self._held)):
            raise RuntimeError(
                "the optimizer's parameters, its state or a learning rate are other tensors than "
                "when the step was captured, as after load_state_dict, and a replay would go on "
                "with those; fill them in place, or make another step with "
                "resnet_fused.graphed_step."
            )
        if (settings := _settings(self._optimizer)) != self._settings:
            raise RuntimeError(
                f"the optimizer's settings were {self._settings} when the step was captured, which "
                f"a replay keeps, and are {settings}; give a learning rate that changes as a "
                "tensor, or make another step with resnet_fused.graphed_step."
            )
        with torch.no_grad():
            self._input.copy_(x)
            self._target.copy_(target)
            self._graph.replay()
            return self._result.clone()

    def _capture(self) -> None:
        model = self._model
        if not model.training:
            raise ValueError("the model is in eval mode; call model.train() first.")
        _check_unwatched(model)
        _check_synchronised(model)
        _check_optimizer(self._optimizer, self._scaler)
        with torch.cuda.device(self._input.device), torch.enable_grad():
            # The warm-up's steps are real ones: what they change is put back.
            kept = _State(model, self._optimizer, self._scaler)
            _warm_up(self._step)
            kept.restore()
            self._optimizer.zero_grad(set_to_none=True)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = self._step()
        self._snapshot = _snapshot(model, self._loss)
        self._trained = _trained(self._snapshot)
        self._settings, self._held = _settings(self._optimizer), _held(self._optimizer)
        self._surroundings = _surroundings(self._input)

    def _step(self) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", self._autocast, enabled=self._autocast is not None):
            value = self._loss(self._model(self._input), self._target)
        if self._scaler is None:
            value.backward()
            self._optimizer.step()
        else:
            self._scaler.scale(value).backward()
            self._scaler.step(self._optimizer)
            self._scaler.update()
        return value.detach()


def _check_synchronised(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"{name or 'the model'} is a SyncBatchNorm, whose exchange between processes is "
                "not captured; train it without a graph."
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "the model is wrapped in DistributedDataParallel, whose hooks a replay would not "
                "call; train it without a graph."
            )


def _trained(snapshot: Snapshot) -> list[tuple[bool, bool]]:
    """Which tensors have gradients, and on which gradients somebody has a hook."""
    return [
        (t.requires_grad, bool(t._backward_hooks or t._post_accumulate_grad_hooks))
        for t in snapshot.tensors
    ]


def _held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Its tensors, which a replay reads and writes where they were captured."""
    held: list[Any] = []
    for group in optimizer.param_groups:
        held += (*group["params"], *group.values())
    for state in optimizer.state.values():
        held += state.values()
    return [value for value in held if isinstance(value, Tensor)]


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What its groups hold beside tensors, which are read as they are."""
    return [
        {k: v for k, v in group.items() if k != "params" and not isinstance(v, Tensor)}
        for group in optimizer.param_groups
    ]


def _check_optimizer(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    for group in optimizer.param_groups:
        if "capturable" in group and not group["capturable"]:
            raise ValueError(
                f"{type(optimizer).__name__} keeps its step count on the host; make it with "
                "capturable=True."
            )
    if scaler is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"{type(optimizer).__name__} asks the host whether a scaled gradient overflowed; make "
            "it with fused=True, or compute in bfloat16 without a scaler."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS decides on the host how to go on, and cannot be captured.")


class _State:
    """What training steps change, to be put back in place."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._tensors = [*model.parameters(), *model.buffers()]
        self._copies = [t.detach().clone() for t in self._tensors]
        self._optimizer, self._scaler = optimizer, scaler
        self._had_state = {
            p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
            for p, state in optimizer.state.items()
        }
        self._scale = None if scaler is None else scaler.state_dict()

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.copy_(copy)
        if self._scaler is not None and self._scale is not None:
            self._scaler.load_state_dict(self._scale)
        # In place: the optimizer's tensors stay those that the warm-up made.
        refused = self._refused()
        for parameter, state in self._optimizer.state.items():
            before = self._had_state.get(parameter, {})
            for name, value in list(state.items()):
                if name in before and isinstance(value, Tensor):
                    value.copy_(before[name])
                elif name in before:
                    state[name] = before[name]
                elif refused:
                    del state[name]
                elif isinstance(value, Tensor):
                    value.zero_()
        if refused:
            raise ValueError(f"{type(self._optimizer).__name__} {refused}.")

    def _refused(self) -> str | None:
        """Why a replay, or the first one, would not do what the optimizer does."""
        dampens = any(group.get("dampening") for group in self._optimizer.param_groups)
        from_zero = _FROM_ZERO - {"momentum_buffer"} if dampens else _FROM_ZERO
        for parameter, state in self._optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    on_host = value.device != parameter.device
                else:
                    on_host = isinstance(value, (int, float)) and not isinstance(value, bool)
                if on_host:
                    return f"keeps its {name!r} on the host, which no replay changes"
                if name not in from_zero and name not in self._had_state.get(parameter, {}):
                    return (
                        f"may begin its {name!r} at another number than 0, to which it cannot be "
                        "put back; make one step without a graph before this"
                    )
        return None


def graphed_step(
    model: nn.Module,
    loss: _Loss,
    optimizer: torch.optim.Optimizer,
    example_input: Tensor,
    example_target: Tensor,
    *,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> GraphedStep:
    """A whole training step as a CUDA graph: forward, loss, backward, the optimizer's step.

    Args:
        model: in training mode, on the GPU; without hooks.
        loss: of the model's result and the target; a scalar. It may not wait for the GPU.
        optimizer: of the model's parameters. Those with a `capturable` argument need it True; a
            learning rate that a schedule changes has to be a tensor, as a number is captured as it
            is. State that may begin at another number than 0 (NAdam, ASGD, Rprop, dampening) has to
            be there: make one step before.
        example_input: on the GPU; the graph serves its shape and dtype.
        example_target: on the GPU; the graph serves its shape and dtype.
        autocast: the dtype to compute in, or None.
        scaler: of the losses in float16, or None.

    Returns a function of an input and a target that makes one step and returns its loss. Making it
    runs the step a few times and then puts parameters, statistics and the optimizer's state back.

    Raises TypeError for what is no module, ValueError for what is not on a GPU or has another shape
    or dtype, a model in eval mode or with hooks, SyncBatchNorm, DistributedDataParallel and
    optimizers that cannot be captured; RuntimeError, at a call, where the model, the loss or the
    optimizer's tensors are not those that were captured.
    """
    return GraphedStep(model, loss, optimizer, example_input, example_target, autocast, scaler)
