"""The host simulator under random orders of threads and bulk copies, which seeds choose.

Races are found by vector clocks in any one order; what only some orders show is who meets whom at a
barrier and which arrivals end a phase. The kernels of csrc/host_sim/tests/primitives_schedule.cu
have mistakes of that kind, each of which the fixed order misses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor

from resnet_fused.backends.cuda_sim import SimulatedBackend
from resnet_fused.parameters import ConvBn, Convolution, MaxPool
from resnet_fused.testing.cases import BlockCase, generator, make_batch_norm, make_bottleneck
from resnet_fused.testing.on import On

pytestmark = pytest.mark.simulator

SEEDS = range(1, 9)
WORDS = list(range(6 * 8 * 32))  # six tiles of eight rows
OUTPUTS = 192


def rows(*tiles: int) -> list[int]:
    """The first row of each tile, which its swizzle leaves as it is."""
    return [WORDS[tile * 256 + word] for tile in tiles for word in range(32)]


# What each kernel computes, and the one with its mistake.
KERNELS = {
    "two producers": ("two producers that do not wait", rows(*range(6))),
    "two consumers": (
        "two consumers, one of which releases early",
        rows(0, 0, 3, 1, 2, 2),
    ),
    "two copies": ("two copies that one mbarrier counts", rows(0, 1)),
    "two barriers": (
        "two barriers of one number",
        [*range(63, -1, -1), *range(127, 63, -1)],
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_right_kernel_is_right_in_every_order(simulator, name):
    expected = KERNELS[name][1]
    for seed in (0, *SEEDS):
        simulator.set_schedule(seed)
        assert simulator.run_primitive(name, WORDS, OUTPUTS)[: len(expected)] == expected


@pytest.mark.parametrize("name", KERNELS)
def test_mistake_that_the_fixed_order_misses_is_caught_under_a_seed(simulator, name):
    mistake, expected = KERNELS[name]
    assert simulator.run_primitive(mistake, WORDS, OUTPUTS)[: len(expected)] == expected
    caught = 0
    for seed in SEEDS:
        simulator.set_schedule(seed)
        try:
            simulator.run_primitive(mistake, WORDS, OUTPUTS)
        except simulator.Fault:
            caught += 1
    assert caught >= len(SEEDS) // 2


def test_a_seed_gives_the_same_order_again(simulator):
    def messages() -> list[str]:
        found = []
        for seed in SEEDS:
            simulator.set_schedule(seed)
            with pytest.raises(simulator.Fault) as caught:
                simulator.run_primitive("two barriers of one number", WORDS, OUTPUTS)
            found.append(str(caught.value))
        return found

    first = messages()
    assert messages() == first
    assert len(set(first)) > 1


def conv(simulator: ModuleType, tile: str, capability: int, projection: bool) -> Tensor:
    backend = On(SimulatedBackend(simulator, getattr(simulator.ConvTile, tile), capability))
    rng = generator()
    x = torch.randn(1, 72, 9, 32, generator=rng).half()
    conv = Convolution(torch.randn(72, 72, 3, 3, generator=rng).half(), (1, 1), (1, 1))
    layer = ConvBn(conv, make_batch_norm(72, rng))
    if projection:
        shortcut = Convolution(torch.randn(72, 72, 1, 1, generator=rng).half())
        return backend.conv_bn_projection(x, layer, x, layer._replace(conv=shortcut))
    residual = torch.randn(1, 72, 9, 32, generator=rng).half()
    return backend.conv_bn(x, layer, residual, True)


def lines(simulator: ModuleType, tile: str) -> Tensor:
    rng = generator()
    x = torch.randn(9, 72, 7, 7, generator=rng).half()
    conv = Convolution(torch.randn(136, 72, 3, 3, generator=rng).half(), (1, 1), (1, 1))
    layer = ConvBn(conv, make_batch_norm(136, rng))
    backend = SimulatedBackend(simulator, getattr(simulator.ConvTile, tile), capability=90)
    return On(backend).conv_bn(x, layer, None, True)


def stem(simulator: ModuleType, capability: int) -> Tensor:
    rng = generator()
    x = torch.randn(1, 3, 28, 32, generator=rng).half()
    conv = Convolution(torch.randn(64, 3, 7, 7, generator=rng).half(), (2, 2), (3, 3))
    layer = ConvBn(conv, make_batch_norm(64, rng))
    backend = SimulatedBackend(simulator, capability=capability)
    return On(backend).stem(x, layer, MaxPool())


def bottleneck(simulator: ModuleType, capability: int, channels: int, images: int) -> Tensor:
    case = BlockCase(images, channels, 14, 14, 64, 64, 1, projection=True)
    arguments = make_bottleneck(case, generator(), torch.bfloat16)
    (only,) = SimulatedBackend(simulator, capability=capability).bottleneck(*arguments)
    return only.launch(*arguments)


def head(simulator: ModuleType) -> Tensor:
    rng = generator()
    x = torch.randn(2, 64, 7, 7, generator=rng).half()
    weight = torch.randn(24, 64, generator=rng).half()
    return On(SimulatedBackend(simulator)).head(x, weight, None)


def bn_add_relu(simulator: ModuleType) -> Tensor:
    rng = generator()
    x, residual = (torch.randn(2, 24, 5, 7, generator=rng).half() for _ in range(2))
    bn = make_batch_norm(24, rng)
    return On(SimulatedBackend(simulator)).bn_add_relu(x, bn, residual, True)


NETWORK: dict[str, Callable[[ModuleType], Tensor]] = {
    **{
        f"{tile}{' projection' * projection}": partial(
            conv, tile=tile, capability=90 if "sm90" in tile else 80, projection=projection
        )
        for tile in (
            *("m64n64", "m128n64_sm90", "m128n128_sm90", "m128n128_sm90_pingpong"),
            *("m128n256_sm90_cluster", "m256n128_sm90_cluster"),
        )
        for projection in (False, True)
    },
    "m128n128": partial(conv, tile="m128n128", capability=80, projection=False),
    "m64n64_sm90_split4": partial(conv, tile="m64n64_sm90_split4", capability=90, projection=False),
    **{f"m{n}n128_sm90_lines": partial(lines, tile=f"m{n}n128_sm90_lines") for n in (200, 224)},
    "stem": partial(stem, capability=80),
    "stem sm90": partial(stem, capability=90),
    "bottleneck": partial(bottleneck, capability=80, channels=72, images=1),
    "bottleneck sm90": partial(bottleneck, capability=90, channels=64, images=5),
    "head": head,
    "bn_add_relu": bn_add_relu,
}


@pytest.mark.parametrize("name", NETWORK)
def test_kernels_compute_the_same_in_every_order(simulator, name):
    expected = NETWORK[name](simulator)
    for seed in SEEDS:
        simulator.set_schedule(seed)
        assert torch.equal(NETWORK[name](simulator), expected)


def test_missing_waits_and_deadlocks_are_reported_in_every_order(simulator):
    run = partial(conv, simulator, "m128n64_sm90", 90, False)
    for seed in SEEDS:
        simulator.set_schedule(seed)
        for mistake, message in (
            ({"skipped_mbarrier_wait": 0}, "in flight|races"),
            ({"skipped_proxy_fence": 0}, "no fence.proxy.async between"),
            ({"skipped_register_release": 0}, "deadlock"),
            ({"bytes_not_expected": 128}, "deadlock"),
        ):
            simulator.plant(mistake)
            with pytest.raises(simulator.Fault, match=message):
                run()
        simulator.plant()
