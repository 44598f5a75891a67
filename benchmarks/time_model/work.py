"""What a launch has to do, and how long that takes by the rates assumed.

A launch is cut into tiles: its blocks, or what a persistent block takes one after the other. A
tile's code is known (`resnet_fused.testing.machine_code`), and from the shapes how often each of
its loops runs. Two times bound an SM:

- of each resource (issue slots, tensor cores, shared memory with the load/store units, L2), what
  all its tiles ask of it;
- the chain of one tile, step by step: a step lasts as long as the resource it needs most, alone on
  the SM, and longer where it waits for its own product or for a load; tiles in
  different blocks of an SM overlap.

The largest counts. Beside it stand the bytes that cross to DRAM, for the whole launch: the larger
of both times, and of the smaller a part ("overlap"); then the distance between two launches.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from resnet_fused._extension import TensorArg
from resnet_fused.testing import machine_code
from resnet_fused.testing.machine_code import LANES, Code, Loop, Tally, tally

from .rates import RESERVED, Gpu, Limits, Rates

SCHEDULERS = 4
L2_PORT_BYTES = 64  # a cycle, of an SM, what it asked for and what others have sent it
_LOAD_STORE_BYTES = 128  # a cycle; narrower accesses of a warp take a cycle as well


def bytes_of(*tensors: Tensor | TensorArg | None) -> int:
    """Of tensors, or of what the extension takes for them; None has none."""
    total = 0
    for found in tensors:
        if isinstance(found, tuple):
            _address, _type, _sizes, _strides, found = found
        total += 0 if found is None else found.numel() * found.element_size()
    return total


@dataclass(frozen=True)
class Work:
    """One launch.

    layer, shape: for people; who reads the network's launches fills in the former, and
    blocks_per_sm where it is 0. tiles: independent pieces. warps: of a tile, that run `code`.
    trips: per tile, how often each loop of `code` runs, by address, on average over the warps;
    shared_loops: those of them that load what all tiles load, so from L2. persistent: blocks take
    several tiles; the loops beyond `trips` and what is in no loop are then other warps' or run
    once. beside: loops that other warps run at the same time, which take resources and are no part
    of a tile's chain. bulk_bytes: that a step's bulk copies write to shared memory, those of other
    blocks included. resident_bytes: that a persistent block copies from L2 before its first tile.
    meetings: times that the blocks of a cluster wait for each other and read each other's memory.
    dram_bytes, l2_bytes: of the whole launch; the former once each, the latter as blocks ask.
    multiply_adds: useful ones, of numbers of operand_bytes.
    code None: a kernel of PyTorch's or its libraries', of which only bytes and products are known.
    """

    kernel: str
    config: str
    shape: str
    tiles: int
    warps: int
    trips: tuple[float, ...]
    dram_bytes: int
    l2_bytes: int
    multiply_adds: int
    layer: str = ""
    blocks_per_sm: int = 0
    operand_bytes: int = 2
    code: Code | None = None
    registers: int = 0
    spilled: int = 0
    shared_bytes: int = 0
    shared_loops: tuple[int, ...] = ()
    persistent: bool = False
    beside: tuple[int, ...] = ()
    bulk_bytes: int = 0
    resident_bytes: int = 0
    meetings: int = 0


@dataclass(frozen=True)
class Prediction:
    """Modelled times of one launch.

    cycles: of the busiest SM, by resource, and "chain" for the chains of its tiles.
    chain: what those wait for, step by step.
    """

    microseconds: float
    floor_microseconds: float
    bound: str
    waves: float
    cycles: dict[str, float] = field(default_factory=dict)
    chain: dict[str, float] = field(default_factory=dict)


def resident_blocks(limits: Limits, registers: int, shared_bytes: int, warps: int) -> int:
    """Blocks that fit an SM; registers are given out to warps by the 256."""
    per_warp = math.ceil(registers * LANES / 256) * 256
    return min(
        limits.registers // per_warp // warps,
        limits.shared * 1024 // (shared_bytes + RESERVED),
        limits.warps // warps,
        limits.blocks,
    )


@functools.cache
def parts(code: Code) -> tuple[Tally, tuple[tuple[Loop, Tally], ...]]:
    """What the code does outside loops, and each loop with what one trip does."""
    outside, loops = code.regions
    return tally(outside), tuple((loop, tally(loop.body)) for loop in loops)


def _cycles(
    done: Tally, warps: int, bulk_bytes: int, l2_bytes: float, r: Rates
) -> dict[str, float]:
    """What `done` by each of a tile's warps takes of each resource of an SM."""
    narrow = sum(
        count * max(1.0, LANES * width / _LOAD_STORE_BYTES)
        for widths in (done.loads, done.stores)
        for width, count in widths.items()
    )
    found = done.multiply_adds
    # Of int8 the tensor cores compute two in the time of one.
    tensor = found["HGMMA"] + found["IGMMA"] / 2 + (found["HMMA"] + found["IMMA"] / 2) / r.mma_sync
    return {
        "issue": done.instructions * warps / SCHEDULERS / r.issue,
        "tensor": tensor * warps / r.tensor,
        "shared": (done.shared_bytes * warps + bulk_bytes) / r.shared + narrow * warps,
        "l2": max(l2_bytes / r.l2, bulk_bytes / L2_PORT_BYTES),
    }


