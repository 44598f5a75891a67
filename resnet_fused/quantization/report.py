"""What quantisation cost: layer by layer, and in the network's answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .calibration import progress
from .folded import FoldedNetwork
from .network import QuantizedNetwork


class LayerReport(NamedTuple):
    """A layer: its name in the float network, and signal-to-noise ratios of its result in dB.

    own: with the layer alone quantised, its input and its result; snr: in the quantised network,
    with the noise of all layers before it. dtype: of its weights; float32 where it was kept in
    higher precision.
    """

    name: str
    dtype: torch.dtype
    own: float
    snr: float


@dataclass
class Report:
    """On the calibration images. agreement: of the quantised and the float network's top-1 answers,
    0 to 1; images: how many; layers: from the input to the output."""

    layers: list[LayerReport]
    agreement: float
    images: int

    def worst(self) -> list[LayerReport]:
        """The layers in the order of the precision that each loses by itself, most first."""
        return sorted(self.layers, key=lambda layer: layer.own)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        kept = [layer.name for layer in self.layers if layer.dtype == torch.float32]
        lost = ", ".join(f"{layer.name} ({layer.own:.1f} dB)" for layer in self.worst()[:3])
        lines = [
            f"top-1 agreement with the float network: {self.agreement:.2%} of {self.images} images",
            f"most precision is lost in {lost}",
            f"kept in float32: {', '.join(kept) or 'none'}",
            f"{'layer':{width}}  weights        own dB  network dB",
        ]
        lines += [
            f"{layer.name:{width}}  {str(layer.dtype)[6:]:13}  {layer.own:6.1f}  {layer.snr:10.1f}"
            for layer in self.layers
        ]
        return "\n".join(lines)


class _Noise:
    """Signal and noise power, summed over batches."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, real: Tensor, found: Tensor) -> None:
        self.signal += float(real.double().square().sum())
        self.noise += float((found.double() - real.double()).square().sum())

    def decibels(self) -> float:
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


@torch.no_grad()
def agreement(model: nn.Module, network: QuantizedNetwork, batches: Sequence[Tensor]) -> float:
    """How often the two give the same top-1 answer."""
    like = next(model.parameters())
    same = sum(
        int((network(x).argmax(1) == model(x.to(like.dtype)).argmax(1)).sum()) for x in batches
    )
    return same / sum(map(len, batches))


@torch.no_grad()
def report(
    model: nn.Module,
    folded: FoldedNetwork,
    network: QuantizedNetwork,
    batches: Sequence[Tensor],
    shown: bool,
) -> Report:
    """Compares the quantised network with the float one that it was made of."""
    layers, quantized = folded.folded(), list(network.layers())
    own, snr = ([_Noise() for _ in layers] for _ in range(2))
    real: list[Tensor] = []

    def see_real(i: int, layer: Any, arguments: tuple[Tensor, ...], y: Tensor) -> None:
        real.append(y)
        own[i].add(y, layer.fake(*arguments))

    def see_quantized(i: int, layer: Any, y: Tensor) -> None:
        scale = getattr(layer, "scale", None)
        snr[i].add(real[i], y if scale is None else y.float() * scale)

    hooks = [
        layer.register_forward_hook(lambda layer, a, y, i=i: see_real(i, layer, a, y))
        for i, layer in enumerate(layers)
    ]
    hooks += [
        layer.register_forward_hook(lambda layer, _, y, i=i: see_quantized(i, layer, y))
        for i, layer in enumerate(quantized)
    ]
    try:
        for images in progress(batches, "report", shown):
            real.clear()
            folded.run(images)
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    found = [
        LayerReport(layer.name, done.weight.dtype, o.decibels(), s.decibels())  # type: ignore[arg-type]
        for layer, done, o, s in zip(layers, quantized, own, snr, strict=True)
    ]
    return Report(found, agreement(model, network, batches), sum(map(len, batches)))
