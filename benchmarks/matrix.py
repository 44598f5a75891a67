"""The support matrix: what is committed, built, installed and tested with each Python and torch.

    python benchmarks/matrix.py                                every Python found on PATH
    python benchmarks/matrix.py --python ~/.pyenv/versions/*/bin/python --torch oldest newest

For each Python that the package supports, the oldest torch that it supports, the one that pip gives
on this machine, and the newest, for which pip's own settings are put aside where they hold it back.
The extension knows no torch, so it is built once for each Python: with the CUDA kernels for the
first, without them for the others. Then in an environment of its own: a smoke test (the extension
loads, a ResNet-18 answers as torchvision's) and the drop-in tests. The file is written after each
combination, and one that passed is not run again while nothing that it depends on has changed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from harness import results
from harness.results import ROOT

RESULT = results.RESULTS / "matrix.json"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("oldest", "default", "newest")
TESTS = ("tests/test_drop_in.py", "tests/test_models.py")
# What a combination depends on.
_TESTED = (
    *("CMakeLists.txt", "build_backend.py", "csrc", "pyproject.toml", "resnet_fused", "setup.py"),
    "tests",
)
_SECONDS = 3600

_SMOKE = """
import json, torch, torchvision, triton, resnet_fused
from resnet_fused import _extension
from resnet_fused.env import versions
from resnet_fused.numerics import relative_error
torch.manual_seed(0)
theirs, ours = torchvision.models.resnet18().eval(), resnet_fused.resnet18().eval()
ours.load_state_dict(theirs.state_dict())
x = torch.randn(2, 3, 96, 96)
with torch.inference_mode():
    error = relative_error(ours(x), theirs(x))
