// The vector code of quantized_conv.cpp, included once per instruction set by for_each_isa.h.
#include "quantized_dot.h"

// What a tile's sums become.
enum class QuantizedEnd {
  kResult,    // rne(sum * scale), clamped to 8 bits
  kResidual,  // the same with the residual added before, whose pixels follow each other evenly
  kParts,     // the same, where not all columns are channels of the result or of the residual
  kKeep,      // rne(sum * scale) + the start of the next pass's sums, kept for it
};

// The columns of a tile: kTileColumns or what is left of a strip.
struct QuantizedColumns {
  const std::int8_t* weights;
  std::int64_t pitch;         // bytes from one word's weights to the next's
  std::int64_t first;         // the first one's number among all output channels
  std::int64_t valid;         // how many are output channels
  std::int64_t operand;       // the block's first channel of x
  const std::int32_t* start;  // of the sums: of all rows, or row by row
  std::int64_t start_pitch;
  QuantizedEnd end;
};

constexpr std::int64_t kKeptPitch = kQuantizedStrip;

// The sums with the residual added, vector by vector, where some of a tile's columns are no output
// channels or have no residual.
ISA inline __attribute__((noinline)) void finish_parts(const std::int32_t* sums, std::int64_t rows,
                                                       std::int64_t vecs, const Shared& shared,
                                                       const Row* row,
                                                       const QuantizedColumns& columns) {
  const QuantizedConv& op = shared.op;
  const Vec most = splat(op.relu ? 255.0f : 127.0f);
  for (std::int64_t r = 0; r < rows; ++r, ++row) {
    for (std::int64_t k = 0; k < vecs * kLanes; k += kLanes, sums += kLanes) {
      const std::int64_t channel = columns.first + k;
      if (k >= columns.valid) continue;
      Sums sum = load_sums(sums);
      if (const std::int64_t left = op.residual.channels - channel; left > 0) {
        const auto* const from = static_cast<const std::uint8_t*>(op.residual.data) +
                                 op.residual.offset(row->pixel) + channel;
        const Sums added = load_bytes(from, op.residual_is_signed, left);
        sum += rounded(to_float(added) * load(shared.passes[1].scale + channel));
      }
      sum = requantised(sum, load(shared.passes[0].scale + channel), most);
      store_bytes(static_cast<std::uint8_t*>(op.out) + row->pixel * op.conv.out_channels + channel,
                  sum, !op.relu, columns.valid - k);
    }
  }
}

template <int kRows, int kVecs>
ISA_INLINE void finish(Sums (&sum)[kRows][kVecs], const Shared& shared, const Pass& pass,
                       const Row* rows, const QuantizedColumns& columns, std::int32_t* kept) {
  const QuantizedConv& op = shared.op;
  const float* const scale = pass.scale + columns.first;
  if (columns.end == QuantizedEnd::kKeep) {
    const std::int32_t* const start = shared.passes[0].start + columns.first;
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const int k = j * kLanes;
        store_sums(kept + r * kKeptPitch + k,
                   rounded(to_float(sum[r][j]) * load(scale + k)) + load_sums(start + k));
      }
    }
    return;
  }
  if (columns.end == QuantizedEnd::kParts) {
    std::int32_t sums[kRows * kVecs * kLanes];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) store_sums(sums + (r * kVecs + j) * kLanes, sum[r][j]);
    }
    return finish_parts(sums, kRows, kVecs, shared, rows, columns);
  }
  const Vec most = splat(op.relu ? 255.0f : 127.0f);
  auto* const out = static_cast<std::uint8_t*>(op.out) + columns.first;
  if (columns.end == QuantizedEnd::kResidual) {
    const auto* const residual = static_cast<const std::uint8_t*>(op.residual.data) + columns.first;
    const float* const residual_scale = shared.passes[1].scale + columns.first;
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const std::uint8_t* const from = residual + rows[r].pixel * op.residual.pixel;
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const int k = j * kLanes;
        const Sums added = load_bytes(from + k, op.residual_is_signed);
        sum[r][j] += rounded(to_float(added) * load(residual_scale + k));
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      sum[r][j] = requantised(sum[r][j], load(scale + j * kLanes), most);
    }
    store_row(out + rows[r].pixel * op.conv.out_channels, sum[r], !op.relu);
  }
}

