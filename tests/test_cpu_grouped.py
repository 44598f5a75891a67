"""The CPU's kernel of grouped convolutions by itself: grouped_conv_bn in resnet_fused._C."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from resnet_fused import _extension, backends, use_backend
from resnet_fused._extension import optional_tensor_arg, tensor_arg
from resnet_fused.backends.cpu.native import pack, vectors
from resnet_fused.models import resnext50_32x4d
from resnet_fused.numerics import cast, check_op
from resnet_fused.parameters import BatchNorm, ConvBn, Convolution
from resnet_fused.reference import ops as reference
from resnet_fused.testing.cases import (
    ConvCase,
    generator,
    make_convolution,
    make_identity,
    make_integers,
    make_residual,
)
from resnet_fused.testing.on import On

if reason := _extension.available():
    pytest.skip(reason, allow_module_level=True)
_C = _extension.load()
if not _C.cpu_isa():
    pytest.skip("this processor has neither AVX2 nor AVX-512", allow_module_level=True)

NHWC = torch.channels_last


@pytest.fixture(params=["float32-avx2", "float32-avx512", "bfloat16-avx2", "bfloat16-avx512"])
def kernel(request: pytest.FixtureRequest) -> tuple[torch.dtype, str]:
    dtype, isa = request.param.split("-")
    if isa > _C.cpu_isa():
        pytest.skip("this processor has AVX2 only")
    return getattr(torch, dtype), isa


def grouped(x: Tensor, layer: ConvBn, residual: Tensor | None, relu: bool, isa: str) -> Tensor:
    """relu?(bn(conv(x)) (+ residual)), between other memory of its size, all of it NaN before."""
    conv, bn = layer
    packed = tensor_arg(pack(_C, "grouped", conv.weight, conv.groups, isa))
    size = (conv.weight.shape[0], *conv.output_size(*x.shape[2:]))
    whole = torch.full((x.shape[0] + 2, *size), float("nan"), dtype=x.dtype)
    whole = whole.contiguous(memory_format=NHWC)
    out = whole[1:-1]
    window = (tuple(conv.weight.shape[2:]), *conv[1:4])
    described = (tensor_arg(x.contiguous(memory_format=NHWC)), packed, window, vectors(bn))
    _C.grouped_conv_bn(
        tensor_arg(out), described, conv.groups, optional_tensor_arg(residual), relu, isa
    )
    assert whole[0].isnan().all()
    assert whole[-1].isnan().all()
    return out


# Beside ResNeXt's widths: those of RegNet, depthwise ones, groups that are no whole words, units
# that are no whole vectors, outputs of a vector that belong to several groups, and the widths of
# tiles.
CASES = {
    "4 a group": ConvCase(2, 128, 9, 56, 128, 3, 1, 1, groups=32),
    "8 a group, stride 2": ConvCase(1, 256, 13, 28, 256, 3, 2, 1, groups=32),
    "16 a group": ConvCase(1, 128, 14, 14, 128, 3, 1, 1, groups=8),
    "32 a group": ConvCase(2, 128, 7, 7, 128, 3, 1, 1, groups=4),
    "32 a group, stride 2": ConvCase(1, 128, 14, 14, 128, 3, 2, 1, groups=4),
    "24 a group": ConvCase(1, 72, 9, 16, 72, 3, 1, 1, groups=3),
    "40 a group": ConvCase(1, 80, 5, 8, 80, 3, 1, 1, groups=2),
    "64 a group": ConvCase(1, 192, 5, 9, 192, 3, 1, 1, groups=3),
    "120 a group": ConvCase(1, 240, 4, 4, 240, 3, 1, 1, groups=2),
    "depthwise": ConvCase(2, 40, 15, 17, 40, 3, 1, 1, groups=40),
    "depthwise, 7x7": ConvCase(1, 33, 16, 11, 33, 7, 2, 3, groups=33),
    "depthwise, several out": ConvCase(1, 17, 9, 9, 51, 5, 1, 2, groups=17),
    "depthwise, many out": ConvCase(1, 3, 9, 9, 120, 3, 1, 1, groups=3),
    "odd groups": ConvCase(2, 35, 8, 13, 55, 3, 1, 1, groups=5),
    "fewer out than in": ConvCase(1, 96, 6, 10, 12, 3, 1, 1, groups=6),
    "one out a group": ConvCase(1, 64, 6, 10, 4, 3, 1, 1, groups=4),
    "pointwise": ConvCase(2, 64, 9, 12, 96, groups=8),
    "pointwise, stride 3": ConvCase(1, 64, 10, 13, 96, 1, 3, groups=8),
    "dilated": ConvCase(1, 48, 12, 15, 48, 3, 1, 2, 2, groups=12),
    "dilated, stride 2": ConvCase(1, 48, 12, 15, 48, 3, 2, 4, 4, groups=12),
    "dilated, stride 3": ConvCase(1, 48, 17, 19, 48, 4, 3, 2, 2, groups=12),
    "even window": ConvCase(1, 48, 12, 15, 48, 2, 1, 0, groups=12),
    "window wider than the image": ConvCase(2, 48, 9, 3, 32, 7, 1, 3, groups=4),
    "all in the padding": ConvCase(1, 16, 1, 1, 16, 1, 2, 3, groups=4),
    "one group": ConvCase(1, 20, 6, 7, 24, 3, 1, 1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("add", [True, False], ids=["residual", "plain"])
def test_it_is_exact_on_integers(name, add, kernel):
    dtype, isa = kernel
    rng = generator()
    x, layer = make_integers(CASES[name], rng, dtype)
    residual = make_residual(CASES[name], x, rng).round_() if add else None
    arguments = [x, layer, residual, add]
    truth = reference.conv_bn(*cast(arguments, torch.float64))
    assert torch.equal(grouped(*arguments, isa), truth.to(dtype))


@pytest.mark.parametrize(
    ("name", "channels", "stride"),
    [("4 a group", 64, 2), ("odd groups", 17, 1), ("40 a group", 41, 3), ("depthwise", 1, 2)],
)
def test_it_reads_a_narrower_strided_residual(name, channels, stride, kernel):
    dtype, isa = kernel
    rng = generator()
    x, layer = make_integers(CASES[name], rng, dtype)
    arguments = [x, layer, make_identity(CASES[name], channels, stride, x, rng), True]
    truth = reference.conv_bn(*cast(arguments, torch.float64))
    assert torch.equal(grouped(*arguments, isa), truth.to(dtype))


@pytest.mark.parametrize("name", CASES)
def test_it_is_as_accurate_as_eager(name, kernel):
    dtype, isa = kernel
    case = CASES[name]
    rng = generator(2)
    x, layer = make_convolution(case, rng, dtype)
    # Of few results, or sums of few terms, it is chance which side errs less.
    terms = case.channels // case.groups * case.kernel**2
    tiny = terms < 100 or torch.Size(case.output_shape).numel() < 1000
    check_op(
        lambda *arguments: grouped(*arguments, isa),
        reference.conv_bn,
        [x.relu(), layer, make_residual(case, x, rng), True],
        noise=1.1 if tiny else 1.0,
    )


def test_the_residual_may_be_the_output(kernel):
    dtype, isa = kernel
    rng = generator()
    case = CASES["24 a group"]
    x, (conv, bn) = make_integers(case, rng, dtype)
    residual = make_residual(case, x, rng).round_()
    truth = reference.conv_bn(*cast([x, ConvBn(conv, bn), residual, True], torch.float64))
    packed = tensor_arg(pack(_C, "grouped", conv.weight, conv.groups, isa))
    layer = (tensor_arg(x), packed, ((3, 3), *conv[1:4]), vectors(bn))
    out = tensor_arg(residual)
    _C.grouped_conv_bn(out, layer, conv.groups, out, True, isa)
    assert torch.equal(residual, truth.to(dtype))


def test_threads_do_not_change_bits(threads, kernel):
    dtype, isa = kernel
    for case in (CASES["4 a group"], CASES["32 a group"], CASES["odd groups"], CASES["dilated"]):
        x, layer = make_convolution(case, generator(), dtype)
        results = []
        for count in (1, 2, 5, 64):
            torch.set_num_threads(count)
            results.append(grouped(x, layer, None, False, isa))
        assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4, 7, 8, 16, 24, 32])
def test_a_number_reaches_its_own_group_only(channels, value, kernel):
    """NaN and infinity in the first and last channel of a group reach what its window reads."""
    dtype, isa = kernel
    for channel in (channels, 2 * channels - 1):
        case = ConvCase(1, 5 * channels, 9, 15, 5 * channels, 3, 1, 1, groups=5)
        x, layer = make_convolution(case, generator(), dtype)
        x[0, channel, 4, 7] = value
        expected = reference.conv_bn(*cast([x, layer, None, False], torch.float64))
        out = grouped(x, layer, None, False, isa)
        assert torch.equal(out.isfinite(), expected.isfinite())
        assert expected.isfinite().sum() == expected.numel() - 9 * channels


def test_weights_of_any_strides_and_an_empty_batch():
    x, layer = make_integers(CASES["24 a group"], generator(), torch.float32)
    wide = torch.zeros(72, 24, 3, 6)
    wide[..., ::2] = layer.conv.weight
    sliced = ConvBn(layer.conv._replace(weight=wide[..., ::2]), layer.bn)
    expected = grouped(x, layer, None, True, "")
    assert torch.equal(grouped(x, sliced, None, True, ""), expected)
    assert grouped(x[:0], layer, None, True, "").shape == (0, *expected.shape[1:])


def test_impossible_groups_are_refused():
    x, (conv, bn) = make_convolution(CASES["24 a group"], generator())
    described = tensor_arg(conv.weight)
    for groups in (0, -1, 5):
        with pytest.raises(ValueError, match="groups must divide the 72 output channels"):
            _C.grouped_packed_bytes(described, groups)
    packed = tensor_arg(pack(_C, "grouped", conv.weight, 3))
    out = tensor_arg(torch.empty_like(x))
    layer = (tensor_arg(x), packed, ((3, 3), *conv[1:4]), vectors(bn))
    with pytest.raises(ValueError, match="groups must divide the 72 channels of x, found 7"):
        _C.grouped_conv_bn(out, layer, 7, None, True)
    with pytest.raises(ValueError, match="packed must be of size"):
        _C.grouped_conv_bn(out, layer, 9, None, True)
    with pytest.raises(ValueError, match="out overlaps x"):
        _C.grouped_conv_bn(tensor_arg(x), layer, 3, None, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_onednn_computes_wrong_is_exact(dtype):
    """oneDNN's bfloat16 result, PyTorch's own, is off by 5 (see reference/convolution.py)."""
    rng = generator()
    x = torch.randint(-3, 4, (1, 8, 7, 2), generator=rng).to(dtype)
    weight = torch.randint(-3, 4, (16, 1, 1, 3), generator=rng).to(dtype)
    conv = Convolution(weight, (1, 3), (0, 1), (1, 1), 8)
    zeros = torch.zeros(16)
    layer = ConvBn(conv, BatchNorm(zeros, zeros + 0.75, None, None, 0.25))
    truth = torch.nn.functional.conv2d(x.double(), weight.double(), None, *conv[1:])
    out = On(backends.get("cpu")).conv_bn(x, layer, None, False)
    assert torch.equal(out.double(), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_forward_of_resnext_is_one_program(dtype):
    torch.manual_seed(0)
    model = resnext50_32x4d().eval().to(dtype)
    if reason := backends.get("cpu").unsupported(torch.device("cpu"), dtype):
        pytest.skip(reason)
    x = torch.randn(1, 3, 64, 64).to(dtype)
    with torch.inference_mode(), use_backend("cpu"):
        ordinary = model(x)
        for _ in range(3):
            out = model(x)
        (plan,) = (e.plan for e in model._plans._entries.values() if e.plan is not None)
        assert len(plan.steps) == 1
        assert torch.equal(out, ordinary)
        model.layer1[0].conv2.weight.data.mul_(2)
        edited = model(x)
        assert torch.equal(edited, copy.deepcopy(model)(x))  # plans do not travel
        assert not torch.equal(edited, ordinary)
