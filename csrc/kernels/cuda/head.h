// The head of a ResNet in two kernels: global average pool, and a fully connected layer.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/tensor.h"

namespace resnet_fused {

struct AveragePool {
  void* out;      // (batch, channels) of `out_dtype`
  const void* x;  // (batch, positions, channels) of `dtype`
  DType dtype;
  DType out_dtype;  // `dtype`, or float32: the fp32 means as they are
  std::int64_t batch;
  int positions;  // at least 1
  int channels;
};

// out = x * weight^T (+ bias), rounded once.
struct Linear {
  void* out;           // (batch, classes) of `dtype`
  const float* x;      // (batch, channels)
  const void* weight;  // (classes, channels) of `dtype`
  const void* bias;    // (classes) of `dtype`, or null
  DType dtype;
  std::int64_t batch;
  int channels;
  int classes;
};

// Each queues its kernel on `stream`, which belongs to `device`, and leaves `device` current. The
// status is cudaErrorInvalidConfiguration for a result too large for one grid.
cudaError_t average_pool(const AveragePool& arguments, int device, cudaStream_t stream);
cudaError_t linear(const Linear& arguments, int device, cudaStream_t stream);

}  // namespace resnet_fused
