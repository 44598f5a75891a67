"""The training loop: one network, one recipe, one checkpoint.

Everything that is drawn at random follows from the seed and the number of the iteration, so a run
that was killed and started again ends with the same bits as one that was not, and processes that
share a batch see the images that one process would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2
from tqdm import tqdm

from .augmentation import Transform
from .checkpoint import Checkpoint
from .data import Images, Pairs, TrainingBatches, Transformed, size
from .errors import DivergedError, ExperimentError
from .launch import Launch, seed_of, share, synchronise_batch_norm, total
from .schedules import Schedule

# A row of the history: iteration, learning_rate, training_loss, training_error, and where they
# were measured test_loss, test_error, test_top5_error and what a probe added. Errors in percent.
Row = dict[str, float]
Probe = Callable[[nn.Module, int], dict[str, float]]


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with momentum, and what comes with it.

    iterations: optimizer steps. batch: images in each, of all processes together.
    schedule: makes the learning rate's schedule for an optimizer.
    augment, view: transforms of a training and a test image.
    record_every, evaluate_every: iterations between two rows of the history, and between two
        measurements on the test set.
    average: decay of an exponential moving average of the weights, which is then what is tested.
    mixup: alpha of the Beta distribution that mixes pairs of images (arXiv 1710.09412).
    """

    iterations: int
    batch: int
    schedule: Callable[[torch.optim.Optimizer], Schedule]
    augment: Transform
    view: Transform
    record_every: int
    evaluate_every: int
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    average: float | None = None
    mixup: float = 0.0

    def facts(self) -> dict[str, int | float | None]:
        """What of it is a number: a checkpoint of other numbers is not gone on from."""
        found = vars(self)
        return {key: value for key, value in found.items() if not callable(value)}


@dataclass
class Result:
    """A finished training: the network that was tested, its history, and how long it took."""

    name: str
    model: nn.Module
    history: list[Row]
    seconds: float

    @property
    def last(self) -> Row:
        """The last row, in which everything was measured."""
        return self.history[-1]

    @property
    def training_error(self) -> float:
        """The mean over the last tenth of the iterations: a single row's is of a few batches."""
        return self.training_error_before(1.0)

    def training_error_before(self, part: float) -> float:
        """The mean over the tenth of the iterations that ends at `part` of them; where no row
        falls into it, as in very short runs, the last row's before."""
        count = self.last["iteration"]
        before = [row for row in self.history if row["iteration"] <= part * count]
        rows = [row for row in before if row["iteration"] > (part - 0.1) * count] or before[-1:]
        return sum(row["training_error"] for row in rows) / len(rows)


@dataclass
class _Progress:
    """What a run has come to: with the states of model and optimizer, all that it goes on from."""

    iteration: int = 0
    seconds: float = 0.0
    window: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    history: list[Row] = field(default_factory=list)


def train(
    name: str,
    build: Callable[[], nn.Module],
    images: Images,
    recipe: Recipe,
    launch: Launch,
    seed: int | None = None,
    probe: Probe | None = None,
) -> Result:
    """Trains what `build` makes, or goes on from its checkpoint `launch.out`/checkpoints/`name`.pt.

    build: called with torch's generator seeded; parameters that need no gradient stay as they are.
    seed: instead of the launch's.
    probe: called with the network and the iteration when its gradients of a recorded iteration
        are complete; its numbers join the row.

    Raises ExperimentError for a checkpoint that is of another run or cannot be read, a batch that
    does not divide among the processes; DivergedError for a loss that is no longer finite.
    """
    seed = launch.seed if seed is None else seed
    return _Training(name, build, images, recipe, launch, seed, probe).run()


def batches(
    name: str,
    dataset: Dataset[Any],
    batch: int,
    done: int,
    iterations: int,
    launch: Launch,
    seed: int,
    collate: Callable[[list[Any]], Any] | None = None,
) -> tqdm[Any]:
    """This process's share of the batches after the first `done`, behind a progress bar."""
    share(batch, launch)
    order = TrainingBatches(size(dataset), batch, done, iterations, seed, launch.rank, launch.world)
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=launch.workers,
        pin_memory=launch.device.type == "cuda",
    )
    return tqdm(loader, desc=name, initial=done, total=iterations, disable=not launch.leads)


