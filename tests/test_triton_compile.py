"""Ahead-of-time compilation of the Triton backend's ops at ResNet-50's shapes, batch 256."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from code_budgets import BLACKWELL, COMPILERS, most_spilled

from resnet_fused.backends import Candidate
from resnet_fused.parameters import (
    BatchNorm,
    ConvBn,
    Gate,
    ImageQuantization,
    MaxPool,
    QuantizedLayer,
    QuantizedShortcut,
)
from resnet_fused.reference.quantized import FLOAT8
from resnet_fused.testing.ahead_of_time import (
    DTYPES,
    TARGETS,
    compile_launches,
    compiled_kernels,
    lacks_fence,
    meta,
    meta_convolution,
)

triton = pytest.importorskip("triton")
tl = triton.language

from resnet_fused.backends.triton.primitives import multiply  # noqa: E402

BATCH = 256


# The 16-bit types differ in one letter of an instruction, so one stands for both.
CASES = [
    pytest.param(capability, dtype, id=f"sm_{capability}-{dtype}", marks=marks)
    for capability, dtype, marks in (
        (80, "float16", ()),
        (90, "bfloat16", ()),
        (90, "tf32", pytest.mark.thorough),
        (90, "float32", pytest.mark.slow),
        (100, "bfloat16", pytest.mark.thorough),
        (120, "float16", pytest.mark.slow),
    )
]


# Layers that show a tile each; and the products of tensor cores in machine code.
TELLING = ("stage 1 projection", "stage 2 reduce", "stage 3 3x3")
PRODUCTS = {100: "UTCHMMA", 120: "HMMA.16816.F32"}


@pytest.mark.parametrize(("capability", "dtype"), CASES)
def test_kernels_of_resnets(capability: int, dtype: str) -> None:
    """No unknown spill, tensor cores in use, 16-byte copies, no division in a loop."""
    kernels = compiled_kernels(__file__, capability, dtype)
    assert {kernel["kernel"] for kernel in kernels} == {
        "stem_kernel",
        "conv_bn_kernel",
        "head_kernel",
        "bn_add_relu_kernel",
        "gate_add_relu_kernel",
    }
    for kernel in kernels:
        assert kernel["spilled"] <= most_spilled(kernel, capability, dtype), kernel
        assert kernel["divisions"] == 0, kernel
        assert kernel["shared"] <= TARGETS[capability].shared_bytes, kernel
        if kernel["kernel"] in ("bn_add_relu_kernel", "gate_add_relu_kernel"):
            continue
        assert kernel["loops"] > 0, kernel
        if "conv" in kernel["kernel"]:
            assert kernel["copies"][-1] == 16, kernel
        if dtype != "float32" and kernel["kernel"] != "head_kernel":
            assert TARGETS[capability].instruction in kernel["instructions"], kernel
        elif dtype not in ("float32", "tf32"):
            # 16 images a tile are too few for the newer chips' warp-group instructions.
            assert "mma.sync" in kernel["instructions"], kernel


@pytest.mark.parametrize("capability", sorted(BLACKWELL))
def test_convolutions_on_blackwell(capability: int) -> None:
    """The chip's products in the main loop, fed by 16-byte copies a step and more ahead; no spill;
    a block's share of shared memory; and instructions within a budget."""
    kernels = compiled_kernels(__file__, capability, "bfloat16", *TELLING)
    assert [kernel["name"] for kernel in kernels] == list(BLACKWELL[capability])
    for kernel in kernels:
        code = kernel["code"]
        (product,) = code["tensor_instructions"]
        assert product.startswith(PRODUCTS[capability]), kernel
        assert kernel["instructions"] == [TARGETS[capability].instruction], kernel
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= TARGETS[capability].shared_bytes, kernel
        assert code["load_bytes"] == {}, kernel
        assert set(code["copy_bytes"]) == {"16"}, kernel
        assert code["copies_pending"] >= 2, kernel  # groups, two of which are a step's
        if COMPILERS["triton"] == f"triton {triton.__version__}":
            main, elsewhere = BLACKWELL[capability][kernel["name"]]
            assert code["instructions_main_loop"] <= main, kernel
            assert code["instructions_elsewhere"] <= elsewhere, kernel


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        (90, "int8"),
        (80, "float8"),
        *(
            pytest.param(capability, dtype, marks=marks)
            for capability, dtype, marks in (
                (90, "float8", pytest.mark.thorough),
                (100, "int8", pytest.mark.thorough),
                *((of, "int8", pytest.mark.slow) for of in (80, 120)),
                *((of, "float8", pytest.mark.slow) for of in (100, 120)),
            )
        ),
    ],
)
def test_kernels_of_quantised_resnets(capability: int, dtype: str) -> None:
    """As above; on Hopper int8's products are of whole warp groups, and e4m3 numbers are made
    float16 by instructions of their own from sm_89 on."""
    kernels = compiled_kernels(__file__, capability, dtype)
    assert {kernel["kernel"] for kernel in kernels} == {
        "quantized_images_kernel",
        "border_kernel",
        "max_pool_kernel",
        "quantized_conv_kernel",
        "pixel_sums_kernel",
        "quantized_head_kernel",
    }
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["divisions"] == 0, kernel
        if kernel["kernel"] == "quantized_head_kernel":
            assert kernel["copies"][-1] == 16, kernel
        if kernel["kernel"] != "quantized_conv_kernel":
            continue
        assert TARGETS[capability].instruction in kernel["instructions"], kernel
        if dtype == "float8":
            assert kernel["converts_e4m3"] == (capability >= 90), kernel
            continue
        assert kernel["copies"][-1] == (8 if "stem" in kernel["name"] else 16), kernel
        if capability == 90:
            used = kernel["code"]["tensor_instructions"]
            assert all(name.startswith("IGMMA.64x") for name in used), kernel


