"""What a comparison found, as data, as a table and as a chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Entry:
    """What was found of one implementation, ours or a baseline.

    Times are in seconds, memory in bytes, rates in images per second.
    status: "measured"; "unavailable" or "failed" with the reason; "wrong" where the logits miss
    what is asked of them, with the reason, in which case it is not timed; "pending" until then.
    error: ‖logits - truth‖ / ‖truth‖, the truth computed in float64.
    bound: the error allowed to what computes in fewer bits than the comparison's dtype; it has a
        part in speed-ups only where ours does so too.
    rounds: the time of every single call, by round.
    cold_start, new_batch: until the first logits, and until those of another batch size.
    speedup: the rate of the best of ours over this one's.
    """

    key: str
    title: str
    ours: bool
    bound: float | None = None
    status: str = "pending"
    reason: str | None = None
    error: float | None = None
    cold_start: float | None = None
    new_batch: float | None = None
    memory: int | None = None
    rounds: list[list[float]] = field(default_factory=list)
    rate: float | None = None
    rate_p10: float | None = None
    rate_p90: float | None = None
    latency_p50: float | None = None
    latency_p99: float | None = None
    floor_share: float | None = None
    speedup: float | None = None


@dataclass
class Comparison:
    """All implementations on one input. `eager_error` is the yardstick of the numerics contract.

    floor: seconds a batch takes at least by the roofline (`harness.measure`), from
    `bandwidth` (bytes/s) and `arithmetic` (operations/s) as measured in the same run.
    """

    architecture: str
    device: str
    dtype: str
    batch: int
    size: int
    entries: list[Entry]
    eager_error: float | None = None
    bandwidth: float | None = None
    arithmetic: float | None = None
    floor: float | None = None

    def summarise(self) -> None:
        """Fills in what follows from the samples. No speed-up is stated on a red gate."""
        timed = [entry for entry in self.entries if entry.status == "measured" and entry.rounds]
        for entry in timed:
            # A round's rate is its images over its whole time; latencies are of single calls.
            rates = [self.batch * len(times) / sum(times) for times in entry.rounds]
            quantiles = np.quantile(rates, (0.1, 0.5, 0.9)).tolist()
            entry.rate_p10, entry.rate, entry.rate_p90 = quantiles
            singles = np.concatenate(entry.rounds)
            entry.latency_p50, entry.latency_p99 = np.quantile(singles, (0.5, 0.99)).tolist()
            if self.floor is not None:
                entry.floor_share = entry.rate * self.floor / self.batch
        best = self.best_of_ours()
        for entry in timed:
            comparable = entry.bound is None or (best is not None and best.bound is not None)
            if best is not None and best.rate and entry.rate and comparable:
                entry.speedup = best.rate / entry.rate

    def gate_is_red(self) -> bool:
        """Whether one of ours gave wrong logits."""
        return any(entry.ours and entry.status == "wrong" for entry in self.entries)

    def best_of_ours(self) -> Entry | None:
        """Our fastest, if one was timed and none is wrong."""
        ours = [entry for entry in self.entries if entry.ours and entry.rate is not None]
        if self.gate_is_red() or not ours:
            return None
        return max(ours, key=lambda entry: entry.rate or 0.0)

    def title(self) -> str:
        return (
            f"{self.architecture} · {self.dtype} · batch {self.batch} · "
            f"{self.size}×{self.size} · {self.device}"
        )


def ranked(comparison: Comparison) -> list[Entry]:
    """Who was timed, fastest first."""
    timed = [entry for entry in comparison.entries if entry.rate is not None]
    return sorted(timed, key=lambda entry: -(entry.rate or 0.0))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _size(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _cell(value: float | None, form: Callable[[float], str]) -> str:
    return "–" if value is None else form(value)


def _milliseconds(seconds: float) -> str:
    return _number(seconds * 1e3)


_COLUMNS: dict[str, Callable[[Entry], str]] = {
    "  implementation": lambda e: ("▸ " if e.ours else "  ") + e.title,
    "images/s": lambda e: _cell(e.rate, _number),
    "p10–p90": lambda e: f"{_cell(e.rate_p10, _number)}–{_cell(e.rate_p90, _number)}",
    "ms p50": lambda e: _cell(e.latency_p50, _milliseconds),
    "ms p99": lambda e: _cell(e.latency_p99, _milliseconds),
    "ours is": lambda e: _cell(e.speedup, "{:.2f}×".format),
    "memory": lambda e: _cell(e.memory, _size),
    "of floor": lambda e: _cell(e.floor_share, "{:.0%}".format),
    "error": lambda e: _cell(e.error, "{:.1e}".format),
    "cold start": lambda e: _cell(e.cold_start, "{:.1f} s".format),
    "new batch": lambda e: _cell(e.new_batch, "{:.1f} s".format),
}


def cells(comparison: Comparison) -> list[list[str]]:
    """The comparison's table, fastest first, the headings above."""
    rows = [[column(entry) for column in _COLUMNS.values()] for entry in ranked(comparison)]
    return [list(_COLUMNS), *rows]


