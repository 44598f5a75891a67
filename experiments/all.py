"""Every experiment's default run, into one folder, with an index page of the verdicts.

    python experiments/all.py                            # everything
    python experiments/all.py --only shortcuts cifar     # some of it
    python experiments/all.py --quick --out runs/quick   # a few iterations of each, to try it out

Several experiments run at once, on one core each: the networks are so small that a second one gains
almost nothing. Those that took longest when the committed reports were made start first. The same
command goes on after a stop; what was done by the same command and the same code is not run again,
and after a change of either an experiment begins anew. Failures are named at the end, and make the
exit code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from common import index
from common.checkpoint import write_whole
from common.index import Run
from harness.results import ROOT, positive
from tqdm import tqdm

_TICK, _SAVED_EVERY = 0.2, 10.0  # seconds


def parse(arguments: list[str]) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("runs/all"), help="results go here")
    options.add_argument("--only", nargs="+", choices=index.EXPERIMENTS, metavar="NAME")
    options.add_argument("--quick", action="store_true", help="a few iterations, to try it out")
    options.add_argument(
        "--jobs", type=positive, default=index.cores(), help="experiments at once (%(default)s)"
    )
    options.add_argument(
        "--keep",
        action="store_true",
        help="go on from checkpoints of other code too, after a change that alters no training",
    )
    return options.parse_args(arguments)


def code_of(name: str) -> str:
    """A digest of what an experiment's numbers follow from."""
    program = index.HERE / f"{name}.py"
    files = [program, *(index.HERE / "common").glob("*.py")]
    if "from detectors" in program.read_text(encoding="utf-8"):
        files += (index.HERE / "detectors").glob("*.py")
    package = ROOT / "resnet_fused"
    files += [*package.rglob("*.py"), *package.glob("_C.*.so")]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(files):
        digest.update(f"\n{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def longest_first(names: Sequence[str]) -> list[str]:
    """By the times of the committed reports; those without one first."""
    times = index.runs(index.HERE / "reports")
    return sorted(names, key=lambda name: -times[name].seconds if name in times else -float("inf"))


class All:
    """Runs experiments, and keeps `out`/times.csv and `out`/index.md up to date."""

    def __init__(self, out: Path, quick: bool, keep: bool) -> None:
        self.out, self.quick, self.keep = out, quick, keep
        self.runs = index.runs(out)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.failed: list[str] = []

    def run(self, names: Sequence[str], jobs: int) -> None:
        """Runs those of `names` that are not done, `jobs` at once."""
        waiting = [name for name in longest_first(names) if not self._done(name)]
        for name in names:
            if name not in waiting:
                print(f"{name}: done before, in {self.runs[name].time()}")
        bar = tqdm(total=len(waiting), unit="experiment", disable=None)
        now = saved = time.monotonic()
        try:
            while waiting or self.running:
                while waiting and len(self.running) < jobs:
                    self._start(waiting.pop(0), bar)
                time.sleep(_TICK)
                before, now = now, time.monotonic()
                self._count(now - before)
                for name in [
                    n for n, process in self.running.items() if process.poll() is not None
                ]:
                    self._finish(name, bar)
                if now - saved > _SAVED_EVERY:
                    index.write_runs(self.out, self.runs)
                    saved = now
        finally:
            for process in self.running.values():
                process.terminate()
            for process in self.running.values():
                process.wait()
            bar.close()
            self._save()

    def _arguments(self, name: str) -> list[str]:
        return [f"experiments/{name}.py", *(["--quick"] if self.quick else [])]

    def _command(self, name: str) -> str:
        return " ".join(["python", *self._arguments(name)])

    def _done(self, name: str) -> bool:
        run = self.runs.get(name)
        return (
            run is not None
            and (run.command, run.code) == (self._command(name), code_of(name))
            and run.status == "done"
            and (self.out / name / "report.md").exists()
        )

    def _start(self, name: str, bar: tqdm[None]) -> None:
        run, before = Run(name, self._command(name), code_of(name)), self.runs.get(name)
        if before is not None:
            if before.command == run.command and (self.keep or before.code == run.code):
                run.seconds, run.others = before.seconds, before.others
            else:
                shutil.rmtree(self.out / name, ignore_errors=True)
        self.runs[name] = run
        program, *others = self._arguments(name)
        command = [sys.executable, str(index.HERE / Path(program).name), *others]
        with self._log(name).open("ab") as log:
            self.running[name] = subprocess.Popen(
                [*command, "--out", str(self.out / name)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        index.write_runs(self.out, self.runs)
        bar.write(f"{name}: started; its progress goes to {self._log(name)}")
        bar.set_postfix_str(", ".join(self.running))

    def _log(self, name: str) -> Path:
        return self.out / f"{name}.log"

    def _count(self, passed: float) -> None:
        """Adds the time that has passed to what is running."""
        for name in self.running:
            run = self.runs[name]
            weighted = run.others * run.seconds + (len(self.running) - 1) * passed
            run.seconds += passed
            run.others = weighted / run.seconds

    def _finish(self, name: str, bar: tqdm[None]) -> None:
        code = self.running.pop(name).returncode
        run = self.runs[name]
        run.status = "failed" if code else "done"
        if code:
            self.failed.append(name)
            found = f"failed with exit code {code}; see {self._log(name)}"
        else:
            judged = index.findings(self.out / name, index.claims(name))
            counted = Counter(finding.verdict for _, finding in judged)
            found = ", ".join(f"{verdict}: {number}" for verdict, number in counted.items())
        bar.write(f"{name}: {run.time()}; {found}")
        bar.update()
        bar.set_postfix_str(", ".join(self.running))
        self._save()

    def _save(self) -> None:
        index.write_runs(self.out, self.runs)
        text = f"# Experiments\n\n{index.table(self.out)}\n"
        write_whole(self.out / "index.md", lambda path: path.write_text(text, encoding="utf-8"))


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    everything = All(options.out, options.quick, options.keep)
    # As after Ctrl-C, so that the experiments stop as well.
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        everything.run(options.only or index.EXPERIMENTS, options.jobs)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from the last checkpoints.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, handler)
    print(options.out / "index.md")
    for name in everything.failed:
        print(f"error: {name} failed; see {options.out / name}.log", file=sys.stderr)
    return int(bool(everything.failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
