"""The CPU kernels by themselves: convolutions, stem, head, fingerprints in resnet_fused._C."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import _extension
from resnet_fused._extension import optional_tensor_arg, tensor_arg
from resnet_fused.backends.cpu.native import (
    PackedConvolution,
    bn_add_relu,
    group_norm_add_relu,
    head,
    pack,
    squeeze_excite,
    suits_winograd,
    vectors,
)
from resnet_fused.numerics import (
    bn_add_relu_roundings,
    cast,
    check_op,
    relative_error,
    rounding_floor,
)
from resnet_fused.parameters import BatchNorm, ConvBn, Convolution, GroupNorm
from resnet_fused.reference import ops as reference
from resnet_fused.testing.cases import (
    CONV_CASES,
    ConvCase,
    generator,
    make_batch_norm,
    make_convolution,
    make_group_norm,
    make_identity,
    make_integers,
    make_residual,
    make_squeeze_excite,
)

if reason := _extension.available():
    pytest.skip(reason, allow_module_level=True)
_C = _extension.load()

ISAS = ("avx2", "avx512")
NHWC = torch.channels_last
# Kernel, stride, padding, dilation.
WINDOW_3X3 = ((3, 3), (1, 1), (1, 1), (1, 1))
WINDOW_1X1 = ((1, 1), (1, 1), (0, 0), (1, 1))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    have = _C.cpu_isa()
    if have not in ISAS or ISAS.index(request.param) > ISAS.index(have):
        pytest.skip(f"this processor has {have or 'neither AVX2 nor AVX-512'}")
    return request.param


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype).contiguous(memory_format=NHWC)


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale[:, None, None] + shift[:, None, None]


def batch_norm(scale: Tensor, shift: Tensor) -> tuple:
    """x * scale + shift, as the kernels take a batch norm."""
    zero = torch.zeros_like(scale)
    return vectors(BatchNorm(zero, zero + 0.75, scale, shift, 0.25))


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
        batch, _, height, width = self.x.shape
        packed = tensor_arg(pack(_C, "winograd", self.weight))
        x = self.x.contiguous(memory_format=NHWC)
        residual = self.residual
        if residual is not None and residual is not out:
            residual = residual.contiguous(memory_format=NHWC)
        if out is None:
            out = poisoned(batch, self.weight.shape[0], height, width)
        layer = (tensor_arg(x), packed, WINDOW_3X3, batch_norm(self.scale, self.shift))
        _C.winograd_conv(tensor_arg(out), layer, optional_tensor_arg(residual), self.relu, isa)
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
    (1, 83, 70, 9, 5),
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
    (2, 80, 64, 9, 10),  # a chunk of AVX2's long ones, and a rest
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


@pytest.mark.parametrize(
    ("size", "suits"),
    [
        *((size, True) for size in [(56, 56), (11, 11), (8, 8)]),
        *((size, False) for size in [(9, 9), (7, 7), (56, 2), (1, 1)]),
    ],
    ids=str,
)
def test_winograd_serves_maps_that_its_tiles_fill(size, suits):
    conv = Convolution(torch.empty(16, 16, 3, 3), padding=(1, 1))
    assert suits_winograd(torch.empty(1, 16, *size), conv) is suits


def test_winograd_of_an_empty_batch_is_empty():
    assert integer_conv(0, 16, 16, 5, 5).winograd().shape == (0, 16, 5, 5)


def changed(argument: tuple, **changes: Any) -> tuple:
    """A tensor's description with other fields."""
    fields = dict(zip(("address", "type", "sizes", "strides", "tensor"), argument, strict=True))
    return tuple({**fields, **changes}.values())


