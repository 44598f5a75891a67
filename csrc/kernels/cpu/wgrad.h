// Gradient of a convolution with respect to its weight, one group, any window. NHWC, fp32 or
// bfloat16; sums are fp32. Implementation and figures: wgrad.cpp.
#pragma once

#include <cstdint>

#include "conv.h"
#include "isa.h"

namespace resnet_fused::cpu {

struct ConvWgrad {
  const void* x;     // (batch, height, width, in_channels)
  const void* grad;  // (batch, output height, output width, out_channels), of the result
  void* out;         // (out_channels, in_channels, *kernel), apart from both
  std::int64_t batch, height, width, in_channels, out_channels;
  Window window;
  bool channels_last;  // whether out lies in memory as (out_channels, *kernel, in_channels)
  Format format;       // of x and grad
  Format out_format;   // fp32, or the format of x and grad: then the sums are rounded once
};

// Requires convolves(conv.format, isa) and isa <= best_isa(). Partial sums live in memory that the
// calling thread keeps for its next call.
void conv_wgrad(const ConvWgrad& conv, Isa isa);

}  // namespace resnet_fused::cpu
