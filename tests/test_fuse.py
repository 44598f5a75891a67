"""`fuse` on other people's networks: their results, gradients and everything that one can see."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import render
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.feature_extraction import create_feature_extractor

import resnet_fused
from resnet_fused import fuse, unfuse
from resnet_fused.numerics import assert_contract, relative_error
from resnet_fused.testing.cases import generator, randomise_statistics
from resnet_fused.testing.plain import training_ops_in_pytorch

try:
    import timm
except ImportError:
    timm = None

# Of float64, where our ops compute as PyTorch's do, in another order.
ROUNDING = 1e-10


def torchvisions(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(num_classes=7, **arguments)


def timms(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        if timm is None:
            pytest.skip("needs timm, which is not installed: pip install timm")
        return timm.create_model(name, num_classes=7, **arguments)

    return build


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels)


def segmenter() -> nn.Module:
    return torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=7, aux_loss=True
    )


# Each with how many of its convolutions are fused, of how many. What is left belongs to
# classifiers, with biases and no batch norm, and to ASPP's pooling.
CLASSIFIERS = {
    "timm resnet18": (timms("resnet18"), 20, 20),
    "timm resnet50": (timms("resnet50"), 53, 53),
    "timm resnet50d": (timms("resnet50d"), 55, 55),
    "timm resnet101d": (timms("resnet101d"), 106, 106),
    "timm seresnet50": (timms("seresnet50"), 85, 85),
    "timm resnext50_32x4d": (timms("resnext50_32x4d"), 53, 53),
    "timm wide_resnet50_2": (timms("wide_resnet50_2"), 53, 53),
    "timm regnety_008": (timms("regnety_008"), 75, 75),
    "timm resnet18 drop path": (timms("resnet18", drop_path_rate=0.5), 20, 20),
    "timm resnetblur18": (timms("resnetblur18"), 20, 20),
    "torchvision resnet50": (torchvisions("resnet50"), 53, 53),
    "torchvision resnet50 GroupNorm": (torchvisions("resnet50", norm_layer=group_norm), 53, 53),
    "timm resnet50_gn": (timms("resnet50_gn"), 53, 53),
    "deeplabv3_resnet50": (segmenter, 60, 63),
}
DEFAULT = (
    "timm resnet18",
    "timm resnet50d",
    "timm seresnet50",
    "timm regnety_008",
    "timm resnet18 drop path",
    "timm resnetblur18",
    "torchvision resnet50 GroupNorm",
    "deeplabv3_resnet50",
)
CASES = [
    pytest.param(name, marks=[] if name in DEFAULT else pytest.mark.thorough)
    for name in CLASSIFIERS
]


def images(batch: int = 2, size: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=generator()).to(dtype)


def pair(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A network as it was made, in float64 and eval mode, and a copy to be fused."""
    torch.manual_seed(0)
    model = randomise_statistics(build()).double().eval()
    return model, copy.deepcopy(model)


def resnet18() -> tuple[nn.Module, nn.Module]:
    return pair(torchvisions("resnet18"))


def close(found: Any, expected: Any) -> None:
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        if b.is_floating_point():
            assert relative_error(a, b) < ROUNDING
        else:
            assert torch.equal(a, b)


def step(model: nn.Module, *inputs: Any) -> Any:
    """What a forward and backward lead to: results, gradients, buffers."""
    model.zero_grad()
    torch.manual_seed(1)
    out = tree_leaves(model(*inputs))
    sum(o.square().mean() for o in out if o.requires_grad).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out, gradients, dict(model.named_buffers())


