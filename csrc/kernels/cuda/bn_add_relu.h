// Batch norm with running statistics, residual add and ReLU over an NHWC tensor, in one pass.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/tensor.h"
#include "kernels/residual.h"

namespace resnet_fused {

struct BnAddRelu {
  void* out;          // (rows, channels) of `dtype`; may be x or residual itself
  const void* x;      // (rows, channels): an NHWC tensor has rows = N * H * W
  Residual residual;  // in_line()
  DType dtype;
  std::int64_t rows;
  std::int64_t channels;
  BatchNorm bn;
  bool relu;
};

// Queues the kernel on `stream`, which belongs to `device`. Leaves `device` current.
cudaError_t bn_add_relu(const BnAddRelu& arguments, int device, cudaStream_t stream);

// Whether this build holds code for `device`: the error that a launch would meet. Leaves `device`
// current.
cudaError_t bn_add_relu_loadable(int device);

}  // namespace resnet_fused
