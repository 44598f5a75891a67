"""The CUDA kernels for a whole bottleneck: machine code, results, simulated, waits, choice."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from conftest import one_half
from machine_code import cuobjdump, kernels
from torch import Tensor

from resnet_fused import Bottleneck, ResNet, use_backend
from resnet_fused._extension import tensor_arg
from resnet_fused.backends import Candidate, autotune
from resnet_fused.backends.arguments import batch_norm_arg
from resnet_fused.backends.cuda_sim import SimulatedBackend
from resnet_fused.numerics import assert_contract, cast, check_op
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


class Kernel(NamedTuple):
    """One of the two kernels, and what its tests need to know."""

    name: str  # of its functions in the bindings
    capability: int
    candidate: str
    cases: dict[str, BlockCase]
    spread: tuple[str, int, int]  # a case, and where in its image something is not finite
    moves: str  # what the simulator counts of it
    conflicts: str
    blocks: int  # of the six of a network, those that it computes
    not_implemented: dict[str, dict[str, Any]]  # `described` otherwise


SM80 = Kernel(
    name="cuda_bottleneck",
    capability=80,
    candidate="cuda fused",
    # One tile; several in each direction with tails in all of them; slices of output channels.
    cases={
        "one tile": BlockCase(1, 64, 14, 14, 64, 64),
        "tails": BlockCase(2, 72, 17, 15, 40, 72),
        "several tiles": BlockCase(1, 136, 29, 16, 64, 136),
        "first of stage 1": BlockCase(1, 64, 15, 16, 64, 256, projection=True),
        "projection with tails": BlockCase(2, 24, 16, 13, 56, 136, projection=True),
        "strided": BlockCase(1, 40, 31, 17, 64, 72, 2, True),
        "wide": BlockCase(1, 200, 9, 16, 128, 200),
        "wide with projection": BlockCase(1, 72, 9, 15, 104, 200, projection=True),
        "wide strided": BlockCase(1, 72, 16, 19, 128, 72, 2, True),
        "one pixel": BlockCase(2, 8, 1, 1, 8, 8),
    },
    # Positions are computed in vain, and those beyond the last tap must not count.
    spread=("several tiles", 20, 13),
    moves="matrix_loads",
    conflicts="bank_conflicts",
    blocks=4,
    not_implemented={
        "channels": {"channels": 252, "out_channels": 252},
        "inner": {"inner": 136},
        "inner of no chunks": {"inner": 60},
        "shortcut": {"channels": 64},
        "strided identity": {"stride": 2},
        "stride": {"stride": 3, "projects": True},
        "address": {"address": 8},
        "dtype": {"dtype": 0},
    },
)

SM90 = Kernel(
    name="cuda_bottleneck_sm90",
    capability=90,
    candidate="cuda fused sm90",
    # The simulated GPU has 4 multiprocessors. A job each; several, of which blocks take two or
    # three; strips of images of more than 56 columns; channels that fill no panel.
    cases={
        "one job": BlockCase(1, 64, 6, 14, 64, 64),
        "a line's columns": BlockCase(1, 256, 5, 56, 64, 256),
        "two strips": BlockCase(1, 256, 5, 62, 64, 256),
        "tails": BlockCase(2, 72, 17, 15, 40, 72),
        "strips": BlockCase(1, 136, 7, 130, 64, 136),
        "several jobs": BlockCase(9, 200, 5, 20, 64, 200),
        "first of stage 1": BlockCase(1, 64, 15, 16, 64, 256, projection=True),
        "projection with tails": BlockCase(9, 24, 7, 66, 56, 136, projection=True),
        "one pixel": BlockCase(2, 8, 1, 1, 8, 8),
    },
    # Rows beyond a line's last column are computed in vain, from lines that others read.
    spread=("strips", 4, 43),
    moves="bulk_copies",
    conflicts="shared_conflicts",
    blocks=2,
    not_implemented={
        "channels": {"channels": 252, "out_channels": 252},
        "inner": {"inner": 72},
        "inner of no chunks": {"inner": 60},
        "shortcut": {"channels": 64},
        "many channels": {"channels": 264, "out_channels": 264},
        "wide projection": {"channels": 72, "projects": True},
        "stride": {"channels": 64, "projects": True, "stride": 2},
        "address": {"address": 8},
        "dtype": {"dtype": 0},
    },
)

KERNELS = {"sm80": SM80, "sm90": SM90}
both = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def each(names: str) -> pytest.MarkDecorator:
    """Parametrizes by kernel and by the name of each entry of its field of that name."""
    found = [
        pytest.param(kernel, name, id=f"{key}-{name}")
        for key, kernel in KERNELS.items()
        for name in getattr(kernel, names)
    ]
    return pytest.mark.parametrize(("kernel", "name"), found)


class WholeBlocks(SimulatedBackend):
    """Takes that kernel wherever it is listed."""

    def __init__(self, simulator: ModuleType, kernel: Kernel) -> None:
        super().__init__(simulator, capability=kernel.capability)
        self.kernel = kernel

    def bottleneck(self, x: Tensor, layer1: ConvBn, *others: Any) -> list[Candidate]:
        listed = super().bottleneck(x, layer1, *others)
        ours = [c for c in listed if c.name == self.kernel.candidate]
        assert all(candidate.is_profitable for candidate in ours) or self.kernel is SM80
        return [candidate._replace(is_profitable=True) for candidate in ours]


def rounded_truth(arguments: list[Any]) -> Tensor:
    """In float64, what the layers give each other rounded to the input's dtype."""
    x, layer1, layer2, layer3, projection = cast(arguments, torch.float64)
    half = arguments[0].dtype

    def conv_bn(x: Tensor, layer: ConvBn, residual: Tensor | None = None) -> Tensor:
        return reference.conv_bn(x, layer, residual, True).to(half).double()

    out = conv_bn(conv_bn(x, layer1), layer2)
    if projection is None:
        return conv_bn(out, layer3, x)
    return reference.conv_bn_projection(out, layer3, x, projection).to(half).double()


