"""Recorded launches in place of training ops: the same bits, and only where nobody could tell."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import checkpoint

from resnet_fused import _extension, backends, cifar, freeze_batch_norm, fuse, use_backend
from resnet_fused.backends import recording
from resnet_fused.backends.cpu.training import CpuTraining
from resnet_fused.blocks import BasicBlock, Bottleneck, PaddedIdentity, PlainBlock, conv1x1
from resnet_fused.ops import training_programs
from resnet_fused.plan import training

pytestmark = pytest.mark.skipif(
    _extension.available() is not None or not _extension.load().cpu_isa(),
    reason="there are no kernels for training on this processor",
)

NHWC = torch.channels_last


def image(channels: int, batch: int = 3, size: int = 7) -> Tensor:
    return torch.randn(batch, channels, size, size).contiguous(memory_format=NHWC)


def projected() -> nn.Module:
    return Bottleneck(32, 16, 2, nn.Sequential(conv1x1(32, 64, 2), nn.BatchNorm2d(64)))


def partly_frozen() -> nn.Module:
    block = Bottleneck(64, 16)
    block.bn2 = freeze_batch_norm(block.bn2)
    block.conv1.weight.requires_grad_(False)
    block.bn3.bias.requires_grad_(False)
    return block


BLOCKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "basic": (16, lambda: BasicBlock(16, 16)),
    "plain": (16, lambda: PlainBlock(16, 32, 2)),
    "bottleneck": (64, lambda: Bottleneck(64, 16)),
    "projected": (32, projected),
    "option A": (16, lambda: BasicBlock(16, 32, 2, PaddedIdentity(16, 32, 2))),
    "partly frozen": (64, partly_frozen),
}


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tensors of each program that was replayed; nothing is recorded before."""
    seen: list[int] = []
    replay = CpuTraining.replay

    def watched(self: CpuTraining, program: Any, device: Any, tensors: list[int]) -> None:
        seen.append(len(tensors))
        replay(self, program, device, tensors)

    monkeypatch.setattr(CpuTraining, "replay", watched)
    monkeypatch.setattr(training_programs, "_programs", {})
    return seen


