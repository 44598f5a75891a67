// The micro-kernel of conv_tile.h in tile registers (AMX), included there instead of the one in
// vector registers. A step sums 16 words: it loads a tile of up to 16 pixels x 16 words for each of
// the two halves and two tiles of 16 words x 16 columns, and does four TDPBF16PS into four tiles of
// sums, so all 8 registers are in use and every operand serves twice. A word is a pair of bfloat16
// in pixels and packed weights alike, which is what the instruction multiplies; the rows of both
// lie evenly apart in memory and are loaded from where they lie, but the last words of a tap that
// are less than 16 are copied with zeros behind.
//
// TDPBF16PS sums a tile's even and its odd products apart, each step a fused multiply-add in fp32
// rounded to the nearest, ties to even, and adds the two to the sum; denormal inputs and results
// count as zero (Intel SDM). So the order of a sum depends on neither tiles nor threads here too.
//
// Registers: 0 to 3 sums, of half i and vector j at 2 i + j; 4 and 5 pixels; 6 and 7 weights. The
// intrinsics take their numbers as literals only.

#include "amx_state.h"

using TileState = TileRegisters<2>;

// Adds 16 words' products; pixels lie `pitch` bytes apart, weights a strip.
template <int kHalves>
ISA_INLINE void multiply_step(const char* low, const char* high, std::int64_t pitch,
                              const std::uint32_t* weights) {
  constexpr std::int64_t kPitch = kStrip * sizeof(std::uint32_t);
  _tile_loadd(4, low, pitch);
  _tile_loadd(6, weights, kPitch);
  _tile_loadd(7, weights + kLanes, kPitch);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (kHalves == 2) {
    _tile_loadd(5, high, pitch);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Adds the products of `steps` times 16 words. Whatever is to be fetched meanwhile is fetched by
// whole steps too: a few lines more than asked for.
template <int kHalves>
ISA inline __attribute__((noinline)) void multiply_steps(const char* low, const char* high,
                                                         std::int64_t pitch,
                                                         const std::uint32_t* weights,
                                                         std::int64_t steps, Stretch*& fetch) {
  while (steps > 0) {
    while (fetch->words <= 0) ++fetch;
    std::int64_t count = std::min(steps, ceil_div(fetch->words, kTileWords));
    const char *first = fetch->line, *second = first + fetch->second;
    const std::int64_t step = fetch->step;
    fetch->words -= kTileWords * count;
    fetch->line += kTileWords * count * step;
    steps -= count;
    for (; count > 0; --count) {
#pragma GCC unroll 16
      for (int i = 0; i < kTileWords; ++i, first += step, second += step) {
        __builtin_prefetch(first);
        __builtin_prefetch(second);
      }
      multiply_step<kHalves>(low, high, pitch, weights);
      low += kTileRegisterBytes;
      high += kTileRegisterBytes;
      weights += kTileWords * kStrip;
    }
  }
}

// The last words of a tap, and zeros.
struct TileTail {
  alignas(64) char pixels[2][kTileRegisterRows * kTileRegisterBytes] = {};
  alignas(64) std::uint32_t weights[kTileWords * kStrip] = {};

  ISA_INLINE void copy(const char* from, int half, int rows, std::int64_t pitch,
                       std::int64_t words) {
    for (int r = 0; r < rows; ++r) {
      std::memcpy(pixels[half] + r * kTileRegisterBytes, from + r * pitch, 4 * words);
    }
  }

  ISA_INLINE void copy(const std::uint32_t* packed, std::int64_t words) {
    std::memcpy(weights, packed, 4 * words * kStrip);
    finish_stores(this);
  }
};

// The epilogue of kRows pixels from the r-th of a half on.
template <int kRows, End kEnd, bool kWhole>
ISA_INLINE void finish_pixels(const float* sums, const Conv& conv, const Half& half, int r,
                              const Columns& columns, float* kept) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) load_row(sums + (r + i) * kStrip, sum[i]);
  Tile pixels;
  pixels.halves[0] = {half.x, half.pixel + r, half.column + r,
                      half.residual + r * conv.residual.pixel};
  finish<kRows, 1, kEnd, kWhole>(sum, conv, pixels, columns, kept);
}

