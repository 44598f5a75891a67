"""Machine code of NVIDIA GPUs (SASS), read: its loops, and what the instructions of each do.

cuobjdump of Triton's wheel, or from PATH, disassembles; nothing runs. A loop is a backward branch.
Loops that only wait (for an mbarrier, for a turn of the uniform datapath) are left out.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx

LANES = 32

_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.ASCII
)
LOADS, STORES, COPY = ("LDG", "LD"), ("STG", "ST", "RED", "ATOMG"), "LDGSTS"
PRODUCTS = ("HGMMA", "IGMMA", "HMMA", "IMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA")
_WARP_PRODUCTS = {"16832": 4096, "16816": 2048, "1688": 1024, "1684": 512}  # multiply-adds
_SHARED, _MATRICES = ("LDS", "STS"), ("LDSM", "STSM")
# Bodies this short only wait: poll an mbarrier, or trap.
_SHORTEST_LOOP = 6


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The opcode without what qualifies it."""
        return self.opcode.split(".", 1)[0]

    @property
    def target(self) -> int | None:
        """Where a branch leads, None for other instructions."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.base == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def width(self) -> int:
        """Bytes that a lane loads, stores or copies."""
        kinds = self.opcode.split(".")
        for kind, width in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if kind in kinds:
                return width
        return 4


class Tally(NamedTuple):
    """What a run of instructions amounts to, for one warp.

    multiply_adds: on tensor cores, by instruction: HGMMA, and IGMMA of int8, of a warpgroup, a
    quarter of it; HMMA and IMMA.
    loads, stores, copies: instructions that go to global memory, by bytes a lane; copies are the
    asynchronous ones into shared memory. shared_bytes: read or written in shared memory, the
    operands of HGMMA and IGMMA and the copies included.
    """

    instructions: int
    multiply_adds: Counter[str]
    loads: Counter[int]
    stores: Counter[int]
    copies: Counter[int]
    shared_bytes: int


@dataclass(frozen=True, eq=False)
class Loop:
    """A natural loop: addresses of its first instruction and of its last backward branch; `body`
    without the loops inside it."""

    first: int
    last: int
    body: tuple[Instruction, ...]

    @cached_property
    def products_pending(self) -> int | None:
        """How many groups of warpgroups' products may be unfinished where the loop waits; None: no
        wait."""
        return self._pending(r"WARPGROUP\.DEPBAR\.LE", "gsb0")

    @cached_property
    def copies_pending(self) -> int | None:
        """How many groups of LDGSTS may be unfinished where the loop waits; None: no wait."""
        if not any(i.base == "LDGDEPBAR" for i in self.body):
            return None
        return self._pending(r"DEPBAR\.LE", "SB0")

    def _pending(self, opcode: str, barrier: str) -> int | None:
        counts = [
            int(i.operands.split("0x")[1].split(",")[0], 16)
            for i in self.body
            if re.fullmatch(opcode, i.opcode) and barrier in i.operands
        ]
        return min(counts, default=None)

    @cached_property
    def has_products(self) -> bool:
        return any(i.base in PRODUCTS for i in self.body)

    @cached_property
    def loads(self) -> bool:
        """Whether it loads global memory into registers."""
        return any(i.base in LOADS for i in self.body)


@dataclass(frozen=True, eq=False)
class Code:
    """One kernel's machine code."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def regions(self) -> tuple[list[Instruction], list[Loop]]:
        """What is in no loop, and the loops by address.

        An instruction belongs to the innermost loop around it. What is only called, such as the
        slow path of a division, belongs nowhere.
        """
        blocks = _blocks(self.instructions)
        natural = _natural_loops(blocks)
        # Where loops nest, the smaller one holds the block.
        owner: dict[int, int] = {}
        for header, (members, _) in sorted(
            natural.items(), key=lambda item: len(item[1][0]), reverse=True
        ):
            owner.update(dict.fromkeys(members, header))
        bodies: dict[int | None, list[Instruction]] = {None: []}
        for number in _flow(blocks):
            bodies.setdefault(owner.get(number), []).extend(blocks[number].instructions)
        loops = []
        for header, (_, last) in sorted(natural.items()):
            body = sorted(bodies.get(header, []))
            loops.append(Loop(blocks[header].instructions[0].address, last, tuple(body)))
        return sorted(bodies[None]), sorted(loops, key=lambda loop: (loop.first, loop.last))

    @cached_property
    def main_loop(self) -> Loop | None:
        """The longest loop with matrix products, or, without any, with loads of 16 bytes."""
        _, loops = self.regions
        candidates = [loop for loop in loops if loop.has_products] or [
            loop for loop in loops if any(i.base in LOADS and i.width == 16 for i in loop.body)
        ]
        return max(candidates, key=lambda loop: len(loop.body), default=None)


