"""Quantised networks: near the float ones, frozen, saved, reported on, exported, fine-tuned."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import require
from torch import Tensor, nn

import resnet_fused
from resnet_fused import BasicBlock, Bottleneck, CheckpointError, PlainBlock, use_backend
from resnet_fused.backends import autotune
from resnet_fused.models.network import ResidualNetwork, StageShape
from resnet_fused.numerics import relative_error
from resnet_fused.plan import record
from resnet_fused.quantization import (
    METHODS,
    QuantizedNetwork,
    calibration,
    convert,
    prepare_qat,
    quantize,
)
from resnet_fused.quantization.fold import fold
from resnet_fused.quantization.folded import FoldedConv
from resnet_fused.quantization.layers import (
    Geometry,
    HigherPrecisionConv,
    Images,
    InputKind,
    QuantizedConv,
)
from resnet_fused.reference.quantized import FLOAT8
from resnet_fused.reference.quantized import quantize as quantize_tensor
from resnet_fused.testing.cases import generator, randomise_statistics

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
WINDOW = ((1, 1), (1, 1), (1, 1), 1)


class Small(ResidualNetwork):
    """Four stages of few channels, whose blocks a ResNet's are."""

    def __init__(self, block: Any, stem: Any = None, dilate: bool = False, **options: Any) -> None:
        stem = stem or nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        stages = [StageShape(8, 1), StageShape(8, 2, 2, dilate), StageShape(16, 1, 2, dilate)]
        super().__init__(stem, nn.MaxPool2d(3, 2, 1), block, stages, 10, **options)


def deep_stem() -> nn.Sequential:
    first, second = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.Conv2d(8, 16, 3, 1, 1, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "bottlenecks": lambda: Small(Bottleneck),
    "basic blocks": lambda: Small(BasicBlock),
    "plain": lambda: Small(PlainBlock),
    "option C": lambda: Small(BasicBlock, shortcut="C"),
    "option A": lambda: Small(Bottleneck, shortcut="A"),
    "dilated": lambda: Small(Bottleneck, dilate=True),
    "grouped": lambda: Small(Bottleneck, groups=4, width_per_group=32),
    "wide": lambda: Small(Bottleneck, width_per_group=128),
    "strided 1x1": lambda: Small(Bottleneck, stride_in="1x1"),
    "deep stem": lambda: Small(BasicBlock, deep_stem()),
    "CIFAR": lambda: resnet_fused.cifar.resnet(8),
}


def make(name: str = "bottlenecks") -> Any:
    torch.manual_seed(0)
    return randomise_statistics(NETWORKS[name]()).eval()


def images(batch: int = 4, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=generator(seed)) * 4 - 1.5


def run(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x)


@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8], ids=["int8", "fp8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_stay_near_and_what_is_trained_is_what_is_converted(
    name: str, dtype: torch.dtype
) -> None:
    """Random networks, which damp no noise, from images that they were not calibrated with."""
    model, x = make(name), images(seed=1)
    calibration = [images(), images(seed=2)]
    quantized = quantize(model, calibration, dtype)
    expected, found = run(model, x), quantized(x)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < (0.12 if dtype == torch.int8 else 0.25)
    folded = fold(model, dtype, None)
    assert relative_error(run(folded, x), expected) < 1e-5
    trainable = prepare_qat(model, calibration, dtype)
    assert torch.equal(run(trainable, x), found)
    assert torch.equal(convert(trainable)(x), found)
    loaded = QuantizedNetwork.from_state_dict(quantized.state_dict())
    assert torch.equal(loaded(x), found)
    assert str(loaded) == str(quantized)


