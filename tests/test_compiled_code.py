"""Compiled code held to numbers: what a step of each kernel's main loop may hold, and how long the
model of time (benchmarks/time_model) says that networks take with it.

Speed that nobody measures drifts: kernels with 2-byte loads, or unrolled to thousands of
instructions, compute the right results. The rules and budgets stand in code_budgets.py, with every
kernel that breaks one by name. Regressions planted below turn each rule red.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from code_budgets import BUDGETS, COMPILERS, KNOWN, violations
from machine_code import cuobjdump, listing
from time_model import cuda_kernels, network
from time_model.rates import GPUS, rates
from time_model.work import Work, predict

from resnet_fused.testing import machine_code
from resnet_fused.testing.ahead_of_time import compiled_kernels
from resnet_fused.testing.machine_code import Code, Instruction, Resources

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "predicted"
Facts = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def cuda_facts(extension, architectures) -> Facts:
    """Of the CUDA kernels for bfloat16, whole chunks: sm_90a's, and the convolution for sm_80; and
    of the quantised ones for uint8."""
    found: Facts = {}
    of_sm80 = ("conv_bn_kernel", "quantized_conv_kernel")
    for architecture in {"80", "90a"} & set(architectures):
        usage = cuobjdump(extension, "--dump-resource-usage", f"-arch=sm_{architecture}")
        used = machine_code.resources(usage)
        bases = of_sm80 if architecture == "80" else ("",)
        text = "".join(listing(extension, architecture, base) for base in bases)
        for symbol, kernel in machine_code.listings(text).items():
            name = cuda_variant(symbol)
            if name is None or name.startswith(of_sm80) != (architecture == "80"):
                continue
            found[name] = facts(machine_code.read(symbol, kernel), used[symbol])
    return found


def cuda_variant(symbol: str) -> str | None:
    """A readable name of a mangled one; None for what has no budget of its own."""
    pattern = r"(quantized_conv_(?:sm90_)?kernel)IhNS0_4TileI((?:L[ib]\d+E)+)EELNS_8ShortcutE(\d)E"
    if int8 := re.search(pattern, symbol):
        sizes = re.findall(r"L[ib](\d+)E", int8[2])
        more = ("", " residual", " projection")[int(int8[3])]
        if "sm90" not in int8[1]:
            return f"{int8[1]} {sizes[0]}×{sizes[1]}{more}"
        return f"{int8[1]} 128×{sizes[0]}{' cluster' * (sizes[3] != '1')}{more}"
    if "13__nv_bfloat16" not in symbol:
        return None
    pattern = (
        r"((?:conv_training|wgrad)_sm90_kernel)I\w*TileI((?:L[ib]\d+E)+)EE(?:LNS\w+EndingE(\d))?"
    )
    if training := re.search(pattern, symbol):
        sizes = re.findall(r"L[ib](\d+)E", training[2])
        ending = (
            ("statistics", "masks", "adds", "folded", "sums")[int(training[3])]
            if training[3]
            else ""
        )
        tile = f"{sizes[0]}×{sizes[1]}" if ending else f"256×{sizes[0]}"
        return f"{training[1]} {tile} {ending}".strip()
    pattern = r"(conv_training_sm90_lines_kernel)I\w*TileILi(\d+)EEELb([01])E"
    if lines := re.search(pattern, symbol):
        return f"{lines[1]} {lines[2]}×64 {('statistics', 'masks')[int(lines[3])]}"
    # A name stands behind its length; parts of those before it may look like that too.
    lengths = re.finditer(r"(?=(\d\d)([a-z]\w*_kernel)I)", symbol)
    *_, base = (found[2] for found in lengths if len(found[2]) == int(found[1]))
    kernel = cuda_kernels.described(symbol)
    if isinstance(kernel, cuda_kernels.BlockKernel):
        projection = " projection" * kernel.projection
        return f"{base} {kernel.inner} inner, stride {kernel.stride}{projection}"
    if isinstance(kernel, cuda_kernels.Kernel):
        tile = f"{kernel.positions}×{kernel.channels}" + " cluster" * (kernel.cluster > 1)
        tile += " ping-pong" * kernel.ping_pong
        tile += " projection" * kernel.projection + " signs" * kernel.signs
        return f"{base} {tile}" if kernel.vectorised else None
    sizes = re.search(r"13__nv_bfloat16(?:S2_|(h))?((?:L[ib]\d+E)*)E", symbol)
    assert sizes is not None, symbol
    numbers = re.findall(r"L[ib](\d+)E", sizes[2])
    read = ["bytes"] * (sizes[1] is not None)
    return None if numbers[:1] == ["1"] else " ".join([base, *read, *numbers])


@pytest.fixture(scope="module")
def triton_facts() -> Facts:
    """Of the Triton kernels for inference, as test_triton_compile.py compiles them for sm_90."""
    pytest.importorskip("triton")
    worker = str(Path(__file__).with_name("test_triton_compile.py"))
    return {
        f"{kernel['kernel']}: {kernel['name']}": {**kernel["code"], "spilled": kernel["spilled"]}
        for kernel in compiled_kernels(worker, 90, "bfloat16")
    }


@pytest.fixture(scope="module")
def predict_here() -> Iterator[Callable[..., dict[str, Any]]]:
    """`predicted` of this checkout."""
    with predicted(ROOT) as ask:
        yield ask


@pytest.fixture(scope="module")
def training_record(predict_here: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The model's file for a training step of Triton's kernels alone on an H100."""
    pytest.importorskip("triton")
    return predict_here("--training", "--backend", "triton")


