"""docs/predicted.md from the committed predictions: what was written by hand, then tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.results import markdown

from .rates import GPUS

MARK = "<!-- From here on written by benchmarks/render.py. -->\n"
_FOLDER = "../benchmarks/results/predicted"
_SHOWN = 12  # launches of a table


def report(root: Path) -> str:
    """The document's text, for the checkout at `root`."""
    folder = root / "benchmarks" / "results" / "predicted"
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    written = (root / "docs" / "predicted.md").read_text().split(MARK)[0]
    parts = [
        "## Predictions",
        _summary(records),
        "## Rates assumed",
        _assumptions(records),
    ]
    for name, record in records.items():
        if record["batch"] == 256:
            parts += [f"## {_title(record)}", _launches(record)]
            if (folder / f"{name}.png").exists():
                parts.append(f"![time by layer and by bound]({_FOLDER}/{name}.png)")
    return written + MARK + "\n" + "\n\n".join(parts) + "\n"


def _what(record: dict[str, Any]) -> str:
    if record["training"]:
        return "a training step" + ", Triton alone" * (record.get("backend") == "triton")
    return "int8 inference" if record["dtype"] == "int8" else "inference"


def _title(record: dict[str, Any]) -> str:
    gpu = GPUS[record["gpu"]].name
    return f"{record['arch']}, {_what(record)}, batch {record['batch']}, {gpu}: a model"


def _summary(records: dict[str, dict[str, Any]]) -> str:
    rows = [["file", "GPU", "what", "batch", "ms", "images/s, modelled", "range"]]
    for name, record in records.items():
        speed = record["images_per_second"]
        rows.append(
            [
                f"[{name}]({_FOLDER}/{name}.json)",
                GPUS[record["gpu"]].name,
                _what(record),
                str(record["batch"]),
                f"{record['milliseconds']:.2f}",
                f"{speed['expected']:,.0f}",
                f"{speed['low']:,.0f} to {speed['high']:,.0f}",
            ]
        )
    return markdown(rows)


def _assumptions(records: dict[str, dict[str, Any]]) -> str:
    """Each rate, and what its ends change of a batch of 256 on an H100, in percent of the time."""
    shown = [records[f"h100_{what}_256"] for what in ("inference", "training")]
    rows = [["rate", "slow / expected / fast", "unit", "inference", "training", "from"]]
    for name, assumed in shown[0]["assumptions"].items():
        values = " / ".join(f"{assumed[side]:g}" for side in ("slow", "expected", "fast"))
        effects = [
            " / ".join(
                f"{record['milliseconds_if'][name][side] / record['milliseconds'] - 1:+.1%}"
                for side in ("slow", "fast")
            )
            for record in shown
        ]
        rows.append([name, values, assumed["unit"], *effects, assumed["source"]])
    return markdown(rows)


def _launches(record: dict[str, Any]) -> str:
    head = "launches, kernel, shape, tile, instructions, µs each, × floor, bound"
    cells = [head.split(", ")]
    rows = sorted(record["layers"], key=lambda r: r["calls"] * r["microseconds"], reverse=True)
    for row in rows[:_SHOWN]:
        counts = "–"
        if "code" in row:
            counts = f"{row['instructions_outside']:,}"
            if step := row["code"]["instructions_main_loop"]:
                counts = f"{row['main_loop_trips']:g} × {step} + {counts}"
        cells.append(
            [
                str(row["calls"]),
                row["kernel"],
                row["shape"],
                row["config"],
                counts,
                f"{row['microseconds']:.1f}",
                f"{row['microseconds'] / row['floor_microseconds']:.2f}",
                row["bound"],
            ]
        )
    rest = sum(row["calls"] * row["microseconds"] for row in rows[_SHOWN:]) / 1e3
    others = f"The other {sum(row['calls'] for row in rows[_SHOWN:])} launches take {rest:.2f} ms."
    return f"{markdown(cells)}\n\n{others}"
