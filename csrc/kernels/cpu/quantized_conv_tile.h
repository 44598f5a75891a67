// The vector code of quantized_conv.cpp, included once per instruction set by for_each_isa.h.
#include "quantized_dot.h"

// Up to kTileColumns columns of a strip: what they are summed from, and what becomes of the sums.
struct QuantizedColumns {
  const std::int8_t* weights[2];  // of each pass, as the start of each column's sum
  const std::int32_t* start[2];
  std::int64_t pitch;    // bytes from one word's weights to the next's
  std::int64_t operand;  // the block's first channel of x
  const float *scale, *shortcut_scale;
  const std::uint8_t* residual;  // nullptr: none
  std::uint8_t* out;
  std::int64_t residual_pitch, out_pitch;  // bytes from one pixel to the next
#ifndef ISA_VNNI
  const std::int32_t* tap_start[2];  // what of each pass's start belongs to each tap
#endif
};

// Those of a strip from its column `j` on.
ISA_INLINE QuantizedColumns columns_at(const Shared& shared, std::int64_t strip, std::int64_t j) {
  const QuantizedConv& op = shared.op;
  const PackedWeights& layout = shared.passes[0].layout;
  const std::int64_t first = layout.block(strip) * layout.out_channels + layout.column(strip) + j;
  QuantizedColumns columns;
  for (int p = 0; p < shared.count; ++p) {
    const Pass& pass = shared.passes[p];
    columns.weights[p] = pass.weights + pass.layout.offset(strip) + j * 4;
    columns.start[p] = pass.start + first;
  }
  columns.pitch = layout.width(strip) * 4;
  columns.operand = layout.block(strip) * layout.in_channels;
  columns.scale = shared.passes[0].scale + first;
  columns.shortcut_scale = shared.passes[1].scale + first;
  columns.residual = static_cast<const std::uint8_t*>(op.residual.data) + first;
  if (op.residual.channels <= first) columns.residual = nullptr;
  columns.residual_pitch = op.residual.pixel;
  columns.out = static_cast<std::uint8_t*>(op.out) + first;
  columns.out_pitch = op.conv.out_channels;
  return columns;
}

// Rows whose x stays in L1 while the columns of a strip take turns, as their weights do meanwhile.
constexpr std::int64_t kBlockRows = 8 * kTileRows;

// The memory of a result's row is fetched while the second tile before it is made.
constexpr std::int64_t kRowsAhead = 2 * kTileRows;

// sum = start + the shortcut in the accumulator's scale; those of a projection are in sum.
template <int kRows, int kVecs>
ISA_INLINE void add_shortcut(Sums (&sum)[kRows][kVecs], const QuantizedConv& op,
                             const QuantizedColumns& columns, const Row* rows) {
  const std::int32_t* const start = columns.start[0];
  if (!op.projected && columns.residual == nullptr) return begin(sum, start);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    if (!op.projected) {
      const std::uint8_t* const from = columns.residual + rows[r].pixel * columns.residual_pitch;
      __builtin_prefetch(from + kRowsAhead * columns.residual_pitch);
      load_row(from, sum[r], op.residual_is_signed);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      const Vec scale = load(columns.shortcut_scale + j * kLanes);
      sum[r][j] = load_sums(start + j * kLanes) + rounded(to_float(sum[r][j]) * scale);
    }
  }
}

template <bool kFits, int kRows, int kVecs>
ISA_INLINE void finish_rows(Sums (&sum)[kRows][kVecs], bool relu, const QuantizedColumns& columns,
                            const Row* rows) {
  const Vec most = splat(relu ? 255.0f : 127.0f);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    std::uint8_t* const to = columns.out + rows[r].pixel * columns.out_pitch;
    __builtin_prefetch(to + kRowsAhead * columns.out_pitch, 1);
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      const Vec scale = load(columns.scale + j * kLanes);
      // What fits into int32 is clamped by narrowing.
      sum[r][j] =
          kFits ? rounded(to_float(sum[r][j]) * scale) : requantised(sum[r][j], scale, most);
    }
    store_row(to, sum[r], !relu);
  }
}

