"""timm's methods and options on our networks beside its own, and weights from its checkpoints."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused.errors import CheckpointError
from resnet_fused.numerics import relative_error
from resnet_fused.testing.cases import generator, randomise_statistics

# timm's networks, and the arguments that make ours the same.
DEEP = {"stem": "deep", "avg_down": True}
NETWORKS = {"resnet18": {}, "resnet18d": DEEP, "resnet50d": DEEP}
CASES = ["resnet18", "resnet18d", pytest.param("resnet50d", marks=pytest.mark.thorough)]


def images(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 40, 40, generator=generator()).double()


def pair(name: str = "resnet18", in_chans: int = 3) -> tuple[Any, Any]:
    """Ours and timm's with the same random weights and statistics, in float64 and eval mode."""
    timm = pytest.importorskip("timm", reason="needs timm: pip install timm")
    torch.manual_seed(0)
    options = {"num_classes": 7, "in_chans": in_chans}
    theirs = randomise_statistics(timm.create_model(name, **options)).double().eval()
    build = getattr(resnet_fused, name.removesuffix("d"))
    ours = build(**options, **NETWORKS[name]).double().eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def close(found: Tensor, expected: Tensor) -> None:
    assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_methods_return_what_timms_do(name: str) -> None:
    ours, theirs = pair(name)
    x = images()
    close(ours(x), theirs(x))
    features, expected = ours.forward_features(x), theirs.forward_features(x)
    close(features, expected)
    close(ours.forward_head(features), theirs.forward_head(expected))
    pooled = theirs.forward_head(expected, pre_logits=True)
    close(ours.forward_head(features, pre_logits=True), pooled)
    for indices in ((0, 1, 2, 3, 4), (1, 3), (-2, -1)):
        taken = theirs.forward_intermediates(x, list(indices), intermediates_only=True)
        found = ours.features(x, out_indices=indices)
        assert len(found) == len(taken)
        for a, b in zip(found, taken, strict=True):
            close(a, b)
    assert len(ours.features(x)) == 4


@pytest.mark.parametrize("name", CASES)
def test_training_is_timms(name: str) -> None:
    models = pair(name)
    found = []
    for model in models:
        model.train()
        model(images()).square().mean().backward()
        found.append([p.grad for p in model.parameters()] + [b.double() for b in model.buffers()])
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("indices", [None, (1, 2, 3, 4), (0, 2), (-3, -2)])
@pytest.mark.parametrize("name", ["resnet18", "resnet18d"])
def test_features_only_is_timms(name: str, indices: tuple[int, ...] | None) -> None:
    timm = pytest.importorskip("timm", reason="needs timm: pip install timm")
    wanted = {} if indices is None else {"out_indices": indices}
    torch.manual_seed(0)
    theirs = timm.create_model(name, features_only=True, **wanted)
    theirs = randomise_statistics(theirs).double().eval()
    ours = resnet_fused.resnet18(features_only=True, **wanted, **NETWORKS[name]).double().eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for found, expected in zip(ours(images()), theirs(images()), strict=True):
        close(found, expected)
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    sum(found.sum() for found in ours.train()(images())).backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_features_only_takes_a_classifiers_weights() -> None:
    whole = randomise_statistics(resnet_fused.resnet18(num_classes=7)).eval()
    state = whole.state_dict()
    features = resnet_fused.resnet18(weights=state, features_only=True, out_indices=[2]).eval()
    left = {key.split(".")[0] for key in features.state_dict()}
    assert left == {"conv1", "bn1", "layer1", "layer2"}
    x = images().float()
    with torch.no_grad():
        (found,) = features(x)
        assert torch.equal(found, whole.features(x, [2])[0])
    for given in (features.state_dict(), state):
        again = resnet_fused.resnet18(
            weights=given, features_only=True, out_indices=[2], num_classes=5
        )
        assert all(map(torch.equal, again.state_dict().values(), features.state_dict().values()))
    with pytest.raises(RuntimeError, match=r"Missing key.*layer3"):
        resnet_fused.resnet18(weights=features.state_dict(), features_only=True)
    with pytest.raises(ValueError, match=r"out_indices=\[2\] needs features_only=True"):
        resnet_fused.resnet18(out_indices=[2])
    with pytest.raises(ValueError, match="out_indices must be ascending"):
        resnet_fused.resnet18(features_only=True, out_indices=[2, 1])


def test_classifiers_are_replaced_as_timms() -> None:
    ours, theirs = pair()
    assert ours.get_classifier(name_only=True) == theirs.get_classifier(name_only=True)
    assert ours.get_classifier() is ours.fc
    for classes in (5, 0):
        for model in (ours, theirs):
            torch.manual_seed(1)
            model.reset_classifier(classes)
        assert ours.num_classes == theirs.num_classes == classes
        assert ours.num_features == theirs.num_features
        close(ours(images()), theirs(images()))
    with pytest.raises(ValueError, match="global_pool must be"):
        ours.reset_classifier(5, "catavgmax")


