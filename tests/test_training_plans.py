"""Plans of training: a stage as one node of autograd, with the bits of its blocks in turn."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from resnet_fused import _extension, cifar, freeze_batch_norm
from resnet_fused.backends.cpu.training import CpuTraining
from resnet_fused.blocks import BasicBlock, Bottleneck
from resnet_fused.models.network import ResidualNetwork, Stage, StageShape
from resnet_fused.ops import training_programs
from resnet_fused.plan import training as training_plans
from resnet_fused.testing.cases import randomise_statistics

pytestmark = pytest.mark.skipif(
    _extension.available() is not None or not _extension.load().cpu_isa(),
    reason="there are no kernels for training on this processor",
)


class Small(ResidualNetwork):
    """Two stages of bottlenecks, both with a projection, the second strided."""

    def __init__(self) -> None:
        stem, pool = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.MaxPool2d(3, 2, 1)
        super().__init__(stem, pool, Bottleneck, [StageShape(16, 2), StageShape(16, 3, 2)], 10)


NETWORKS: dict[str, Callable[[], Any]] = {
    "option A": cifar.resnet20,
    "projections": lambda: cifar.resnet20(shortcut="B"),
    "plain": cifar.plain20,
    "bottlenecks": Small,
}


def make(name: str = "option A") -> Any:
    torch.manual_seed(0)
    return randomise_statistics(NETWORKS[name]()).train()


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of every plan that ran."""
    seen: list[int] = []
    run = training_plans._TrainingPlan.run

    def watched(self: Any, x: Tensor) -> Tensor:
        seen.append(self.bound.call.layers)
        return run(self, x)

    monkeypatch.setattr(training_plans._TrainingPlan, "run", watched)
    return seen