@triton.jit
def _products(a, b, out, steps, precision: tl.constexpr):
    row, inner = tl.arange(0, 64)[:, None], tl.arange(0, 32)
    acc = tl.zeros((64, 64), tl.float32)
    for step in range(steps):
        left = tl.load(a + row * 32 * steps + step * 32 + inner[None, :])
        right = tl.load(b + row.T * 32 * steps + step * 32 + inner[:, None])
        acc = multiply(left, right, acc, precision)
    tl.store(out + row * 64 + row.T, acc)


@pytest.mark.parametrize("capability", [80, 90])
def test_float32_sums_each_step_by_itself(capability: int) -> None:
    """The error of a single chain of sums would grow with the number of steps. A thread has 32
    accumulators, so it adds 32 sums beside the products of a step."""
    (counts,) = compiled_kernels(__file__, capability, "sums")
    assert counts == {"fma": 32 * 32, "add": 32}


def test_products_without_a_fence_are_found() -> None:
    """Which Triton leaves out before 3.7.1; the kernels are compiled for single warps there."""
    copy = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;\n"
    fence = "fence.proxy.async.shared::cta;\n"
    for product in ("wgmma.mma_async.sync.aligned.m64n64k16;", "tcgen05.mma.cta_group::1;"):
        assert lacks_fence(copy + product)
        assert not lacks_fence(copy + fence + product)
        assert not lacks_fence(product)
    assert not lacks_fence(copy + "mma.sync.aligned.m16n8k16;")


def test_sizes_of_one_compile() -> None:
    """Triton makes a constant of an integer that is 1, which is no tensor any more and has no type
    to convert from; and numbers of the padding, which no layer of a ResNet but the first has."""
    kernels = compiled_kernels(__file__, 90, "ones")
    assert {kernel["kernel"] for kernel in kernels} == {
        "conv_bn_kernel",
        "bn_add_relu_kernel",
        "head_kernel",
        "quantized_images_kernel",
        "quantized_conv_kernel",
        "pixel_sums_kernel",
        "quantized_head_kernel",
    }


