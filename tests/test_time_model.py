"""The model of time by hand: loops of machine code, cycles of a launch, the host's choices."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import predict as program
import pytest
import torch
from time_model import beside, cuda_int8, cuda_launches, triton_launches
from time_model.cuda_backend import Block, RecordingBackend
from time_model.cuda_launches import choose_tile
from time_model.cuda_training import WIDTHS, Wgrad, tiles_in_order, wgrads_in_order
from time_model.rates import GPUS, rates
from time_model.work import Work, predict, resident_blocks

from resnet_fused._extension import tensor_arg
from resnet_fused.backends.arguments import empty_signs
from resnet_fused.parameters import Convolution, Folded
from resnet_fused.testing import machine_code

# A tile's loop around a main loop; two waits out of line, one of which returns into a loop; a vote;
# a function that is only called.
LISTING = """
        Function : kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5], R9 ;
        /*0030*/              @!P0 BRA 0x1000 ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0050*/                   LDGDEPBAR ;
        /*0060*/                   LDG.E.U16 R3, desc[UR4][R2.64] ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*00a0*/                   DEPBAR.LE SB0, 0x2 ;
        /*00b0*/              @!P1 BRA 0x20 ;
        /*00c0*/                   CALL.REL.NOINC 0x2000 ;
        /*00d0*/                   STS.128 [R1], R4 ;
        /*00e0*/               @P2 BRA.U.ANY 0xd0 ;
        /*00f0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0100*/               @P3 BRA 0x10 ;
        /*0110*/                   EXIT ;
        /*1000*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5], R9 ;
        /*1010*/              @!P0 BRA 0x1000 ;
        /*1020*/                   BRA 0x40 ;
        /*2000*/                   MUFU.RCP R1, R1 ;
        /*2010*/                   RET.REL.NODEC R2 0x0 ;
        /*2020*/                   BRA 0x2020 ;
        /*2030*/                   NOP ;
"""


@pytest.fixture
def code() -> machine_code.Code:
    (found,) = machine_code.disassembled(LISTING)
    return found


def test_loops_of_a_listing(code):
    outside, (tiles, main) = code.regions
    assert [i.address for i in outside] == [0x0, 0x110]
    assert (tiles.first, tiles.last) == (0x10, 0x100)
    assert [i.address for i in tiles.body] == [0x10, *range(0xC0, 0x110, 0x10)]
    assert (main.first, main.last) == (0x20, 0xB0)
    # The wait out of line belongs to the loop that it returns to.
    assert {i.address for i in main.body} == {*range(0x20, 0xC0, 0x10), 0x1000, 0x1010, 0x1020}
    assert code.main_loop == main
    assert (main.products_pending, main.copies_pending) == (1, 2)


def test_what_a_loop_does(code):
    main = code.main_loop
    assert main is not None
    done = machine_code.tally(main.body)
    assert done.multiply_adds == {"HGMMA": 2 * 64 * 128 * 16 // 4}
    assert done.loads == {2: 1}
    assert done.copies == {16: 1}
    # A copy writes 512 bytes; the first product reads both operands, the second one has A already.
    assert done.shared_bytes == 512 + (2 * (64 + 128) * 16 + 2 * 128 * 16) // 4


def test_int8_products_count_by_a_byte_an_operand():
    listing = """
        Function : integers
        /*0000*/                   IGMMA.64x128x32.S8.S8 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*0010*/                   IMMA.16832.S8.S8.SAT R4, R8.ROW, R12.COL, R4 ;