class _Block(NamedTuple):
    """Instructions that run one after the other, and the numbers of the blocks that may follow."""

    instructions: list[Instruction]
    followers: list[int]


def _blocks(instructions: Sequence[Instruction]) -> list[_Block]:
    targets = {i.target for i in instructions}
    runs: list[list[Instruction]] = [[]]
    for i in instructions:
        if i.address in targets and runs[-1]:
            runs.append([])
        runs[-1].append(i)
        if i.base in ("BRA", "EXIT", "RET"):
            runs.append([])
    runs = [run for run in runs if run]
    number = {run[0].address: n for n, run in enumerate(runs)}
    found = []
    for n, run in enumerate(runs):
        last = run[-1]
        followers = [number[last.target]] if last.target in number else []
        always = last.base in ("BRA", "EXIT", "RET") and not last.predicate
        # A condition may also stand among the operands of a branch.
        if (not always or "," in last.operands) and n + 1 < len(runs):
            followers.append(n + 1)
        found.append(_Block(run, followers))
    return found


def _flow(blocks: Sequence[_Block]) -> nx.DiGraph[int]:
    """The numbers of the blocks that run, each with an edge to those that may follow."""
    every = nx.DiGraph(
        (n, follower) for n, block in enumerate(blocks) for follower in block.followers
    )
    every.add_node(0)
    return every.subgraph({0} | nx.descendants(every, 0))


def _natural_loops(blocks: Sequence[_Block]) -> dict[int, tuple[set[int], int]]:
    """Members and last branch's address of each loop that does more than wait, by first block."""
    flow = _flow(blocks)
    dominator = nx.immediate_dominators(flow, 0)
    loops: dict[int, tuple[set[int], int]] = {}
    for n, header in flow.edges:
        branch, around = blocks[n].instructions[-1], n
        while around not in (0, header):
            around = dominator[around]
        if around != header or branch.opcode.endswith(".ANY"):
            continue
        members = {header, n}
        if n != header:  # what leads to the branch without coming by the header
            members |= nx.ancestors(nx.restricted_view(flow, [header], []), n)
        known, last = loops.get(header, (set(), 0))
        loops[header] = (known | members, max(last, branch.address))
    return {
        header: found
        for header, found in loops.items()
        if sum(len(blocks[n].instructions) for n in found[0]) > _SHORTEST_LOOP
    }


