// Quantised int8 convolutions:
//
//   acc[k] = sum of x * weight[k] + bias[k] + rne(float32(shortcut) * shortcut_scale[k])
//   out[k] = rne(float32(acc[k]) * multiplier[k]), clamped to the range of out
//
// where the shortcut is a residual, a projection's sum, or absent, rne rounds to the nearest
// integer, halves to even, and each product is rounded to float32. Integers are of 32 bits; what
// their sums must not exceed is the caller's affair.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "kernels/cuda/conv.h"

namespace resnet_fused {

struct ConvInt8 {
  // Of the type of x and of the shortcut that is projected, uint8 or int8; there are no batch
  // norms. `out` is uint8 where there is a ReLU, else int8. Weights are int8; of each 16 output
  // channels, number 4 t + 2 h + e, with t below 4, stands at place 8 h + 2 t + e.
  ConvBn conv;
  DType residual_dtype;      // uint8 or int8
  const std::int32_t* bias;  // of out_channels, as the others
  const float* multiplier;
  const float* shortcut_scale = nullptr;  // goes with a residual or a projection
};

// Output positions x output channels of a block, of the kernel for sm_90a or, k...Sm80, of the one
// for sm_80 and later; ...Cluster: of two blocks of a cluster each, at adjacent positions.
enum class Int8Tile : int {
  k128x64,
  k128x128,
  k128x128Cluster,
  k128x256Cluster,
  k64x64Sm80,
  k128x128Sm80
};

// Whether some tile can compute it: one group, channels that are multiples of 16, aligned to 16
// bytes.
bool conv_int8_can_implement(const ConvInt8& arguments);

// Appends the tiles that can implement `arguments` on `device`, the one first that, by arithmetic,
// keeps the busiest SM for the shortest time.
cudaError_t conv_int8_tiles(const ConvInt8& arguments, int device, std::vector<Int8Tile>* tiles);

// Queues the kernel on `stream`, which belongs to `device`. Leaves `device` current. The status is
// cudaErrorInvalidValue for what the tile cannot implement there, and cudaErrorInvalidConfiguration
// for a result too large for one grid.
cudaError_t conv_int8(const ConvInt8& arguments, Int8Tile tile, int device, cudaStream_t stream);

}  // namespace resnet_fused
