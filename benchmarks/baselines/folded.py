"""The vendors' fused convolutions, batch norm folded into the weights: cuDNN's and oneDNN's.

`CudnnNetwork` is a whole ResNet of them, `library_call` the counterpart of one of our ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights


class Folded(NamedTuple):
    """The arguments of `torch.conv2d` after its input."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def fold(conv: Any, mean: Tensor, var: Tensor, gamma: Any, beta: Any, eps: float) -> Folded:
    """conv: a module or `Convolution`; the vectors are its batch norm's. Computed in float32."""
    gamma, beta = (None if v is None else v.float() for v in (gamma, beta))
    weight, bias = fuse_conv_bn_weights(
        conv.weight.float(), None, mean.float(), var.float(), eps, gamma, beta
    )
    dtype = conv.weight.dtype
    nhwc = weight.detach().to(dtype, memory_format=torch.channels_last)
    window = conv.stride, conv.padding, conv.dilation, conv.groups
    return Folded(nhwc, bias.detach().to(dtype), *window)


def blocks_of(model: Any) -> Iterator[tuple[list[tuple[Any, Any]], Any]]:
    """Convolutions with their batch norms of each block of torchvision's ResNet, and the same of
    its projection or None."""
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            numbers = [n for n in "123" if hasattr(block, f"conv{n}")]
            layers = [(getattr(block, f"conv{n}"), getattr(block, f"bn{n}")) for n in numbers]
            yield layers, block.downsample


class CudnnNetwork:
    """torchvision's ResNet on cuDNN's fused operators."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.stem = _fold_modules(model.conv1, model.bn1)
        self.blocks = [
            ([_fold_modules(*layer) for layer in layers], side and _fold_modules(*side))
            for layers, side in blocks_of(model)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        x = self.model.maxpool(torch.cudnn_convolution_relu(x, *self.stem))
        for (*inner, last), projection in self.blocks:
            shortcut = x if projection is None else torch.conv2d(x, *projection)
            for layer in inner:
                x = torch.cudnn_convolution_relu(x, *layer)
            x = _add_relu(x, last, shortcut)
        logits: Tensor = self.model.fc(self.model.avgpool(x).flatten(1))
        return logits


def _add_relu(x: Tensor, folded: Folded, added: Tensor) -> Tensor:
    """ReLU(convolution + `added`) in one call of cuDNN."""
    return torch.cudnn_convolution_add_relu(x, folded[0], added, 1.0, *folded[1:])


def _fold_modules(conv: Any, bn: Any) -> Folded:
    return fold(conv, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)


def library_call(
    convolutions: Sequence[tuple[Tensor, Folded]], residual: Tensor | None, pool: Any
) -> Callable[[], object]:
    """A call of ReLU(first convolution + residual or second convolution), then max pooling.

    convolutions: inputs, and what they are convolved with. pool: arguments of `F.max_pool2d`, or
    None where there is none.

    oneDNN in PyTorch 2.9 and 2.11 adds nothing to images of 1×1, in any layout or type: there the
    call raises RuntimeError ("could not create a memory"). That of 2.14 does.
    """
    build = _cudnn if convolutions[0][0].is_cuda else _onednn
    convolve, convolve_relu, convolve_add_relu = build(convolutions)

    def run() -> object:
        added = convolve(1) if len(convolutions) > 1 else residual
        out = convolve_relu(0) if added is None else convolve_add_relu(0, added)
        return out if pool is None else F.max_pool2d(out, *pool)

    return run


def _cudnn(convolutions: Sequence[tuple[Tensor, Folded]]) -> tuple[Callable[..., Tensor], ...]:
    def convolve(i: int) -> Tensor:
        x, folded = convolutions[i]
        return torch.conv2d(x, *folded)

    def convolve_relu(i: int) -> Tensor:
        x, folded = convolutions[i]
        return torch.cudnn_convolution_relu(x, *folded)

    def convolve_add_relu(i: int, added: Tensor) -> Tensor:
        x, folded = convolutions[i]
        return _add_relu(x, folded, added)

    return convolve, convolve_relu, convolve_add_relu


def _onednn(convolutions: Sequence[tuple[Tensor, Folded]]) -> tuple[Callable[..., Tensor], ...]:
    ops = torch.ops.mkldnn
    packed = []
    for x, folded in convolutions:
        window = (list(folded.padding), list(folded.stride), list(folded.dilation), folded.groups)
        weight = ops._reorder_convolution_weight(folded.weight, *window, list(x.shape))
        nhwc = x.contiguous(memory_format=torch.channels_last)
        packed.append((nhwc, weight, folded.bias, *window))

    def convolve(i: int, then: str = "none") -> Tensor:
        return ops._convolution_pointwise(*packed[i], then, [], "")

    def convolve_add_relu(i: int, added: Tensor) -> Tensor:
        x, *rest = packed[i]
        return ops._convolution_pointwise.binary(x, added, *rest, "add", 1.0, "relu", [], "")

    return convolve, lambda i: convolve(i, "relu"), convolve_add_relu
