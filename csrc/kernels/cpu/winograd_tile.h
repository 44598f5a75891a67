// The vector code of winograd.cpp, included once per instruction set by for_each_isa.h.
#include "vec.h"
#include "winograd_input.h"

// Tiles of a micro-kernel, by its vectors of columns: enough sums to hide a product's latency.
constexpr int rows_of(int vecs) { return kLanes < 16 || vecs == 4 ? 6 : vecs == 3 ? 8 : 12; }

// m[kRows][kVecs vectors] (+)= v[kRows][depth] * u[depth][kVecs vectors]; m's rows are `m_stride`
// apart. Fetches a line from `ahead` on with each step.
template <int kVecs, int kRows>
ISA inline __attribute__((noinline)) void multiply(const float* v, std::int64_t v_stride,
                                                   const float* u, std::int64_t u_stride, float* m,
                                                   std::int64_t m_stride, std::int64_t depth,
                                                   bool first, const float* ahead) {
  Vec sum[kRows][kVecs] = {};
  const std::int64_t three = 3 * v_stride, five = 5 * v_stride;
  const float *low = v, *high = v + 2 * three;
  for (std::int64_t c = 0; c < depth; ++c, ++low, ++high, u += u_stride, ahead += kLine) {
    __builtin_prefetch(ahead);
    Vec columns[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) columns[j] = load(u + j * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t offsets[] = {0, v_stride, 2 * v_stride, three, 4 * v_stride, five};
      const Vec element = splat(r < 6 ? low[offsets[r]] : high[offsets[r - 6]]);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sum[r][j] += element * columns[j];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      float* to = m + r * m_stride + j * kLanes;
      store(to, first ? sum[r][j] : load(to) + sum[r][j]);
    }
  }
}

using Multiply = void (*)(const float*, std::int64_t, const float*, std::int64_t, float*,
                          std::int64_t, std::int64_t, bool, const float*);

template <int kVecs, int... Indices>
constexpr std::array<Multiply, sizeof...(Indices)> multiplies(
    std::integer_sequence<int, Indices...>) {
  return {multiply<kVecs, Indices + 1>...};
}

// All rows of one strip of columns, in micro-tiles of equal height.
template <int kVecs>
ISA_INLINE void multiply_rows(std::int64_t rows, const float* v, std::int64_t v_stride,
                              const float* u, std::int64_t u_stride, float* m,
                              std::int64_t m_stride, std::int64_t depth, bool first) {
  static constexpr auto kMultiply =
      multiplies<kVecs>(std::make_integer_sequence<int, rows_of(kVecs)>{});
  const float* ahead = u + kFetchAhead;
  const std::int64_t tiles = ceil_div(rows, rows_of(kVecs));
  for (std::int64_t tile = 0; tile < tiles; ++tile, ahead += depth * kLine) {
    const std::int64_t from = tile * rows / tiles, to = (tile + 1) * rows / tiles;
    kMultiply[to - from - 1](v + from * v_stride, v_stride, u, u_stride, m + from * m_stride,
                             m_stride, depth, first, ahead);
  }
}

// m = v * u for one of the 16 planes and one block of output channels.
ISA_INLINE void multiply_plane(std::int64_t rows, const float* v, std::int64_t v_stride,
                               const float* u, std::int64_t width, float* m,
                               std::int64_t channels) {
  const std::int64_t chunk = kLanes == 8 && channels >= kLongChunk ? kLongChunk : kChunk;
  for (std::int64_t c = 0; c < channels; c += chunk, v += chunk, u += chunk * width) {
    const std::int64_t depth = std::min(chunk, channels - c);
#if ISA_LANES == 16
    switch (width / 16) {
      case 4:
        multiply_rows<4>(rows, v, v_stride, u, width, m, width, depth, c == 0);
        break;
      case 3:
        multiply_rows<3>(rows, v, v_stride, u, width, m, width, depth, c == 0);
        break;
      case 2:
        multiply_rows<2>(rows, v, v_stride, u, width, m, width, depth, c == 0);
        break;
      case 1:
        multiply_rows<1>(rows, v, v_stride, u, width, m, width, depth, c == 0);
        break;
    }
#else
    for (std::int64_t k = 0; k < width; k += 16) {
      multiply_rows<16 / kLanes>(rows, v, v_stride, u + k, width, m + k, width, depth, c == 0);
    }
#endif
  }
}

// The epilogue of one pixel, by one expression: of two, GCC rounds the product that they share.
template <bool kAdds>
ISA_INLINE void finish(const WinogradConv& conv, const NormTerms& terms, Vec least, Vec y,
                       std::int64_t pixel, std::int64_t k, std::int64_t count) {
  if constexpr (kAdds) {
    const Residual& residual = conv.residual;
    const auto* const added = static_cast<const float*>(residual.data) + residual.offset(pixel) + k;
    y = terms.normalise(y, load(added, residual.channels - k));
  } else {
    y = terms.normalise(y);
  }
  store(conv.out + pixel * conv.out_channels + k, at_least(y, least), count);
}

