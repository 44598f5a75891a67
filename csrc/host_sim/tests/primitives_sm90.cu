// The same for what only sm_90a has: compiled for the simulator, and by nvcc for such a GPU.
#include <cuda_runtime_api.h>

#include <cstring>

#include "host_sim/tests/primitives.h"
#include "kernels/cuda/dtype.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx_sm90.cuh"
#include "kernels/cuda/tensor_map.h"

namespace host_sim::tests {
namespace {

namespace ptx = resnet_fused::ptx;
using resnet_fused::DType;
using Quad = resnet_fused::Pack<std::uint32_t, 4>;

constexpr std::uint32_t kRowBytes = 128, kRowWords = kRowBytes / 4;
constexpr std::uint32_t kMbarriers = 48 * 1024 - 64;  // behind all else in shared memory
constexpr std::size_t kSharedBytes = 48 * 1024;

struct Arguments {
  const std::uint32_t* in;
  std::uint32_t* out;
  CUtensorMap a, b;
};

// Mistakes that a kernel makes on demand.
enum Mistake {
  kNone,
  kNoWait,       // for what it reads
  kNoRead,       // of what it asks for, and no wait
  kExpectsLess,  // bytes than will come
  kExpectsMore,
  kNoFence,          // of the kind that it needs
  kNoBarrier,        // behind the initialisation
  kTooManyArrivals,  // in one phase
  kNoStoreWait,      // before it leaves
  kOverwrites,       // what is still being read
};

// Thread 0 makes `count` mbarriers, which wait for that many threads each.
template <Mistake kMistake = kNone>
__device__ void make_mbarriers(int count, std::uint32_t arrivals) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < count; ++i) ptx::mbarrier_init(kMbarriers + 8 * i, arrivals);
    if (kMistake != kNoFence) ptx::fence_mbarrier_init();
  }
  if (kMistake != kNoBarrier) __syncthreads();
}

// Rows of 128 bytes from shared memory, as they lie there, to `out`.
__device__ void dump(std::uint32_t* out, int rows) {
  for (unsigned i = threadIdx.x; i < rows * kRowWords; i += blockDim.x) {
    ptx::store_global(out + i, ptx::load_shared<std::uint32_t>(4 * i));
  }
}

// Four times, a warp hands 32 words to another, which returns them in reverse order.
template <Mistake kMistake>
__global__ void mbarrier_phases(const Arguments a) {
  constexpr std::uint32_t kFull = kMbarriers, kEmpty = kMbarriers + 8;
  make_mbarriers<kMistake>(2, 32);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned turn = 0; turn < 4; ++turn) {
    if (threadIdx.x < 32) {
      ptx::mbarrier_wait(kEmpty, turn % 2 ^ 1);
      ptx::store_shared(4 * lane, ptx::load_global(a.in + 32 * turn + lane));
      ptx::mbarrier_arrive(kFull);
    } else {
      if (kMistake != kNoWait) ptx::mbarrier_wait(kFull, turn % 2);
      ptx::store_global(a.out + 32 * turn + lane, ptx::load_shared<std::uint32_t>(4 * (31 - lane)));
      ptx::mbarrier_arrive(kEmpty);
    }
  }
}

// A box of 8 rows, from the coordinates in the first words of `in`.
constexpr int kTileRows = 8;
template <Mistake kMistake>
__global__ void tile(const __grid_constant__ Arguments a) {
  constexpr std::uint32_t kBytes = kTileRows * kRowBytes;
  make_mbarriers<kMistake>(1, 1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(kMbarriers, kMistake == kExpectsLess   ? kBytes - 16
                                            : kMistake == kExpectsMore ? kBytes + 16
                                                                       : kBytes);
    ptx::load_tile(0, a.a, kMbarriers,
                   {static_cast<std::int32_t>(ptx::load_global(a.in)),
                    static_cast<std::int32_t>(ptx::load_global(a.in + 1))});
    if (kMistake == kTooManyArrivals) ptx::mbarrier_arrive(kMbarriers);
  }
  if (kMistake == kNoRead) return;
  if (kMistake != kNoWait) ptx::mbarrier_wait(kMbarriers, 0);
  dump(a.out, kTileRows);
}

