"""The cases of the self-check: for each kernel family calls that a faulty kernel gets wrong.

Sizes follow the GPU: at least three tiles for each SM, so that persistent blocks go
round and rings of buffers wrap; tails in every direction; residuals, projections, strides. Values
are integers (the head's means whole 64ths), of which every correct kernel gives the same bits as
float64. Quantised ops have a meaning to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..backends import Backend, autotune
from ..backends.autotune.verify import uninitialised_memory_is_nan
from ..parameters import (
    INVSTD,
    MEAN,
    SCALE,
    Activation,
    ConvBn,
    Convolution,
    Folded,
    MaxPool,
    Normalization,
    OperandTerm,
    PreBnGradient,
)
from ..reference import ops as reference
from ..reference import quantized
from ..reference.training import ReferenceTraining, signs_of
from .cases import (
    BlockCase,
    ConvCase,
    as_images,
    generator,
    make_bottleneck,
    make_gated_integers,
    make_identity,
    make_integers,
    make_residual,
    randint,
)
from .on import On
from .quantized_cases import (
    in_whole_numbers,
    make_quantized_conv,
    make_quantized_head,
    make_quantized_images,
    make_quantized_stem,
)

CONVOLUTION = "conv_bn"
TRAINING = "training"
FOLDED = "training.folded"  # the pieces of a folded end
QUANTIZED = "quantized"
_CHOOSING = ("conv_stats", "dgrad", "wgrad", "folded_end")  # training's pieces with candidates
FAMILIES = (
    *(CONVOLUTION, "bn_add_relu", "bottleneck", "stem", "image_stem", "squeeze_excite", "head"),
    *(TRAINING, QUANTIZED),
)
# Of bottlenecks: inner channels, stride, and whether there is a projection.
_BLOCKS = ((64, 1, False), (64, 1, True), (64, 2, True), (128, 1, False), (128, 2, True))


class Case(NamedTuple):
    """A call of a backend's op, or of a piece of its training; `results`: how many of those that it
    gives are exact, first ones first."""

    name: str
    op: str
    arguments: list[Any]
    results: int = 9


class _Rounded:
    """The reference in float64, each op's result rounded once, as a chain of kernels rounds it."""

    training = ReferenceTraining()
    training.folded = training  # type: ignore[attr-defined]

    def bottleneck(
        self,
        x: Tensor,
        layer1: ConvBn,
        layer2: ConvBn,
        layer3: ConvBn,
        projection: ConvBn | None,
    ) -> Tensor:
        out = self.conv_bn(self.conv_bn(x, layer1, None, True), layer2, None, True)
        if projection is None:
            return self.conv_bn(out, layer3, x, True)
        return self.conv_bn_projection(out, layer3, x, projection)

    def image_stem(
        self, images: Tensor, layer: ConvBn, pool: MaxPool, normalization: Normalization
    ) -> Tensor:
        x = reference.normalise(images, normalization, layer.conv.weight.dtype)
        return self.stem(x, layer, pool)

    def __getattr__(self, op: str) -> Callable[..., Tensor]:
        if op.startswith(QUANTIZED):
            meaning: Callable[..., Tensor] = getattr(quantized, op)
            return meaning

        def run(x: Tensor, *others: Any) -> Tensor:
            out: Tensor = getattr(reference, op)(*_wide((x, *others)))
            # To the 64ths that there can be: float64 convolutions may be off by 1e-12.
            return (64 * out).round().div(64).to(x.dtype)

        return run


def _wide(values: Any) -> Any:
    """With every floating tensor in float64."""
    return tree_map(
        lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, values
    )


def _expected(case: Case) -> list[Tensor]:
    arguments = _wide(case.arguments) if case.op.startswith(TRAINING) else case.arguments
    return _tensors(attrgetter(case.op)(_Rounded())(*arguments))[: case.results]


def _tensors(results: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]


