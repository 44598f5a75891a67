"""What the reference and the cpu backend hand to oneDNN: the same convolution, in safe terms.

Values are small integers, so that every dtype's result is exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import require
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from resnet_fused import _extension
from resnet_fused.backends.cpu.onednn import OneDnnConvolution
from resnet_fused.ops import BatchNorm, ConvBn, Convolution
from resnet_fused.reference import ops as reference
from resnet_fused.reference.convolution import convolve, usual_strides, well_posed
from resnet_fused.reference.training import ReferenceTraining
from resnet_fused.testing.cases import generator
from resnet_fused.testing.on import On


class Case(NamedTuple):
    """An input's shape, a weight's, and the window's geometry, (height, width) each."""

    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def make(self, dtype: torch.dtype) -> tuple[Tensor, Convolution]:
        """Both channels_last, of integers from -1 to 1."""
        rng = generator()
        x, weight = (
            torch.randint(-1, 2, shape, generator=rng)
            .to(dtype)
            .contiguous(memory_format=torch.channels_last)
            for shape in (self.x, self.weight)
        )
        return x, Convolution(weight, *self[2:])


# Handed to PyTorch 2.14 as they are, in bfloat16, these end the process.
MISSED = {
    "1x1": Case((3, 17, 6, 1), (14, 17, 1, 1), (2, 2), (3, 3), (2, 2)),
    "kernel of two": Case((1, 2, 6, 1), (2, 2, 1, 2), (1, 2), (2, 3), (1, 2)),
    "groups": Case((1, 8, 2, 1), (64, 1, 1, 1), (2, 2), (1, 1), (2, 2), 8),
    "pytorch #195394": Case((2, 64, 1, 1), (1, 64, 125, 1), (2, 2), (63, 63)),
}
# These are computed wrong.
ONE_WINDOW = {
    "wide kernel": Case((1, 8, 7, 2), (16, 1, 1, 3), (1, 3), (0, 1), (1, 1), 8),
    "unpadded": Case((1, 4, 6, 4), (8, 1, 2, 2), (1, 4), (0, 0), (1, 1), 4),
    "one channel": Case((2, 1, 7, 1), (3, 1, 3, 5), (1, 3), (1, 3), (2, 1)),
}
ODD = {**MISSED, **ONE_WINDOW}


def convolution(x: Tensor, conv: Convolution) -> Tensor:
    """By PyTorch's own loops, which serve float64."""
    return F.conv2d(x.double(), conv.weight.double().contiguous(), None, *conv[1:])


def identity_layer(conv: Convolution) -> ConvBn:
    zeros = torch.zeros(conv.weight.shape[0])
    return ConvBn(conv, BatchNorm(zeros, zeros + 0.75, None, None, 0.25))


def by_reference(x: Tensor, conv: Convolution) -> Tensor:
    return reference.conv_bn(x, identity_layer(conv), None, False)


def by_training_reference(x: Tensor, conv: Convolution) -> Tensor:
    return ReferenceTraining().conv_stats(x, conv, False)[0]