// Columns of 40 pixels; in: channel, width, height, batch, then both offsets, then the image.
constexpr int kPixels = 40;
__global__ void pixels(const __grid_constant__ Arguments a) {
  make_mbarriers(1, 1);
  if (threadIdx.x == 0) {
    std::int32_t c[6];
    for (int k = 0; k < 6; ++k) c[k] = static_cast<std::int32_t>(ptx::load_global(a.in + k));
    ptx::mbarrier_arrive_expect(kMbarriers, kPixels * kRowBytes);
    ptx::load_pixels(0, a.a, kMbarriers, {c[0], c[1], c[2], c[3]},
                     {static_cast<std::uint16_t>(c[4]), static_cast<std::uint16_t>(c[5])});
  }
  ptx::mbarrier_wait(kMbarriers, 0);
  dump(a.out, kPixels);
}

// Rows of in, 32 words each, as a box of 8 rows to the coordinates in its first words.
template <Mistake kMistake>
__global__ void store(const __grid_constant__ Arguments a) {
  const std::uint32_t row = threadIdx.x / 8, chunk = threadIdx.x % 8;
  const Quad* from = reinterpret_cast<const Quad*>(a.in + 4) + threadIdx.x;
  ptx::store_shared(kRowBytes * row + 16 * (chunk ^ row % 8), ptx::load_global(from));
  if (kMistake != kNoFence) ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x > 0) return;
  ptx::store_tile(a.a, 0,
                  {static_cast<std::int32_t>(ptx::load_global(a.in)),
                   static_cast<std::int32_t>(ptx::load_global(a.in + 1))});
  ptx::bulk_commit();
  if (kMistake == kOverwrites) ptx::store_shared(0, 0u);
  if (kMistake != kNoStoreWait) ptx::bulk_wait_read<0>();
  ptx::store_shared(0, 0u);
}

// in: 32 rows of 16 bytes. out: the first 8 x kMatrices of them, read and written by .trans, then
// the registers in between.
template <int kMatrices>
__global__ void transpose(const Arguments a) {
  for (int i = threadIdx.x; i < 128; i += 32) ptx::store_shared(4 * i, ptx::load_global(a.in + i));
  __syncthreads();
  std::uint32_t registers[kMatrices];
  ptx::ldmatrix_trans(registers, 16 * threadIdx.x);
  ptx::stmatrix_trans(512 + 16 * threadIdx.x, registers);
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * kMatrices; i += 32) {
    ptx::store_global(a.out + i, ptx::load_shared<std::uint32_t>(512 + 4 * i));
    ptx::store_global(a.out + 32 * kMatrices + i, registers[i / 32]);
  }
}

// d = a (64, 64) * b (n, 64)^T, plus the number of each value in its thread where kAdds says so.
template <typename T, int kN, bool kAdds, Mistake kMistake>
__global__ void wgmma(const __grid_constant__ Arguments a) {
  constexpr std::uint32_t kB = 64 * kRowBytes;
  make_mbarriers(1, 1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(kMbarriers, (64 + kN) * kRowBytes);
    ptx::load_tile(0, a.a, kMbarriers, {0, 0});
    ptx::load_tile(kB, a.b, kMbarriers, {0, 0});
  }
  if (kMistake != kNoWait) ptx::mbarrier_wait(kMbarriers, 0);
  float d[kN / 2];
  for (int i = 0; i < kN / 2; ++i) d[i] = static_cast<float>(i);
  if (kMistake != kNoFence) ptx::wgmma_fence(d);
  for (std::uint32_t k = 0; k < 4; ++k) {
    ptx::wgmma<T>(d, ptx::matrix_descriptor(32 * k), ptx::matrix_descriptor(kB + 32 * k),
                  kAdds || k > 0);
  }
  ptx::wgmma_commit();
  if (kMistake == kOverwrites) ptx::store_shared(4 * threadIdx.x, 0u);
  if (kMistake != kNoStoreWait) ptx::wgmma_wait<0>(d);
  for (int i = 0; i < kN / 2; ++i) {
    std::uint32_t bits;
    memcpy(&bits, &d[i], sizeof(bits));
    ptx::store_global(a.out + kN / 2 * threadIdx.x + i, bits);
  }
}

