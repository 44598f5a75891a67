// Batch norm's parameters as a model holds them, and the terms that the kernels apply in fp32.
#pragma once

#include <cstdint>
#include <vector>

namespace resnet_fused::cpu {

enum class VectorType { kBFloat16, kFloat32, kFloat64 };

// One value per channel, `stride` elements apart; data nullptr: absent.
struct Vector {
  const void* data;
  VectorType type;
  std::int64_t stride;
};

// Number `i` of a vector that is present.
double element(const Vector& vector, std::int64_t i);

inline double element(const Vector& vector, std::int64_t i, double absent) {
  return vector.data == nullptr ? absent : element(vector, i);
}

// Vectors that are absent count as 0 (mean, bias) and 1 (var, weight): of a BatchNorm{} nothing
// changes.
struct BatchNorm {
  Vector mean, var, weight, bias;
  double eps;
};

// The terms of some consecutive channels.
struct TermsAt {
  const float *mean, *scale, *bias;
};

// (value - mean) * scale + bias. The mean comes off first: folded into the bias it would cancel
// where it is large beside the deviation.
class Terms {
 public:
  // Computed in fp64 from the parameters, then rounded; zeros follow the last channel as far as a
  // multiple of `padded_to`.
  Terms(const BatchNorm& bn, std::int64_t channels, std::int64_t padded_to);

  TermsAt at(std::int64_t channel) const {
    const float* const values = values_.data() + channel;
    return {values, values + padded_, values + 2 * padded_};
  }

 private:
  std::int64_t padded_;
  std::vector<float> values_;
};

}  // namespace resnet_fused::cpu
