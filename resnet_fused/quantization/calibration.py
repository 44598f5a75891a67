"""Finds the scale of every activation from images: by range, by percentile, or by squared error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..reference.quantized import FLOAT8, LIMITS, quantize
from .folded import FoldedConv, FoldedNetwork

METHODS = ("range", "percentile", "mse")
BINS = 2048
_PERCENTILE = 0.9999
_CLIPS = 96  # of the range, evenly from a fifth of it, that "mse" tries
_T = TypeVar("_T")


def progress(items: Sequence[_T], what: str, shown: bool) -> Iterable[_T]:
    """With a bar where stderr is a terminal, tqdm is installed and it is wanted."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return items
    bar: Iterable[_T] = tqdm(items, desc=what, disable=None if shown else True)
    return bar


def checked(calibration: Iterable[Any], network: FoldedNetwork) -> list[Tensor]:
    """The batches of images, from batches or from (images, ...) as a data loader gives them.

    Raises ValueError for none, empty ones, other channels than the network's, NaN or infinity, and
    images that are all constant.
    """
    first = network.folded()[0]
    assert isinstance(first, FoldedConv)
    channels = first.weight.shape[1] * first.geometry.conv[3]
    batches = []
    varies = False
    for i, batch in enumerate(calibration):
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(images, Tensor) or images.dim() != 4 or not images.numel():
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__qualname__
            raise ValueError(
                f"calibration batch {i} must be images (N, C, H, W), at least one, or a tuple that "
                f"begins with them; found {found}."
            )
        if images.shape[1] != channels:
            raise ValueError(
                f"calibration batch {i} has images of {images.shape[1]} channels, and the model "
                f"takes {channels}."
            )
        # A copy: loaders may write the next batch where this one was.
        images = network.images(images.to(first.weight.device, copy=True))
        if not images.isfinite().all():
            raise ValueError(f"calibration batch {i} holds NaN or infinity; leave such images out.")
        varies |= bool((images != images[:, :, :1, :1]).any())
        batches.append(images)
    if not batches:
        raise ValueError(
            "calibration holds no batch; pass some hundred images, as the network will see them (a "
            "generator can be used once)."
        )
    if not varies:
        raise ValueError(
            "every calibration image is constant, which says nothing of the activations that "
            "images cause; pass images as the network will see them."
        )
    return batches


@torch.no_grad()
def calibrate(network: FoldedNetwork, batches: Sequence[Tensor], method: str, shown: bool) -> None:
    """Gives every layer its scales, from images as `checked` returns them.

    Raises ValueError where a layer's result is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, found {method!r}.")
    layers = [layer for layer in network.folded() if isinstance(layer, FoldedConv)]
    largest = torch.zeros(len(layers))
    images = sum(map(len, batches))

    def see(i: int, y: Tensor) -> None:
        largest[i] = torch.maximum(largest[i], y.max().cpu())
        if not largest[i].isfinite():
            raise ValueError(
                f"{layers[i].name} gives NaN or infinity on the calibration images; look at the "
                "weights and at how images are normalised."
            )

    hooks = [layer.register_forward_hook(partial(_average, images)) for layer in network.folded()]
    try:
        _visit(network, layers, batches, see, "range", shown)
    finally:
        for hook in hooks:
            hook.remove()
    clips = largest.tolist()
    if method != "range":
        histograms = torch.zeros(len(layers), BINS, dtype=torch.float64)

        def count(i: int, y: Tensor) -> None:
            if clips[i]:
                histograms[i] += torch.histc(y.float(), BINS, 0, clips[i]).cpu()

        _visit(network, layers, batches, count, method, shown)
        clip = percentile if method == "percentile" else least_squares
        dtype = layers[0].geometry.dtype
        clips = [clip(h, c, dtype) if c else c for h, c in zip(histograms, clips, strict=True)]
    for layer, found in zip(layers, clips, strict=True):
        # Of a result that is always zero any scale will do.
        layer.scale.fill_(found / LIMITS[layer.geometry.dtype][1] or 1.0)
    _set_input(network, layers[0], batches)
    _wire(network)


def _average(images: int, layer: Any, arguments: Sequence[Tensor], y: Tensor) -> None:
    """Adds a batch's share to the means of what a layer takes, by channel."""
    for name, x in zip(("mean_in", "mean_shortcut"), arguments, strict=False):
        mean = x.double().mean((2, 3)).sum(0) / images
        setattr(layer, name, (getattr(layer, name) + mean).float())


def _visit(
    network: FoldedNetwork,
    layers: Sequence[FoldedConv],
    batches: Sequence[Tensor],
    see: Callable[[int, Tensor], None],
    what: str,
    shown: bool,
) -> None:
    """Runs the float network and shows `see` what each layer gives."""
    hooks = [
        layer.register_forward_hook(lambda _, __, y, i=i: see(i, y))
        for i, layer in enumerate(layers)
    ]
    try:
        for images in progress(batches, f"calibration: {what}", shown):
            network.run(images)
    finally:
        for hook in hooks:
            hook.remove()


def percentile(histogram: Tensor, largest: float, dtype: torch.dtype) -> float:
    """What all but a ten thousandth of the positive values stay below."""
    positive = histogram.clone()
    positive[0] = 0  # where the zeros of a ReLU are
    total = positive.cumsum(0)
    bin_ = int(torch.searchsorted(total, _PERCENTILE * total[-1]))
    return largest * min(bin_ + 1, BINS) / BINS


def least_squares(histogram: Tensor, largest: float, dtype: torch.dtype) -> float:
    """The clip with the least squared error of the values quantised with it."""
    centres = (torch.arange(BINS) + 0.5) * (largest / BINS)
    weight = histogram.clone()
    weight[0] = 0
    best, least = largest, float("inf")
    for clip in torch.linspace(0.2, 1.0, _CLIPS).flip(0).tolist():
        scale = clip * largest / LIMITS[dtype][1]
        error = (quantize(centres / scale, dtype).float() * scale - centres).double()
        if (found := float((weight * error.square()).sum())) < least:
            best, least = clip * largest, found
    return best


def _set_input(network: FoldedNetwork, first: FoldedConv, batches: Sequence[Tensor]) -> None:
    """Images are quantised as the bytes that they are, or else over their range."""
    images: Any = network.images
    dtype = first.geometry.dtype
    channels = batches[0].shape[1]
    first.in_scale, first.zero = first.scale.repeat(channels), first.zero[:1].repeat(channels)
    if dtype == FLOAT8:
        largest = max(batch.abs().max() for batch in batches)
        first.in_scale.copy_(largest / LIMITS[dtype][1])
        return
    if images.mean is not None:
        first.in_scale, first.zero = 1 / images.std, images.mean.clone()
        return
    low = min(min(batch.min() for batch in batches), torch.zeros(()))
    high = max(max(batch.max() for batch in batches), torch.zeros(()))
    scale = (high - low) / LIMITS[dtype][1]
    first.in_scale.copy_(scale)
    # A whole number, so that zero, and so the padding, is exact.
    first.zero.copy_((-low / scale).round())


def _wire(network: FoldedNetwork) -> None:
    """Tells every layer the scales of what it takes."""
    stem: Any = network.stem
    blocks: Any = network.blocks
    classifier: Any = network.head
    for before, layer in itertools.pairwise(stem):
        layer.in_scale.copy_(before.scale)
    scale = stem[-1].scale
    for block in blocks:
        entry = scale
        for layer in block:
            layer.in_scale.copy_(scale)
            layer.shortcut_in_scale.copy_(entry)
            scale = layer.scale
    classifier.in_scale.copy_(scale)