@pytest.fixture(scope="module")
def training_facts(training_record: dict[str, Any]) -> Facts:
    """Of the Triton kernels of a training step, equal code once."""
    return facts_of_rows(training_record["layers"])


def facts(code: Code, used: Resources) -> dict[str, Any]:
    return {**machine_code.facts(code), "spilled": used.spilled}


def facts_of_rows(rows: list[dict[str, Any]]) -> Facts:
    """By kernel, tile and window; what several codes of one name hold is put together."""
    found: Facts = {}
    for row in rows:
        if "code" not in row:
            continue
        window = re.sub(r" \d+→.*? at \d+×\d+|^\d+ (rows|parts) of \d+", "", row["shape"])
        tile = re.sub(r"^(\d+×\d+×\d+)×\d+", r"\1", row["config"])  # without wgrad's parts
        name = f"{row['kernel']}: {tile} {window}".strip()
        code = {**row["code"], "spilled": row["spilled_bytes"]}
        known = found.get(name, code)
        found[name] = {fact: worse(fact, value, known[fact]) for fact, value in code.items()}
    return found


def worse(fact: str, one: Any, other: Any) -> Any:
    """Of two codes' values of a fact."""
    if isinstance(one, dict):
        return {w: max(one.get(w, 0), other.get(w, 0)) for w in sorted({*one, *other}, key=int)}
    if isinstance(one, list):
        return sorted({*one, *other})
    if fact.endswith("pending"):
        return min((value for value in (one, other) if value is not None), default=None)
    return max(one, other)


PREDICTING = """
import json, predict, sys
for line in sys.stdin:
    print(json.dumps(predict.record(predict.parse(json.loads(line)))), flush=True)
"""


