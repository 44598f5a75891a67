"""CUDA graphs of a forward and of a training step.

Where there is no GPU, a recorder of operators stands for CUDA's graphs: it notes what runs between
the beginning and the end of a capture, and a replay runs that again on the same tensors.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import resnet_fused
from resnet_fused import _extension, graphed, graphed_step, use_backend
from resnet_fused.models import cifar
from resnet_fused.plan import graphs
from resnet_fused.testing.cases import randomise_statistics

if reason := _extension.available():
    pytest.skip(reason, allow_module_level=True)


class RecordedGraph:
    """As `torch.cuda.CUDAGraph`, of operators."""

    captured = 0

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Capture(TorchDispatchMode):
    sees_fused_ops = True

    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()  # by the captured operators, which keep them alive
        RecordedGraph.captured += 1

    def __exit__(self, *error: Any) -> None:
        """A capture runs nothing: what was written to is put back."""
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, copy in self.before.values():
                tensor.copy_(copy)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Of every op: batch norm's schema does not tell that it writes to the statistics.
        for leaf in tree_leaves((args, kwargs)):
            known = id(leaf) in self.before or id(leaf) in self.made
            if isinstance(leaf, Tensor) and not known:
                self.before[id(leaf)] = leaf, leaf.detach().clone()
        out = func(*args, **(kwargs or {}))
        self.made.update(map(id, tree_leaves(out)))
        self.graph.calls.append((func, args, kwargs or {}, out))
        return out


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[RecordedGraph]]:
    """Graphs of operators in the place of CUDA's, over tensors in main memory."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(graphs, "_check_cuda", lambda name, tensor: None)
    RecordedGraph.captured = 0
    with use_backend("reference"):
        yield RecordedGraph


def network() -> Any:
    torch.manual_seed(0)
    return randomise_statistics(cifar.resnet20()).eval()


