// Kernels whose mistakes show in some orders only, in which hardware may run them: the fixed order
// of the simulator is not among those. Compiled for sm_90a too, never run there with a mistake.
#include <cuda_runtime_api.h>

#include "host_sim/tests/primitives.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx_sm90.cuh"
#include "kernels/cuda/tensor_map.h"

namespace host_sim::tests {
namespace {

namespace ptx = resnet_fused::ptx;

constexpr std::uint32_t kRows = 8, kTileBytes = kRows * 128;
constexpr std::uint32_t kMbarriers = 8 * 1024;
constexpr std::size_t kSharedBytes = 9 * 1024;
constexpr std::uint32_t kTurns = 3;

struct Arguments {
  const std::uint32_t* in;
  std::uint32_t* out;
  CUtensorMap map;
};

__device__ void load(std::uint32_t to, const CUtensorMap& map, std::uint32_t mbarrier,
                     std::uint32_t tile) {
  ptx::mbarrier_arrive_expect(mbarrier, kTileBytes);
  ptx::load_tile(to, map, mbarrier, {0, static_cast<std::int32_t>(kRows * tile)});
}

// Word `lane` of a tile's first row to the turn's words of `out`.
__device__ void put(const Arguments& a, std::uint32_t turn, unsigned part, std::uint32_t from) {
  const unsigned lane = threadIdx.x % 32;
  ptx::store_global(a.out + (2 * turn + part) * 32 + lane,
                    ptx::load_shared<std::uint32_t>(from + 4 * lane));
}

// Warps 0 and 1 bring one tile each a turn, every one to a place of its own, and say that it is
// there; warp 2 reads both. Nothing is overwritten, so that not to wait for warp 2 looks harmless:
// but then one warp's turn can end another's, which the mbarrier cannot tell apart.
template <bool kWaits>
__global__ void two_producers(const __grid_constant__ Arguments a) {
  constexpr std::uint32_t kFull = kMbarriers, kEmpty = kFull + 8, kOwn = kEmpty + 8;
  const unsigned warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(kFull, 64);
    ptx::mbarrier_init(kEmpty, 32);
    for (int i = 0; i < 2; ++i) ptx::mbarrier_init(kOwn + 8 * i, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (std::uint32_t turn = 0; turn < kTurns; ++turn) {
    if (warp < 2) {
      if (kWaits) ptx::mbarrier_wait(kEmpty, turn % 2 ^ 1);
      const std::uint32_t place = 2 * turn + warp;
      if (threadIdx.x % 32 == 0) load(kTileBytes * place, a.map, kOwn + 8 * warp, place);
      ptx::mbarrier_wait(kOwn + 8 * warp, turn % 2);
      ptx::mbarrier_arrive(kFull);
    } else {
      ptx::mbarrier_wait(kFull, turn % 2);
      for (unsigned part = 0; part < 2; ++part) put(a, turn, part, kTileBytes * (2 * turn + part));
      ptx::mbarrier_arrive(kEmpty);
    }
  }
}

// Warp 0 brings a tile a turn, all to one place; warps 1 and 2 read and release it. Warp 1 has no
// use for the tile of turn 1. It may not release that before it is there: the mbarrier would count
// it for turn 0, which warp 2 may not have read.
template <bool kEarly>
__global__ void two_consumers(const __grid_constant__ Arguments a) {
  constexpr std::uint32_t kFull = kMbarriers, kEmpty = kFull + 8, kOwn = kEmpty + 8;
  const unsigned warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(kFull, 1);
    ptx::mbarrier_init(kEmpty, 64);
    ptx::mbarrier_init(kOwn, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (std::uint32_t turn = 0; turn < kTurns; ++turn) {
    if (warp == 0) {
      if (threadIdx.x > 0) continue;
      ptx::mbarrier_wait(kEmpty, turn % 2 ^ 1);
      load(0, a.map, kFull, turn);
    } else if (warp == 1 && turn == 1) {
      if (threadIdx.x % 32 == 0) load(kTileBytes, a.map, kOwn, kTurns);  // what it uses instead
      ptx::mbarrier_wait(kOwn, 0);
      put(a, turn, 0, kTileBytes);
      if (kEarly) ptx::mbarrier_arrive(kEmpty);
      ptx::mbarrier_wait(kFull, turn % 2);
      if (!kEarly) ptx::mbarrier_arrive(kEmpty);
    } else {
      ptx::mbarrier_wait(kFull, turn % 2);
      put(a, turn, warp - 1, 0);
      ptx::mbarrier_arrive(kEmpty);
    }
  }
}

// Two copies that one mbarrier counts, each announced and waited for by itself: the first wait ends
// with whichever copy lands first.
template <bool kApart>
__global__ void two_copies(const __grid_constant__ Arguments a) {
  if (threadIdx.x == 0) {
    for (std::uint32_t i = 0; i < 2; ++i) ptx::mbarrier_init(kMbarriers + 8 * i, 1);
    ptx::fence_mbarrier_init();
    load(0, a.map, kMbarriers, 0);
    const std::uint32_t second = kApart ? kMbarriers + 8 : kMbarriers;
    if (kApart) ptx::mbarrier_arrive_expect(second, kTileBytes);
    ptx::load_tile(kTileBytes, a.map, second, {0, kRows});
  }
  __syncthreads();
  ptx::mbarrier_wait(kMbarriers, 0);
  put(a, 0, 0, 0);
  if (!kApart && threadIdx.x == 0) ptx::mbarrier_arrive_expect(kMbarriers, kTileBytes);
  ptx::mbarrier_wait(kApart ? kMbarriers + 8 : kMbarriers, kApart ? 0 : 1);
  put(a, 0, 1, kTileBytes);
}

// Each half of the block reverses its words behind a barrier of its own, or of that of the other.
template <int kNumbers>
__global__ void barrier_numbers(const Arguments a) {
  const unsigned half = threadIdx.x / 64, place = threadIdx.x % 64;
  ptx::store_shared(4 * threadIdx.x, ptx::load_global(a.in + threadIdx.x));
  ptx::named_barrier(1 + static_cast<int>(half) % kNumbers, 64);
  ptx::store_global(a.out + threadIdx.x,
                    ptx::load_shared<std::uint32_t>(4 * (64 * half + 63 - place)));
}

template <auto* kKernel, unsigned kThreads>
cudaError_t over_tiles(const std::uint32_t* in, std::uint32_t* out) {
  Arguments a{in, out, {}};
  const cudaError_t status =
      encode_tiles(&a.map, resnet_fused::DType::kFloat16, in, {64, 2 * kTurns * kRows}, {kRows});
  if (status != cudaSuccess) return status;
  return resnet_fused::launch(kKernel, {dim3(1), dim3(kThreads), kSharedBytes}, nullptr, a);
}

template <auto* kKernel, unsigned kThreads>
cudaError_t plain(const std::uint32_t* in, std::uint32_t* out) {
  return resnet_fused::launch(kKernel, {dim3(1), dim3(kThreads), kSharedBytes}, nullptr,
                              Arguments{in, out, {}});
}

}  // namespace

const Tests& schedule_tests() {
  static const Tests tests = {
      {"two producers", &over_tiles<&two_producers<true>, 96>},
      {"two producers that do not wait", &over_tiles<&two_producers<false>, 96>},
      {"two consumers", &over_tiles<&two_consumers<false>, 96>},
      {"two consumers, one of which releases early", &over_tiles<&two_consumers<true>, 96>},
      {"two copies", &over_tiles<&two_copies<true>, 32>},
      {"two copies that one mbarrier counts", &over_tiles<&two_copies<false>, 32>},
      {"two barriers", &plain<&barrier_numbers<2>, 128>},
      {"two barriers of one number", &plain<&barrier_numbers<1>, 128>},
  };
  return tests;
}

}  // namespace host_sim::tests
