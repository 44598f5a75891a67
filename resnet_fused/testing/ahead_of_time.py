"""Ahead-of-time compilation of Triton kernels for GPUs that need not be present.

A backend runs on tensors without memory (device `meta`) and its launches are recorded and compiled
instead of started, so what is checked is what would run. Tests do that in worker processes, which
print a JSON line for each distinct kernel: in their own the kernels may be interpreted objects.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import resnet_fused

from ..parameters import Convolution
from . import machine_code


class Target(NamedTuple):
    """A GPU: its limits, and the PTX instruction of its tensor cores."""

    num_sms: int
    shared_bytes: int
    instruction: str


TARGETS = {
    80: Target(108, 163 * 1024, "mma.sync"),
    90: Target(132, 227 * 1024, "wgmma.mma_async"),
    100: Target(148, 227 * 1024, "tcgen05.mma"),
    120: Target(170, 99 * 1024, "mma.sync"),
}
INSTRUCTIONS = sorted({target.instruction for target in TARGETS.values()})
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
}
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "tf32": torch.float32,
}


def compiled_kernels(
    worker: str, capability: int, *rest: str, before: Path | None = None
) -> list[dict[str, Any]]:
    """What the script `worker`, run for that GPU, says of each kernel it compiled. Packages in the
    folder `before` go before those that are installed."""
    folders = [*([before] if before else []), Path(resnet_fused.__file__).parents[1]]
    path = os.pathsep.join(map(str, folders))
    environment = {**os.environ, "RESNET_FUSED_TUNE": "off", "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, worker, str(capability), *rest],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


class Launch(NamedTuple):
    """One launch as the host side asked for it: a `triton.launching.Launch`, and its tensors."""

    plan: Any
    tensors: tuple[Any, ...]

    def named(self) -> dict[str, Any]:
        """The kernel's arguments by name, compile-time constants among them."""
        values = (*self.tensors, *self.plan.settled)
        return dict(zip(self.plan.kernel.arg_names, values, strict=True))

    def identity(self) -> str:
        """The same for launches that run the same machine code."""
        return repr((self.plan.kernel.__name__, _describe(self), self.plan.config))


@contextmanager
def recorded_launches(capability: int) -> Iterator[list[Launch]]:
    """The launches that Triton kernels make within, in order; none of them starts."""
    from ..backends.triton import launching

    launches: list[Launch] = []
    target = TARGETS[capability]
    limits = launching.Machine.of(target.num_sms, target.shared_bytes, capability)

    def record(plan: Any, *tensors: Any) -> None:
        launches.append(Launch(plan, tensors))

    with (
        mock.patch.object(launching.Launch, "__call__", record),
        mock.patch.object(launching, "machine", return_value=limits),
    ):
        yield launches


def compile_launch(launch: Launch, capability: int) -> Any:
    """What Triton compiles for it; its cache spares the work the next time. AssertionError where
    its products would read what is not visible to them yet."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiled = triton.compile(
        ASTSource(launch.plan.kernel, *_describe(launch)),
        target=GPUTarget("cuda", capability, machine_code.LANES),
        options=launch.plan.options,
    )
    if lacks_fence(compiled.asm["ptx"]):
        raise AssertionError(f"{launch.plan.kernel.__name__} {launch.plan.config} lacks a fence")
    return compiled


def compile_launches(capability: int, calls: Iterable[tuple[str, Callable[[], object]]]) -> None:
    """Makes the calls, compiles what Triton kernels they launch, and prints its facts."""
    seen = set()
    for name, call in calls:
        with recorded_launches(capability) as launches:
            call()
        for launch in launches:
            if launch.identity() not in seen:
                seen.add(launch.identity())
                _print_facts(name, launch, compile_launch(launch, capability))


def _print_facts(name: str, launch: Launch, compiled: Any) -> None:
    ptx, config = compiled.asm["ptx"], launch.plan.config
    code, used = machine_code.of_cubin(compiled.asm["cubin"])
    facts = {
        "name": f"{name} {config.blocks} {config.warps} warps",
        "kernel": launch.plan.kernel.__name__,
        "rows": config.blocks[0],
        "instructions": [i for i in INSTRUCTIONS if i in ptx],
        "copies": _copy_widths(ptx),
        "converts_e4m3": "cvt.rn.f16x2.e4m3x2" in ptx,
        **_loops(ptx),
        "shared": compiled.metadata.shared,
        **used._asdict(),
        "code": machine_code.facts(code),
    }
    print(json.dumps(facts), flush=True)


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of that shape without memory, channels_last if it is an image."""
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor


def meta_convolution(k: int, c: int, size: int, stride: int, dtype: torch.dtype) -> Convolution:
    """A K×C convolution of `size`×`size` taps that keeps the image's size at stride 1."""
    padding = (size - 1) // 2
    weight = meta(k, c, size, size, dtype=dtype)
    return Convolution(weight, (stride, stride), (padding, padding))


def _describe(launch: Launch) -> Any:
    """(signature, constants, attributes) as Triton's launcher derives them: integers 1 and None
    become constants, multiples of 16 and allocations are known to be aligned."""
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    fixed = launch.plan.kernel.constexprs

    def kind(value: Any, place: tuple[int, ...]) -> Any:
        if isinstance(value, tuple) and place[0] not in fixed:
            kinds = [kind(member, (*place, i)) for i, member in enumerate(value)]
            return type(value)(*kinds)
        if place[0] in fixed or value is None or (type(value) is int and value == 1):
            constants[place] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[place] = [["tt.divisibility", 16]]
        return "*" + _TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"

    signature = {
        name: kind(value, (position,))
        for position, (name, value) in enumerate(launch.named().items())
    }
    return signature, constants, attributes


def lacks_fence(ptx: str) -> bool:
    """Whether products of warp groups read what asynchronous copies wrote without a proxy's fence
    (PTX ISA, "Async proxy")."""
    by_warp_groups = any(i in ptx for i in ("wgmma.mma_async", "tcgen05.mma"))
    return by_warp_groups and bool(_copy_widths(ptx)) and "fence.proxy.async" not in ptx


def _copy_widths(ptx: str) -> list[int]:
    """The distinct sizes, in bytes, of asynchronous copies into shared memory."""
    copy = r"cp\.async\.c[ag]\.shared\.global\s*\[[^\]]*\],\s*\[[^\]]*\],\s*(\w+)"
    return sorted({int(size, 0) for size in re.findall(copy, ptx)})


def _loops(ptx: str) -> dict[str, int]:
    """How many loops there are (a label and a jump back to it), and integer divisions in them."""
    bodies = []
    for label in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE):
        jumps = list(re.finditer(rf"\bbra(?:\.uni)?\s+{re.escape(label[1])};", ptx))
        if jumps and jumps[-1].start() > label.start():
            bodies.append(ptx[label.start() : jumps[-1].start()])
    divisions = sum(len(re.findall(r"\b(?:div|rem)\.[su]\d\d", body)) for body in bodies)
    return {"loops": len(bodies), "divisions": divisions}