class Calls(TorchDispatchMode):
    """Counts operators, a fused op as one."""

    sees_fused_ops = True

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def fused_ops(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """How many fused ops a forward consists of, and how many convolutions beside them."""
    with torch.no_grad(), Calls() as calls:
        model(x)
    ours = sum(n for name, n in calls.counts.items() if name.startswith("resnet_fused::"))
    return ours, calls.counts["aten::convolution"]


@pytest.mark.parametrize("name", CASES)
def test_results_gradients_and_state_are_what_they_were(name: str) -> None:
    build, fused, convolutions = CLASSIFIERS[name]
    model, ours = pair(build)
    before = dict(ours.state_dict(keep_vars=True)), repr(ours), [type(m) for m in ours.modules()]
    report = fuse(ours)

    state = ours.state_dict(keep_vars=True)
    assert list(state) == list(before[0])
    assert all(state[key] is value for key, value in before[0].items())
    assert repr(ours) == before[1]
    assert report.convolutions == convolutions
    assert report.convolutions - len(report.left) == fused
    assert str(report).startswith(f"{fused} of {convolutions} convolutions fused")

    plain = fused_ops(model, images())
    assert plain[0] == 0
    ops, left = fused_ops(ours, images())
    assert left == plain[1] - fused
    assert (ops > 0) == (fused > 0)
    close(step(ours, images()), step(model, images()))
    close(step(ours.train(), images()), step(model.train(), images()))

    unfuse(ours)
    assert [type(m) for m in ours.modules()] == before[2]
    assert fused_ops(ours.eval(), images()) == plain


@pytest.mark.parametrize(
    "name",
    [
        "timm resnet18",
        "timm seresnet50",
        "timm resnet50_gn",
        pytest.param("torchvision resnet50 GroupNorm", marks=pytest.mark.thorough),
        pytest.param("timm resnet50d", marks=pytest.mark.thorough),
        pytest.param("timm regnety_008", marks=pytest.mark.thorough),
        pytest.param("deeplabv3_resnet50", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_errors_are_no_larger_than_pytorchs(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = randomise_statistics(CLASSIFIERS[name][0]()).to(dtype).eval()
    x = images(4, 64, dtype)
    if isinstance(model, torchvision.models.ResNet):
        model.fc = nn.Identity()  # thousands of features, where logits are 28

    def results(model: nn.Module, x: Tensor) -> Tensor:
        features = getattr(model, "forward_features", model)
        with torch.no_grad():
            return torch.cat([t.flatten() for t in tree_leaves(features(x))])

    truth = results(copy.deepcopy(model).double(), x.double())
    layouts = (torch.contiguous_format, torch.channels_last)
    # The larger of PyTorch's own two layouts: which is closer is chance.
    eager = max(
        (results(model, x.contiguous(memory_format=layout)) for layout in layouts),
        key=lambda out: relative_error(out, truth),
    )
    fuse(model)
    for _ in range(3):  # the last ones by a plan
        assert_contract(results(model, x), eager, truth, what=name)


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("torchvision resnet18", 9),  # the stem and eight blocks
        ("timm resnet18", 9),
        # Seven blocks drop paths, whose second convolutions have no ReLU and run as modules.
        ("timm resnet18 drop path", 9),
        ("timm resnet18d", 8),  # three layers of the stem; three blocks pool in their shortcut
        pytest.param("timm seresnet50", 33, marks=pytest.mark.thorough),
    ],
)
def test_training_by_fused_ops(name: str, ops: int) -> None:
    build = CLASSIFIERS[name][0] if name in CLASSIFIERS else None
    if build is None:
        library, kind = name.split()
        build = {"timm": timms, "torchvision": torchvisions}[library](kind)
    model, ours = pair(build)
    fuse(ours)
    with training_ops_in_pytorch():
        close(step(ours.train(), images()), step(model.train(), images()))
        with Calls() as calls:
            ours(images())
    found = {key: n for key, n in calls.counts.items() if key.startswith("resnet_fused::")}
    assert sum(found.values()) == ops, found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda se: setattr(se, "add_maxpool", True), "more than mean, ReLU and sigmoid"),
        (lambda se: setattr(se, "act", nn.SiLU()), "more than mean, ReLU and sigmoid"),
        (lambda se: setattr(se, "gate", nn.Hardsigmoid()), "more than mean, ReLU and sigmoid"),
        (lambda se: setattr(se, "bn", nn.BatchNorm2d(16).double().eval()), "more than mean"),
        (lambda se: se.fc1.register_forward_hook(lambda m, i, out: out * 3), "more than mean"),
        (lambda se: se.gate.register_forward_hook(lambda m, i, out: out / 2), "more than mean"),
        (lambda se: se.register_forward_hook(lambda m, i, out: out * 0.9), ""),
    ],
)
def test_a_gate_that_is_another_one_is_left_alone(
    change: Callable[[nn.Module], object], reason: str
) -> None:
    timms("resnet18")()  # skips without timm
    gate = timm.layers.squeeze_excite.SEModule
    model, ours = pair(lambda: timm.models.resnet.Bottleneck(256, 64, attn_layer=gate))
    fuse(ours)
    x = images(2, 9)[:, :1].repeat(1, 256, 1, 1)
    with torch.no_grad():
        unchanged = model(x)
    assert fused_ops(ours, x) == (4, 0)
    change(model.se), change(ours.se)
    close(ours(x), model(x))
    assert relative_error(model(x), unchanged) > 10 * ROUNDING
    unfuse(ours)
    left = fuse(ours).left.get("se.fc1", "")
    assert reason in left
    assert bool(left) == bool(reason)


