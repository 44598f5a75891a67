"""The cpu backend at sizes that its primitives serve: numerics, stale caches, memory, absence."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
import torchvision
from conftest import require
from torch import Tensor, nn

import resnet_fused
import resnet_fused.backends.cpu as cpu
from resnet_fused import _extension, backends, use_backend
from resnet_fused.backends.cpu.onednn import OneDnnConvolution
from resnet_fused.errors import BackendUnavailableError
from resnet_fused.numerics import assert_contract, cast, check_op, relative_error
from resnet_fused.ops import BatchNorm, ConvBn, Convolution, MaxPool
from resnet_fused.reference import ops as reference
from resnet_fused.testing.cases import (
    ConvCase,
    generator,
    make_batch_norm,
    make_convolution,
    make_integers,
    make_residual,
    randomise_statistics,
)
from resnet_fused.testing.on import On

pytestmark = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason=str(backends.unavailable("cpu"))
)

LARGE = {
    "pointwise": ConvCase(2, 64, 28, 28, 256),
    "pointwise strided": ConvCase(2, 64, 31, 28, 128, stride=2),
    "3x3": ConvCase(2, 64, 28, 28, 64, 3, 1, 1),
    "3x3 odd": ConvCase(3, 48, 27, 13, 80, 3, 1, 1),
    "3x3 strided": ConvCase(2, 64, 29, 28, 128, 3, 2, 1),
    "3x3 dilated": ConvCase(1, 64, 28, 23, 64, 3, 1, 2, 2),
    "5x5": ConvCase(1, 32, 29, 28, 64, 5, 1, 2),
    "grouped": ConvCase(2, 128, 28, 28, 128, 3, 1, 1, groups=32),
    "wide weight, small map": ConvCase(2, 256, 3, 3, 256, 3, 1, 1),
    "wide weight, one small map": ConvCase(1, 256, 3, 3, 256, 3, 1, 1),
}


@pytest.fixture(params=[True, False], ids=["kernels", "onednn"])
def kernels(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def backend(kernels: bool) -> cpu.CpuBackend:
    return make_backend(kernels)


@pytest.fixture
def on(backend: cpu.CpuBackend) -> On:
    """The ops as that backend computes them."""
    return On(backend)


@pytest.fixture
def noise(kernels: bool) -> float:
    """Behind oneDNN's own rounding both sides round as often, and which one errs less is chance."""
    return 1.0 if kernels else 1.1


def make_backend(kernels: bool) -> cpu.CpuBackend:
    """The backend with its own convolutions, or as it is where the processor has none."""
    with pytest.MonkeyPatch.context() as patch:
        if not kernels:
            patch.setattr(_extension.load(), "cpu_isa", lambda: "")
            patch.setattr(_extension.load(), "cpu_convolves_bf16", lambda: False)
        return cpu.CpuBackend()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest, backend: cpu.CpuBackend) -> torch.dtype:
    if reason := backend.unsupported(torch.device("cpu"), request.param):
        pytest.skip(reason)
    return request.param


def non_negative(x: Tensor) -> Tensor:
    """As a ReLU leaves what a convolution inside a ResNet reads."""
    return x.relu()


@pytest.mark.parametrize("name", LARGE)
def test_conv_bn_meets_the_contract(name: str, on: On, dtype: torch.dtype, noise: float) -> None:
    rng = generator(1)
    x, layer = make_convolution(LARGE[name], rng, dtype)
    x = non_negative(x)
    for residual in (None, make_residual(LARGE[name], x, rng)):
        for relu in (False, True):
            arguments = [x, layer, residual, relu]
            out = check_op(on.conv_bn, reference.conv_bn, arguments, noise=noise)
            assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", LARGE)
def test_conv_bn_is_exact_on_integers(name: str, on: On, dtype: torch.dtype) -> None:
    rng = generator()
    x, layer = make_integers(LARGE[name], rng, dtype)
    residual = make_residual(LARGE[name], x, rng).round_()
    out = on.conv_bn(x, layer, residual, True)
    truth = reference.conv_bn(*cast([x, layer, residual, True], torch.float64))
    # Larger sums than 256 are rounded by bfloat16, once.
    assert torch.equal(out, truth.to(dtype))