ALL = {
    name: getattr(resnet_fused, name)
    for name in (
        *("resnet18", "resnet50", "resnext50_32x4d", "resnet34", "resnet101", "resnet152"),
        *("resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
    )
}
_AT_ONCE = ("resnet18", "resnet50", "resnext50_32x4d")
_SIMULATED = ("resnet18", "resnet50")  # the simulator takes minutes for the largest


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *(pytest.param(n, "cpu", marks=[] if n in _AT_ONCE else pytest.mark.thorough) for n in ALL),
        *((n, "cuda_sim") for n in _SIMULATED),
    ],
)
def test_backends_equal_the_reference_in_whole_networks(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(backend, "cpu", torch.uint8)
    monkeypatch.setenv("RESNET_FUSED_HOST_SIM_CAPABILITY", "90")
    model = randomise_statistics(ALL[name](num_classes=10)).eval()
    calibration = [(images(2) * 60 + 90).clamp(0, 255).byte()]
    trainable = prepare_qat(model, calibration, normalization=(MEAN, STD))
    network = convert(trainable)
    for size in (32, 47):
        x = (images(2, size, seed=1) * 60 + 90).clamp(0, 255).byte()
        with use_backend("reference"):
            expected = network(x)
        with use_backend(backend):
            found = [network(x) for _ in range(3)]  # by ops, and by a plan where there is one
        assert expected.std() > 0
        assert all(torch.equal(y, expected) for y in found)


@pytest.mark.parametrize("name", NETWORKS)
def test_triton_equals_the_reference_in_networks(name: str) -> None:
    require("triton", "cpu", torch.uint8)
    x = (images(2) * 60 + 90).clamp(0, 255).byte()
    network = quantize(make(name), [x], normalization=(MEAN, STD))
    for given in (x, images(2, 29, seed=1)):
        with use_backend("reference"):
            expected = network(given)
        with use_backend("triton"), _chosen() as chosen:
            found = network(given)
        assert expected.std() > 0
        assert torch.equal(found, expected)
        assert all(name.startswith("triton") for name in chosen)


@pytest.mark.parametrize("name", ["bottlenecks", "option A", "grouped", "CIFAR"])
def test_fp8_networks_on_triton(name: str) -> None:
    """Every layer by a kernel; sums in float32 now and then make another e4m3 number."""
    require("triton", "cpu", FLOAT8)
    x = (images(2) * 60 + 90).clamp(0, 255).byte()
    network = quantize(make(name), [x], FLOAT8, normalization=(MEAN, STD))
    for given in (x, images(2, 29, seed=1)):
        with use_backend("reference"):
            expected = network(given)
        with use_backend("triton"), _chosen() as chosen:
            found = network(given)
        assert all(name.startswith("triton") for name in chosen)
        assert len(chosen) == 1 + len(list(network.layers()))
        assert relative_error(found, expected) < 0.02


@contextlib.contextmanager
def _chosen() -> Iterator[list[str]]:
    """The names of the candidates that ops take within."""
    names: list[str] = []
    with autotune.tuner.watch() as decisions:
        yield names
    names += [decision.candidate.name for decision in decisions]


def test_a_forward_is_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    require("cpu", "cpu", torch.uint8)
    network, x = quantize(make(), [images()]), images(2)
    programs: list[int] = []
    replay = record._replay
    monkeypatch.setattr(
        record, "_replay", lambda s, *a: (programs.append(len(s.program)), replay(s, *a))[1]
    )
    expected = [network(x) for _ in range(4)]
    assert all(torch.equal(y, expected[0]) for y in expected)
    assert len(programs) == 2  # the third and the fourth call, with one launch a layer
    assert programs[0] == len(list(network.layers()))
    network.stem[0].bias[0] += 1000  # read where it is
    changed = network(x)
    assert not torch.equal(changed, expected[0])
    assert torch.equal(changed, QuantizedNetwork.from_state_dict(network.state_dict())(x))


def test_bytes_are_normalised_floats() -> None:
    """Padding with the mean as it is a byte, the same for both."""
    model = make()
    x = torch.randint(0, 256, (4, 3, 33, 32), generator=generator(), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    floats = (x / 255 - mean) / std
    network = quantize(model, [x], normalization=(MEAN, STD))
    assert torch.equal(network(x), network(floats))
    assert relative_error(network(x), run(model, floats)) < 0.1
    kept = quantize(model, [floats], normalization=(MEAN, STD), keep=["first"])
    assert relative_error(kept(x), kept(floats)) < 0.01
    only_floats = quantize(model, [floats])
    with pytest.raises(TypeError, match=r"normalization=\(mean, std\)"):
        only_floats(x)
    with pytest.raises(TypeError, match=r"found torch\.int32"):
        network(x.int())
    for quantized, given in ((network, floats), (only_floats, floats), (kept, x), (kept, floats)):
        with pytest.raises(ValueError, match="input has 1 channels, and this network takes 3"):
            quantized(given[:, :1])
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        network([x])


def test_layers_are_kept_in_float32() -> None:
    model, x = make("option A"), images()
    network = quantize(model, [x], keep=["first", "layer2.0.conv3", "last"])
    kept = [layer.name for layer in network.report.layers if layer.dtype == torch.float32]
    assert kept == ["conv1", "layer2.0.conv3", "fc"]
    assert relative_error(network(x), run(model, x)) < relative_error(
        quantize(model, [x])(x), run(model, x)
    )
    loaded = QuantizedNetwork.from_state_dict(network.state_dict())
    assert torch.equal(loaded(x), network(x))
    trainable = prepare_qat(model, [x], keep=["first", "layer2.0.conv3", "last"])
    assert torch.equal(run(trainable, x), network(x))
    everything = [layer.name for layer in network.report.layers]
    almost = quantize(model, [x], keep=everything)
    assert relative_error(almost(x), run(model, x)) < 0.03  # activations are still quantised


def ruined(name: str = "layer2.1.conv2") -> Any:
    """A network one of whose layers has large weights for a channel that is always zero."""
    model = make()
    layer, before = model.get_submodule(name), model.get_submodule("layer2.1.bn1")
    with torch.no_grad():
        before.weight[0] = before.bias[0] = 0
        layer.weight[:, 0] = 1e3
    return model


def test_the_report_says_where_precision_was_lost() -> None:
    model, x = ruined(), images(16)
    report = quantize(model, [x[:8], x[8:]]).report
    assert report.worst()[0].name == "layer2.1.conv2"
    assert report.worst()[0].own < 10 < report.worst()[1].own
    assert report.images == 16
    following = [layer.snr for layer in report.layers[-3:]]
    assert max(following) < min(layer.snr for layer in report.layers[:3])
    text = str(report)
    assert "most precision is lost in layer2.1.conv2" in text
    assert all(layer.name in text for layer in report.layers)
    assert "16 images" in text


def test_the_search_keeps_what_loses_most() -> None:
    model, x = ruined(), images(24)
    assert quantize(model, [x]).report.agreement < 0.9
    network = quantize(model, [x], least_agreement=0.9)
    kept = [layer.name for layer in network.report.layers if layer.dtype == torch.float32]
    assert kept == ["layer2.1.conv2"]
    answers = run(model, x).argmax(1) == network(x).argmax(1)
    assert network.report.agreement == answers.double().mean() >= 0.9
    with pytest.warns(UserWarning, match="every layer in float32"):
        network = quantize(make(), [images()], FLOAT8, least_agreement=1.01)
    assert all(layer.dtype == torch.float32 for layer in network.report.layers)


@pytest.fixture(scope="module")
def network() -> QuantizedNetwork:
    return quantize(make(), [images()])


def test_it_is_frozen(network: QuantizedNetwork) -> None:
    assert not list(network.parameters())
    assert not network.training
    assert network.eval() is network
    assert "frozen" in repr(network)
    with pytest.raises(RuntimeError, match="prepare_qat"):
        network.train()
    x = images().requires_grad_()
    with pytest.raises(RuntimeError, match="no gradients"):
        network(x)
    assert not network(x.detach()).requires_grad
    for change in (lambda n: n.half(), lambda n: n.to(torch.float64), lambda n: n.type(x.dtype)):
        with pytest.raises(TypeError, match="only its device"):
            change(copy.deepcopy(network))
    float8 = quantize(make(), [images()], FLOAT8)
    with pytest.raises(TypeError, match="stays float8_e4m3fn"):
        float8.float()
    assert torch.equal(copy.deepcopy(network).float()(images()), network(images()))


def test_autocast_has_no_part_in_it() -> None:
    model, x = make(), images()
    expected = quantize(model, [x], keep=["first", "last"])
    with torch.autocast("cpu", torch.bfloat16):
        network = quantize(model, [x], keep=["first", "last"])
        found = [network(x) for _ in range(4)]
    assert str(network.report) == str(expected.report)
    assert all(torch.equal(y, expected(x)) for y in found)


def test_it_is_saved_and_copied(network: QuantizedNetwork, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    x = images()
    expected = network(x)
    torch.save(network.state_dict(), tmp_path / "network.pt")
    safetensors.save_file(network.state_dict(), tmp_path / "network.safetensors")
    for state in (
        torch.load(tmp_path / "network.pt", weights_only=True),
        safetensors.load_file(tmp_path / "network.safetensors"),
    ):
        assert torch.equal(QuantizedNetwork.from_state_dict(state)(x), expected)
    assert torch.equal(copy.deepcopy(network)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), expected)
    with pytest.raises(CheckpointError, match=r"resnet_fused\.quantize"):
        QuantizedNetwork.from_state_dict(make().state_dict())
    kept = quantize(make(), [images()], keep=["layer1.0.conv3"]).state_dict()
    for whole, key in (
        *((network.state_dict(), k) for k in network.state_dict() if "_extra" not in k),
        *((kept, k) for k in kept if k.startswith("blocks.0.2.") and "_extra" not in k),
    ):
        state = {name: tensor for name, tensor in whole.items() if name != key}
        with pytest.raises(CheckpointError, match=key.split(".")[-1]):
            QuantizedNetwork.from_state_dict(state)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: quantize(make(), []), "holds no batch"),
    "an empty batch": (lambda: quantize(make(), [images(0)]), "batch 0 must be images"),
    "one image": (lambda: quantize(make(), [images()[0]]), "batch 0 must be images"),
    "no tensor": (lambda: quantize(make(), [[["x"]]]), "found list"),
    "NaN": (lambda: quantize(make(), [images(), images() / 0 * 0]), "batch 1 holds NaN"),
    "constants": (lambda: quantize(make(), [torch.ones(2, 3, 32, 32)]), "image is constant"),
    "weights": (lambda: quantize(_with("layer1.0.conv1.weight"), [images()]), "conv1 gives NaN"),
    "a classifier": (lambda: quantize(_with("fc.weight"), [images()]), "^fc, with"),
    "a classifier, in e4m3": (
        lambda: quantize(_with("fc.weight"), [images()], torch.float8_e4m3fn),
        "^fc, with",
    ),
    "behind a ReLU": (
        lambda: quantize(_with("layer1.0.bn1.bias", -torch.inf), [images()]),
        "^layer1.0.conv1, with",
    ),
    "fine-tuned": (lambda: convert(_fine_tuned_to_nan()), "^conv1, with"),
    "dtype": (lambda: quantize(make(), [images()], torch.int16), "found torch.int16"),
    "method": (lambda: quantize(make(), [images()], method="max"), "range, percentile, mse"),
    "keep": (lambda: quantize(make(), [images()], keep=["conv9"]), "found conv9; there are conv1"),
    "keep a string": (lambda: quantize(make(), [images()], keep="first"), "found 'first'"),
    "training": (lambda: quantize(make().train(), [images()]), "model.eval"),
    "another model": (lambda: quantize(nn.Sequential(), [images()]), "resnet_fused.fuse"),
    "no classifier": (
        lambda: quantize(resnet_fused.resnet18(features_only=True).eval(), [images()]),
        "FeatureNetwork has no avgpool: .* and not timm's, whose weights",
    ),
    "a pooled projection": (lambda: quantize(_pooled(), [images()]), "layer2.0.downsample"),
    "a hook": (lambda: quantize(_hooked(), [images()]), "layer1.0.bn1"),
    "channels of a normalization": (
        lambda: quantize(make(), [images()], normalization=((0.5,), (0.5,))),
        "deviation of 3 channels",
    ),
    "three vectors": (
        lambda: quantize(make(), [images()], normalization=(MEAN, STD, STD)),
        "deviation of 3 channels",
    ),
    "a mean of bytes": (
        lambda: quantize(make(), [images()], normalization=((124, 116, 104), (58, 57, 57))),
        "images from 0 to 1",
    ),
    "channels": (lambda: quantize(make(), [images()[:, :2]]), "batch 0 has images of 2 channels"),
    "channels of bytes": (
        lambda: quantize(make(), [images()[:, :1].byte()], normalization=(MEAN, STD)),
        "images of 1 channels, and the model takes 3",
    ),
}


