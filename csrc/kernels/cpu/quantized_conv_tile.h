// The vector code of quantized_conv.cpp, included once per instruction set by for_each_isa.h.
#include "quantized_dot.h"

// The columns of a tile: kTileColumns or what is left of a strip.
struct QuantizedColumns {
  const std::int8_t* weights;
  std::int64_t pitch;         // bytes from one word's weights to the next's
  std::int64_t operand;       // the block's first channel of x
  const std::int32_t* start;  // of each column's sum
};

// The sums of a tile and, of the projection, those that are to be added: rows of kTileColumns.
struct TileSums {
  alignas(64) std::int32_t sums[kTileRows * kTileColumns];
  alignas(64) std::int32_t projected[kTileRows * kTileColumns];
};

// A tile whose sums are complete, and its place in the result.
struct QuantizedResult {
  const QuantizedConv* op = nullptr;
  const TileSums* tile = nullptr;
  const float *scale = nullptr, *shortcut_scale = nullptr;  // of its first column, as what follows
  const std::uint8_t* residual = nullptr;
  std::uint8_t* out = nullptr;
  const Row* row = nullptr;         // the first one
  std::int64_t next = 0, rows = 0;  // those that are still to be stored
  std::int64_t ahead = 0;           // from each row to one whose memory is fetched meanwhile
};

// What is to be added to some of a tile's sums, before it is rescaled.
ISA_INLINE Sums shortcut_at(const QuantizedResult& result, std::int64_t row, std::int64_t column,
                            std::int64_t left) {
  const QuantizedConv& op = *result.op;
  if (op.projected) return load_sums(result.tile->projected + row * kTileColumns + column);
  const std::int64_t offset = op.residual.offset(result.row[row].pixel);
  return load_bytes(result.residual + offset + column, op.residual_is_signed, left);
}

// The next row of a tile of kTileColumns columns, all of which are channels of the result and of
// the residual, whose pixels follow each other evenly.
template <int kVecs>
ISA_INLINE void finish_row(QuantizedResult& result) {
  const QuantizedConv& op = *result.op;
  const std::int64_t row = result.next++;
  const std::int32_t* const from = result.tile->sums + row * kTileColumns;
  const Vec most = splat(op.relu ? 255.0f : 127.0f);
  Sums sums[kVecs];
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) sums[j] = load_sums(from + j * kLanes);
  if (op.projected) {
    const std::int32_t* const added = result.tile->projected + row * kTileColumns;
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      const Vec scale = load(result.shortcut_scale + j * kLanes);
      sums[j] += rounded(to_float(load_sums(added + j * kLanes)) * scale);
    }
  } else if (result.residual != nullptr) {
    const std::uint8_t* const added = result.residual + result.row[row].pixel * op.residual.pixel;
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      const Vec scale = load(result.shortcut_scale + j * kLanes);
      sums[j] += rounded(to_float(load_bytes(added + j * kLanes, op.residual_is_signed)) * scale);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) {
    sums[j] = requantised(sums[j], load(result.scale + j * kLanes), most);
  }
  store_row(result.out + result.row[row].pixel * op.conv.out_channels, sums, !op.relu);
  const std::int64_t later = result.row[row + result.ahead].pixel;
  __builtin_prefetch(result.out + later * op.conv.out_channels);
  if (result.residual != nullptr) {
    __builtin_prefetch(result.residual + later * op.residual.pixel);
  }
}

ISA inline __attribute__((noinline)) void finish_rows(QuantizedResult& result) {
  while (result.next < result.rows) finish_row<kTileColumns / kLanes>(result);
}

