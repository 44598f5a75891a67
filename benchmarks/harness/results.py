"""Result files: what every one of them says of its machine, versions and commit; command lines."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from resnet_fused import env

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# One of several results that are made in a row must not call the next one's code changed.
_WRITTEN = ("benchmarks/results", "experiments/reports")


def commit() -> dict[str, Any]:
    """The commit of this checkout, and whether tracked files other than results differ from it."""
    return env.commit(ROOT, *_WRITTEN)


def facts(
    device: torch.device | None, *packages: str, options: argparse.Namespace | None = None
) -> dict[str, Any]:
    """What a result file begins with; no machine where nothing is measured (`device` None).

    options: of the command line; those that say where the results go are left out.
    """
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": env.versions(*packages),
        **commit(),
    }
    if device is not None:
        found |= {"machine": env.machine(device), "load_average": os.getloadavg()}
    if options is not None:
        found["options"] = {
            name: str(value) if isinstance(value, (Path, torch.device)) else value
            for name, value in vars(options).items()
            if name not in ("json", "plot")
        }
    return found


def warn_if_busy(record: Mapping[str, Any]) -> None:
    """Says so where the machine of these `facts` had other work."""
    if record["load_average"][0] > 0.5 * env.cores():
        print("This machine is busy with other work; the timings will be noisy.")


def chip(machine: Mapping[str, Any]) -> str:
    """The processor that was measured, for people."""
    return machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"


def write(path: Path | None, record: Mapping[str, Any] | str) -> None:
    """Replaces the file in one step, if one is asked for: who stops a run finds a whole one."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    text = record if isinstance(record, str) else json.dumps(record, indent=1) + "\n"
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; the first row holds the headings."""
    head, *others = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *others])


def device(name: str) -> torch.device:
    """For a command's option: the device, or argparse's error for one that is not there."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise argparse.ArgumentTypeError(f"{name!r} is neither cpu nor cuda nor cuda:1 and so on")
    found = torch.device(name)
    beyond = found.index is not None and found.index >= torch.cuda.device_count()
    if found.type == "cuda" and (beyond or not torch.cuda.is_available()):
        raise argparse.ArgumentTypeError(
            f"{name!r} is no GPU that PyTorch sees; see python -m resnet_fused.env"
        )
    return found


def positive(text: str) -> int:
    """For a command's option: the number, or argparse's error for one below 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def parser(doc: str | None, *names: str) -> argparse.ArgumentParser:
    """A parser with those named of the options that several benchmarks have."""
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known: dict[str, dict[str, Any]] = {
        "device": {"type": device, "default": here, "help": "cpu, cuda, cuda:1 … (%(default)s)"},
        "size": {"type": positive, "default": 224, "help": "pixels a side (%(default)s)"},
        "dtype": {"default": "bfloat16", "choices": DTYPES},
        "json": {"type": Path, "metavar": "FILE", "help": "write machine, versions, samples here"},
        "plot": {"type": Path, "metavar": "FILE", "help": "draw a chart here (PNG, SVG or PDF)"},
    }
    for name in names:
        made.add_argument(f"--{name}", **known[name])
    return made
