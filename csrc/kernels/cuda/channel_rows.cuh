// What kernels for sm_90a share whose products have 64 output channels as rows and pixels as
// columns: a lane's channels, weights in registers, and values as rows of pixels in shared memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cuda/conv_sm90.cuh"
#include "kernels/cuda/epilogue.cuh"

namespace resnet_fused {

// Of a warpgroup's 64 channels a lane holds row(0) and row(1), in every product.
__device__ __forceinline__ int row(int half) {
  return threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4 + 8 * half;
}

// A lane's two channels, from `first` on; nothing of those that there are not.
struct Channels {
  ScaleShift of[2];
  bool exist[2];
};

__device__ __forceinline__ Channels channels_of(const BatchNorm& bn, int first, int count) {
  Channels channels;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int channel = first + row(half);
    channels.exist[half] = channel < count;
    if (channels.exist[half]) channels.of[half] = scale_shift_of(bn, channel);
  }
  return channels;
}

constexpr int kDepths = 4;  // products of depth 16 in a panel, 64 channels

// A lane's part of 64 x 16 weights, wgmma's operand A: `from` is that of channel 0, their rows lie
// `stride` elements apart, and `rows` and `depth` of them are there; zeros beyond.
template <typename T>
__device__ __forceinline__ void load_weights(std::uint32_t (&to)[4], const void* from,
                                             std::int64_t stride, int rows, int depth) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int k = threadIdx.x % 4 * 2 + i / 2 * 8;
    to[i] = 0;
    if (row(i % 2) < rows && k < depth) {
      to[i] = ptx::load_global(reinterpret_cast<const std::uint32_t*>(static_cast<const T*>(from) +
                                                                      row(i % 2) * stride + k));
    }
  }
}

// Those of 64 x 64.
template <typename T>
__device__ __forceinline__ void load_weights(std::uint32_t (&to)[kDepths][4], const void* from,
                                             std::int64_t stride, int rows, int depth) {
#pragma unroll
  for (int k = 0; k < kDepths; ++k) {
    load_weights<T>(to[k], static_cast<const T*>(from) + 16 * k, stride, rows, depth - 16 * k);
  }
}

// Where the lane's row of the first matrices lies, for ldmatrix and stmatrix, of a panel that
// begins at `line`: a warp's 16 channels of 8 pixels, twice.
__device__ __forceinline__ std::uint32_t matrix_row(std::uint32_t line) {
  const int lane = threadIdx.x % 32;
  const std::uint32_t pixel = line + (lane / 16 * 8 + lane % 8) * kRowBytes;
  const unsigned chunk = threadIdx.x % kWarpgroup / 32 * 2 + lane / 8 % 2;
  return pixel + (chunk ^ pixel / kRowBytes % 8) * 16;
}

// 16-bit values of a lane's channels, of two neighbouring pixels in each run of 8.
template <int kRuns>
using Pairs = std::uint32_t[kRuns][2];

// The pixels of a panel from row `halo` on, of an odd number of runs; behind the last one comes the
// last one again.
template <int kRuns>
__device__ __forceinline__ void load_pairs(Pairs<kRuns>& pairs, std::uint32_t line, int halo) {
  static_assert(kRuns % 2 == 1);
  const std::uint32_t from = matrix_row(line + halo * kRowBytes);
#pragma unroll
  for (int j = 0; j + 1 < kRuns; j += 2) {
    std::uint32_t loaded[4];
    ptx::ldmatrix_trans(loaded, from + j * 8 * kRowBytes);
#pragma unroll
    for (int k = 0; k < 4; ++k) pairs[j + k / 2][k % 2] = loaded[k];
  }
  const bool beyond = threadIdx.x % 8 + halo == 8;
  ptx::ldmatrix_trans(pairs[kRuns - 1], beyond ? matrix_row(line) + (kRuns - 1) * 8 * kRowBytes
                                               : from + (kRuns - 1) * 8 * kRowBytes);
}

// Stores kRuns runs of 8 pixels of a warp's 16 channels as rows of a panel: `pair(j, half)` is what
// the lane has of run j. `moved(j)`: by how many rows, a multiple of 8, the row that the lane names
// of runs j and j + 1 lies behind its pixel's place.
template <int kRuns, typename Pair, typename Moved>
__device__ __forceinline__ void store_line(std::uint32_t line, Pair pair, Moved moved) {
  const std::uint32_t to = matrix_row(line);
#pragma unroll
  for (int j = 0; j + 1 < kRuns; j += 2) {
    ptx::stmatrix_trans<4>(to + (j * 8 + moved(j)) * kRowBytes,
                           {pair(j, 0), pair(j, 1), pair(j + 1, 0), pair(j + 1, 1)});
  }
  if constexpr (kRuns % 2 == 1) {
    ptx::stmatrix_trans<2>(to + ((kRuns - 1) * 8 + moved(kRuns - 1)) * kRowBytes,
                           {pair(kRuns - 1, 0), pair(kRuns - 1, 1)});
  }
}
template <int kRuns, typename Pair>
__device__ __forceinline__ void store_line(std::uint32_t line, Pair pair) {
  store_line<kRuns>(line, pair, [](int) { return 0; });
}

template <typename T>
__device__ __forceinline__ std::uint32_t bits_of(const Pack<T, 2>& pair) {
  std::uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// Batch norm, ReLU where there is one and rounding of two pixels in run j of a product; zeros of
// channels that there are not, which would otherwise be NaN where x is not finite.
template <typename T, int kValues>
__device__ __forceinline__ std::uint32_t finish(const float (&acc)[kValues], int j, int half,
                                                const Channels& channels,
                                                const Epilogue<T>& epilogue = Epilogue<T>(true)) {
  float y[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    y[e] = Epilogue<T>::normalise(acc[4 * j + 2 * half + e], channels.of[half]);
  }
  return channels.exist[half] ? bits_of(epilogue.pack(y)) : 0;
}

}  // namespace resnet_fused
