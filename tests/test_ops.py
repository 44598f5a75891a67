"""Every op on every backend against float64, by the numerics contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from resnet_fused import backends, ops
from resnet_fused.numerics import bn_add_relu_roundings, cast, check_op
from resnet_fused.ops import BatchNorm, ConvBn, GroupNorm, MaxPool
from resnet_fused.ops.registry import registered
from resnet_fused.reference import ops as reference
from resnet_fused.testing.cases import (
    CONV_CASES,
    BlockCase,
    ConvCase,
    generator,
    make_batch_norm,
    make_bottleneck,
    make_convolution,
    make_group_norm,
    make_identity,
    make_integers,
    make_residual,
    make_squeeze_excite,
)
from resnet_fused.testing.on import On

# The results have a few hundred elements, so one rounding more or less shows in the norm.
NOISE = 1.1


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every tensor that a backend allocates with NaN, so that an unwritten element shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        allocate = getattr(torch, name)

        def poisoned(*args, _allocate=allocate, **kwargs):
            tensor = _allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(params=CONV_CASES.values(), ids=CONV_CASES.keys())
def case(request: pytest.FixtureRequest) -> ConvCase:
    return request.param


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("add", [False, True], ids=["plain", "residual"])
def test_conv_bn(case: ConvCase, device: str, dtype: torch.dtype, add: bool, relu: bool) -> None:
    rng = generator()
    x, layer = make_convolution(case, rng, dtype, device)
    residual = make_residual(case, x, rng) if add else None
    out = check_op(ops.conv_bn, reference.conv_bn, [x, layer, residual, relu], noise=NOISE)
    assert out.shape == case.output_shape
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_conv_bn_is_exact_on_integers(case: ConvCase, device: str, dtype: torch.dtype) -> None:
    rng = generator()
    x, layer = make_integers(case, rng, dtype, device)
    residual = make_residual(case, x, rng).round_()
    out = ops.conv_bn(x, layer, residual, True)
    truth = reference.conv_bn(*cast([x, layer, residual, True], torch.float64))
    assert truth.abs().max() <= 256, "the case no longer fits every dtype exactly"
    assert torch.equal(out.double(), truth)


def test_conv_bn_reads_any_layout(device: str, dtype: torch.dtype) -> None:
    case = CONV_CASES["3x3"]
    rng = generator()
    x, layer = make_integers(case, rng, dtype, device)  # exact in whatever order sums run
    residual = make_residual(case, x, rng).round_()
    expected = ops.conv_bn(x, layer, residual, True)
    wide = torch.randn(x.shape[0], x.shape[1], x.shape[2], 2 * x.shape[3]).to(x)
    sliced = wide[..., ::2].copy_(x)
    vectors = torch.stack([v for v in layer.bn[:4] if v is not None], 1)
    conv = layer.conv._replace(weight=layer.conv.weight.contiguous())
    strided = ConvBn(conv, BatchNorm(*vectors.unbind(1), layer.bn.eps))
    for layout in (x.contiguous(), sliced, x.mT.contiguous().mT):
        out = ops.conv_bn(layout, strided, residual.contiguous(), True)
        assert torch.equal(out, expected)


def test_conv_bn_keeps_small_deviations_from_a_large_mean(device: str, dtype: torch.dtype) -> None:
    """Mean 100 and standard deviation 0.1: the subtraction must not lose what is left."""
    rng = generator()
    x, layer = make_convolution(CONV_CASES["pointwise"], rng, dtype, device)
    mean = torch.full_like(layer.bn.mean, 100.0)
    layer = layer._replace(bn=layer.bn._replace(mean=mean, var=torch.full_like(mean, 0.01)))
    x = (x + 4).to(dtype)
    check_op(ops.conv_bn, reference.conv_bn, [x, layer, None, False], noise=NOISE)


@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
def test_conv_bn_without_affine_parameters(device: str, dtype: torch.dtype, missing: str) -> None:
    x, layer = make_convolution(CONV_CASES["pointwise"], generator(), dtype, device)
    for name in ("weight", "bias") if missing == "both" else (missing,):
        layer = layer._replace(bn=layer.bn._replace(**{name: None}))
    check_op(ops.conv_bn, reference.conv_bn, [x, layer, None, True], noise=NOISE)


def test_conv_bn_reads_float32_batch_norms_beside_any_dtype(
    device: str, dtype: torch.dtype
) -> None:
    x, layer = make_convolution(CONV_CASES["3x3"], generator(), dtype, device)
    channels = layer.conv.weight.shape[0]
    layer = layer._replace(bn=make_batch_norm(channels, generator(1), torch.float32, device))
    check_op(ops.conv_bn, reference.conv_bn, [x, layer, None, True], noise=NOISE)


def test_conv_bn_leaves_its_arguments_alone(device: str, dtype: torch.dtype) -> None:
    case = CONV_CASES["pointwise"]
    rng = generator()
    x, layer = make_convolution(case, rng, dtype, device)
    residual = make_residual(case, x, rng)
    tensors = [x, layer.conv.weight, residual, *layer.bn[:4]]
    before = [tensor.clone() for tensor in tensors]
    ops.conv_bn(x, layer, residual, True)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_conv_bn_adds_the_input_itself(device: str, dtype: torch.dtype) -> None:
    """An identity block whose residual is its input, as in ResNets of one channel count."""
    x, layer = make_convolution(ConvCase(2, 16, 5, 5, 16), generator(), dtype, device)
    check_op(ops.conv_bn, reference.conv_bn, [x, layer, x, True], noise=NOISE)


# The block's input's channels, rows and columns, and its stride; the result has 37 × 5 × 4.
IDENTITIES = {
    "strided": (37, 9, 8, 2),
    "strided, padded": (19, 10, 7, 2),
    "padded": (16, 5, 4, 1),
    "one channel": (1, 13, 11, 3),
}


@pytest.mark.parametrize("layout", ["nhwc", "nchw", "sliced"])
@pytest.mark.parametrize("name", IDENTITIES)
def test_conv_bn_adds_a_strided_narrower_residual(
    name: str, layout: str, device: str, dtype: torch.dtype
) -> None:
    """Shortcut option A: integers, so that one element from a wrong place shows."""
    channels, height, width, stride = IDENTITIES[name]
    rng = generator()
    x, layer = make_integers(ConvCase(2, 8, 5, 4, 37, 3, 1, 1), rng, dtype, device)
    block_input = torch.randint(-9, 10, (2, 40, height, width), generator=rng).to(device, dtype)
    if layout == "nhwc":
        block_input = block_input[:, :channels]
    if layout != "nchw":
        block_input = block_input.contiguous(memory_format=torch.channels_last)
    identity = block_input[:, :channels, ::stride, ::stride]
    out = ops.conv_bn(x, layer, identity, True, pad_residual=True)
    linear = reference.conv_bn(*cast([x, layer, None, False], torch.float64))
    linear[:, :channels] += identity
    assert torch.equal(out.double(), linear.clamp(min=0))


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda_sim", marks=pytest.mark.simulator)])
@pytest.mark.parametrize("groups", [1, 2])  # on the CPU, groups go another way
def test_conv_bn_copies_no_narrower_strided_residual(name: str, groups: int) -> None:
    if reason := backends.unavailable(name):
        pytest.skip(reason)
    case = ConvCase(1, 16, 4, 4, 32, 3, 1, 1, groups=groups)
    x, layer = make_convolution(case, generator(), torch.float32)
    identity = make_identity(case, 16, 2, x, generator())
    On(name).conv_bn(x, layer, identity, True)  # packs the weights
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        On(name).conv_bn(x, layer, identity, True)
    called = {event.name for event in profiler.events()}
    assert any("empty" in op or "convolution" in op for op in called)
    assert not any(word in op for op in called for word in ("clone", "copy", "pad", "zero"))


PROJECTIONS = {
    "bottleneck": (ConvCase(2, 16, 5, 5, 64), 2, (10, 9)),
    "bottleneck stride 1": (ConvCase(2, 16, 6, 5, 64), 1, (6, 5)),
    "basic": (ConvCase(1, 32, 5, 4, 32, 3, 1, 1), 2, (9, 8)),
    "channel tails": (ConvCase(1, 13, 4, 4, 21), 2, (7, 8)),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_conv_bn_projection(name: str, device: str, dtype: torch.dtype) -> None:
    case, stride, (height, width) = PROJECTIONS[name]
    rng = generator()
    x, layer = make_convolution(case, rng, dtype, device)
    block_input = ConvCase(case.batch, 24, height, width, case.out_channels, stride=stride)
    shortcut, projection = make_convolution(block_input, rng, dtype, device)
    arguments = [x, layer, shortcut, projection]
    out = check_op(ops.conv_bn_projection, reference.conv_bn_projection, arguments, noise=NOISE)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_conv_bn_projection_with_a_3x3_projection(device: str, dtype: torch.dtype) -> None:
    rng = generator()
    x, layer = make_convolution(ConvCase(1, 8, 5, 5, 16), rng, dtype, device)
    wide = ConvCase(1, 8, 10, 10, 16, 3, 2, 1)
    shortcut, projection = make_convolution(wide, rng, dtype, device)
    arguments = [x, layer, shortcut, projection]
    check_op(ops.conv_bn_projection, reference.conv_bn_projection, arguments, noise=NOISE)


BOTTLENECKS = {
    "identity": BlockCase(2, 24, 6, 5, 8, 24),
    "projection": BlockCase(1, 16, 5, 6, 8, 32, projection=True),
    "strided": BlockCase(2, 24, 9, 8, 16, 40, 2, True),
    "channel tails": BlockCase(2, 19, 9, 8, 13, 19),
}


def bottleneck(
    x: Tensor, layer1: ConvBn, layer2: ConvBn, layer3: ConvBn, projection: ConvBn | None
) -> Tensor:
    """The op with the reference's signature."""
    return ops.bottleneck(x, (layer1, layer2, layer3), projection)


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_bottleneck(name: str, device: str, dtype: torch.dtype) -> None:
    arguments = make_bottleneck(BOTTLENECKS[name], generator(), dtype, device)
    out = check_op(bottleneck, reference.bottleneck, arguments, noise=NOISE)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_bottleneck_of_other_windows(device: str, dtype: torch.dtype) -> None:
    """Stride in the first layer, as in the paper, groups, dilation; a 3×3 projection."""
    rng = generator()
    x, layer1 = make_convolution(ConvCase(1, 16, 10, 9, 8, stride=2), rng, dtype, device)
    _, layer2 = make_convolution(ConvCase(1, 8, 5, 5, 8, 3, 1, 2, 2, 2), rng, dtype, device)
    _, layer3 = make_convolution(ConvCase(1, 8, 5, 5, 24), rng, dtype, device)
    _, projection = make_convolution(ConvCase(1, 16, 10, 9, 24, 3, 2, 1), rng, dtype, device)
    arguments = [x, layer1, layer2, layer3, projection]
    check_op(bottleneck, reference.bottleneck, arguments, noise=NOISE)


