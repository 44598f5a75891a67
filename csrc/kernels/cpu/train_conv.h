// A convolution without batch norm, and its gradient with respect to its input at stride 1, which
// is one of the same kind with the weight's two channel axes exchanged and its window turned round.
// One group; NHWC, fp32 or bfloat16. The weight changes from step to step, so it is packed for the
// kernels of conv.cpp and winograd.cpp in each call.
#pragma once

#include <cstdint>

#include "conv.h"

namespace resnet_fused::cpu {

struct TrainConv {
  const void* x;              // (batch, height, width, in_channels)
  const void* weight;         // (out_channels, in_channels, *kernel) of any strides, in elements
  std::int64_t strides[4];
  Format weight_format;       // rounded to `format` while it is packed
  bool turned;                // weight is (in_channels, out_channels, *kernel), its window reversed
  Residual residual;          // added to the result before it is rounded; may be out itself
  void* out;                  // (batch, output height, output width, out_channels)
  std::int64_t batch, height, width, in_channels, out_channels;
  Window window;
  Format format;  // of x, residual and out
};

// Requires convolves(conv.format, isa) and isa <= best_isa().
void train_conv(const TrainConv& conv, Isa isa);

}  // namespace resnet_fused::cpu
