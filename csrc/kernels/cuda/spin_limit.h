// A limit on how often kernels try a barrier, for runs in which a kernel may hang: one that gives
// up leaves a record of what it was waiting for, and traps.
//
// The record lies in host memory, which outlives the GPU's context. Printing from the kernel would
// need a function call, for which ptxas serialises every wgmma of the kernel (its remark C7510).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "kernels/cuda/launch.h"

namespace resnet_fused {

// The pipelines of all kernels (pipeline.cuh), as kPipelineNames below names them.
enum class PipelineId : std::uint32_t {
  kConvOperands,
  kConvScaleShift,
  kConvResult,
  kConvTurns,
  kConvSplitOperands,
  kConvLinesPixels,
  kConvLinesWeights,
  kStemPixels,
  kBottleneckPixels,
  kBottleneckLines,
  kBottleneckOperand,
  kQuantizedOperands,
  kQuantizedVectors,
  kQuantizedResult,
  kQuantizedTurns,
  kTrainingOperands,
  kTrainingResult,
  kTrainingTurns,
  kTrainingLinesPixels,
  kTrainingLinesWeights,
  kTrainingLinesResult,
  kTrainingLinesTurns,
  kWgradOperands
};

// What a thread waited for when it gave up.
struct alignas(16) StuckBarrier {
  std::uint32_t barrier;  // 1 + 2 * PipelineId, plus 1 for the empty one; 0: nobody gave up
  std::uint32_t stage;
  std::int32_t tile, block;
};

// What kernels are given: each try in vain takes `step` from `tries`, and who has none left records
// the barrier. A step of 0 is no limit, and costs a waiting thread no more than one of 1.
struct SpinLimit {
  std::uint32_t tries = 1, step = 0;
  StuckBarrier* record = nullptr;
};

inline std::string to_string(const StuckBarrier& stuck) {
  static constexpr const char* kPipelineNames[][2] = {
      {"conv_bn_sm90", "operands"},
      {"conv_bn_sm90", "scale and shift"},
      {"conv_bn_sm90", "result"},
      {"conv_bn_sm90", "turns"},
      {"conv_bn_sm90_split", "operands"},
      {"conv_bn_sm90_lines", "pixels"},
      {"conv_bn_sm90_lines", "weights"},
      {"stem_sm90", "pixels"},
      {"bottleneck_sm90", "pixels"},
      {"bottleneck_sm90", "lines"},
      {"bottleneck_sm90", "operand"},
      {"quantized_conv_sm90", "operands"},
      {"quantized_conv_sm90", "vectors"},
      {"quantized_conv_sm90", "result"},
      {"quantized_conv_sm90", "turns"},
      {"conv_training_sm90", "operands"},
      {"conv_training_sm90", "result"},
      {"conv_training_sm90", "turns"},
      {"conv_training_sm90_lines", "pixels"},
      {"conv_training_sm90_lines", "weights"},
      {"conv_training_sm90_lines", "result"},
      {"conv_training_sm90_lines", "turns"},
      {"wgrad_sm90", "operands"},
  };
  if (stuck.barrier == 0) return "";
  const auto& [kernel, pipeline] = kPipelineNames[(stuck.barrier - 1) / 2];
  return std::string(kernel) + " gave up: block " + std::to_string(stuck.block) + " at tile " +
         std::to_string(stuck.tile) + " waited too long for the \"" +
         ((stuck.barrier - 1) % 2 == 0 ? "full" : "empty") + "\" barrier of stage " +
         std::to_string(stuck.stage) + " of its pipeline of " + pipeline;
}

// The limit of launches to come, on every device.
inline SpinLimit spin_limit;

// Limits the tries of launches that follow, on every device; 0, as at first, for no limit. A try
// takes from nanoseconds to some microseconds. Leaves `device` current, in whose context the record
// is made.
inline cudaError_t set_spin_limit(int device, std::uint32_t tries) {
#ifndef RESNET_FUSED_HOST_SIM
  cudaError_t status = cudaSetDevice(device);
  if (status == cudaSuccess && spin_limit.record == nullptr) {
    status = cudaHostAlloc(reinterpret_cast<void**>(&spin_limit.record), sizeof(StuckBarrier),
                           cudaHostAllocPortable | cudaHostAllocMapped);
  }
  if (status != cudaSuccess) return take_error(status);
  *spin_limit.record = {};
#else
  static_cast<void>(device);
#endif
  spin_limit.tries = tries > 0 ? tries : 1;
  spin_limit.step = tries > 0;
  return cudaSuccess;
}

// What a kernel gave up at since set_spin_limit was called, in one sentence; "" for none. For a
// launch that failed.
inline std::string stuck_barrier() {
  return spin_limit.record == nullptr ? "" : to_string(*spin_limit.record);
}

}  // namespace resnet_fused
