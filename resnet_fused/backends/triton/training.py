"""The training pieces of backend `triton`: which kernel serves which piece."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from ... import _extension
from ...parameters import Activation, Convolution, Folded, OperandTerm
from ...reference.training import ReferenceTraining, signs_of
from .. import Candidate, Candidates, autotune
from ..training import FoldedEnds, Replays
from . import training_batch_norm as batch_norm
from . import training_ends as ends
from . import training_pool as pooling
from .launching import Config, candidates, nhwc
from .training_convolution import conv_stats, conv_stats_configs
from .training_dgrad import dgrad, dgrad_configs
from .training_wgrad import wgrad, wgrad_configs

_reference = ReferenceTraining()


class _Piece:
    """A way to compute a piece. Called, which is how candidates are checked and measured, it turns
    what it found into what can be held against another's; `run` leaves it as it is."""

    def __init__(
        self, run: Callable[..., Any], comparable: Callable[[Any], Any] | None = None
    ) -> None:
        self.run = run
        self.comparable = comparable

    def __call__(self, *arguments: Any) -> Any:
        found = self.run(*arguments)
        return found if self.comparable is None else self.comparable(found)


def _merged(
    merge: Callable[[Tensor], Tensor],
) -> Callable[[tuple[Tensor, Tensor | None]], tuple[Tensor, Tensor | None]]:
    """Merges parts of statistics, of which other configurations make others."""

    def comparable(found: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        result, parts = found
        return result, None if parts is None else merge(parts)

    return comparable


def _with_right_signs(found: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """A result, and one more than the bytes of its signs that are wrong: signs of a result that is
    rounded otherwise may differ."""
    y, signs = found
    return y, None if signs is None else 1.0 + (signs != signs_of(y)).sum()


_PLAIN = {
    "conv_stats": _Piece(_reference.conv_stats, _merged(_reference.merge_moments)),
    "dgrad": _Piece(_reference.dgrad, _merged(_reference.merge_sums)),
    "wgrad": _Piece(_reference.wgrad),
    "folded_end": _Piece(_reference.folded_end, _with_right_signs),
}


class TritonReplays:
    """Implements `resnet_fused.backends.training.Replays`."""

    def __init__(self, extension: ModuleType) -> None:
        self.extension = extension

    def state(self) -> Hashable:
        # Without calls of Python's functions, as every op comes by here, each way.
        convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        return (
            autotune.tuner.generation,
            convolutions.fp32_precision,
            torch.are_deterministic_algorithms_enabled(),
        )

    def operands(self, weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        lowered, copies, sources = list(weights), [], []
        for i, weight in enumerate(weights):
            if weight.dtype != dtype:
                lowered[i] = torch.empty_like(weight, dtype=dtype)
                copies.append(lowered[i])
                sources.append(weight)
        if copies:  # by one launch, where each weight would take one of its own
            with torch.no_grad():
                torch._foreach_copy_(copies, sources)
        return list(map(nhwc, lowered))

    def allocator(
        self,
        device: torch.device,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
    ) -> Callable[[], Tensor]:
        return functools.partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)

    def replay(self, program: Any, device: torch.device, tensors: list[int]) -> None:
        arena = torch.empty(program.arena_bytes, dtype=torch.uint8, device=device)
        with torch.cuda.device(device.index if device.type == "cuda" else -1):
            stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
            program.run(tensors, arena.data_ptr(), stream)


def _replays() -> TritonReplays | None:
    """None where kernels are interpreted, which takes tensors, and where nothing can record."""
    if triton.knobs.runtime.interpret or _extension.available() is not None:
        return None
    return TritonReplays(_extension.load())


class TritonTraining:
    """Implements `resnet_fused.backends.training.TrainingKernels`."""

    def __init__(self) -> None:
        self.replays: Replays | None = _replays()

    # Tells the choices of a subclass, which lists more, from those made here.
    among: Hashable = None
    # By the model of time the kernels here take longer for signs than backward saves.
    signs = False

    def more(self, piece: str, arguments: tuple[Any, ...]) -> list[Candidate]:
        """What computes a piece beside the kernels here, the expected fastest first."""
        return []

    def choose(
        self,
        piece: str,
        arguments: tuple[Any, ...],
        run: Callable[..., Any],
        configs: Callable[[], Sequence[Config]],
    ) -> Callable[..., Any]:
        """What is to compute the piece: `run` in one of the configurations, or the reference."""
        plain = _PLAIN[piece]

        def listed() -> Candidates:
            found = [
                *self.more(piece, arguments),
                *candidates(run, configs(), "triton training"),
            ]
            found = [c._replace(launch=_Piece(c.launch, plain.comparable)) for c in found]
            return [*found, Candidate("pytorch", plain)]

        chosen = autotune.choose(piece, arguments, listed, plain, self.among).launch
        assert isinstance(chosen, _Piece)  # all that are listed
        return chosen.run

    saves_all = staticmethod(_reference.saves_all)
    is_profitable = staticmethod(_reference.is_profitable)
    merge_moments = staticmethod(batch_norm.merge_moments)
    bn_scale_shift = staticmethod(batch_norm.bn_scale_shift)
    bn_add_relu = staticmethod(batch_norm.bn_add_relu)
    relu_gradient = staticmethod(batch_norm.relu_gradient)
    merge_sums = staticmethod(batch_norm.merge_sums)
    bn_backward_coefficients = staticmethod(batch_norm.bn_backward_coefficients)
    bn_relu_pool = staticmethod(pooling.bn_relu_pool)
    pool_gradient = staticmethod(pooling.pool_gradient)
    pre_bn_gradient = staticmethod(batch_norm.pre_bn_gradient)

    def folded_ends(self, dtype: torch.dtype) -> FoldedEnds | None:
        # In float32 PyTorch's errors are so small that the cancellation in sums would show.
        return TritonFoldedEnds(self) if dtype in (torch.float16, torch.bfloat16) else None

    def conv_stats(
        self, x: Tensor, conv: Convolution, statistics: bool
    ) -> tuple[Tensor, Tensor | None]:
        run = self.choose(
            "conv_stats",
            (x, conv, True),  # in any case: backward repeats the forward's bits without statistics
            conv_stats,
            lambda: conv_stats_configs(x, conv),
        )
        found: tuple[Tensor, Tensor | None] = run(x, conv, statistics)
        return found

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
        arguments = (g, conv, shape, below, add, add_stride, term)
        run = self.choose(
            "dgrad",
            arguments,
            dgrad,
            lambda: dgrad_configs(g, conv, shape, below is not None, term is not None),
        )
        found: tuple[Tensor, Tensor | None] = run(*arguments)
        return found

    def wgrad(self, g: Tensor, x: Tensor, conv: Convolution) -> Tensor:
        run = self.choose("wgrad", (g, x, conv), wgrad, lambda: wgrad_configs(g, conv))
        found: Tensor = run(g, x, conv)
        return found


class TritonFoldedEnds:
    """Implements `resnet_fused.backends.training.FoldedEnds`."""

    def __init__(self, kernels: TritonTraining) -> None:
        self._choose = kernels.choose
        self.signs = kernels.signs

    operand_moments = staticmethod(ends.operand_moments)
    relu_gradient_sum = staticmethod(batch_norm.relu_gradient_sum)
    folded_sums = staticmethod(ends.folded_sums)
    folded_gradients = staticmethod(ends.folded_gradients)

    def folded_end(
        self, main: Folded, shortcut: Tensor | Folded | None, signs: bool
    ) -> tuple[Tensor, Tensor | None]:
        arguments = (main, shortcut, signs)
        run = self._choose(
            "folded_end",
            arguments,
            ends.folded_end,
            lambda: ends.folded_end_configs(*arguments),
        )
        found: tuple[Tensor, Tensor | None] = run(*arguments)
        return found
