// The quantised convolution for sm_80 and later.
#pragma once

#include <vector>

#include "kernels/cuda/conv_int8.h"

namespace resnet_fused {

// Its tiles, the larger one first where that gives every SM a block and is not half empty.
std::vector<Int8Tile> conv_int8_sm80_tiles(const ConvInt8& arguments, int num_sms);

// As conv_int8, on the current device, for a result that is not empty.
cudaError_t conv_int8_sm80(const ConvInt8& arguments, Int8Tile tile, cudaStream_t stream);

}  // namespace resnet_fused
