"""Training by the CPU's own kernels: each pass against plain PyTorch, bits, memory, networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import _extension, backends, models, use_backend
from resnet_fused.backends.cpu.training import CpuTraining
from resnet_fused.models import cifar
from resnet_fused.numerics import relative_error
from resnet_fused.ops import training_backend
from resnet_fused.parameters import Activation, Convolution, Layer, MaxPool, PreBnGradient
from resnet_fused.reference import training as reference
from resnet_fused.testing.cases import generator

if reason := backends.unavailable("cpu"):
    pytest.skip(reason, allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16)
# Channels: less than a vector, whole strips and a rest, many; rows: more than a task, a rest.
SHAPES = ((2, 5, 3, 4), (3, 83, 9, 7), (1, 272, 13, 11), (2, 64, 40, 33), (4, 16, 31, 32))


@pytest.fixture
def pieces() -> CpuTraining:
    found = backends.get("cpu").training
    assert isinstance(found, CpuTraining)
    return found


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return _nhwc(torch.randn(shape, generator=generator(seed)).to(dtype))


def _activation(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Activation:
    rng = generator(100 + seed)
    scale_shift = torch.randn((6, shape[1]), generator=rng)
    scale_shift[5] = shape[0] * shape[2] * shape[3]
    return Activation(_random(shape, dtype, seed), scale_shift)


def _exact(x: Tensor, y: Tensor, of: str) -> None:
    """Equal but for one rounding: both compute in float32 or better."""
    ulp = torch.finfo(y.dtype).eps
    torch.testing.assert_close(x, y.to(x.dtype), rtol=2 * ulp, atol=4 * ulp, msg=lambda m: of + m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_moments(pieces: CpuTraining, shape: tuple[int, ...], dtype: torch.dtype, mean: float):
    """A mean far from zero does not cancel, and parts merge as one."""
    x = _nhwc((_random(shape, torch.float32) + mean).to(dtype))
    conv = Convolution(torch.eye(shape[1])[:, :, None, None])
    stored, moments = pieces.conv_stats(x, conv, True)
    assert torch.equal(stored, x)
    assert moments is not None
    right = reference.moments(x.double())
    torch.testing.assert_close(moments.double(), right, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("branches", [0, 1, 2])
def test_relu_gradient(
    pieces: CpuTraining, shape: tuple[int, ...], dtype: torch.dtype, branches: int
) -> None:
    grad, y = _random(shape, dtype, 1), _nhwc(_random(shape, dtype, 2).relu())
    layers = [_activation(shape, dtype, 3 + i) for i in range(branches)]
    g, sums = pieces.relu_gradient(grad, y, layers)
    assert torch.equal(g, torch.where(y > 0, grad, 0))
    for found, layer in zip(sums, layers, strict=True):
        right = reference.sums(g.double(), layer._replace(scale_shift=layer.scale_shift.double()))
        assert relative_error(found, right) < (1e-6 if dtype == torch.float32 else 3e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normalisation_and_its_gradient(
    pieces: CpuTraining, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    main, other = _activation(shape, dtype), _activation(shape, dtype, 1)
    residual = _random(shape, dtype, 2)
    narrow = residual[:, : shape[1] - 2]
    plain = reference.ReferenceTraining()
    for shortcut in (None, residual, narrow, other):
        found, right = (p.bn_add_relu(main, shortcut) for p in (pieces, plain))
        _exact(found, right, "bn_add_relu ")
    coefficients = torch.randn((4, shape[1]), generator=generator(7))
    for frozen in (False, True):
        gradient = PreBnGradient(residual, main.pre_bn, coefficients, frozen)
        right = reference.pre_bn_gradient(gradient)
        _exact(pieces.pre_bn_gradient(gradient), right, "pre_bn_gradient ")
        spent = gradient._replace(grad=residual.clone(memory_format=torch.preserve_format))
        found = pieces.pre_bn_gradient(spent._replace(last_use=True))
        assert found.data_ptr() == spent.grad.data_ptr()
        _exact(found, right, "in place ")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", [MaxPool(), MaxPool(5, 2, 2), MaxPool(2, 3, 0)], ids=str)
def test_pooling(pieces: CpuTraining, dtype: torch.dtype, pool: MaxPool) -> None:
    """Of integers, so that windows hold equal values, whose first takes the gradient."""
    shape = (2, 19, 21, 18)
    x = _nhwc(torch.randint(-3, 4, shape, generator=generator()).to(dtype))
    scale_shift = torch.zeros((6, 19))
    scale_shift[1] = torch.where(torch.arange(19) % 4 == 0, -1.0, 1.0)
    activation = Activation(x, scale_shift)
    plain = reference.ReferenceTraining()
    (out, argmax), (right, places) = (p.bn_relu_pool(activation, pool) for p in (pieces, plain))
    assert torch.equal(out, right)
    assert torch.equal(argmax, places)
    grad = _nhwc(torch.randint(-3, 4, out.shape, generator=generator(1)).to(dtype))
    g, sums = pieces.pool_gradient(grad, activation, argmax, pool)
    wanted, right_sums = plain.pool_gradient(grad, activation, places, pool)
    assert torch.equal(g, wanted)
    assert torch.equal(sums, right_sums)


CONVOLUTIONS = (
    # in, out, kernel, stride, padding, dilation, size
    (64, 64, 3, 1, 1, 1, 16),  # Winograd in float32
    (16, 48, 3, 1, 1, 1, 23),
    (33, 17, 3, 1, 1, 1, 9),
    (40, 72, 1, 1, 0, 1, 6),
    (40, 72, 1, 2, 0, 1, 7),
    (24, 35, 3, 2, 1, 1, 9),
    (24, 35, 3, 2, 2, 2, 11),
    (3, 64, 7, 2, 3, 1, 20),
    (21, 18, 2, 1, 0, 1, 9),
    (18, 20, 1, 1, 1, 1, 5),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions_of_integers(
    pieces: CpuTraining, case: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    """Exact forward and backward, of weights in either layout and, in bfloat16, of either type."""
    channels, filters, kernel, stride, padding, dilation, size = case
    rng = generator()

    def integers(*shape: int) -> Tensor:
        return _nhwc(torch.randint(-1, 2, shape, generator=rng).to(dtype))

    x = integers(2, channels, size, size)
    for weight_dtype in {torch.float32, dtype}:
        weight = torch.randint(-1, 2, (filters, channels, kernel, kernel), generator=rng)
        weight = weight.to(weight_dtype).contiguous(memory_format=layout)
        conv = Convolution(weight, (stride,) * 2, (padding,) * 2, (dilation,) * 2)
        leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
        right = F.conv2d(*leaves, None, *conv[1:])
        out, _ = pieces.conv_stats(x, conv, False)
        assert torch.equal(out.double(), right.to(dtype).double())
        g, add = integers(*right.shape), integers(*x.shape)
        x_grad, weight_grad = torch.autograd.grad(right, leaves, g.double())
        found, _ = pieces.dgrad(g, conv, x.shape, None, add)
        assert torch.equal(found.double(), (x_grad + add).to(dtype).double())
        assert torch.equal(pieces.wgrad(g, x, conv).double(), weight_grad.to(weight_dtype).double())


def _step(model: torch.nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        out = model(x)
    out.float().square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar"])
def test_bits_do_not_depend_on_threads(name: str, dtype: torch.dtype | None, threads: None) -> None:
    torch.manual_seed(0)
    model = (cifar.resnet20 if name == "cifar" else getattr(models, name))().train()
    x = torch.randn(2, 3, 33, 33)
    found = []
    with use_backend("cpu"):
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(_step(model, x, dtype))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar.resnet20"])
def test_running_statistics_and_gradients_of_networks(name: str) -> None:
    """Beside the modules, whose gradients float64 confirms; biases keep ReLU inputs from zero, so
    that no sign is rounding's."""
    torch.manual_seed(0)
    build = cifar.resnet20 if name.startswith("cifar") else getattr(models, name)
    model = build(num_classes=10).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.bias.copy_(torch.where(torch.arange(len(module.bias)) % 4 == 0, -8.0, 8.0))
    x = _nhwc(torch.randn(4, 3, 32, 32))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    results, statistics = [], []
    for backend, kind in (("cpu", torch.float32), (None, torch.float32), (None, torch.float64)):
        model.float().load_state_dict(state)
        model.to(kind)
        with use_backend(backend or "reference"):
            results.append(_step(model, x.to(kind)))
        statistics.append([b.double() for b in model.buffers()])
    ours, eager, truth = (torch.cat([g.double().flatten() for g in r[1:]]) for r in results)
    assert relative_error(ours, truth) <= 1.1 * relative_error(eager, truth)
    ours, eager, truth = (torch.cat([b.flatten() for b in buffers]) for buffers in statistics)
    assert relative_error(ours, truth) <= 1.1 * relative_error(eager, truth)


