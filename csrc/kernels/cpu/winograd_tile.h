// The vector code of winograd.cpp, included once per instruction set by for_each_isa.h.
#include "vec.h"

// Where tile number `tile` lies: image, and first output row and column.
struct TilePlace {
  std::int64_t image, row, column;
};

ISA_INLINE TilePlace place_of(const Plan& plan, std::int64_t tile) {
  const std::int64_t row = tile / plan.tile_columns;
  return {row / plan.tile_rows, row % plan.tile_rows * 2, tile % plan.tile_columns * 2};
}

// V = B^T d B for `count` (a whole vector or the last, partial one) channels of one tile.
ISA_INLINE void transform_input(const float* const pixels[16], std::int64_t c, std::int64_t count,
                                float* v, std::int64_t plane) {
  Vec half[4][4];  // B^T d
  for (int j = 0; j < 4; ++j) {
    const Vec d0 = load(pixels[j] + c, count), d1 = load(pixels[4 + j] + c, count);
    const Vec d2 = load(pixels[8 + j] + c, count), d3 = load(pixels[12 + j] + c, count);
    half[0][j] = d0 - d2;
    half[1][j] = d1 + d2;
    half[2][j] = d2 - d1;
    half[3][j] = d1 - d3;
  }
  for (int i = 0; i < 4; ++i) {
    const Vec* h = half[i];
    float* to = v + 4 * i * plane + c;
    store(to, h[0] - h[2]);
    store(to + plane, h[1] + h[2]);
    store(to + 2 * plane, h[2] - h[1]);
    store(to + 3 * plane, h[1] - h[3]);
  }
}

// The 16 pixels of one tile, pixels outside the image read from `zeros`.
ISA_INLINE void transform_tile(const WinogradConv& conv, const TilePlace& at, const float* zeros,
                               float* v, std::int64_t plane) {
  const std::int64_t channels = conv.in_channels;
  const float* pixels[16];
  for (int i = 0; i < 4; ++i) {
    const std::int64_t y = at.row - 1 + i;
    for (int j = 0; j < 4; ++j) {
      const std::int64_t x = at.column - 1 + j;
      const bool inside = y >= 0 && y < conv.height && x >= 0 && x < conv.width;
      pixels[4 * i + j] =
          inside ? conv.x + ((at.image * conv.height + y) * conv.width + x) * channels : zeros;
    }
  }
  std::int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) transform_input(pixels, c, kLanes, v, plane);
  if (c < channels) transform_input(pixels, c, channels - c, v, plane);
}

// m[Rows][Vecs vectors] (+)= v[Rows][depth] * u[depth][Vecs vectors]; m's rows are kBlock apart.
// Fetches a line from `ahead` on with each step.
template <int Rows, int Vecs>
ISA inline __attribute__((noinline)) void multiply(const float* v, std::int64_t v_stride,
                                                   const float* u, std::int64_t u_stride, float* m,
                                                   std::int64_t depth, bool first,
                                                   const float* ahead) {
  Vec sum[Rows][Vecs] = {};
  for (std::int64_t c = 0; c < depth; ++c, ++v, u += u_stride, ahead += kLine) {
    __builtin_prefetch(ahead);
    Vec columns[Vecs];
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) columns[j] = load(u + j * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const Vec element = splat(v[r * v_stride]);
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; ++j) sum[r][j] += element * columns[j];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) {
      float* to = m + r * kBlock + j * kLanes;
      store(to, first ? sum[r][j] : load(to) + sum[r][j]);
    }
  }
}

// All rows of one strip of columns: whole micro-tiles, then the remaining rows.
template <int Vecs>
ISA_INLINE void multiply_rows(std::int64_t rows, const float* v, std::int64_t v_stride,
                              const float* u, std::int64_t u_stride, float* m, std::int64_t depth,
                              bool first) {
  const float* ahead = u + kFetchAhead;
  for (; rows >= kRows; rows -= kRows, v += kRows * v_stride, m += kRows * kBlock) {
    multiply<kRows, Vecs>(v, v_stride, u, u_stride, m, depth, first, ahead);
    ahead += depth * kLine;
  }
  switch (rows) {
    case 5:
      return multiply<5, Vecs>(v, v_stride, u, u_stride, m, depth, first, ahead);
    case 4:
      return multiply<4, Vecs>(v, v_stride, u, u_stride, m, depth, first, ahead);
    case 3:
      return multiply<3, Vecs>(v, v_stride, u, u_stride, m, depth, first, ahead);
    case 2:
      return multiply<2, Vecs>(v, v_stride, u, u_stride, m, depth, first, ahead);
    case 1:
      return multiply<1, Vecs>(v, v_stride, u, u_stride, m, depth, first, ahead);
  }
}

