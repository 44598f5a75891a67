// Quantised convolutions, of int8 or of e4m3 numbers:
//
//   acc[k] = sum of x * weight[k] + bias[k] + rne(float32(shortcut) * shortcut_scale[k])
//   out[k] = rne(float32(acc[k]) * multiplier[k]), clamped to the range of out
//
// where the shortcut is a residual, a projection's sum, or absent, and each product is rounded to
// float32. Of int8, rne rounds to the nearest integer, halves to even; integers are of 32 bits, and
// what their sums must not exceed is the caller's affair. Of e4m3, acc is of float32, only out is
// rounded to what it holds, and the sum of the products is rounded as quantized_conv_sm90.cu says.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "kernels/cuda/conv.h"

namespace resnet_fused {

struct QuantizedConv {
  // Of the type of x and of the shortcut that is projected, uint8 or int8, or e4m3 as all else
  // then is; there are no batch norms. `out` is uint8 where there is a ReLU, else int8. Weights are
  // int8; of each 16 output channels, number 4 t + 2 h + e, with t below 4, stands at place
  // 8 h + 2 t + e.
  ConvBn conv;
  DType residual_dtype;  // uint8 or int8
  const void* bias;      // of out_channels, as the others; int32, of e4m3 float32
  const float* multiplier;
  const float* shortcut_scale = nullptr;  // goes with a residual or a projection
};

// Output positions x output channels of a block, of the kernel for sm_90a or, k...Sm80, of the one
// for sm_80 and later; ...Cluster: of two blocks of a cluster each, at adjacent positions.
enum class QuantizedTile : int {
  k128x64,
  k128x128,
  k128x128Cluster,
  k128x256Cluster,
  k64x64Sm80,
  k128x128Sm80
};

// Whether the tile can compute it: one group, channels that are multiples of 16, aligned to 16
// bytes; of e4m3 only the three first tiles.
bool quantized_conv_can_implement(const QuantizedConv& arguments, QuantizedTile tile);

// Appends the tiles that can implement `arguments` on `device`, the one first that, by arithmetic,
// keeps the busiest SM for the shortest time.
cudaError_t quantized_conv_tiles(const QuantizedConv& arguments, int device,
                                 std::vector<QuantizedTile>* tiles);

// Queues the kernel on `stream`, which belongs to `device`. Leaves `device` current. The status is
// cudaErrorInvalidValue for what the tile cannot implement there, and cudaErrorInvalidConfiguration
// for a result too large for one grid.
cudaError_t quantized_conv(const QuantizedConv& arguments, QuantizedTile tile, int device,
                           cudaStream_t stream);

}  // namespace resnet_fused
