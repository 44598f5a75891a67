"""One training step of a ResNet (forward, loss, backward, SGD with momentum), ours and peers.

    python benchmarks/training.py --model resnet50 --batch 64 128 256 --json out.json --plot out.png

Gate first: 20 steps from one seed in float32 on small images, logits, running statistics, gradients
and losses beside eager PyTorch's and a float64 run's (`gate`). Nothing is timed on a red gate. Then
for each network and batch all implementations are built and warmed, and train on random images in
turns, round after round. On a GPU they share a process, on a CPU each round of each has its own,
because there PyTorch's step differs from one process to another. Times are read from CUDA events,
memory from the allocator, kept bytes from saved-tensor hooks. `--dtype` is autocast's; float32
means none.

Each is timed for the first time as soon as it is warm, ours first, what compiles for minutes last,
and the result file is written after each measurement: a run that is stopped keeps what it has. Of
ours, the result file has every kernel's time and share of a step, beside its floor
(`training_profile.py`).
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import itertools
import math
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
import training_profile
from baselines import UnavailableError
from baselines import training as baselines
from harness import measure, results
from harness.measure import Peaks, floor_seconds, in_turn
from harness.workers import FailedError, Worker
from torch import Tensor, nn
from tqdm import tqdm

import resnet_fused
from resnet_fused import complexity, settings
from resnet_fused.numerics import relative_error

GATE_STEPS, GATE_PASSES, GATE_NUDGES = 20, 1, 7
GATE_CHANCE = 0.005  # of a red gate where ours and eager's losses, or gradients, are alike
GATE_SHIFT = 2.5  # deviations by which ReLU inputs are moved where gradients are compared


@dataclass
class Row:
    """One implementation at one batch size. Times in seconds, memory in bytes.

    rounds: the median step of each; step: the median of these.
    """

    model: str
    batch: int
    name: str
    step: float | None = None
    images_per_second: float | None = None
    peak_memory: int | None = None
    kept_bytes: int | None = None
    floor_share: float | None = None
    speedup_over: float | None = None
    failure: str | None = None
    rounds: list[float] = field(default_factory=list)
    kernels: list[dict[str, Any]] | None = None  # of ours; see training_profile.py


def training_step(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    dtype: torch.dtype | None,
    lr: float = 0.05,
    graph: bool = False,
) -> Callable[[], Tensor]:
    """A call that trains `model` for one step and returns the loss; autocast to `dtype`.

    `graph`: as one CUDA graph.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, fused=x.is_cuda and dtype is not None
    )
    if graph:
        whole = resnet_fused.graphed_step(
            model, F.cross_entropy, optimizer, x, target, autocast=dtype
        )
        return lambda: whole(x, target)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        enabled = dtype is not None
        with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def nudge(model: nn.Module, seed: int) -> nn.Module:
    """Moves each parameter by one unit in the last place, up or down at random."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            up = (torch.rand(parameter.shape, generator=rng) < 0.5).to(parameter.device)
            parameter.copy_(torch.nextafter(parameter, torch.where(up, torch.inf, -torch.inf)))
    return model


def shift_biases(model: nn.Module) -> nn.Module:
    """Moves what normalisations give up, by GATE_SHIFT of its deviations."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # On to what float32 holds, which all are to start from.
                module.bias.copy_((module.bias + GATE_SHIFT * module.weight.abs()).float())
    return model


