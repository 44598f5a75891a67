"""Modules called one after the other, with a fused op for each convolution and what follows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from . import fusion
from .ops.block_training import residual_block_training
from .ops.conv import conv as convolve
from .ops.conv_bn import conv_bn
from .ops.group_norm_add_relu import group_norm_add_relu
from .ops.image_stem import image_stem
from .ops.stem import stem
from .ops.stem_training import stem_training
from .ops.training_choice import run_on, training_backend
from .parameters import ConvBn, Convolution, GroupNorm, MaxPool, Normalization


class Group(NamedTuple):
    """A convolution with the modules behind it that one op may compute with it.

    relu: what is called between the normalisation and the pooling, also inside of `bn`
        (`fusion.behind_norm`); None where nothing is.
    """

    conv: nn.Module
    bn: nn.Module
    relu: nn.Module | None
    pool: nn.Module | None
    length: int  # in modules of the sequence


def run(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """`x` (N, C, H, W) through the modules in turn, fused where nobody could tell."""
    modules = list(modules)
    if fusion.must_call_modules(x):
        return _in_turn(modules, x)
    modules = list(flat(modules))
    start = 0
    while start < len(modules):
        group = group_at(modules, start)
        out = None if group is None else fused(x, *group[:4])
        if group is None or out is None:
            x = fusion.run_unfused(modules[start], modules[start], x)
            start += 1
        else:
            x = out
            start += group.length
    return x


def _in_turn(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = fusion.run_unfused(module, module, x)
    return x


def flat(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules, with those of an `nn.Sequential` in its place, and without identities."""
    for module in modules:
        if type(module) is nn.Sequential and fusion.untouched(module):
            yield from flat(module)
        elif not fusion.is_identity(module):
            yield module


def group_at(modules: Sequence[nn.Module], start: int) -> Group | None:
    """The group that begins at `start`, or None where no convolution does."""
    if not isinstance(modules[start], nn.Conv2d) or start + 1 == len(modules):
        return None
    conv, bn, *behind = modules[start : start + 4]
    inside = fusion.behind_norm(bn)
    if len(inside) > 1:
        return None
    relu = inside[0] if inside else None
    length = 2
    if relu is None and behind and fusion.is_relu(behind[0]):
        relu = behind[0]
        length += 1
    pool = None
    if relu is not None and len(behind) > length - 2:
        candidate = behind[length - 2]
        if fusion.max_pool(candidate) is not None:
            pool = candidate
            length += 1
    return Group(conv, bn, relu, pool, length)


def fused(
    x: Tensor, conv: nn.Module, bn: nn.Module, relu: nn.Module | None, pool: nn.Module | None
) -> Tensor | None:
    """pool?(relu?(bn(conv(x)))) by fused ops, or None where the modules have to run.

    In training mode it is one op, forward and backward, where the backend trains fused.
    """
    if relu is not None and not fusion.is_relu(relu):
        return None
    window = None if pool is None or fusion.is_group_norm(bn) else fusion.max_pool(pool)
    training = fusion.training_plan([(conv, bn)]) if conv.training else None
    if training is not None and (not training.is_frozen() or training.needs_gradients(x)):
        out = None if relu is None else _train(x, bn, training, window)
    else:
        out = _infer(x, conv, bn, relu is not None, window)
    return out if out is None or pool is None or window is not None else pool(out)


def _infer(
    x: Tensor, conv: nn.Module, bn: nn.Module, relu: bool, window: MaxPool | None
) -> Tensor | None:
    convolution, normalisation = fusion.convolution(conv), fusion.normalisation(bn)
    if convolution is None:
        return None
    if (norm := fusion.group_norm(bn)) is not None:
        return conv_group_norm(x, (convolution, norm), None, relu)
    if normalisation is None:
        return None
    layer = ConvBn(convolution, normalisation)
    return conv_bn(x, layer, relu=relu) if window is None else stem(x, layer, window)


def stem_of_images(
    images: Tensor,
    normalization: Normalization,
    conv: nn.Module,
    bn: nn.Module,
    relu: nn.Module,
    pool: nn.Module | None,
) -> Tensor | None:
    """pool(relu(bn(conv(images, normalised)))) of images of bytes by one op, or None."""
    if conv.training or pool is None or not fusion.is_relu(relu) or fusion.is_group_norm(bn):
        return None
    window, convolution = fusion.max_pool(pool), fusion.convolution(conv)
    statistics = fusion.normalisation(bn)
    if window is None or convolution is None or statistics is None:
        return None
    return image_stem(images, ConvBn(convolution, statistics), normalization, window)


def conv_group_norm(
    x: Tensor, layer: tuple[Convolution, GroupNorm], residual: Tensor | None, relu: bool
) -> Tensor:
    """relu?(group_norm(conv(x)) (+ residual)), two ops."""
    conv, norm = layer
    return group_norm_add_relu(convolve(x, conv), *norm, residual, relu)


def _train(
    x: Tensor, bn: nn.Module, training: fusion.TrainingPlan, window: MaxPool | None
) -> Tensor | None:
    block = (x, training.layers, None, False, training.sync_group)
    backend = training_backend(*block, pool=window)
    if backend is None:
        return None
    if window is None:
        out, (scale_shift,) = run_on(backend, residual_block_training, *block)
    else:
        layer, group = training.layers[0], training.sync_group
        out, scale_shift = run_on(backend, stem_training, x, layer, window, group)
    fusion.track_statistics([bn], [scale_shift])
    return out
