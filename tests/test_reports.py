"""Reports of the paper's claims: verdicts follow from the data, in the reports, their index and
docs/paper.md; and all.py, which makes them."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="the experiments' data comes through torchvision")

import publish
from common import index
from common.claims import Claim, Finding, Rows, column, differences, judged, read, spread
from common.launch import Launch
from common.report import Report

everything = importlib.import_module("all")  # a builtin's name

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "experiments"
REPORTS = EXPERIMENTS / "reports"


# What is committed.


def test_every_experiment_is_one_of_all() -> None:
    programs = {path.stem for path in EXPERIMENTS.glob("*.py")} - {"all", "publish"}
    assert sorted(programs) == sorted(index.EXPERIMENTS)


@pytest.mark.parametrize("name", index.EXPERIMENTS)
def test_verdicts_follow_from_the_data(name: str) -> None:
    claims = index.claims(name)
    assert claims
    assert len({claim.name for claim in claims}) == len(claims)
    assert differences(REPORTS / name, claims) == []


def test_index_and_page_are_what_the_reports_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert publish.main(["--check"]) == 0, capsys.readouterr().out


def with_a_wrong_number(folder: Path, claim: Claim) -> str | None:
    """The first cell of the claim's file by which its paragraph would change, made wrong."""
    path = folder / f"{claim.file}.csv"
    before = judged(claim, read(path))
    with path.open(newline="", encoding="utf-8") as file:
        columns, *rows = csv.reader(file)
    for row in rows:
        for place, value in enumerate(row):
            if not re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", value):
                continue
            row[place] = repr(10 * float(value) + 7)
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows([columns, *rows])
            try:
                if judged(claim, read(path)) != before:
                    return columns[place]
            except ValueError:
                return columns[place]
            row[place] = value
    return None


@pytest.mark.parametrize("name", index.EXPERIMENTS)
def test_a_wrong_number_is_found(name: str, tmp_path: Path) -> None:
    """In what every claim reads that is not "not shown"."""
    found = index.findings(REPORTS / name, index.claims(name))
    shown = [claim for claim, finding in found if finding.margin is not None]
    if not shown:
        pytest.skip("every claim is not shown")
    for number, claim in enumerate(shown):
        folder = tmp_path / str(number)
        shutil.copytree(REPORTS / name, folder)
        assert with_a_wrong_number(folder, claim), f"{claim.name} reads no number"
        wrong = differences(folder, index.claims(name))
        assert any(f": {claim.name}: " in line for line in wrong), (claim.name, wrong)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_experiments_anew_find_the_same(tmp_path: Path) -> None:
    times = index.runs(REPORTS)
    shortest = sorted(times, key=lambda name: times[name].seconds)[:2]
    assert len(shortest) == 2
    assert everything.main(["--out", str(tmp_path), "--only", *shortest]) == 0
    for name in shortest:
        claims = index.claims(name)
        assert differences(tmp_path / name, claims) == []
        before, now = (
            {claim.name: found.verdict for claim, found in index.findings(folder / name, claims)}
            for folder in (REPORTS, tmp_path)
        )
        assert now == before


# Differences, on reports that are made here.


def _lower(rows: Rows) -> Finding:
    plain, residual = (column(rows, "error (%)", network=kind) for kind in ("plain", "residual"))
    margin = sum(plain) / len(plain) - sum(residual) / len(residual) - 1
    return Finding(f"{margin + 1:.2f} points lower.", margin, spread(plain, residual))


LOWER = Claim("residual lower", "Fig. 4", "It is lower.", "By at least a point.", _lower)
UNSEEN = Claim("long", "4.2", "It is long.", "It is.", lambda rows: Finding("Too short.", None))
ROWS = [
    {"network": kind, "seed": seed, "parameters": 1234, "error (%)": error, "note": note}
    for kind, seed, error, note in (
        ("plain", 0, 10.125, None),
        ("plain", 1, 12.0, "1.5"),
        ("residual", 0, 2.5, None),
        ("residual", 1, 3.0, "a ± b"),
    )
]


