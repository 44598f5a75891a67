"""Data sets: the embedded digits, CIFAR-10 and ImageNet as published.

Without a folder, scikit-learn's handwritten digits: 1,797 grey 8×8 images of ten classes, shipped
inside its package (a part of UCI's "Optical Recognition of Handwritten Digits"), enlarged, or
placed on a noisy canvas, where they are harder, and given three equal channels. With one,
torchvision's readers of CIFAR-10 (Python version) and of ImageNet (devkit and archives, or one
folder per class in train/ and val/).
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Sampler, Subset
from torchvision import datasets

from .errors import DataError
from .launch import seed_of

Pairs = Dataset[tuple[Any, int]]

_CIFAR_FOLDER = datasets.CIFAR10.base_folder
_CIFAR_PUBLISHED_ROWS = 10_000  # images in each of its files
_UNPACK = "unpack cifar-10-python.tar.gz again."
# Of placed digits: the share of the canvas' side, the largest turn, and the noise's deviation.
_PLACED_SIZES, _PLACED_DEGREES, _PLACED_NOISE = (0.6, 0.9), 20, 0.15
# Mean and standard deviation of ImageNet's channels, as torchvision's weights expect them.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Published with Torch's ResNet training (github.com/facebookarchive/fb.resnet.torch).
_IMAGENET_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_IMAGENET_EIGENVECTORS = (
    (-0.5675, -0.5808, -0.5836),
    (0.7192, -0.0045, -0.6948),
    (0.4009, -0.8140, 0.4203),
)


@dataclass(frozen=True)
class Images:
    """A data set in two parts; pixels count from 0 to 1.

    kind: "digits", "cifar" or "imagenet": which defaults of the experiments suit it.
    train, test: (image, label) pairs, the image a uint8 (3, H, W) tensor or a PIL image.
    side: height and width of the images, None where they differ.
    mirrors: whether a mirrored image keeps its meaning. Digits do not.
    mean: subtracted from images, (3, H, W) or (3, 1, 1). std: they are divided by it, (3, 1, 1).
    eigenvalues, eigenvectors: of the colours' covariance, (3,) and one a row, (3, 3).
    """

    kind: str
    name: str
    description: str
    train: Pairs
    test: Pairs
    classes: int
    side: int | None
    mirrors: bool
    mean: Tensor
    std: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor


def _head(pairs: Pairs, count: int) -> Pairs:
    return Subset(pairs, range(min(count, size(pairs))))


def size(pairs: Pairs) -> int:
    """The number of pairs."""
    return len(pairs)  # type: ignore[arg-type]  # Dataset declares no length


class InMemory(Dataset[tuple[Any, int]]):
    """Pairs from images (N, 3, H, W) in uint8 and their labels."""

    def __init__(self, images: Tensor, labels: Sequence[int]) -> None:
        self.images = images
        self.labels = list(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def open_images(
    path: Path | None, side: int, quick: bool = False, train: bool = True, copies: int = 0
) -> Images:
    """The data set in `path`, or the digits enlarged to `side`×`side` where it is None.

    quick: only the first images of it, 256 to train and 128 to test.
    train: whether the training images are needed; without, ImageNet's need not be there, and both
        parts are its test images.
    copies: of the digits, see `digits`.

    Raises DataError, naming the file, for anything missing or corrupt.
    """
    images = _open(path, side, train, copies)
    if quick:
        learned, tested = _head(images.train, 256), _head(images.test, 128)
        note = f"; of them the first {size(learned)} and {size(tested)}"
        description = images.description + note
        images = replace(images, train=learned, test=tested, description=description)
    return images


def _open(path: Path | None, side: int, train: bool, copies: int) -> Images:
    if path is None:
        return digits(side, copies)
    if not path.is_dir():
        raise DataError(f"--data {path}: there is no such folder.")
    if path.name == _CIFAR_FOLDER:
        return cifar10(path.parent)
    if (path / _CIFAR_FOLDER).is_dir():
        return cifar10(path)
    if (path / datasets.CIFAR10.filename).is_file():
        archive = path / datasets.CIFAR10.filename
        raise DataError(f"{archive} is still packed; unpack it: tar -C {path} -xf {archive}")
    if any((path / part).is_dir() for part in ("train", "val")) or list(path.glob("ILSVRC2012_*")):
        return image_folders(path, train)
    raise DataError(
        f"--data {path} holds no data set that is known here: neither {_CIFAR_FOLDER}/ (CIFAR-10, "
        "Python version) nor train/ and val/ with one folder per class, or ILSVRC2012's archives "
        "(ImageNet)."
    )


def digits(side: int, copies: int = 0) -> Images:
    """Handwritten digits: 1,200 to train and 597 to test, bilinearly enlarged to `side`×`side`.

    copies: where not 0, there are this many of each digit, and every one has a size, an angle and
        a place of its own on a noisy canvas of `side`×`side` (`_placed`). They are the same in
        every run.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    small = torch.from_numpy(found.images).float()[:, None] / 16  # values are 0 to 16
    labels = torch.from_numpy(found.target)
    parts = train_test_split(
        range(len(small)), train_size=1200, stratify=found.target, random_state=0
    )

    def part(index: int) -> InMemory:
        chosen, own = small[parts[index]], labels[parts[index]]
        if copies:
            chosen = _placed(chosen.repeat(copies, 1, 1, 1), side, index)
        else:
            chosen = F.interpolate(chosen, (side, side), mode="bilinear", align_corners=False)
        images = (chosen * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
        return InMemory(images.contiguous(), own.repeat(max(1, copies)).tolist())

    train, test = part(0), part(1)
    placed = ""
    if copies:
        low, high = _PLACED_SIZES
        placed = (
            f" ({copies} of each of {len(parts[0]):,} and {len(parts[1])} digits, {100 * low:.0f} "
            f"to {100 * high:.0f} % of the side, turned by up to {_PLACED_DEGREES}°, with noise of "
            f"{_PLACED_NOISE})"
        )
    return _in_memory(
        "digits",
        "placed digits" if copies else "digits",
        f"scikit-learn's handwritten digits, {len(train):,} to train and {len(test):,} to test, "
        f"{side}×{side}{placed}",
        train,
        test,
        mirrors=False,
    )


def _placed(small: Tensor, side: int, seed: int) -> Tensor:
    """`small` (N, 1, h, w), each at a size, an angle and a place of its own, as (N, 1, side, side)
    from 0 to 1 with Gaussian noise. A digit turned by 0° is whole."""
    generator = torch.Generator().manual_seed(seed_of("placed", seed))
    sizes, turns, across, down = torch.rand(4, len(small), generator=generator)
    low, high = _PLACED_SIZES
    share = low + (high - low) * sizes
    angle = math.radians(_PLACED_DEGREES) * (2 * turns - 1)
    cos, sin = angle.cos() / share, angle.sin() / share
    centre_x, centre_y = ((1 - share) * (2 * where - 1) for where in (across, down))
    # From a place on the canvas, from -1 to 1, to one on the digit.
    affine = torch.stack(
        [cos, -sin, sin * centre_y - cos * centre_x, sin, cos, -sin * centre_x - cos * centre_y], 1
    ).view(-1, 2, 3)
    grid = F.affine_grid(affine, [len(small), 1, side, side], align_corners=False)
    canvas = F.grid_sample(small, grid, align_corners=False)
    noise = torch.randn(canvas.shape, generator=generator)
    return (canvas + _PLACED_NOISE * noise).clamp(0, 1)


def _in_memory(
    kind: str, name: str, description: str, train: InMemory, test: InMemory, mirrors: bool
) -> Images:
    # The paper subtracts the mean of each pixel (4.2). Dividing by one number only sets the scale.
    pixels = train.images.double() / 255
    mean = pixels.mean(0)
    std = (pixels - mean).square().mean().sqrt()
    values, vectors = torch.linalg.eigh(pixels.transpose(0, 1).flatten(1).cov())
    return Images(
        kind,
        name,
        description,
        train,
        test,
        10,
        train.images.shape[-1],
        mirrors,
        mean.float(),
        std.float().expand(3, 1, 1),
        values.float(),
        vectors.T.float(),
    )


class _NumpyOnly(pickle.Unpickler):
    """Reads arrays, lists and dicts; refuses anything that would run code."""

    _ALLOWED = ("_reconstruct", "ndarray", "dtype", "scalar", "encode", "_frombuffer")

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which no image file needs")


class _Cifar10(datasets.CIFAR10):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's reader without its check of hashes: `_check_cifar` is here for that."""

    train_list = [(name, None) for name, _ in datasets.CIFAR10.train_list]  # noqa: RUF012
    test_list = [(name, None) for name, _ in datasets.CIFAR10.test_list]  # noqa: RUF012
    meta = {**datasets.CIFAR10.meta, "md5": None}  # noqa: RUF012


def cifar10(root: Path) -> Images:
    """CIFAR-10 in `root`/cifar-10-batches-py; smaller sets in the same format are taken too."""
    folder = root / _CIFAR_FOLDER
    batches = datasets.CIFAR10.train_list + datasets.CIFAR10.test_list
    names = folder / datasets.CIFAR10.meta["filename"]
    for file in (*(folder / name for name, _ in batches), names):
        if not file.is_file():
            raise DataError(
                f"{file} is missing; unpack cifar-10-python.tar.gz "
                f"from https://www.cs.toronto.edu/~kriz/cifar.html into {root} again."
            )
    published = [_check_cifar(folder / name, md5) for name, md5 in batches]  # every one
    _unpickle(names, datasets.CIFAR10.meta["key"])  # torchvision reads it, whatever it holds
    train, test = (
        InMemory(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), part.targets)
        for part in (_Cifar10(str(root), train=train) for train in (True, False))
    )
    name = "CIFAR-10" if all(published) else "CIFAR-10's format"
    description = f"{name}, {len(train):,} to train and {len(test):,} to test"
    return _in_memory("cifar", name, description, train, test, mirrors=True)


