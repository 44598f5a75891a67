"""`stem` of images of bytes, as serving gets them, normalised on the way to the convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Candidate
from ..parameters import ConvBn, MaxPool, Normalization
from ..reference import ops as reference
from .checks import check_batch_norm, check_images, pool_shape, window_shape
from .registry import Op, autocast_dtype
from .stem import op as stem_op


def _output_shape(
    images: Tensor, layer: ConvBn, pool: MaxPool, normalization: Normalization
) -> tuple[int, ...]:
    check_images(images, normalization)
    weight = layer.conv.weight
    if weight.device != images.device:
        raise ValueError(
            f"layer.weight is on {weight.device} and the images on {images.device}; move one."
        )
    if not weight.dtype.is_floating_point:
        raise TypeError(f"layer.weight must be floating point, found {weight.dtype}.")
    shape = window_shape("layer", images.shape, layer.conv)
    check_batch_norm("layer.bn", layer.bn, shape[1], images)
    return pool_shape(shape, pool)


def _separate(images: Tensor, layer: ConvBn, pool: MaxPool, normalization: Normalization) -> Tensor:
    x = reference.normalise(images, normalization, layer.conv.weight.dtype)
    return stem_op.compute(x, layer, pool)


_op = Op(
    reference.image_stem,
    _output_shape,
    lambda backend: backend.image_stem,
    Candidate("separate", _separate),
    result_dtype=lambda images, layer, *_: layer.conv.weight.dtype,
)


def image_stem(
    images: Tensor, layer: ConvBn, normalization: Normalization, pool: MaxPool | None = None
) -> Tensor:
    """max_pool(relu(bn(conv((images / 255 - mean) / std)))): `stem` of images of bytes, fused.

    Args:
        images: (N, C, H, W), uint8, any layout.
        layer: as in `stem`; its weight's dtype is the result's, to which normalised pixels are
            rounded, as they would be for the model.
        normalization: mean and standard deviation of each channel, of pixels from 0 to 1.
        pool: the pooling window; 3×3, stride 2, padding 1 if None.

    Returns the pooled (N, K, P, Q), channels_last. Where gradients of the layer are wanted, and
    under autocast, images are normalised first and `stem` does the rest. Raises ValueError for
    shapes and devices that disagree and TypeError for dtypes that are none of these.
    """
    arguments = (images, layer, MaxPool() if pool is None else pool, normalization)
    parameters = (layer.conv.weight, layer.bn.weight, layer.bn.bias)
    trained = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)
    if trained or autocast_dtype(images) != images.dtype:
        _output_shape(*arguments)
        x = reference.normalise(images, normalization, layer.conv.weight.dtype)
        return stem_op(x, *arguments[1:3])
    return _op(*arguments)