def _waits(loop: Loop, product: float, from_l2: bool, r: Rates) -> dict[str, float]:
    """Cycles of a step that nothing of the same block hides.

    The `product` that is waited for in its own step, and loads into registers that the step uses.
    """
    waits = {}
    if loop.products_pending == 0 and loop.has_products:
        waits["product"] = product + r.synchronisation
    if loop.loads:
        waits["latency"] = r.l2_latency if from_l2 else r.latency
    return waits


def _longest(cycles: dict[str, float]) -> dict[str, float]:
    name = max(cycles, key=cycles.__getitem__)
    return {name: cycles[name]}


_Cycles = defaultdict[str, float]


def _tile(work: Work, r: Rates) -> tuple[_Cycles, _Cycles]:
    """A tile's cycles of each resource, and those of its chain."""
    outside, loops = parts(work.code) if work.code else (tally([]), ())
    if len(work.trips) > len(loops) or (len(work.trips) < len(loops) and not work.persistent):
        raise ValueError(
            f"{work.kernel} {work.config} has {len(loops)} loops and the model knows the trips of "
            f"{len(work.trips)}; describe the kernel's loops again."
        )
    total, chain = _Cycles(float), _Cycles(float)

    def add(
        trips: float, cycles: dict[str, float], waits: dict[str, float], beside: bool = False
    ) -> None:
        for name, value in cycles.items():
            total[name] += trips * value
        if beside:
            return
        # A loop that only some of the warps enter lasts its whole time.
        times = max(trips, math.ceil(min(trips, 1.0)))
        for name, value in [*_longest(cycles).items(), *waits.items()]:
            chain[name] += times * value

    if not work.persistent:
        add(1.0, _cycles(outside, work.warps, 0, 0.0, r), {"latency": r.latency})
    # The steps of products ask L2 for what the tile needs, or else the whole tile does.
    described = list(zip(work.trips, loops, strict=False))
    steps = sum(trips for trips, (loop, _) in described if loop.has_products)
    asked = work.l2_bytes / work.tiles
    for n, (trips, (loop, done)) in enumerate(described):
        bulk, share = (work.bulk_bytes, asked / steps) if loop.has_products else (0, 0.0)
        cycles = _cycles(done, work.warps, bulk, share, r)
        waits = _waits(loop, cycles["tensor"], n in work.shared_loops, r)
        add(trips, cycles, waits, n in work.beside)
    if not steps:
        total["l2"] = asked / r.l2
    return total, chain


def predict(work: Work, gpu: Gpu, r: Rates) -> Prediction:
    """How long `work` takes on `gpu` at the rates `r`."""
    dram = work.dram_bytes / r.dram / 1e6
    least = work.multiply_adds * work.operand_bytes / 2 / (gpu.sms * r.tensor * r.clock * 1e3)
    floor = max(dram, least)
    if work.code is None:
        library = least / r.library
        bound = "dram" if dram > library else "library"
        return Prediction(max(dram, library) + r.launch, floor, bound, 0.0)
    # Where few SMs work, each has more of L2, as far as its port goes.
    l2 = min(r.l2 * max(1.0, gpu.sms / work.tiles), L2_PORT_BYTES)
    total, chain = _tile(work, r._replace(l2=l2))
    tiles = math.ceil(work.tiles / gpu.sms)
    turns = math.ceil(tiles / work.blocks_per_sm)
    busy = {name: tiles * value for name, value in total.items()}
    chains = {name: turns * value for name, value in chain.items()}
    if work.meetings:
        chains["cluster"] = turns * work.meetings * (r.synchronisation + r.l2_latency)
    if work.persistent:  # the first tile's operands; those of the others are there
        chains["latency"] = chains.get("latency", 0.0) + r.latency
        chains["l2"] = chains.get("l2", 0.0) + work.resident_bytes / l2
    busy["chain"] = sum(chains.values())
    bound = max(busy, key=busy.__getitem__)
    on_chip = busy[bound] / r.clock / 1e3
    time = max(on_chip, dram) + r.overlap * min(on_chip, dram)
    if bound == "chain":
        bound = "chain: " + max(chains, key=chains.__getitem__)
    if dram > on_chip:
        bound = "dram"
    if r.launch > time:
        bound = "launch"
    waves = work.tiles / (gpu.sms * work.blocks_per_sm)
    return Prediction(time + r.launch, floor, bound, waves, busy, chains)


_facts = functools.cache(machine_code.facts)


def facts(work: Work) -> dict[str, Any]:
    """What the compiled code says, for a result file; instructions of one warp, for a tile."""
    if work.code is None:
        return {}
    outside, loops = parts(work.code)
    main = work.code.main_loop
    described = list(zip(work.trips, loops, strict=False))
    elsewhere = sum(
        trips * done.instructions for trips, (loop, done) in described if not loop.has_products
    )
    return {
        "registers": work.registers,
        "spilled_bytes": work.spilled,
        "shared_bytes": work.shared_bytes,
        "blocks_per_sm": work.blocks_per_sm,
        "main_loop_trips": sum(trips for trips, (loop, _) in described if loop == main),
        "instructions_outside": round(elsewhere + outside.instructions * (not work.persistent)),
        "code": _facts(work.code),
    }
