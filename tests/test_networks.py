"""The paper's networks beside torchvision's family: plain, shortcut options, strides, CIFAR-10."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import require
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock as TorchvisionBlock

import resnet_fused
from resnet_fused import (
    PaddedIdentity,
    cifar,
    fusion,
    kept_activation_bytes,
    record_responses,
    use_backend,
)
from resnet_fused.models.network import ResidualNetwork
from resnet_fused.numerics import assert_contract, relative_error
from resnet_fused.testing.cases import generator, randomise_statistics
from resnet_fused.testing.plain import run_modules, training_ops_in_pytorch

NOISE = 1.1  # the results are a few dozen numbers


def images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=generator())


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


TABLE_6 = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4}  # millions


@pytest.mark.parametrize("depth", TABLE_6)
def test_cifar_parameters_are_table_6s(depth: int) -> None:
    """Exactly what the paper describes, which rounds to what it prints."""
    n = (depth - 2) // 6
    widths = [3, *[16] * (2 * n + 1), *[32] * (2 * n), *[64] * (2 * n)]
    expected = sum(9 * a * b + 2 * b for a, b in pairwise(widths)) + 650
    with torch.device("meta"):
        model = getattr(cifar, f"resnet{depth}")()
    assert parameters(model) == expected
    assert round(expected / 1e6, 2 if depth < 100 else 1) == TABLE_6[depth]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == depth
    if depth <= 110:
        with torch.device("meta"):
            assert parameters(getattr(cifar, f"plain{depth}")()) == expected


def _projections(model: nn.Module) -> int:
    return sum(parameters(m) for name, m in model.named_modules() if name.endswith("downsample"))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_parameters_follow_torchvisions(name: str, request: pytest.FixtureRequest) -> None:
    """A drops the projections, C adds one to every block, and strides weigh nothing."""
    torch.set_default_device("meta")
    request.addfinalizer(lambda: torch.set_default_device(None))
    theirs = getattr(torchvision.models, name)()
    ours = getattr(resnet_fused, name)
    assert parameters(ours()) == parameters(theirs)
    assert parameters(ours(shortcut="A")) == parameters(theirs) - _projections(theirs)
    added = 0
    for stage, widths in enumerate((64, 128, 256, 512), 1):
        for block in getattr(theirs, f"layer{stage}"):
            width = widths * block.expansion
            added += 0 if block.downsample else width * width + 2 * width
    assert parameters(ours(shortcut="C")) == parameters(theirs) + added
    if name == "resnet50":
        assert parameters(ours(stride_in="1x1")) == parameters(theirs)
    else:
        plain = getattr(resnet_fused, name.replace("resnet", "plain"))
        assert parameters(plain()) == parameters(theirs) - _projections(theirs)


class _PlainOracle(TorchvisionBlock):
    """torchvision's block, the addition left out."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


