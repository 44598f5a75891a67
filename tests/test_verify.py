"""No kernel wins unchecked: faults planted in candidates exclude them, and results stay right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused import ops, settings, use_backend
from resnet_fused.backends import Candidate, autotune
from resnet_fused.backends.autotune import Tuner, verify
from resnet_fused.backends.autotune.cache import FILE
from resnet_fused.backends.reference import ReferenceBackend
from resnet_fused.reference import ops as reference
from resnet_fused.reference import quantized
from resnet_fused.reference.quantized import FLOAT8
from resnet_fused.testing.cases import ConvCase, generator, make_convolution, make_residual
from resnet_fused.testing.quantized_cases import make_quantized_conv

CASE = ConvCase(2, 16, 7, 6, 24, 3, 1, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of measured times, with a cache folder of each test's own."""
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("RESNET_FUSED_TUNE", "on")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return settings.cache_directory() / FILE


def new_tuner(machine: str = "Imaginary 1000") -> Tuner:
    """As a new process has it on that machine; the candidate that is measured first is fastest."""
    seconds = iter(range(1, 100))
    return Tuner(
        clock=lambda: 0.0,
        measure=lambda call, device: call() is None or float(next(seconds)),
        passed=lambda family, device: True,
        environment=lambda device: (machine,),
        device_type="cpu",
    )


Fault = Callable[[Tensor], Tensor]


def rounded_more_often(out: Tensor) -> Tensor:
    for factor in (1.1, 1.3, 1.7):
        out = out * factor * (1 / factor)
    return out


def one_wrong_element(out: Tensor) -> Tensor:
    out = out.clone()
    out[-1, -1, -1, -1] += 1
    return out


def raises(out: Tensor) -> Tensor:
    raise RuntimeError("too many resources requested for launch")


