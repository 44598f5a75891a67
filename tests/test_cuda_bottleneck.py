"""The CUDA kernel for a whole bottleneck: machine code, results, simulated, and its choice."""

from __future__ import annotations

import copy
import re
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from machine_code import cuobjdump, kernels
from torch import Tensor

import resnet_fused
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

# One tile; several in each direction with tails in all of them; slices of output channels.
CASES = {
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
}


class WholeBlocks(SimulatedBackend):
    """Takes the kernel for the whole block, which it must have for few inner channels."""

    def bottleneck(self, x: Tensor, layer1: ConvBn, *others: Any) -> list[Candidate]:
        listed = super().bottleneck(x, layer1, *others)
        assert listed or layer1.conv.weight.shape[0] > 128
        return [candidate._replace(is_profitable=True) for candidate in listed]


@pytest.fixture
def whole(simulator) -> On:
    return On(WholeBlocks(simulator))


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


@pytest.mark.parametrize("name", CASES)
def test_exact_on_integers_and_free_of_bank_conflicts(simulator, whole, half, name):
    arguments = make_bottleneck(CASES[name], generator(), half, make=make_integers)
    assert torch.equal(whole.bottleneck(*arguments).double(), rounded_truth(arguments))
    counts = simulator.take_statistics()
    assert counts["matrix_loads"] > 0
    assert counts["bank_conflicts"] == 0


