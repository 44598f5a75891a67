"""The CPU kernels by themselves: convolutions, stem, head, fingerprints in resnet_fused._C."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import _extension
from resnet_fused.backends.cpu.native import PackedConvolution, Vectors, bn_add_relu, head
from resnet_fused.backends.residual import residual_argument
from resnet_fused.parameters import BatchNorm, Convolution
from resnet_fused.reference import ops as reference
from resnet_fused.testing.cases import (
    CONV_CASES,
    ConvCase,
    generator,
    make_batch_norm,
    make_convolution,
    make_identity,
    make_integers,
    make_residual,
)
from resnet_fused.testing.numerics import bn_add_relu_roundings, cast, check_op, relative_error

if reason := _extension.available():
    pytest.skip(reason, allow_module_level=True)
_C = _extension.load()

ISAS = ("avx2", "avx512")
NHWC = torch.channels_last


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    have = _C.cpu_isa()
    if have not in ISAS or ISAS.index(request.param) > ISAS.index(have):
        pytest.skip(f"this processor has {have or 'neither AVX2 nor AVX-512'}")
    return request.param


@pytest.fixture(params=["float32-avx2", "float32-avx512", "bfloat16-avx512"])
def kernel(request: pytest.FixtureRequest) -> tuple[torch.dtype, str]:
    dtype, isa = request.param.split("-")
    have = _C.cpu_isa()
    if have not in ISAS or ISAS.index(isa) > ISAS.index(have):
        pytest.skip(f"this processor has {have or 'neither AVX2 nor AVX-512'}")
    if dtype == "bfloat16" and not _C.cpu_convolves_bf16():
        pytest.skip("this processor lacks AVX512_BF16")
    return getattr(torch, dtype), isa


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype).contiguous(memory_format=NHWC)


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale[:, None, None] + shift[:, None, None]


def batch_norm(scale: Tensor, shift: Tensor) -> tuple:
    """x * scale + shift, as the kernels take a batch norm."""
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    vectors = Vectors(BatchNorm(zero, one, scale, shift, 0.0))
    KEPT.append(vectors)
    return vectors.arguments


KEPT: list[Vectors] = []  # until the process ends: the arguments are addresses


class Conv(NamedTuple):
    """A 3x3 convolution with its epilogue, and its meaning in any dtype."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None
    relu: bool

    def double(self) -> Conv:
        return Conv(*(v.double() if isinstance(v, Tensor) else v for v in self))

    def eager(self) -> Tensor:
        y = affine(F.conv2d(self.x, self.weight, padding=1), self.scale, self.shift)
        if self.residual is not None:
            y = y + self.residual
        return y.relu() if self.relu else y

    def winograd(self, isa: str = "", out: Tensor | None = None) -> Tensor:
        batch, channels, height, width = self.x.shape
        out_channels = self.weight.shape[0]
        packed = torch.full((_C.winograd_weight_floats(channels, out_channels),), float("nan"))
        _C.winograd_transform_weights(
            self.weight.data_ptr(), self.weight.stride(), packed.data_ptr(), channels, out_channels
        )
        x = self.x.contiguous(memory_format=NHWC)
        residual = self.residual
        if residual is not None and residual is not out:
            residual = residual.contiguous(memory_format=NHWC)
        if out is None:
            out = poisoned(batch, out_channels, height, width)
        _C.winograd_conv(
            x.data_ptr(),
            packed.data_ptr(),
            batch_norm(self.scale, self.shift),
            residual_argument(residual),
            out.data_ptr(),
            batch,
            height,
            width,
            channels,
            out_channels,
            self.relu,
            isa,
        )
        return out


def random_conv(batch: int, channels: int, out_channels: int, height: int, width: int) -> Conv:
    """Activations after a ReLU, weights as ResNets initialise them, any batch norm."""
    return Conv(
        torch.randn(batch, channels, height, width).relu(),
        torch.randn(out_channels, channels, 3, 3) * (2 / (9 * out_channels)) ** 0.5,
        torch.randn(out_channels),
        torch.randn(out_channels),
        torch.randn(batch, out_channels, height, width),
        relu=True,
    )


