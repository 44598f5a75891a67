"""The kernel for a whole bottleneck over a cluster's blocks: results, simulated, its waits, and its
choice."""

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

KERNEL = "cuda_bottleneck_sm90_cluster"

# The simulated GPU has 4 multiprocessors, so one cluster, which takes all jobs. Rings come round
# within an image or from one to the next; an odd number of lines; lines that leave columns over;
# channels that fill no panel, and none of a block's.
CASES = {
    "as in a ResNet": BlockCase(1, 512, 28, 28, 128, 512),
    "a step": BlockCase(1, 64, 2, 28, 128, 64),
    "several images": BlockCase(3, 200, 14, 14, 128, 200),
    "odd": BlockCase(5, 136, 7, 15, 72, 136),
    "one block's channels": BlockCase(2, 264, 5, 28, 64, 264),
    "tails": BlockCase(2, 72, 9, 27, 104, 72),
    "one pixel": BlockCase(3, 8, 1, 1, 8, 8),
}


class OverClusters(SimulatedBackend):
    """Takes this kernel wherever it is listed."""

    def __init__(self, simulator: ModuleType) -> None:
        super().__init__(simulator, capability=90)

    def bottleneck(self, x: Tensor, layer1: ConvBn, *others: Any) -> list[Candidate]:
        listed = super().bottleneck(x, layer1, *others)
        ours = [c for c in listed if c.name == "cuda fused cluster"]
        return [candidate._replace(is_profitable=True) for candidate in ours]


@pytest.fixture
def over_clusters(simulator: ModuleType) -> On:
    return On(OverClusters(simulator))