// All rows of any other tile, vector by vector: the first `valid` columns are channels of the
// result, the first `added` of the residual.
ISA inline __attribute__((noinline)) void finish_parts(QuantizedResult& result, std::int64_t valid,
                                                       std::int64_t added) {
  const QuantizedConv& op = *result.op;
  const Vec most = splat(op.relu ? 255.0f : 127.0f);
  for (; result.next < result.rows; ++result.next) {
    std::uint8_t* const to = result.out + result.row[result.next].pixel * op.conv.out_channels;
    for (std::int64_t k = 0; k < valid; k += kLanes) {
      Sums sum = load_sums(result.tile->sums + result.next * kTileColumns + k);
      if (k < added) {
        const Sums shortcut = shortcut_at(result, result.next, k, added - k);
        sum += rounded(to_float(shortcut) * load(result.shortcut_scale + k));
      }
      store_bytes(to + k, requantised(sum, load(result.scale + k), most), !op.relu, valid - k);
    }
  }
}

#ifdef ISA_AMX
#include "quantized_conv_amx.h"
#else
// What of a thread outlives a tile: nothing.
struct TileState {};

// One tile's sums over the window. Meanwhile the tile before it, if there is one, is finished row
// by row: vector units that multiply have others beside them, which round and narrow.
template <int kRows, int kVecs>
struct ConvTile {
  ISA static void run(const Pass& pass, const Row* rows, const QuantizedColumns& columns,
                      std::int32_t* to, QuantizedResult& before, Lines (&ahead)[2]) {
    Sums sum[kRows][kVecs];
    start(sum, columns.start, 0);
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
    }
    // Neighbouring taps are one run of words where nothing lies between them.
    const std::int64_t together =
        alike && pass.tap_bytes == 4 * pass.tap_words ? taps.columns[1] - taps.columns[0] : 1;
    constexpr bool kFinishes = kLanes == 16 && kVecs == 4;
    for (std::int64_t y = taps.rows[0]; y < taps.rows[1]; ++y) {
      for (std::int64_t x = taps.columns[0]; x < taps.columns[1]; x += together) {
        const std::int64_t offset = y * pass.tap_line_bytes + x * pass.tap_bytes + columns.operand;
        const std::uint8_t* at[kRows];
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
          at[r] = alike || has(pass.borders[rows[r].border], y, x)
                      ? at_offset(rows[r].window, offset)
                      : pass.padding_value + columns.operand;
        }
        const std::int8_t* weights =
            columns.weights + (y * window.kernel[1] + x) * pass.tap_words * columns.pitch;
        const std::int64_t words = together * pass.tap_words;
        for (std::int64_t word = 0; word < words;) {
          const bool finishes = kFinishes && before.next < before.rows;
          const std::int64_t count = finishes ? std::min(pass.step, words - word) : words - word;
          accumulate(sum, at, word, count, weights, columns.pitch, ahead[ahead[0].left <= 0]);
          word += count;
          if constexpr (kFinishes) {
            if (finishes) finish_row<kVecs>(before);
          }
        }
      }
    }
    if (before.next < before.rows) finish_rows(before);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) store_sums(to + r * kTileColumns + j * kLanes, sum[r][j]);
    }
  }
};

using ConvTiles = Tiles<decltype(&ConvTile<1, 1>::run), ConvTile>;

// Of up to kTileRows rows and kTileColumns columns.
ISA_INLINE void multiply_tile(TileState&, std::int64_t row_count, std::int64_t column_count,
                              const Pass& pass, const Row* rows, const QuantizedColumns& columns,
                              std::int32_t* to, QuantizedResult& before, Lines (&ahead)[2]) {
  ConvTiles::at(row_count, column_count)(pass, rows, columns, to, before, ahead);
}
#endif

// A strip's weights into L2.
ISA_INLINE void fetch(const Pass& pass, std::int64_t strip) {
  const std::int8_t* const weights = pass.weights + pass.layout.offset(strip);
  const std::int64_t bytes = pass.layout.width(strip) * pass.layout.words() * 4;
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(weights + i, 0, 2);
}

