// Batch norm's terms, computed at each call: a few microseconds for a layer, and never stale.
#include "batch_norm.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"

namespace resnet_fused::cpu {

namespace {

constexpr std::int64_t kChannels = 64;  // at a time

double number(double value) { return value; }
double number(float value) { return value; }
double number(BFloat16 value) {
  const std::uint32_t bits = std::uint32_t{value} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <typename Number>
void read(const Vector& vector, std::int64_t first, std::int64_t count, double* to) {
  const auto* const from = static_cast<const Number*>(vector.data) + first * vector.stride;
  for (std::int64_t i = 0; i < count; ++i) to[i] = number(from[i * vector.stride]);
}

// Numbers `first` to before first + count; `absent` where there is no vector.
void read(const Vector& vector, std::int64_t first, std::int64_t count, double absent, double* to) {
  if (vector.data == nullptr) {
    std::fill_n(to, count, absent);
    return;
  }
  switch (vector.type) {
    case VectorType::kFloat64:
      return read<double>(vector, first, count, to);
    case VectorType::kFloat32:
      return read<float>(vector, first, count, to);
    case VectorType::kBFloat16:
      return read<BFloat16>(vector, first, count, to);
  }
}

}  // namespace

double element(const Vector& vector, std::int64_t i) {
  double value;
  read(vector, i, 1, 0, &value);
  return value;
}

Terms::Terms(const BatchNorm& bn, std::int64_t channels, std::int64_t padded_to)
    : padded_(round_up(channels, padded_to)), values_(3 * padded_) {
  double mean[kChannels], var[kChannels], weight[kChannels], bias[kChannels];
  for (std::int64_t first = 0; first < channels; first += kChannels) {
    const std::int64_t count = std::min(kChannels, channels - first);
    read(bn.mean, first, count, 0, mean);
    read(bn.var, first, count, 1, var);
    read(bn.weight, first, count, 1, weight);
    read(bn.bias, first, count, 0, bias);
    float* const values = values_.data() + first;
    for (std::int64_t k = 0; k < count; ++k) {
      const double scale = weight[k] / std::sqrt(var[k] + bn.eps);
      values[k] = static_cast<float>(mean[k]);
      values[padded_ + k] = static_cast<float>(scale);
      values[2 * padded_ + k] = static_cast<float>(bias[k] - (mean[k] - values[k]) * scale);
    }
  }
}

}  // namespace resnet_fused::cpu
