// Quantised inference: uint8 or int8 activations times int8 weights, summed in int32 and rescaled
// to 8 bits, bit for bit as resnet_fused/reference/quantized.py defines it. NHWC. Implementation:
// quantized_conv.cpp, quantized_stem.cpp, quantized_head.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv.h"
#include "kernels/residual.h"

namespace resnet_fused::cpu {

// The instructions that multiply: AVX2 widens to 16 bits, AMX has tiles for convolutions, and all
// but AVX2 have VPDPBUSD.
enum class QuantizedIsa { kNone, kAvx2, kAvxVnni, kAvx512Vnni, kAmx };

// Whether this processor and operating system offer it; kNone is no set of instructions.
bool supports(QuantizedIsa isa);

struct Activations {
  const std::uint8_t* data;  // (batch, height, width, channels) of uint8, or int8 if is_signed
  bool is_signed;
  std::int64_t batch, height, width, channels;
};

struct QuantizedConvolution {
  Activations x;
  const void* packed;                 // from quantized_conv_pack
  const std::uint8_t* padding_value;  // (channels) of x's type; nullptr: zero
  std::int64_t out_channels, groups;
  Window window;
};

// acc = conv(x) + bias; acc += rne(float32(shortcut) * shortcut_scale); the result is
// rne(float32(acc) * multiplier), clamped to the range of its type.
struct QuantizedConv {
  QuantizedConvolution conv;
  const std::int32_t* bias;  // (out_channels), as the vectors below
  const float* multiplier;
  const float* shortcut_scale;  // of the residual or the projection
  Residual residual;
  bool residual_is_signed;
  bool projected;
  QuantizedConvolution projection;  // of the same result size, if projected; without a residual
  void* out;  // (batch, output height, output width, out_channels): uint8 with a ReLU, else int8
  bool relu;
};

std::int64_t quantized_conv_packed_bytes(std::int64_t in_channels, std::int64_t out_channels,
                                         std::int64_t groups, const std::int64_t kernel[2]);

// packed = weight (out_channels, in_channels / groups, *kernel) of `strides` elements, reordered.
void quantized_conv_pack(const std::int8_t* weight, const std::int64_t strides[4], void* packed,
                         std::int64_t in_channels, std::int64_t out_channels, std::int64_t groups,
                         const std::int64_t kernel[2]);

void quantized_conv(const QuantizedConv& op, QuantizedIsa isa);

// A ResNet's: convolution 7 x 7 of 3 channels with stride 2 and padding 3, then max pooling 3 x 3
// with stride 2 and padding 1.
struct QuantizedStem {
  const std::uint8_t* x;  // (batch, 3, height, width) of uint8, or int8 if is_signed
  bool is_signed;
  std::int64_t batch, height, width;
  std::int64_t strides[4];            // of x, in elements
  const void* packed;                 // from quantized_stem_pack
  const std::uint8_t* padding_value;  // (3) of x's type; nullptr: zero
  const std::int32_t* bias;           // (out_channels), as the multiplier
  const float* multiplier;
  std::int64_t out_channels;
  std::uint8_t* out;  // (batch, pooled height, pooled width, out_channels)
};

std::int64_t quantized_stem_packed_bytes(std::int64_t out_channels);

// packed = weight (out_channels, 3, 7, 7) of `strides` elements, reordered.
void quantized_stem_pack(const std::int8_t* weight, const std::int64_t strides[4], void* packed,
                         std::int64_t out_channels);

void quantized_stem(const QuantizedStem& op, QuantizedIsa isa);

// out = float32(sum over pixels and channels of x * weight) * (multiplier / float32(pixels)) + bias
struct QuantizedHead {
  Activations x;
  const void* packed;  // from quantized_head_pack
  const float* bias;   // (classes), as the multiplier
  const float* multiplier;
  std::int64_t classes;
  float* out;  // (batch, classes)
};

std::int64_t quantized_head_packed_bytes(std::int64_t channels, std::int64_t classes);

// packed = weight (classes, channels) of `strides` elements, reordered.
void quantized_head_pack(const std::int8_t* weight, const std::int64_t strides[2], void* packed,
                         std::int64_t channels, std::int64_t classes);

void quantized_head(const QuantizedHead& op, QuantizedIsa isa);

}  // namespace resnet_fused::cpu
