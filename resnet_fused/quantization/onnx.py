"""A quantised network as ONNX: QuantizeLinear and DequantizeLinear around float operators (QDQ).

Engines recognise the pattern and compute in int8. They add the shortcut and round in their own
order, so that a result may differ by a unit of its scale from this package's.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers import QuantizedConv
from .network import QuantizedNetwork

_OPSET = 17


def export_onnx(network: QuantizedNetwork, path: str | PathLike[str]) -> None:
    """Writes `network`, of int8, to `path` as an ONNX model with any batch and image size.

    Its input "x" (N, C, H, W) is bytes, uint8, where the network takes those, else normalised
    floats; its output "logits" (N, classes) is float32. Needs the package onnx. Raises ValueError
    for fp8 and for layers that were kept in higher precision, TypeError for other networks.
    """
    if not isinstance(network, QuantizedNetwork):
        raise TypeError(
            f"network must be one of resnet_fused.quantize, found {type(network).__qualname__}."
        )
    import onnx

    if network.dtype != torch.int8:
        raise ValueError(f"only int8 networks are exported as ONNX, found {network.dtype}.")
    onnx.save(_Graph(network).model(), path)


class _Value(NamedTuple):
    """Dequantised activations: their name in the graph, scale and number of channels."""

    name: str
    scale: Tensor
    channels: int


class _Graph:
    """The ONNX graph of a network, made node by node."""

    def __init__(self, network: QuantizedNetwork) -> None:
        self._network = network
        self._nodes: list[Any] = []
        self._tensors: list[Any] = []

    def model(self) -> Any:
        from onnx import TensorProto, checker, helper

        network = self._network
        images: Any = network.images
        x = self._images(images)
        for layer in network.stem:
            x = self._conv(layer, x, None)
        for block in network.blocks:
            entry = x
            for layer in block.children():
                x = self._conv(layer, x, entry)
        head: Any = network.head
        self._head(head, x)
        channels, classes = len(images.scale), len(head.bias)
        kind = TensorProto.FLOAT if images.mean is None else TensorProto.UINT8
        graph = helper.make_graph(
            self._nodes,
            "resnet_fused",
            [helper.make_tensor_value_info("x", kind, ["N", channels, "H", "W"])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])],
            self._tensors,
        )
        opset = helper.make_opsetid("", _OPSET)
        model = helper.make_model(graph, opset_imports=[opset], producer_name="resnet_fused")
        model.ir_version = 9  # what engines of that opset read
        checker.check_model(model, full_check=True)
        return model

    def _images(self, images: Any) -> _Value:
        """Images, in units of their scale where they are bytes, from whose padding they count."""
        first: Any = next(iter(self._network.stem))
        if not isinstance(first, QuantizedConv):
            raise _not_quantized(first)
        if images.mean is None:
            zero = images.zero[0].to(torch.uint8)
            return _Value(*self._quantized("x", images.scale[0], zero), len(images.scale))
        x = self._node("Cast", "x", to=1)
        if first.padding_value is not None:
            x = self._node("Sub", x, self._tensor(first.padding_value.float().view(1, -1, 1, 1)))
        return _Value(x, torch.ones(()).double(), len(images.scale))

    def _conv(self, layer: nn.Module, x: _Value, entry: _Value | None) -> _Value:
        """What QuantizedConv means, of x and the block's input."""
        if not isinstance(layer, QuantizedConv):
            raise _not_quantized(layer)
        geometry, value = layer.geometry, x.name
        unit = layer.multiplier.double() * layer.scale.double()  # of the accumulator
        bias = layer.bias.double()
        if layer.padding_value is not None:
            # Of products with what the padding holds, which images here are less by.
            sums = layer.weight.double().sum((2, 3))
            bias = bias + (sums * layer.padding_value.double()).sum(1)
        weight = self._dequantized(layer.weight, unit / x.scale)
        added = self._dequantized(bias.int(), unit)
        y = self._node("Conv", value, weight, added, **_window(geometry.conv))
        if entry is not None and geometry.takes_shortcut():
            shortcut, scale, channels = entry
            if layer.projection_weight is not None:
                assert layer.shortcut_scale is not None
                projected = unit * layer.shortcut_scale.double() / scale
                weight = self._dequantized(layer.projection_weight, projected)
                shortcut = self._node("Conv", shortcut, weight, **_window(geometry.projection))
            else:
                shortcut = self._identity(shortcut, geometry.stride, len(bias), channels)
            y = self._node("Add", y, shortcut)
        zero = torch.zeros((), dtype=torch.uint8)
        y, scale = self._quantized(self._node("Relu", y), layer.scale[0], zero)
        if geometry.pool is not None:
            kernel, stride, padding = geometry.pool
            window = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [padding] * 4}
            y = self._node("MaxPool", y, **window)
        return _Value(y, scale, len(bias))

    def _identity(self, x: str, stride: int, channels: int, of: int) -> str:
        """x, of `of` channels: every stride-th pixel, and zeros in the channels it lacks."""
        if stride > 1:
            ends, axes = torch.tensor([2**31 - 1] * 2), torch.tensor([2, 3])
            starts, steps = torch.tensor([0, 0]), torch.tensor([stride] * 2)
            x = self._node("Slice", x, *map(self._tensor, (starts, ends, axes, steps)))
        if of < channels:
            pads = torch.tensor([0, 0, 0, 0, 0, channels - of, 0, 0])
            x = self._node("Pad", x, self._tensor(pads))
        return x

    def _head(self, head: Any, x: _Value) -> None:
        pooled = self._node("Flatten", self._node("GlobalAveragePool", x.name))
        if head.multiplier is None:
            raise _not_quantized(head)
        weight = self._dequantized(head.weight, head.multiplier.double() / x.scale)
        bias = self._tensor(head.bias)
        self._node("Gemm", pooled, weight, bias, outputs=["logits"], transB=1)

    def _quantized(self, x: str, scale: Tensor, zero: Tensor) -> tuple[str, Tensor]:
        """x quantised and dequantised."""
        arguments = self._tensor(scale), self._tensor(zero)
        x = self._node("QuantizeLinear", x, *arguments)
        return self._node("DequantizeLinear", x, *arguments), scale.double()

    def _dequantized(self, weight: Tensor, scale: Tensor) -> str:
        """Integers with a scale for each output channel."""
        return self._node(
            "DequantizeLinear", self._tensor(weight), self._tensor(scale.float()), axis=0
        )

    def _node(self, kind: str, *inputs: str, outputs: Any = None, **attributes: Any) -> str:
        from onnx import helper

        outputs = outputs or [f"v{len(self._nodes)}"]
        self._nodes.append(helper.make_node(kind, inputs, outputs, **attributes))
        name: str = outputs[0]
        return name

    def _tensor(self, tensor: Tensor) -> str:
        from onnx import numpy_helper

        name = f"t{len(self._tensors)}"
        self._tensors.append(numpy_helper.from_array(tensor.cpu().numpy(), name))
        return name


def _window(window: Any) -> dict[str, Any]:
    stride, padding, dilation, groups = window
    return {
        "strides": list(stride),
        "pads": [*padding, *padding],
        "dilations": list(dilation),
        "group": groups,
    }


def _not_quantized(layer: nn.Module) -> ValueError:
    return ValueError(
        f"{layer} was kept in higher precision, and only networks of int8 layers are exported; "
        "quantise without keep and least_agreement."
    )
