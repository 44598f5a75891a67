"""How blocks and stems train: by fused ops only where these were found to be right and faster."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused import backends, models, use_backend
from resnet_fused.backends import autotune
from resnet_fused.backends.autotune import Decision, Tuner
from resnet_fused.blocks import BasicBlock, Bottleneck
from resnet_fused.ops import training_backend
from resnet_fused.parameters import Convolution, Layer, MaxPool
from resnet_fused.reference.training import ReferenceTraining


class Training(ReferenceTraining):
    """The pieces of fused training in PyTorch, counting the convolutions that they make."""

    def __init__(self) -> None:
        self.convolutions = 0

    def conv_stats(self, *arguments: Any) -> Any:
        self.convolutions += 1
        return super().conv_stats(*arguments)


class Machine:
    """A machine with one backend that trains fused (`reference`, for CPU tensors) and the seconds
    that a step takes there by fused ops and by modules, which are measured in the other order."""

    def __init__(self, fused: float, modules: float) -> None:
        self.times = {"modules": modules, "reference": fused}
        self.measured = 0
        self.passes = True

    def measure(self, call: Callable[[], object], device: torch.device) -> float:
        call()
        time = list(self.times.values())[self.measured % 2]
        self.measured += 1
        return time

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Tuner:
        """As the choice of this process."""
        tuner = Tuner(
            self.measure,
            passed=lambda family, device: self.passes or family != "reference training",
            environment=lambda device: ("Imaginary 1000",),
            clock=lambda: 0.0,
            device_type="cpu",
        )
        monkeypatch.setattr(autotune, "choose", tuner.choose)
        return tuner


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Training]:
    """The pieces of the one backend that trains fused."""
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("RESNET_FUSED_TUNE", "on")
    monkeypatch.setenv("RESNET_FUSED_TRAINING", "speed")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    pieces = Training()
    monkeypatch.setattr(backends.get("reference"), "training", pieces)
    return pieces


def make_layer(channels: int, filters: int, kernel: int = 3, stride: int = 1) -> Layer:
    weight = torch.randn(filters, channels, kernel, kernel, dtype=torch.float64) / 8
    conv = Convolution(weight, (stride, stride), (kernel // 2, kernel // 2))
    return Layer(conv, *torch.rand(2, filters, dtype=torch.float64))


def image(channels: int = 8, batch: int = 4) -> Tensor:
    x = torch.randn(batch, channels, 6, 6, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last)


Block = tuple[Any, ...]
BLOCKS: dict[str, Callable[[], Block]] = {
    "identity": lambda: (image(), [make_layer(8, 8), make_layer(8, 8)], None, True),
    "projection": lambda: (
        image(),
        [make_layer(8, 16, stride=2), make_layer(16, 16)],
        make_layer(8, 16, 1, 2),
    ),
    "plain": lambda: (image(), [make_layer(8, 16, stride=2), make_layer(16, 16)]),
    "option A": lambda: (
        image(),
        [make_layer(8, 16, stride=2), make_layer(16, 16)],
        None,
        True,
        "",
        2,
    ),
    "frozen": lambda: (
        image(),
        [make_layer(8, 8), make_layer(8, 8)._replace(frozen=tuple(torch.ones(2, 8).double()))],
        None,
        True,
    ),
    "stem": lambda: (image(3), [make_layer(3, 16, 7, 2)], None, False, "", None, MaxPool()),
}


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest) -> Block:
    torch.manual_seed(0)
    return BLOCKS[request.param]()


@pytest.mark.parametrize(("fused", "modules"), [(1.0, 2.0), (2.0, 1.0)])
def test_each_block_trains_by_what_was_faster(
    fused: float, modules: float, block: Block, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(fused, modules)
    tuner = machine.install(monkeypatch)
    with warnings.catch_warnings(), tuner.watch() as decisions:
        warnings.simplefilter("error")
        found = training_backend(*block)
    assert (found is backends.get("reference")) == (fused < modules)
    (decision,) = decisions
    assert decision.op == "training"
    assert decision.times == machine.times
    assert training.convolutions >= 2 * len(block[1])  # checked, then measured


def test_where_nothing_was_measured_the_modules_train(
    block: Block, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESNET_FUSED_TUNE", "off")
    machine = Machine(1.0, 2.0)
    machine.install(monkeypatch)
    assert training_backend(*block) is None
    assert machine.measured == training.convolutions == 0


def test_memory_is_saved_where_that_is_preferred(
    block: Block, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(2.0, 1.0)
    machine.install(monkeypatch)
    assert training_backend(*block) is None
    monkeypatch.setenv("RESNET_FUSED_TRAINING", "memory")
    assert training_backend(*block) is backends.get("reference")
    monkeypatch.setenv("RESNET_FUSED_TRAINING", "speed")
    assert training_backend(*block) is None


def test_fused_training_that_failed_its_self_check_is_left_out(
    block: Block, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(1.0, 2.0)
    machine.passes = False
    machine.install(monkeypatch)
    for preference in ("speed", "memory"):
        monkeypatch.setenv("RESNET_FUSED_TRAINING", preference)
        assert training_backend(*block) is None
    assert training.convolutions == 0


def test_the_chosen_backend_trains_unmeasured(
    block: Block, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(2.0, 1.0)
    machine.install(monkeypatch)
    with use_backend("reference"):
        assert training_backend(*block) is backends.get("reference")
    assert machine.measured == 0
    monkeypatch.setattr(backends.get("reference"), "training", None)
    with use_backend("reference"):
        assert training_backend(*block) is None


def test_synchronised_statistics_train_fused_on_the_cpu(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `nn.SyncBatchNorm` refuses to run."""
    machine = Machine(2.0, 1.0)
    machine.install(monkeypatch)
    x, layers = BLOCKS["plain"]()
    assert training_backend(x, layers, sync_group="0") is backends.get("reference")
    assert machine.measured == 0