// As above, of operands that threads have written, in the order that wgmma reads or in none.
template <typename T, bool kSwizzled, bool kFenced>
__global__ void wgmma_written(const Arguments a) {
  for (std::uint32_t i = threadIdx.x; i < 128 * 8; i += blockDim.x) {
    const std::uint32_t row = i / 8, chunk = kSwizzled ? i % 8 ^ row % 8 : i % 8;
    const Quad* from = reinterpret_cast<const Quad*>(a.in) + i;
    ptx::store_shared(kRowBytes * row + 16 * chunk, ptx::load_global(from));
  }
  if (kFenced) ptx::fence_proxy_async();
  __syncthreads();
  float d[32];
  ptx::wgmma_fence(d);
  ptx::wgmma<T>(d, ptx::matrix_descriptor(0), ptx::matrix_descriptor(64 * kRowBytes), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
  for (int i = 0; i < 32; ++i) {
    std::uint32_t bits;
    memcpy(&bits, &d[i], sizeof(bits));
    ptx::store_global(a.out + 32 * threadIdx.x + i, bits);
  }
}

// Of operands without a swizzle: in: 2 x 64 chunks of a, whose rows' chunks lie apart, then 66
// chunks of which two neighbours make a row of b. The descriptor of b says kSaid bytes from one to
// the next.
template <std::uint32_t kSaid>
__global__ void wgmma_of_overlapping_rows(const Arguments a) {
  constexpr std::uint32_t kSecond = 2 * 64 * 16, kChunks = 2 * 64 + 66;
  for (std::uint32_t i = threadIdx.x; i < kChunks; i += blockDim.x) {
    ptx::store_shared(16 * i, ptx::load_global(reinterpret_cast<const Quad*>(a.in) + i));
  }
  ptx::fence_proxy_async();
  __syncthreads();
  float d[32];
  ptx::wgmma_fence(d);
  ptx::wgmma<__half>(d, ptx::plain_descriptor(0, 64 * 16), ptx::plain_descriptor(kSecond, kSaid),
                     false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
  for (int i = 0; i < 32; ++i) {
    std::uint32_t bits;
    memcpy(&bits, &d[i], sizeof(bits));
    ptx::store_global(a.out + 32 * threadIdx.x + i, bits);
  }
}

// As above, of rows of kRowBytes, whose pattern starts kShift rows of 128 bytes behind a multiple
// of 1024, which the descriptors' base offset says, or kSaid.
template <int kOperandBytes, std::uint32_t kShift, std::uint32_t kSaid>
__global__ void wgmma_of_rows(const Arguments a) {
  constexpr std::uint32_t kChunks = kOperandBytes / 16, kFirst = kShift * 128;
  constexpr std::uint32_t kSecond = kFirst + 64 * kOperandBytes;
  for (std::uint32_t i = threadIdx.x; i < 128 * kChunks; i += blockDim.x) {
    const std::uint32_t row = i / kChunks, line = row * kOperandBytes / 128;
    const std::uint32_t chunk = i % kChunks ^ line % kChunks;
    const Quad* from = reinterpret_cast<const Quad*>(a.in) + i;
    ptx::store_shared(kFirst + kOperandBytes * row + 16 * chunk, ptx::load_global(from));
  }
  ptx::fence_proxy_async();
  __syncthreads();
  float d[32];
  ptx::wgmma_fence(d);
  for (std::uint32_t k = 0; k < kChunks / 2; ++k) {
    ptx::wgmma<__half>(d, ptx::matrix_descriptor<kOperandBytes>(kFirst + 32 * k, kSaid),
                       ptx::matrix_descriptor<kOperandBytes>(kSecond + 32 * k, kSaid), k > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
  for (int i = 0; i < 32; ++i) {
    std::uint32_t bits;
    memcpy(&bits, &d[i], sizeof(bits));
    ptx::store_global(a.out + 32 * threadIdx.x + i, bits);
  }
}

// Each half of the block reverses its words, behind a barrier of its own.
template <int kCount>
__global__ void named_barriers(const Arguments a) {
  const unsigned half = threadIdx.x / 64, place = threadIdx.x % 64;
  ptx::store_shared(4 * threadIdx.x, ptx::load_global(a.in + threadIdx.x));
  ptx::named_barrier(1 + static_cast<int>(half), kCount);
  ptx::store_global(a.out + threadIdx.x,
                    ptx::load_shared<std::uint32_t>(4 * (64 * half + 63 - place)));
}

// Two warpgroups claim 8 and more registers, which the third one releases, with all of its warps or
// not. Each thread leaves its number once it has what it asks for.
constexpr int kLaunchRegisters = 80;
template <int kAtLaunch, int kReleased, int kClaimed, int kReleasing>
__global__ void __launch_bounds__(384, 2) registers(const Arguments a) {
  if (kAtLaunch > 0) ptx::registers_at_launch<kAtLaunch>();
  const unsigned group = threadIdx.x / 128;
  if (group == 0) {
    ptx::increase_registers<kLaunchRegisters + 8>();
  } else if (group == 1) {
    ptx::increase_registers<kClaimed>();
  } else if (threadIdx.x < 256 + kReleasing) {
    ptx::decrease_registers<kReleased>();
  }
  ptx::store_global(a.out + threadIdx.x, std::uint32_t{threadIdx.x});
}

template <auto* kKernel, unsigned kThreads>
cudaError_t launch(const Arguments& arguments) {
  return resnet_fused::launch(kKernel, {dim3(1), dim3(kThreads), kSharedBytes}, nullptr, arguments);
}

template <auto* kKernel, unsigned kThreads>
cudaError_t plain(const std::uint32_t* in, std::uint32_t* out) {
  return launch<kKernel, kThreads>(Arguments{in, out, {}, {}});
}

// A matrix of 24 elements x kRows, behind 4 words.
template <auto* kKernel, int kRows>
cudaError_t over_tiles(const std::uint32_t* in, std::uint32_t* out) {
  Arguments a{in, out, {}, {}};
  const cudaError_t status = encode_tiles(&a.a, DType::kFloat16, in + 4, {24, kRows}, {kTileRows});
  return status == cudaSuccess ? launch<kKernel, 64>(a) : status;
}

// An image of 16 channels, 7 x 6 pixels, 3 images, behind 8 words, under a window of 2 x 3 (width x
// height) whose steps are 2 and 1, with 1 and 2 pixels of padding.
cudaError_t over_pixels(const std::uint32_t* in, std::uint32_t* out) {
  Arguments a{in, out, {}, {}};
  const resnet_fused::PixelBox box{{-1, -2}, {1 - 1, 2 - 2}, {2, 1}};
  const cudaError_t status =
      encode_pixels(&a.a, DType::kFloat16, in + 8, {16, 7, 6, 3}, box, kPixels);
  return status == cudaSuccess ? launch<&pixels, 64>(a) : status;
}

// The output as a matrix of 24 elements x 6.
template <Mistake kMistake>
cudaError_t to_tiles(const std::uint32_t* in, std::uint32_t* out) {
  Arguments a{in, out, {}, {}};
  const cudaError_t status = encode_tiles(&a.a, DType::kFloat16, out, {24, 6}, {kTileRows});
  return status == cudaSuccess ? launch<&store<kMistake>, 64>(a) : status;
}

template <typename T, int kN, bool kAdds, Mistake kMistake>
cudaError_t products(const std::uint32_t* in, std::uint32_t* out) {
  Arguments a{in, out, {}, {}};
  cudaError_t status = encode_tiles(&a.a, DType::kFloat16, in, {64, 64}, {64});
  if (status == cudaSuccess) {
    status = encode_tiles(&a.b, DType::kFloat16, in + 64 * kRowWords, {64, kN}, {kN});
  }
  return status == cudaSuccess ? launch<&wgmma<T, kN, kAdds, kMistake>, 128>(a) : status;
}

}  // namespace

const Tests& sm90_tests() {
  static const Tests tests = {
      {"mbarrier", &plain<&mbarrier_phases<kNone>, 64>},
      {"mbarrier not waited for", &plain<&mbarrier_phases<kNoWait>, 64>},
      {"mbarrier used too early", &plain<&mbarrier_phases<kNoBarrier>, 64>},
      {"tile", &over_tiles<&tile<kNone>, 10>},
      {"tile not waited for", &over_tiles<&tile<kNoWait>, 10>},
      {"tile never waited for", &over_tiles<&tile<kNoRead>, 10>},
      {"tile of more bytes than expected", &over_tiles<&tile<kExpectsLess>, 10>},
      {"tile of fewer bytes than expected", &over_tiles<&tile<kExpectsMore>, 10>},
      {"tile announced twice", &over_tiles<&tile<kTooManyArrivals>, 10>},
      {"tile counted by an unfenced mbarrier", &over_tiles<&tile<kNoFence>, 10>},
      {"tile off by one", &over_tiles<&tile<kNone>, 11>},
      {"pixels", &over_pixels},
      {"store", &to_tiles<kNone>},
      {"store unfenced", &to_tiles<kNoFence>},
      {"store overwritten", &to_tiles<kOverwrites>},
      {"store not waited for", &to_tiles<kNoStoreWait>},
      {"wgmma f16 n64", &products<__half, 64, false, kNone>},
      {"wgmma f16 n128", &products<__half, 128, true, kNone>},
      {"wgmma bf16 n64", &products<__nv_bfloat16, 64, true, kNone>},
      {"wgmma bf16 n128", &products<__nv_bfloat16, 128, false, kNone>},
      {"wgmma of operands not waited for", &products<__half, 64, false, kNoWait>},
      {"wgmma unfenced", &products<__half, 64, false, kNoFence>},
      {"wgmma overwritten", &products<__half, 64, false, kOverwrites>},
      {"wgmma not waited for", &products<__half, 64, false, kNoStoreWait>},
      {"wgmma of written operands", &plain<&wgmma_written<__half, true, true>, 128>},
      {"wgmma of operands without swizzle", &plain<&wgmma_written<__half, false, true>, 128>},
      {"wgmma of e4m3 operands", &plain<&wgmma_written<__nv_fp8_e4m3, true, true>, 128>},
      {"wgmma of overlapping rows", &plain<&wgmma_of_overlapping_rows<16>, 128>},
      {"wgmma of rows that overlap less", &plain<&wgmma_of_overlapping_rows<32>, 128>},
      {"wgmma of unfenced operands", &plain<&wgmma_written<__half, true, false>, 128>},
      {"wgmma of rows of 64 bytes", &plain<&wgmma_of_rows<64, 0, 0>, 128>},
      {"wgmma of rows of 32 bytes", &plain<&wgmma_of_rows<32, 0, 0>, 128>},
      {"wgmma at a base offset", &plain<&wgmma_of_rows<128, 3, 3>, 128>},
      {"wgmma at a wrong base offset", &plain<&wgmma_of_rows<128, 3, 2>, 128>},
      {"wgmma at a forgotten base offset", &plain<&wgmma_of_rows<128, 3, 0>, 128>},
      {"registers", &plain<&registers<kLaunchRegisters, 56, 96, 128>, 384>},
      {"registers of nobody", &plain<&registers<kLaunchRegisters, 56, 104, 128>, 384>},
      {"registers not released by a warp", &plain<&registers<kLaunchRegisters, 56, 96, 96>, 384>},
      {"registers released that are not there",
       &plain<&registers<kLaunchRegisters, 88, 96, 128>, 384>},
      {"registers claimed that are there", &plain<&registers<kLaunchRegisters, 56, 72, 128>, 384>},
      {"registers of an unknown number", &plain<&registers<0, 56, 96, 128>, 384>},
      {"two transposed matrices", &plain<&transpose<2>, 32>},
      {"four transposed matrices", &plain<&transpose<4>, 32>},
      {"named barriers", &plain<&named_barriers<64>, 128>},
      {"named barriers for too many", &plain<&named_barriers<96>, 128>},
  };
  return tests;
}

}  // namespace host_sim::tests