def _of_one(backend: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """Ops of single images, channels and pixels."""
    half, float32 = torch.float16, torch.float32
    one, vector = meta(1, 1, 1, 1, dtype=half), meta(1, dtype=float32)
    yield "conv", _first(backend.conv_bn, one, _layer(1, 1, 3, 1, half), None, True)
    yield "elementwise", _first(backend.bn_add_relu, one, _batch_norm(1), one, True)
    yield "head", _first(backend.head, one, meta(1, 1, dtype=half), meta(1, dtype=half))
    for dtype, weights, sums in (
        (torch.uint8, torch.int8, torch.int32),
        (FLOAT8, FLOAT8, float32),
    ):
        images = ImageQuantization(vector, vector)
        yield "images", _first(backend.quantized_images, one, images, dtype == FLOAT8)
        conv, padding = meta_convolution(1, 16, 3, 1, weights), meta(16, dtype=dtype)
        layer = QuantizedLayer(conv, meta(1, dtype=sums), vector, padding)
        x = meta(1, 16, 1, 1, dtype=dtype)
        yield "quantised conv", _first(backend.quantized_conv, x, layer, None, True)
        x, weight = meta(1, 1, 1, 1, dtype=dtype), meta(1, 1, dtype=weights)
        yield "quantised head", _first(backend.quantized_head, x, weight, vector, vector)


def _batch_norm(channels: int) -> BatchNorm:
    mean, var, weight, bias = (meta(channels, dtype=torch.float32) for _ in range(4))
    return BatchNorm(mean, var, weight, bias)


def _layer(k: int, c: int, kernel: int, stride: int, dtype: torch.dtype, groups: int = 1) -> ConvBn:
    conv = meta_convolution(k, c // groups, kernel, stride, dtype)._replace(groups=groups)
    return ConvBn(conv, _batch_norm(k))


def _first(listed: Callable[..., Sequence[Candidate]], *arguments: Any) -> Callable[[], object]:
    """A call of the heuristic's choice."""
    return lambda: listed(*arguments)[0].launch(*arguments)


def _resnet(backend: Any, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kind of op that ResNet-50 has, at shapes with different tiles."""

    def conv(
        c: int, size: int, k: int, kernel: int, stride: int, add: bool, groups: int = 1
    ) -> Callable[[], object]:
        out = (BATCH, k, size // stride, size // stride)
        return _first(
            backend.conv_bn,
            meta(BATCH, c, size, size, dtype=dtype),
            _layer(k, c, kernel, stride, dtype, groups),
            meta(*out, dtype=dtype) if add else None,
            True,
        )

    def projection(width: int, c: int, size: int, stride: int) -> Callable[[], object]:
        return _first(
            backend.conv_bn_projection,
            meta(BATCH, width, size // stride, size // stride, dtype=dtype),
            _layer(4 * width, width, 1, 1, dtype),
            meta(BATCH, c, size, size, dtype=dtype),
            _layer(4 * width, c, 1, stride, dtype),
        )

    yield (
        "stem",
        _first(
            backend.stem,
            torch.empty(BATCH, 3, 224, 224, dtype=dtype, device="meta"),
            _layer(64, 3, 7, 2, dtype),
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
    yield (
        "stage 2 shortcut option A",
        _first(
            backend.conv_bn,
            meta(BATCH, 128, 28, 28, dtype=dtype),
            _layer(128, 128, 3, 1, dtype),
            meta(BATCH, 64, 56, 56, dtype=dtype)[:, :, ::2, ::2],
            True,
        ),
    )
    yield "stage 1 of ResNeXt 3x3", conv(128, 56, 128, 3, 1, False, groups=32)
    yield (
        "elementwise",
        _first(
            backend.bn_add_relu,
            meta(BATCH, 256, 56, 56, dtype=dtype),
            _batch_norm(256),
            meta(BATCH, 256, 56, 56, dtype=dtype),
            True,
        ),
    )
    yield (
        "squeeze and excitation",
        _first(
            backend.squeeze_excite,
            meta(BATCH, 1024, 14, 14, dtype=dtype),
            Gate(
                *(meta(64, 1024, dtype=dtype), meta(64, dtype=dtype)),
                *(meta(1024, 64, dtype=dtype), meta(1024, dtype=dtype)),
            ),
            meta(BATCH, 1024, 14, 14, dtype=dtype),
            True,
        ),
    )
    yield (
        "head",
        _first(
            backend.head,
            meta(BATCH, 2048, 7, 7, dtype=dtype),
            meta(1000, 2048, dtype=dtype),
            meta(1000, dtype=dtype),
        ),
    )


def _quantized_resnet(backend: Any, float8: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kind of op that an int8 or fp8 ResNet-50 has, at shapes with different tiles."""
    weights, activations, biases = torch.int8, torch.uint8, torch.int32
    if float8:
        weights, activations, biases = FLOAT8, FLOAT8, torch.float32

    def layer(k: int, c: int, kernel: int, stride: int) -> QuantizedLayer:
        conv = meta_convolution(k, c, kernel, stride, weights)
        return QuantizedLayer(conv, meta(k, dtype=biases), meta(k, dtype=torch.float32))

    def conv(
        c: int, size: int, k: int, kernel: int, stride: int = 1, shortcut: int = 0
    ) -> Callable[[], object]:
        """shortcut: its channels; with as many as the result has, it is added as it is."""
        out = size // stride
        added = None
        if shortcut:
            added = QuantizedShortcut(
                meta(BATCH, shortcut, out, out, dtype=activations),
                meta(k, dtype=torch.float32),
                None if shortcut == k else meta_convolution(k, shortcut, 1, 1, weights),
            )
        return _first(
            backend.quantized_conv,
            meta(BATCH, c, size, size, dtype=activations),
            layer(k, c, kernel, stride),
            added,
            True,
        )

    vectors = [meta(3, dtype=torch.float32) for _ in range(4)]
    for name, x, given in (
        ("images", meta(BATCH, 3, 224, 224, dtype=torch.float32).contiguous(), vectors[:2]),
        ("channels_last images", meta(BATCH, 3, 224, 224, dtype=torch.float16), vectors[:2]),
        ("images of bytes", meta(BATCH, 3, 224, 224, dtype=torch.uint8), vectors),
    ):
        yield name, _first(backend.quantized_images, x, ImageQuantization(*given), float8)
    yield (
        "stem",
        _first(
            backend.quantized_stem,
            meta(BATCH, 3, 224, 224, dtype=activations),
            layer(64, 3, 7, 2)._replace(padding_value=meta(3, dtype=activations)),
            MaxPool(),
        ),
    )
    yield "stage 1 3x3", conv(64, 56, 64, 3)
    yield "stage 1 projection", conv(64, 56, 256, 1, shortcut=64)
    yield "stage 2 3x3 strided", conv(128, 56, 128, 3, 2)
    yield "stage 2 expand", conv(128, 28, 512, 1, shortcut=512)
    yield "stage 4 reduce", conv(2048, 7, 512, 1)
    yield "stage 4 3x3", conv(512, 7, 512, 3)
    yield (
        "head",
        _first(
            backend.quantized_head,
            meta(BATCH, 2048, 7, 7, dtype=activations),
            meta(1000, 2048, dtype=weights),
            *(meta(1000, dtype=torch.float32) for _ in range(2)),
        ),
    )


def _worker(capability: int, dtype: str, names: Sequence[str]) -> None:
    """Compiles what a ResNet-50 launches, or of it what has one of those names."""
    from resnet_fused.backends.triton.backend import TritonBackend

    if dtype == "sums":
        from triton.backends.compiler import GPUTarget

        kinds = dict.fromkeys(("a", "b", "out"), "*fp32") | {"steps": "i32"}
        source = triton.compiler.ASTSource(_products, kinds, {"precision": "ieee"})
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        kinds = {"fma": r"\bfma\.rn\.f32\b", "add": r"\badd(?:\.rn)?\.f32\b"}
        print(json.dumps({name: len(re.findall(kind, ptx)) for name, kind in kinds.items()}))
        return
    if dtype == "ones":
        compile_launches(capability, _of_one(TritonBackend()))
        return
    if dtype in ("int8", "float8"):
        compile_launches(capability, _quantized_resnet(TritonBackend(), dtype == "float8"))
        return
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    calls = _resnet(TritonBackend(), DTYPES[dtype])
    compile_launches(capability, (call for call in calls if not names or call[0] in names))


if __name__ == "__main__":
    _worker(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
