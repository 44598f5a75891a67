"""The committed reports, their index, and the results of docs/paper.md.

    python experiments/publish.py                    writes index and page from experiments/reports
    python experiments/publish.py --from runs/all    takes over the reports of all.py before that
    python experiments/publish.py --check            exit code 1 where they are not what files say

Verdicts and figures are those of the reports, and verdicts are judged again from the CSV files.
Text outside the marks `<!-- NAME -->` and `<!-- end of NAME -->` is kept.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from common import index
from common.claims import Claim, Finding, Rows, column, differences, parsed
from harness.results import ROOT, markdown

_FIGURE = re.compile(r"^!\[([^\]]*)\]\(([^)/]+\.png)\)$", re.MULTILINE)
_KEPT = ("report.md", "*.csv", "*.png")


def _multiply_adds(rows: Rows, *networks: str) -> list[float]:
    """In billions."""
    counted = (column(rows, "multiply_adds", network=network) for network in networks)
    return [count / 1e9 for (count,) in counted]


def _share_of_vgg(rows: Rows) -> Finding:
    ours, vgg = _multiply_adds(rows, "resnet34 A", "vgg19")
    share = 100 * ours / vgg
    text = f"{ours:.2f} of {vgg:.2f} billion multiply-adds, {share:.1f} %."
    return Finding(text, 1 - abs(share - 18))


def _below_vgg(rows: Rows) -> Finding:
    deep, vgg16, vgg19 = _multiply_adds(rows, "resnet152 1x1", "vgg16", "vgg19")
    text = f"{deep:.2f} beside {vgg16:.2f} and {vgg19:.2f} billion multiply-adds."
    return Finding(text, min(vgg16, vgg19) - deep)


NETWORKS = (
    *("plain18", "plain34", "resnet18", "resnet34 A", "resnet34", "resnet34 C", "resnet50 1x1"),
    *("resnet50", "resnet101 1x1", "resnet101", "resnet152 1x1", "resnet152", "vgg16", "vgg19"),
    *(f"cifar.resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202)),
)
# Of benchmarks/results/complexity.json, which is counted and not measured.
COMPLEXITY = [
    Claim(
        "34 layers at a fifth of VGG-19",
        "3.3, Fig. 3",
        "The 34-layer network has 3.6 billion FLOPs (multiply-adds), only 18 % of VGG-19's 19.6 "
        "billion.",
        "The share is 18 % within one point.",
        _share_of_vgg,
        "complexity",
    ),
    Claim(
        "152 layers below VGG",
        "4.1, Table 1",
        "Although the depth is much increased, the 152-layer network (11.3 billion FLOPs) still "
        "has lower complexity than VGG-16 and VGG-19 (15.3 and 19.6 billion).",
        "Fewer multiply-adds than either; the margin is in billions.",
        _below_vgg,
        "complexity",
    ),
]


def claim_table(found: list[tuple[Claim, Finding]]) -> str:
    """Claims beside what was found."""
    rows = [["claim", "the paper", "here", "verdict"]]
    for claim, finding in found:
        margin = "" if finding.margin is None else f"; margin {index.margin(finding)}"
        spread = "" if finding.spread is None else f", spread {index.spread(finding)}"
        verdict = f"**{finding.verdict}**{margin}{spread}"
        rows.append([f"{claim.name} ({claim.source})", claim.paper, finding.text, verdict])
    return markdown([index.escaped(row) for row in rows])


def results(reports: Path) -> str:
    """The page's part with figures and verdicts."""
    times = index.runs(reports)
    parts = []
    for name in index.EXPERIMENTS:
        text = (reports / name / "report.md").read_text(encoding="utf-8")
        path = f"../experiments/reports/{name}"
        run = times.get(name)
        parts.append(f"### {text.splitlines()[0].removeprefix('# ')}")
        parts += [f"![{caption}]({path}/{file})" for caption, file in _FIGURE.findall(text)]
        parts.append(claim_table(index.findings(reports / name, index.claims(name))))
        parts.append(
            f"[Report]({path}/report.md), by `python experiments/{name}.py`"
            + (f": {run.time()}." if run else ".")
        )
    return "\n\n".join(parts)


def costs() -> str:
    """The page's part on complexity."""
    import complexity  # a benchmark, which lies where `common` has found its harness

    record = json.loads((ROOT / "benchmarks/results/complexity.json").read_text())
    rows = parsed(record["networks"])
    found = [(claim, claim.judge(rows)) for claim in COMPLEXITY]
    by_name = {row["network"]: row for row in record["networks"]}
    table = complexity.table([by_name[name] for name in NETWORKS])
    return f"{claim_table(found)}\n\n{table}"


def marked(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of `name`."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"there is no pair of marks {begin.strip()} and {end.strip()}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def pages(root: Path) -> Iterator[tuple[Path, str]]:
    """The generated pages of the checkout in `root`, and what they are to say."""
    reports = root / "experiments/reports"
    path = reports / "README.md"
    yield path, marked(path.read_text(encoding="utf-8"), "verdicts", index.table(reports))
    path = root / "docs/paper.md"
    text = marked(path.read_text(encoding="utf-8"), "results", results(reports))
    yield path, marked(text, "complexity", costs())


def take_over(folder: Path, reports: Path) -> None:
    """Replaces reports by those of `folder` that are done; raises ValueError for quick ones."""
    found = index.runs(folder)
    times = index.runs(reports)
    for name, run in found.items():
        if run.status != "done":
            continue
        if "--quick" in run.command:
            raise ValueError(f"{folder / name} is of a quick run, which shows nothing")
        target = reports / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for pattern in _KEPT:
            for path in (folder / name).glob(pattern):
                shutil.copyfile(path, target / path.name)
        times[name] = run
        print(f"{target}: {run.time()}")
    index.write_runs(reports, times)


def parse(arguments: list[str]) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    one = options.add_mutually_exclusive_group()
    one.add_argument("--from", type=Path, dest="source", metavar="DIR", help="all.py's --out")
    one.add_argument("--check", action="store_true", help="write nothing")
    return options.parse_args(arguments)


def main(arguments: list[str], root: Path = ROOT) -> int:
    options = parse(arguments)
    reports = root / "experiments/reports"
    try:
        if options.source:
            take_over(options.source, reports)
        wrong = [
            difference
            for name in index.EXPERIMENTS
            for difference in differences(reports / name, index.claims(name))
        ]
        stale = [(p, text) for p, text in pages(root) if p.read_text(encoding="utf-8") != text]
    except (OSError, KeyError, ValueError) as error:
        print(f"error: {error!r}", file=sys.stderr)
        return 1
    for difference in wrong:
        print(f"{difference}")
    for path, text in stale:
        print(f"{path.relative_to(root)} {'is out of date' if options.check else 'written'}")
        if not options.check:
            path.write_text(text, encoding="utf-8")
    return int(bool(wrong) or (options.check and bool(stale)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
