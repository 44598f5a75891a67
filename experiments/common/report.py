"""What an experiment leaves behind: CSV files, plots, and report.md about them."""

from __future__ import annotations

import argparse
import csv
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from harness import results as files

from .checkpoint import write_whole
from .claims import Claim, judged, parsed, section
from .launch import Launch
from .training import Result, Row

_PACKAGES = ("torch", "torchvision", "scikit-learn", "pycocotools", "triton")
_COLOURS = ("#1971c2", "#e8590c", "#2f9e44", "#9c36b5", "#c92a2a", "#0b7285", "#868e96", "#5c940d")


class Described(Protocol):
    """A data set that says what it is."""

    @property
    def description(self) -> str: ...


class Report:
    """Collects text, tables and plots in the order given; `save` writes them to `launch.out`.

    Files are written by the leading process only.
    """

    def __init__(self, launch: Launch, title: str, question: str) -> None:
        self._launch = launch
        self._parts = [f"# {title}", question.strip()]

    def text(self, paragraph: str) -> None:
        """A paragraph, or a heading."""
        self._parts.append(paragraph.strip())

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table in the report and `name`.csv beside it; columns are the rows' keys."""
        columns = _columns(rows)
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows]
        self._parts.append("\n".join(lines))
        self.csv(name, rows)

    def claims(self, claims: Sequence[Claim], **tables: Sequence[Mapping[str, Any]]) -> None:
        """The section of verdicts; `tables` are the CSV files' rows, by the files' names."""
        written = {
            name: parsed([{column: row.get(column) for column in _columns(rows)} for row in rows])
            for name, rows in tables.items()
        }
        self._parts.append(section([judged(claim, written[claim.file]) for claim in claims]))

    def csv(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """`name`.csv, with all digits."""

        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, _columns(rows), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)

        self._write(f"{name}.csv", write)

    def plot(self, name: str, caption: str, draw: Callable[[Any], None], panels: int = 1) -> None:
        """`name`.png; `draw` gets the axes, a list of them where there are several panels."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        if self._launch.leads:
            figure, axes = pyplot.subplots(
                1, panels, figsize=(1.5 + 4.5 * panels, 4), squeeze=False, layout="constrained"
            )
            draw(axes[0, 0] if panels == 1 else list(axes[0]))
            self._write(f"{name}.png", lambda path: figure.savefig(path, dpi=120, format="png"))
            pyplot.close(figure)
        self._parts.append(f"![{caption}]({name}.png)\n\n*{caption}*")

    def curves(self, caption: str, histories: Mapping[str, Sequence[Row]]) -> None:
        """curves.png: training and test error, one pair of curves for each history."""
        self.plot("curves", caption, lambda axes: error_curves(axes, histories))

    def save(
        self,
        images: Described,
        results: Sequence[Result],
        history: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """report.md, which ends with the data, the machine, versions, the commit and times; and
        history.csv: `history`, by default every row of every run."""
        launch = self._launch
        if history is None:
            history = [{"run": result.name, **row} for result in results for row in result.history]
        self.csv("history", history)
        facts = files.facts(launch.device, *_PACKAGES)
        machine = facts["machine"]
        minutes = sum(result.seconds for result in results) / 60
        changed = ", with uncommitted changes" if facts["dirty"] else ""
        lines = [
            f"- command: `{_command()}`",
            f"- data: {images.description}",
            f"- machine: {files.chip(machine)}; {machine['system']}; {launch.world} process(es), "
            f"{str(launch.dtype).removeprefix('torch.')}, seed {launch.seed}",
            "- versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v),
            f"- commit: {facts['commit'] or 'unknown'}{changed}",
            f"- training took {minutes:.1f} minutes; written "
            f"{datetime.now(timezone.utc).isoformat(timespec='minutes')}",
        ]
        text = "\n\n".join([*self._parts, "## How it was made", "\n".join(lines)]) + "\n"
        self._write("report.md", lambda path: path.write_text(text, encoding="utf-8"))
        if launch.leads:
            print(f"{launch.out / 'report.md'}")

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        if self._launch.leads:
            write_whole(self._launch.out / name, write)


def mean_and_deviation(values: Sequence[float]) -> str:
    """ "mean ± standard deviation", as in Table 6; the mean alone of a single value."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for all `rows` that differ in their "seed" and in floats: of these mean ± deviation."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        same = (v for k, v in row.items() if k != "seed" and not isinstance(v, float))
        groups.setdefault(tuple(same), []).append(row)
    return [
        {
            key: mean_and_deviation([row[key] for row in group])
            if isinstance(value, float)
            else value
            for key, value in group[0].items()
            if key != "seed"
        }
        for group in groups.values()
    ]


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return (
        f"{value:,.2f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def _command() -> str:
    """What makes the same report again, wherever it is put."""
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--out")
    _, others = where.parse_known_args(sys.argv[1:])
    program = Path(sys.argv[0])
    return shlex.join(["python", f"{program.parent.name}/{program.name}", *others])


def measured(history: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Iterations and values of the rows in which `key` was measured."""
    rows = [row for row in history if key in row]
    return [row["iteration"] for row in rows], [row[key] for row in rows]


def error_curves(axes: Any, curves: Mapping[str, Sequence[Row]], title: str = "") -> None:
    """Training (thin, dashed) and test (bold) error against iterations, as in Fig. 1, 4 and 6."""
    for colour, (label, history) in zip(_cycled(len(curves)), curves.items(), strict=True):
        axes.plot(*measured(history, "training_error"), "--", color=colour, linewidth=0.8)
        axes.plot(*measured(history, "test_error"), color=colour, linewidth=2, label=label)
    axes.set(title=title, xlabel="iteration", ylabel="error (%)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="bold: test, dashed: training", title_fontsize=7)


def _cycled(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]
