"""What is particular to the Triton backend: tiles, packs, offset widths, fallbacks, its absence.

That its ops mean what they should is tested for every backend alike in test_ops.py. Here the same
kernels run with tiles smaller than the tensors, interpreted on the CPU and compiled on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import conftest
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from resnet_fused import backends, ops, use_backend
from resnet_fused.backends import Candidate
from resnet_fused.backends import triton as package
from resnet_fused.backends.triton import convolution, launching
from resnet_fused.backends.triton.backend import TritonBackend
from resnet_fused.backends.triton.convolution import conv_bn, conv_bn_projection
from resnet_fused.backends.triton.launching import Config, Launch, Machine
from resnet_fused.backends.triton.stem import stem
from resnet_fused.errors import BackendUnavailableError
from resnet_fused.numerics import cast, check_op, relative_error
from resnet_fused.ops import MaxPool
from resnet_fused.ops.registry import registered
from resnet_fused.parameters import ConvBn, Convolution
from resnet_fused.reference import ops as reference
from resnet_fused.testing.cases import (
    ConvCase,
    generator,
    make_batch_norm,
    make_convolution,
    make_gated_integers,
    make_integers,
    make_residual,
)

# Results of a few hundred elements: one rounding more or less shows in the norm.
NOISE = 1.1


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreted"),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest, dtype: torch.dtype) -> Iterator[str]:
    conftest.require("triton", request.param, dtype)
    with use_backend("triton"):
        yield request.param


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what the backend allocates with NaN, so that an element left unwritten shows."""
    empty = torch.empty

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        tensor = empty(*arguments, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


class _Forced(TritonBackend):
    """The backend with one launch configuration for each op that has several."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def _only(self, run: Callable[..., Tensor]) -> list[Candidate]:
        return launching.candidates(run, [self._config], "")

    def conv_bn(self, *_: Any) -> list[Candidate]:
        return self._only(conv_bn)

    def conv_bn_projection(self, *_: Any) -> list[Candidate]:
        return self._only(conv_bn_projection)

    def stem(self, *_: Any) -> list[Candidate]:
        return self._only(stem)


TILED = {
    "pointwise": ConvCase(2, 40, 5, 7, 40),
    "pointwise strided": ConvCase(2, 24, 9, 6, 40, stride=2),
    "3x3": ConvCase(1, 40, 6, 7, 33, 3, 1, 1),
    "3x3 strided": ConvCase(2, 16, 9, 8, 40, 3, 2, 1),
    "3x3 dilated": ConvCase(1, 17, 9, 8, 16, 3, 1, 2, 2),
    "wide groups": ConvCase(1, 80, 5, 5, 96, 3, 1, 1, groups=2),
    "packed groups": ConvCase(1, 64, 5, 6, 64, 3, 1, 1, groups=16),
    "packed groups of unlike size": ConvCase(1, 18, 7, 5, 36, 3, 2, 1, groups=9),
}


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("warps", [4, 8])
def test_tiles_smaller_than_the_result(
    name: str, warps: int, device: str, dtype: torch.dtype
) -> None:
    """Several tiles in every direction, and several steps; 8 warps because flattened convolution
    loops have been miscompiled there (the interpreter has no warps and runs this once)."""
    if device == "cpu" and warps == 8:
        pytest.skip("the interpreter has no warps")
    case = TILED[name]
    rng = generator()
    x, layer = make_convolution(case, rng, dtype, device)
    residual = make_residual(case, x, rng)
    block_c = 32 if case.groups > 2 else 16
    use_backend(_Forced(Config((16 if device == "cpu" else 64, 16, block_c), warps, 3)))
    check_op(ops.conv_bn, reference.conv_bn, [x, layer, residual, True], noise=NOISE)


def test_tiles_wide_enough_to_be_finished_in_slices(device: str, dtype: torch.dtype) -> None:
    case = ConvCase(1, 16, 5, 5, 150)
    x, layer = make_convolution(case, generator(), dtype, device)
    use_backend(_Forced(Config((32, 128, 16), 4, 2)))
    check_op(ops.conv_bn, reference.conv_bn, [x, layer, None, True], noise=NOISE)
    shortcut, projection = make_convolution(case, generator(1), dtype, device)
    arguments = [x, layer, shortcut, projection]
    check_op(ops.conv_bn_projection, reference.conv_bn_projection, arguments, noise=NOISE)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["3x3", "pointwise"])
def test_every_candidate_is_right(name: str, dtype: torch.dtype) -> None:
    """All tile shapes that tuning may choose, on a shape that fills more than one of each."""
    conftest.require("triton", "cuda", dtype)
    case = {
        "3x3": ConvCase(4, 96, 17, 15, 320, 3, 1, 1),
        "pointwise": ConvCase(4, 576, 17, 15, 320),
    }[name]
    x, layer = make_convolution(case, generator(), dtype, "cuda")
    pool = convolution._FMA if dtype == torch.float32 else convolution._TENSOR_CORE
    for config in pool:
        with pytest.MonkeyPatch.context() as patch, use_backend(_Forced(config)):
            patch.setattr(torch.backends.cudnn, "allow_tf32", False)
            check_op(
                ops.conv_bn,
                reference.conv_bn,
                [x, layer, None, True],
                noise=NOISE,
                what=str(config),
            )


def _arguments(name: str, dtype: torch.dtype, device: str) -> list[Any]:
    """Integer-valued arguments of the op, so that any two ways to compute it agree exactly."""
    rng = generator()
    if name == "conv_bn":
        case = ConvCase(2, 19, 7, 5, 21, 3, 2, 1)
        x, layer = make_integers(case, rng, dtype, device)
        return [x, layer, make_residual(case, x, rng).round_(), True]
    if name == "conv_bn grouped":
        x, layer = make_integers(ConvCase(2, 16, 5, 5, 16, 3, 1, 1, groups=4), rng, dtype, device)
        return [x, layer, None, True]
    if name == "conv_bn_projection":
        main = make_integers(ConvCase(2, 19, 4, 3, 21), rng, dtype, device)
        return [*main, *make_integers(ConvCase(2, 11, 7, 6, 21, stride=2), rng, dtype, device)]
    if name == "stem":
        return [
            *make_integers(ConvCase(2, 3, 19, 21, 20, 7, 2, 3), rng, dtype, device),
            MaxPool(),
        ]
    x, layer = make_integers(ConvCase(2, 19, 5, 4, 19), rng, dtype, device)
    if name == "bn_add_relu":
        return [x, layer.bn, x.clone(), True]
    if name == "squeeze_excite":  # means of 16 values, gates of 0, 1/2 and 1
        return make_gated_integers(x[..., :4, :], 6, rng)
    return [x[..., :4, :], layer.conv.weight[:, :, 0, 0], layer.bn.weight]  # head: 16 positions


OPS = [
    "conv_bn",
    "conv_bn grouped",
    "conv_bn_projection",
    "stem",
    "bn_add_relu",
    "squeeze_excite",
    "head",
]


@pytest.mark.parametrize("name", OPS)
def test_64_bit_offsets_change_nothing(
    name: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = registered[name.split()[0]]
    arguments = _arguments(name, dtype, device)
    narrow = op(*arguments)
    monkeypatch.setattr(launching, "_NARROW_ELEMENTS", 0)
    monkeypatch.setattr(launching, "_plans", {})
    launches = _launches(monkeypatch)
    wide = op(*arguments)
    assert launches
    for launch in launches:
        names = launch.kernel.arg_names[-len(launch.settled) :]
        settled = dict(zip(names, launch.settled, strict=True))
        assert settled["TILE"].is_wide if "TILE" in settled else settled["WIDE"]
    assert torch.equal(wide, narrow)
    assert not torch.isnan(wide).any()


def test_offsets_are_wide_where_a_view_reaches_far() -> None:
    assert not launching.is_wide(torch.zeros(1).expand(2**20, 2**20))  # one element, many times
    far = torch.empty((2, 2**16, 2**15), dtype=torch.int8, device="meta")
    assert launching.is_wide(far)
    assert not launching.is_wide(far[0, : 2**15])


def _launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What is launched from now on."""
    launches: list[Launch] = []
    start = Launch.__call__

    def launch(self: Launch, *tensors: Any) -> None:
        launches.append(self)
        start(self, *tensors)

    monkeypatch.setattr(Launch, "__call__", launch)
    return launches


def _names(launches: list[Launch]) -> list[str]:
    return [launch.kernel.__name__ for launch in launches]


def test_the_stem_and_a_projecting_block_end_are_one_launch_each(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = _launches(monkeypatch)
    ops.stem(*_arguments("stem", dtype, device))
    ops.conv_bn_projection(*_arguments("conv_bn_projection", dtype, device))
    ops.head(*_arguments("head", dtype, device))
    assert _names(launches) == ["stem_kernel", "conv_bn_kernel", "head_kernel"]


PROJECTION_FALLBACKS = {
    "3x3": ConvCase(1, 6, 8, 7, 20, 3, 2, 1),
    "padded": ConvCase(1, 6, 4, 3, 20, padding=1, stride=2),
    "grouped": ConvCase(1, 8, 7, 6, 20, stride=2, groups=4),
}


@pytest.mark.parametrize("name", PROJECTION_FALLBACKS)
def test_other_projections_take_two_launches(
    name: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = generator()
    case = PROJECTION_FALLBACKS[name]
    shortcut, projection = make_convolution(case, rng, dtype, device)
    x, layer = make_convolution(ConvCase(1, 24, *case.output_size, 20, 3, 1, 1), rng, dtype, device)
    launches = _launches(monkeypatch)
    arguments = [x, layer, shortcut, projection]
    # The shortcut is rounded on its way through memory, as PyTorch rounds it.
    check_op(ops.conv_bn_projection, reference.conv_bn_projection, arguments, noise=NOISE)
    assert _names(launches) == ["conv_bn_kernel"] * 2


STEM_FALLBACKS = {
    "other pool": (ConvCase(8, 3, 14, 15, 16, 7, 2, 3), MaxPool(2, 2, 0)),
    "overlapping pool": (ConvCase(8, 3, 14, 15, 16, 3, 1, 1), MaxPool(5, 2, 2)),
    "wide rows": (ConvCase(8, 16, 14, 15, 16, 5, 2, 2), MaxPool()),
    "grouped": (ConvCase(8, 4, 14, 15, 16, 3, 2, 1, groups=2), MaxPool()),
}


@pytest.mark.parametrize("name", STEM_FALLBACKS)
def test_other_stems_are_pooled_apart(
    name: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, pool = STEM_FALLBACKS[name]
    arguments = [*make_convolution(case, generator(), dtype, device), pool]
    launches = _launches(monkeypatch)
    check_op(ops.stem, reference.stem, arguments, noise=NOISE)
    assert _names(launches) == ["conv_bn_kernel"]  # the pooling is PyTorch's


@pytest.mark.parametrize(
    "config",
    [Config((8, 16, 16), 4, 1), Config((16, 8, 32), 8, 2), Config((16, 16, 16), 8, 2)],
    ids=["8x16", "16x8", "16x16"],
)
def test_stem_tiles(config: Config, device: str, dtype: torch.dtype) -> None:
    """Several patches in each direction, the last ones cut, and two channel tiles."""
    use_backend(_Forced(config))
    case = ConvCase(1, 3, 45, 39, 24, 7, 2, 3)
    x, layer = make_convolution(case, generator(), dtype, device)
    check_op(ops.stem, reference.stem, [x, layer, MaxPool()], noise=NOISE)
    conv = layer.conv._replace(dilation=(2, 1), padding=(5, 0), stride=(1, 2))
    check_op(ops.stem, reference.stem, [x, layer._replace(conv=conv), MaxPool()], noise=NOISE)


@pytest.mark.parametrize("pool", [MaxPool(), MaxPool(2, 2, 0)], ids=["fused", "pooled apart"])
def test_not_a_number_passes_the_stem_as_in_pytorch(
    pool: MaxPool, device: str, dtype: torch.dtype
) -> None:
    x, layer = make_integers(ConvCase(1, 3, 24, 22, 16, 7, 2, 3), generator(), dtype, device)
    x[0, 1, 12, 13] = float("nan")
    out = ops.stem(x, layer, pool)
    expected = reference.stem(x, layer, pool)
    assert torch.isnan(out).any()
    assert torch.equal(torch.isnan(out), torch.isnan(expected))
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("relu", [False, True])
def test_infinities_stay_infinite(relu: bool, device: str, dtype: torch.dtype) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], device=device)
    x = x.to(dtype).reshape(4, 1, 1, 1).repeat(1, 5, 1, 1)
    bn = make_batch_norm(5, generator(), dtype, device)
    out = ops.bn_add_relu(x, bn, None, relu)
    expected = reference.bn_add_relu(x, bn, None, relu)
    infinite = torch.isinf(expected)
    assert torch.equal(out[infinite], expected[infinite])
    assert torch.equal(torch.isnan(out), torch.isnan(expected))


def test_parameters_in_another_dtype_than_the_input(device: str, dtype: torch.dtype) -> None:
    """Whole numbers, which all dtypes hold, so that the results are equal bit for bit."""
    x, layer = make_integers(ConvCase(2, 16, 5, 5, 16), generator(), dtype, device)
    expected = ops.conv_bn(x, layer, None, True)
    for other in (torch.float16, torch.float32, torch.float64):
        mixed = layer._replace(bn=cast(layer.bn, other))
        assert torch.equal(ops.conv_bn(x, mixed, None, True), expected)


def test_the_same_bits_every_time(device: str, dtype: torch.dtype) -> None:
    x, layer = make_convolution(ConvCase(2, 48, 9, 9, 40, 3, 1, 1), generator(), dtype, device)
    first = ops.conv_bn(x, layer, None, True)
    for _ in range(3):
        assert torch.equal(ops.conv_bn(x, layer, None, True), first)


def test_the_same_bits_in_every_layout(device: str, dtype: torch.dtype) -> None:
    """A plan may lay images out before the stem that an ordinary forward gives it as they are."""
    x, layer = make_convolution(ConvCase(2, 3, 24, 22, 16, 7, 2, 3), generator(), dtype, device)
    use_backend(_Forced(Config((16, 16, 16), 8, 2)))
    x = x.to(memory_format=torch.channels_last)
    assert torch.equal(ops.stem(x, layer, MaxPool()), ops.stem(x.contiguous(), layer, MaxPool()))


def test_a_batch_norm_is_read_live(device: str, dtype: torch.dtype) -> None:
    x, layer = make_integers(ConvCase(1, 16, 4, 4, 16), generator(), dtype, device)
    before = ops.conv_bn(x, layer, None, False)
    assert layer.bn.bias is not None
    layer.bn.bias.data.add_(1)
    layer.conv.weight.data.neg_()
    assert torch.equal(
        ops.conv_bn(x, layer, None, False),
        reference.conv_bn(x, layer, None, False),
    )
    assert not torch.equal(before, ops.conv_bn(x, layer, None, False))


@pytest.fixture
def _tf32_settings() -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    yield
    cudnn.allow_tf32, matmul.allow_tf32 = before


@pytest.mark.usefixtures("_tf32_settings")
def test_tf32_only_where_the_settings_allow_it() -> None:
    for allowed, expected in ((False, "ieee"), (True, "tf32")):
        torch.backends.cudnn.allow_tf32 = allowed
        torch.backends.cuda.matmul.allow_tf32 = not allowed
        assert launching.convolution_precision(torch.float32) == expected
        assert launching.matmul_precision(torch.float32) != expected
        assert launching.convolution_precision(torch.float16) == "ieee"
        assert launching.matmul_precision(torch.bfloat16) == "ieee"


@pytest.mark.usefixtures("_tf32_settings")
def test_tf32_rounds_operands_to_nearest(device: str, dtype: torch.dtype) -> None:
    """Tensor cores cut off what TF32 cannot hold; the interpreter, which multiplies in float32,
    shows what they are given."""
    if dtype != torch.float32:
        pytest.skip("TF32 is a format for products of float32")
    torch.backends.cudnn.allow_tf32 = True
    x, layer = make_convolution(ConvCase(1, 32, 6, 5, 16, 3, 1, 1), generator(), device=device)
    layer.conv.weight[0, 0] = torch.tensor([1 + 2**-11, -1 - 2**-11, 2**-10 + 2**-22])

    def rounded(values: torch.Tensor) -> torch.Tensor:
        bits = values.contiguous().view(torch.int32)
        return ((bits + 0x1000) & -0x2000).view(torch.float32).reshape(values.shape)

    conv = layer.conv._replace(weight=rounded(layer.conv.weight))
    wide = cast([rounded(x), ConvBn(conv, layer.bn)], torch.float64)
    expected = reference.conv_bn(*wide, None, False)
    found = ops.conv_bn(x, layer, None, False)
    assert relative_error(found, expected) < 1e-6
    plain = reference.conv_bn(*cast([x, layer], torch.float64), None, False)
    assert relative_error(plain, expected) > 1e-5


def test_unsupported_tensors_are_named() -> None:
    if reason := backends.unavailable("triton"):
        pytest.skip(reason)
    backend = package.create()
    assert "float64" in str(backend.unsupported(torch.device("cpu"), torch.float64))
    if not torch.cuda.is_available():
        assert backend.unsupported(torch.device("cpu"), torch.float32) is None
        assert "bfloat16" in str(backend.unsupported(torch.device("cpu"), torch.bfloat16))
        assert "interprets CPU" in str(backend.unsupported(torch.device("meta"), torch.float32))


def test_without_triton_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="pip install triton"):
        package.create()


def test_without_gpu_and_interpreter_the_error_says_what_is_missing() -> None:
    script = (
        "import os, resnet_fused\n"
        "os.environ['CUDA_VISIBLE_DEVICES'] = ''\n"
        "try:\n"
        "    resnet_fused.use_backend('triton')\n"
        "except resnet_fused.errors.BackendUnavailableError as error:\n"
        "    print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert "needs a CUDA GPU" in result.stdout
    assert "TRITON_INTERPRET=1" in result.stdout


@pytest.mark.gpu
def test_in_a_cuda_graph_and_on_another_stream(dtype: torch.dtype) -> None:
    """Capturing neither measures nor synchronises, and replays read parameters live."""
    x, layer = make_integers(ConvCase(2, 64, 9, 9, 64, 3, 1, 1), generator(), dtype, "cuda")
    with use_backend("triton"):
        expected = ops.conv_bn(x, layer, None, True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out = ops.conv_bn(x, layer, None, True)
        stream.synchronize()
        assert torch.equal(out, expected)
        graph = torch.cuda.CUDAGraph()
        unseen = x[:1]  # a batch that nothing was measured for
        with torch.cuda.graph(graph):
            out = ops.conv_bn(unseen, layer, None, True)
        graph.replay()
        assert torch.equal(out, expected[:1])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one(dtype: torch.dtype) -> None:
    x, layer = make_integers(ConvCase(1, 16, 5, 5, 16), generator(), dtype, "cuda:1")
    with use_backend("triton"):
        out = ops.conv_bn(x, layer, None, True)
    assert out.device == x.device
    assert torch.equal(out, reference.conv_bn(x, layer, None, True))


H200 = Machine(132, 227 * 1024)
B200 = Machine(148, 227 * 1024, tensor_memory=True)


def test_candidates_fit_the_machine_and_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    gemm = convolution.Gemm(rows=256 * 56 * 56, columns=64, channels=64)
    small = Machine(20, 99 * 1024)
    for limits in (H200, B200, small):
        found = _configurations(monkeypatch, limits, gemm, taps=9)
        assert len(found) > 1
        assert len(set(found)) == len(found)
        for (block_m, block_n, block_c), _, stages in found:
            assert block_n <= 64
            assert block_c <= 64
            assert stages * (block_m + block_n) * block_c * 2 <= limits.shared_bytes


def _configurations(
    monkeypatch: pytest.MonkeyPatch, limits: Machine, gemm: convolution.Gemm, taps: int = 1
) -> list[Config]:
    monkeypatch.setattr(launching, "machine", lambda _: limits)
    like = torch.empty(0, dtype=torch.float16)
    return convolution.configurations(gemm, like, "ieee", taps)


def test_a_pack_of_groups_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the type and the size: a later step would read weights of other channels."""
    monkeypatch.setattr(launching, "machine", lambda _: H200)
    for images in (1, 64):
        for dtype in (torch.float32, torch.float16):
            x = torch.empty(images, 128, 56, 56, dtype=dtype, device="meta")
            weight = torch.empty(128, 4, 3, 3, dtype=dtype, device="meta")
            conv = Convolution(weight, (1, 1), (1, 1), (1, 1), 32)
            _, gemm = convolution.packing(x, conv)
            listed = convolution.list_conv_bn(x, ConvBn(conv, make_batch_norm(128, generator())))
            assert len(listed) > 1
            for candidate in listed:
                assert candidate.launch.args[0].blocks[2] >= gemm.channels == 32, candidate.name


@pytest.mark.parametrize("fences", [True, False])
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_products_of_warp_groups_are_left_out_without_fences(
    capability: int, fences: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "fences_products", lambda: fences)
    limits = Machine.of(100, 99 * 1024, capability)
    replaced = not fences and capability in (90, 100)
    assert limits.architecture == ("sm89" if replaced else None)
    assert limits.tensor_memory == (fences and capability == 100)
    assert limits.converts_e4m3 == (capability >= 90 and not replaced)
    monkeypatch.setattr(launching, "machine", lambda _: limits)
    config = Config((16, 16, 16), 4, 2)
    kernel = SimpleNamespace(__name__="kernel", arg_names=["x", "n"])
    launch = Launch(kernel, (1,), config, torch.device("meta"), n=1)
    assert launch.options.get("arch") == limits.architecture


def test_which_tritons_fence_products(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"3.5.1": False, "3.6.0": False, "3.7.0+git": False, "3.7.1": True, "3.10.0": True}
    for version, fences in versions.items():
        monkeypatch.setattr(backends.metadata, "version", lambda _, version=version: version)
        assert backends.fences_products.__wrapped__() == fences, version


def test_the_heuristic_spreads_small_problems_over_the_sms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gemm = convolution.Gemm(rows=49, columns=2048, channels=512)
    (block_m, block_n, _), _, _ = _configurations(monkeypatch, H200, gemm)[0]
    assert -(-49 // block_m) * -(-2048 // block_n) >= 64


def test_the_heuristic_takes_large_tiles_for_large_problems(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gemm = convolution.Gemm(rows=256 * 14 * 14, columns=256, channels=256)
    found = _configurations(monkeypatch, H200, gemm, taps=9)
    assert found[0] == Config((128, 256, 64), 8, 3)


def test_tiles_alone_on_an_sm_copy_further_ahead_of_tcgen05(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gemm = convolution.Gemm(rows=256 * 14 * 14, columns=256, channels=256)
    found = _configurations(monkeypatch, B200, gemm, taps=9)
    assert found[0] == Config((128, 256, 64), 8, 4)
    assert Config((128, 128, 64), 8, 3) in found  # two of them share an SM


def test_names_of_candidates_are_short_and_unlike() -> None:
    conftest.require("triton", "cpu", torch.float32)
    with use_backend("triton"):
        backend = package.create()
        x, layer = make_convolution(
            ConvCase(2, 64, 9, 9, 64, 3, 1, 1), generator(), torch.float32, "cpu"
        )
        listed = backend.conv_bn(x, layer, None, True)
    assert [c.name for c in listed] == ["triton 128x64x64 w4 s1"]
    assert {c.family for c in listed} == {"triton conv_bn"}
