"""The training ops: results and gradients by the numerics contract, registration, statistics.

Without a GPU the Triton kernels run interpreted, slowly: shapes are small.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import require
from torch import Tensor

from resnet_fused import use_backend
from resnet_fused.backends.training import FoldedEnds
from resnet_fused.numerics import relative_error
from resnet_fused.ops import (
    Convolution,
    Layer,
    MaxPool,
    block_training,
    residual_block_training,
    stem_training,
)
from resnet_fused.ops.dispatch import chosen_backend
from resnet_fused.ops.training_layers import flatten
from resnet_fused.parameters import COUNT, MEAN, UNBIASED_VAR, Folded
from resnet_fused.reference.training import ReferenceTraining, signs_of
from resnet_fused.testing.cases import generator

Result = tuple[Tensor, list[Tensor]]  # an op's result and its gradients
NOISE = 1.1  # tensors of a few hundred elements


class BlockCase(NamedTuple):
    """A residual block: (kernel, out channels, stride, dilation, groups) of each layer."""

    layers: tuple[tuple[int, int, int, int, int], ...]
    shortcut: str = "identity"
    frozen: tuple[bool, ...] = ()
    shape: tuple[int, int, int, int] = (2, 24, 6, 7)


BOTTLENECK = ((1, 16, 1, 1, 1), (3, 16, 1, 1, 1), (1, 24, 1, 1, 1))
STRIDED = ((1, 32, 1, 1, 1), (3, 32, 2, 1, 1), (1, 72, 1, 1, 1))
CASES = {
    "bottleneck": BlockCase(BOTTLENECK),
    "bottleneck projection": BlockCase(STRIDED, "projection"),
    "bottleneck frozen": BlockCase(BOTTLENECK, frozen=(True, True, True)),
    "bottleneck partly frozen": BlockCase(
        STRIDED, "projection", (True, False, True, False), (5, 24, 8, 7)
    ),
    "bottleneck grouped": BlockCase(
        ((1, 32, 1, 1, 1), (3, 32, 2, 1, 4), (1, 48, 1, 1, 1)), "none", shape=(8, 24, 8, 7)
    ),
    "bottleneck dilated": BlockCase(((1, 16, 1, 1, 1), (3, 16, 1, 2, 1), (1, 24, 1, 1, 1))),
    "dilated and strided": BlockCase(((3, 35, 2, 2, 1),), "none", shape=(2, 5, 13, 12)),
    "pointwise": BlockCase(((1, 64, 1, 1, 1), (1, 96, 1, 1, 1)), shape=(4, 96, 6, 7)),
    "basic": BlockCase(((3, 24, 1, 1, 1), (3, 24, 1, 1, 1))),
    "basic projection": BlockCase(((3, 33, 2, 1, 1), (3, 33, 1, 1, 1)), "projection"),
    "basic frozen": BlockCase(((3, 24, 1, 1, 1), (3, 24, 1, 1, 1)), frozen=(True, True)),
    "basic padded": BlockCase(((3, 40, 2, 1, 1), (3, 40, 1, 1, 1)), "padded", shape=(2, 24, 7, 8)),
    "bottleneck padded": BlockCase(
        ((1, 16, 2, 1, 1), (3, 16, 1, 1, 1), (1, 40, 1, 1, 1)), "padded"
    ),
    "padded, same size": BlockCase(((3, 16, 1, 1, 1), (1, 40, 1, 1, 1)), "padded"),
    "padded, frozen": BlockCase(
        ((3, 24, 3, 1, 1), (3, 24, 1, 1, 1)), "padded", (True, True), (4, 24, 7, 8)
    ),
    "lone layer": BlockCase(((3, 48, 1, 1, 1),), "none", shape=(4, 1, 9, 8)),
    "odd kernel": BlockCase(((5, 17, 3, 1, 1),), "none", shape=(1, 9, 11, 7)),
}


def _convolution(
    rng: torch.Generator, channels: int, spec: tuple[int, int, int, int, int]
) -> Convolution:
    kernel, filters, stride, dilation, groups = spec
    shape = (filters, channels // groups, kernel, kernel)
    weight = torch.randn(shape, generator=rng) * (2 / (shape[1] * kernel**2)) ** 0.5
    padding = dilation * (kernel // 2)
    return Convolution(weight, (stride, stride), (padding, padding), (dilation, dilation), groups)


def _layer(
    rng: torch.Generator, channels: int, spec: tuple[int, int, int, int, int], frozen: bool
) -> Layer:
    conv = _convolution(rng, channels, spec)
    filters = spec[1]
    weight = torch.rand(filters, generator=rng) + 0.5
    weight[::4] *= -1
    bias = 0.3 * torch.randn(filters, generator=rng)
    mean, var = torch.randn(filters, generator=rng), torch.rand(filters, generator=rng) + 0.3
    return Layer(conv, weight, bias, 1e-5, (mean, var) if frozen else None)


def _block(case: BlockCase) -> tuple[Tensor, list[Layer], Tensor]:
    """Input, layers (a projection's last) and the result's gradient, float32."""
    return _sample(case, generator(_clear_seed(case)))


@functools.cache
def _clear_seed(case: BlockCase) -> int:
    """Of 60 samples that whose ReLU inputs keep furthest from zero: where rounding decides a sign,
    that alone outweighs all other errors, ours or PyTorch's."""
    return max(range(60), key=lambda seed: _least_relu_input(case, generator(seed)))


def _least_relu_input(case: BlockCase, rng: torch.Generator) -> float:
    x, layers, _ = _sample(case, rng)
    least: list[float] = []

    def relu(value: Tensor) -> Tensor:
        least.append(value.abs().min().item())
        return F.relu(value)

    _unfused_block(x, layers, case.shortcut, relu)
    return min(least)


def _sample(case: BlockCase, rng: torch.Generator) -> tuple[Tensor, list[Layer], Tensor]:
    x = torch.randn(case.shape, generator=rng).relu()
    frozen = case.frozen or (False,) * 4
    layers = []
    channels = case.shape[1]
    for spec, fixed in zip(case.layers, frozen, strict=False):
        layers.append(_layer(rng, channels, spec, fixed))
        channels = spec[1]
    if case.shortcut == "projection":
        stride = max(spec[2] for spec in case.layers)
        spec = (1, channels, stride, 1, 1)
        layers.append(_layer(rng, case.shape[1], spec, frozen[len(case.layers)]))
    y = _unfused_block(x, layers, case.shortcut)
    return x, layers, torch.randn(y.shape, generator=rng)


def _normalise(x: Tensor, layer: Layer) -> Tensor:
    mean, var = layer.frozen or (None, None)
    return F.batch_norm(
        x, mean, var, layer.weight, layer.bias, training=mean is None, eps=layer.eps
    )


def _convolve(x: Tensor, conv: Convolution) -> Tensor:
    return F.conv2d(x, conv.weight, None, *conv[1:])


def _unfused_block(
    x: Tensor, layers: Sequence[Layer], shortcut: str, relu: Callable[[Tensor], Tensor] = F.relu
) -> Tensor:
    other: Tensor | float = x if shortcut == "identity" else 0.0
    if shortcut == "padded":
        stride = _stride(layers)
        other = F.avg_pool2d(x, 1, stride)  # of single pixels: every stride-th
        missing = len(layers[-1].weight) - x.shape[1]
        other = torch.cat([other, other[:, :1].expand(-1, missing, -1, -1) * 0], 1)
    if shortcut == "projection":
        *layers, projection = layers
        other = _normalise(_convolve(x, projection.conv), projection)
    out = x
    for layer in layers[:-1]:
        out = relu(_normalise(_convolve(out, layer.conv), layer))
    return relu(_normalise(_convolve(out, layers[-1].conv), layers[-1]) + other)


def _stride(layers: Sequence[Layer]) -> int:
    return max(layer.conv.stride[0] for layer in layers)


def _fused_block(x: Tensor, layers: Sequence[Layer], shortcut: str) -> Tensor:
    return _block_op(x, layers, shortcut)[0]


def _block_op(x: Tensor, layers: Sequence[Layer], shortcut: str) -> tuple[Tensor, list[Tensor]]:
    projection = None
    if shortcut == "projection":
        *layers, projection = layers
    stride = _stride(layers) if shortcut == "padded" else None
    return residual_block_training(x, layers, projection, shortcut != "none", padded_stride=stride)


def _decided(bias: Tensor) -> Tensor:
    """Biases that decide the sign of every ReLU's input: in bfloat16 rounding does otherwise, of
    some inputs ours and of others PyTorch's, which outweighs all other errors of gradients."""
    third = torch.arange(len(bias)) % 3 == 0
    return torch.where(third, -16.0, 16.0) + bias


def _unfused_stem(x: Tensor, layers: Sequence[Layer], pool: MaxPool) -> Tensor:
    (layer,) = layers
    return F.max_pool2d(F.relu(_normalise(_convolve(x, layer.conv), layer)), *pool)


def _fused_stem(x: Tensor, layers: Sequence[Layer], pool: MaxPool) -> Tensor:
    return stem_training(x, layers[0], pool)[0]


def _leaves(x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    return [x, *(t for layer in layers for t in (layer.conv.weight, layer.weight, layer.bias))]


def _prepare(
    x: Tensor, layers: Sequence[Layer], dtype: torch.dtype, device: str = "cpu", wide: bool = False
) -> tuple[Tensor, list[Layer]]:
    """Leaves rounded to `dtype`; `wide`: those rounded values in float64."""
    vectors = torch.promote_types(dtype, torch.float32)

    def leaf(tensor: Tensor, kind: torch.dtype) -> Tensor:
        tensor = tensor.to(device, kind)
        return (tensor.double() if wide else tensor.clone()).requires_grad_()

    return leaf(x, dtype), [
        Layer(
            layer.conv._replace(weight=leaf(layer.conv.weight, dtype)),
            leaf(layer.weight, vectors),
            leaf(layer.bias, vectors),
            layer.eps,
            layer.frozen and tuple(leaf(v, vectors).detach() for v in layer.frozen),  # type: ignore[arg-type]
        )
        for layer in layers
    ]


def _run(
    function: Callable[..., Tensor],
    x: Tensor,
    layers: Sequence[Layer],
    rest: Any,
    grad: Tensor,
) -> Result:
    y = function(x, layers, rest)
    # Gradients of constant zero (batch norm takes out what they act on) are left to the others.
    return y, list(torch.autograd.grad(y, _leaves(x, layers), grad.to(y.dtype)))


def _assert_contract(ours: Result, eager: Result, truth: Result) -> None:
    """Errors, pooled over the tensors of a kind: single vectors have too few elements."""
    kinds = {
        "result": ([ours[0]], [eager[0]], [truth[0]]),
        "input gradient": (ours[1][:1], eager[1][:1], truth[1][:1]),
        "weight gradients": (ours[1][1::3], eager[1][1::3], truth[1][1::3]),
        "batch norm gradients": tuple(
            [g for i, g in enumerate(r[1]) if i and i % 3 != 1] for r in (ours, eager, truth)
        ),
    }
    for kind, (found, usual, right) in kinds.items():
        for a, b in zip(found, usual, strict=True):
            assert a.dtype == b.dtype, kind
        error, allowed = (
            sum(relative_error(a, t) ** 2 for a, t in zip(tensors, right, strict=True)) ** 0.5
            for tensors in (found, usual)
        )
        assert error <= NOISE * allowed, f"{kind}: error {error:.3e}, PyTorch's {allowed:.3e}"


TARGETS = [
    pytest.param(("cpu", "cpu", torch.float32), id="cpu-float32"),
    pytest.param(("cpu", "cpu", torch.bfloat16), id="cpu-bfloat16"),
    pytest.param(("triton", "cpu", torch.float32), id="interpreted-float32"),
    pytest.param(("triton", "cpu", torch.float16), id="interpreted-float16"),
    # In float32 PyTorch sums on the CPU in float64, which passes for GPUs do not.
    pytest.param(("cudnn", "cpu", torch.float16), id="library-float16"),
    *(
        pytest.param(
            (backend, "cuda", dtype), id=f"{backend}-{str(dtype)[6:]}", marks=pytest.mark.gpu
        )
        for backend in ("triton", "cudnn")
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ),
]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[tuple[str, torch.dtype]]:
    """(device, dtype), with the backend chosen."""
    backend, device, dtype = request.param
    require(backend, device, dtype)
    with use_backend(backend):
        yield device, dtype


@pytest.mark.parametrize("name", CASES)
def test_block_by_the_contract(name: str, target: tuple[str, torch.dtype]) -> None:
    device, dtype = target
    case = CASES[name]
    x, layers, grad = _block(case)
    if dtype == torch.bfloat16:
        layers = [layer._replace(bias=_decided(layer.bias)) for layer in layers]
    if chosen_backend().name == "cudnn":  # whose convolutions PyTorch's are in that layout alone
        x = x.to(memory_format=torch.channels_last)
    grad = grad.to(device, dtype)
    results = [
        _run(function, *_prepare(x, layers, dtype, device, wide), case.shortcut, grad)
        for function, wide in (
            (_fused_block, False),
            (_unfused_block, False),
            (_unfused_block, True),
        )
    ]
    _assert_contract(*results)
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)


STEMS = {
    "resnet": ((7, 16, 2, 1, 1), (3, 3, 27, 22), MaxPool(), False),
    "frozen": ((7, 16, 2, 1, 1), (2, 3, 21, 18), MaxPool(), True),
    "overlapping pool": ((3, 8, 1, 1, 1), (4, 17, 9, 10), MaxPool(5, 2, 2), False),
    "pool with gaps": ((3, 8, 1, 1, 1), (16, 4, 9, 10), MaxPool(2, 3, 0), False),
}


@pytest.mark.parametrize("name", STEMS)
def test_stem_by_the_contract(name: str, target: tuple[str, torch.dtype]) -> None:
    device, dtype = target
    spec, shape, pool, frozen = STEMS[name]
    rng = generator()
    x = torch.randn(shape, generator=rng)
    layers = [_layer(rng, shape[1], spec, frozen)]
    grad = torch.randn(_unfused_stem(x, layers, pool).shape, generator=rng).to(device, dtype)
    results = [
        _run(function, *_prepare(x, layers, dtype, device, wide), pool, grad)
        for function, wide in ((_fused_stem, False), (_unfused_stem, False), (_unfused_stem, True))
    ]
    _assert_contract(*results)


def test_equal_values_in_a_pooling_window_give_to_the_first(
    target: tuple[str, torch.dtype],
) -> None:
    """Integers collide often: the input's gradient shows who took what."""
    device, dtype = target
    rng = generator()
    x = torch.randint(-1, 2, (2, 16, 9, 9), generator=rng).to(device, dtype)
    weight = torch.eye(16).reshape(16, 16, 1, 1).to(device, dtype)
    sign = torch.where(torch.arange(16) % 2 == 0, 1.0, -1.0).to(device)
    ones, zeros = torch.ones(16, device=device), torch.zeros(16, device=device)
    layers = [Layer(Convolution(weight), sign, ones, 0.25, (zeros, 0.75 * ones))]
    grad = torch.randint(-4, 5, (2, 16, 5, 5), generator=rng).to(device, dtype)
    ours, eager = (
        _run(function, *_prepare(x, layers, dtype, device), MaxPool(), grad)
        for function in (_fused_stem, _unfused_stem)
    )
    assert torch.equal(ours[0], eager[0])
    for a, b in zip(ours[1], eager[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["bottleneck projection", "bottleneck frozen", "basic", "basic padded"]
)
def test_block_gradients_are_exact_in_float64(name: str) -> None:
    case = CASES[name]._replace(shape=(2, 4, 4, 3))
    specs = tuple((k, 4, s, d, 1) for k, _, s, d, _ in case.layers)
    x, layers, _ = _block(case._replace(layers=specs))
    x, layers = _prepare(x, layers, torch.float64)
    _gradcheck(_fused_block, x, layers, case.shortcut)


class FoldingReference(ReferenceTraining):
    """The plain meaning of the pieces with which a block's end is folded."""

    def folded_ends(self, dtype: torch.dtype) -> FoldedEnds:
        return self


FOLDED = [name for name, case in CASES.items() if case.layers[-1][0] == 1]


@pytest.mark.parametrize("name", FOLDED)
def test_folded_ends_are_exact_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results, statistics and gradients are those of the ordinary pieces, and their derivative."""
    x, layers, grad = _block(CASES[name])
    x, layers = _prepare(x, layers, torch.float64)

    def found() -> list[Tensor]:
        y, scale_shifts = _block_op(x, layers, CASES[name].shortcut)
        leaves = _leaves(x, layers)
        return [y, *scale_shifts, *torch.autograd.grad(y, leaves, grad.double())]

    def alone() -> Iterator[Tensor]:
        """The gradient of one leaf while no other wants any."""
        leaves = _leaves(x, layers)
        for leaf in leaves:
            for other in leaves:
                other.requires_grad_(other is leaf)
            y, _ = _block_op(x, layers, CASES[name].shortcut)
            yield from torch.autograd.grad(y, [leaf], grad.double())
        for leaf in leaves:
            leaf.requires_grad_()

    ordinary = [*found(), *alone()]
    monkeypatch.setattr(block_training, "kernels", lambda x: FoldingReference())
    for ours, expected in zip([*found(), *alone()], ordinary, strict=True):
        if expected.norm() > 1e-9:  # batch norm takes out what some biases do
            assert relative_error(ours, expected) < 1e-12
    case = CASES[name]._replace(shape=(2, 4, 4, 3))
    specs = tuple((k, 4, s, d, 1) for k, _, s, d, _ in case.layers)
    x, layers, _ = _block(case._replace(layers=specs))
    x, layers = _prepare(x, layers, torch.float64)
    _gradcheck(_fused_block, x, layers, case.shortcut)


class _OfOtherChannels(FoldingReference):
    """Whose signs are read one channel off."""

    def relu_gradient_sum(
        self, grad: Tensor, y: Tensor | None, signs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert signs is not None
        return super().relu_gradient_sum(grad, y, signs.roll(1, 1))


def test_backward_reads_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong index of them shows in gradients."""
    case = CASES[FOLDED[0]]
    x, layers, grad = _block(case)
    x, layers = _prepare(x, layers, torch.float64)
    found = []
    for kernels in (FoldingReference(), _OfOtherChannels()):
        monkeypatch.setattr(block_training, "kernels", lambda x, kernels=kernels: kernels)
        y, _ = _block_op(x, layers, case.shortcut)
        found.append(torch.autograd.grad(y, x, grad.double())[0])
    assert relative_error(found[1], found[0]) > 0.1


@pytest.mark.parametrize("channels", [64, 136, 24])
def test_tritons_signs(channels: int) -> None:
    """What its folded end writes and its pass reads, beside NaN; in float16, of which the
    interpreter has products."""
    pytest.importorskip("triton")
    from resnet_fused.backends.triton import training_batch_norm, training_ends
    from resnet_fused.backends.triton.launching import Config

    rng = generator()
    x, grad = (
        torch.randn(2, of, 5, 7, generator=rng).half().contiguous(memory_format=torch.channels_last)
        for of in (16, channels)
    )
    x[0, 0, 0, 0] = grad[1, :, 0, 0] = torch.nan
    conv = Convolution(torch.randn(channels, 16, 1, 1, generator=rng), (1, 1), (0, 0), (1, 1), 1)
    end = Folded(x, conv, torch.rand(6, channels, generator=rng) + 0.1)
    for other in (None, grad, end):
        for blocks in ((128, 256, 16), (32, 64, 16)):
            config = Config(blocks, 4, 1)
            y, signs = training_ends.folded_end(config, end, other, True)
            assert y.isnan().any()
            assert torch.equal(signs, signs_of(y))
            by_signs = training_batch_norm.relu_gradient_sum(grad, None, signs)
            by_y = training_batch_norm.relu_gradient_sum(grad, y, None)
            for ours, expected in zip(by_signs, by_y, strict=True):
                assert torch.equal(ours.nan_to_num(7), expected.nan_to_num(7))
            right, _ = ReferenceTraining().relu_gradient_sum(grad, None, signs)
            assert torch.equal(by_signs[0].nan_to_num(7), right.nan_to_num(7))


@pytest.mark.parametrize("name", ["bottleneck projection", "bottleneck partly frozen"])
def test_the_op_with_a_folded_end_is_well_formed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What compilers take its results for is what they are."""
    monkeypatch.setattr(block_training, "kernels", lambda x: FoldingReference())
    x, layers = _prepare(*_block(CASES[name])[:2], torch.float32)
    torch.library.opcheck(
        torch.ops.resnet_fused.residual_block_training.default,
        (x, *flatten(layers), CASES[name].shortcut, 1, ""),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


def test_stem_gradients_are_exact_in_float64() -> None:
    rng = generator()
    x, layers = _prepare(
        torch.randn(2, 2, 7, 6, generator=rng), [_layer(rng, 2, (3, 3, 1, 1, 1), False)],
        torch.float64,
    )  # fmt: skip
    _gradcheck(_fused_stem, x, layers, MaxPool())


def _gradcheck(function: Callable[..., Tensor], x: Tensor, layers: list[Layer], rest: Any) -> None:
    def call(*leaves: Tensor) -> Tensor:
        x, *vectors = leaves
        swapped = [
            layer._replace(conv=layer.conv._replace(weight=w), weight=g, bias=b)
            for layer, w, g, b in zip(
                layers, vectors[::3], vectors[1::3], vectors[2::3], strict=True
            )
        ]
        return function(x, swapped, rest)

    assert torch.autograd.gradcheck(call, tuple(_leaves(x, layers)), fast_mode=True)


def test_no_second_derivative() -> None:
    x, layers, _ = _block(CASES["lone layer"])
    x, layers = _prepare(x, layers, torch.float32)
    (grad,) = torch.autograd.grad(_fused_block(x, layers, "none").sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_statistics_with_a_large_mean(backend: str, dtype: torch.dtype) -> None:
    """Mean 100, deviation 0.1: E[x²] - E[x]² would keep no digit of the variance."""
    require(backend, "cpu", dtype)
    x = (100 + 0.1 * torch.randn(4, 16, 24, 24, generator=generator())).to(dtype)
    conv = Convolution(torch.eye(16).reshape(16, 16, 1, 1).to(dtype))
    with use_backend(backend):
        _, (scale_shift,) = residual_block_training(
            x, [Layer(conv, torch.ones(16), torch.zeros(16))], identity=False
        )
    wide = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(scale_shift[MEAN].double(), wide.mean(1), rtol=2e-7, atol=0)
    # The parts' means are rounded to float32, here to 1e-5 of a deviation.
    torch.testing.assert_close(scale_shift[UNBIASED_VAR].double(), wide.var(1), rtol=1e-5, atol=0)
    assert scale_shift[COUNT].eq(4 * 24 * 24).all()


def test_many_parts_merge_as_one() -> None:
    """More row tiles than one launch merges, each part with its own mean and count."""
    require("triton", "cpu", torch.float32)
    from resnet_fused.backends.triton import training_batch_norm as kernels
    from resnet_fused.reference.training import ReferenceTraining

    rng = generator()
    parts = torch.rand(700, 3, 37, generator=rng)
    parts[:, 0] += 50 * torch.randn(700, 1, generator=rng)
    parts[:, 2] = torch.randint(1, 128, (700, 1), generator=rng).float()
    truth = ReferenceTraining().merge_moments(parts.double())
    torch.testing.assert_close(kernels.merge_moments(parts).double(), truth, rtol=3e-7, atol=0)
    sums = torch.randn(700, 2, 37, generator=rng)
    torch.testing.assert_close(
        kernels.merge_sums(sums).double(), sums.double().sum(0, keepdim=True), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("filters", "channels"), [(72, 40), (24, 300)])
def test_a_folded_ends_moments_from_many_parts(
    filters: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of integers, whose sums are exact: what the matrix loses is what float32 does."""
    require("triton", "cpu", torch.float16)
    from resnet_fused.backends.triton import launching, training_ends

    monkeypatch.setattr(launching, "machine", lambda _: launching.Machine(40, 227 * 1024))
    monkeypatch.setattr(training_ends, "_LEAST_POSITIONS", 16)
    rng = generator()
    x = torch.randint(-3, 4, (2, channels, 19, 17), generator=rng).to(torch.float16)
    weight = torch.randint(-3, 4, (filters, channels, 1, 1), generator=rng).to(torch.float16)
    end = Convolution(weight)
    found = training_ends.operand_moments(x, end)
    right = FoldingReference().operand_moments(x.double(), end._replace(weight=weight.double()))
    for ours, truth in zip(found, right, strict=True):
        assert relative_error(ours, truth) < 1e-6
    (moments,), (expected,) = found[0], right[0]
    torch.testing.assert_close(moments[1].double(), expected[1], rtol=1e-6, atol=0)


def test_same_bits_every_time(target: tuple[str, torch.dtype]) -> None:
    device, dtype = target
    x, layers, grad = _block(CASES["bottleneck projection"])
    first, second = (
        _run(
            _fused_block, *_prepare(x, layers, dtype, device), "projection", grad.to(device, dtype)
        )
        for _ in range(2)
    )
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_weight_gradient_in_parts() -> None:
    """Positions split among programs, summed in order: the same as in one piece."""
    require("triton", "cpu", torch.float32)
    from resnet_fused.backends.triton.launching import Config
    from resnet_fused.backends.triton.training_wgrad import wgrad
    from resnet_fused.reference.training import ReferenceTraining

    rng = generator()
    x, g = torch.randn(2, 3, 16, 9, 9, generator=rng)
    conv = _convolution(rng, 16, (3, 16, 1, 1, 1))
    truth = ReferenceTraining().wgrad(
        g.double(), x.double(), conv._replace(weight=conv.weight.double())
    )
    for parts in (1, 4, 7):
        config = Config((16, 64, 32, parts), 4, 2)
        ours = wgrad(config, g, x, conv)
        assert relative_error(ours, truth) < 2e-6


MISTAKES: dict[str, tuple[Callable[[Tensor, Layer], object], type[Exception], str]] = {
    "one value per channel": (
        lambda x, layer: residual_block_training(x[:1, :, :1, :1], [layer]),
        ValueError,
        "Expected more than 1 value per channel",
    ),
    "identity shape": (
        lambda x, layer: residual_block_training(
            x, [layer._replace(conv=layer.conv._replace(stride=(2, 2)))]
        ),
        ValueError,
        "the shortcut has shape",
    ),
    "padded shape": (
        lambda x, layer: residual_block_training(x, [layer], padded_stride=2),
        ValueError,
        r"the shortcut has shape \(2, 4, 3, 3\)",
    ),
    "padded stride": (
        lambda x, layer: residual_block_training(x, [layer], padded_stride=-1),
        ValueError,
        "padded_stride must be positive",
    ),
    "weight dtype": (
        lambda x, layer: residual_block_training(
            x, [layer._replace(conv=layer.conv._replace(weight=layer.conv.weight.double()))]
        ),
        TypeError,
        r"layers\[0\].weight is torch.float64",
    ),
    "channels": (
        lambda x, layer: residual_block_training(x[:, :3], [layer]),
        ValueError,
        "input has 3 channels",
    ),
    "bn length": (
        lambda x, layer: residual_block_training(x, [layer._replace(weight=layer.weight[:2])]),
        ValueError,
        r"layers\[0\].bn",
    ),
    "dimensions": (
        lambda x, layer: stem_training(x[0], layer),
        ValueError,
        "4-dimensional",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    call, error, message = MISTAKES[name]
    rng = generator()
    layer = _layer(rng, 4, (1, 4, 1, 1, 1), False)
    with pytest.raises(error, match=message):
        call(torch.randn(2, 4, 5, 5, generator=rng), layer)