class _PaddedOracle(nn.Module):
    """Option A in other words: average pooling over single pixels, zeros concatenated."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 1, self.stride)
        return torch.cat([x, x.new_zeros(x.shape[0], self.extra, *x.shape[2:])], 1)


def _plain_oracle() -> nn.Module:
    model = torchvision.models.ResNet(_PlainOracle, [2, 2, 2, 2], num_classes=10)
    for block in model.modules():
        if isinstance(block, _PlainOracle):
            block.downsample = None
    return model


def _padded_oracle(name: str) -> nn.Module:
    model = getattr(torchvision.models, name)(num_classes=10)
    for block in model.modules():
        if getattr(block, "downsample", None) is not None:
            conv = block.downsample[0]
            extra = conv.out_channels - conv.in_channels
            block.downsample = _PaddedOracle(extra, conv.stride[0])
    return model


def _strided_oracle() -> nn.Module:
    model = torchvision.models.resnet50(num_classes=10)
    for module in model.modules():
        if isinstance(module, torchvision.models.resnet.Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)
    return model


class _CifarOracle(nn.Module):
    """Section 4.2 out of torchvision's blocks."""

    def __init__(self, n: int, block: type[TorchvisionBlock], padded: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, width in enumerate((16, 32, 64), 1):
            stride, inplanes = (1, 16) if stage == 1 else (2, width // 2)
            shortcut = _PaddedOracle(inplanes, 2) if padded and stage > 1 else None
            blocks = [block(inplanes, width, stride, shortcut)]
            blocks += [block(width, width) for _ in range(n - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


# Ours, and the same network written another way; images' size.
NETWORKS: dict[str, tuple[Callable[[], ResidualNetwork], Callable[[], nn.Module], int]] = {
    "plain18": (lambda: resnet_fused.plain18(num_classes=10), _plain_oracle, 64),
    "resnet18 A": (
        lambda: resnet_fused.resnet18(num_classes=10, shortcut="A"),
        lambda: _padded_oracle("resnet18"),
        61,
    ),
    "resnet50 A": (
        lambda: resnet_fused.resnet50(num_classes=10, shortcut="A"),
        lambda: _padded_oracle("resnet50"),
        33,
    ),
    "resnet50 1x1": (
        lambda: resnet_fused.resnet50(num_classes=10, stride_in="1x1"),
        _strided_oracle,
        33,
    ),
    "cifar.resnet20": (
        cifar.resnet20,
        lambda: _CifarOracle(3, TorchvisionBlock, padded=True),
        32,
    ),
    "cifar.plain20": (cifar.plain20, lambda: _CifarOracle(3, _PlainOracle), 32),
    "cifar.resnet110": (
        cifar.resnet110,
        lambda: _CifarOracle(18, TorchvisionBlock, padded=True),
        8,
    ),
}


def pair(name: str) -> tuple[ResidualNetwork, nn.Module, Tensor]:
    """Ours and the other with the same random weights and statistics, and images."""
    make, oracle, size = NETWORKS[name]
    torch.manual_seed(0)
    theirs = oracle().eval()
    if "110" not in name:  # random scales of 110 layers multiply to anything
        randomise_statistics(theirs)
    ours = make().eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, images(4, size)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in NETWORKS),
        *((name, torch.bfloat16) for name in ("plain18", "resnet18 A", "cifar.resnet20")),
    ],
    ids=lambda v: str(v).removeprefix("torch."),
)
def test_error_is_no_larger_than_unfused(name: str, dtype: torch.dtype) -> None:
    ours, theirs, x = pair(name)
    ours, theirs, x = ours.to(dtype), theirs.to(dtype), x.to(dtype)
    with torch.no_grad():
        truth = copy.deepcopy(theirs).double()(x.double())
        assert relative_error(run_modules(ours.double(), x.double()), truth) < 1e-13
        assert_contract(ours.to(dtype)(x), theirs(x), truth, noise=NOISE)


@pytest.mark.parametrize("shortcut", ["B", "C"])
def test_projections_in_a_cifar_network(shortcut: str) -> None:
    """Against the reference: nothing else here has projections where dimensions stay."""
    model = randomise_statistics(cifar.resnet(14, shortcut=shortcut)).eval()
    count = sum(isinstance(m, nn.Conv2d) for m in model.modules()) - 13
    assert count == {"B": 2, "C": 6}[shortcut]
    x = images(4, 16)
    with torch.no_grad():
        truth = run_modules(copy.deepcopy(model).double(), x.double())
        assert_contract(model(x), run_modules(model, x), truth, noise=NOISE)


SMALL: dict[str, Callable[[], ResidualNetwork]] = {
    "residual": lambda: cifar.resnet(8),
    "plain": lambda: cifar.plain(8),
    "bottlenecks": lambda: resnet_fused.ResNet(
        resnet_fused.Bottleneck, (1, 1, 1, 1), 5, width_per_group=16, shortcut="A", stride_in="1x1"
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("residual", torch.float32),
        ("plain", torch.float16),
        ("bottlenecks", torch.float16),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_triton_interpreted(name: str, dtype: torch.dtype) -> None:
    require("triton", "cpu", dtype)
    torch.manual_seed(0)
    model = randomise_statistics(SMALL[name]()).eval().to(dtype)
    x = images(8, 16).to(dtype)
    with torch.no_grad():
        truth = run_modules(copy.deepcopy(model).double(), x.double())
        with use_backend("triton"):
            ours = model(x)
        assert_contract(ours, run_modules(model, x), truth, noise=NOISE)


@pytest.mark.parametrize("name", SMALL)
def test_training_is_wired_exactly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the training ops in float64: gradients and running statistics are the modules'."""
    torch.manual_seed(0)
    ours = SMALL[name]().double()
    other = copy.deepcopy(ours)
    x, target = images(4, 32).double(), torch.tensor([0, 1, 2, 3])
    with training_ops_in_pytorch(), monkeypatch.context() as patch:
        patch.setattr(fusion, "run_unfused", None)  # no block runs module by module
        F.cross_entropy(ours(x), target).backward()
    F.cross_entropy(run_modules(other, x), target).backward()
    for (key, p), q in zip(ours.named_parameters(), other.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) < 1e-9, key
    for (key, p), q in zip(ours.named_buffers(), other.buffers(), strict=True):
        assert relative_error(p, q) < 1e-12, key


def test_training_with_triton_interpreted() -> None:
    """Option A's gradient in the kernels, beside the modules' own error."""
    require("triton", "cpu", torch.float32)
    torch.manual_seed(0)
    ours = cifar.resnet(8)
    eager, truth = copy.deepcopy(ours), copy.deepcopy(ours).double()
    x, target = images(3, 8), torch.tensor([0, 1, 2])
    with use_backend("triton"):
        F.cross_entropy(ours(x), target).backward()
    for model in (eager, truth):
        out = run_modules(model, x.to(model.fc.weight.dtype))
        F.cross_entropy(out, target).backward()

    def error(model: nn.Module) -> float:
        pairs = zip(model.parameters(), truth.parameters(), strict=True)
        return sum(relative_error(p.grad, q.grad) ** 2 for p, q in pairs) ** 0.5

    assert error(ours) <= NOISE * error(eager)


@pytest.mark.parametrize("name", SMALL)
def test_compiles_in_one_graph(name: str) -> None:
    torch.compiler.reset()
    model = randomise_statistics(SMALL[name]()).eval()
    x = images(2, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_trains_compiled_in_one_graph() -> None:
    """Through the training ops, option A's among them."""
    torch.compiler.reset()
    torch.manual_seed(0)
    eager = cifar.resnet(8)
    compiled = copy.deepcopy(eager)
    x, target = images(3, 8), torch.tensor([0, 1, 2])
    with training_ops_in_pytorch():
        F.cross_entropy(eager(x), target).backward()
        call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        F.cross_entropy(call(x), target).backward()
    for (key, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key
    # Before 2.14 PyTorch traces the running statistics' average with another rounding.
    rounding = 0.0 if torch.__version__ >= "2.14" else torch.finfo(torch.float32).eps
    for p, q in zip(eager.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=rounding, atol=0)


@pytest.mark.filterwarnings("ignore:The nodes obtained by tracing")
def test_feature_extraction_export_and_pickle() -> None:
    model = cifar.resnet(8).eval()
    x = images(2, 16)
    with torch.no_grad():
        expected = model(x)
        features = create_feature_extractor(model, ["layer1", "layer3"])(x)
        assert features["layer3"].shape == (2, 64, 4, 4)
        exported = torch.export.export(model, (x,)).module()(x)
        assert relative_error(exported, expected) < 1e-6
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


def test_option_a_is_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """No padded copy: the block's last Triton kernel gets a view of the block's own input."""
    require("triton", "cpu", torch.float32)
    from resnet_fused.backends.triton.launching import Launch

    shortcuts = []

    def launch(self, *tensors, _call=Launch.__call__):
        shortcut = dict(zip(self.kernel.arg_names, tensors, strict=False))["shortcut"]
        shortcuts.append(None if shortcut is None else shortcut.data_ptr())
        _call(self, *tensors)

    monkeypatch.setattr(Launch, "__call__", launch)
    block = resnet_fused.BasicBlock(16, 32, 2, PaddedIdentity(16, 32, 2)).eval()
    x = torch.randn(2, 16, 9, 9, generator=generator()).to(memory_format=torch.channels_last)
    with use_backend("triton"), torch.no_grad():
        out = block(x)
    assert shortcuts == [None, x.data_ptr()]
    assert relative_error(out, run_modules(block, x)) < 1e-6


def test_checkpointing_changes_no_bit() -> None:
    """Gradients, and running statistics, which the second forward must not move again."""
    torch.manual_seed(0)
    plain = cifar.resnet(32)
    kept = cifar.resnet(32, checkpoint=True)
    kept.load_state_dict(plain.state_dict())
    x, target = images(4, 12), torch.tensor([1, 2, 3, 4])
    for model in (plain, kept):
        for _ in range(2):
            F.cross_entropy(model(x), target).backward()
    for (key, p), q in zip(plain.named_parameters(), kept.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key
    for (key, p), q in zip(plain.named_buffers(), kept.buffers(), strict=True):
        assert torch.equal(p, q), key
    assert all(m.track_running_stats for m in kept.modules() if isinstance(m, nn.BatchNorm2d))


def test_1202_layers_train_in_bounded_memory() -> None:
    """Every 24th block's input is kept; and calls nest no deeper than in a shallow network."""
    torch.manual_seed(0)
    model = cifar.resnet1202(checkpoint=True)
    x = images(2, 8)
    shallow = kept_activation_bytes(cifar.resnet(20), x).total / 9  # of one block, on average
    kept = kept_activation_bytes(model, x).total
    assert kept < 27 * shallow  # 25 runs, stem and head
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 120)
    try:
        loss = F.cross_entropy(model(x), torch.tensor([1, 2]))
    finally:
        sys.setrecursionlimit(limit)
    loss.backward()
    assert torch.isfinite(model.conv1.weight.grad).all()
    assert model.conv1.weight.grad.norm() > 0


@pytest.mark.parametrize("training", [False, True])
def test_responses_are_those_of_hooks(training: bool) -> None:
    torch.manual_seed(0)
    model = randomise_statistics(cifar.resnet(14)).train(training)
    other = copy.deepcopy(model)
    x = images(2, 16)
    expected = {}
    for name, module in other.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(
                lambda m, i, out, name=name: expected.__setitem__(
                    name.replace("bn", "conv"), out.detach().clone()
                )
            )
    with torch.no_grad(), record_responses(model) as responses:
        out = model(x)
    with torch.no_grad():
        assert relative_error(out, other(x)) < 1e-5
    assert list(responses) == list(expected)
    for name, (response,) in responses.items():
        assert relative_error(response, expected[name]) < 1e-5, name
    with torch.no_grad():
        model(x)
    assert all(len(recorded) == 1 for recorded in responses.values())


def test_responses_of_every_forward() -> None:
    model = cifar.resnet(8).eval()
    with torch.no_grad(), record_responses(model, lambda r: r.std().item()) as deviations:
        for _ in range(2):
            model(images(2, 16))
    assert [len(d) for d in deviations.values()] == [2] * 7
    assert all(d[0] == d[1] > 0 for d in deviations.values())
    with pytest.raises(ValueError, match="holds no network or block"), record_responses(nn.ReLU()):
        pass


@pytest.mark.parametrize("training", [False, True])
def test_without_batch_norm(training: bool) -> None:
    torch.manual_seed(0)
    model = cifar.resnet(8, norm_layer=nn.Identity).train(training)
    assert parameters(model) == parameters(cifar.resnet(8)) - 2 * (3 * 16 + 2 * 32 + 2 * 64)
    x = images(2, 16)
    assert relative_error(model(x), run_modules(model, x)) < 1e-6


def test_weights_and_classes(tmp_path) -> None:
    state = cifar.resnet(8, num_classes=7).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    model = cifar.resnet(8, weights=tmp_path / "weights.pt")
    assert model.fc.out_features == 7
    assert all(torch.equal(a, state[key]) for key, a in model.state_dict().items())


MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "depth": (lambda: cifar.resnet(27), ValueError, r"6n\+2.*found 27.*26 and 32"),
    "shallow": (lambda: cifar.plain(2), ValueError, r"6n\+2 with n >= 1.*found 2"),
    "option": (lambda: resnet_fused.resnet18(shortcut="D"), ValueError, '"A", "B" or "C".*\'D\''),
    "stride": (
        lambda: resnet_fused.resnet50(stride_in="7x7"), ValueError, '"3x3" or "1x1".*7x7',
    ),
    "stride of basic blocks": (
        lambda: resnet_fused.resnet18(stride_in="1x1"), ValueError, "BasicBlock has 3×3",
    ),
    "plain with shortcut": (
        lambda: resnet_fused.plain18(shortcut="A"), ValueError, "does not apply to plain18",
    ),
    "plain as identities": (
        lambda: resnet_fused.plain18(zero_init_residual=True), ValueError, "has no shortcuts",
    ),
    "narrowing": (lambda: PaddedIdentity(8, 4), ValueError, "8 come in and outplanes is 4"),
    "published weights": (
        lambda: cifar.resnet20(weights="DEFAULT"), ValueError, "no published weights.*a path",
    ),
    "image": (lambda: cifar.resnet(8).eval()(torch.zeros(1, 1, 8, 8)), ValueError, "expects 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    call, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        call()