// One tile's sums over the window, and the epilogue.
template <int kRows, int kVecs>
ISA_INLINE void multiply(const Shared& shared, const Pass& pass, const Row* rows,
                         const QuantizedColumns& columns, std::int32_t* kept, Lines& ahead) {
  Sums sum[kRows][kVecs];
  start(sum, columns.start, columns.start_pitch);
  const Sums flip = splat(pass.flip);
  const Window& window = pass.window;

  // The taps to take, and whether all of them are inside the image for all rows.
  Taps taps = pass.borders[rows[0].border];
  bool alike = true;
  for (int r = 1; r < kRows; ++r) alike &= rows[r].border == rows[0].border;
  if (!pass.skips) {
    alike &= taps.rows[1] - taps.rows[0] == window.kernel[0] &&
             taps.columns[1] - taps.columns[0] == window.kernel[1];
    taps = {{0, window.kernel[0]}, {0, window.kernel[1]}};
  } else if (!alike) {
    for (int r = 1; r < kRows; ++r) {
      const Taps& other = pass.borders[rows[r].border];
      taps.rows[0] = std::min(taps.rows[0], other.rows[0]);
      taps.rows[1] = std::max(taps.rows[1], other.rows[1]);
      taps.columns[0] = std::min(taps.columns[0], other.columns[0]);
      taps.columns[1] = std::max(taps.columns[1], other.columns[1]);
    }
  }
  const std::int64_t tap_words = pass.layout.tap_words();
  const std::int64_t tap_bytes = window.dilation[1] * pass.pixel_bytes;
  // Neighbouring taps are one run of words where nothing lies between them.
  const std::int64_t together =
      alike && tap_bytes == 4 * tap_words ? taps.columns[1] - taps.columns[0] : 1;
  for (std::int64_t y = taps.rows[0]; y < taps.rows[1]; ++y) {
    const std::int64_t line = y * window.dilation[0] * pass.line_bytes + columns.operand;
    for (std::int64_t x = taps.columns[0]; x < taps.columns[1]; x += together) {
      const std::int64_t offset = line + x * tap_bytes;
      const std::uint8_t* at[kRows];
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        bool inside = alike;
        if (!alike) {
          const Taps& own = pass.borders[rows[r].border];
          inside = y >= own.rows[0] && y < own.rows[1] && x >= own.columns[0] && x < own.columns[1];
        }
        at[r] = inside ? reinterpret_cast<const std::uint8_t*>(
                             reinterpret_cast<std::uintptr_t>(rows[r].window) + offset)
                       : pass.padding_value + columns.operand;
      }
      const std::int8_t* weights =
          columns.weights + (y * window.kernel[1] + x) * tap_words * columns.pitch;
      accumulate(sum, at, together * tap_words, weights, columns.pitch, flip, ahead);
    }
  }
  finish(sum, shared, pass, rows, columns, kept);
}

template <int kRows, int kVecs>
struct ConvTile {
  ISA static void run(const Shared& shared, const Pass& pass, const Row* rows,
                      const QuantizedColumns& columns, std::int32_t* kept, Lines& ahead) {
    multiply<kRows, kVecs>(shared, pass, rows, columns, kept, ahead);
  }
};

using ConvTiles = Tiles<decltype(&ConvTile<1, 1>::run), ConvTile>;

