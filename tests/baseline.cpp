// What the CPU kernels compute on a processor without vector instructions that they know: the
// passes of "any machine", of integers, so that every result is exact. Ends with 1 where one is
// wrong. tests/test_packaging.py compiles it for AArch64 and runs it in an emulator.
#include <cmath>
#include <cstdio>
#include <vector>

#include "kernels/cpu/batch_norm.h"
#include "kernels/cpu/bn_add_relu.h"
#include "kernels/cpu/group_norm_add_relu.h"
#include "kernels/cpu/head.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/squeeze_excite.h"

namespace cpu = resnet_fused::cpu;

namespace {

constexpr std::int64_t kBatch = 3, kPixels = 16, kChannels = 21, kClasses = 5;

int wrong = 0;

void expect(const char* what, std::int64_t i, float found, float expected) {
  if (found == expected) return;
  std::printf("%s, element %d: %g, expected %g\n", what, static_cast<int>(i), found, expected);
  wrong = 1;
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

int main() {
  if (cpu::best_isa() != cpu::Isa::kNone) {
    std::puts("this processor has vector instructions that the kernels know");
    return 1;
  }
  if (cpu::convolves(cpu::Format::kFloat32, cpu::best_isa())) {
    std::puts("convolutions would run");
    return 1;
  }
  const std::int64_t rows = kBatch * kPixels;
  std::vector<float> x(rows * kChannels), added(x.size()), out(x.size(), NAN);
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(static_cast<int>(i * 7 % 11) - 5);
    added[i] = static_cast<float>(static_cast<int>(i * 5 % 7) - 3);
  }
  const std::vector<float> one(kChannels, 1.0f), two(kChannels, 2.0f);
  const auto vector = [](const std::vector<float>& v) {
    return cpu::Vector{v.data(), cpu::VectorType::kFloat32, 1};
  };
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
