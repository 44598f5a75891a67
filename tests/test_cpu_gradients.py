"""The CPU kernels for the gradients of convolutions by themselves: those in resnet_fused._C."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from resnet_fused import _extension
from resnet_fused._extension import optional_tensor_arg, tensor_arg
from resnet_fused.numerics import assert_contract, relative_error

if reason := _extension.available():
    pytest.skip(reason, allow_module_level=True)
_C = _extension.load()

NHWC = torch.channels_last
Pair = tuple[int, int]


class Case(NamedTuple):
    """A convolution (batch, channels, *size) -> out_channels with one group."""

    batch: int
    channels: int
    size: Pair
    out_channels: int
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)

    @property
    def window(self) -> tuple[Pair, Pair, Pair, Pair]:
        return self.kernel, self.stride, self.padding, self.dilation

    @property
    def out_size(self) -> Pair:
        height, width = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(self.size, *self.window, strict=True)
        )
        return height, width

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.channels, *self.kernel

    def gradients(self, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """PyTorch's, with respect to x and weight, in their dtype."""
        by_x, by_weight, _ = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            1,
            [True, True, False],
        )
        return by_x, by_weight


# Each stands for a way in which a kernel can go wrong.
CASES = {
    "3x3": Case(2, 16, (8, 8), 32),
    "3x3 tails": Case(3, 19, (7, 6), 37),
    "3x3 strided": Case(2, 33, (9, 11), 70, stride=(2, 2)),
    "3x3 strided, even": Case(4, 64, (8, 28), 64, stride=(2, 2)),
    "3x3 dilated": Case(5, 20, (10, 7), 16, padding=(2, 2), dilation=(2, 2)),
    "3x3 unpadded": Case(2, 17, (6, 5), 9, padding=(0, 0)),
    "pointwise": Case(7, 64, (3, 3), 65, (1, 1), padding=(0, 0)),
    "pointwise strided": Case(3, 32, (9, 6), 48, (1, 1), (2, 2), (0, 0)),
    "7x7 stem": Case(2, 3, (21, 17), 64, (7, 7), (2, 2), (3, 3)),
    "one channel": Case(3, 1, (5, 5), 1),
    "single image, odd height": Case(1, 24, (7, 9), 40),
    "single pixel": Case(1, 30, (1, 1), 50),
    "lines longer than a block": Case(2, 5, (3, 300), 6),
    "rectangular": Case(2, 21, (9, 14), 34, (1, 5), (1, 3), (0, 4), (1, 2)),
    "stride beyond the window": Case(3, 18, (13, 11), 20, (2, 1), (3, 4), (1, 0)),
    "padding beyond the window": Case(2, 4, (2, 3), 5, padding=(4, 5)),
    "many parts": Case(4, 40, (56, 56), 33, (1, 1), padding=(0, 0)),
}
# Of ResNet-50 at 224 x 224, and of a ResNet on CIFAR.
LAYERS = {
    "stem": Case(1, 3, (224, 224), 64, (7, 7), (2, 2), (3, 3)),
    "stage 1, 1x1": Case(2, 256, (56, 56), 64, (1, 1), padding=(0, 0)),
    "stage 1, 3x3": Case(2, 64, (56, 56), 64),
    "stage 2, 3x3 strided": Case(2, 128, (56, 56), 128, stride=(2, 2)),
    "stage 3, projection": Case(2, 512, (28, 28), 1024, (1, 1), (2, 2), (0, 0)),
    "stage 3, 3x3": Case(2, 256, (14, 14), 256),
    "stage 4, 1x1": Case(2, 512, (7, 7), 2048, (1, 1), padding=(0, 0)),
    "stage 4, 3x3": Case(2, 512, (7, 7), 512),
    "CIFAR": Case(16, 16, (32, 32), 16),
}


def random_case(rng: random.Random) -> Case:
    while True:
        case = Case(
            rng.randint(1, 5),
            rng.choice([rng.randint(1, 20), rng.randint(1, 80)]),
            (rng.randint(1, 18), rng.choice([rng.randint(1, 18), rng.randint(1, 150)])),
            rng.choice([rng.randint(1, 20), rng.randint(1, 80)]),
            *((rng.randint(1, most), rng.randint(1, most)) for most in (4, 3)),
            (rng.randint(0, 4), rng.randint(0, 4)),
            (rng.randint(1, 3), rng.randint(1, 3)),
        )
        if min(case.out_size) >= 1:
            return case


