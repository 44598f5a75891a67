"""The CUDA kernels of the head: machine code, results in the simulator, argument checks.

test_ops.py holds the op to the contract with every backend; here are the cases that only they have.
"""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest
import torch
from machine_code import cuobjdump
from torch import Tensor

from resnet_fused._extension import tensor_arg
from resnet_fused.backends.cuda_sim import SimulatedBackend
from resnet_fused.reference import ops as reference
from resnet_fused.testing.cases import generator
from resnet_fused.testing.numerics import cast, check_op
from resnet_fused.testing.on import On

# Batch, channels, height, width, classes. A block of products has 4 images, or one, and 8 classes.
CASES = {
    "resnet50": (1, 2048, 7, 7, 100),
    "resnet18": (3, 512, 7, 7, 10),
    "tails": (5, 72, 2, 3, 9),
    "odd channels": (2, 37, 3, 5, 11),
    "odd channels of one image": (1, 37, 3, 5, 151),
    "few channels": (6, 3, 5, 4, 8),
    "more chunks than threads": (2, 4104, 1, 1, 5),
    "one class": (4, 16, 1, 1, 1),
    "most images": (16, 24, 2, 2, 17),
    "products left to cuBLAS": (17, 24, 2, 2, 17),
}


@pytest.fixture
def backend(simulator: ModuleType) -> On:
    return On(SimulatedBackend(simulator))


def test_spills_nothing(extension):
    """Per type, pooling by chunks and one by one; products by chunks of one image and of more."""
    usage = cuobjdump(extension, "--dump-resource-usage")
    pattern = r"(average_pool|linear)_kernel\w*:\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)"
    found = re.findall(pattern, usage)
    assert len(found) == 3 * (2 + 3) * len(extension.build_info()["cuda_architectures"].split())
    for _, registers, stack, local in found:
        assert int(registers) <= 128  # two blocks of 256 threads
        assert (stack, local) == ("0", "0")


