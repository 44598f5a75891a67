"""Launches: what the first one compiles, later ones start with the same arguments; and candidates
of the training pieces, as the choice checks them."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from resnet_fused import backends
from resnet_fused.backends import autotune, recording
from resnet_fused.backends.autotune.verify import Check
from resnet_fused.backends.triton import launching
from resnet_fused.backends.triton.launching import Config, Launch
from resnet_fused.parameters import Activation, BatchNorm, Convolution, Folded
from resnet_fused.reference import quantized as reference
from resnet_fused.reference.quantized import FLOAT8
from resnet_fused.testing.cases import ConvCase, generator
from resnet_fused.testing.quantized_cases import (
    in_whole_numbers,
    make_quantized_conv,
    make_quantized_head,
    make_quantized_images,
)

ROOT = Path(__file__).resolve().parents[1]
_FUNCTION, _LAUNCH_METADATA = 4, 6  # their places among the arguments of Triton's launcher


def test_later_launches_take_what_the_first_one_compiled() -> None:
    """A driver without a GPU notes what it is asked to start; not interpreted, so in a process of
    its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert result.returncode == 0, result.stderr


def test_a_recorded_launch_takes_other_addresses_and_holds_no_tensor() -> None:
    """Tensors in groups, whose numbers and gaps stay as they were."""
    recorded: list[tuple[Callable[..., None], list[Any]]] = []
    started: list[tuple[Any, ...]] = []
    kernel = SimpleNamespace(__name__="kernel", arg_names=["x", "bn", "out", "N"])
    launch = Launch(kernel, (1,), Config((), 4, 1), torch.device("cpu"), N=7)
    launch._compiled = lambda *arguments: started.append(arguments)
    x, out, mean, weight, bias = (torch.zeros(3) for _ in range(5))
    given = BatchNorm(mean, None, weight, bias, 0.5)  # type: ignore[arg-type]
    recorder = SimpleNamespace(add_call=lambda *call: recorded.append(call))
    token = recording.recorder.set(recorder)
    try:
        launch(x, given, out)
    finally:
        recording.recorder.reset(token)
    (replay, described), tensors = recorded.pop(), [x, mean, weight, bias, out]
    assert [address for address, *_ in described] == [t.data_ptr() for t in tensors]
    replay(1, 2, 3, 4, 5)
    assert started == [(x, given, out, 7), (1, BatchNorm(2, None, 3, 4, 0.5), 5, 7)]  # type: ignore
    held = [weakref.ref(tensor) for tensor in tensors]
    started.clear()
    del x, out, mean, weight, bias, given, tensors, described
    assert [ref() for ref in held] == [None] * 5


def _unaligned(tensor: Tensor) -> Tensor:
    """The same, which begins an element behind an aligned address."""
    return torch.cat([tensor[:1], tensor])[1:]


@pytest.mark.parametrize("dtype", [torch.uint8, FLOAT8], ids=["int8", "e4m3"])
def test_launches_are_planned_for_what_the_caller_gives(dtype: torch.dtype) -> None:
    """Vectors of quantised ops where it pleases them, and a border's numbers or none; the fixture
    that watches launches says what is wrong."""
    from conftest import require  # which asks for the interpreter, as other tests must not

    require("triton", "cpu", dtype)
    rng = generator()
    for channels, kernel in ((3, 3), (16, 3)):  # those of few channels have a bordered copy
        case = ConvCase(1, channels, 5, 5, 16, kernel, 1, 1)
        arguments = make_quantized_conv(case, rng, "none", dtype, padding_value=True)
        x, layer, *rest = in_whole_numbers(arguments) if dtype == FLOAT8 else arguments
        given = [layer, layer._replace(padding_value=None)]
        given += [g._replace(multiplier=_unaligned(g.multiplier)) for g in given]
        given += [g._replace(bias=_unaligned(g.bias)) for g in given]
        for changed in given:
            _assert_exact("quantized_conv", x, changed, *rest)
    x, weight, bias, multiplier = make_quantized_head(1, 16, 3, 8, rng, dtype)
    for vectors in ((bias, multiplier), (_unaligned(bias), _unaligned(multiplier))):
        _assert_exact("quantized_head", x, weight, *vectors)
    images, quantization, float8 = make_quantized_images(
        (1, 4, 3, 3), rng, torch.uint8, dtype == FLOAT8
    )
    for found in (quantization, type(quantization)(*map(_unaligned, quantization))):
        _assert_exact("quantized_images", images, found, float8)


