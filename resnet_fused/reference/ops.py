"""What every op means, in plain PyTorch.

Tests, benchmarks and the ops' own gradients take their meaning from here; float64 inputs give the
truth that errors are measured against. Shapes are logical NCHW; results are channels_last.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parameters import BatchNorm, Convolution, MaxPool
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


def bn_add_relu(x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
    """relu?(bn(x) (+ residual)); x and residual (N, C, H, W)."""
    out = _normalise(x, bn)
    if residual is not None:
        out = out + residual
    if relu:
        out = F.relu(out)
    return nhwc(out)


def pad_channels(x: Tensor, channels: int) -> Tensor:
    """x (N, D, H, W) with zeros in its channels from D on: (N, channels, H, W), channels_last."""
    if x.shape[1] < channels:
        x = F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))
    return nhwc(x)


def conv_bn(
    x: Tensor, conv: Convolution, bn: BatchNorm, residual: Tensor | None, relu: bool
) -> Tensor:
    """relu?(bn(conv(x)) (+ residual)); x (N, C, H, W), residual (N, D, P, Q), zero from D on."""
    if residual is not None:
        residual = pad_channels(residual, conv.weight.shape[0])
    return bn_add_relu(convolve(x, conv), bn, residual, relu)


def conv_bn_projection(
    x: Tensor,
    conv: Convolution,
    bn: BatchNorm,
    shortcut: Tensor,
    projection: Convolution,
    projection_bn: BatchNorm,
) -> Tensor:
    """relu(bn(conv(x)) + projection_bn(projection(shortcut))): a block's end (paper, eq. 2)."""
    return conv_bn(x, conv, bn, conv_bn(shortcut, projection, projection_bn, None, False), True)


def bottleneck(
    x: Tensor,
    conv1: Convolution,
    bn1: BatchNorm,
    conv2: Convolution,
    bn2: BatchNorm,
    conv3: Convolution,
    bn3: BatchNorm,
    projection: Convolution | None,
    projection_bn: BatchNorm | None,
) -> Tensor:
    """relu(F(x) + shortcut(x)), F three convolutions with BN, ReLU between (paper, Fig. 5)."""
    out = conv_bn(conv_bn(x, conv1, bn1, None, True), conv2, bn2, None, True)
    if projection is None or projection_bn is None:
        return conv_bn(out, conv3, bn3, x, True)
    return conv_bn_projection(out, conv3, bn3, x, projection, projection_bn)


def stem(x: Tensor, conv: Convolution, bn: BatchNorm, pool: MaxPool) -> Tensor:
    """max_pool(relu(bn(conv(x)))): the network's first layers (paper, Table 1: conv1, pool)."""
    out = F.max_pool2d(conv_bn(x, conv, bn, None, True), *pool)
    return nhwc(out)


def head(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(global_average_pool(x)): x (N, C, H, W), weight (classes, C) -> (N, classes)."""
    return F.linear(x.mean((2, 3)), weight, bias)
