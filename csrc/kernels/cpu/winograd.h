// 3x3, stride 1, padding 1 convolution by Winograd's F(2x2, 3x3), with the epilogue
//   out = relu?(bn(conv(x)) (+ residual))
// NHWC, fp32. Implementation and figures: winograd.cpp.
#pragma once

#include <cstdint>

#include "batch_norm.h"
#include "isa.h"
#include "kernels/residual.h"

namespace resnet_fused::cpu {

struct WinogradConv {
  const float* x;       // (batch, height, width, in_channels)
  const float* packed;  // from winograd_transform_weights
  Residual residual;    // may be out itself
  float* out;           // (batch, height, width, out_channels), must not overlap x
  std::int64_t batch, height, width, in_channels, out_channels;
  BatchNorm bn;
  bool relu;
};

// Floats that the transformed weights of a (out_channels, in_channels, 3, 3) convolution take.
std::int64_t winograd_weight_floats(std::int64_t in_channels, std::int64_t out_channels);

// U = G g G^T, computed in double precision and rounded once. `strides` are those of
// weight (out_channels, in_channels, 3, 3), in elements.
void winograd_transform_weights(const float* weight, const std::int64_t strides[4], float* packed,
                                std::int64_t in_channels, std::int64_t out_channels);

// Requires isa != Isa::kNone and isa <= best_isa().
void winograd_conv(const WinogradConv& conv, Isa isa);

}  // namespace resnet_fused::cpu
