"""Each fused op of a network by itself: time, rate, and how near to the machine's floor.

    python benchmarks/layers.py                              ResNet-50, this machine's defaults
    python benchmarks/layers.py --batch 256 --dtype bfloat16 --json out.json
    python benchmarks/layers.py --backends cuda --kernels    and each of its candidates
    ncu --kernel-name-base demangled --kernel-name regex:resnet_fused --set full \\
        python benchmarks/layers.py --once "conv_bn 3×3/1 64→64 on 56×56, cuda m128n64_sm90"

The ops are recorded from one forward pass. For each distinct shape every backend's choice is held
against float64 (one that fails is not timed) and then measured, beside the vendor library's own
convolution (cuDNN's fused ops on a GPU, oneDNN's on a CPU, batch norm folded into the weights
beforehand).
The share of the floor is max(bytes / bandwidth, operations / peak) over the time: bytes count
every operand and the result once (of a strided 1×1 window's input what it sees), both peaks are
measured in the run. On a CPU the share of the peak is that of what its multiply-adds reach from
registers alone (microbenchmarks/peaks.cpp), direct convolution's operations over the time: taps
that lie outside the image, which kernels may skip, and Winograd's fewer products count as done, so
that it can pass 100%. A network's operands are often in cache when an op starts; here they are as
the previous round left them. On a GPU several calls are captured in a graph and its replays timed
by events, so that the host has no part in it.
A whole bottleneck has a row beside those of its layers, and no part in the sums.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from baselines.folded import fold, library_call
from harness import results
from harness.measure import Peaks, in_cuda_graph, in_turn, iterations_for, measure_peaks, times_of
from torch import Tensor
from tqdm import tqdm

import resnet_fused
from resnet_fused import available_backends, backends, ops
from resnet_fused.backends import Backend, Candidate, Candidates
from resnet_fused.backends.autotune import choose
from resnet_fused.backends.autotune.verify import Check
from resnet_fused.parameters import ConvBn
from resnet_fused.reference import ops as reference
from resnet_fused.testing.cases import randomise_statistics
from resnet_fused.tune import ARCHITECTURES

_SECONDS = {"cpu": 0.15, "cuda": 0.02}  # of calls in a round
_CALLS_IN_GRAPH = 4


class Layer(NamedTuple):
    """A recorded op: its name, arguments as backends take them, and how often it is called."""

    op: str
    arguments: tuple[Any, ...]
    calls: int

    def convolutions(self) -> list[tuple[Tensor, ConvBn]]:
        """Inputs and layers of the main path and of a projection."""
        if self.op in ("head", "bottleneck"):
            return []
        projects = self.op == "conv_bn_projection"
        return [self.arguments[:2], *([self.arguments[2:]] if projects else [])]

    def residual(self) -> Tensor | None:
        return self.arguments[2] if self.op == "conv_bn" else None

    def title(self) -> str:
        """For people: op, window/stride, channels, size of the map."""
        if self.op == "head":
            return f"head {self.arguments[1].shape[1]}→{self.arguments[1].shape[0]}"
        if self.op == "bottleneck":
            x, layer1, layer2, layer3, projection = self.arguments
            widths = [x.shape[1], *(len(layer.conv.weight) for layer in (layer1, layer3))]
            return (
                f"bottleneck/{layer2.conv.stride[0]} {'→'.join(map(str, widths))} on "
                f"{x.shape[2]}×{x.shape[3]}{' + projection' if projection else ''}"
            )
        x, (conv, _) = self.convolutions()[0]
        filters, channels, height, width = conv.weight.shape
        added = " + shortcut" if self.residual() is not None else ""
        return (
            f"{self.op} {height}×{width}/{conv.stride[0]} {channels}→{filters} "
            f"on {x.shape[2]}×{x.shape[3]}{added}"
        )

    def floor(self, out: Tensor, peaks: Peaks) -> tuple[int, int, float]:
        """(operations, bytes, seconds) that the op takes at the least."""
        if self.op == "head":
            x, weight = self.arguments[:2]
            operations, moved = 2 * out.numel() * x.shape[1], x.nbytes + weight.nbytes
        elif self.op == "bottleneck":
            x, *layers = self.arguments
            weights = [layer.conv.weight for layer in layers if layer]
            first, others = x[:, 0].numel(), out[:, 0].numel()  # positions of conv1 and of the rest
            operations = 2 * first * weights[0].numel()
            operations += sum(2 * others * weight.numel() for weight in weights[1:])
            moved = x.nbytes + sum(weight.nbytes for weight in weights)
        else:
            operations, moved = 0, 0
            for x, (conv, _) in self.convolutions():
                height, width = conv.output_size(*x.shape[2:])
                operations += 2 * len(x) * height * width * conv.weight.numel()
                height, width = conv.weight.shape[2:]
                # A 1×1 window sees every stride-th pixel only.
                unread = conv.stride[0] * conv.stride[1] if height * width == 1 else 1
                moved += x.nbytes // unread + conv.weight.nbytes
        residual = self.residual()
        moved += out.nbytes + (0 if residual is None else residual.nbytes)
        return operations, moved, peaks.floor(moved, operations)


class _Recorder:
    """A backend that notes each call of an op, and computes it by the reference."""

    name = "recorder"
    training = None

    def __init__(self) -> None:
        self.layers: dict[Any, Layer] = {}

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def __getattr__(self, op: str) -> Callable[..., Candidates]:
        def launch(*arguments: Any) -> Tensor:
            key = (op, *map(_shapes, arguments))
            known = self.layers.get(key, Layer(op, arguments, 0))
            self.layers[key] = known._replace(calls=known.calls + 1)
            if op != "bottleneck":
                return getattr(reference, op)(*arguments)
            x, layer1, layer2, layer3, projection = arguments  # its layers are of interest too
            out = ops.conv_bn(ops.conv_bn(x, layer1, relu=True), layer2, relu=True)
            if projection is None:
                return ops.conv_bn(out, layer3, x, relu=True)
            return ops.conv_bn_projection(out, layer3, x, projection)

        return lambda *_: [Candidate("recorder", launch)]


def record(architecture: str, x: Tensor) -> list[Layer]:
    """The distinct ops of one forward pass on `x`, in the order of their first call."""
    torch.manual_seed(0)
    model = randomise_statistics(getattr(resnet_fused, architecture)()).eval().to(x)
    recorder = _Recorder()
    with resnet_fused.use_backend(cast(Backend, recorder)), torch.inference_mode():
        model(x)
    return list(recorder.layers.values())


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return tuple(map(_shapes, value)) if isinstance(value, (tuple, list)) else value


def library(layer: Layer) -> Callable[[], object] | None:
    """The vendor's fused convolution(s) for `layer`, weights folded; None where it has none."""
    if layer.op in ("head", "bottleneck"):
        return None
    convolutions = [(x, fold(conv, *bn)) for x, (conv, bn) in layer.convolutions()]
    pool = layer.arguments[2] if layer.op == "stem" else None
    return library_call(convolutions, layer.residual(), pool)


