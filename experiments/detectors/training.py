"""Trains a detector, and measures it; resumable and shared among processes like classifiers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from common.checkpoint import Checkpoint
from common.data import open_image
from common.errors import ExperimentError
from common.launch import Launch, seed_of, total
from common.schedules import Milestones
from common.training import Result, Row, autocast, batches
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.models.detection import FasterRCNN
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from .inference import detect
from .metric import coco_precision, voc_precision
from .scenes import Scene, Scenes

_Target = dict[str, Tensor]
# Pairs of an image, float (3, H, W) from 0 to 1, and its target, by (epoch, index).
Views = Dataset[tuple[Tensor, _Target]]
Measure = Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum; the rate divided by 10 after 3/4 (240k of 320k) of the iterations.

    batch: images in each iteration, of all processes together.
    record_every, evaluate_every: iterations between two rows of the history, and between two
        measurements on the test set.
    """

    iterations: int
    batch: int
    learning_rate: float
    record_every: int
    evaluate_every: int
    momentum: float = 0.9
    weight_decay: float = 1e-4


@dataclass
class _Progress:
    iteration: int = 0
    seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)  # sums since the last row
    summed: int = 0
    history: list[Row] = field(default_factory=list)


class MirroredViews(Dataset[tuple[Tensor, _Target]]):
    """Images from 0 to 1 and targets by (epoch, index), mirrored at random where that is right."""

    def __init__(self, scenes: Scenes, seed: int) -> None:
        self.scenes, self.seed = scenes, seed

    def __len__(self) -> int:
        return len(self.scenes.train)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, _Target]:
        scene = self.scenes.train[key[1]]
        image, target = read(scene), scene.target()
        if self.scenes.mirrors and seed_of(self.seed, "mirror", *key) % 2:
            image, boxes = image.flip(-1), target["boxes"]
            sides = image.shape[-1] - boxes[:, [2, 0]]
            target["boxes"] = torch.stack([sides[:, 0], boxes[:, 1], sides[:, 1], boxes[:, 3]], 1)
        return image, target


def read(scene: Scene) -> Tensor:
    """The image, float (3, H, W) from 0 to 1; raises DataError where it is no whole image."""
    return transforms.to_dtype(
        transforms.pil_to_tensor(open_image(str(scene.image))), torch.float32, scale=True
    )


def train(
    name: str,
    build: Callable[[], nn.Module],
    scenes: Scenes,
    recipe: Recipe,
    launch: Launch,
    views: Views | None = None,
    measured: Measure | None = None,
) -> Result:
    """Trains what `build` makes, or goes on from its checkpoint `launch.out`/checkpoints/`name`.pt.

    build: makes a network that gives losses for lists of images and targets, as torchvision's
        detectors do.
    views: what it sees of `scenes.train`; images and their mirror images without.
    measured: numbers of the network on the test set; average precision without.

    Raises ExperimentError for a checkpoint that is of another run or cannot be read, a batch that
    does not divide among the processes, and a loss that is no longer finite.
    """
    views = MirroredViews(scenes, launch.seed) if views is None else views
    measured = partial(measure, scenes=scenes, launch=launch) if measured is None else measured
    return _Training(name, build, scenes.description, recipe, launch, views, measured).run()


