"""Training's convolutions on Hopper, simulated: results, statistics, sums, synchronisation."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import test_training as blocks
import torch
from conftest import one_half
from machine_code import cuobjdump
from torch import Tensor

from resnet_fused._extension import tensor_arg
from resnet_fused.backends import autotune
from resnet_fused.backends.autotune.verify import Check
from resnet_fused.backends.cuda_sim import SimulatedBackend
from resnet_fused.numerics import assert_contract
from resnet_fused.ops import block_training, training_programs
from resnet_fused.parameters import (
    MEAN,
    SCALE,
    SHIFT,
    Activation,
    Convolution,
    Folded,
    OperandTerm,
)
from resnet_fused.reference.training import ReferenceTraining, positive, signs_of
from resnet_fused.testing.cases import generator

TILES = ("m128n64", "m128n128", "m256n128_cluster")
LINE_TILES = ("m216n64_lines", "m248n64_lines")  # of whole lines
WGRAD_TILES = ("m256n64", "m256n128")
ENDINGS = 5  # statistics, mask, add, folded, sum
PLAIN = ReferenceTraining()
NHWC = torch.channels_last


class Case(NamedTuple):
    """A convolution of x (batch, channels, height, width)."""

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1


# Of the simulated GPU's few SMs every block has several tiles, in which rings of stages wrap; tails
# of positions and of channels, less than a tile and less than a panel.
CASES = {
    "1x1": Case(6, 72, 23, 19, 200),
    "1x1 strided": Case(5, 64, 30, 30, 64, 1, 2),
    "3x3": Case(20, 40, 9, 9, 136, 3, 1, 1),
    "3x3 strided": Case(4, 136, 21, 17, 72, 3, 2, 1),
    "3x3 dilated": Case(2, 24, 23, 19, 136, 3, 1, 2, 2),
    "a corner": Case(1, 8, 3, 3, 8, 3, 1, 1),
    "a stem": Case(3, 3, 21, 26, 72, 7, 2, 3),
    "few channels": Case(2, 5, 9, 11, 24, 3, 1, 1),
}
# What has a gradient here: strides of 2 have it where height and width are even.
GRADIENTS = {
    **{name: CASES[name] for name in ("1x1", "3x3", "a corner")},
    "3x3 by 2": Case(7, 72, 22, 18, 136, 3, 2, 1),
    "5x5 by 2": Case(3, 136, 10, 22, 40, 5, 2, 2),
}


# For tiles of whole lines: several images of a tile, the last one of fewer; parts of images, the
# last one of fewer lines; a tile for each image; weights that stay, and others; the shortest lines
# and about the longest; lines that begin at positions of their own modulo 8.
LINES = {
    "7x7": Case(11, 72, 7, 7, 136, 3, 1, 1),
    "14x14": Case(9, 136, 14, 14, 72, 3, 1, 1),
    "lines of 56": Case(4, 64, 9, 56, 64, 3, 1, 1),
    "lines of 33": Case(5, 40, 17, 33, 24, 3, 1, 1),
    "low": Case(40, 136, 2, 11, 64, 3, 1, 1),
    "high": Case(3, 24, 70, 7, 72, 3, 1, 1),
}
EVERY = {**CASES, **LINES}


@pytest.fixture
def backend(simulator: ModuleType) -> SimulatedBackend:
    return SimulatedBackend(simulator, capability=90)


def values(
    shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator, integers: bool
) -> Tensor:
    found = torch.randn(shape, generator=rng)
    found = found.round().clamp(-3, 3) if integers else found
    return found.to(dtype).contiguous(memory_format=NHWC)


def convolution(case: Case, dtype: torch.dtype, integers: bool) -> tuple[Tensor, Convolution]:
    rng = generator()
    x = values((case.batch, case.channels, case.height, case.width), dtype, rng, integers)
    shape = (case.filters, case.channels, case.kernel, case.kernel)
    window = [(v, v) for v in (case.stride, case.padding, case.dilation)]
    return x, Convolution(values(shape, dtype, rng, integers), *window, 1)


def wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, Convolution):
        return value._replace(weight=value.weight.double())
    if isinstance(value, OperandTerm):
        return OperandTerm(*(v.double() for v in value))
    return None if value is None else Activation(*(v.double() for v in value))


def scale_shift(channels: int, rng: torch.Generator, integers: bool) -> Tensor:
    found = torch.ones(6, channels)
    if not integers:
        found += torch.randn(found.shape, generator=rng)
    found[SCALE, ::3] *= -1
    return found


def operand_term(
    shape: Iterable[int], dtype: torch.dtype, rng: torch.Generator, integers: bool
) -> OperandTerm:
    """Of a convolution whose input has that shape."""
    x = values(tuple(shape), dtype, rng, integers)
    half = values((x.shape[1], x.shape[1], 1, 1), dtype, rng, integers)[:, :, 0, 0].contiguous()
    offset = torch.randn(x.shape[1], generator=rng)
    return OperandTerm(x, half.triu() + half.triu(1).T, offset.round() if integers else offset)


def of_tiles(names: Iterable[str]) -> list[tuple[str, str]]:
    """Cases with the tiles that compute them."""
    found = [(name, tile) for name in names for tile in TILES]
    return found + [(name, tile) for name in LINES for tile in LINE_TILES]


@one_half
@pytest.mark.parametrize(("name", "tile"), of_tiles(CASES))
def test_forward_is_exact_on_integers_and_its_moments_are_those_of_the_result(
    simulator, backend, half, name, tile
):
    x, conv = convolution(EVERY[name], half, integers=True)
    out, moments = backend._launcher.conv_stats(tile, x, conv, True)
    counts = simulator.take_statistics()
    expected, _ = PLAIN.conv_stats(wide(x), wide(conv), False)
    assert torch.equal(out, expected.to(half))
    assert counts["bank_conflicts"] == counts["shared_conflicts"] == 0
    assert_moments(moments, out, tile)
    again, nothing = backend._launcher.conv_stats(tile, x, conv, False)
    assert torch.equal(again, out)
    assert nothing is None


def parts_of(value: Tensor, tile: str) -> list[Tensor]:
    """(positions, channels) of each part of a result: 128 positions, or the lines of a tile."""
    rows = value.permute(0, 2, 3, 1)
    if tile not in LINE_TILES:
        return list(rows.flatten(0, 2).split(128))
    height, pitch = rows.shape[1], rows.shape[2] + 1
    most = int(tile[1:4]) // pitch
    if most >= height and (height + 1) * pitch % 8 == 0:
        images = (most + 1) // (height + 1)
        return [part.flatten(0, 2) for part in rows.split(images)]
    lines = -(-height // -(-height // most))
    return [part.flatten(0, 1) for image in rows for part in image.split(lines)]


def assert_moments(moments: Tensor, out: Tensor, tile: str) -> None:
    """Of each part: mean, squared deviations and count, to a few units of float32."""
    parts = parts_of(out.double(), tile)
    assert len(moments) == len(parts)
    for part, found in zip(parts, moments.double(), strict=True):
        mean = part.mean(0)
        squares = (part - mean).square().sum(0)
        assert torch.equal(found[2], torch.full_like(mean, len(part)))
        size = part.abs().amax(0) + squares.div(len(part)).sqrt() + 1e-30
        assert ((found[0] - mean).abs() <= 4e-7 * size).all()
        assert ((found[1] - squares).abs() <= 4e-6 * squares + 1e-12 * size.square()).all()


def test_moments_keep_the_digits_of_a_small_deviation_from_a_large_mean(backend):
    """Mean 100, deviation 0.1, of which float16 keeps a few steps; also in the last, short part."""
    rng = generator()
    x = torch.full((3, 64, 10, 11), 100.0) + 0.1 * torch.randn((3, 64, 10, 11), generator=rng)
    x = x.half().contiguous(memory_format=NHWC)
    eye = torch.eye(64).reshape(64, 64, 1, 1).half().contiguous(memory_format=NHWC)
    conv = Convolution(eye, (1, 1), (0, 0), (1, 1), 1)
    for tile in TILES:
        out, moments = backend._launcher.conv_stats(tile, x, conv, True)
        assert torch.equal(out, x)
        assert_moments(moments, out, tile)


@pytest.mark.parametrize("tile", LINE_TILES)
def test_moments_of_lines_keep_the_digits_of_a_small_deviation_from_a_large_mean(backend, tile):
    """As above, of windows of which one tap counts: all of a tile, and of its positions in vain."""
    rng = generator()
    x = torch.full((9, 64, 7, 9), 100.0) + 0.1 * torch.randn((9, 64, 7, 9), generator=rng)
    x = x.half().contiguous(memory_format=NHWC)
    eye = torch.zeros(64, 64, 3, 3)
    eye[:, :, 1, 1] = torch.eye(64)
    conv = Convolution(eye.half().contiguous(memory_format=NHWC), (1, 1), (1, 1), (1, 1), 1)
    out, moments = backend._launcher.conv_stats(tile, x, conv, True)
    assert torch.equal(out, x)
    assert_moments(moments, out, tile)


@one_half
@pytest.mark.parametrize(("name", "tile"), of_tiles(GRADIENTS))
@pytest.mark.parametrize("ending", ["", "masks", "adds", "folded", "sums", "sums apart"])
def test_dgrad_is_exact_on_integers(simulator, backend, half, name, tile, ending):
    if ending in ("folded", "sums", "sums apart") and name != "1x1":
        pytest.skip("ends that are folded are 1 x 1")
    if tile in LINE_TILES and ending != "masks":
        pytest.skip("whole lines are masked")
    x, conv = convolution({**GRADIENTS, **LINES}[name], half, integers=True)
    rng = generator(1)
    g = values((len(x), len(conv.weight), *conv.output_size(*x.shape[2:])), half, rng, True)
    below = add = term = None
    if ending in ("folded", "sums"):
        term = operand_term(x.shape, half, rng, True)
    if ending == "sums apart":  # at every other position of what it is read from
        term = operand_term((*x.shape[:2], *(2 * size for size in x.shape[2:])), half, rng, True)
        term = term._replace(x=term.x[:, :, ::2, ::2])
    if ending in ("masks", "folded"):
        pre_bn = values(tuple(x.shape), half, rng, True)
        below = Activation(pre_bn, scale_shift(x.shape[1], rng, True))
    if ending == "adds":
        add = values(tuple(x.shape), half, rng, True)
    out, sums = backend._launcher.dgrad(tile, g, conv, x.shape, below, add, None, term)
    counts = simulator.take_statistics()
    expected, _ = PLAIN.dgrad(
        wide(g), wide(conv), x.shape, wide(below), wide(add), None, wide(term)
    )
    assert torch.equal(out, expected.to(half))
    assert counts["bank_conflicts"] == counts["shared_conflicts"] == 0
    if below is None:
        assert sums is None
        return
    deviation = below.pre_bn.double() - below.scale_shift[MEAN, :, None, None].double()
    (stride, _), products = conv.stride, out.double() * deviation
    classes = [(h, w) for h in range(stride) for w in range(stride)]
    parts = [
        [part for h, w in classes for part in parts_of(of[:, :, h::stride, w::stride], tile)]
        for of in (out.double(), products)
    ]
    exact = torch.stack([torch.stack([p.sum(0) for p in of]) for of in parts], 1)
    assert torch.equal(sums.double(), exact)


@pytest.mark.parametrize(("name", "tile"), of_tiles(["3x3", "3x3 by 2"]))
def test_dgrad_keeps_the_contract(backend, half, tile, name):
    x, conv = convolution({**GRADIENTS, **LINES}[name], half, integers=False)
    rng = generator(2)
    g = values((len(x), len(conv.weight), *conv.output_size(*x.shape[2:])), half, rng, False)
    below = Activation(
        values(tuple(x.shape), half, rng, False), scale_shift(x.shape[1], rng, False)
    )
    ours, sums = backend._launcher.dgrad(tile, g, conv, x.shape, below, None)
    eager = PLAIN.dgrad(g, conv, x.shape, below, None)
    truth = PLAIN.dgrad(wide(g), wide(conv), x.shape, wide(below), None)
    # Both round the same float32 sums once: by chance one or the other is nearer.
    assert_contract(ours, eager[0], truth[0], noise=1.01)
    assert_contract(PLAIN.merge_sums(sums), PLAIN.merge_sums(eager[1]), truth[1], noise=1.01)


@one_half
@pytest.mark.parametrize("tile", WGRAD_TILES)
@pytest.mark.parametrize("name", CASES)
def test_wgrad_is_exact_on_integers(simulator, backend, half, name, tile):
    x, conv = convolution(CASES[name], half, integers=True)
    size = conv.output_size(*x.shape[2:])
    g = values((len(x), len(conv.weight), *size), half, generator(1), True)
    for dtype in (torch.float32, half):
        typed = conv._replace(weight=conv.weight.to(dtype))
        out = backend._launcher.wgrad(tile, g, x, typed)
        counts = simulator.take_statistics()
        expected = PLAIN.wgrad(wide(g), wide(x), wide(conv))
        assert out.dtype == dtype
        assert torch.equal(out, expected.to(dtype))
        assert out.is_contiguous(memory_format=NHWC)
        assert counts["bank_conflicts"] == counts["shared_conflicts"] == 0


def test_wgrad_adds_ranges_of_positions_and_has_one_where_that_is_less(simulator, backend):
    x, conv = convolution(CASES["1x1"], torch.bfloat16, integers=True)
    g = values((len(x), len(conv.weight), *x.shape[2:]), torch.bfloat16, generator(1), True)

    def parts(tile: str, g: Tensor, x: Tensor) -> int:
        launcher = backend._launcher
        out, call = launcher._wgrad_call(g, x, conv)
        named = getattr(simulator.WgradTile, tile)
        place = launcher.place(x.device)
        found: int = simulator.cuda_wgrad_parts(tensor_arg(out), *call, named, place)
        return found

    assert parts("m256n128", g, x) > 1
    assert parts("m256n128", g[:1, :, :2, :2], x[:1, :, :2, :2]) == 1


@pytest.mark.parametrize("tile", WGRAD_TILES)
def test_wgrad_keeps_the_contract(backend, half, tile):
    x, conv = convolution(CASES["3x3 strided"], half, integers=False)
    conv = conv._replace(weight=conv.weight.float())
    g = values(
        (len(x), len(conv.weight), *conv.output_size(*x.shape[2:])), half, generator(3), False
    )
    ours = backend._launcher.wgrad(tile, g, x, conv)
    truth = PLAIN.wgrad(wide(g), wide(x), wide(conv))
    assert_contract(ours, PLAIN.wgrad(g, x, conv), truth)


def test_what_there_is_no_kernel_for_is_left_to_others(backend):
    x, conv = convolution(CASES["3x3 strided"], torch.bfloat16, integers=True)
    g, _ = PLAIN.conv_stats(x, conv, False)
    below = Activation(x, scale_shift(x.shape[1], generator(), True))
    listed = backend.training_convolutions

    def names(piece: str, *arguments: Any) -> set[str]:
        return {candidate.name for candidate in listed(piece, arguments)}

    ours, wgrads = ({f"cuda {tile}" for tile in of} for of in (TILES, WGRAD_TILES))
    assert names("conv_stats", x, conv, True) == ours
    assert names("wgrad", g, x, conv) == wgrads
    assert names("dgrad", g, conv, x.shape, below, None, None, None) == set()  # of odd sizes
    lines = {f"cuda {tile}" for tile in LINE_TILES}
    even, even_g = x[:, :, :20, :16], g[:, :, :10, :8]
    masked = Activation(even, below.scale_shift)
    assert names("dgrad", even_g, conv, even.shape, masked, None, None, None) == ours
    by_one_way = conv._replace(stride=(2, 1))
    assert (
        names("dgrad", g[:, :, :10], by_one_way, (4, 136, 20, 9), None, None, None, None) == set()
    )
    same = conv._replace(stride=(1, 1))
    assert names("dgrad", x[:, :72], same, x.shape, below, None, None, None) == ours | lines
    assert names("conv_stats", x, same, True) == ours | lines
    wide_x = x.new_zeros(1, 136, 3, 150).contiguous(memory_format=NHWC)
    assert names("conv_stats", wide_x, same, True) == ours
    assert names("conv_stats", wide_x[..., :6], same, True) == ours
    assert names("conv_stats", x, same._replace(padding=(0, 0)), True) == ours
    assert names("dgrad", x[:, :72], same, x.shape, None, None, None, None) == ours
    assert names("dgrad", x[:, :72], same, x.shape, None, x, None, None) == ours
    assert names("dgrad", x[:, :72], same, x.shape, below, x, None, None) == set()
    assert names("dgrad", x[:, :72], same, x.shape, None, x, 2, None) == set()
    point = same._replace(weight=same.weight[:, :, :1, :1], padding=(0, 0))
    term = operand_term(x.shape, torch.bfloat16, generator(), True)
    assert names("dgrad", x[:, :72], point, x.shape, below, None, None, term) == ours
    assert names("dgrad", x[:, :72], point, x.shape, None, None, None, term) == ours
    assert names("dgrad", x[:, :72], point, x.shape, None, x, None, term) == set()
    assert names("dgrad", x[:, :72], point, x.shape, None, x, 2, term) == set()
    assert names("dgrad", x[:, :72], same, x.shape, below, None, None, term) == set()
    apart = operand_term((*x.shape[:2], 41, 33), torch.bfloat16, generator(), True)
    apart = apart._replace(x=apart.x[:, :, ::2, ::2])  # whose images lie apart by half a line
    assert names("dgrad", x[:, :72], point, x.shape, None, None, None, apart) == set()
    odd = conv._replace(weight=conv.weight[:70])
    assert names("conv_stats", x, odd, True) == set()
    few = same._replace(weight=same.weight[:, :3])
    assert names("dgrad", x[:, :72], few, (4, 3, 21, 17), None, None, None, None) == set()
    assert names("conv_stats", x.float(), wide(conv), True) == set()
    older = SimulatedBackend(backend.extension, capability=80).training_convolutions
    assert older("conv_stats", (x, conv, True)) == []
    assert older("wgrad", (g, x, conv)) == []


@pytest.mark.parametrize("name", ["a stem", "few channels"])
def test_lines_of_few_channels_are_laid_out_by_launches(backend, name):
    """The weight's too: where PyTorch computes anything, a training op is no program."""
    x, conv = convolution(CASES[name], torch.bfloat16, integers=True)
    with training_programs._Watch() as watch:
        (tile, *_) = backend._launcher.conv_stats_tiles(x, conv)
        backend._launcher.conv_stats(tile, x, conv, True)
    assert not watch.computed


