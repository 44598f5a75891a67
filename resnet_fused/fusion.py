"""Reads live modules as op arguments, and says which of them an op can stand for.

A fused op replaces the calls of several modules. That is only right where each is exactly the
layer it looks like, normalises with given statistics, and has nobody hooked on to it; everything
else gets None here and runs module by module, as in plain PyTorch.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from .parameters import BatchNorm, Convolution, MaxPool


def untouched(*modules: nn.Module) -> bool:
    """Whether no hook would miss its module's call."""
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in modules
    )


def is_relu(module: nn.Module) -> bool:
    """Whether `module` is a plain ReLU."""
    return type(module) is nn.ReLU and untouched(module)


def convolution(module: nn.Module) -> Convolution | None:
    """The argument group of a bias-free, zero-padded `nn.Conv2d`, else None."""
    if (
        type(module) is not nn.Conv2d
        or module.bias is not None
        or module.padding_mode != "zeros"
        or isinstance(module.padding, str)
        or not untouched(module)
    ):
        return None
    return Convolution(
        module.weight,
        cast("tuple[int, int]", module.stride),
        cast("tuple[int, int]", module.padding),
        cast("tuple[int, int]", module.dilation),
        module.groups,
    )


def batch_norm(module: nn.Module) -> BatchNorm | None:
    """The argument group of a normalisation with given statistics, else None.

    That is `nn.BatchNorm2d` or `nn.SyncBatchNorm` in eval mode with running statistics, and
    torchvision's `FrozenBatchNorm2d` in any mode.
    """
    if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        if module.training or module.running_mean is None:
            return None
    elif type(module).__name__ != "FrozenBatchNorm2d":
        return None
    if not untouched(module):
        return None
    frozen = cast("nn.BatchNorm2d", module)  # the others have the same fields
    return BatchNorm(
        cast("Tensor", frozen.running_mean),
        cast("Tensor", frozen.running_var),
        frozen.weight,
        frozen.bias,
        frozen.eps,
    )


def conv_bn(conv: nn.Module, bn: nn.Module) -> tuple[Convolution, BatchNorm] | None:
    """Argument groups of a convolution and its normalisation, or None if they cannot fuse."""
    convolution_ = convolution(conv)
    batch_norm_ = batch_norm(bn)
    if convolution_ is None or batch_norm_ is None:
        return None
    return convolution_, batch_norm_


def projection(module: nn.Module) -> tuple[Convolution, BatchNorm] | None:
    """Argument groups of a Sequential(convolution, normalisation) shortcut, else None."""
    if type(module) is not nn.Sequential or len(module) != 2 or not untouched(module):
        return None
    return conv_bn(module[0], module[1])


def max_pool(module: nn.Module) -> MaxPool | None:
    """The argument group of a square, undilated, floor-rounding `nn.MaxPool2d`, else None."""
    if type(module) is not nn.MaxPool2d or not untouched(module):
        return None
    if module.return_indices or module.ceil_mode or module.dilation not in (1, (1, 1)):
        return None
    window = []
    for size in (module.kernel_size, module.stride, module.padding):
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            return None
        window.append(height)
    return MaxPool(*window)