def test_checkpointed_gradients_are_timms() -> None:
    ours, theirs = pair()
    kept = resnet_fused.kept_activation_bytes(ours.train(), images()).total
    for model in (ours, theirs):
        model.train().set_grad_checkpointing()
        model(images()).square().mean().backward()
    assert resnet_fused.kept_activation_bytes(ours, images()).total < kept
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(a.grad, b.grad)
    ours.set_grad_checkpointing(False)
    assert resnet_fused.kept_activation_bytes(ours, images()).total == kept


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_timms(channels: int) -> None:
    ours, theirs = pair(in_chans=channels)
    close(ours(images(channels)), theirs(images(channels)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_weights_are_adapted_as_timm_does(channels: int) -> None:
    manipulate = pytest.importorskip("timm.models._manipulate", reason="needs timm")
    state = resnet_fused.resnet18(num_classes=7).state_dict()
    model = resnet_fused.resnet18(
        weights=state, in_chans=channels, num_classes=5, adapt_weights=True
    )
    expected = manipulate.adapt_input_conv(channels, state["conv1.weight"])
    assert torch.equal(model.conv1.weight, expected)
    assert torch.equal(model.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])
    assert model.fc.weight.shape == (5, 512)
    if channels != 3:
        with pytest.raises(RuntimeError, match="size mismatch"):
            resnet_fused.resnet18(weights=state, in_chans=channels)
        assert resnet_fused.resnet18(weights=model.state_dict()).in_chans == channels


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match='stem must be "7x7" or "deep"'):
        resnet_fused.resnet18(stem="3x3")
    with pytest.raises(ValueError, match="avg_down pools where a stage strides"):
        resnet_fused.resnet50(avg_down=True, replace_stride_with_dilation=[False, False, True])
    with pytest.raises(ValueError, match=r'avg_down pools before a projection.*shortcut="A"'):
        resnet_fused.resnet18(avg_down=True, shortcut="A")
    with pytest.raises(ValueError, match="avg_down does not apply to plain18"):
        resnet_fused.plain18(avg_down=True)
    model = resnet_fused.resnet18(num_classes=2)
    for indices in ((), (2, 1), (1, 1), (5,), (-6,)):
        with pytest.raises(ValueError, match="out_indices must be ascending"):
            model.features(images().float(), out_indices=indices)


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in state.items()}


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "arch": "resnet18", "state_dict": s, "optimizer": {}},
    "torchvision": lambda s: {
        "model": zeros(s),
        "args": argparse.Namespace(lr=0.1),
        "model_ema": {"n_averaged": torch.tensor(5), **prefixed(s, "module.")},
    },
    "timm": lambda s: {"state_dict": zeros(s), "state_dict_ema": s, "metric": 0.8},
    "no average": lambda s: {"state_dict": s, "state_dict_ema": None},
    "DataParallel": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "both": lambda s: prefixed(s, "_orig_mod.module."),
    "compiled stage": lambda s: {
        key.replace("layer1.", "layer1._orig_mod."): value for key, value in s.items()
    },
    "Lightning": lambda s: {"state_dict": prefixed(s, "model."), "global_step": 7},
}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return dict(randomise_statistics(resnet_fused.resnet18(num_classes=7)).state_dict())


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_as_people_have_them(
    form: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    checkpoint = FORMS[form](state)
    path = tmp_path / "checkpoint.pth"
    torch.save(checkpoint, path)
    assert_holds(resnet_fused.resnet18(weights=path), state)
    assert_holds(resnet_fused.resnet18(weights=checkpoint), state)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_safetensors(prefix: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    path = tmp_path / "model.safetensors"
    safetensors.save_file(prefixed(state, prefix), path)
    assert_holds(resnet_fused.resnet18(weights=str(path)), state)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        resnet_fused.resnet18(weights=path)


def test_what_holds_no_state_dict_says_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"net": {"conv1.weight": torch.ones(1)}, "epoch": 3}, path)
    with pytest.raises(CheckpointError, match=r"weights\.pt holds no .* but dict with net, epoch"):
        resnet_fused.resnet18(weights=path)
    with pytest.raises(CheckpointError, match=r"^weights holds no state dict"):
        resnet_fused.resnet18(weights={"epoch": 3})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty, without a connection."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs huggingface_hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def cached(hub: Path, repository: str, content: bytes) -> Path:
    """Puts a file into the cache as the hub's client does; returns where its bytes are."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    commit = "0123456789" * 4
    blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
    snapshot = folder / "snapshots" / commit / "model.safetensors"
    for path in (blob, snapshot, folder / "refs/main"):
        path.parent.mkdir(parents=True)
    blob.write_bytes(content)
    snapshot.symlink_to(blob)
    (folder / "refs/main").write_text(commit)
    return blob


def test_weights_of_the_hub(hub: Path, state: dict[str, Tensor]) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    blob = cached(hub, "timm/resnet18.a1_in1k", safetensors.save(state))
    assert_holds(resnet_fused.resnet18(weights="timm/resnet18.a1_in1k", progress=False), state)
    damaged = bytearray(blob.read_bytes())
    damaged[-1] ^= 1
    blob.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"is damaged, its SHA-256 is [0-9a-f]{64}; delete"):
        resnet_fused.resnet18(weights="timm/resnet18.a1_in1k")


def test_weights_of_the_hub_offline(hub: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        resnet_fused.resnet18(weights="timm/resnet18.a1_in1k")
    for part in (
        "weights='timm/resnet18.a1_in1k' cannot be had from the Hugging Face hub",
        "https://huggingface.co/timm/resnet18.a1_in1k/resolve/main/model.safetensors",
    ):
        assert part in str(caught.value)
