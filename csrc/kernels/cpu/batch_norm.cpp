// Batch norm's terms, computed at each call: a few microseconds for a layer, and never stale.
#include "batch_norm.h"

#include <cmath>
#include <cstring>

#include "isa.h"

namespace resnet_fused::cpu {

double element(const Vector& vector, std::int64_t i) {
  const std::int64_t at = i * vector.stride;
  switch (vector.type) {
    case VectorType::kFloat64:
      return static_cast<const double*>(vector.data)[at];
    case VectorType::kFloat32:
      return static_cast<const float*>(vector.data)[at];
    case VectorType::kBFloat16:
      break;
  }
  const std::uint32_t bits = std::uint32_t{static_cast<const BFloat16*>(vector.data)[at]} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

Terms::Terms(const BatchNorm& bn, std::int64_t channels, std::int64_t padded_to)
    : padded_(round_up(channels, padded_to)), values_(3 * padded_) {
  for (std::int64_t k = 0; k < channels; ++k) {
    const double mean = element(bn.mean, k, 0), bias = element(bn.bias, k, 0);
    const double scale = element(bn.weight, k, 1) / std::sqrt(element(bn.var, k, 1) + bn.eps);
    values_[k] = static_cast<float>(mean);
    values_[padded_ + k] = static_cast<float>(scale);
    values_[2 * padded_ + k] = static_cast<float>(bias - (mean - values_[k]) * scale);
  }
}

}  // namespace resnet_fused::cpu
