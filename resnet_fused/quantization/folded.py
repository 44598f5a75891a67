"""The float network that is to be quantised: batch norm folded, visibly, and scales beside it.

A folded network computes in float32 what the network computes that it was made of, up to rounding.
With scales (`calibration.py`) each of its layers can also be made a quantised one, and imitate it:
forward computes by the quantised layer itself, bit for bit what the converted network will compute;
backward passes the gradient of the float layer through (a straight-through estimator: Bengio et
al., arXiv 1308.3432; Jacob et al., 1712.05877, section 3), and none where a result was clamped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference.quantized import FLOAT8, LIMITS, of_image, quantize
from .layers import Geometry, Head, HigherPrecisionConv, Images, InputKind, QuantizedConv
from .network import Network, QuantizedNetwork

# Sums of int8 layers stay below this, so that no order of adding wraps in int32.
_INT32 = 2.0**31
# The weights' scale of a channel is no less than keeps bias and shortcut this small a part of that,
# and a unit of the result this many units of the accumulator at most.
_ADDED, _FINEST = 2.0**28, 2.0**24


def _largest_weight(dtype: torch.dtype) -> int:
    return 448 if dtype == FLOAT8 else 127


def _quantize_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight (K, ...) in units of scale (K,); dtype: of the activations that it goes with."""
    largest = _largest_weight(dtype)
    units = (weight / scale.view(-1, *[1] * (weight.dim() - 1))).float()
    return quantize(units.clamp(-largest, largest), FLOAT8 if dtype == FLOAT8 else torch.int8)


def _largest(weight: Tensor) -> Tensor:
    """|weight| (K, ...), the largest of each output channel."""
    return weight.abs().flatten(1).amax(1)


def _parameter(value: Tensor) -> nn.Parameter:
    """`value` in float32, in memory of its own: fine-tuning leaves the float network as it is."""
    return nn.Parameter(value.detach().to(torch.float32, copy=True))


def _straight_through(value: Tensor, real: Tensor) -> Tensor:
    """`value`, with the gradient of `real`."""
    return real + (value - real).detach()