def write_report(folder: Path, claims: list[Claim] = [LOWER, UNSEEN]) -> Path:  # noqa: B006
    """A report as an experiment writes it."""
    import torch

    pages = Report(
        Launch(None, folder, torch.device("cpu"), torch.float32, 0, 0, True, 30.0), "Fake", "Is it?"
    )
    pages.table("results", ROWS)
    pages.claims(claims, results=ROWS)
    pages.save(dataclasses.make_dataclass("Data", ["description"])("none"), [], [{"run": "a"}])
    return folder


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_true_report_has_no_differences(tmp_path: Path) -> None:
    folder = write_report(tmp_path)
    assert differences(folder, [LOWER, UNSEEN]) == []
    text = (folder / "report.md").read_text()
    deviation = "margin 7.31, spread over seeds 1.33"
    assert f"**residual lower** (Fig. 4): **holds**; {deviation}." in text
    assert "**long** (4.2): **not shown**." in text
    assert "| plain | 0 | 1,234 | 10.12 | – |" in text
    assert "| plain | 1 | 1,234 | 12.00 | 1.5 |" in text


@pytest.mark.parametrize(
    ("file", "old", "new", "found"),
    [
        ("results.csv", "3.0", "13.0", "residual lower: report.md does not say"),
        ("results.csv", "3.0", "13.0", r"results.csv: error \(%\) is 13.0, and 3.00 in report.md"),
        ("results.csv", "1234", "1235", "results.csv: parameters is 1235, and 1,234 in report"),
        ("results.csv", "10.125", "10.131", "is 10.131, and 10.12 in report.md"),
        ("results.csv", "plain,0", "plain,", "results.csv: seed is , and 0 in report.md"),
        ("report.md", "a ± b", "a ± c", "results.csv: note is a ± b, and a ± c in report.md"),
        ("results.csv", "residual,1,1234,3.0,a ± b\n", "", "results.csv has 3 rows, and report.md"),
        ("results.csv", "plain", "plane", "residual lower: report.md does not say"),
        ("results.csv", "error (%)", "mistakes", r"residual lower: cannot be judged \(KeyError"),
        ("report.md", "**holds**", "**does not hold**", "residual lower: report.md does not say"),
        ("report.md", "Too short", "Too long", "long: report.md does not say"),
        ("report.md", "## How", "**third** (1): **holds**.\n\n## How", "on other claims too"),
    ],
)
def test_what_differs_is_named(file: str, old: str, new: str, found: str, tmp_path: Path) -> None:
    folder = write_report(tmp_path)
    replace(folder / file, old, new)
    assert re.search(found, "\n".join(differences(folder, [LOWER, UNSEEN])))


def test_a_report_or_claim_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert differences(tmp_path, [LOWER]) == [f"{tmp_path.name}: there is no report.md"]
    folder = write_report(tmp_path, [LOWER])
    (found,) = differences(folder, [LOWER, UNSEEN])
    assert "long: report.md does not say" in found
    (found,) = differences(write_report(tmp_path), [LOWER])
    assert "on other claims too" in found


