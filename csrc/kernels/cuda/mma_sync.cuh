// What the kernels on mma.sync share: swizzled rows, the ring of stages that cp.async fills, and a
// warp's products.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/ptx.cuh"

namespace resnet_fused {

constexpr int kChunkBytes = 16;

// The byte offset of a chunk in an operand of rows of kRowBytes. Chunks are permuted, so that 8
// rows of one logical chunk, which ldmatrix reads at a time, and the 128 bytes that 8 neighbouring
// threads write, each fill all 32 banks once.
template <int kRowBytes>
__device__ __forceinline__ std::uint32_t swizzle(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes == 128);
  const int permuted = chunk ^ (kRowBytes == 128 ? row % 8 : row / 2 % 4);
  return row * kRowBytes + permuted * kChunkBytes;
}

// Stages of shared memory from kFirst on, filled in turn.
template <int kFirst_, int kStageBytes_, int kStages_>
struct Ring {
  static constexpr int kFirst = kFirst_, kStageBytes = kStageBytes_, kStages = kStages_;
  static constexpr int kEnd = kFirst + kStages * kStageBytes;
};

// Starts the first steps of a K loop, into stages that nobody reads any more. `copies` has steps()
// and copy(stage), which starts the copies of the next of them.
template <typename Ring, typename Copies>
__device__ __forceinline__ void start(Copies& copies) {
#pragma unroll
  for (int stage = 0; stage < Ring::kStages - 1; ++stage) {
    if (stage < copies.steps()) copies.copy(Ring::kFirst + stage * Ring::kStageBytes);
    ptx::cp_async_commit();
  }
}

// The K loop: multiply(stage) for each of the steps that `start` has begun, at least one, so that
// what was stored before lies behind a barrier. At the end, other threads may still read the
// stages.
template <typename Ring, typename Copies, typename Multiply>
__device__ __forceinline__ void accumulate(Copies& copies, Multiply multiply) {
  const int steps = copies.steps();
  std::uint32_t multiplied = Ring::kFirst;
  std::uint32_t copied = Ring::kFirst + (Ring::kStages - 1) * Ring::kStageBytes;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Ring::kStages - 2>();
    __syncthreads();  // this step's copies of all threads are here, and the last stage is read
    if (step + Ring::kStages - 1 < steps) copies.copy(copied);
    ptx::cp_async_commit();
    multiply(multiplied);
    copied = multiplied;
    multiplied += Ring::kStageBytes;
    if (multiplied == Ring::kEnd) multiplied = Ring::kFirst;
  }
}

// A warp's kM x kN results in the layout of mma.m16n8k16, as Accumulators in epilogue.cuh but for
// the place in the tile. T is what the operands hold; float is rounded to TF32.
template <typename T, int kM, int kN>
class WarpTile {
 public:
  static constexpr int kRows = kM / 8, kColumns = kN / 8, kRun = 2;

  __device__ __forceinline__ float& at(int i, int j, int e) { return d_[i / 2][j][i % 2 * 2 + e]; }

 protected:
  // The rows that this lane names to ldmatrix: of a, both row halves, then both depth halves; of b,
  // both depth halves, then the next 8 columns.
  __device__ __forceinline__ static int a_row() { return threadIdx.x % 16; }
  __device__ __forceinline__ static int a_half() { return threadIdx.x % 32 / 16; }
  __device__ __forceinline__ static int b_row() {
    return threadIdx.x % 32 / 16 * 8 + threadIdx.x % 8;
  }
  __device__ __forceinline__ static int b_half() { return threadIdx.x / 8 % 2; }

  // Adds a product of the depth of two chunks: a(i) is the one that this lane names of the 16 rows
  // i, b(j) that of the 16 columns j. ldmatrix moves registers of 32 bits, one element of fp32 or
  // two of 16 bits, to the lanes where the products of either kind want them.
  template <typename A, typename B>
  __device__ __forceinline__ void multiply_chunks(A a_chunk, B b_chunk) {
    std::uint32_t b[kN / 16][4];
#pragma unroll
    for (int j = 0; j < kN / 16; ++j) load(b[j], b_chunk(j));
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) {
      std::uint32_t a[4];
      load(a, a_chunk(i));
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        if constexpr (kTf32) {
          ptx::mma_m16n8k8(d_[i][j], a, &b[j / 2][j % 2 * 2]);
        } else {
          ptx::mma_m16n8k16<T>(d_[i][j], a, &b[j / 2][j % 2 * 2]);
        }
      }
    }
  }

 private:
  static constexpr bool kTf32 = std::is_same_v<T, float>;

  __device__ __forceinline__ static void load(std::uint32_t (&to)[4], std::uint32_t row) {
    ptx::ldmatrix_x4(to, row);
    if constexpr (kTf32) {
#pragma unroll
      for (int k = 0; k < 4; ++k) to[k] = ptx::round_to_tf32(to[k]);
    }
  }

  float d_[kM / 16][kN / 8][4] = {};
};

}  // namespace resnet_fused
