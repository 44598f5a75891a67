"""Detection: Faster R-CNN on ResNets with frozen batch norm (appendix A and B, Tables 7 to 11).

    python experiments/detection.py                    # digits on backgrounds, minutes on two cores
    python experiments/detection.py --data VOC                          # Table 7
    torchrun --nproc-per-node 8 experiments/detection.py --data COCO    # Table 8 and 9

VOC is the folder that holds VOCdevkit/, COCO the one that holds annotations/, train2017/ and so
on. Proposals and regions train together, where the paper alternates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from common import launch, networks, recipes
from common.errors import ExperimentError
from common.report import Report, measured
from common.training import Result
from common.training import train as train_classifier
from detectors import digits
from detectors.inference import SCALES, detect
from detectors.model import ARRANGEMENTS, faster_rcnn
from detectors.scenes import Scenes, open_scenes
from detectors.training import Recipe, measure, read, train
from torchvision.models.detection import FasterRCNN

import resnet_fused
from resnet_fused.models.network import ResidualNetwork

TESTS: dict[str, dict[str, Any]] = {
    "single scale": {},
    "box refinement": {"refine": True},
    "multi-scale": {"scales": SCALES},
    "both": {"scales": SCALES, "refine": True},
}


def parse(arguments: list[str]) -> argparse.Namespace:
    options = launch.parser(__doc__, "detection")
    options.add_argument("--model", help="a network of resnet_fused: resnet101, for example")
    options.add_argument(
        "--weights", help="what it begins with: a file, or a name of torchvision's"
    )
    options.add_argument("--arrangement", nargs="+", choices=ARRANGEMENTS)
    options.add_argument("--tests", nargs="+", choices=TESTS)
    options.add_argument(
        "--dilate",
        nargs="+",
        choices=("conv4", "conv5"),
        default=[],
        help="stages that dilate instead of striding",
    )
    options.add_argument(
        "--stride-in", choices=("3x3", "1x1"), help="of bottlenecks; the paper's is 1x1"
    )
    options.add_argument("--side", type=int, help="shorter side of the images in pixels")
    options.add_argument("--iterations", type=int)
    options.add_argument("--batch", type=int)
    options.add_argument("--learning-rate", type=float)
    return options.parse_args(arguments)


def experiment(place: launch.Launch, options: argparse.Namespace) -> None:
    scenes = _scenes(place)
    kind = scenes.kind if place.data else "digits"
    names = (
        *("model", "weights", "side", "arrangement", "tests"),
        *("iterations", "batch", "learning_rate"),
    )
    model, weights, side, arrangements, tests, iterations, batch, rate = launch.choose(
        options,
        kind,
        names,
        digits=(None, None, 128, ARRANGEMENTS, TESTS, 500, 2, 0.01),
        voc=("resnet101", "DEFAULT", 600, ["c4"], TESTS, 80_000, 2, 0.001),
        coco=("resnet101", "DEFAULT", 600, ["c4"], TESTS, 320_000, 8, 0.001),
        quick=(None, None, 64, ["c4"], ["single scale", "both"], 4, 2, 0.01),
    )
    first: list[Result] = []
    network = digits.network if model is None else _network(options, model)
    if weights is None and place.data is None:
        first.append(_classifier(place, network))
        weights = first[0].model.state_dict()
    recipe = Recipe(
        iterations,
        batch,
        rate,
        record_every=max(1, iterations // 50),
        evaluate_every=max(1, iterations // 4),
    )
    results = {
        arrangement: train(
            arrangement,
            _detector(network, weights, arrangement, scenes, side, small=kind == "digits"),
            scenes,
            recipe,
            place,
        )
        for arrangement in arrangements
    }
    rows = [
        {
            "arrangement": arrangement,
            "test": test,
            **measure(
                result.model, scenes, place, **TESTS[test], progress=f"{arrangement}, {test}"
            ),
        }
        for arrangement, result in results.items()
        for test in tests
    ]
    name = model or "a ResNet-18 of a quarter of its width"
    report(place, scenes, results, rows, first, name)


def _scenes(place: launch.Launch) -> Scenes:
    if place.data is not None:
        scenes = open_scenes(place.data)
        return scenes.first(16, 8) if place.quick else scenes
    counts = (16, 8) if place.quick else (800, 60)
    root = place.out / f"scenes-{counts[0]}-{counts[1]}-{place.seed}"
    return digits.open_or_write(root, *counts, place)


def _network(options: argparse.Namespace, name: str) -> Callable[..., ResidualNetwork]:
    """The constructor of the network with the options' strides."""
    make = networks.named(name)
    arguments: dict[str, Any] = {}
    if options.stride_in:
        arguments["stride_in"] = options.stride_in
    if options.dilate:
        dilated = ["conv4" in options.dilate, "conv5" in options.dilate]
        arguments["replace_stride_with_dilation"] = [False, *dilated]

    def build(**more: Any) -> ResidualNetwork:
        try:
            return make(**arguments, **more)
        except (ValueError, NotImplementedError, resnet_fused.ResnetFusedError) as error:
            raise ExperimentError(f"--model {name}: {error}") from error

    return build


