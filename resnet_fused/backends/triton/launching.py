"""Host side of every launch: layouts, offset width, TF32 permission, the machine's limits."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...parameters import BatchNorm
from .. import tf32_in_convolutions

# Row indices run past the result by at most a tile, which must not overflow 32 bits either.
_NARROW_ELEMENTS = 2**31 - 2**16


class Config(NamedTuple):
    """How a kernel is launched: its tile sizes (their meaning is the kernel's), warps, stages."""

    blocks: tuple[int, ...]
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{'×'.join(map(str, self.blocks))} {self.warps} warps {self.stages} stages"


class Machine(NamedTuple):
    """What a launch rule must know of a GPU."""

    processors: int
    shared_bytes: int  # that one program may use
    interpreted: bool = False


@functools.cache
def machine(device: torch.device) -> Machine:
    """Limits of `device`; of the interpreter, which runs programs one by one, on the CPU."""
    if device.type != "cuda":
        return Machine(1, 227 * 1024, interpreted=True)
    properties: Any = torch.cuda.get_device_properties(device)  # stubs lack some of them
    return Machine(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def launch(
    kernel: Any, grid: tuple[int, ...], config: Config, *arguments: Any, **constants: Any
) -> None:
    """Runs `kernel` on the current stream with the warps and stages of `config`."""
    kernel[grid](*arguments, **options(config), **constants)


def options(config: Config) -> dict[str, Any]:
    """Compiler options; fusing multiply-adds is spelled out because its default varies."""
    return {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }


def nhwc(tensor: Tensor) -> Tensor:
    """`tensor` in channels_last memory; itself where it already is."""
    return tensor.contiguous(memory_format=torch.channels_last)


def strided_operand(
    tensor: Tensor | None, out: Tensor
) -> tuple[Tensor | None, tuple[int | None, ...]]:
    """An operand of `out`'s shape, or of fewer channels, and (channels, strides of n, h and w) to
    read it by; all None where it is laid out like `out`. Copied only if its channels are apart."""
    if tensor is not None and tensor.stride(1) != 1:
        tensor = nhwc(tensor)
    if tensor is None or (tensor.shape == out.shape and nhwc(tensor) is tensor):
        return tensor, (None,) * 4
    stride_n, _, stride_h, stride_w = tensor.stride()
    return tensor, (tensor.shape[1], stride_n, stride_h, stride_w)


def dense(bn: BatchNorm) -> tuple[Tensor | None, ...]:
    """The (mean, var, weight, bias) of `bn`, each contiguous."""
    return tuple(None if vector is None else vector.contiguous() for vector in bn[:4])


def empty_nhwc(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised channels_last result."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def is_wide(*tensors: Tensor) -> bool:
    """Whether offsets into these tensors need 64 bits."""
    return any(_reach(t) > _NARROW_ELEMENTS for t in tensors)


def _reach(tensor: Tensor) -> int:
    """The largest offset from the tensor's first element to any of its elements."""
    return sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def convolution_precision(dtype: torch.dtype) -> str:
    """Input precision of `tl.dot` in a convolution."""
    return "tf32" if dtype == torch.float32 and tf32_in_convolutions() else "ieee"


def matmul_precision(dtype: torch.dtype) -> str:
    """The same for matrix products (`torch.backends.cuda.matmul`)."""
    setting = torch.backends.cuda.matmul
    return "tf32" if dtype == torch.float32 and setting.fp32_precision == "tf32" else "ieee"
