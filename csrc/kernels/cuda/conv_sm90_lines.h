// The 3 x 3 convolution for sm_90a whose tiles are whole lines.
#pragma once

#include <cstdint>

#include "kernels/cuda/conv.h"

namespace resnet_fused {

// Whether `tile` is one of this kernel's.
bool is_lines(ConvTile tile);

// Whether it can compute `arguments`, of which conv_bn_sm90_can_implement knows that tensor maps
// can express them: a 3 x 3 window that moves by single pixels, with a padding of 1, on lines of
// up to 28 (m200) or 16 (m224) pixels, and nothing added.
bool conv_bn_sm90_lines_can_implement(const ConvBn& arguments, ConvTile tile);

// As for the other tiles (conv_sm90.cu), cycles of the SM with the most tiles.
std::int64_t conv_bn_sm90_lines_cycles(const ConvBn& arguments, ConvTile tile, int num_sms);

// As conv_bn_sm90.
cudaError_t conv_bn_sm90_lines(const ConvBn& arguments, ConvTile tile, int num_sms,
                               cudaStream_t stream);

}  // namespace resnet_fused