# The index and the page.


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with two experiments, their reports, and the two pages."""
    monkeypatch.setattr(index, "EXPERIMENTS", ("one", "two"))
    monkeypatch.setattr(index, "claims", lambda name: [LOWER, UNSEEN])
    for page in ("docs/paper.md", "experiments/reports/README.md"):
        (tmp_path / page).parent.mkdir(parents=True)
        shutil.copy(ROOT / page, tmp_path / page)
    for name in ("one", "two"):
        folder = write_report(tmp_path / "experiments/reports" / name)
        replace(folder / "report.md", "Is it?", "Is it?\n\n![A curve.](curve.png)")
    return tmp_path


def test_the_pages_have_verdicts_and_figures(checkout: Path) -> None:
    assert publish.main(["--check"], checkout) == 1
    assert publish.main([], checkout) == 0
    assert publish.main(["--check"], checkout) == 0
    page = (checkout / "docs/paper.md").read_text()
    assert "\n![A curve.](../experiments/reports/two/curve.png)\n" in page
    row = "It is lower. | 8.31 points lower. | **holds**; margin 7.31, spread 1.33 |"
    assert f"\n| residual lower (Fig. 4) | {row}\n" in page
    assert "**holds**; margin 0.436" in page  # 34 layers beside VGG-19
    reports = (checkout / "experiments/reports/README.md").read_text()
    row = "residual lower | Fig. 4 | **holds** | 7.31 | 1.33 |  |"
    assert (
        f"\n| [one](one/report.md) | {row}\n|  | long | 4.2 | **not shown** | – | – |  |" in reports
    )


@pytest.mark.parametrize(
    ("page", "old", "new"),
    [
        ("docs/paper.md", "8.31 points", "8.91 points"),
        ("docs/paper.md", "**holds**; margin 0.436", "**holds**; margin 0.936"),
        ("docs/paper.md", "| resnet50 | 50 | 25.56", "| resnet50 | 50 | 25.57"),
        ("experiments/reports/README.md", "**not shown**", "**holds**"),
        ("experiments/reports/one/results.csv", "10.125", "10.126"),
    ],
)
def test_a_page_that_differs_is_found(page: str, old: str, new: str, checkout: Path) -> None:
    assert publish.main([], checkout) == 0
    replace(checkout / page, old, new)
    assert publish.main(["--check"], checkout) == 1


def test_text_outside_the_marks_is_kept(checkout: Path) -> None:
    replace(checkout / "docs/paper.md", "# The paper\n", "# The paper\n\nBy hand.\n")
    assert publish.main([], checkout) == 0
    before, after = ((root / "docs/paper.md").read_text() for root in (ROOT, checkout))
    assert after.startswith("# The paper\n\nBy hand.\n")
    assert (
        after[after.index("<!-- end of complexity") :]
        == before[before.index("<!-- end of complexity") :]
    )
    replace(checkout / "docs/paper.md", "<!-- end of results -->", "")
    assert publish.main([], checkout) == 1


# all.py, with programs that take no time.

PROGRAM = """
import os, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
with open(out / "starts", "a") as file:
    print(os.environ["OMP_NUM_THREADS"], "--quick" in sys.argv, file=file)
time.sleep({seconds})
if {fails}:
    sys.exit("it went wrong")
