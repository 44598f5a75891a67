"""What every op means, in plain PyTorch.

Tests, benchmarks and the ops' own gradients take their meaning from here; float64 inputs give the
truth that errors are measured against. Shapes are logical NCHW; results are channels_last.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parameters import BatchNorm, ConvBn, Convolution, Gate, GroupNorm, MaxPool, Normalization
from .convolution import convolve


def nhwc(x: Tensor) -> Tensor:
    """x (N, C, H, W) in channels_last memory; itself where it already is.

    Inside `torch.func`, whose tensors cannot be asked for a layout, it is x as it comes.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _normalise(x: Tensor, bn: BatchNorm) -> Tensor:
    # Parameters as PyTorch's kernels take them: all alike, and no narrower than the input.
    present = [v for v in bn[:4] if v is not None]
    dtype = functools.reduce(torch.promote_types, (v.dtype for v in present), x.dtype)
    mean, var, weight, bias = (None if v is None else v.to(dtype) for v in bn[:4])
    return F.batch_norm(x, mean, var, weight, bias, training=False, eps=bn.eps)


def _add_relu(out: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        out = out + residual
    if relu:
        out = F.relu(out)
    return nhwc(out)


def bn_add_relu(x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
    """relu?(bn(x) (+ residual)); x and residual (N, C, H, W)."""
    return _add_relu(_normalise(x, bn), residual, relu)


def group_norm_add_relu(x: Tensor, norm: GroupNorm, residual: Tensor | None, relu: bool) -> Tensor:
    """relu?(group_norm(x) (+ residual)); x and residual (N, C, H, W)."""
    groups, weight, bias, eps = norm
    present = [v for v in (weight, bias) if v is not None]
    if all(v.dtype == x.dtype for v in present):
        out = F.group_norm(x, groups, weight, bias, eps)
    else:  # which some of PyTorch's kernels refuse
        dtype = functools.reduce(torch.promote_types, (v.dtype for v in present), x.dtype)
        weight, bias = (None if v is None else v.to(dtype) for v in (weight, bias))
        out = F.group_norm(x.to(dtype), groups, weight, bias, eps).to(x.dtype)
    return _add_relu(out, residual, relu)


def pad_channels(x: Tensor, channels: int) -> Tensor:
    """x (N, D, H, W) with zeros in its channels from D on: (N, channels, H, W), channels_last."""
    if x.shape[1] < channels:
        x = F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))
    return nhwc(x)


def conv(x: Tensor, conv: Convolution) -> Tensor:
    """conv(x): x (N, C, H, W) -> (N, K, P, Q)."""
    return nhwc(convolve(x, conv))


def conv_bn(x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool) -> Tensor:
    """relu?(bn(conv(x)) (+ residual)); x (N, C, H, W), residual (N, D, P, Q), zero from D on."""
    if residual is not None:
        residual = pad_channels(residual, layer.conv.weight.shape[0])
    return bn_add_relu(convolve(x, layer.conv), layer.bn, residual, relu)


def conv_bn_projection(x: Tensor, layer: ConvBn, shortcut: Tensor, projection: ConvBn) -> Tensor:
    """relu(bn(conv(x)) + bn'(conv'(shortcut))): a block's end (paper, eq. 2)."""
    return conv_bn(x, layer, conv_bn(shortcut, projection, None, False), True)


def bottleneck(
    x: Tensor, layer1: ConvBn, layer2: ConvBn, layer3: ConvBn, projection: ConvBn | None
) -> Tensor:
    """relu(F(x) + shortcut(x)), F three convolutions with BN, ReLU between (paper, Fig. 5)."""
    out = conv_bn(conv_bn(x, layer1, None, True), layer2, None, True)
    if projection is None:
        return conv_bn(out, layer3, x, True)
    return conv_bn_projection(out, layer3, x, projection)


def stem(x: Tensor, layer: ConvBn, pool: MaxPool) -> Tensor:
    """max_pool(relu(bn(conv(x)))): the network's first layers (paper, Table 1: conv1, pool)."""
    return nhwc(F.max_pool2d(conv_bn(x, layer, None, True), *pool))


def normalise(images: Tensor, normalization: Normalization, dtype: torch.dtype) -> Tensor:
    """(images / 255 - mean) / std of bytes (N, C, H, W), in float32 or more, then `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    mean, std = (
        torch.tensor(list(values), dtype=wide, device=images.device)[:, None, None]
        for values in normalization
    )
    return ((images.to(wide) / 255 - mean) / std).to(dtype)


def image_stem(
    images: Tensor, layer: ConvBn, pool: MaxPool, normalization: Normalization
) -> Tensor:
    """`stem` of images of bytes, normalised."""
    return stem(normalise(images, normalization, layer.conv.weight.dtype), layer, pool)


def excitation(x: Tensor, gate: Gate) -> Tensor:
    """The factors (N, C) of `squeeze_excite`."""
    hidden = F.relu(F.linear(x.mean((2, 3)), gate.reduce, gate.reduce_bias))
    return torch.sigmoid(F.linear(hidden, gate.expand, gate.expand_bias))


def squeeze_excite(x: Tensor, gate: Gate, residual: Tensor | None, relu: bool) -> Tensor:
    """relu?(x · sigmoid(expand(relu(reduce(global_average_pool(x))))) (+ residual)); x and residual
    (N, C, H, W)."""
    out = x * excitation(x, gate)[:, :, None, None]
    return _add_relu(out, residual, relu)


def head(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(global_average_pool(x)): x (N, C, H, W), weight (classes, C) -> (N, classes)."""
    return F.linear(x.mean((2, 3)), weight, bias)