@contextmanager
def predicted(root: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Within, what predict.py of the checkout `root` writes with some options. One process serves
    all calls, as what it compiled and read for one of them serves the next."""
    path = f"{root}{os.pathsep}{root / 'benchmarks'}"
    environment = {**os.environ, "RESNET_FUSED_TUNE": "off", "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    with subprocess.Popen(
        [sys.executable, "-c", PREDICTING],
        cwd=root,  # where Python looks first
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None
        assert answers is not None

        def ask(*options: str) -> dict[str, Any]:
            print(json.dumps(options), file=asked, flush=True)
            answer = answers.readline()
            assert answer, "predict.py failed; its error is above"
            return json.loads(answer)

        yield ask


def skip_unless_compiled_by(**versions: str | None) -> None:
    """Another compiler makes other code, which these numbers do not describe."""
    for compiler, version in versions.items():
        if version != COMPILERS[compiler]:
            pytest.skip(f"numbers are those of {COMPILERS[compiler]}, and this is {version}")


def triton_version() -> str:
    return f"triton {metadata.version('triton')}"


def check(found: Facts) -> None:
    """Rules and budgets, with all that is known to break them and nothing else."""
    assert found
    broken = {name: rules for name, kernel in found.items() if (rules := violations(name, kernel))}
    assert broken == {name: rules for name, rules in KNOWN.items() if name in found}


# The gates


def test_cuda_kernels(extension, architectures, cuda_facts):
    if not {"80", "90a"} <= set(architectures):
        pytest.skip("built without sm_80 or sm_90a")
    skip_unless_compiled_by(nvcc=extension.build_info()["cuda_note"])
    assert set(cuda_facts) == {n for n in BUDGETS if ":" not in n}
    check(cuda_facts)


def test_triton_inference_kernels(triton_facts):
    skip_unless_compiled_by(triton=triton_version())
    check(triton_facts)


def test_triton_training_kernels(training_facts):
    skip_unless_compiled_by(triton=triton_version())
    check(training_facts)


@pytest.mark.parametrize("of", ["cuda_facts", "triton_facts", "training_facts"])
def test_no_spills_by_any_compiler(request, of):
    """What no version of a compiler may do."""
    for name, kernel in request.getfixturevalue(of).items():
        assert kernel["spilled"] == 0, name


def test_predicted_inference(extension, architectures, predict_here):
    if "90a" not in architectures:
        pytest.skip("built without sm_90a")
    skip_unless_compiled_by(nvcc=extension.build_info()["cuda_note"])
    check_time(predict_here(), "h100_inference_256")


def test_predicted_int8(extension, architectures, predict_here):
    pytest.importorskip("triton")
    if "90a" not in architectures:
        pytest.skip("built without sm_90a")
    skip_unless_compiled_by(triton=triton_version(), nvcc=extension.build_info()["cuda_note"])
    check_time(predict_here("--dtype", "int8"), "h100_int8_256")


def test_predicted_training(training_record):
    skip_unless_compiled_by(triton=triton_version())
    check_time(training_record, "h100_training_triton_256")


def test_predicted_training_with_our_convolutions(extension, architectures, predict_here):
    pytest.importorskip("triton")
    if "90a" not in architectures:
        pytest.skip("built without sm_90a")
    skip_unless_compiled_by(triton=triton_version(), nvcc=extension.build_info()["cuda_note"])
    check_time(predict_here("--training"), "h100_training_256")


def check_time(record: dict[str, Any], name: str) -> None:
    """The same launches as in the committed file, each within 5% of its time."""
    committed = json.loads((RESULTS / f"{name}.json").read_text())

    def times(of: dict[str, Any]) -> dict[tuple[str, ...], float]:
        rows = of["layers"]
        return {
            (*row["layers"], row["kernel"], row["config"], row["shape"]): row["microseconds"]
            for row in rows
        }

    assert times(record) == pytest.approx(times(committed), rel=0.05)
    assert record["milliseconds"] == pytest.approx(committed["milliseconds"], rel=0.05)


PRODUCTS = """
#include "kernels/cuda/ptx_sm90.cuh"
namespace ptx = resnet_fused::ptx;
template <typename T, int kN>
__global__ void product(float* out, std::uint64_t a, std::uint64_t b) {
  float d[kN / 2] = {};
  ptx::wgmma_fence(d);
  ptx::wgmma<T>(d, a, b, true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
  for (int i = 0; i < kN / 2; ++i) out[threadIdx.x * kN / 2 + i] = d[i];
}
"""


def test_a_warpgroups_product_has_every_width(tmp_path):
    """PTX ISA, wgmma.mma_async: N is any multiple of 8 up to 256."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc in PATH")
    suffixes = {"__half": "", "__nv_bfloat16": ".BF16"}
    widths = range(8, 257, 8)
    source, cubin = tmp_path / "products.cu", tmp_path / "products.cubin"
    lines = [
        f"template __global__ void product<{dtype}, {n}>(float*, std::uint64_t, std::uint64_t);"
        for dtype in suffixes
        for n in widths
    ]
    source.write_text(PRODUCTS + "\n".join(lines))
    command = ["nvcc", "-cubin", "-std=c++17", "-arch=sm_90a", f"-I{ROOT / 'csrc'}", source]
    subprocess.run([*command, "-o", cubin], check=True)
    found = {
        instruction
        for code in machine_code.disassembled(machine_code.cuobjdump(str(cubin), "--dump-sass"))
        for instruction in machine_code.facts(code)["tensor_instructions"]
    }
    assert found == {f"HGMMA.64x{n}x16.F32{s}" for s in suffixes.values() for n in widths}


# Planted regressions: each must break its rule, and nothing else


def edited(code: Code, edit: Callable[[Instruction], Instruction]) -> Code:
    return replace(code, instructions=tuple(map(edit, code.instructions)))


def in_main_loop(code: Code, base: str) -> Instruction:
    """The first instruction of that kind in the main loop."""
    main = code.main_loop
    assert main is not None
    return next(i for i in main.body if i.base == base)


@pytest.fixture(scope="module")
def sm90_work(extension, architectures) -> Work:
    """A block end with projection of a ResNet-18 in a tile without turns, and its compiled code."""
    if "90a" not in architectures:
        pytest.skip("built without sm_90a")
    file = Path(str(extension.__file__))
    works = network.inference("resnet18", 64, torch.bfloat16, GPUS["h100"], file)
    found = (work for work in works if work.config == "128×128×64, 4 stages")
    return next(work for work in found if "+" in work.shape)


SM90 = "conv_bn_sm90_kernel 128×128 projection"


def sm90_violations(work: Work, code: Code) -> set[str]:
    return set(violations(SM90, facts(code, Resources(work.registers, work.spilled))))


def test_the_code_as_it_is_breaks_nothing_more(sm90_work):
    assert sm90_work.code is not None
    assert sm90_violations(sm90_work, sm90_work.code) == set(KNOWN.get(SM90, {}))


def test_a_serialised_wait_is_found(sm90_work):
    code = edited(
        sm90_work.code,
        lambda i: (
            i._replace(operands=i.operands.replace("0x1", "0x0"))
            if i.opcode == "WARPGROUP.DEPBAR.LE"
            else i
        ),
    )
    assert "products_pending" in sm90_violations(sm90_work, code)
    assert slower(sm90_work, code) > 1.05


def test_a_narrower_load_is_found(sm90_work):
    branch = in_main_loop(sm90_work.code, "SYNCS")
    load = Instruction(branch.address, "", "LDG.E.U16", "R0, desc[UR4][R2.64]")
    code = edited(sm90_work.code, lambda i: load if i == branch else i)
    assert "load_bytes" in sm90_violations(sm90_work, code)
    assert slower(sm90_work, code) > 1.05


def test_a_doubled_epilogue_is_found(sm90_work):
    """Every instruction of the tile's loop but its branches and products, twice."""
    _, loops = sm90_work.code.regions
    repeated = {i for i in loops[0].body if i.target is None and i.base not in ("SYNCS", "BAR")}
    code = replace(
        sm90_work.code,
        instructions=tuple(
            again
            for i in sm90_work.code.instructions
            for again in ([i, i._replace(address=i.address + 1)] if i in repeated else [i])
        ),
    )
    assert "instructions_elsewhere" in sm90_violations(sm90_work, code)
    assert slower(sm90_work, code) > 1.05


def test_a_weaker_product_and_a_spill_are_found(sm90_work):
    code = edited(
        sm90_work.code,
        lambda i: i._replace(opcode="HMMA.16816.F32.BF16") if i.base == "HGMMA" else i,
    )
    assert "tensor_instructions" in sm90_violations(sm90_work, code)
    spilling = facts(sm90_work.code, Resources(168, 8))
    assert violations(SM90, spilling)["spilled"] == 8


def slower(work: Work, code: Code) -> float:
    """How many times longer the launch takes with `code`, by the model; L2, which would bind it
    before its code does, gives all that an SM's port takes."""
    gpu, r = GPUS["h100"], rates("h100")._replace(l2=64.0)
    before = predict(work, gpu, r).microseconds
    return predict(replace(work, code=code), gpu, r).microseconds / before


PLANTED = {
    "dgrad's weights 2 bytes at a time": (
        "training_dgrad.py",
        "            + column[None, :]\n",
        "            + tl.where(in_columns, column, 0)[None, :]\n",
        ("dgrad_kernel", "load_bytes"),
    ),
    "one stage, so operands are loaded and waited for": (
        "convolution.py",
        "Config((128, 128, 64), 8, 3),",
        "Config((128, 128, 64), 8, 1),",
        ("conv_bn_kernel", "load_bytes"),
    ),
    "statistics taken twice": (
        "training_convolution.py",
        "        mean, squares = tile_moments(stored, in_rows, count)\n",
        "        mean, squares = tile_moments(stored, in_rows, count)\n"
        "        mean, squares = tile_moments(stored + mean[None, :], in_rows, count)\n",
        ("conv_stats_kernel", "instructions_elsewhere"),
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "names",
    [
        ["dgrad's weights 2 bytes at a time", "statistics taken twice"],
        # By every kernel: all are compiled anew.
        pytest.param(["one stage, so operands are loaded and waited for"], marks=pytest.mark.slow),
    ],
)
def test_regressions_planted_in_triton_are_found(names, tmp_path):
    """The package's sources, changed, compiled and judged as a training step's are."""
    skip_unless_compiled_by(triton=triton_version())
    for folder in ("resnet_fused", "benchmarks"):
        ignored = ("*.so", "__pycache__", "results")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns(*ignored))
    for file, before, after, _ in map(PLANTED.get, names):
        source = tmp_path / "resnet_fused" / "backends" / "triton" / file
        text = source.read_text()
        assert text.count(before) == 1
        source.write_text(text.replace(before, after))
    with predicted(tmp_path) as ask:
        found = facts_of_rows(ask("--training", "--backend", "triton")["layers"])
    new = {
        (kernel.split(":")[0], rule)
        for kernel, those in found.items()
        for rule, value in violations(kernel, those).items()
        if KNOWN.get(kernel, {}).get(rule) != value
    }
    assert {PLANTED[name][-1] for name in names} <= new
