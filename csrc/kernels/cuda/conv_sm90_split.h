// The convolution for sm_90a whose tiles' K loops are shared by the blocks of a cluster.
#pragma once

#include <cstdint>

#include "kernels/cuda/conv.h"

namespace resnet_fused {

// Whether `tile` is one of this kernel's.
bool is_split(ConvTile tile);

// Whether it can compute `arguments`, of which conv_bn_sm90_can_implement knows that tensor maps
// can express them: as many steps as blocks, of each product.
bool conv_bn_sm90_split_can_implement(const ConvBn& arguments, ConvTile tile);

// As for the other tiles (conv_sm90.cu), cycles of the SM with the most blocks.
std::int64_t conv_bn_sm90_split_cycles(const ConvBn& arguments, ConvTile tile, int num_sms);

// As conv_bn_sm90.
cudaError_t conv_bn_sm90_split(const ConvBn& arguments, ConvTile tile, cudaStream_t stream);

}  // namespace resnet_fused