def _with(name: str, value: float = torch.nan) -> nn.Module:
    model = make()
    model.get_parameter(name).data[0] = value
    return model


def _fine_tuned_to_nan() -> nn.Module:
    network = prepare_qat(make(), [images()])
    network.stem[0].weight.data[0] = torch.nan
    return network


def _pooled() -> nn.Module:
    return Small(BasicBlock, avg_down=True).eval()


def _hooked() -> nn.Module:
    model = make()
    model.layer1[0].bn1.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("name", BAD)
def test_bad_calibration_and_models_are_refused(name: str) -> None:
    call, said = BAD[name]
    with pytest.raises(ValueError, match=said):
        call()


def test_calibration_takes_what_a_loader_gives() -> None:
    model, x = make(), images()
    pairs = [(x[:2], torch.zeros(2)), [x[2:], torch.zeros(2)]]
    expected = quantize(model, [x[:2], x[2:]])(x)
    assert torch.equal(quantize(model, iter(pairs))(x), expected)
    place = torch.empty_like(x[:2])
    assert torch.equal(quantize(model, (place.copy_(part) for part in (x[:2], x[2:])))(x), expected)


def test_outliers_are_clipped_by_percentile_and_error() -> None:
    """Ten thousand values of a half-normal distribution, and two a hundred times as large."""
    values = torch.randn(30_000, generator=generator()).abs()
    values[:2] = 400
    histogram = torch.histc(values, calibration.BINS, 0, 400).double()
    ordered = values.sort().values
    found = calibration.percentile(histogram, 400, torch.uint8)
    assert ordered[int(0.9998 * len(values))] <= found < 400 / 20

    def error(clip: float) -> float:
        step = clip / 255
        rounded = ((values / step).round() * step).clamp(max=clip)
        return float((rounded - values).double().square().sum())

    bulk = torch.randn(3_000_000, generator=generator()).abs()
    bulk[:2] = 8
    values = bulk
    histogram = torch.histc(values, calibration.BINS, 0, 8).double()
    clip = calibration.least_squares(histogram, 8, torch.uint8)
    assert clip < 0.8 * 8
    assert error(clip) < 0.9 * error(8)
    assert error(clip) <= 1.02 * min(error(c) for c in torch.linspace(3, 8, 20).tolist())