@pytest.mark.parametrize("name", CASES)
def test_keeps_the_contract(whole, half, name):
    arguments = make_bottleneck(CASES[name], generator(), half)
    check_op(whole.bottleneck, reference.bottleneck, arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_spreads_what_is_not_finite_no_further_than_pytorch(whole, half, value):
    """The positions that are computed in vain, and those beyond the last tap, must not count."""
    arguments = make_bottleneck(CASES["several tiles"], generator(), half, make=make_integers)
    arguments[0][0, 3, 20, 13] = value
    expected = rounded_truth(arguments)
    out = whole.bottleneck(*arguments).double()
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


def can_implement(simulator: ModuleType, **changes: Any) -> bool:
    return bool(simulator.cuda_bottleneck_can_implement(*described(**changes), 0))


def is_profitable(simulator: ModuleType, **changes: Any) -> bool:
    return bool(simulator.cuda_bottleneck_is_profitable(*described(**changes), 0))


NOT_OFFERED: dict[str, dict[str, Any]] = {
    "channels": {"channels": 252, "out_channels": 252},
    "inner": {"inner": 136},
    "inner of no chunks": {"inner": 60},
    "shortcut": {"channels": 64},
    "strided identity": {"stride": 2},
    "stride": {"stride": 3, "projects": True},
    "address": {"address": 8},
}


@pytest.mark.parametrize("name", NOT_OFFERED)
def test_is_not_implemented(simulator, name):
    simulator.set_capability(80)
    assert can_implement(simulator)
    assert not can_implement(simulator, **NOT_OFFERED[name])
    assert not is_profitable(simulator, **NOT_OFFERED[name])
    x, layers, stride = described(**NOT_OFFERED[name])
    batch, _, *image = x[2]
    height, width = (-(-size // stride) for size in image)
    channels = layers[2][0][2][0]
    strides = (height * width * channels, 1, width * channels, channels)
    out = (1 << 40, x[1], (batch, channels, height, width), strides, None)
    with pytest.raises(ValueError, match="no kernel for such a bottleneck"):
        simulator.cuda_bottleneck(out, x, layers, stride, 0, 0)
    assert not can_implement(simulator, dtype=0)


def test_is_implemented_where_it_fits_shared_memory_but_not_on_hopper(simulator):
    for capability, widest in ((80, 128), (86, 64), (89, 64), (90, 0), (120, 64)):
        simulator.set_capability(capability)
        for inner in (64, 128):
            for projects in (False, True):
                found = can_implement(simulator, inner=inner, projects=projects)
                assert found == (inner <= widest)


def test_is_profitable_in_the_first_stage(simulator):
    """And not where recomputation outweighs the traffic, nor where few images leave a GPU idle."""
    simulator.set_capability(80)
    assert is_profitable(simulator)
    assert not is_profitable(simulator, channels=64, projects=True)
    wide = {"channels": 512, "inner": 128, "out_channels": 512, "image": (28, 28)}
    assert not is_profitable(simulator, **wide)
    strided = {**wide, "channels": 256, "image": (56, 56), "stride": 2, "projects": True}
    assert not is_profitable(simulator, **strided)
    assert not is_profitable(simulator, image=(16, 16))  # a tile of 2 x 2 beside one of 14 x 14
    assert is_profitable(simulator, batch=1)  # 16 tiles for 4 SMs
    assert not is_profitable(simulator, batch=1, image=(14, 42))


def test_heuristic_takes_the_whole_block(simulator, half):
    """Four tiles of one launch: the steps of conv1, conv2 and four slices of conv3."""
    case = BlockCase(1, 256, 28, 28, 64, 256)
    arguments = make_bottleneck(case, generator(), half, make=make_integers)
    out = On(SimulatedBackend(simulator, capability=80)).bottleneck(*arguments)
    assert torch.equal(out.double(), rounded_truth(arguments))
    assert simulator.take_statistics()["waits"] == 4 * (8 + 9 + 4)


def test_on_hopper_a_networks_blocks_have_one_kernel_in_stage_1_alone(simulator):
    """The others' layers have one each, as have those that are too wide for any kernel."""
    torch.manual_seed(0)
    net = randomise_statistics(ResNet(Bottleneck, [2, 2, 1, 1])).eval().half()
    x = torch.randn(2, 3, 33, 33, generator=generator()).half()
    backend = SimulatedBackend(simulator, capability=90)
    listed: list[list[str]] = []

    def bottleneck(*arguments: Any) -> list[Candidate]:
        candidates = SimulatedBackend.bottleneck(backend, *arguments)
        listed.append([candidate.name for candidate in candidates])
        return candidates

    backend.bottleneck = bottleneck  # type: ignore[method-assign]
    with torch.no_grad(), use_backend(backend), autotune.tuner.watch() as decisions:
        result = net(x)
    with torch.no_grad(), use_backend("reference"):
        assert_contract(result, net(x), net.double()(x.double()))
    assert listed == [["cuda fused sm90"]] * 2 + [[]] * 4
    chosen = [d.candidate.name for d in decisions if d.op == "bottleneck"]
    assert chosen == ["cuda fused sm90"] * 2 + ["layers"] * 4
    layers = [d.candidate.name for d in decisions if d.op.startswith("conv_bn")]
    assert len(layers) == 4 * 3
    assert all("sm90" in name for name in layers)


def test_reads_tensors_off_sixteen_bytes_layer_by_layer(simulator, half):
    arguments = make_bottleneck(CASES["one tile"], generator(), half, make=make_integers)
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
        can_implement(simulator, **changes)


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


def test_halo_off_by_one_is_caught(simulator, half):
    """The kernel is told of a row more than the image has: it must not read it unnoticed."""
    x, *layers, _ = make_bottleneck(BlockCase(1, 16, 13, 8, 16, 16), generator(), half)
    taller = torch.empty(1, 16, 14, 8, dtype=half).contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(taller)
    read = [t for conv, bn in layers for t in (conv.weight, *bn[:4])]
    short = (taller.data_ptr(), x.nbytes, False)
    buffers = [(t.data_ptr(), t.nbytes, False) for t in read]
    simulator.set_buffers([*buffers, short, (out.data_ptr(), out.nbytes, True)])
    types = (torch.float32, torch.float16, torch.bfloat16)
    arguments = [(tensor_arg(conv.weight), batch_norm_arg(bn, types)) for conv, bn in layers]
    with pytest.raises(simulator.Fault, match=r"reads .* out of bounds of global memory"):
        simulator.cuda_bottleneck(tensor_arg(out), tensor_arg(taller), arguments, 1, 0, 0)


def test_whole_network_keeps_the_contract(simulator, half):
    torch.manual_seed(0)
    theirs = randomise_statistics(torchvision.models.resnet50()).eval()
    ours = resnet_fused.resnet50().eval()
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.to(half), theirs.to(half)
    x = torch.randn(2, 3, 33, 33, generator=generator()).to(half)
    with torch.no_grad(), use_backend(WholeBlocks(simulator)):
        result = ours(x)
    assert simulator.take_statistics()["bank_conflicts"] == 0
    with torch.no_grad():
        assert_contract(result, theirs(x), copy.deepcopy(theirs).double()(x.double()))


# Per architecture: for each 16-bit type 64 and 128 inner channels, each with the identity, a
# projection, and a strided one.
KERNELS = 2 * 2 * 3


def test_spills_nothing(extension, architectures):
    usage = cuobjdump(extension, "--dump-resource-usage")
    found = re.findall(r"bottleneck_kernel\w*:\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert len(found) == KERNELS * len(architectures)
    assert {(stack, local) for _, stack, local in found} == {("0", "0")}


def test_uses_tensor_cores_and_moves_sixteen_bytes_an_access(extension, architectures):
    bodies = kernels(extension, r"\w*bottleneck_kernelI", *architectures)
    assert len(bodies) == KERNELS * len(architectures)
    for body in bodies:
        for instruction in ("HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS.E.BYPASS", "STG.E.128"):
            assert instruction in body
        projects = re.match(r"\w*?TileI(?:Li\d+E)+Lb(\d)E", body)
        assert projects is not None
        assert ("LDG.E.128" in body) == (projects[1] == "0")  # the shortcut
        assert not re.search(r"\b(LDL|STL)\b|STG\.E\.(64|U16)|STS\.U16", body)