def integer_conv(batch: int, channels: int, out_channels: int, height: int, width: int) -> Conv:
    return Conv(
        torch.randint(-3, 4, (batch, channels, height, width)).float(),
        torch.randint(-3, 4, (out_channels, channels, 3, 3)).float(),
        torch.randint(-2, 3, (out_channels,)).float(),
        torch.randint(-9, 10, (out_channels,)).float(),
        torch.randint(-9, 10, (batch, out_channels, height, width)).float(),
        relu=True,
    )


# (batch, channels, out_channels, height, width): tails of channels and tiles, images without an
# interior, more than one task, every width of the last block of output channels.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 16, 16, 4, 4),
    (1, 3, 5, 1, 9),
    (2, 17, 33, 5, 7),
    (3, 48, 100, 7, 7),
    (1, 31, 47, 13, 3),
    (1, 64, 64, 56, 56),
    (1, 128, 192, 25, 33),
    (2, 512, 512, 7, 7),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_winograd_is_exact_on_integers(shape, residual, relu, isa):
    torch.manual_seed(0)
    conv = integer_conv(*shape)._replace(relu=relu)
    if not residual:
        conv = conv._replace(residual=None)
    assert torch.equal(conv.winograd(isa).double(), conv.double().eager())


# What Winograd is meant for: whole vectors of channels, at least 5 pixels a side. On smaller maps
# most taps meet the border, the direct sum is short, and rounding in the transforms weighs more.
ACCURATE = [
    (2, 16, 16, 9, 12),
    (1, 32, 48, 13, 9),
    (2, 64, 64, 5, 6),
    *(shape for shape in SHAPES if shape[1] % 16 == 0 and min(shape[3:]) >= 5),
]


@pytest.mark.parametrize("shape", ACCURATE, ids=str)
@pytest.mark.parametrize("relu_input", [True, False], ids=["relu-input", "normal-input"])
def test_winograd_is_as_accurate_as_direct_convolution(shape, relu_input, isa):
    torch.manual_seed(1)
    conv = random_conv(*shape)
    if not relu_input:
        conv = conv._replace(x=torch.randn_like(conv.x))
    truth = conv.double().eager()
    direct = conv._replace(x=conv.x.contiguous(memory_format=NHWC)).eager()
    assert relative_error(conv.winograd(isa), truth) <= relative_error(direct, truth)


@pytest.mark.parametrize(("channels", "size"), [(64, 56), (128, 28), (256, 14), (512, 7)])
def test_winograd_is_as_accurate_as_onednn_on_resnet_layers(channels, size, isa):
    torch.manual_seed(2)
    conv = random_conv(1, channels, channels, size, size)
    where = ([1, 1], [1, 1], [1, 1], 1)
    weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *where, list(conv.x.shape))
    y = torch.ops.mkldnn._convolution_pointwise(
        conv.x.contiguous(memory_format=NHWC), weight, None, *where, "none", [], ""
    )
    onednn = (affine(y, conv.scale, conv.shift) + conv.residual).relu()
    truth = conv.double().eager()
    assert relative_error(conv.winograd(isa), truth) <= relative_error(onednn, truth)


def test_winograd_residual_may_be_the_output(isa):
    torch.manual_seed(3)
    conv = integer_conv(2, 32, 48, 9, 7)
    residual = conv.residual.contiguous(memory_format=NHWC)
    truth = conv.double().eager()
    out = conv._replace(residual=residual).winograd(isa, out=residual)
    assert out.data_ptr() == residual.data_ptr()
    assert torch.equal(out.double(), truth)


def test_winograd_takes_weights_of_any_strides():
    conv = integer_conv(1, 20, 24, 6, 6)
    strided = conv._replace(weight=conv.weight.contiguous(memory_format=NHWC))
    assert strided.weight.stride() != conv.weight.stride()
    assert torch.equal(strided.winograd(), conv.winograd())