def test_a_detector() -> None:
    """Detections and losses of a feature pyramid network."""
    model, ours = pair(
        lambda: torchvision.models.detection.fasterrcnn_resnet50_fpn(
            weights=None,
            weights_backbone=None,
            num_classes=3,
            min_size=64,
            max_size=64,
            rpn_post_nms_top_n_test=20,
            rpn_post_nms_top_n_train=20,
        )
    )
    report = fuse(ours)
    assert report.convolutions - len(report.left) == 53
    assert set(report.left.values()) == {
        "RPNHead.forward is of torchvision.models.detection.rpn, which fuse does not know",
        "has a bias",
    }
    ops, _ = fused_ops(ours, list(images(1, 64)))
    assert ops == 17  # the stem and sixteen blocks
    with torch.no_grad():
        close(ours(list(images(1, 64))), model(list(images(1, 64))))
    boxes = torch.tensor([[4.0, 4, 40, 40], [10, 20, 60, 50]]).double()
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])}]
    inputs = (list(images(1, 64)), targets)
    close(step(ours.train(), *inputs), step(model.train(), *inputs))


def test_hooks_and_changes_after_fusing_count() -> None:
    def change(model: nn.Module) -> list[Tensor]:
        seen: list[Tensor] = []
        model.layer1[0].bn1.register_forward_hook(lambda m, i, out: out * 0.9)
        model.layer1[1].register_forward_hook(lambda m, i, out: seen.append(out.detach().clone()))
        model.layer2[0].conv1.forward = lambda x, f=model.layer2[0].conv1.forward: f(x) * 0.7
        model.layer3[0].relu = nn.SiLU()
        model.layer3[1].conv2 = nn.Conv2d(256, 256, 3, padding=1).double()
        nn.init.constant_(model.layer3[1].conv2.weight, 0.01)
        nn.init.ones_(model.layer3[1].conv2.bias)
        model.layer4[1].forward = lambda x: x * 2
        return seen

    model, ours = resnet18()
    fuse(ours)
    seen, ours_seen = change(model), change(ours)
    close(ours(images()), model(images()))
    close(ours_seen, seen)


def test_hooks_of_modules_that_do_nothing_count() -> None:
    def change(model: nn.Module) -> None:
        model.layer1[1].drop_path.register_forward_hook(lambda m, i, out: out * 0.9)
        model.layer2[0].drop_block.register_forward_hook(lambda m, i, out: out * 0.9)
        model.layer3[0].aa.register_forward_pre_hook(lambda m, i: (i[0] * 0.9,))

    model, ours = pair(timms("resnet18", drop_path_rate=0.5))
    fuse(ours)
    unchanged = model(images())
    change(model), change(ours)
    close(ours(images()), model(images()))
    assert relative_error(model(images()), unchanged) > 1e-3


