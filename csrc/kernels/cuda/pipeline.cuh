// How threads that load a tile's data hand it to threads that use it, on sm_90a: a ring of stages
// in shared memory, each with an mbarrier that counts it full and one that counts it empty. The
// producer acquires a stage, fills and commits it; the consumer waits for it, uses and releases it;
// both advance to the next. (On sm_80 all threads do both: CpAsyncPipeline in mma_sync.cuh.)
#pragma once

#include <cstdint>

#include "kernels/cuda/ptx_sm90.cuh"

namespace resnet_fused {

// One thread's, or one warp's, way through the pipeline whose mbarriers lie from kFirst on. What a
// stage holds, and where, is the kernel's affair.
template <PipelineId kId, std::uint32_t kFirst, int kStages_>
class Pipeline {
 public:
  static constexpr int kStages = kStages_;
  static constexpr std::uint32_t kEnd = kFirst + 2 * 8 * kStages;

  // Called by one thread of the block, before a barrier: arrivals that fill and that empty a stage.
  __device__ static void init(std::uint32_t producers, std::uint32_t consumers) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full(i), producers);
      ptx::mbarrier_init(empty(i), consumers);
    }
  }

  __device__ __forceinline__ explicit Pipeline(const SpinLimit& limit) : limit_(limit) {}

  __device__ __forceinline__ int stage() const { return stage_; }
  // The mbarrier that counts the bytes of bulk copies into this stage.
  __device__ __forceinline__ std::uint32_t full() const { return full(stage_); }

  // `tile` is what a record says of a wait that is given up.
  __device__ __forceinline__ void acquire(int tile) const { wait(false, tile); }
  __device__ __forceinline__ void commit() const { ptx::mbarrier_arrive(full(stage_)); }
  // Before bulk copies of so many bytes, with which the stage is full.
  __device__ __forceinline__ void commit_bytes(std::uint32_t bytes) const {
    ptx::mbarrier_arrive_expect(full(stage_), bytes);
  }

  __device__ __forceinline__ void wait(int tile) const { wait(true, tile); }
  __device__ __forceinline__ static void release(int stage) { ptx::mbarrier_arrive(empty(stage)); }
  __device__ __forceinline__ void release() const { release(stage_); }
  // In the block of that rank of the cluster, whose producer fills this block's stages too.
  __device__ __forceinline__ static void release_of_cluster(int stage, int rank) {
    ptx::mbarrier_arrive_cluster(ptx::cluster_address(empty(stage), rank));
  }

  __device__ __forceinline__ void advance() {
    if (++stage_ == kStages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }
  // Past stages that others use.
  __device__ __forceinline__ void advance(int stages) {
    stage_ += stages;
    parity_ ^= stage_ / kStages % 2;
    stage_ %= kStages;
  }

 private:
  __device__ __forceinline__ void wait(bool is_full, int tile) const {
    const std::uint32_t mbarrier = is_full ? full(stage_) : empty(stage_);
    if (ptx::mbarrier_wait(mbarrier, parity_ ^ !is_full, limit_)) return;
    ptx::give_up(limit_,
                 {1 + 2 * static_cast<std::uint32_t>(kId) + !is_full,
                  static_cast<std::uint32_t>(stage_), tile, static_cast<std::int32_t>(blockIdx.x)});
  }

  __device__ __forceinline__ static std::uint32_t full(int stage) { return kFirst + 8 * stage; }
  __device__ __forceinline__ static std::uint32_t empty(int stage) { return full(kStages + stage); }

  const SpinLimit& limit_;
  int stage_ = 0;
  std::uint32_t parity_ = 0;
};

}  // namespace resnet_fused