assert error < 1e-5, f"logits are {error:.1e} away from torchvision's"
print(json.dumps([_extension.load().build_info(), versions("torch", "torchvision", "triton")]))
"""


class UnavailableError(Exception):
    """A combination cannot be had here; the message says why."""


@dataclass
class Row:
    """A combination of a Python and a torch, by choice of PYTHONS and TORCHES.

    outcome: "passed", "failed", or "unavailable", with the reason unless it passed.
    versions: of Python and of what pip installed. build: what the extension says of itself.
    smoke: whether the smoke test passed. passed, skipped, failures: of the tests, None where they
    were not run; failures by name. seconds: of installing, smoke test and tests together.
    """

    python: str
    torch: str
    commit: str
    outcome: str = "failed"
    reason: str | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    build: dict[str, Any] = field(default_factory=dict)
    smoke: bool = False
    passed: int | None = None
    skipped: int | None = None
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The command's output; UnavailableError with the end of it where it fails."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    try:
        result = subprocess.run(
            command,
            cwd=cwd,
            env={**inherited, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(str(error)) from error
    if result.returncode:
        lines = [line for line in result.stdout.splitlines() if line.strip()] or ["no output"]
        telling = [
            line for line in lines if re.match(r"\s*(ERROR|\w*Error|Building resnet)\b", line)
        ]
        raise UnavailableError((telling or lines)[-1].strip())
    return result.stdout


def find(pythons: Sequence[str] | None) -> dict[str, str]:
    """A working interpreter of each version, among those given or else on PATH."""
    found: dict[str, str] = {}
    for program in pythons or [f"python{version}" for version in PYTHONS]:
        ask = "import sys; print('%d.%d' % sys.version_info[:2])"
        try:
            version = run(program, "-c", ask, cwd=ROOT).strip()
        except UnavailableError:
            continue
        if version in PYTHONS:
            found.setdefault(version, program)
    return dict(sorted(found.items(), key=lambda item: PYTHONS.index(item[0])))


def pip_settings(choice: str) -> tuple[list[str], dict[str, str]]:
    """Requirements and environment for a choice of TORCHES."""
    if choice == "oldest":
        bound = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
        assert bound is not None
        return [f"torch=={bound[1]}.*"], {}
    if choice == "newest":
        return [], {"PIP_CONFIG_FILE": os.devnull, "PIP_CONSTRAINT": ""}
    return [], {}


class Combination:
    """One row in the making: an environment in `folder`, over the sources in `folder`/source."""

    def __init__(self, row: Row, program: str, folder: Path) -> None:
        self.row, self.program, self.folder = row, program, folder
        self.source = folder / "source"
        self.python = folder / "venv/bin/python"

    def try_out(self, wheel: Path) -> None:
        """Fills in the row."""
        start = time.monotonic()
        try:
            self._install(wheel)
            self._smoke()
            self._test()
            self.row.outcome = "failed" if self.row.failures else "passed"
        finally:
            self.row.seconds = round(time.monotonic() - start)

    def same_as_default(self) -> bool:
        """Whether "newest" is what pip gives by default."""
        self._create()
        dry = ("install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report")
        names = []
        for choice in ("default", "newest"):
            report = self.folder / f"{choice}.json"
            command = (self.python, "-m", "pip", *dry, report, "torch")
            run(*command, cwd=self.folder, **pip_settings(choice)[1])
            names += [m["metadata"]["version"] for m in json.loads(report.read_text())["install"]]
        return len(set(names)) == 1

    def _create(self) -> None:
        run(self.program, "-m", "venv", "--clear", self.folder / "venv", cwd=self.folder)

    def _install(self, wheel: Path) -> None:
        self._create()
        requirements, environment = pip_settings(self.row.torch)
        command = ("install", f"{wheel}[bench,test]", *requirements)
        try:
            run(self.python, "-m", "pip", *command, cwd=self.folder, **environment)
        except UnavailableError:
            self.row.outcome = "unavailable"
            raise

    def _smoke(self) -> None:
        answer = run(self.python, "-c", _SMOKE, cwd=self.folder).splitlines()[-1]
        self.row.build, self.row.versions = json.loads(answer)
        self.row.smoke = True

    def _test(self) -> None:
        report = self.folder / "tests.xml"
        report.unlink(missing_ok=True)
        command = ("-q", "-n", "2", f"--junitxml={report}", *TESTS)
        failure = None
        try:
            run(self.python.with_name("pytest"), *command, cwd=self.source)
        except UnavailableError as error:
            failure = error
        if report.exists():
            self.row.passed, self.row.skipped, self.row.failures = read_tests(report)
        if failure and not self.row.failures:
            raise failure
        if self.row.failures:
            self.row.reason = f"{len(self.row.failures)} tests fail, as {self.row.failures[0]}"


def read_tests(report: Path) -> tuple[int, int, list[str]]:
    """How many tests of a JUnit report passed and were skipped, and the names of the others."""
    passed, skipped, failures = 0, 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, skipped, failures


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)


def still_holds(row: Row) -> bool:
    """Whether a row of an earlier run passed, with its tests, on what stands now."""
    unchanged = _git("diff", "--quiet", row.commit, "HEAD", "--", *_TESTED).returncode == 0
    return row.outcome == "passed" and unchanged and row.passed is not None


def table(record: Mapping[str, Any]) -> str:
    """The rows in Markdown, and below them where they come from."""
    head = "Python, torch, torchvision, Triton, extension, smoke test, drop-in tests"
    lines = [head.split(", ")]
    for row in (Row(**found) for found in record["rows"]):
        versions = [row.versions.get(name) for name in ("torch", "torchvision", "triton")]
        if not row.versions:
            versions = [row.torch, None, None]
        build = "–"
        if row.build:
            build = "CPU and CUDA" if row.build["cuda"] else "CPU"
        smoke = "passed" if row.smoke else f"{row.outcome}: {row.reason}"
        tests = "–"
        if row.passed is not None:
            tests = f"{row.passed} passed, {row.skipped} skipped"
            tests += f", **{len(row.failures)} failed**" if row.failures else ""
        elif row.smoke:
            tests = row.reason or "not run"
        cells = [row.versions.get("python") or row.python, *versions, build, smoke, tests]
        lines.append([cell or "–" for cell in cells])
    commits = ", ".join(dict.fromkeys(row["commit"][:10] for row in record["rows"]))
    facts = record["machine"]
    where = f"{facts['cpu']}, {facts['system']}; {record['date'][:10]}, commit {commits}."
    return f"{results.markdown(lines)}\n\n{where}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", nargs="+", metavar="PROGRAM", help="interpreters to use")
    parser.add_argument("--torch", nargs="+", choices=TORCHES, default=TORCHES)
    parser.add_argument("--json", type=Path, default=RESULT, help="the result file (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all combinations that can be had pass."""
    options = parse(arguments)
    found = find(options.python)
    head = _git("rev-parse", "HEAD").stdout.decode().strip()
    if not head:
        sys.exit(f"{ROOT} is no git checkout: the matrix is made of what is committed there.")
    rows: dict[tuple[str, str], Row] = {}
    if options.json.exists():
        earlier = (Row(**row) for row in json.loads(options.json.read_text())["rows"])
        rows = {(row.python, row.torch): row for row in earlier}

    def save(row: Row) -> None:
        rows[row.python, row.torch] = row
        order = [rows[p, t] for p in PYTHONS for t in TORCHES if (p, t) in rows]
        facts = results.facts(torch.device("cpu"))
        results.write(options.json, {**facts, "rows": [asdict(row) for row in order]})
        print(f"{row.python}, torch {row.torch}: {row.outcome} {row.reason or ''}", flush=True)

    wanted = [(p, t) for p in (found if options.python else PYTHONS) for t in options.torch]
    wanted = [key for key in wanted if key not in rows or not still_holds(rows[key])]
    with tempfile.TemporaryDirectory(prefix="resnet_fused_matrix_") as folder:
        run("git", "clone", "--quiet", ROOT, Path(folder, "source"), cwd=ROOT)
        for python, choice in wanted:
            row = Row(python, choice, head)
            try:
                if python not in found:
                    row.outcome = "unavailable"
                    raise UnavailableError(f"no python{python} was found")
                combination = Combination(row, found[python], Path(folder))
                if choice == "newest" and combination.same_as_default():
                    continue
                others = [other for other in rows.values() if other.python != python]
                cuda = not any(other.build.get("cuda") for other in others)
                combination.try_out(build(found[python], python, Path(folder), cuda))
            except UnavailableError as error:
                row.reason = str(error)
            save(row)
    if rows:
        print(table(json.loads(options.json.read_text())))
    return int(any(row.outcome == "failed" for row in rows.values()))


def build(program: str, python: str, folder: Path, cuda: bool) -> Path:
    """The wheel of `folder`/source for that Python; the one of an earlier call if there is one."""
    wheels = folder / python
    if not wheels.exists():
        settings = {} if cuda else {"RESNET_FUSED_CUDA": "off"}
        command = ("-m", "pip", "wheel", "--no-deps", "-w", wheels, folder / "source")
        run(program, *command, cwd=folder, **settings)
    (wheel,) = wheels.glob("*.whl")
    return wheel


if __name__ == "__main__":
    sys.exit(main())
