"""Claims of the paper, and the rules that decide whether a run shows them.

A rule reads a report's CSV file alone, in which each training is a row, so anyone can judge a
committed report again. Rules are written before the run that they judge.
"""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

# A CSV file's rows; what reads as a number is one.
Rows = Sequence[Mapping[str, float | str]]


@dataclass(frozen=True)
class Finding:
    """What a rule found.

    text: what was found, with its numbers; where nothing can be said, why.
    margin: by how much the rule is met, in the unit of what it compares; negative where it is not;
        None where these rows cannot say, for example because a network was not trained.
    spread: the standard deviation over seeds of what is compared, the largest where there are
        several; None with one seed.
    """

    text: str
    margin: float | None
    spread: float | None = None

    @property
    def verdict(self) -> str:
        """ "holds", "does not hold" or "not shown"."""
        if self.margin is None:
            return "not shown"
        return "holds" if self.margin >= 0 else "does not hold"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    name: a few words, unique among an experiment's claims.
    source: the paper's section, figure or table, or where else the claim is from.
    paper: the claim, with the paper's numbers.
    rule: when it holds here, with every bound that `judge` has.
    judge: the rule. It raises no error on rows of a --quick run.
    file: the CSV file that it reads.
    """

    name: str
    source: str
    paper: str
    rule: str
    judge: Callable[[Rows], Finding]
    file: str = "results"


def read(path: Path) -> Rows:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return parsed(list(csv.DictReader(file)))


def parsed(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """`rows` as they are read back from a CSV file."""
    return [{key: _number(value) for key, value in row.items()} for row in rows]


def _number(value: Any) -> float | str:
    text = "" if value is None else str(value)
    try:
        return float(text)
    except ValueError:
        return text


def column(rows: Rows, name: str, **where: float | str) -> list[float]:
    """Column `name` of the rows whose columns are `where`, one value for each seed.

    Raises KeyError for a column, and ValueError for rows, that are not there.
    """
    chosen = [row[name] for row in rows if all(row[key] == value for key, value in where.items())]
    if not chosen or any(isinstance(value, str) for value in chosen):
        raise ValueError(f"no numbers in column {name!r} where {where}: {chosen}")
    return [float(value) for value in chosen]


def spread(*groups: Sequence[float]) -> float | None:
    """The largest standard deviation of `groups`; None where one has a single value."""
    if any(len(group) < 2 for group in groups):
        return None
    return max(statistics.stdev(group) for group in groups)


def judged(claim: Claim, rows: Rows) -> str:
    """The claim's paragraph in a report, with its verdict."""
    found = claim.judge(rows)
    margin = "" if found.margin is None else f"; margin {found.margin:.3g}"
    deviation = "" if found.spread is None else f", spread over seeds {round(found.spread, 9):.3g}"
    return "\n".join(
        (
            f"**{claim.name}** ({claim.source}): **{found.verdict}**{margin}{deviation}.",
            "",
            f"- The paper: {claim.paper}",
            f"- Rule: {claim.rule}",
            f"- Found: {found.text}",
        )
    )


HEADING = "## What the paper claims, and what is found here"


def section(paragraphs: Sequence[str]) -> str:
    """A report's section of verdicts, of what `judged` gives for each claim."""
    return "\n\n".join([HEADING, *paragraphs])


def differences(folder: Path, claims: Sequence[Claim]) -> list[str]:
    """Where the report in `folder` is not what its CSV files and `claims` say; empty where it is.

    Each claim is judged again, and each table of the report that is a CSV file's is compared with
    the file.
    """
    report = folder / "report.md"
    if not report.is_file():
        return [f"{folder.name}: there is no report.md"]
    text = report.read_text(encoding="utf-8")
    found = []
    paragraphs = []
    for claim in claims:
        try:
            paragraph = judged(claim, read(folder / f"{claim.file}.csv"))
        except (OSError, KeyError, ValueError, ArithmeticError) as error:
            found.append(f"{folder.name}: {claim.name}: cannot be judged ({error!r})")
            continue
        paragraphs.append(paragraph)
        if f"\n\n{paragraph}\n\n" not in text:
            found.append(f"{folder.name}: {claim.name}: report.md does not say\n{paragraph}")
    if not found and claims and f"\n\n{section(paragraphs)}\n\n## " not in text:
        found.append(
            f"{folder.name}: report.md's verdicts are on other claims too, or do not end it"
        )
    for path in sorted(folder.glob("*.csv")):
        found += [f"{folder.name}: {wrong}" for wrong in _wrong_cells(text, path)]
    return found


def _wrong_cells(report: str, path: Path) -> list[str]:
    """Cells of the table of `path` in a report, where it has one, that are not the file's."""
    with path.open(newline="", encoding="utf-8") as file:
        columns, *rows = csv.reader(file)
    lines = iter(report.splitlines())
    if "| " + " | ".join(columns) + " |" not in lines:  # goes on to the line after it
        return []
    next(lines)
    shown = itertools.takewhile(lambda line: line.startswith("| "), lines)
    cells = [line[2:-2].split(" | ") for line in shown]
    if len(cells) != len(rows):
        return [f"{path.name} has {len(rows)} rows, and report.md {len(cells)}"]
    return [
        f"{path.name}: {column} is {value}, and {cell} in report.md"
        for row, line in zip(rows, cells, strict=True)
        for column, value, cell in zip(columns, row, line, strict=True)
        if not _shows(cell, value)
    ]


def _shows(cell: str, value: str) -> bool:
    """Whether a table's cell is a CSV file's value, rounded to the digits that the cell has."""
    if cell == value or (cell, value) == ("–", ""):
        return True
    try:
        shown, exact = Decimal(cell.replace(",", "")), Decimal(value)
        last_digit = Decimal(1).scaleb(int(shown.as_tuple().exponent))
        return abs(shown - exact) <= last_digit / 2
    except (InvalidOperation, ValueError):
        return False
