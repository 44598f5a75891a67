"""The kernel for sm_90a for a whole bottleneck: results, simulated, its waits, and its choice."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from test_cuda_bottleneck import described, rounded_truth
from torch import Tensor

import resnet_fused
from resnet_fused import use_backend
from resnet_fused._extension import tensor_arg
from resnet_fused.backends import Candidate
from resnet_fused.backends.arguments import batch_norm_arg
from resnet_fused.backends.cuda_sim import SimulatedBackend
from resnet_fused.numerics import assert_contract, check_op
from resnet_fused.parameters import ConvBn
from resnet_fused.reference import ops as reference
from resnet_fused.testing.cases import (
    BlockCase,
    generator,
    make_bottleneck,
    make_integers,
    randomise_statistics,
)
from resnet_fused.testing.on import On

KERNEL = "cuda_bottleneck_sm90"

# The simulated GPU has 4 multiprocessors. A job each; several, of which blocks take two or three;
# strips of images of more than 56 columns; channels that fill no panel.
CASES = {
    "one job": BlockCase(1, 64, 6, 14, 64, 64),
    "a line's columns": BlockCase(1, 256, 5, 56, 64, 256),
    "two strips": BlockCase(1, 256, 5, 62, 64, 256),
    "tails": BlockCase(2, 72, 17, 15, 40, 72),
    "strips": BlockCase(1, 136, 7, 130, 64, 136),
    "several jobs": BlockCase(9, 200, 5, 20, 64, 200),
    "first of stage 1": BlockCase(1, 64, 15, 16, 64, 256, projection=True),
    "projection with tails": BlockCase(9, 24, 7, 66, 56, 136, projection=True),
    "one pixel": BlockCase(2, 8, 1, 1, 8, 8),
}


class ByLines(SimulatedBackend):
    """Takes this kernel wherever it is listed."""

    def __init__(self, simulator: ModuleType) -> None:
        super().__init__(simulator, capability=90)

    def bottleneck(self, x: Tensor, layer1: ConvBn, *others: Any) -> list[Candidate]:
        listed = super().bottleneck(x, layer1, *others)
        ours = [c for c in listed if c.name == "cuda fused sm90"]
        return [candidate._replace(is_profitable=True) for candidate in ours]


@pytest.fixture
def by_lines(simulator: ModuleType) -> On:
    return On(ByLines(simulator))


@pytest.mark.parametrize("name", CASES)
def test_exact_on_integers_and_free_of_bank_conflicts(simulator, by_lines, half, name):
    arguments = make_bottleneck(CASES[name], generator(), half, make=make_integers)
    assert torch.equal(by_lines.bottleneck(*arguments).double(), rounded_truth(arguments))
    counts = simulator.take_statistics()
    assert counts["bulk_copies"] > 0
    assert counts["shared_requests"] > 0
    assert counts["shared_conflicts"] == 0


@pytest.mark.parametrize("name", CASES)
def test_keeps_the_contract(by_lines, half, name):
    arguments = make_bottleneck(CASES[name], generator(), half)
    check_op(by_lines.bottleneck, reference.bottleneck, arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_spreads_what_is_not_finite_no_further_than_pytorch(by_lines, half, value):
    """Rows beyond a line's last column are computed in vain, from lines that others read."""
    arguments = make_bottleneck(CASES["strips"], generator(), half, make=make_integers)
    arguments[0][0, 3, 4, 43] = value
    expected = rounded_truth(arguments)
    out = by_lines.bottleneck(*arguments).double()
    assert expected.isnan().any()
    assert not expected.isnan().all()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


def can_implement(simulator: ModuleType, **changes: Any) -> bool:
    return bool(simulator.cuda_bottleneck_sm90_can_implement(*described(**changes), 0))