def _assert_exact(op: str, *arguments: Any) -> None:
    """Triton's result has the reference's bits."""
    found = getattr(backends.get("triton"), op)(*arguments)[0].launch(*arguments)
    right = getattr(reference, op)(*arguments)
    torch.testing.assert_close(found.float(), right.float(), rtol=0, atol=0)


def test_plans_of_sizes_that_never_repeat_take_bounded_memory() -> None:
    plans = launching._plans
    plan = launching.planned(lambda size: f"for {size}")
    for size in (*range(5000), 0):
        assert plan(size) == f"for {size}"
    assert len(plans) < 5000
    plans.clear()


def test_what_a_captured_graph_computes_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be read before the graph has run; what is kept is computed, for other streams."""
    from resnet_fused.backends.live_cache import LiveCache
    from resnet_fused.backends.triton import launching

    waited = []
    stream = SimpleNamespace(synchronize=lambda: waited.append(True))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    weight = torch.ones(2, 16, 1, 1, dtype=torch.int8)
    cache: LiveCache[int] = LiveCache(SimpleNamespace(), frozen=True)  # type: ignore[arg-type]
    packed = iter(range(9))
    on_gpu = SimpleNamespace(is_cuda=True, device="cuda:0")
    keeps = recording.may_keep
    monkeypatch.setattr(recording, "may_keep", lambda _: keeps(on_gpu))  # type: ignore[arg-type]
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        launching.made_of(weight, (), lambda: next(packed))
        cache.get(weight, "form", lambda: next(packed))
        assert len(waited) == (0 if capturing else 2)
    assert launching.made_of(weight, (), lambda: next(packed)) == 2
    assert cache.get(weight, "form", lambda: next(packed)) == 3


def test_what_is_made_of_a_weight_goes_with_its_data() -> None:
    """Which moves no version counter."""
    from resnet_fused.backends.triton import launching

    weight = torch.ones(2, 16, 1, 1, dtype=torch.int8)
    assert launching.made_of(weight, (), lambda: int(weight.sum())) == 32
    weight.data = torch.zeros_like(weight)
    assert launching.made_of(weight, (), lambda: int(weight.sum())) == 0


def test_folded_gradients_of_a_block_that_is_frozen_in_part() -> None:
    """Blocks of one shape, of which one trains, one normalises by frozen statistics and one trains
    nothing, and one whose weight is of the activations' type."""
    from conftest import require

    require("triton", "cpu", torch.float16)
    from resnet_fused.backends.triton.training_ends import folded_gradients

    x = torch.randn(2, 16, 3, 3).half().contiguous(memory_format=torch.channels_last)
    conv = Convolution(torch.randn(32, 16, 1, 1))
    scale_shift, coefficients, sums = torch.rand(6, 32), torch.rand(4, 32), torch.rand(1, 2, 32)
    gradient, products = torch.randn(32, 16, 1, 1), torch.randn(33, 16)

    def weight_gradient(kept: Tensor | None, of: Tensor | None, conv: Convolution) -> Any:
        end = Folded(x, conv, scale_shift)
        return folded_gradients(of, kept, sums, coefficients, end, kept is None)[0]

    half = conv._replace(weight=conv.weight.half())
    trained = weight_gradient(products, gradient, conv)
    frozen = weight_gradient(None, gradient, conv)
    torch.testing.assert_close(frozen, coefficients[0][:, None, None, None] * gradient)
    assert not torch.equal(trained, frozen)
    assert weight_gradient(None, None, conv) is None
    torch.testing.assert_close(weight_gradient(products, gradient, half), trained.half())


class _Utils:
    def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
        return object(), object(), 0, 0, 1024  # module, function

    def unload_module(self, module: object) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}


class _Driver:
    """As much of a driver as compiling and launching asks for; GPUs are those of sm_90."""

    def __init__(self) -> None:
        self.utils = _Utils()
        self.started: list[tuple[Any, ...]] = []

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *arguments: self.started.append(arguments)


