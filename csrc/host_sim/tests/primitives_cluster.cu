// Small kernels over what blocks of a cluster share: compiled for the simulator, and by nvcc for
// sm_90a.
#include <cuda_runtime_api.h>

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

constexpr std::uint32_t kRowWords = 32, kRows = 8;  // of a tile
constexpr std::uint32_t kTileBytes = kRows * kRowWords * 4;
constexpr std::uint32_t kFull = 16 * 1024, kEmpty = kFull + 8;  // mbarriers
constexpr std::size_t kSharedBytes = 17 * 1024;
constexpr unsigned kThreads = 64;
constexpr std::uint16_t kBoth = 3;

struct Arguments {
  const std::uint32_t* in;
  std::uint32_t* out;
  CUtensorMap map;
};

// Mistakes that a kernel makes on demand.
enum Mistake {
  kNone,
  kNoFirstBarrier,  // of the cluster, before the other block is reached
  kNoBarrier,       // between a write and its read
  kNoLastBarrier,   // before the block exits
  kNotMapped,       // an offset for an address
  kMapped,          // an address for an offset
  kNoBlock,         // a rank that the cluster lacks
  kOneBlock,        // of two that a copy should reach
  kThreeBlocks,
  kNoArrival,      // of the other block
  kBlocksRelease,  // of a block's scope, of what another block reads
  kBlocksAcquire,
  kReleasesEarly,  // what it has yet to read
  kReleasesAlone,  // what the other block has yet to read
};

__device__ void cluster_barrier() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

__device__ unsigned number() { return blockIdx.x * blockDim.x + threadIdx.x; }

__global__ void ranks(const Arguments a) {
  ptx::store_global(a.out + number(),
                    std::uint32_t(ptx::cluster_rank() + 16 * ptx::cluster_size()));
}

// Each thread hands its word to the other block's thread from the other end, which reads it there.
template <Mistake kMistake>
__global__ void read_across(const Arguments a) {
  const unsigned mirrored = blockDim.x - 1 - threadIdx.x;
  const int other = kMistake == kNoBlock ? 2 : ptx::cluster_rank() ^ 1;
  ptx::store_shared(4 * threadIdx.x, ptx::load_global(a.in + number()));
  if (kMistake != kNoFirstBarrier) cluster_barrier();
  const std::uint32_t from =
      kMistake == kNotMapped ? 4 * mirrored : ptx::cluster_address(4 * mirrored, other);
  ptx::store_global(a.out + number(), kMistake == kMapped ? ptx::load_shared<std::uint32_t>(from)
                                                          : ptx::load_cluster<std::uint32_t>(from));
  if (kMistake != kNoLastBarrier) cluster_barrier();
}

// The same, 16 bytes a thread, written there by whoever has them.
template <Mistake kMistake>
__global__ void write_across(const Arguments a) {
  const unsigned mirrored = blockDim.x - 1 - threadIdx.x;
  if (kMistake != kNoFirstBarrier) cluster_barrier();
  ptx::store_cluster(ptx::cluster_address(16 * mirrored, ptx::cluster_rank() ^ 1),
                     ptx::load_global(reinterpret_cast<const Quad*>(a.in) + number()));
  if (kMistake != kNoBarrier) cluster_barrier();
  ptx::store_global(reinterpret_cast<Quad*>(a.out) + number(),
                    ptx::load_shared<Quad>(16 * threadIdx.x));
}

// Block 1 writes its words to block 0, whose mbarrier counts the arrivals of both blocks' threads.
template <Mistake kMistake>
__global__ void arrive_across(const Arguments a) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(kFull, 2 * blockDim.x);
    ptx::fence_mbarrier_init();
  }
  if (kMistake == kNoFirstBarrier) {
    __syncthreads();
  } else {
    cluster_barrier();
  }
  if (ptx::cluster_rank() == 1) {
    ptx::store_cluster(ptx::cluster_address(4 * threadIdx.x, 0), ptx::load_global(a.in + number()));
    const std::uint32_t full = ptx::cluster_address(kFull, 0);
    if (kMistake == kBlocksRelease) {
      ptx::mbarrier_arrive_cluster(full);
    } else if (kMistake != kNoArrival) {
      ptx::mbarrier_publish_cluster(full);
    }
  } else {
    ptx::mbarrier_arrive(kFull);
    if (kMistake == kBlocksAcquire) {
      ptx::mbarrier_wait(kFull, 0);
    } else {
      ptx::mbarrier_wait_cluster(kFull, 0);
    }
    const unsigned mirrored = blockDim.x - 1 - threadIdx.x;
    ptx::store_global(a.out + threadIdx.x, ptx::load_shared<std::uint32_t>(4 * mirrored));
  }
}

