// What the kernels on mma.sync share: swizzled rows, the pipeline of stages that cp.async fills,
// and a warp's products.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/ptx_bytes.cuh"

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

// A ring of stages of shared memory from kFirst on, which the block's threads all fill, by
// cp.async, and all multiply. (On sm_90a warps have roles of their own: Pipeline in pipeline.cuh.)
// A producer has steps() and load(stage), which starts this thread's copies of the next of them.
template <int kFirst_, int kStageBytes, int kStages>
struct CpAsyncPipeline {
  static constexpr int kFirst = kFirst_;
  static constexpr int kEnd = kFirst + kStages * kStageBytes;

  // Starts the first steps of a K loop, into stages that nobody reads any more.
  template <typename Producer>
  __device__ __forceinline__ static void start(Producer& producer) {
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage < producer.steps()) producer.load(kFirst + stage * kStageBytes);
      ptx::cp_async_commit();
    }
  }

  // The K loop: consume(stage) for each of the steps that `start` has begun, at least one, so that
  // what was stored before lies behind a barrier. At the end, other threads may still read the
  // stages.
  template <typename Producer, typename Consume>
  __device__ __forceinline__ static void run(Producer& producer, Consume consume) {
    const int steps = producer.steps();
    std::uint32_t full = kFirst, empty = kFirst + (kStages - 1) * kStageBytes;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // all threads' copies of this step are here, and they have read `empty`
      if (step + kStages - 1 < steps) producer.load(empty);
      ptx::cp_async_commit();
      consume(full);
      empty = full;
      full += kStageBytes;
      if (full == kEnd) full = kFirst;
    }
  }
};

// A warp's kM x kN results in the layout of mma.m16n8k16, as Accumulators in epilogue.cuh but for
// the place in the tile. T is what the operands hold; float is rounded to TF32, and of bytes the
// weights are std::int8_t.
template <typename T, int kM, int kN>
class WarpTile {
 public:
  static constexpr int kRows = kM / 8, kColumns = kN / 8, kRun = 2;

  using Value = std::conditional_t<std::is_integral_v<T>, std::int32_t, float>;

  __device__ __forceinline__ Value& at(int i, int j, int e) { return d_[i / 2][j][i % 2 * 2 + e]; }

  __device__ __forceinline__ void add(const WarpTile& other) {
#pragma unroll
    for (int k = 0; k < kM * kN / 32; ++k) (&d_[0][0][0])[k] += (&other.d_[0][0][0])[k];
  }

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
  // i, b(j) that of the 16 columns j. ldmatrix moves registers of 32 bits, one element of fp32, two
  // of 16 bits or four bytes, to the lanes where the products of each kind want them.
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
        } else if constexpr (std::is_integral_v<T>) {
          ptx::mma_m16n8k32<T>(d_[i][j], a, &b[j / 2][j % 2 * 2]);
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

  Value d_[kM / 16][kN / 8][4] = {};
};

}  // namespace resnet_fused