def _operation(backend: Backend, case: Case) -> Callable[..., Any]:
    if not case.op.startswith(FOLDED):
        return attrgetter(case.op)(backend if case.op.startswith(TRAINING) else On(backend))
    assert backend.training is not None
    # Sums, vectors and gradients of weights are wider than the activations.
    floating = filter(Tensor.is_floating_point, _tensors(case.arguments))
    dtype = min(floating, key=Tensor.element_size).dtype
    return getattr(backend.training.folded_ends(dtype), case.op.rsplit(".", 1)[1])


def check_case(backend: Backend, case: Case, kernel: str | None = None, repeats: int = 1) -> bool:
    """Holds a backend's result against the reference; False where `kernel` does not serve the case.

    kernel: the candidate to take; None for the one that the backend chooses.
    Raises AssertionError where the result is wrong.
    """
    is_piece = case.op.startswith(TRAINING)
    if kernel is not None and is_piece and case.op.rsplit(".", 1)[1] not in _CHOOSING:
        return False
    op = _operation(backend, case)
    expected: list[Tensor] = []
    for turn in range(repeats):
        tuner = autotune.tuner
        try:
            with (
                torch.no_grad(),
                tuner.prefer(kernel or "", only=kernel is not None),
                uninitialised_memory_is_nan(),
            ):
                out = _tensors(op(*case.arguments))
        except autotune.NotListedError:
            return False
        expected = expected or _expected(case)  # of what is served only: float64 takes its time
        for ours, right in zip(out, expected, strict=False):
            _compare(ours, right, f"{case.name}, run {turn}")
    return True


def _compare(out: Tensor, expected: Tensor, what: str) -> None:
    if out.dim() == 3:  # sums of parts of the batch, however many parts those are
        out, expected = out.sum(0), expected.sum(0)
    if out.shape != expected.shape:
        raise AssertionError(f"{what}: {tuple(out.shape)}, expected {tuple(expected.shape)}")
    expected = expected.to(out.dtype)
    if not torch.equal(out, expected):
        wrong = (out != expected).nonzero()
        first = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{what}: {len(wrong)} of {out.numel()} elements differ, the first at {first}: "
            f"{out[first].item()}, expected {expected[first].item()}"
        )