def _unpickle(file: Path, *keys: str) -> list[Any]:
    """What `file` holds under `keys`; raises DataError where it is corrupt."""
    try:
        found = _NumpyOnly(io.BytesIO(file.read_bytes()), encoding="latin1").load()
        return [found[key] for key in keys]
    except Exception as error:  # damaged pickles raise anything
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{file} is corrupt ({reason}); {_UNPACK}") from error


def _check_cifar(file: Path, md5: str) -> bool:
    """Whether `file` is the published one; raises DataError where it is not a whole one at all."""
    if datasets.utils.check_integrity(str(file), md5):
        return True
    rows, labels = _unpickle(file, "data", "labels")
    shape, dtype = getattr(rows, "shape", None), str(getattr(rows, "dtype", type(rows)))
    whole = isinstance(labels, list) and bool(labels)
    whole = whole and shape == (len(labels), 3072) and dtype == "uint8"
    if not (whole and all(label in range(10) for label in labels)):
        raise DataError(
            f"{file} is corrupt: its data is {dtype} of shape {shape} beside {len(labels)} labels, "
            f"where uint8 of shape (labels, 3072) and labels 0 to 9 belong; {_UNPACK}"
        )
    if len(labels) == _CIFAR_PUBLISHED_ROWS:
        raise DataError(f"{file} is corrupt: its MD5 is not the published one; {_UNPACK}")
    return False


