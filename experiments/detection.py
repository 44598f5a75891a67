"""Detection: Faster R-CNN on ResNets with frozen batch norm (appendix A and B, Tables 7 to 11).

    python experiments/detection.py                    # digits on backgrounds, minutes on two cores
    python experiments/detection.py --data VOC                          # Table 7
    torchrun --nproc-per-node 8 experiments/detection.py --data COCO    # Table 8 and 9

VOC is the folder that holds VOCdevkit/, COCO the one that holds annotations/, train2017/ and so
on. Proposals and regions train together, where the paper alternates.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from common import launch, networks
from common.claims import Claim, Finding, Rows, spread
from common.errors import ExperimentError
from common.report import Report, measured
from common.training import Result
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

# Rules, written before the run that they judge.
_LEARNED = {"digits": 75.0, "voc": 75.0, "coco": 47.0}  # AP50; the paper's are 76.4 and 48.4
_LEAST_RISE = 0.5  # points


def parse(arguments: list[str]) -> argparse.Namespace:
    options = launch.parser(__doc__, "detection")
    options.add_argument("--model", help="a network of resnet_fused: resnet101, for example")
    options.add_argument(
        "--weights", help="what it begins with: a file, or a name of torchvision's"
    )
    options.add_argument("--arrangement", nargs="+", choices=ARRANGEMENTS)
    options.add_argument("--runs", type=int, help="seeds")
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
        *("model", "weights", "side", "arrangement", "tests", "runs"),
        *("iterations", "batch", "learning_rate"),
    )
    model, weights, side, arrangements, tests, runs, iterations, batch, rate = launch.choose(
        options,
        kind,
        names,
        digits=(None, None, 128, ["c4", "c4+context", "fpn"], TESTS, 2, 600, 2, 0.01),
        voc=("resnet101", "DEFAULT", 600, ["c4"], TESTS, 1, 80_000, 2, 0.001),
        coco=("resnet101", "DEFAULT", 600, ["c4", "c4+context"], TESTS, 1, 320_000, 8, 0.001),
        quick=(None, None, 64, ["c4"], ["single scale", "both"], 1, 4, 2, 0.01),
    )
    first: list[Result] = []
    network = digits.network if model is None else _network(options, model)
    if weights is None and place.data is None:
        first.append(digits.classifier(place, network))
        weights = first[0].model.state_dict()
    recipe = Recipe(
        iterations,
        batch,
        rate,
        record_every=max(1, iterations // 50),
        evaluate_every=max(1, iterations // 4),
    )
    results: dict[str, Result] = {}
    rows: list[dict[str, Any]] = []
    for seed in range(place.seed, place.seed + runs):
        for arrangement in arrangements:
            name = f"{arrangement}-seed{seed}"
            build = _detector(network, weights, arrangement, scenes, side, small=kind == "digits")
            result = train(name, build, scenes, recipe, replace(place, seed=seed))
            results[name] = result
            facts = {"data": kind, "arrangement": arrangement, "seed": seed}
            rows += [
                {
                    **{**facts, "test": test},
                    **measure(
                        result.model, scenes, place, **TESTS[test], progress=f"{name}, {test}"
                    ),
                }
                for test in tests
            ]
    report(place, scenes, results, rows, first, model or "a ResNet-18 of a quarter of its width")


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


def _detector(
    network: Callable[..., ResidualNetwork],
    weights: Any,
    arrangement: str,
    scenes: Scenes,
    side: int,
    small: bool,
) -> Callable[[], FasterRCNN]:
    sizes = {"positions": 32, "regions": 64, "candidates": 200, "proposals": 50, "pooled": 8}
    sizes["pyramid"] = 64
    return lambda: faster_rcnn(
        network(weights=weights),
        arrangement,
        len(scenes.classes),
        side,
        scenes.mean,
        scenes.std,
        **(sizes if small else {}),
    )


def _found(rows: Rows, arrangement: str, test: str, name: str) -> list[float]:
    """The numbers of all seeds, none where that was not run."""
    chosen = [row for row in rows if (row["arrangement"], row["test"]) == (arrangement, test)]
    return [float(row[name]) for row in chosen]


def _learns(rows: Rows) -> Finding:
    single = {kind: _found(rows, kind, "single scale", "AP50") for kind in ("c4", "fpn")}
    single = {kind: values for kind, values in single.items() if values}
    if not single:
        return Finding("no detector was tested at a single scale.", None)
    means = {kind: statistics.mean(values) for kind, values in single.items()}
    text = ", ".join(f"{kind} {mean:.1f} %" for kind, mean in means.items())
    margin = min(means.values()) - _LEARNED[str(rows[0]["data"])]
    return Finding(f"AP50 {text}.", margin, spread(*single.values()))


def _test_helps(test: str) -> Callable[[Rows], Finding]:
    return lambda rows: _rises(rows, ("c4", "single scale"), ("c4", test), "AP")


def _context_helps(rows: Rows) -> Finding:
    found = _rises(rows, ("c4", "single scale"), ("c4+context", "single scale"), "AP50")
    if rows[0]["data"] != "digits":
        return found
    text = (
        f"{found.text} It cannot be seen on these scenes: their digits and backgrounds are drawn "
        "independently, so that nothing outside a region tells what it holds."
    )
    return Finding(text, None, found.spread)


def _rises(rows: Rows, without: tuple[str, str], with_: tuple[str, str], judged: str) -> Finding:
    """Whether column `judged` rises between two (arrangement, test), and for what margin."""
    if not all(_found(rows, *which, judged) for which in (without, with_)):
        return Finding(
            f"{' or '.join(', '.join(which) for which in (without, with_))} was not run.", None
        )
    numbers = []
    for name in ("AP", "AP50"):
        old, new = (statistics.mean(_found(rows, *which, name)) for which in (without, with_))
        numbers.append(f"{name} {old:.1f} to {new:.1f} %")
    before, after = (_found(rows, *which, judged) for which in (without, with_))
    rises = [b - a for a, b in zip(before, after, strict=True)]
    deviation = spread(rises)
    margin = statistics.mean(rises) - max(_LEAST_RISE, deviation or 0.0)
    return Finding(f"{', '.join(numbers)}.", margin, deviation)


def _rise(name: str) -> str:
    return (
        f"the mean {name} of c4, the paper's arrangement, rises by at least {_LEAST_RISE:g} points "
        "and by the standard deviation of that rise over seeds."
    )


CLAIMS = (
    Claim(
        "Detectors learn",
        "A, Table 7 and 8",
        "AP50 of 76.4 % on VOC 2007 and 48.4 % on COCO with ResNet-101.",
        "the mean AP50 at a single scale of c4, and of the pyramid where it was trained, is at "
        f"least {_LEARNED['digits']:g} % on digits, {_LEARNED['voc']:g} % on VOC and "
        f"{_LEARNED['coco']:g} % on COCO.",
        _learns,
    ),
    Claim(
        "Box refinement helps",
        "B, Table 9",
        "on COCO AP rises from 27.2 to 29.9 %, AP50 from 48.4 to 49.9 %.",
        _rise("AP"),
        _test_helps("box refinement"),
    ),
    Claim(
        "Global context helps",
        "B, Table 9",
        "on COCO, after box refinement, AP rises from 29.9 to 30.0 %, AP50 from 49.9 to 51.1 %.",
        f"at a single scale {_rise('AP50')} On digits, which are independent of one another, it "
        "is not judged.",
        _context_helps,
    ),
    Claim(
        "Multi-scale testing helps",
        "B, Table 9",
        "on COCO, after both of these, AP rises from 30.0 to 32.5 %, AP50 from 51.1 to 53.8 %.",
        _rise("AP"),
        _test_helps("multi-scale"),
    ),
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
        "before conv5, which is the head; fpn is a feature pyramid; context joins the features of "
        "the whole image to each region's. Tests are appendix B's: box refinement with voting, and "
        "five scales with maxout over two. Average precision in "
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
        for name, result in results.items():
            panels[0].plot(*measured(result.history, "training_loss"), label=name)
            panels[1].plot(*measured(result.history, "AP50"), "o-", label=name)
        for axes, what in zip(panels, ("training loss", "AP50 on test images (%)"), strict=True):
            axes.set(xlabel="iteration", ylabel=what, ylim=(0, None))
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)

    pages.plot("curves", f"Training on {scenes.name}.", draw, panels=2)
    name, result = next(iter(results.items()))
    pages.plot(
        "examples",
        f"The first test images with {name}'s objects of score 0.5 and more, single scale.",
        lambda panels: _draw_examples(panels, result.model, scenes, place),
        panels=_EXAMPLES,
    )
    pages.claims(CLAIMS, results=rows)
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
