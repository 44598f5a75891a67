"""Images per second of fused ResNets beside every peer, on the same photographs, in one run.

    python benchmarks/throughput.py                        this machine's defaults
    python benchmarks/throughput.py --quick                a first impression in about a minute
    python benchmarks/throughput.py --weights DEFAULT      trained weights, prints top-5 labels
    python benchmarks/throughput.py --arch resnet18 resnet101 --batch 1 8 --json out.json
    python benchmarks/throughput.py --batch 1 8 32 --dtype bfloat16 --json out.json --plot out.png

A correctness gate comes first: logits are held against float64, and ours may not be further off
than PyTorch's own in the same dtype, else the exit code is 1 and no speed-up is stated. Then the
implementations take turns, round after round, each in a process of its own with all cores, one
running at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    import torch
    import torchvision
except ImportError as missing:
    sys.exit(f"{missing}; install the benchmark's packages: pip install '.[bench]'")

from baselines import BASELINES, Baseline, UnavailableError
from harness import inputs, results
from harness.comparison import Comparison, Entry, plot, table
from harness.measure import Peaks, floor_seconds, in_turn
from harness.workers import ANSWER_SECONDS, Built, FailedError, Job, Referee, Runner, Truth, Worker

from resnet_fused import complexity, env
from resnet_fused.numerics import relative_error
from resnet_fused.tune import ARCHITECTURES

# A peer further off than this many times PyTorch's own error did not do the work in that dtype.
_PEER_LIMIT = 10.0
_PACKAGES = (
    "resnet-fused",
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
)


def parse(arguments: Sequence[str] | None, baselines: Sequence[Baseline]) -> argparse.Namespace:
    """The command line, with defaults that suit the machine."""
    parser = results.parser(__doc__, "device", "size", "json", "plot")
    peers = [baseline.key for baseline in baselines if not baseline.ours]
    ours = [baseline.key for baseline in baselines if baseline.ours]
    parser.add_argument(
        "--arch",
        nargs="+",
        default=["resnet50"],
        choices=[name for name in ARCHITECTURES if hasattr(torchvision.models, name)],
        metavar="NAME",
        help="ResNets by torchvision's names (resnet50)",
    )
    parser.add_argument(
        "--batch", type=results.positive, nargs="+", help="batch sizes (CPU: 8; GPU: 1 32 256)"
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=results.DTYPES,
        help="CPU: float32, and bfloat16 where it has it; GPU: bfloat16",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=["all", "none", *peers],
        default=["all"],
        metavar="PEER",
        help=f"all, none, or some of: {', '.join(peers)}",
    )
    parser.add_argument(
        "--ours", nargs="+", choices=ours, metavar="NAME", help=f"only these: {', '.join(ours)}"
    )
    parser.add_argument("--images", type=Path, help="folder of photographs (scikit-image's)")
    parser.add_argument("--weights", help="torchvision's name, e.g. DEFAULT, or a file (random)")
    parser.add_argument(
        "--rounds", type=results.positive, help="rounds of turns (5; with --quick: 3)"
    )
    parser.add_argument("--quick", action="store_true", help="few short rounds, one dtype")
    parser.add_argument(
        "--new-batch", action="store_true", help="also time the start with another batch size"
    )
    parser.add_argument(
        "--warm",
        action="store_true",
        help="use the caches of kernels that are there; starts are not stated then",
    )
    parser.add_argument(
        "--rest",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="on a CPU, idle seconds before each call, as a server has them: workers have to be "
        "woken then (%(default)s)",
    )
    parser.add_argument(
        "--answer-seconds",
        type=float,
        default=ANSWER_SECONDS,
        help="give up on a baseline that takes longer to build or to time (%(default)s)",
    )
    options = parser.parse_args(arguments)
    gpu = options.device.type == "cuda"
    if gpu and options.rest:
        parser.error("--rest is for a CPU; calls on a GPU are timed in one queue")
    options.batch = options.batch or ([1, 32, 256] if gpu else [8])
    options.dtype = options.dtype or _usual_dtypes(options.device, options.quick)
    options.rounds = options.rounds or (3 if options.quick else 5)
    options.round_seconds = 0.3 if gpu else 0.6
    return options


def _usual_dtypes(device: torch.device, quick: bool) -> list[str]:
    if device.type == "cuda":
        return ["bfloat16"]
    flags = env.machine(device)["cpu_flags"]
    has_bfloat16 = any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return ["float32", "bfloat16"] if has_bfloat16 and not quick else ["float32"]


class Benchmark:
    """One run of the program: the input, and the comparisons made on it so far."""

    def __init__(
        self, options: argparse.Namespace, baselines: Sequence[Baseline], folder: Path
    ) -> None:
        self.options = options

        def wanted(baseline: Baseline) -> bool:
            if baseline.ours:
                return baseline.key in (options.ours or [baseline.key])
            return "all" in options.peers or baseline.key in options.peers

        self.baselines = [b for b in baselines if options.device.type in b.devices and wanted(b)]
        self.folder = folder
        self.comparisons: list[Comparison] = []
        self.record = results.facts(options.device, *_PACKAGES, options=options)
        self.paths = inputs.find(options.images)
        for architecture in options.arch:  # what is wrong with one shall not cost the others' time
            self._prepare(architecture)
        self.record["photographs"] = self.photographs.names

    def _prepare(self, architecture: str) -> None:
        options = self.options
        preset = torchvision.models.get_model_weights(architecture).DEFAULT.transforms()
        self.photographs = inputs.preprocess(self.paths, max(options.batch), options.size, preset)
        torch.save(self.photographs.images, self.folder / "images")
        self.state = inputs.make_state(architecture, options.weights, self.photographs.images[:8])

    def run(self) -> None:
        """Compares all implementations for each network, dtype and batch, and prints the tables."""
        for architecture in self.options.arch:
            self._prepare(architecture)
            self._run(architecture)

    def _run(self, architecture: str) -> None:
        for name in self.options.dtype:
            dtype = results.DTYPES[name]
            state = self.folder / f"state_{name}"
            values = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.state.items()}
            torch.save(values, state)
            job = Job(
                architecture,
                state,
                self.folder / "images",
                max(self.options.batch),
                dtype,
                self.options.device,
            )
            referee = Worker(Referee)
            try:
                truth = referee.ask("judge", job)
                peaks = referee.ask("peaks", job)
            finally:
                referee.stop()
            self._print_labels(architecture, truth)
            for batch in self.options.batch:
                self._compare(job._replace(batch=batch), truth, peaks, name)

    def _compare(self, job: Job, truth: Truth, peaks: Peaks, dtype: str) -> None:
        truth = Truth(truth.logits[: job.batch], [e[: job.batch] for e in truth.eager])
        with torch.device("meta"):
            model = getattr(torchvision.models, job.architecture)().eval()
        passes = complexity.passes(model, job.batch, self.options.size)
        comparison = Comparison(
            job.architecture,
            str(job.device),
            dtype,
            job.batch,
            self.options.size,
            [Entry(c.key, c.title, c.ours, bound=c.bound) for c in self.baselines],
            # The larger of PyTorch's own two layouts: which is closer is chance.
            max(_error(logits, truth) for logits in truth.eager),
            *peaks,
            floor_seconds(passes, peaks, job.dtype.itemsize),
        )
        self.comparisons.append(comparison)
        race = _Race(self.baselines, comparison, self.options)
        try:
            race.run(job, truth)
        finally:
            race.stop()
            comparison.summarise()
            print(f"\n{table(comparison)}\n", flush=True)
            self.save()

    def _print_labels(self, architecture: str, truth: Truth) -> None:
        labels = inputs.labels(architecture, self.options.weights)
        if labels is None or len(labels) != truth.logits.shape[1]:
            return
        probabilities = torch.from_numpy(truth.logits).softmax(1)
        for name, row in zip(self.photographs.names, probabilities, strict=False):
            best = zip(*(part.tolist() for part in row.topk(5)), strict=True)
            print(f"{name}: " + ", ".join(f"{labels[i]} {p:.0%}" for p, i in best))

    def save(self) -> None:
        """Writes the JSON and the chart that were asked for, from what is there."""
        comparisons = [asdict(comparison) for comparison in self.comparisons]
        results.write(self.options.json, {**self.record, "comparisons": comparisons})
        if self.options.plot and any(e.rate for c in self.comparisons for e in c.entries):
            subtitle = (
                f"{results.chip(self.record['machine'])} · "
                f"torch {self.record['versions']['torch']} · {self.record['date'][:10]} · bars: "
                f"median of {self.options.rounds} interleaved rounds, whiskers: 10th to 90th "
                "percentile · "
                "×: how much faster ours is"
            )
            plot(self.comparisons, subtitle, self.options.plot)

    def exit_code(self) -> int:
        """0 if ours was right and was measured in every comparison."""
        return int(any(comparison.best_of_ours() is None for comparison in self.comparisons))


class _Race:
    """The implementations of one comparison, each in its worker."""

    def __init__(
        self, baselines: Sequence[Baseline], comparison: Comparison, options: argparse.Namespace
    ) -> None:
        self.comparison = comparison
        self.options = options
        self.workers: dict[str, Worker] = {}
        self.field: list[tuple[Baseline, Entry]] = []
        for baseline, entry in zip(baselines, comparison.entries, strict=True):
            if options.quick and baseline.slow and baseline.key not in options.peers:
                entry.status, entry.reason = "unavailable", "takes long to build; not in --quick"
            else:
                self.field.append((baseline, entry))

    def run(self, job: Job, truth: Truth) -> None:
        """Builds everyone, holds them against the truth, and times them in turns.

        The first round is each one's own, as soon as it is built: who stops the run, or a peer that
        never ends, finds the others measured.
        """
        from tqdm import tqdm  # not above: every worker imports this file, and needs no bar

        for baseline, _ in self.field:
            self.workers[baseline.key] = Worker(
                Runner, self.options.answer_seconds, self.options.warm
            )
        # Only then: nobody's cold start shall compete with another one's imports.
        for worker in self.workers.values():
            worker.wait_until_started()
        steps = len(self.field) * self.options.rounds
        with tqdm(total=steps, unit="step", dynamic_ncols=True, leave=False, disable=None) as bar:
            for baseline, entry in self.field:
                bar.set_description(f"{job.batch}×{self.comparison.dtype}: build {entry.title}")
                self._build(baseline, entry, job, truth)
                self._time(entry)
                bar.update()
            if self.comparison.gate_is_red():
                # Ours is not timed at all then; the peers' numbers still stand.
                for _, entry in self.field:
                    if entry.ours and entry.status == "measured":
                        entry.status, entry.reason = "unavailable", "another of ours is wrong"
                        entry.rounds.clear()
            racing = [entry for _, entry in self.field if entry.status == "measured"]
            bar.total = len(self.field) + len(racing) * (self.options.rounds - 1)
            for entry in in_turn(racing, range(1, self.options.rounds)):
                bar.set_description(f"{job.batch}×{self.comparison.dtype}: {entry.title}")
                self._time(entry)
                bar.update()
            for entry in racing:
                with contextlib.suppress(FailedError):
                    entry.memory = self.workers[entry.key].ask("memory")

    def _build(self, baseline: Baseline, entry: Entry, job: Job, truth: Truth) -> None:
        worker = self.workers[entry.key]
        try:
            built: Built = worker.ask(
                "build", baseline, job, self.options.round_seconds, self.options.new_batch
            )
        except (UnavailableError, FailedError) as error:
            entry.status = "unavailable" if isinstance(error, UnavailableError) else "failed"
            entry.reason = str(error)
        else:
            if not self.options.warm:
                entry.cold_start, entry.new_batch = built.cold_start, built.new_batch
            entry.error = _error(built.logits, truth)
            limit = (1.0 if entry.ours else _PEER_LIMIT) * (self.comparison.eager_error or 0.0)
            limit = limit if entry.bound is None else entry.bound
            entry.status = "measured" if entry.error <= limit else "wrong"
            if entry.status == "wrong":
                entry.reason = f"error {entry.error:.2e}, allowed {limit:.2e}"
        if entry.status != "measured":
            worker.stop()
            del self.workers[entry.key]

    def _time(self, entry: Entry) -> None:
        if entry.status != "measured":
            return
        try:
            entry.rounds.append(self.workers[entry.key].ask("time", self.options.rest))
        except FailedError as error:
            entry.status, entry.reason = "failed", str(error)

    def stop(self) -> None:
        """Ends all workers."""
        for worker in self.workers.values():
            worker.stop()
        for entry in self.comparison.entries:
            if entry.status == "pending" or (entry.status == "measured" and not entry.rounds):
                entry.status, entry.reason = "unavailable", "the run was interrupted"


def _error(logits: Any, truth: Truth) -> float:
    return relative_error(torch.from_numpy(logits), torch.from_numpy(truth.logits))


def main(arguments: Sequence[str] | None = None, baselines: Sequence[Baseline] = BASELINES) -> int:
    """Runs the benchmark; 0 if all went well, 1 on a red gate, 130 when interrupted."""
    options = parse(arguments, baselines)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was measured is kept then, too
    with tempfile.TemporaryDirectory(prefix="resnet_fused_benchmark_") as folder:
        try:
            benchmark = Benchmark(options, baselines, Path(folder))
        except (FileNotFoundError, ValueError) as error:
            print(f"throughput.py: {error}", file=sys.stderr)
            return 2
        results.warn_if_busy(benchmark.record)
        try:
            benchmark.run()
        except KeyboardInterrupt:
            benchmark.record["interrupted"] = True
            benchmark.save()
            print("Interrupted; what was measured so far is kept.", file=sys.stderr)
            return 130
        except FailedError as error:
            print(f"throughput.py: no truth to hold anyone against: {error}", file=sys.stderr)
            return 2
        return benchmark.exit_code()


if __name__ == "__main__":
    sys.exit(main())