def test_methods_give_other_scales() -> None:
    x = images(16, 64)
    networks = {method: prepare_qat(make(), [x], method=method).folded() for method in METHODS}
    scales = {method: [v.scale for v in layers[:-1]] for method, layers in networks.items()}
    pairs = list(zip(*scales.values(), strict=True))
    assert all(percentile <= largest and mse <= largest for largest, percentile, mse in pairs)
    assert any(percentile < largest for largest, percentile, _ in pairs)
    assert any(mse < largest for largest, _, mse in pairs)


def test_means_make_up_for_rounded_weights() -> None:
    """Weights that round down by a third of a unit each, and inputs of one value."""
    weight = torch.full((1, 8, 1, 1), 10.33)
    weight[0, 0] = 127
    layer = folded(weight, torch.zeros(1), Geometry(((1, 1), (0, 0), (1, 1), 1)), 2.0)
    x = torch.full((1, 8, 1, 1), 3, dtype=torch.uint8)
    x[0, 0] = 0
    lost = layer.quantized()(x)
    layer.mean_in = x.float().flatten()
    expected = round(7 * 3 * 10.33 / 2)
    assert layer.quantized()(x) == expected != lost


def folded(weight: Tensor, bias: Tensor, geometry: Geometry, scale: float = 1.0) -> FoldedConv:
    layer = FoldedConv("layer", weight, bias, None, geometry)
    layer.scale.fill_(scale)
    return layer


