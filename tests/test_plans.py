"""Plans: they give what the ordinary forward gives, for as long as nobody could tell."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode

import resnet_fused
from resnet_fused import BasicBlock, Bottleneck, _extension, use_backend
from resnet_fused.backends import recording
from resnet_fused.models.network import ResidualNetwork, StageShape
from resnet_fused.plan import Plans, record, store
from resnet_fused.plan.arena import Arenas
from resnet_fused.testing.cases import randomise_statistics

if reason := _extension.available():
    pytest.skip(reason, allow_module_level=True)
if not _extension.load().cpu_isa():
    pytest.skip("this processor has no kernels for float32", allow_module_level=True)

Change = Callable[[nn.Module], object]


class Small(ResidualNetwork):
    """Four stages of few channels, whose blocks a ResNet's are."""

    def __init__(self, block: Any, dilate: bool = False, **arguments: Any) -> None:
        stem, pool = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)
        stages = [StageShape(16, 1), StageShape(16, 2, 2, dilate), StageShape(32, 1, 2, dilate)]
        super().__init__(stem, pool, block, [*stages, StageShape(32, 1, 2)], 10, **arguments)


def make(block: type = Bottleneck, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return randomise_statistics(Small(block, **arguments)).eval()


def image(batch: int = 2, size: int = 40) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of launches of every program whose result is used."""
    seen: list[int] = []
    replay = record._replay

    def counted(segment: Any, *arguments: Any) -> Tensor | None:
        out = replay(segment, *arguments)
        if out is not None:
            seen.append(len(segment.program))
        return out

    monkeypatch.setattr(record, "_replay", counted)
    return seen


def run(network: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x)


def ordinary(network: Any, x: Tensor) -> Tensor:
    """What the network gives without a plan."""
    kept, network._plans = network._plans, Plans()
    try:
        return run(network, x)
    finally:
        network._plans = kept


def plan(network: Any, x: Tensor) -> None:
    """Runs until a plan is recorded."""
    for _ in range(2):
        run(network, x)
    assert len(network._plans) == 1


NETWORKS: dict[str, Callable[[], Any]] = {
    "bottlenecks": make,
    "basic blocks": lambda: make(BasicBlock),
    "plain": lambda: make(resnet_fused.PlainBlock),
    "option C": lambda: make(BasicBlock, shortcut="C"),
    "dilated": lambda: make(dilate=True),
    "frozen": lambda: make(norm_layer=resnet_fused.training.FrozenBatchNorm2d),
    "group norm": lambda: make(norm_layer=lambda channels: nn.GroupNorm(8, channels)),
    "option A": lambda: randomise_statistics(resnet_fused.cifar.resnet20()).eval(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_one_program_gives_the_bits_of_the_ordinary_forward(name, dtype, replays):
    if dtype == torch.bfloat16 and not _extension.load().cpu_convolves_bf16():
        pytest.skip("the kernels of bfloat16 need AVX2 or AVX512_BF16")
    network = NETWORKS[name]().to(dtype)
    for x in (image().to(dtype), image(3, 47).to(dtype).contiguous(memory_format=NHWC)):
        expected = ordinary(network, x) if hasattr(network, "_plans") else run(network, x)
        run(network, x)
        run(network, x)
        replays.clear()
        for _ in range(2):
            assert torch.equal(run(network, x), expected)
        assert len(replays) == 2


NHWC = torch.channels_last


def test_inputs_of_any_strides_share_a_plan(replays):
    network, x = make(), image()
    plan(network, x.contiguous(memory_format=NHWC))
    expected = ordinary(network, x)
    wide = torch.zeros(2, 3, 40, 80)
    wide[..., ::2] = x
    for form in (x.contiguous(memory_format=NHWC), wide[..., ::2]):
        assert torch.equal(run(network, form), expected)
    assert len(replays) == 2


def test_every_kind_of_input_has_a_plan_and_the_oldest_goes(replays):
    network = make(BasicBlock)
    for size in range(33, 33 + store._PLANS + 3):
        x = image(1, size)
        run(network, x)
        run(network, x)
    assert len(network._plans) == store._PLANS
    replays.clear()
    run(network, image(1, 33))
    assert not replays
    run(network, image(1, 33 + store._PLANS))
    assert len(replays) == 1


def test_an_empty_batch_has_no_plan(replays):
    network = make()
    for _ in range(5):
        assert run(network, image(0)).shape == (0, 10)
    assert not replays


# Ways of invalidation


def double(tensor: Tensor) -> None:
    """As moving averages write it: no version counter moves."""
    tensor.data.mul_(2)


def through_numpy(tensor: Tensor) -> None:
    tensor.detach().numpy()[...] *= 2


def replace_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: forward(x) * 2


def other_parameter(network: Any) -> None:
    conv = network.layer1[0].conv1
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def other_data(network: Any) -> None:
    weight = network.layer1[0].bn1.weight
    weight.data = weight.detach() * 2


def other_strides(network: Any) -> None:
    """The same address."""
    weight = network.fc.weight
    square = torch.randn(weight.shape[1], weight.shape[1])
    weight.data = square[: weight.shape[0]]
    for _ in range(4):
        run(network, image())
    weight.data = square.t()[: weight.shape[0]]


def other_state(network: Any) -> None:
    state = {k: v * 2 if v.is_floating_point() else v for k, v in network.state_dict().items()}
    network.load_state_dict(state)


def other_state_assigned(network: Any) -> None:
    state = {k: v * 2 if v.is_floating_point() else v for k, v in network.state_dict().items()}
    network.load_state_dict(state, assign=True)


def other_block(network: Any) -> None:
    network.layer2[1] = randomise_statistics(Bottleneck(64, 16)).eval()


def other_dict(network: Any) -> None:
    bn = network.layer1[0].bn1
    bn.__dict__ = {**bn.__dict__, "eps": 0.5}


def another_class(network: Any) -> None:
    class Doubled(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    network.layer1[0].relu.__class__ = Doubled


def one_block_less(network: Any) -> None:
    del network.layer2[1]


CHANGES: dict[str, Change] = {
    "forward hook": lambda n: n.layer1[0].conv2.register_forward_hook(lambda m, a, y: y * 2),
    "forward pre-hook": lambda n: n.layer1[0].register_forward_pre_hook(lambda m, a: a[0] * 2),
    "hook of a stage": lambda n: n.layer3.register_forward_hook(lambda m, a, y: y * 2),
    "hook of the pooling": lambda n: n.maxpool.register_forward_hook(lambda m, a, y: y * 2),
    "hook of the head": lambda n: n.fc.register_forward_hook(lambda m, a, y: y * 2),
    "hook of a shortcut": lambda n: n.layer2[0].downsample.register_forward_hook(
        lambda m, a, y: y * 2
    ),
    "forward of a layer": lambda n: replace_forward(n.layer1[0].conv1),
    "forward of a block": lambda n: replace_forward(n.layer2[0]),
    "forward of a stage": lambda n: replace_forward(n.layer2),
    "method of the network": lambda n: setattr(n, "_head", lambda x: x.mean((2, 3))[:, :10]),
    "parameter": other_parameter,
    "data of a parameter": other_data,
    "strides of a parameter": other_strides,
    "state dict": other_state,
    "state dict, assigned": other_state_assigned,
    "submodule": other_block,
    "submodule removed": one_block_less,
    "relu": lambda n: setattr(n.layer1[0], "relu", nn.Identity()),
    "attributes as a whole": other_dict,
    "class": another_class,
    "eps": lambda n: setattr(n.layer1[0].bn1, "eps", 0.5),
    "padding": lambda n: (
        setattr(n.layer2[0].conv1, "padding", (1, 1))
        or setattr(n.layer2[0].conv2, "padding", (0, 0))
    ),
    "stride": lambda n: (
        setattr(n.layer4[0].conv2, "stride", (1, 1))
        or setattr(n.layer4[0].downsample[0], "stride", (1, 1))
    ),
    "packed weight": lambda n: double(n.layer2[0].conv1.weight),
    "packed weight through NumPy": lambda n: through_numpy(n.layer2[0].conv2.weight),
    "packed weight of the stem": lambda n: double(n.conv1.weight),
    "weight that kernels read": lambda n: double(n.fc.weight),
    "bias": lambda n: double(n.fc.bias),
    "statistics": lambda n: double(n.layer3[0].bn2.running_mean),
    "buffer": lambda n: setattr(n.layer3[0].bn2, "running_mean", torch.ones(32)),
    "no running statistics": lambda n: (
        setattr(n.layer1[0].bn1, "running_mean", None)
        or setattr(n.layer1[0].bn1, "running_var", None)
    ),
    "no affine": lambda n: setattr(n.layer1[0].bn1, "weight", None),
    "one layer in training": lambda n: n.layer1[0].bn1.train(),
    "parameter pruned": lambda n: prune.l1_unstructured(n.layer1[0].conv1, "weight", amount=0.5),
    "parametrisation": lambda n: parametrizations.weight_norm(n.layer1[0].conv2),
    "list of stages": lambda n: n._stages.remove("layer4") or setattr(n, "fc", nn.Linear(128, 10)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name, replays):
    network, x = make(), image()
    plan(network, x)
    before = run(network, x)
    assert replays
    CHANGES[name](network)
    expected = ordinary(network, x)
    assert not torch.equal(expected, before)
    for _ in range(6):  # recorded anew meanwhile
        assert torch.equal(run(network, x), expected)
    assert replays[-1] > 1, "something is planned again"


def watched(network: Any, x: Tensor) -> None:
    """Runs until its weights' pages are watched."""
    for _ in range(12):
        run(network, x)
    plan = network._plans.find(store.surroundings(x)).plan
    if plan is None or not all(step.contents.watched for step in plan.steps):
        pytest.skip("this system watches no pages (Linux 6.7, without a seccomp filter)")


def by_a_system_call(tensor: Tensor) -> None:
    with open("/dev/zero", "rb", buffering=0) as zeros:
        zeros.readinto(tensor.detach().numpy().reshape(-1).view("uint8"))


def in_its_first_bytes(tensor: Tensor) -> None:
    """Before the first whole page. NaN, since any other number may end at a ReLU."""
    tensor.data.view(-1)[0] = torch.nan


def in_its_last_bytes(tensor: Tensor) -> None:
    tensor.data.view(-1)[-1] = torch.nan


EDITS = (double, through_numpy, by_a_system_call, in_its_first_bytes, in_its_last_bytes)


@pytest.mark.parametrize("stage", ["layer1", "layer4"])  # less than a page, and several
@pytest.mark.parametrize("edit", EDITS)
def test_a_write_to_watched_weights_is_seen(edit, stage, replays):
    network, x = make(), image()
    watched(network, x)
    before = run(network, x)
    edit(getattr(network, stage)[0].conv1.weight)
    expected = ordinary(network, x)
    assert not torch.equal(expected, before)
    for _ in range(24):
        assert torch.equal(run(network, x).nan_to_num(7), expected.nan_to_num(7))


def test_a_second_plan_hides_no_write_from_the_first(replays):
    network, x, other = make(), image(2), image(1)
    watched(network, x)
    for _ in range(12):
        run(network, other)
    network.layer4[0].conv2.weight.data.mul_(2)
    expected = ordinary(network, other), ordinary(network, x)
    for _ in range(12):  # finds the write and has the pages watched anew
        assert torch.equal(run(network, other), expected[0])
    assert torch.equal(run(network, x), expected[1])


def test_a_write_of_another_process_to_shared_weights_is_seen(replays):
    network, x = make(), image()
    network.share_memory()
    for _ in range(12):
        before = run(network, x)
    child = os.fork()
    if child == 0:
        network.layer4[0].conv2.weight.data.mul_(2)
        os._exit(0)
    os.waitpid(child, 0)
    expected = ordinary(network, x)
    assert not torch.equal(expected, before)
    assert torch.equal(run(network, x), expected)


def test_a_forked_process_sees_its_own_writes(replays):
    network, x = make(), image()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's threads do not follow a fork
    try:
        watched(network, x)
        before = run(network, x)
        child = os.fork()
        if child == 0:
            right = torch.equal(run(network, x), before)
            network.layer4[0].conv2.weight.data.mul_(2)
            expected = ordinary(network, x)
            for _ in range(24):
                right = right and torch.equal(run(network, x), expected)
            os._exit(0 if right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(run(network, x), before)
    finally:
        torch.set_num_threads(threads)


def test_weights_that_fill_no_span_of_memory(replays):
    """Nothing verifies such a packed weight where it lies, so there is no plan."""
    network, x = make(), image()
    conv = network.layer1[0].conv1
    expected = run(network, x)
    conv.weight = nn.Parameter(conv.weight.detach().repeat_interleave(2, 0)[::2])
    for _ in range(4):
        assert torch.equal(run(network, x), expected)
    double(conv.weight)
    assert torch.equal(run(network, x), ordinary(network, x))
    assert not replays


def test_changes_that_kernels_read_live_keep_the_plan(replays):
    network, x = make(), image()
    plan(network, x)
    network.layer1[0].bn1.bias.data.add_(1)
    double(network.fc.weight)
    expected = ordinary(network, x)
    assert torch.equal(run(network, x), expected)
    assert len(replays) == 1


KINDS = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Linear, Bottleneck, nn.Module, type(make().layer1))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_class_whose_methods_change_is_seen(kind, monkeypatch, replays):
    network, x = make(), image()
    plan(network, x)
    calls = []
    name = "__call__" if kind is nn.Module else "forward"
    original = getattr(kind, name)

    def counted(self: nn.Module, *arguments: Any) -> Any:
        calls.append(self)
        return original(self, *arguments)

    monkeypatch.setattr(kind, name, counted)
    run(network, x)
    assert len(calls) > (1 if kind is nn.Module else 0)
    assert not replays


@pytest.mark.parametrize(
    "register",
    [
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
    ],
)
def test_global_hooks_are_called(register, replays):
    network, x = make(), image()
    plan(network, x)
    calls: list[nn.Module] = []
    handle = register(lambda module, *_: calls.append(module) if module is network.fc else None)
    try:
        run(network, x)
    finally:
        handle.remove()
    assert calls == [network.fc]
    assert not replays
    run(network, x)
    assert len(replays) == 1


def test_moved_to_another_type_and_back(replays):
    network, x = make(), image()
    plan(network, x)
    first = run(network, x)
    network.double()
    assert run(network, x.double()).dtype == torch.float64
    with pytest.raises(TypeError):
        run(network, x)
    network.float().to(memory_format=NHWC)
    expected = ordinary(network, x)
    for _ in range(5):
        found = run(network, x)
        assert torch.equal(found, expected)
        assert torch.allclose(found, first, rtol=1e-4, atol=1e-4)


def test_weights_may_be_swapped(replays):
    network, x = make(), image()
    plan(network, x)
    torch.utils.swap_tensors(network.fc.bias, nn.Parameter(network.fc.bias.detach() + 1))
    weight = network.conv1.weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 2))
    assert torch.equal(run(network, x), ordinary(network, x))
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        assert run(network.double(), x.double()).dtype == torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapping)


