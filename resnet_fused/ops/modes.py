"""What a call happens inside of: transforms, tracers and modes that a fused op would hide from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

PLAIN = frozenset((Tensor, nn.Parameter))


def is_plain(x: object) -> bool:
    """Whether `x` is an ordinary tensor, whose type takes no part in what is done with it."""
    return type(x) in PLAIN


def is_transformed() -> bool:
    """Whether the call has to consist of PyTorch's own ops.

    That is inside `torch.func` (`grad`, `vmap`, `jvp`, ...) and forward-mode AD, which need a rule
    for every op, and inside `torch.jit.trace` and `torch.export`, whose results are to be read,
    edited and loaded where this package is not.
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.compiler.is_exporting()
    )


# What torch.compiler.assume_constant_result sets; calling that would import all of torch._dynamo.
# Dynamo enters transforms for real while it traces them, and guards on them.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_recorded() -> bool:
    """Whether a mode sees every function or operator that is called, to count or record it.

    `torch.device` as a context is such a mode too, but only looks at where tensors are made. A
    dispatch mode that wants the fused ops whole says so by an attribute `sees_fused_ops = True`.
    """
    if torch._C._len_torch_dispatch_stack() > 0 and not all(
        getattr(mode, "sees_fused_ops", False) for mode in _get_current_dispatch_mode_stack()
    ):
        return True
    return torch._C._len_torch_function_stack() > 0 and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    )


def refuse_tangents(name: str, arguments: object) -> None:
    """Raises NotImplementedError where the op `name` would lose forward-mode derivatives.

    Reached only by who calls `torch.ops.resnet_fused` directly: the Python functions compute by
    PyTorch's own ops there, or raise.
    """
    if forward_ad._current_level < 0:
        return
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"torch.ops.resnet_fused.{name} has no forward-mode derivative; call "
            f"resnet_fused.ops.{name}, or differentiate in reverse mode."
        )
