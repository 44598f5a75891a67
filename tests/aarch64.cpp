// What the CPU kernels compute on AArch64, of integers, so that every result is exact:
// convolutions, and the passes of "any machine". Ends with 1 where one is wrong.
// tests/test_packaging.py compiles it and runs it in an emulator, with and without the processor's
// bfloat16 ("bf16", "plain").
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels/cpu/batch_norm.h"
#include "kernels/cpu/bn_add_relu.h"
#include "kernels/cpu/conv.h"
#include "kernels/cpu/group_norm_add_relu.h"
#include "kernels/cpu/head.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/squeeze_excite.h"
#include "kernels/cpu/stem.h"
#include "kernels/cpu/winograd.h"

namespace cpu = resnet_fused::cpu;

namespace {

constexpr std::int64_t kBatch = 3, kPixels = 16, kChannels = 21, kClasses = 5;

int wrong = 0;

void expect(const char* what, std::int64_t i, float found, float expected) {
  if (found == expected) return;
  std::printf("%s, element %d: %g, expected %g\n", what, static_cast<int>(i), found, expected);
  wrong = 1;
}

// To the nearest, ties to even.
cpu::BFloat16 bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<cpu::BFloat16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float number(float value) { return value; }
float number(cpu::BFloat16 half) {
  const std::uint32_t bits = std::uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename Element>
Element element(float value) {
  if constexpr (sizeof(Element) == 2) return bfloat16(value);
  return value;
}

template <typename Element>
constexpr cpu::Format kFormatOf =
    sizeof(Element) == 2 ? cpu::Format::kBFloat16 : cpu::Format::kFloat32;

// Whole numbers from -most to most.
template <typename Element>
std::vector<Element> numbers(std::int64_t count, int most) {
  std::vector<Element> values(count);
  std::uint32_t state = 1;
  for (Element& value : values) {
    state = state * 1664525 + 1013904223;
    value = element<Element>(static_cast<int>((state >> 16) % (2 * most + 1)) - most);
  }
  return values;
}

cpu::Vector vector(const std::vector<float>& v) { return {v.data(), cpu::VectorType::kFloat32, 1}; }

// relu?(2 (conv(x) - 1) + 1 (+ residual)), by its definition; x is NHWC, weight in PyTorch's order.
template <typename Element>
std::vector<float> convolved(const cpu::Conv& conv, const Element* x, const Element* weight,
                             const Element* residual) {
  const cpu::Window& w = conv.window;
  const std::int64_t height = cpu::conv_output_size(w, 0, conv.height);
  const std::int64_t width = cpu::conv_output_size(w, 1, conv.width);
  std::vector<float> out;
  for (std::int64_t n = 0; n < conv.batch; ++n) {
    for (std::int64_t p = 0; p < height * width; ++p) {
      for (std::int64_t k = 0; k < conv.out_channels; ++k) {
        float sum = 0;
        for (std::int64_t i = 0; i < w.kernel[0]; ++i) {
          for (std::int64_t j = 0; j < w.kernel[1]; ++j) {
            const std::int64_t row = p / width * w.stride[0] - w.padding[0] + i * w.dilation[0];
            const std::int64_t column = p % width * w.stride[1] - w.padding[1] + j * w.dilation[1];
            if (row < 0 || row >= conv.height || column < 0 || column >= conv.width) continue;
            const Element* const at =
                x + ((n * conv.height + row) * conv.width + column) * conv.in_channels;
            const Element* const taps =
                weight + k * conv.in_channels * w.kernel[0] * w.kernel[1] + i * w.kernel[1] + j;
            for (std::int64_t c = 0; c < conv.in_channels; ++c) {
              sum += number(at[c]) * number(taps[c * w.kernel[0] * w.kernel[1]]);
            }
          }
        }
        float value = 2 * (sum - 1) + 1;
        if (residual != nullptr) value += number(residual[out.size()]);
        out.push_back(conv.relu ? std::fmax(value, 0.0f) : value);
      }
    }
  }
  return out;
}

// The direct kernel and, where `winograd`, that one.
template <typename Element>
void check_conv(const char* what, cpu::Conv conv, bool adds, bool winograd = false) {
  const std::int64_t taps = conv.window.kernel[0] * conv.window.kernel[1];
  const std::int64_t height = cpu::conv_output_size(conv.window, 0, conv.height);
  const std::int64_t width = cpu::conv_output_size(conv.window, 1, conv.width);
  const std::int64_t results = conv.batch * height * width * conv.out_channels;
  const auto x = numbers<Element>(conv.batch * conv.height * conv.width * conv.in_channels, 2);
  const auto weight = numbers<Element>(conv.out_channels * conv.in_channels * taps, 1);
  const auto residual = numbers<Element>(results, 9);
  const std::vector<float> one(conv.out_channels, 1.0f), two(conv.out_channels, 2.0f);
  const cpu::BatchNorm bn{vector(one), vector(one), vector(two), vector(one), 0.0};
  const auto expected = convolved(conv, x.data(), weight.data(), adds ? residual.data() : nullptr);

  const std::int64_t strides[4] = {conv.in_channels * taps, taps, conv.window.kernel[1], 1};
  std::vector<std::uint32_t> packed(cpu::conv_weight_words(
      conv.in_channels, conv.out_channels, taps, kFormatOf<Element>, cpu::Isa::kNeon));
  cpu::conv_transform_weights(weight.data(), strides, packed.data(), conv.in_channels,
                              conv.out_channels, conv.window.kernel, kFormatOf<Element>,
                              cpu::Isa::kNeon);
  std::vector<Element> out(results, element<Element>(NAN));
  conv.x = x.data();
  conv.packed = packed.data();
  conv.out = out.data();
  conv.bn = bn;
  conv.format = kFormatOf<Element>;
  if (adds) {
    conv.residual.data = residual.data();
    conv.residual.channels = conv.residual.pixel = conv.out_channels;
    conv.residual.height = height;
    conv.residual.width = width;
    conv.residual.line = width * conv.out_channels;
    conv.residual.image = height * conv.residual.line;
  }
  cpu::conv_bn(conv, cpu::best_isa());
  const auto check = [&] {
    for (std::int64_t i = 0; i < results; ++i) {
      expect(what, i, number(out[i]), number(element<Element>(expected[i])));
    }
  };
  check();
  if constexpr (sizeof(Element) == 4) {
    if (!winograd) return;
    std::vector<float> transformed(
        cpu::winograd_weight_floats(conv.in_channels, conv.out_channels));
    cpu::winograd_transform_weights(weight.data(), strides, transformed.data(), conv.in_channels,
                                    conv.out_channels);
    out.assign(results, NAN);
    cpu::winograd_conv(
        {x.data(), transformed.data(), conv.residual, out.data(), conv.batch, conv.height,
         conv.width, conv.in_channels, conv.out_channels, bn, conv.relu},
        cpu::best_isa());
    check();
  }
}

template <typename Element>
void check_stem() {
  cpu::Conv conv{};
  conv.batch = 2;
  conv.height = 33;
  conv.width = 38;
  conv.in_channels = 3;
  conv.out_channels = 64;
  conv.window = {{7, 7}, {2, 2}, {3, 3}, {1, 1}};
  conv.relu = true;
  const auto x = numbers<Element>(conv.batch * conv.height * conv.width * 3, 2);
  const auto weight = numbers<Element>(64 * 3 * 49, 1);
  const std::vector<float> one(64, 1.0f), two(64, 2.0f);
  const auto expected = convolved<Element>(conv, x.data(), weight.data(), nullptr);

  const std::int64_t strides[4] = {147, 49, 7, 1};
  std::vector<std::uint32_t> packed(cpu::stem_weight_words(64, kFormatOf<Element>));
  cpu::stem_transform_weights(weight.data(), strides, packed.data(), 64, kFormatOf<Element>);
  const std::int64_t rows = cpu::stem_halved(conv.height), columns = cpu::stem_halved(conv.width);
  const std::int64_t height = cpu::stem_halved(rows), width = cpu::stem_halved(columns);
  std::vector<Element> out(conv.batch * height * width * 64, element<Element>(NAN));
  cpu::stem_conv_pool({x.data(),
                       packed.data(),
                       out.data(),
                       conv.batch,
                       conv.height,
                       conv.width,
                       64,
                       {vector(one), vector(one), vector(two), vector(one), 0.0},
                       kFormatOf<Element>},
                      cpu::best_isa());
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::int64_t pixel = i / 64, n = pixel / (height * width);
    float most = 0;
    for (std::int64_t y = -1; y <= 1; ++y) {
      for (std::int64_t z = -1; z <= 1; ++z) {
        const std::int64_t row = pixel / width % height * 2 + y, column = pixel % width * 2 + z;
        if (row < 0 || row >= rows || column < 0 || column >= columns) continue;
        most = std::fmax(most, expected[((n * rows + row) * columns + column) * 64 + i % 64]);
      }
    }
    expect("stem", i, number(out[i]), number(element<Element>(most)));
  }
}

template <typename Element>
void check_convolutions() {
  const auto conv = [](std::int64_t batch, std::int64_t height, std::int64_t width,
                       std::int64_t in_channels, std::int64_t out_channels, cpu::Window window,
                       bool relu) {
    cpu::Conv made{};
    made.batch = batch;
    made.height = height;
    made.width = width;
    made.in_channels = in_channels;
    made.out_channels = out_channels;
    made.window = window;
    made.relu = relu;
    return made;
  };
  const cpu::Window three{{3, 3}, {1, 1}, {1, 1}, {1, 1}};
  check_conv<Element>("3x3", conv(2, 9, 15, 32, 48, three, true), true, true);
  check_conv<Element>("3x3, odd", conv(1, 8, 7, 21, 35, three, false), false);
  check_conv<Element>("1x1", conv(2, 7, 7, 70, 64, {{1, 1}, {1, 1}, {0, 0}, {1, 1}}, true), true);
  check_conv<Element>("1x1, stride 2",
                      conv(1, 9, 9, 32, 40, {{1, 1}, {2, 2}, {0, 0}, {1, 1}}, false), false);
  check_conv<Element>("3x3, stride 2",
                      conv(1, 11, 30, 16, 32, {{3, 3}, {2, 2}, {1, 1}, {1, 1}}, true), false);
  check_conv<Element>("dilated", conv(1, 10, 12, 24, 32, {{3, 3}, {1, 1}, {2, 2}, {2, 2}}, true),
                      true);
  check_stem<Element>();
}

resnet_fused::Residual added_to_all(const std::vector<float>& values) {
  resnet_fused::Residual residual;
  residual.data = values.data();
  residual.channels = kChannels;
  residual.width = kPixels;
  residual.pixel = kChannels;
  residual.line = residual.image = kPixels * kChannels;
  return residual;
}

}  // namespace

