"""The training pieces of backend `triton`: which kernel serves which piece."""

from __future__ import annotations

import torch
from torch import Tensor

from ...parameters import Convolution
from ..training import Activation, PreBnGradient
from ..tuning import Tuner
from . import training_batch_norm as batch_norm
from . import training_pool as pooling
from .training_convolution import conv_stats
from .training_dgrad import dgrad
from .training_wgrad import wgrad


class TritonTraining:
    """Implements `resnet_fused.backends.training.TrainingKernels`."""

    merge_moments = staticmethod(batch_norm.merge_moments)
    bn_scale_shift = staticmethod(batch_norm.bn_scale_shift)
    bn_add_relu = staticmethod(batch_norm.bn_add_relu)
    relu_gradient = staticmethod(batch_norm.relu_gradient)
    merge_sums = staticmethod(batch_norm.merge_sums)
    bn_backward_coefficients = staticmethod(batch_norm.bn_backward_coefficients)
    bn_relu_pool = staticmethod(pooling.bn_relu_pool)
    pool_gradient = staticmethod(pooling.pool_gradient)

    def __init__(self, tuner: Tuner) -> None:
        self._tuner = tuner

    def conv_stats(
        self, x: Tensor | Activation, conv: Convolution, statistics: bool
    ) -> tuple[Tensor, Tensor | None]:
        return conv_stats(self._tuner, x, conv, statistics)

    def dgrad(
        self,
        gradient: PreBnGradient,
        conv: Convolution,
        shape: torch.Size,
        below: Activation | None,
        add: Tensor | None,
        add_stride: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return dgrad(self._tuner, gradient, conv, shape, below, add, add_stride)

    def wgrad(self, gradient: PreBnGradient, x: Tensor | Activation, conv: Convolution) -> Tensor:
        return wgrad(self._tuner, gradient, x, conv)