def _pass(model: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits, and the gradients of all parameters."""
    out = model(x)
    loss = F.cross_entropy(out, target)
    return out.detach(), torch.autograd.grad(loss, list(model.parameters()))


@functools.cache
def _larger_pairs(n: int) -> list[int]:
    """In how many orders of n numbers of ours and n of eager's how many of the n² pairs have the
    larger one in ours; a Gaussian binomial coefficient, by its powers."""
    ways = [1] + [0] * n * n
    for i in range(1, n + 1):
        for pairs in range(n * n, n + i - 1, -1):
            ways[pairs] -= ways[pairs - n - i]
        for pairs in range(i, n * n + 1):
            ways[pairs] += ways[pairs - i]
    return ways


def chance(ours: list[float], eager: list[float]) -> float:
    """How often as many pairs as here would have the larger number in `ours`, if both lists, which
    are of one length, were drawn alike: the exact test of Mann and Whitney (1947)."""
    ways = _larger_pairs(len(ours))
    found = sum(a > b for a, b in itertools.product(ours, eager))
    return sum(ways[found:]) / sum(ways)


def _distance(gradient: Tensor, right: Tensor) -> float:
    """The relative error; none of what is nothing but rounding, because normalisation takes out
    what the parameter does."""
    return relative_error(gradient, right) if right.norm() > 1e-9 else 0.0


def gate(name: str, device: torch.device) -> dict[str, Any]:
    """Errors of float32 training steps, ours and eager's, against float64.

    Logits, running statistics and gradients are compared on the float64 run's weights at each of
    20 steps. All are channels_last, because PyTorch's convolutions round differently in the other
    layout. Where rounding decides the sign of a ReLU's input, which in a ResNet-50 of float32
    happens in most passes, gradients are off by a thousand times the usual from there on, ours or
    eager's, and hide all else. So these passes move every normalisation's bias up by GATE_SHIFT of
    a normalised input's deviations: one ReLU input of 160 is then negative, and 23 times fewer are
    near zero. Logits and statistics, over all passes, may be no further off than eager's (1.1:
    noise). Each parameter's gradient has an error of ours and one of eager's in each pass, so that
    a layer does not hide behind another one, nor a fault behind the few passes that a sign decides.
    The gate is red where ours are larger (by 1.1) in more pairs of passes than chance gives any
    parameter, of all that there are, except in one of 1 / GATE_CHANCE gates.

    The losses are those of whole runs, in which training amplifies rounding: how far it carries a
    run is chance. So ours and eager's each run from the same weights as the float64 run, and from
    weights moved by one unit in the last place, the same for both. The gate is red where ours end
    further (by 1.1) from float64's losses than eager's in more pairs of runs, by the same rule.
    """
    torch.manual_seed(0)
    eager = baselines.network(torchvision.models, name, num_classes=10)
    eager = baselines.channels_last(eager).to(device).train()
    ours = baselines.network(resnet_fused, name, num_classes=10).to(device).train()
    ours.load_state_dict(eager.state_dict())
    truth = copy.deepcopy(eager).double()

    def images(count: int, size: int) -> Tensor:
        x = torch.randn(count, 3, size, size, device=device)
        return x.contiguous(memory_format=torch.channels_last)

    def losses_of(model: nn.Module) -> list[float]:
        step = training_step(model, x, target, None, lr=1e-3)
        return [float(step()) for _ in range(GATE_STEPS)]

    x, target = images(8, 64), torch.arange(8, device=device)
    losses: dict[str, list[float]] = {}
    probes = {"ours": ours, "eager": eager}
    for key, model in tqdm(probes.items(), desc=f"gate {name}, losses"):
        losses[key] = losses_of(copy.deepcopy(model))
        for i in range(GATE_NUDGES):
            losses[f"{key}, nudged {i}"] = losses_of(nudge(copy.deepcopy(model), i))
    losses["truth"] = []
    step = training_step(truth, x.double(), target, None, lr=1e-3)
    squares = {kind: dict.fromkeys(probes, 0.0) for kind in ("logits", "statistics")}
    gradients: dict[str, list[list[float]]] = {key: [] for key in probes}
    for _ in tqdm(range(GATE_STEPS), desc=f"gate {name}"):
        with torch.no_grad():
            for parameter in truth.parameters():  # on to what float32 can hold
                parameter.copy_(parameter.float())
        for _ in range(GATE_PASSES):
            few, shifted = images(4, 33), shift_biases(copy.deepcopy(truth))
            for probe in probes.values():
                probe.load_state_dict(shifted.state_dict())
            right, right_gradients = _pass(shifted, few.double(), target[:4])
            right_statistics = list(shifted.buffers())
            for key, probe in probes.items():
                found, found_gradients = _pass(probe, few, target[:4])
                squares["logits"][key] += float((found - right).square().sum())
                distances = map(relative_error, probe.buffers(), right_statistics)
                squares["statistics"][key] += sum(distance**2 for distance in distances)
                gradients[key].append(list(map(_distance, found_gradients, right_gradients)))
        losses["truth"].append(float(step()))
    errors = {kind: {key: v**0.5 for key, v in total.items()} for kind, total in squares.items()}
    distances_of = {
        key: [math.dist(run, losses["truth"]) for k, run in losses.items() if k.startswith(key)]
        for key in probes
    }

    def by_chance_of(ours: Sequence[float], eager: Sequence[float]) -> float:
        return chance(list(ours), [1.1 * error for error in eager])

    of_parameters = [list(zip(*gradients[key], strict=True)) for key in ("ours", "eager")]
    each = {
        parameter: by_chance_of(*of_both)
        for (parameter, _), *of_both in zip(truth.named_parameters(), *of_parameters, strict=True)
    }
    least = min(each, key=each.__getitem__)
    by_chance = {
        "gradients": min(1.0, len(each) * each[least]),
        "losses": by_chance_of(distances_of["ours"], distances_of["eager"]),
    }
    green = min(by_chance.values()) >= GATE_CHANCE and all(
        error["ours"] <= 1.1 * error["eager"] for error in errors.values()
    )
    place = list(each).index(least)
    errors[f"gradient of {least}"] = {
        key: statistics.median(errors_of[place] for errors_of in gradients[key]) for key in probes
    }
    errors["losses"] = {key: statistics.median(runs) for key, runs in distances_of.items()}
    return {"model": name, "errors": errors, "chance": by_chance, "losses": losses, "green": green}


class Contestant:
    """A row's implementation, built and warm."""

    def __init__(
        self,
        row: Row,
        size: int,
        device: torch.device,
        dtype: torch.dtype | None,
        seconds: float,
        peaks: Peaks,
    ) -> None:
        """Fills in the row but for its times, of which it takes a first round; a round lasts about
        that many seconds. Raises whatever the library raises where it cannot run."""
        trained = baselines.ALL[row.name]
        torch.manual_seed(0)
        x = torch.randn(row.batch, 3, size, size, device=device)
        if row.name != "eager NCHW":
            x = x.contiguous(memory_format=torch.channels_last)
        target = torch.randint(0, 10, (row.batch,), device=device)
        self.row, self._device, self._within = row, device, trained.within
        with self._within():
            model = baselines.network(trained.library, row.model).to(device).train()
            with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                row.kept_bytes = resnet_fused.kept_activation_bytes(model, x).total
            self._step = training_step(
                trained.prepare(model), x, target, dtype, graph=trained.graph
            )
            for _ in range(3):
                self._step()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            first = statistics.median(measure.times_of(self._step, device, 3))
            self._iterations = max(3, round(seconds / first))
            self.time()
            if device.type == "cuda":
                row.peak_memory = torch.cuda.max_memory_allocated(device)
            if row.name in baselines.PROFILED and not row.kernels:
                row.kernels = training_profile.profile(self._step, x, peaks)

    def time(self) -> None:
        """Takes a round."""
        with self._within():
            times = measure.times_of(self._step, self._device, self._iterations)
        row = self.row
        row.rounds.append(statistics.median(times))
        row.step = statistics.median(row.rounds)
        row.images_per_second = row.batch / row.step