@pytest.mark.parametrize("kernel", [1, 3])
def test_projection_meets_the_contract(
    kernel: int, on: On, dtype: torch.dtype, noise: float
) -> None:
    rng = generator(2)
    case = ConvCase(2, 64, 28, 28, 128, kernel, 1, kernel // 2)
    x, layer = make_convolution(case, rng, dtype)
    wide = ConvCase(2, 64, 56, 55, 128, stride=2)
    shortcut, projection = make_convolution(wide, rng, dtype)
    arguments = [non_negative(x), layer, non_negative(shortcut), projection]
    check_op(on.conv_bn_projection, reference.conv_bn_projection, arguments, noise=noise)


@pytest.mark.parametrize("size", [(64, 64), (97, 131)])
def test_stem_meets_the_contract(
    size: tuple[int, int], on: On, dtype: torch.dtype, noise: float
) -> None:
    x, layer = make_convolution(ConvCase(2, 3, *size, 64, 7, 2, 3), generator(3), dtype)
    for layout in (x, x.contiguous()):
        out = check_op(on.stem, reference.stem, [layout, layer, MaxPool()], noise=noise)
        assert out.is_contiguous(memory_format=torch.channels_last)


class Layer(nn.Module):
    """A convolution and its BN, large enough to be packed."""

    def __init__(self, dtype: torch.dtype, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 64, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(64).eval()
        self.to(dtype)

    def arguments(self) -> ConvBn:
        conv, bn = self.conv, self.bn
        assert bn.running_mean is not None
        assert bn.running_var is not None
        padding = (conv.kernel_size[0] // 2,) * 2
        return ConvBn(
            Convolution(conv.weight, (1, 1), padding),
            BatchNorm(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps),
        )


def other_state(layer: Layer) -> dict[str, Tensor]:
    rng = generator(9)
    return {
        key: torch.rand(value.shape, generator=rng).to(value.dtype)
        for key, value in layer.state_dict().items()
    }


def sgd_step(layer: Layer) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def no_grad_edit(layer: Layer) -> None:
    with torch.no_grad():
        layer.conv.weight[3, 1].mul_(2)


def data_edit(layer: Layer) -> None:
    layer.conv.weight.data.mul_(0.9)


def one_bit(layer: Layer) -> None:
    layer.conv.weight.data.view(-1)[-1:].mul_(-1)


def bias_data_edit(layer: Layer) -> None:
    layer.bn.bias.data.add_(1)


def numpy_edit(layer: Layer) -> None:
    bits = torch.int32 if layer.conv.weight.dtype == torch.float32 else torch.int16
    layer.conv.weight.detach().view(bits).numpy()[0, 0, 0, 0] = 0


def replaced_parameter(layer: Layer) -> None:
    layer.conv.weight = nn.Parameter(layer.conv.weight.detach() * 2)


def swapped_data(layer: Layer) -> None:
    layer.conv.weight.data = layer.conv.weight.data.flip(0)


def statistics_edit(layer: Layer) -> None:
    assert layer.bn.running_mean is not None
    layer.bn.running_mean.copy_(torch.ones(64))


def replaced_buffer(layer: Layer) -> None:
    assert layer.bn.running_var is not None
    layer.bn.running_var = layer.bn.running_var * 2


def other_eps(layer: Layer) -> None:
    layer.bn.eps = 0.5


def no_affine(layer: Layer) -> None:
    layer.bn.weight = None  # type: ignore[assignment]


EDITS: list[Callable[[Layer], object]] = [
    lambda layer: layer.load_state_dict(other_state(layer)),
    sgd_step,
    no_grad_edit,
    data_edit,
    one_bit,
    bias_data_edit,
    numpy_edit,
    replaced_parameter,
    swapped_data,
    statistics_edit,
    replaced_buffer,
    other_eps,
    no_affine,
]
EDIT_NAMES = ["load_state_dict", *(edit.__name__ for edit in EDITS[1:])]


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("edit", EDITS, ids=EDIT_NAMES)
def test_every_edit_is_seen(
    edit: Callable[[Layer], object], kernel: int, on: On, kernels: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = Layer(dtype, kernel)
    x = torch.rand(2, 32, 16, 16).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        layer.bn.weight.uniform_(0.5, 1.5)
        before = on.conv_bn(x, layer.arguments(), None, True)
    edit(layer)
    with torch.no_grad():
        after = on.conv_bn(x, layer.arguments(), None, True)
        fresh = On(make_backend(kernels)).conv_bn(x, layer.arguments(), None, True)
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)


def test_the_stem_sees_edits_too(on: On, kernels: bool, dtype: torch.dtype) -> None:
    x, layer = make_convolution(ConvCase(2, 3, 64, 64, 64, 7, 2, 3), generator(), dtype)
    before = on.stem(x, layer, MaxPool())
    layer.conv.weight.data.mul_(2)
    after = on.stem(x, layer, MaxPool())
    assert relative_error(after, before.double()) > 0.1
    assert torch.equal(after, On(make_backend(kernels)).stem(x, layer, MaxPool()))


def test_unchanged_weights_are_packed_once(backend: cpu.CpuBackend, dtype: torch.dtype) -> None:
    layer = Layer(dtype, 1)
    packed = set()
    for size in (16, 24, 16):
        x = torch.rand(4, 32, size, size).to(dtype)
        packed.add(backend._pack(x, layer.arguments().conv))
    assert len(packed) == 1


def test_a_deleted_model_frees_its_packed_weights(
    backend: cpu.CpuBackend, on: On, dtype: torch.dtype
) -> None:
    layer = Layer(dtype)
    x = torch.rand(2, 32, 16, 16).to(dtype)
    with torch.no_grad():
        on.conv_bn(x, layer.arguments(), None, True)
    weight = weakref.ref(layer.conv.weight)
    assert len(backend._convolutions) == 1
    del layer
    gc.collect()
    assert weight() is None
    assert len(backend._convolutions) == 0


def test_modes_of_inference_mix(on: On, dtype: torch.dtype) -> None:
    """Packed in inference mode and used outside, inference tensors, and the reverse."""
    layer = Layer(dtype)
    x = torch.rand(2, 32, 16, 16).to(dtype)
    with torch.inference_mode():
        inside = on.conv_bn(x, layer.arguments(), None, True)
        weight = layer.conv.weight.clone()
        conv, bn = layer.arguments()
        copied = ConvBn(conv._replace(weight=weight), bn)
        of_inference_tensors = on.conv_bn(x, copied, None, True)
    with torch.no_grad():
        outside = on.conv_bn(x, layer.arguments(), None, True)
    assert torch.equal(inside, outside)
    assert torch.equal(of_inference_tensors, outside)


def test_strided_weights_and_other_sizes(on: On, dtype: torch.dtype) -> None:
    rng = generator()
    x, layer = make_integers(ConvCase(2, 32, 28, 28, 64, 3, 1, 1), rng, dtype)
    wide = torch.zeros(64, 32, 3, 6, dtype=dtype)
    wide[..., ::2] = layer.conv.weight
    sliced = layer._replace(conv=layer.conv._replace(weight=wide[..., ::2]))
    for crop in (28, 7, 20, 28):
        part = x[:, :, :crop, :crop]
        expected = reference.conv_bn(part, layer, None, False)
        assert torch.equal(on.conv_bn(part, layer, None, False), expected)
        assert torch.equal(on.conv_bn(part, sliced, None, False), expected)


def test_the_callers_tensors_are_left_alone(on: On, dtype: torch.dtype) -> None:
    rng = generator()
    case = LARGE["3x3"]
    x, layer = make_convolution(case, rng, dtype)
    residual = make_residual(case, x, rng)
    wide = ConvCase(2, 64, 28, 28, 64)
    shortcut, projection = make_convolution(wide, rng, dtype)
    tensors = [x, residual, shortcut]
    for conv, bn in (layer, projection):
        tensors += [conv.weight, *bn[:4]]
    before = [t.clone() for t in tensors]
    on.conv_bn(x, layer, residual, True)
    on.conv_bn(x, layer, x, True)
    on.conv_bn_projection(x, layer, shortcut, projection)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_threads_share_the_cache(
    backend: cpu.CpuBackend, on: On, kernels: bool, dtype: torch.dtype
) -> None:
    layers = [Layer(dtype) for _ in range(4)]
    x = torch.rand(2, 32, 16, 16).to(dtype)
    with torch.no_grad():
        other = On(make_backend(kernels))
        expected = [other.conv_bn(x, v.arguments(), None, True) for v in layers]
    wrong: list[object] = []

    def work() -> None:
        try:
            with torch.no_grad():
                for _ in range(10):
                    for layer, truth in zip(layers, expected, strict=True):
                        out = on.conv_bn(x, layer.arguments(), None, True)
                        if not torch.equal(out, truth):
                            wrong.append(out)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(backend._convolutions) == 4


def test_what_it_does_not_serve_has_a_reason() -> None:
    backend = cpu.CpuBackend()
    here = torch.device("cpu")
    assert "float16" in str(backend.unsupported(here, torch.float16))
    assert "float64" in str(backend.unsupported(here, torch.float64))
    assert "meta" in str(backend.unsupported(torch.device("meta"), torch.float32))
    with torch.backends.mkldnn.flags(enabled=False):
        assert "mkldnn.enabled" in str(backend.unsupported(here, torch.float32))


def test_absent_onednn_or_operators_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "OPERATORS", ("_no_such_operator",))
    with pytest.raises(BackendUnavailableError, match="mkldnn::_no_such_operator"):
        cpu.create()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="oneDNN"):
        cpu.create()


@pytest.mark.parametrize(
    ("isa", "bfloat16", "amx", "setting", "own"),
    [
        ("avx512", True, False, "on", {torch.float32, torch.bfloat16}),
        ("avx512", True, True, "off", {torch.float32}),
        ("avx512", True, True, "on", {torch.float32, torch.bfloat16}),
        ("avx512", False, False, "off", {torch.float32}),
        ("avx2", True, False, "off", {torch.float32, torch.bfloat16}),
        ("neon", False, False, "off", {torch.float32}),
        ("neon", True, False, "off", {torch.float32, torch.bfloat16}),
        ("", False, False, "off", set()),
    ],
    ids=["AVX512_BF16", "AMX", "our AMX", "AVX-512", "AVX2", "NEON", "NEON, bf16", "none"],
)
def test_the_processor_decides_what_onednn_computes(
    isa: str,
    bfloat16: bool,
    amx: bool,
    setting: str,
    own: set[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RESNET_FUSED_CPU_AMX", setting)
    extension = _extension.load()
    monkeypatch.setattr(extension, "cpu_isa", lambda: isa)
    monkeypatch.setattr(extension, "cpu_convolves_bf16", lambda: bfloat16)
    monkeypatch.setattr(extension, "cpu_has_amx_bf16", lambda: amx)
    backend = cpu.CpuBackend()
    for dtype in (torch.float32, torch.bfloat16):
        x, layer = make_convolution(LARGE["pointwise"], generator(), dtype)
        assert isinstance(backend._pack(x, layer.conv), OneDnnConvolution) == (dtype not in own)
        x, layer = make_convolution(LARGE["grouped"], generator(), dtype)
        groups = isa in ("avx2", "avx512")  # never oneDNN's
        assert len(backend.conv_bn(x, layer, None, True)) == groups
        assert len(backend.conv_bn_projection(x, layer, x, layer)) == groups


@pytest.mark.parametrize(("dilation", "is_far"), [(1, False), (4, False), (24, True)])
def test_dilated_windows_that_reach_far_are_left_to_pytorch(dilation: int, is_far: bool) -> None:
    """Those of an atrous pyramid: a task of ours would copy mostly zeros."""
    case = ConvCase(1, 1024, 20, 20, 16, 3, 1, dilation, dilation)
    x, layer = make_convolution(case, generator(), torch.float32, "cpu")
    listed = backends.get("cpu").conv_bn(x, layer, None, True)
    assert [candidate.name for candidate in listed] == ([] if is_far else ["cpu"])
    with use_backend("cpu"):
        check_op(resnet_fused.ops.conv_bn, reference.conv_bn, [x, layer, None, True])


def test_an_absent_or_foreign_extension_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "available", lambda: "it is left out by the test")
    with pytest.raises(BackendUnavailableError, match=r"left out by the test.*'reference'"):
        cpu.create()
    monkeypatch.undo()
    monkeypatch.setattr(_extension, "_interface", lambda: "of other sources")
    found = _extension._load.__wrapped__("_C")
    assert isinstance(found, str)
    assert "was built from other bindings" in found
    assert "pip install" in found


def test_batch_norm_alone_takes_statistics_of_any_float() -> None:
    require("cpu", "cpu", torch.bfloat16)
    x = torch.randn(2, 8, 5, 5, generator=generator()).bfloat16()
    bn = make_batch_norm(8, generator(1))
    check_op(On("cpu").bn_add_relu, reference.bn_add_relu, [x, bn, x, True])


@pytest.mark.parametrize("size", [(224, 224), (97, 131)], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_networks_meet_the_contract(
    name: str,
    size: tuple[int, int],
    backend: cpu.CpuBackend,
    dtype: torch.dtype,
) -> None:
    """Against torchvision's own run on images in NCHW, two of them."""
    torch.manual_seed(0)
    theirs = randomise_statistics(getattr(torchvision.models, name)()).eval().to(dtype)
    ours = getattr(resnet_fused, name)().eval().to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *size, generator=generator()).to(dtype)
    with torch.no_grad(), use_backend(backend):
        result, eager = ours(x), theirs(x)
        assert_contract(result, eager, theirs.double()(x.double()))