"""
    (code,) = machine_code.disassembled(listing)
    done = machine_code.tally(code.instructions)
    assert done.multiply_adds == {"IGMMA": 64 * 128 * 32 // 4, "IMMA": 16 * 8 * 32}
    assert done.shared_bytes == 128 * 32 // 4  # A is in registers


def test_cycles_by_hand(code):
    """2 tiles a multiprocessor of 10 steps, each of which is issued, then waits for its load."""
    r = rates("h100")._replace(
        issue=1.0, tensor=1e9, latency=100, shared=1e9, dram=1e9, clock=1.0, launch=0, overlap=0
    )
    gpu = GPUS["h100"]
    steps, warps = 10, 40
    work = Work(
        layer="", kernel="kernel", config="", shape="", tiles=2 * gpu.sms, warps=warps,
        blocks_per_sm=1, trips=(1, steps), dram_bytes=1, l2_bytes=1, multiply_adds=1, code=code,
        persistent=True,
    )  # fmt: skip
    main = 13 * warps / 4  # instructions of a step
    tile, stores = 6 * warps / 4, 2 * warps  # of 8 bytes a lane, two cycles each
    found = predict(work, gpu, r)
    assert found.cycles["issue"] == pytest.approx(2 * (steps * main + tile))
    assert found.cycles["chain"] == pytest.approx(2 * (steps * (main + 100) + stores) + 100)
    assert found.bound == "chain: issue"
    assert found.microseconds == pytest.approx(found.cycles["chain"] / 1e3)
    with pytest.raises(ValueError, match="has 2 loops and the model knows the trips of 3"):
        predict(Work(**{**vars(work), "trips": (1, 2, 3)}), gpu, r)


def test_blocks_that_fit():
    limits = GPUS["h100"].limits
    assert resident_blocks(limits, registers=128, shared_bytes=0, warps=8) == 2
    assert resident_blocks(limits, registers=129, shared_bytes=0, warps=8) == 1
    assert resident_blocks(limits, registers=32, shared_bytes=75 * 1024, warps=4) == 3


@pytest.mark.parametrize(
    ("batch", "size", "channels", "inner", "out", "stride", "projects"),
    [
        (2, 56, 256, 64, 256, 1, False),
        (1, 14, 256, 64, 256, 1, False),
        (2, 56, 64, 64, 256, 1, True),
        (2, 28, 512, 128, 512, 1, False),
        (2, 56, 256, 128, 512, 2, True),
        (8, 56, 256, 256, 1024, 1, False),
    ],
)
def test_a_whole_bottleneck_is_taken_as_the_extension_takes_it(
    simulator, batch, size, channels, inner, out, stride, projects
):
    """The simulated GPU has 4 multiprocessors."""
    vector = (4096, 0, (0,), (1,), None)

    def tensor(*sizes: int) -> tuple[Any, ...]:
        strides = (math.prod(sizes[1:]), 1, sizes[3] * sizes[1], sizes[1])
        return 4096, 2, sizes, strides, None

    def layer(*sizes: int) -> tuple[Any, ...]:
        return tensor(*sizes), (*[(*vector[:2], sizes[:1], *vector[3:])] * 2, None, None, 1e-5)

    layers = [layer(inner, channels, 1, 1), layer(inner, inner, 3, 3), layer(out, inner, 1, 1)]
    if projects:
        layers.append(layer(out, channels, 1, 1))
    described = (tensor(batch, channels, size, size), layers, stride)
    simulator.set_capability(90)
    ours = Block(batch, (size, size), channels, inner, out, stride, projects, 4)
    assert ours == Block.of(*described, 4)
    for question in ("can_implement", "is_profitable"):
        theirs = getattr(simulator, f"cuda_bottleneck_sm90_{question}")
        assert ours.can_implement() == theirs(*described, 0)


@pytest.mark.parametrize("adds", ["nothing", "residual", "projection"])
@pytest.mark.parametrize("channels", [(64, 64), (512, 2048), (64, 512)])
@pytest.mark.parametrize("size", [3, 5, 12, 18, 40, 75, 100])
@pytest.mark.parametrize(("side", "signs"), [(1, False), (1, True), (3, False)])
def test_a_convolutions_tile_is_the_one_that_the_extension_takes(
    simulator, side, signs, size, channels, adds
):
    """The simulated GPU has 4 multiprocessors; what it takes stands first among its tiles."""
    inner, filters = channels
    vector = (4096, 0, (filters,), (1,), None)

    def tensor(*sizes: int) -> tuple[Any, ...]:
        strides = (math.prod(sizes[1:]), 1, sizes[3] * sizes[1], sizes[1])
        return 4096, 2, sizes, strides, None

    def layer(kernel: int, padding: int) -> tuple[Any, ...]:
        bn = (vector, vector, None, None, 1e-5)
        window = ((1, 1), (padding, padding), (1, 1))
        return tensor(1, inner, size, size), tensor(filters, inner, kernel, kernel), window, bn

    projection = layer(1, 0) if adds == "projection" else None
    simulator.set_capability(90)
    out = tensor(1, filters, size, size)
    added = out if adds == "residual" else None
    conv = layer(side, side // 2)
    of_signs = None
    if signs:
        count = -(-filters // 64) * 8
        of_signs = (
            4096,
            4,
            (1, count, size, size),
            (count * size**2, 1, size * count, count),
            None,
        )
    tiles = simulator.cuda_conv_bn_tiles(out, conv, projection, added, 1, True, False, of_signs, 0)
    steps = [side**2 * inner // 64, *[inner // 64] * (projection is not None)]
    images = (1, (size, size)) if adds == "nothing" and side == 3 else None
    assert tiles[0].name == choose_tile(
        size * size, filters, steps, added is not None, 4, images, signs
    )


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "h200"


@pytest.mark.parametrize(
    ("batch", "most"), [(256, 0.01), (32, 0.02), (1, 0.03)], ids=["256", "32", "1"]
)
def test_the_tiles_taken_are_nearly_the_fastest_that_an_h200_measured(simulator, batch, most):
    """Of the convolutions of a ResNet-50, in total; with 256 images each for itself as well. The
    older files lack tiles of whole lines, and have some that are gone."""
    if batch == 256:
        rows = json.loads((RESULTS / "layers_256.json").read_text())["rows"]
    else:
        rows = json.loads((RESULTS / "tried_tiles.json").read_text())["layers"][str(batch)]
    taken = fastest = 0.0
    for row in rows:
        pattern = r"conv_bn\w* (\d)×\d/(\d) (\d+)→(\d+) on (\d+)×\d+( \+ shortcut)?"
        if (found := re.fullmatch(pattern, row["layer"])) is None:
            continue
        side, stride, channels, filters, size = map(int, found.groups()[:5])
        size //= stride
        positions = batch * size**2
        steps = [side**2 * channels // 64]
        if row["op"] == "conv_bn_projection":
            steps.append(row["operations"] // (2 * positions * filters * 64) - steps[0])
        seconds = {
            tile: statistics.median(times)
            for name, times in row["seconds"].items()
            if (tile := name.removeprefix("cuda ")) in simulator.ConvTile.__members__
        }
        lines = side == 3 and stride == 1 and "cuda m200n128_sm90_lines" in row["seconds"]
        images = (batch, (size, size)) if lines else None
        tile = choose_tile(positions, filters, steps, found[6] is not None, 132, images)
        assert batch < 256 or seconds[tile] < 1.08 * min(seconds.values()), row["layer"]
        taken += row["calls"] * seconds[tile]
        fastest += row["calls"] * min(seconds.values())
    assert 0 < taken < (1 + most) * fastest


def test_signs_are_fewer_bytes_than_the_result():
    """Of the launches' own arguments: what backward reads and, beside its result, a folded end
    writes."""
    pytest.importorskip("triton")
    from resnet_fused.backends.cuda.training import CudaTraining

    gpu, moved = GPUS["h100"], {}
    x, y = (
        torch.empty(8, channels, 14, 14, dtype=torch.bfloat16, device="meta")
        for channels in (256, 1024)
    )
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    conv = Convolution(y.new_empty(1024, 256, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    end = Folded(x, conv, y.new_empty(6, 1024, dtype=torch.float32))
    for signed in (False, True):
        cuda = RecordingBackend(gpu)
        cuda.training_convolutions("folded_end", (end, y, True))[0].launch(end, y, signed)
        work, _ = cuda_launches._conv_bn(cuda.calls[0], gpu)
        with triton_launches.recorded() as launches:
            folded = CudaTraining(cuda.training_convolutions).folded_ends(torch.bfloat16)
            assert folded.signs
            signs = empty_signs(y.shape, y) if signed else None
            folded.relu_gradient_sum(torch.empty_like(y), y, signs)
        tensors = {id(t): t for t in launches[0].named().values() if isinstance(t, torch.Tensor)}
        read = sum(t.numel() * t.element_size() for t in tensors.values())
        moved[signed] = work.dram_bytes, read
    bits = y.numel() // 8
    assert moved[True][0] - moved[False][0] == bits
    assert moved[False][1] - moved[True][1] == 2 * y.numel() - bits


@pytest.mark.parametrize("adds", ["nothing", "residual", "projection"])
@pytest.mark.parametrize("channels", [(64, 64), (512, 2048), (64, 512)])
@pytest.mark.parametrize("size", [3, 5, 12, 18, 40, 75, 100])
def test_a_quantised_convolutions_tile_is_the_one_that_the_extension_takes(
    simulator, size, channels, adds
):
    """As above, of bytes."""
    inner, filters = channels

    def tensor(code: int, *sizes: int) -> tuple[Any, ...]:
        strides: tuple[int, ...] = (1,)
        if len(sizes) == 4:
            strides = (math.prod(sizes[1:]), 1, sizes[3] * sizes[1], sizes[1])
        return 4096, code, sizes, strides, None

    def layer(kernel: int, padding: int) -> tuple[Any, ...]:
        window = ((1, 1), (padding, padding), (1, 1))
        return tensor(4, 1, inner, size, size), tensor(5, filters, inner, kernel, kernel), window

    projection = layer(1, 0) if adds == "projection" else None
    out, vector = tensor(4, 1, filters, size, size), tensor(0, filters)
    added = out if adds == "residual" else None
    simulator.set_capability(90)
    tiles = simulator.cuda_quantized_conv_tiles(
        *(out, layer(3, 1), tensor(6, filters), vector),
        *(None if adds == "nothing" else vector, added, projection, True, 0),
    )
    steps = [9 * math.ceil(inner / 128), *[math.ceil(inner / 128)] * (projection is not None)]
    ours = cuda_int8.tiles_in_order(size * size, filters, steps, added is not None, 4)
    assert [tile.name for tile in tiles[: len(ours)]] == ours


@pytest.mark.parametrize("filters", [64, 72, 512])
@pytest.mark.parametrize("channels", [8, 64, 576])
@pytest.mark.parametrize("size", [3, 9, 23, 60])
def test_trainings_tiles_and_ranges_are_those_of_the_extension(simulator, size, channels, filters):
    """The simulated GPU has 4 multiprocessors. Tiles of whole lines stand among the others."""

    def tiles(found: list[Any]) -> list[str]:
        return [tile.name for tile in found if not tile.name.endswith("_lines")]

    simulator.set_capability(90)
    window = ((1, 1), (1, 1), (1, 1))

    def tensor(*sizes: int, code: int = 2) -> tuple[Any, ...]:
        strides = (math.prod(sizes[1:]), 1, sizes[3] * sizes[1], sizes[1])
        return 4096, code, sizes, strides, None

    x, out = (tensor(2, width, size, size) for width in (channels, filters))
    weight = tensor(filters, channels, 3, 3)
    rows = 2 * size * size
    found = simulator.cuda_conv_stats_tiles(out, x, weight, window, None, 0)
    steps = 9 * math.ceil(channels / 64)
    assert tiles(found) == tiles_in_order(rows, filters, steps, 4)
    found = simulator.cuda_dgrad_tiles(x, out, weight, window, None, None, None, None, None, 0)
    steps = 9 * math.ceil(filters / 64)
    assert tiles(found) == tiles_in_order(rows, channels, steps, 4)
    point, window_of_one = tensor(filters, channels, 1, 1), ((1, 1), (0, 0), (1, 1))
    half = next(
        t for t in (torch.float16, torch.bfloat16) if tensor_arg(torch.empty(1, dtype=t))[1] == 2
    )
    square, vector = torch.empty(channels, channels, dtype=half), torch.empty(channels)
    term = (x, tensor_arg(square), tensor_arg(vector))
    found = simulator.cuda_dgrad_tiles(
        x, out, point, window_of_one, None, None, None, None, term, 0
    )
    steps = math.ceil(filters / 64) + math.ceil(channels / 64)
    assert tiles(found) == tiles_in_order(rows, channels, steps, 4)
    of = Wgrad.of(weight, out, 4)
    found = simulator.cuda_wgrad_tiles(weight, out, x, window, 0)
    assert [tile.name for tile in found] == wgrads_in_order(of)
    for tile in found:
        count = simulator.cuda_wgrad_parts(weight, out, x, window, tile, 0)
        assert count == of.plan(WIDTHS[tile.name])[1]


def test_prediction_is_set_beside_what_was_measured() -> None:
    launches = [
        {"multiply_adds": 50, "dram_bytes": 1010, "microseconds": 10.0, "bound": "DRAM"},
        {"multiply_adds": 50, "dram_bytes": 1990, "microseconds": 30.0, "bound": "L2"},
        {"multiply_adds": 70, "dram_bytes": 1000, "microseconds": 99.0, "bound": "tensor"},
    ]
    predicted = {
        **{"arch": "resnet50", "dtype": "bfloat16", "batch": 256, "layers": launches},
        "images_per_second": {"low": 33000, "expected": 37000, "high": 42000},
    }
    same = {"architecture": "resnet50", "dtype": "bfloat16"}
    entries = [{"key": "cuda-graph", "rate": 18500.0}, {"key": "cudnn-graph", "rate": 99.0}]
    comparisons = [{**same, "batch": batch, "entries": entries} for batch in (256, 1)]
    rows = [
        {"layer": name, "calls": 2, "operations": 100, "bytes": moved, "seconds": {"cuda": times}}
        for name, moved, times in (("a", 1000, [9e-6, 2e-5, 1e-3]), ("b", 2000, [1.5e-5] * 3))
    ]
    rows.append({**rows[0], "layer": "c", "bytes": 1500})
    record = beside.compare(predicted, [{"comparisons": comparisons}, {"rows": rows}])
    (rate,) = record["images_per_second"]
    assert (rate["measured"], rate["over_expected"], rate["within"]) == (18500.0, 0.5, False)
    ratios = {row["layer"]: (row["over_predicted"], row["bound"]) for row in record["layers"]}
    assert ratios["a"] == (pytest.approx(2.0), "DRAM")
    assert ratios["b"] == (pytest.approx(0.5), "L2")
    assert ratios["c"] == (None, None)
    table = beside.table(record)
    assert "OUTSIDE its range" in table
    assert "c: no launch of the prediction is its like" in table


def test_nothing_to_compare_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "record", lambda options: {"layers": []})
    monkeypatch.setattr(program, "table", lambda found: "")
    assert program.main([]) == 0
    assert program.main(["--measured", str(tmp_path / "none.json")]) == 1