class Held:
    """Lives in a worker, in which a contestant takes its only round."""

    @torch.inference_mode(False)
    def take(self, row: Row, *setting: Any) -> Row:
        Contestant(row, *setting)
        return row


class Apart:
    """A contestant that is built anew for each round, in a process of its own."""

    def __init__(self, row: Row, *setting: Any) -> None:
        self.row, self._setting = row, setting
        self.time()

    def time(self) -> None:
        """Takes a round."""
        worker = Worker(Held, warm=True)
        try:
            vars(self.row).update(vars(worker.ask("take", self.row, *self._setting)))
        finally:
            worker.stop()


def contestant(
    row: Row, size: int, device: torch.device, *setting: Any
) -> Contestant | Apart | None:
    """The row's implementation; one that cannot run says why."""
    kind = Contestant if device.type == "cuda" else Apart
    try:
        return kind(row, size, device, *setting)
    except Exception as error:
        told = isinstance(error, FailedError | UnavailableError)
        reason = str(error) if told else f"{type(error).__name__}: {error}"
        row.failure = reason.splitlines()[0][:300]
        return None


def race(
    rows: list[Row],
    rounds: int,
    size: int,
    device: torch.device,
    dtype: torch.dtype | None,
    seconds: float,
    peaks: Peaks,
) -> Iterator[Row]:
    """Measures rows of one network and batch; after each measurement, its row."""
    racing: list[Contestant | Apart] = []
    for row in rows:
        found = contestant(row, size, device, dtype, seconds, peaks)
        if found is not None:
            racing.append(found)
        yield row
    for one in in_turn(racing, range(1, rounds)):
        one.time()
        yield one.row
    racing.clear()
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def step_floor(name: str, batch: int, size: int, peaks: Peaks, itemsize: int) -> float:
    """Three times the floor of a fused forward: backward has two products for each of
    the forward's, and moves each activation and its gradient."""
    with torch.device("meta"):
        model = baselines.network(torchvision.models, name).eval()
    return 3 * floor_seconds(complexity.passes(model, batch, size), peaks, itemsize)


def compare(rows: list[Row], floors: dict[tuple[str, int], float]) -> None:
    """Shares of the floor, and how much faster our best is than each baseline."""
    for row in rows:
        if row.step is None:
            continue
        if floor := floors.get((row.model, row.batch)):
            row.floor_share = floor / row.step
        ours = [
            other.step
            for other in rows
            if other.name.startswith("resnet_fused")
            and (other.model, other.batch) == (row.model, row.batch)
            and other.step is not None
        ]
        if ours:
            row.speedup_over = row.step / min(ours)