int main(int count, char** arguments) {
  const bool has_bfloat16 = count == 2 && std::strcmp(arguments[1], "bf16") == 0;
  if (cpu::best_isa() != cpu::Isa::kNeon ||
      !cpu::convolves(cpu::Format::kFloat32, cpu::best_isa()) ||
      cpu::convolves(cpu::Format::kBFloat16, cpu::best_isa()) != has_bfloat16) {
    std::puts("the processor is not taken for what it is");
    return 1;
  }
  check_convolutions<float>();
  if (has_bfloat16) check_convolutions<cpu::BFloat16>();

  const std::int64_t rows = kBatch * kPixels;
  std::vector<float> x(rows * kChannels), added(x.size()), out(x.size(), NAN);
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(static_cast<int>(i * 7 % 11) - 5);
    added[i] = static_cast<float>(static_cast<int>(i * 5 % 7) - 3);
  }
  const std::vector<float> one(kChannels, 1.0f), two(kChannels, 2.0f);
  const cpu::BatchNorm bn{vector(one), vector(one), vector(two), vector(one), 0.0};
  cpu::bn_add_relu({x.data(), added_to_all(added), out.data(), rows, kChannels, bn, true,
                    cpu::Format::kFloat32});
  for (std::size_t i = 0; i < x.size(); ++i) {
    expect("bn_add_relu", i, out[i], std::fmax(2 * (x[i] - 1) + 1 + added[i], 0.0f));
  }

  // 0 and 2 by turns: a mean of 1 and a variance of 1.
  std::vector<float> turns(x.size());
  for (std::int64_t i = 0; i < rows * kChannels; ++i) turns[i] = 2.0f * (i / kChannels % 2);
  cpu::group_norm_add_relu({turns.data(), added_to_all(added), out.data(), kBatch, kPixels,
                            kChannels, 3, vector(two), vector(one), 0.0, true,
                            cpu::Format::kFloat32});
  for (std::size_t i = 0; i < x.size(); ++i) {
    expect("group_norm_add_relu", i, out[i], std::fmax(2 * (turns[i] - 1) + 1 + added[i], 0.0f));
  }

  std::vector<float> weight(kClasses * kChannels), logits(kBatch * kClasses, NAN);
  for (std::size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<float>(i % 3) - 1;
  cpu::head({x.data(), weight.data(), nullptr, logits.data(), kBatch, kPixels, kChannels, kClasses,
             kChannels, cpu::Format::kFloat32});
  for (std::int64_t n = 0; n < kBatch; ++n) {
    for (std::int64_t k = 0; k < kClasses; ++k) {
      float sum = 0;
      for (std::int64_t i = 0; i < kPixels * kChannels; ++i) {
        sum += x[n * kPixels * kChannels + i] * weight[k * kChannels + i % kChannels];
      }
      expect("head", n * kClasses + k, logits[n * kClasses + k], sum / kPixels);
    }
  }

  // Gates of 0, 1/2 and 1: what is not zero before the sigmoid is at least 64.
  std::vector<float> expand(kChannels * kClasses);
  for (std::size_t i = 0; i < expand.size(); ++i) {
    expand[i] = 4096 * (static_cast<float>(i * 5 % 3) - 1);
  }
  cpu::SqueezeExcite gated{};
  gated.x = x.data();
  gated.reduce = weight.data();
  gated.expand = expand.data();
  gated.residual = added_to_all(added);
  gated.out = out.data();
  gated.batch = kBatch;
  gated.pixels = kPixels;
  gated.channels = kChannels;
  gated.hidden = kClasses;
  gated.relu = true;
  gated.format = cpu::Format::kFloat32;
  cpu::squeeze_excite(gated);
  for (std::int64_t i = 0; i < rows * kChannels; ++i) {
    const std::int64_t n = i / (kPixels * kChannels), c = i % kChannels;
    float sum = 0;
    for (std::int64_t k = 0; k < kClasses; ++k) {
      sum += expand[c * kClasses + k] * std::fmax(logits[n * kClasses + k], 0.0f);
    }
    const float gate = sum > 0 ? 1.0f : sum < 0 ? 0.0f : 0.5f;
    expect("squeeze_excite", i, out[i], std::fmax(x[i] * gate + added[i], 0.0f));
  }
  return wrong;
}
