"""Whole networks against torchvision's, in weights, results and everyday use."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import require
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

import resnet_fused
from resnet_fused import CheckpointError, use_backend
from resnet_fused.numerics import assert_contract, relative_error
from resnet_fused.testing.cases import generator, randomise_statistics
from resnet_fused.testing.plain import run_modules

FAMILY = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


def images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=generator(seed))


def pair(name: str, **arguments) -> tuple[nn.Module, nn.Module]:
    """Ours and torchvision's with the same random weights and statistics, in eval mode."""
    torch.manual_seed(0)
    theirs = randomise_statistics(getattr(torchvision.models, name)(**arguments)).eval()
    ours = getattr(resnet_fused, name)(**arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def check_against_torchvision(
    ours: nn.Module, theirs: nn.Module, x: torch.Tensor, dtype: torch.dtype, noise: float = 1.0
) -> None:
    """The numerics contract for a network: its weights and images rounded to the dtype first."""
    ours, theirs, x = ours.to(dtype), theirs.to(dtype), x.to(dtype)
    with torch.no_grad():
        result, eager = ours(x), theirs(x)
        truth = copy.deepcopy(theirs).double()(x.double())
    assert_contract(result, eager, truth, noise=noise)


@pytest.mark.parametrize("name", FAMILY)
def test_state_dict_moves_both_ways(name: str) -> None:
    ours, theirs = getattr(resnet_fused, name)(), getattr(torchvision.models, name)()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("arguments", [{}, {"zero_init_residual": True, "num_classes": 7}])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_initialisation_is_torchvisions_bit_for_bit(name: str, arguments: dict) -> None:
    torch.manual_seed(3)
    ours = getattr(resnet_fused, name)(**arguments).state_dict()
    torch.manual_seed(3)
    theirs = getattr(torchvision.models, name)(**arguments).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# A network of each kind of block at ImageNet's size, where the wide and deep ones take minutes.
AT_224 = ("resnet18", "resnet50", "resnext50_32x4d")
# Left to the slow tests at small sizes, too.
LARGE = ("resnet152", "resnext101_64x4d", "wide_resnet101_2")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(
            pytest.param(name, (97, 131), marks=pytest.mark.slow if name in LARGE else ())
            for name in FAMILY
        ),
        *(
            pytest.param(name, (224, 224), marks=() if name in AT_224 else pytest.mark.slow)
            for name in FAMILY
        ),
    ],
    ids=str,
)
def test_error_is_no_larger_than_torchvisions(name: str, size: tuple[int, int]) -> None:
    ours, theirs = pair(name)
    x = images(1, *size)
    check_against_torchvision(ours, theirs, x, torch.float32)
    check_against_torchvision(ours, theirs, x, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_triton_interpreted(name: str, dtype: torch.dtype) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    require("triton", "cpu", dtype)
    ours, theirs = pair(name)
    with use_backend("triton"):
        check_against_torchvision(ours, theirs, images(1, 33, 33), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", FAMILY)
def test_on_a_gpu(name: str, backend: str, dtype: torch.dtype) -> None:
    ours, theirs = pair(name)
    with use_backend(backend):
        check_against_torchvision(ours.cuda(), theirs.cuda(), images(4, 97, 131).cuda(), dtype)


@pytest.mark.parametrize(
    "arguments",
    [
        {"replace_stride_with_dilation": [False, True, True]},
        {"norm_layer": FrozenBatchNorm2d},
        {"norm_layer": lambda channels: nn.GroupNorm(8, channels)},
        {"norm_layer": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False)},
    ],
    ids=["dilated", "frozen", "group norm", "no running statistics"],
)
def test_constructor_arguments(arguments: dict) -> None:
    """In torchvision's channels_last: some of these run PyTorch's own kernels in that layout.

    Where only the head is fused both errors are almost the same number, hence the noise.
    """
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(**arguments).eval().to(memory_format=torch.channels_last)
    ours = resnet_fused.resnet50(**arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 64, 64).contiguous(memory_format=torch.channels_last)
    check_against_torchvision(ours, theirs, x, torch.float32, noise=1.1)


def test_batch_norm_without_affine_parameters() -> None:
    """torchvision's constructor cannot make this network, so the reference stands in for it."""
    torch.manual_seed(0)
    ours = resnet_fused.resnet50(norm_layer=partial(nn.BatchNorm2d, affine=False)).eval()
    randomise_statistics(ours)
    x = images(2, 64, 64)
    with torch.no_grad():
        truth = run_modules(copy.deepcopy(ours).double(), x.double())
        assert_contract(ours(x), run_modules(ours, x), truth)


def test_training_is_torchvisions() -> None:
    """Loss, gradients and running statistics of one step, each by the contract."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10).train()
    ours = resnet_fused.resnet18(num_classes=10).train()
    ours.load_state_dict(theirs.state_dict())
    truth = copy.deepcopy(theirs).double()
    x, target = images(4, 64, 64), torch.tensor([1, 2, 3, 4])
    # In the layout that ours takes: in another, other kernels of PyTorch sum in another order.
    theirs.to(memory_format=torch.channels_last)
    for model in (ours, theirs, truth):
        batch = x.to(model.fc.weight.dtype, memory_format=torch.channels_last)
        nn.functional.cross_entropy(model(batch), target).backward()
    for (name, a), b, c in zip(
        ours.named_parameters(), theirs.parameters(), truth.parameters(), strict=True
    ):
        assert relative_error(a.grad, c.grad) <= 1.1 * relative_error(b.grad, c.grad) + 1e-6, name
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_eval_with_gradients_is_torchvisions() -> None:
    """Fine-tuning with frozen statistics."""
    ours, theirs = pair("resnet18", num_classes=10)
    truth = copy.deepcopy(theirs).double()
    x = images(2, 64, 64)
    for model in (ours, theirs, truth):
        model(x.to(model.fc.weight.dtype)).square().sum().backward()
    for (name, a), b, c in zip(
        ours.named_parameters(), theirs.parameters(), truth.parameters(), strict=True
    ):
        assert relative_error(a.grad, c.grad) <= 2 * relative_error(b.grad, c.grad) + 1e-6, name


def test_new_values_are_seen_at_once() -> None:
    """Nothing that was derived from weights or statistics outlives a change of them."""
    ours, theirs = pair("resnet18", num_classes=10)
    x = images(2, 64, 64)

    def same() -> bool:
        with torch.no_grad():
            return relative_error(ours(x), theirs(x)) < 1e-5

    assert same()
    for model in (ours, theirs):
        with torch.no_grad():
            model.bn1.running_mean.copy_(torch.full((64,), 0.3))
            model.layer1[0].conv1.weight.mul_(1.5)
    assert same()
    for model in (ours, theirs):
        model.layer2[0].conv2.weight.data.mul_(0.5)  # moves no version counter
        model.layer2[0].bn1.weight.data.add_(0.5)
        model.fc.weight.data.neg_()
    assert same()
    for model in (ours, theirs):
        torch.manual_seed(1)
        model.layer3[0].conv1.weight = nn.Parameter(torch.randn(256, 128, 3, 3) / 30)
        model.layer3[0].bn1.running_var = torch.rand(256) + 1
    assert same()
    other = randomise_statistics(torchvision.models.resnet18(num_classes=10), seed=5).state_dict()
    for model in (ours, theirs):
        model.load_state_dict(other)
    assert same()
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(x).square().mean().backward()
        optimizer.step()
    assert same()


def test_hooks_and_replaced_modules_are_honoured() -> None:
    ours, theirs = pair("resnet18", num_classes=10)
    x = images(2, 40, 40)
    seen: dict[nn.Module, torch.Tensor] = {}
    for model in (ours, theirs):
        model.maxpool = nn.Identity()
        model.layer2[0].relu = nn.LeakyReLU(0.1)
        model.layer3[1].bn2.register_forward_hook(
            lambda module, inputs, output, model=model: seen.__setitem__(model, output)
        )
        model.layer4[0].downsample.insert(0, nn.AvgPool2d(1))
        model.fc = nn.Sequential(nn.Flatten(), model.fc)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-5
    assert relative_error(seen[ours], seen[theirs]) < 1e-5


def test_block_hooks_see_whole_outputs_that_nothing_overwrites() -> None:
    ours, theirs = pair("resnet50")
    taps: dict[str, list[torch.Tensor]] = {"ours": [], "theirs": []}
    for key, model in (("ours", ours), ("theirs", theirs)):
        for block in [*model.layer1, *model.layer2]:
            block.register_forward_hook(lambda m, i, out, key=key: taps[key].append(out))
    with torch.no_grad():
        x = images(2, 64, 64)
        ours(x), theirs(x)
    for a, b in zip(taps["ours"], taps["theirs"], strict=True):
        assert relative_error(a, b) < 1e-5


def test_feature_extraction_export_compile_copy_and_pickle() -> None:
    ours, _ = pair("resnet18")
    x = images(2, 64, 64)
    with torch.no_grad():
        expected = ours(x)
        features = create_feature_extractor(ours, ["layer1", "layer4"])(x)
        assert features["layer4"].shape == (2, 512, 2, 2)
        exported = torch.export.export(ours, (x,)).module()(x)
        assert relative_error(exported, expected) < 1e-6
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
        for other in (compiled, copy.deepcopy(ours)(x)):
            assert torch.equal(other, expected)
        assert torch.equal(pickle.loads(pickle.dumps(ours))(x), expected)


def test_autocast_follows_torchvision() -> None:
    ours, theirs = pair("resnet18")
    x = images(2, 64, 64)
    with torch.no_grad():
        truth = copy.deepcopy(theirs).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert_contract(ours(x), theirs(x), truth)


def test_odd_inputs() -> None:
    ours, theirs = pair("resnet18")
    with torch.no_grad():
        assert ours(images(0, 64, 64)).shape == (0, 1000)
        for x in (images(1, 1, 1), images(2, 65, 63)[:, :, ::2, ::2]):
            assert relative_error(ours(x), theirs(x)) < 1e-5
    for x, error, message in [
        (images(1, 8, 8)[0], ValueError, "unsqueeze"),
        (torch.zeros(1, 4, 8, 8), ValueError, "input has 4 channels.*expects 3"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "floating point"),
        (images(1, 8, 8).half(), TypeError, "float16"),
        (torch.zeros(1, 3, 8, 8, device="meta"), ValueError, "on cpu and the input on meta"),
    ]:
        with pytest.raises(error, match=message):
            ours(x)


def test_reference_network_is_torchvisions_in_float64() -> None:
    ours, theirs = pair("resnet18")
    x = images(2, 40, 40).double()
    with torch.no_grad():
        result = run_modules(ours.double(), x)
        assert relative_error(result, theirs.double()(x)) < 1e-14


def test_weights_from_a_file_a_dict_and_by_name(tmp_path: Path) -> None:
    state = torchvision.models.resnet18(num_classes=12).state_dict()
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    for weights in (state, path, str(path)):
        model = resnet_fused.resnet18(weights=weights)
        assert model.fc.out_features == 12
        assert all(torch.equal(a, state[key]) for key, a in model.state_dict().items())
    with pytest.raises(ValueError, match="known names are IMAGENET1K_V1, IMAGENET1K_V2"):
        resnet_fused.resnet50(weights="IMAGENET22K")
    with pytest.raises(ValueError, match="no such file"):
        resnet_fused.resnet50(weights="missing/weights.pt")
    with pytest.raises(ValueError, match="belong to another model"):
        resnet_fused.resnet50(weights=torchvision.models.ResNet18_Weights.DEFAULT)
    with pytest.raises(RuntimeError, match="size mismatch"):
        resnet_fused.resnet18(weights=state, num_classes=5)


def test_named_weights_are_downloaded_with_their_hash_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[dict] = []

    def download(url: str, **arguments):
        calls.append({"url": url, **arguments})
        return torchvision.models.resnet18().state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    for weights in ("DEFAULT", "ResNet18_Weights.IMAGENET1K_V1"):
        resnet_fused.resnet18(weights=weights, progress=False)
    assert all(call["check_hash"] and not call["progress"] for call in calls)
    assert [Path(call["url"]).name for call in calls] == ["resnet18-f37072fd.pth"] * 2


@pytest.mark.parametrize(
    "found", [5, ["a.pth"], nn.ReLU(), torchvision.models.ResNet18_Weights], ids=str
)
def test_what_is_no_source_of_weights_is_named(found: object) -> None:
    with pytest.raises(TypeError, match=r"^weights must be .*state dict, found"):
        resnet_fused.resnet18(weights=found)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "list"])
def test_a_corrupt_checkpoint_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "weights.pt"
    if content is None:
        torch.save([1, 2], path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.pt"):
        resnet_fused.resnet18(weights=path)


def test_weights_that_cannot_be_downloaded_name_their_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of another content in the place of the download's is refused by its hash, or named."""
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints" / Path(entry.url).name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match=re.escape(f"had from {entry.url} (")) as caught:
        resnet_fused.resnet18(weights=entry)
    assert str(cached.parent) in str(caught.value)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"fc.weight": Harmful()}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError):
        resnet_fused.resnet18(weights=tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


def test_importing_loads_no_backend_and_asks_for_no_gpu(tmp_path: Path) -> None:
    code = (
        "import sys, resnet_fused, torch; "
        "assert not torch.cuda.is_initialized(); "
        "found = [m for m in sys.modules if m.startswith(('triton', 'torchvision', "
        "'resnet_fused._C', 'resnet_fused.backends.cpu', 'resnet_fused.backends.triton', "
        "'resnet_fused.backends.cuda'))]; assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def _record(model: object) -> None:
    with resnet_fused.record_responses(model):
        pass


IMAGE = torch.zeros(1, 3, 32, 32)
OF_A_MODEL = {
    "fuse": resnet_fused.fuse,
    "unfuse": resnet_fused.unfuse,
    "freeze": resnet_fused.freeze,
    "freeze_batch_norm": resnet_fused.freeze_batch_norm,
    "kept_activation_bytes": lambda model: resnet_fused.kept_activation_bytes(model, IMAGE),
    "record_responses": _record,
    "throughput": resnet_fused.throughput,
    "graphed": lambda model: resnet_fused.graphed(model, IMAGE),
    "graphed_step": lambda model: resnet_fused.graphed_step(model, None, None, IMAGE, IMAGE),
    "passes": lambda model: resnet_fused.complexity.passes(model, 1, 32),
    "count": resnet_fused.complexity.count,
    "export_onnx": lambda model: resnet_fused.quantization.export_onnx(model, "model.onnx"),
    "use_backend": use_backend,
}


@pytest.mark.parametrize("name", OF_A_MODEL)
@pytest.mark.parametrize("found", [50, nn.ReLU], ids=["number", "class"])
def test_what_is_no_module_is_named(name: str, found: object) -> None:
    named = rf"(model|network|backend) must be .*, found {type(found).__name__}"
    with pytest.raises(TypeError, match=named):
        OF_A_MODEL[name](found)
