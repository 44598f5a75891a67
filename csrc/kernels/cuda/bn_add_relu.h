// Batch norm with given statistics, residual add and ReLU over an NHWC tensor, in one pass.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace resnet_fused {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// One value per channel, of any of the types; null means absent.
struct Vector {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

struct BnAddRelu {
  void* out;             // (rows, channels) of `dtype`; may be x or residual itself
  const void* x;         // (rows, channels): an NHWC tensor has rows = N * H * W
  const void* residual;  // like x, or null
  DType dtype;
  std::int64_t rows;
  std::int64_t channels;
  Vector mean;
  Vector var;
  Vector weight;  // null: 1
  Vector bias;    // null: 0
  float eps;
  bool relu;
};

// Queues the kernel on `stream`, which belongs to `device`. Leaves `device` current.
cudaError_t bn_add_relu(const BnAddRelu& arguments, int device, cudaStream_t stream);

// Whether this build holds code for `device`: the error that a launch would meet. Leaves `device`
// current.
cudaError_t bn_add_relu_loadable(int device);

}  // namespace resnet_fused
