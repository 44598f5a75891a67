"""torchvision's ResNets in JAX: NHWC, one jitted function, every batch norm left to XLA to fuse."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from .folded import blocks_of


def call(model: Any, images: Tensor, device: Any) -> Callable[[], Tensor]:
    """A call of torchvision's `model`, in eval mode, on `images` (N, 3, H, W), both in one dtype.

    device: JAX's. The logits come back as a tensor that shares JAX's memory, finished.
    """
    dtype = jnp.dtype(str(images.dtype).removeprefix("torch."))

    def array(tensor: Tensor) -> Array:
        return jax.device_put(jnp.asarray(tensor.float().cpu().numpy(), dtype), device)

    weights = {name: array(value) for name, value in model.state_dict().items()}
    x = array(images.permute(0, 2, 3, 1))
    logits = jax.jit(functools.partial(_network, model))
    return lambda: from_dlpack(logits(weights, x).block_until_ready())


def _network(model: Any, weights: dict[str, Array], x: Array) -> Array:
    names = {module: name for name, module in model.named_modules()}

    def conv_bn(x: Array, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Array:
        x = _convolution(x, weights[f"{names[conv]}.weight"], conv)
        # In float32, as PyTorch's kernels do it.
        mean, var, gamma, beta = (
            weights[f"{names[bn]}.{key}"].astype(jnp.float32)
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        scale = gamma * lax.rsqrt(var + bn.eps)
        return (x.astype(jnp.float32) * scale + (beta - mean * scale)).astype(x.dtype)

    x = _max_pool(jax.nn.relu(conv_bn(x, model.conv1, model.bn1)))
    for (*inner, last), projection in blocks_of(model):
        shortcut = x if projection is None else conv_bn(x, *projection)
        for layer in inner:
            x = jax.nn.relu(conv_bn(x, *layer))
        x = jax.nn.relu(conv_bn(x, *last) + shortcut)
    return x.mean((1, 2)) @ weights["fc.weight"].T + weights["fc.bias"]


def _convolution(x: Array, weight: Array, conv: Any) -> Array:
    return lax.conv_general_dilated(
        x,
        weight,
        conv.stride,
        [(p, p) for p in conv.padding],
        rhs_dilation=conv.dilation,
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
        feature_group_count=conv.groups,
        precision=lax.Precision.HIGHEST,  # in float32, no TF32; no other meaning
    )


def _max_pool(x: Array) -> Array:
    """3×3, stride 2, padding 1."""
    window = ((1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    return lax.reduce_window(x, -jnp.inf, lax.max, *window)
