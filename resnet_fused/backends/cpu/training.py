"""The training pieces of backend `cpu`: our convolutions, and passes of ours between them.

Algorithm: a convolution reads plain operands, so normalisation, ReLU and their gradients are passes
of their own, each over memory once. dgrad at stride 1 is our forward kernel on the weight turned
round, 3×3 in float32 by Winograd's. Groups, which our kernels do not serve, are left to PyTorch's
convolution between the same passes.
Memory: results lie in memory that is kept from step to step, because fresh pages from the system
cost more than what is then done with them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Hashable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import settings
from ..._extension import optional_tensor_arg, tensor_arg
from ...parameters import Activation, Convolution, Layer, MaxPool, OperandTerm, PreBnGradient
from ...reference.convolution import convolution_backward, convolve, well_posed
from ...reference.training import ReferenceTraining
from ..arguments import nhwc, residual_arg
from ..training import Replays

_LANES = 16
_KEPT_BYTES = 64 << 10  # smaller memory comes from pages that are there
_reference = ReferenceTraining()


class CpuTraining:
    """Implements `TrainingKernels` and `Replays` of `resnet_fused.backends.training`, for float32
    and bfloat16."""

    merge_moments = staticmethod(_reference.merge_moments)
    merge_sums = staticmethod(_reference.merge_sums)

    def __init__(self, extension: ModuleType, own: Collection[torch.dtype]) -> None:
        """own: dtypes that our kernels convolve."""
        self.extension = extension
        self.replays: Replays = self
        self._own = own

    def saves_all(self) -> bool:
        return not settings.training_saves_memory()

    def folded_ends(self, dtype: torch.dtype) -> None:
        """None: arithmetic takes the time here, and folding adds some to save bytes."""

    def is_profitable(self, layers: Sequence[Layer]) -> bool:
        return all(self._convolves(layer.conv.weight, layer.conv) for layer in layers)

    def conv_stats(
        self, x: Tensor, conv: Convolution, statistics: bool
    ) -> tuple[Tensor, Tensor | None]:
        x = nhwc(x)
        if self._convolves(x, conv):
            size = conv.output_size(*x.shape[2:])
            pre_bn = self._empty(x, (len(x), len(conv.weight), *size))
            self.extension.train_conv(
                tensor_arg(pre_bn), tensor_arg(x), tensor_arg(conv.weight.detach()), _window(conv)
            )
        else:
            pre_bn = nhwc(convolve(x, conv._replace(weight=conv.weight.to(x.dtype))))
        if not statistics:
            return pre_bn, None
        moments = torch.empty((3, pre_bn.shape[1]))
        self.extension.train_moments(tensor_arg(moments), tensor_arg(pre_bn))
        return pre_bn, moments[None]

    def bn_scale_shift(self, moments: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        scale_shift = torch.empty((6, moments.shape[2]))
        self.extension.train_scale_shift(
            tensor_arg(scale_shift),
            tensor_arg(moments.float().contiguous()),
            tensor_arg(weight.detach()),
            tensor_arg(bias.detach()),
            eps,
        )
        return scale_shift

    def bn_add_relu(self, main: Activation, shortcut: Tensor | Activation | None) -> Tensor:
        out = self._empty(main.pre_bn, main.pre_bn.shape)
        residual = shortcut if isinstance(shortcut, Tensor) else None
        other = shortcut if isinstance(shortcut, Activation) else None
        self.extension.train_bn_add_relu(
            tensor_arg(out),
            _activation_arg(main),
            residual_arg(residual),
            None if other is None else _activation_arg(other),
        )
        return out

    def relu_gradient(
        self, grad: Tensor, y: Tensor, branches: list[Activation]
    ) -> tuple[Tensor, list[Tensor]]:
        g = self._empty(y, y.shape)
        return g, self._relu_gradient(g, nhwc(grad), nhwc(y), branches)

    def bn_backward_coefficients(
        self, sums: Tensor, total: Tensor, scale_shift: Tensor, frozen: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels = scale_shift.shape[1]
        coefficients = torch.empty((4, channels))
        weight_grad, bias_grad = torch.empty(channels), torch.empty(channels)
        self.extension.train_coefficients(
            tensor_arg(coefficients),
            tensor_arg(weight_grad),
            tensor_arg(bias_grad),
            tensor_arg(sums),
            tensor_arg(total),
            tensor_arg(scale_shift),
            frozen,
        )
        return coefficients, weight_grad, bias_grad

    def pre_bn_gradient(self, gradient: PreBnGradient) -> Tensor:
        g = nhwc(gradient.grad)
        out = g if gradient.last_use else self._empty(g, g.shape)
        self.extension.train_pre_bn_gradient(
            tensor_arg(out),
            tensor_arg(g),
            None if gradient.frozen else optional_tensor_arg(gradient.pre_bn),
            tensor_arg(gradient.coefficients),
        )
        return out

    def dgrad(
        self,
        g: Tensor,
        conv: Convolution,
        shape: torch.Size,
        below: Activation | None,
        add: Tensor | None,
        add_stride: int | None = None,
        term: OperandTerm | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        assert term is None  # no ends are folded
        before, after = (add, None) if add_stride in (None, 1) else (None, add)
        if before is not None:
            before = before[:, : shape[1]]
        # With few channels our sums run longer than PyTorch's before they are added up, and most
        # lanes idle: a stem's gradient of the image, which training does not ask for.
        if self._convolves(g, conv) and min(conv.weight.shape[:2]) >= _LANES:
            out = self._empty(g, shape)
            if max(conv.stride) > 1 and before is not None:
                before = nhwc(before)
            self.extension.train_dgrad(
                tensor_arg(out),
                tensor_arg(nhwc(g)),
                tensor_arg(conv.weight.detach()),
                _window(conv),
                residual_arg(before),
            )
        else:
            x = g.new_empty(1).expand(shape)  # of which only the sizes count
            out = nhwc(convolution_backward(g, x, conv, 0))
            if before is not None:
                out += before
        if after is not None:
            assert add_stride is not None
            self.extension.train_add_strided(
                tensor_arg(out), residual_arg(after[:, : shape[1]]), add_stride
            )
        if below is None:
            return out, None
        (sums,) = self._relu_gradient(out, out, None, [below])
        return out, sums

    def wgrad(self, g: Tensor, x: Tensor, conv: Convolution) -> Tensor:
        if not self._convolves(g, conv):
            x, posed = well_posed(x, conv)
            return nhwc(convolution_backward(g, x, posed, 1).to(conv.weight.dtype))
        out = self._empty(conv.weight, conv.weight.shape)
        self.extension.conv_wgrad(
            tensor_arg(out), tensor_arg(nhwc(x)), tensor_arg(nhwc(g)), _window(conv)
        )
        return out

    def bn_relu_pool(self, x: Activation, pool: MaxPool) -> tuple[Tensor, Tensor]:
        shape = (*x.pre_bn.shape[:2], *pool.output_size(*x.pre_bn.shape[2:]))
        out, argmax = self._empty(x.pre_bn, shape), self._empty(x.pre_bn, shape, torch.uint8)
        self.extension.train_pool(
            tensor_arg(out), tensor_arg(argmax), _activation_arg(x), tuple(pool)
        )
        return out, argmax

    def pool_gradient(
        self, grad: Tensor, x: Activation, argmax: Tensor, pool: MaxPool
    ) -> tuple[Tensor, Tensor]:
        g, sums = self._empty(x.pre_bn, x.pre_bn.shape), torch.empty((2, x.pre_bn.shape[1]))
        self.extension.train_pool_gradient(
            tensor_arg(g),
            tensor_arg(sums),
            tensor_arg(nhwc(grad)),
            _activation_arg(x),
            tensor_arg(argmax),
            tuple(pool),
        )
        return g, sums[None]

    def _empty(
        self, like: Tensor, shape: Collection[int], dtype: torch.dtype | None = None
    ) -> Tensor:
        """An uninitialised channels_last tensor, of like's dtype, in memory that is kept."""
        n, c, h, w = shape
        strides = (h * w * c, 1, w * c, c)
        return self.allocator(like.device, (n, c, h, w), strides, dtype or like.dtype)()

    def operands(self, weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        return weights

    def allocator(
        self,
        device: torch.device,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
    ) -> Callable[[], Tensor]:
        elements = math.prod(shape)
        if elements * dtype.itemsize < _KEPT_BYTES:
            return functools.partial(torch.empty_strided, shape, strides, dtype=dtype)
        return functools.partial(self._kept, elements, shape, strides, dtype)

    def _kept(
        self, elements: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        memory = self.extension.TrainMemory(elements * dtype.itemsize)
        flat = torch.frombuffer(memory, dtype=dtype, count=elements)
        # Not as a view of `flat`: autograd would refuse changes of an op's result in place.
        return flat.new_empty(0).set_(flat.untyped_storage(), 0, shape, strides)

    def state(self) -> Hashable:
        return self.saves_all()

    def replay(self, program: Any, device: torch.device, tensors: list[int]) -> None:
        self.extension.train_run(program, tensors)

    def _convolves(self, x: Tensor, conv: Convolution) -> bool:
        return conv.groups == 1 and x.dtype in self._own

    def _relu_gradient(
        self, g: Tensor, grad: Tensor, y: Tensor | None, branches: list[Activation]
    ) -> list[Tensor]:
        sums = [torch.empty((2, g.shape[1])) for _ in branches]
        self.extension.train_relu_gradient(
            tensor_arg(g),
            tensor_arg(grad),
            optional_tensor_arg(y),
            [(*_activation_arg(b), tensor_arg(s)) for b, s in zip(branches, sums, strict=True)],
        )
        return [s[None] for s in sums]


def _activation_arg(activation: Activation) -> tuple[object, object]:
    return tensor_arg(activation.pre_bn), tensor_arg(activation.scale_shift)


def _window(conv: Convolution) -> tuple[tuple[int, ...], ...]:
    """Kernel, stride, padding and dilation, as the extension takes them."""
    return (tuple(conv.weight.shape[2:]), *map(tuple, conv[1:4]))