@pytest.mark.parametrize("name", ["3x3", "a stem"])
def test_our_candidates_pass_the_check_of_the_choice(backend, monkeypatch, name):
    """And come first, beside Triton's; a candidate that errs does not pass."""
    pytest.importorskip("triton")
    from resnet_fused.backends.cuda.training import CudaTraining

    faults: dict[str, str | None] = {}

    def choose(piece: str, arguments: Any, listed: Any, reference: Any, among: Any) -> Any:
        assert among == "cuda"
        check = Check(reference, arguments, per_image=False)
        found = listed()
        ours = [c for c in found if c.name.startswith("cuda ")]
        assert found[: len(ours)] == ours
        assert any(c.name.startswith("triton ") for c in found)
        for candidate in ours:
            faults[f"{piece} {candidate.name}"] = check.fault(candidate.launch)

        def errs(*arguments: Any) -> Any:
            out = ours[0].launch(*arguments)
            (out[0] if isinstance(out, tuple) else out).mul_(1.05)
            return out

        assert check.fault(errs) is not None
        return ours[0]

    monkeypatch.setattr(autotune, "choose", choose)
    x, conv = convolution(CASES[name], torch.bfloat16, integers=False)
    kernels = CudaTraining(backend.training_convolutions)
    g, _ = kernels.conv_stats(x, conv, True)
    kernels.wgrad(g, x, conv._replace(weight=conv.weight.float()))
    if name == "3x3":
        below = Activation(x, scale_shift(x.shape[1], generator(), False))
        kernels.dgrad(g, conv, x.shape, below, None)
    assert set(faults.values()) == {None}
    every = len(TILES) + len(LINE_TILES)
    assert len(faults) == (3 + 2 if name == "a stem" else every + 2 + every)