@contextmanager
def ordinarily() -> Iterator[None]:
    """Within it every block is called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_plans, "_MOST_ELEMENTS", 0)
        yield


def image(batch: int = 3, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def step(network: nn.Module, x: Tensor | None = None, autocast: bool = False) -> list[Any]:
    """The result, all gradients and all buffers."""
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = network(image() if x is None else x)
    if y.requires_grad:
        y.float().square().sum().backward()
    return [
        y.detach(),
        *(p.grad for p in network.parameters()),
        *map(torch.clone, network.buffers()),
    ]


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    for mine, right in zip(ours, theirs, strict=True):
        assert (mine is None) == (right is None)
        assert mine is None or (mine.dtype == right.dtype and torch.equal(mine, right))


def planned(network: nn.Module) -> None:
    """Trains until the stages have plans."""
    for _ in range(2):
        step(network)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_plan_gives_the_bits_of_the_blocks(name: str, autocast: bool, replays: list[int]) -> None:
    if autocast and not _extension.load().cpu_convolves_bf16():
        pytest.skip("the kernels of bfloat16 need AVX2 or AVX512_BF16")
    ours, theirs = make(name), make(name)
    for _ in range(4):
        found = step(ours, autocast=autocast)
        with ordinarily():
            assert_same(found, step(theirs, autocast=autocast))
    assert len(replays) == 2 * len(list(ours.stages()))


def test_a_stage_is_one_program_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    network, programs = make(), 0
    planned(network)
    step(network)
    replay = CpuTraining.replay

    def counted(self: CpuTraining, *arguments: Any) -> None:
        nonlocal programs
        programs += 1
        replay(self, *arguments)

    monkeypatch.setattr(CpuTraining, "replay", counted)
    step(network)
    assert programs == 2 * (1 + 3)  # the stem and three stages


def replace_block(network: Any) -> None:
    torch.manual_seed(5)
    network.layer1[1] = BasicBlock(16, 16)


def move(network: Any) -> None:
    weight = network.layer2[1].conv1.weight
    weight.data = weight.data.clone() * 2


def set_grad(network: Any, wanted: Callable[[str], bool]) -> None:
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(wanted(name))


def double(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def scale_gradient(module: nn.Module, inputs: Any, outputs: Any) -> tuple[Tensor, ...]:
    return tuple(2 * grad for grad in inputs)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a hook of a block": lambda n: n.layer1[1].register_forward_hook(double),
    "a hook of a convolution": lambda n: n.layer2[1].conv1.register_forward_hook(double),
    "a backward hook": lambda n: n.layer2[1].register_full_backward_hook(scale_gradient),
    "another forward": lambda n: setattr(n.layer1[0], "forward", lambda x: x * 2),
    "another block": replace_block,
    "another activation": lambda n: setattr(n.layer1[1], "relu", nn.ELU()),
    "one block less": lambda n: n.layer3.pop(2),
    "other memory": move,
    "edited in place": lambda n: n.layer2[1].conv1.weight.data.mul_(2),
    "another parameter": lambda n: setattr(
        n.layer1[1].conv2, "weight", nn.Parameter(n.layer1[1].conv2.weight.detach() * 2)
    ),
    "parametrised": lambda n: parametrizations.weight_norm(n.layer1[1].conv2),
    "momentum": lambda n: setattr(n.layer1[1].bn1, "momentum", 0.5),
    "eps": lambda n: setattr(n.layer1[1].bn1, "eps", 0.5),
    "untracked": lambda n: setattr(n.layer1[1].bn1, "track_running_stats", False),
    "a norm in eval mode": lambda n: n.layer1[1].bn1.eval(),
    "a block in eval mode": lambda n: n.layer2[0].eval(),
    "a frozen norm": lambda n: setattr(n.layer1[1], "bn1", freeze_batch_norm(n.layer1[1].bn1)),
    "a frozen block": lambda n: n.layer1[1].requires_grad_(False),
    "all frozen but the last": lambda n: set_grad(n, lambda name: name.startswith("fc")),
    "frozen up to the middle of a stage": lambda n: set_grad(
        n, lambda name: name.startswith(("layer2.2", "layer3", "fc"))
    ),
    "a stem without gradients": lambda n: n.conv1.requires_grad_(False),
    "biases alone": lambda n: set_grad(n, lambda name: name.endswith("bias")),
    "in float64": lambda n: n.double(),
    "checkpointed": lambda n: n.set_grad_checkpointing(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    ours, theirs = make(), make()
    planned(ours)
    with ordinarily():
        planned(theirs)
    for network in (ours, theirs):
        CHANGES[change](network)
    x = image().double() if change == "in float64" else image()
    for _ in range(4):  # until there is a new plan, where there may be one
        found = step(ours, x)
        with ordinarily():
            assert_same(found, step(theirs, x))


def test_what_stands_between_the_ops_is_not_planned_away(
    monkeypatch: pytest.MonkeyPatch, replays: list[int]
) -> None:
    forward = BasicBlock.forward
    monkeypatch.setattr(BasicBlock, "forward", lambda self, x: forward(self, x) * 2)
    ours, theirs = make(), make()
    for _ in range(3):
        found = step(ours)
        with ordinarily():
            assert_same(found, step(theirs))
    assert not replays


def test_launches_that_read_copies_of_weights_are_not_planned(
    monkeypatch: pytest.MonkeyPatch, replays: list[int]
) -> None:
    """They would read what the weights were."""
    bind = training_programs.bind

    def copying(*arguments: Any) -> Any:
        bound = bind(*arguments)
        return bound and bound._replace(read=[tensor.clone() for tensor in bound.read])

    monkeypatch.setattr(training_programs, "bind", copying)
    network = make()
    for _ in range(4):
        step(network)
    assert not replays


def test_a_method_that_is_replaced_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = make(), make()
    planned(ours)
    with ordinarily():
        planned(theirs)
    forward = BasicBlock.forward
    monkeypatch.setattr(BasicBlock, "forward", lambda self, x: forward(self, x) * 2)
    found = step(ours)
    with ordinarily():
        assert_same(found, step(theirs))


def test_inputs_have_plans_of_their_own(replays: list[int]) -> None:
    ours, theirs = make(), make()
    for x in (image(), image(2), image(3, 20), image(), image(2), image(3, 20)) * 2:
        found = step(ours, x)
        with ordinarily():
            assert_same(found, step(theirs, x))
    assert len(replays) == 3 * 3 * 2


def test_backward_may_come_twice_and_late(replays: list[int]) -> None:
    """Two forwards before their backwards, one of which is made twice."""
    ours, theirs = make(), make()
    planned(ours)
    with ordinarily():
        planned(theirs)

    def grads(network: Any) -> list[Tensor]:
        network.zero_grad()
        first, second = network(image()), network(image(2))
        first.sum().backward(retain_graph=True)
        second.square().sum().backward()
        first.sum().backward()
        return [p.grad for p in network.parameters()]

    found = grads(ours)
    with ordinarily():
        assert_same(found, grads(theirs))
    assert replays


def test_no_second_derivative() -> None:
    network = make()
    planned(network)
    y = network(image())
    (grad,) = torch.autograd.grad(y.sum(), [network.conv1.weight], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def test_a_profiler_sees_every_block() -> None:
    network = make()
    planned(network)
    with torch.profiler.profile() as profile:
        step(network)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["resnet_fused::residual_block_training"] == 1 + 9  # the stem is one too


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_save_the_same_each_time(reentrant: bool, replays: list[int]) -> None:
    """Whichever of a checkpoint's two forwards is the one after which there could be a plan."""
    ours, theirs = make(), make()
    x = torch.randn(3, 16, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()

    def steps(network: Any) -> list[Any]:
        found = []
        network.layer1(x)
        for _ in range(4):
            network.zero_grad()
            checkpoint(network.layer1, x, use_reentrant=reentrant).square().sum().backward()
            found += [p.grad.clone() for p in network.layer1.parameters()]
        return found

    found = steps(ours)
    with ordinarily():
        assert_same(found, steps(theirs))
    assert not (replays and not reentrant)


def test_large_inputs_are_left_to_the_blocks(
    monkeypatch: pytest.MonkeyPatch, replays: list[int]
) -> None:
    network = make()
    monkeypatch.setattr(training_plans, "_MOST_ELEMENTS", image().numel())
    for _ in range(4):
        step(network)
    assert not replays


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["copy", "pickle"]
)
def test_plans_do_not_travel(make_copy: Callable[[Any], Any]) -> None:
    network = make()
    planned(network)
    assert all(len(stage._plans) == 1 for stage in network.stages())
    other = make_copy(network)
    assert not any(hasattr(stage, "_plans") for stage in other.stages())
    assert_same(step(other), step(network))


def test_a_stage_with_plans_is_collected() -> None:
    network = make()
    planned(network)
    kept = weakref.ref(next(network.stages()))
    assert isinstance(kept(), Stage)
    del network
    gc.collect()
    assert kept() is None