def test_surroundings_have_plans_of_their_own(replays):
    network, x = make(), image()
    plan(network, x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        run(network, x)
    finally:
        torch.set_num_threads(threads)
    with use_backend("reference"):
        run(network, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(network, x).dtype == torch.bfloat16
    with torch.inference_mode():
        assert network(x).is_inference()
    assert not replays
    assert not run(network, x).is_inference()
    assert len(replays) == 1


def test_not_where_gradients_or_training_are_wanted(replays):
    network, x = make(), image()
    plan(network, x)
    network(x).sum().backward()
    assert network.conv1.weight.grad is not None
    network.train()
    run(network, x)
    assert not replays


class Seen(TorchDispatchMode):
    sees_fused_ops = True

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func.namespace)
        return func(*args, **(kwargs or {}))


def test_modes_transforms_and_tracers_see_every_op(replays):
    network, x = make(), image()
    plan(network, x)
    expected = run(network, x)
    replays.clear()
    with Seen() as seen:
        run(network, x)
    assert seen.ops.count("resnet_fused") > 5
    with torch.no_grad():
        mapped = torch.func.vmap(network)(x[:, None])
        assert torch.allclose(mapped[:, 0], expected, rtol=1e-3, atol=1e-3)
        traced = torch.fx.symbolic_trace(network)
        assert torch.allclose(traced(x), expected, rtol=1e-3, atol=1e-3)
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), expected, rtol=1e-3, atol=1e-3)
    assert not replays


