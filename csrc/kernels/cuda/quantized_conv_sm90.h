// The quantised convolution for sm_90a; its functions are called on such devices alone.
#pragma once

#include <vector>

#include "kernels/cuda/quantized_conv.h"

namespace resnet_fused {

// Whether windows and sizes are such that tensor maps can express them, too.
bool quantized_conv_sm90_can_implement(const QuantizedConv& arguments);

// Its tiles, the expected fastest one first.
std::vector<QuantizedTile> quantized_conv_sm90_tiles(const QuantizedConv& arguments, int num_sms);

// As quantized_conv, on the current device, for a result that is not empty.
cudaError_t quantized_conv_sm90(const QuantizedConv& arguments, QuantizedTile tile, int num_sms,
                                cudaStream_t stream);

}  // namespace resnet_fused
