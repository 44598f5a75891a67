// The gradient of a convolution's weight on sm_90a.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cuda/conv.h"

namespace resnet_fused {

// Columns of the weight (a tap's channels) x output channels of a block's tile.
enum class WgradTile : int { k256x64 = 0, k256x128 = 1 };

struct Wgrad {
  void* out;         // (out_channels, kernel_h, kernel_w, channels) of out_dtype
  DType out_dtype;   // float32, or op.dtype
  const void* grad;  // (batch, out_height, out_width, out_channels)
  ConvBn op;         // of which weight and out are null
  float* parts;      // (count, elements of out): what the blocks of a range of positions sum up
  int count;         // as wgrad_parts says
};

// Appends the tiles that can compute `arguments` on `device`, the expected fastest first; none
// where there is no kernel for them.
cudaError_t wgrad_tiles(const Wgrad& arguments, int device, std::vector<WgradTile>* tiles);

// Into how many ranges the positions fall.
cudaError_t wgrad_parts(const Wgrad& arguments, WgradTile tile, int device, int* count);

// As conv_bn. Two kernels, the second of which adds the parts in their order.
cudaError_t wgrad(const Wgrad& arguments, WgradTile tile, int device, cudaStream_t stream);

}  // namespace resnet_fused
