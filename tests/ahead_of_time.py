"""Ahead-of-time compilation of Triton kernels for GPUs that need not be present.

A backend runs on tensors without memory (device `meta`) and its launches are compiled instead of
started, so what is checked is what would run. Compilation happens in worker processes, which print
a JSON line for each distinct kernel: in the tests' own the kernels may be interpreted objects.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import resnet_fused
from resnet_fused.parameters import Convolution


class Target(NamedTuple):
    """A GPU: its limits, and the PTX instruction of its tensor cores."""

    processors: int
    shared_bytes: int
    instruction: str


TARGETS = {
    80: Target(108, 163 * 1024, "mma.sync"),
    90: Target(132, 227 * 1024, "wgmma.mma_async"),
    100: Target(148, 227 * 1024, "tcgen05.mma"),
    120: Target(170, 99 * 1024, "mma.sync"),
}
INSTRUCTIONS = sorted({target.instruction for target in TARGETS.values()})
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "tf32": torch.float32,
}


def compiled_kernels(worker: str, capability: int, *rest: str) -> list[dict[str, Any]]:
    """What the script `worker`, run for that GPU, says of each kernel it compiled."""
    root = str(Path(resnet_fused.__file__).parents[1])
    environment = {**os.environ, "RESNET_FUSED_TUNE": "off", "PYTHONPATH": root}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, worker, str(capability), *rest],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def compile_launches(
    capability: int,
    modules: Iterable[Any],
    calls: Iterable[tuple[str, Callable[[], object]]],
) -> None:
    """Makes the calls, compiles what the Triton `modules` launch in them, and prints its facts."""
    from resnet_fused.backends.triton.launching import Machine

    launches: list[Any] = []
    for module in modules:
        module.launch = lambda *a, **k: launches.append((a, k))
        if hasattr(module, "machine"):
            module.machine = lambda device: Machine(*TARGETS[capability][:2])
    seen = set()
    for name, call in calls:
        launches.clear()
        call()
        for (kernel, _, config, *arguments), constants in launches:
            description = _describe(kernel, tuple(arguments), constants)
            identity = repr((kernel.__name__, description, config))
            if identity not in seen:
                seen.add(identity)
                _compile(name, kernel, description, config, capability)


def _compile(name: str, kernel: Any, description: Any, config: Any, capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from resnet_fused.backends.triton.launching import options

    compiled = triton.compile(
        ASTSource(kernel, *description),
        target=GPUTarget("cuda", capability, 32),
        options=options(config),
    )
    ptx = compiled.asm["ptx"]
    facts = {
        "name": f"{name} {config.blocks} {config.warps} warps",
        "kernel": kernel.__name__,
        "rows": next(iter(config.blocks), 0),  # passes over whole rows have no blocks
        "instructions": [i for i in INSTRUCTIONS if i in ptx],
        "copies": _copy_widths(ptx),
        **_loops(ptx),
        "shared": compiled.metadata.shared,
        **_resources(compiled.asm["cubin"]),
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


def _describe(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """(signature, constants, attributes) as Triton's launcher derives them: integers 1 and None
    become constants, multiples of 16 and allocations are known to be aligned."""
    types = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = arguments[position] if position < len(arguments) else constants[name]
        aligned = False
        if position >= len(arguments) or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants = {**constants, name: value}
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + types[value.dtype]
            aligned = True
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            aligned = value % 16 == 0
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


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


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes (stack and local memory) of the one kernel in `cubin`."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "spilled": usage["STACK"] + usage["LOCAL"]}