def test_the_simulated_backend_trains_with_them(backend):
    """Forward and backward of a piece each, as the training ops would choose them."""
    x, conv = convolution(CASES["3x3"], torch.bfloat16, integers=True)
    training = backend.training
    assert training is not None
    with autotune.tuner.watch() as decisions:
        out, _ = training.conv_stats(x, conv, True)
        training.dgrad(out, conv, x.shape, None, None)
        training.wgrad(out, x, conv)
    assert all(decision.candidate.name.startswith("cuda m") for decision in decisions)
    assert len(decisions) == 3


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_a_whole_block_with_triton_passes(backend, monkeypatch, shortcut):
    """Convolutions and the folded end simulated, passes interpreted: Hopper has them together."""
    pytest.importorskip("triton")
    from resnet_fused.backends.cuda.training import CudaTraining

    channels = 128 if shortcut == "identity" else 64
    specs = ((1, 64, 1, 1, 1), (3, 64, 1, 1, 1), (1, 128, 1, 1, 1))
    case = blocks.BlockCase(specs, shortcut, shape=(3, channels, 9, 8))
    x, layers, grad = blocks._block(case)
    layers = [layer._replace(bias=blocks._decided(layer.bias)) for layer in layers]
    truth, eager, ours = (
        blocks._run(block, *blocks._prepare(x, layers, torch.float16, wide=wide), shortcut, grad)
        for block, wide in (
            (blocks._unfused_block, True),
            (blocks._unfused_block, False),
            (_trained_by(CudaTraining(backend.training_convolutions), monkeypatch), False),
        )
    )
    blocks._assert_contract(ours, eager, truth)


