"""Documents: the commands of docs/paper.md are accepted, and what documents and docstrings name is
there."""

from __future__ import annotations

import ast
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


def test_arguments_that_docstrings_describe_exist() -> None:
    """One by one, as the site's strict build asks for."""
    found = 0
    for path in sorted((ROOT / "resnet_fused").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            section = re.search(r"^Args:\n((?: .*\n|\n)+)", f"{ast.get_docstring(node)}\n", re.M)
            if section is None:
                continue
            (function,) = (
                n
                for n in [node, *getattr(node, "body", [])]
                if isinstance(n, ast.FunctionDef) and (n is node or n.name == "__init__")
            )
            arguments = [n.arg for n in ast.walk(function.args) if isinstance(n, ast.arg)]
            described = re.findall(r"^ {4}\*{0,2}(\S[^:]*):", section[1], re.M)
            assert set(described) <= set(arguments), f"{path}:{node.lineno}"
            found += len(described)
    assert found
