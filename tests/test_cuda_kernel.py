"""The CUDA kernel for BN, residual add and ReLU: machine code, argument checks, results on a GPU.

The backend `cuda` as a whole is held to the contract with every other backend in test_ops.py.
"""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest
import torch
from machine_code import cuobjdump, kernels
from torch import Tensor

from resnet_fused import backends, ops, use_backend
from resnet_fused._extension import tensor_arg
from resnet_fused.backends.arguments import batch_norm_arg
from resnet_fused.numerics import cast, relative_error
from resnet_fused.parameters import BatchNorm
from resnet_fused.reference import ops as reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# Machine code


def test_holds_code_for_every_architecture_it_reports(extension):
    listing = cuobjdump(extension, "--list-elf", "--list-ptx")
    info = extension.build_info()
    compiled = set(re.findall(r"sm_(\w+)\.cubin", listing))
    assert compiled == set(info["cuda_architectures"].split())
    assert set(re.findall(r"sm_(\w+)\.ptx", listing)) == set(info["cuda_ptx"].split())


def test_spills_nothing_and_leaves_room_for_three_blocks(extension):
    usage = cuobjdump(extension, "--dump-resource-usage")
    found = re.findall(r"bn_add_relu_kernel\w*:\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert len(found) == 12 * len(extension.build_info()["cuda_architectures"].split())
    for registers, stack, local in found:
        assert int(registers) <= 65536 // (3 * 256)
        assert (stack, local) == ("0", "0")


def test_moves_sixteen_bytes_an_access(extension, architectures):
    # Mangled template arguments: type, elements a vector, whether a residual is added.
    symbol = r"\w*bn_add_relu_kernelI\w*?Li(\d)ELb(\d)E"
    bodies = kernels(extension, symbol, *architectures)
    assert len(bodies) == 12 * len(architectures)
    for body in bodies:
        lanes, residual = re.match(symbol, body).groups()
        loads, stores = body.count("LDG.E.128"), body.count("STG.E.128")
        if lanes == "1":
            assert (loads, stores) == (0, 0)
        else:
            assert loads >= (4 if residual == "1" else 2)
            assert stores >= 2


# Argument checks: nothing is launched, so no GPU is needed


def _tensor(address: int, *sizes: int, dtype: int = 1) -> tuple[Any, ...]:
    batch, channels, height, width = sizes
    strides = (height * width * channels, 1, width * channels, channels)
    return address, dtype, (batch, channels, height, width), strides, None


def _vector(address: int = 1 << 20, channels: int = 8) -> tuple[Any, ...]:
    return address, 0, (channels,), (1,), None


def _call(extension: ModuleType, bn: tuple[Any, ...] | None = None, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "out": _tensor(1 << 20, 1, 8, 2, 2),
        "x": _tensor(1 << 20, 1, 8, 2, 2),
        "bn": bn or (_vector(), _vector(), None, None, 1e-5),
        "residual": None,
        "relu": True,
        "device": 0,
        "stream": 0,
    }
    extension.cuda_bn_add_relu(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": _tensor(1 << 20, -1, 8, 2, 2)}, "negative size"),
        ({"x": _tensor(1 << 20, 2**46, 8, 2, 2)}, r"more than 2\^48 elements"),
        ({"x": _tensor(1 << 20, 1, 8, 2, 3)}, r"out must be of size \(1, 8, 2, 3\)"),
        ({"x": _tensor(1 << 20, 1, 8, 2, 2, dtype=2)}, "x must be float16, found bfloat16"),
        ({"residual": _tensor(1 << 21, 1, 9, 2, 2)}, "residual must have 1 to 8 channels"),
        (
            {"residual": (1 << 21, 1, (1, 8, 2, 2), (64, 1, 32, 8), None)},
            "pixels at one distance",
        ),
        ({"residual": _tensor((1 << 20) + 2, 1, 8, 2, 2)}, "out overlaps residual"),
        ({"x": _tensor(0, 1, 8, 2, 2)}, "x is a null pointer"),
        ({"out": _tensor(0, 1, 8, 2, 2)}, "out is a null pointer"),
        ({"bn": (_vector(), _vector(0), None, None, 0.0)}, "var is a null pointer"),
        ({"bn": (_vector(), _vector(), _vector(0), None, 0.0)}, "weight is a null pointer"),
        ({"bn": (_vector(channels=7), _vector(), None, None, 0.0)}, r"mean must be of size \(8\)"),
    ],
)
def test_binding_refuses(extension, changes, message):
    with pytest.raises(ValueError, match=message):
        _call(extension, **changes)


