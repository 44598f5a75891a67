"""Costs of networks: against the paper's figures, and bytes against arithmetic by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import complexity as benchmark
import pytest
import torch
import torchvision
from torch import nn

import resnet_fused
from resnet_fused import PaddedIdentity, cifar, complexity


@pytest.mark.parametrize("name", benchmark.PAPER_MULTIPLY_ADDS)
def test_multiply_adds_are_the_papers(name: str) -> None:
    """To the one digit it prints; ResNet-50's 3.86 it prints as 3.8."""
    (row,) = benchmark.rows([name], 1)
    paper = benchmark.PAPER_MULTIPLY_ADDS[name]
    assert row["paper_multiply_adds"] == paper
    assert -0.05 <= row["multiply_adds"] / 1e9 - paper < (0.06 if "50" in name else 0.05)
    assert row["layers"] == int("".join(filter(str.isdigit, name.split()[0])))


def test_counts_of_resnet50_by_hand() -> None:
    """Stage by stage: (1×1, 3×3, 1×1) on maps of 56 to 7 pixels, strides on the 3×3."""
    adds, written, inplanes, inside = 118_013_952 + 2_048_000, 112**2 * 64, 64, 56
    for width, size, blocks in ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3)):
        for i in range(blocks):
            before = inside if i == 0 else size
            adds += before**2 * inplanes * width
            adds += size**2 * (9 * width * width + width * 4 * width)
            written += before**2 * width + size**2 * 5 * width
            if i == 0:
                adds += size**2 * inplanes * 4 * width
                written += size**2 * 4 * width
            inplanes = 4 * width
        inside = size
    cost = complexity.count(resnet_fused.resnet50())
    assert cost.multiply_adds == adds
    assert cost.activations == written
    assert (cost.layers, cost.parameters) == (50, 25_557_032)


class _Tiny(nn.Module):
    """A stem with pooling, one residual block with the given shortcut, and a head."""

    def __init__(self, downsample: nn.Module | None, stride: int, planes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(8), nn.ReLU()
        self.maxpool = nn.MaxPool2d(2)
        self.block = resnet_fused.BasicBlock(8, planes, stride, downsample)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(planes, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.avgpool(self.block(x)).flatten(1))


# Elements of an 8×8 image: 3·64 in, stem 8·64, pooled 8·16 = x. Weights come on top.
STEM = {"ops": 192 + 512 + 4 * 512 + 512 + 128, "layers": 192 + 512 + 512 + 128}
WHOLE_STEM = 192 + 128
IDENTITY = {  # y: 8·16 = 128 elements, like x
    "ops": STEM["ops"] + 10 * 128 + 3 * 128 + 2 * 128 + 128 + 8 + 8 + 5,
    "layers": STEM["layers"] + 4 * 128 + 3 * 128 + 128 + 8 + 8 + 5,
    "block ends": WHOLE_STEM + 4 * 128 + 128 + 128 + 5,
    "blocks": WHOLE_STEM + 2 * 128 + 128 + 5,
}
PADDED = {  # y: 16·4 = 64 elements; of x 8·4 = 32 are read
    "ops": STEM["ops"] + 192 + 4 * 64 + 128 + 2 * 64 + 96 + 3 * 64 + 2 * 64 + 64 + 16 + 16 + 5,
    "layers": STEM["layers"] + 192 + 128 + 96 + 3 * 64 + 64 + 16 + 16 + 5,
    "block ends": WHOLE_STEM + 192 + 128 + 32 + 64 + 5,
    "blocks": WHOLE_STEM + 128 + 64 + 64 + 5,
}
PROJECTED = {  # the projection reads the same 32, writes 64, and is normalised apart
    **PADDED,
    "ops": PADDED["ops"] + 2 * 64,
}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, int], int]] = {
    "identity": (lambda: _Tiny(None, 1, 8), IDENTITY, 2 * 9 * 64 + 5 * 8),
    "padded": (lambda: _Tiny(PaddedIdentity(8, 16, 2), 2, 16), PADDED, 9 * 16 * 24 + 5 * 16),
    "projected": (
        lambda: _Tiny(nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16)), 2, 16),
        PROJECTED,
        9 * 16 * 24 + 8 * 16 + 5 * 16,
    ),
}


@pytest.mark.parametrize("level", complexity.FUSION)
@pytest.mark.parametrize("name", CASES)
def test_bytes_by_hand(name: str, level: str) -> None:
    make, activations, weights = CASES[name]
    model = make().to("meta").eval()
    weights += 9 * 3 * 8
    for batch in (1, 4):
        found = complexity.passes(model, batch, 8, level)
        assert sum(p.activations for p in found) == batch * activations[level]
        assert sum(p.weights for p in found) == weights
    cost = complexity.count(model, 8, batch=4, element_size=4)
    assert cost.bytes[level] == 4 * (activations[level] + weights / 4)
    assert cost.passes[level] == len(found)


def test_fusion_only_ever_saves_and_plain_nets_have_nothing_to_add() -> None:
    for model, size in ((cifar.resnet20(), 32), (resnet_fused.resnet50(shortcut="A"), 64)):
        moved = list(complexity.count(model, size).bytes.values())
        assert moved == sorted(moved, reverse=True)
    plain = complexity.count(cifar.plain20(), 32)
    assert plain.passes["layers"] == plain.passes["block ends"] + 1  # pooling joins the head


def test_torchvisions_networks_count_the_same() -> None:
    ours, theirs = resnet_fused.resnet18(), torchvision.models.resnet18()
    assert complexity.count(ours, 64) == complexity.count(theirs, 64)


def test_passes_are_of_our_ops() -> None:
    with torch.device("meta"):
        model = resnet_fused.resnet50().eval()
    passes = complexity.passes(model, 2, 64)
    cost = complexity.count(model, 64, batch=2, element_size=1)
    assert sum(p.elements for p in passes) == 2 * cost.bytes["block ends"]
    assert sum(p.multiply_adds for p in passes) == 2 * cost.multiply_adds
    assert len(passes) == 50


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="must lie on the meta device"):
        complexity.passes(cifar.resnet(8), 1, 32)
    with torch.device("meta"):
        model = cifar.resnet(8).eval()
    with pytest.raises(ValueError, match=r"fusion must be one of ops, layers.*'all'"):
        complexity.passes(model, 1, 32, "all")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["cifar.resnet20", "vgg19"]
    file = tmp_path / "c.json"
    assert benchmark.main(["--network", *names, "--batch", "4", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "| cifar.resnet20 | 20 | 0.27 | 0.27 |" in shown
    record = json.loads(file.read_text())
    assert [row["network"] for row in record["networks"]] == names
    assert record["options"] == {"batch": 4}
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert "commit" in record
    assert [row["parameters"] for row in record["networks"]] == [269722, 143667240]
    with pytest.raises(SystemExit):
        benchmark.main(["--batch", "0"])
