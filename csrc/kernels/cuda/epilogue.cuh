// What every kernel does with the fp32 values of a result: batch norm, residual, ReLU, one
// rounding, packed stores.
//
// Accumulators reach it in two ways. A kernel whose accumulators lie in rows of 16 bytes, or that
// stores them from shared memory, calls `normalise` and `pack` itself. Others call `store_tile`:
// the tile passes through shared memory, so that each thread adds the residual and writes its 16
// bytes in rows, whatever layout the accumulators had.
//
// `Accumulators` is a thread's part of a tile: kRows x kColumns runs of kRun neighbouring values,
// at(i, j) being the run at row(i), column(j) of the tile.
//
// Shared memory of store_tile: kM x kN floats, over the pipeline's stages. The 16-byte chunks of a
// staged row are permuted: ^ 2 * (row % 4), so that the fragments' 8 byte stores (4 rows x 2 chunks
// in one go) do not meet in a bank, and ^ 1 in every other 8 of them, so that the 16-byte loads of
// every other chunk (8 in one go) do not either.
#pragma once

#include <cstdint>

#include "kernels/cuda/batch_norm.cuh"
#include "kernels/cuda/dtype.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/residual.h"

namespace resnet_fused {

// One group of an NHWC result as a matrix of (rows, columns).
struct Output {
  void* out;          // may be the residual
  Residual residual;  // of this group: plain, strided or zero-padded; its positions are the rows
  std::int64_t rows;
  std::int64_t row_stride;  // elements
  int columns;
  bool relu;
  bool vectorised;  // every row of `out` and the residual is a whole number of aligned 16 bytes
};

template <typename T>
class Epilogue {
 public:
  static constexpr bool kExact = sizeof(T) == sizeof(float);
  static constexpr int kLanes = 16 / sizeof(T);

  __device__ __forceinline__ explicit Epilogue(bool relu) : floor_(relu ? 0.0f : -INFINITY) {}

  __device__ __forceinline__ static float normalise(float value, const ScaleShift& of) {
    return resnet_fused::normalise<kExact>(value, of);
  }

  // Batch norm of all accumulators, by the scale and shift of the tile's columns that lie in shared
  // memory.
  template <typename Accumulators>
  __device__ __forceinline__ static void normalise(Accumulators& acc, std::uint32_t scale_shift) {
#pragma unroll
    for (int j = 0; j < Accumulators::kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < Accumulators::kRun; ++e) {
        const ScaleShift column =
            ptx::load_shared<ScaleShift>(scale_shift + (acc.column(j) + e) * kScaleShiftBytes);
#pragma unroll
        for (int i = 0; i < Accumulators::kRows; ++i) {
          acc.at(i, j, e) = normalise(acc.at(i, j, e), column);
        }
      }
    }
  }

  template <int kCount>
  __device__ __forceinline__ static void add(float (&y)[kCount], const Pack<T, kCount>& residual) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) y[e] += to_float(residual.value[e]);
  }

  // ReLU where there is one, and the only rounding.
  template <int kCount>
  __device__ __forceinline__ Pack<T, kCount> pack(float (&y)[kCount]) const {
#pragma unroll
    for (int e = 0; e < kCount; ++e) y[e] = ptx::max_nan(y[e], floor_);
    return pack_floats<T>(y);
  }

  // Writes the (kM, kN) tile at (first_row, first_column) of `to`. All of the block's threads call
  // it; the shared memory from `staging` on is free to them, earlier accesses being behind a
  // barrier.
  template <int kM, int kN, int kThreads, typename Accumulators>
  __device__ __forceinline__ void store_tile(const Output& to, Accumulators& acc,
                                             std::uint32_t staging, std::int64_t first_row,
                                             int first_column) const {
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

    constexpr int kAcross = kN / kLanes;
    static_assert(kThreads % kAcross == 0 && kM % (kThreads / kAcross) == 0);
    using Chunk = Pack<T, kLanes>;
    const int column = threadIdx.x % kAcross * kLanes;
#pragma unroll 1
    for (int row = threadIdx.x / kAcross; row < kM; row += kThreads / kAcross) {
      const int left = to.columns - first_column - column;
      if (first_row + row >= to.rows || left <= 0) break;
      float y[kLanes];
#pragma unroll
      for (int e = 0; e < kLanes; e += 4) {
        const auto quad = ptx::load_shared<Pack<float, 4>>(staging + staged<kN>(row, column + e));
#pragma unroll
        for (int k = 0; k < 4; ++k) y[e + k] = quad.value[k];
      }
      const std::int64_t position = first_row + row;
      T* const out = static_cast<T*>(to.out) + position * to.row_stride + first_column + column;
      const std::int64_t added = to.residual.channels - first_column - column;
      const T* residual = nullptr;
      if (added > 0) {
        residual = static_cast<const T*>(to.residual.data) + to.residual.offset(position) +
                   first_column + column;
      }
      if (to.vectorised) {
        if (added > 0) add(y, ptx::load_global(reinterpret_cast<const Chunk*>(residual)));
        ptx::store_global(reinterpret_cast<Chunk*>(out), pack(y));
      } else {
#pragma unroll
        for (int e = 0; e < kLanes; ++e) {
          if (e >= left) continue;
          float one[1] = {y[e]};
          if (e < added) one[0] += to_float(ptx::load_global(residual + e));
          ptx::store_global(out + e, pack(one).value[0]);
        }
      }
    }
  }

 private:
  template <int kN>
  __device__ __forceinline__ static std::uint32_t staged(int row, int column) {
    constexpr int kChunk = 16 / sizeof(float);
    const int chunk = (column / kChunk) ^ (2 * (row % 4)) ^ (column / (8 * kChunk) % 2);
    return (row * kN + chunk * kChunk + column % kChunk) * sizeof(float);
  }

  const float floor_;
};

}  // namespace resnet_fused