// Requantises a tile's sums and stores them.
template <int kRows, int kVecs>
ISA_INLINE void finish(Sums (&sum)[kRows][kVecs], const Shared& shared,
                       const QuantizedColumns& columns, const Row* rows) {
  if (shared.fits) {
    finish_rows<true>(sum, shared.op.relu, columns, rows);
  } else {
    finish_rows<false>(sum, shared.op.relu, columns, rows);
  }
}

#ifdef ISA_AMX
#include "quantized_conv_amx.h"
#else
// What of a thread outlives a tile: nothing.
struct TileState {};

// A tile of the result: the projection's sums over its window, the convolution's on top of them, in
// registers.
template <int kRows, int kVecs>
struct ConvTile {
  ISA static void run(const Shared& shared, const QuantizedColumns& columns,
                      const Row* const (&all_rows)[2], Lines (&ahead)[2]) {
    Sums sum[kRows][kVecs];
    if (shared.count == 2) begin(sum, columns.start[1]);
    for (int p = shared.count - 1; p >= 0; --p) {
      const Pass& pass = shared.passes[p];
      const Row* const rows = all_rows[p];
      if (p == 0) add_shortcut(sum, shared.op, columns, rows);
      const Window& window = pass.window;

      // The taps to take, and whether all of them are inside the image for all rows.
      Taps taps = pass.borders[rows[0].border];
      bool alike = true;
      if (!pass.inside) {
        for (int r = 1; r < kRows; ++r) alike &= rows[r].border == rows[0].border;
        if (!pass.skips) {
          alike &= taps.rows[1] - taps.rows[0] == window.kernel[0] &&
                   taps.columns[1] - taps.columns[0] == window.kernel[1];
          taps = {{0, window.kernel[0]}, {0, window.kernel[1]}};
        } else if (!alike) {
          for (int r = 1; r < kRows; ++r) taps = union_of(taps, pass.borders[rows[r].border]);
        }
#ifndef ISA_VNNI
        for (std::int64_t y = 0; y < window.kernel[0]; ++y) {
          for (std::int64_t x = 0; x < window.kernel[1]; ++x) {
            if (has(taps, y, x)) continue;
            const std::int32_t* const start =
                columns.tap_start[p] + (y * window.kernel[1] + x) * kTileColumns;
#pragma GCC unroll 6
            for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
              for (int j = 0; j < kVecs; ++j) sum[r][j] -= load_sums(start + j * kLanes);
            }
          }
        }
#endif
      }
      // Neighbouring taps are one run of words where nothing lies between them.
      const std::int64_t together =
          alike && pass.tap_bytes == 4 * pass.tap_words ? taps.columns[1] - taps.columns[0] : 1;
      const std::uint8_t* from[kRows];
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) from[r] = rows[r].window;
      for (std::int64_t y = taps.rows[0]; y < taps.rows[1]; ++y) {
        for (std::int64_t x = taps.columns[0]; x < taps.columns[1]; x += together) {
          const std::int64_t at = y * pass.tap_line_bytes + x * pass.tap_bytes + columns.operand;
          if (!alike) {
            const std::uint8_t* const outside =
                at_offset(pass.padding_value + columns.operand, -at);
            for (int r = 0; r < kRows; ++r) {
              from[r] = has(pass.borders[rows[r].border], y, x) ? rows[r].window : outside;
            }
          }
          const std::int64_t word = (y * window.kernel[1] + x) * pass.tap_words;
          accumulate(sum, from, at, together * pass.tap_words,
                     columns.weights[p] + word * columns.pitch, columns.pitch, ahead[p]);
        }
      }
    }
    finish(sum, shared, columns, all_rows[0]);
  }
};

using ConvTiles = Tiles<decltype(&ConvTile<1, 1>::run), ConvTile>;

