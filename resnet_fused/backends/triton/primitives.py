"""Device functions that the Triton kernels share: indices, batch norm, the convolution's main loop.

Activations are NHWC in memory, weights KRSC (both channels_last), accumulators float32. A
convolution is an implicit GEMM: rows are output positions n·P·Q + p·Q + q, columns output
channels, and the inner dimension runs over taps (r, s) and input channels.
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
def strided_rows(row, P, Q, stride_n, stride_h, stride_w):
    """Where the channels of flat positions n·P·Q + p·Q + q begin in a tensor of these strides."""
    image, p, q = split_position(row, P, Q)
    return image * stride_n + p * stride_h + q * stride_w


@triton.jit
def batch_norm_terms(bn, channel, mask):
    """Float32 (mean, scale, what scale's rounding lost, shift) of the given channels.

    bn: (mean, var, weight, bias, eps), live pointers of any dtype, the latter two or None.

    scale = γ/√(var + ε) comes from the hardware's approximate 1/√ and one Newton step with the
    roundings of its residual added back: threads repeat this for every column they hold, and a
    library root and quotient would take several times as long.
    """
    mean, var, weight, bias, eps = bn
    mu = tl.load(mean + channel, mask, other=0.0).to(tl.float32)
    var = tl.load(var + channel, mask, other=1.0).to(tl.float32)
    v = var + eps
    v_low = eps - (v - var)
    root = tl.rsqrt(v)
    vr = v * root
    residue = tl.fma(-vr, root, 1.0) - (tl.fma(v, root, -vr) + v_low * root) * root
    step = 0.5 * root * residue
    if weight is None:
        scale = root + step
        scale_low = step - (scale - root)
    else:
        gamma = tl.load(weight + channel, mask, other=0.0).to(tl.float32)
        scale = tl.fma(gamma, root, gamma * step)
        scale_low = tl.fma(gamma, root, -scale) + gamma * step
    shift = tl.zeros_like(mu)
    if bias is not None:
        shift = tl.load(bias + channel, mask, other=0.0).to(tl.float32)
    return mu, scale, scale_low, shift


@triton.jit
def normalise(values, bn, channel, mask, EXACT: tl.constexpr):
    """Batch norm of float32 (rows, channels), parameters as in `batch_norm_terms`.

    The mean comes off first: x·scale + (β − mean·scale) cancels catastrophically where the mean is
    large beside the deviation. EXACT, for float32 results, adds back what each step's rounding
    lost, so that the result is rounded once; 16-bit results have nothing to gain from it.
    """
    mean, scale, scale_low, shift = batch_norm_terms(bn, channel, mask)
    mean = mean[None, :]
    scale = scale[None, :]
    shift = shift[None, :]
    difference = values - mean
    if EXACT:
        back = difference - values
        difference_low = (values - (difference - back)) - (mean + back)
        product = difference * scale
        product_low = tl.fma(difference, scale, -product)
        total = product + shift
        back = total - product
        low = (product - (total - back)) + (shift - back) + product_low
        low += tl.fma(difference, scale_low[None, :], difference_low * scale)
        return total + tl.where(low == low, low, 0.0)  # infinities leave no remainder
    return tl.fma(difference, scale, shift)


@triton.jit
def rectify(values):
    """ReLU that passes NaN on, as PyTorch's does."""
    return tl.where(values < 0, 0.0, values)


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
    H,
    W,
    C,
    P,
    Q,
    channels,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    POINTWISE: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP_IN: tl.constexpr,
    GROUP_OUT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The float32 accumulator (BLOCK_M, BLOCK_N) of a convolution's output tile.

    x: (N, H, W, C); weight: (output channels, R, S, channels). `row` and `column` must be valid
    positions (clamp what lies beyond the edge and mask the store instead). `first_channel` is the
    first input channel of `column`'s group. POINTWISE: 1×1, stride 1, no padding, a plain GEMM.
    PADDED: some tap may fall outside the image. EVEN: BLOCK_C divides `channels`.

    GROUP_IN > 0 packs several small groups into one tile: `weight` is then (…, GROUP_IN), the
    tile's `channels` (<= BLOCK_C) span whole groups, and weights between unlike groups read as 0.
    """
    inner = tl.arange(0, BLOCK_C)
    if POINTWISE:
        x_row = row * C
    else:
        image, p, q = split_position(row, P, Q)
        h = p * STRIDE_H - PAD_H
        w = q * STRIDE_W - PAD_W
        x_row = ((image * H + h) * W + w) * C
    x_tile = x + first_channel + x_row[:, None] + inner[None, :]

    if GROUP_IN > 0:
        group_channel = (column % (channels // GROUP_IN * GROUP_OUT)) // GROUP_OUT * GROUP_IN
        weight_channels = GROUP_IN
        weight_column = column * (R * S * GROUP_IN) - group_channel
        from_group = (inner[:, None] >= group_channel[None, :]) & (
            inner[:, None] < group_channel[None, :] + GROUP_IN
        )
    else:
        weight_channels = channels
        weight_column = column * (R * S * channels)
        if WIDE:
            weight_column = column.to(tl.int64) * (R * S * channels)
    weight_tile = weight + weight_column[None, :] + inner[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    r = 0
    s = 0
    c = 0
    for _ in range(R * S * tl.cdiv(channels, BLOCK_C)):
        if R * S > 1:
            x_step = (r * DILATION_H * W + s * DILATION_W) * C + c
            weight_step = (r * S + s) * weight_channels + c
        else:
            x_step = c
            weight_step = c
        in_channels = inner < channels - c
        if PADDED:
            in_image = is_inside(h + r * DILATION_H, H) & is_inside(w + s * DILATION_W, W)
            if EVEN:
                a = tl.load(x_tile + x_step, in_image[:, None], other=0.0)
            else:
                a = tl.load(x_tile + x_step, in_image[:, None] & in_channels[None, :], other=0.0)
        elif EVEN:
            a = tl.load(x_tile + x_step)
        else:
            a = tl.load(x_tile + x_step, in_channels[None, :], other=0.0)
        if GROUP_IN > 0:
            b = tl.load(weight_tile + weight_step, from_group, other=0.0)
        elif EVEN:
            b = tl.load(weight_tile + weight_step)
        else:
            b = tl.load(weight_tile + weight_step, in_channels[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        r, s, c = next_step(r, s, c, channels, 0, R, S, 1, 1, BLOCK_C)
    return acc
