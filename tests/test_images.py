"""Images of bytes: op `image_stem` beside normalising first, the kernels, and whole networks."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from test_cuda_conv import WIDE_STEMS
from torch import Tensor

import resnet_fused
from resnet_fused import ops, use_backend
from resnet_fused.backends import autotune
from resnet_fused.backends.cuda_sim import SimulatedBackend
from resnet_fused.numerics import assert_contract, check_op
from resnet_fused.ops import MaxPool, Normalization
from resnet_fused.reference import ops as reference
from resnet_fused.testing.cases import (
    ConvCase,
    as_images,
    generator,
    make_convolution,
    make_integers,
)
from resnet_fused.testing.on import On

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LAYOUTS = [torch.channels_last, torch.contiguous_format]
CASES = {**WIDE_STEMS, "no whole octets": ConvCase(3, 3, 10, 21, 24, 7, 2, 3)}


def images_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator(), dtype=torch.uint8)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_exact_on_integers(simulator, half, name, layout, capability):
    """Zeros stand beside the image, not what a byte of zero becomes."""
    x, layer = make_integers(CASES[name], generator(), half)
    images, normalization = as_images(x)
    expected = reference.stem(x.double(), _wide(layer), MaxPool())
    on = On(SimulatedBackend(simulator, capability=capability))
    with autotune.tuner.watch() as decisions:
        out = on.image_stem(
            images.contiguous(memory_format=layout), layer, MaxPool(), normalization
        )
    assert [d.candidate.name for d in decisions] == ["cuda fused"]
    assert out.dtype == half
    assert torch.equal(out.double(), expected)


def _wide(layer: ops.ConvBn) -> ops.ConvBn:
    weight = layer.conv.weight.double()
    return layer._replace(conv=layer.conv._replace(weight=weight))


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_keep_the_contract(simulator, half, capability):
    case = ConvCase(2, 3, 24, 32, 64, 7, 2, 3)
    _, layer = make_convolution(case, generator(), half)
    on = On(SimulatedBackend(simulator, capability=capability))
    arguments = [images_of(2, 3, 24, 32), layer, MaxPool(), IMAGENET]
    check_op(on.image_stem, reference.image_stem, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_a_kernel_it_is_the_stem_of_what_was_normalised(dtype):
    _, layer = make_convolution(ConvCase(2, 3, 20, 18, 16, 7, 2, 3), generator(), dtype)
    images = images_of(2, 3, 20, 18)
    with torch.no_grad():
        out = ops.image_stem(images, layer, IMAGENET)
        x = reference.normalise(images, IMAGENET, dtype)
        assert torch.equal(out, ops.stem(x, layer))
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in IMAGENET)
    truth = (images.double() / 255 - mean) / std
    assert torch.allclose(x.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_gradients_are_those_of_the_stem():
    images = images_of(2, 3, 12, 12)
    _, (conv, bn) = make_convolution(ConvCase(2, 3, 12, 12, 8, 7, 2, 3), generator())
    weight = conv.weight.requires_grad_()
    layer = ops.ConvBn(conv, bn)
    (ours,) = torch.autograd.grad(ops.image_stem(images, layer, IMAGENET).sum(), weight)
    x = reference.normalise(images, IMAGENET, torch.float32)
    (theirs,) = torch.autograd.grad(ops.stem(x, layer).sum(), weight)
    assert torch.equal(ours, theirs)


MISTAKES = {
    "floating": (torch.zeros(1, 3, 12, 12), IMAGENET, TypeError, "uint8.*found torch.float32"),
    "channels": (images_of(1, 4, 12, 12), IMAGENET, ValueError, "each of the 4 channels"),
    "zero": (
        images_of(1, 3, 12, 12),
        Normalization((0.0,) * 3, (1.0, 0.0, 1.0)),
        ValueError,
        r"std must hold a positive number",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    images, normalization, error, message = MISTAKES[name]
    _, layer = make_convolution(ConvCase(1, 3, 12, 12, 8, 7, 2, 3), generator())
    with pytest.raises(error, match=message):
        ops.image_stem(images, layer, normalization)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stem", ["7x7", "deep"])
def test_a_network_takes_bytes(stem, training):
    torch.manual_seed(0)
    model = resnet_fused.resnet18(num_classes=5, stem=stem).train(training)
    images = images_of(2, 3, 33, 40)
    model.normalization = IMAGENET
    state = {name: value.clone() for name, value in model.state_dict().items()}
    out = model(images)
    model.load_state_dict(state)
    assert torch.equal(out, model(reference.normalise(images, IMAGENET, torch.float32)))
    assert out.requires_grad


@pytest.mark.parametrize("training", [False, True])
def test_bytes_that_the_normalisation_is_not_for_are_refused(training):
    """Where PyTorch normalises them too, which would make three channels of one."""
    model = resnet_fused.cifar.resnet(8).train(training)
    model.normalization = IMAGENET
    with pytest.raises(ValueError, match="a number for each of the 1 channels"):
        model(images_of(1, 1, 33, 40))
    with pytest.raises(TypeError, match=r"of shape \(3, 33, 40\)"):
        model(images_of(1, 3, 33, 40)[0])
    model.normalization = Normalization((0.0,) * 3, (1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="std must hold a positive number"):
        model(images_of(1, 3, 33, 40))


def test_bytes_without_a_normalisation_are_refused():
    with pytest.raises(TypeError, match=r"floating point, found torch\.uint8"):
        resnet_fused.resnet18().eval()(images_of(1, 3, 33, 40))


def test_plans_see_another_normalisation():
    torch.manual_seed(0)
    model = resnet_fused.resnet18(num_classes=5).eval()
    images = images_of(1, 3, 40, 40)
    other = Normalization((0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        for normalization in (IMAGENET, other, IMAGENET):
            model.normalization = normalization
            expected = model(reference.normalise(images, normalization, torch.float32))
            for _ in range(4):  # by then a plan runs
                assert torch.equal(model(images), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_network_of_our_kernels_reads_bytes(simulator: ModuleType, half, layout):
    torch.manual_seed(0)
    model = resnet_fused.resnet18(num_classes=5).eval()
    images = images_of(1, 3, 36, 40).contiguous(memory_format=layout)
    with torch.no_grad():
        x = reference.normalise(images, IMAGENET, torch.float64)
        truth = model.double()(x)
        model.to(half).normalization = IMAGENET
        with use_backend("reference"):
            theirs = model(images)
        backend = SimulatedBackend(simulator, capability=90)
        with use_backend(backend), autotune.tuner.watch() as decisions:
            out = model(images)
    assert [d.candidate.name for d in decisions if d.op == "image_stem"] == ["cuda fused"]
    assert not any(d.op == "stem" for d in decisions)
    assert_contract(out, theirs, truth)
