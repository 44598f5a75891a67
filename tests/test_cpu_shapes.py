"""Random convolutions by every way that the cpu backend computes them, exact on integers.

Truth is PyTorch's own loops in float64, which serve that dtype without oneDNN.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import _extension, backends
from resnet_fused._extension import optional_tensor_arg, tensor_arg
from resnet_fused.backends.cpu import CpuBackend
from resnet_fused.backends.cpu.native import pack, vectors
from resnet_fused.ops import BatchNorm, ConvBn, Convolution
from resnet_fused.reference import ops as reference
from resnet_fused.testing.on import On

pytestmark = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason=str(backends.unavailable("cpu"))
)

GROUP_WIDTHS = (1, 1, 2, 3, 4, 4, 5, 7, 8, 8, 12, 16, 16, 20, 24, 32, 33, 48, 64)
MOST_PRODUCTS = 20_000_000  # of a case, which bounds its time


class Case(NamedTuple):
    """A convolution with its epilogue, in float64, which bfloat16 too holds exactly."""

    x: Tensor
    layer: ConvBn
    residual: Tensor | None
    relu: bool

    def truth(self) -> Tensor:
        conv, bn = self.layer
        out = F.conv2d(self.x, conv.weight, None, *conv[1:])
        return reference.bn_add_relu(out, bn, self.residual, self.relu)

    def to(self, dtype: torch.dtype) -> Case:
        """Activations and weight in that dtype, the activations channels_last."""
        x, residual = (
            None if t is None else t.to(dtype).contiguous(memory_format=torch.channels_last)
            for t in (self.x, self.residual)
        )
        assert x is not None
        conv, bn = self.layer
        layer = ConvBn(conv._replace(weight=conv.weight.to(dtype)), bn)
        return Case(x, layer, residual, self.relu)


def integers(rng: random.Random, most: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    return torch.randint(-most, most + 1, shape, generator=generator).double()


def draw(rng: random.Random) -> Case:
    """Half of the cases have several groups, a third the window of a ResNet's 3×3."""
    while True:
        width, out = rng.choice(GROUP_WIDTHS), rng.choice(GROUP_WIDTHS)
        if rng.random() < 0.5:
            out = width
        groups = 1 if rng.random() < 0.5 else rng.randint(2, 40)
        if groups == 1 and rng.random() < 0.5:
            width, out = (rng.choice((16, 31, 64, 100, 130, 256)) for _ in range(2))
        image = rng.randint(1, 20), rng.randint(1, 40)
        kernel, stride, padding, dilation = (
            (rng.randint(low, high), rng.randint(low, high))
            for low, high in ((1, 5), (1, 4), (0, 3), (1, 3))
        )
        if rng.random() < 0.35:
            kernel, padding, dilation = (3, 3), (1, 1), (1, 1)
            stride = rng.choice(((1, 1), (1, 1), (2, 2)))
        elif rng.random() < 0.2:
            kernel, padding, dilation = (1, 1), (0, 0), (1, 1)
        batch = rng.randint(1, 4)
        weight = torch.empty(groups * out, width, *kernel, device="meta")
        size = Convolution(weight, stride, padding, dilation, groups).output_size(*image)
        if min(size) < 1 or weight.numel() * batch * size[0] * size[1] > MOST_PRODUCTS:
            continue
        weight = integers(rng, 1, *weight.shape) * (integers(rng, 2, *weight.shape) > 0)
        vectors = [integers(rng, most, groups * out) for most in (2, 0, 1, 3)]
        bn = BatchNorm(vectors[0], vectors[1] + 0.75, vectors[2], vectors[3], 0.25)
        residual = None
        if rng.random() < 0.4:
            residual = integers(rng, 9, batch, groups * out, *size)
        x = integers(rng, 1, batch, groups * width, *image)
        conv = Convolution(weight, stride, padding, dilation, groups)
        return Case(x, ConvBn(conv, bn), residual, rng.random() < 0.5)


def by_kernel(case: Case, form: str, isa: str) -> Tensor:
    """Into memory full of NaN."""
    extension = _extension.load()
    conv, bn = case.layer
    options = {"grouped": (conv.groups, isa), "conv": (isa,)}.get(form, ())
    packed = pack(extension, form, conv.weight, *options)
    size = (case.x.shape[0], conv.weight.shape[0], *conv.output_size(*case.x.shape[2:]))
    out = torch.full(size, float("nan"), dtype=case.x.dtype)
    out = out.contiguous(memory_format=torch.channels_last)
    window = (tuple(conv.weight.shape[2:]), *conv[1:4])
    layer = (tensor_arg(case.x), tensor_arg(packed), window, vectors(bn))
    rest = (optional_tensor_arg(case.residual), case.relu)
    if form == "grouped":
        extension.grouped_conv_bn(tensor_arg(out), layer, conv.groups, *rest, isa=isa)
    elif form == "winograd":
        extension.winograd_conv(tensor_arg(out), layer, *rest, isa=isa)
    else:
        extension.conv_bn(tensor_arg(out), layer, *rest, isa=isa)
    return out


def kernels(case: Case) -> Iterator[tuple[str, str]]:
    """Those that compute the case, by any instruction set of this processor."""
    extension = _extension.load()
    conv = case.layer.conv
    for isa in ("avx2", "avx512"):
        if isa > extension.cpu_isa():
            continue
        yield "grouped", isa
        if conv.groups > 1:
            continue
        single = case.x.dtype == torch.float32
        if single or isa == "avx2" or extension.cpu_convolves_bf16():
            yield "conv", isa
        if single and (tuple(conv.weight.shape[2:]), *conv[1:4]) == ((3, 3), *[(1, 1)] * 3):
            yield "winograd", isa


@pytest.fixture(scope="module")
def ways() -> dict[str, CpuBackend]:
    """The backend as it is, and as on a processor where oneDNN has to compute bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_extension.load(), "cpu_convolves_bf16", lambda: False)
        onednn = CpuBackend()
    return {"cpu": backends.get("cpu"), "cpu by oneDNN": onednn}


def wrong(case: Case, ways: dict[str, CpuBackend]) -> Iterator[str]:
    """The ways that compute it wrong."""
    truth = case.truth()
    for dtype in (torch.float32, torch.bfloat16):
        rounded = truth.to(dtype)
        given = case.to(dtype)
        for form, isa in kernels(given):
            if not torch.equal(by_kernel(given, form, isa), rounded):
                yield f"{form} {isa} {dtype}"
        for name, backend in ways.items():
            if backend.unsupported(given.x.device, dtype):
                continue
            if not torch.equal(On(backend).conv_bn(*given), rounded):
                yield f"{name} {dtype}"


PARTS = [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 11))]


@pytest.mark.parametrize("part", PARTS)
def test_random_convolutions_are_exact(part: int, ways: dict[str, CpuBackend]) -> None:
    """300 of them by default, 10,000 with `-m slow`."""
    failures = []
    for number in range(1000 if part else 300):
        case = draw(random.Random(1000 * part + number))
        conv = case.layer.conv
        failures += [
            f"{way}: x {tuple(case.x.shape)} weight {tuple(conv.weight.shape)} {conv[1:]}"
            for way in wrong(case, ways)
        ]
    assert not failures
