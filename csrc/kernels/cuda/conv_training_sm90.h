// Convolutions of a training step on sm_90a: forward with the statistics of the result, and the
// gradient of the input. For conv_training_sm90.cu's meaning of their arguments see
// resnet_fused/backends/training.py.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cuda/conv.h"

namespace resnet_fused {

// Positions x channels of a block's tile; those of whole lines are conv_training_sm90_lines.cu's.
enum class TrainingTile : int {
  k128x64 = 0,
  k128x128 = 1,
  k256x128Cluster = 2,
  k216x64Lines = 3,
  k248x64Lines = 4
};

struct ConvStats {
  ConvBn op;       // without batch norm, residual, projection and ReLU
  float* moments;  // (parts, 3, out_channels), or null
};

// Without dilated windows; of those that move by 2 in both directions, at most by their size, x has
// an even height and width. `op` is the convolution whose x has the gradient `out`.
struct Dgrad {
  void* out;                    // (batch, height, width, channels) of `dtype`, op.conv's sizes
  const void* grad;             // (batch, out_height, out_width, out_channels), op's sizes
  ConvBn op;                    // of which x and out are null
  const void* below = nullptr;  // pre-BN output, laid out like `out`
  const float* below_scale_shift = nullptr;  // (6, channels)
  float* sums = nullptr;                     // (parts, 2, channels), with `below`, class by class
  const void* add = nullptr;                 // laid out like `out`, without `below`
  // Of a folded end, a 1 x 1 convolution, without `add`: operand_matrix * operand + operand_offset
  // are added before the mask.
  Residual operand;                       // with all channels of `out`
  const void* operand_matrix = nullptr;   // (channels, channels), symmetric
  const float* operand_offset = nullptr;  // (channels)
};

// Appends the tiles that can compute `arguments` on `device`, the expected fastest first; none
// where there is no kernel for them.
cudaError_t training_tiles(const ConvStats& arguments, int device,
                           std::vector<TrainingTile>* tiles);
cudaError_t training_tiles(const Dgrad& arguments, int device, std::vector<TrainingTile>* tiles);

// Of how many parts of the result `tile` takes statistics or sums.
int training_parts(const ConvStats& arguments, TrainingTile tile);
int training_parts(const Dgrad& arguments, TrainingTile tile);

// As conv_bn.
cudaError_t conv_stats(const ConvStats& arguments, TrainingTile tile, int device,
                       cudaStream_t stream);
cudaError_t dgrad(const Dgrad& arguments, TrainingTile tile, int device, cudaStream_t stream);

}  // namespace resnet_fused