SIGN_TILES = (
    *("m128n64_sm90", "m128n128_sm90", "m128n128_sm90_pingpong"),
    *("m128n256_sm90_cluster", "m256n128_sm90_cluster"),
)


def folded_end(dtype: torch.dtype, shortcut: str) -> tuple[Folded, Tensor | Folded | None]:
    """Of channels that fill no whole group of signs; NaN at a position, and a channel whose
    results are above zero until they are rounded."""
    x, conv = convolution(CASES["1x1"], dtype, integers=False)
    x[0, 0, 3, 4] = torch.nan
    scale_shifts = [scale_shift(len(conv.weight), generator(seed), False) for seed in (1, 2)]
    for of in scale_shifts:
        of[SCALE, 3] = 0
        of[SHIFT, 3] = 1e-8 if dtype == torch.float16 else 1e-41
    main, other = (Folded(x, conv, of) for of in scale_shifts)
    added = {
        "none": None,
        "identity": values((len(x), len(conv.weight), *x.shape[2:]), dtype, generator(3), False),
        "projection": other,
    }
    return main, added[shortcut]


@one_half
@pytest.mark.parametrize("shortcut", ["none", "identity", "projection"])
@pytest.mark.parametrize("tile", SIGN_TILES)
def test_signs_are_those_of_the_result_as_rounded(backend, half, shortcut, tile):
    main, other = folded_end(half, shortcut)
    y, signs = backend._folded_end(tile, main, other, True)
    plain, none = backend._folded_end(tile, main, other, False)
    assert none is None
    assert torch.equal(y.nan_to_num(7), plain.nan_to_num(7))
    assert torch.equal(signs, signs_of(y))
    assert not positive(signs, y.shape[1])[0, :, 3, 4].any()  # NaN's gradient is masked
    if shortcut == "none":
        assert not positive(signs, y.shape[1])[:, 3].any()