(out / "report.md").write_text("# Fake")
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the programs are: `short` and `long` end well, `broken` does not."""
    folder = tmp_path / "experiments"
    (folder / "reports").mkdir(parents=True)
    for name, seconds, fails in (("short", 0.0, 0), ("broken", 0.0, 1), ("long", 1.0, 0)):
        (folder / f"{name}.py").write_text(PROGRAM.format(seconds=seconds, fails=fails))
    monkeypatch.setattr(index, "HERE", folder)
    monkeypatch.setattr(index, "EXPERIMENTS", ("short", "broken", "long"))
    monkeypatch.setattr(index, "claims", lambda name: [dataclasses.replace(UNSEEN, file="claims")])
    monkeypatch.setattr("common.index.read", lambda path: [])
    return folder


def starts(folder: Path) -> list[str]:
    return (folder / "starts").read_text().splitlines()


def test_all_runs_each_once_and_names_failures(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # the second time what failed only
        assert everything.main(["--out", str(out), "--jobs", "2"]) == 1
        shown = capsys.readouterr()
        assert f"error: broken failed; see {out / 'broken'}.log" in shown.err
    assert starts(out / "short") == starts(out / "long") == ["1 False"]
    assert starts(out / "broken") == ["1 False"] * 2
    assert "short: done before" in shown.out
    assert (out / "broken.log").read_text() == "it went wrong\n" * 2
    found = index.runs(out)
    assert {name: run.status for name, run in found.items()} == {
        "short": "done",
        "broken": "failed",
        "long": "done",
    }
    assert found["long"].command == "python experiments/long.py"
    assert found["long"].seconds >= 1
    page = (out / "index.md").read_text()
    assert (
        f"| [long](long/report.md) | long | 4.2 | **not shown** | – | – | {found['long'].time()} |"
        in page
    )
    assert f"| broken |  |  | failed |  |  | {found['broken'].time()} |" in page


def test_a_change_begins_anew(programs: Path, tmp_path: Path) -> None:
    run = ["--out", str(tmp_path / "out"), "--only", "short"]
    folder = tmp_path / "out/short"
    assert everything.main(run) == everything.main(run) == 0
    assert starts(folder) == ["1 False"]
    replace(programs / "short.py", "# Fake", "# False")
    assert everything.main(run) == 0
    assert starts(folder) == ["1 False"]  # in a folder that was emptied
    replace(programs / "short.py", "# False", "# Faked")
    assert everything.main([*run, "--keep"]) == 0
    assert starts(folder) == ["1 False"] * 2
    assert everything.main([*run, "--quick"]) == 0
    assert starts(folder) == ["1 True"]
    (folder / "report.md").unlink()
    assert everything.main([*run, "--quick"]) == 0
    assert starts(folder) == ["1 True"] * 2


def test_what_runs_beside_is_counted(programs: Path, tmp_path: Path) -> None:
    shutil.copy(programs / "long.py", programs / "short.py")
    for jobs in (1, 2):
        out = tmp_path / str(jobs)
        assert (
            everything.main(["--out", str(out), "--jobs", str(jobs), "--only", "short", "long"])
            == 0
        )
        others = [run.others for run in index.runs(out).values()]
        assert others == [0, 0] if jobs == 1 else min(others) > 0.3


def test_the_longest_starts_first(programs: Path) -> None:
    times = {
        name: index.Run(name, "", "", seconds, 0.0, "done")
        for name, seconds in (("short", 1.0), ("broken", 30.0))
    }
    index.write_runs(programs / "reports", times)
    assert index.runs(programs / "reports") == times
    assert everything.longest_first(index.EXPERIMENTS) == ["long", "broken", "short"]


def test_the_code_of_an_experiment(programs: Path) -> None:
    for folder in ("common", "detectors"):
        (programs / folder).mkdir()
        (programs / folder / "part.py").write_text("")
    replace(programs / "long.py", "import os", "from detectors import part\nimport os")
    before = {name: everything.code_of(name) for name in ("short", "long")}
    (programs / "detectors/part.py").write_text("changed = 1")
    after = {name: everything.code_of(name) for name in ("short", "long")}
    assert before["short"] == after["short"]
    assert before["long"] != after["long"]
    (programs / "common/part.py").write_text("changed = 1")
    assert everything.code_of("short") != after["short"]


def test_publishing_takes_over_what_is_done(checkout: Path, tmp_path: Path) -> None:
    source = tmp_path / "runs"
    write_report(source / "one")
    (source / "one/checkpoints").mkdir()
    (source / "one/checkpoints/a.pt").write_text("")
    write_report(source / "two")
    done = index.Run("one", "python experiments/one.py", "0", 90.0, 0.5, "done")
    broken = index.Run("two", "python experiments/two.py", "0", 90.0, 0.5, "failed")
    index.write_runs(source, {"one": done, "two": broken})
    kept = checkout / "experiments/reports"
    before = (kept / "two/report.md").read_bytes()
    assert publish.main(["--from", str(source)], checkout) == 0
    assert sorted(p.name for p in (kept / "one").iterdir()) == [
        "history.csv",
        "report.md",
        "results.csv",
    ]
    assert (kept / "two/report.md").read_bytes() == before
    assert list(index.runs(kept)) == ["one"]
    assert "| 1.5 min beside 0.5 others |" in (kept / "README.md").read_text()
    index.write_runs(source, {"one": dataclasses.replace(done, command="python x.py --quick")})
    assert publish.main(["--from", str(source)], checkout) == 1


@pytest.mark.thorough
def test_a_stop_stops_the_experiments_too(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the experiments' digits come with scikit-learn")
    command = [sys.executable, str(EXPERIMENTS / "all.py"), "--quick", "--out", str(tmp_path)]
    command += ["--only", "cifar"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "cifar/checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    assert children
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    stopped = index.runs(tmp_path)["cifar"]
    assert stopped.status == "running"
    assert subprocess.run(command, check=False).returncode == 0
    finished = index.runs(tmp_path)["cifar"]
    assert finished.status == "done"
    assert finished.seconds > stopped.seconds > 0