STEMS = {
    "resnet": (ConvCase(2, 3, 32, 32, 64, 7, 2, 3), MaxPool(3, 2, 1)),
    "odd size": (ConvCase(1, 3, 37, 23, 64, 7, 2, 3), MaxPool(3, 2, 1)),
    "one pixel": (ConvCase(9, 3, 1, 1, 64, 7, 2, 3), MaxPool(3, 2, 1)),
    "other channels": (ConvCase(1, 5, 15, 14, 20, 7, 2, 3), MaxPool(3, 2, 1)),
    "small windows": (ConvCase(6, 3, 11, 12, 16, 3, 1, 1), MaxPool(2, 2, 0)),
}


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("name", STEMS)
def test_stem(name: str, layout: str, device: str, dtype: torch.dtype) -> None:
    case, pool = STEMS[name]
    x, layer = make_convolution(case, generator(), dtype, device)
    if layout == "nchw":
        x = x.contiguous()
    out = check_op(ops.stem, reference.stem, [x, layer, pool], noise=NOISE)
    assert out.is_contiguous(memory_format=torch.channels_last)


# Enough results that chance makes no tenth of their error.
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(400, 64, 7, 7, 10), (1, 37, 3, 5, 411), (403, 16, 1, 1, 1)])
def test_head(shape: tuple[int, ...], bias: bool, device: str, dtype: torch.dtype) -> None:
    batch, channels, height, width, classes = shape
    rng = generator()
    x = torch.randn(batch, channels, height, width, generator=rng).to(device, dtype)
    weight = torch.randn(classes, channels, generator=rng).to(device, dtype)
    offset = torch.randn(classes, generator=rng).to(device, dtype) if bias else None
    x = x.contiguous(memory_format=torch.channels_last)
    out = check_op(ops.head, reference.head, [x, weight, offset], noise=NOISE)
    assert out.shape == (batch, classes)


