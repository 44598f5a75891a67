// A ResNet's head: global average pool and fully connected layer, NHWC. Implementation: head.cpp.
#pragma once

#include <cstdint>

#include "batch_norm.h"
#include "isa.h"

namespace resnet_fused::cpu {

struct Head {
  const void* x;       // (batch, pixels, channels)
  const void* weight;  // (classes, channels), rows `weight_stride` elements apart
  const void* bias;    // (classes); nullptr: none
  void* out;           // (batch, classes)
  std::int64_t batch, pixels, channels, classes, weight_stride;
  Format format;  // of everything; sums are fp32, rounded once at the end
};

// Runs on every processor. pixels >= 1.
void head(const Head& head);

}  // namespace resnet_fused::cpu