def is_profitable(simulator: ModuleType, **changes: Any) -> bool:
    return bool(simulator.cuda_bottleneck_sm90_is_profitable(*described(**changes), 0))


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 252, "out_channels": 252},
        {"inner": 72},
        {"inner": 60},
        {"channels": 64},
        {"channels": 264, "out_channels": 264},
        {"channels": 72, "projects": True},
        {"channels": 64, "projects": True, "stride": 2},
        {"address": 8},
        {"dtype": 0},
    ],
)
def test_is_not_implemented(simulator, changes):
    simulator.set_capability(90)
    assert can_implement(simulator)
    assert can_implement(simulator, channels=64, projects=True)
    assert not can_implement(simulator, **changes)
    assert not is_profitable(simulator, **changes)
    x, layers, stride = described(**changes)
    batch, _, *image = x[2]
    height, width = (-(-size // stride) for size in image)
    channels = layers[2][0][2][0]
    strides = (height * width * channels, 1, width * channels, channels)
    out = (1 << 40, x[1], (batch, channels, height, width), strides, None)
    with pytest.raises(ValueError, match="no kernel for such a bottleneck"):
        simulator.cuda_bottleneck_sm90(out, x, layers, stride, 0, 0)


def test_is_for_hopper_alone(simulator):
    for capability in (80, 86, 89, 90, 100, 120):
        simulator.set_capability(capability)
        assert can_implement(simulator) == (capability == 90)


def test_is_profitable_where_it_can(simulator):
    simulator.set_capability(90)
    assert is_profitable(simulator, batch=1, image=(5, 6))
    assert is_profitable(simulator, batch=1, image=(5, 6), channels=64, projects=True)


def test_heuristic_takes_it_for_stage_1(simulator, half):
    case = BlockCase(1, 64, 28, 28, 64, 256, projection=True)
    arguments = make_bottleneck(case, generator(), half, make=make_integers)
    out = On(SimulatedBackend(simulator, capability=90)).bottleneck(*arguments)
    assert torch.equal(out.double(), rounded_truth(arguments))
    # Each of four blocks: nine lines of conv1 at most, so that six are loaded twice; panels stored.
    assert simulator.take_statistics()["bulk_copies"] == 28 + 6 + 4 * 28


@pytest.mark.parametrize("projection", [False, True])
def test_every_wait_is_needed(simulator, projection):
    """But for what another one covers. Two images a block, so that each pipeline comes round and
    jobs follow each other."""
    channels = 64 if projection else 200
    case = BlockCase(8, channels, 5, 6, 64, 200, projection=projection)
    x, *layers = make_bottleneck(case, generator(), torch.bfloat16, make=make_integers)
    launcher = SimulatedBackend(simulator, capability=90)._launcher
    run = partial(launcher.bottleneck, KERNEL, x, [y for y in layers if y is not None])
    right = run()
    counts = simulator.take_statistics()
    assert counts["named_barriers"] == 14
    assert counts["proxy_fences"] == 15
    # A projection's tiles are waited for twice, once for each product's registers.
    tiles = counts["product_waits"] // 2 if projection else counts["product_waits"]
    assert tiles == 2 * 5 * 4
    # The first result follows none, and the last ones' places are not filled again.
    stores = {*range(1, 9)} if projection else {*range(1, 5), 10}
    mistakes = {
        "skipped_mbarrier_wait": set(range(counts["mbarrier_waits"])),
        "skipped_named_barrier": set(range(14)),
        "skipped_proxy_fence": set(range(1, 15)),
        "skipped_product_wait": set(range(10 if projection else tiles)),
        "skipped_store_wait": stores,
        "skipped_wait": {0} if projection else set(),
        "skipped_barrier": {0},
        "skipped_register_release": {0},
        "bytes_not_expected": {128},
    }
    unnoticed = []
    for mistake, which in mistakes.items():
        for number in which:
            simulator.plant({mistake: number})
            try:
                if not torch.equal(run(), right):
                    continue
            except simulator.Fault:
                continue
            unnoticed.append((mistake, number))
    assert unnoticed == []


@pytest.mark.parametrize("offset", range(1, 8))
def test_wrong_base_offset_is_caught(simulator, half, by_lines, offset):
    arguments = make_bottleneck(CASES["one job"], generator(), half, make=make_integers)
    simulator.plant({"base_offset": offset})
    out = by_lines.bottleneck(*arguments).double()
    assert not torch.equal(out, rounded_truth(arguments))


def test_halo_off_by_one_is_caught(simulator, half):
    """The kernel is told of a row more than the image has: it must not read it unnoticed."""
    x, *layers, _ = make_bottleneck(BlockCase(1, 16, 13, 8, 16, 16), generator(), half)
    taller = torch.empty(1, 16, 14, 8, dtype=half).contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(taller)
    read = [t for conv, bn in layers for t in (conv.weight, *bn[:4])]
    short = (taller.data_ptr(), x.nbytes, False)
    buffers = [(t.data_ptr(), t.nbytes, False) for t in read]
    simulator.set_capability(90)
    simulator.set_buffers([*buffers, short, (out.data_ptr(), out.nbytes, True)])
    types = (torch.float32, torch.float16, torch.bfloat16)
    arguments = [(tensor_arg(conv.weight), batch_norm_arg(bn, types)) for conv, bn in layers]
    with pytest.raises(simulator.Fault, match=r"reads .* out of bounds of global memory"):
        simulator.cuda_bottleneck_sm90(tensor_arg(out), tensor_arg(taller), arguments, 1, 0, 0)


def test_whole_network_keeps_the_contract(simulator, half):
    torch.manual_seed(0)
    theirs = randomise_statistics(torchvision.models.resnet50()).eval()
    ours = resnet_fused.resnet50().eval()
    ours.load_state_dict(theirs.state_dict())
    wide = theirs.double()
    x = torch.randn(2, 3, 33, 33, generator=generator()).to(half)
    with torch.no_grad():
        truth = wide(x.double())
        ours, theirs = ours.to(half), theirs.to(half)
        with use_backend(ByLines(simulator)):
            result = ours(x)
        assert_contract(result, theirs(x), truth)