class _Training:
    def __init__(
        self,
        name: str,
        build: Callable[[], nn.Module],
        images: Images,
        recipe: Recipe,
        launch: Launch,
        seed: int,
        probe: Probe | None,
    ) -> None:
        self.name, self.images, self.recipe = name, images, recipe
        self.launch, self.seed, self.probe = launch, seed, probe
        torch.manual_seed(seed_of(seed, "weights"))
        model = build().to(launch.device).to(memory_format=torch.channels_last)
        self.model = self.parallel = synchronise_batch_norm(model, launch).train()
        self.average: AveragedModel | None = None
        if recipe.average is not None:
            decay = get_ema_multi_avg_fn(recipe.average)
            self.average = AveragedModel(self.model, multi_avg_fn=decay, use_buffers=True)
        self.optimizer = torch.optim.SGD(
            [p for p in self.model.parameters() if p.requires_grad],
            recipe.learning_rate,
            recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self.schedule = recipe.schedule(self.optimizer)
        self.scaler = torch.amp.GradScaler(
            launch.device.type, enabled=launch.dtype == torch.float16
        )
        parts = {
            "model": self.model,
            "average": self.average,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
        }
        facts = {
            "name": name,
            "seed": seed,
            "data": images.description,
            "dtype": str(launch.dtype),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **recipe.facts(),
        }
        self.checkpoint = Checkpoint(
            launch.out / "checkpoints" / f"{name}.pt",
            {key: part for key, part in parts.items() if part is not None},
            facts,
        )
        self.progress = _Progress(**(self.checkpoint.load() or {}))
        self.window = torch.tensor(self.progress.window, dtype=torch.float64, device=launch.device)

    def run(self) -> Result:
        state = self.progress
        if state.iteration < self.recipe.iterations:
            if self.launch.world > 1:
                self.parallel = DistributedDataParallel(self.model)
            started = saved = time.monotonic()
            before = state.seconds
            for image, label in self._batches():
                self._step(image, label)
                now = time.monotonic()
                state.seconds = before + now - started
                last = state.iteration == self.recipe.iterations
                if last or now - saved >= self.launch.checkpoint_seconds:
                    state.window = self.window.tolist()
                    if self.launch.leads:
                        self.checkpoint.save(vars(state))
                    saved = now
        tested = self.model if self.average is None else self.average.module
        return Result(self.name, tested.eval(), state.history, state.seconds)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        images = Transformed(self.images.train, self.recipe.augment, self.seed)
        recipe, done = self.recipe, self.progress.iteration
        bar = batches(
            self.name, images, recipe.batch, done, recipe.iterations, self.launch, self.seed
        )
        for image, label in bar:
            yield to_device(image, self.launch), label.to(self.launch.device)
            if history := self.progress.history:
                errors = {k: f"{v:.1f}%" for k, v in history[-1].items() if k.endswith("error")}
                bar.set_postfix(errors, refresh=False)

    def _step(self, image: Tensor, label: Tensor) -> None:
        recipe, state = self.recipe, self.progress
        state.iteration += 1
        # Whatever draws in this iteration (mixup, dropout) is a function of its number.
        torch.manual_seed(seed_of(self.seed, "step", state.iteration, self.launch.rank))
        target = label
        if recipe.mixup:
            mix = v2.MixUp(alpha=recipe.mixup, num_classes=self.images.classes)
            image, target = mix(image, label)
            image = image.contiguous(memory_format=torch.channels_last)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.launch):
            logits = self.parallel(image)
        loss = F.cross_entropy(logits.float(), target, label_smoothing=recipe.label_smoothing)
        self.scaler.scale(loss).backward()
        recorded = (
            state.iteration in (1, recipe.iterations)
            or state.iteration % recipe.record_every == 0
            or state.iteration % recipe.evaluate_every == 0
        )
        row: Row = {
            "iteration": state.iteration,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        if recorded and self.probe is not None:
            self.scaler.unscale_(self.optimizer)
            row.update(self.probe(self.model, state.iteration))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        wrong = (logits.detach().argmax(1) != label).sum()
        seen = torch.tensor(float(len(label)), device=label.device)
        sums = torch.stack([loss.detach().double() * seen, wrong.double(), seen.double()])
        # Over all processes, so that the first one's checkpoint holds everything.
        self.window += total(sums)
        if recorded:
            self._record(row)
        # The first row is of one batch, by whose error nothing is decided.
        training_error = row.get("training_error") if state.iteration > 1 else None
        self.schedule.after_iteration(training_error, row.get("test_error"))

    def _record(self, row: Row) -> None:
        recipe, state = self.recipe, self.progress
        loss, wrong, seen = self.window.tolist()
        self.window.zero_()
        row["training_loss"], row["training_error"] = loss / seen, 100 * wrong / seen
        if not torch.isfinite(torch.tensor(loss)):
            raise DivergedError(
                f"{self.name}: the loss at iteration {state.iteration} is {loss / seen}; a lower "
                "learning rate, or --dtype float32, may keep it finite.",
                state.history,
            )
        if state.iteration % recipe.evaluate_every == 0 or state.iteration == recipe.iterations:
            tested = self.model if self.average is None else self.average.module
            row.update(evaluate(tested, self.images.test, recipe.view, self.launch))
            self.model.train()
        state.history.append(row)


def to_device(image: Tensor, launch: Launch) -> Tensor:
    """A batch of images where and as the network wants it."""
    return image.to(launch.device, memory_format=torch.channels_last, non_blocking=True)


def autocast(launch: Launch) -> torch.autocast:
    """Autocast to the launch's dtype."""
    enabled = launch.dtype != torch.float32
    return torch.autocast(launch.device.type, launch.dtype, enabled=enabled)


@torch.inference_mode()
def evaluate(
    model: nn.Module, pairs: Pairs, view: Transform, launch: Launch, batch: int = 256
) -> dict[str, float]:
    """test_loss, and test_error and test_top5_error in percent; in eval mode, on all processes."""
    model.eval()
    mine = Subset(pairs, range(launch.rank, size(pairs), launch.world))
    keyed = Transformed(mine, view, launch.seed)
    loader = DataLoader(
        keyed,
        batch_sampler=[
            [(0, index) for index in range(first, min(first + batch, len(mine)))]
            for first in range(0, len(mine), batch)
        ],
        num_workers=launch.workers,
    )
    sums = torch.zeros(4, dtype=torch.float64, device=launch.device)
    for image, label_ in loader:
        label = label_.to(launch.device)
        with autocast(launch):
            logits = model(to_device(image, launch)).float()
        best = logits.topk(min(5, logits.shape[1])).indices == label[:, None]
        loss = F.cross_entropy(logits, label, reduction="sum")
        hits = [best[:, 0].sum().double(), best.any(1).sum().double()]
        sums += torch.stack([loss.double(), *hits, torch.tensor(len(label), device=label.device)])
    loss_sum, top1, top5, count = total(sums).tolist()
    if not count:
        raise ExperimentError("there are no images to test.")
    return {
        "test_loss": loss_sum / count,
        "test_error": 100 * (1 - top1 / count),
        "test_top5_error": 100 * (1 - top5 / count),
    }
