// Gradient of a convolution with respect to its input, one group, any window. NHWC, fp32 or
// bfloat16; sums are fp32. Implementation and figures: dgrad.cpp.
//
// With a stride of 1 it is itself a convolution, of the result's gradient with the weights flipped
// and transposed (train_conv.cpp). conv_dgrad takes any stride.
#pragma once

#include <cstdint>

#include "conv.h"
#include "isa.h"

namespace resnet_fused::cpu {

struct ConvDgrad {
  const void* grad;    // (batch, output height, output width, out_channels), of the result
  const void* packed;  // the turned weight from pack_for_conv
  void* out;           // (batch, height, width, in_channels), apart from grad
  const void* add;     // of out's size, added to it; may be out itself; nullptr: none
  std::int64_t batch, height, width, in_channels, out_channels;
  Window window;
  Format format;  // of all tensors
};

// Requires convolves(conv.format, isa) and isa <= best_isa().
void conv_dgrad(const ConvDgrad& conv, Isa isa);

}  // namespace resnet_fused::cpu
