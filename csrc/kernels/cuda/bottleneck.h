// A whole bottleneck block of a ResNet with running statistics, in one kernel:
//   relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut),
// conv1 and conv3 being 1 x 1, conv2 3 x 3 with padding 1 and the stride, the shortcut x itself or
// bn(projection(x)), 1 x 1 with the stride.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/tensor.h"

namespace resnet_fused {

// A convolution without bias and its batch norm.
struct Layer {
  const void* weight = nullptr;  // (out_channels, kernel_h, kernel_w, channels)
  BatchNorm bn;                  // of out_channels
};

struct Bottleneck {
  const void* x;  // (batch, height, width, channels)
  DType dtype;    // of x, the weights and the result
  std::int64_t batch;
  int height, width;
  int channels, inner, out_channels;  // inner: of the results of conv1 and conv2
  int stride;
  Layer conv1, conv2, conv3;
  Layer projection;  // its weight is null where x itself is the shortcut
};

// The size of the result: of the image, divided by the stride and rounded up.
constexpr int strided(int size, int stride) { return size / stride + (size % stride != 0); }

// Whether the kernel computes `arguments` on `device`, which is none that has the kernels for
// sm_90a: 16-bit types, channels that are multiples of 8 and 16-byte aligned tensors, inner up to
// 128, strides 1 and 2, 2 with a projection only, and enough shared memory.
bool bottleneck_can_implement(const Bottleneck& arguments, int device);

// Whether the kernel can implement it and, by the arithmetic of docs/cuda_kernels.md, is faster
// than a kernel for each layer.
bool bottleneck_is_profitable(const Bottleneck& arguments, int device);

// Queues the kernel on `stream`, which belongs to `device`. Leaves `device` current. `out` is
// (batch, strided height, strided width, out_channels), 16-byte aligned and no part of x. The
// status is cudaErrorInvalidValue for what it cannot implement and cudaErrorInvalidConfiguration
// for a result too large for one grid.
cudaError_t bottleneck(void* out, const Bottleneck& arguments, int device, cudaStream_t stream);

}  // namespace resnet_fused