@pytest.mark.parametrize("name", CASES)
def test_exact_on_integers_and_free_of_bank_conflicts(simulator, over_clusters, half, name):
    case = CASES[name]
    arguments = make_bottleneck(case, generator(), half, make=make_integers)
    assert torch.equal(over_clusters.bottleneck(*arguments).double(), rounded_truth(arguments))
    counts = simulator.take_statistics()
    assert counts["matrix_loads"] > 0
    assert counts["shared_requests"] > 0
    assert counts["bank_conflicts"] == counts["shared_conflicts"] == 0
    steps = case.batch * -(-case.height // 2)
    pairs = steps + case.batch  # of lines of conv1
    # In each block of the ends panels of x, shortcut and result; lines to both of the middle, every
    # fourth pair twice, and back.
    assert counts["bulk_copies"] == 2 * (
        8 * pairs + 2 * 4 * steps + 2 * (pairs + -(-pairs // 4)) + 2 * steps
    )


@pytest.mark.parametrize("name", CASES)
def test_keeps_the_contract(over_clusters, half, name):
    arguments = make_bottleneck(CASES[name], generator(), half)
    check_op(over_clusters.bottleneck, reference.bottleneck, arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_spreads_what_is_not_finite_no_further_than_pytorch(over_clusters, half, value):
    """Columns between lines are computed in vain, from rows of both, and some that none wrote."""
    arguments = make_bottleneck(CASES["tails"], generator(), half, make=make_integers)
    arguments[0][0, 3, 4, 26] = value
    expected = rounded_truth(arguments)
    out = over_clusters.bottleneck(*arguments).double()
    assert expected.isnan().any()
    assert not expected.isnan().all()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


STAGE_2 = {"image": (28, 28), "channels": 512, "inner": 128, "out_channels": 512}


def asked(simulator: ModuleType, question: str, **changes: Any) -> bool:
    return bool(getattr(simulator, f"{KERNEL}_{question}")(*described(**STAGE_2 | changes), 0))


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 508, "out_channels": 508},
        {"inner": 136},
        {"inner": 124},
        {"channels": 256},
        {"channels": 520, "out_channels": 520},
        {"image": (28, 30)},
        {"projects": True},
        {"channels": 256, "projects": True, "stride": 2},
        {"address": 8},
        {"dtype": 0},
    ],
)
def test_is_not_implemented(simulator, changes):
    simulator.set_capability(90)
    assert asked(simulator, "can_implement")
    assert not asked(simulator, "can_implement", **changes)
    assert not asked(simulator, "is_profitable", **changes)
    x, layers, stride = described(**STAGE_2 | changes)
    batch, _, *image = x[2]
    height, width = (-(-size // stride) for size in image)
    channels = layers[2][0][2][0]
    strides = (height * width * channels, 1, width * channels, channels)
    out = (1 << 40, x[1], (batch, channels, height, width), strides, None)
    with pytest.raises(ValueError, match="no kernel for such a bottleneck"):
        getattr(simulator, KERNEL)(out, x, layers, stride, 0, 0)


def test_is_for_hopper_alone(simulator):
    for capability in (80, 86, 89, 90, 100, 120):
        simulator.set_capability(capability)
        assert asked(simulator, "can_implement") == (capability == 90)


def test_is_profitable_for_wide_blocks_and_lines(simulator):
    simulator.set_capability(90)
    assert asked(simulator, "is_profitable")
    assert asked(simulator, "is_profitable", batch=1)
    assert asked(simulator, "is_profitable", inner=72, image=(5, 15))
    assert not asked(simulator, "is_profitable", image=(14, 14))
    assert not asked(simulator, "is_profitable", inner=64)


def test_heuristic_takes_it_for_stage_2(simulator, half):
    arguments = make_bottleneck(
        BlockCase(1, 512, 4, 28, 128, 512), generator(), half, make=make_integers
    )
    out = On(SimulatedBackend(simulator, capability=90)).bottleneck(*arguments)
    assert torch.equal(out.double(), rounded_truth(arguments))
    # Of 2 steps and 3 pairs, as counted above.
    assert simulator.take_statistics()["bulk_copies"] == 2 * (8 * 3 + 2 * 4 * 2 + 2 * 4 + 2 * 2)


# Each once in a thread's way through two images of two steps, but for what comes to nothing: a
# place that is released and not filled again. Of x there are 48 panels for 10 places, and a wait
# for the products of each, of which every eighth one is for the sums; of results 4 for 3.
MISTAKES = {
    "skipped_mbarrier_wait": range(50),
    "skipped_product_wait": [*range(38), 39, 47],
    "skipped_named_barrier": range(6),
    "skipped_proxy_fence": range(7),
    "skipped_store_wait": [1, 4],
    "skipped_cluster_barrier": range(2),
    "skipped_register_release": [0],
    "skipped_arrival": range(4),
    "bytes_not_expected": [128],
}


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(mistake, marks=[pytest.mark.thorough] if len(MISTAKES[mistake]) > 9 else [])
        for mistake in MISTAKES
    ],
)
def test_every_wait_is_needed(simulator, mistake):
    x, *layers = make_bottleneck(
        BlockCase(2, 72, 4, 28, 72, 72), generator(), torch.bfloat16, make=make_integers
    )
    launcher = SimulatedBackend(simulator, capability=90)._launcher
    run = partial(launcher.bottleneck, KERNEL, x, [y for y in layers if y is not None])
    right = run()
    counts = simulator.take_statistics()
    assert [counts[f"{what}s"] for what in ("mbarrier_wait", "product_wait")] == [50, 48]
    assert [counts[f"{what}s"] for what in ("named_barrier", "proxy_fence")] == [6, 7]
    assert [counts[f"{what}s"] for what in ("store_wait", "cluster_barrier")] == [5, 2]
    unnoticed = []
    for number in MISTAKES[mistake]:
        simulator.plant({mistake: number})
        try:
            if not torch.equal(run(), right):
                continue
        except simulator.Fault:
            continue
        unnoticed.append(number)
    assert unnoticed == []


def test_halo_off_by_one_is_caught(simulator, half):
    """The kernel is told of a row more than the image has: it must not read it unnoticed."""
    x, *layers, _ = make_bottleneck(BlockCase(1, 16, 13, 8, 72, 16), generator(), half)
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
        getattr(simulator, KERNEL)(tensor_arg(out), tensor_arg(taller), arguments, 1, 0, 0)


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
        with use_backend(OverClusters(simulator)):
            result = ours(x)
        assert_contract(result, theirs(x), truth)