def _convolutions(dtype: torch.dtype, device: str, num_sms: int) -> Iterator[Case]:
    """For each SM 2 × 128 positions, and 136 channels: with tiles of 64 or 128
    channels, three or two tiles from each 128 positions, the last one all tail."""
    rng = generator(device=device)

    def integers(name: str, case: ConvCase) -> tuple[ConvCase, Any, Any]:
        """`case` with as many images as it takes."""
        height, width = case.output_size
        case = case._replace(batch=-(-2 * 128 * num_sms // (height * width)))
        return case, *make_integers(case, rng, dtype, device)

    def added(case: ConvCase, x: Tensor) -> Tensor:
        return make_residual(case, x, rng).round_()

    case, *main = integers("pointwise", ConvCase(1, 72, 23, 19, 136))
    yield Case("pointwise", CONVOLUTION, [*main, None, False])
    yield Case("residual", CONVOLUTION, [*main, added(case, main[0]), True])
    yield Case(
        "narrower strided residual",
        CONVOLUTION,
        [*main, make_identity(case, 104, 2, main[0], rng), True],
    )
    shortcut, projection = make_integers(
        ConvCase(case.batch, 200, 46, 38, 136, stride=2), rng, dtype, device
    )
    yield Case("projection", "conv_bn_projection", [*main, shortcut, projection])
    for name, window in {
        "pointwise strided": ConvCase(1, 64, 45, 37, 136, stride=2),
        "3x3": ConvCase(1, 72, 23, 19, 136, 3, 1, 1),
        "3x3 strided": ConvCase(1, 136, 45, 37, 136, 3, 2, 1),
        "3x3 dilated": ConvCase(1, 24, 23, 19, 136, 3, 1, 2, 2),
        "grouped": ConvCase(1, 48, 23, 19, 272, 3, 1, 1, groups=2),
        "small groups": ConvCase(1, 64, 23, 19, 64, 3, 1, 1, groups=16),
        "tails": ConvCase(1, 8, 3, 3, 8, 3, 1, 1),
    }.items():
        case, *main = integers(name, window)
        yield Case(name, CONVOLUTION, [*main, added(case, main[0]), True])
    # Tiles of whole lines add nothing; images of two of them, and several images in one.
    for name, window in {
        "3x3 alone": ConvCase(1, 72, 23, 15, 136, 3, 1, 1),
        "3x3 alone, small images": ConvCase(1, 72, 7, 7, 136, 3, 1, 1),
    }.items():
        _, *main = integers(name, window)
        yield Case(name, CONVOLUTION, [*main, None, True])


def _others(family: str, dtype: torch.dtype, device: str, num_sms: int) -> Iterator[Case]:
    rng = generator(device=device)
    images = 3 * num_sms
    if family == "bn_add_relu":
        for channels in (64, 19):
            case = ConvCase(images, 8, 11, 7, channels)
            x, (_, bn) = make_integers(case._replace(channels=channels), rng, dtype, device)
            for name, residual in (("", None), (" residual", make_residual(case, x, rng).round_())):
                yield Case(f"{channels} channels{name}", family, [x, bn, residual, True])
    elif family == "bottleneck":  # blocks make 14 × 14 or, with stride 2, 7 × 7 positions
        for inner, stride, projection in _BLOCKS:
            out = 2 * inner if projection else inner
            block = BlockCase(images, inner, 15, 13, inner, out, stride, projection)
            shortcut = "projection" if projection else "identity"
            yield Case(
                f"{inner} inner channels, stride {stride}, {shortcut}",
                family,
                make_bottleneck(block, rng, dtype, device, make_integers),
            )
    elif family in ("stem", "image_stem"):
        for channels, height, width in ((64, 37, 30), (24, 9, 50), (64, 36, 40)):
            case = ConvCase(images, 3, height, width, channels, 7, 2, 3)
            x, layer = make_integers(case, rng, dtype, device)
            arguments = [x, layer, MaxPool(3, 2, 1)]
            if family == "image_stem":
                x, normalization = as_images(x)
                arguments = [x, *arguments[1:], normalization]
            yield Case(f"{channels} channels, {height}×{width}", family, arguments)
    elif family == "squeeze_excite":  # means of 64 and of 16 values
        for channels, hidden, side in ((512, 32, 8), (72, 5, 4)):
            shape = ConvCase(images, channels, side, side, channels)
            x, _ = make_integers(shape, rng, dtype, device)
            arguments = make_gated_integers(x, hidden, rng)
            yield Case(f"{channels} channels, {side}×{side}", family, arguments)
    elif family == "head":  # means of 64 and of 16 values
        for batch, channels, classes, side in ((3, 512, 1000, 8), (17, 264, 11, 4)):
            shape = ConvCase(batch, channels, side, side, classes)
            x, (conv, _) = make_integers(shape, rng, dtype, device)
            weight = conv.weight[:, :, 0, 0].contiguous()
            bias = torch.ones(classes, device=device, dtype=dtype)
            yield Case(f"{batch} images, {classes} classes", family, [x, weight, bias])


def _training(dtype: torch.dtype, device: str, num_sms: int) -> Iterator[Case]:
    """The pieces of a training step around a convolution, forward and backward; of the moments,
    which are no integers, nothing is said."""
    rng = generator(device=device)
    images = -(-128 * num_sms // 81)
    more = {  # what is new in further cases
        "3x3 of small images": ("conv_stats", "dgrad that masks"),
        "few channels": ("conv_stats", "wgrad"),
    }
    for name, case in {
        "1x1": ConvCase(images, 72, 9, 9, 136),
        "3x3": ConvCase(images, 40, 9, 9, 136, 3, 1, 1),
        # For tiles of whole lines, of several images and with weights that stay.
        "3x3 of small images": ConvCase(5 * num_sms, 40, 7, 7, 64, 3, 1, 1),
        "3x3 strided": ConvCase(images, 40, 18, 18, 72, 3, 2, 1),
        "few channels": ConvCase(images, 3, 18, 18, 72, 7, 2, 3),
    }.items():
        x, (conv, _) = make_integers(case, rng, dtype, device)
        grad, pre_bn = (_integers_like(case, x, rng) for _ in range(2))
        below = Activation(x, _scale_shift(case.channels, device))
        above = Activation(pre_bn, _scale_shift(case.out_channels, device))
        coefficients = _scale_shift(case.out_channels, device)[[SCALE, INVSTD, MEAN, MEAN]]
        add = _integers_like(
            case._replace(kernel=1, stride=1, padding=0, out_channels=case.channels), x, rng
        )
        y = torch.relu(pre_bn)
        pooled = ConvCase(images, case.out_channels, *case.output_size, case.out_channels, 3, 2, 1)
        _, argmax = ReferenceTraining().bn_relu_pool(above, MaxPool(3, 2, 1))
        pieces: dict[str, list[Any]] = {
            "conv_stats": [x, conv, True],
            "bn_add_relu": [above, grad],
            "pre_bn_gradient": [PreBnGradient(grad, pre_bn, coefficients, False)],
            "relu_gradient": [grad, y, [above]],
            "dgrad": [grad, conv, x.shape, below, add],
            "dgrad that masks": [grad, conv, x.shape, below, None],
            "dgrad that adds": [grad, conv, x.shape, None, add],
            "wgrad": [grad, x, conv],
            "bn_relu_pool": [above, MaxPool(3, 2, 1)],
            "pool_gradient": [_integers_like(pooled, x, rng), above, argmax, MaxPool(3, 2, 1)],
        }
        for piece, arguments in pieces.items():
            if piece not in more.get(name, pieces):
                continue  # the others see as little of what is special as above
            exact = 1 if piece in ("conv_stats", "dgrad that adds") else 9
            yield Case(f"{name} {piece}", f"{TRAINING}.{piece.split()[0]}", arguments, exact)
        if name == "1x1":
            yield from _folded_ends(x, conv, grad, y, below, above, coefficients, rng)


def _folded_ends(
    x: Tensor,
    conv: Convolution,
    grad: Tensor,
    y: Tensor,
    below: Activation,
    above: Activation,
    coefficients: Tensor,
    rng: torch.Generator,
) -> Iterator[Case]:
    """The pieces of a block whose end is folded; of means that are whole numbers."""
    filters, channels = conv.weight.shape[:2]

    def integers(*shape: int) -> Tensor:
        return randint(rng, -3, 4, shape, torch.float32)

    end, sums, product = (
        Folded(x, conv, above.scale_shift),
        integers(2, 2, filters),
        integers(filters, channels, 1, 1),
    )
    matrix = integers(channels, channels)
    term = OperandTerm(x, (matrix + matrix.T).to(x.dtype), integers(channels))
    kept = integers(filters + 1, channels)
    pieces: dict[str, list[Any]] = {
        "operand_moments": [torch.cat([x, -x]), conv],
        "folded_end": [end, grad, False],
        "folded_end with signs": [end, grad, True],
        "folded_end of two with signs": [end, end, True],
        "relu_gradient_sum": [grad, y, None],
        "relu_gradient_sum by signs": [grad, None, signs_of(y)],
        "folded_sums": [sums, product, end],
        "folded_gradients": [product, kept, sums[:1], coefficients, end, False],
    }
    dgrad = [grad, conv, x.shape, below, None, None, term]
    yield Case("1x1 dgrad, folded", f"{TRAINING}.dgrad", dgrad)
    for name, arguments in pieces.items():
        yield Case(f"1x1 {name}, folded", f"{FOLDED}.{name.split()[0]}", arguments)


def _quantized(dtype: torch.dtype, device: str, num_sms: int) -> Iterator[Case]:
    """Convolutions of as many positions as `_convolutions` has, of bytes of their whole range, or
    of whole numbers in e4m3; some of channels in chunks of 16, and some not."""
    float8 = dtype == quantized.FLOAT8
    rng = generator(device=device)
    cases = {
        "pointwise": (ConvCase(1, 72, 23, 19, 136), "none"),
        "adds": (ConvCase(1, 64, 23, 19, 144), "identity"),
        "narrower strided shortcut": (ConvCase(1, 64, 23, 19, 136), "option A"),
        "projection": (ConvCase(1, 208, 23, 19, 144), "projection"),
        "3x3": (ConvCase(1, 80, 23, 19, 144, 3, 1, 1), "none"),
        "3x3 strided": (ConvCase(1, 144, 45, 37, 144, 3, 2, 1), "none"),
        "grouped": (ConvCase(1, 64, 23, 19, 64, 3, 1, 1, groups=16), "none"),
    }
    for name, (case, shortcut) in cases.items():
        height, width = case.output_size
        case = case._replace(batch=-(-2 * 128 * num_sms // (height * width)))
        arguments = make_quantized_conv(case, rng, shortcut, dtype, side_channels=48)
        arguments = in_whole_numbers(arguments) if float8 else arguments
        yield Case(name, "quantized_conv", _to(device, arguments))
    if not float8:
        # Of an even number of lines, so that tensor maps can express every second one.
        case = ConvCase(-(-2 * 128 * num_sms // (23 * 19)), 80, 23, 19, 144)
        arguments = _to(device, make_quantized_conv(case, rng, "identity", dtype, relu=False))
        whole = make_quantized_conv(ConvCase(case.batch, 80, 46, 38, 16), rng, "none", torch.int8)
        arguments[2] = arguments[2]._replace(x=whole[0].to(device)[:, :, ::2, ::2])
        yield Case("narrower strided signed shortcut", "quantized_conv", arguments)
    stem = make_quantized_stem(
        ConvCase(3 * num_sms, 3, 37, 30, 64, 7, 2, 3),
        rng,
        MaxPool(),
        dtype=dtype,
        padding_value=True,
    )
    yield Case("stem", "quantized_stem", _to(device, stem))
    shape = (3 * num_sms, 3, 37, 30)
    images = _to(device, make_quantized_images(shape, rng, torch.float32, float8))
    yield Case("images", "quantized_images", images)
    images[0] = images[0].contiguous(memory_format=torch.channels_last)
    yield Case("channels_last images", "quantized_images", images)
    images = _to(device, make_quantized_images(shape, rng, torch.uint8, float8))
    yield Case("images of bytes", "quantized_images", images)
    # Sums of as many digits as a ResNet's, and of one more.
    for size, batch in ((7, 3 * num_sms), (24, 3)):
        head = make_quantized_head(batch, 200, size, 136, rng, dtype)
        yield Case(f"head of {size} lines", "quantized_head", _to(device, head))


def _to(device: str, values: Any) -> Any:
    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, values)


def _integers_like(case: ConvCase, x: Tensor, rng: torch.Generator) -> Tensor:
    """Small integers of the shape of the case's result, like `x` otherwise."""
    return make_residual(case, x, rng).round_()


def _scale_shift(channels: int, device: str) -> Tensor:
    """Means 1, scales 1 and -1, shifts 1, as `resnet_fused.backends.training` has them."""
    scale_shift = torch.ones(6, channels, device=device)
    scale_shift[SCALE, ::3] = -1
    return scale_shift


def cases(
    family: str, backend: Backend, device: str, num_sms: int, every_dtype: bool = False
) -> Iterator[Case]:
    """A family's cases in the first dtype that the backend serves, or in every one; convolutions of
    float32 with and without TF32."""
    names = ["bfloat16", "float16", "float32", *(["TF32"] if family == CONVOLUTION else [])]
    if family == QUANTIZED:
        names = ["uint8", "float8_e4m3fn"]
    dtypes = {name: getattr(torch, name, torch.float32) for name in names}
    served = {
        name: dtype
        for name, dtype in dtypes.items()
        if backend.unsupported(torch.device(device), dtype) is None
    }
    for name in served if every_dtype else list(served)[:1]:
        torch.backends.cudnn.allow_tf32 = name == "TF32"
        make = {
            CONVOLUTION: _convolutions,
            TRAINING: _training,
            QUANTIZED: _quantized,
        }.get(family, partial(_others, family))
        for case in make(served[name], device, num_sms):
            training = backend.training
            folds = training is not None and training.folded_ends(served[name]) is not None
            if case.name.endswith(", folded") and not folds:
                continue
            yield case._replace(name=f"{name} {case.name}")