def test_sums_that_could_wrap_stay_in_float32() -> None:
    geometry = Geometry(WINDOW)
    most = 2**31 // (127 * 255 * 9)  # channels of the largest weights
    fits = folded(torch.ones(1, most - 8, 3, 3), torch.zeros(1), geometry)
    assert isinstance(fits.quantized(), QuantizedConv)
    wraps = folded(torch.ones(1, most + 8, 3, 3), torch.zeros(1), geometry)
    assert isinstance(wraps.quantized(), HigherPrecisionConv)


def test_channels_without_weights_keep_their_bias() -> None:
    weight = torch.tensor([0.0, 1e-30, 1.0])[:, None, None, None].expand(3, 4, 1, 1)
    bias = torch.tensor([100.0, 33.0, 2.0])
    geometry = Geometry(((1, 1), (0, 0), (1, 1), 1), stride=1)
    layer = folded(weight, bias, geometry).quantized()
    x = torch.zeros(1, 4, 1, 1, dtype=torch.uint8)
    shortcut = torch.full((1, 3, 1, 1), 50, dtype=torch.uint8)
    assert layer(x, shortcut).flatten().tolist() == [150, 83, 52]
    assert layer.bias.abs().max() < 2**28


@pytest.mark.parametrize("dtype", [torch.uint8, FLOAT8], ids=["int8", "fp8"])
def test_gradients_are_the_float_layers_but_where_it_clamps(dtype: torch.dtype) -> None:
    rng = generator()
    geometry = Geometry(WINDOW, stride=1, dtype=dtype)
    limit = 448 if dtype == FLOAT8 else 255
    # Weights that are what they are quantised to, with a scale of one over the largest.
    if dtype == FLOAT8:
        weight = torch.randint(-3, 4, (4, 4, 3, 3), generator=rng).double().exp2() / 8
        weight *= torch.randint(-1, 2, weight.shape, generator=rng)
    else:
        weight = torch.randint(-127, 128, (4, 4, 3, 3), generator=rng).double() / 127
    weight[:, 0, 0, 0] = 1
    layer = folded(weight, torch.zeros(4), geometry, 1 / limit)
    for scale in (layer.in_scale, layer.shortcut_in_scale):
        scale.fill_(1 / limit)
    steps = torch.randint(0, 16, (2, 2, 4, 6, 6), generator=rng) * 16 / limit  # exact in both types
    x, shortcut = steps.float().unbind()
    x = x.requires_grad_()
    y = layer.fake(x, shortcut)
    assert torch.equal(
        y,
        layer.quantized()((x * limit).to(dtype), (shortcut * limit).to(dtype)).float()
        * layer.scale,
    )
    gradient = torch.randn(y.shape, generator=rng)
    found = torch.autograd.grad(y, (x, layer.bias), gradient)
    real = layer.real(x, shortcut)
    inside = (real > 0) & (real < 1)
    assert 0.1 < (real >= 1).float().mean() < 0.9
    expected = torch.autograd.grad(real, (x, layer.bias), gradient * inside)
    assert relative_error(found[1], expected[1]) < 1e-4
    assert relative_error(found[0], expected[0]) < 1e-4


