// The quantised convolution for sm_90a; its functions are called on such devices alone.
#pragma once

#include <vector>

#include "kernels/cuda/conv_int8.h"

namespace resnet_fused {

// Whether windows and sizes are such that tensor maps can express them, too.
bool conv_int8_sm90_can_implement(const ConvInt8& arguments);

// Its tiles, the expected fastest one first.
std::vector<Int8Tile> conv_int8_sm90_tiles(const ConvInt8& arguments, int num_sms);

// As conv_int8, on the current device, for a result that is not empty.
cudaError_t conv_int8_sm90(const ConvInt8& arguments, Int8Tile tile, int num_sms,
                           cudaStream_t stream);

}  // namespace resnet_fused
