"""What the model predicted beside what was measured, for images/s and for each layer.

A launch of the prediction stands for a measured layer with as many operations and, within a
twentieth, the bytes; the others are listed. Nothing here is a bound: a ratio says where the model
has to learn.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

_BYTES = 0.05  # by which both counts may differ: one of them leaves out batch norm's vectors
OURS = "cuda-graph"  # throughput.py's key of whose launches predict.py counts
BACKEND = "cuda"


def compare(predicted: dict[str, Any], measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """measured: what throughput.py and layers.py have written, in any order."""
    both: dict[str, Any] = {"images_per_second": [], "layers": []}
    for record in measured:
        if "comparisons" in record:
            both["images_per_second"] += rates(predicted, record)
        else:
            both["layers"] += layers(predicted, record)
    return both


def rates(predicted: dict[str, Any], throughput: dict[str, Any]) -> list[dict[str, Any]]:
    """Predicted and measured images/s, where network, dtype and batch are the same."""
    found = []
    for comparison in throughput["comparisons"]:
        wanted = ("architecture", "arch"), ("dtype", "dtype"), ("batch", "batch")
        if any(comparison[ours] != predicted[theirs] for ours, theirs in wanted):
            continue
        rate = next((e["rate"] for e in comparison["entries"] if e["key"] == OURS), None)
        if rate is not None:
            expected = predicted["images_per_second"]
            within = expected["low"] <= rate <= expected["high"]
            found.append(
                {
                    **expected,
                    "batch": comparison["batch"],
                    "measured": rate,
                    "over_expected": rate / expected["expected"],
                    "within": within,
                }
            )
    return found


def layers(predicted: dict[str, Any], measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Each measured layer, with the launch that stands for it or None."""
    found = []
    for row in measured["rows"]:
        if BACKEND not in row["seconds"]:
            continue
        launches = [
            launch
            for launch in predicted["layers"]
            if 2 * launch["multiply_adds"] == row["operations"]
            and abs(launch["dram_bytes"] / row["bytes"] - 1) <= _BYTES
        ]
        nearest = min(launches, key=lambda x: abs(x["dram_bytes"] - row["bytes"]), default=None)
        seconds = statistics.median(row["seconds"][BACKEND])
        expected = None if nearest is None else nearest["microseconds"] / 1e6
        found.append(
            {
                "layer": row["layer"],
                "calls": row["calls"],
                "measured": seconds,
                "predicted": expected,
                "over_predicted": None if expected is None else seconds / expected,
                "bound": None if nearest is None else nearest["bound"],
            }
        )
    return found


def table(record: dict[str, Any]) -> str:
    """Both for people, the layers that the model misses furthest first."""
    lines = [
        f"batch {row['batch']}: measured {row['measured']:,.0f} images/s, predicted "
        f"{row['expected']:,.0f} ({row['low']:,.0f} to {row['high']:,.0f}): "
        f"{'within' if row['within'] else 'OUTSIDE'} its range"
        for row in record["images_per_second"]
    ]
    lines.append(f"{'layer':58}{'×':>3}{'measured µs':>13}{'predicted µs':>14}{'ratio':>7}  bound")
    matched = [row for row in record["layers"] if row["predicted"] is not None]
    for row in sorted(matched, key=lambda row: -row["over_predicted"]):
        lines.append(
            f"{row['layer']:58}{row['calls']:>3}{row['measured'] * 1e6:>13.1f}"
            f"{row['predicted'] * 1e6:>14.1f}{row['over_predicted']:>7.2f}  {row['bound']}"
        )
    lines += [
        f"{row['layer']}: no launch of the prediction is its like"
        for row in record["layers"]
        if row["predicted"] is None
    ]
    return "\n".join(lines)
