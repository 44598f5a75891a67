"""Quantised convolutions on Hopper, of int8: tiles that csrc/kernels/cuda/quantized_conv_sm90.cu
takes, and its loops. What its host code decides from sizes is said again here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .cuda_backend import STEP_BYTES, Call, PersistentTile, Product
from .rates import Gpu
from .work import Work


class Tile(PersistentTile):
    """Of quantized_conv_sm90.cu."""

    def cycles(
        self, rows: int, filters: int, steps: Sequence[int], residual: bool, sms: int
    ) -> int:
        """By which the host code chooses."""
        step = max(self.m * self.n * STEP_BYTES // 4096, self.asked_rows * STEP_BYTES // 64)
        of_element = 60 + 50 * residual + 35 * (len(steps) > 1)
        epilogue = self.m * self.n * of_element // 1000
        products, of_sm = sum(steps) * step, math.ceil(self.tiles(rows, filters) / sms)
        if self.ping_pong:
            alone = epilogue * 5 // 3
            return of_sm * max(products, products // 2 + alone) + alone
        return of_sm * products + math.ceil(of_sm / self.blocks) * epilogue


# In the order of quantized_conv_sm90.cu.
TILES = {
    "m128n64": Tile(128, 64, 3, 2),
    "m128n128": Tile(128, 128, 5, 1, ping_pong=True),
    "m128n128_cluster": Tile(128, 128, 5, 1, 2, ping_pong=True),
    "m128n256_cluster": Tile(128, 256, 3, 1, 2),
}


def products_of(layer: Any, projection: Any) -> list[Product]:
    return [Product.of(*one, operand_bytes=1) for one in (layer, projection) if one is not None]


def tiles_in_order(
    rows: int, filters: int, steps: Sequence[int], residual: bool, sms: int
) -> list[str]:
    """Names of the tiles: the one that the heuristic takes, then the others as they stand."""
    best = min(TILES, key=lambda name: TILES[name].cycles(rows, filters, steps, residual, sms))
    return [best, *(name for name in TILES if name != best)]


def quantized_conv(call: Call, gpu: Gpu) -> tuple[Work, str]:
    """The launch, and the symbol of its kernel."""
    layer, _, _, _, residual, projection, _, name = call.arguments
    batch, filters, *image = call.out.shape
    rows, products = batch * math.prod(image), products_of(layer, projection)
    steps = [p.steps for p in products]
    tile = TILES[name]
    tiles, stored = tile.tiles(rows, filters), call.out.numel()
    added = stored if residual is not None else 0
    # What is beyond the last channel is asked of nobody.
    asked = sum(math.prod(p.window) * p.channels for p in products) * tile.asked_rows
    work = tile.work(
        "quantized_conv_sm90_kernel",
        operand_bytes=1,
        shape=" + ".join(p.title() for p in products) + ", residual" * bool(added),
        tiles=tiles,
        # A tile; who takes turns and adds a residual has a loop that waits; the products.
        trips=(1, *[0.0] * (tile.ping_pong and bool(added)), *steps),
        dram_bytes=int(sum(p.moved_bytes(batch) for p in products)) + added + stored,
        l2_bytes=tiles * asked + added + stored,
        multiply_adds=rows * sum(p.weights for p in products),
    )
    signed = "a" if layer[0][-1].dtype == torch.int8 else "h"
    sizes = rf"ILi{tile.n}ELi{tile.stages}ELi{tile.blocks}ELi{tile.cluster}E"
    shortcut = 2 if len(products) > 1 else int(residual is not None)
    return work, rf"quantized_conv_sm90_kernelI{signed}NS0_4Tile{sizes}\w*ShortcutE{shortcut}E"