def test_winograd_gives_the_same_bits_with_any_number_of_threads(threads, isa):
    conv = random_conv(2, 64, 128, 15, 14)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(conv.winograd(isa))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_winograd_passes_nan_on_and_writes_nothing_else(isa):
    conv = random_conv(1, 16, 24, 8, 8)
    conv.x[0, 3, 0, 0] = float("nan")
    whole = poisoned(3, 24, 8, 8)
    out = conv.winograd(isa, out=whole[1:2])
    assert out.isnan()[..., :2, :2].all()
    assert not out.isnan()[..., 2:, :].any()
    assert not out.isnan()[..., 2:].any()
    assert whole[::2].isnan().all()


@pytest.mark.parametrize(
    ("shape", "channels", "stride"),
    [((2, 32, 64, 14, 9), 32, 2), ((3, 48, 100, 7, 7), 33, 2), ((1, 16, 32, 5, 6), 7, 1)],
    ids=str,
)
def test_winograd_reads_a_narrower_strided_residual(shape, channels, stride, isa):
    conv = integer_conv(*shape)._replace(relu=False)
    case = ConvCase(shape[0], shape[1], *shape[3:], shape[2], 3, 1, 1)
    identity = make_identity(case, channels, stride, conv.x, generator())
    expected = conv._replace(residual=None).eager()
    expected[:, :channels] += identity
    assert torch.equal(conv._replace(residual=identity).winograd(isa), expected)


def test_winograd_of_an_empty_batch_is_empty():
    assert integer_conv(0, 16, 16, 5, 5).winograd().shape == (0, 16, 5, 5)


DENSE = (256, 64, 16)  # strides of (N, 16, 4, 4)
REFUSED_RESIDUALS = [
    ({"residual": ("out + 4", 16, DENSE)}, "out overlaps residual"),
    ({"residual": ("out", 8, DENSE)}, "out overlaps residual"),
    ({"residual": ("out", 16, (256, 128, 32))}, "out overlaps residual"),
    ({"residual": (0, 16, DENSE)}, "residual is a null pointer"),
    ({"residual": (2, 16, DENSE)}, "residual is not aligned"),
    ({"residual": ("x", 17, DENSE)}, "residual must have 1 to 16 channels, found 17"),
    ({"residual": ("x", 0, DENSE)}, "residual must have 1 to 16 channels, found 0"),
    ({"residual": ("x", 16, (256, -64, 16))}, "residual has a stride of -64"),
    ({"residual": ("x", 16, (2**62, 64, 16))}, "residual has a stride of"),
]


def addressed(change: dict[str, Any], x: Tensor, out: Tensor) -> dict[str, Any]:
    """The changed arguments with addresses for names."""
    names = {"x": x.data_ptr(), "out": out.data_ptr(), "out + 4": out.data_ptr() + 4}

    def address(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(address, value))
        return names.get(value, value) if isinstance(value, str) else value

    return {name: address(value) for name, value in change.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 0}, "x is a null pointer"),
        ({"bn": ((0, 1, 4), (4, 1, 4), None, None, 0.0)}, "mean is a null pointer"),
        ({"bn": ((4, 1, 4), (4, 1, 3), None, None, 0.0)}, "var has elements of 3 bytes"),
        ({"out_channels": 0}, "out_channels must be at least 1"),
        ({"height": -1}, "negative size -1"),
        ({"batch": 2**62}, r"more than 2\^48 elements"),
        ({"isa": "sse"}, 'found "sse"'),
        ({"out": "x"}, "out overlaps x"),
        *REFUSED_RESIDUALS,
    ],
    ids=str,
)
def test_winograd_refuses_impossible_arguments(change, message):
    x, out = torch.zeros(1, 16, 4, 4), torch.zeros(1, 16, 4, 4)
    packed, vector = torch.zeros(_C.winograd_weight_floats(16, 16)), torch.zeros(16)
    arguments = {
        "x": x.data_ptr(),
        "packed": packed.data_ptr(),
        "bn": batch_norm(vector, vector),
        "residual": None,
        "out": out.data_ptr(),
        "batch": 1,
        "height": 4,
        "width": 4,
        "in_channels": 16,
        "out_channels": 16,
        "relu": True,
    }
    arguments |= addressed(change, x, out)
    with pytest.raises(ValueError, match=message):
        _C.winograd_conv(**arguments)