def test_infinities_stay_infinite_in_the_head(device: str, dtype: torch.dtype) -> None:
    """Zeros that fill a step must not meet them, nor what is kept of a rounded sum."""
    x = torch.randn(5, 40, 3, 3, generator=generator()).to(device, dtype)
    weight = torch.randn(20, 40, generator=generator()).to(device, dtype)
    weight[3, 1] = torch.inf
    x[1, 5], x[2, 7, 1, 1], x[3, 39] = torch.inf, -torch.inf, torch.nan
    out, expected = ops.head(x, weight, None), reference.head(x, weight, None)
    infinite = torch.isinf(expected)
    assert infinite.any()
    assert torch.equal(out[infinite], expected[infinite])
    assert torch.equal(torch.isnan(out), torch.isnan(expected))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("add", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", [(8, 64, 7, 7, 16), (9, 37, 3, 5, 5), (8, 64, 1, 1, 16)])
def test_squeeze_excite(
    shape: tuple[int, ...], add: bool, bias: bool, device: str, dtype: torch.dtype
) -> None:
    for relu in (False, True):
        arguments = make_squeeze_excite(*shape, generator(), add, bias, relu, dtype, device)
        # Mean, hidden value, gate before and behind the sigmoid, product; and the residual.
        roundings = 5 + add if dtype == torch.float32 else 0
        out = check_op(
            registered["squeeze_excite"],
            reference.squeeze_excite,
            arguments,
            noise=NOISE,
            roundings=roundings,
        )
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_squeeze_excite_refuses_what_does_not_fit() -> None:
    x, (reduce, _, expand, _), *_ = make_squeeze_excite(2, 8, 3, 3, 4, generator())
    for arguments, message in (
        ((x, reduce[:, :4], None, expand, None), r"reduce must have shape \(hidden, 8\)"),
        ((x, reduce, reduce[:3, 0], expand, None), r"reduce_bias must have shape \(4,\)"),
        ((x, reduce, None, expand.T, None), r"expand must have shape \(8, 4\)"),
        ((x, reduce, None, expand, expand[:, 0][:7]), r"expand_bias must have shape \(8,\)"),
        ((x, reduce, None, expand, None, x[:1]), r"residual must have shape \(2, 8, 3, 3\)"),
        ((x[:, :, :0], reduce, None, expand, None), "at least one pixel"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.squeeze_excite(*arguments)
    with pytest.raises(TypeError, match=r"expand is torch\.float64 and the input torch\.float32"):
        ops.squeeze_excite(x, reduce, None, expand.double(), None)


@pytest.mark.parametrize("add", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", [(2, 64, 7, 7), (1, 19, 3, 5), (1, 1, 1, 1)])
def test_bn_add_relu(shape: tuple[int, ...], add: bool, device: str, dtype: torch.dtype) -> None:
    rng = generator()
    x = torch.randn(shape, generator=rng).to(device, dtype)
    residual = torch.randn(shape, generator=rng).to(device, dtype) if add else None
    bn = make_batch_norm(shape[1], rng, dtype, device)
    for relu in (False, True):
        arguments = [x, bn, residual, relu]
        check_op(
            ops.bn_add_relu,
            reference.bn_add_relu,
            arguments,
            noise=NOISE,
            roundings=bn_add_relu_roundings(dtype, add),
        )


def group_norm_add_relu(x: Tensor, norm: GroupNorm, residual: Tensor | None, relu: bool) -> Tensor:
    return ops.group_norm_add_relu(x, *norm, residual, relu)


GROUP_NORMS = [
    ((2, 64, 7, 7), 32),
    ((1, 19, 3, 5), 1),
    ((2, 19, 4, 4), 19),
    ((3, 40, 20, 17), 5),
    ((1, 33, 9, 1), 11),
    ((2, 6, 1, 1), 3),
    ((1, 80, 1, 1), 1),
]


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("add", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize(("shape", "groups"), GROUP_NORMS)
def test_group_norm_add_relu(
    shape: tuple[int, int, int, int],
    groups: int,
    add: bool,
    affine: bool,
    device: str,
    dtype: torch.dtype,
) -> None:
    for relu in (False, True):
        arguments = make_group_norm(shape, groups, generator(), add, affine, relu, dtype, device)
        out = check_op(
            group_norm_add_relu,
            reference.group_norm_add_relu,
            arguments,
            noise=NOISE,
            roundings=bn_add_relu_roundings(dtype, add),  # those of batch norm
        )
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_group_norm_of_any_layout_and_of_parameters_of_any_type(
    device: str, dtype: torch.dtype
) -> None:
    x, norm, residual, _ = make_group_norm(
        (2, 24, 6, 5), 4, generator(), True, True, True, dtype, device
    )
    wide = torch.zeros(2, 24, 6, 10, dtype=dtype, device=device)
    wide[..., ::2] = x
    exact = norm._replace(weight=norm.weight.double(), bias=norm.bias.float())
    for view, parameters in ((x.contiguous(), norm), (wide[..., ::2], norm), (x, exact)):
        out = check_op(
            group_norm_add_relu,
            reference.group_norm_add_relu,
            [view, parameters, residual.contiguous(), True],
            noise=NOISE,
            roundings=bn_add_relu_roundings(dtype, True),
        )
        assert out.dtype == dtype


def test_group_norm_confines_nan_to_its_group_and_image(device: str, dtype: torch.dtype) -> None:
    arguments = make_group_norm((3, 24, 5, 7), 6, generator(), True, True, True, dtype, device)
    expected = group_norm_add_relu(*arguments)
    for value in (float("nan"), float("inf")):
        spoilt = arguments[0].clone()
        spoilt[1, 9, 2, 3] = value  # of channels 8 to 11
        out = group_norm_add_relu(spoilt, *arguments[1:])
        assert out[1, 8:12].isnan().all()
        out[1, 8:12] = expected[1, 8:12]
        assert torch.equal(out, expected)


@pytest.mark.parametrize("case", [CONV_CASES[name] for name in ("3x3", "7x7 stem", "grouped")])
def test_conv(case: ConvCase, device: str, dtype: torch.dtype) -> None:
    x, (conv, _) = make_convolution(case, generator(), dtype, device)
    out = check_op(ops.conv, reference.conv, [x, conv], noise=NOISE)
    assert out.is_contiguous(memory_format=torch.channels_last)
    x, (conv, _) = make_integers(case, generator(), dtype, device)
    truth = reference.conv(*cast([x, conv], torch.float64))
    assert torch.equal(ops.conv(x, conv).double(), truth)


@st.composite
def conv_cases(draw: st.DrawFn) -> ConvCase:
    """Any convolution that fits, small enough for an interpreter."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    case = ConvCase(
        batch=draw(st.integers(1, 3)),
        channels=groups * draw(st.integers(1, 20)),
        height=draw(st.integers(1, 12)),
        width=draw(st.integers(1, 12)),
        out_channels=groups * draw(st.integers(1, 20)),
        kernel=draw(st.sampled_from([1, 1, 2, 3, 3, 5, 7])),
        stride=draw(st.integers(1, 3)),
        padding=draw(st.integers(0, 3)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
    )
    assume(min(case.output_size) >= 1)
    return case


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(case=conv_cases(), add=st.booleans(), relu=st.booleans(), seed=st.integers(0, 99))
def test_conv_bn_on_random_shapes(
    device: str, dtype: torch.dtype, case: ConvCase, add: bool, relu: bool, seed: int
) -> None:
    """Integers, so that the answer is exact and one wrong element among thousands shows."""
    rng = generator(seed)
    x, layer = make_integers(case, rng, dtype, device)
    residual = make_residual(case, x, rng).round_() if add else None
    out = ops.conv_bn(x, layer, residual, relu)
    truth = reference.conv_bn(*cast([x, layer, residual, relu], torch.float64))
    assert torch.equal(out.double(), truth)


def test_same_inputs_give_the_same_bits(device: str, dtype: torch.dtype) -> None:
    x, layer = make_convolution(CONV_CASES["3x3"], generator(), dtype, device)
    first = ops.conv_bn(x, layer, None, True)
    assert all(torch.equal(ops.conv_bn(x, layer, None, True), first) for _ in range(3))


def test_batch_zero_gives_an_empty_result(device: str, dtype: torch.dtype) -> None:
    x, layer = make_convolution(ConvCase(0, 16, 8, 8, 32, 3, 2, 1), generator(), dtype, device)
    assert ops.conv_bn(x, layer).shape == (0, 32, 4, 4)
    assert ops.conv(x, layer.conv).shape == (0, 32, 4, 4)
    assert ops.group_norm_add_relu(x, 4).shape == (0, 16, 8, 8)
    assert ops.stem(x, layer).shape == (0, 32, 2, 2)
    weight = torch.zeros(7, 16, dtype=dtype, device=device)
    assert ops.head(x, weight).shape == (0, 7)
    assert ops.conv_bn_projection(x, layer, x, layer).shape == (0, 32, 4, 4)
    block = make_bottleneck(BlockCase(0, 16, 8, 8, 8, 16), generator(), dtype, device)
    assert bottleneck(*block).shape == (0, 16, 8, 8)