def by_cpu(x: Tensor, conv: Convolution) -> Tensor:
    require("cpu", "cpu", x.dtype)
    return On("cpu").conv_bn(x, identity_layer(conv), None, False)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Those that oneDNN computes on every processor."""
    return request.param


WAYS = pytest.mark.parametrize("convolve", [by_reference, by_training_reference, by_cpu])


def misses(x: Tensor, conv: Convolution) -> bool:
    """Whether every tap along the width lies in the padding, counted one by one."""
    width, taps = x.shape[3], range(conv.weight.shape[3])
    windows = range(conv.output_size(*x.shape[2:])[1])
    (_, stride), (_, padding), (_, dilation) = conv[1:4]
    return all(
        not 0 <= window * stride - padding + tap * dilation < width
        for window in windows
        for tap in taps
    )


@pytest.mark.parametrize("name", MISSED)
def test_windows_beside_the_image_get_one_to_meet(name: str) -> None:
    x, conv = MISSED[name].make(torch.bfloat16)
    assert misses(x, conv)
    assert not misses(*well_posed(x, conv))


@WAYS
@pytest.mark.parametrize("name", ODD)
def test_odd_geometries_are_exact(name: str, convolve: Any, dtype: torch.dtype) -> None:
    x, conv = ODD[name].make(dtype)
    assert not misses(*well_posed(x, conv))  # or PyTorch may end this process
    assert torch.equal(convolve(x, conv).double(), convolution(x, conv))


@pytest.mark.parametrize("name", [name for name, case in ODD.items() if case.groups == 1])
def test_odd_geometries_of_one_group_are_exact_by_onednn(name: str) -> None:
    """In bfloat16, which the cpu backend leaves to it on some processors."""
    require("cpu", "cpu", torch.bfloat16)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    x, conv = ODD[name].make(torch.bfloat16)
    out = OneDnnConvolution(_extension.load(), conv)(x, identity_layer(conv).bn, None, False)
    assert torch.equal(out.double(), convolution(x, conv))


@pytest.mark.parametrize("channels", [3, 5, 7])
def test_weight_gradient_of_a_moving_pointwise_window_of_few_channels(channels: int) -> None:
    """PyTorch's own is memory of others with AVX2, and differs from call to call."""
    rng = generator()
    x = torch.randn(2, channels, 12, 12, generator=rng).contiguous(
        memory_format=torch.channels_last
    )
    weight = torch.randn(8, channels, 1, 1, generator=rng)

    def gradient(x: Tensor, weight: Tensor) -> Tensor:
        leaf = weight.clone().requires_grad_()
        convolve(x, Convolution(leaf, (2, 2))).square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    expected = gradient(x.double(), weight.double())
    for _ in range(20):
        torch.testing.assert_close(gradient(x, weight).double(), expected, rtol=1e-5, atol=1e-4)


@WAYS
@pytest.mark.parametrize("strides", [(9, 1, 3, 1), (9, 1, 3, 1000), (9, 1, 3, 0)])
def test_strides_along_one_element_do_not_matter(
    strides: tuple[int, ...], convolve: Any, dtype: torch.dtype
) -> None:
    case = Case((1, 24, 3, 3), (8, 3, 3, 1), (2, 1), (2, 1), (1, 2), 8)
    x, conv = case.make(dtype)
    odd = conv.weight.as_strided(conv.weight.shape, strides)
    assert torch.equal(odd, conv.weight)
    out = convolve(x, conv._replace(weight=odd))
    assert torch.equal(out.double(), convolution(x, conv))


def test_strides_are_changed_along_single_elements_only() -> None:
    dense = torch.randn(8, 3, 3, 1)
    channels_last = dense.contiguous(memory_format=torch.channels_last)
    sliced = torch.randn(8, 3, 3, 2)[..., :1]
    for tensor in (dense, channels_last, sliced, torch.randn(4, 4, 3, 3)):
        assert usual_strides(tensor) is tensor
    for tensor, strides in ((dense, (9, 3, 1, 7)), (channels_last, (9, 1, 3, 7))):
        odd = tensor.as_strided(tensor.shape, strides)
        assert usual_strides(odd).stride() == tensor.stride()
        assert usual_strides(odd).data_ptr() == tensor.data_ptr()
        assert torch.equal(usual_strides(odd), tensor)


def test_weight_gradients_of_one_window_are_exact(dtype: torch.dtype) -> None:
    """The last stage of a ResNet on 16×16 pixels: PyTorch's own in bfloat16 holds any number."""
    x, conv = Case((2, 256, 1, 1), (32, 256, 3, 3), (2, 2), (1, 1)).make(dtype)
    gradients = []
    for of in (x, x.double()):
        weight = conv.weight.to(of.dtype).requires_grad_()
        layer = identity_layer(conv._replace(weight=weight))
        out = reference.conv_bn(of, layer, None, False)
        gradients += torch.autograd.grad(out.sum(), weight)
    assert torch.equal(gradients[0].double(), gradients[1])


sizes = st.integers(1, 6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    image=st.tuples(sizes, sizes),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_other_terms_give_the_same_result(image, kernel, stride, padding, dilation) -> None:
    case = Case((1, 2, *image), (2, 2, *kernel), stride, padding, dilation)
    x, conv = case.make(torch.bfloat16)
    assume(min(conv.output_size(*image)) >= 1)
    posed = well_posed(x, conv)
    assert torch.equal(convolution(*posed), convolution(x, conv))
    assert not misses(*posed)
    assert posed[1].output_size(*posed[0].shape[2:])[1] > 1 or posed[1].stride[1] == 1
