// The convolution for sm_80 and later.
#pragma once

#include "kernels/cuda/conv.h"

namespace resnet_fused {

// Whether `tile` can compute `arguments`. k64x64 computes everything; the larger tiles need a
// 16-bit type, and rows of x and weight that are whole aligned 16 bytes; the largest has no
// projection.
bool conv_bn_sm80_can_implement(const ConvBn& arguments, ConvTile tile);

// As conv_bn, on the current device, which has `num_sms`, for a result that is not empty.
cudaError_t conv_bn_sm80(const ConvBn& arguments, ConvTile tile, int num_sms, cudaStream_t stream);

}  // namespace resnet_fused
