"""Writes the tables of docs/cuda_kernels.md: what the compiler and the layers' shapes say.

    python benchmarks/cuda_resources.py

Registers come from the machine code in resnet_fused._C (cuobjdump of triton's wheel or from PATH),
blocks per SM from CUDA's limits per architecture, bytes from ResNet-50's layers. No GPU
is needed and nothing is timed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchvision
from harness.results import ROOT, markdown
from time_model.cuda_kernels import BlockKernel, Kernel, OtherKernel, described
from time_model.rates import LIMITS
from time_model.work import resident_blocks
from torch import nn

from resnet_fused import _extension, complexity
from resnet_fused.testing import machine_code

DOCUMENT = ROOT / "docs" / "cuda_kernels.md"
MARK = "<!-- From here on written by benchmarks/cuda_resources.py. -->\n"
BATCH = 256


AnyKernel = Kernel | BlockKernel | OtherKernel


def fitting(kernel: AnyKernel, registers: int, architecture: str) -> int:
    """Blocks that fit an SM."""
    return resident_blocks(LIMITS[architecture], registers, kernel.shared, kernel.warps)


def registers() -> dict[AnyKernel, dict[str, int]]:
    """Registers of each kernel per architecture, as the machine code records them."""
    usage = machine_code.cuobjdump(str(_extension.load().__file__), "--dump-resource-usage")
    found: dict[AnyKernel, dict[str, int]] = {}
    for part in re.split(r"^arch = sm_", usage, flags=re.MULTILINE)[1:]:
        architecture = part.split(maxsplit=1)[0]
        for name, count in re.findall(r"Function (\w+):\s+REG:(\d+)", part):
            if kernel := described(name):
                found.setdefault(kernel, {})[architecture] = int(count)
    if not found:
        raise SystemExit(
            "resnet_fused._C holds no CUDA kernels; build it with RESNET_FUSED_CUDA=on"
        )
    return found


def kernel_table(found: dict[Kernel, dict[str, int]]) -> str:
    head = "type, tile, channels, projection, threads, shared memory, registers, blocks"
    rows = [head.split(", ")]
    for kernel, counts in sorted(found.items()):
        architectures = [a for a in LIMITS if a in counts]
        blocks = [fitting(kernel, counts[a], a) for a in architectures]
        numbers = [counts[a] for a in architectures]
        rows.append(
            [
                kernel.dtype,
                f"{kernel.positions} × {kernel.channels}"
                + ", cluster" * (kernel.cluster > 1)
                + ", ping-pong" * kernel.ping_pong
                + ", resident" * (kernel.resident > 0),
                "16 bytes" if kernel.vectorised else "one by one",
                "yes" if kernel.projection else "",
                str(32 * kernel.warps),
                f"{kernel.shared / 1024:g} KiB",
                " / ".join(map(str, [*numbers, *kernel.claimed])),
                " / ".join(map(str, blocks)),
            ]
        )
    return markdown(rows)


def block_kernel_table(found: dict[BlockKernel, dict[str, int]]) -> str:
    head = "type, inner channels, shortcut, threads, shared memory, registers, blocks"
    rows = [head.split(", ")]
    for kernel, counts in sorted(found.items()):
        architectures = [a for a in LIMITS if a in counts]
        shortcut = f"projection, stride {kernel.stride}" if kernel.projection else "x"
        rows.append(
            [
                kernel.dtype,
                f"{kernel.inner}" + ", wgmma" * kernel.sm90,
                shortcut,
                str(32 * kernel.warps),
                f"{kernel.shared / 1024:g} KiB",
                " / ".join(str(counts[a]) for a in architectures),
                " / ".join(str(fitting(kernel, counts[a], a)) for a in architectures),
            ]
        )
    return markdown(rows)


def other_kernel_table(found: dict[OtherKernel, dict[str, int]]) -> str:
    rows = [["file", "type", "tile", "threads", "shared memory", "registers", "blocks"]]
    for kernel, counts in sorted(found.items()):
        count = counts["90a"]
        rows.append(
            [
                f"`{kernel.name}`",
                kernel.dtype,
                kernel.tile,
                str(32 * kernel.warps),
                f"{kernel.shared / 1024:g} KiB",
                " / ".join(map(str, [count, *kernel.claimed])),
                str(fitting(kernel, count, "90a")),
            ]
        )
    return markdown(rows)


class Product(NamedTuple):
    """One convolution of a layer: its geometry per axis, and channels."""

    image: int
    positions: int
    kernel: int
    stride: int
    padding: int
    channels: int
    out_channels: int

    def loads(self, tile: tuple[int, int]) -> int:
        """Elements that blocks of `tile` copy to shared memory; padding costs no access."""
        inside = sum(
            0 <= p * self.stride - self.padding + r < self.image
            for p in range(self.positions)
            for r in range(self.kernel)
        )
        down = -(-BATCH * self.positions**2 // tile[0])
        across = -(-self.out_channels // tile[1])
        x = BATCH * inside**2 * self.channels * across
        return x + down * self.kernel**2 * self.channels * self.out_channels


def products(model: nn.Module) -> dict[str, Product]:
    """Every convolution of `model` by name; computes nothing."""
    found: dict[str, Product] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Conv2d, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            found[name] = Product(
                inputs[0].shape[3],
                output.shape[3],
                module.kernel_size[0],
                module.stride[0],
                int(module.padding[0]),
                module.in_channels,
                module.out_channels,
            )

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(record(name))
    with torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    return found


def layer_table() -> str:
    with torch.device("meta"):
        model = torchvision.models.resnet50().eval()
    floors = {layer.name: layer for layer in complexity.passes(model, BATCH, 224)}
    of = products(model)
    tiles = ((64, 64), (128, 64), (128, 128))
    rows: dict[tuple[Any, ...], list[str]] = {}
    cells = [["layers", "window", "image → result", "floor", *(f"{m} × {n}" for m, n in tiles)]]
    for name, layer in floors.items():
        if name not in of or name == "conv1":
            continue
        projection = of.get(name.rsplit(".", 1)[0] + ".downsample.0")
        if not name.endswith("conv3"):
            projection = None
        rows.setdefault((of[name], projection, layer.elements), []).append(name)
    for (product, projection, elements), names in rows.items():
        stored = BATCH * product.positions**2 * product.out_channels
        streamed = stored * (2 if names[0].endswith("conv3") and projection is None else 1)
        moved = []
        for tile in tiles:
            both = product.loads(tile) + (projection.loads(tile) if projection else 0)
            moved.append(f"{2 * (both + streamed) / 1e6:.0f}")
        label = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        stride = f"/{product.stride}" if product.stride > 1 else ""
        cells.append(
            [
                label + (" + downsample" if projection else ""),
                f"{product.kernel} × {product.kernel}{stride}",
                f"{product.image}² × {product.channels} → "
                f"{product.positions}² × {product.out_channels}",
                f"{2 * elements / 1e6:.0f}",
                *moved,
            ]
        )
    return markdown(cells)


def block_table() -> str:
    with torch.device("meta"):
        of = products(torchvision.models.resnet50().eval())
    rows = [["block", "by layers", "floor", "asked for", "operations per byte of the layers"]]
    for block in ("layer1.0", "layer1.1", "layer2.0", "layer2.1"):
        first, second, third = (of[f"{block}.conv{i}"] for i in (1, 2, 3))
        projection = of.get(f"{block}.downsample.0")
        kernel = BlockKernel("", first.out_channels, second.stride, projection is not None)
        inner, out = first.out_channels, third.out_channels
        pixels, positions = BATCH * first.image**2, BATCH * second.positions**2
        side = 14 // second.stride
        tiles = BATCH * (-(-second.positions // side)) ** 2
        weights = first.channels * inner + 9 * inner**2 + inner * out
        weights += first.channels * out if projection else 0
        layers = pixels * (first.channels + 2 * inner)
        layers += positions * (2 * inner + first.channels + out)
        inside = sum(
            0 <= start * second.stride - 1 + line < first.image
            for start in range(0, second.positions, side)
            for line in range((side - 1) * second.stride + 3)
        )
        ends = kernel.positions * (inner + (first.channels if projection else 0)) * out
        products_ = tiles * (256 * first.channels * inner + kernel.positions * 9 * inner**2 + ends)
        floor = pixels * first.channels + positions * out + weights
        asked = BATCH * inside**2 * first.channels + positions * (first.channels + out)
        asked += tiles * weights
        rows.append(
            [
                block,
                *(f"{2 * moved / 1e6:.0f}" for moved in (layers + weights, floor, asked)),
                f"{products_ / layers:.0f}",
            ]
        )
    return markdown(rows)


def main() -> None:
    found = registers()
    compiler = _extension.load().build_info()["cuda_note"]
    text = DOCUMENT.read_text().split(MARK)[0]
    lines = [
        "## Registers, shared memory and blocks per SM",
        "",
        f"Compiled by {compiler}. Registers of a thread and blocks that fit an SM are",
        f"those of sm_{' / sm_'.join(LIMITS)}. Nothing spills.",
        "",
        kernel_table({k: v for k, v in found.items() if isinstance(k, Kernel) and not k.sm90}),
        "",
        "The kernel for sm_90a: registers of a thread at launch / then of one that copies / of one",
        "that multiplies.",
        "",
        kernel_table({k: v for k, v in found.items() if isinstance(k, Kernel) and k.sm90}),
        "",
        "Others for sm_90a.",
        "",
        other_kernel_table({k: v for k, v in found.items() if isinstance(k, OtherKernel)}),
        "",
        "The kernels for a whole bottleneck.",
        "",
        block_kernel_table({k: v for k, v in found.items() if isinstance(k, BlockKernel)}),
        "",
        f"## ResNet-50 at 224², batch {BATCH}, 16-bit: megabytes",
        "",
        "The floor counts x, weights, residual or what is read of the shortcut, and result once",
        "each, from memory. The last columns are what the blocks of each tile ask for in total.",
        "What exceeds the floor is asked for again, by the taps of a window and by the blocks that",
        "share positions or channels, and comes from L2 as far as it holds them. Only sm_90a's",
        "kernel has a 128 × 128 tile for a shortcut's projection, and it has no 64 × 64 one.",
        "",
        layer_table(),
        "",
        f"## Bottlenecks of ResNet-50 at 224², batch {BATCH}, 16-bit, whole: megabytes",
        "",
        "What the layers move one by one, at the least; the floor of a kernel for the whole block;",
        "what its blocks ask for, halo, shortcut and weights again, which come from L2 as far as",
        "it holds them; and its arithmetic, recomputation included, by what the layers move.",
        "",
        block_table(),
        "",
    ]
    DOCUMENT.write_text(text + MARK + "\n" + "\n".join(lines))
    print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()
