"""Reads a float network and folds its batch norms, in float64, into weights and biases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import fusion
from ..blocks import PaddedIdentity, ResidualBlock
from ..fuse import Fused
from ..models.network import ResidualNetwork
from ..parameters import BatchNorm, MaxPool
from ..sequence import flat
from .folded import FoldedConv, FoldedHead, FoldedNetwork
from .layers import Geometry, Images, InputKind

Normalization = tuple[Sequence[float], Sequence[float]]


def fold(
    model: nn.Module, dtype: torch.dtype, normalization: Normalization | None
) -> FoldedNetwork:
    """The network of `model` without batch norms, in float32, uncalibrated.

    Raises ValueError for a model in training mode and for one that has anything else than the
    layers of a ResNet, naming it.
    """
    if not isinstance(model, (ResidualNetwork, Fused)):
        raise ValueError(
            f"quantize takes this package's networks, found {type(model).__qualname__}; a ResNet "
            "of torchvision serves after resnet_fused.fuse(model)."
        )
    network = cast("nn.Module", model)
    if network.training:
        raise ValueError("the model is in training mode; call model.eval() first.")
    names = {module: name for name, module in network.named_modules()}
    reader = _Reader(names, torch.uint8 if dtype == torch.int8 else dtype)
    children = dict(network.named_children())
    try:
        stem = list(reader.stem([children[name] for name in ("conv1", "bn1", "relu")], children))
        stages = [child for name, child in children.items() if name.startswith("layer")]
        blocks = [reader.block(block) for stage in stages for block in stage.children()]
        head = reader.head(children["avgpool"], children["fc"])
    except KeyError as error:
        raise ValueError(
            f"{type(model).__qualname__} has no {error.args[0]}: only a network of a stem, "
            "residual blocks, average pooling and one linear layer can be quantised, and not "
            "timm's, whose weights this package's networks take."
        ) from error
    like = stem[0].weight
    mean = std = None
    if normalization is not None:
        values = [255 * torch.as_tensor(v, device=like.device).float() for v in normalization]
        # A mean is between the least byte and the largest, as which images are padded with it.
        if (
            len(values) != 2
            or any(tuple(v.shape) != like.shape[1:2] for v in values)
            or ((values[0] < 0) | (values[0] > 255) | (values[1] <= 0)).any()
        ):
            raise ValueError(
                f"normalization must be the mean and the positive standard deviation of "
                f"{like.shape[1]} channels, of images from 0 to 1; found {normalization}."
            )
        mean, std = values
    stem[0].is_first = True
    images = Images({"mean": mean, "std": std}, InputKind(torch.float32))
    return FoldedNetwork(images, stem, blocks, head).eval()


class _Reader:
    """Makes folded layers of modules, whose names it knows."""

    def __init__(self, names: dict[nn.Module, str], dtype: torch.dtype) -> None:
        self._names, self._dtype = names, dtype

    def stem(
        self, modules: Sequence[nn.Module], children: dict[str, nn.Module]
    ) -> Iterator[FoldedConv]:
        pool = None
        if (module := children.get("maxpool")) is not None and not fusion.is_identity(module):
            pool = fusion.max_pool(module)
            if pool is None:
                raise self._unfit(module)
        row = list(flat(modules))
        for start in range(0, len(row), 3):
            conv, bn, relu = row[start : start + 3]
            last = start + 3 == len(row)
            yield self._layer(conv, bn, relu, pool=pool if last else None)

    def block(self, block: nn.Module) -> list[FoldedConv]:
        if not isinstance(block, ResidualBlock):
            raise self._unfit(block)
        activations = block.activations()
        pairs = block.layers()
        layers = [
            self._layer(*pair, activations[min(i, len(activations) - 1)])
            for i, pair in enumerate(pairs[:-1])
        ]
        shortcut: dict[str, Any] = {}
        downsample = block.downsample
        if not block.has_shortcut:
            pass
        elif downsample is None or fusion.is_identity(downsample):
            shortcut["stride"] = 1
        elif type(downsample) is PaddedIdentity and fusion.untouched(downsample):
            shortcut["stride"] = downsample.stride
        else:
            projection = fusion.projection_modules(downsample)
            if projection is None or len(projection) != 2:
                raise self._unfit(downsample)
            shortcut["projection"] = projection
        return [*layers, self._layer(*pairs[-1], activations[-1], **shortcut)]

    def head(self, pool: nn.Module, linear: nn.Module) -> FoldedHead:
        arguments = fusion.head(pool, linear)
        if arguments is None:
            raise self._unfit(linear)
        weight, bias = arguments
        return FoldedHead(self._names[linear], weight, bias, self._dtype)

    def _layer(
        self,
        conv: nn.Module,
        bn: nn.Module,
        relu: nn.Module,
        projection: Sequence[nn.Module] | None = None,
        stride: int = 0,
        pool: MaxPool | None = None,
    ) -> FoldedConv:
        if not fusion.is_relu(relu):
            raise self._unfit(relu)
        weight, bias, window = self._folded(conv, bn)
        projected, side = None, None
        if projection is not None:
            projected, added, side = self._folded(*projection)
            bias = bias + added
        geometry = Geometry(window, side, stride, pool, self._dtype)
        return FoldedConv(self._names[conv], weight, bias, projected, geometry)

    @torch.no_grad()
    def _folded(self, conv: nn.Module, bn: nn.Module) -> tuple[Tensor, Tensor, Any]:
        """The weight and the bias, in float64, of the two together."""
        layer = fusion.conv_bn(conv, bn)
        if layer is None:
            raise self._unfit(conv if fusion.convolution(conv) is None else bn)
        scale, shift = _scale_shift(layer.bn)
        weight, *window = layer.conv
        return weight.double() * scale[:, None, None, None], shift, tuple(window)

    def _unfit(self, module: nn.Module) -> ValueError:
        return ValueError(
            f"{self._names.get(module, 'a module')} ({type(module).__qualname__}) cannot be "
            "quantised: it is hooked or replaced, in another mode, or none of convolution, batch "
            "norm with running statistics, ReLU, max pooling, residual block, 1×1 projection, "
            "average pooling and linear layer, in their usual order."
        )


def _scale_shift(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """Batch norm as x · scale + shift, in float64."""
    scale = (bn.var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    shift = -bn.mean.double() * scale
    return scale, shift if bn.bias is None else shift + bn.bias.double()
