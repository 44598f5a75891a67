"""What the names of the compiled CUDA kernels say: tiles, and a block's shared memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple


class Kernel(NamedTuple):
    """One instantiation of a convolution kernel, as its mangled name tells it."""

    sm90: bool
    dtype: str
    positions: int
    channels: int
    row_bytes: int
    warps: int
    stages: int
    vectorised: bool
    projection: bool
    results: int = 0  # places for results, on sm_90a
    cluster: int = 1  # blocks that share copies of weights
    claimed: tuple[int, ...] = ()  # registers of copying and of multiplying threads, if different
    ping_pong: bool = False  # whether warpgroups take turns at tiles
    signs: bool = False  # whether the result's are written too

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: the stages, and 16 bytes a channel of batch norm; on
        sm_90a the results and two such sets, and the mbarriers."""
        stages = self.stages * (self.positions + self.channels) * self.row_bytes
        terms = 16 * self.channels
        if not self.sm90:
            return stages + terms
        results = self.results * 2 * self.positions * self.channels
        return stages + results + 2 * terms + 256


class BlockKernel(NamedTuple):
    """One instantiation of a kernel for a whole bottleneck; sizes as in bottleneck.cu or, of the
    one for sm_90a, as in bottleneck_sm90.cu."""

    dtype: str
    inner: int
    stride: int
    projection: bool
    sm90: bool = False

    @property
    def warps(self) -> int:
        return 16 if self.sm90 else 4 * self.inner // 64

    @property
    def positions(self) -> int:
        """That a block computes of the result; (14 / stride)² of them count."""
        return (16 // self.stride) ** 2

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: what is kept, the larger of two rings, the terms; on
        sm_90a lines of x and of conv2, results and weights of a projection, the ring, the terms and
        the mbarriers."""
        if self.sm90:
            panel, stages, operands = 56 * 128, 6, 2
            pixels, lines = (64 * 128, 6) if self.projection else (4 * panel, 5)
            projected = self.projection * (2 * 4 * panel + 256 * 128)
            kept = stages * pixels + operands * panel + projected + lines * 58 * 128
            return kept + 256 * 16 * (1 + self.projection) + 16 * (stages + lines + operands)
        channels = self.inner // 64 * (32 if self.projection else 64)  # of a slice
        kept = (256 + 34) * self.inner * 2
        ring = max(3 * self.inner * 128, 2 * (self.positions + channels) * 64 * self.projection)
        first = 3 * (256 + self.inner) * 64
        terms = 2 * self.inner + 2 * channels * (1 + self.projection)
        return max(first, kept + ring) + 16 * terms


class OtherKernel(NamedTuple):
    """One instantiation of another kernel for sm_90a."""

    name: str
    dtype: str
    tile: str
    warps: int
    shared: int  # bytes of dynamic shared memory
    claimed: tuple[int, ...] = ()  # registers of copying and of multiplying threads


_DTYPES = {
    "f": "float32",
    "NS0_4Tf32E": "TF32",
    "6__half": "float16",
    "13__nv_bfloat16": "bfloat16",
}


def _block_kernel(name: str) -> BlockKernel | None:
    found = re.search(r"bottleneck_sm90_kernelI(6__half|13__nv_bfloat16)Lb([01])E", name)
    if found is not None:
        return BlockKernel(_DTYPES[found[1]], 64, 1, found[2] == "1", sm90=True)
    found = re.search(
        r"bottleneck_kernelI(6__half|13__nv_bfloat16)NS0_4TileILi(\d+)ELi(\d)ELb([01])E", name
    )
    if found is None:
        return None
    return BlockKernel(_DTYPES[found[1]], int(found[2]), int(found[3]), found[4] == "1")


def _kernel(name: str) -> Kernel | None:
    found = re.search(
        r"conv_bn_(sm90_)?kernelI(f|NS0_4Tf32E|6__half|13__nv_bfloat16)NS0_4TileI((?:L[ib]\d+E)+)EE"
        r"(?:Lb([01])E)?Lb([01])E",
        name,
    )
    if found is None:
        return None
    sm90 = found[1] is not None
    projection = found[4 if sm90 else 5] == "1"
    dtype = _DTYPES[found[2]]
    sizes = list(map(int, re.findall(r"L[ib](\d+)E", found[3])))
    if sm90:
        m, n, stages, results, _, cluster, copying, multiplying, _, ping_pong = sizes
        claimed = (copying, multiplying)
        return Kernel(
            *(sm90, dtype, m, n, 128, 12, stages, True, projection, results, cluster, claimed),
            ping_pong=bool(ping_pong),
            signs=found[5] == "1",
        )
    m, n, row_bytes, warps_m, warps_n, stages, _ = sizes
    warps = warps_m * warps_n
    return Kernel(sm90, dtype, m, n, row_bytes, warps, stages, found[4] == "1", projection)


def _lines(dtype: str, positions: str) -> OtherKernel:
    """Of conv_sm90_lines.cu: stages of x and of the weight, the result, the mbarriers."""
    shared = (3 * 256 + 4 * 128 + 2 * int(positions)) * 128 + 2 * 8 * (3 + 4)
    tile = f"{positions} × 128, lines"
    return OtherKernel("conv_sm90_lines.cu", _DTYPES[dtype], tile, 12, shared, (40, 232))


# What a mangled name has behind its folder, and what its groups say.
_OTHERS: dict[str, Callable[..., OtherKernel]] = {
    r"conv_bn_sm90_lines_kernelI(6__half|13__nv_bfloat16)Li(\d+)E": _lines,
}


def described(name: str) -> Kernel | BlockKernel | OtherKernel | None:
    """What the mangled name of a kernel says; None for those that no table lists."""
    for pattern, describe in _OTHERS.items():
        if (found := re.search(pattern, name)) is not None:
            return describe(*found.groups())
    return _kernel(name) or _block_kernel(name)