def computed_by(layer: Layer, names: Sequence[str], kernels: bool) -> Iterator[Candidate]:
    """What computes the layer: of each backend the candidate that it would choose, under the
    backend's name, and if `kernels` each candidate under its own."""
    for name in names:
        list_candidates = partial(getattr(backends.get(name), layer.op), *layer.arguments)
        if listed := list_candidates():
            meaning = getattr(reference, layer.op)
            chosen = choose(layer.op, layer.arguments, list_candidates, meaning, name, True)
            yield chosen._replace(name=name)
        if kernels:
            yield from listed


def once(layers: Sequence[Layer], names: Sequence[str], wanted: Sequence[str]) -> None:
    """Runs calls once each, for a profiler: a layer's title and a kernel's name, as the table has
    them. Exits where there is no such call."""
    missing = set(wanted)
    for layer in layers:
        for candidate in computed_by(layer, names, kernels=True):
            call = f"{layer.title()}, {candidate.name}"
            if call in missing:
                candidate.launch(*layer.arguments)
                missing.remove(call)
    if missing:
        sys.exit(f"there is no call {'; '.join(sorted(missing))}; the table of --kernels has all")


def _timed(call: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], int]:
    """What to time, and how many calls it makes."""
    if device.type != "cuda":
        return call, 1

    def calls() -> Any:
        for _ in range(_CALLS_IN_GRAPH):
            call()

    return in_cuda_graph(calls), _CALLS_IN_GRAPH


def measure(
    layer: Layer, candidates: Iterable[Candidate], rounds: int, peaks: Peaks
) -> dict[str, Any]:
    """One row: the times of every candidate and of the library's call, in turn."""
    device = layer.arguments[0].device
    meaning = getattr(reference, layer.op)
    check = Check(meaning, layer.arguments, per_image=True)
    calls: dict[str, Callable[[], object]] = {}
    wrong: dict[str, str] = {}
    for candidate in candidates:
        try:
            fault = check.fault(candidate.launch)
        except RuntimeError as error:
            fault = str(error)
        if fault is None:
            calls[candidate.name] = partial(candidate.launch, *layer.arguments)
        else:
            wrong[candidate.name] = fault
    if call := library(layer):
        try:
            call()
        except RuntimeError as error:
            tqdm.write(f"{layer.title()}: the library's own convolution fails: {error}")
        else:
            calls["library"] = call
    out = meaning(*layer.arguments)
    timed = {key: _timed(call, device) for key, call in calls.items()}
    seconds = _SECONDS[device.type]
    counts = {key: iterations_for(call, device, seconds) for key, (call, _) in timed.items()}
    samples: dict[str, list[float]] = {key: [] for key in calls}
    for key, (call, each) in in_turn(list(timed.items()), range(rounds)):
        samples[key].append(statistics.median(times_of(call, device, counts[key])) / each)
    operations, moved, floor = layer.floor(out, peaks)
    return {
        "layer": layer.title(),
        "op": layer.op,
        "calls": layer.calls,
        "operations": operations,
        "bytes": moved,
        "floor_seconds": floor,
        "seconds": samples,
        "wrong": wrong,
    }