template <End kEnd, bool kWhole>
ISA_INLINE void finish_halves(const float* sums, const Conv& conv, const Tile& tile,
                              const Columns& columns, float* kept) {
  for (int half = 0; half < tile.count; ++half, sums += kTileRegisterRows * kStrip) {
    int r = 0;
    for (; r + 4 <= tile.rows; r += 4, kept += 4 * kStrip) {
      finish_pixels<4, kEnd, kWhole>(sums, conv, tile.halves[half], r, columns, kept);
    }
    for (; r < tile.rows; ++r, kept += kStrip) {
      finish_pixels<1, kEnd, kWhole>(sums, conv, tile.halves[half], r, columns, kept);
    }
  }
}

// The tile's sums over the window's rows that meet the image, stored.
template <int kHalves>
ISA inline __attribute__((noinline)) void sum_tile(const Source& source, const Tile& tile,
                                                   const std::uint32_t* weights, Stretch* fetch,
                                                   float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kHalves == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const std::int64_t pitch = source.pixel_pitch, steps = source.words / kTileWords;
  const std::int64_t rest = source.words % kTileWords;
  const std::uint32_t* b = weights + tile.first_row * source.segments * source.words * kStrip;
  for (std::int64_t row = tile.first_row; row < tile.last_row; ++row) {
    for (std::int64_t segment = 0; segment < source.segments; ++segment) {
      const std::int64_t offset = row * source.row_pitch + segment * source.segment_pitch;
      const char* const low = tile.halves[0].x + offset;
      const char* const high = tile.halves[kHalves - 1].x + offset;
      multiply_steps<kHalves>(low, high, pitch, b, steps, fetch);
      b += steps * kTileWords * kStrip;
      if (rest == 0) continue;
      TileTail tail;
      tail.copy(low + steps * kTileRegisterBytes, 0, tile.rows, pitch, rest);
      if constexpr (kHalves == 2) {
        tail.copy(high + steps * kTileRegisterBytes, 1, tile.rows, pitch, rest);
      }
      tail.copy(b, rest);
      multiply_step<kHalves>(tail.pixels[0], tail.pixels[1], kTileRegisterBytes, tail.weights);
      b += rest * kStrip;
    }
  }
  constexpr std::int64_t kPitch = kStrip * sizeof(float);
  _tile_stored(0, sums, kPitch);
  _tile_stored(1, sums + kLanes, kPitch);
  if constexpr (kHalves == 2) {
    _tile_stored(2, sums + kTileRegisterRows * kStrip, kPitch);
    _tile_stored(3, sums + kTileRegisterRows * kStrip + kLanes, kPitch);
  }
}

// One tile's sums over the whole window, and the epilogue. `fetch` ends with an endless stretch.
ISA inline void multiply_tile(TileState& state, const Conv& conv, const Source& source,
                              const Tile& tile, const Columns& columns, End end, Stretch* fetch,
                              float* kept) {
  alignas(64) float sums[2 * kTileRegisterRows * kStrip];
  state.set_pixels(tile.rows);
  (tile.count == 2 ? sum_tile<2> : sum_tile<1>)(source, tile, columns.weights, fetch, sums);
  const bool whole = columns.valid >= kStrip &&
                     (end != End::kResidual || conv.residual.channels - columns.first >= kStrip);
  switch (end) {
    case End::kResult:
      return whole ? finish_halves<End::kResult, true>(sums, conv, tile, columns, kept)
                   : finish_halves<End::kResult, false>(sums, conv, tile, columns, kept);
    case End::kResidual:
      return whole ? finish_halves<End::kResidual, true>(sums, conv, tile, columns, kept)
                   : finish_halves<End::kResidual, false>(sums, conv, tile, columns, kept);
    case End::kAdd:
      return whole ? finish_halves<End::kAdd, true>(sums, conv, tile, columns, kept)
                   : finish_halves<End::kAdd, false>(sums, conv, tile, columns, kept);
    case End::kKeep:
      return finish_halves<End::kKeep, true>(sums, conv, tile, columns, kept);
  }
}