def partly_written(out: Tensor) -> Tensor:
    """An eighth is not written, in memory that holds a copy of the right result."""
    held = torch.empty_like(out)
    held.copy_(out)
    del held
    ours = torch.empty_like(out)
    ours[:, out.shape[1] // 8 :] = out[:, out.shape[1] // 8 :]
    return ours


def not_written(out: Tensor) -> Tensor:
    held = out.clone()
    del held
    return torch.empty_like(out)


def too_small(out: Tensor) -> Tensor:
    return out[:, :, :-1]


def too_wide(out: Tensor) -> Tensor:
    return out.float()


def two_results(out: Tensor) -> Any:
    return out, out


FAULTS: dict[Fault, str] = {
    rounded_more_often: r"result 0 has an error of \d\.\d+e-0\d where \d\.\d+e-0\d is allowed",
    one_wrong_element: r"result 0 has an error of \d\.\d+e-0\d where \d\.\d+e-0\d is allowed",
    raises: r"RuntimeError: too many resources requested for launch",
    partly_written: r"result 0 has 252 of 2016 elements that are NaN or unwritten",
    not_written: r"result 0 has 2016 of 2016 elements that are NaN or unwritten",
    too_small: r"is torch.bfloat16 of shape \(2, 24, 6, 6\) instead of .* shape \(2, 24, 7, 6\)",
    too_wide: r"result 0 is torch.float32 of shape .* instead of torch.bfloat16",
    two_results: r"ValueError: .*",
}


class Planted(ReferenceBackend):
    """Two kernels for each convolution, the preferred one with a fault."""

    name = "planted"

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.ran: list[str] = []

    def _launch(self, name: str, fault: Fault) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            self.ran.append(name)
            return fault(reference.conv_bn(*arguments))

        return run

    def conv_bn(self, *arguments: Any) -> list[Candidate]:
        return [
            Candidate("planted fast", self._launch("fast", self.fault), "planted fast"),
            Candidate("planted right", self._launch("right", lambda out: out), "planted right"),
        ]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_faulty_candidate_is_excluded_with_one_warning_and_for_good(
    fault: Fault, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = generator()
    x, layer = make_convolution(CASE, rng, torch.bfloat16)
    residual = make_residual(CASE, x, rng)
    expected = reference.conv_bn(x, layer, residual, True)
    backend = Planted(fault)

    def run(machine: str = "Imaginary 1000") -> None:
        monkeypatch.setattr(autotune, "choose", new_tuner(machine).choose)
        with torch.inference_mode(), use_backend(backend):
            for _ in range(2):
                backend.ran.clear()
                assert torch.equal(ops.conv_bn(x, layer, residual, True), expected)
                assert backend.ran[-1] == "right"
        assert backend.ran == ["right"]

    with pytest.warns(UserWarning, match="excluded") as caught:
        run()
    (warning,) = caught
    message = str(warning.message)
    for part in (
        "candidate 'planted fast' is excluded on this machine: ",
        "for Imaginary 1000|conv_bn|torch.bfloat16|2×16×7×6|24×16×3×3 padding 1,1|2×24×7×6|True",
        "Results stay right, by another candidate; please report this line.",
    ):
        assert part in message
    assert re.search(FAULTS[fault], message)
    (times,) = json.loads(cache.read_text())["entries"].values()
    assert re.search(FAULTS[fault], times["planted fast"])
    assert isinstance(times["planted right"], float)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.fault = lambda out: pytest.fail("tried again")
        run()
    backend.fault = fault
    with pytest.warns(UserWarning, match="for Imaginary 2000"):
        run("Imaginary 2000")


def test_where_all_are_faulty_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    class AllPlanted(Planted):
        def conv_bn(self, *arguments: Any) -> list[Candidate]:
            pytorch = Candidate("pytorch", reference.conv_bn)
            return [*super().conv_bn(*arguments)[:1], pytorch]

    arguments = make_convolution(CASE, generator(), torch.bfloat16)
    monkeypatch.setattr(autotune, "choose", new_tuner().choose)
    with use_backend(AllPlanted(one_wrong_element)), pytest.warns(UserWarning, match="excluded"):
        assert torch.equal(ops.conv_bn(*arguments), reference.conv_bn(*arguments, None, False))


def coarse(x: Tensor) -> Tensor:
    """Three times x; in float32, with an error as if it were stored in ten bits."""
    return 3 * x if x.dtype == torch.float64 else (3 * x * 1024).round() / 1024


def choose_by_error(factor: float = 1.0, at_worst: float = 0.0, name: str = "ours") -> str:
    """The choice where PyTorch computes `coarse`, and a faster candidate with `factor` times its
    error, and with one element off by `at_worst` times its worst one."""
    x = torch.randn(4, 8, 32, 32, generator=generator())
    truth, eager = coarse(x.double()), coarse(x)
    error = eager - truth

    def ours(x: Tensor) -> Tensor:
        out = truth + factor * error
        if at_worst:
            out[0, 0, 0, 0] = truth[0, 0, 0, 0] + at_worst * error.abs().max()
        return out.float()

    listed = [Candidate(name, ours, "family"), Candidate("pytorch", coarse)]
    return new_tuner().choose("op", (x,), lambda: listed, coarse, per_image=True).name


def _fault_of_sums(factor: float, rng: torch.Generator) -> str | None:
    """That of 64 numbers with errors of their own, `factor` times PyTorch's in size."""
    truth, *errors = torch.randn(3, 2, 32, generator=rng).double()
    eager, ours = (truth + f * 1e-4 * e for f, e in zip((1, factor), errors, strict=True))

    def reference(x: Tensor) -> Tensor:
        return truth if x.dtype == torch.float64 else eager.float()

    return verify.Check(reference, [eager.float()], False).fault(lambda x: ours.float())


def test_chance_does_not_exclude_sums() -> None:
    """The errors of few numbers differ by more than a tenth now and then, if equal in kind."""
    rng = generator()
    faults = [_fault_of_sums(1.0, rng) or "" for _ in range(200)]
    assert sum("an error of" in fault for fault in faults) <= 1
    assert sum(_fault_of_sums(2.0, rng) is not None for _ in range(200)) > 190


def test_what_is_within_the_bound_by_a_hair_is_not_excluded() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_by_error(1.09) == "ours"
        assert choose_by_error(1.0, 1.9, "with one element twice as bad") != "pytorch"
    with pytest.warns(UserWarning, match="error of"):
        assert choose_by_error(1.13, 0.0, "beyond") == "pytorch"


def test_one_element_that_no_norm_shows_is_found() -> None:
    """0.01 off, in one of 32,768 elements, where PyTorch's own are up to 0.0005 off."""
    with pytest.warns(UserWarning, match=r"element that is .* off where 9\.\d+e-04 is allowed"):
        assert choose_by_error(0.9, 20.0) == "pytorch"


def test_what_pytorch_computes_exactly_may_be_a_few_roundings_off() -> None:
    x = torch.randn(4, 8, 32, 32, generator=generator())

    def off(roundings: float) -> Callable[[Tensor], Tensor]:
        """In the norm; evenly, so that no element stands out."""
        relative = (roundings / 3) ** 0.5 * torch.finfo(torch.float32).eps / 2
        return lambda x: (x.double() * (1 + relative)).to(x.dtype)

    for roundings, chosen in ((5.0, "5.0"), (7.0, "pytorch")):
        listed = [
            Candidate(str(roundings), off(roundings), "family"),
            Candidate("pytorch", torch.Tensor.clone),
        ]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = new_tuner().choose(
                "op", (x.double(),), lambda listed=listed: listed, torch.Tensor.clone
            )
        assert found.name == chosen
        assert len(caught) == (chosen == "pytorch")


def test_truth_is_computed_a_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, int]] = []

    def doubled(x: Tensor, residual: Tensor | None) -> Tensor:
        seen.append((x.dtype, len(x)))
        return 2 * x + residual

    monkeypatch.setattr(verify, "CHUNK_ELEMENTS", 4 * 8 * 3)
    x, residual = torch.randn(2, 5, 2, 4, 3).unbind()
    wrong = Candidate("wrong", lambda x, residual: 2 * x, "family")
    listed = [wrong, Candidate("pytorch", doubled)]
    with pytest.warns(UserWarning, match="'wrong' is excluded"):
        new_tuner().choose("op", (x, residual), lambda: listed, doubled, per_image=True)
    assert seen[:2] == [(torch.float64, 4), (torch.float64, 1)]
    assert (torch.float32, 5) in seen