def tally(instructions: Iterable[Instruction]) -> Tally:
    """Adds up `instructions`, each executed once by a whole warp."""
    count, shared = 0, 0
    products: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    copies: Counter[int] = Counter()
    for i in instructions:
        if i.base == "NOP":
            continue
        count += 1
        if i.base in LOADS:
            loads[i.width] += 1
        elif i.base in STORES:
            stores[i.width] += 1
        elif i.base == COPY:
            copies[i.width] += 1
            shared += LANES * i.width
        elif i.base in _SHARED:
            shared += LANES * i.width
        elif i.base in _MATRICES:
            number = i.opcode.rsplit(".", 1)[1]  # of 8 × 8 matrices; one where there is none
            shared += 128 * (int(number) if number.isdigit() else 1)
        elif i.base in ("HGMMA", "IGMMA"):
            m, n, k = map(int, i.opcode.split(".")[1].split("x"))
            size = 1 if i.base == "IGMMA" else 4 if "TF32" in i.opcode else 2
            from_shared = [n] + [m] * (i.operands.split(", ")[1].startswith("gdesc"))
            shared += sum(from_shared) * k * size // 4
            products[i.base] += m * n * k // 4
        elif i.base in ("HMMA", "IMMA"):
            products[i.base] += _WARP_PRODUCTS[i.opcode.split(".")[1]]
    return Tally(count, products, loads, stores, copies, shared)


def facts(code: Code) -> dict[str, Any]:
    """What a step of the main loop is made of, or all of the code where there is no such loop.

    instructions_elsewhere: outside the loops with products, each counted once.
    load_bytes_elsewhere: of loops without products. Widths are bytes of a lane, as text, with how
    many instructions have them; the pending counts are those of `Loop`.
    """
    outside, loops = code.regions
    main = code.main_loop
    body = outside if main is None else main.body
    elsewhere = [i for loop in loops if loop != main and not loop.has_products for i in loop.body]
    done = tally(body)
    return {
        "instructions_main_loop": 0 if main is None else done.instructions,
        "instructions_elsewhere": tally([*outside, *elsewhere]).instructions,
        "tensor_instructions": sorted({i.opcode for i in body if i.base in PRODUCTS}),
        "load_bytes": _by_width(done.loads),
        "copy_bytes": _by_width(done.copies),
        "load_bytes_elsewhere": _by_width(tally(elsewhere).loads),
        "copies_pending": None if main is None else main.copies_pending,
        "products_pending": None if main is None else main.products_pending,
    }


def _by_width(counts: Counter[int]) -> dict[str, int]:
    return {str(width): count for width, count in sorted(counts.items())}


def listings(text: str) -> dict[str, str]:
    """What `cuobjdump --dump-sass` printed, by kernel; reading one takes longer than finding it."""
    parts = re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]
    return {part.split("\n", 1)[0].strip(): part for part in parts}


def read(name: str, listing: str) -> Code:
    """One of `listings`."""
    return Code(
        name,
        tuple(
            Instruction(int(address, 16), predicate.strip(), opcode, operands.strip())
            for address, predicate, opcode, operands in _INSTRUCTION.findall(listing)
        ),
    )


def disassembled(text: str) -> Iterator[Code]:
    """Every kernel of what `cuobjdump --dump-sass` printed."""
    return itertools.starmap(read, listings(text).items())


class Resources(NamedTuple):
    """Registers of a thread, and bytes that it keeps in memory for want of them."""

    registers: int
    spilled: int


def resources(text: str) -> dict[str, Resources]:
    """Of each kernel in what `cuobjdump --dump-resource-usage` printed."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    return {
        name: Resources(int(registers), int(stack) + int(local))
        for name, registers, stack, local in found
    }


def cuobjdump(file: str | Path, *options: str, folder: Path | None = None) -> str:
    """What `cuobjdump *options file` prints, run in `folder`; FileNotFoundError where there is no
    cuobjdump."""
    folders = [os.environ.get("PATH", "")]
    try:
        import triton
    except ImportError:
        pass
    else:
        folders.insert(0, str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    program = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if program is None:
        raise FileNotFoundError(
            "no cuobjdump, neither in triton's package nor in PATH; install triton or CUDA"
        )
    command = [program, *options, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


def of_cubin(cubin: bytes) -> tuple[Code, Resources]:
    """The one kernel in `cubin`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (code,) = disassembled(cuobjdump(file.name, "--dump-sass"))
        (used,) = resources(cuobjdump(file.name, "--dump-resource-usage")).values()
    return code, used