def integers(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias whose means are integers, so that everything but the result is exact."""
    batch, channels, height, width, classes = CASES[name]
    rng = generator()
    x = height * width * torch.randint(-1, 2, (batch, channels, height, width), generator=rng)
    weight = torch.randint(-2, 3, (classes, channels), generator=rng)
    bias = torch.randint(-9, 10, (classes,), generator=rng)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_exact_on_integers(backend, dtype, name, biased):
    x, weight, bias = integers(name, dtype)
    offset = bias if biased else None
    truth = reference.head(*cast([x, weight, offset], torch.float64))
    assert torch.equal(backend.head(x, weight, offset), truth.to(dtype))


@pytest.mark.parametrize("name", CASES)
def test_keeps_the_contract(backend, dtype, name):
    batch, channels, height, width, classes = CASES[name]
    rng = generator()
    x = torch.randn(batch, channels, height, width, generator=rng).relu().to(dtype)
    wide = (torch.randn(classes, 2 * channels, generator=rng) * channels**-0.5).to(dtype)
    bias = torch.randn(classes, generator=rng).to(dtype)
    noise = 1.1 if batch * classes < 100 else 1.0  # a norm of few errors is noisy
    for weight in (wide[:, :channels], wide[:, ::2]):
        check_op(backend.head, reference.head, [x, weight, bias], noise=noise)


def test_same_bits_in_any_batch_of_more_than_one(backend, dtype):
    """An image's sums are formed in the same order wherever it stands."""
    rng = generator()
    x = torch.randn(9, 264, 3, 3, generator=rng).to(dtype)
    weight = torch.randn(13, 264, generator=rng).to(dtype)
    expected = backend.head(x, weight, None)
    assert torch.equal(backend.head(x, weight, None), expected)
    assert torch.equal(backend.head(x[3:8], weight, None), expected[3:8])


@pytest.mark.parametrize("shifted", ["x", "weight"])
def test_pointers_off_sixteen_bytes(backend, dtype, shifted):
    def moved(tensor: Tensor) -> Tensor:
        storage = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:]
        return storage.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)

    x, weight, bias = integers("tails", dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    truth = reference.head(*cast([x, weight, bias], torch.float64))
    if shifted == "x":
        x = moved(x)
    else:
        weight = moved(weight)
    assert torch.equal(backend.head(x, weight, bias), truth.to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_image(backend, dtype, value):
    x, weight, bias = integers("most images", dtype)
    x[2, 5, 1, 1] = value
    truth = reference.head(*cast([x, weight, bias], torch.float64))
    out = backend.head(x, weight, bias).double()
    assert torch.equal(out.isnan(), truth.isnan())
    assert torch.equal(out.nan_to_num(), truth.to(dtype).double().nan_to_num())


@pytest.mark.parametrize("images", [1, 5])
def test_both_barriers_are_needed(simulator, backend, images):
    x, weight = torch.ones(images, 64, 3, 3).half(), torch.ones(10, 64).half()
    backend.head(x, weight, None)
    # One in each block: one block pools an image, and two multiply up to 4.
    assert simulator.take_statistics()["barriers"] == images + 2 * -(-images // 4)
    simulator.plant({"skipped_barrier": 0})
    try:
        with pytest.raises(simulator.Fault, match="races"):
            backend.head(x, weight, None)  # in its first kernel, which pools
        with pytest.raises(simulator.Fault, match="races"):
            multiply(simulator, x[:, :, 0, 0].float(), weight)
    finally:
        simulator.plant()


def multiply(simulator: ModuleType, x: Tensor, weight: Tensor, /, **changes: Any) -> Tensor:
    """The binding of the product itself, without bias."""
    out = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=weight.dtype)
    arguments = {"out": tensor_arg(out), "x": tensor_arg(x), "weight": tensor_arg(weight)}
    for name, fields in changes.items():
        arguments[name] = (*fields, *arguments[name][len(fields) :])
    simulator.cuda_linear(**arguments, bias=None, device=0, stream=0)
    return out


def test_a_class_too_many_is_caught(simulator):
    weight, out = torch.ones(9, 8), torch.empty(1, 9)
    x = torch.ones(1, 8)
    read = [(x.data_ptr(), x.nbytes, False), (weight.data_ptr(), weight[:8].nbytes, False)]
    simulator.set_buffers([*read, (out.data_ptr(), out.nbytes, True)])
    with pytest.raises(simulator.Fault, match="out of bounds of global memory"):
        simulator.cuda_linear(tensor_arg(out), tensor_arg(x), tensor_arg(weight), None, 0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": (0,)}, "out is a null pointer"),
        ({"x": (0,)}, "x is a null pointer"),
        ({"weight": (0,)}, "weight is a null pointer"),
        ({"x": (64, 1)}, "x must be float32, found float16"),
        ({"x": (64, 0, (1, 0), (1, 1))}, r"weight must be of size \(8, 0\), found \(8, 8\)"),
        ({"out": (64, 0, (1, 7), (7, 1))}, r"out must be of size \(1, 8\), found \(1, 7\)"),
        ({"weight": (64, 0, (8, 8), (1, 8))}, "weight must be contiguous"),
    ],
)
def test_product_refuses(simulator, changes, message):
    with pytest.raises(ValueError, match=message):
        multiply(simulator, torch.ones(1, 8), torch.ones(8, 8), **changes)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        ((0, 1, (1, 64, 1, 1), (64, 1, 64, 64)), None, "x is a null pointer"),
        ((64, 1, (1, 64, 0, 1), (64, 1, 64, 64)), None, "positions must be at least 1"),
        ((64, 1, (1, 64, 2, 2), (256, 4, 2, 1)), None, "x must be dense and channels_last"),
        (None, (64, 2, (1, 64), (64, 1)), "out must be float32, found bfloat16"),
        (None, (64, 1, (1, 63), (63, 1)), r"out must be of size \(1, 64\)"),
    ],
)
def test_pooling_refuses(simulator, x, out, message):
    x = x or (64, 1, (1, 64, 1, 1), (64, 1, 64, 64))
    out = out or (64, 1, (1, 64), (64, 1))
    with pytest.raises(ValueError, match=message):
        simulator.cuda_average_pool((*out, None), (*x, None), 0, 0)
