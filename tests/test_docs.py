"""Every code block of README.md and docs/ is executed, and the site is built strictly.

The blocks of a page run in order: Python in one namespace, `sh` by bash, in a folder that holds
images and a link to the examples. Weights of every name are random ones that lie where a download
would have put them. A block that does not run here says why in its title, which the site shows:

    title="needs X, Y"         runs where these packages are installed (or "a GPU" is there)
    title="run by FILE"        a test or CI runs it; `FILE::TEST` names the test
    title="not run here: WHY"

A block without a language, as in README.md, is a command that .ci/run or a named test runs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The README's blocks without a language, by their beginning, and what runs them.
ELSEWHERE = {
    "python3 -m venv": ".ci/run",
    "pytest -n 2": ".ci/run",
    "pip install '.[experiments]'": "tests/test_experiments.py",
}
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

models = pytest.importorskip("torchvision.models", reason="prepares images")
Image = pytest.importorskip("PIL.Image", reason="writes the images")


class Block(NamedTuple):
    line: int
    language: str
    title: str
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for fence in _FENCE.finditer(text):
        language, _, rest = fence[1].strip().partition(" ")
        title = re.fullmatch(r'title="([^"]*)"', rest)
        assert title or not rest, f"{page.name}: {fence[0]}"
        line = text.count("\n", 0, fence.start(2)) + 1
        found.append(Block(line, language, title[1] if title else "", fence[2]))
    assert text.count("\n```") == 2 * len(found), f"{page.name}: a fence is not closed"
    return found


WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, a folder for each of three classes, weights, the examples and the command."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "photos").mkdir()
    torch.manual_seed(0)
    for name in ("astronaut", "coffee"):
        pixels = torch.randint(256, (60, 80, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"photos/{name}.png")
    for name in ("aster", "lily", "rose"):
        (folder / "flowers" / name).mkdir(parents=True)
        for number in range(3):
            pixels = torch.randint(256, (40, 48, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"flowers/{name}/{number}.png")
    checkpoints = folder / "torch/hub/checkpoints"
    checkpoints.mkdir(parents=True)
    for name in ("resnet18", "resnet50"):
        state = getattr(models, name)().state_dict()
        for entry in models.get_model_weights(name):
            torch.save(state, checkpoints / entry.url.rsplit("/", 1)[1])
    torch.save(models.resnet18(num_classes=3).state_dict(), folder / "flowers.pth")
    for name in ("examples", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    programs = folder / "bin"
    programs.mkdir()
    for name, module in (
        ("resnet-fused", "-m resnet_fused.cli"),
        ("torchrun", "-m torch.distributed.run --standalone"),
        ("python", ""),
    ):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (programs / name).chmod(0o755)
    return folder


def _lacking(title: str) -> str | None:
    """What the block needs and is not here."""
    for need in title.removeprefix("needs ").split(", "):
        here = torch.cuda.is_available() if need == "a GPU" else importlib.util.find_spec(need)
        if not here:
            return need
    return None


def _stands_for(page: Path, block: Block) -> str:
    """The file that runs the block instead, checked as far as can be."""
    if block.title.startswith("run by "):
        name = block.title.removeprefix("run by ")
    else:
        names = [name for begin, name in ELSEWHERE.items() if block.code.startswith(begin)]
        assert names, f"{page.name}:{block.line} has neither a language nor who runs it"
        (name,) = names
    file, _, test = name.partition("::")
    assert (ROOT / file).is_file(), name
    if test:
        assert f"\ndef {test}(" in (ROOT / file).read_text(), name
    if file == ".ci/run":
        commands = (ROOT / file).read_text()
        assert all(line in commands for line in block.code.splitlines()), block.code
    return name


def _environment(place: Path) -> dict[str, str]:
    path = os.pathsep.join([str(place / "bin"), os.environ["PATH"]])
    found = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**found, "TORCH_HOME": str(place / "torch")}


@pytest.fixture
def surroundings(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.chdir(place)
    monkeypatch.setenv("TORCH_HOME", str(place / "torch"))
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page: Path, place: Path, surroundings: None) -> None:
    namespace = {"torch": torch, "images": torch.randn(2, 3, 64, 64), "__name__": "docs"}
    exec("import resnet_fused", namespace)
    if page.name == "paper.md":  # reads on from the README's model
        exec("model, x = resnet_fused.resnet18(), images", namespace)
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.title.startswith("not run here: "):
            continue
        if block.title.startswith("needs "):
            if lacking := _lacking(block.title):
                print(f"{where} is not run: there is no {lacking}")
                continue
        elif block.title.startswith("run by ") or not block.language:
            _stands_for(page, block)
            continue
        else:
            assert not block.title, f"{where}: {block.title!r} is none of the titles above"
        if block.language == "python":
            source = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            with contextlib.redirect_stdout(None):
                exec(source, namespace)
        elif block.language == "sh":
            command = ["bash", "-euo", "pipefail", "-c", block.code]
            result = subprocess.run(
                command, cwd=place, env=_environment(place), capture_output=True, text=True
            )
            assert result.returncode == 0, f"{where}\n{result.stdout}\n{result.stderr}"
        else:
            assert block.language == "text", f"{where}: {block.language!r} is run by nobody"


@pytest.mark.thorough
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason="pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    written = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("index.html")}
    for page in (p for p in PAGES if p.parent != ROOT):
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        assert ("index.html" if name == "index" else f"{name}/index.html") in written
    ops = (tmp_path / "reference/ops/index.html").read_text()
    assert 'class="doc doc-' in ops
    assert "conv_bn_projection" in ops
    results = (tmp_path / "results/index.html").read_text()
    (plot,) = set(re.findall(r'src="([^"]*throughput_cpu\.png)"', results))
    assert (tmp_path / "results" / plot).resolve().is_file()
    paper = (tmp_path / "paper/index.html").read_text()
    figures = set(re.findall(r'src="([^"]*experiments/reports/[^"]*\.png)"', paper))
    assert len(figures) >= len(list((ROOT / "experiments/reports").glob("*/report.md")))
    assert all((tmp_path / "paper" / figure).resolve().is_file() for figure in figures)