def direct(
    x: Tensor, conv: Convolution, bn: BatchNorm, residual: Tensor | None, isa: str
) -> Tensor:
    """relu(bn(conv(x)) (+ residual)) by the direct kernel, into memory full of NaN."""
    out_channels, channels, *size = conv.weight.shape
    bf16 = x.dtype == torch.bfloat16
    packed = torch.empty(
        _C.conv_weight_bytes(channels, out_channels, size, bf16) // 2, dtype=torch.bfloat16
    ).fill_(float("nan"))
    _C.conv_transform_weights(
        conv.weight.data_ptr(),
        conv.weight.stride(),
        packed.data_ptr(),
        channels,
        out_channels,
        size,
        bf16,
    )
    shape = reference.conv_bn(x.double(), cast(conv, torch.float64), bn, None, True).shape
    out = poisoned(*shape, dtype=x.dtype)
    vectors = Vectors(bn)
    batch, _, height, width = x.shape
    _C.conv_bn(
        x.contiguous(memory_format=NHWC).data_ptr(),
        packed.data_ptr(),
        vectors.arguments,
        residual_argument(residual),
        out.data_ptr(),
        batch,
        height,
        width,
        channels,
        out_channels,
        size,
        *conv[1:4],
        True,
        bf16,
        isa,
    )
    return out


# Beside the common shapes: several chunks of a sum, strips and tasks, and tails of each.
DIRECT = {
    **{name: case for name, case in CONV_CASES.items() if case.groups == 1},
    "long sums": ConvCase(1, 300, 6, 5, 70, 3, 1, 1),
    "many rows": ConvCase(3, 24, 31, 29, 40, 3, 2, 1),
    "many strips": ConvCase(1, 130, 4, 4, 600),
    "odd sums": ConvCase(2, 129, 9, 9, 33),
    # Windows beside the image at the ends of a half, of a tile, of both halves; and of stride 2.
    **{
        f"3x3, {width} wide, stride {stride}": ConvCase(3, 40, 5, width, 40, 3, stride, 1)
        for width in (7, 13, 14, 28)
        for stride in (1, 2)
    },
    "window wider than the image": ConvCase(2, 48, 9, 3, 32, 7, 1, 3),
    "rows a cache way apart": ConvCase(2, 1024, 5, 7, 40),
}


@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.parametrize("add", [True, False], ids=["residual", "plain"])
def test_direct_convolution_is_exact_on_integers(name, add, kernel):
    dtype, isa = kernel
    rng = generator()
    x, (conv, bn) = make_integers(DIRECT[name], rng, dtype)
    residual = make_residual(DIRECT[name], x, rng).round_() if add else None
    truth = reference.conv_bn(
        x.double(),
        cast(conv, torch.float64),
        bn,
        residual.double() if add else None,
        True,
    )
    assert torch.equal(direct(x, conv, bn, residual, isa), truth.to(dtype))


# The residual's channels and stride: in place of whole strips, within one, at the end of one.
IDENTITIES = [
    ("pointwise", 64, 2),
    ("pointwise", 17, 1),
    ("many strips", 330, 2),
    ("3x3, 28 wide, stride 1", 32, 2),
    ("many rows", 1, 3),
    ("odd sums", 16, 2),
]


@pytest.mark.parametrize(("name", "channels", "stride"), IDENTITIES)
def test_direct_convolution_reads_a_narrower_strided_residual(name, channels, stride, kernel):
    dtype, isa = kernel
    rng = generator()
    x, (conv, bn) = make_integers(DIRECT[name], rng, dtype)
    identity = make_identity(DIRECT[name], channels, stride, x, rng)
    truth = reference.conv_bn(x.double(), cast(conv, torch.float64), bn, identity.double(), True)
    assert torch.equal(direct(x, conv, bn, identity, isa), truth.to(dtype))