def operands(case: Case, dtype: torch.dtype, integers: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x after a ReLU (integers: any), weight and the result's gradient."""
    shapes = (
        (case.batch, case.channels, *case.size),
        case.weight_shape,
        (case.batch, case.out_channels, *case.out_size),
    )
    if integers:
        return tuple(
            torch.randint(-3, 4, shape).to(dtype).contiguous(memory_format=NHWC) for shape in shapes
        )
    x, weight, grad = (torch.randn(shape) for shape in shapes)
    return tuple(v.to(dtype).contiguous(memory_format=NHWC) for v in (x.relu(), weight, grad))


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype).contiguous(memory_format=layout)


def wgrad(
    case: Case,
    x: Tensor,
    grad: Tensor,
    isa: str,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    out = poisoned(case.weight_shape, dtype, layout)
    _C.conv_wgrad(tensor_arg(out), tensor_arg(x), tensor_arg(grad), case.window, isa)
    return out


def dgrad(
    case: Case,
    weight: Tensor,
    grad: Tensor,
    isa: str,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = poisoned((case.batch, case.channels, *case.size), grad.dtype, NHWC)
    tensors = (tensor_arg(out), tensor_arg(grad), tensor_arg(weight), case.window)
    _C.train_dgrad(*tensors, optional_tensor_arg(add), isa)
    return out


def assert_exact(case: Case, dtype: torch.dtype, isa: str) -> None:
    """Both gradients of integers are float64's, rounded once."""
    x, weight, grad = operands(case, dtype, integers=True)
    by_x, by_weight = case.gradients(x.double(), weight.double(), grad.double())
    assert torch.equal(wgrad(case, x, grad, isa).double(), by_weight), case
    assert torch.equal(dgrad(case, weight, grad, isa), by_x.to(dtype)), case


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_are_exact_on_integers(case, kernel):
    torch.manual_seed(0)
    assert_exact(case, *kernel)


@pytest.mark.parametrize("seed", range(4))
def test_gradients_of_random_convolutions_are_exact_on_integers(seed, kernel):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    for _ in range(50):
        assert_exact(random_case(rng), *kernel)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_gradients_of_many_random_convolutions_are_exact_on_integers(seed, kernel):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    for _ in range(500):
        assert_exact(random_case(rng), *kernel)


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("normal", [False, True], ids=["relu-input", "normal-input"])
def test_gradients_are_as_accurate_as_pytorchs(case, normal, kernel):
    torch.manual_seed(1)
    dtype, isa = kernel
    x, weight, grad = operands(case, dtype, integers=False)
    if normal:
        x = torch.randn_like(x)
    truth = case.gradients(x.double(), weight.double(), grad.double())
    ours = (dgrad(case, weight, grad, isa), wgrad(case, x, grad, isa, dtype))
    if dtype == torch.float32:
        for out, eager, exact in zip(ours, case.gradients(x, weight, grad), truth, strict=True):
            assert_contract(out, eager, exact)
        return
    # Nothing is better than the truth rounded once, and PyTorch's result is as good as that; ours
    # may add what PyTorch errs in float32 on the same numbers.
    sums = case.gradients(x.float(), weight.float(), grad.float())
    for out, eager, exact in zip(ours, sums, truth, strict=True):
        rounded = relative_error(exact.to(dtype), exact)
        assert relative_error(out, exact) <= rounded + relative_error(eager, exact)


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_weight_gradient_of_bfloat16_is_summed_in_float32(case):
    """A float32 result is that of float32 on the same numbers, as far as sums in float32 go."""
    if not _C.cpu_convolves_bf16():
        pytest.skip("the kernels of bfloat16 need AVX2 or AVX512_BF16")
    torch.manual_seed(2)
    x, weight, grad = operands(case, torch.bfloat16, integers=False)
    truth = case.gradients(x.double(), weight.double(), grad.double())[1]
    eager = case.gradients(x.float(), weight.float(), grad.float())[1]
    out = wgrad(case, x, grad, "")
    assert relative_error(out, truth) <= 2 * relative_error(eager, truth)
    assert torch.equal(wgrad(case, x, grad, "", torch.bfloat16), out.bfloat16())


@pytest.mark.parametrize("name", ["3x3 tails", "7x7 stem", "pointwise strided"])
def test_weight_gradient_in_channels_last(name, kernel):
    torch.manual_seed(3)
    case, (dtype, isa) = CASES[name], kernel
    x, _, grad = operands(case, dtype, integers=False)
    out = wgrad(case, x, grad, isa, dtype)
    assert torch.equal(wgrad(case, x, grad, isa, dtype, NHWC), out)


@pytest.mark.parametrize("name", ["many parts", "3x3 strided, even", "7x7 stem", "3x3 tails"])
def test_gradients_give_the_same_bits_with_any_number_of_threads(name, threads, kernel):
    torch.manual_seed(4)
    case, (dtype, isa) = CASES[name], kernel
    x, weight, grad = operands(case, dtype, integers=False)
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results.append((wgrad(case, x, grad, isa), dgrad(case, weight, grad, isa)))
    for by_weight, by_x in results[1:]:
        assert torch.equal(by_weight, results[0][0])
        assert torch.equal(by_x, results[0][1])


@pytest.mark.parametrize("name", ["3x3", "3x3 strided", "pointwise strided"])
def test_input_gradient_adds(name, kernel):
    torch.manual_seed(5)
    case, (dtype, isa) = CASES[name], kernel
    _, weight, grad = operands(case, dtype, integers=True)
    plain = dgrad(case, weight, grad, isa)
    add = torch.randint_like(plain, -9, 10).to(dtype)
    by_x = case.gradients(plain.double(), weight.double(), grad.double())[0]
    expected = (by_x + add.double()).to(dtype)
    assert torch.equal(dgrad(case, weight, grad, isa, add), expected)
    out = add.clone(memory_format=torch.preserve_format)
    assert torch.equal(dgrad(case, weight, grad, isa, out, out), expected)


@pytest.mark.parametrize("name", ["3x3 tails", "3x3 strided", "7x7 stem", "pointwise strided"])
def test_non_finite_numbers_stay_in_their_channel_and_image(name, kernel):
    torch.manual_seed(6)
    case, (dtype, isa) = CASES[name], kernel
    x, weight, grad = operands(case, dtype, integers=False)
    clean = wgrad(case, x, grad, isa)
    spoilt = grad.clone(memory_format=torch.preserve_format)
    spoilt[1, 2, 2, 2] = float("nan")  # all of whose taps lie inside
    out = wgrad(case, x, spoilt, isa)
    others = [k for k in range(case.out_channels) if k != 2]
    assert torch.equal(out[others], clean[others])
    assert out[2].isnan().all()
    assert torch.equal(dgrad(case, weight, spoilt, isa)[0], dgrad(case, weight, grad, isa)[0])
    assert dgrad(case, weight, spoilt, isa)[1].isnan().any()
    spoilt = x.clone(memory_format=torch.preserve_format)
    spoilt[1, 1, 2, 2] = float("inf")
    out = wgrad(case, spoilt, grad, isa)
    others = [c for c in range(case.channels) if c != 1]
    assert torch.equal(out[:, others], clean[:, others])
    assert not out[:, 1].isfinite().all()


def test_gradients_of_no_images(kernel):
    dtype, isa = kernel
    case = Case(0, 5, (4, 4), 7)
    x, weight, grad = operands(case, dtype, integers=True)
    assert torch.equal(wgrad(case, x, grad, isa), torch.zeros(case.weight_shape))
    assert dgrad(case, weight, grad, isa).shape == x.shape


def test_what_does_not_fit_is_refused():
    case = CASES["3x3"]
    x, weight, grad = operands(case, torch.float32, integers=True)
    with pytest.raises(ValueError, match="grad must be of size"):
        wgrad(case, x, grad[:1], "")
    with pytest.raises(ValueError, match="grad must be float32, found bfloat16"):
        wgrad(case, x, grad.bfloat16(), "")
    with pytest.raises(ValueError, match="x must be dense and channels_last"):
        wgrad(case, x.contiguous(), grad, "")
    with pytest.raises(ValueError, match="out must be of size"):
        wgrad(case._replace(kernel=(3, 3), out_channels=31), x, grad, "")
    with pytest.raises(ValueError, match="out must be float32, found bfloat16"):
        wgrad(case, x, grad, "", torch.bfloat16)
    strided = torch.empty(*case.weight_shape[:3], 6)[..., ::2]
    with pytest.raises(ValueError, match="contiguous or channels_last"):
        _C.conv_wgrad(tensor_arg(strided), tensor_arg(x), tensor_arg(grad), case.window)
    with pytest.raises(ValueError, match="weight must be of size"):
        dgrad(case, weight[:, :, :2], grad, "")
    with pytest.raises(ValueError, match="residual must have 1 to 16 channels, found 32"):
        dgrad(case, weight, grad, "", add=grad[:1])
    shared = torch.zeros(weight.numel())
    grad = shared[: grad.numel()].view(2, 8, 8, 32).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="out overlaps grad"):
        _C.conv_wgrad(
            tensor_arg(shared.view(weight.shape)), tensor_arg(x), tensor_arg(grad), case.window
        )