def test_only_hoppers_tiles_write_signs(backend):
    main, other = folded_end(torch.bfloat16, "identity")
    listed = backend.training_convolutions("folded_end", (main, other, True))
    assert {candidate.name for candidate in listed} == {f"cuda {tile}" for tile in SIGN_TILES}
    with pytest.raises(ValueError, match="this tile does not compute"):
        backend._folded_end("m128n64", main, other, True)


def test_wrong_signs_exclude_a_candidate(backend):
    """Of a bit that is another channel's the tuner finds out, whatever rounding does to signs."""
    pytest.importorskip("triton")
    from resnet_fused.backends.triton.training import _PLAIN, _Piece

    plain = _PLAIN["folded_end"]
    main, other = folded_end(torch.bfloat16, "identity")
    main = main._replace(x=main.x.nan_to_num(1))

    def off_by_one(*arguments: Any) -> tuple[Tensor, Tensor]:
        y, signs = backend._folded_end(SIGN_TILES[0], *arguments)
        return y, signs.roll(1, 1)

    check = Check(plain, (main, other, True), False)
    right = functools.partial(backend._folded_end, SIGN_TILES[0])
    assert check.is_possible()
    assert check.fault(_Piece(right, plain.comparable)) is None
    assert "result 1" in check.fault(_Piece(off_by_one, plain.comparable))