def test_fine_tuning_recovers_what_bad_calibration_loses() -> None:
    """The float network's own answers, with scales that clip most activations."""
    model, x = make("basic blocks"), images(32)
    answers = run(model, x)
    labels = answers.argmax(1)
    network = prepare_qat(model, [images(8) / 10])

    def loss() -> Tensor:
        return F.cross_entropy(network(x), labels)

    before = float(loss().detach())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for _ in range(15):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < 0.6 * before
    assert torch.equal(convert(network)(x), run(network, x))
    assert torch.equal(run(model, x), answers)  # it shares no memory with what was trained
    with pytest.raises(TypeError, match="prepare_qat"):
        convert(model)  # type: ignore[arg-type]


def test_weights_that_are_loaded_in_inference_mode_count() -> None:
    """Tensors that are made there count no edits."""
    model, x = make("CIFAR"), images(2)
    with torch.inference_mode():
        network = quantize(model, [x])
        for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
            conv.weight.neg_()
        other = quantize(model, [x])
        for _ in range(3):
            before = network(x)
        network.load_state_dict(other.state_dict())
        assert not torch.equal(network(x), before)
        assert torch.equal(network(x), other(x))


def test_fused_torchvision_is_quantised_as_ours_is() -> None:
    torch.manual_seed(0)
    theirs = randomise_statistics(torchvision.models.resnet18(num_classes=10)).eval()
    ours = resnet_fused.resnet18(num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    resnet_fused.fuse(theirs)
    x = images(2)
    assert torch.equal(quantize(theirs, [x])(x), quantize(ours, [x])(x))


@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8], ids=["int8", "fp8"])
def test_exports_as_pytorchs_own_ops(dtype: torch.dtype) -> None:
    x = images(2)
    network = quantize(make(), [x], dtype)
    program = torch.export.export(network, (x,))
    assert not [n for n in program.graph.nodes if "resnet_fused" in str(n.target)]
    assert torch.equal(program.module()(x), network(x))
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), network(x))