def test_a_method_replaced_in_the_class_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ours = resnet18()
    fuse(ours)
    planned, x = copy.deepcopy(ours).float(), images(dtype=torch.float32)
    kind = torchvision.models.resnet.BasicBlock
    original = kind.forward
    with torch.no_grad():
        for _ in range(3):
            planned(x)
        monkeypatch.setattr(kind, "forward", lambda self, x: 1.1 * original(self, x))
        assert relative_error(planned(x), copy.deepcopy(model).float()(x)) < 1e-5
    close(ours(images()), model(images()))
    _, other = resnet18()
    assert "layer1.0" not in fuse(other).fused
    close(other(images()), model(images()))


def test_another_version_of_a_class_is_left_alone() -> None:
    class Scaled(torchvision.models.resnet.BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.stride

    class Renamed(torchvision.models.resnet.BasicBlock):
        pass

    model, ours = pair(lambda: nn.ModuleList([Scaled(8, 8), Renamed(8, 8)]))
    report = fuse(ours)
    assert list(report.fused) == ["1"]
    assert report.left["0.conv1"] == (
        f"Scaled.forward is of {__name__}, which fuse does not know".replace(
            "Scaled", Scaled.__qualname__
        )
    )
    x = images()[:, :1].repeat(1, 8, 1, 1)
    for a, b in zip(ours, model, strict=True):
        close(a(x), b(x))

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))

    forward.__module__ = "torchvision.models.resnet"
    forward.__qualname__ = "BasicBlock.forward"
    with mock.patch.object(Renamed, "forward", forward):
        why = fuse(nn.Sequential(Renamed(8, 8))).left["0.conv1"]
    assert why.endswith("is of another version than fuse knows")


def test_what_is_left_has_a_reason() -> None:
    hooked = nn.Conv2d(8, 8, 1, bias=False)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1, bias=False),
        nn.LocalResponseNorm(2),
        nn.Conv2d(8, 8, 1, bias=False, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1, bias=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        hooked,
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1, bias=False),
    )
    report = fuse(model)
    assert list(report.left.items()) == [
        ("3", "has a bias"),
        ("5", "no batch or group norm follows but LocalResponseNorm"),
        ("7", "is padded by 'reflect', (1, 1)"),
        ("9", "its normalisation has no running statistics"),
        ("11", "has hooks or a method of its own, or its normalisation has"),
        ("13", "no batch or group norm follows but nothing"),
    ]
    assert "1 of 7 convolutions fused, by\n  1 × Sequential: (the model)\nleft as they are:\n" in (
        f"{report}"
    )
    assert str(fuse(model)) == str(report)  # fused already


def test_copies_and_pickles_stay_fused() -> None:
    model, ours = resnet18()
    fuse(ours)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    )
    for copied in copies:
        assert fused_ops(copied, images()) == fused_ops(ours, images())
        close(copied(images()), model(images()))
        unfuse(copied)
        assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]


def test_tools_see_the_modules() -> None:
    model, ours = resnet18()
    fuse(ours)
    expected = model(images())
    close(torch.jit.script(ours)(images()), expected)
    close(torch.jit.trace(ours, images())(images()), expected)
    exported = torch.export.export(ours, (images(),))
    assert not any("resnet_fused" in str(node.target) for node in exported.graph.nodes)
    close(exported.module()(images()), expected)
    names = ["relu", "layer2.0.downsample.1", "layer4"]
    extracted = create_feature_extractor(ours, names)
    close(extracted(images()), create_feature_extractor(model, names)(images()))
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    close(torch.func.functional_call(ours, parameters, (images(),)), expected)
    close(torch.func.vmap(ours)(images()[None]), expected[None])


def test_it_compiles_whole() -> None:
    model, ours = resnet18()
    fuse(ours)
    close(torch.compile(ours, fullgraph=True, backend="aot_eager")(images()), model(images()))


def test_a_class_made_of_a_fused_one_is_not_undone() -> None:
    _, ours = resnet18()
    fuse(ours)
    block = ours.layer1[0]
    block.__class__ = type("Sharded", (type(block),), {})
    with pytest.raises(ValueError, match="Sharded is a class made of a fused one"):
        unfuse(ours)


