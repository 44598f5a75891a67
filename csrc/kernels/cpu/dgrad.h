// Gradient of a convolution with respect to its input, one group, any window. NHWC, fp32 or
// bfloat16; sums are fp32. Implementation and figures: dgrad.cpp.
//
// With a stride of 1 it is itself a convolution, of the result's gradient with the weights flipped
// and transposed: conv_bn computes it from weights that dgrad_transform_weights packs. conv_dgrad
// takes any stride.
#pragma once

#include <cstdint>

#include "conv.h"
#include "isa.h"

namespace resnet_fused::cpu {

struct ConvDgrad {
  const void* grad;    // (batch, output height, output width, out_channels), of the result
  const void* packed;  // from dgrad_transform_weights
  void* out;           // (batch, height, width, in_channels), apart from grad
  const void* add;     // of out's size, added to it; may be out itself; nullptr: none
  // Of out's size: out is zero where it is at most zero, as the ReLU that made it wants; nullptr:
  // none.
  const void* positive;
  std::int64_t batch, height, width, in_channels, out_channels;
  Window window;
  Format format;  // of all tensors
};

// The weights of the convolution that maps the result's gradient to the input's, packed as
// conv_transform_weights packs them: out_channels inputs, in_channels outputs, taps in reverse.
// conv_weight_words(out_channels, in_channels, taps, format) words. `weight` is
// (out_channels, in_channels, *kernel) of `strides` elements.
void dgrad_transform_weights(const void* weight, const std::int64_t strides[4], void* packed,
                             std::int64_t in_channels, std::int64_t out_channels,
                             const std::int64_t kernel[2], Format format);

// Requires convolves(conv.format, isa) and isa <= best_isa().
void conv_dgrad(const ConvDgrad& conv, Isa isa);

}  // namespace resnet_fused::cpu
