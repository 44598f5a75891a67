// A convolution without batch norm, and its gradient with respect to its input, which at stride 1
// is one of the same kind with the weight's two channel axes exchanged and its window turned round.
// One group; NHWC, fp32 or bfloat16. The weight changes from step to step, so it is packed for the
// kernels of conv.cpp, winograd.cpp and dgrad.cpp in each call.
#pragma once

#include <cstdint>

#include "conv.h"

namespace resnet_fused::cpu {

// x (batch, height, width, in_channels) -> y (batch, output height, output width, out_channels).
struct TrainConv {
  const void* from;         // x, or the gradient of y
  void* to;                 // y, or the gradient of x
  const void* weight;       // (out_channels, in_channels, *kernel)
  std::int64_t strides[4];  // of weight, in elements
  Format weight_format;     // rounded to `format` while it is packed
  Residual add;             // of a gradient: added before it is rounded; may be `to` itself
  std::int64_t batch, height, width, in_channels, out_channels;
  Window window;
  Format format;  // of from, to and add
};

// Whether train_dgrad is a convolution; else `add` is dense and has all channels.
bool dgrad_turns(const Window& window);

// Both require convolves(conv.format, isa) and isa <= best_isa().
void train_conv(const TrainConv& conv, Isa isa);
void train_dgrad(const TrainConv& conv, Isa isa);

}  // namespace resnet_fused::cpu