ISA_INLINE QuantizedEnd end_of(const QuantizedConv& op, const QuantizedColumns& columns,
                               std::int64_t width) {
  const std::int64_t wide = std::min<std::int64_t>(width, kTileColumns);
  const std::int64_t left = op.residual.channels - columns.first;
  if (columns.valid < wide) return QuantizedEnd::kParts;
  if (left <= 0) return QuantizedEnd::kResult;
  return left >= wide && op.residual.in_line() ? QuantizedEnd::kResidual : QuantizedEnd::kParts;
}

ISA void quantized_conv_task(const Shared& shared, std::int64_t pixel_task,
                             std::int64_t strip_task) {
  const std::int64_t begin = pixel_task * shared.pixels() / shared.pixel_tasks;
  const std::int64_t end = (pixel_task + 1) * shared.pixels() / shared.pixel_tasks;
  const std::int64_t count = end - begin;
  Row* all_rows[2] = {};
  if (!shared.pointwise) {
    auto* const memory = reinterpret_cast<Row*>(thread_scratch(2).floats(
        shared.count * count * static_cast<std::int64_t>(sizeof(Row) / sizeof(float))));
    all_rows[0] = memory;
    all_rows[1] = memory + count;
    shared.fill_rows(begin, end, {all_rows[0], all_rows[1]});
  }
  alignas(64) std::int32_t kept[kTileRows * kKeptPitch];

  const QuantizedConv& op = shared.op;
  const std::int64_t strips = shared.passes[0].layout.strips();
  const std::int64_t first_strip = strip_task * strips / shared.strip_tasks;
  const std::int64_t last_strip = (strip_task + 1) * strips / shared.strip_tasks;
  for (std::int64_t strip = first_strip; strip < last_strip; ++strip) {
    Lines next[2];
    for (int i = 0; i < shared.count; ++i) {
      const Pass& pass = shared.passes[i];
      const std::int64_t after = std::min(strip + 1, last_strip - 1);
      next[i].next = reinterpret_cast<const char*>(pass.weights + pass.layout.offset(after));
      if (after > strip) next[i].left = pass.layout.width(after) * pass.layout.words() / 16;
    }
    for (std::int64_t i = 0; i < count; i += kTileRows) {
      const std::int64_t tile_rows = std::min<std::int64_t>(count - i, kTileRows);
      const std::int64_t tiles_left = ceil_div(count - i, kTileRows);
      for (int pass_index = shared.count - 1; pass_index >= 0; --pass_index) {
        const Pass& pass = shared.passes[pass_index];
        const PackedWeights& layout = pass.layout;
        Row pointwise_rows[kTileRows];
        const Row* rows = all_rows[pass_index] + i;
        if (shared.pointwise) {
          for (int r = 0; r < kTileRows; ++r) {
            const std::int64_t pixel = begin + i + r;
            pointwise_rows[r] = {pass.x + pixel * pass.pixel_bytes, pixel, 0};
          }
          rows = pointwise_rows;
        }
        const std::int64_t width = layout.width(strip), column = layout.column(strip);
        const std::int64_t first = layout.block(strip) * layout.out_channels + column;
        Lines ahead{next[pass_index].next, ceil_div(next[pass_index].left, tiles_left)};
        const Lines before = ahead;
        for (std::int64_t j = 0; j < width; j += kTileColumns) {
          QuantizedColumns columns;
          columns.pitch = width * 4;
          columns.weights = pass.weights + layout.offset(strip) + j * 4;
          columns.first = first + j;
          columns.valid = std::min(layout.out_channels - column - j, kQuantizedStrip);
          columns.operand = layout.block(strip) * layout.in_channels;
          const bool continues = pass_index == 0 && shared.count == 2;
          columns.start = continues ? kept + j : pass.start + columns.first;
          columns.start_pitch = continues ? kKeptPitch : 0;
          columns.end = pass_index == 1 ? QuantizedEnd::kKeep : end_of(op, columns, width - j);
          ConvTiles::at(tile_rows, width - j)(shared, pass, rows, columns, kept + j, ahead);
        }
        next[pass_index].left -= before.left - ahead.left;
        next[pass_index].next = ahead.next;
      }
    }
  }
}
