"""What only a GPU can show of whole networks: full-size images, long runs, streams, large tensors.

Each backend is the one under test for every test here; kernels one by one have their own files.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import Tensor, nn

import resnet_fused
from resnet_fused import ops, use_backend
from resnet_fused.parameters import ConvBn, Convolution
from resnet_fused.reference import ops as reference
from resnet_fused.testing.cases import generator, make_batch_norm, randomise_statistics
from resnet_fused.testing.numerics import assert_contract, cast

pytestmark = pytest.mark.gpu

NETWORKS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
HALF = torch.float16


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def images(batch: int, size: int = 224, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=generator(seed)).cuda()


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_statistics(getattr(resnet_fused, name)()).eval().cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_contract_at_full_size(name: str, dtype: torch.dtype, monkeypatch) -> None:
    """Batch 64 of 224×224; the truth in slices, since float64 activations take four times more."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    ours = network(name).to(dtype)
    theirs = getattr(torchvision.models, name)().eval().cuda().to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = images(64).to(dtype)
    with torch.inference_mode():
        result, eager = ours(x), theirs(x)
        theirs.double()
        truth = torch.cat([theirs(part.double()) for part in x.split(8)])
    assert_contract(result, eager, truth)


def test_a_thousand_runs_give_the_same_bits() -> None:
    model, x = network("resnet50").to(HALF), images(8).to(HALF)
    with torch.inference_mode():
        first = model(x).clone()
        differ = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(1000):
            differ += (model(x) != first).any()
    assert differ.item() == 0


def test_two_streams_at_once() -> None:
    """Networks that share weights run side by side as they run alone."""
    model = network("resnet50").to(HALF)
    inputs = [images(16, seed=seed).to(HALF) for seed in (1, 2)]
    streams = [torch.cuda.Stream() for _ in inputs]
    with torch.inference_mode():
        alone = [model(x).clone() for x in inputs]
        torch.cuda.synchronize()
        found: list[list[Tensor]] = [[], []]
        for _ in range(20):
            for results, x, stream in zip(found, inputs, streams, strict=True):
                with torch.cuda.stream(stream):
                    results.append(model(x))
        torch.cuda.synchronize()
    for results, expected in zip(found, alone, strict=True):
        assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("kernel", [1, 3])
def test_more_than_two_to_the_31_elements(kernel: int) -> None:
    """Input, shortcut and result; the last images, whose offsets are the largest, are checked."""
    side, channels = 224, 64
    batch = 2**31 // (side * side * channels) + 2
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    rng = generator(kernel)
    weight = torch.randn(channels, channels, kernel, kernel, generator=rng) / (8 * kernel)
    conv = Convolution(weight.cuda().to(HALF), (1, 1), (kernel // 2,) * 2, (1, 1), 1)
    layer = ConvBn(conv, make_batch_norm(channels, rng, HALF, "cuda"))
    shape = (batch, channels, side, side)
    x = torch.empty(shape, dtype=HALF, device="cuda", memory_format=torch.channels_last)
    assert x.numel() > 2**31
    x.normal_(generator=torch.Generator("cuda").manual_seed(0))
    with torch.inference_mode():
        result = ops.conv_bn(x, layer, residual=x, relu=True)[-2:].clone()
        last = x[-2:].clone()
        del x
        arguments = [last, layer, last, True]
        eager = reference.conv_bn(*arguments)
        truth = reference.conv_bn(*cast(arguments, torch.float64))
    assert_contract(result, eager, truth)
