"""Frozen networks: the model's bits without a look at its weights; no change goes unsaid."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import Bottleneck, FrozenModelError, ResNet, _extension, freeze, use_backend
from resnet_fused.backends import live_cache, recording
from resnet_fused.frozen import FrozenNetwork
from resnet_fused.testing.cases import randomise_statistics

needs_extension = pytest.mark.skipif(
    _extension.available() is not None or not _extension.load().cpu_isa(),
    reason="without the extension's kernels nothing is packed",
)


def make(**arguments: Any) -> Any:
    torch.manual_seed(0)
    return randomise_statistics(ResNet(Bottleneck, [1, 1, 1, 1], 10, **arguments)).eval()


def fused_torchvision() -> Any:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = randomise_statistics(torchvision.models.resnet18(num_classes=10)).eval()
    resnet_fused.fuse(model)
    return model


NETWORKS: dict[str, Callable[[], Any]] = {
    "bottlenecks": make,
    "grouped": lambda: make(groups=32, width_per_group=4),
    "option A": lambda: randomise_statistics(resnet_fused.cifar.resnet20()).eval(),
    "fused": fused_torchvision,
    "user's block between": lambda: _with_a_users_block(),
}


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1.5


def _with_a_users_block() -> Any:
    network = make()
    network.layer2.append(Scaled().eval())
    return network


def image(batch: int = 2, size: int = 40, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def convolutions(network: nn.Module) -> list[Tensor]:
    return [m.weight for m in network.modules() if isinstance(m, nn.Conv2d)]


def poison(network: nn.Module) -> None:
    """So that no version counter moves."""
    for weight in convolutions(network):
        weight.data.fill_(float("nan"))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_convolution_weights_are_read_once_and_give_the_models_bits(
    name: str, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and not _extension.load().cpu_convolves_bf16():
        pytest.skip("the kernels of bfloat16 need AVX2 or AVX512_BF16")
    model, x = NETWORKS[name]().to(dtype), image().to(dtype)
    with torch.no_grad():
        expected = model(x)
    frozen = freeze(model)
    assert torch.equal(frozen(x), expected)
    poison(frozen.network)
    for _ in range(4):  # on the ordinary path, while it is recorded, and replayed
        out = frozen(x)
        assert not out.requires_grad
        assert torch.equal(out, expected)
    assert torch.equal(model(x), expected), "the model has weights of its own"


@needs_extension
def test_no_forward_takes_a_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Tensor] = []
    content = live_cache.LiveCache._content

    def counted(self: Any, weight: Tensor) -> Any:
        hashed.append(weight)
        return content(self, weight)

    monkeypatch.setattr(live_cache.LiveCache, "_content", counted)
    model, x = make(), image()
    frozen = freeze(model)
    for _ in range(3):
        frozen(x)
    assert not hashed
    with torch.no_grad():
        frozen.network(x)  # itself an ordinary model
        assert len(hashed) >= len(convolutions(model))


@needs_extension
def test_the_model_inside_is_verified_where_it_is_called_itself() -> None:
    frozen, x = freeze(make()), image()
    for _ in range(3):
        frozen(x)
    with torch.no_grad():
        for _ in range(3):
            before = frozen.network(x)
        frozen.network.layer1[0].conv2.weight.data.mul_(2)
        assert not torch.equal(frozen.network(x), before)


def test_the_simulated_gpu_lays_weights_out_once(
    simulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    awaited: list[Tensor] = []  # as other streams, which do not wait for this one, will read them
    may_keep = recording.may_keep
    monkeypatch.setattr(recording, "may_keep", lambda t: awaited.append(t) or may_keep(t))
    model, x = make().half(), image(1, 33).half()
    with use_backend("cuda_sim"), torch.no_grad():
        expected = model(x)
        frozen = freeze(model)
        for _ in range(2):
            assert torch.equal(frozen(x), expected)
        (entry,) = frozen.network._plans._entries.values()
        assert entry.plan is not None
        assert any(t is frozen.network.layer2[0].conv2.weight for t in awaited)
        frozen.network.layer2[0].conv2.weight.data.fill_(float("nan"))  # 3×3
        assert torch.equal(frozen(x), expected)


def add(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.add_(1)


EDITS: dict[str, Callable[[FrozenNetwork], object]] = {
    "packed weight": lambda f: add(f.network.layer1[0].conv1.weight),
    "weight that kernels read": lambda f: add(f.network.fc.weight),
    "statistics": lambda f: add(f.network.bn1.running_var),
    "tensor of the state dict": lambda f: add(f.state_dict()["layer3.0.conv2.weight"]),
    "network's state dict": lambda f: f.network.load_state_dict(f.state_dict()),
}


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_in_place_is_refused(name: str, planned: bool) -> None:
    frozen, x = freeze(make()), image()
    for _ in range(3 if planned else 0):
        frozen(x)
    EDITS[name](frozen)
    named = {
        "packed weight": "layer1.0.conv1.weight",
        "weight that kernels read": "fc.weight",
        "statistics": "bn1.running_var",
        "tensor of the state dict": "layer3.0.conv2.weight",
        "network's state dict": "conv1.weight",
    }[name]
    for _ in range(2):
        with pytest.raises(FrozenModelError, match=f"^{named} of a frozen network was edited"):
            frozen(x)


def other_parameter(network: Any) -> None:
    conv = network.layer1[0].conv1
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def other_data(network: Any) -> None:
    weight = network.layer1[0].conv1.weight
    weight.data = weight.detach() * 2


@pytest.mark.parametrize("change", [other_parameter, other_data])
def test_a_replaced_weight_counts(change: Callable[[Any], None]) -> None:
    """No tensor was edited, and what takes its place is packed anew."""
    model, x = make(), image()
    frozen = freeze(model)
    for _ in range(3):
        before = frozen(x)
    change(frozen.network)
    change(model)
    with torch.no_grad():
        expected = model(x)
    assert not torch.equal(expected, before)
    for _ in range(4):
        assert torch.equal(frozen(x), expected)
    for network in (frozen.network, model):
        add(network.layer1[0].conv1.weight)
    if change is other_data:
        with pytest.raises(FrozenModelError, match="was edited in place"):
            frozen(x)
        return
    with torch.no_grad():
        expected = model(x)
    for _ in range(3):
        assert torch.equal(frozen(x), expected)


def test_only_its_own_weights_are_promised_to_stay() -> None:
    """Not those of another network that a hook calls."""
    other, x = make(), image()
    frozen, results = freeze(make()), list[Tensor]()
    frozen.network.layer1[0].register_forward_hook(lambda *_: results.append(other(x)))
    for _ in range(3):
        frozen(x)
    other.layer1[0].conv1.weight.data.mul_(2)
    frozen(x)
    with torch.no_grad():
        expected = copy.deepcopy(other)(x)
    assert not torch.equal(expected, results[0])
    assert torch.equal(results[-1], expected)


REFUSED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "train": (lambda m: m.train(), "cannot be trained"),
    "load_state_dict": (lambda m: m.load_state_dict(m.state_dict()), "loads no other weights"),
    "assigned": (lambda m: m.load_state_dict(m.state_dict(), assign=True), "loads no other"),
    "to dtype": (lambda m: m.to(torch.bfloat16), "stays in the type and memory"),
    "to layout": (lambda m: m.to(memory_format=torch.channels_last), "stays in the type"),
    "double": (lambda m: m.double(), "stays in the type and memory"),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_it_is_refused(name: str, nested: bool) -> None:
    frozen, x = freeze(make()), image()
    expected = frozen(x)
    call, message = REFUSED[name]
    with pytest.raises(FrozenModelError, match=message):
        call(nn.Sequential(frozen) if nested else frozen)
    assert torch.equal(frozen(x), expected)
    assert frozen.eval() is frozen


def test_gradients_are_refused() -> None:
    frozen, x = freeze(make()), image().requires_grad_()
    for call in (lambda: frozen(x), lambda: frozen(x=x)):
        with pytest.raises(FrozenModelError, match=r"no gradients.*x\.detach"):
            call()
    with torch.no_grad():
        frozen(x)
    assert not frozen(x.detach()).requires_grad


def test_models_that_do_not_serve_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^the model is in training mode; call model\.eval\(\)"):
        freeze(make().train())
    model = make()
    model.layer2[0].bn1.train()
    with pytest.raises(ValueError, match=r"^layer2\.0\.bn1 is in training mode"):
        freeze(model)
    for other in (nn.Conv2d(3, 8, 3).eval(), "resnet50"):
        with pytest.raises(TypeError, match=f"found {type(other).__name__} without any"):
            freeze(other)  # type: ignore[arg-type]


def test_its_state_dict_is_the_models() -> None:
    model = make()
    frozen = freeze(model)
    for prefix, holder in (("", frozen), ("0.", nn.Sequential(frozen))):
        state = holder.state_dict()
        assert list(state) == [prefix + key for key in model.state_dict()]
        for key, value in model.state_dict().items():
            assert torch.equal(state[prefix + key], value)
    other = make(zero_init_residual=True)
    other.load_state_dict(frozen.state_dict())
    with torch.no_grad():
        assert torch.equal(other(image()), model(image()))


def _saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _saved])
def test_a_copy_is_frozen_with_weights_of_its_own(copied: Callable[[Any], Any]) -> None:
    frozen, x = freeze(make()), image()
    expected = frozen(x)
    with torch.no_grad():
        frozen.network.fc.weight.mul_(1)  # a copy's counters begin anew
    other = copied(frozen)
    assert torch.equal(other(x), expected)
    add(other.network.fc.bias)
    with pytest.raises(FrozenModelError, match=r"fc\.bias"):
        other(x)


def test_made_and_loaded_in_inference_mode() -> None:
    """Whose tensors count no edits: the copy's do."""
    x = image()
    with torch.inference_mode():
        model = make()
        frozen = freeze(model)
        expected = model(x)
        for _ in range(3):
            assert torch.equal(frozen(x), expected)
        assert torch.equal(_saved(frozen)(x), expected)
        frozen.network.conv1.weight.mul_(2)
        with pytest.raises(FrozenModelError, match=r"conv1\.weight"):
            frozen(x)


def test_it_says_what_it_is() -> None:
    text = repr(freeze(make()))
    assert text.startswith("FrozenNetwork(\n  frozen: inference only, on weights ")
    assert "(network): ResNet(" in text


def test_compiled_it_gives_the_models_result() -> None:
    model, x = make(), image()
    compiled = torch.compile(freeze(model), backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(compiled(x), expected, rtol=1e-3, atol=1e-3)


def test_threads_share_two_frozen_networks_of_one_model() -> None:
    model = make()
    inputs = [image(seed=i) for i in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    networks = [freeze(model), freeze(model)]
    results: list[list[Tensor]] = [[] for _ in inputs]

    def work(i: int) -> None:
        for n in range(20):
            results[i].append(networks[(i + n) % 2](inputs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, right in zip(results, expected, strict=True):
        assert len(found) == 20
        assert all(torch.equal(out, right) for out in found)
