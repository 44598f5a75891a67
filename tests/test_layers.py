"""The benchmark of single layers: what it records, and whose kernel a column's times are."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision", reason="the benchmark's peers are torchvision's models")

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import layers
from layers import Contestant, Layer

from resnet_fused.backends import tuning
from resnet_fused.reference import ops as reference
from resnet_fused.testing.cases import ConvCase, generator, make_integers
from resnet_fused.testing.roofline import Peaks


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


def test_a_column_is_of_the_kernel_that_it_names(simulator: ModuleType, monkeypatch: Any) -> None:
    monkeypatch.setenv("RESNET_FUSED_HOST_SIM_CAPABILITY", "90")
    x, (conv, bn) = make_integers(ConvCase(1, 16, 6, 6, 24), generator(), torch.float16)
    arguments = (x, conv, bn, None, True)
    expected = reference.conv_bn(*arguments)
    layer = Layer("conv_bn", arguments, 1)
    for kernel, copies in (("m64n64", False), ("m128n64_sm90", True)):
        simulator.take_statistics()
        out = Contestant("cuda_sim", kernel).call(layer, arguments)
        assert out is not None
        assert torch.equal(out, expected)
        assert (simulator.take_statistics()["bulk_copies"] > 0) == copies
    assert Contestant("cuda_sim", "linear").call(layer, arguments) is None
    assert str(Contestant("cuda", "m64n64")) == "cuda/m64n64"


def test_a_preferred_candidate_runs_where_it_is_offered() -> None:
    tuner = tuning.Tuner("test")
    device = torch.device("cpu")

    def run() -> str:
        return tuner.run(("key",), device, lambda: ["first", "second"], lambda name: name)

    assert run() == "first"
    with tuning.prefer("second"), tuning.watch() as decisions:
        assert run() == "second"
        with tuning.prefer("third"):
            assert run() == "first"
    assert [decision.choice for decision in decisions] == ["second", "first"]
    assert run() == "first"
