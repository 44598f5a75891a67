"""The training pieces of backend `triton`: which kernel serves which piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...parameters import Convolution
from ...reference.training import ReferenceTraining
from .. import Candidate, Candidates, autotune
from ..training import Activation, PreBnGradient
from . import training_batch_norm as batch_norm
from . import training_pool as pooling
from .launching import Config, candidates
from .training_convolution import conv_stats, conv_stats_configs
from .training_dgrad import dgrad, dgrad_configs
from .training_wgrad import wgrad, wgrad_configs

_reference = ReferenceTraining()


def _candidates(
    run: Callable[..., Any], configs: Sequence[Config], reference: Callable[..., Any]
) -> Candidates:
    return [*candidates(run, configs, "triton training"), Candidate("pytorch", reference)]


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

    def conv_stats(
        self, x: Tensor | Activation, conv: Convolution, statistics: bool
    ) -> tuple[Tensor, Tensor | None]:
        value = x if isinstance(x, Tensor) else x.pre_bn
        # With statistics or without: backward repeats the forward's convolution, bit for bit.
        chosen = autotune.choose(
            "conv_stats",
            (x, conv, True),
            lambda: _candidates(conv_stats, conv_stats_configs(value, conv), _reference.conv_stats),
            _reference.conv_stats,
        )
        found: tuple[Tensor, Tensor | None] = chosen.launch(x, conv, statistics)
        return found

    def dgrad(
        self,
        gradient: PreBnGradient,
        conv: Convolution,
        shape: torch.Size,
        below: Activation | None,
        add: Tensor | None,
        add_stride: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        arguments = (gradient, conv, shape, below, add, add_stride)
        chosen = autotune.choose(
            "dgrad",
            arguments,
            lambda: _candidates(
                dgrad, dgrad_configs(gradient, conv, shape, below is not None), _reference.dgrad
            ),
            _reference.dgrad,
        )
        found: tuple[Tensor, Tensor | None] = chosen.launch(*arguments)
        return found

    def wgrad(self, gradient: PreBnGradient, x: Tensor | Activation, conv: Convolution) -> Tensor:
        chosen = autotune.choose(
            "wgrad",
            (gradient, x, conv),
            lambda: _candidates(wgrad, wgrad_configs(gradient, x, conv), _reference.wgrad),
            _reference.wgrad,
        )
        found: Tensor = chosen.launch(gradient, x, conv)
        return found
