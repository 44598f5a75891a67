"""`resnet-fused`: the package's commands, of which `classify` and `validate` stand here.

    resnet-fused classify PATH... --arch resnet50 --csv out.csv     labels of images and folders
    resnet-fused validate --data IMAGENET/val --arch resnet50       top-1, top-5, images a second
    resnet-fused tune | env | selfcheck | bench ...                 what has modules of its own

Weights come by torchvision's name, which downloads them once, or from a file, which needs no
network. Images are prepared by the weights' own recipe, as torchvision's `weights.transforms()`
gives it; a file is taken to have the recipe of the published weights of its name, or else that of
the architecture's default ones.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:  # `resnet-fused env` has to run where torch cannot be imported
    import torch
    from torch import Tensor, nn

_T = TypeVar("_T")
_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks/throughput.py"


class Classifier(NamedTuple):
    """A network in eval mode, and what its weights say about images and classes."""

    model: nn.Module
    transform: Callable[[Any], Tensor]  # an RGB image -> (3, H, W) float32, normalised
    labels: list[str]
    device: torch.device
    dtype: torch.dtype

    def probabilities(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W), as `transform` makes them -> (N, classes) float32 on the CPU."""
        import torch

        with torch.inference_mode():
            return self.model(images.to(self.device, self.dtype)).float().softmax(1).cpu()


def load(options: argparse.Namespace) -> Classifier:
    """The classifier that the command line describes; exits with a message where there is none."""
    import torch

    from . import CheckpointError, models
    from .models.weights import load_weights

    try:
        from torchvision.models import get_model_weights, list_models
    except ImportError as error:
        sys.exit(f"{error}: images are prepared by torchvision; run `pip install torchvision`.")

    names = sorted(set(models.__all__) & set(list_models()))
    if options.arch not in names:
        sys.exit(f"--arch {options.arch} is unknown; take one of {', '.join(names)}.")
    entries = get_model_weights(options.arch)
    try:
        state = load_weights(options.arch, options.weights)
    except (CheckpointError, ValueError) as error:
        sys.exit(f"--weights {options.weights}: {error}")
    assert state is not None
    if "fc.bias" not in state:
        sys.exit(f"--weights {options.weights} holds no classifier (fc.bias); give a whole network")
    classes = state["fc.bias"].numel()
    model = getattr(models, options.arch)(num_classes=classes)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        sys.exit(f"--weights {options.weights} are not those of {options.arch}: {error}")

    entry = _published(options.weights, entries)
    if entry is None:
        entry = entries.DEFAULT
        print(f"images are prepared as for {entry}", file=sys.stderr)
    if options.labels:
        labels = options.labels.read_text(errors="replace").splitlines()
        if len(labels) != classes:
            sys.exit(f"--labels has {len(labels)} lines; the weights have {classes} classes")
    elif len(entry.meta["categories"]) == classes:
        labels = list(entry.meta["categories"])
    else:
        labels = [str(number) for number in range(classes)]
        print("classes are numbered; --labels FILE names them", file=sys.stderr)
    dtype = getattr(torch, options.dtype)
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = model.eval().to(device, dtype)
    except RuntimeError as error:
        sys.exit(f"--device {options.device}: {error}")
    return Classifier(model, entry.transforms(), labels, device, dtype)


def _published(weights: str, entries: Any) -> Any:
    """The entry of torchvision that `weights` names, or that is stored in a file of that name."""
    name = Path(weights).name
    for key, entry in entries.__members__.items():
        if weights in (key, f"{entries.__name__}.{key}") or name == entry.url.rsplit("/", 1)[1]:
            return entry
    return None


def _open(path: Path) -> Any:
    """The image in RGB, or None, and a word on stderr, for a file that cannot be read as one."""
    try:
        image = _decoded(path)
        if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):
            # Of 16 bits, which Pillow would cut off at 255.
            image = image.convert("I").point(lambda value: value * (255 / 65535))
        elif image.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {image.mode} do not tell which of them is white")
        return image.convert("RGB")
    except ValueError as error:
        print(f"{path} cannot be read as an image: {error}", file=sys.stderr)
        return None


def _decoded(path: Path) -> Any:
    from PIL import Image

    try:
        image: Any = Image.open(path)
        image.load()
    except Exception as error:  # a damaged file makes Pillow raise anything, even TypeError
        raise ValueError(error) from error
    return image


class _Images:
    """A data set of the files that could be read: (number, image prepared), None for the others."""

    def __init__(self, paths: Sequence[Path], transform: Callable[[Any], Tensor]) -> None:
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[int, Tensor] | None:
        image = _open(self._paths[number])
        return None if image is None else (number, self._transform(image))


def _stack(pairs: Sequence[tuple[int, Tensor] | None]) -> tuple[list[int], Tensor | None]:
    import torch

    found = [pair for pair in pairs if pair is not None]
    images = torch.stack([image for _, image in found]) if found else None
    return [number for number, _ in found], images


def _predict(
    classifier: Classifier, paths: Sequence[Path], options: argparse.Namespace
) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers of paths and their probabilities (N, classes), one batch after the other."""
    from torch.utils.data import DataLoader

    batches: DataLoader[Any] = DataLoader(
        _Images(paths, classifier.transform),  # type: ignore[arg-type]  # no subclass of Dataset
        batch_size=options.batch,
        num_workers=options.workers,
        collate_fn=_stack,
    )
    for numbers, images in _progress(batches):
        if images is not None:
            yield numbers, classifier.probabilities(images)


def _progress(batches: Iterable[_T]) -> Iterable[_T]:
    """With a bar where stderr is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return batches
    bar: Iterable[_T] = tqdm(batches, unit="batch", disable=None)
    return bar


