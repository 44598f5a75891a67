// The vector code of train_pack.cpp, included once per instruction set by for_each_isa.h.
#include "vec.h"

typedef double Wide __attribute__((vector_size(ISA_LANES * 4)));

// to[j] (kBlock) = column j of `rows` rows that are `pitch` elements apart, zeros where there are
// fewer than kBlock, for up to kBlock columns.
template <typename Number>
ISA_INLINE void transpose(const Number* from, std::int64_t pitch, std::int64_t rows,
                          std::int64_t columns, float* const* to) {
#if ISA_LANES == 16
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    r[i] = i < rows ? (__m512)load(from + i * pitch, columns) : _mm512_setzero_ps();
    __builtin_prefetch(from + i * pitch + kReadAhead);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  // r[4 * q + j] holds columns j, 4 + j, 8 + j, 12 + j of rows 4 * q to 4 * q + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
    const __m512 d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(a, b, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
    t[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
  for (int j = 0; j < columns; ++j) store(to[j], (Vec)t[j]);
#else
  for (std::int64_t j = 0; j < columns; ++j) {
    for (std::int64_t i = 0; i < kBlock; ++i) {
      BFloat16 bits;
      if constexpr (sizeof(Number) == 4) {
        to[j][i] = i < rows ? from[i * pitch + j] : 0;
      } else {
        bits = i < rows ? from[i * pitch + j] : 0;
        const std::uint32_t wide = std::uint32_t{bits} << 16;
        std::memcpy(to[j] + i, &wide, sizeof wide);
      }
    }
  }
#endif
}

// stage[(i - first) * taps + tap][kBlock] = the weight of kBlock outputs from `out` on.
template <typename Number>
ISA_INLINE void fill_stage(const Pack& pack, std::int64_t out, std::int64_t first,
                           std::int64_t last, float* stage) {
  const auto& s = pack.strides;
  const std::int64_t width = pack.kernel[1], taps = pack.kernel[0] * width;
  const std::int64_t rows = std::min(kBlock, pack.out_channels - out);
  const Number* const from = static_cast<const Number*>(pack.weight) + out * s[0];
  if (rows <= 0) {
    std::fill_n(stage, (last - first) * taps * kBlock, 0.0f);
    return;
  }
  const auto place = [&](std::int64_t i, std::int64_t tap) {
    return i * s[1] + tap / width * s[2] + tap % width * s[3];
  };
  if (s[0] == 1) {
    for (std::int64_t i = first; i < last; ++i) {
      for (std::int64_t tap = 0; tap < taps; ++tap, stage += kBlock) {
        const Number* const p = from + place(i, tap);
        for (int lane = 0; lane < kBlock; lane += kLanes) {
          store(stage + lane, load(p + lane, std::max<std::int64_t>(rows - lane, 0)));
        }
        __builtin_prefetch(p + kBlock);
      }
    }
    return;
  }
  // Runs of neighbours along the inputs, the taps, or both; else single elements.
  const bool taps_adjacent = taps == 1 || (s[3] == 1 && (pack.kernel[0] == 1 || s[2] == width));
  const bool by_input = s[1] == 1 && taps > 1, both = taps_adjacent && s[1] == taps;
  const std::int64_t inputs = last - first;
  const std::int64_t length = by_input ? inputs : both ? inputs * taps : taps_adjacent ? taps : 1;
  const std::int64_t runs = inputs * taps / length;
  for (std::int64_t run = 0; run < runs; ++run) {
    for (std::int64_t at = 0; at < length; at += kBlock) {
      const std::int64_t columns = std::min(kBlock, length - at);
      float* to[kBlock];
      for (std::int64_t j = 0; j < columns; ++j) {
        to[j] = stage + kBlock * (by_input ? (at + j) * taps + run : run * length + at + j);
      }
      const std::int64_t element = run * length;  // counted by input, then tap
      const Number* const p = by_input ? from + place(first + at, run)
                                       : from + place(first + element / taps, element % taps) + at;
      transpose(p, s[0], rows, columns, to);
    }
  }
}

template <typename Number>
ISA_INLINE void conv_rows(const Pack& pack, std::int64_t out, std::int64_t first, std::int64_t last,
                          float* stage) {
  const std::int64_t taps = pack.kernel[0] * pack.kernel[1];
  const bool single = pack.format == Format::kFloat32;
  const std::int64_t pixel_words = single ? pack.in_channels : ceil_div(pack.in_channels, 2);
  const std::int64_t width = pack.strip;
  auto* const strip = static_cast<std::uint32_t*>(pack.packed) +
                      out / width * taps * pixel_words * width + out % width;
  fill_stage<Number>(pack, out, first, last, stage);
  for (std::int64_t tap = 0; tap < taps; ++tap) {
    std::uint32_t* const to = strip + (pack.turned ? taps - 1 - tap : tap) * pixel_words * width;
    for (std::int64_t i = first; i < last; i += single ? 1 : 2) {
      const float* const from = stage + ((i - first) * taps + tap) * kBlock;
      if (single) {
        std::memcpy(to + i * width, from, kBlock * sizeof *from);
        continue;
      }
      BFloat16 low[kBlock], high[kBlock] = {};
      for (int lane = 0; lane < kBlock; lane += kLanes) {
        store(low + lane, load(from + lane));
        if (i + 1 < pack.in_channels) store(high + lane, load(from + taps * kBlock + lane));
      }
      std::uint32_t* const word = to + i / 2 * width;
      __builtin_prefetch(word + kWriteAhead * width, 1);
      for (int lane = 0; lane < kBlock; ++lane) {
        word[lane] = low[lane] | std::uint32_t{high[lane]} << 16;
      }
    }
  }
}

ISA void conv_pack_task(const Pack& pack, std::int64_t out, std::int64_t first, std::int64_t last,
                        float* stage) {
  if (pack.stored == Format::kFloat32) {
    conv_rows<float>(pack, out, first, last, stage);
  } else {
    conv_rows<BFloat16>(pack, out, first, last, stage);
  }
}

// U = G g G^T of half a vector of outputs.
ISA_INLINE void winograd_transform(const Wide g[9], Wide u[16]) {
  Wide half[4][3];
  for (int j = 0; j < 3; ++j) {
    half[0][j] = g[j];
    half[1][j] = (g[j] + g[3 + j] + g[6 + j]) / 2;
    half[2][j] = (g[j] - g[3 + j] + g[6 + j]) / 2;
    half[3][j] = g[6 + j];
  }
  for (int i = 0; i < 4; ++i) {
    const Wide* const h = half[i];
    u[4 * i] = h[0];
    u[4 * i + 1] = (h[0] + h[1] + h[2]) / 2;
    u[4 * i + 2] = (h[0] - h[1] + h[2]) / 2;
    u[4 * i + 3] = h[2];
  }
}

ISA_INLINE Wide widened(const float* p) {
  typedef float Half __attribute__((vector_size(ISA_LANES * 2)));
  Half half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, Wide);
}

ISA_INLINE void narrowed(float* p, Wide v) {
  typedef float Half __attribute__((vector_size(ISA_LANES * 2)));
  const Half half = __builtin_convertvector(v, Half);
  std::memcpy(p, &half, sizeof half);
}

ISA void winograd_pack_task(const Pack& pack, std::int64_t out, std::int64_t first,
                            std::int64_t last, float* stage) {
  constexpr std::int64_t kTaps = 9;
  if (pack.stored == Format::kFloat32) {
    fill_stage<float>(pack, out, first, last, stage);
  } else {
    fill_stage<BFloat16>(pack, out, first, last, stage);
  }
  const std::int64_t padded = round_up(pack.out_channels, kBlock);
  const std::int64_t block = out / kWinogradBlock * kWinogradBlock;
  const std::int64_t width = std::min(kWinogradBlock, padded - block);
  float* const to = static_cast<float*>(pack.packed) + 16 * pack.in_channels * block + out - block;
  for (std::int64_t i = first; i < last; ++i) {
    const float* const from = stage + (i - first) * kTaps * kBlock;
    for (int lane = 0; lane < kBlock; lane += kLanes / 2) {
      Wide g[kTaps], u[16];
      for (int tap = 0; tap < kTaps; ++tap) {
        g[tap] = widened(from + (pack.turned ? kTaps - 1 - tap : tap) * kBlock + lane);
      }
      winograd_transform(g, u);
      for (int e = 0; e < 16; ++e) narrowed(to + (e * pack.in_channels + i) * width + lane, u[e]);
    }
  }
}
