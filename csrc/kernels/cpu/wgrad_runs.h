// Where the products of wgrad.cpp and wgrad_winograd.cpp find their operands.
#pragma once

#include <cstdint>

namespace resnet_fused::cpu {

// Pixels at equal distances in both operands: words to the first of x, pixels to that of the
// gradient.
struct Run {
  std::int64_t x, grad, count;
};

struct RunList {
  const Run *begin, *end;
};

}  // namespace resnet_fused::cpu
