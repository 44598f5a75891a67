// relu?(group_norm(x) (+ residual)), NHWC: each image's channels in groups, normalised by the mean
// and variance that a group has in that image (arXiv:1803.08494). Implementation:
// group_norm_add_relu.cpp.
#pragma once

#include <cstdint>

#include "batch_norm.h"
#include "isa.h"
#include "kernels/residual.h"

namespace resnet_fused::cpu {

struct GroupNormAddRelu {
  const void* x;      // (batch, pixels, channels), may be out itself
  Residual residual;  // may be out itself
  void* out;          // like x
  std::int64_t batch, pixels, channels;
  std::int64_t groups;  // divides channels
  Vector weight, bias;  // may be absent: 1 and 0
  double eps;
  bool relu;
  Format format;  // computed in fp32, rounded once at the end
};

// Runs on every processor. pixels >= 1.
void group_norm_add_relu(const GroupNormAddRelu& op);

}  // namespace resnet_fused::cpu