def _trained_by(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    def run(*arguments: Any) -> Tensor:
        monkeypatch.setattr(block_training, "kernels", lambda x: kernels)
        with autotune.tuner.watch() as decisions:
            out = blocks._fused_block(*arguments)
        # Forward: two convolutions, and the end, which is one of inference.
        assert sum(d.candidate.name.startswith("cuda m") for d in decisions) == 3
        return out

    return run


# Blocks of the four simulated SMs take several tiles, of two steps or more, of both consumers, so
# that every ring wraps.
Runner = Callable[[], "list[Tensor | None]"]


def runner(backend: SimulatedBackend, piece: str, tile: str) -> Runner:
    x, conv = convolution(Case(1, 72, 12, 128, 72), torch.bfloat16, integers=True)
    below = Activation(x, scale_shift(x.shape[1], generator(), True))
    g = x.flip(0).contiguous(memory_format=NHWC)
    term = operand_term(x.shape, torch.bfloat16, generator(2), True)
    launcher = backend._launcher
    quarters = Convolution(x.new_ones(72, 72, 2, 2), (2, 2))
    quarter = g[:, :, :6, :64].contiguous(memory_format=NHWC)
    runs: dict[str, Runner] = {
        "statistics": lambda: list(launcher.conv_stats(tile, x, conv, True)),
        "masks": lambda: list(launcher.dgrad(tile, g, conv, x.shape, below, None)),
        "folded": lambda: list(launcher.dgrad(tile, g, conv, x.shape, below, None, None, term)),
        "sums": lambda: list(launcher.dgrad(tile, g, conv, x.shape, None, None, None, term)),
        "adds": lambda: list(launcher.dgrad(tile, g, conv, x.shape, None, x)),
        "by 2": lambda: list(launcher.dgrad(tile, quarter, quarters, x.shape, below, None)),
        "wgrad": lambda: [launcher.wgrad(tile, g, x, conv)],
    }
    return runs[piece]


ENDINGS_RUN = ("statistics", "masks", "adds", "folded", "sums")
RUNS = [
    *((ending, tile) for ending in ENDINGS_RUN for tile in TILES),
    ("by 2", "m128n64"),
    *(("wgrad", tile) for tile in WGRAD_TILES),
]


def count_needless(simulator: ModuleType, run: Runner) -> Callable[[str, Iterable[int]], int]:
    """How many of the numbered mistakes change nothing."""
    expected = run()

    def needless(mistake: str, numbers: Iterable[int]) -> int:
        found = 0
        for number in numbers:
            simulator.plant({mistake: number})
            with contextlib.suppress(simulator.Fault):
                found += same(run(), expected)
        simulator.plant()
        return found

    simulator.take_statistics()
    return needless


@pytest.mark.parametrize(("piece", "tile"), RUNS)
def test_every_wait_and_fence_is_needed(simulator, backend, piece, tile):
    """Each that is left out gives a fault or another result, but for those that wait for what is
    there anyway, which would change nothing."""
    run = runner(backend, piece, tile)
    needless = count_needless(simulator, run)
    run()
    counts = simulator.take_statistics()
    waits, barriers, stores = (
        counts[name] for name in ("mbarrier_waits", "named_barriers", "store_waits")
    )
    # A consumer's first result has a place from the start, unless something is copied there.
    free = piece == "statistics" and tile != "m128n64"
    assert waits > 4
    assert needless("skipped_mbarrier_wait", range(waits)) == free
    # The one before the first tile's sums, which are the first ones there.
    assert needless("skipped_named_barrier", range(barriers)) == (piece == "statistics")
    assert needless("skipped_proxy_fence", range(counts["proxy_fences"])) == 0
    # Of the last two stores one behind the other the second one's wait is enough.
    assert needless("skipped_store_wait", range(stores)) == (stores > 2)
    assert needless("skipped_cluster_barrier", range(counts["cluster_barriers"])) == 0
    assert needless("skipped_register_release", [0]) == 0
    # The wait behind a tile's last product; those before it matter where a stage is filled again.
    # Of a folded end's gradient they are two products, of as many steps each.
    steps = {"wgrad": counts["product_waits"] - 1, "folded": 5, "sums": 5}.get(piece, 2)
    last = range(steps, counts["product_waits"], steps + 1)
    assert len(last) >= 1 + (piece != "wgrad")
    assert needless("skipped_product_wait", last) == 0


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(found, expected, strict=True)
    )