def table(rows: list[Row]) -> str:
    """The rows, for people."""
    head = "model, batch, implementation, images/s, step ms, kept MB, peak MB, floor, ours ×"

    def cell(value: float | None, scale: float, digits: int) -> str:
        return "–" if value is None else f"{value * scale:.{digits}f}"

    cells = [
        [
            *(row.model, str(row.batch), row.name, cell(row.images_per_second, 1, 0)),
            *(row.failure or cell(row.step, 1e3, 2), cell(row.kept_bytes, 1e-6, 0)),
            *(cell(row.peak_memory, 1e-6, 0), cell(row.floor_share, 100, 1) + "%"),
            cell(row.speedup_over, 1, 2),
        ]
        for row in rows
    ]
    return results.markdown([head.split(", "), *cells])


def plot(rows: list[Row], path: Path) -> None:
    """Images/s of every implementation, one group of bars for each model and batch."""
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys((row.model, row.batch) for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    figure, axes = plt.subplots(figsize=(3 + 2.5 * len(groups), 4.5), layout="constrained")
    for i, name in enumerate(names):
        rates = {(r.model, r.batch): r.images_per_second or 0 for r in rows if r.name == name}
        places = [g + 0.8 * i / len(names) for g in range(len(groups))]
        axes.bar(places, [rates.get(g, 0) for g in groups], 0.8 / len(names), label=name)
    axes.set_xticks([g + 0.35 for g in range(len(groups))], [f"{m}, batch {b}" for m, b in groups])
    axes.set_ylabel("training images/s")
    axes.legend()
    figure.savefig(path, dpi=150)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = results.parser(__doc__, "device", "size", "dtype", "json", "plot")
    parser.add_argument("--model", nargs="+", default=["resnet50"], choices=baselines.MODELS)
    parser.add_argument("--batch", nargs="+", type=results.positive, default=[64])
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round (%(default)s)")
    parser.add_argument("--rounds", type=results.positive, default=5, help="of turns (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=baselines.ALL, default=list(baselines.ALL))
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    device, dtype = options.device, getattr(torch, options.dtype)
    torch.backends.cudnn.allow_tf32 = False  # the gate is float32; autocast is not affected
    with baselines.fused(device):
        gates = [gate(name, device) for name in options.model]
    for result in gates:
        print("gate", {key: value for key, value in result.items() if key != "losses"}, flush=True)
    if not all(result["green"] for result in gates):
        print("The gate is red: nothing is timed.", file=sys.stderr)
        return 1
    torch.backends.cudnn.benchmark = True
    peaks = measure.measure_peaks(device, dtype)
    rows = [
        Row(model, batch, name)
        for model in options.model
        for batch in options.batch
        for name in options.only
    ]
    floors = {
        (row.model, row.batch): step_floor(
            row.model, row.batch, options.size, peaks, dtype.itemsize
        )
        for row in rows
    }
    record = {
        **results.facts(device, "torch", "torchvision", "triton"),
        "tuning": settings.tuning_enabled(),
        "dtype": options.dtype,
        "size": options.size,
        "peaks": peaks._asdict(),
        "gates": gates,
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    autocast = None if dtype == torch.float32 else dtype
    setting = (options.size, device, autocast, options.seconds, peaks)
    measured: list[Row] = []
    steps = len(rows) * options.rounds
    try:
        with tqdm(total=steps, unit="round", dynamic_ncols=True) as bar:
            for _, group in itertools.groupby(rows, lambda row: (row.model, row.batch)):
                for row in race(list(group), options.rounds, *setting):
                    if row not in measured:
                        measured.append(row)
                        rate = row.failure or f"{row.images_per_second:.1f} images/s"
                        bar.write(f"{row.model} {row.batch} {row.name}: {rate}")
                    bar.update(options.rounds if row.failure else 1)
                    compare(measured, floors)
                    results.write(options.json, {**record, "rows": [*map(asdict, measured)]})
    except KeyboardInterrupt:
        print(f"Stopped with {len(measured)} of {len(rows)} rows measured.", file=sys.stderr)
    finished = all(row.failure or len(row.rounds) == options.rounds for row in rows)
    print(table(measured))
    for row in measured:
        if row.kernels and row.name == "resnet_fused":
            print(f"\n{row.model}, batch {row.batch}, one step of resnet_fused:")
            print(training_profile.table(row.kernels))
    if options.plot and measured:
        plot(measured, options.plot)
    return 0 if finished else 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