DENSE = (256, 1, 64, 16)  # strides of (1, 16, 4, 4) in channels_last memory
SIZES = (1, 16, 4, 4)
# Each a tensor among x and out, and what is wrong with the residual in its place.
REFUSED_RESIDUALS = [
    ("out", {"shift": 4}, "out overlaps residual"),
    ("out", {"sizes": (1, 8, 4, 4)}, "out overlaps residual"),
    ("out", {"strides": (256, 1, 128, 32)}, "out overlaps residual"),
    ("x", {"address": 0}, "residual is a null pointer"),
    ("x", {"address": 2}, "residual is not aligned"),
    ("x", {"sizes": (1, 17, 4, 4)}, "residual must have 1 to 16 channels, found 17"),
    ("x", {"sizes": (1, 0, 4, 4)}, "residual must have 1 to 16 channels, found 0"),
    (
        "x",
        {"sizes": (1, 16, 4, 5)},
        r"residual must be of size \(1, 16, 4, 4\), found \(1, 16, 4, 5\)",
    ),
    ("x", {"strides": (256, 16, 4, 1)}, "residual must have adjacent channels"),
    ("x", {"strides": (256, 1, -64, 16)}, "a tensor has a stride of -64"),
    ("x", {"strides": (256, 1, 2**62, 16)}, "a tensor has a stride of"),
    ("x", {"type": 2}, "residual must be float32, found bfloat16"),
    ("x", {"type": 9}, "a tensor has a type of number 9"),
]


@pytest.fixture
def arguments() -> dict[str, tuple]:
    """x, out and a batch norm of 16 channels."""
    tensors = {name: torch.zeros(SIZES).contiguous(memory_format=NHWC) for name in ("x", "out")}
    one = torch.ones(16)
    return {**{n: tensor_arg(t) for n, t in tensors.items()}, "bn": batch_norm(one, one)}


KERNELS = {"conv": _C.conv_bn, "winograd": _C.winograd_conv}


@pytest.mark.parametrize("form", KERNELS)
@pytest.mark.parametrize(("name", "changes", "message"), REFUSED_RESIDUALS, ids=str)
def test_convolutions_refuse_impossible_residuals(form, name, changes, message, arguments):
    changes = dict(changes)
    residual = arguments[name]
    if shift := changes.pop("shift", 0):
        changes["address"] = residual[0] + shift
    window = WINDOW_1X1 if form == "conv" else WINDOW_3X3
    weight = torch.zeros(16, 16, *window[0])
    layer = (arguments["x"], tensor_arg(pack(_C, form, weight)), window, arguments["bn"])
    with pytest.raises(ValueError, match=message):
        KERNELS[form](arguments["out"], layer, changed(residual, **changes), True)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("x", {"address": 0}, "x is a null pointer"),
        ("x", {"sizes": (1, 0, 4, 4), "strides": (0, 1, 0, 0)}, "x has no channels"),
        ("x", {"sizes": (1, 16, -1, 4)}, "a tensor has a negative size of -1"),
        ("x", {"sizes": (2**24, 2**24, 2, 2)}, r"more than 2\^48 elements"),
        ("x", {"strides": (256, 16, 4, 1)}, "x must be dense and channels_last"),
        ("x", {"type": 2}, "x must be float32, found bfloat16"),
        ("out", {"sizes": (1, 16, 4, 5)}, "out must be dense"),
        ("packed", {"sizes": (64,)}, r"packed must be of size \(\d+\), found \(64\)"),
        ("packed", {"type": 0}, "packed must be uint8, found float32"),
        ("mean", {"address": 0}, "mean is a null pointer"),
        ("mean", {"sizes": (15,)}, r"mean must be of size \(16\), found \(15\)"),
        ("mean", {"type": 1}, "mean must be float32, found float16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", KERNELS)
def test_convolutions_refuse_impossible_tensors(form, name, changes, message, arguments):
    window = WINDOW_1X1 if form == "conv" else WINDOW_3X3
    packed = tensor_arg(pack(_C, form, torch.zeros(16, 16, *window[0])))
    mean, *others = arguments["bn"]
    tensors = {"x": arguments["x"], "out": arguments["out"], "packed": packed, "mean": mean}
    tensors[name] = changed(tensors[name], **changes)
    bn = (tensors["mean"], *others)
    with pytest.raises(ValueError, match=message):
        KERNELS[form](tensors["out"], (tensors["x"], tensors["packed"], window, bn), None, True)


