// The vector code of quantized_head.cpp, included once per instruction set by for_each_isa.h.
#include "quantized_dot.h"

ISA void pool_task(const HeadPass& pass, std::int64_t image, std::int64_t first,
                   std::int64_t last) {
  const Activations& x = pass.op.x;
  const Sums offset = splat(std::int32_t{x.is_signed ? 128 : 0});
  for (std::int64_t c = first; c < last; c += kLanes) {
    const std::uint8_t* from = x.data + image * pass.pixels * x.channels + c;
    Sums total = {};
    for (std::int64_t pixel = 0; pixel < pass.pixels; ++pixel, from += x.channels) {
      total += load_bytes(from, x.is_signed, last - c) + offset;
    }
    std::uint8_t* to = pass.plane_rows + image * pass.planes * pass.row_bytes + c;
    for (std::int64_t plane = 0; plane < pass.planes; ++plane, to += pass.row_bytes) {
      store_bytes(to, total & 255, false);
      total >>= 8;
    }
  }
}

// Products of some planes' rows with some columns of weights.
template <int kRows, int kVecs>
struct HeadTile {
  ISA static void run(const HeadPass& pass, std::int64_t row, const Columns& columns,
                      std::int32_t* to, std::int64_t pitch) {
    Sums sum[kRows][kVecs];
    begin(sum, columns.start);
    const std::uint8_t* at[kRows];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) at[r] = pass.plane_rows + (row + r) * pass.row_bytes;
    Lines none;
    accumulate(sum, at, 0, pass.layout.words(), columns.weights, columns.pitch, none);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r, to += pitch) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) store_sums(to + j * kLanes, sum[r][j]);
    }
  }
};

using HeadTiles = Tiles<decltype(&HeadTile<1, 1>::run), HeadTile>;

// sums (batch * planes, width of the strip)
ISA void multiply_task(const HeadPass& pass, std::int64_t strip, std::int32_t* sums) {
  const std::int64_t rows = pass.op.x.batch * pass.planes, width = pass.layout.width(strip);
  const auto* const weights =
      static_cast<const std::int8_t*>(pass.op.packed) + pass.layout.offset(strip);
  const std::int64_t words = pass.layout.words();
  constexpr std::int32_t kZeros[kTileColumns] = {};
  auto* const memory =
      reinterpret_cast<std::int8_t*>(thread_scratch(0).floats(columns_bytes(words) / 4));
  for (std::int64_t j = 0; j < width; j += kTileColumns) {
    const Columns columns = columns_of(weights + j * 4, width * 4, words, kZeros, memory);
    for (std::int64_t row = 0; row < rows; row += kTileRows) {
      HeadTiles::at(rows - row, width - j)(pass, row, columns, sums + row * width + j, width);
    }
  }
}
