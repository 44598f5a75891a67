"""Reports from result files: they say what the files say, and who wins."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="the benchmarks' peers are torchvision's models")

import render
from harness.comparison import Comparison, Entry

ROOT = Path(__file__).resolve().parents[1]


def comparison(*rates: float, wrong: bool = False) -> Comparison:
    """Ours and peers with the given images per second, the floor at 100."""
    entries = [
        Entry(str(i), f"entry {i}", ours=i == 0, status="measured", rounds=[[2 / rate] * 2])
        for i, rate in enumerate(rates)
    ]
    if wrong:
        entries.append(Entry("wrong", "wrong", ours=True, status="wrong"))
    found = Comparison("resnet18", "cpu", "float32", 2, 64, entries, floor=2 / 100)
    found.summarise()
    return found


def test_readme_and_reports_are_what_the_files_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert render.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_number_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted = sorted((ROOT / "benchmarks/results/predicted").glob("*.*"))
    for name in (
        "README.md",
        "docs/results.md",
        "docs/predicted.md",
        "benchmarks/results/h200/throughput.json",
        "benchmarks/results/throughput_cpu.json",
        "benchmarks/results/matrix.json",
        *(str(path.relative_to(ROOT)) for path in predicted),
    ):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(render, "ROOT", tmp_path)
    (tmp_path / "benchmarks/results/throughput_cpu.md").write_text("A profile says why.\n")
    assert render.main(["--check"]) == 1
    assert render.main([]) == 0
    assert (tmp_path / "docs/results.md").read_text().endswith("A profile says why.\n")
    readme = (tmp_path / "README.md").read_text()
    assert readme == (ROOT / "README.md").read_text()
    for cell, other in (("cpu** | **", "cpu** | **9"), ("| passed |", "| passed twice |")):
        (tmp_path / "README.md").write_text(readme.replace(cell, other, 1))
        assert render.main(["--check"]) == 1


def test_verdicts_by_hand() -> None:
    assert render.verdict(comparison(60, 40, 50)) == (
        "**entry 0** wins: 1.20× the best peer, entry 2. Ours runs at 60% of the roofline floor."
    )
    assert render.verdict(comparison(40, 50, 20)).startswith(
        "**entry 1** wins: 1.25× ours, entry 0."
    )
    assert "wrong" in render.verdict(comparison(60, 40, wrong=True))
    alone = comparison(60)
    assert render.verdict(alone) == "Nothing to compare was measured."
    alone.entries.append(
        Entry("int8", "int8", ours=False, bound=0.2, status="measured", rounds=[[0.1]])
    )
    alone.summarise()
    assert render.verdict(alone) == "Nothing to compare was measured."