// m = v * u for one of the 16 planes and one block of output channels.
ISA_INLINE void multiply_plane(std::int64_t rows, const float* v, std::int64_t v_stride,
                               const float* u, std::int64_t width, float* m,
                               std::int64_t channels) {
  for (std::int64_t c = 0; c < channels; c += kChunk, v += kChunk, u += kChunk * width) {
    const std::int64_t depth = std::min(kChunk, channels - c);
#if ISA_LANES == 16
    switch (width / 16) {
      case 4:
        multiply_rows<4>(rows, v, v_stride, u, width, m, depth, c == 0);
        break;
      case 3:
        multiply_rows<3>(rows, v, v_stride, u, width, m, depth, c == 0);
        break;
      case 2:
        multiply_rows<2>(rows, v, v_stride, u, width, m, depth, c == 0);
        break;
      case 1:
        multiply_rows<1>(rows, v, v_stride, u, width, m, depth, c == 0);
        break;
    }
#else
    for (std::int64_t k = 0; k < width; k += 16) {
      multiply_rows<16 / kLanes>(rows, v, v_stride, u + k, width, m + k, depth, c == 0);
    }
#endif
  }
}

// Y = A^T M A and the epilogue, for the channels [k, k + count) of one tile.
ISA_INLINE void transform_output(const WinogradConv& conv, const Terms& terms, const TilePlace& at,
                                 const float* m, std::int64_t plane, std::int64_t k,
                                 std::int64_t count) {
  Vec half[2][4];  // A^T M
  for (int j = 0; j < 4; ++j) {
    const Vec m0 = load(m + j * plane), m1 = load(m + (4 + j) * plane);
    const Vec m2 = load(m + (8 + j) * plane), m3 = load(m + (12 + j) * plane);
    half[0][j] = m0 + m1 + m2;
    half[1][j] = m1 - m2 - m3;
  }
  for (int i = 0; i < 2 && at.row + i < conv.height; ++i) {
    const Vec* h = half[i];
    const Vec y[2] = {h[0] + h[1] + h[2], h[1] - h[2] - h[3]};
    for (int j = 0; j < 2 && at.column + j < conv.width; ++j) {
      const std::int64_t pixel = (at.image * conv.height + at.row + i) * conv.width + at.column + j;
      const Residual& residual = conv.residual;
      const Vec added =
          k < residual.channels
              ? load(static_cast<const float*>(residual.data) + residual.offset(pixel) + k,
                     residual.channels - k)
              : Vec{};
      store(conv.out + pixel * conv.out_channels + k,
            normalise(y[j], terms.at(k), added, least_result(conv.relu)), count);
    }
  }
}

ISA void winograd_task(const WinogradConv& conv, const Plan& plan, const Terms& terms,
                       std::int64_t tile_task, std::int64_t block_task) {
  const std::int64_t first_tile = tile_task * plan.tiles_per_task;
  const std::int64_t rows = std::min(plan.tiles_per_task, plan.tiles - first_tile);
  const std::int64_t v_plane = plan.tiles_per_task * plan.padded_channels + kSkew;
  const std::int64_t m_plane = plan.tiles_per_task * kBlock + kSkew;
  float* const v = thread_scratch().floats(16 * (v_plane + m_plane) + plan.padded_channels);
  float* const m = v + 16 * v_plane;
  float* const zeros = m + 16 * m_plane;
  std::fill_n(zeros, plan.padded_channels, 0.0f);

  for (std::int64_t t = 0; t < rows; ++t) {
    transform_tile(conv, place_of(plan, first_tile + t), zeros, v + t * plan.padded_channels,
                   v_plane);
  }
  const std::int64_t k_begin = block_task * plan.blocks_per_task * kBlock;
  const std::int64_t k_end = std::min(conv.out_channels, k_begin + plan.blocks_per_task * kBlock);
  for (std::int64_t k = k_begin; k < k_end; k += kBlock) {
    const std::int64_t width = std::min(kBlock, round_up(conv.out_channels - k, 16));
    const float* const u = conv.packed + 16 * conv.in_channels * k;
    for (int e = 0; e < 16; ++e) {
      multiply_plane(rows, v + e * v_plane, plan.padded_channels, u + e * conv.in_channels * width,
                     width, m + e * m_plane, conv.in_channels);
    }
    for (std::int64_t t = 0; t < rows; ++t) {
      const TilePlace at = place_of(plan, first_tile + t);
      const std::int64_t end = std::min(k_end - k, kBlock);
      for (std::int64_t j = 0; j < end; j += kLanes) {
        transform_output(conv, terms, at, m + t * kBlock + j, m_plane, k + j, end - j);
      }
    }
  }
}
