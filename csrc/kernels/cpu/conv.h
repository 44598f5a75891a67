// Convolution with batch norm, residual and ReLU in its epilogue, one group, any window. NHWC, fp32
// or bfloat16. Implementation and figures: conv.cpp.
#pragma once

#include <cstdint>

#include "batch_norm.h"
#include "isa.h"
#include "kernels/residual.h"

namespace resnet_fused::cpu {

// Sizes along height and width.
struct Window {
  std::int64_t kernel[2], stride[2], padding[2], dilation[2];
};

struct Conv {
  const void* x;       // (batch, height, width, in_channels)
  const void* packed;  // from conv_transform_weights
  Residual residual;   // may be out itself
  void* out;           // (batch, output height, output width, out_channels), apart from x
  std::int64_t batch, height, width, in_channels, out_channels;
  Window window;
  BatchNorm bn;
  bool relu;
  Format format;  // of x, packed, residual and out; sums and the epilogue are fp32
  // A convolution, normalised, of the same result's size and format that is added before the ReLU;
  // its residual, out and relu have no meaning. nullptr: none. Not together with a residual.
  const Conv* projection = nullptr;
};

// The size of the result along an axis (0: height, 1: width); below 1 where the window is larger
// than the padded input.
constexpr std::int64_t conv_output_size(const Window& window, int axis, std::int64_t size) {
  const std::int64_t reach = window.dilation[axis] * (window.kernel[axis] - 1) + 1;
  const std::int64_t room = size + 2 * window.padding[axis] - reach;
  return room < 0 ? 0 : room / window.stride[axis] + 1;
}

// Output channels of a strip of packed weights: the columns of a tile of these instructions.
constexpr std::int64_t conv_strip(Isa isa) {
  return isa == Isa::kAvx2 ? 16 : isa == Isa::kNeon ? 8 : 32;
}

// 32-bit words of the weights packed for `isa`; taps = kernel height * kernel width.
std::int64_t conv_weight_words(std::int64_t in_channels, std::int64_t out_channels,
                               std::int64_t taps, Format format, Isa isa);

// Reorders weight (out_channels, in_channels, *kernel) of `strides` elements, of the given format,
// in strips for conv_bn with `isa`.
void conv_transform_weights(const void* weight, const std::int64_t strides[4], void* packed,
                            std::int64_t in_channels, std::int64_t out_channels,
                            const std::int64_t kernel[2], Format format, Isa isa);

// Requires convolves(conv.format, isa), and isa <= best_isa() or Isa::kAmx.
void conv_bn(const Conv& conv, Isa isa);

}  // namespace resnet_fused::cpu