@one_half
@each("cases")
def test_exact_on_integers_and_free_of_bank_conflicts(simulator, kernel, half, name):
    arguments = make_bottleneck(kernel.cases[name], generator(), half, make=make_integers)
    out = On(WholeBlocks(simulator, kernel)).bottleneck(*arguments)
    assert torch.equal(out.double(), rounded_truth(arguments))
    counts = simulator.take_statistics()
    assert counts[kernel.moves] > 0
    assert counts["shared_requests"] > 0
    assert counts[kernel.conflicts] == 0


@each("cases")
def test_keeps_the_contract(simulator, kernel, half, name):
    arguments = make_bottleneck(kernel.cases[name], generator(), half)
    check_op(On(WholeBlocks(simulator, kernel)).bottleneck, reference.bottleneck, arguments)


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_spreads_what_is_not_finite_no_further_than_pytorch(simulator, kernel, half, value):
    name, row, column = kernel.spread
    arguments = make_bottleneck(kernel.cases[name], generator(), half, make=make_integers)
    arguments[0][0, 3, row, column] = value
    expected = rounded_truth(arguments)
    out = On(WholeBlocks(simulator, kernel)).bottleneck(*arguments).double()
    assert expected.isnan().any()
    assert not expected.isnan().all()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


Description = tuple[tuple[Any, ...], list[Any], int]


def described(
    dtype: int = 2,
    batch: int = 256,
    image: tuple[int, int] = (56, 56),
    channels: int = 256,
    inner: int = 64,
    out_channels: int = 256,
    stride: int = 1,
    address: int = 16,
    projects: bool = False,
) -> Description:
    """x, layers and stride of a block that is never run: stage 1 of a ResNet-50, 256 images."""

    def tensor(address: int, *sizes: int) -> tuple[Any, ...]:
        _, channels, height, width = sizes
        strides = (height * width * channels, 1, width * channels, channels)
        return address, dtype, sizes, strides, None

    def layer(filters: int, channels: int, window: int) -> tuple[Any, ...]:
        vector = (16, 0, (filters,), (1,), None)
        return tensor(16, filters, channels, window, window), (vector, vector, None, None, 1e-5)

    layers = [layer(inner, channels, 1), layer(inner, inner, 3), layer(out_channels, inner, 1)]
    if projects:
        layers.append(layer(out_channels, channels, 1))
    return tensor(address, batch, channels, *image), layers, stride


def asks(simulator: ModuleType, kernel: Kernel, question: str, **changes: Any) -> bool:
    return bool(getattr(simulator, f"{kernel.name}_{question}")(*described(**changes), 0))


@pytest.fixture
def can_implement(simulator: ModuleType, kernel: Kernel) -> Callable[..., bool]:
    simulator.set_capability(kernel.capability)
    return partial(asks, simulator, kernel, "can_implement")


@pytest.fixture
def is_profitable(simulator: ModuleType, kernel: Kernel) -> Callable[..., bool]:
    simulator.set_capability(kernel.capability)
    return partial(asks, simulator, kernel, "is_profitable")