# Of the four simulated SMs one has three tiles, so that each ring wraps and turns come again.
LINE_RUNS = [
    (piece, channels, tile)
    for piece in ("statistics", "masks")
    for channels in (40, 72)  # whose weights stay, and which are two steps of depth
    for tile in LINE_TILES
]


def line_runner(backend: SimulatedBackend, piece: str, channels: int, tile: str) -> Runner:
    side = 14 if tile == "m216n64_lines" else 7
    case = Case(
        9 if side == 14 else 36, channels, side, side, 40 if channels == 72 else 24, 3, 1, 1
    )
    x, conv = convolution(case, torch.bfloat16, integers=True)
    launcher = backend._launcher
    if piece == "statistics":
        return lambda: list(launcher.conv_stats(tile, x, conv, True))
    turned = conv._replace(weight=conv.weight.transpose(0, 1).contiguous(memory_format=NHWC))
    pre_bn = values((len(x), case.filters, side, side), x.dtype, generator(1), True)
    below = Activation(pre_bn, scale_shift(case.filters, generator(), True))
    return lambda: list(launcher.dgrad(tile, x, turned, pre_bn.shape, below, None))


@pytest.mark.parametrize(("piece", "channels", "tile"), LINE_RUNS)
def test_every_wait_and_fence_of_lines_is_needed(simulator, backend, piece, channels, tile):
    run = line_runner(backend, piece, channels, tile)
    needless = count_needless(simulator, run)
    run()
    counts = simulator.take_statistics()
    stays = channels == 40
    # A number is that of a wait of every thread. Of weights that stay the nine waits of a second
    # tile are needless, and, unless something is copied there, both consumers' for a first result,
    # which has a place from the start. (Where weights come anew, those have the numbers of waits of
    # the thread that copies.)
    needless_waits = stays * (9 + 2 * (piece == "statistics"))
    assert needless("skipped_mbarrier_wait", range(counts["mbarrier_waits"])) == needless_waits
    assert counts["mbarrier_waits"] > 22
    assert needless("skipped_named_barrier", range(counts["named_barriers"])) == 0
    assert needless("skipped_proxy_fence", range(counts["proxy_fences"])) == 0
    assert needless("skipped_store_wait", range(counts["store_waits"])) == 0
    assert needless("skipped_register_release", [0]) == 0
    # The waits behind a tile's last product, and those behind which stages are filled again.
    taps = 9 if stays else 18
    assert counts["product_waits"] == 2 * (taps + 1)
    assert needless("skipped_product_wait", [taps, 2 * taps + 1]) == 0
    if not stays:
        assert needless("skipped_product_wait", range(1, 10)) == 0


