"""Convolution shapes and parameters that every backend is tested with, fixed and random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..parameters import BatchNorm, ConvBn, Convolution, Gate, GroupNorm, Normalization


class ConvCase(NamedTuple):
    """One convolution layer and its input: (batch, channels, height, width) -> out_channels."""

    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the result; below 1 where the input is smaller than the window."""
        reach = self.dilation * (self.kernel - 1) + 1
        height, width = (
            (size + 2 * self.padding - reach) // self.stride + 1
            for size in (self.height, self.width)
        )
        return height, width

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.out_channels, *self.output_size


class BlockCase(NamedTuple):
    """A bottleneck and its input: (batch, channels, height, width) -> inner -> out_channels."""

    batch: int
    channels: int
    height: int
    width: int
    inner: int
    out_channels: int
    stride: int = 1
    projection: bool = False

    def convolutions(self) -> list[ConvCase]:
        """Those of the main path, then the projection where there is one."""
        first = ConvCase(self.batch, self.channels, self.height, self.width, self.inner)
        second = ConvCase(
            self.batch, self.inner, self.height, self.width, self.inner, 3, self.stride, 1
        )
        third = ConvCase(self.batch, self.inner, *second.output_size, self.out_channels)
        side = first._replace(out_channels=self.out_channels, stride=self.stride)
        return [first, second, third, *([side] if self.projection else [])]


# Each stands for a way in which a kernel can go wrong; small enough for an interpreter.
CONV_CASES = {
    "pointwise": ConvCase(2, 32, 7, 7, 64),
    "pointwise strided": ConvCase(2, 32, 9, 6, 48, stride=2),
    "3x3": ConvCase(2, 16, 8, 8, 32, 3, 1, 1),
    "3x3 strided": ConvCase(1, 32, 9, 11, 16, 3, 2, 1),
    "3x3 dilated": ConvCase(1, 16, 10, 7, 16, 3, 1, 2, 2),
    "3x3 unpadded": ConvCase(2, 8, 6, 5, 8, 3),
    "5x5": ConvCase(1, 8, 9, 9, 8, 5, 1, 2),
    "7x7 stem": ConvCase(1, 3, 21, 17, 64, 7, 2, 3),
    "channel tails": ConvCase(1, 19, 5, 6, 37, 3, 1, 1),
    "one channel": ConvCase(3, 1, 5, 5, 1, 3, 1, 1),
    "grouped": ConvCase(1, 32, 7, 7, 32, 3, 1, 1, groups=4),
    "grouped uneven": ConvCase(2, 12, 5, 5, 18, 3, 2, 1, groups=3),
    "depthwise": ConvCase(1, 8, 6, 6, 8, 3, 1, 1, groups=8),
    "1x1 image": ConvCase(1, 32, 1, 1, 16),
    "1x1 image padded": ConvCase(8, 16, 1, 1, 64, 3, 1, 1),
}


