// What kernels for sm_90a share whose products have 64 output channels as rows and pixels as
// columns: a lane's channels, and their values as rows of pixels in shared memory.
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

// Where the lane's row of the first matrices lies, for ldmatrix and stmatrix, of a panel that
// begins at `line`: a warp's 16 channels of 8 pixels, twice.
__device__ __forceinline__ std::uint32_t matrix_row(std::uint32_t line) {
  const int lane = threadIdx.x % 32;
  const std::uint32_t pixel = line + (lane / 16 * 8 + lane % 8) * kRowBytes;
  const unsigned chunk = threadIdx.x % kWarpgroup / 32 * 2 + lane / 8 % 2;
  return pixel + (chunk ^ pixel / kRowBytes % 8) * 16;
}

// Stores kRuns runs of 8 pixels of a warp's 16 channels as rows of a panel: `pair(j, half)` is what
// the lane has of run j.
template <int kRuns, typename Pair>
__device__ __forceinline__ void store_line(std::uint32_t line, Pair pair) {
  const std::uint32_t to = matrix_row(line);
#pragma unroll
  for (int j = 0; j + 1 < kRuns; j += 2) {
    ptx::stmatrix_trans<4>(to + j * 8 * kRowBytes,
                           {pair(j, 0), pair(j, 1), pair(j + 1, 0), pair(j + 1, 1)});
  }
  if constexpr (kRuns % 2 == 1) {
    ptx::stmatrix_trans<2>(to + (kRuns - 1) * 8 * kRowBytes,
                           {pair(kRuns - 1, 0), pair(kRuns - 1, 1)});
  }
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