@pytest.mark.parametrize("form", KERNELS)
def test_convolutions_refuse_an_output_in_the_input_and_other_processors(form, arguments):
    window = WINDOW_1X1 if form == "conv" else WINDOW_3X3
    packed = tensor_arg(pack(_C, form, torch.zeros(16, 16, *window[0])))
    layer = (arguments["x"], packed, window, arguments["bn"])
    with pytest.raises(ValueError, match="out overlaps x"):
        KERNELS[form](arguments["x"], layer, None, True)
    with pytest.raises(ValueError, match='found "sse"'):
        KERNELS[form](arguments["out"], layer, None, True, isa="sse")


def direct(
    x: Tensor, conv: Convolution, bn: BatchNorm, residual: Tensor | None, isa: str
) -> Tensor:
    """relu(bn(conv(x)) (+ residual)) by the direct kernel, into memory full of NaN."""
    packed = tensor_arg(pack(_C, "conv", conv.weight, isa))
    shape = reference.conv_bn(x.double(), ConvBn(cast(conv, torch.float64), bn), None, True).shape
    out = poisoned(*shape, dtype=x.dtype)
    window = (tuple(conv.weight.shape[2:]), *conv[1:4])
    layer = (tensor_arg(x.contiguous(memory_format=NHWC)), packed, window, vectors(bn))
    _C.conv_bn(tensor_arg(out), layer, optional_tensor_arg(residual), True, isa=isa)
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
    "every other pixel, a cache way apart": ConvCase(3, 512, 9, 13, 40, stride=2),
    # Lines whose halves are of two lengths, so that a tile's halves come from different lines.
    **{
        f"{kernel}x{kernel}, {width} wide, {batch} images, {stride}": ConvCase(
            batch, 70, 7, width, 33, kernel, stride, kernel // 2
        )
        for kernel, width, batch, stride in [
            (3, 7, 1, 1),
            (3, 14, 3, 2),
            (3, 28, 1, 2),
            (3, 5, 2, 1),
            (3, 11, 2, 1),
            (1, 27, 2, 2),
        ]
    },
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
        ConvBn(cast(conv, torch.float64), bn),
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
    truth = reference.conv_bn(
        x.double(), ConvBn(cast(conv, torch.float64), bn), identity.double(), True
    )
    assert torch.equal(direct(x, conv, bn, identity, isa), truth.to(dtype))