ISA void quantized_conv_task(const Shared& shared, std::int64_t pixel_task,
                             std::int64_t strip_task) {
  const std::int64_t begin = pixel_task * shared.pixels() / shared.pixel_tasks;
  const std::int64_t end = (pixel_task + 1) * shared.pixels() / shared.pixel_tasks;
  const std::int64_t count = end - begin;
  auto* const memory = reinterpret_cast<Row*>(thread_scratch(2).floats(
      shared.count * count * static_cast<std::int64_t>(sizeof(Row) / sizeof(float))));
  Row* const all_rows[2] = {memory, memory + count};
  shared.fill_rows(begin, end, all_rows);
  TileSums tile;
  TileState state;
  QuantizedResult result;
  result.op = &shared.op;
  result.tile = &tile;

  const QuantizedConv& op = shared.op;
  const Residual& residual = op.residual;
  const PackedWeights& layout = shared.passes[0].layout;
  const std::int64_t first_strip = strip_task * layout.strips() / shared.strip_tasks;
  const std::int64_t last_strip = (strip_task + 1) * layout.strips() / shared.strip_tasks;
  for (std::int64_t strip = first_strip; strip < last_strip; ++strip) {
    const std::int64_t width = layout.width(strip), column = layout.column(strip);
    const std::int64_t first = layout.block(strip) * layout.out_channels + column;
    const std::int64_t operand = layout.block(strip) * layout.in_channels;
    Lines next[2];
    for (int i = 0; i < shared.count; ++i) {
      const Pass& pass = shared.passes[i];
      const std::int64_t after = std::min(strip + 1, last_strip - 1);
      next[i].next = reinterpret_cast<const char*>(pass.weights + pass.layout.offset(after));
      if (strip == first_strip) fetch(pass, strip);
      if (after > strip) next[i].left = pass.layout.width(after) * pass.layout.words() / 16;
    }
    for (std::int64_t i = 0; i < count; i += kTileRows) {
      const std::int64_t rows_left = count - i;
      const std::int64_t tiles_left = ceil_div(rows_left, kTileRows);
      for (std::int64_t j = 0; j < width; j += kTileColumns) {
        for (int p = shared.count - 1; p >= 0; --p) {
          const Pass& pass = shared.passes[p];
          const Row* const rows = all_rows[p] + i;
          // The next tile's x, in the first round, and this tile's share of the next weights.
          Lines ahead[2] = {{}, {next[p].next, ceil_div(next[p].left, tiles_left)}};
          if (pass.pointwise && strip == first_strip && rows_left > kTileRows) {
            ahead[0] = {reinterpret_cast<const char*>(rows[kTileRows].window),
                        kTileRows * pass.pixel_bytes / 64};
          }
          const std::int64_t wanted = ahead[1].left;
          const QuantizedColumns columns{pass.weights + pass.layout.offset(strip) + j * 4,
                                         width * 4, operand, pass.start + first + j};
          multiply_tile(state, rows_left, width - j, pass, rows, columns,
                        p == 0 ? tile.sums : tile.projected, result, ahead);
          next[p] = {ahead[1].next, next[p].left - (wanted - ahead[1].left)};
        }
        const std::int64_t wide = std::min<std::int64_t>(width - j, kTileColumns);
        const std::int64_t valid = std::min(layout.out_channels - column - j, wide);
        const std::int64_t added =
            op.projected ? valid : std::clamp<std::int64_t>(residual.channels - first - j, 0, wide);
        result.scale = shared.passes[0].scale + first + j;
        result.shortcut_scale = shared.passes[1].scale + first + j;
        result.residual =
            added > 0 ? static_cast<const std::uint8_t*>(residual.data) + first + j : nullptr;
        result.out = static_cast<std::uint8_t*>(op.out) + first + j;
        result.next = 0;
        result.rows = std::min<std::int64_t>(rows_left, kTileRows);
        result.row = all_rows[0] + i;
        // The one after that which is multiplied while this one is finished.
        result.ahead = rows_left >= 3 * kTileRows ? 2 * kTileRows : 0;
        const bool whole = valid == kTileColumns && (op.projected || added == 0 ||
                                                     (added == kTileColumns && residual.in_line()));
        if (!whole) {
          finish_parts(result, valid, added);
        } else if (kLanes != 16) {
          finish_rows(result);
        }
      }
    }
  }
  finish_rows(result);
}
