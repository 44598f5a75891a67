"""The roofline floor of a ResNet: the least time that fusing layer by layer allows.

Fusion is counted at the level of `resnet_fused.ops` ("block ends" of `resnet_fused.complexity`):
each convolution reads its input and writes its result once, with BN, ReLU and addition in its
epilogue. The end of a block also reads the shortcut, and computes a projected one; the stem pools.
Weights are read once a batch. Batch norm's vectors (under 0.1%) are left out.

Operations are those of direct convolution, two a multiply-add. An algorithm that needs fewer
(Winograd), or a cache that holds a whole activation between two layers, can beat the floor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from .. import complexity


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


def layers(model: nn.Module, batch: int, size: int) -> list[Layer]:
    """The fused layers of `model` on `batch` images of `size`×`size` pixels.

    model: a residual network or a VGG, on the meta device, in eval mode.
    Raises ValueError if a parameter lies on another device.
    """
    return [
        Layer(part.name, 2 * part.multiply_adds, part.elements)
        for part in complexity.passes(model, batch, size)
    ]


def floor_seconds(work: Iterable[Layer], peaks: Peaks, element_size: int) -> float:
    """Least time for all layers, one after the other: the sum of max(memory, arithmetic)."""
    return sum(layer.seconds(peaks, element_size) for layer in work)
