"""The ImageNet recipe (section 3.4), and a modern one beside it.

    python experiments/imagenet.py                  # embedded digits, minutes on two cores
    torchrun --nproc-per-node 8 experiments/imagenet.py --data IMAGENET --workers 12
    torchrun --nproc-per-node 8 experiments/imagenet.py --data IMAGENET --recipes modern

paper: crops of 224 from images whose shorter side is drawn from [256, 480], or of their mirror
images; the channels' means subtracted; colours shifted along their principal components; SGD with
momentum 0.9 and weight decay 1e-4, batches of 256, rate 0.1 divided by 10 on a plateau.
modern: the same crops; the rate along a cosine, label smoothing, mixup, and a moving average of
the weights. With mixup the training error is that of mixed images, and processes mix their own.
"""

from __future__ import annotations

import argparse
import sys

from common import data, launch, networks, recipes
from common.report import Report
from common.training import Result, train

RECIPES = {"paper": recipes.imagenet, "modern": recipes.modern}


def parse(arguments: list[str]) -> argparse.Namespace:
    options = launch.parser(__doc__, "imagenet")
    options.add_argument("--model", help="resnet18, resnet50, plain34, ...: a name in resnet_fused")
    options.add_argument("--recipes", nargs="+", choices=RECIPES)
    options.add_argument("--epochs", type=int)
    options.add_argument("--batch", type=int)
    options.add_argument("--learning-rate", type=float)
    options.add_argument("--crop", type=int, help="height and width that the network sees")
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    images = data.open_images(place.data, side=48, quick=place.quick)
    model, chosen, epochs, batch, rate, crop = launch.choose(
        options,
        images.kind,
        ("model", "recipes", "epochs", "batch", "learning_rate", "crop"),
        digits=("resnet18", ["paper", "modern"], 10, 32, 0.02, 32),
        cifar=("resnet18", ["paper"], 60, 128, 0.1, 32),
        imagenet=("resnet50", ["paper"], 120, 256, 0.1, 224),
        quick=("resnet18", ["paper", "modern"], 2, 64, 0.1, 32),
    )
    make = networks.named(model)
    epoch = max(1, data.size(images.train) // batch)
    results = {}
    for name in chosen:
        recipe = RECIPES[name](images, crop, epoch, epochs * epoch, batch, rate)
        results[name] = train(
            f"{model}-{name}", lambda: make(num_classes=images.classes), images, recipe, place
        )
    report(place, images, model, batch, results)


def report(
    place: launch.Launch,
    images: data.Images,
    model: str,
    batch: int,
    results: dict[str, Result],
) -> None:
    pages = Report(
        place,
        "The ImageNet recipe",
        f"{model} trained by the recipe of section 3.4, and where asked for by a modern one. On "
        "ImageNet's validation images the paper's ResNet-50 (option B) has top-1 and top-5 errors "
        "of 22.85 % and 6.71 % with ten crops (Table 3).",
    )
    pages.table(
        "results",
        [
            {
                "network": model,
                "recipe": name,
                "parameters": networks.parameters(result.model),
                "training error (%)": result.training_error,
                "top-1 test error (%)": result.last["test_error"],
                "top-5 test error (%)": result.last["test_top5_error"],
                "images a second": result.last["iteration"] * batch / result.seconds,
            }
            for name, result in results.items()
        ],
    )

    pages.curves(
        f"Training and test error on {images.name}, single centre crops.",
        {f"{model}, {name}": result.history for name, result in results.items()},
    )
    pages.save(images, list(results.values()))


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