def find(paths: Iterable[Path]) -> list[Path]:
    """The images among the files of folders, and every file named itself; exits if one is absent"""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
            if not inside:
                sys.exit(f"{path} holds no images ({' '.join(_SUFFIXES)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            sys.exit(f"{path}: there is no such file or folder")
    return found


def classify(options: argparse.Namespace) -> int:
    """Prints the likeliest classes of each image; 1 if a file was no image."""
    paths = find(options.paths)
    classifier = load(options)
    top = min(options.top, len(classifier.labels))
    shown = 0
    with ExitStack() as stack:
        writer = None
        if options.csv:
            file = stack.enter_context(options.csv.open("w", newline=""))
            writer = csv.writer(file)
            writer.writerow(("path", "rank", "label", "class", "probability"))
        for numbers, probabilities in _predict(classifier, paths, options):
            best = probabilities.topk(top)
            for number, values, classes in zip(
                numbers, *(part.tolist() for part in best), strict=True
            ):
                names = [classifier.labels[index] for index in classes]
                likeliest = [f"{name} {p:.1%}" for name, p in zip(names, values, strict=True)]
                print(f"{paths[number]}: {', '.join(likeliest)}")
                if writer:
                    ranked = zip(range(1, top + 1), names, classes, values, strict=True)
                    writer.writerows((paths[number], *row) for row in ranked)
            shown += len(numbers)
    return int(shown < len(paths))


def validate(options: argparse.Namespace) -> int:
    """Prints top-1 and top-5 accuracy and images a second; 1 if a file was no image."""
    if not options.data.is_dir():
        sys.exit(f"--data {options.data} is no folder")
    classifier = load(options)
    data = options.data / "val" if (options.data / "val").is_dir() else options.data
    folders = sorted(p for p in data.iterdir() if p.is_dir())
    if len(folders) != len(classifier.labels):
        sys.exit(
            f"--data {data} has {len(folders)} folders; these weights have "
            f"{len(classifier.labels)} classes, and need a folder of images for each, in the "
            "classes' order by name (ImageNet: n01440764 to n15075141)."
        )
    files = [(path, number) for number, folder in enumerate(folders) for path in find([folder])]
    paths = [path for path, _ in files]
    hits, seen, start = {1: 0, 5: 0}, 0, time.perf_counter()
    for numbers, probabilities in _predict(classifier, paths, options):
        best = probabilities.topk(min(5, probabilities.shape[1])).indices.tolist()
        for number, found in zip(numbers, best, strict=True):
            for k in hits:
                hits[k] += files[number][1] in found[:k]
        seen += len(numbers)
    rate = seen / (time.perf_counter() - start)
    if not seen:
        sys.exit(f"--data {data}: no file could be read as an image")
    print(
        f"{seen} images: top-1 {hits[1] / seen:.3%}, top-5 {hits[5] / seen:.3%}; "
        f"{rate:.1f} images/s with reading and decoding ({options.dtype} on {classifier.device})"
    )
    return int(seen < len(paths))


def bench(arguments: Sequence[str]) -> int:
    """Runs `benchmarks/throughput.py` of the sources; the wheel has no benchmarks."""
    if not _BENCHMARK.is_file():
        sys.exit(
            "the benchmark stands in the sources, beside every peer that it measures, not in the "
            "wheel: unpack the sdist or clone the repository, and run `resnet-fused bench` there "
            "after `pip install '.[bench]'`."
        )
    return subprocess.run([sys.executable, str(_BENCHMARK), *arguments]).returncode


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
        return value

    return number


def _options(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"resnet-fused {command}", description=COMMANDS[command])
    if command == "classify":
        parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="image or folder")
        parser.add_argument(
            "--top", type=_at_least(1), default=5, help="classes shown (%(default)s)"
        )
        parser.add_argument("--csv", type=Path, help="also write path, rank, label, class, p there")
    else:
        parser.add_argument("--data", type=Path, required=True, help="a folder for each class")
    parser.add_argument("--arch", default="resnet50", help="torchvision's name (%(default)s)")
    parser.add_argument(
        "--weights", default="DEFAULT", help="torchvision's name, or a file (%(default)s)"
    )
    parser.add_argument("--labels", type=Path, help="a file with the name of a class in each line")
    parser.add_argument(
        "--batch", type=_at_least(1), default=16, help="images a call (%(default)s)"
    )
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--workers", type=_at_least(0), default=0, help="processes that read (%(default)s)"
    )
    return parser.parse_args(arguments)


COMMANDS = {
    "classify": "the likeliest classes of images, or of the images in folders",
    "validate": "top-1 and top-5 accuracy on a folder with a folder of images for each class",
    "bench": "images a second beside every peer on this machine",
    "tune": "measures a network's kernels ahead of time",
    "selfcheck": "whether this machine's kernels compute what they should",
    "env": "what this machine, installation and build offer",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="resnet-fused",
        description="Fused ResNets.",
        epilog="\n".join(f"{name:10} {meaning}" for name, meaning in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see `resnet-fused CMD --help`")
    chosen = parser.parse_args(arguments)
    command, rest = chosen.command, chosen.arguments
    if command == "bench":
        return bench(rest)
    if command not in ("classify", "validate"):
        return int(importlib.import_module(f"resnet_fused.{command}").main(rest) or 0)
    options = _options(command, rest)
    try:
        return classify(options) if command == "classify" else validate(options)
    except OSError as error:  # a file to read or to write, which it names
        sys.exit(f"resnet-fused {command}: {error}")


if __name__ == "__main__":
    sys.exit(main())