@each("not_implemented")
def test_is_not_implemented(simulator, kernel, can_implement, is_profitable, name):
    changes = kernel.not_implemented[name]
    assert can_implement()
    assert can_implement(channels=64, projects=True)
    assert not can_implement(**changes)
    assert not is_profitable(**changes)
    x, layers, stride = described(**changes)
    batch, _, *image = x[2]
    height, width = (-(-size // stride) for size in image)
    channels = layers[2][0][2][0]
    strides = (height * width * channels, 1, width * channels, channels)
    out = (1 << 40, x[1], (batch, channels, height, width), strides, None)
    with pytest.raises(ValueError, match="no kernel for such a bottleneck"):
        getattr(simulator, kernel.name)(out, x, layers, stride, 0, 0)


@pytest.mark.parametrize("kernel", [SM80])
def test_is_implemented_where_it_fits_shared_memory_but_not_on_hopper(simulator, can_implement):
    for capability, widest in ((80, 128), (86, 64), (89, 64), (90, 0), (120, 64)):
        simulator.set_capability(capability)
        for inner in (64, 128):
            for projects in (False, True):
                found = can_implement(inner=inner, projects=projects)
                assert found == (inner <= widest)


@pytest.mark.parametrize("kernel", [SM90])
def test_is_for_hopper_alone(simulator, can_implement):
    for capability in (80, 86, 89, 90, 100, 120):
        simulator.set_capability(capability)
        assert can_implement() == (capability == 90)


@pytest.mark.parametrize("kernel", [SM80])
def test_is_profitable_in_the_first_stage(is_profitable):
    """And not where recomputation outweighs the traffic, nor where few images leave a GPU idle."""
    assert is_profitable()
    assert not is_profitable(channels=64, projects=True)
    wide = {"channels": 512, "inner": 128, "out_channels": 512, "image": (28, 28)}
    assert not is_profitable(**wide)
    strided = {**wide, "channels": 256, "image": (56, 56), "stride": 2, "projects": True}
    assert not is_profitable(**strided)
    assert not is_profitable(image=(16, 16))  # a tile of 2 x 2 beside one of 14 x 14
    assert is_profitable(batch=1)  # 16 tiles for 4 SMs
    assert not is_profitable(batch=1, image=(14, 42))


@pytest.mark.parametrize("kernel", [SM90])
def test_is_profitable_where_it_can_on_hopper(is_profitable):
    assert is_profitable(batch=1, image=(5, 6))
    assert is_profitable(batch=1, image=(5, 6), channels=64, projects=True)


def test_heuristic_takes_the_whole_block(simulator, half):
    """Four tiles of one launch: the steps of conv1, conv2 and four slices of conv3."""
    case = BlockCase(1, 256, 28, 28, 64, 256)
    arguments = make_bottleneck(case, generator(), half, make=make_integers)
    out = On(SimulatedBackend(simulator, capability=80)).bottleneck(*arguments)
    assert torch.equal(out.double(), rounded_truth(arguments))
    assert simulator.take_statistics()["waits"] == 4 * (8 + 9 + 4)


def test_heuristic_takes_the_whole_block_on_hopper(simulator, half):
    case = BlockCase(1, 64, 28, 28, 64, 256, projection=True)
    arguments = make_bottleneck(case, generator(), half, make=make_integers)
    out = On(SimulatedBackend(simulator, capability=90)).bottleneck(*arguments)
    assert torch.equal(out.double(), rounded_truth(arguments))
    # Each of four blocks: nine lines of conv1 at most, so that six are loaded twice; panels stored.
    assert simulator.take_statistics()["bulk_copies"] == 28 + 6 + 4 * 28


def test_reads_tensors_off_sixteen_bytes_layer_by_layer(simulator, half):
    arguments = make_bottleneck(SM80.cases["one tile"], generator(), half, make=make_integers)
    x = arguments[0]
    storage = torch.zeros(x.numel() + 1, dtype=half)[1:]
    arguments[0] = storage.as_strided(x.shape, x.stride(), 1).copy_(x)
    out = On(SimulatedBackend(simulator)).bottleneck(*arguments)
    assert torch.equal(out.double(), rounded_truth(arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": 0}, "x is a null pointer"),
        ({"inner": 0}, "inner must be at least 1"),
        ({"batch": 0, "image": (2**29, 8)}, "height must be at least 0 and below 2"),
        ({"batch": 2**20, "image": (2**20, 2**20)}, r"more than 2\^48 elements"),
        ({"dtype": 3}, "x must be float32, float16 or bfloat16, found float64"),
    ],
)
def test_binding_refuses(simulator, changes, message):
    with pytest.raises(ValueError, match=message):
        asks(simulator, SM80, "can_implement", **changes)


def test_binding_refuses_layers(simulator):
    x, layers, stride = described()
    ask = simulator.cuda_bottleneck_can_implement
    with pytest.raises(ValueError, match="three layers, or four, are needed"):
        ask(x, layers[:2], stride, 0)
    weight, bn = layers[2]
    with pytest.raises(ValueError, match="weight is a null pointer"):
        ask(x, [*layers[:2], ((0, *weight[1:]), bn)], stride, 0)
    with pytest.raises(ValueError, match=r"weight must be of size \(64, 64, 3, 3\)"):
        ask(x, [layers[0], layers[0], layers[2]], stride, 0)


def test_binding_refuses_a_null_result(simulator):
    x, layers, stride = described(address=1 << 40)
    with pytest.raises(ValueError, match="out is a null pointer"):
        simulator.cuda_bottleneck((0, *x[1:]), x, layers, stride, 0, 0)


@pytest.mark.parametrize("projection", [False, True])
def test_every_wait_on_hopper_is_needed(simulator, projection):
    """But for what another one covers. Two images a block, so that each pipeline comes round and
    jobs follow each other."""
    channels = 64 if projection else 200
    case = BlockCase(8, channels, 5, 6, 64, 200, projection=projection)
    x, *layers = make_bottleneck(case, generator(), torch.bfloat16, make=make_integers)
    launcher = SimulatedBackend(simulator, capability=90)._launcher
    run = partial(launcher.bottleneck, SM90.name, x, [y for y in layers if y is not None])
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
def test_wrong_base_offset_is_caught(simulator, half, offset):
    arguments = make_bottleneck(SM90.cases["one job"], generator(), half, make=make_integers)
    simulator.plant({"base_offset": offset})
    out = On(WholeBlocks(simulator, SM90)).bottleneck(*arguments).double()
    assert not torch.equal(out, rounded_truth(arguments))


@both
def test_halo_off_by_one_is_caught(simulator, kernel, half):
    """The kernel is told of a row more than the image has: it must not read it unnoticed."""
    x, *layers, _ = make_bottleneck(BlockCase(1, 16, 13, 8, 16, 16), generator(), half)
    taller = torch.empty(1, 16, 14, 8, dtype=half).contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(taller)
    read = [t for conv, bn in layers for t in (conv.weight, *bn[:4])]
    short = (taller.data_ptr(), x.nbytes, False)
    buffers = [(t.data_ptr(), t.nbytes, False) for t in read]
    simulator.set_capability(kernel.capability)
    simulator.set_buffers([*buffers, short, (out.data_ptr(), out.nbytes, True)])
    types = (torch.float32, torch.float16, torch.bfloat16)
    arguments = [(tensor_arg(conv.weight), batch_norm_arg(bn, types)) for conv, bn in layers]
    with pytest.raises(simulator.Fault, match=r"reads .* out of bounds of global memory"):
        getattr(simulator, kernel.name)(tensor_arg(out), tensor_arg(taller), arguments, 1, 0, 0)


@both
def test_network_keeps_the_contract(simulator, kernel, half):
    """Of a ResNet-50's stages the first blocks alone: the third is the second again. Blocks that
    are too wide for the kernel have one for each layer."""
    torch.manual_seed(0)
    net = randomise_statistics(ResNet(Bottleneck, [2, 2, 1, 1])).eval().to(half)
    x = torch.randn(2, 3, 33, 33, generator=generator()).to(half)
    backend = WholeBlocks(simulator, kernel)
    with torch.no_grad(), use_backend(backend), autotune.tuner.watch() as decisions:
        result = net(x)
    assert simulator.take_statistics()["bank_conflicts"] == 0
    with torch.no_grad(), use_backend("reference"):
        assert_contract(result, net(x), net.double()(x.double()))
    whole = kernel.blocks
    chosen = [d.candidate.name for d in decisions if d.op == "bottleneck"]
    assert chosen == [kernel.candidate] * whole + ["layers"] * (6 - whole)
    layers = [d.candidate.name for d in decisions if d.op.startswith("conv_bn")]
    assert len(layers) == (6 - whole) * 3
    assert all(("sm90" in name) == (kernel is SM90) for name in layers)


# Per architecture: for each 16-bit type 64 and 128 inner channels, each with the identity, a
# projection, and a strided one.
COMPILED = 2 * 2 * 3


def test_spills_nothing(extension, architectures):
    usage = cuobjdump(extension, "--dump-resource-usage")
    found = re.findall(r"bottleneck_kernel\w*:\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert len(found) == COMPILED * len(architectures)
    assert {(stack, local) for _, stack, local in found} == {("0", "0")}


def test_uses_tensor_cores_and_moves_sixteen_bytes_an_access(extension, architectures):
    bodies = kernels(extension, r"\w*bottleneck_kernelI", *architectures)
    assert len(bodies) == COMPILED * len(architectures)
    for body in bodies:
        for instruction in ("HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS.E.BYPASS", "STG.E.128"):
            assert instruction in body
        projects = re.match(r"\w*?TileI(?:Li\d+E)+Lb(\d)E", body)
        assert projects is not None
        assert ("LDG.E.128" in body) == (projects[1] == "0")  # the shortcut
        assert not re.search(r"\b(LDL|STL)\b|STG\.E\.(64|U16)|STS\.U16", body)
