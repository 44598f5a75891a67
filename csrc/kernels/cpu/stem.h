// A ResNet's stem in one pass: 7x7 convolution of stride 2 and padding 3 on 3 channels, batch
// norm, ReLU, 3x3 max pool of stride 2 and padding 1. NHWC. Implementation and figures: stem.cpp.
#pragma once

#include <cstdint>

#include "batch_norm.h"
#include "isa.h"

namespace resnet_fused::cpu {

constexpr std::int64_t kStemStrip = 32;  // out_channels must be a multiple

struct Stem {
  const void* x;       // (batch, height, width, 3)
  const void* packed;  // from stem_transform_weights
  void* out;           // (batch, pooled height, pooled width, out_channels), must not overlap x
  std::int64_t batch, height, width, out_channels;
  BatchNorm bn;
  Format format;  // of x, packed and out; sums and the epilogue are fp32
};

// The size of the stem's convolution along an axis; the max pool's is the same function of that.
constexpr std::int64_t stem_halved(std::int64_t size) { return (size + 1) / 2; }

// 32-bit words of the packed weights.
std::int64_t stem_weight_words(std::int64_t out_channels, Format format);

// Packs weight (out_channels, 3, 7, 7) of `strides` elements, of the given format.
void stem_transform_weights(const void* weight, const std::int64_t strides[4], void* packed,
                            std::int64_t out_channels, Format format);

// Requires convolves(stem.format, isa) and isa <= best_isa().
void stem_conv_pool(const Stem& stem, Isa isa);

}  // namespace resnet_fused::cpu
