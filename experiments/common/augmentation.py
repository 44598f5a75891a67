"""The paper's augmentations: 3.4 for ImageNet, 4.2 for CIFAR-10."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from .data import Images

Transform = Callable[[Any], Tensor]

# The scales of the paper: shorter sides drawn from [256, 480] for crops of 224 (3.4).
_CROP, _TEST_SIDE, _SCALES = 224, 256, (256, 480)


class _Standardise(nn.Module):
    """(image - mean) / std; the mean may differ from pixel to pixel, as v2.Normalize's cannot."""

    def __init__(self, images: Images) -> None:
        super().__init__()
        self.mean, self.std = images.mean, images.std

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


class PcaColour(nn.Module):
    """Adds the colours' principal components, each times its eigenvalue times N(0, 0.1²).

    "The standard color augmentation" of 3.4, from Krizhevsky et al. 2012, section 4.1.
    image: float (3, H, W) from 0 to 1.
    """

    def __init__(self, images: Images) -> None:
        super().__init__()
        self.eigenvalues, self.eigenvectors = images.eigenvalues, images.eigenvectors

    def forward(self, image: Tensor) -> Tensor:
        shift = (torch.randn(3) * 0.1 * self.eigenvalues) @ self.eigenvectors
        return image + shift[:, None, None]


def _image(*transforms: nn.Module) -> Transform:
    first = (v2.ToImage(), *transforms)
    return v2.Compose([*first, v2.ToPureTensor()])


def _as_float() -> nn.Module:
    return v2.ToDtype(torch.float32, scale=True)


def _mirrored(images: Images) -> list[nn.Module]:
    return [v2.RandomHorizontalFlip()] if images.mirrors else []


def padded_crops(images: Images) -> Transform:
    """4.2: an image or its mirror image, padded on each side by an eighth (4 pixels of 32), with
    zeros after the mean is subtracted, and cropped at random to its own size."""
    side = images.side
    assert side is not None
    crop = v2.RandomCrop(side, padding=max(1, side // 8))
    return _image(_as_float(), _Standardise(images), crop, *_mirrored(images))


def whole(images: Images) -> Transform:
    """4.2's test: the single view of the original image."""
    return _image(_as_float(), _Standardise(images))


def scaled_crops(images: Images, crop: int) -> Transform:
    """3.4: shorter side drawn from [256, 480] (for crops of 224; in proportion for others), a
    random crop of the image or its mirror image, colours shifted along their components."""
    low, high = (round(scale * crop / _CROP) for scale in _SCALES)
    return _image(
        v2.RandomShortestSize(list(range(low, high + 1)), antialias=True),
        v2.RandomCrop(crop),
        *_mirrored(images),
        _as_float(),
        PcaColour(images),
        _Standardise(_by_channel(images)),
    )


def centre_crop(images: Images, crop: int) -> Transform:
    """The single centre crop, of an image whose shorter side is 256 (for crops of 224)."""
    return _image(
        v2.Resize(round(_TEST_SIDE * crop / _CROP), antialias=True),
        v2.CenterCrop(crop),
        _as_float(),
        _Standardise(_by_channel(images)),
    )


def _by_channel(images: Images) -> Images:
    """With one mean per channel: crops of many scales have no mean per pixel."""
    return replace(images, mean=images.mean.mean((1, 2), keepdim=True))
