"""Documents: the commands of docs/paper.md are accepted, and what documents name is there."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="the experiments' data comes through torchvision")

ROOT = Path(__file__).resolve().parents[1]
PAPER = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted(set(re.findall(r"`python ((?:experiments|benchmarks)/[^`]+)`", PAPER)))


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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link


def test_files_that_contributing_names_exist() -> None:
    """By their path in the checkout or the package; NAME stands for one that is to be written."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w./]+\.(?:cpp|h|md|py|pyi|toml|txt|yml))`", text)
    assert named
    for file in named:
        places = (ROOT / file, ROOT / "resnet_fused" / file)
        assert "NAME" in file or any(place.exists() for place in places), file