@pytest.mark.parametrize("name", ["long sums", "many rows", "many strips", "odd sums"])
@pytest.mark.parametrize("layout", [NHWC, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_direct_convolution_is_as_accurate_as_eager(name, layout, kernel):
    """As eager in either memory format, which sums in other orders."""
    dtype, isa = kernel
    rng = generator()
    x, (conv, bn) = make_convolution(DIRECT[name], rng, dtype)
    arguments = [x.relu(), conv, bn, make_residual(DIRECT[name], x, rng), True]
    check_op(
        lambda x, conv, bn, residual, relu: direct(x, conv, bn, residual, isa),
        lambda x, *rest: reference.conv_bn(x.contiguous(memory_format=layout), *rest),
        arguments,
    )


def test_direct_convolution_gives_the_same_bits_with_any_number_of_threads(threads, kernel):
    dtype, isa = kernel
    results = []
    for case in (DIRECT["many rows"], DIRECT["many strips"], DIRECT["long sums"]):
        x, (conv, bn) = make_convolution(case, generator(), dtype)
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(direct(x, conv, bn, None, isa))
        assert all(torch.equal(result, results[-1]) for result in results[-3:])


def test_direct_convolution_passes_nan_on_only_where_it_is_read(kernel):
    dtype, isa = kernel
    x, (conv, bn) = make_convolution(ConvCase(1, 33, 9, 9, 40, 3, 1, 1), generator(), dtype)
    x[0, 32, 4, 4] = float("nan")
    expected = reference.conv_bn(x.float(), cast(conv, torch.float32), bn, None, True).isnan()
    assert expected.any()
    assert torch.equal(direct(x, conv, bn, None, isa).isnan(), expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_batch_norm_is_read_in_any_type_and_stride(stored):
    x, (conv, bn) = make_convolution(CONV_CASES["3x3"], generator(), torch.float32)
    rounded = BatchNorm(*(v.to(stored) for v in bn[:4]), bn.eps)
    wide = BatchNorm(*torch.stack(rounded[:4], 1).unbind(1), bn.eps)
    assert wide.mean.stride() == (4,)
    plain = BatchNorm(*(v.double() for v in rounded[:4]), bn.eps)
    expected = direct(x, conv, plain, None, "")
    assert torch.equal(direct(x, conv, rounded, None, ""), expected)
    assert torch.equal(direct(x, conv, wide, None, ""), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 0}, "x is a null pointer"),
        ({"kernel": (0, 1)}, "kernel sizes must be at least 1"),
        ({"stride": (1, 0)}, "stride and dilation must be at least 1"),
        ({"padding": (-1, 0)}, "padding at least 0"),
        ({"batch": -1}, "negative size -1"),
        ({"out": "x"}, "out overlaps x"),
        *REFUSED_RESIDUALS,
        ({"projection": (5, 5), "residual": ("out", 16, DENSE)}, "exclude each other"),
        ({"projection": (5, 5)}, "the projection's result has another size"),
        ({"projection": (-1, 4)}, "negative size -1"),
    ],
    ids=str,
)
def test_direct_convolution_refuses_impossible_arguments(change, message):
    x, out, vector = torch.zeros(1, 16, 4, 4), torch.zeros(1, 16, 4, 4), torch.ones(16)
    packed = torch.zeros(_C.conv_weight_bytes(16, 16, (1, 1), False), dtype=torch.uint8)
    arguments = {
        "x": x.data_ptr(),
        "packed": packed.data_ptr(),
        "bn": batch_norm(vector, vector),
        "residual": None,
        "out": out.data_ptr(),
        "batch": 1,
        "height": 4,
        "width": 4,
        "in_channels": 16,
        "out_channels": 16,
        "kernel": (1, 1),
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "relu": True,
        "bf16": False,
    }
    arguments |= addressed(change, x, out)
    if "projection" in change:
        window = ((1, 1), (1, 1), (0, 0), (1, 1))
        shortcut = torch.zeros(1, 16, 5, 5)
        arguments["projection"] = (
            *(shortcut.data_ptr(), packed.data_ptr(), arguments["bn"]),
            *(*change["projection"], 16, *window),
        )
    with pytest.raises(ValueError, match=message):
        _C.conv_bn(**arguments)


