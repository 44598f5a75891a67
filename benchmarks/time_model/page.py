"""docs/predicted.md from the committed predictions: what was written by hand, then tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .rates import GPUS

MARK = "<!-- From here on written by benchmarks/render.py. -->\n"
_FOLDER = "../benchmarks/results/predicted"
_SHOWN = 12  # launches of a table


def page(root: Path) -> str:
    """The page's text, for the checkout at `root`."""
    folder = root / "benchmarks" / "results" / "predicted"
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    written = (root / "docs" / "predicted.md").read_text().split(MARK)[0]
    parts = [
        "## Predictions",
        "\n".join(_summary(records)),
        "## Rates assumed",
        "\n".join(_assumptions(records)),
    ]
    for name, record in records.items():
        if record["batch"] == 256:
            plot = f"![time by layer and by bound]({_FOLDER}/{name}.png)"
            parts += [f"## {_title(record)}", "\n".join(_launches(record)), plot]
    return written + MARK + "\n" + "\n\n".join(parts) + "\n"


def _title(record: dict[str, Any]) -> str:
    what = "a training step" if record["training"] else "inference"
    return f"{record['arch']}, {what}, batch {record['batch']}, {GPUS[record['gpu']].name}: a model"


def _summary(records: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "| file | GPU | what | batch | ms | images/s, modelled | range |"
    yield "|---|---|---|---|---|---|---|"
    for name, record in records.items():
        speed = record["images_per_second"]
        cells = [
            f"[{name}]({_FOLDER}/{name}.json)",
            GPUS[record["gpu"]].name,
            "training step" if record["training"] else "inference",
            str(record["batch"]),
            f"{record['milliseconds']:.2f}",
            f"{speed['expected']:,.0f}",
            f"{speed['low']:,.0f} to {speed['high']:,.0f}",
        ]
        yield "| " + " | ".join(cells) + " |"


def _assumptions(records: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Each rate, and what its ends change of a batch of 256 on an H100, in percent of the time."""
    shown = [records[f"h100_{what}_256"] for what in ("inference", "training")]
    yield "| rate | slow / expected / fast | unit | inference | training | from |"
    yield "|---|---|---|---|---|---|"
    for name, assumed in shown[0]["assumptions"].items():
        values = " / ".join(f"{assumed[side]:g}" for side in ("slow", "expected", "fast"))
        effects = [
            " / ".join(
                f"{record['milliseconds_if'][name][side] / record['milliseconds'] - 1:+.1%}"
                for side in ("slow", "fast")
            )
            for record in shown
        ]
        cells = [name, values, assumed["unit"], *effects, assumed["source"]]
        yield "| " + " | ".join(cells) + " |"


def _launches(record: dict[str, Any]) -> Iterator[str]:
    yield "| launches | kernel | shape | tile | instructions | µs each | × floor | bound |"
    yield "|---|---|---|---|---|---|---|---|"
    rows = sorted(record["layers"], key=lambda r: r["calls"] * r["microseconds"], reverse=True)
    for row in rows[:_SHOWN]:
        counts = "–"
        if "code" in row:
            counts = f"{row['instructions_outside']:,}"
            if step := row["code"]["instructions_main_loop"]:
                counts = f"{row['main_loop_trips']:g} × {step} + {counts}"
        cells = [
            str(row["calls"]),
            row["kernel"],
            row["shape"],
            row["config"],
            counts,
            f"{row['microseconds']:.1f}",
            f"{row['microseconds'] / row['floor_microseconds']:.2f}",
            row["bound"],
        ]
        yield "| " + " | ".join(cells) + " |"
    rest = sum(row["calls"] * row["microseconds"] for row in rows[_SHOWN:]) / 1e3
    yield f"\nThe other {sum(row['calls'] for row in rows[_SHOWN:])} launches take {rest:.2f} ms."