def images(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_a_graph_gives_what_the_model_gives(recorded):
    model = network()
    fast = graphed(model, images())
    for seed in (1, 2):
        x = images(seed=seed)
        with torch.no_grad():
            assert torch.equal(fast(x), model(x))
    assert recorded.captured == 1
    first = fast(images())
    kept = first.clone()
    fast(images(seed=3))
    assert torch.equal(first, kept), "results are the caller's"


def test_parameters_and_statistics_are_read_as_they_are(recorded):
    model, x = network(), images()
    fast = graphed(model, x)
    model.fc.weight.data.mul_(2)
    model.bn1.running_mean.add_(1)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
    assert recorded.captured == 1


CHANGES = {
    "parameter": lambda m: setattr(m.fc, "weight", nn.Parameter(m.fc.weight.detach() * 2)),
    "data": lambda m: setattr(m.fc.weight, "data", m.fc.weight.detach() * 2),
    "module": lambda m: setattr(m.layer1[0], "relu", nn.Identity()),
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_captured_anew(name, recorded):
    model, x = network(), images()
    fast = graphed(model, x)
    before = fast(x)
    CHANGES[name](model)
    with torch.no_grad():
        expected = model(x)
    assert not torch.equal(expected, before)
    for _ in range(2):
        assert torch.equal(fast(x), expected)
    assert recorded.captured == 2


def test_another_backend_is_captured_anew(recorded):
    model, x = network(), images()
    fast = graphed(model, x)
    with use_backend(None):
        fast(x)
    assert recorded.captured == 2


def test_another_precision_of_products_is_captured_anew(recorded):
    model, x = network(), images()
    fast = graphed(model, x)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32" if before != "tf32" else "ieee"
        fast(x)
    finally:
        matmul.fp32_precision = before
    assert recorded.captured == 2


def test_a_graph_refuses_what_it_cannot_do(recorded):
    model, x = network(), images()
    fast = graphed(model, x)
    with pytest.raises(ValueError, match=r"input has shape .*3, 3, 32, 32.* captured for .*2, 3"):
        fast(images(3))
    with pytest.raises(ValueError, match=r"input has dtype torch.float64"):
        fast(x.double())
    with pytest.raises(RuntimeError, match="inside a transform"):
        torch.func.vmap(lambda one: fast(x) + one)(x[:, 0, 0, 0])
    model.layer1[0].conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1 has forward hooks"):
        fast(x)
    with pytest.raises(ValueError, match="in training mode"):
        graphed(network().train(), x)


def test_tensors_in_main_memory_are_refused():
    with pytest.raises(ValueError, match=r"example must be a CUDA tensor.*found cpu"):
        graphed(network(), images())
    with pytest.raises(ValueError, match=r"example_input must be a CUDA tensor.*found list"):
        graphed_step(network().train(), F.cross_entropy, sgd(network()), [1], images())  # type: ignore[arg-type]


# Training steps


def sgd(model: nn.Module, **arguments: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **arguments)


def targets(batch: int = 2) -> Tensor:
    return torch.arange(batch) % 10


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), targets(len(x)))
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_a_step_trains_as_the_loop_does(recorded):
    """From the same start: what making the graph did is put back."""
    model = network().train()
    theirs = copy.deepcopy(model)
    optimizer, their_optimizer = sgd(model), sgd(theirs)
    for m, o in ((model, optimizer), (theirs, their_optimizer)):
        plain_step(m, o, images(seed=9))  # there is momentum already
    step = graphed_step(model, F.cross_entropy, optimizer, images(), targets())
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    for seed in range(3):
        x = images(seed=seed)
        expected = plain_step(theirs, their_optimizer, x)
        assert torch.equal(step(x, targets()), expected)
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert recorded.captured == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, o: setattr(m.bn1, "momentum", 0.5), "is not what it was"),
        (lambda m, o: m.fc.weight.requires_grad_(False), "is not what it was"),
        (lambda m, o: m.eval(), "is not what it was"),
        (lambda m, o: m.fc.weight.register_hook(lambda grad: grad * 2), "is not what it was"),
        (lambda m, o: o.param_groups[0].update(lr=0.2), "'lr': 0.1.*are.*'lr': 0.2"),
        (lambda m, o: o.load_state_dict(copy.deepcopy(o.state_dict())), "are other tensors than"),
        (lambda m, o: o.param_groups[0]["params"].pop(), "are other tensors than"),
    ],
    ids=["attribute", "frozen", "eval", "hook", "learning rate", "state", "parameters"],
)
def test_a_step_refuses_a_model_that_has_changed(change, message, recorded):
    model = network().train()
    optimizer = sgd(model)
    step = graphed_step(model, F.cross_entropy, optimizer, images(), targets())
    change(model, optimizer)
    with pytest.raises(RuntimeError, match=message):
        step(images(), targets())


def test_a_step_refuses_another_learning_rate_tensor(recorded):
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), foreach=False)
    step = graphed_step(model, F.cross_entropy, optimizer, images(), targets())
    optimizer.param_groups[0]["lr"].fill_(0.2)
    step(images(), targets())
    optimizer.param_groups[0]["lr"] = torch.tensor(0.2)
    with pytest.raises(RuntimeError, match="are other tensors than"):
        step(images(), targets())


def test_a_step_refuses_another_loss(recorded):
    model, loss = network().train(), nn.CrossEntropyLoss()
    step = graphed_step(model, loss, sgd(model), images(), targets())
    step(images(), targets())
    loss.label_smoothing = 0.1
    with pytest.raises(RuntimeError, match="is not what it was"):
        step(images(), targets())


def test_hooks_of_all_modules_are_not_passed_over(recorded):
    model, x = network(), images()
    fast = graphed(model, x)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(RuntimeError, match="hooks of all modules"):
            fast(x)
    finally:
        handle.remove()


class Decaying(torch.optim.Optimizer):
    """Each parameter has a rate of its own, which begins at `rate` and is halved at each step."""

    def __init__(self, parameters: Any, rate: Any) -> None:
        super().__init__(parameters, {})
        self.rate = rate

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            rate = state["rate"] if "rate" in state else copy.deepcopy(self.rate)
            p.sub_(p.grad * rate)
            state["rate"] = rate.mul_(0.5) if isinstance(rate, Tensor) else rate / 2


