"""The experiments together: one folder with a report of each, their verdicts and wall times."""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from harness.results import markdown

from .checkpoint import write_whole
from .claims import Claim, Finding, read

HERE = Path(__file__).resolve().parents[1]
# In the paper's order.
EXPERIMENTS = (
    "degradation",
    "gradient_flow",
    "shortcuts",
    "imagenet",
    "evaluate",
    "cifar",
    "over_1000_layers",
    "responses",
    "progressive_deepening",
    "detection",
    "localization",
)


@dataclass
class Run:
    """An experiment's run by all.py, a row of times.csv.

    command: what was run, without where to. code: a digest of the code that ran.
    seconds: wall time, of all starts together. others: how many of the other experiments ran
        beside it, on average over that time.
    status: "running" (which a run that was killed stays), "failed" or "done".
    """

    experiment: str
    command: str
    code: str
    seconds: float = 0.0
    others: float = 0.0
    status: str = "running"

    def time(self) -> str:
        """For people."""
        return f"{self.seconds / 60:.1f} min beside {self.others:.1f} others"


def runs(folder: Path) -> dict[str, Run]:
    """What `folder`/times.csv says, by experiment."""
    path = folder / "times.csv"
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {
            row["experiment"]: Run(
                row["experiment"],
                row["command"],
                row["code"],
                float(row["seconds"]),
                float(row["others"]),
                row["status"],
            )
            for row in csv.DictReader(file)
        }


def write_runs(folder: Path, found: Mapping[str, Run]) -> None:
    """Writes `folder`/times.csv, in the paper's order."""

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            names = [field.name for field in fields(Run)]
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(found[name]) for name in EXPERIMENTS if name in found)

    write_whole(folder / "times.csv", write)


def claims(experiment: str) -> Sequence[Claim]:
    """The experiment's claims."""
    return importlib.import_module(experiment).CLAIMS


def findings(folder: Path, found: Iterable[Claim]) -> list[tuple[Claim, Finding]]:
    """The claims, judged by the CSV files in `folder`."""
    return [(claim, claim.judge(read(folder / f"{claim.file}.csv"))) for claim in found]


def margin(found: Finding) -> str:
    """For a table."""
    return "–" if found.margin is None else f"{found.margin:.3g}"


def spread(found: Finding) -> str:
    """For a table."""
    return "–" if found.spread is None else f"{round(found.spread, 9):.3g}"


def table(folder: Path) -> str:
    """The verdicts of the reports in `folder`, which link to them, with the wall times."""
    times = runs(folder)
    rows = [["experiment", "claim", "source", "verdict", "margin", "spread", "wall time"]]
    for name in EXPERIMENTS:
        run = times.get(name)
        report = folder / name / "report.md"
        if not report.exists() or (run and run.status != "done"):
            state = "not run" if run is None else "failed" if run.status == "failed" else "not done"
            rows.append([name, "", "", state, "", "", run.time() if run else ""])
            continue
        first = [f"[{name}]({name}/report.md)", run.time() if run else ""]
        for claim, found in findings(folder / name, claims(name)):
            rows.append([first[0], claim.name, claim.source, f"**{found.verdict}**"])
            rows[-1] += [margin(found), spread(found), first[1]]
            first = ["", ""]
    return markdown([escaped(row) for row in rows])


def escaped(cells: Iterable[str]) -> list[str]:
    """Cells for a Markdown table."""
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]


def cores() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