// Y = A^T M A and the epilogue, for the channels [k, k + count) of one tile.
template <bool kAdds>
ISA_INLINE void transform_output(const WinogradConv& conv, const NormTerms& terms, Vec least,
                                 const TilePlace& at, const float* m, std::int64_t plane,
                                 std::int64_t k, std::int64_t count) {
  Vec half[2][4];  // A^T M
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vec m0 = load(m + j * plane), m1 = load(m + (4 + j) * plane);
    const Vec m2 = load(m + (8 + j) * plane), m3 = load(m + (12 + j) * plane);
    half[0][j] = m0 + m1 + m2;
    half[1][j] = m1 - m2 - m3;
  }
  const std::int64_t first = (at.image * conv.height + at.row) * conv.width + at.column;
  const std::int64_t lines = std::min<std::int64_t>(2, conv.height - at.row);
  const bool right = at.column + 1 < conv.width;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    if (i == lines) return;
    const Vec* h = half[i];
    const std::int64_t pixel = first + i * conv.width;
    finish<kAdds>(conv, terms, least, h[0] + h[1] + h[2], pixel, k, count);
    if (right) finish<kAdds>(conv, terms, least, h[1] - h[2] - h[3], pixel + 1, k, count);
  }
}

// The first line of a tile, counted through the batch; its end for a tile beyond the last.
ISA_INLINE std::int64_t line_of(const WinogradConv& conv, const Plan& plan, std::int64_t tile) {
  const TilePlace at = place_of(plan, std::min(tile, plan.tiles));
  return at.image * conv.height + at.row;
}

// The lines of a task's part of a tensor, fetched little by little.
class Fetch {
 public:
  Fetch(const float* tensor, std::int64_t first, std::int64_t end)
      : line_(tensor + first), floats_(std::max<std::int64_t>(end - first, 0)) {}

  // One part of kPlanes, number `i`.
  template <int kWrite>
  ISA_INLINE void part(int i) const {
    for (std::int64_t at = floats_ * i / kPlanes / kLine * kLine,
                      end = floats_ * (i + 1) / kPlanes / kLine * kLine;
         at < end; at += kLine) {
      __builtin_prefetch(line_ + at, kWrite, kWrite ? 3 : 2);
    }
  }

 private:
  const float* line_;
  std::int64_t floats_;
};

ISA void winograd_task(const WinogradConv& conv, const Plan& plan, const Terms& terms,
                       std::int64_t tile_task, std::int64_t block_task) {
  const std::int64_t first_tile = tile_task * plan.tiles_per_task;
  const std::int64_t rows = std::min(plan.tiles_per_task, plan.tiles - first_tile);
  const std::int64_t v_plane = plan.tiles_per_task * plan.padded_channels + kSkew;
  const std::int64_t m_plane = plan.tiles_per_task * plan.widest_block + kSkew;
  float* const v = thread_scratch().floats(kPlanes * (v_plane + m_plane) + plan.padded_channels);
  float* const m = v + kPlanes * v_plane;
  float* const zeros = m + kPlanes * m_plane;
  std::fill_n(zeros, plan.padded_channels, 0.0f);

  const Input x{conv.x, conv.height, conv.width, conv.in_channels, zeros};
  const TilePlace first = place_of(plan, first_tile);
  TilePlace at = first;
  for (std::int64_t t = 0; t < rows; ++t, advance(plan, at)) {
    transform_tile(x, at, 0, conv.in_channels, v + t * plan.padded_channels, v_plane);
  }
  // This task's pixels of the result, and what the next task reads.
  const std::int64_t here = line_of(conv, plan, first_tile) * conv.width;
  const std::int64_t next = line_of(conv, plan, first_tile + rows) * conv.width;
  const Fetch result(conv.out, here * conv.out_channels,
                     plan.block_tasks == 1 ? next * conv.out_channels : 0);
  const Residual& residual = conv.residual;
  const bool adds = residual.channels > 0 && residual.in_line() && plan.block_tasks == 1;
  const Fetch added(static_cast<const float*>(residual.data), here * residual.pixel,
                    adds ? next * residual.pixel : 0);
  const Fetch input(conv.x, next * conv.in_channels,
                    line_of(conv, plan, first_tile + 2 * rows) * conv.width * conv.in_channels);
  const Vec least = least_result(conv.relu);
  const std::int64_t k_begin = block_task * plan.blocks_per_task * kBlock;
  const std::int64_t k_end = std::min(conv.out_channels, k_begin + plan.blocks_per_task * kBlock);
  for (std::int64_t k = k_begin; k < k_end; k += kBlock) {
    const std::int64_t width = std::min(kBlock, round_up(conv.out_channels - k, 16));
    const float* const u = conv.packed + kPlanes * conv.in_channels * k;
    for (int e = 0; e < kPlanes; ++e) {
      if (k == k_begin) {
        result.part<1>(e);
        added.part<0>(e);
        input.part<0>(e);
      }
      multiply_plane(rows, v + e * v_plane, plan.padded_channels, u + e * conv.in_channels * width,
                     width, m + e * m_plane, conv.in_channels);
    }
    const std::int64_t end = std::min(k_end - k, kBlock);
    for (std::int64_t j = 0; j < end; j += kLanes) {
      const NormTerms terms_at(terms.at(k + j), 0);
      at = first;
      for (std::int64_t t = 0; t < rows; ++t, advance(plan, at)) {
        const float* const from = m + t * width + j;
        if (k + j < conv.residual.channels) {
          transform_output<true>(conv, terms_at, least, at, from, m_plane, k + j, end - j);
        } else {
          transform_output<false>(conv, terms_at, least, at, from, m_plane, k + j, end - j);
        }
      }
    }
  }
}