class FoldedConv(nn.Module):
    """relu(conv(x) + bias (+ shortcut)), then pooling if the geometry says so, in float32.

    name: the convolution's in the network that it was made of.
    in_scale, zero: (1,) or, of the first layer, (C,): x is (quantised - zero) · in_scale.
    shortcut_in_scale, scale: (1,), of the block's input and the result.
    mean_in, mean_shortcut: the mean of each channel of the input and the block's input, by which
        the bias makes up for what rounding the weights shifts (Nagel et al., arXiv 1906.04721,
        section 4.2).
    higher: whether it is kept in float32 between quantised layers; with is_first it takes images as
        they are.
    faking: whether forward imitates the quantised layer.
    """

    in_scale: Tensor
    zero: Tensor
    shortcut_in_scale: Tensor
    scale: Tensor
    mean_in: Tensor
    mean_shortcut: Tensor

    def __init__(
        self, name: str, weight: Tensor, bias: Tensor, projection: Tensor | None, geometry: Geometry
    ) -> None:
        super().__init__()
        self.name, self.geometry = name, geometry
        self.higher = self.faking = self.is_first = False
        self.weight = _parameter(weight)
        self.bias = _parameter(bias)
        self.projection_weight = None if projection is None else _parameter(projection)
        one = torch.ones_like(bias[:1], dtype=torch.float32)
        for buffer in ("in_scale", "shortcut_in_scale", "scale"):
            self.register_buffer(buffer, one.clone())
        for buffer in ("zero", "mean_in", "mean_shortcut"):
            self.register_buffer(buffer, torch.zeros_like(one))

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """x (N, C, H, W), and the block's input -> (N, K, P, Q), in float32."""
        return self.fake(x, shortcut) if self.faking else self.real(x, shortcut)

    def real(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """The float layer."""
        return self._compute(x, shortcut, self.weight, self.projection_weight)

    def _compute(
        self, x: Tensor, shortcut: Tensor | None, weight: Tensor, projection: Tensor | None
    ) -> Tensor:
        out = F.conv2d(x, weight, self.bias, *self.geometry.conv)
        if shortcut is not None and projection is not None:
            assert self.geometry.projection is not None
            out = out + F.conv2d(shortcut, projection, None, *self.geometry.projection)
        elif (sampled := self.geometry.sampled(shortcut)) is not None:
            out = out + F.pad(sampled, (0, 0, 0, 0, 0, out.shape[1] - sampled.shape[1]))
        out = F.relu(out)
        return out if self.geometry.pool is None else F.max_pool2d(out, *self.geometry.pool)

    def fake(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """The quantised layer's result, dequantised, with the float layer's gradient."""
        dtype = self.geometry.dtype
        weight: Tensor = self.weight
        projection: Tensor | None = self.projection_weight
        with torch.no_grad():
            layer = self.quantized()
            quantized = x
            if not self.is_first or isinstance(layer, QuantizedConv):
                quantized = self._quantize_input(x)
                if self.is_first:
                    x = (quantized.float() - of_image(self.zero)) * of_image(self.in_scale)
            added = shortcut
            if shortcut is not None:
                added = quantize(shortcut / self.shortcut_in_scale, dtype)
            value = layer(quantized, added).float() * self.scale
        if isinstance(layer, QuantizedConv):
            scale, projection_scale = self._accumulator_scales()
            units = layer.weight.double() * _per_output(scale) / _per_input(self.in_scale)
            weight = _straight_through(units.float(), weight)
            if projection is not None:
                assert layer.projection_weight is not None
                units = layer.projection_weight.double() * _per_output(projection_scale)
                units = units / self.shortcut_in_scale
                projection = _straight_through(units.float(), projection)
        real = self._compute(x, shortcut, weight, projection)
        return _straight_through(value, real.clamp(max=self.scale * LIMITS[dtype][1]))

    def _quantize_input(self, x: Tensor) -> Tensor:
        return quantize(x / of_image(self.in_scale) + of_image(self.zero), self.geometry.dtype)

    @torch.no_grad()
    def _accumulator_scales(self) -> tuple[Tensor, Tensor]:
        """In float64, (K,): a unit of the accumulator, input scale × weight scale, and one of the
        projection's."""
        dtype, scale = self.geometry.dtype, self.scale.double()
        finest = scale / _FINEST
        weight = self.weight.double() * _per_input(self.in_scale)
        added, projected = self.bias.double().abs(), finest
        if self.geometry.takes_shortcut():
            largest = self.shortcut_in_scale.double() * LIMITS[dtype][1]
            if self.projection_weight is not None:
                projection = self.projection_weight.double() * self.shortcut_in_scale
                projected = _largest(projection) / _largest_weight(dtype)
                largest = projection.abs().flatten(1).sum(1) * LIMITS[dtype][1]
            added = added + largest
        # A channel whose weights are next to nothing needs a coarser scale than theirs.
        own = _largest(weight) / _largest_weight(dtype)
        own = torch.maximum(torch.maximum(own, added / _ADDED), finest)
        return own, torch.maximum(projected, finest).expand_as(own)

    @torch.no_grad()
    def quantized(self) -> QuantizedConv | HigherPrecisionConv:
        """The layer as it is in the converted network."""
        if self.higher:
            return self._in_higher_precision()
        dtype = self.geometry.dtype
        scale, projection_scale = self._accumulator_scales()
        units = self.weight.double() * _per_input(self.in_scale)
        weight = _quantize_weight(units, scale, dtype)
        shift = _shift(units, weight, scale, self.mean_in / self.in_scale)
        # Images have a zero, by which every product is too large.
        excess = (weight.double().sum((2, 3)) * self.zero.double()).sum(1)
        bias = (self.bias.double() + shift) / scale - excess
        tensors: dict[str, Tensor] = {
            "weight": weight,
            "multiplier": (scale / self.scale.double()).float(),
            "scale": self.scale,
        }
        bound = _most(weight, dtype) + bias.abs()
        if self.geometry.takes_shortcut():
            shortcut_scale = self.shortcut_in_scale.double() / scale
            most: Tensor | float = LIMITS[dtype][1]
            if self.projection_weight is not None:
                shortcut_scale = projection_scale / scale
                units = self.projection_weight.double() * self.shortcut_in_scale.double()
                projection = _quantize_weight(units, projection_scale, dtype)
                tensors["projection_weight"] = projection
                mean = self.mean_shortcut / self.shortcut_in_scale
                bias = bias + _shift(units, projection, projection_scale, mean) / scale
                most = _most(projection, dtype)
                bound = torch.maximum(bound, most)
            tensors["shortcut_scale"] = shortcut_scale.float()
            bound = bound + most * shortcut_scale
        if bool((self.zero != 0).any()):
            tensors["padding_value"] = quantize(self.zero, dtype)
        if dtype == FLOAT8:
            tensors["bias"] = bias.float()
        elif bool((bound < _INT32).all()):
            tensors["bias"] = bias.round().int()
        else:
            return self._in_higher_precision()
        return QuantizedConv(tensors, self.geometry)

    def _in_higher_precision(self) -> HigherPrecisionConv:
        tensors = {
            "weight": self.weight,
            "bias": self.bias,
            "scale": self.scale,
            "in_scale": self.in_scale,
            "projection_weight": self.projection_weight,
        }
        if self.geometry.takes_shortcut():
            tensors["shortcut_in_scale"] = self.shortcut_in_scale
        return HigherPrecisionConv(tensors, self.geometry)


def _per_output(scale: Tensor) -> Tensor:
    return scale[:, None, None, None]


def _per_input(scale: Tensor) -> Tensor:
    return scale.double()[None, :, None, None]


def _shift(units: Tensor, weight: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    """(K,): what a mean input gives with weights in `units` more than with the rounded ones."""
    lost = units - weight.double() * scale.view(-1, *[1] * (units.dim() - 1))
    if units.dim() == 4:
        lost = lost.sum((2, 3))
    groups = max(1, len(mean) // lost.shape[1])  # a mean nobody took is one zero
    means = mean.double().view(groups, -1).repeat_interleave(len(lost) // groups, 0)
    return (lost * means).sum(1)


def _most(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What a sum of products with the weights cannot exceed, by output channel."""
    return weight.double().abs().flatten(1).sum(1) * LIMITS[dtype][1]


class FoldedHead(nn.Module):
    """Average pooling and the classifier, as `FoldedConv`."""

    in_scale: Tensor
    mean_in: Tensor

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.dtype = name, dtype
        self.higher = self.faking = False
        self.weight = _parameter(weight)
        self.bias = _parameter(torch.zeros_like(weight[:, 0]) if bias is None else bias)
        self.register_buffer("in_scale", torch.ones_like(self.bias[:1]))
        self.register_buffer("mean_in", torch.zeros_like(self.bias[:1]))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> logits (N, classes), in float32."""
        return self.fake(x) if self.faking else self.real(x)

    def real(self, x: Tensor) -> Tensor:
        """The float layer."""
        return F.linear(x.mean((2, 3)), self.weight, self.bias)

    def fake(self, x: Tensor) -> Tensor:
        """The quantised layer's result with the float layer's gradient."""
        weight: Tensor = self.weight
        with torch.no_grad():
            layer = self.quantized()
            value = layer(quantize(x / self.in_scale, self.dtype))
        if layer.multiplier is not None:
            units = layer.weight.double() * self._scale()[:, None] / self.in_scale
            weight = _straight_through(units.float(), weight)
        return _straight_through(value, F.linear(x.mean((2, 3)), weight, self.bias))

    @torch.no_grad()
    def _scale(self) -> Tensor:
        units = self.weight.double() * self.in_scale
        smallest = torch.finfo(torch.float32).tiny
        return (_largest(units) / _largest_weight(self.dtype)).clamp(min=smallest)

    @torch.no_grad()
    def quantized(self) -> Head:
        """The layer as it is in the converted network."""
        units = self.weight.double() * self.in_scale
        if self.higher:
            return Head({"weight": units.float(), "bias": self.bias})
        scale = self._scale()
        weight = _quantize_weight(units, scale, self.dtype)
        bias = self.bias + _shift(units, weight, scale, self.mean_in / self.in_scale)
        return Head({"weight": weight, "bias": bias.float(), "multiplier": scale.float()})


class FoldedNetwork(Network):
    """A float network, folded, for calibration and for quantisation-aware fine-tuning.

    Its parameters are the folded weights and biases, under names of their own. Once it was
    calibrated, `imitate` makes it compute as the converted network will.
    """

    def imitate(self) -> FoldedNetwork:
        """Computes by quantised layers from now on."""
        for layer in self.folded():
            layer.faking = True
        return self

    def folded(self) -> list[FoldedConv | FoldedHead]:
        """The layers, from the input to the output."""
        return list(self.layers())  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images x (N, C, H, W), normalised floats or bytes."""
        return self.run(self.images(x))

    def converted(self) -> QuantizedNetwork:
        """The quantised network, from the weights and scales as they are.

        Raises ValueError where those of a layer are not finite: int8 has no NaN to show for it.
        """
        for layer in self.folded():
            if not all(bool(parameter.isfinite().all()) for parameter in layer.parameters()):
                raise ValueError(
                    f"{layer.name}, with the batch norm that is folded into it, has weights or a "
                    "bias with NaN or infinity; quantise a network whose weights are finite."
                )
        first: Any = self.stem[0]
        blocks: Any = self.blocks
        stem = [layer.quantized() for layer in self.folded()[: len(self.stem)]]
        rows = [[layer.quantized() for layer in block] for block in blocks]
        kept = isinstance(stem[0], HigherPrecisionConv)
        kind = InputKind(torch.float32 if kept else first.geometry.dtype)
        images: Any = self.images
        tensors = {"mean": images.mean, "std": images.std}
        tensors |= {"scale": first.in_scale, "zero": first.zero}
        classifier: Any = self.head
        return QuantizedNetwork(Images(tensors, kind), stem, rows, classifier.quantized())