def _classifier(place: launch.Launch, network: Callable[..., ResidualNetwork]) -> Result:
    """A classifier of single digits: what ImageNet's is to the paper's detectors."""
    images = digits.patches(64, *((64, 32) if place.quick else (3000, 500)), seed=place.seed)
    recipe = recipes.cifar(images, *((4, 16) if place.quick else (300, 48)), learning_rate=0.05)
    return train_classifier(
        "classifier", lambda: network(num_classes=images.classes), images, recipe, place
    )


def _detector(
    network: Callable[..., ResidualNetwork],
    weights: Any,
    arrangement: str,
    scenes: Scenes,
    side: int,
    small: bool,
) -> Callable[[], FasterRCNN]:
    sizes = {"positions": 32, "regions": 32, "pooled": 8, "pyramid": 64}
    return lambda: faster_rcnn(
        network(weights=weights),
        arrangement,
        len(scenes.classes),
        side,
        scenes.mean,
        scenes.std,
        **(sizes if small else {}),
    )


def report(
    place: launch.Launch,
    scenes: Scenes,
    results: dict[str, Result],
    rows: Sequence[dict[str, Any]],
    first: Sequence[Result],
    model: str,
) -> None:
    pages = Report(
        place,
        "Detection",
        f"Faster R-CNN on {model} with frozen batch norm (He et al., appendix A): c4 pools regions "
        "before conv5, which is the head; fpn is a feature pyramid. Tests are appendix B's: box "
        "refinement with voting, and five scales with maxout over two. Average precision in "
        "percent: AP50 and AP (mean over IoU 0.5 to 0.95) as for COCO, VOC AP50 as for VOC "
        f"{'2007 (11 points)' if scenes.eleven_points else '2012'}.",
    )
    if first:
        pages.text(
            "The backbone begins as a classifier of single digits on backgrounds, with a test "
            f"error of {first[0].last['test_error']:.2f} %."
        )
    pages.table("results", rows)

    def draw(panels: list[Any]) -> None:
        for arrangement, result in results.items():
            panels[0].plot(*measured(result.history, "training_loss"), label=arrangement)
            panels[1].plot(*measured(result.history, "AP50"), "o-", label=arrangement)
        for axes, name in zip(panels, ("training loss", "AP50 on test images (%)"), strict=True):
            axes.set(xlabel="iteration", ylabel=name, ylim=(0, None))
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)

    pages.plot("curves", f"Training on {scenes.name}.", draw, panels=2)
    arrangement, result = next(iter(results.items()))
    pages.plot(
        "examples",
        f"The first test images with {arrangement}'s objects of score 0.5 and more, single scale.",
        lambda panels: _draw_examples(panels, result.model, scenes, place),
        panels=_EXAMPLES,
    )
    pages.save(scenes, [*first, *results.values()])


_EXAMPLES = 4


def _draw_examples(panels: list[Any], model: Any, scenes: Scenes, place: launch.Launch) -> None:
    from matplotlib.patches import Rectangle

    for axes, scene in zip(panels, scenes.test, strict=False):
        image = read(scene)
        axes.imshow(image.movedim(0, -1).numpy())
        axes.set_axis_off()
        found = detect(model, image.to(place.device))
        sure = found["scores"] >= 0.5
        boxes, scores, labels = (found[k][sure].tolist() for k in ("boxes", "scores", "labels"))
        for box, score, label in zip(boxes, scores, labels, strict=True):
            left, top, right, bottom = box
            size = right - left, bottom - top
            axes.add_patch(Rectangle((left, top), *size, fill=False, edgecolor="lime"))
            name = f"{scenes.classes[label - 1]} {score:.2f}"
            axes.text(left, top, name, color="black", backgroundcolor="lime", fontsize=6)


def main(arguments: list[str]) -> int:
    return launch.run(experiment, parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
