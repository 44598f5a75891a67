"""Quantised networks: int8 and fp8, made in one call, reported on, and fine-tuned where it must be.

    quantized = resnet_fused.quantize(model, batches)
    print(quantized.report)

What a quantised layer computes, `resnet_fused.reference.quantized` says; every backend equals it
bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..reference.quantized import FLOAT8
from .calibration import METHODS, calibrate, checked
from .fold import Normalization, fold
from .folded import FoldedNetwork
from .network import QuantizedNetwork
from .onnx import export_onnx
from .report import LayerReport, Report, agreement, report

__all__ = [
    "METHODS",
    "FoldedNetwork",
    "LayerReport",
    "QuantizedNetwork",
    "Report",
    "convert",
    "export_onnx",
    "prepare_qat",
    "quantize",
]


def quantize(
    model: nn.Module,
    calibration: Iterable[Any],
    dtype: torch.dtype = torch.int8,
    *,
    normalization: Normalization | None = None,
    method: str = "mse",
    keep: Collection[str] = (),
    least_agreement: float | None = None,
    progress: bool = True,
) -> QuantizedNetwork:
    """A quantised network that gives what `model` gives, as nearly as its dtype lets it.

    Weights are symmetric with one scale an output channel, activations have one scale a tensor and
    are unsigned behind their ReLU; batch norm is folded, in float64. Activations stay quantised
    within and between blocks; logits are float32.

    Args:
        model: a network of this package, or one of torchvision after `resnet_fused.fuse`; in eval
            mode, of any floating dtype and device. It is not changed.
        calibration: batches of images (N, C, H, W), or (images, ...) as a data loader gives them,
            a few hundred images in all: floats as `model` takes them, or bytes where
            `normalization` is given. They are kept in memory meanwhile.
        dtype: torch.int8 or torch.float8_e4m3fn, whose convolutions Hopper's kernels compute, and
            all else its reference, slowly.
        normalization: (mean, std) of the channels, of images from 0 to 1, as `model` was trained
            with. Then images may come as bytes, uint8, and are used as they are; floats are
            rounded to those bytes. Without it floats are quantised over the range seen.
        method: how an activation's scale is found: "range", the largest value seen; "percentile",
            all but a ten thousandth; "mse", the least squared error.
        keep: layers to keep in float32 between quantised ones: their names in `model`, or "first"
            and "last".
        least_agreement: keep more layers in float32, those that lose most by themselves first,
            until the top-1 answers agree with the float model's on so many of the calibration
            images (0 to 1).
        progress: whether to show progress on a terminal (with tqdm).

    Autocast has no part in it. Returns the network, whose `report` says what was lost and where.
    In int8 it takes NaN in an image as the least byte; in fp8 NaN stays one.
    Raises ValueError for models, weights and calibration images that do not serve, TypeError for
    images of another dtype, with what was found.
    """
    folded, batches = _calibrated(model, calibration, dtype, normalization, method, keep, progress)
    network = folded.converted()
    with torch.autocast(batches[0].device.type, enabled=False):
        found = report(model, folded, network, batches, progress)
        if least_agreement is not None:
            by_name = {layer.name: layer for layer in folded.folded()}
            order = [by_name[layer.name] for layer in found.worst()]
            agreed, reported = found.agreement, network
            for layer in order:
                if agreed >= least_agreement:
                    break
                if not layer.higher:
                    layer.higher = True
                    network = folded.converted()
                    agreed = agreement(model, network, batches)
            if agreed < least_agreement:
                warnings.warn(
                    f"resnet_fused.quantize: top-1 answers agree on {agreed:.2%} of the "
                    f"calibration images with every layer in float32, less than least_agreement="
                    f"{least_agreement:.2%}; activations between layers are still {dtype}.",
                    stacklevel=2,
                )
            if network is not reported:
                found = report(model, folded, network, batches, progress)
    network.report = found
    return network


def prepare_qat(
    model: nn.Module,
    calibration: Iterable[Any],
    dtype: torch.dtype = torch.int8,
    *,
    normalization: Normalization | None = None,
    method: str = "mse",
    keep: Collection[str] = (),
    progress: bool = True,
) -> FoldedNetwork:
    """A trainable network whose forward is, bit for bit, the quantised one: fake quantisation.

    Fine-tune it for a few epochs, then `convert` it. Choose a smaller learning rate than the
    network was trained with: batch norm is folded, so that nothing rescales what a large step does.
    Its statistics stay; scales are the calibration's and stay too, weights' scales follow the
    weights. Its backward is the float network's (a straight-through estimator), with no
    gradient where an activation is clamped. The arguments are those of `quantize`.
    """
    folded, _ = _calibrated(model, calibration, dtype, normalization, method, keep, progress)
    return folded.imitate().train()


def convert(network: FoldedNetwork) -> QuantizedNetwork:
    """The quantised network that a network of `prepare_qat` imitates, with its weights as they are.

    It has no report.
    """
    if not isinstance(network, FoldedNetwork):
        raise TypeError(
            f"network must be one of prepare_qat, found {type(network).__qualname__}; "
            "resnet_fused.quantize takes float networks."
        )
    return network.converted()


def _calibrated(
    model: nn.Module,
    calibration: Iterable[Any],
    dtype: torch.dtype,
    normalization: Normalization | None,
    method: str,
    keep: Collection[str],
    progress: bool,
) -> tuple[FoldedNetwork, list[Tensor]]:
    """The folded network with its scales, and the calibration's batches."""
    if dtype not in (torch.int8, FLOAT8):
        raise ValueError(f"dtype must be torch.int8 or torch.float8_e4m3fn, found {dtype}.")
    folded = fold(model, dtype, normalization)
    layers = folded.folded()
    names = {layer.name: layer for layer in layers} | {"first": layers[0], "last": layers[-1]}
    if isinstance(keep, str) or (unknown := set(keep) - set(names)):
        found = repr(keep) if isinstance(keep, str) else ", ".join(sorted(unknown))
        raise ValueError(
            f"keep must be names of convolutions or of the classifier, or first and last, found "
            f"{found}; there are {', '.join(layer.name for layer in layers)}."
        )
    for name in keep:
        names[name].higher = True
    batches = checked(calibration, folded)
    with torch.autocast(batches[0].device.type, enabled=False):
        calibrate(folded, batches, method, progress)
    return folded, batches