@pytest.mark.parametrize(
    ("rate", "message"),
    [(0.1, "keeps its 'rate' on the host"), (torch.tensor(0.1), "may begin its 'rate' at another")],
    ids=["number", "tensor"],
)
def test_an_optimizer_whose_state_no_replay_would_follow(rate, message, recorded):
    model = network().train()
    theirs = copy.deepcopy(model)
    optimizer, theirs_optimizer = (Decaying(m.parameters(), rate) for m in (model, theirs))
    with pytest.raises(ValueError, match=f"^Decaying {message}"):
        graphed_step(model, F.cross_entropy, optimizer, images(), targets())
    for m, o in ((model, optimizer), (theirs, theirs_optimizer)):
        plain_step(m, o, images(seed=9))
    assert torch.equal(model.fc.weight, theirs.fc.weight), "the refusal left nothing behind"
    if isinstance(rate, float):
        return
    step = graphed_step(model, F.cross_entropy, optimizer, images(), targets())
    assert torch.equal(step(images(), targets()), plain_step(theirs, theirs_optimizer, images()))
    assert torch.equal(model.fc.weight, theirs.fc.weight)


def test_dampened_momentum_has_to_be_there(recorded):
    model = network().train()
    with pytest.raises(ValueError, match=r"^SGD may begin its 'momentum_buffer'"):
        graphed_step(model, F.cross_entropy, sgd(model, dampening=0.5), images(), targets())


class Scaler:
    """Never asked for anything."""


REFUSED: dict[str, tuple[Any, str]] = {
    "eval": (lambda m: (m.eval(), sgd(m), None), "in eval mode"),
    "SyncBatchNorm": (
        lambda m: (nn.SyncBatchNorm.convert_sync_batchnorm(m), sgd(m), None),
        "bn1 is a SyncBatchNorm",
    ),
    "host's count": (
        lambda m: (m, torch.optim.Adam(m.parameters()), None),
        "Adam keeps its step count on the host",
    ),
    "LBFGS": (lambda m: (m, torch.optim.LBFGS(m.parameters()), None), "LBFGS decides"),
    "scaler": (lambda m: (m, sgd(m), Scaler()), "fused=True"),
    "hook": (lambda m: (hooked(m), sgd(m), None), "fc has forward hooks"),
    "gradient's hook": (lambda m: (watched(m), sgd(m), None), "fc.bias has a hook"),
}


def hooked(model: Any) -> Any:
    model.fc.register_forward_hook(lambda *_: None)
    return model


def watched(model: Any) -> Any:
    model.fc.bias.register_hook(lambda grad: grad * 2)
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_steps_that_cannot_be_captured_are_refused(name, recorded):
    make, message = REFUSED[name]
    model, optimizer, scaler = make(network().train())
    with pytest.raises(ValueError, match=message):
        graphed_step(model, F.cross_entropy, optimizer, images(), targets(), scaler=scaler)
    assert recorded.captured == 0


def test_a_step_refuses_other_shapes(recorded):
    model = network().train()
    step = graphed_step(model, F.cross_entropy, sgd(model), images(), targets())
    with pytest.raises(ValueError, match="target has shape"):
        step(images(), targets(3))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_graph_gives_what_the_model_gives(dtype):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU here")
    model = resnet_fused.resnet50().eval().cuda().to(dtype)
    x = torch.randn(4, 3, 96, 96, device="cuda", dtype=dtype)
    fast = graphed(model, x)
    for _ in range(3):
        x = torch.randn_like(x)
        with torch.no_grad():
            assert torch.equal(fast(x), model(x))
    model.layer1[0].conv2.weight.data.mul_(2)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_gpu_step_trains_as_the_loop_does(autocast, monkeypatch):
    # cuDNN's gradients of weights add up in another order each time, if it may.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model = network().train().cuda()
    theirs = copy.deepcopy(model)
    optimizer, their_optimizer = sgd(model), sgd(theirs)
    x, y = images(8).cuda(), targets(8).cuda()
    step = graphed_step(model, F.cross_entropy, optimizer, x, y, autocast=autocast)
    for seed in range(3):
        x = images(8, seed).cuda()
        with torch.autocast("cuda", autocast, enabled=autocast is not None):
            loss = F.cross_entropy(theirs(x), y)
        their_optimizer.zero_grad()
        loss.backward()
        their_optimizer.step()
        assert torch.equal(step(x, y), loss.detach())
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
