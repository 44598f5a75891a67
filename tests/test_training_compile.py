"""Ahead-of-time compilation of the training kernels at ResNet-50's shapes, batch 256."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module

import pytest
import torch
from code_budgets import most_spilled

from resnet_fused.ops.training_layers import flatten
from resnet_fused.ops.training_op import Kept, Wanted
from resnet_fused.parameters import Layer
from resnet_fused.testing.ahead_of_time import (
    DTYPES,
    TARGETS,
    compile_launches,
    compiled_kernels,
    meta,
    meta_convolution,
)

pytest.importorskip("triton")

BATCH = 256

KERNELS = {
    "conv_stats_kernel",
    "merge_moments_kernel",
    "bn_scale_shift_kernel",
    "bn_add_relu_kernel",
    "relu_gradient_kernel",
    "pre_bn_gradient_kernel",
    "merge_sums_kernel",
    "bn_backward_coefficients_kernel",
    "dgrad_kernel",
    "wgrad_kernel",
    "sum_parts_kernel",
    "bn_relu_pool_kernel",
    "pool_gradient_kernel",
}
# Of a block whose end is folded, which those of 16-bit types are.
FOLDED = {
    "gram_kernel",
    "merge_gram_kernel",
    "end_products_kernel",
    "end_moments_kernel",
    "conv_bn_kernel",
    "end_sums_kernel",
    "end_gradients_kernel",
    "end_matrix_kernel",
    "end_offset_kernel",
}
OPS = ("resnet_fused.ops.block_training", "resnet_fused.ops.stem_training")
PRODUCTS = {"conv_stats_kernel", "dgrad_kernel", "wgrad_kernel", "gram_kernel", "conv_bn_kernel"}


# Every kernel, and the tiles that hold the most registers, for test_oldest_triton.py.
TELLING = ("stem", "stage 2", "stage 2 projection", "stage 3, frozen")


WHOLE = (
    (80, "bfloat16"),
    (90, "bfloat16"),
    (90, "tf32"),  # float32 as PyTorch computes it by default
    (90, "float32"),
    (100, "bfloat16"),
)


@pytest.mark.slow  # test_compiled_code.py compiles a step's kernels for one GPU
@pytest.mark.parametrize(("capability", "dtype"), WHOLE)
def test_training_kernels_of_resnet50(capability: int, dtype: str) -> None:
    """No spilled register that is not known, tensor cores in every product of 16-bit operands."""
    kernels = compiled_kernels(__file__, capability, dtype)
    expected = KERNELS if DTYPES[dtype] == torch.float32 else KERNELS | FOLDED
    assert {kernel["kernel"] for kernel in kernels} == expected
    for kernel in kernels:
        assert kernel["spilled"] <= most_spilled(kernel, capability, dtype), kernel
        if kernel["kernel"] in PRODUCTS and dtype == "bfloat16":
            # Fewer than 64 rows are too few for the newer chips' own instructions.
            wanted = TARGETS[capability].instruction if kernel["rows"] >= 64 else "mma.sync"
            assert wanted in kernel["instructions"], kernel


def _layer(k: int, c: int, size: int, stride: int, frozen: bool) -> Layer:
    conv = meta_convolution(k, c, size, stride, torch.float32)
    vector = meta(k, dtype=torch.float32)
    return Layer(conv, vector, vector, 1e-5, (vector, vector) if frozen else None)


def _steps(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward of the stem and of the blocks, each stage's shapes once."""
    block_training, stem_training = map(import_module, OPS)

    def stem() -> None:
        x = meta(BATCH, 3, 224, 224, dtype=dtype)
        layers = flatten([_layer(64, 3, 7, 2, False)])
        settings = (3, 2, 1, "")
        y, *kept = stem_training._forward(x, layers, *settings)
        results = Kept(y, x, y, layers.weights, *kept, layers.windows, layers.frozen)
        stem_training._backward(results, Wanted(False, [True], [True]), *settings)

    def block(
        width: int, c: int, size: int, stride: int, frozen: bool, padded: bool = False
    ) -> None:
        x = meta(BATCH, c, size, size, dtype=dtype)
        layers = [
            _layer(width, c, 1, 1, frozen),
            _layer(width, width, 3, stride, frozen),
            _layer(4 * width, width, 1, 1, frozen),
        ]
        shortcut = "identity"
        if padded:
            shortcut = "padded"
        elif c != 4 * width:
            layers.append(_layer(4 * width, c, 1, stride, frozen))
            shortcut = "projection"
        flat = flatten(layers)
        settings, needs = (shortcut, stride, ""), [True] * len(layers)
        y, *kept = block_training._forward(x, flat, *settings)
        results = Kept(y, x, y, flat.weights, *kept, flat.windows, flat.frozen)
        block_training._backward(results, Wanted(True, needs, needs), *settings)

    yield "stem", stem
    yield "stage 1 projection", lambda: block(64, 64, 56, 1, False)
    yield "stage 1", lambda: block(64, 256, 56, 1, False)
    yield "stage 2 projection", lambda: block(128, 256, 56, 2, False)
    yield "stage 2", lambda: block(128, 512, 28, 1, False)
    yield "stage 2 shortcut option A", lambda: block(128, 256, 56, 2, False, padded=True)
    yield "stage 3", lambda: block(256, 1024, 14, 1, False)
    yield "stage 4", lambda: block(512, 2048, 7, 1, False)
    yield "stage 3, frozen", lambda: block(256, 1024, 14, 1, True)


def _worker(capability: int, dtype: str, *names: str) -> None:
    """Compiles what a training step of ResNet-50 launches, or those of its parts."""
    from resnet_fused.backends.triton.training import TritonTraining

    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    for ops in map(import_module, OPS):
        ops.kernels = lambda _: TritonTraining()  # type: ignore[attr-defined]
    steps = [step for step in _steps(DTYPES[dtype]) if not names or step[0] in names]
    compile_launches(capability, steps)


if __name__ == "__main__":
    _worker(int(sys.argv[1]), *sys.argv[2:])
