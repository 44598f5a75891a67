"""`python -m resnet_fused.tune`: every choice of a network is made, and said in one table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused import backends, models, selfcheck, tune, use_backend
from resnet_fused.backends import Candidate, autotune
from resnet_fused.backends.autotune import Decision, Operand, Tuner
from resnet_fused.backends.autotune.cache import Times
from resnet_fused.backends.reference import ReferenceBackend
from resnet_fused.reference import ops as reference


class Ours(ReferenceBackend):
    """Two kernels for each op except whole bottlenecks, PyTorch's own under other names; notes
    those that run."""

    name = "ours"

    def __init__(self) -> None:
        self.ran: list[str] = []

    def _candidates(self, meaning: Callable[..., Tensor]) -> list[Candidate]:
        def named(name: str) -> Candidate:
            def launch(*arguments: Any) -> Tensor:
                self.ran.append(name)
                return meaning(*arguments)

            return Candidate(name, launch)

        return [named("ours slow"), named("ours fast")]

    def conv_bn(self, *arguments: Any) -> list[Candidate]:
        return self._candidates(reference.conv_bn)

    def conv_bn_projection(self, *arguments: Any) -> list[Candidate]:
        return self._candidates(reference.conv_bn_projection)

    def stem(self, *arguments: Any) -> list[Candidate]:
        return self._candidates(reference.stem)

    def head(self, *arguments: Any) -> list[Candidate]:
        return self._candidates(reference.head)


class Stopwatch:
    """Measures: of the kernels that call each other's names fast and slow, the former is faster."""

    def __init__(self, backend: Ours) -> None:
        self.backend = backend
        self.measured = 0

    def measure(self, call: Callable[[], object], device: torch.device) -> float:
        self.measured += 1
        call()
        return {"ours fast": 1e-3, "ours slow": 2e-3}.get(self.backend.ran[-1], 3e-3)

    def tuner(self) -> Tuner:
        return Tuner(self.measure, environment=lambda device: ("a GPU",), device_type="cpu")


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stopwatch]:
    """Of the one backend there is, whose tensors lie on the CPU."""
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("RESNET_FUSED_TUNE", "on")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    backend = Ours()
    stopwatch = Stopwatch(backend)
    install(stopwatch.tuner(), monkeypatch)
    with use_backend(backend):
        yield stopwatch


