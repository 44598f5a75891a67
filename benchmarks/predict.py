"""How fast a network would run on an H100 or H200, by a model: nothing is measured, no GPU is used.

    python benchmarks/predict.py --arch resnet50 --batch 256 --dtype bfloat16 --gpu h100
    python benchmarks/predict.py --gpu h200 --training --json predicted.json --plot predicted.png
    python benchmarks/predict.py --measured throughput.json layers_256.json

Launches are those that the heuristics pick, on a network that is not run: of our CUDA kernels in
inference (the extension must hold code for sm_90a), and of the Triton kernels, compiled here, that
stand around our convolutions in a training step and in an int8 network. `benchmarks/time_model/`
explains the model. The file holds `images_per_second` ("low", "expected", "high"), the rates
assumed, what each of them changes, and `layers`: every launch, equal ones once, with what its
compiled code holds and which resource binds it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import results
from time_model import beside, network, plot
from time_model.rates import GPUS, Rates, assumptions, rates
from time_model.work import Work, facts, predict

from resnet_fused import _extension
from resnet_fused.tune import ARCHITECTURES

NOTE = (
    "A model, not a measurement: times follow from compiled code, shapes and assumed rates; "
    "no GPU was used."
)


def works(options: argparse.Namespace) -> list[Work]:
    """The network's launches. Raises RuntimeError where the extension holds no code for Hopper."""
    gpu, dtype = GPUS[options.gpu], getattr(torch, options.dtype)
    if options.backend == "triton":  # needs no extension
        if dtype == torch.int8:
            return network.quantized(options.arch, options.batch, gpu)
        if options.training:
            return network.training(options.arch, options.batch, dtype, gpu)
    if reason := _extension.available():
        raise RuntimeError(reason)
    extension = _extension.load()
    info = extension.build_info()
    if not info["cuda"] or "90a" not in info["cuda_architectures"].split():
        raise RuntimeError(
            "the extension holds no CUDA code for sm_90a; build it with RESNET_FUSED_CUDA=on"
        )
    file = Path(str(extension.__file__))
    if dtype == torch.int8:
        return network.quantized(options.arch, options.batch, gpu, file)
    if options.training:
        return network.training(options.arch, options.batch, dtype, gpu, file)
    return network.inference(options.arch, options.batch, dtype, gpu, file)


def total_seconds(found: Sequence[Work], gpu: str, r: Rates) -> float:
    """Of all launches, one after the other."""
    return 1e-6 * sum(predict(work, GPUS[gpu], r).microseconds for work in found)


def layers(found: Sequence[Work], gpu: str) -> list[dict[str, Any]]:
    """A row for each launch at the expected rates, equal ones together, in order."""
    rows: dict[str, dict[str, Any]] = {}
    for work in found:
        expected = predict(work, GPUS[gpu], rates(gpu))
        row: dict[str, Any] = {
            "calls": 0,
            "kernel": work.kernel,
            "config": work.config,
            "shape": work.shape,
            "microseconds": round(expected.microseconds, 2),
            "floor_microseconds": round(expected.floor_microseconds, 2),
            "bound": expected.bound,
            "tiles": work.tiles,
            "waves": round(expected.waves, 2),
            "dram_bytes": work.dram_bytes,
            "l2_bytes": work.l2_bytes,
            "multiply_adds": work.multiply_adds,
            "cycles": {name: round(value) for name, value in expected.cycles.items()},
            "chain_cycles": {name: round(value) for name, value in expected.chain.items()},
            **facts(work),
        }
        row = rows.setdefault(json.dumps(row), {"layers": [], **row})
        row["calls"] += 1
        if work.layer not in row["layers"]:
            row["layers"].append(work.layer)
    return list(rows.values())


