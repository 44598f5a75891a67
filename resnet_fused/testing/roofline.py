"""The roofline floor of a ResNet: the least time that fusing layer by layer allows.

Fusion is counted at the level of `resnet_fused.ops`' convolutions: each reads its input and writes
its result once, with BN, ReLU and addition in its epilogue. The end of a block also reads the
identity shortcut; a projected shortcut is computed there and never reaches memory. Pooling is a
pass of its own. Weights are read once a batch. Batch norm's vectors (under 0.1%) are left out.

Operations are those of direct convolution, two a multiply-add. An algorithm that needs fewer
(Winograd), or a cache that holds a whole activation between two layers, can beat the floor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Peaks(NamedTuple):
    """What a machine reaches: memory traffic in bytes/s, arithmetic in operations/s."""

    bandwidth: float
    arithmetic: float


class Layer(NamedTuple):
    """The least work of one fused layer for a whole batch."""

    name: str
    operations: int
    elements: int

    def seconds(self, peaks: Peaks, element_size: int) -> float:
        """Time at the machine's peaks, elements of `element_size` bytes each."""
        return max(
            self.elements * element_size / peaks.bandwidth, self.operations / peaks.arithmetic
        )


class _Call(NamedTuple):
    module: nn.Module
    inputs: int
    outputs: int

    def products(self) -> tuple[int, int]:
        """(operations, weights) of a convolution or a fully connected layer; none of a pool."""
        if not isinstance(self.module, (nn.Conv2d, nn.Linear)):
            return 0, 0
        weight = self.module.weight
        return 2 * self.outputs * weight[0].numel(), weight.numel()


def _calls(model: nn.Module, batch: int, size: int) -> dict[str, _Call]:
    """The layers in the order in which they run, with their element counts; computes nothing."""
    names = {module: name for name, module in model.named_modules()}
    calls: dict[str, _Call] = {}

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls[names[module]] = _Call(module, inputs[0].numel(), output.numel())

    counted = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, counted)]
    try:
        with torch.no_grad():
            model(torch.empty(batch, 3, size, size, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def layers(model: nn.Module, batch: int, size: int) -> list[Layer]:
    """The fused layers of `model` on `batch` images of `size`×`size` pixels.

    model: a ResNet with torchvision's submodule names, on the meta device, in eval mode.
    Raises ValueError if a parameter lies on another device.
    """
    if any(parameter.device.type != "meta" for parameter in model.parameters()):
        raise ValueError("model must lie on the meta device; build it under torch.device('meta').")
    calls = _calls(model, batch, size)
    block_of_end = {
        f"{name}.conv{3 if hasattr(block, 'conv3') else 2}": block
        for name, block in model.named_modules()
        if hasattr(block, "downsample")
    }
    found = []
    for name, call in calls.items():
        if ".downsample." in name:
            continue
        operations, weights = call.products()
        elements = call.inputs + call.outputs + weights
        if block := block_of_end.get(name):
            if block.downsample is None:
                elements += call.outputs
            else:
                projection = calls[name.rsplit(".", 1)[0] + ".downsample.0"]
                more_operations, more_weights = projection.products()
                operations += more_operations
                elements += projection.inputs + more_weights
        found.append(Layer(name, operations, elements))
    return found


def floor_seconds(work: Iterable[Layer], peaks: Peaks, element_size: int) -> float:
    """Least time for all layers, one after the other: the sum of max(memory, arithmetic)."""
    return sum(layer.seconds(peaks, element_size) for layer in work)
