// Weights packed for the kernels of conv.cpp and winograd.cpp, at the speed of memory: in training
// they change from step to step. The result is what conv_transform_weights and
// winograd_transform_weights make of the same weight.
#pragma once

#include <cstdint>

#include "isa.h"

namespace resnet_fused::cpu {

struct Pack {
  const void* weight;  // (out_channels, in_channels, height, width) of any strides, in elements
  std::int64_t strides[4];
  std::int64_t out_channels, in_channels, kernel[2];
  bool turned;         // the window is read backwards
  Format stored;       // of the weight; rounded to
  Format format;       // where it is packed
  std::int64_t strip;  // conv_strip() of the kernel, a multiple of 16
  void* packed;
};

void pack_for_conv(const Pack& pack);

// 3 x 3, packed in fp32.
void pack_for_winograd(const Pack& pack);

}  // namespace resnet_fused::cpu