class _Training:
    def __init__(
        self,
        name: str,
        build: Callable[[], nn.Module],
        data: str,
        recipe: Recipe,
        launch: Launch,
        views: Views,
        measured: Measure,
    ) -> None:
        self.name, self.recipe, self.launch = name, recipe, launch
        self.views, self.measured = views, measured
        torch.manual_seed(seed_of(launch.seed, "weights"))
        self.model = build().to(launch.device).to(memory_format=torch.channels_last)
        self.parallel: nn.Module = self.model
        self.optimizer = torch.optim.SGD(
            [p for p in self.model.parameters() if p.requires_grad],
            recipe.learning_rate,
            recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self.schedule = Milestones(self.optimizer, [recipe.iterations * 3 // 4])
        self.scaler = torch.amp.GradScaler(
            launch.device.type, enabled=launch.dtype == torch.float16
        )
        self.checkpoint = Checkpoint(
            launch.out / "checkpoints" / f"{name}.pt",
            {
                "model": self.model,
                "optimizer": self.optimizer,
                "schedule": self.schedule,
                "scaler": self.scaler,
            },
            {
                "name": name,
                "seed": launch.seed,
                "data": data,
                "dtype": str(launch.dtype),
                "parameters": sum(p.numel() for p in self.model.parameters()),
                **asdict(recipe),
            },
        )
        self.progress = _Progress(**(self.checkpoint.load() or {}))

    def run(self) -> Result:
        state, recipe = self.progress, self.recipe
        if state.iteration < recipe.iterations:
            if self.launch.world > 1:
                self.parallel = DistributedDataParallel(self.model, broadcast_buffers=False)
            started = saved = time.monotonic()
            before = state.seconds
            self.model.train()
            for images, targets in self._batches():
                self._step(images, targets)
                now = time.monotonic()
                state.seconds = before + now - started
                last = state.iteration == recipe.iterations
                if last or now - saved >= self.launch.checkpoint_seconds:
                    if self.launch.leads:
                        self.checkpoint.save(vars(state))
                    saved = now
        return Result(self.name, self.model.eval(), state.history, state.seconds)

    def _batches(self) -> Iterator[tuple[list[Tensor], list[_Target]]]:
        launch, device = self.launch, self.launch.device
        recipe, done = self.recipe, self.progress.iteration
        bar = batches(
            *(self.name, self.views, recipe.batch, done, recipe.iterations),
            *(launch, launch.seed, _apart),
        )
        for images, targets in bar:
            yield (
                [image.to(device) for image in images],
                [{key: value.to(device) for key, value in t.items()} for t in targets],
            )
            if history := self.progress.history:
                bar.set_postfix(loss=f"{history[-1]['training_loss']:.3f}", refresh=False)

    def _step(self, images: list[Tensor], targets: list[_Target]) -> None:
        recipe, state = self.recipe, self.progress
        state.iteration += 1
        # Which regions train is drawn at random: a function of the iteration.
        torch.manual_seed(seed_of(self.launch.seed, "step", state.iteration, self.launch.rank))
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.launch):
            losses: dict[str, Tensor] = self.parallel(images, targets)
        self.scaler.scale(torch.stack(list(losses.values())).sum()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Over all processes, so that the first one's checkpoint holds everything.
        means = total(torch.stack(list(losses.values())).detach().double()) / self.launch.world
        for key, loss in zip(losses, means.tolist(), strict=True):
            if not math.isfinite(loss):
                raise ExperimentError(
                    f"{self.name}: {key} at iteration {state.iteration} is {loss}; a lower "
                    "--learning-rate, or --dtype float32, may keep it finite."
                )
            state.losses[key] = state.losses.get(key, 0.0) + loss
        state.summed += 1
        every = {recipe.record_every, recipe.evaluate_every}
        ends = state.iteration in (1, recipe.iterations)
        if ends or any(state.iteration % count == 0 for count in every):
            self._record()
        self.schedule.after_iteration(None, None)

    def _record(self) -> None:
        recipe, state = self.recipe, self.progress
        means = {key: loss / state.summed for key, loss in state.losses.items()}
        row: Row = {
            "iteration": state.iteration,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "training_loss": sum(means.values()),
            **means,
        }
        state.losses, state.summed = {}, 0
        if state.iteration % recipe.evaluate_every == 0 or state.iteration == recipe.iterations:
            row.update(self.measured(self.model))
            self.model.train()
        state.history.append(row)


def _apart(views: list[tuple[Tensor, _Target]]) -> tuple[list[Tensor], list[_Target]]:
    """Images have sizes of their own, so they are no one tensor."""
    return [image for image, _ in views], [target for _, target in views]


def measure(
    model: FasterRCNN,
    scenes: Scenes,
    launch: Launch,
    scales: Sequence[float] = (1.0,),
    refine: bool = False,
    progress: str = "",
) -> dict[str, float]:
    """Average precision on the test images, in percent: "AP50" and "AP", COCO's, and for VOC's
    format "VOC AP50". Scales and refinement are those of `detect`; `progress` names a bar."""
    model.eval()
    count = len(scenes.test)
    mine = tqdm(
        range(launch.rank, count, launch.world),
        desc=progress,
        disable=not (progress and launch.leads),
    )
    found = {}
    for index in mine:
        image = read(scenes.test[index]).to(launch.device)
        with autocast(launch):
            objects = detect(model, image, scales, refine)
        found[index] = {key: value.cpu() for key, value in objects.items()}
    if launch.world > 1:
        parts: list[Any] = [None] * launch.world
        dist.all_gather_object(parts, found)
        found = {index: objects for part in parts for index, objects in part.items()}
    detections = [found[index] for index in range(count)]
    precision = coco_precision(scenes.test, detections)
    if scenes.kind == "voc":
        by_class = torch.tensor(
            voc_precision(scenes.test, detections, len(scenes.classes), scenes.eleven_points)
        )
        precision["VOC AP50"] = float(by_class.nanmean())
    return precision
