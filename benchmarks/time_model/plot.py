"""Predicted time by layer and by bound, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .rates import GPUS

_COLOURS = {
    "dram": "#4c72b0",
    "l2": "#dd8452",
    "shared": "#55a868",
    "issue": "#c44e52",
    "tensor": "#8172b3",
    "latency": "#937860",
    "product": "#da8bc3",
    "launch": "#8c8c8c",
    "library": "#ccb974",
}


def draw(found: dict[str, Any], to: Path) -> None:
    """Left: the launches that take most, with their floors. Right: time by what binds it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(found["layers"], key=_milliseconds, reverse=True)[:24][::-1]
    bounds: dict[str, float] = {}
    for row in found["layers"]:
        bounds[row["bound"]] = bounds.get(row["bound"], 0.0) + _milliseconds(row)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 8), width_ratios=(3, 1), layout="constrained"
    )
    places = range(len(rows))
    left.barh(places, list(map(_milliseconds, rows)), **_bars([r["bound"] for r in rows]))
    floors = [row["calls"] * row["floor_microseconds"] / 1e3 for row in rows]
    left.plot(floors, places, "k|", markersize=9, label="floor: bytes or products alone")
    labels = [f"{row['calls']} × {row['kernel']}: {row['shape']}" for row in rows]
    left.set_yticks(places, labels, fontsize=7)
    left.set_xlabel("milliseconds, modelled")
    left.legend(loc="lower right")
    names = sorted(bounds, key=bounds.__getitem__, reverse=True)
    right.bar(names, [bounds[name] for name in names], **_bars(names))
    right.tick_params(axis="x", rotation=90)
    right.set_title("by what binds it")
    what = "training step" if found["training"] else "inference"
    speed = found["images_per_second"]
    figure.suptitle(
        f"A model, nothing measured: {found['arch']} {what}, {found['dtype']}, batch "
        f"{found['batch']}, {GPUS[found['gpu']].name}: {speed['low']:,.0f} to "
        f"{speed['high']:,.0f} images/s"
    )
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=80)
    pyplot.close(figure)


def _bars(bounds: list[str]) -> dict[str, list[str]]:
    """Colours by resource; hatched where tiles pass one after the other."""
    return {
        "color": [_COLOURS[bound.removeprefix("chain: ")] for bound in bounds],
        "hatch": ["//" if bound.startswith("chain") else "" for bound in bounds],
        "edgecolor": ["white"] * len(bounds),
    }


def _milliseconds(row: dict[str, Any]) -> float:
    return float(row["calls"] * row["microseconds"] / 1e3)
