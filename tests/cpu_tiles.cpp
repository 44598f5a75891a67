// The convolutions in tiles (AMX), called directly: tests/test_cpu_tiles.py compiles this with the
// kernels and amx_emulation.h before all of them, and fills the structs through ctypes.
#include <memory>

#include "kernels/cpu/conv.h"
#include "kernels/cpu/quantized.h"

namespace cpu = resnet_fused::cpu;

namespace {

struct Layer {
  const void *x, *weight;  // NHWC; contiguous (out_channels, in_channels, height, width)
  const float *mean, *var, *scale, *shift;
  std::int64_t batch, height, width, in_channels, out_channels;
  cpu::Window window;
  double eps;
};

struct QuantizedLayer {
  const std::uint8_t* x;
  const void* packed;
  const std::uint8_t* padding_value;
  std::int64_t is_signed, batch, height, width, channels, out_channels, groups;
  cpu::Window window;
};

cpu::QuantizedConvolution quantized(const QuantizedLayer& layer) {
  return {{layer.x, layer.is_signed != 0, layer.batch, layer.height, layer.width, layer.channels},
          layer.packed,
          layer.padding_value,
          layer.out_channels,
          layer.groups,
          layer.window};
}

cpu::Vector vector(const float* data) { return {data, cpu::VectorType::kFloat32, 1}; }

// The convolution of bfloat16, and its packed weights.
std::unique_ptr<std::uint32_t[]> set(cpu::Conv& conv, const Layer& layer) {
  const std::int64_t *const kernel = layer.window.kernel, taps = kernel[0] * kernel[1];
  const auto format = cpu::Format::kBFloat16;
  std::unique_ptr<std::uint32_t[]> packed(new std::uint32_t[cpu::conv_weight_words(
      layer.in_channels, layer.out_channels, taps, format, cpu::Isa::kAmx)]);
  const std::int64_t strides[4] = {layer.in_channels * taps, taps, kernel[1], 1};
  cpu::conv_transform_weights(layer.weight, strides, packed.get(), layer.in_channels,
                              layer.out_channels, kernel, format, cpu::Isa::kAmx);
  conv = cpu::Conv{};
  conv.x = layer.x;
  conv.packed = packed.get();
  conv.batch = layer.batch;
  conv.height = layer.height;
  conv.width = layer.width;
  conv.in_channels = layer.in_channels;
  conv.out_channels = layer.out_channels;
  conv.window = layer.window;
  conv.format = format;
  conv.bn = {vector(layer.mean), vector(layer.var), vector(layer.scale), vector(layer.shift),
             layer.eps};
  return packed;
}

}  // namespace

// residual: dense, of the result's size; nullptr: none. projection: nullptr: none.
extern "C" void conv_bn(const Layer* layer, const Layer* projection, const void* residual,
                        void* out, int relu) {
  cpu::Conv conv, added;
  const auto packed = set(conv, *layer);
  const auto packed_projection = set(added, projection == nullptr ? *layer : *projection);
  if (projection != nullptr) conv.projection = &added;
  if (residual != nullptr) {
    auto& to = conv.residual;
    to.data = residual;
    to.channels = to.pixel = conv.out_channels;
    to.height = cpu::conv_output_size(conv.window, 0, conv.height);
    to.width = cpu::conv_output_size(conv.window, 1, conv.width);
    to.line = to.width * to.pixel;
    to.image = to.height * to.line;
  }
  conv.out = out;
  conv.relu = relu != 0;
  cpu::conv_bn(conv, cpu::Isa::kAmx);
}

// residual: nullptr or of the strides image, line and pixel. projection: nullptr: none.
extern "C" void quantized_conv(const QuantizedLayer* layer, const QuantizedLayer* projection,
                               const std::int32_t* bias, const float* multiplier,
                               const float* shortcut_scale, const void* residual,
                               int residual_is_signed, std::int64_t residual_channels,
                               const std::int64_t residual_strides[3], void* out, int relu) {
  cpu::QuantizedConv op{};
  op.conv = quantized(*layer);
  op.projected = projection != nullptr;
  if (op.projected) op.projection = quantized(*projection);
  op.bias = bias;
  op.multiplier = multiplier;
  op.shortcut_scale = shortcut_scale;
  if (residual != nullptr) {
    op.residual.data = residual;
    op.residual.channels = residual_channels;
    op.residual.height = cpu::conv_output_size(layer->window, 0, layer->height);
    op.residual.width = cpu::conv_output_size(layer->window, 1, layer->width);
    op.residual.image = residual_strides[0];
    op.residual.line = residual_strides[1];
    op.residual.pixel = residual_strides[2];
  }
  op.residual_is_signed = residual_is_signed != 0;
  op.out = out;
  op.relu = relu != 0;
  cpu::quantized_conv(op, cpu::QuantizedIsa::kAmx);
}
