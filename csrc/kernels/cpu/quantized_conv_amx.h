// The micro-kernel of quantized_conv_tile.h in tile registers (AMX), included there instead of the
// one in vector registers. A step sums 16 words of 4 channels: it loads one tile of up to 16 pixels
// and up to four of 16 words x 16 columns, and does a TDPBUSD with each: exact, in int32. Pixels at
// even distances are loaded from where they lie; others, taps outside the image and the last words
// of a run that are less than 16 are copied together first, these with zeros behind.
//
// Registers: 0 to 3 sums, one for 16 columns; 4 pixels; 5 to 7 weights by turns. The intrinsics
// take their numbers as literals only.
#include "amx_state.h"

using TileState = TileRegisters<3>;

template <int kVecs>
ISA_INLINE void multiply_step(const std::uint8_t* pixels, std::int64_t pixel_pitch,
                              const std::int8_t* weights, std::int64_t pitch) {
  _tile_loadd(4, pixels, pixel_pitch);
  _tile_loadd(5, weights, pitch);
  _tile_dpbusd(0, 4, 5);
  if constexpr (kVecs > 1) {
    _tile_loadd(6, weights + 64, pitch);
    _tile_dpbusd(1, 4, 6);
  }
  if constexpr (kVecs > 2) {
    _tile_loadd(7, weights + 128, pitch);
    _tile_dpbusd(2, 4, 7);
  }
  if constexpr (kVecs > 3) {
    _tile_loadd(5, weights + 192, pitch);
    _tile_dpbusd(3, 4, 5);
  }
}

template <int kVecs>
ISA inline __attribute__((noinline)) void multiply_steps(const std::uint8_t* pixels,
                                                         std::int64_t pixel_pitch,
                                                         const std::int8_t* weights,
                                                         std::int64_t pitch, std::int64_t steps) {
  for (; steps > 0; --steps, pixels += kTileRegisterBytes, weights += kTileWords * pitch) {
    multiply_step<kVecs>(pixels, pixel_pitch, weights, pitch);
  }
}

// The bytes between the pixels' addresses, or 0 where they are not even.
ISA_INLINE std::int64_t distance(const std::uint8_t* const* at, std::int64_t rows) {
  const auto address = [&](std::int64_t r) { return reinterpret_cast<std::intptr_t>(at[r]); };
  const std::int64_t pitch = rows > 1 ? address(1) - address(0) : kTileRegisterBytes;
  for (std::int64_t r = 2; r < rows; ++r) {
    if (address(r) - address(r - 1) != pitch) return 0;
  }
  return pitch;
}

// `count` lines of those that are to be fetched.
ISA_INLINE void prefetch_lines(Lines& lines, std::int64_t count) {
  for (; count > 0 && lines.left > 0; --count, --lines.left, lines.next += 64) {
    __builtin_prefetch(lines.next, 0, 2);
  }
}

// The sums of a run of words whose pixels lie at `at`.
template <int kVecs>
ISA_INLINE void multiply_run(const std::uint8_t* const* at, std::int64_t rows, std::int64_t words,
                             const std::int8_t* weights, std::int64_t pitch, Lines& ahead) {
  const std::int64_t pixel_pitch = distance(at, rows), steps = words / kTileWords;
  alignas(64) std::uint8_t pixels[kTileRegisterRows * kTileRegisterBytes];
  for (std::int64_t step = 0; step < steps;) {
    const std::int64_t count = pixel_pitch == 0 ? 1 : steps - step;
    const std::int64_t offset = step * kTileRegisterBytes;
    prefetch_lines(ahead, count * kTileWords);
    if (pixel_pitch != 0) {
      multiply_steps<kVecs>(at[0] + offset, pixel_pitch, weights, pitch, count);
    } else {
      for (std::int64_t r = 0; r < rows; ++r) {
        std::memcpy(pixels + r * kTileRegisterBytes, at[r] + offset, kTileRegisterBytes);
      }
      finish_stores(pixels);
      multiply_step<kVecs>(pixels, kTileRegisterBytes, weights, pitch);
    }
    weights += count * kTileWords * pitch;
    step += count;
  }
  const std::int64_t rest = words % kTileWords;
  if (rest == 0) return;
  constexpr std::int64_t kPitch = kVecs * kLanes * 4;
  alignas(64) std::int8_t last[kTileWords * kPitch] = {};
  std::memset(pixels, 0, sizeof pixels);
  for (std::int64_t r = 0; r < rows; ++r) {
    std::memcpy(pixels + r * kTileRegisterBytes, at[r] + steps * kTileRegisterBytes, 4 * rest);
  }
  for (std::int64_t word = 0; word < rest; ++word) {
    std::memcpy(last + word * kPitch, weights + word * pitch, kPitch);
  }
  finish_stores(pixels);
  finish_stores(last);
  multiply_step<kVecs>(pixels, kTileRegisterBytes, last, kPitch);
}

