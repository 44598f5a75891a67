"""Ahead-of-time compilation of the Triton kernels for GPUs that need not be present.

The backend itself is run on tensors without memory (device `meta`) at ResNet-50's shapes, batch
256, and its launches are compiled instead of started, so what is checked is what would run.
Compilation happens in worker processes: here the kernels may be interpreted objects.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import resnet_fused
from resnet_fused.parameters import BatchNorm, Convolution, MaxPool

pytest.importorskip("triton")

BATCH = 256


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
# The 16-bit types differ in one letter of an instruction, so one stands for both.
CASES = [
    (80, "float16"),
    (90, "bfloat16"),
    (90, "tf32"),
    (90, "float32"),
    (100, "bfloat16"),
    (120, "float16"),
]


@pytest.mark.parametrize(("capability", "dtype"), CASES, ids=[f"sm_{c}-{d}" for c, d in CASES])
def test_kernels_of_resnets(capability: int, dtype: str) -> None:
    """No spilled register, tensor cores in use, 16-byte copies, no division in a loop."""
    root = str(Path(resnet_fused.__file__).parents[1])
    environment = {**os.environ, "RESNET_FUSED_TUNE": "off", "PYTHONPATH": root}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, __file__, str(capability), dtype],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == {
        "stem_kernel",
        "conv_bn_kernel",
        "conv_bn_projection_kernel",
        "head_kernel",
        "bn_add_relu_kernel",
    }
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["divisions"] == 0, kernel
        if kernel["kernel"] == "bn_add_relu_kernel":
            continue
        assert kernel["loops"] > 0, kernel
        if "conv" in kernel["kernel"]:
            assert kernel["copies"][-1] == 16, kernel
        if dtype != "float32" and kernel["kernel"] != "head_kernel":
            assert TARGETS[capability].instruction in kernel["instructions"], kernel
        elif dtype not in ("float32", "tf32"):
            # 16 images a tile are too few for the newer chips' warp-group instructions.
            assert "mma.sync" in kernel["instructions"], kernel


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor


def _batch_norm(channels: int) -> BatchNorm:
    mean, var, weight, bias = (_meta(channels, dtype=torch.float32) for _ in range(4))
    return BatchNorm(mean, var, weight, bias)


def _convolution(k: int, c: int, size: int, stride: int, dtype: torch.dtype) -> Convolution:
    padding = (size - 1) // 2
    weight = _meta(k, c, size, size, dtype=dtype)
    return Convolution(weight, (stride, stride), (padding, padding))


def _resnet(backend: Any, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kind of op that ResNet-50 has, at shapes for which the rule picks different tiles."""

    def conv(
        c: int, size: int, k: int, kernel: int, stride: int, add: bool, groups: int = 1
    ) -> Callable[[], object]:
        out = (BATCH, k, size // stride, size // stride)
        return functools.partial(
            backend.conv_bn,
            _meta(BATCH, c, size, size, dtype=dtype),
            _convolution(k, c // groups, kernel, stride, dtype)._replace(groups=groups),
            _batch_norm(k),
            _meta(*out, dtype=dtype) if add else None,
            True,
        )

    def projection(width: int, c: int, size: int, stride: int) -> Callable[[], object]:
        return functools.partial(
            backend.conv_bn_projection,
            _meta(BATCH, width, size // stride, size // stride, dtype=dtype),
            _convolution(4 * width, width, 1, 1, dtype),
            _batch_norm(4 * width),
            _meta(BATCH, c, size, size, dtype=dtype),
            _convolution(4 * width, c, 1, stride, dtype),
            _batch_norm(4 * width),
        )

    yield (
        "stem",
        functools.partial(
            backend.stem,
            torch.empty(BATCH, 3, 224, 224, dtype=dtype, device="meta"),
            _convolution(64, 3, 7, 2, dtype),
            _batch_norm(64),
            MaxPool(),
        ),
    )
    yield "stage 1 projection", projection(64, 64, 56, 1)
    yield "stage 1 3x3", conv(64, 56, 64, 3, 1, False)
    yield "stage 1 expand", conv(64, 56, 256, 1, 1, True)
    yield "stage 2 3x3 strided", conv(128, 56, 128, 3, 2, False)
    yield "stage 2 projection", projection(128, 256, 56, 2)
    yield "stage 2 reduce", conv(512, 28, 128, 1, 1, False)
    yield "stage 3 3x3", conv(256, 14, 256, 3, 1, False)
    yield "stage 4 3x3", conv(512, 7, 512, 3, 1, False)
    yield "stage 4 expand", conv(512, 7, 2048, 1, 1, True)
    yield "stage 1 of ResNeXt 3x3", conv(128, 56, 128, 3, 1, False, groups=32)
    yield (
        "elementwise",
        functools.partial(
            backend.bn_add_relu,
            _meta(BATCH, 256, 56, 56, dtype=dtype),
            _batch_norm(256),
            _meta(BATCH, 256, 56, 56, dtype=dtype),
            True,
        ),
    )
    yield (
        "head",
        functools.partial(
            backend.head,
            _meta(BATCH, 2048, 7, 7, dtype=dtype),
            _meta(1000, 2048, dtype=dtype),
            _meta(1000, dtype=dtype),
        ),
    )


def _signature(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
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


def _worker(capability: int, dtype_name: str) -> None:
    """Compiles what ResNet-50 launches and prints a JSON line per distinct kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from resnet_fused.backends.triton import backend, convolution, elementwise, head, stem
    from resnet_fused.backends.triton.launching import Machine, options

    target = TARGETS[capability]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype_name == "tf32"
    launches: list[Any] = []
    for module in (convolution, elementwise, head, stem):
        module.launch = lambda *a, **k: launches.append((a, k))  # type: ignore[attr-defined]
        if hasattr(module, "machine"):
            module.machine = lambda device: Machine(*target[:2])  # type: ignore[attr-defined]
    seen = set()
    for name, call in _resnet(backend.TritonBackend(), DTYPES[dtype_name]):
        launches.clear()
        call()
        for (kernel, _, config, *arguments), constants in launches:
            signature, constants, attributes = _signature(kernel, tuple(arguments), constants)
            identity = repr((kernel.__name__, signature, constants, attributes, config))
            if identity in seen:
                continue
            seen.add(identity)
            compiled = triton.compile(
                ASTSource(kernel, signature, constants, attributes),
                target=GPUTarget("cuda", capability, 32),
                options=options(config),
            )
            print(
                json.dumps(
                    {
                        "name": f"{name} {config.blocks} {config.warps} warps",
                        "kernel": kernel.__name__,
                        "instructions": [i for i in INSTRUCTIONS if i in compiled.asm["ptx"]],
                        "copies": _copy_widths(compiled.asm["ptx"]),
                        **_loops(compiled.asm["ptx"]),
                        "shared": compiled.metadata.shared,
                        **_resources(compiled.asm["cubin"]),
                    }
                ),
                flush=True,
            )


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


if __name__ == "__main__":
    _worker(int(sys.argv[1]), sys.argv[2])
