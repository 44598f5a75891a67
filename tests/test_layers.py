"""The benchmark of single layers: what it records, and whose kernel a column's times are."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision", reason="the benchmark's peers are torchvision's models")

import layers
from harness.measure import Peaks
from layers import Layer

from resnet_fused.backends import Candidate
from resnet_fused.reference import ops as reference
from resnet_fused.testing.cases import ConvCase, generator, make_integers


@pytest.fixture(scope="module")
def recorded() -> list[Layer]:
    x = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    return layers.record("resnet50", x)


def test_every_convolution_and_every_block_is_recorded(recorded: list[Layer]) -> None:
    blocks = [layer for layer in recorded if layer.op == "bottleneck"]
    assert sum(layer.calls for layer in blocks) == 16
    convolutions = sum(len(layer.convolutions()) * layer.calls for layer in recorded)
    assert convolutions == 53
    assert blocks[0].title() == "bottleneck/1 64→64→256 on 16×16 + projection"


def test_a_blocks_floor_is_that_of_its_layers_without_what_lies_between(
    recorded: list[Layer],
) -> None:
    """The first block: operations as its four convolutions have them, bytes as counted by hand."""
    block = next(layer for layer in recorded if layer.op == "bottleneck")
    operations, moved, _ = block.floor(torch.empty(1, 256, 16, 16), Peaks(1.0, 1.0))
    weights = 64 * 64 + 9 * 64 * 64 + 2 * 64 * 256
    assert operations == 2 * 256 * weights
    assert moved == 4 * (64 * 256 + weights + 256 * 256)


def test_a_strided_shortcut_is_read_where_it_is_seen(recorded: list[Layer]) -> None:
    """layer2's first block end: 128 channels at 8 × 8, and every other pixel of 256 at 16 × 16."""
    end = [layer for layer in recorded if layer.op == "conv_bn_projection"][1]
    _, moved, _ = end.floor(torch.empty(1, 512, 8, 8), Peaks(1.0, 1.0))
    weights = 128 * 512 + 256 * 512
    assert moved == 4 * (64 * 128 + 64 * 256 + weights + 64 * 512)


def test_each_row_is_of_the_candidate_that_it_names(
    simulator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESNET_FUSED_HOST_SIM_CAPABILITY", "90")
    arguments = (*make_integers(ConvCase(1, 16, 6, 6, 24), generator(), torch.float16), None, True)
    layer = Layer("conv_bn", arguments, 1)
    found = {c.name: c.launch for c in layers.computed_by(layer, ["cuda_sim"], kernels=True)}
    assert next(iter(found)) == "cuda_sim"  # the one that it chooses
    for name, copies in (("cuda m64n64", False), ("cuda m128n64_sm90", True)):
        simulator.take_statistics()
        assert torch.equal(found[name](*arguments), reference.conv_bn(*arguments))
        assert (simulator.take_statistics()["bulk_copies"] > 0) == copies


def test_what_is_wrong_is_named_and_not_timed() -> None:
    arguments = (*make_integers(ConvCase(2, 8, 5, 5, 8), generator()), None, True)

    def off(*given: Any) -> torch.Tensor:
        return reference.conv_bn(*given) + 1

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    launches = {"right": reference.conv_bn, "off": off, "broken": broken}
    candidates = [Candidate(name, launch) for name, launch in launches.items()]
    row = layers.measure(Layer("conv_bn", arguments, 1), candidates, 2, Peaks(1.0, 1.0))
    assert row["wrong"].keys() == {"off", "broken"}
    assert {name: len(times) for name, times in row["seconds"].items()} == {
        "right": 2,
        "library": 2,
    }
    assert "no such kernel" in layers.table([row], None)


def test_the_table_gives_the_share_of_the_peak() -> None:
    row: dict[str, Any] = {"layer": "conv", "op": "conv_bn", "calls": 1, "operations": 300}
    row |= {"bytes": 1, "floor_seconds": 0.1, "seconds": {"cpu": [1.0, 0.5, 0.5]}, "wrong": {}}
    assert " 75% " in layers.table([row], peak=800.0)
    assert "75%" not in layers.table([row], None)


def test_a_call_runs_once_for_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 3, 32, 32)
    found = [layer for layer in layers.record("resnet18", x) if layer.op == "head"]
    launched: list[str] = []
    candidates = [Candidate(name, lambda *_, n=name: launched.append(n)) for name in ("a", "b")]
    monkeypatch.setattr(layers, "computed_by", lambda *_, kernels: candidates)
    layers.once(found, ["cpu"], ["head 512→1000, b"])
    assert launched == ["b"]
    with pytest.raises(SystemExit, match="no call head 512→1000, c;"):
        layers.once(found, ["cpu"], ["head 512→1000, c"])
