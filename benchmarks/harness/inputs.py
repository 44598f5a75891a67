"""What every implementation gets: one state dict, and real photographs preprocessed for it."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

import resnet_fused

# Colour photographs inside scikit-image's wheel; nothing is downloaded.
_SHIPPED = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png", "motorcycle_left.png")
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


class Photographs(NamedTuple):
    """A batch, and the names of the photographs that its first images show whole.

    images: (N, 3, size, size) float32, normalised.
    """

    images: Tensor
    names: list[str]


def find(folder: Path | None) -> list[Path]:
    """The photographs in `folder`, or those that scikit-image ships if None.

    Raises FileNotFoundError, saying what to do, where there are none.
    """
    if folder is not None:
        if not folder.is_dir():
            raise FileNotFoundError(f"--images {folder}: there is no such folder")
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not found:
            raise FileNotFoundError(f"--images {folder} holds no {', '.join(sorted(_SUFFIXES))}")
        return found
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise FileNotFoundError(
            "no photographs: pip install scikit-image, which ships some, or give --images DIR"
        )
    shipped = [Path(package.origin).parent / "data" / name for name in _SHIPPED]
    found = [path for path in shipped if path.is_file()]
    if not found:
        raise FileNotFoundError("this scikit-image ships no photographs; give --images DIR")
    return found


def preprocess(paths: list[Path], batch: int, size: int, transform: Any) -> Photographs:
    """`batch` images of `size`×`size` from the photographs, the same ones every time.

    The first images are the photographs themselves; where the batch is larger, the others are
    random crops of them, mirrored or not, so that no two images are alike. `transform` is that of
    torchvision weights (`weights.transforms()`); a smaller batch is a prefix of a larger one.

    Raises ValueError, naming it, for a file that is no image.
    """
    transform.resize_size = [round(transform.resize_size[0] * size / transform.crop_size[0])]
    transform.crop_size = [size]
    photographs = [_open(path) for path in paths[:batch]]
    draw = random.Random(0)
    images = []
    for index in range(batch):
        photograph = photographs[index % len(photographs)]
        if index >= len(photographs):
            photograph = _crop(photograph, draw)
        images.append(transform(photograph))
    return Photographs(torch.stack(images), [path.stem for path in paths[:batch]])


def _open(path: Path) -> Any:
    from PIL import Image

    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"--images: {path} cannot be read as an image ({error}); mend it or take it away"
        ) from error


def _crop(photograph: Any, draw: random.Random) -> Any:
    from PIL import ImageOps

    width, height = photograph.size
    side = round(min(width, height) * draw.uniform(0.4, 0.9))
    left, top = draw.randrange(width - side + 1), draw.randrange(height - side + 1)
    crop = photograph.crop((left, top, left + side, top + side))
    return ImageOps.mirror(crop) if draw.random() < 0.5 else crop


def make_state(architecture: str, weights: str | None, images: Tensor) -> dict[str, Tensor]:
    """A float32 state dict: that of `weights` (torchvision's name or a file), else a random one.

    The random one stands in for a trained network: seeded weights, batch norms with random scale
    and shift, and the running statistics that `images` (N, 3, H, W) really have in it, so that
    activations keep the range of a trained network's, in float16 too.
    """
    if weights is not None:
        state = getattr(resnet_fused, architecture)(weights=weights).state_dict()
        return {
            name: value.float() if value.is_floating_point() else value
            for name, value in state.items()
        }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(torchvision.models, architecture)()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.normal_(module.bias, 0.0, 0.1)
                module.momentum = None  # running statistics become those of the one batch below
    with torch.no_grad():
        model.train()(images)
    return dict(model.state_dict())


def labels(architecture: str, weights: str | None) -> list[str] | None:
    """The class names that go with `weights`, None for random weights or another data set."""
    if weights is None:
        return None
    entries = torchvision.models.get_model_weights(architecture)
    return list(entries.DEFAULT.meta["categories"])