@pytest.mark.parametrize("sizes", [(0, 8, 2, 2), (1, 0, 2, 2)], ids=str)
def test_nothing_is_launched_for_an_empty_tensor(extension, sizes):
    vector = _vector(channels=sizes[1])
    bn = (vector, vector, None, None, 1e-5)
    _call(extension, bn, out=_tensor(0, *sizes), x=_tensor(0, *sizes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_gpu_the_error_is_cudas_own(extension):
    with pytest.raises(RuntimeError, match=r"bn_add_relu: .*(driver|device)"):
        _call(extension)
    with pytest.raises(RuntimeError, match=r"loading the CUDA kernels: .*(driver|device)"):
        extension.cuda_check_device(0)


# Results


@pytest.fixture
def gpu(extension: ModuleType) -> ModuleType:
    if reason := backends.unavailable("cuda"):
        pytest.skip(reason)
    if reason := backends.get("cuda").unsupported(torch.device("cuda"), torch.float32):
        pytest.skip(reason)
    return extension


def _launch(
    extension: ModuleType,
    x: Tensor,
    bn: BatchNorm,
    residual: Tensor | None,
    relu: bool,
    out: Tensor | None = None,
) -> Tensor:
    """The kernel on (rows, channels) matrices, into `out` or a matrix of NaN."""
    if out is None:
        out = torch.full_like(x, float("nan"))
    described, into, added = (
        None if t is None else tensor_arg(t[:, :, None, None]) for t in (x, out, residual)
    )
    stream = torch.cuda.current_stream(x.device).cuda_stream
    bn_arg = batch_norm_arg(bn, FLOATS)
    extension.cuda_bn_add_relu(into, described, bn_arg, added, relu, x.device.index, stream)
    return out


def _integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-9, 10, shape, device="cuda").to(dtype)


def _integer_bn(channels: int) -> BatchNorm:
    """Parameters of mixed types, whose normalisation is exact in fp32."""
    var = torch.tensor([0.125, 0.875, 3.875], device="cuda")[torch.arange(channels) % 3]
    mean, weight, bias = (_integers(channels, dtype=dtype) for dtype in FLOATS)
    return BatchNorm(mean, var.to(torch.bfloat16), weight, bias, 0.125)


def _truth(x: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
    wide = [cast(value, torch.float64) for value in (x, bn, residual)]
    x4, residual4 = (None if v is None else v[:, :, None, None] for v in (wide[0], wide[2]))
    return reference.bn_add_relu(x4, wide[1], residual4, relu)[:, :, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 4, 8, 12, 24, 64, 257, 264, 2048, 2056, 4100])
def test_exact_on_integers(gpu, dtype, channels, added, relu):
    for rows in (1, 7, 1000):
        x = _integers(rows, channels, dtype=dtype)
        residual = _integers(rows, channels, dtype=dtype) if added else None
        bn = _integer_bn(channels)
        out = _launch(gpu, x, bn, residual, relu)
        assert torch.equal(out, _truth(x, bn, residual, relu).to(dtype))


@pytest.mark.gpu
def test_without_weight_and_bias(gpu, dtype):
    x, bn = _integers(50, 64, dtype=dtype), _integer_bn(64)._replace(weight=None, bias=None)
    assert torch.equal(_launch(gpu, x, bn, None, True), _truth(x, bn, None, True).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 19])
@pytest.mark.parametrize("overwritten", ["x", "residual", "both"])
def test_out_may_be_an_input(gpu, dtype, overwritten, channels):
    x, residual = (_integers(333, channels, dtype=dtype) for _ in range(2))
    if overwritten == "both":
        residual = x
    bn = _integer_bn(channels)
    truth = _truth(x, bn, residual, True).to(dtype)
    out = residual if overwritten == "residual" else x
    assert torch.equal(_launch(gpu, x, bn, residual, True, out), truth)