def open_image(path: str) -> Image.Image:
    """The image in RGB; raises DataError where the file is no whole image."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path} is no whole image ({error}); replace or remove it.") from error


def image_folders(root: Path, train: bool = True) -> Images:
    """ImageNet in `root`: the devkit and archives, or train/ and val/ with a folder per class.

    train: False to read val/ only, which then is both parts.
    """
    official = bool(list(root.glob("ILSVRC2012_*")))
    try:
        learned, tested = (
            datasets.ImageNet(str(root), part, loader=open_image)
            if official
            else datasets.ImageFolder(str(root / part), loader=open_image)
            for part in ("train" if train else "val", "val")
        )
    except (RuntimeError, OSError, ModuleNotFoundError) as error:
        raise DataError(f"--data {root}: {error}") from error
    if learned.classes != tested.classes:
        differing = sorted(set(learned.classes) ^ set(tested.classes), key=str)[0]
        raise DataError(
            f"{root}/train and {root}/val hold different classes: {differing} is in only one."
        )
    name = "ImageNet" if official or len(learned.classes) == 1000 else "image folders"
    trained = f"{len(learned):,} to train and " if train else ""
    return Images(
        "imagenet",
        name,
        f"{name}, {trained}{len(tested):,} to test, {len(tested.classes)} classes",
        learned,
        tested,
        len(learned.classes),
        None,
        True,
        torch.tensor(_IMAGENET_MEAN)[:, None, None],
        torch.tensor(_IMAGENET_STD)[:, None, None],
        torch.tensor(_IMAGENET_EIGENVALUES),
        torch.tensor(_IMAGENET_EIGENVECTORS),
    )


class Transformed(Dataset[tuple[Tensor, int]]):
    """Images through a transform whose random choices follow from (seed, epoch, index) alone.

    So they do not depend on which process or worker loads an image, nor on what ran before.
    Indexed by (epoch, index).
    """

    def __init__(self, pairs: Pairs, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.pairs = pairs
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return size(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        image, label = self.pairs[key[1]]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, *key))
            return self.transform(image), label


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """A process's part of the batches from iteration `start` to `end`, as (epoch, index) keys.

    Each epoch is a permutation made from (seed, epoch); images that fill no batch are left out of
    it. Process `rank` of `world` takes every `world`-th image of each batch.
    """

    def __init__(
        self, images: int, batch: int, start: int, end: int, seed: int, rank: int, world: int
    ) -> None:
        if images < batch:
            raise DataError(f"a batch of {batch} needs as many images; there are {images}.")
        self.images, self.batch, self.seed = images, batch, seed
        self.start, self.end, self.rank, self.world = start, end, rank, world

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Any:
        batches = self.images // self.batch
        epoch = -1
        order: list[int] = []
        for iteration in range(self.start, self.end):
            if iteration // batches != epoch:
                epoch = iteration // batches
                generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
                order = torch.randperm(self.images, generator=generator).tolist()
            first = iteration % batches * self.batch
            chosen = order[first : first + self.batch][self.rank :: self.world]
            yield [(epoch, index) for index in chosen]