@pytest.mark.parametrize(
    "x",
    ["no tensor", torch.zeros(2, 8, 6, 6, dtype=torch.int64), torch.zeros(0, 8, 6, 6)],
    ids=["str", "integers", "empty"],
)
def test_what_no_op_takes_is_left_to_the_modules(
    x: Any, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESNET_FUSED_TRAINING", "memory")
    Machine(1.0, 2.0).install(monkeypatch)
    assert training_backend(x, [make_layer(8, 8)]) is None


def test_a_choice_costs_one_look_up(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1.0, 2.0)
    tuner = machine.install(monkeypatch)
    network = models.cifar.resnet20(num_classes=3).double().train()

    def step(batch: int) -> list[Decision]:
        with tuner.watch() as decisions:
            network(torch.randn(batch, 3, 8, 8, dtype=torch.float64)).sum().backward()
        return decisions

    # The stem, without a pool, and nine blocks of five shapes.
    assert [decision.op for decision in step(4)] == 10 * ["training"]
    assert machine.measured == 2 * 6
    before = training.convolutions
    assert len(step(3)) == 10  # of the same bucket
    assert machine.measured == 2 * 6
    assert training.convolutions == before + 1 + 9 * 2


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_a_compiled_block_trains_by_modules_unless_memory_is_preferred(
    kind: type[BasicBlock], training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor fuses what lies between convolutions by itself."""
    machine = Machine(1.0, 2.0)
    machine.install(monkeypatch)
    for preference, fused in (("speed", False), ("memory", True)):
        monkeypatch.setenv("RESNET_FUSED_TRAINING", preference)
        torch.compiler.reset()
        torch.manual_seed(0)
        block = kind(16, 16 // kind.expansion).double().train()
        before = training.convolutions
        x = image(16).requires_grad_()
        out = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
        assert (training.convolutions > before) == fused
        out.sum().backward()
        monkeypatch.setenv("RESNET_FUSED_TRAINING", "speed")
        theirs = block.forward_unfused(x)
        torch.testing.assert_close(out, theirs)


# Faults


def off_by_a_thousandth(out: Tensor) -> Tensor:
    return out * 1.001


def one_wrong_element(out: Tensor) -> Tensor:
    out = out.clone()
    out[(-1,) * out.dim()] += 0.01
    return out


def partly_written(out: Tensor) -> Tensor:
    ours = torch.empty_like(out)
    ours[1:] = out[1:]
    return ours


def raises(out: Tensor) -> Tensor:
    raise RuntimeError("an illegal instruction was encountered")


FAULTS = {
    off_by_a_thousandth: "error of",
    one_wrong_element: "error of|element that is",
    partly_written: "NaN or unwritten",
    raises: "RuntimeError: an illegal instruction",
}


@pytest.mark.parametrize("piece", ["conv_stats", "bn_add_relu", "dgrad", "wgrad"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faulty_training_is_excluded_and_modules_train(
    fault: Callable[[Tensor], Tensor],
    piece: str,
    training: Training,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A faster one whose forward or gradient is wrong: one warning, and PyTorch's gradients."""
    machine = Machine(1.0, 2.0)
    machine.install(monkeypatch)

    def planted(*arguments: Any) -> Any:
        found = getattr(ReferenceTraining, piece)(training, *arguments)
        return fault(found) if isinstance(found, Tensor) else (fault(found[0]), *found[1:])

    monkeypatch.setattr(training, piece, planted, raising=False)
    torch.manual_seed(0)
    block = BasicBlock(8, 8).double().train()
    x = image().requires_grad_()
    with pytest.warns(UserWarning, match="candidate 'reference' is excluded") as caught:
        out = block(x)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "|training|torch.float64|4×8×6×6|torch.float64|8×8×3×3 padding 1,1|" in message
    assert any(part in message for part in FAULTS[fault].split("|"))
    wanted = [x, *block.parameters()]
    ours = torch.autograd.grad(out.sum(), wanted)
    theirs = torch.autograd.grad(block.forward_unfused(x).sum(), wanted)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(x)
        machine.install(monkeypatch)  # as another process, which finds it in the file
        block(x)
    assert machine.measured == 1  # the modules