// Of up to kTileRows rows.
ISA_INLINE void multiply_tile(TileState&, std::int64_t rows, std::int64_t width,
                              const Shared& shared, const QuantizedColumns& columns,
                              const Row* const (&all_rows)[2], Lines (&ahead)[2]) {
  ConvTiles::at(rows, width)(shared, columns, all_rows, ahead);
}
#endif

// A tile of which not all columns are channels of the result and of the residual, which may lie
// unevenly, by way of rows that have them all: the first `valid` are the result's, the first
// `added` the residual's.
ISA inline __attribute__((noinline)) void multiply_part(TileState& state, std::int64_t count,
                                                        std::int64_t width, const Shared& shared,
                                                        const QuantizedColumns& columns,
                                                        std::int64_t valid, std::int64_t added,
                                                        const Row* const (&all_rows)[2],
                                                        Lines (&ahead)[2]) {
  std::uint8_t out[kTileRows * kTileColumns], residual[kTileRows * kTileColumns] = {};
  Row rows[kTileRows];
  count = std::min<std::int64_t>(count, kTileRows);
  for (std::int64_t r = 0; r < count; ++r) {
    rows[r] = all_rows[0][r];
    if (added > 0) {
      std::memcpy(residual + r * kTileColumns,
                  columns.residual + shared.op.residual.offset(rows[r].pixel), added);
    }
    rows[r].pixel = r;
  }
  QuantizedColumns whole = columns;
  if (added > 0) whole.residual = residual;
  whole.out = out;
  whole.residual_pitch = whole.out_pitch = kTileColumns;
  multiply_tile(state, count, width, shared, whole, {rows, all_rows[1]}, ahead);
  for (std::int64_t r = 0; r < count; ++r) {
    std::memcpy(columns.out + all_rows[0][r].pixel * columns.out_pitch, out + r * kTileColumns,
                valid);
  }
}

// A strip's weights into L2.
ISA_INLINE void fetch(const Pass& pass, std::int64_t strip) {
  const std::int8_t* const weights = pass.weights + pass.layout.offset(strip);
  const std::int64_t bytes = pass.layout.width(strip) * pass.layout.words() * 4;
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(weights + i, 0, 2);
}

#ifndef ISA_VNNI
constexpr std::int64_t kPreparedBytes = 192 << 10;  // of weights at a time, beside x in L2

// Memory that kTileColumns prepared columns of a pass take, behind whose weights follow what their
// sums begin with, for each tap and together.
ISA_INLINE std::int64_t prepared_bytes_of(const Pass& pass) {
  const std::int64_t starts = (pass.layout.taps + 1) * kTileColumns;
  return pass.layout.words() * kWordBytes +
         starts * static_cast<std::int64_t>(sizeof(std::int32_t));
}

// Prepares the weights of columns for their tiles.
ISA_INLINE void prepare(const Pass& pass, int p, QuantizedColumns& columns, std::int8_t* memory) {
  const std::int64_t taps = pass.layout.taps, tap_bytes = pass.tap_words * kWordBytes;
  auto* const tap_start = reinterpret_cast<std::int32_t*>(memory + taps * tap_bytes);
  std::int32_t* const start = tap_start + taps * kTileColumns;
  std::copy_n(columns.start[p], kTileColumns, start);
  for (std::int64_t tap = 0; tap < taps; ++tap) {
    std::int32_t* const own = tap_start + tap * kTileColumns;
    prepare(columns.weights[p] + tap * pass.tap_words * columns.pitch, columns.pitch,
            pass.tap_words, memory + tap * tap_bytes, own);
    for (int j = 0; j < kTileColumns; ++j) start[j] += own[j];
  }
  columns.weights[p] = memory;
  columns.start[p] = start;
  columns.tap_start[p] = tap_start;
}
#endif

#ifndef ISA_VNNI
#include "quantized_winograd_tile.h"
#endif