@pytest.mark.parametrize("name", ["long sums", "many rows", "many strips", "odd sums"])
@pytest.mark.parametrize("layout", [NHWC, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_direct_convolution_is_as_accurate_as_eager(name, layout, kernel):
    """As eager in either memory format, which sums in other orders."""
    dtype, isa = kernel
    rng = generator()
    x, (conv, bn) = make_convolution(DIRECT[name], rng, dtype)
    arguments = [x.relu(), ConvBn(conv, bn), make_residual(DIRECT[name], x, rng), True]
    check_op(
        lambda x, layer, residual, relu: direct(x, *layer, residual, isa),
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
    expected = reference.conv_bn(
        x.float(), ConvBn(cast(conv, torch.float32), bn), None, True
    ).isnan()
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
    ("field", "value", "message"),
    [
        (0, (0, 1), "kernel, stride and dilation must be at least 1"),
        (1, (1, 0), "kernel, stride and dilation must be at least 1"),
        (2, (-1, 0), "padding at least 0"),
        (3, (1, 2**40), r"at most 2\^31"),
        (1, (2, 2), r"out must be of size \(1, 16, 2, 2\), found \(1, 16, 4, 4\)"),
    ],
)
def test_direct_convolution_refuses_impossible_windows(field, value, message, arguments):
    packed = tensor_arg(pack(_C, "conv", torch.zeros(16, 16, 1, 1)))
    window = tuple(value if i == field else pair for i, pair in enumerate(WINDOW_1X1))
    with pytest.raises(ValueError, match=message):
        _C.conv_bn(arguments["out"], (arguments["x"], packed, window, arguments["bn"]), None, True)


def test_direct_convolution_refuses_impossible_projections(arguments):
    packed = tensor_arg(pack(_C, "conv", torch.zeros(16, 16, 1, 1)))
    layer = (arguments["x"], packed, WINDOW_1X1, arguments["bn"])
    with pytest.raises(ValueError, match="exclude each other"):
        _C.conv_bn(arguments["out"], layer, arguments["out"], True, layer)
    wider = tensor_arg(torch.zeros(1, 16, 5, 5).contiguous(memory_format=NHWC))
    with pytest.raises(ValueError, match=r"out must be of size \(1, 16, 5, 5\)"):
        _C.conv_bn(arguments["out"], layer, None, True, (wider, *layer[1:]))


@pytest.mark.parametrize("form", ["conv", "winograd", "stem"])
def test_packing_refuses_other_memory(form):
    weight = tensor_arg(torch.zeros(32, 3, 7, 7) if form == "stem" else torch.zeros(32, 16, 3, 3))
    size = getattr(_C, f"{form}_packed_bytes")(weight)
    into = getattr(_C, f"{form}_pack")
    for wrong, message in (
        (tensor_arg(torch.zeros(size - 1, dtype=torch.uint8)), "packed must be of size"),
        (tensor_arg(torch.zeros(size)), "packed must be uint8, found float32"),
        (changed(tensor_arg(torch.zeros(size, dtype=torch.uint8)), address=0), "packed is a null"),
    ):
        with pytest.raises(ValueError, match=message):
            into(weight, wrong)
    with pytest.raises(ValueError, match="weight must be float32, found float64"):
        into(tensor_arg(torch.zeros(weight[2]).double()), tensor_arg(torch.zeros(size)))


PROJECTIONS = {
    "bottleneck": (ConvCase(2, 64, 7, 7, 96), ConvCase(2, 48, 13, 14, 96, 1, 2)),
    "basic block, odd channels": (
        ConvCase(1, 33, 9, 20, 70, 3, 1, 1),
        ConvCase(1, 17, 9, 20, 70),
    ),
    "several rounds of strips": (
        ConvCase(3, 300, 3, 14, 200),
        ConvCase(3, 520, 5, 27, 200, 1, 2),
    ),
    "other windows": (ConvCase(3, 16, 6, 30, 40, 3, 1, 1), ConvCase(3, 130, 6, 30, 40, 5, 1, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_projection_is_exact_on_integers_and_meets_the_contract(name, dtype):
    if dtype == torch.bfloat16 and not _C.cpu_convolves_bf16():
        pytest.skip("the kernels of bfloat16 need AVX2 or AVX512_BF16")

    def by_kernel(x, layer, shortcut, projection):
        convolutions = (layer.conv, projection.conv)
        main, side = (PackedConvolution(_C, conv, winograd=False) for conv in convolutions)
        assert main.adds_projection(side)
        return main.with_projection(x, layer.bn, shortcut, side, projection.bn)

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
    bn = BatchNorm(zero, zero + 0.75, zero, normal, 0.25)
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


@pytest.mark.parametrize(
    "shape",
    [(2, 64, 20, 17, 16), (3, 19, 3, 5, 3), (1, 256, 56, 56, 16), (16, 37, 1, 1, 70)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("add", [True, False], ids=["residual", "plain"])
def test_squeeze_excite_rounds_once(shape, dtype, add):
    arguments = make_squeeze_excite(*shape, generator(), add, add, add, dtype)
    run = partial(squeeze_excite, _C)
    out = check_op(run, reference.squeeze_excite, arguments)
    truth = reference.squeeze_excite(*cast(arguments, torch.float64))
    spacing = torch.finfo(dtype).eps * truth.abs() * (0.51 if dtype == torch.bfloat16 else 4)
    assert ((out.double() - truth).abs() <= spacing + 1e-5).all()


def test_squeeze_excite_gives_the_same_bits_with_any_number_of_threads_and_images(threads):
    x, gate, residual, relu = make_squeeze_excite(5, 40, 25, 21, 7, generator(), True, True)
    images = zip(x.split(1), residual.split(1), strict=True)
    expected = torch.cat([squeeze_excite(_C, one, gate, added, relu) for one, added in images])
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert torch.equal(squeeze_excite(_C, x, gate, residual, relu), expected)


def test_squeeze_excite_in_place_and_with_nan():
    x, gate, residual, relu = make_squeeze_excite(2, 24, 9, 5, 6, generator(), True, True, True)
    expected = squeeze_excite(_C, x, gate, residual, relu)
    described = tensor_arg(x)
    reduce, reduce_bias, expand, expand_bias = map(tensor_arg, gate)
    linears = (reduce, reduce_bias), (expand, expand_bias)
    _C.squeeze_excite(described, described, *linears, tensor_arg(residual), relu)
    assert torch.equal(x, expected)
    x[0, 3, 8, 4] = float("nan")  # by way of its image's means all of that image
    out = squeeze_excite(_C, x, gate, residual, relu)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


def test_squeeze_excite_refuses_impossible_arguments(arguments):
    x = arguments["x"]
    reduce, expand = ((tensor_arg(torch.zeros(s)), None) for s in ((5, 16), (16, 5)))
    out = arguments["out"]
    for wrong, message in (
        ((out, x, (tensor_arg(torch.zeros(16, 5).t()), None), expand), "reduce must be contiguous"),
        ((out, x, reduce, reduce), r"expand must be of size \(16, 5\)"),
        ((out, x, (tensor_arg(torch.zeros(0, 16)), None), expand), "reduce has no rows"),
        ((out, x, (reduce[0], tensor_arg(torch.zeros(4))), expand), r"bias must be of size \(5\)"),
        ((changed(x, address=x[0] + 4), x, reduce, expand), "out overlaps x"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.squeeze_excite(*wrong, None, True)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 64, 56, 56), 32),  # several runs of pixels
        ((1, 256, 30, 13), 1),
        ((3, 19, 4, 5), 19),
        ((2, 2048, 7, 7), 32),
        ((1, 50, 41, 40), 5),
        ((4, 6, 1, 1), 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (100, 0.1), (-3, 1e-3)], ids=str)
def test_group_norm_is_stable_and_rounds_once(shape, groups, dtype, mean, deviation):
    """Also where the mean is large beside the deviation, and the first pixel lies far off."""
    x, norm, residual, relu = make_group_norm(shape, groups, generator(), True)
    x = torch.randn(shape, generator=generator(1)) * deviation + mean
    x[:, ::3, 0, 0] += 5 * deviation
    x = x.to(dtype).contiguous(memory_format=NHWC)
    arguments = [x, norm, residual.to(dtype), relu]
    out = group_norm_add_relu(_C, *arguments)
    truth = reference.group_norm_add_relu(*cast(arguments, torch.float64))
    # Of batch norm, with the residual; and bfloat16's one.
    roundings = bn_add_relu_roundings(torch.float32, True)
    bound = rounding_floor(roundings, torch.float32) + (
        rounding_floor(1, dtype) * 1.05 if dtype == torch.bfloat16 else 0
    )
    assert relative_error(out, truth) < bound


def test_group_norm_of_constants():
    """No variance: the bias is left, exactly."""
    x = torch.full((2, 8, 9, 9), 0.1).contiguous(memory_format=NHWC)
    bias = torch.randn(8, generator=generator())
    out = group_norm_add_relu(_C, x, GroupNorm(2, None, bias), None, False)
    assert torch.equal(out, bias[:, None, None].expand_as(x))


def test_group_norm_gives_the_same_bits_with_any_number_of_threads_and_images(threads):
    x, norm, residual, relu = make_group_norm((5, 40, 35, 41), 8, generator(), True, relu=True)
    images = zip(x.split(1), residual.split(1), strict=True)
    expected = torch.cat([group_norm_add_relu(_C, a, norm, b, relu) for a, b in images])
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert torch.equal(group_norm_add_relu(_C, x, norm, residual, relu), expected)


@pytest.mark.parametrize(("channels", "stride"), [(19, 2), (7, 1), (16, 3)])
def test_group_norm_reads_a_narrower_strided_residual(channels, stride):
    case = ConvCase(2, 20, 5, 3, 20)
    x, norm, _, _ = make_group_norm((2, 20, 5, 3), 4, generator())
    identity = make_identity(case, channels, stride, x, generator(1))
    wide = torch.zeros_like(x)
    wide[:, :channels] = identity
    expected = group_norm_add_relu(_C, x, norm, wide, True)
    assert torch.equal(group_norm_add_relu(_C, x, norm, identity, True), expected)


def test_group_norm_in_place():
    x, norm, residual, relu = make_group_norm((2, 24, 30, 50), 6, generator(), True, relu=True)
    expected = group_norm_add_relu(_C, x, norm, residual, relu)
    rest = (tensor_arg(norm.weight), tensor_arg(norm.bias), norm.eps)
    own, added = x.clone(), residual.clone()
    _C.group_norm_add_relu(tensor_arg(own), tensor_arg(own), 6, *rest, tensor_arg(added), relu)
    assert torch.equal(own, expected)
    _C.group_norm_add_relu(tensor_arg(added), tensor_arg(x), 6, *rest, tensor_arg(added), relu)
    assert torch.equal(added, expected)


def test_group_norm_refuses_impossible_arguments(arguments):
    out, x = arguments["out"], arguments["x"]
    for wrong, message in (
        ((out, x, 5, None, None), "groups must divide the 16 channels, found 5"),
        ((out, x, 0, None, None), "groups must divide the 16 channels, found 0"),
        ((out, x, 4, tensor_arg(torch.zeros(4)), None), r"weight must be of size \(16\)"),
        ((changed(x, address=x[0] + 4), x, 4, None, None), "out overlaps x"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.group_norm_add_relu(*wrong, 1e-5, None, True)


def stem_eager(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = affine(F.conv2d(x, weight, stride=2, padding=3), scale, shift)
    return F.max_pool2d(y.relu(), 3, 2, 1)


def stem(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, isa: str = "") -> Tensor:
    batch, _, height, width = x.shape
    packed = tensor_arg(pack(_C, "stem", weight))
    pooled = [((size + 1) // 2 + 1) // 2 for size in (height, width)]
    out = poisoned(batch, weight.shape[0], *pooled, dtype=x.dtype)
    x = x.contiguous(memory_format=NHWC)
    _C.stem_conv_pool(tensor_arg(out), tensor_arg(x), packed, batch_norm(scale, shift), isa)
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
    with pytest.raises(ValueError, match="multiple of 32, found 48"):
        _C.stem_packed_bytes(tensor_arg(torch.zeros(48, 3, 7, 7)))
    packed = tensor_arg(pack(_C, "stem", torch.zeros(64, 3, 7, 7)))
    bn = batch_norm(torch.ones(64), torch.ones(64))
    x, out = (tensor_arg(poisoned(1, c, n, n)) for c, n in ((3, 8), (64, 2)))
    for wrong, message in (
        ((out, changed(x, address=0)), "x is a null pointer"),
        ((changed(out, address=x[0]), x), "out overlaps x"),
        ((out, tensor_arg(poisoned(1, 4, 8, 8))), r"x must be of size \(1, 3, 8, 8\)"),
        ((tensor_arg(poisoned(1, 64, 4, 4)), x), r"out must be of size \(1, 64, 2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.stem_conv_pool(*wrong, packed, bn)


def test_head_and_batch_norm_refuse_impossible_arguments(arguments):
    x, bn = arguments["x"], arguments["bn"]
    weight, bias, out = (tensor_arg(torch.zeros(s)) for s in ((5, 16), (5,), (1, 5)))
    for wrong, message in (
        ((out, x, tensor_arg(torch.zeros(16, 5).t()), bias), "weight must have contiguous rows"),
        ((out, x, tensor_arg(torch.zeros(5, 15)), bias), r"weight must be of size \(5, 16\)"),
        ((out, x, weight, tensor_arg(torch.zeros(4))), r"bias must be of size \(5\)"),
        ((out, x, weight, tensor_arg(torch.zeros(5).bfloat16())), "bias must be float32"),
        ((tensor_arg(torch.zeros(1, 4)), x, weight, bias), r"out must be of size \(1, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.head(*wrong)
    with pytest.raises(ValueError, match="out overlaps x"):
        _C.bn_add_relu(changed(x, address=x[0] + 4), x, bn, None, True)
    with pytest.raises(TypeError):
        _C.bn_add_relu(x[:4], x, bn, None, True)


def fingerprint(tensor: Tensor) -> int:
    (found,) = _C.fingerprints([tensor_arg(tensor)])
    return found


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
    assert len({fingerprint(zeros[:length]) for length in lengths}) == len(lengths)


def test_fingerprint_is_the_same_for_any_threads_alignment_and_batching(threads):
    data = torch.randint(0, 256, (1_000_003,), dtype=torch.uint8)
    shifted = torch.empty(1_000_004, dtype=torch.uint8)[1:].copy_(data)
    small = torch.arange(10.0)
    inputs = [tensor_arg(t) for t in (data, small, shifted, small[:0])]
    results = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        one_by_one = [_C.fingerprints([item])[0] for item in inputs]
        assert _C.fingerprints(inputs) == one_by_one
        assert one_by_one[0] == one_by_one[2]
        results.add(tuple(one_by_one))
    assert len(results) == 1
    assert _C.fingerprints([]) == []


def test_fingerprint_refuses_impossible_arguments():
    with pytest.raises(ValueError, match="fill one span"):
        fingerprint(torch.zeros(4, 4)[:, :2])
    with pytest.raises(ValueError, match="null pointer"):
        _C.fingerprints([changed(tensor_arg(torch.zeros(4)), address=0)])


@pytest.mark.parametrize("watchable", [False, True])
def test_contents_see_an_edit_that_moves_no_version_counter(watchable):
    weights = [torch.randn(16, 16, 3, 3), torch.randn(5)]
    prints = [fingerprint(w) for w in weights]
    contents = _C.Contents([tensor_arg(w) for w in weights], prints, watchable)
    x = torch.randn(1, 8, 3, 3).contiguous(memory_format=NHWC)
    weight, out = torch.randn(4, 8), torch.empty(1, 4)
    recorder = _C.Recorder()
    recorder.start()
    _C.head(tensor_arg(out), tensor_arg(x), tensor_arg(weight), None)
    recorder.stop()
    program = recorder.program(0, 1, [tensor_arg(x)], [tensor_arg(out)], [tensor_arg(weight)], 64)
    expected = out.clone()
    out.fill_(torch.nan)
    assert contents.run(program, [x.data_ptr(), out.data_ptr()], 0)
    assert torch.equal(out, expected)
    weights[1].data[3] += 1
    assert not contents.run(program, [x.data_ptr(), out.data_ptr()], 0)
    with pytest.raises(ValueError, match="one fingerprint"):
        _C.Contents([tensor_arg(weights[0])], [], watchable)