// Adds a pass over the window to a tile's sums, rows of kTileColumns.
template <int kVecs>
ISA inline __attribute__((noinline)) void sum_tile(std::int64_t count, const Pass& pass,
                                                   const Row* rows, const std::int8_t* all_weights,
                                                   const QuantizedColumns& columns,
                                                   std::int32_t* sums, Lines& ahead) {
  constexpr std::int64_t kPitch = kTileColumns * sizeof(std::int32_t);
  finish_stores(sums);
  _tile_loadd(0, sums, kPitch);
  if constexpr (kVecs > 1) _tile_loadd(1, sums + kLanes, kPitch);
  if constexpr (kVecs > 2) _tile_loadd(2, sums + 2 * kLanes, kPitch);
  if constexpr (kVecs > 3) _tile_loadd(3, sums + 3 * kLanes, kPitch);

  // The taps to take, and whether all of them are inside the image for all rows.
  const Window& window = pass.window;
  Taps taps = pass.borders[rows[0].border];
  bool alike = true;
  if (!pass.inside) {
    for (std::int64_t r = 1; r < count; ++r) {
      alike &= rows[r].border == rows[0].border;
      if (pass.skips) taps = union_of(taps, pass.borders[rows[r].border]);
    }
    if (!pass.skips) {
      alike &= taps.rows[1] - taps.rows[0] == window.kernel[0] &&
               taps.columns[1] - taps.columns[0] == window.kernel[1];
      taps = {{0, window.kernel[0]}, {0, window.kernel[1]}};
    }
  }
  // Neighbouring taps are one run of words where nothing lies between them.
  const std::int64_t together =
      alike && pass.tap_bytes == 4 * pass.tap_words ? taps.columns[1] - taps.columns[0] : 1;
  for (std::int64_t y = taps.rows[0]; y < taps.rows[1]; ++y) {
    for (std::int64_t x = taps.columns[0]; x < taps.columns[1]; x += together) {
      const std::int64_t offset = y * pass.tap_line_bytes + x * pass.tap_bytes + columns.operand;
      const std::uint8_t* at[kTileRows];
      for (std::int64_t r = 0; r < count; ++r) {
        at[r] = alike || has(pass.borders[rows[r].border], y, x)
                    ? at_offset(rows[r].window, offset)
                    : pass.padding_value + columns.operand;
      }
      multiply_run<kVecs>(at, count, together * pass.tap_words,
                          all_weights + (y * window.kernel[1] + x) * pass.tap_words * columns.pitch,
                          columns.pitch, ahead);
    }
  }
  _tile_stored(0, sums, kPitch);
  if constexpr (kVecs > 1) _tile_stored(1, sums + kLanes, kPitch);
  if constexpr (kVecs > 2) _tile_stored(2, sums + 2 * kLanes, kPitch);
  if constexpr (kVecs > 3) _tile_stored(3, sums + 3 * kLanes, kPitch);
}

// A tile of the result.
template <int kVecs>
ISA inline __attribute__((noinline)) void make_tile(std::int64_t count, const Shared& shared,
                                                    const QuantizedColumns& columns,
                                                    const Row* const (&all_rows)[2],
                                                    Lines (&ahead)[2]) {
  alignas(64) std::int32_t sums[kTileRows * kTileColumns];
  for (int p = shared.count - 1; p >= 0; --p) {
    for (std::int64_t r = 0; r < count; ++r) {
      Sums row[1][kVecs];
      std::int32_t* const at = sums + r * kTileColumns;
      if (p == 1) {
        begin(row, columns.start[1]);
      } else {
        if (shared.count == 2) begin(row, at);
        add_shortcut(row, shared.op, columns, all_rows[0] + r);
      }
      for (int j = 0; j < kVecs; ++j) store_sums(at + j * kLanes, row[0][j]);
    }
    sum_tile<kVecs>(count, shared.passes[p], all_rows[p], columns.weights[p], columns, sums,
                    ahead[p]);
  }
  for (std::int64_t r = 0; r < count; ++r) {
    Sums row[1][kVecs];
    begin(row, sums + r * kTileColumns);
    finish(row, shared, columns, all_rows[0] + r);
  }
}

// Of up to kTileRows rows.
ISA inline void multiply_tile(TileState& state, std::int64_t rows, std::int64_t width,
                              const Shared& shared, const QuantizedColumns& columns,
                              const Row* const (&all_rows)[2], Lines (&ahead)[2]) {
  constexpr decltype(&make_tile<1>) kOfWidth[] = {make_tile<1>, make_tile<2>, make_tile<3>,
                                                  make_tile<4>};
  const std::int64_t count = std::min<std::int64_t>(rows, kTileRows);
  state.set_pixels(static_cast<int>(count));
  kOfWidth[std::min<std::int64_t>(width, kTileColumns) / kLanes - 1](count, shared, columns,
                                                                     all_rows, ahead);
}
