"""Writes the tables of docs/cuda_kernels.md: what the compiler says of the CUDA kernels.

    python benchmarks/cuda_resources.py

Registers come from the machine code in resnet_fused._C (cuobjdump of triton's wheel or from PATH),
blocks per SM from CUDA's limits per architecture. No GPU is needed and nothing is timed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.results import ROOT, markdown
from time_model.cuda_kernels import BlockKernel, Kernel, OtherKernel, described
from time_model.rates import LIMITS
from time_model.work import resident_blocks

from resnet_fused import _extension
from resnet_fused.testing import machine_code

DOCUMENT = ROOT / "docs" / "cuda_kernels.md"
MARK = "<!-- From here on written by benchmarks/cuda_resources.py. -->\n"


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


def table(
    heads: Sequence[str],
    found: Mapping[Any, dict[str, int]],
    describe: Callable[[Any], Sequence[str]],
) -> str:
    """A row for each kernel: what tells it from the others, then what it takes of an SM."""
    rows = [[*heads, "threads", "shared memory", "registers", "blocks"]]
    for kernel, counts in sorted(found.items()):
        architectures = [a for a in LIMITS if a in counts]
        claimed = () if isinstance(kernel, BlockKernel) else kernel.claimed
        registers = [*(counts[a] for a in architectures), *claimed]
        blocks = [fitting(kernel, counts[a], a) for a in architectures]
        rows.append(
            [
                *describe(kernel),
                *(str(32 * kernel.warps), f"{kernel.shared / 1024:g} KiB"),
                *(" / ".join(map(str, numbers)) for numbers in (registers, blocks)),
            ]
        )
    return markdown(rows)


def kernel_table(found: dict[Kernel, dict[str, int]]) -> str:
    def describe(kernel: Kernel) -> list[str]:
        tile = f"{kernel.positions} × {kernel.channels}"
        tile += ", cluster" * (kernel.cluster > 1) + ", ping-pong" * kernel.ping_pong
        read = "16 bytes" if kernel.vectorised else "one by one"
        added = ["projection"] * kernel.projection + ["signs"] * kernel.signs
        return [kernel.dtype, tile, read, ", ".join(added)]

    return table(["type", "tile", "channels", "with"], found, describe)


def block_kernel_table(found: dict[BlockKernel, dict[str, int]]) -> str:
    def describe(kernel: BlockKernel) -> list[str]:
        shortcut = f"projection, stride {kernel.stride}" if kernel.projection else "x"
        return [kernel.dtype, f"{kernel.inner}" + ", wgmma" * kernel.sm90, shortcut]

    return table(["type", "inner channels", "shortcut"], found, describe)


def other_kernel_table(found: dict[OtherKernel, dict[str, int]]) -> str:
    def describe(kernel: OtherKernel) -> list[str]:
        return [f"`{kernel.name}`", kernel.dtype, kernel.tile]

    return table(["file", "type", "tile"], found, describe)


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
        "What each launch of a network asks of memory and of L2 stands, with the time that this",
        "takes by the model, in the files of benchmarks/results/predicted/ (`dram_bytes`,",
        "`l2_bytes`).",
        "",
    ]
    DOCUMENT.write_text(text + MARK + "\n" + "\n".join(lines))
    print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()