def test_which_blocks_train_by_it() -> None:
    """Groups, which our kernels do not serve, are left to the modules."""

    def layer(filters: int, channels: int, groups: int = 1) -> Layer:
        weight = torch.randn(filters, channels // groups, 3, 3)
        conv = Convolution(weight, padding=(1, 1), groups=groups)
        return Layer(conv, torch.ones(filters), torch.zeros(filters))

    x = torch.randn(2, 32, 8, 8)
    chosen = training_backend(x, [layer(32, 32), layer(32, 32)], None, True)
    assert chosen is not None
    assert chosen.name == "cpu"
    assert training_backend(x, [layer(32, 32), layer(32, 32, 8)], None, True) is None


def test_freed_memory_serves_the_next_step(pieces: CpuTraining) -> None:
    extension = _extension.load()
    extension.train_memory_release()
    x = _random((2, 64, 56, 56), torch.float32)
    activation = _activation((2, 64, 56, 56), torch.float32)
    place = pieces.bn_add_relu(activation, None).data_ptr()
    kept = extension.train_memory_kept()
    assert kept >= x.nbytes
    again = pieces.bn_add_relu(activation, None)
    assert again.data_ptr() == place
    assert extension.train_memory_kept() < kept
    del again
    extension.train_memory_release()
    assert extension.train_memory_kept() == 0
