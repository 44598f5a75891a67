// The convolution for sm_90a.
#pragma once

#include "kernels/cuda/conv.h"

namespace resnet_fused {

// Whether `tile`, or for kAuto any, can compute `arguments`: a 16-bit type, one group, channels
// that are multiples of 8, aligned to 16 bytes, in windows that tensor maps can express.
bool conv_bn_sm90_can_implement(const ConvBn& arguments, ConvTile tile);

// What kAuto stands for: the tile that, by arithmetic, keeps the busiest SM for the shortest time.
ConvTile conv_bn_sm90_choose(const ConvBn& arguments, int num_sms);

// As conv_bn, on the current device, of compute capability 9.0 with `num_sms`, for a result that is
// not empty.
cudaError_t conv_bn_sm90(const ConvBn& arguments, ConvTile tile, int num_sms, cudaStream_t stream);

}  // namespace resnet_fused