ISA void quantized_conv_task(const Shared& shared, std::int64_t pixel_task,
                             std::int64_t strip_task) {
  const std::int64_t begin = pixel_task * shared.pixels() / shared.pixel_tasks;
  const std::int64_t end = (pixel_task + 1) * shared.pixels() / shared.pixel_tasks;
  const std::int64_t count = end - begin;
  const std::int64_t row_bytes =
      round_up(shared.count * count * static_cast<std::int64_t>(sizeof(Row)), 64);
#ifdef ISA_VNNI
  constexpr std::int64_t at_once = kQuantizedStrip, prepared_bytes = 0;
#else
  // Columns whose weights are prepared at a time: few where sums are long.
  std::int64_t bytes = prepared_bytes_of(shared.passes[0]);
  if (shared.count == 2) bytes += prepared_bytes_of(shared.passes[1]);
  const std::int64_t at_once = std::clamp(kPreparedBytes / bytes * kTileColumns,
                                          std::int64_t{kTileColumns}, kQuantizedStrip);
  const std::int64_t prepared_bytes = at_once / kTileColumns * bytes;
#endif
  auto* const memory = reinterpret_cast<Row*>(thread_scratch(2).floats(
      (row_bytes + prepared_bytes) / static_cast<std::int64_t>(sizeof(float))));
  Row* const all_rows[2] = {memory, memory + count};
  shared.fill_rows(begin, end, all_rows);
  TileState state;

  const QuantizedConv& op = shared.op;
  const Residual& residual = op.residual;
  const PackedWeights& layout = shared.passes[0].layout;
  const std::int64_t first_strip = strip_task * layout.strips() / shared.strip_tasks;
  const std::int64_t last_strip = (strip_task + 1) * layout.strips() / shared.strip_tasks;
  for (std::int64_t strip = first_strip; strip < last_strip; ++strip) {
    const std::int64_t width = layout.width(strip), column = layout.column(strip);
    const std::int64_t first = layout.block(strip) * layout.out_channels + column;
    Lines next[2];
    QuantizedColumns all_columns[kQuantizedStrip / kTileColumns];
    for (int p = 0; p < shared.count; ++p) {
      const Pass& pass = shared.passes[p];
      if (strip == first_strip) fetch(pass, strip);
      if (strip + 1 < last_strip) {
        next[p] = {reinterpret_cast<const char*>(pass.weights + pass.layout.offset(strip + 1)),
                   pass.layout.width(strip + 1) * pass.layout.words() / 16};
      }
    }
    for (std::int64_t j = 0; j < width; j += kTileColumns) {
      all_columns[j / kTileColumns] = columns_at(shared, strip, j);
    }
    for (std::int64_t part = 0; part < width; part += at_once) {
#ifndef ISA_VNNI
      auto* to = reinterpret_cast<std::int8_t*>(memory) + row_bytes;
      for (std::int64_t j = part; j < std::min(part + at_once, width); j += kTileColumns) {
        QuantizedColumns& columns = all_columns[j / kTileColumns];
        for (int p = 0; p < shared.count; ++p) {
          prepare(shared.passes[p], p, columns, to);
          to += prepared_bytes_of(shared.passes[p]);
        }
        columns.pitch = kWordBytes;
      }
#endif
      for (std::int64_t block = 0; block < count; block += kBlockRows) {
        for (std::int64_t j = part; j < std::min(part + at_once, width); j += kTileColumns) {
          const QuantizedColumns& columns = all_columns[j / kTileColumns];
          const std::int64_t wide = std::min<std::int64_t>(width - j, kTileColumns);
          const std::int64_t valid = std::min(layout.out_channels - column - j, wide);
          const std::int64_t added =
              std::clamp<std::int64_t>(residual.channels - first - j, 0, wide);
          const bool whole = valid == wide && (added == 0 || (added == wide && residual.in_line()));
          for (std::int64_t i = block; i < std::min(block + kBlockRows, count); i += kTileRows) {
            const Row* const rows[2] = {all_rows[0] + i, all_rows[1] + i};
            if (whole) {
              multiply_tile(state, count - i, width - j, shared, columns, rows, next);
            } else {
              multiply_part(state, count - i, width - j, shared, columns, valid, added, rows, next);
            }
          }
        }
      }
    }
  }
}
