"""Backend `tuned`: for each op and shape the backend that this GPU was measured to run fastest.

It chooses among whole backends, which in turn choose among their own tiles; PyTorch is one of them,
so that no op need be slower than cuDNN's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailableError
from ..parameters import BatchNorm, ConvBn, MaxPool
from . import Backend, LayerByLayer, get, unavailable
from .training import TrainingKernels
from .tuning import Tuner, describe

_KERNELS = ("triton", "cuda")  # best first, where nothing was measured
_LIBRARY = "reference"
_LAYERS = "layers"


class TunedBackend(LayerByLayer):
    """Implements `resnet_fused.backends.Backend` by backends with kernels and PyTorch's."""

    name = "tuned"

    def __init__(self, kernels: Sequence[Backend], library: Backend, tuner: Tuner) -> None:
        """`kernels`: at least one backend, the rule's choice first."""
        self._kernels = kernels
        self._library = library
        self._tuner = tuner
        self._serving = functools.cache(self._find_serving)
        # Of the first backend that has them: they are not mixed.
        self.training: TrainingKernels | None = next(
            (b.training for b in kernels if b.training is not None), None
        )

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        reasons = [backend.unsupported(device, dtype) for backend in self._kernels]
        if None in reasons:
            return None
        named = zip(self._kernels, reasons, strict=True)
        return "; ".join(f"{backend.name!r} cannot: {reason}" for backend, reason in named)

    def _find_serving(self, device: torch.device, dtype: torch.dtype) -> dict[str, Backend]:
        candidates = [*self._kernels, self._library]
        return {b.name: b for b in candidates if b.unsupported(device, dtype) is None}

    def _run(self, op: str, x: Tensor, *others: Any) -> Tensor:
        serving = self._serving(x.device, x.dtype)
        return self._tuner.run(
            (op, *describe(x, *others)),
            x.device,
            lambda: list(serving),
            lambda name: getattr(serving[name], op)(x, *others),
        )

    def bn_add_relu(self, x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
        return self._run("bn_add_relu", x, bn, residual, relu)

    def conv_bn(self, x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool) -> Tensor:
        return self._run("conv_bn", x, layer, residual, relu)

    def conv_bn_projection(self, x: Tensor, *others: Any) -> Tensor:
        return self._run("conv_bn_projection", x, *others)

    def bottleneck(self, x: Tensor, *layers: Any) -> Tensor:
        """By one backend, or layer by layer, each by the backend chosen for it."""
        serving = self._serving(x.device, x.dtype)

        def launch(name: str) -> Tensor:
            if name == _LAYERS:
                return LayerByLayer.bottleneck(self, x, *layers)
            return serving[name].bottleneck(x, *layers)

        return self._tuner.run(
            ("bottleneck", *describe(x, *layers)), x.device, lambda: [_LAYERS, *serving], launch
        )

    def stem(self, x: Tensor, layer: ConvBn, pool: MaxPool) -> Tensor:
        return self._run("stem", x, layer, pool)

    def head(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._run("head", x, weight, bias)


def create() -> Backend:
    """The backend; BackendUnavailableError where there is nothing to choose among."""
    missing = {name: reason for name in _KERNELS if (reason := unavailable(name))}
    if len(missing) == len(_KERNELS):
        reasons = " ".join(missing.values())
        raise BackendUnavailableError(
            f"backend 'tuned' has no kernels to choose among here: {reasons}"
        )
    kernels = [get(name) for name in _KERNELS if name not in missing]
    return TunedBackend(kernels, get(_LIBRARY), Tuner(TunedBackend.name))
