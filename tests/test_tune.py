"""Backend `tuned` and `python -m resnet_fused.tune`: who computes what, and what is said of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from resnet_fused.backends.tuned import TunedBackend
from resnet_fused.backends.tuning import Decision, Operand, Tuner, Window
from torch import Tensor

from resnet_fused import backends, models, tune, use_backend
from resnet_fused.backends import tuned as tuned_module
from resnet_fused.backends.reference import ReferenceBackend
from resnet_fused.errors import BackendUnavailableError
from resnet_fused.parameters import MaxPool
from resnet_fused.testing.cases import (
    ConvCase,
    generator,
    make_batch_norm,
    make_convolution,
    make_residual,
)


def _arguments() -> dict[str, tuple[Any, ...]]:
    """Of every op, those of a call."""
    rng = generator()
    case = ConvCase(1, 8, 5, 5, 16)
    x, (conv, bn) = make_convolution(case, rng, torch.float32)
    residual = make_residual(case, x, rng)
    return {
        "conv_bn": (x, conv, bn, residual, True),
        "conv_bn_projection": (x, conv, bn, *make_convolution(case, rng, torch.float32)),
        "stem": (*make_convolution(ConvCase(1, 3, 9, 9, 8, 7, 2, 3), rng, x.dtype), MaxPool()),
        "head": (x, torch.randn(10, 8, generator=rng), None),
        "bn_add_relu": (residual, make_batch_norm(16, rng, torch.float32), None, True),
    }


OPS = tuple(_arguments())


class Named(ReferenceBackend):
    """PyTorch under a name; serves all but the `refused` type, and notes each op that it runs."""

    def __init__(self, name: str, refused: torch.dtype | None = None) -> None:
        self.name = name
        self.refused = refused
        self.calls: list[str] = []

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return f"no {dtype}" if dtype == self.refused else None

    def __getattribute__(self, name: str) -> Any:
        if name in OPS:
            self.calls.append(name)
        return super().__getattribute__(name)


class Fastest(Tuner):
    """As if measured: takes the candidate of that name."""

    def __init__(self, name: str) -> None:
        super().__init__("tests")
        self._name = name
        self.offered: list[list[str]] = []

    def run(self, key: Any, device: Any, candidates: Any, launch: Callable[[str], Any]) -> Any:
        self.offered.append(candidates())
        return launch(self._name)


@pytest.mark.parametrize("op", OPS)
def test_every_op_runs_on_the_backend_that_was_chosen(op: str) -> None:
    first, second, library = Named("first"), Named("second"), Named("library")
    tuner = Fastest("second")
    arguments = _arguments()[op]
    result = getattr(TunedBackend([first, second], library, tuner), op)(*arguments)
    assert torch.equal(result, getattr(ReferenceBackend(), op)(*arguments))
    assert tuner.offered == [["first", "second", "library"]]
    assert (first.calls, second.calls, library.calls) == ([], [op], [])


def test_without_measuring_the_first_backend_that_serves_is_taken() -> None:
    first, second = Named("first", torch.float32), Named("second")
    tuned = TunedBackend([first, second], Named("library"), Tuner("tests"))
    for _ in range(2):
        tuned.head(*_arguments()["head"])
    assert (first.calls, second.calls) == ([], ["head", "head"])


def test_tuned_serves_what_one_of_its_backends_with_kernels_serves() -> None:
    first, second = Named("first", torch.float32), Named("second", torch.float32)
    cpu = torch.device("cpu")
    tuned = TunedBackend([first, second], Named("library"), Tuner("tests"))
    assert tuned.unsupported(cpu, torch.float16) is None
    reason = tuned.unsupported(cpu, torch.float32)
    assert reason == "'first' cannot: no torch.float32; 'second' cannot: no torch.float32"


def test_training_is_that_of_the_first_backend_that_has_it() -> None:
    backends = [Named("first"), Named("second")]
    assert TunedBackend(backends, Named("library"), Tuner("tests")).training is None
    backends[1].training = object()  # type: ignore[assignment]
    tuned = TunedBackend(backends, Named("library"), Tuner("tests"))
    assert tuned.training is backends[1].training


def test_tuned_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_module, "unavailable", lambda name: f"{name} is not here.")
    with pytest.raises(BackendUnavailableError, match=r"triton is not here\. cuda is not here"):
        tuned_module.create()


# The command


@pytest.fixture
def tuned() -> Iterator[None]:
    with use_backend(
        TunedBackend([Named("ours"), Named("theirs")], Named("library"), Tuner("tuned"))
    ):
        yield


@pytest.mark.usefixtures("tuned")
def test_every_layer_of_a_network_is_accounted_for() -> None:
    network = models.resnet18(num_classes=3)
    seen: list[str] = []

    def progress(names: list[str]) -> Iterator[str]:
        for name in names:
            seen.append(name)
            yield name

    rows = tune.tune(network, torch.randn(3, 3, 32, 32), progress=progress)
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert seen == ["stem", *blocks, "head"]
    calls = sorted((row.decision.key[0], *row.parts) for row in rows)
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
    assert {row.decision.choice for row in rows} == {"ours"}


def test_parts_make_up_the_network() -> None:
    network = models.cifar.resnet20().eval()
    images = torch.randn(2, 3, 32, 32)
    x: Tensor = images
    for _, part in network.parts():
        x = part(x)
    assert torch.equal(x, network(images))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_training_measures_backward_to_everything_but_the_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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


X = Operand((256, 64, 56, 56), None, True)
ONE = Window(Operand((256, 64, 1, 1), None, True), (1, 1), (0, 0), (1, 1), 1)
THREE = Window(Operand((64, 64, 3, 3), None, True), (2, 2), (1, 1), (1, 1), 1)


def _rows() -> list[tune.Row]:
    within = Decision("cuda", ("conv_bn",), "m128n64", {"m128n64": 3e-5, "cudnn": None})
    two = [Decision("cuda", ("conv_bn",), choice, {}) for choice in ("cudnn", "m64n64")]
    separate = Decision("cuda", ("conv_bn_projection",), "separate", {}, two)
    return [
        tune.Row(
            ["layer1.0", "layer1.1"],
            Decision(
                "tuned",
                ("conv_bn", torch.bfloat16, X, ONE, None, True),
                "cuda",
                {"triton": 4e-5, "cuda": 3e-5, "reference": 6e-5},
                [within],
            ),
        ),
        tune.Row(
            ["layer2.0"],
            Decision(
                "tuned",
                ("conv_bn_projection", torch.bfloat16, X, THREE),
                "cuda",
                {"cuda": 9e-5, "triton": None},
                [separate],
            ),
        ),
        tune.Row(["head"], Decision("tuned", ("head", X), "reference", {"reference": 5e-5})),
        tune.Row(["layer2.0"], Decision("triton", ("wgrad", X), "64×64", {})),
    ]


def test_the_table_of_winners() -> None:
    heading, *lines = (re.split(r"\s{2,}", line) for line in tune.table(_rows()).splitlines())
    assert heading == ["layer", "op", "shape", "winner", "µs", "runner-up", "share"]
    image = "256×64×56×56"
    assert lines == [
        [
            "layer2.0", "conv_bn_projection", f"{image}, 64×64×3×3 stride 2,2 padding 1,1",
            "cuda cudnn + cuda m64n64", "90.0", "-", "45.0%",
        ],
        [
            "layer1.0 and 1 more", "conv_bn", f"{image}, 256×64×1×1", "cuda m128n64", "30.0",
            "triton +33%", "30.0%",
        ],
        ["head", "head", image, "reference", "50.0", "-", "25.0%"],
        ["layer2.0", "wgrad", image, "triton 64×64", "-", "-", "-"],
    ]  # fmt: skip


def test_a_single_candidate_takes_what_is_chosen_within() -> None:
    parts = [Decision("cuda", ("conv_bn",), "cudnn", {"cudnn": 2e-5}) for _ in range(2)]
    row = tune.Row(["stem"] * 3, Decision("tuned", ("stem",), "cuda", {}, parts))
    assert row.seconds() == pytest.approx(3 * 2 * 2e-5)


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


def test_too_large_a_batch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def randn(*shape: int, **options: object) -> Tensor:
        assert shape == (4096, 3, 224, 224)
        raise torch.OutOfMemoryError

    monkeypatch.setenv("RESNET_FUSED_TUNE", "on")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    monkeypatch.setattr(backends, "get", lambda name: Named(name))
    monkeypatch.setitem(tune.ARCHITECTURES, "resnet50", torch.nn.Identity)
    monkeypatch.setattr(torch, "randn", randn)
    with pytest.raises(SystemExit, match=r"^4096 images do not fit"):
        tune.main(["--batch", "4096"])


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
    monkeypatch.setattr(Tuner, "_measure_all", lambda *_: pytest.fail("measured again"))
    tune.main(arguments)
    assert capsys.readouterr().out == first
