// What every convolution does with its fp32 tile: batch norm, residual, ReLU, one rounding, store.
//
// 1. normalise: (acc - mean) * scale + bias, in registers, with the terms that load_terms has left
// in
//    shared memory (batch_norm.cuh).
// 2. store_tile: the accumulators pass through shared memory, so that each thread adds the residual
//    and writes its 16 bytes in rows, whatever layout the accumulators had.
//
// `Accumulators` is a thread's part of a tile: kRows x kColumns runs of kRun neighbouring values,
// at(i, j) being the run at row(i), column(j) of the tile.
//
// Shared memory: staging takes kM x kN floats, over the pipeline's buffers. The 16-byte chunks of a
// staged row are permuted: ^ 2 * (row % 4), so that the fragments' 8 byte stores (4 rows x 2 chunks
// in one go) do not meet in a bank, and ^ 1 in every other 8 of them, so that the 16-byte loads of
// every other chunk (8 in one go) do not either.
#pragma once

#include <cstdint>

#include "kernels/cuda/batch_norm.cuh"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/residual.h"

namespace resnet_fused {

// The epilogue's view of the result, one group of an NHWC tensor being a (rows, columns) matrix.
struct Output {
  void* out;          // may be the residual
  Residual residual;  // of this group; its positions are the rows
  std::int64_t rows;
  std::int64_t row_stride;  // elements
  int columns;
  bool relu;
  bool vectorised;  // every row of `out` and the residual is a whole number of aligned 16 bytes
};

template <bool kExact, typename Accumulators>
__device__ __forceinline__ void normalise(Accumulators& acc, std::uint32_t terms) {
#pragma unroll
  for (int j = 0; j < Accumulators::kColumns; ++j) {
#pragma unroll
    for (int e = 0; e < Accumulators::kRun; ++e) {
      const Terms column = ptx::load_shared<Terms>(terms + (acc.column(j) + e) * kTermBytes);
#pragma unroll
      for (int i = 0; i < Accumulators::kRows; ++i) {
        acc.at(i, j, e) = normalise<kExact>(acc.at(i, j, e), column);
      }
    }
  }
}

template <int kN>
__device__ __forceinline__ std::uint32_t staged(int row, int column) {
  constexpr int kChunk = 16 / sizeof(float);
  const int chunk = (column / kChunk) ^ (2 * (row % 4)) ^ (column / (8 * kChunk) % 2);
  return (row * kN + chunk * kChunk + column % kChunk) * sizeof(float);
}

// Writes the (kM, kN) tile at (first_row, first_column) of `to`. All of the block's threads call
// it; the shared memory from `staging` on is free to them, earlier accesses being behind a barrier.
template <typename T, int kM, int kN, int kThreads, typename Accumulators>
__device__ __forceinline__ void store_tile(const Output& to, Accumulators& acc,
                                           std::uint32_t staging, std::int64_t first_row,
                                           int first_column) {
  using Run = Pack<float, Accumulators::kRun>;
#pragma unroll
  for (int j = 0; j < Accumulators::kColumns; ++j) {
#pragma unroll
    for (int i = 0; i < Accumulators::kRows; ++i) {
      Run run;
#pragma unroll
      for (int e = 0; e < Accumulators::kRun; ++e) run.value[e] = acc.at(i, j, e);
      ptx::store_shared(staging + staged<kN>(acc.row(i), acc.column(j)), run);
    }
  }
  __syncthreads();

  constexpr int kLanes = 16 / sizeof(T);
  constexpr int kAcross = kN / kLanes;
  static_assert(kThreads % kAcross == 0 && kM % (kThreads / kAcross) == 0);
  using Quad = Pack<float, 4>;
  using Vectorised = Pack<T, kLanes>;
  const int column = threadIdx.x % kAcross * kLanes;
  // Written so that a NaN passes, as it does through PyTorch's ReLU.
  const float floor = to.relu ? 0.0f : -INFINITY;
#pragma unroll 1
  for (int row = threadIdx.x / kAcross; row < kM; row += kThreads / kAcross) {
    const int left = to.columns - first_column - column;
    if (first_row + row >= to.rows || left <= 0) break;
    float y[kLanes];
#pragma unroll
    for (int q = 0; q < kLanes / 4; ++q) {
      const Quad quad = ptx::load_shared<Quad>(staging + staged<kN>(row, column + 4 * q));
#pragma unroll
      for (int e = 0; e < 4; ++e) y[4 * q + e] = quad.value[e];
    }
    const std::int64_t position = first_row + row;
    T* out = static_cast<T*>(to.out) + position * to.row_stride + first_column + column;
    const std::int64_t added = to.residual.channels - first_column - column;
    const T* residual = nullptr;
    if (added > 0) {
      residual = static_cast<const T*>(to.residual.data) + to.residual.offset(position) +
                 first_column + column;
    }
    if (to.vectorised) {
      if (added > 0) {
        const Vectorised values = ptx::load_global(reinterpret_cast<const Vectorised*>(residual));
#pragma unroll
        for (int e = 0; e < kLanes; ++e) y[e] += to_float(values.value[e]);
      }
      Vectorised result;
#pragma unroll
      for (int e = 0; e < kLanes; ++e) result.value[e] = from_float<T>(y[e] < floor ? floor : y[e]);
      ptx::store_global(reinterpret_cast<Vectorised*>(out), result);
    } else {
#pragma unroll
      for (int e = 0; e < kLanes; ++e) {
        if (e < left) {
          if (e < added) y[e] += to_float(ptx::load_global(residual + e));
          ptx::store_global(out + e, from_float<T>(y[e] < floor ? floor : y[e]));
        }
      }
    }
  }
}

}  // namespace resnet_fused