def install(tuner: Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the process's own."""
    monkeypatch.setattr(autotune, "tuner", tuner)
    monkeypatch.setattr(autotune, "choose", tuner.choose)


def test_every_layer_of_a_network_is_measured_and_accounted_for(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, images = models.resnet18(num_classes=3), torch.randn(3, 3, 32, 32)
    seen: list[str] = []

    def progress(names: list[str]) -> Iterator[str]:
        for name in names:
            seen.append(name)
            yield name

    rows = tune.tune(network, images, progress=progress)
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert seen == ["stem", *blocks, "head"]
    calls = sorted((row.decision.op, *row.parts) for row in rows)
    first_layers = [("conv_bn", "layer1.0", "layer1.1")] * 2  # with the shortcut, and without
    others = [
        one
        for i in (2, 3, 4)
        for one in (
            ("conv_bn", f"layer{i}.0"),
            ("conv_bn", f"layer{i}.1"),
            ("conv_bn", f"layer{i}.1"),
            ("conv_bn_projection", f"layer{i}.0"),
        )
    ]
    assert calls == sorted([("stem", "stem"), *first_layers, *others, ("head", "head")])
    assert not network.training
    assert {row.decision.candidate.name for row in rows} == {"ours fast"}
    assert {row.decision.seconds() for row in rows} == {1e-3}
    measured = stopwatch.measured
    assert measured >= 2 * len(rows)
    install(stopwatch.tuner(), monkeypatch)  # as another process
    again = tune.tune(network, images)
    assert stopwatch.measured == measured
    assert tune.table(again) == tune.table(rows)


def test_compositions_have_no_row_beside_those_of_their_parts(stopwatch: Stopwatch) -> None:
    rows = tune.tune(models.resnet50(num_classes=3), torch.randn(1, 3, 32, 32))
    assert {row.decision.op for row in rows} == {"stem", "conv_bn", "conv_bn_projection", "head"}
    by_op = [row for row in rows if row.decision.op == "conv_bn_projection"]
    assert sum(len(row.parts) for row in by_op) == 4


def test_processes_that_compile_share_the_candidates(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, images = models.cifar.resnet20(num_classes=3), torch.randn(1, 3, 8, 8)
    ran: list[set[str]] = []
    for share in range(3):
        stopwatch.backend.ran.clear()
        tune.compile_share(network, images, False, share, 3)
        assert stopwatch.measured == 0
        ran.append(set(stopwatch.backend.ran))
    # What computes meanwhile is the heuristic's choice.
    assert ran == [{"ours slow"}, {"ours slow", "ours fast"}, {"ours slow"}]
    tune.tune(network, images)
    assert stopwatch.measured > 0


def test_parts_make_up_the_network() -> None:
    network = models.cifar.resnet20().eval()
    images = torch.randn(2, 3, 32, 32)
    x: Tensor = images
    for _, part in network.parts():
        x = part(x)
    assert torch.equal(x, network(images))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_training_measures_backward_to_everything_but_the_images() -> None:
    gradients: list[tuple[str, bool]] = []
    network = models.cifar.resnet20(num_classes=3)
    for name, module in network.named_modules():
        if name in ("conv1", "layer1.0", "fc"):
            module.register_full_backward_hook(
                lambda _, inputs, outputs, name=name: gradients.append(
                    (name, inputs[0] is not None)
                )
            )
    tune.tune(network, torch.randn(2, 3, 8, 8), training=True)
    assert gradients == [("conv1", False)] * 2 + [("layer1.0", True)] * 2 + [("fc", True)] * 2
    assert network.training


X = Operand("256×64×56×56")
ONE = Operand("256×64×1×1")
THREE = Operand("64×64×3×3 stride 2,2 padding 1,1")


def _row(parts: list[str], winner: str, times: Times, op: str, *described: object) -> tune.Row:
    return tune.Row(parts, Decision(op, described, Candidate(winner, abs), times))


def _rows() -> list[tune.Row]:
    fastest: Times = {"triton 128x128": 4e-5, "cuda m128n64": 3e-5, "pytorch": 6e-5}
    excluded: Times = {"cudnn": 9e-5, "cuda m64n64": "result 0 has an error of 1 ..."}
    return [
        _row(["layer1.0", "layer1.1"], "cuda m128n64", fastest, "conv_bn", torch.bfloat16, X, ONE,
             None, True),
        _row(["layer2.0"], "cudnn", excluded, "conv_bn_projection", torch.bfloat16, X, THREE),
        _row(["head"], "pytorch", {"pytorch": 5e-5}, "head", X),
        _row(["layer2.0"], "triton 64x64", {}, "wgrad", X),
    ]  # fmt: skip


def test_the_table_of_winners() -> None:
    heading, *lines = (re.split(r"\s{2,}", line) for line in tune.table(_rows()).splitlines())
    assert heading == ["layer", "op", "shape", "winner", "µs", "runner-up", "share"]
    image = "256×64×56×56"
    assert lines == [
        [
            "layer2.0", "conv_bn_projection", f"{image}, 64×64×3×3 stride 2,2 padding 1,1",
            "cudnn", "90.0", "-", "45.0%",
        ],
        [
            "layer1.0 and 1 more", "conv_bn", f"{image}, 256×64×1×1", "cuda m128n64", "30.0",
            "triton 128x128 +33%", "30.0%",
        ],
        ["head", "head", image, "pytorch", "50.0", "-", "25.0%"],
        ["layer2.0", "wgrad", image, "triton 64x64", "-", "-", "-"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "resnet51"], "'resnet50'"),
        (["--batch", "0"], "at least 1"),
        (["--dtype", "int8"], "'bfloat16'"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        tune.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_where_nothing_can_be_measured_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"NVIDIA GPU.*resnet_fused\.env"):
        tune.main([])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("RESNET_FUSED_TUNE", "off")
    with pytest.raises(SystemExit, match="RESNET_FUSED_TUNE=off"):
        tune.main([])
    monkeypatch.setenv("RESNET_FUSED_TUNE", "on")
    monkeypatch.setattr(backends, "unavailable", lambda name: "no kernels at all.")
    with pytest.raises(SystemExit, match=r"no kernels at all\."):
        tune.main([])


def test_kernels_are_checked_before_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on a new GPU, those that nobody has checked would be no candidates."""
    done: list[object] = []
    monkeypatch.setenv("RESNET_FUSED_TUNE", "on")
    monkeypatch.setenv("RESNET_FUSED_SELFCHECK", "on")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    monkeypatch.setattr(backends, "get", lambda name: ReferenceBackend())
    monkeypatch.setattr(selfcheck, "main", done.append)

    def network() -> torch.nn.Module:
        done.append("the network is made")
        raise ZeroDivisionError

    monkeypatch.setitem(tune.ARCHITECTURES, "resnet50", network)
    with pytest.raises(ZeroDivisionError):
        tune.main(["--jobs", "1"])
    assert done == [["--record"], "the network is made"]


def test_too_large_a_batch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def randn(*shape: int, **options: object) -> Tensor:
        assert shape == (4096, 3, 224, 224)
        raise torch.OutOfMemoryError

    monkeypatch.setenv("RESNET_FUSED_TUNE", "on")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    monkeypatch.setattr(backends, "get", lambda name: ReferenceBackend())
    monkeypatch.setitem(tune.ARCHITECTURES, "resnet50", torch.nn.Identity)
    monkeypatch.setattr(torch, "randn", randn)
    with pytest.raises(SystemExit, match=r"^4096 images do not fit"):
        tune.main(["--batch", "4096", "--jobs", "1"])


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_command_measures_once(
    training: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESNET_FUSED_TUNE", "on")
    arguments = ["--arch", "cifar.resnet20", "--batch", "4", "--dtype", "float16"]
    arguments += ["--training"] * training
    tune.main(arguments)
    first = capsys.readouterr().out
    shares = [float(share) for share in re.findall(r"([\d.]+)%$", first, re.MULTILINE)]
    assert sum(shares) == pytest.approx(100 * (1 + training), abs=0.1 * len(shares))
    again = Tuner(lambda *_: pytest.fail("measured again"))
    install(again, monkeypatch)
    tune.main(arguments)
    assert capsys.readouterr().out == first
