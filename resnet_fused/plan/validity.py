"""Whether a network is still the one that a plan was recorded of, and what surrounds it the same.

What a module computes is decided by its class, its attributes, its parameters and its hooks. All of
them are compared by identity, in the extension; of every tensor also the memory that it covers,
because `p.data = other` leaves the object. What tensors hold needs no comparison where kernels read
it live; packed weights are verified by their fingerprints, as at every use of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from .. import fusion
from ..backends import recording, tf32_in_convolutions
from ..backends.autotune import generation
from ..ops.dispatch import chosen_backend

_address, _shape, _strides = Tensor.data_ptr, Tensor.size, Tensor.stride
_dtype = Tensor.dtype.__get__  # type: ignore[attr-defined]


def may_serve(x: Tensor) -> bool:
    """Whether a plan may stand for calls on `x`: not where gradients may be wanted, inside modes,
    transforms and tracers, nor under a profiler, which is to see the ops."""
    return not (
        torch.is_grad_enabled()
        or fusion.must_call_modules(x)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    )


def surroundings(x: Tensor) -> Hashable:
    """What a plan for `x` depends on beside the network."""
    kind = x.device.type
    return (
        x.shape,
        x.is_contiguous(),  # some kernels of the stem read images so
        x.dtype,
        x.device,
        chosen_backend(),
        generation(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        tf32_in_convolutions(),
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        recording.frozen.get(),
    )


class Snapshot:
    """Modules, and the tensors that they hold, as they are now.

    Attributes:
        is_frozen: nobody is to edit the tensors, so that other memory is all that is looked for in
            them. (Where they have left the caches, looking takes as long as a layer of one image.)
    """

    def __init__(self, extension: ModuleType, modules: Sequence[nn.Module]) -> None:
        self._extension = extension
        self._modules = extension.snapshot(list(modules))
        self.tensors = list(dict.fromkeys(t for module in modules for t in _tensors(module)))
        self.is_frozen = recording.frozen.get().issuperset(map(id, self.tensors))
        self._reads = (_address,) if self.is_frozen else (_address, _shape, _strides, _dtype)
        self._memory = self._covered()

    def is_complete(self) -> bool:
        """Whether every change would be seen."""
        return self._modules is not None

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return self._extension.unchanged(self._modules) and self._memory == self._covered()

    def _covered(self) -> list[list[object]]:
        return [list(map(read, self.tensors)) for read in self._reads]


def _tensors(module: nn.Module) -> list[Tensor]:
    kept = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
    # Not counters, which no kernel reads.
    return [t for t in kept if isinstance(t, Tensor) and t.dim()]
