"""Device functions that the Triton kernels share: indices, batch norm, the convolution's main loop.

Activations are NHWC in memory, weights KRSC (both channels_last), accumulators float32, of
integers int32. A convolution is an implicit GEMM: rows are output positions n·P·Q + p·Q + q,
columns output channels, and the inner dimension runs over taps (r, s) and input channels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_index(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """Row indices and first column of this program's tile of a (rows, columns) result.

    Column tiles of one row tile are neighbours in launch order, so activations come from DRAM
    once and are found in L2 afterwards; the weights, being small, stay in L2 anyway.
    """
    tiles_n = tl.cdiv(columns, BLOCK_N)
    pid = tl.program_id(0)
    first_row = (pid // tiles_n) * BLOCK_M
    if WIDE:
        first_row = (pid // tiles_n).to(tl.int64) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    return row, (pid % tiles_n) * BLOCK_N


@triton.jit
def split_position(row, P, Q):
    """(n, p, q) of flat positions n·P·Q + p·Q + q; p and q in 32 bits, n as wide as `row`."""
    image = row // (P * Q)
    position = row - image * (P * Q)
    return image, (position // Q).to(tl.int32), (position % Q).to(tl.int32)


@triton.jit
def strided_rows(row, P, Q, strides):
    """Where the channels of flat positions n·P·Q + p·Q + q begin in a tensor of these strides."""
    image, p, q = split_position(row, P, Q)
    return image * strides.n + p * strides.h + q * strides.w


@triton.jit
def bn_scale_shift(bn, channel, mask):
    """Float32 (mean, scale, what scale's rounding lost, shift) of the given channels.

    bn: a `resnet_fused.parameters.BatchNorm`, live pointers of any dtype; or, if its variance is
    None, a `arguments.given_scale`.

    scale = γ/√(var + ε) comes from the hardware's approximate 1/√ and one Newton step with the
    roundings of its residual added back: a library root and quotient would take several times as
    long.
    """
    mean = tl.load(bn.mean + channel, mask, other=0.0).to(tl.float32)
    if bn.var is None:
        scale = tl.load(bn.weight + channel, mask, other=0.0)
        scale_low = tl.zeros_like(scale)
    else:
        var = tl.load(bn.var + channel, mask, other=1.0).to(tl.float32)
        v = var + bn.eps
        v_low = bn.eps - (v - var)
        root = tl.rsqrt(v)
        vr = v * root
        residue = tl.fma(-vr, root, 1.0) - (tl.fma(v, root, -vr) + v_low * root) * root
        step = 0.5 * root * residue
        if bn.weight is None:
            scale = root + step
            scale_low = step - (scale - root)
        else:
            gamma = tl.load(bn.weight + channel, mask, other=0.0).to(tl.float32)
            scale = tl.fma(gamma, root, gamma * step)
            scale_low = tl.fma(gamma, root, -scale) + gamma * step
    shift = tl.zeros_like(mean)
    if bn.bias is not None:
        shift = tl.load(bn.bias + channel, mask, other=0.0).to(tl.float32)
    return mean, scale, scale_low, shift


@triton.jit
def computed_once(vector):
    """`vector`, which each warp computes once, by shuffles or through shared memory.

    Where a vector meets a tile, Triton lets every thread compute it anew for all columns that the
    thread has of the tile; on sm_100, whose products leave a row to a thread, that is once for each
    element. It does not do so through a gather.
    """
    return tl.gather(vector, tl.arange(0, vector.shape[0]), 0)


@triton.jit
def normalise(values, bn, channel, mask, EXACT: tl.constexpr):
    """Batch norm of float32 (rows, channels), parameters as in `bn_scale_shift`.

    The mean comes off first: x·scale + (β − mean·scale) cancels catastrophically where the mean is
    large beside the deviation. EXACT, for float32 results, adds back what each step's rounding
    lost, so that the result is rounded once; 16-bit results have nothing to gain from it.
    """
    mean, scale, scale_low, shift = bn_scale_shift(bn, channel, mask)
    mean = computed_once(mean)[None, :]
    scale = computed_once(scale)[None, :]
    shift = computed_once(shift)[None, :]
    difference = values - mean
    if EXACT:
        back = difference - values
        difference_low = (values - (difference - back)) - (mean + back)
        product = difference * scale
        product_low = tl.fma(difference, scale, -product)
        total = product + shift
        back = total - product
        low = (product - (total - back)) + (shift - back) + product_low
        scale_low = computed_once(scale_low)[None, :]
        low += tl.fma(difference, scale_low, difference_low * scale)
        return total + tl.where(low == low, low, 0.0)  # infinities leave no remainder
    return tl.fma(difference, scale, shift)


@triton.jit
def load_scale_shift(scale_shift, channels, channel, mask):
    """Float32 (mean, scale, shift) of the given channels of a training layer, (6, channels)."""
    mean = tl.load(scale_shift + channel, mask, other=0.0)
    scale = tl.load(scale_shift + channels + channel, mask, other=0.0)
    shift = tl.load(scale_shift + 2 * channels + channel, mask, other=0.0)
    return mean, scale, shift


@triton.jit
def affine(pre_bn, mean, scale, shift):
    """Float32 (pre_bn - mean) · scale + shift of (rows, channels). Every pass forms the same bits,
    so that all agree on a ReLU's sign."""
    return tl.fma(pre_bn.to(tl.float32) - mean[None, :], scale[None, :], shift[None, :])


@triton.jit
def for_sums(values):
    """`values` in the type that their sums are taken in: float32 sums lose nothing beside the
    rounding of 16-bit tensors, but would be the largest error of float32 ones."""
    if values.dtype == tl.float32:
        return values.to(tl.float64)
    else:
        return values.to(tl.float32)


@triton.jit
def relu(values):
    """ReLU that passes NaN on, as PyTorch's does. A maximum becomes a part of the conversion to 16
    bits, which a choice does not."""
    return tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def from_e4m3(values):
    """Float16 of e4m3 numbers or of their bytes: exactly, a NaN as a NaN. A byte's exponent, put
    where float16 has its own, is one whose bias is greater by 8; a subnormal number stays one."""
    if values.dtype == tl.uint8:
        magnitude = (values & 0x7F).to(tl.uint16)
        bits = ((values & 0x80).to(tl.uint16) << 8) | (magnitude << 7)
        number = bits.to(tl.float16, bitcast=True) * 256.0
        return tl.where(magnitude == 0x7F, float("nan"), number)
    else:
        return values.to(tl.float16)


@triton.jit
def to_byte(values, LOW: tl.constexpr):
    """float32 numbers as integers from LOW, 0 or -128, to LOW + 255: rounded to nearest even."""
    values = tl.minimum(tl.maximum(values, LOW), LOW + 255.0)
    # The sum of 1.5 · 2**23 and a small integer ends in its bits.
    return (values + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def to_e4m3(values, LOW: tl.constexpr, BYTES: tl.constexpr):
    """float32 numbers as e4m3, or as its BYTES, within LOW and 448: rounded to nearest even."""
    values = tl.where(values < LOW, LOW, tl.where(values > 448.0, 448.0, values))  # passes NaN on
    if BYTES:
        bits = values.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # The last of 3 bits is the 20th, and the exponent's bias less by 120.
        rounded = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2**-6 whole multiples of 2**-9, as which the sum with 2**14 ends.
        shifted = tl.abs(values) + 16384.0
        rounded = tl.where(
            magnitude < 0x3C800000, shifted.to(tl.int32, bitcast=True) - 0x46800000, rounded
        )
        signed = rounded | ((bits >> 24) & 0x80)
        return tl.where(magnitude > 0x7F800000, 0x7F, signed).to(tl.uint8)
    else:
        return values.to(tl.float8e4nv)


@triton.jit
def round_to_tf32(x):
    """To the nearest number with 10 bits behind the point, ties away from zero, as cvt.rna.tf32 of
    the PTX ISA does; what is not finite stays as it is."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x1000) & -0x2000
    is_finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(is_finite, rounded, bits).to(tl.float32, bitcast=True)


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b, in TF32 where PRECISION says so: its products cut off the bits that they do not
    take, which errs twice as far as rounding does, so operands are rounded first.

    Exact float32 products of one step are summed by themselves, because the error of one chain of
    sums grows with its length: as CUDA cores compute it, thousands of terms of a convolution. The
    limit on imprecise sums, which Triton otherwise reads for float8 alone, keeps its compiler from
    making one chain of it.
    """
    if PRECISION == "tf32" and a.dtype == tl.float32:
        a = round_to_tf32(a)
        b = round_to_tf32(b)
    if PRECISION == "ieee" and a.dtype == tl.float32:
        step = tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1, out_dtype=acc.dtype)
        return acc + step
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def is_inside(index, size):
    """0 <= index < size in one comparison: negative numbers wrap to large unsigned ones."""
    return index.to(tl.uint32, bitcast=True) < size


@triton.jit
def next_step(
    r,
    s,
    c,
    channels,
    first_s,
    R: tl.constexpr,
    S: tl.constexpr,
    STEP_R: tl.constexpr,
    STEP_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The tap and first channel that follow (r, s, c) in a convolution's loop.

    Taps and channel blocks form one loop, so that its software pipeline never drains; the tap
    advances by comparison, because a division per step is slow and because Triton has
    miscompiled loops that recover indices by // and % at 8 warps (pytorch #173068).
    """
    c += BLOCK_C
    if R * S > 1:
        next_s = c >= channels
        c = tl.where(next_s, 0, c)
        s = tl.where(next_s, s + STEP_S, s)
        next_r = s >= S
        s = tl.where(next_r, first_s, s)
        r = tl.where(next_r, r + STEP_R, r)
    return r, s, c


@triton.jit
def convolve(
    x,
    weight,
    row,
    column,
    first_channel,
    image,
    result,
    channels,
    EVEN: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    padding_value=None,
):
    """The accumulator (TILE.m, TILE.n) of a convolution's output tile.

    x: (N, H, W, C), sizes in `image`; weight: (output channels, R, S, channels); result: the
    output's sizes. `row` and `column` must be valid positions (clamp what lies beyond the edge and
    mask the store instead). `first_channel` is the first input channel of `column`'s group. EVEN:
    TILE.c divides `channels`.

    Integers: weights are int8. Triton's products take two operands of one type, so 128 comes off
    each uint8 input: the caller adds 128 · the sum of a column's weights to the int32 result.
    e4m3 numbers, or their bytes, are multiplied by weights of float16, which holds them: products
    are exact, and sums of float32.
    padding_value: (C,), what pixels of the padding hold; None for zero.

    Where small groups are packed, `weight` is (…, WINDOW.packed_in), the tile's `channels`
    (<= TILE.c) span whole groups, and weights between unlike groups read as 0.
    """
    taps: tl.constexpr = WINDOW.r * WINDOW.s
    inner = tl.arange(0, TILE.c)
    if WINDOW.is_pointwise:
        x_row = row * image.c
    else:
        n, p, q = split_position(row, result.h, result.w)
        h = p * WINDOW.stride_h - WINDOW.pad_h
        w = q * WINDOW.stride_w - WINDOW.pad_w
        x_row = ((n * image.h + h) * image.w + w) * image.c
    x_row += first_channel

    if WINDOW.packed_in > 0:
        group_channel = (
            (column % (channels // WINDOW.packed_in * WINDOW.packed_out))
            // WINDOW.packed_out
            * WINDOW.packed_in
        )
        weight_channels = WINDOW.packed_in
        weight_column = column * (taps * WINDOW.packed_in) - group_channel
        from_group = (inner[:, None] >= group_channel[None, :]) & (
            inner[:, None] < group_channel[None, :] + WINDOW.packed_in
        )
    else:
        weight_channels = channels
        weight_column = column * (taps * channels)
        if TILE.is_wide:
            weight_column = column.to(tl.int64) * (taps * channels)

    # Members of a tuple are no constants to Triton 3.5 where they stand in another one.
    block_m: tl.constexpr = TILE.m
    block_n: tl.constexpr = TILE.n
    if weight.dtype.element_ty == tl.int8:
        acc = tl.zeros((block_m, block_n), tl.int32)
    else:
        acc = tl.zeros((block_m, block_n), tl.float32)
    r = 0
    s = 0
    c = 0
    steps = tl.cdiv(taps * channels, TILE.c) if WINDOW.is_flat else taps * tl.cdiv(channels, TILE.c)
    for step in range(steps):
        border = 0.0
        if WINDOW.is_flat:
            index = step * TILE.c + inner
            tap = index // channels
            inner_channel = index - tap * channels
            tap_h = tap // WINDOW.s * WINDOW.dilation_h
            tap_w = tap % WINDOW.s * WINDOW.dilation_w
            in_channels = index < taps * channels
            in_image = is_inside(h[:, None] + tap_h[None, :], image.h) & is_inside(
                w[:, None] + tap_w[None, :], image.w
            )
            x_step = (tap_h * image.w + tap_w) * image.c + inner_channel
            a_tile = x + x_row[:, None] + x_step[None, :]
            b_tile = weight + weight_column[None, :] + index[:, None]
            a = tl.load(a_tile, in_image & in_channels[None, :], other=0.0)
        else:
            inner_channel = c + inner
            in_channels = inner < channels - c
            # Of several taps a step is a number, of one tap it is added where channels are: either
            # way round costs instructions.
            if taps > 1:
                x_step = (r * WINDOW.dilation_h * image.w + s * WINDOW.dilation_w) * image.c + c
                weight_step = (r * WINDOW.s + s) * weight_channels + c
                a_tile = x + x_row[:, None] + inner[None, :] + x_step
                b_tile = weight + weight_column[None, :] + inner[:, None] + weight_step
            else:
                a_tile = x + x_row[:, None] + inner_channel[None, :]
                b_tile = weight + weight_column[None, :] + inner_channel[:, None]
            if WINDOW.is_padded:
                in_image = (
                    is_inside(h + r * WINDOW.dilation_h, image.h)
                    & is_inside(w + s * WINDOW.dilation_w, image.w)
                )[:, None]
                if padding_value is not None:
                    place = padding_value + first_channel + inner_channel
                    border = tl.load(place, in_channels, other=0.0)[None, :]
                if EVEN:
                    a = tl.load(a_tile, in_image, other=border)
                else:
                    a = tl.load(a_tile, in_image & in_channels[None, :], other=border)
            elif EVEN:
                a = tl.load(a_tile)
            else:
                a = tl.load(a_tile, in_channels[None, :], other=0.0)
        if WINDOW.packed_in > 0:
            b = tl.load(b_tile, from_group, other=0.0)
        elif EVEN and not WINDOW.is_flat:
            b = tl.load(b_tile)
        else:
            b = tl.load(b_tile, in_channels[:, None], other=0.0)
        if weight.dtype.element_ty != tl.int8 and a.dtype.primitive_bitwidth == 8:
            a = from_e4m3(a)
        elif x.dtype.element_ty == tl.uint8:
            a = (a ^ 128).to(tl.int8, bitcast=True)
        acc = multiply(a, b, acc, tl.constexpr(TILE.precision))
        if not WINDOW.is_flat:
            r, s, c = next_step(r, s, c, channels, 0, WINDOW.r, WINDOW.s, 1, 1, TILE.c)
    return acc