def _worker() -> None:
    import triton

    from resnet_fused.backends.triton import elementwise, training_convolution
    from resnet_fused.backends.triton.launching import Config

    driver = _Driver()
    triton.runtime.driver.set_active(driver)
    x, shift = torch.zeros(2, 32, 6, 6, dtype=torch.float16), torch.zeros(33)
    conv = Convolution(torch.zeros(32, 32, 3, 3, dtype=torch.float16), (1, 1), (1, 1), (1, 1), 1)

    def both(aligned: bool) -> None:
        vector = shift[:32] if aligned else shift[1:]
        elementwise.bn_add_relu(x, BatchNorm(vector, vector, None, vector, 0.5), None, True)
        config = Config((32, 32, 32), 4, 2)
        training_convolution.conv_stats(config, x, conv, True)
        training_convolution.conv_stats(config, x, conv, False)

    both(True)
    first = [_facts(call) for call in driver.started]
    assert len(first) == 3
    jitted = triton.runtime.jit.JITFunction.run
    triton.runtime.jit.JITFunction.run = None  # type: ignore[method-assign]  # nobody looks up again
    both(True)
    assert [_facts(call) for call in driver.started[3:]] == first
    triton.runtime.jit.JITFunction.run = jitted  # type: ignore[method-assign]
    both(False)  # what is aligned otherwise is another kernel
    assert driver.started[6][_FUNCTION] is not driver.started[0][_FUNCTION]


def _facts(call: tuple[Any, ...]) -> list[Any]:
    """A call without what differs from launch to launch: what hooks get, and where tensors lie."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.shape, value.data_ptr() % 16
        return tuple(map(plain, value)) if isinstance(value, tuple) else value

    return [plain(value) for i, value in enumerate(call) if i != _LAUNCH_METADATA]


class _Pieces(NamedTuple):
    """Arguments of the pieces around one convolution."""

    activation: Activation
    conv: Convolution
    g: Tensor
    add: Tensor


def _pieces(kernel: int, stride: int, dtype: torch.dtype) -> _Pieces:
    rng = generator()

    def image(*shape: int) -> Tensor:
        found = torch.randn(shape, generator=rng).to(dtype)
        return found.contiguous(memory_format=torch.channels_last)

    def vectors(*scales: float) -> Tensor:
        rows = [1 + s * torch.randn(32, generator=rng) for s in scales]
        return torch.stack(rows)

    x = image(4, 32, 12, 12)
    weight = torch.randn(32, 32, kernel, kernel, generator=rng) / (6 * kernel)
    padding = kernel // 2
    conv = Convolution(weight, (stride,) * 2, (padding,) * 2, (1, 1), 1)
    p, q = conv.output_size(12, 12)
    activation = Activation(x, vectors(0.1, 0.3, 0.1, 0.1, 0.1, 0.0))
    return _Pieces(activation, conv, image(4, 32, p, q), image(4, 32, 12, 12))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 2)])
def test_candidates_of_pieces_pass_the_check_of_the_choice(
    kernel: int, stride: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a GPU would have them all excluded: parts of statistics are compared merged."""
    from conftest import require  # which asks for the interpreter, as the other test must not

    require("triton", "cpu", dtype)
    from resnet_fused.backends.triton.training import TritonTraining

    faults: dict[str, str | None] = {}

    def choose(piece: str, arguments: Any, listed: Any, reference: Any, among: Any) -> Any:
        check = Check(reference, arguments, per_image=False)
        assert check.is_possible()
        first = listed()[0]
        faults[f"{piece} {len(faults)}"] = check.fault(first.launch)
        return first

    monkeypatch.setattr(autotune, "choose", choose)
    kernels = TritonTraining()
    below, conv, g, add = _pieces(kernel, stride, dtype)
    kernels.conv_stats(add, conv, False)
    kernels.dgrad(g, conv, add.shape, below, None)
    kernels.dgrad(g, conv, add.shape, None, add)
    kernels.wgrad(g, add, conv)
    assert len(faults) == 4
    assert not any(faults.values()), faults


if __name__ == "__main__":
    _worker()
