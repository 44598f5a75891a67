"""The support matrix: which combinations are run, what becomes a row, and what the table says."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import matrix
import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = {"cuda": False, "compiler": "GNU 12.2.0"}
VERSIONS = {"python": "3.12.1", "torch": "2.9.1", "torchvision": "0.24.1", "triton": "3.5.1"}


def program(folder: Path, name: str, script: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_interpreters_that_do_not_work_are_not_found(tmp_path: Path) -> None:
    """As a version manager's stand-ins do not for versions that are not chosen."""
    shim = program(tmp_path, "python3.10", "echo 'python3.10: command not found' >&2; exit 127")
    old = program(tmp_path, "python3.9", "echo 3.9")
    good = program(tmp_path, "python", "echo 3.13")
    assert matrix.find([shim, old, str(tmp_path / "none"), good]) == {"3.13": good}


def test_settings_that_hold_pip_back_are_put_aside_for_the_newest_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    constraint = tmp_path / "constraints.txt"
    constraint.write_text("torch<=2.10\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(constraint))
    monkeypatch.delenv("PIP_CONFIG_FILE", raising=False)
    shown = {}
    for choice in matrix.TORCHES:
        _, environment = matrix.pip_settings(choice)
        show = "import os; print(os.environ['PIP_CONSTRAINT'], os.environ.get('PIP_CONFIG_FILE'))"
        shown[choice] = matrix.run(sys.executable, "-c", show, cwd=tmp_path, **environment).strip()
    assert shown["oldest"] == shown["default"] == f"{constraint} None"
    assert shown["newest"] == "/dev/null"
    assert matrix.pip_settings("oldest")[0] == ["torch==2.9.*"]


def test_a_failing_command_says_why(tmp_path: Path) -> None:
    pip = program(
        tmp_path,
        "pip",
        "echo 'ERROR: No matching distribution found for torch==2.9.*'; echo; echo bye; exit 1",
    )
    with pytest.raises(matrix.UnavailableError, match=r"^ERROR: No matching distribution"):
        matrix.run(pip, cwd=tmp_path)
    with pytest.raises(matrix.UnavailableError, match="No such file"):
        matrix.run(tmp_path / "none", cwd=tmp_path)


def test_tests_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(
        "<testsuites><testsuite>"
        "<testcase classname='tests.a' name='one'/><testcase classname='tests.a' name='two'/>"
        "<testcase classname='tests.a' name='three'><skipped/></testcase>"
        "<testcase classname='tests.b' name='four'><failure/></testcase>"
        "<testcase classname='tests.b' name='five'><error/></testcase>"
        "</testsuite></testsuites>"
    )
    assert matrix.read_tests(report) == (2, 1, ["tests.b::four", "tests.b::five"])


def row(**changed: object) -> matrix.Row:
    fields = {"outcome": "passed", "versions": VERSIONS, "build": BUILD, "smoke": True}
    fields |= {"passed": 5, "skipped": 2, **changed}
    return matrix.Row("3.12", "oldest", "c" * 40, **fields)


def test_the_table_says_what_was_run_and_why_not() -> None:
    rows = [
        row(),
        row(build={"cuda": True}, outcome="failed", failures=["a::b"], reason="1 tests fail"),
        row(passed=None),
        matrix.Row("3.12", "oldest", "c" * 40, "unavailable", "no way"),
    ]
    record = {
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "a chip", "system": "Linux"},
        "rows": [asdict(row) for row in rows],
    }
    lines = matrix.table(record).splitlines()
    assert lines[2:] == [
        "| 3.12.1 | 2.9.1 | 0.24.1 | 3.5.1 | CPU | passed | 5 passed, 2 skipped |",
        "| 3.12.1 | 2.9.1 | 0.24.1 | 3.5.1 | CPU and CUDA | passed | 5 passed, 2 skipped, "
        "**1 failed** |",
        "| 3.12.1 | 2.9.1 | 0.24.1 | 3.5.1 | CPU | passed | not run |",
        "| 3.12 | oldest | – | – | – | unavailable: no way | – |",
        "",
        "a chip, Linux; 2026-01-02, commit cccccccccc.",
    ]


def test_rows_are_written_as_they_come_and_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three combinations: at first the second fails, and the run is stopped at the third."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    tried: list[str] = []
    fails = {"default"}

    def try_out(combination: matrix.Combination, wheel: Path) -> None:
        tried.append(combination.row.torch)
        if combination.row.torch == "newest" and fails:
            raise KeyboardInterrupt
        if combination.row.torch in fails:
            raise matrix.UnavailableError("it broke")
        combination.row.outcome, combination.row.passed = "passed", 1

    monkeypatch.setattr(matrix, "build", lambda *_: Path("wheel"))
    monkeypatch.setattr(matrix.Combination, "try_out", try_out)
    monkeypatch.setattr(matrix.Combination, "same_as_default", lambda _: False)
    python = program(tmp_path, "python", "echo 3.12")
    result = tmp_path / "matrix.json"
    command = ["--python", python, "--json", str(result)]
    with pytest.raises(KeyboardInterrupt):
        matrix.main(command)
    rows = json.loads(result.read_text())["rows"]
    assert [(r["outcome"], r["reason"]) for r in rows] == [("passed", None), ("failed", "it broke")]

    fails.clear()
    assert matrix.main(command) == 0
    assert tried == ["oldest", "default", "newest", "default", "newest"]

    monkeypatch.setattr(matrix, "_TESTED", ("no such file, so nothing has changed",))
    held = [matrix.Row(**r) for r in json.loads(result.read_text())["rows"]]
    assert all(matrix.still_holds(row) for row in held)
    held[0].passed = None
    assert not matrix.still_holds(held[0])
    held[1].commit = "0" * 40
    assert not matrix.still_holds(held[1])
