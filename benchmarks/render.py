"""Reports from the result files: docs/results.md, docs/predicted.md, and the README's tables.

    python benchmarks/render.py            writes all of them
    python benchmarks/render.py --check    exit code 1 where they are not what the files say

Every JSON file under benchmarks/results/ that throughput.py, training.py or layers.py wrote has its
part of docs/results.md; what predict.py wrote is no result and has a report of its own. What a
profile explains goes into a Markdown file of the same name beside it, and is taken in.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import layers
import matrix
import training
from harness.comparison import Comparison, Entry, cells, ranked
from harness.results import ROOT, chip, markdown, parser
from time_model import report as predicted

_TABLE = re.compile(r"(<!-- results of (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def comparisons(record: dict[str, Any]) -> list[Comparison]:
    """The comparisons that throughput.py recorded."""
    return [
        Comparison(**{**found, "entries": [Entry(**entry) for entry in found["entries"]]})
        for found in record["comparisons"]
    ]


def verdict(comparison: Comparison) -> str:
    """Who wins, and by how much."""
    if comparison.gate_is_red():
        return "A result of ours is wrong: no speed-up is stated."
    ours = comparison.best_of_ours()
    # What computes in fewer bits has no speed-up.
    best = next((e for e in ranked(comparison) if not e.ours and e.speedup), None)
    if ours is None or best is None or best.speedup is None:
        return "Nothing to compare was measured."
    times = best.speedup
    if times >= 1:
        found = f"**{ours.title}** wins: {times:.2f}× the best peer, {best.title}."
    else:
        found = f"**{best.title}** wins: {1 / times:.2f}× ours, {ours.title}."
    if ours.floor_share:
        found += f" Ours runs at {ours.floor_share:.0%} of the roofline floor."
    return found


def throughput_part(record: dict[str, Any]) -> Iterator[str]:
    """One table for each comparison, and who was not measured."""
    for comparison in comparisons(record):
        yield f"### {comparison.title()}"
        yield verdict(comparison)
        yield markdown([cell.strip() for cell in row] for row in cells(comparison))
        absent = [entry for entry in comparison.entries if entry.rate is None]
        if absent:
            yield "\n".join(f"- {e.status}: {e.title} – {e.reason}" for e in absent)


def training_part(record: dict[str, Any]) -> Iterator[str]:
    """The steps' table."""
    yield training.table([training.Row(**row) for row in record["rows"]])


def layers_part(record: dict[str, Any]) -> Iterator[str]:
    """The layers' table."""
    yield f"```text\n{layers.table(record['rows'], record.get('register_peak'))}\n```"


def part(path: Path, folder: Path) -> Iterator[str]:
    """A result file's part of a report in `folder`; nothing for a file of another kind."""
    record = json.loads(path.read_text())
    rows = record.get("rows") or [{}]
    if "comparisons" in record:
        body = throughput_part(record)
    elif "gates" in record:
        body = training_part(record)
    elif "floor_seconds" in rows[0]:
        body = layers_part(record)
    else:
        return
    versions = ", ".join(f"{name} {v}" for name, v in record["versions"].items() if v)
    changed = " with uncommitted changes" if record["dirty"] else ""
    name = path.relative_to(ROOT)
    yield f"## {name.relative_to('benchmarks/results').with_suffix('')}"
    yield (
        f"[{name.name}]({os.path.relpath(path, folder)}): {chip(record['machine'])}; "
        f"{versions}; "
        f"{record['date'][:10]}, commit {record['commit'][:10]}{changed}."
    )
    yield from body
    if (plot := path.with_suffix(".png")).exists():
        yield f"![{name.stem}]({os.path.relpath(plot, folder)})"
    if (reasons := path.with_suffix(".md")).exists():
        yield reasons.read_text().strip()


def report() -> str:
    """docs/results.md."""
    parts = [
        "# Results",
        "Written by `python benchmarks/render.py` from the result files, which hold every sample. "
        "A rate is the median of interleaved rounds; *ours is*: how many times faster our fastest "
        "is; *error*: ‖logits − truth‖ / ‖truth‖ against float64; *of floor*: the roofline's time, "
        "from this machine's measured peaks, over ours; *new batch*: until the first logits of "
        "another batch size.",
    ]
    for path in sorted((ROOT / "benchmarks/results").rglob("*.json")):
        parts += part(path, ROOT / "docs")
    return "\n\n".join(parts) + "\n"


def summary(record: dict[str, Any]) -> str:
    """One row for each implementation, fastest first, a pair of columns for each comparison in
    which one was measured."""
    shown = [found for found in comparisons(record) if ranked(found)]
    order = dict.fromkeys(entry.key for found in shown for entry in ranked(found))
    batches = len({found.batch for found in shown}) > 1
    headings = [""]
    for found in shown:
        name = _SHORT[found.dtype] + (f" × {found.batch}" if batches else "")
        headings += [f"{name} images/s", f"{name} error"]
    rows = []
    for key in order:
        row = []
        for comparison in shown:
            entry = next(entry for entry in comparison.entries if entry.key == key)
            title, ours = entry.title, entry.ours
            if entry.rate is None:
                row += ["–", "–"]
            else:
                row += [f"{entry.rate:,.1f}", f"{entry.error:.1e}"]
        rows.append([f"**{cell}**" if ours and cell != "–" else cell for cell in (title, *row)])
    return markdown([headings, *rows])


def readme() -> str:
    """README.md with the tables of the files that its marks name."""

    def table(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        record = json.loads((ROOT / name).read_text())
        write = summary if "comparisons" in record else matrix.table
        return f"{begin}{write(record)}\n{end}"

    return _TABLE.sub(table, (ROOT / "README.md").read_text())


def main(arguments: list[str] | None = None) -> int:
    command = parser(__doc__)
    command.add_argument("--check", action="store_true", help="write nothing")
    options = command.parse_args(arguments)
    stale = [
        (path, text)
        for path, text in (
            (ROOT / "docs/results.md", report()),
            (ROOT / "docs/predicted.md", predicted.report(ROOT)),
            (ROOT / "README.md", readme()),
        )
        if not path.exists() or path.read_text() != text
    ]
    for path, text in stale:
        print(f"{path.relative_to(ROOT)} {'is out of date' if options.check else 'written'}")
        if not options.check:
            path.write_text(text)
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
