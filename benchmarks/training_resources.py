"""What the training kernels take of a GPU, as the compiler says: registers, spills, shared memory.

    python benchmarks/training_resources.py --json benchmarks/results/training_resources.json

Compiles all that a training step of ResNet-50, batch 256, launches with the tiles that the
heuristic takes, for each target of the tests marked `slow` in tests/test_training_compile.py, and
prints a table. No GPU is needed and nothing is timed; from an empty cache of Triton's it takes
minutes.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from harness import results
from tqdm import tqdm

sys.path.append(str(results.ROOT / "tests"))

import test_training_compile as compilation  # type: ignore[import-not-found]

FIELDS = ("name", "kernel", "registers", "spilled", "shared")


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Per kernel and target: variants; most registers of a thread, most KiB of shared memory."""
    rows = [["kernel", *found]]
    for name in sorted({kernel["kernel"] for kernels in found.values() for kernel in kernels}):
        rows.append([name.removesuffix("_kernel")])
        for kernels in found.values():
            variants = [kernel for kernel in kernels if kernel["kernel"] == name]
            if not variants:
                rows[-1].append("–")
                continue
            registers = max(kernel["registers"] for kernel in variants)
            shared = max(kernel["shared"] for kernel in variants) / 1024
            rows[-1].append(f"{len(variants)}; {registers}, {shared:.0f}")
    spills = [sum(kernel["spilled"] > 0 for kernel in kernels) for kernels in found.values()]
    return results.markdown([*rows, ["variants that spill", *map(str, spills)]])


def main() -> None:
    """Compiles, prints, writes."""
    options = results.parser(__doc__, "json").parse_args()
    found = {
        f"sm_{capability} {dtype}": compilation.compiled_kernels(
            compilation.__file__, capability, dtype
        )
        for capability, dtype in tqdm(compilation.WHOLE)
    }
    print(table(found))
    facts = {**results.facts(None, "torch", "triton"), "batch": compilation.BATCH}
    targets = []
    for target, kernels in found.items():
        rows = [json.dumps({field: kernel[field] for field in FIELDS}) for kernel in kernels]
        targets.append(f'"{target}": [\n  ' + ",\n  ".join(rows) + "\n ]")
    head = json.dumps(facts, indent=1).removesuffix("\n}")
    results.write(options.json, head + ",\n " + ",\n ".join(targets) + "\n}\n")


if __name__ == "__main__":
    main()