PROJECTIONS = {
    "bottleneck": (ConvCase(2, 64, 7, 7, 96), ConvCase(2, 48, 13, 14, 96, 1, 2)),
    "basic block, odd channels": (
        ConvCase(1, 33, 9, 20, 70, 3, 1, 1),
        ConvCase(1, 17, 9, 20, 70),
    ),
    "other windows": (ConvCase(3, 16, 6, 30, 40, 3, 1, 1), ConvCase(3, 130, 6, 30, 40, 5, 1, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_projection_is_exact_on_integers_and_meets_the_contract(name, dtype):
    if dtype == torch.bfloat16 and not _C.cpu_convolves_bf16():
        pytest.skip("this processor lacks AVX512_BF16")

    def by_kernel(x, conv, bn, shortcut, projection, projection_bn):
        main, side = (PackedConvolution(_C, c, winograd=False) for c in (conv, projection))
        assert main.adds_projection(side)
        return main.with_projection(x, bn, shortcut, side, projection_bn)

    for make in (make_integers, make_convolution):
        rng = generator(3)
        arguments = [part for case in PROJECTIONS[name] for part in make(case, rng, dtype)]
        out = check_op(by_kernel, reference.conv_bn_projection, arguments)
        if make is make_integers:
            truth = reference.conv_bn_projection(*cast(arguments, torch.float64))
            assert torch.equal(out, truth.to(dtype))


@pytest.mark.parametrize("shape", [(2, 64, 7, 5), (1, 19, 3, 1), (3, 5, 40, 41)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "apart"])
def test_batch_norm_pass_rounds_once(shape, dtype, in_place):
    x = torch.randn(shape, generator=generator()).to(dtype).contiguous(memory_format=NHWC)
    bn, residual = make_batch_norm(shape[1], generator(1)), torch.flip(x, (0,))
    for other in (None, residual):
        own = x.clone()
        out = bn_add_relu(_C, own, bn, other, True, in_place)
        assert (out.data_ptr() == own.data_ptr()) == in_place
        arguments = [x, bn, other, True]
        roundings = bn_add_relu_roundings(dtype, other is not None)
        check_op(lambda *_, out=out: out, reference.bn_add_relu, arguments, roundings=roundings)
        truth = reference.bn_add_relu(*cast(arguments, torch.float64))
        # A unit in the last place of the largest value, where every step may round in float32.
        spacing = torch.finfo(dtype).eps * truth.abs() * (0.51 if dtype == torch.bfloat16 else 2)
        assert ((out.double() - truth).abs() <= spacing + 1e-6).all()


@pytest.mark.parametrize(("channels", "stride"), [(19, 2), (7, 1), (16, 3)])
def test_batch_norm_pass_reads_a_narrower_strided_residual(channels, stride):
    case = ConvCase(2, 19, 5, 3, 19)
    x, (_, bn) = make_integers(case, generator())
    identity = make_identity(case, channels, stride, x, generator(1))
    expected = reference.bn_add_relu(x, bn, None, False)
    expected[:, :channels] += identity
    assert torch.equal(bn_add_relu(_C, x, bn, identity, True), expected.relu())


def test_bfloat16_is_rounded_to_the_nearest_even():
    """Every upper half with lower halves around its midpoint, NaN and infinities among them."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = (upper | lower).view(torch.float32).flatten()
    normal = values[~((values.abs() > 0) & (values.abs() < torch.finfo(torch.float32).tiny))]
    x = torch.ones(1, normal.numel(), 1, 1, dtype=torch.bfloat16)
    zero = torch.zeros(normal.numel())
    bn = BatchNorm(zero, zero + 1, zero, normal, 0.0)
    out = bn_add_relu(_C, x, bn, None, False).flatten()
    expected = normal.bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(1.0), expected.nan_to_num(1.0))


@pytest.mark.parametrize(
    "shape", [(1, 2048, 7, 7, 1000), (5, 512, 4, 5, 10), (2, 37, 1, 3, 51)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_meets_the_contract(shape, dtype):
    batch, channels, height, width, classes = shape
    rng = generator()
    x = torch.randn(batch, channels, height, width, generator=rng).relu().to(dtype)
    wide = torch.randn(classes, 2 * channels, generator=rng).to(dtype) * channels**-0.5
    bias = torch.randn(classes, generator=rng).to(dtype)
    for weight in (wide[:, :channels], wide[:, ::2]):
        for arguments in ([x, weight, bias], [x, weight, None]):
            check_op(lambda *a: head(_C, *a), reference.head, arguments)


def test_head_gives_the_same_bits_with_any_number_of_threads_and_images(threads):
    x = torch.randn(7, 300, 5, 5, generator=generator())
    weight, bias = torch.randn(101, 300, generator=generator(1)), torch.zeros(101)
    expected = torch.cat([head(_C, image, weight, bias) for image in x.split(1)])
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert torch.equal(head(_C, x, weight, bias), expected)


def stem_eager(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = affine(F.conv2d(x, weight, stride=2, padding=3), scale, shift)
    return F.max_pool2d(y.relu(), 3, 2, 1)


def stem(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, isa: str = "") -> Tensor:
    batch, _, height, width = x.shape
    channels, bf16 = weight.shape[0], x.dtype == torch.bfloat16
    packed = torch.empty(_C.stem_weight_bytes(channels, bf16), dtype=torch.uint8)
    _C.stem_transform_weights(weight.data_ptr(), weight.stride(), packed.data_ptr(), channels, bf16)
    pooled = [((size + 1) // 2 + 1) // 2 for size in (height, width)]
    out = poisoned(batch, channels, *pooled, dtype=x.dtype)
    x = x.contiguous(memory_format=NHWC)
    bn = batch_norm(scale, shift)
    _C.stem_conv_pool(
        x.data_ptr(),
        packed.data_ptr(),
        bn,
        out.data_ptr(),
        batch,
        height,
        width,
        channels,
        bf16,
        isa,
    )
    return out


STEM_SHAPES = [
    (0, 8, 8, 64),
    (1, 1, 1, 32),
    (1, 2, 300, 64),
    (3, 7, 5, 64),
    (2, 20, 9, 96),
    (1, 32, 33, 32),
    (2, 97, 131, 64),
    (1, 224, 224, 64),
]


@pytest.mark.parametrize("shape", STEM_SHAPES, ids=str)
def test_stem_is_exact_on_integers(shape, kernel):
    torch.manual_seed(4)
    (batch, height, width, channels), (dtype, isa) = shape, kernel
    x = torch.randint(-2, 3, (batch, 3, height, width)).to(dtype)
    weight = torch.randint(-1, 2, (channels, 3, 7, 7)).to(dtype)
    scale = torch.randint(-2, 3, (channels,)).float()
    shift = torch.randint(-5, 6, (channels,)).float()
    truth = stem_eager(x.double(), weight.double(), scale.double(), shift.double())
    assert torch.equal(stem(x, weight, scale, shift, isa), truth.to(dtype))


@pytest.mark.parametrize("shape", [(1, 224, 224, 64), (2, 97, 131, 64)], ids=str)
def test_stem_is_as_accurate_as_eager(shape, kernel):
    torch.manual_seed(5)
    (batch, height, width, channels), (dtype, isa) = shape, kernel
    x = torch.randn(batch, 3, height, width).to(dtype)
    weight = (torch.randn(channels, 3, 7, 7) * 0.1).to(dtype)
    scale, shift = torch.randn(channels), torch.randn(channels)
    truth = stem_eager(x.double(), weight.double(), scale.double(), shift.double())
    eager = stem_eager(x, weight, scale.to(dtype), shift.to(dtype))
    error = relative_error(stem(x, weight, scale, shift, isa), truth)
    assert error <= relative_error(eager, truth)


def test_stem_takes_weights_of_any_strides_and_any_number_of_threads(threads, kernel):
    torch.manual_seed(6)
    dtype, isa = kernel
    x, weight = torch.randn(1, 3, 75, 50).to(dtype), torch.randn(64, 3, 7, 7).to(dtype)
    scale, shift = torch.randn(64), torch.randn(64)
    strided = weight.contiguous(memory_format=NHWC)
    assert strided.stride() != weight.stride()
    results = []
    for count, form in ((1, weight), (2, strided), (3, weight)):
        torch.set_num_threads(count)
        results.append(stem(x, form, scale, shift, isa))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_stem_passes_nan_on(kernel):
    dtype, isa = kernel
    x, weight = torch.randn(1, 3, 40, 40).to(dtype), torch.randn(32, 3, 7, 7).to(dtype)
    x[0, 1, 20, 20] = float("nan")
    out = stem(x, weight, torch.ones(32), torch.zeros(32), isa)
    eager = stem_eager(x.float(), weight.float(), torch.ones(32), torch.zeros(32))
    assert torch.equal(out.isnan(), eager.isnan())


def test_stem_refuses_impossible_arguments():
    bn = batch_norm(torch.ones(64), torch.ones(64))
    with pytest.raises(ValueError, match="multiple of 32, found 48"):
        _C.stem_weight_bytes(48, False)
    with pytest.raises(ValueError, match="x is a null pointer"):
        _C.stem_conv_pool(0, 4, bn, 4, 1, 8, 8, 64, False)
    with pytest.raises(ValueError, match="out overlaps x"):
        _C.stem_conv_pool(64, 64, bn, 64, 1, 8, 8, 64, False)


def fingerprint(tensor: Tensor) -> int:
    return _C.fingerprint(tensor.data_ptr(), tensor.nbytes)


@pytest.mark.parametrize("size", [1, 7, 8, 63, 64, 65, 1000, 300_000])
def test_fingerprint_sees_every_single_bit(size):
    torch.manual_seed(7)
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    clean = fingerprint(data)
    positions = range(size) if size <= 1000 else torch.randint(0, size, (300,)).tolist()
    seen = {clean}
    for position in positions:
        for bit in range(8):
            data[position] ^= 1 << bit
            seen.add(fingerprint(data))
            data[position] ^= 1 << bit
    assert fingerprint(data) == clean
    assert len(seen) == 1 + 8 * len(set(positions))


@pytest.mark.parametrize(
    "edit",
    [
        lambda w: w.neg_(),
        lambda w: w.mul_(2),
        lambda w: w.mul_(0.999),
        lambda w: w.zero_(),
        lambda w: w.copy_(w.flip(0)),
        lambda w: w.copy_(w.roll(1)),
        lambda w: w.copy_(w.roll(16)),
        lambda w: w.copy_(w.roll(65536)),
        lambda w: w[:2].copy_(w[:2].flip(0)),
        lambda w: w[::16].neg_(),
        lambda w: w[100_000:].neg_(),
    ],
)
@pytest.mark.parametrize("make", [torch.randn, torch.ones], ids=["random", "constant"])
def test_fingerprint_sees_edits_of_a_weight(edit, make):
    weight = make(200_000)
    before, clean = weight.clone(), fingerprint(weight)
    edit(weight)
    assert (fingerprint(weight) == clean) == torch.equal(weight, before)


def test_fingerprint_depends_on_the_length():
    zeros = torch.zeros(600_000, dtype=torch.uint8)
    lengths = [0, 1, 8, 64, 65, 128, 262_143, 262_144, 262_145, 524_288, 600_000]
    assert len({_C.fingerprint(zeros.data_ptr(), length) for length in lengths}) == len(lengths)


def test_fingerprint_is_the_same_for_any_threads_alignment_and_batching(threads):
    data = torch.randint(0, 256, (1_000_003,), dtype=torch.uint8)
    shifted = torch.empty(1_000_004, dtype=torch.uint8)[1:].copy_(data)
    small = torch.arange(10.0)
    inputs = [(t.data_ptr(), t.nbytes) for t in (data, small, shifted)] + [(0, 0)]
    results = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        one_by_one = [_C.fingerprint(*item) for item in inputs]
        assert _C.fingerprints(inputs) == one_by_one
        assert one_by_one[0] == one_by_one[2]
        results.add(tuple(one_by_one))
    assert len(results) == 1
    assert _C.fingerprints([]) == []


def test_fingerprint_refuses_impossible_arguments():
    with pytest.raises(ValueError, match="negative size -1"):
        _C.fingerprint(64, -1)
    with pytest.raises(ValueError, match="null pointer"):
        _C.fingerprints([(64, 0), (0, 8)])