// Block 0 copies two tiles one after the other to the same place of both blocks, the second once
// both have released the first; each block writes them to its part of `out`.
template <Mistake kMistake>
__global__ void multicast(const __grid_constant__ Arguments a) {
  constexpr std::uint32_t kTurns = 2;
  constexpr std::uint16_t kRanks = kMistake == kOneBlock ? 1 : kMistake == kThreeBlocks ? 7 : kBoth;
  const int rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(kFull, 1);
    ptx::mbarrier_init(kEmpty, (kMistake == kReleasesAlone ? 1 : 2) * blockDim.x);
    ptx::fence_mbarrier_init();
  }
  if (kMistake == kNoFirstBarrier) {
    __syncthreads();
  } else {
    cluster_barrier();
  }
  const std::uint32_t empty = ptx::cluster_address(kEmpty, 0);
  for (std::uint32_t turn = 0; turn < kTurns; ++turn) {
    if (threadIdx.x == 0) {
      if (rank == 0) ptx::mbarrier_wait(kEmpty, turn % 2 ^ 1);
      ptx::mbarrier_arrive_expect(kFull, kTileBytes);
      if (rank == 0) {
        ptx::load_tile_multicast(0, a.map, kFull, {0, static_cast<std::int32_t>(kRows * turn)},
                                 kRanks);
      }
    }
    const bool releases = kMistake != kReleasesAlone || rank == 0;
    if (kMistake == kReleasesEarly && rank == 1) ptx::mbarrier_arrive_cluster(empty);
    ptx::mbarrier_wait(kFull, turn % 2);
    std::uint32_t* const out = a.out + (kTurns * rank + turn) * kTileBytes / 4;
    for (unsigned i = threadIdx.x; i < kTileBytes / 4; i += blockDim.x) {
      ptx::store_global(out + i, ptx::load_shared<std::uint32_t>(4 * i));
    }
    if (releases && (kMistake != kReleasesEarly || rank == 0)) ptx::mbarrier_arrive_cluster(empty);
  }
  if (kMistake != kNoLastBarrier) cluster_barrier();
}

// Each block asks for one half of 40 pixels, and both get both halves.
__global__ void pixels(const __grid_constant__ Arguments a) {
  constexpr std::uint32_t kHalf = 20, kHalfBytes = kHalf * kRowWords * 4;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(kFull, 1);
    ptx::fence_mbarrier_init();
  }
  cluster_barrier();
  const int rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(kFull, 2 * kHalfBytes);
    ptx::load_pixels_multicast(rank * 5120, a.map, kFull, {0, 0, 5 * rank, 0}, {1, 1}, kBoth);
  }
  ptx::mbarrier_wait(kFull, 0);
  for (unsigned i = threadIdx.x; i < kHalf * kRowWords; i += blockDim.x) {
    for (unsigned half = 0; half < 2; ++half) {
      ptx::store_global(a.out + (2 * rank + half) * kHalf * kRowWords + i,
                        ptx::load_shared<std::uint32_t>(5120 * half + 4 * i));
    }
  }
  cluster_barrier();
}

template <auto* kKernel, unsigned kBlocks = 2>
cudaError_t launch(const Arguments& arguments) {
  return resnet_fused::launch(kKernel, {dim3(kBlocks), dim3(kThreads), kSharedBytes, dim3(2)},
                              nullptr, arguments);
}

template <auto* kKernel, unsigned kBlocks = 2>
cudaError_t plain(const std::uint32_t* in, std::uint32_t* out) {
  return launch<kKernel, kBlocks>(Arguments{in, out, {}});
}

// A matrix of 64 elements x 16.
template <Mistake kMistake>
cudaError_t over_tiles(const std::uint32_t* in, std::uint32_t* out) {
  Arguments a{in, out, {}};
  const cudaError_t status = encode_tiles(&a.map, DType::kFloat16, in, {64, 2 * kRows}, {kRows});
  return status == cudaSuccess ? launch<&multicast<kMistake>>(a) : status;
}

// An image of 64 channels and 6 x 12 pixels (width x height) under a window of 3 x 3: 4 x 10
// places.
cudaError_t over_pixels(const std::uint32_t* in, std::uint32_t* out) {
  Arguments a{in, out, {}};
  const cudaError_t status =
      encode_pixels(&a.map, DType::kFloat16, in, {64, 6, 12, 1}, {{0, 0}, {-2, -2}, {1, 1}}, 20);
  return status == cudaSuccess ? launch<&pixels>(a) : status;
}

}  // namespace

const Tests& cluster_tests() {
  static const Tests tests = {
      {"cluster ranks", &plain<&ranks, 4>},
      {"cluster read", &plain<&read_across<kNone>>},
      {"cluster read too early", &plain<&read_across<kNoFirstBarrier>>},
      {"cluster read too late", &plain<&read_across<kNoLastBarrier>>},
      {"cluster read of no address", &plain<&read_across<kNotMapped>>},
      {"cluster address read as an offset", &plain<&read_across<kMapped>>},
      {"cluster read of no block", &plain<&read_across<kNoBlock>>},
      {"cluster write", &plain<&write_across<kNone>>},
      {"cluster write too early", &plain<&write_across<kNoFirstBarrier>>},
      {"cluster write not waited for", &plain<&write_across<kNoBarrier>>},
      {"cluster arrivals", &plain<&arrive_across<kNone>>},
      {"cluster arrivals too early", &plain<&arrive_across<kNoFirstBarrier>>},
      {"cluster arrivals missing", &plain<&arrive_across<kNoArrival>>},
      {"cluster arrivals of a block's scope", &plain<&arrive_across<kBlocksRelease>>},
      {"cluster arrivals waited for in a block's scope", &plain<&arrive_across<kBlocksAcquire>>},
      {"multicast", &over_tiles<kNone>},
      {"multicast before the other block is ready", &over_tiles<kNoFirstBarrier>},
      {"multicast to one block", &over_tiles<kOneBlock>},
      {"multicast to three blocks", &over_tiles<kThreeBlocks>},
      {"multicast released early", &over_tiles<kReleasesEarly>},
      {"multicast released by one block", &over_tiles<kReleasesAlone>},
      {"multicast without a last barrier", &over_tiles<kNoLastBarrier>},
      {"multicast of pixels", &over_pixels},
  };
  return tests;
}

}  // namespace host_sim::tests
