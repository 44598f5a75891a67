"""docs/paper.md: every command in it is one that its program accepts."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="the experiments' data comes through torchvision")

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`python ((?:experiments|benchmarks)/[^`]+)`", DOCUMENT)))


def test_it_names_every_experiment() -> None:
    named = {shlex.split(command)[0] for command in COMMANDS}
    assert named >= {f"experiments/{path.name}" for path in (ROOT / "experiments").glob("*.py")}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_accepted(command: str) -> None:
    program, *arguments = shlex.split(command)
    path = ROOT / program
    module = importlib.import_module(path.stem)
    assert Path(str(module.__file__)) == path
    module.parse(arguments)
    with pytest.raises(SystemExit):
        module.parse([*arguments, "--no-such-option"])


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", DOCUMENT):
        assert (ROOT / "docs" / link).exists(), link