def register_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations/s of the CPU's multiply-adds from registers; None where it cannot be measured."""
    compiler = shutil.which("c++")
    if device.type != "cpu" or compiler is None:
        return None
    source = Path(__file__).parent / "microbenchmarks" / "peaks.cpp"
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/peaks"
        built = subprocess.run(
            [compiler, "-O2", "-pthread", str(source), "-o", program], capture_output=True
        )
        if built.returncode != 0:  # another processor's instructions
            return None
        run = [program, str(torch.get_num_threads())]
        peaks = json.loads(subprocess.run(run, capture_output=True, check=True).stdout)
    peak = peaks.get(str(dtype).removeprefix("torch."))
    return None if peak is None else float(peak)


def table(rows: list[dict[str, Any]], peak: float | None) -> str:
    """The rows as text: milliseconds a call, rates, shares, time over the library's."""
    names = list(dict.fromkeys(n for row in rows for n in [*row["seconds"], *row["wrong"]]))
    names = [name for name in names if name != "library"]
    lines = [
        f"{'layer':58}{'×':>3} {'by':>20}{'ms':>9}{'TFLOP/s':>9}{'GB/s':>8}{'floor':>7}"
        f"{'peak':>6}{'× library':>11}"
    ]
    for row in rows:
        library = row["seconds"].get("library")
        for name in names:
            if name in row["wrong"]:
                lines.append(f"{row['layer']:58}{row['calls']:>3} {name:>20}  {row['wrong'][name]}")
                continue
            if name not in row["seconds"]:
                continue
            seconds = statistics.median(row["seconds"][name])
            ratio = f"{statistics.median(library) / seconds:.2f}" if library else "–"
            share = f"{row['operations'] / seconds / peak:.0%}" if peak else "–"
            lines.append(
                f"{row['layer']:58}{row['calls']:>3} {name:>20}{seconds * 1e3:>9.3f}"
                f"{row['operations'] / seconds / 1e12:>9.3f}{row['bytes'] / seconds / 1e9:>8.0f}"
                f"{row['floor_seconds'] / seconds:>7.0%}{share:>6}{ratio:>11}"
            )
    for name in [*names, "library"]:
        measured = [r for r in rows if name in r["seconds"] and r["op"] != "bottleneck"]
        total = sum(row["calls"] * statistics.median(row["seconds"][name]) for row in measured)
        lines.append(f"{name}: {total * 1e3:.2f} ms for all calls of {len(measured)} shapes")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with defaults that suit the machine."""
    parser = results.parser(__doc__, "device", "size", "dtype", "json")
    choices = [name for name in ARCHITECTURES if hasattr(resnet_fused, name)]
    parser.add_argument("--arch", default="resnet50", choices=choices)
    usual = 256 if torch.cuda.is_available() else 8
    parser.add_argument("--batch", type=results.positive, default=usual)
    parser.add_argument("--backends", nargs="+", choices=backends.NAMES, help="those to measure")
    parser.add_argument("--kernels", action="store_true", help="each kernel of theirs as well")
    parser.add_argument("--rounds", type=results.positive, default=7)
    parser.add_argument(
        "--once", nargs="+", metavar="CALL", help="run 'layer, kernel' once and time nothing"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device, dtype = options.device, getattr(torch, options.dtype)
    shape = (options.batch, 3, options.size, options.size)
    names = [
        name
        for name in options.backends or backends.PREFERENCE[device.type]
        if name != "reference"  # which has no kernels
        and name in available_backends()
        and backends.get(name).unsupported(device, dtype) is None
    ]
    if not names:
        sys.exit(f"no backend serves {options.dtype} on {device}; see python -m resnet_fused.env")
    with torch.inference_mode():
        x = torch.randn(shape).to(device, dtype).contiguous(memory_format=torch.channels_last)
        layers = record(options.arch, x)
        if options.once:
            return once(layers, names, options.once)
        peaks, registers = measure_peaks(device, dtype), register_peak(device, dtype)
        rows: list[dict[str, Any]] = []
        facts = {
            **results.facts(device, "resnet-fused", "torch", "triton", "numpy", options=options),
            "peaks": peaks._asdict(),
            "register_peak": registers,
        }
        for layer in tqdm(layers, unit="layer", leave=False):
            candidates = computed_by(layer, names, options.kernels)
            rows.append(measure(layer, candidates, options.rounds, peaks))
            results.write(options.json, {**facts, "rows": rows})  # a stopped run keeps what it has
    print(table(rows, registers))
    if any(row["wrong"] for row in rows):
        sys.exit("some results break the numerics contract, so they were not timed")


if __name__ == "__main__":
    main()
