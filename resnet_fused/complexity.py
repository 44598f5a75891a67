"""What a network costs: layers, parameters, multiply-adds, activations, and bytes moved.

Bytes depend on how much is fused, from nothing to whole blocks (`FUSION`). A pass reads what it
needs once and writes its result once: activations for every image, weights once a batch. Batch
norm's vectors (under 0.1%) are left out, and so is what a cache may keep from one pass to the next.

Counted are networks made of residual blocks (this package's and torchvision's) and plain chains of
layers such as VGG; the network runs on the meta device, where nothing is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .blocks import PaddedIdentity
from .ops.checks import check_is_module

FUSION = {
    "ops": "every convolution, batch norm, ReLU, addition and pooling by itself",
    "layers": "convolution + BN + ReLU; addition + ReLU",
    "block ends": "also the addition with its shortcut, the stem with its pooling, the head",
    "blocks": "every residual block whole, its inner activations on chip",
}


class Pass(NamedTuple):
    """One trip through memory for a whole batch: elements of activations, and weights."""

    name: str
    multiply_adds: int
    activations: int
    weights: int

    @property
    def elements(self) -> int:
        """All that is read and written."""
        return self.activations + self.weights


class Complexity(NamedTuple):
    """One image's cost.

    layers: with weights, from input to output, as the paper counts: projections left out.
    multiply_adds: of convolutions and fully connected layers, projections included.
    activations: elements that convolutions write.
    passes, bytes: of a batch's passes through memory, an image's share, by the level of fusion.
    """

    layers: int
    parameters: int
    multiply_adds: int
    activations: int
    passes: dict[str, int]
    bytes: dict[str, float]


class _Call(NamedTuple):
    """One run of a module without children; sizes in elements of the whole batch."""

    name: str
    module: nn.Module
    inputs: int  # those that are read: a 1×1 convolution of stride 2 skips three in four
    outputs: int

    @property
    def weights(self) -> int:
        module = self.module
        return module.weight.numel() if isinstance(module, (nn.Conv2d, nn.Linear)) else 0

    @property
    def multiply_adds(self) -> int:
        module = self.module
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            return 0
        return self.outputs * module.weight[0].numel()

    def alone(self) -> Pass:
        return Pass(self.name, self.multiply_adds, self.inputs + self.outputs, self.weights)


_PRODUCTS = (nn.Conv2d, nn.Linear)
_POOLS = (nn.MaxPool2d, nn.AdaptiveAvgPool2d)
# What a product's epilogue can do.
_EPILOGUES = (nn.BatchNorm2d, nn.ReLU)
_COUNTED = (*_PRODUCTS, *_POOLS, *_EPILOGUES, PaddedIdentity)


def _read(module: nn.Module, x: Tensor, y: Tensor) -> int:
    if isinstance(module, nn.Conv2d):
        skips = max(module.kernel_size) < min(module.stride)
        return x.shape[1] * y[:, 0].numel() if skips else x.numel()
    if isinstance(module, PaddedIdentity):
        return module.sampled(x).numel()
    return x.numel()


def _calls(model: nn.Module, batch: int, size: int) -> list[_Call]:
    """The runs of `model`'s layers, in order."""
    names = {module: name for name, module in model.named_modules()}
    calls: list[_Call] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
        calls.append(_Call(names[module], module, _read(module, inputs[0], y), y.numel()))

    # A hooked layer is not fused, so each one is seen.
    hooks = [m.register_forward_hook(record) for m in names if isinstance(m, _COUNTED)]
    try:
        with torch.no_grad():
            model(torch.empty(batch, 3, size, size, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _fused(name: str, parts: Sequence[_Call | Pass], activations: int) -> Pass:
    return Pass(
        name, sum(p.multiply_adds for p in parts), activations, sum(p.weights for p in parts)
    )


def _with_epilogues(calls: Sequence[_Call]) -> list[Pass]:
    passes: list[Pass] = []
    for call in calls:
        if not (passes and isinstance(call.module, _EPILOGUES)):
            passes.append(call.alone())
    return passes


def _block(name: str, block: nn.Module, calls: list[_Call], fusion: str) -> list[Pass]:
    side = [call for call in calls if call.name.startswith(f"{name}.downsample")]
    main = [call for call in calls if call not in side]
    x, result = main[0], main[-1].outputs
    if fusion == "blocks":
        return [_fused(name, calls, x.inputs + result)]
    if not getattr(block, "has_shortcut", True):
        return [call.alone() for call in main] if fusion == "ops" else _with_epilogues(main)
    *main, relu = main
    addition = Pass(f"{name}.add", 0, 3 * result, 0)
    if fusion == "ops":
        return [*(call.alone() for call in [*main, *side]), addition, relu.alone()]
    *inner, end = _with_epilogues(main)
    if fusion == "layers":
        return [*inner, end, *_with_epilogues(side), addition]
    shortcut = side[0].inputs if side else result
    return [*inner, _fused(end.name, [end, *side], end.activations + shortcut)]


def _chain(calls: Sequence[_Call], fusion: str) -> list[Pass]:
    """Layers outside blocks: stem and head, or all of a VGG."""
    if fusion == "ops":
        return [call.alone() for call in calls]
    passes = _with_epilogues(calls)
    if fusion == "layers":
        return passes
    by_name = {call.name: call for call in calls}
    merged: list[Pass] = []
    for part in passes:
        call, before = by_name[part.name], by_name[merged[-1].name] if merged else None
        if before is not None and isinstance(before.module, nn.AdaptiveAvgPool2d):
            merged[-1] = _fused(call.name, [call], before.inputs + call.outputs)
        elif before is not None and isinstance(call.module, nn.MaxPool2d):
            merged[-1] = _fused(before.name, [before], before.inputs + call.outputs)
        else:
            merged.append(part)
    return merged


def passes(model: nn.Module, batch: int, size: int, fusion: str = "block ends") -> list[Pass]:
    """What `model` does with `batch` images of `size`×`size` pixels, fused to a level of `FUSION`.

    model: on the meta device, in eval mode. Raises ValueError if a parameter lies on another
    device or the level is unknown, and TypeError for what is no module.
    """
    check_is_module(model)
    if any(parameter.device.type != "meta" for parameter in model.parameters()):
        raise ValueError("model must lie on the meta device; build it under torch.device('meta').")
    if fusion not in FUSION:
        raise ValueError(f"fusion must be one of {', '.join(FUSION)}, found {fusion!r}.")
    blocks = {name: m for name, m in model.named_modules() if hasattr(m, "downsample")}

    def block_of(call: _Call) -> str:
        parts = call.name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(1, len(parts)))
        return next((prefix for prefix in prefixes if prefix in blocks), "")

    found: list[Pass] = []
    for name, calls in groupby(_calls(model, batch, size), block_of):
        group = list(calls)
        found += _block(name, blocks[name], group, fusion) if name else _chain(group, fusion)
    return found


def count(model: nn.Module, size: int = 224, batch: int = 1, element_size: int = 2) -> Complexity:
    """The cost of an image of `size`×`size` pixels, of `batch` that run together.

    element_size: bytes of an activation and of a weight (2: float16 or bfloat16). Raises TypeError
    for what is no module.
    """
    check_is_module(model)
    model = copy.deepcopy(model).to("meta").eval()
    calls = _calls(model, 1, size)
    levels = {level: passes(model, batch, size, level) for level in FUSION}
    return Complexity(
        sum(isinstance(c.module, _PRODUCTS) and ".downsample." not in c.name for c in calls),
        sum(parameter.numel() for parameter in model.parameters()),
        sum(call.multiply_adds for call in calls),
        sum(call.outputs for call in calls if isinstance(call.module, nn.Conv2d)),
        {level: len(found) for level, found in levels.items()},
        {
            level: element_size * sum(p.elements for p in found) / batch
            for level, found in levels.items()
        },
    )
