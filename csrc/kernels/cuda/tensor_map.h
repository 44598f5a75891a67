// Tensor maps: what sm_90's bulk copies know of a tensor of 16-bit elements or bytes in global
// memory. Every copy moves rows of 128 bytes, whose 16-byte chunks it permutes by the row's number
// modulo 8 (the 128-byte swizzle), from or to multiples of 1024 bytes of shared memory; or rows of
// 64 bytes, whose 4 chunks it permutes by half the row's number modulo 4.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>

#include "kernels/cuda/tensor.h"

namespace resnet_fused {

constexpr int kMapRowBytes = 128;
constexpr int kMapChannels = kMapRowBytes / 2;  // of 16 bits

// Sizes are given fastest dimension first, and strides likewise, of all dimensions but the first,
// in elements: multiples of 16 bytes, and each of the one before (CUDA driver API,
// cuTensorMapEncodeTiled, globalStrides). None stand for a dense tensor, of rows that are such
// multiples. `data` is a multiple of 16 bytes.
using Sizes = std::initializer_list<std::int64_t>;

// A map for boxes of `row_bytes`, 128 or 64, x `box` elements.
cudaError_t encode_tiles(CUtensorMap* map, DType dtype, const void* data, Sizes size,
                         std::initializer_list<int> box, Sizes strides = {},
                         int row_bytes = kMapRowBytes);

// The (width, height) pixels that a convolution's first tap meets: from `lower` to the image's last
// pixel + `upper`, every `step`-th.
struct PixelBox {
  int lower[2], upper[2], step[2];
};

// Whether hardware can express it (CUDA driver API, cuTensorMapEncodeIm2col).
bool encodable(const PixelBox& box);

// A map of an image's `size` (channels, width, height, batch) for columns of `row_bytes` x
// `pixels`.
cudaError_t encode_pixels(CUtensorMap* map, DType dtype, const void* data, Sizes size,
                          const PixelBox& box, int pixels, Sizes strides = {},
                          int row_bytes = kMapRowBytes);

}  // namespace resnet_fused