def ordinarily(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    """`call()`, launch by launch."""
    with monkeypatch.context() as patch:
        patch.setattr(training_programs, "bind", lambda *arguments: None)
        return call()


def step(
    block: nn.Module, x: Tensor, autocast: bool = False, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor | None]:
    """The result, all gradients and all buffers."""
    block.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = block(x)
    y.float().square().sum().backward()
    return [
        y.detach(),
        x.grad,
        *(p.grad for p in block.parameters()),
        *map(torch.clone, block.buffers()),
    ]


def assert_same(ours: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    for mine, right in zip(ours, theirs, strict=True):
        assert (mine is None) == (right is None)
        if mine is not None and right is not None:
            assert mine.dtype == right.dtype
            assert torch.equal(mine, right)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", BLOCKS)
def test_replays_have_the_bits_of_launch_by_launch(
    name: str, autocast: bool, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if autocast and not _extension.load().cpu_convolves_bf16():
        pytest.skip("the kernels of bfloat16 need AVX2 or AVX512_BF16")
    torch.manual_seed(0)
    channels, make = BLOCKS[name]
    ours = make().train()
    theirs = copy.deepcopy(ours)
    for i in range(3):
        x = image(channels)
        right = ordinarily(monkeypatch, lambda x=x: step(theirs, x, autocast))
        del replays[:]
        assert_same(step(ours, x, autocast), right)
        # The first time each was replayed to be compared, too. PyTorch stacks frozen statistics.
        assert len(replays) == (0 if name == "partly frozen" else 4 if i == 0 else 2)


def test_a_network_replays_its_stem_and_every_block(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its stages have no plans."""
    monkeypatch.setattr(training, "_MOST_ELEMENTS", 0)
    model = cifar.resnet20().train()
    for _ in range(2):
        del replays[:]
        model(torch.randn(4, 3, 8, 8)).sum().backward()
    assert len(replays) == 2 * (1 + 9)


def test_what_pytorch_computes_is_not_recorded(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that no launch tells of: the program would read what was there once."""
    torch.manual_seed(0)
    block = BasicBlock(16, 16).train()
    conv_stats = CpuTraining.conv_stats

    def copied(self: CpuTraining, x: Tensor, *arguments: Any) -> Any:
        return conv_stats(self, x.clone(memory_format=torch.preserve_format), *arguments)

    monkeypatch.setattr(CpuTraining, "conv_stats", copied)
    x = image(16)
    ours = step(copy.deepcopy(block), x)
    assert not replays
    assert_same(ours, ordinarily(monkeypatch, lambda: step(block, x)))


def test_a_program_with_other_bits_is_not_used(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    block, x = BasicBlock(16, 16).train(), image(16)
    replay = CpuTraining.replay

    def wrong(self: CpuTraining, program: Any, device: Any, tensors: list[int]) -> None:
        replay(self, program, device, [*tensors[:1], *tensors[2:3], *tensors[2:]])  # a weight

    with monkeypatch.context() as patch:
        patch.setattr(CpuTraining, "replay", wrong)
        ours = step(copy.deepcopy(block), x)
    assert_same(ours, ordinarily(monkeypatch, lambda: step(copy.deepcopy(block), x)))
    del replays[:]
    assert_same(step(copy.deepcopy(block), x), ours)
    assert not replays, "it was refused for good"


def test_nothing_is_recorded_while_a_graph_is_captured(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    block, x = BasicBlock(16, 16).train(), image(16)
    right = ordinarily(monkeypatch, lambda: step(copy.deepcopy(block), x))
    y = block(x.clone(memory_format=torch.preserve_format).requires_grad_())
    with monkeypatch.context() as patch:
        patch.setattr(recording, "is_capturing", lambda x: True)
        del replays[:]
        y.sum().backward()
        assert not replays, "the backward of a recorded forward"
        patch.setattr(training_programs, "_programs", {})
        assert_same(step(copy.deepcopy(block), x)[:-6], right[:-6])
        assert not replays
    step(copy.deepcopy(block), x)
    assert replays


def test_a_weight_that_two_layers_share(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded with one address for both, a program would serve no other block."""
    torch.manual_seed(0)
    shared, other = BasicBlock(16, 16).train(), BasicBlock(16, 16).train()
    shared.conv2.weight = shared.conv1.weight
    x = image(16)
    for block in (shared, other, shared):
        right = ordinarily(monkeypatch, lambda block=block: step(copy.deepcopy(block), x))
        assert_same(step(block, x), right)


def test_other_strides_and_moved_parameters_are_other_programs(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    block, x = BasicBlock(16, 16).train(), image(16)
    step(block, x)
    block.conv1.weight.data = block.conv1.weight.data.flip(0).contiguous(memory_format=NHWC)
    block.bn1.weight.data = torch.rand(32)[1::2]
    right = ordinarily(monkeypatch, lambda: step(copy.deepcopy(block), x))
    assert_same(step(block, x), right)


def test_kernels_replay_their_own_launches_alone(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `cuda` and `triton` would on Hopper, whose state is the same and whose kernels differ."""
    monkeypatch.setattr(CpuTraining, "state", lambda self: None)
    first = backends.get("cpu")
    second = copy.copy(first)
    second.training = copy.copy(first.training)
    second.training.replays = second.training
    block, x = BasicBlock(16, 16).train(), image(16)
    for backend in (first, second):
        del replays[:]
        with use_backend(backend):
            step(block, x)
        assert len(replays) == 4, "recorded, and replayed"


def test_what_decides_launches_may_change_before_backward(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = "forward's"
    monkeypatch.setattr(CpuTraining, "state", lambda self: state)
    block, x = BasicBlock(16, 16).train(), image(16)
    step(block, x)
    y = block(x.requires_grad_())
    state = "another"
    del replays[:]
    for expected in (2, 3):
        y.sum().backward(retain_graph=True)
        assert len(replays) == expected, "recorded at first"


def test_saved_tensors_may_be_kept_elsewhere(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks give back copies, of other strides too."""
    torch.manual_seed(0)
    block, x = Bottleneck(64, 16).train(), image(64)
    right = ordinarily(monkeypatch, lambda: step(copy.deepcopy(block), x))
    for _ in range(2):
        with save_on_cpu():
            ours = step(copy.deepcopy(block), x)
        assert_same(ours, right)


def test_saved_floats_may_be_kept_in_fewer_bits(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As compressed activations are; where a pooling's maxima stand is no float."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    stem.append(nn.MaxPool2d(2)).train()
    fuse(stem)

    def pack(tensor: Tensor) -> Tensor:
        return tensor.half() if tensor.dtype == torch.float32 else tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    def gradients() -> list[Tensor | None]:
        with saved_tensors_hooks(pack, unpack):
            return step(copy.deepcopy(stem), image(3))[2:5]

    torch.manual_seed(1)
    right = ordinarily(monkeypatch, gradients)
    torch.manual_seed(1)
    ours = gradients()
    assert replays
    for mine, expected in zip(ours, right, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_save_the_same_each_time(reentrant: bool, replays: list[int]) -> None:
    """The first forward, which records, saves what the second does, which replays."""
    torch.manual_seed(0)
    block = BasicBlock(16, 16).train()
    x = image(16).requires_grad_()
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    expected = torch.autograd.grad(block(x).sum(), x)[0]
    assert torch.equal(x.grad, expected)


def test_a_backward_that_is_to_be_differentiated_is_refused(replays: list[int]) -> None:
    block = BasicBlock(16, 16).train()
    x = image(16).requires_grad_()
    (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


class _Seen(TorchDispatchMode):
    sees_fused_ops = True

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_modes_and_profilers_see_the_ops(replays: list[int]) -> None:
    block, x = BasicBlock(16, 16).train(), image(16)
    step(block, x)
    del replays[:]
    with _Seen() as seen:
        step(block, x)
    assert "resnet_fused::residual_block_training" in seen.names
    assert "resnet_fused::residual_block_training_backward" in seen.names
    with torch.profiler.profile() as profiler:
        step(block, x)
    names = {event.key for event in profiler.key_averages()}
    assert {"resnet_fused::residual_block_training"} <= names
    assert not replays


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "float16"])
def test_tritons_launches_are_replayed(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, which takes tensors: they are made of the addresses."""
    pytest.importorskip("triton")
    if (reason := backends.unavailable("triton")) or torch.cuda.is_available():
        pytest.skip(reason or "kernels are not interpreted")
    from resnet_fused.backends.triton import launching
    from resnet_fused.backends.triton.training import TritonReplays

    kinds: dict[int, list[Any]] = {}
    replayed = 0
    start = launching.Launch._start

    def watched(self: launching.Launch, tensors: tuple[Any, ...]) -> None:
        kinds[id(self)] = [t if t is None else (t.dtype, t.shape, t.stride()) for t in tensors]
        with _disable_current_modes():  # the interpreter itself computes by PyTorch's ops
            start(self, tensors)

    def replay(self: launching.Launch, *addresses: Any) -> None:
        nonlocal replayed
        replayed += 1
        tensors: list[Any] = []
        for address, kind in zip(addresses, kinds[id(self)], strict=True):
            if address is None:
                tensors.append(None)
                continue
            dtype, shape, strides = kind
            reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            memory = (ctypes.c_char * (reach * dtype.itemsize)).from_address(address)
            tensors.append(torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides))
        start(self, tuple(tensors))

    monkeypatch.setattr(launching.Launch, "_start", watched)
    monkeypatch.setattr(launching.Launch, "replay", replay)
    training = backends.get("triton").training
    monkeypatch.setattr(training, "replays", TritonReplays(_extension.load()))
    monkeypatch.setattr(training_programs, "_programs", {})
    torch.manual_seed(0)
    ours = BasicBlock(16, 16).train()
    theirs = copy.deepcopy(ours)
    with use_backend("triton"):
        arguments = image(16, 2, 3), autocast, torch.float16
        right = ordinarily(monkeypatch, lambda: step(theirs, *arguments))
        assert replayed == 0
        assert_same(step(ours, *arguments), right)
        assert replayed > 0


def test_launches_of_pythons_are_replayed_on_addresses() -> None:
    """Of two calls, one after the other: what the first writes lies in the arena."""
    extension = _extension.load()
    x, middle, out = (torch.zeros(64) for _ in range(3))
    calls: list[tuple[Any, ...]] = []
    recorder = extension.Recorder()

    def call(*addresses: Any) -> None:
        calls.append(addresses)

    described = [_extension.tensor_arg(t) for t in (x, middle, out)]
    recorder.add_call(call, [described[0], None, described[1]])
    recorder.add_call(call, [described[1], described[2]])
    program = recorder.program(0, 2, described[:1], described[2:], [], 64)
    program.run([4096, 8192], 12288)
    assert calls == [(4096, None, 12288), (12288, 8192)]
    with pytest.raises(ValueError, match="takes 2 addresses, found 1"):
        program.run([4096], 12288)
    assert recorder.program(0, 1, described[:1], described[2:], [], 64) is None, "out is unwritten"
    assert recording.recorder.get() is None
