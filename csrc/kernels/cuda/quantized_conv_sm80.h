// The quantised convolution for sm_80 and later.
#pragma once

#include <vector>

#include "kernels/cuda/quantized_conv.h"

namespace resnet_fused {

// Its tiles, the larger one first where that gives every SM a block and is not half empty.
std::vector<QuantizedTile> quantized_conv_sm80_tiles(const QuantizedConv& arguments, int num_sms);

// As quantized_conv, on the current device, for a result that is not empty.
cudaError_t quantized_conv_sm80(const QuantizedConv& arguments, QuantizedTile tile,
                                cudaStream_t stream);

}  // namespace resnet_fused