@pytest.mark.parametrize("layer", ["GroupNorm", "GroupNorm1", "GroupNormAct"])
def test_timms_group_norms(layer: str) -> None:
    timms("resnet18")()  # skips without timm
    kind = getattr(timm.layers, layer)
    model, ours = pair(
        lambda: nn.Sequential(nn.Conv2d(3, 64, 3, bias=False), kind(64), nn.Conv2d(64, 8, 1))
    )
    assert list(fuse(ours).left) == ["2"]
    assert fused_ops(ours, images()) == (2, 1)
    close(ours(images()), model(images()))
    assert fused_ops(ours.train(), images()) == (0, 2)
    ours.eval()
    ours[1]._fast_norm = True  # which computes in autocast's dtype
    assert fused_ops(ours, images()) == (0, 2)


def test_group_norm_trains_by_pytorch() -> None:
    """In training mode, which changes nothing else of it, and with a hook on it."""
    model, ours = pair(lambda: torchvision.models.resnet.Bottleneck(64, 16, norm_layer=group_norm))
    fuse(ours)
    x = torch.randn(2, 64, 9, 9, generator=generator()).double()
    assert fused_ops(ours, x) == (6, 0)
    assert fused_ops(ours.train(), x) == (0, 3)
    ours.eval().bn3.register_forward_hook(lambda module, inputs, out: out * 2)
    model.bn3.register_forward_hook(lambda module, inputs, out: out * 2)
    close(step(ours, x), step(model, x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_compiled_modules_are_left_alone() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)))
    assert str(fuse(scripted)) == "0 of 0 convolutions fused"
    unfuse(scripted)


def test_models_of_ours_stay_what_they_are() -> None:
    model = resnet_fused.resnet18(stem="deep", avg_down=True, num_classes=7)
    kinds = [type(module) for module in model.modules()]
    assert str(fuse(model)).startswith("22 of 22 convolutions fused")
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize(
    "build",
    [
        torchvisions("resnet18"),
        timms("resnet18"),
        timms("seresnet18"),
        torchvisions("resnet18", norm_layer=group_norm),
        timms("resnet18", norm_layer="groupnorm"),
    ],
    ids=["torchvision", "timm", "timm SE", "torchvision GroupNorm", "timm GroupNorm"],
)
def test_plans_serve_fused_networks(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomise_statistics(build()).eval()
    x = images(dtype=torch.float32)
    fuse(model)
    with torch.no_grad():
        first = model(x)
        for _ in range(3):
            assert torch.equal(model(x), first)
        if not model._plans:
            pytest.skip("no backend here has kernels to plan")
        model.layer1[0].bn1.bias.add_(1)
        model.layer2[0].conv1.weight.data.mul_(-1)
        changed = model(x)
        unfuse(model)
        assert relative_error(changed, model(x)) < 1e-5
        assert relative_error(changed, first) > 1e-3


def test_plans_go_with_their_network() -> None:
    _, ours = resnet18()
    fuse(ours)
    ours.float()
    with torch.no_grad():
        for _ in range(3):
            ours(images(dtype=torch.float32))
    plans = weakref.ref(ours._plans)
    assert "_plans" not in vars(copy.deepcopy(ours))
    unfuse(ours)
    assert "_plans" not in vars(ours)
    gc.collect()
    assert plans() is None


def test_the_benchmark_measures_both(tmp_path: Path) -> None:
    """By its command line, at a size that says nothing about speed."""
    timms("resnet18")()
    root = Path(__file__).parents[1]
    path = tmp_path / "out.json"
    command = [sys.executable, root / "benchmarks/fuse.py", "--device", "cpu", "--json", path]
    command += ["--models", "resnet18", "--batch", "2", "--size", "64"]
    command += ["--rounds", "2", "--seconds", "0.01"]
    subprocess.run(command, check=True, cwd=root, timeout=500)
    record = json.loads(path.read_text())
    (comparison,) = record["comparisons"]
    fused, eager = comparison["entries"]
    assert fused["status"] == eager["status"] == "measured"
    assert fused["error"] <= comparison["eager_error"]
    assert eager["speedup"] == pytest.approx(fused["rate"] / eager["rate"])
    assert record["reports"]["resnet18"].startswith("20 of 20 convolutions fused")
    (shown,) = render.comparisons(record)
    assert shown.title().startswith("resnet18")
