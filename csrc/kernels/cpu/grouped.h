// Convolution of any number of groups with batch norm, residual and ReLU in its epilogue. NHWC,
// fp32 or bfloat16. Implementation and figures: grouped.cpp.
#pragma once

#include <cstdint>

#include "conv.h"

namespace resnet_fused::cpu {

struct GroupedConv {
  Conv conv;  // packed: from grouped_transform_weights with the same isa; no projection
  std::int64_t groups;
};

// 32-bit words of the packed weights; taps = kernel height * kernel width.
std::int64_t grouped_weight_words(std::int64_t group_channels, std::int64_t out_channels,
                                  std::int64_t taps, std::int64_t groups, Format format, Isa isa);

// Reorders weight (out_channels, group_channels, *kernel) of `strides` elements, of the given
// format.
void grouped_transform_weights(const void* weight, const std::int64_t strides[4], void* packed,
                               std::int64_t group_channels, std::int64_t out_channels,
                               const std::int64_t kernel[2], std::int64_t groups, Format format,
                               Isa isa);

// Requires kNone < isa <= best_isa(). bfloat16 is multiplied as such where the processor can, else
// in fp32, as exactly.
void grouped_conv_bn(const GroupedConv& op, Isa isa);

}  // namespace resnet_fused::cpu
