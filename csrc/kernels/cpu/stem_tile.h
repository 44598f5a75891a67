// The vector code of stem.cpp, included once per instruction set by for_each_isa.h.
#include "vec.h"

constexpr int kTaps = taps_per_row(kFormat);
constexpr int kStep = 2 * kChannels * sizeof(Element) / 4;  // words between output pixels
constexpr int kPixels = kLanes == 8 ? 6 : 14;               // of the micro-kernel
constexpr int kVecs = 2;

// Convolution rows hold numbers with the sign taken off, which a ReLU leaves to NaN and -0 alone.
// Their bits are ordered as they are, NaN above all, so that a maximum of bits is that of
// torch.max_pool2d; and rounding keeps the order, so they may be kept as they will be stored.
using Bits = std::conditional_t<sizeof(Element) == 2, std::uint16_t, std::uint32_t>;
constexpr int kBitLanes = kLanes * 4 / sizeof(Element);
typedef Bits BitsVec __attribute__((vector_size(ISA_LANES * 4)));

ISA_INLINE BitsVec load_bits(const Element* p) {
  BitsVec bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

ISA_INLINE BitsVec maximum(BitsVec a, BitsVec b) { return a > b ? a : b; }

ISA_INLINE Vec without_sign(Vec v) { return (Vec)((VecBits)v & 0x7fffffff); }

// relu(bn(conv)) for kPixels pixels and kVecs vectors of channels.
ISA inline __attribute__((noinline)) void convolve(const std::uint32_t* const rows[kFilter],
                                                   std::int64_t offset, const std::uint32_t* packed,
                                                   const Terms& terms, std::int64_t first,
                                                   Element* to, std::int64_t to_stride) {
  Vec sum[kPixels][kVecs] = {};
  for (int row = 0; row < kFilter; ++row) {
    const std::uint32_t* x = rows[row] + offset;
    for (int tap = 0; tap < kTaps; ++tap, ++x, packed += kStemStrip) {
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        // Windows overlap; hide it, or the compiler keeps old taps in registers that it lacks.
        asm("" : "+r"(x));
        Vec columns[kVecs];
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) columns[j] = load_factors(packed + j * kLanes, part);
#pragma GCC unroll 14
        for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
          for (int j = 0; j < kVecs; ++j) {
            sum[p][j] = multiply_add(x[p * kStep], columns[j], sum[p][j], part);
          }
        }
      }
    }
  }
  const Vec least = least_result(true);
  NormTerms norm[kVecs];
#pragma GCC unroll 2
  for (int j = 0; j < kVecs; ++j) norm[j] = NormTerms(terms.at(first), j * kLanes);
#pragma GCC unroll 14
  for (int p = 0; p < kPixels; ++p) {
    Vec v[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) {
      v[j] = without_sign(at_least(norm[j].normalise(sum[p][j]), least));
    }
    store_row(to + p * to_stride, v);
  }
}

// The maximum of one column of up to three rows.
ISA_INLINE BitsVec column_maximum(const Element* const rows[kPoolRing], std::int64_t count,
                                  std::int64_t at) {
  return maximum(maximum(load_bits(rows[0] + at), load_bits(rows[count / 2] + at)),
                 load_bits(rows[count - 1] + at));
}

// One pooled row from `count` convolution rows, three but at the border.
ISA_INLINE void pool_row(const Element* const rows[kPoolRing], std::int64_t count,
                         std::int64_t width, std::int64_t channels, Element* out) {
  for (std::int64_t k = 0; k < channels; k += kBitLanes) {
    BitsVec left = column_maximum(rows, count, k);
    for (std::int64_t x = 0; x < width; x += 2) {
      BitsVec best = maximum(left, column_maximum(rows, count, x * channels + k));
      if (x + 1 < width) {
        left = column_maximum(rows, count, (x + 1) * channels + k);
        best = maximum(best, left);
      }
      std::memcpy(out + x / 2 * channels + k, &best, sizeof best);
    }
  }
}

ISA void stem_task(const Stem& stem, const Terms& terms, const Band& band) {
  const std::int64_t channels = stem.out_channels;
  const std::int64_t conv_height = stem_halved(stem.height), conv_width = stem_halved(stem.width);
  const std::int64_t computed = round_up(conv_width, kPixels);
  const std::int64_t row_elements = kChannels * stem.width;
  // Words of a bordered input row, as far as the last computed pixel and its last tap reach.
  const std::int64_t row_words =
      round_up(std::max((computed - 1) * kStep + kTaps,
                        ceil_div((kBorder * kChannels + row_elements) * sizeof(Element), 4)),
               16);
  auto* const x_rows = reinterpret_cast<std::uint32_t*>(
      thread_scratch().floats((kRowRing + 1) * row_words + kPoolRing * computed * channels));
  auto* const conv_rows = reinterpret_cast<Element*>(x_rows + (kRowRing + 1) * row_words);
  const std::uint32_t* const zero_row = x_rows + kRowRing * row_words;
  std::memset(x_rows, 0, (kRowRing + 1) * row_words * 4);

  const auto* const image =
      static_cast<const Element*>(stem.x) + band.image * stem.height * row_elements;
  const std::int64_t pooled_width = stem_halved(conv_width);
  auto* const out = static_cast<Element*>(stem.out) +
                    band.image * stem_halved(conv_height) * pooled_width * channels;

  const std::int64_t begin = std::max<std::int64_t>(2 * band.first - 1, 0);
  const std::int64_t end = std::min(2 * band.last, conv_height);
  std::int64_t copied = std::max<std::int64_t>(2 * begin - kBorder, 0);  // next input row to copy
  for (std::int64_t y = begin; y < end; ++y) {
    for (; copied < std::min(2 * y + kBorder + 1, stem.height); ++copied) {
      auto* const row = reinterpret_cast<Element*>(x_rows + copied % kRowRing * row_words);
      std::memcpy(row + kBorder * kChannels, image + copied * row_elements,
                  row_elements * sizeof(Element));
    }
    const std::uint32_t* rows[kFilter];
    for (int i = 0; i < kFilter; ++i) {
      const std::int64_t source = 2 * y - kBorder + i;
      rows[i] =
          source < 0 || source >= stem.height ? zero_row : x_rows + source % kRowRing * row_words;
    }
    Element* const conv_row = conv_rows + y % kPoolRing * computed * channels;
    for (std::int64_t k = 0; k < channels; k += kVecs * kLanes) {
      const std::uint32_t* const packed = static_cast<const std::uint32_t*>(stem.packed) +
                                          k / kStemStrip * kStemStrip * kFilter * kTaps +
                                          k % kStemStrip;
      for (std::int64_t x = 0; x < conv_width; x += kPixels) {
        convolve(rows, x * kStep, packed, terms, k, conv_row + x * channels + k, channels);
      }
    }
    const std::int64_t pooled = y / 2;  // complete after its odd row, or the last
    if (pooled < band.first || (y % 2 == 0 && y + 1 < conv_height)) continue;
    const Element* pool_rows[kPoolRing];
    std::int64_t count = 0;
    for (std::int64_t row = std::max<std::int64_t>(2 * pooled - 1, 0); row <= y; ++row) {
      pool_rows[count++] = conv_rows + row % kPoolRing * computed * channels;
    }
    pool_row(pool_rows, count, conv_width, channels, out + pooled * pooled_width * channels);
  }
}