@pytest.mark.parametrize(("piece", "channels", "tile"), LINE_RUNS)
def test_lines_are_the_same_in_every_order(simulator, backend, piece, channels, tile):
    run = line_runner(backend, piece, channels, tile)
    expected = run()
    for seed in range(1, 5):
        simulator.set_schedule(seed)
        assert same(run(), expected)


def test_what_overwrites_a_stage_too_early_is_found(simulator, backend):
    """A wait for products before their stage is released, in the depth of a wgrad."""
    run = runner(backend, "wgrad", "m256n128")
    run()
    waits = simulator.take_statistics()["product_waits"]
    faults = 0
    for number in range(waits):
        simulator.plant({"skipped_product_wait": number})
        try:
            run()
        except simulator.Fault:
            faults += 1
    assert faults > 1


@pytest.mark.parametrize(("piece", "tile"), RUNS)
def test_results_are_the_same_in_every_order(simulator, backend, piece, tile):
    run = runner(backend, piece, tile)
    expected = run()
    for seed in range(1, 5):
        simulator.set_schedule(seed)
        assert same(run(), expected)


def test_training_kernels_of_sm90_spill_nothing_and_use_their_instructions(
    extension, architectures
):
    if "90a" not in architectures:
        pytest.skip("built without sm_90a")
    usage = cuobjdump(extension, "--dump-resource-usage", "-arch=sm_90a")
    found = re.findall(
        r"(conv_training|wgrad)_sm90_(?:lines_)?kernel\w*:\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)",
        usage,
    )
    lines = 2 * len(LINE_TILES)  # statistics and mask
    assert len(found) == 2 * (ENDINGS * len(TILES) + len(WGRAD_TILES) + lines)
    assert {tuple(numbers) for _, *numbers in found} == {("168", "0", "0")}