def generator(seed: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A seeded generator: on the CPU a case is the same wherever it is used, and on a GPU large
    ones are made in no time."""
    return torch.Generator(device).manual_seed(seed)


def randn(rng: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers, on the generator's device as all that is drawn."""
    return torch.randn(shape, generator=rng, device=rng.device)


def rand(rng: torch.Generator, *shape: int) -> Tensor:
    """Numbers from [0, 1)."""
    return torch.rand(shape, generator=rng, device=rng.device)


def randint(
    rng: torch.Generator,
    low: int,
    high: int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Integers from [low, high)."""
    return torch.randint(low, high, tuple(shape), generator=rng, device=rng.device, dtype=dtype)


def make_batch_norm(
    channels: int,
    rng: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> BatchNorm:
    """Random BN parameters with a few negative, tiny and zero weights among them."""
    weight = randn(rng, channels)
    weight[::5] *= 1e-4
    weight[1::7] = 0.0
    return BatchNorm(
        randn(rng, channels).to(device, dtype),
        (rand(rng, channels) + 0.3).to(device, dtype),
        weight.to(device, dtype),
        randn(rng, channels).to(device, dtype),
        1e-5,
    )


def make_convolution(
    case: ConvCase,
    rng: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, ConvBn]:
    """A random input (channels_last) and a layer of the case's shapes."""
    x = randn(rng, *case[:4])
    fan_in = case.channels // case.groups * case.kernel**2
    weight = randn(rng, case.out_channels, case.channels // case.groups, case.kernel, case.kernel)
    x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
    weight = (weight * (2 / fan_in) ** 0.5).to(device, dtype)
    conv = Convolution(
        weight.contiguous(memory_format=torch.channels_last),
        (case.stride, case.stride),
        (case.padding, case.padding),
        (case.dilation, case.dilation),
        case.groups,
    )
    return x, ConvBn(conv, make_batch_norm(case.out_channels, rng, dtype, device))


def make_residual(case: ConvCase, x: Tensor, rng: torch.Generator) -> Tensor:
    """A random tensor shaped like the case's result, like `x` otherwise."""
    residual = randn(rng, *case.output_shape).to(x.device, x.dtype)
    return residual.contiguous(memory_format=torch.channels_last)


def make_identity(
    case: ConvCase, channels: int, stride: int, x: Tensor, rng: torch.Generator
) -> Tensor:
    """Shortcut option A's residual for the case's result: every `stride`-th row and column of a
    block's input of so many channels, small integers, like `x` otherwise."""
    height, width = (stride * size for size in case.output_size)
    block_input = randint(rng, -9, 10, (case.batch, channels, height, width))
    block_input = block_input.to(x.device, x.dtype).contiguous(memory_format=torch.channels_last)
    return block_input[:, :, ::stride, ::stride]


def as_images(x: Tensor) -> tuple[Tensor, Normalization]:
    """Small integers as bytes, and the normalisation that makes them what they were."""
    channels = x.shape[1]
    return (x + 8).to(torch.uint8), Normalization([8 / 255] * channels, [1 / 255] * channels)


def make_integers(
    case: ConvCase,
    rng: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, ConvBn]:
    """Like `make_convolution`, with values whose exact result every dtype can hold.

    Activations and weights lie in {-1, 0, 1}, few enough non-zero that sums stay below 2⁷ for
    these shapes; the normalisation (mean 1, variance + eps = 1) is exact.
    """
    x, (conv, _) = make_convolution(case, rng, dtype, device)
    draw = randint(rng, -1, 2, x.shape)
    keep = rand(rng, *conv.weight.shape) < 0.3
    weight = randint(rng, -1, 2, conv.weight.shape) * keep
    ones = torch.ones(case.out_channels, dtype=dtype, device=device)
    sign = torch.where(torch.arange(case.out_channels) % 3 == 0, -1.0, 1.0).to(device, dtype)
    conv = conv._replace(weight=conv.weight.copy_(weight))
    bn = BatchNorm(ones, 0.75 * ones, sign, ones.clone(), 0.25)
    return x.copy_(draw), ConvBn(conv, bn)


def make_bottleneck(
    case: BlockCase,
    rng: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    make: Callable[..., tuple[Tensor, ConvBn]] = make_convolution,
) -> list[Any]:
    """The arguments of `reference.ops.bottleneck`; `make` makes each layer and its input."""
    made = [make(conv, rng, dtype, device) for conv in case.convolutions()]
    return [made[0][0], *(layer for _, layer in made), *(() if case.projection else (None,))]


def make_group_norm(
    shape: tuple[int, int, int, int],
    groups: int,
    rng: torch.Generator,
    residual: bool = False,
    affine: bool = True,
    relu: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Any]:
    """The arguments of `reference.ops.group_norm_add_relu`, groups of unlike mean and deviation."""
    channels = shape[1]

    def draw(*size: int) -> Tensor:
        return randn(rng, *size)

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype)

    x = (draw(*shape) + draw(channels, 1, 1)) * (0.5 + draw(channels, 1, 1).abs())
    added = draw(*shape).contiguous(memory_format=torch.channels_last) if residual else None
    weight, bias = (moved(draw(channels)), moved(draw(channels))) if affine else (None, None)
    norm = GroupNorm(groups, weight, bias)
    x = moved(x.contiguous(memory_format=torch.channels_last))
    return [x, norm, None if added is None else moved(added), relu]


def make_squeeze_excite(
    batch: int,
    channels: int,
    height: int,
    width: int,
    hidden: int,
    rng: torch.Generator,
    residual: bool = False,
    bias: bool = False,
    relu: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Any]:
    """The arguments of `reference.ops.squeeze_excite`, gates all over their range."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (randn(rng, *shape) * scale).to(device, dtype)

    image = (batch, channels, height, width)
    x = (draw(*image) + 0.5).contiguous(memory_format=torch.channels_last)
    added = draw(*image).contiguous(memory_format=torch.channels_last) if residual else None
    reduce, expand = draw(hidden, channels, scale=2 * channels**-0.5), draw(channels, hidden)
    biases = (draw(hidden), draw(channels)) if bias else (None, None)
    return [x, Gate(reduce, biases[0], expand, biases[1]), added, relu]


def make_gated_integers(x: Tensor, hidden: int, rng: torch.Generator) -> list[Any]:
    """The same of integers `x` whose means are whole 64ths: the gates are 0, 1/2 and 1 to the last
    bit, because what is not zero before the sigmoid is at least 512. Few channels, about four, make
    up a hidden value, so that bfloat16 holds it."""

    def draw(*shape: int, scale: int = 1) -> Tensor:
        return (scale * randint(rng, -1, 2, shape)).to(x.device, x.dtype)

    channels = x.shape[1]
    few = (rand(rng, hidden, channels) < 6 / channels).to(x.device)
    reduce, expand = draw(hidden, channels) * few, draw(channels, hidden, scale=2**15)
    residual = draw(*x.shape).contiguous(memory_format=torch.channels_last)
    return [x, Gate(reduce, None, expand, None), residual, True]


def randomise_statistics(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every BN of `model` random statistics, and every BN and group norm random parameters,
    negative and tiny weights included.

    The scale of each layer is kept near one, so that activations of deep networks stay finite.
    """
    rng = generator(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
                channels = module.num_features
                assert module.running_var is not None
                module.running_mean.copy_(0.1 * randn(rng, channels))
                module.running_var.copy_(0.5 + rand(rng, channels))
            elif isinstance(module, torch.nn.GroupNorm):
                channels = module.num_channels
            else:
                continue
            weight = 0.5 + rand(rng, channels)
            weight[::7] *= -1
            weight[3::11] *= 1e-3
            if module.affine:
                module.weight.copy_(weight)
                module.bias.copy_(0.1 * randn(rng, channels))
    return model
