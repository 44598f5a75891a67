"""relu?(x · gate (+ residual)): squeeze and excitation (arXiv:1709.01507) with a block's end."""

from __future__ import annotations

from torch import Tensor

from ..parameters import Gate
from ..reference import ops as reference
from .checks import check_activation, check_like, check_residual
from .registry import Op


def _output_shape(x: Tensor, gate: Gate, residual: Tensor | None, relu: bool) -> tuple[int, ...]:
    reduce, reduce_bias, expand, expand_bias = gate
    check_activation("input", x)
    if 0 in x.shape[2:]:
        raise ValueError(f"input must have at least one pixel, found shape {tuple(x.shape)}.")
    check_like("reduce", reduce, x)
    channels = x.shape[1]
    if reduce.dim() != 2 or reduce.shape[1] != channels or len(reduce) < 1:
        raise ValueError(
            f"reduce must have shape (hidden, {channels}), found {tuple(reduce.shape)}."
        )
    hidden = len(reduce)
    wanted = {
        "reduce_bias": (reduce_bias, (hidden,)),
        "expand": (expand, (channels, hidden)),
        "expand_bias": (expand_bias, (channels,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        check_like(name, tensor, x)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, found {tuple(tensor.shape)}.")
    check_residual(residual, tuple(x.shape), x)
    return tuple(x.shape)


_op = Op(
    reference.squeeze_excite,
    _output_shape,
    lambda backend: backend.squeeze_excite,
)


def squeeze_excite(
    x: Tensor,
    reduce: Tensor,
    reduce_bias: Tensor | None,
    expand: Tensor,
    expand_bias: Tensor | None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """relu?(x · sigmoid(expand(relu(reduce(global_average_pool(x))))) (+ residual)).

    Args:
        x: (N, C, H, W), floating; NHWC memory (channels_last) is used as it is, others converted.
        reduce: the first linear layer's weight, (hidden, C), of x's dtype like all that follow.
        reduce_bias: its bias, (hidden,), or None.
        expand: the second one's weight, (C, hidden).
        expand_bias: its bias, (C,), or None.
        residual: added to the gated x; like x in shape, dtype and device.
        relu: whether to clamp at zero.

    Returns a channels_last tensor like x. Raises ValueError for shapes and devices that disagree
    and TypeError for dtypes that do.
    """
    return _op(x, Gate(reduce, reduce_bias, expand, expand_bias), residual, relu)
