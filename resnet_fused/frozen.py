"""Networks whose weights are promised to stay, so that no forward looks whether they did."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .backends import recording
from .blocks import ResidualBlock
from .errors import FrozenModelError
from .fuse import Fused
from .models.network import ResidualNetwork

_version = Tensor._version.__get__  # type: ignore[attr-defined]
_AGAIN = "change the model that it was made from and call resnet_fused.freeze on that again."


class FrozenNetwork(nn.Module):
    """What `resnet_fused.freeze` makes: a network for inference only, on a copy of its own.

    It refuses training, gradients, other weights, types and devices with FrozenModelError. Its
    `state_dict` has the keys and values of the model that it was made from, which loads it. A copy
    of it, or one from `torch.save`, is frozen too.

    Attributes:
        network: the copy of the model.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        super().train(False)
        self._watch()

    def _watch(self) -> None:
        named = [*self.network.named_parameters(), *self.network.named_buffers()]
        # Inference tensors count no edits; torch.load makes such in inference mode.
        watched = {name: tensor for name, tensor in named if not tensor.is_inference()}
        self._promised = frozenset(id(tensor) for _, tensor in named)
        self._kept = named  # so that no id becomes another's
        self._names, self._tensors = list(watched), list(watched.values())
        self._versions = list(map(_version, self._tensors))

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The model's result, without gradients. Raises FrozenModelError where PyTorch has counted
        an edit in place of a parameter or buffer, and where an input requires gradients."""
        if torch.compiler.is_compiling():
            return self.network(*inputs, **options)
        versions = list(map(_version, self._tensors))
        if versions != self._versions:
            changed = zip(self._names, versions, self._versions, strict=True)
            name = next(name for name, now, then in changed if now != then)
            raise FrozenModelError(f"{name} of a frozen network was edited in place; {_AGAIN}")
        given = (*inputs, *options.values())
        wanted = (isinstance(x, Tensor) and x.requires_grad for x in given)
        if torch.is_grad_enabled() and any(wanted):
            raise FrozenModelError(
                "a frozen network has no gradients; call it on x.detach(), or call the model that "
                "it was made from."
            )
        token = recording.frozen.set(self._promised)
        try:
            with torch.no_grad():
                return self.network(*inputs, **options)
        finally:
            recording.frozen.reset(token)

    def train(self, mode: bool = True) -> FrozenNetwork:
        """Stays in eval mode; FrozenModelError where another is asked for."""
        if mode:
            raise FrozenModelError(
                "a frozen network cannot be trained; train the model that it was made from, and "
                "call resnet_fused.freeze on that again."
            )
        return self

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """The model's state dict, with the model's keys."""
        return self.network.state_dict(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> NoReturn:
        raise FrozenModelError(f"a frozen network loads no other weights; {_AGAIN}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoReturn:
        raise FrozenModelError(
            "a frozen network stays in the type and memory that it was frozen in; move or convert "
            "the model that it was made from and call resnet_fused.freeze on that again."
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch()

    def extra_repr(self) -> str:
        return "frozen: inference only, on weights that are read once"


def freeze(model: nn.Module) -> FrozenNetwork:
    """The model for inference, on a copy of its weights that is promised not to change.

    An ordinary model in eval mode notices every edit of its weights, also those that PyTorch does
    not count (`p.data.mul_()`, NumPy's views). On Linux 6.7 and later the system's page tables tell
    of them, after some forwards; elsewhere, and where a seccomp filter is in force, as in Docker by
    default, all weights are read at each forward, for few images on a CPU a good part of the time.
    A frozen network does neither: convolutions' weights are read once, when they are packed.
    Results have the same bits. On a GPU, weights in another layout than the kernels' are laid out
    once where a plan replays them, and nothing else changes.

    Edits in place that PyTorch counts raise FrozenModelError at the next forward; those that it
    does not count must not be made, and what they change is not defined. `model` itself is not
    changed and remains free: the frozen network has a copy of its weights.

    Args:
        model: a network of this package, or any module that holds one or was treated with
            `resnet_fused.fuse`; in eval mode, of any dtype and on any device.

    Raises ValueError for a model in training mode, and TypeError for one without fused ops.
    """
    if not isinstance(model, nn.Module) or not any(
        isinstance(module, (ResidualNetwork, ResidualBlock, Fused)) for module in model.modules()
    ):
        raise TypeError(
            f"model must be a network with fused ops, found {type(model).__qualname__} without "
            "any; resnet_fused.fuse gives them to a network of torchvision or timm."
        )
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"{name or 'the model'} is in training mode; call model.eval() before "
                "resnet_fused.freeze."
            )
    with torch.inference_mode(False), torch.no_grad():  # inference tensors count no edits
        network = copy.deepcopy(model)
    return FrozenNetwork(network.requires_grad_(False))