def record(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the result file holds."""
    found = works(options)
    assumed = assumptions(options.gpu)
    expected = total_seconds(found, options.gpu, rates(options.gpu))
    effects = {
        name: {
            side: total_seconds(found, options.gpu, rates(options.gpu, {name: side}))
            for side in ("slow", "fast")
        }
        for name in assumed
    }
    # Assumptions are independent of each other: their effects add as squares.
    slower, faster = (
        math.hypot(*(effect[side] - expected for effect in effects.values()))
        for side in ("slow", "fast")
    )
    batch, backend = options.batch, options.backend
    facts = results.facts(None, "torch", "triton")
    return {
        "note": NOTE,
        **facts,
        "arch": options.arch,
        "batch": batch,
        "dtype": options.dtype,
        "gpu": options.gpu,
        "training": options.training,
        "backend": backend,
        "versions": {
            **facts["versions"],
            "nvcc": _extension.load().build_info()["cuda_note"] if backend == "cuda" else None,
        },
        "images_per_second": {
            "low": round(batch / (expected + slower), 1),
            "expected": round(batch / expected, 1),
            "high": round(batch / (expected - faster), 1),
        },
        "milliseconds": round(1e3 * expected, 4),
        "assumptions": {name: a._asdict() for name, a in assumed.items()},
        "milliseconds_if": {
            name: {side: round(1e3 * seconds, 4) for side, seconds in effect.items()}
            for name, effect in effects.items()
        },
        "layers": layers(found, options.gpu),
    }


def dumps(found: dict[str, Any]) -> str:
    """JSON with a line for each launch."""
    head = json.dumps({k: v for k, v in found.items() if k != "layers"}, indent=1)
    rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in found["layers"])
    return head.removesuffix("\n}") + f',\n "layers": [\n  {rows}\n ]\n}}\n'


def table(found: dict[str, Any]) -> str:
    """The launches that take a hundredth of the time or more, for people."""
    lines = [f"{'kernel':24} {'shape':46} {'calls':>5} {'µs':>8} {'× floor':>8}  bound"]
    for row in found["layers"]:
        if row["calls"] * row["microseconds"] >= 10 * found["milliseconds"]:
            times = row["microseconds"] / row["floor_microseconds"]
            lines.append(
                f"{row['kernel']:24} {row['shape'][:46]:46} {row['calls']:5} "
                f"{row['microseconds']:8.1f} {times:8.2f}  {row['bound']}"
            )
    speed = found["images_per_second"]
    what = "training step" if found["training"] else "inference"
    lines.append(
        f"{found['arch']} {what}, {found['dtype']}, batch {found['batch']}, "
        f"{GPUS[found['gpu']].name}: {found['milliseconds']:.2f} ms, {speed['expected']:,.0f} "
        f"images/s ({speed['low']:,.0f} to {speed['high']:,.0f}). {NOTE}"
    )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = results.parser(__doc__, "json", "plot")
    parser.add_argument("--arch", default="resnet50", choices=ARCHITECTURES, metavar="NETWORK",
                        help=f"one of {', '.join(ARCHITECTURES)}")  # fmt: skip
    parser.add_argument("--batch", type=results.positive, default=256)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "int8"), default="bfloat16")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100")
    parser.add_argument("--training", action="store_true", help="a step, not a forward")
    parser.add_argument(
        "--backend",
        choices=("cuda", "triton"),
        default="cuda",
        help="of a step or int8: whose convolutions; where ours do not serve, Triton's",
    )
    parser.add_argument(
        "--measured",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="result files of throughput.py and layers.py to set it beside, as far as they exist",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        found = record(options)
    except RuntimeError as error:
        print(f"predict: {error}", file=sys.stderr)
        return 1
    print(table(found))
    measured = [json.loads(path.read_text()) for path in options.measured if path.exists()]
    if options.measured:
        found = {**found, "measured": beside.compare(found, measured)}
        print(beside.table(found["measured"]))
    results.write(options.json, dumps(found))
    if options.plot is not None:
        plot.draw(found, options.plot)
    return int(bool(options.measured) and not measured)


if __name__ == "__main__":
    sys.exit(main())
