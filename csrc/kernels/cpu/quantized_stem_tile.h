// The vector code of quantized_stem.cpp, included once per instruction set by for_each_isa.h.
#include "quantized_dot.h"

constexpr std::int64_t kStep = 2 * kChannels;  // bytes between output pixels' windows

// Requantised relu(conv) for some neighbouring pixels and columns.
template <int kRows, int kVecs>
struct StemTile {
  ISA static void run(const StemPass& pass, const std::uint8_t* const rows[kFilter],
                      std::int64_t offset, const Columns& columns, std::int64_t first,
                      std::uint8_t* to, std::int64_t to_pitch) {
    Sums sum[kRows][kVecs];
    begin(sum, columns.start);
    const std::int64_t words = pass.layout.tap_words();
    Lines none;
    for (int row = 0; row < kFilter; ++row) {
      const std::uint8_t* at[kRows];
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) at[r] = rows[row] + offset + r * kStep;
      accumulate(sum, at, 0, words, columns.weights + row * words * columns.pitch, columns.pitch,
                 none);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r, to += to_pitch) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        sum[r][j] = requantised(sum[r][j], load(pass.multiplier.data() + first + j * kLanes),
                                splat(255.0f));
      }
      store_row(to, sum[r], false);
    }
  }
};

using StemTiles = Tiles<decltype(&StemTile<1, 1>::run), StemTile>;

typedef std::uint8_t Bytes __attribute__((vector_size(ISA_LANES * 4)));

ISA_INLINE Bytes maximum(Bytes a, Bytes b) {
#if ISA_LANES == 16
  return (Bytes)_mm512_max_epu8((__m512i)a, (__m512i)b);
#else
  return (Bytes)_mm256_max_epu8((__m256i)a, (__m256i)b);
#endif
}

// One pooled row from up to three convolution rows, whose pixels lie `pitch` bytes apart, a
// multiple of a vector's.
ISA_INLINE void pool_row(const std::uint8_t* const rows[kPoolRing], std::int64_t count,
                         std::int64_t width, std::int64_t pitch, std::int64_t channels,
                         std::uint8_t* out) {
  constexpr std::int64_t kBytes = sizeof(Bytes);
  for (std::int64_t x = 0; x < stem_halved(width); ++x, out += channels) {
    const std::int64_t begin = std::max<std::int64_t>(2 * x - 1, 0);
    const std::int64_t end = std::min(2 * x + 2, width);
    for (std::int64_t k = 0; k < channels; k += kBytes) {
      Bytes best = {};
      for (std::int64_t row = 0; row < count; ++row) {
        for (std::int64_t column = begin; column < end; ++column) {
          Bytes pixel;
          std::memcpy(&pixel, rows[row] + column * pitch + k, sizeof pixel);
          best = maximum(best, pixel);
        }
      }
      if (channels - k >= kBytes) {
        std::memcpy(out + k, &best, sizeof best);
      } else {
        std::memcpy(out + k, &best, channels - k);
      }
    }
  }
}

ISA void quantized_stem_task(const StemPass& pass, const Band& band) {
  const QuantizedStem& op = pass.op;
  const PackedWeights& layout = pass.layout;
  const std::int64_t pitch = round_up(op.out_channels, kQuantizedStrip);
  const std::int64_t conv_height = stem_halved(op.height), conv_width = stem_halved(op.width);
  const std::int64_t row_bytes = op.width * kChannels;
  // As far as the last pixel's last word reaches.
  const std::int64_t ring_bytes =
      round_up(std::max((conv_width - 1) * kStep + layout.tap_words() * 4,
                        2 * kBorder * kChannels + row_bytes),
               64);
  auto* const x_rows = reinterpret_cast<std::uint8_t*>(thread_scratch(2).floats(
      ((kRowRing + 1) * ring_bytes + kPoolRing * conv_width * pitch) / 4 + 1));
  std::uint8_t* const outside = x_rows + kRowRing * ring_bytes;
  std::uint8_t* const conv_rows = outside + ring_bytes;
  for (std::int64_t i = 0; i < (kRowRing + 1) * ring_bytes; ++i) {
    x_rows[i] = pass.padding[i % ring_bytes % kChannels];
  }

  std::vector<Columns> all_columns;
  const std::int64_t tile_bytes = columns_bytes(layout.words());
  auto* memory = reinterpret_cast<std::int8_t*>(
      thread_scratch(0).floats(layout.padded() / kTileColumns * tile_bytes / 4));
  for (std::int64_t strip = 0; strip < layout.strips(); ++strip) {
    const std::int64_t width = layout.width(strip);
    for (std::int64_t j = 0; j < width; j += kTileColumns, memory += tile_bytes) {
      all_columns.push_back(columns_of(
          static_cast<const std::int8_t*>(op.packed) + layout.offset(strip) + j * 4, width * 4,
          layout.words(), pass.start.data() + layout.column(strip) + j, memory));
    }
  }

  const std::int64_t pooled_width = stem_halved(conv_width);
  std::uint8_t* const out =
      op.out + band.image * stem_halved(conv_height) * pooled_width * op.out_channels;
  const std::int64_t begin = std::max<std::int64_t>(2 * band.first - 1, 0);
  const std::int64_t end = std::min(2 * band.last, conv_height);
  std::int64_t copied = std::max<std::int64_t>(2 * begin - kBorder, 0);  // next input row to copy
  for (std::int64_t y = begin; y < end; ++y) {
    for (; copied < std::min(2 * y + kBorder + 1, op.height); ++copied) {
      copy_row(pass, band.image, copied,
               x_rows + copied % kRowRing * ring_bytes + kBorder * kChannels);
    }
    const std::uint8_t* rows[kFilter];
    for (int i = 0; i < kFilter; ++i) {
      const std::int64_t source = 2 * y - kBorder + i;
      rows[i] =
          source < 0 || source >= op.height ? outside : x_rows + source % kRowRing * ring_bytes;
    }
    std::uint8_t* const conv_row = conv_rows + y % kPoolRing * conv_width * pitch;
    for (std::int64_t strip = 0; strip < layout.strips(); ++strip) {
      const std::int64_t width = layout.width(strip), column = layout.column(strip);
      for (std::int64_t j = 0; j < width; j += kTileColumns) {
        for (std::int64_t x = 0; x < conv_width; x += kTileRows) {
          StemTiles::at(conv_width - x, width - j)(
              pass, rows, x * kStep, all_columns[(column + j) / kTileColumns], column + j,
              conv_row + x * pitch + column + j, pitch);
        }
      }
    }
    const std::int64_t pooled = y / 2;  // complete after its odd row, or the last
    if (pooled < band.first || (y % 2 == 0 && y + 1 < conv_height)) continue;
    const std::uint8_t* pool_rows[kPoolRing];
    std::int64_t count = 0;
    for (std::int64_t row = std::max<std::int64_t>(2 * pooled - 1, 0); row <= y; ++row) {
      pool_rows[count++] = conv_rows + row % kPoolRing * conv_width * pitch;
    }
    pool_row(pool_rows, count, conv_width, pitch, op.out_channels,
             out + pooled * pooled_width * op.out_channels);
  }
}
