"""How a block or a stem trains: by which backend's fused op, or module by module.

The choice is made for forward and backward together, once for each signature, as any choice of a
kernel is (`resnet_fused.backends.autotune`). Where nothing was measured the modules train, so that
training is no slower than PyTorch's on a GPU that nobody has measured; on the CPU, where nothing is
measured ahead of use, what the backend says of the block decides. The fused ops keep less than 0.6
of the bytes for backward with `RESNET_FUSED_TRAINING=memory`, which chooses among them alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import backends, settings
from ..backends import Backend, Candidate, autotune
from ..backends.autotune import families
from ..parameters import Layer, MaxPool
from ..reference import training as reference
from .block_training import residual_block_training
from .dispatch import chosen_backend, serving, use_backend
from .registry import autocast_dtype
from .stem_training import stem_training

_Result = TypeVar("_Result")
_MODULES = "modules"


def _trained_fused(device: str, dtype: torch.dtype) -> list[Backend]:
    sample = torch.empty(0, device=device, dtype=dtype)
    return [backend for backend in serving(sample) if backend.training is not None]


def _trains_fused(device: str, dtype: torch.dtype) -> bool:
    return bool(_trained_fused(device, dtype))


def _first_if_passed(device: str, dtype: torch.dtype) -> Backend | None:
    """The one that the training ops take by themselves."""
    backend = _trained_fused(device, dtype)[0]
    return backend if families.passed(f"{backend.name} training", torch.device(device)) else None


# What torch.compiler.assume_constant_result sets; calling that would import all of torch._dynamo.
_trains_fused._dynamo_marked_constant = True  # type: ignore[attr-defined]
_first_if_passed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def training_backend(
    x: Any,
    layers: Sequence[Layer],
    projection: Layer | None = None,
    identity: bool = False,
    sync_group: str = "",
    padded_stride: int | None = None,
    pool: MaxPool | None = None,
) -> Backend | None:
    """The backend whose training op computes a block, or with `pool` a stem; None for modules.

    The arguments are those of `residual_block_training` and `stem_training`. A backend that
    `use_backend` chose is taken where it trains fused. On the CPU the ops also run, in plain
    PyTorch, where statistics are synchronised, which `nn.SyncBatchNorm` refuses there.
    """
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point or 0 in x.shape:
        return None
    chosen = chosen_backend()
    if sync_group and x.device.type == "cpu":
        return chosen or backends.get("reference")
    dtype = autocast_dtype(x)
    if not _trains_fused(x.device.type, dtype):
        return None
    if chosen is not None:
        return chosen
    memory = settings.training_saves_memory()
    if torch.compiler.is_compiling():  # Inductor fuses what lies between convolutions by itself
        return _first_if_passed(x.device.type, dtype) if memory else None
    fused = {backend.name: backend for backend in _trained_fused(x.device.type, dtype)}
    block = (dtype, layers, projection, identity, padded_stride, pool)

    def candidates() -> list[Candidate]:
        found = [
            Candidate(
                name,
                functools.partial(_step, backend),
                f"{name} training",
                memory or _is_profitable(backend, layers, projection),
            )
            for name, backend in fused.items()
        ]
        return found if memory else [*found, Candidate(_MODULES, _step_by_modules)]

    name = autotune.choose(
        "training", (x, *block), candidates, _step_by_modules, among=(memory, *fused)
    ).name
    return fused.get(name)


def _is_profitable(backend: Backend, layers: Sequence[Layer], projection: Layer | None) -> bool:
    assert backend.training is not None
    return backend.training.is_profitable([*layers, *([projection] if projection else [])])


def run_on(backend: Backend, op: Callable[..., _Result], *arguments: Any) -> _Result:
    """`op(*arguments)` on the backend, to which its backward keeps."""
    if torch.compiler.is_compiling() or backend is chosen_backend():  # see `training_backend`
        return op(*arguments)
    with use_backend(backend):
        return op(*arguments)


def _step(backend: Backend, x: Tensor, *block: Any) -> tuple[Tensor, ...]:
    def forward(
        x: Tensor,
        layers: Sequence[Layer],
        projection: Layer | None,
        identity: bool,
        padded_stride: int | None,
        pool: MaxPool | None,
    ) -> Tensor:
        if pool is not None:
            return run_on(backend, stem_training, x, layers[0], pool)[0]
        return run_on(
            backend, residual_block_training, x, layers, projection, identity, "", padded_stride
        )[0]

    return _forward_and_backward(forward, x, *block)


def _step_by_modules(x: Tensor, *block: Any) -> tuple[Tensor, ...]:
    return _forward_and_backward(reference.residual_block, x, *block)


def _forward_and_backward(
    forward: Callable[..., Tensor],
    x: Tensor,
    dtype: torch.dtype,
    layers: Sequence[Layer],
    projection: Layer | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """The result in `dtype` (float64 where x is) and the gradients of x and of all weights, for a
    gradient of small fractions that every dtype holds exactly."""
    wanted: list[Tensor] = []
    x = x if x.dtype == torch.float64 else x.to(dtype)

    def leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        wanted.append(tensor.detach().to(dtype or tensor.dtype).requires_grad_())
        return wanted[-1]

    def trained(layer: Layer) -> Layer:
        conv = layer.conv._replace(weight=leaf(layer.conv.weight, x.dtype))
        return layer._replace(conv=conv, weight=leaf(layer.weight), bias=leaf(layer.bias))

    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        image = leaf(x)
        layers = [trained(layer) for layer in layers]
        out = forward(image, layers, projection and trained(projection), *rest)
        rng = torch.Generator(x.device).manual_seed(0)
        grad = torch.randint(-8, 9, out.shape, generator=rng, device=x.device).to(out) / 8
        return (out.detach(), *torch.autograd.grad(out, wanted, grad))