@pytest.mark.gpu
@pytest.mark.parametrize("shifted", ["x", "residual", "out"])
def test_pointers_off_sixteen_bytes(gpu, dtype, shifted):
    def matrix(name: str) -> Tensor:
        flat = _integers(100 * 64 + 1, dtype=dtype)
        return (flat[1:] if name == shifted else flat[:-1]).view(100, 64)

    x, residual, out, bn = matrix("x"), matrix("residual"), matrix("out"), _integer_bn(64)
    out.fill_(float("nan"))
    truth = _truth(x, bn, residual, True).to(dtype)
    assert torch.equal(_launch(gpu, x, bn, residual, True, out), truth)


@pytest.mark.gpu
def test_writes_nothing_beyond_out(gpu, dtype):
    padded = torch.full((102, 64), float("nan"), device="cuda", dtype=dtype)
    x = _integers(100, 64, dtype=dtype)
    _launch(gpu, x, _integer_bn(64), None, True, padded[1:101])
    assert padded[[0, 101]].isnan().all()
    assert not padded[1:101].isnan().any()


@pytest.mark.gpu
def test_nan_passes_and_infinity_stays(gpu, dtype):
    x = torch.tensor([[float("nan"), float("inf"), float("-inf"), -1.0] * 2], device="cuda")
    one = torch.ones(8, device="cuda")
    out = _launch(gpu, x.to(dtype), BatchNorm(one * 0, one * 0.75, None, None, 0.25), None, True)
    expected = torch.tensor([[float("nan"), float("inf"), 0.0, 0.0] * 2], device="cuda")
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(
        out.nan_to_num(1.0, posinf=2.0), expected.to(dtype).nan_to_num(1.0, posinf=2.0)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_no_less_accurate_than_pytorch(gpu, dtype, mean):
    """A large mean beside a small variance is where a folded shift would cancel."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    var = 0.01 + 0.1 * normal(256).abs()
    bn = BatchNorm(mean + normal(256), var, normal(256), normal(256), 1e-5)
    x = (normal(4000, 256) * var.sqrt() + bn.mean).to(dtype)
    residual = normal(4000, 256).to(dtype)
    truth = _truth(x, bn, residual, True)
    eager = reference.bn_add_relu(x[:, :, None, None], bn, residual[:, :, None, None], True)
    ours = _launch(gpu, x, bn, residual, True)
    assert relative_error(ours, truth) <= relative_error(eager[:, :, 0, 0].to(dtype), truth)


@pytest.mark.gpu
def test_runs_on_the_current_stream_and_in_a_graph(gpu):
    x, bn = _integers(1000, 64), _integer_bn(64)
    truth = _truth(x, bn, None, True).float()
    out = torch.full_like(x, float("nan"))
    graph = torch.cuda.CUDAGraph()
    _launch(gpu, x, bn, None, True)
    with torch.cuda.graph(graph):
        _launch(gpu, x, bn, None, True, out)
    assert out.isnan().all(), "captured, not run: a launch on another stream would have run"
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, truth)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(gpu):
    channels = 64
    rows = 2**31 // channels + 5
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * channels:
        pytest.skip("needs 13 GB of free GPU memory")
    x = torch.zeros(rows, channels, device="cuda", dtype=torch.bfloat16)
    x[-5:] = _integers(5, channels, dtype=torch.bfloat16)
    bn = _integer_bn(channels)
    last = _truth(x[-5:], bn, None, False).to(x.dtype)
    first = _truth(x[:5], bn, None, False).to(x.dtype)
    out = _launch(gpu, x, bn, None, False)
    assert torch.equal(out[-5:], last)
    assert torch.equal(out[:5], first)
    assert not out.isnan().any()


@pytest.mark.gpu
def test_on_a_device_that_is_not_current(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = _integers(2, 64, 5, 5).to("cuda:1")
    bn = BatchNorm(*(v.to("cuda:1") for v in _integer_bn(64)[:4] if v is not None), eps=0.125)
    truth = reference.bn_add_relu(x.double(), cast(bn, torch.float64), None, True)
    with torch.cuda.device(0), use_backend("cuda"):
        out = ops.bn_add_relu(x, bn)
    assert out.device == x.device
    assert torch.equal(out, truth.float())