def table(comparison: Comparison) -> str:
    """The comparison as text, and below it who was not measured and why."""
    rows = cells(comparison)
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "─" * len(lines[0]))
    lines.insert(0, comparison.title())
    if comparison.floor and comparison.bandwidth and comparison.arithmetic:
        lines.append(
            f"  floor: {_number(comparison.batch / comparison.floor)} images/s, from "
            f"{_number(comparison.bandwidth / 1e9)} GB/s and "
            f"{_number(comparison.arithmetic / 1e9)} GFLOP/s as measured here; "
            "each convolution fused with what follows it"
        )
    if comparison.eager_error is not None:
        lines.append(
            f"  error: ‖logits − truth‖ / ‖truth‖, truth in float64; {comparison.eager_error:.1e}, "
            "PyTorch's own, is what ours may have"
        )
    lines.extend(
        f"  {entry.title}: in fewer bits than {comparison.dtype}, error up to {entry.bound:.1e} "
        f"allowed{'; no speed-up is stated of it' if entry.speedup is None else ''}"
        for entry in ranked(comparison)
        if entry.bound is not None
    )
    absent = [entry for entry in comparison.entries if entry.rate is None]
    lines.extend(f"  {entry.status}: {entry.title} – {entry.reason}" for entry in absent)
    if comparison.gate_is_red():
        lines.append("  RED GATE: a result of ours is wrong, so no speed-up is stated.")
    return "\n".join(lines)


_OURS, _PEER, _INK, _MUTED = "#d9480f", "#adb5bd", "#212529", "#868e96"


def plot(comparisons: Sequence[Comparison], subtitle: str, path: Path) -> None:
    """A bar chart of images per second, one panel a comparison, ours highlighted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [comparison for comparison in comparisons if ranked(comparison)]
    if not shown:
        raise ValueError("nothing was measured, so there is nothing to plot.")
    heights = [0.34 * len(ranked(comparison)) + 0.75 for comparison in shown]
    figure, panels = pyplot.subplots(
        len(shown),
        1,
        figsize=(8.6, sum(heights) + 0.75),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(
        "Images per second", x=0.012, ha="left", fontsize=14, fontweight="bold", color=_INK
    )
    for panel, comparison in zip(panels[:, 0], shown, strict=True):
        _panel(panel, comparison)
    figure.text(0.012, -0.02, subtitle, ha="left", va="top", fontsize=7.5, color=_MUTED)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.15, facecolor="white")
    pyplot.close(figure)


def _panel(panel: Any, comparison: Comparison) -> None:
    entries = list(reversed(ranked(comparison)))
    rates = [entry.rate or 0.0 for entry in entries]
    below = [max(0.0, (e.rate or 0.0) - (e.rate_p10 or 0.0)) for e in entries]
    above = [max(0.0, (e.rate_p90 or 0.0) - (e.rate or 0.0)) for e in entries]
    panel.barh(
        [entry.title for entry in entries],
        rates,
        height=0.72,
        color=[_OURS if entry.ours else _PEER for entry in entries],
        xerr=(below, above),
        error_kw={"ecolor": _INK, "elinewidth": 0.9, "capsize": 2.5},
    )
    floor = comparison.batch / comparison.floor if comparison.floor else None
    reach = max(rate + more for rate, more in zip(rates, above, strict=True))
    # A floor many times higher would squeeze the bars; it then stands in the corner as a number.
    if floor is not None and floor < 3 * reach:
        panel.axvline(floor, color=_MUTED, linestyle=(0, (4, 3)), linewidth=1)
        reach = max(reach, floor)
    panel.set_xlim(0, reach * 1.2)
    for position, (entry, rate, more) in enumerate(zip(entries, rates, above, strict=True)):
        label = _number(rate)
        if entry.speedup is not None and entry.speedup != 1:
            label += f"   {entry.speedup:.2f}×"
        panel.annotate(
            label,
            (rate + more, position),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if entry.ours else "normal",
            color=_OURS if entry.ours else _INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )
    panel.set_title(comparison.title(), loc="left", fontsize=9.5, color=_INK)
    if floor is not None:
        panel.set_title(f"┆ roofline floor {_number(floor)}", loc="right", fontsize=8, color=_MUTED)
    panel.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=_INK)
    panel.tick_params(axis="x", labelsize=7.5, labelcolor=_MUTED, color=_MUTED)
    for label, entry in zip(panel.get_yticklabels(), entries, strict=True):
        if entry.ours:
            label.set_color(_OURS)
            label.set_fontweight("bold")
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color(_PEER)
