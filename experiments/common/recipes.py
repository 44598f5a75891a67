"""The paper's recipes, 4.2 for CIFAR-10 and 3.4 for ImageNet, and their scaled-down forms.

On the embedded digits the same recipe runs for far fewer iterations: every number that is a count
of iterations shrinks in proportion, and images are not mirrored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .augmentation import centre_crop, padded_crops, scaled_crops, whole
from .data import Images, size
from .schedules import Cosine, Milestones, Plateau
from .training import Recipe


def cifar(
    images: Images,
    iterations: int = 64_000,
    batch: int = 128,
    learning_rate: float = 0.1,
    warm_up: bool = False,
    milestones: Sequence[int] | None = None,
) -> Recipe:
    """4.2: rate 0.1, divided by 10 after 1/2 and 3/4 of the iterations (32k and 48k of 64k).

    milestones: iterations to divide the rate at, instead of those.
    warm_up: a tenth of the rate until the training error is under 80 % (for 110 layers).
    """
    every = max(24, iterations // 640 * 4)
    if milestones is None:
        milestones = (iterations // 2, iterations * 3 // 4)
    return Recipe(
        iterations=iterations,
        batch=batch,
        schedule=lambda optimizer: Milestones(
            optimizer, milestones, learning_rate / 10 if warm_up else None
        ),
        augment=padded_crops(images),
        view=whole(images),
        record_every=every // 4,
        evaluate_every=every,
        learning_rate=learning_rate,
    )


def cifar_in_short(
    images: Images, iterations: int, batch: int, weight_decay: float = 1e-4
) -> Recipe:
    """4.2 for networks of every depth in hundreds of iterations; `CHANGED` says how and why.

    weight_decay: the paper's by default.
    """
    every = max(24, iterations // 20)
    return replace(
        cifar(images, iterations, batch),
        schedule=lambda optimizer: Cosine(optimizer, iterations, max(1, iterations // 10)),
        record_every=every // 4,
        evaluate_every=every,
        weight_decay=weight_decay,
    )


# What a report says of `cifar_in_short`.
CHANGED = (
    "Changed from the paper's recipe (4.2): the run has hundreds of iterations and not 64k. So "
    "every network's rate rises to 0.1 over the first tenth of them, as the paper's warm-up lets "
    "110 layers survive that rate, and then falls along half a cosine: divided by 10 after half "
    "of so few iterations, it would stop the deep networks while they still learn. Digits are not "
    "mirrored."
)


def imagenet(
    images: Images,
    crop: int,
    epoch: int,
    iterations: int,
    batch: int = 256,
    learning_rate: float = 0.1,
    milestones: Sequence[int] | None = None,
) -> Recipe:
    """3.4: rate 0.1, divided by 10 when more than 5 epochs saw no lower test error; in runs of
    fewer than 50 epochs, more than a tenth of them.

    epoch: iterations between two measurements on the test set.
    milestones: iterations to divide the rate at, instead. Short runs come to no plateau.
    """
    patience = min(5, max(1, iterations // epoch // 10))
    return Recipe(
        iterations=iterations,
        batch=batch,
        schedule=lambda optimizer: (
            Plateau(optimizer, patience)
            if milestones is None
            else Milestones(optimizer, milestones)
        ),
        augment=scaled_crops(images, crop),
        view=centre_crop(images, crop),
        record_every=max(1, epoch // 4),
        evaluate_every=epoch,
        learning_rate=learning_rate,
    )


def modern(
    images: Images,
    crop: int,
    epoch: int,
    iterations: int,
    batch: int = 256,
    learning_rate: float = 0.1,
) -> Recipe:
    """A cosine with a rise of a twentieth of the iterations, label smoothing 0.1, mixup 0.2 and a
    moving average of the weights over about a fiftieth of the iterations."""
    return Recipe(
        iterations=iterations,
        batch=batch,
        schedule=lambda optimizer: Cosine(optimizer, iterations, max(1, iterations // 20)),
        augment=scaled_crops(images, crop),
        view=centre_crop(images, crop),
        record_every=max(1, epoch // 4),
        evaluate_every=epoch,
        learning_rate=learning_rate,
        label_smoothing=0.1,
        average=1 - 1 / max(2, iterations // 50),
        mixup=0.2,
    )


def of_the_paper(images: Images, iterations: int, batch: int, **changes: Any) -> Recipe:
    """3.4 for photographs of many sizes, 4.2 for small images; `changes` as each of them takes."""
    if images.side is None:
        epoch = max(1, size(images.train) // batch)
        return imagenet(images, 224, epoch, iterations, batch, **changes)
    return cifar(images, iterations, batch, **changes)
