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

struct BatchNorm {
  Vector mean, var;
  Vector weight, bias;  // may be absent: 1 and 0
  double eps;
};

// (value - mean) * scale + bias. The mean comes off first: folded into the bias it would cancel
// where it is large beside the deviation.
class Terms {
 public:
  // In fp64 from the parameters, each term rounded once; zeros follow the last channel as far as a
  // multiple of `padded_to`.
  Terms(const BatchNorm& bn, std::int64_t channels, std::int64_t padded_to);

  const float* mean() const { return values_.data(); }
  const float* scale() const { return values_.data() + padded_; }
  const float* bias() const { return values_.data() + 2 * padded_; }

 private:
  std::int64_t padded_;
  std::vector<float> values_;
};

}  // namespace resnet_fused::cpu
