// The vector code of stem.cpp, included once per instruction set by for_each_isa.h.
#include "vec.h"

constexpr int kTaps = taps_per_row(kFormat);
constexpr int kStep = 2 * kChannels * sizeof(Element) / 4;  // words between output pixels
constexpr int kPixels = kLanes == 16 ? 14 : 6;              // of the micro-kernel
constexpr int kVecs = 2;

// The larger, or NaN where either is, as torch.max_pool2d has it.
ISA_INLINE Vec maximum(Vec a, Vec b) { return (a >= b) | (a != a) ? a : b; }

// relu(bn(conv)) for kPixels pixels and kVecs vectors of channels.
ISA inline __attribute__((noinline)) void convolve(const std::uint32_t* const rows[kFilter],
                                                   std::int64_t offset, const std::uint32_t* packed,
                                                   const Terms& terms, std::int64_t first,
                                                   float* to, std::int64_t to_stride) {
  Vec sum[kPixels][kVecs] = {};
  for (int row = 0; row < kFilter; ++row) {
    const std::uint32_t* x = rows[row] + offset;
    for (int tap = 0; tap < kTaps; ++tap, ++x, packed += kStemStrip) {
      // Windows overlap; hide it, or the compiler keeps old taps in registers that it lacks.
      asm("" : "+r"(x));
#pragma GCC unroll 14
      for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) {
          sum[p][j] = multiply_add(x[p * kStep], load_words(packed + j * kLanes), sum[p][j]);
        }
      }
    }
  }
#pragma GCC unroll 14
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) {
      const std::int64_t k = j * kLanes;
      store(to + p * to_stride + k,
            normalise(sum[p][j], terms.at(first + k), Vec{}, least_result(true)));
    }
  }
}

// One pooled row from up to three convolution rows.
ISA_INLINE void pool_row(const float* const rows[kPoolRing], std::int64_t count, std::int64_t width,
                         std::int64_t channels, Element* out) {
  for (std::int64_t x = 0; x < stem_halved(width); ++x) {
    const std::int64_t begin = std::max<std::int64_t>(2 * x - 1, 0);
    const std::int64_t end = std::min(2 * x + 2, width);
    for (std::int64_t k = 0; k < channels; k += kLanes, out += kLanes) {
      Vec best = load(rows[0] + begin * channels + k);
      for (std::int64_t row = 0; row < count; ++row) {
        for (std::int64_t column = begin; column < end; ++column) {
          best = maximum(best, load(rows[row] + column * channels + k));
        }
      }
      store(out, best);
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
  float* const conv_rows =
      thread_scratch().floats((kRowRing + 1) * row_words + kPoolRing * computed * channels);
  auto* const x_rows =
      reinterpret_cast<std::uint32_t*>(conv_rows + kPoolRing * computed * channels);
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
    float* const conv_row = conv_rows + y % kPoolRing * computed * channels;
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
    const float* pool_rows[kPoolRing];
    std::int64_t count = 0;
    for (std::int64_t row = std::max<std::int64_t>(2 * pooled - 1, 0); row <= y; ++row) {
      pool_rows[count++] = conv_rows + row % kPoolRing * computed * channels;
    }
    pool_row(pool_rows, count, conv_width, channels, out + pooled * pooled_width * channels);
  }
}
