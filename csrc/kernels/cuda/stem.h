// maxpool(relu(bn(conv(x)))) of a ResNet's stem: a 7 x 7 convolution of 3 channels with stride 2
// and padding 3, then a 3 x 3 maximum with stride 2 and padding 1.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/tensor.h"

namespace resnet_fused {

struct Stem {
  void* out;           // (batch, pooled height, pooled width, out_channels), 16-byte aligned
  const void* x;       // (batch, height, width, 3), or (batch, 3, height, width) where `planar`
  const void* weight;  // (out_channels, 7, 7, 3)
  DType dtype;         // of out and weight: float16 or bfloat16
  DType x_dtype;       // the same, or uint8
  // Pixels that are bytes count as x * scale + shift of their channel, rounded to dtype.
  float scale[3], shift[3];
  bool planar;  // how x lies
  std::int64_t batch;
  int height, width;
  int out_channels;  // a multiple of 8
  BatchNorm bn;
};

// The size of the convolution's or the pooling's result: both halve, upwards.
constexpr int halved(int size) { return size / 2 + size % 2; }

// Queues the kernel on `stream`, which belongs to `device`. Leaves `device` current. The status is
// cudaErrorInvalidValue for a type or channels other than above, and
// cudaErrorInvalidConfiguration for a result too large for one grid.
cudaError_t stem(const Stem& arguments, int device, cudaStream_t stream);

}  // namespace resnet_fused