@pytest.mark.parametrize("bytes_", [False, True], ids=["floats", "bytes"])
@pytest.mark.parametrize("name", ["bottlenecks", "option A", "grouped", "deep stem"])
def test_onnx_runtime_agrees(name: str, bytes_: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    x, options = images(), {}
    if bytes_:
        x = torch.randint(0, 256, (4, 3, 32, 32), generator=generator(), dtype=torch.uint8)
        options = {"normalization": (MEAN, STD)}
    model = make(name)
    network = quantize(model, [x], **options)
    path = tmp_path / "network.onnx"
    resnet_fused.quantization.export_onnx(network, path)
    # As the nodes say. Fused, its products of bytes saturate where the processor lacks VNNI.
    as_written = onnxruntime.SessionOptions()
    as_written.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(path, as_written, providers=["CPUExecutionProvider"])
    for batch in (x, x[:1, :, :25]):
        (found,) = session.run(None, {"x": batch.numpy()})
        # A unit of some activations apart, which random networks do not damp.
        assert relative_error(torch.from_numpy(found), network(batch)) < 0.01


def test_onnx_refuses_what_it_cannot_say(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    kept = quantize(make(), [images()], keep=["last"])
    for network, said in (
        (kept, "higher precision"),
        (quantize(make(), [images()], FLOAT8), "int8"),
    ):
        with pytest.raises(ValueError, match=said):
            resnet_fused.quantization.export_onnx(network, tmp_path / "network.onnx")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_are_quantised_in_either_layout(layout: torch.memory_format) -> None:
    x = 60 * torch.randn(2, 3, 5, 7).contiguous(memory_format=layout)
    before = x.clone()
    scale, zero = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([10.0, 120.0, 250.0])
    images = Images({"scale": scale, "zero": zero}, InputKind(torch.uint8))
    units = x / scale[:, None, None] + zero[:, None, None]
    assert torch.equal(images(x), quantize_tensor(units, torch.uint8))
    assert images(x).is_contiguous(memory_format=layout)
    assert torch.equal(x, before)