def test_a_check_imports_no_compiler() -> None:
    """PyTorch's own switch of its deterministic mode does, which takes seconds of a first call."""
    script = """
import sys, torch
from resnet_fused.backends.autotune.verify import Check
assert Check(torch.abs, [torch.ones(2, 3)], False).fault(lambda x: torch.empty_like(x))
assert Check(torch.abs, [torch.ones(2, 3)], False).fault(torch.abs) is None
assert "torch._inductor" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_warnings_of_the_deterministic_mode_are_not_shown() -> None:
    x = torch.ones(2, 3)
    messages = (
        "max_pool2d_with_indices_backward_cuda does not have a deterministic implementation, but",
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)`",
        "something else",
    )

    def launch(x: Tensor) -> Tensor:
        for message in messages:
            warnings.warn(message, stacklevel=1)
        return x.abs()

    check = verify.Check(torch.abs, [x], per_image=False)
    with pytest.warns(UserWarning, match="something else") as caught:
        assert check.fault(launch) is None
    assert len(caught) == 1


def test_settings_of_pytorch_are_as_before_a_check() -> None:
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]

    def state() -> tuple[bool, bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        )

    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        before = state()
        for fault in (raises, not_written):
            listed = [Candidate(fault.__name__, fault, "family"), Candidate("pytorch", abs)]
            with pytest.warns(UserWarning, match="excluded"):
                new_tuner().choose("op", (torch.ones(2, 3),), lambda listed=listed: listed, abs)
            assert state() == before
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@pytest.mark.parametrize("shortcut", ["none", "projection"])
def test_results_in_e4m3_are_held_to_their_one_rounding(shortcut: str) -> None:
    """The truth is not rounded: a sum in float32 may end as the next number where it lies half way,
    and three hundredths more of every value may not pass."""
    case = CASE._replace(channels=64, height=12, width=12)
    arguments = make_quantized_conv(case, generator(), shortcut, FLOAT8, relu=False)
    check = verify.Check(quantized.quantized_conv, arguments, per_image=True)
    assert check.is_possible()
    assert check.fault(quantized.quantized_conv) is None

    def scaled(factor: float) -> Callable[..., Tensor]:
        def launch(x: Tensor, layer: Any, *others: Any) -> Tensor:
            layer = layer._replace(multiplier=layer.multiplier * factor)
            return quantized.quantized_conv(x, layer, *others)

        return launch

    nearly = scaled(1 + 2**-10)
    right = quantized.quantized_conv(*arguments)
    assert not torch.equal(nearly(*arguments).view(torch.uint8), right.view(torch.uint8))
    assert check.fault(nearly) is None
    assert "an error of" in str(check.fault(scaled(33 / 32)))