def test_functional_call_swaps_parameters(replays):
    network, x = make(), image()
    plan(network, x)
    before = run(network, x)
    swapped = {"fc.bias": network.fc.bias.detach() + 1}
    with torch.no_grad():
        out = torch.func.functional_call(network, swapped, (x,))
    assert torch.allclose(out, before + 1, atol=1e-4)
    assert torch.equal(run(network, x), before)


@pytest.mark.parametrize(
    "make_copy",
    [
        copy.deepcopy,
        copy.copy,
        lambda network: pickle.loads(pickle.dumps(network)),
        lambda network: _saved(network),
        lambda network: network._replicate_for_data_parallel(),
    ],
    ids=["deepcopy", "copy", "pickle", "torch.save", "replica"],
)
def test_plans_do_not_travel(make_copy, replays):
    network, x = make(), image()
    attributes, state = set(vars(network)), set(network.state_dict())
    plan(network, x)
    assert set(vars(network)) == attributes
    assert set(network.state_dict()) == state
    expected = run(network, x)
    other = make_copy(network)
    assert not hasattr(other, "_plans")
    replays.clear()
    if other.conv1._parameters:
        assert torch.equal(run(other, x), expected)
        assert not replays


def _saved(network: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def test_a_model_with_plans_is_collected():
    network, x = make(), image()
    network.owner = [network]  # in a cycle of its own
    plan(network, x)
    weight = weakref.ref(network.layer1[0].conv1.weight)
    model = weakref.ref(network)
    del network
    gc.collect()
    assert model() is None
    assert weight() is None


def test_threads_share_a_model(replays):
    network = make()
    inputs = [image() + i for i in range(4)]
    expected = [run(network, x) for x in inputs]
    replays.clear()
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(run(network, inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(replays) == 80


def test_threads_that_record_leave_no_mode_behind():
    """PyTorch's flag for it is one a process: `torch.compile` would compile nothing any more."""
    inside, left = threading.Event(), threading.Event()

    def watch() -> None:
        inside.set()
        with recording.Watch():
            left.wait(10)

    thread = threading.Thread(target=watch)
    with recording.Watch():
        thread.start()
        inside.wait(10)
        time.sleep(0.1)  # for the other one to enter, if it could
    left.set()
    thread.join()
    assert not is_in_torch_dispatch_mode()


def test_a_model_that_never_stays_the_same_is_rarely_recorded(monkeypatch):
    recorded = []
    real = store.record

    def counted(*arguments: Any) -> Any:
        recorded.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(store, "record", counted)
    network, x = make(BasicBlock), image(1, 33)
    for i in range(60):
        network.layer1[0].calls = i
        assert run(network, x).shape == (1, 10)
    assert 2 <= len(recorded) <= 6


# What is not planned runs as ever, between programs


class Scaled(nn.Module):
    """A user's block, which remembers its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x.shape)
        return x * 1.5


@pytest.fixture
def mixed() -> Any:
    """A network with a user's block in the middle."""
    network = make()
    network.layer2.append(Scaled())
    return network


def test_a_users_block_is_called_between_programs(mixed, replays):
    x = image()
    expected = run(mixed, x)
    run(mixed, x)
    replays.clear()
    mixed.layer2[2].calls.clear()
    for _ in range(3):
        assert torch.equal(run(mixed, x), expected)
    assert len(replays) == 6
    assert len(mixed.layer2[2].calls) == 3


def test_a_hooked_block_is_called_between_programs(replays):
    network, x = make(), image()
    seen: list[Tensor] = []
    network.layer2[0].bn1.register_forward_hook(lambda m, a, y: seen.append(y.clone()))
    expected = run(network, x)
    run(network, x)
    seen.clear()
    replays.clear()
    assert torch.equal(run(network, x), expected)
    assert len(replays) == 2
    assert len(seen) == 1


def test_what_a_called_block_changes_is_seen_by_the_next_program(mixed, replays):
    x = image()

    def forward(y: Tensor) -> Tensor:
        mixed.layer4[0].conv1.weight.data.mul_(2)
        return y

    plan(mixed, x)
    mixed.layer2[2].forward = forward
    weight = mixed.layer4[0].conv1.weight
    start = weight.detach().clone()
    for _ in range(6):
        weight.data.copy_(start)
        expected = ordinary(mixed, x)
        weight.data.copy_(start)
        assert torch.equal(run(mixed, x), expected)


def test_what_a_called_block_lets_record_gradients_does(mixed, replays):
    x = image()

    def forward(y: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        return y * 1.5

    plan(mixed, x)
    mixed.layer2[2].forward = forward
    for _ in range(4):
        assert run(mixed, x).requires_grad


def test_a_called_block_may_give_another_shape(mixed, replays):
    x = image()
    plan(mixed, x)
    crop = mixed.layer2[2]
    sizes: Iterator[int] = iter([9, 3, 4, 2, 5, 9, 9])

    def forward(y: Tensor) -> Tensor:
        return y[:, :, : crop.size, : crop.size]

    crop.forward = forward
    for size in sizes:
        crop.size = size
        expected = ordinary(mixed, x)
        assert torch.equal(run(mixed, x), expected)


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


def test_what_pytorch_writes_between_launches_is_not_planned_away(monkeypatch, replays):
    """Even by a module whose type may be planned: no launch tells of it."""
    monkeypatch.setattr(record, "_PLANNED", (*record._PLANNED, Doubling))
    network, x = make(), image()
    network.layer2[1].downsample = Doubling()
    expected = run(network, x)
    for _ in range(4):
        assert torch.equal(run(network, x), expected)
    assert replays


def test_a_subclass_with_pieces_of_its_own_is_not_planned(replays):
    class Scaling(Small):
        def _head(self, x: Tensor) -> Tensor:
            return super()._head(x) * 2

    torch.manual_seed(0)
    network, x = randomise_statistics(Scaling(BasicBlock)).eval(), image()
    expected = run(network, x)
    for _ in range(4):
        assert torch.equal(run(network, x), expected)
    assert not replays


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
def test_a_planned_forward_asks_the_system_for_no_memory():
    """glibc gives every block above 32 MB back to the system at once."""
    import resource

    network, x = make(), image(16, 320)
    plan(network, x)
    (entry,) = network._plans._entries.values()
    assert entry.plan.steps[0].program.arena_bytes > 32 << 20
    run(network, x)
    faults = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run(network, x)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults) < 300  # now and then other threads of the process have their own


def test_arenas_are_as_many_as_programs_at_a_time_and_go_with_the_network():
    arenas = Arenas()
    with arenas.borrow(100) as first, arenas.borrow(50) as second:
        assert first.numel() >= 100
        assert second.numel() >= 50
        assert first.data_ptr() != second.data_ptr()
    addresses = {first.data_ptr(), second.data_ptr()}
    for _ in range(3):
        with arenas.borrow(40) as again:
            assert again.data_ptr() in addresses
    with pytest.raises(KeyError), arenas.borrow(10):
        raise KeyError
    kept = weakref.ref(again)
    del first, second, again, arenas
    assert kept() is None


# Programs


def test_simulated_gpu_gives_the_bits_of_the_ordinary_forward(simulator, replays):
    """Weights that a GPU's kernels want in another layout are laid out anew at each call."""
    network, x = make().half(), image(1, 33).half()
    with use_backend("cuda_sim"):
        expected = run(network, x)
        run(network, x)
        for _ in range(2):
            assert torch.equal(run(network, x), expected)
        assert len(replays) == 2
        double(network.layer2[0].conv2.weight)
        changed = ordinary(network, x)
        assert not torch.equal(changed, expected)
        assert torch.equal(run(network, x), changed)
        assert len(replays) == 3


@pytest.mark.parametrize("layout", [torch.contiguous_format, NHWC], ids=str)
def test_a_program_reads_images_as_they_lie(layout, simulator, replays, monkeypatch):
    """The stem's kernel reads either layout, so that nothing is copied before the program runs."""
    network, x = make().half(), image(1, 32).half().contiguous(memory_format=layout)
    with use_backend("cuda_sim"):
        expected = run(network, x)
        plan(network, x)
        replays.clear()
        monkeypatch.setattr(record, "_laid_out", None)
        assert torch.equal(run(network, x), expected)
    assert len(replays) == 1


def test_a_part_whose_bits_depend_on_the_layout_is_called(monkeypatch, replays):
    """Its program would read a copy, and give other bits than the forward before it did."""
    network, x = make(), image()
    expected, stem = run(make(), x), ResidualNetwork._stem

    def by_layout(self: Any, x: Tensor) -> Tensor:
        out = stem(self, x)
        return out if x.is_contiguous(memory_format=NHWC) else -out

    monkeypatch.setattr(ResidualNetwork, "_stem", by_layout)
    other = run(network, x)
    assert not torch.equal(other, expected)
    for _ in range(3):
        assert torch.equal(run(network, x), other)
    assert len(replays) == 2


def test_programs_reuse_memory_and_nothing_that_lives():
    """A chain of passes needs two intermediates at a time; a residual keeps one longer."""
    extension = _extension.load()
    vectors = [torch.full((8,), v) for v in (0.0, 1.0)]
    bn = (*map(_extension.tensor_arg, vectors), None, None, 0.0)
    values = [torch.randn(2, 8, 3, 3).contiguous(memory_format=NHWC) for _ in range(6)]
    described = [_extension.tensor_arg(value) for value in values]

    def passes(residual: int | None) -> Any:
        recorder = extension.Recorder()
        recorder.start()
        for i in range(5):
            added = described[residual] if residual is not None and i == 4 else None
            extension.bn_add_relu(described[i + 1], described[i], bn, added, True)
        recorder.stop()
        constants = [_extension.tensor_arg(vector) for vector in vectors]
        return recorder.program(0, 5, [described[0]], [described[5]], constants, 64)

    size = -(-values[0].nbytes // 64) * 64
    assert passes(None).arena_bytes <= 2 * size
    longer = passes(1)
    assert 2 * size < longer.arena_bytes <= 3 * size
    x = torch.randn(2, 8, 3, 3).contiguous(memory_format=NHWC)
    out, arena = torch.empty_like(x), torch.empty(longer.arena_bytes, dtype=torch.uint8)
    longer.run([x.data_ptr(), out.data_ptr()], arena.data_ptr())
    assert torch.equal(out, x.relu() * 2)


def test_recorders_refuse_what_they_cannot_resolve():
    extension = _extension.load()
    one = torch.ones(8)
    bn = (*map(_extension.tensor_arg, (one, one)), None, None, 0.0)
    x, middle, out, other = (
        torch.randn(1, 8, 3, 3).contiguous(memory_format=NHWC) for _ in range(4)
    )
    described = {
        name: _extension.tensor_arg(value)
        for name, value in {"x": x, "middle": middle, "out": out, "other": other}.items()
    }

    def program(launches: list[tuple[str, str, str | None]], constants: list[Tensor]) -> Any:
        recorder = extension.Recorder()
        recorder.start()
        for target, source, residual in launches:
            added = None if residual is None else described[residual]
            extension.bn_add_relu(described[target], described[source], bn, added, True)
        recorder.stop()
        known = [_extension.tensor_arg(constant) for constant in constants]
        return recorder.program(0, len(launches), [described["x"]], [described["out"]], known, 64)

    whole = [("middle", "x", None), ("out", "middle", None)]
    assert program(whole, [one]) is not None
    assert program(whole, []) is None, "the vectors are nobody's"
    assert program([("out", "other", None)], [one]) is None, "an input that is nobody's"
    assert program([("out", "other", None)], [one, other]) is not None
    assert program([("middle", "x", None)], [one]) is None, "no output"
    assert program([("out", "out", None)], [one]) is None, "an output read before it is written"
    assert program([("x", "x", None), ("out", "x", None)], [one]) is None, "an input written to"
    assert program([("other", "x", None), ("out", "x", None)], [one, other]) is None
    first, second = extension.Recorder(), extension.Recorder()
    first.start()
    with pytest.raises(RuntimeError, match="another recorder is active"):
        second.start()
    first.stop()


def test_a_profiler_sees_every_op(replays: list[int]) -> None:
    """A replay is no op, so that under a profiler the ordinary path computes."""
    network, x = make(), image()
    for _ in range(3):
        expected = run(network, x)
    before = list(replays)
    with torch.profiler.profile() as profile:
        out = run(network, x)
    assert before
    assert replays == before
    assert torch.equal(out, expected)
    assert any(event.name.startswith("resnet_fused::") for event in profile.events())
