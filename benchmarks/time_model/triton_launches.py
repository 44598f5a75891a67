"""Launches of Triton's kernels, for training and int8, compiled for Hopper; their loops' trips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends import Backend, Candidates
from resnet_fused.backends.training import TrainingKernels
from resnet_fused.backends.triton.backend import TritonBackend
from resnet_fused.testing import ahead_of_time, machine_code
from resnet_fused.testing.ahead_of_time import Launch

from .rates import Gpu
from .work import Work, bytes_of, resident_blocks

CAPABILITY = 90


class _Recorded(TritonBackend):
    """The Triton backend for tensors without memory."""

    def __init__(self, training: TrainingKernels | None, cuda: Backend | None) -> None:
        if training is not None:
            self.training = training  # type: ignore[assignment]
        self._cuda = cuda

    def quantized_conv(self, *arguments: Any) -> Candidates:
        found = () if self._cuda is None else self._cuda.quantized_conv(*arguments)
        return found or super().quantized_conv(*arguments)

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None


def backend(training: TrainingKernels | None = None, cuda: Backend | None = None) -> TritonBackend:
    """What ops are to run on while their launches are recorded; `training` instead of its own, and
    quantised convolutions by `cuda` where that serves them."""
    return _Recorded(training, cuda)


def recorded() -> AbstractContextManager[list[Launch]]:
    """The list that launches made within go to."""
    return ahead_of_time.recorded_launches(CAPABILITY)


class _Compiled(NamedTuple):
    code: machine_code.Code
    used: machine_code.Resources
    shared: int


_compiled: dict[str, _Compiled] = {}


def _compile(launch: Launch) -> _Compiled:
    identity = launch.identity()
    if identity not in _compiled:
        compiled = ahead_of_time.compile_launch(launch, CAPABILITY)
        _compiled[identity] = _Compiled(
            *machine_code.of_cubin(compiled.asm["cubin"]), compiled.metadata.shared
        )
    return _compiled[identity]


def works(
    launches: Sequence[Launch], name_of: Callable[[Sequence[Tensor]], str], gpu: Gpu
) -> Iterator[Work]:
    """What the launches have to do. name_of: the layer that some tensors are parameters of."""
    for launch in launches:
        plan = launch.plan
        code, used, shared = _compile(launch)
        named = launch.named()
        _, loops = code.regions
        geometry = _DESCRIBE[plan.kernel.__name__](SimpleNamespace(**named, loops=loops))
        tensors = {id(t): t for t in named.values() if isinstance(t, Tensor)}
        grid = geometry.tiles or math.prod(plan.grid)
        moved = geometry.bytes or bytes_of(*tensors.values())
        yield Work(
            layer=name_of(list(tensors.values())),
            kernel=plan.kernel.__name__,
            config=str(plan.config),
            shape=geometry.shape,
            tiles=grid,
            warps=plan.config.warps,
            blocks_per_sm=resident_blocks(gpu.limits, used.registers, shared, plan.config.warps),
            # The compiler unrolls short loops, all of them or none.
            trips=geometry.trips if loops else (),
            shared_loops=geometry.shared_loops,
            dram_bytes=moved,
            l2_bytes=grid * geometry.asked + moved if geometry.asked else moved,
            multiply_adds=geometry.multiply_adds,
            operand_bytes=geometry.operand_bytes,
            code=code,
            registers=used.registers,
            spilled=used.spilled,
            shared_bytes=shared,
        )


class _Geometry(NamedTuple):
    """trips, shared_loops: as in `Work`. asked: bytes that a block asks of L2 in its main loop, 0
    where nothing is asked for twice. bytes: of DRAM, where not every tensor counts once. tiles:
    where not every program of the grid computes."""

    shape: str
    trips: tuple[float, ...] = ()
    asked: int = 0
    multiply_adds: int = 0
    bytes: int = 0
    shared_loops: tuple[int, ...] = ()
    operand_bytes: int = 2
    tiles: int = 0


def _window(a: Any) -> str:
    window, image = a.WINDOW, a.image
    stride = f"/{window.stride_h}" if window.stride_h > 1 else ""
    return f"{window.r}×{window.s}{stride} {image.c}→{a.result.c} at {image.h}×{image.w}"


def _read(a: Any) -> float:
    """The share of the image that the windows touch."""
    window = a.WINDOW
    return min(1.0, window.r * window.s / (window.stride_h * window.stride_w))


def _convolution(a: Any) -> _Geometry:
    """One with its statistics, a quantised one, or the end of a folded block: with what is added,
    which another convolution, 1×1, may project."""
    taps, channels, projected = a.WINDOW.r * a.WINDOW.s, a.gemm.channels, 0
    steps = [taps * math.ceil(channels / a.TILE.c)]
    if a.WINDOW.is_flat:
        steps = [math.ceil(taps * channels / a.TILE.c)]
    read, added = int(_read(a) * bytes_of(a.x)) + bytes_of(a.weight), ""
    shortcut = getattr(a, "shortcut", None)
    if getattr(a, "projection", None) is not None:
        projected, added = a.shortcut_image.c, ", projects"
        steps.append(math.ceil(projected / a.TILE.c))
        pixels = a.PROJECTION_WINDOW.stride_h * a.PROJECTION_WINDOW.stride_w
        read += bytes_of(shortcut) // pixels + bytes_of(a.projection)
    elif shortcut is not None:
        read, added = read + bytes_of(shortcut), ", adds"
    element_size = a.x.element_size()
    return _Geometry(
        _window(a) + added,
        tuple(steps[: len(a.loops)]),
        sum(steps) * (a.TILE.m + a.TILE.n) * a.TILE.c * element_size,
        a.gemm.rows * a.result.c * (taps * channels + projected),
        read + bytes_of(a.out, getattr(a, "moments", None), getattr(a, "signs", None)),
        operand_bytes=element_size,
    )


def _gram(a: Any) -> _Geometry:
    steps = math.ceil(a.rows_per_part / a.TILE.c)
    return _Geometry(
        f"{a.rows} rows of {a.result.c}",
        (steps,),
        int(steps * (a.TILE.m + a.TILE.n) * a.TILE.c * a.x.element_size()),
        a.rows * a.result.c**2,
        int(_read(a) * bytes_of(a.x)) + bytes_of(a.parts) + bytes_of(a.sums),
    )


def _merge_gram(a: Any) -> _Geometry:
    # Each program reads a row of every part, and the sums of its columns.
    asked = 8 * a.count * a.BLOCK
    return _Geometry(f"{a.count} parts of {a.C * a.C}", (math.ceil(a.count / a.STEP),), asked)


def _by_rows(a: Any) -> _Geometry:
    """Of matrices that lie in L2; loops one behind the other, each through the columns, behind one
    through parts of sums."""
    loops, steps = len(a.loops), math.ceil(a.C / a.BLOCK_C)
    merges = [math.ceil(a.parts / a.BLOCK_C)] if hasattr(a, "parts") else []
    trips = (*merges, *(steps,) * loops)[:loops]
    return _Geometry(f"{a.K} rows of {a.C}", trips, shared_loops=tuple(range(loops)))


def _end_products(a: Any) -> _Geometry:
    steps = math.ceil(a.C / a.BLOCK_C)
    asked = steps * a.BLOCK_C * (2 * a.BLOCK_K + 4 * a.BLOCK_C)
    return _Geometry(f"{a.K} rows of {a.C}", (steps,), asked, shared_loops=(0,))


def _end_matrix(a: Any) -> _Geometry:
    steps = math.ceil(a.K / a.BLOCK_K)
    asked, blocks = steps * a.BLOCK_K * 4 * a.BLOCK, math.ceil(a.C / a.BLOCK)
    return _Geometry(
        f"{a.K} rows of {a.C}",
        (steps,),
        asked,
        shared_loops=(0,),
        tiles=blocks * (blocks + 1) // 2,  # at the diagonal and below
    )


def _end_offset(a: Any) -> _Geometry:
    trips = math.ceil(a.K / a.BLOCK_K), math.ceil(a.C / a.BLOCK_K)
    return _Geometry(f"{a.K} rows of {a.C}", trips, shared_loops=(0, 1))


def _pixel_sums(a: Any) -> _Geometry:
    return _Geometry(f"{a.positions} pixels of {a.C}", (math.ceil(a.positions / a.BLOCK_P),))


def _quantized_head(a: Any) -> _Geometry:
    """A loop over channels, in one over pairs of digits; counted as one."""
    steps = a.DIGITS * a.WEIGHT_DIGITS * math.ceil(a.C / a.BLOCK_C)
    return _Geometry(
        f"{a.C}→{a.classes} of {a.DIGITS} digits",
        (steps,) * len(a.loops),
        steps * (a.BLOCK_M + a.BLOCK_N) * a.BLOCK_C,
        a.batch * a.classes * a.C * a.DIGITS * a.WEIGHT_DIGITS,
        shared_loops=tuple(range(len(a.loops))),
        operand_bytes=1,
    )


def _max_pool(a: Any) -> _Geometry:
    return _Geometry(f"{a.SIZE}×{a.SIZE}/{a.STRIDE} of {a.image.c} at {a.image.h}×{a.image.w}")


def _step_bytes(a: Any) -> int:
    """Bytes that a step of dgrad or wgrad reads."""
    return int((a.TILE.m + a.TILE.n) * a.TILE.c * a.grad.element_size())


def _dgrad(a: Any) -> _Geometry:
    taps = a.WINDOW.r * a.WINDOW.s
    # Of a class, on average.
    steps = [taps / (a.CLASS_H * a.CLASS_W) * math.ceil(a.group_out / a.TILE.c)]
    ends = ", masks" * (a.below is not None) + ", adds" * (a.add is not None)
    channels = a.result.c * taps
    if a.operand is not None:
        ends += ", folded"
        channels += a.image.c
        steps.append(math.ceil(a.image.c / a.TILE.c) / (a.CLASS_H * a.CLASS_W))
    return _Geometry(
        _window(a) + ends,
        tuple(steps[: len(a.loops)]),
        int(sum(steps) * _step_bytes(a)),
        a.batch * a.result.h * a.result.w * channels * a.group_in,
        shared_loops=(0,),
    )


def _wgrad(a: Any) -> _Geometry:
    steps = math.ceil(a.rows_per_part / a.TILE.c)
    return _Geometry(
        _window(a),
        (steps,),
        steps * _step_bytes(a),
        a.rows * a.result.c * a.WINDOW.r * a.WINDOW.s * a.group_in,
        int(_read(a) * bytes_of(a.x)) + bytes_of(a.grad) + bytes_of(a.out),
    )


def _rows(a: Any) -> _Geometry:
    return _Geometry(f"{a.rows} rows of {a.result.c}")


def _pre_bn_gradient(a: Any) -> _Geometry:
    # In place one tensor is both read and written.
    return _Geometry(f"{a.rows} rows of {a.K}", bytes=bytes_of(a.grad, a.pre_bn, a.out))


def _relu_gradient(a: Any) -> _Geometry:
    return _Geometry(f"{a.rows} rows of {a.K}", (a.TILES,))


def _merge(a: Any) -> _Geometry:
    parts = min(getattr(a, "CHUNK", a.parts), a.parts)
    trips = (math.ceil(parts / a.PARTS),) * len(a.loops)
    shared = tuple(range(len(trips)))
    return _Geometry(f"{a.parts} parts of {a.K}", trips, shared_loops=shared)


def _sum_parts(a: Any) -> _Geometry:
    # An unrolled loop, and one for the rest, told apart by how many parts a trip loads.
    loads = [sum(i.base in machine_code.LOADS for i in loop.body) for loop in a.loops]
    trips, rest, one = [0] * len(loads), a.count, min(loads, default=1)
    for n in sorted(range(len(loads)), key=loads.__getitem__, reverse=True):
        trips[n], rest = divmod(rest, loads[n] // one)
    return _Geometry(f"{a.count} parts of {a.elements}", tuple(trips))


_DESCRIBE: dict[str, Callable[[Any], _Geometry]] = {
    "conv_stats_kernel": _convolution,
    "conv_bn_kernel": _convolution,
    "gram_kernel": _gram,
    "merge_gram_kernel": _merge_gram,
    "end_products_kernel": _end_products,
    "end_moments_kernel": _by_rows,
    "end_sums_kernel": _by_rows,
    "end_gradients_kernel": _by_rows,
    "end_matrix_kernel": _end_matrix,
    "end_offset_kernel": _end_offset,
    "quantized_conv_kernel": _convolution,
    "border_kernel": lambda a: _Geometry(f"{a.image.c} of {a.image.h}×{a.image.w}, with a border"),
    "max_pool_kernel": _max_pool,
    "quantized_images_kernel": lambda a: _Geometry(f"{a.CHANNELS} channels to bytes"),
    "pixel_sums_kernel": _pixel_sums,
    "quantized_head_kernel": _quantized_head,
    "dgrad_kernel": _dgrad,
    "wgrad_kernel": _wgrad,
    "bn_add_relu_kernel": _rows,
    "bn_relu_pool_kernel": _rows,
    "pool_gradient_kernel": _rows,
    "pre_bn_gradient_kernel": _pre_bn_gradient,
    "relu_gradient_kernel": _relu_gradient,
    "merge_moments_kernel": _merge,
    "merge_sums_kernel": _merge,
    "bn_scale_shift_kernel": _merge,
    "bn_backward_coefficients_kernel": _merge,
    "sum_parts_kernel": _sum_parts,
}
