// relu?(x · gate (+ residual)), NHWC, where an image's gate is made of its channels' means by two
// small linear layers (squeeze and excitation, arXiv:1709.01507). Implementation:
// squeeze_excite.cpp.
#pragma once

#include <cstdint>

#include "isa.h"
#include "kernels/residual.h"

namespace resnet_fused::cpu {

struct SqueezeExcite {
  const void* x;            // (batch, pixels, channels), may be out itself
  const void* reduce;       // (hidden, channels), dense
  const void* reduce_bias;  // (hidden); nullptr: none
  const void* expand;       // (channels, hidden), dense
  const void* expand_bias;  // (channels); nullptr: none
  Residual residual;        // may be out itself
  void* out;                // like x
  std::int64_t batch, pixels, channels, hidden;
  bool relu;
  Format format;  // of everything; computed in fp32, rounded once at the end
};

// Runs on every processor. pixels and hidden >= 1.
void squeeze_excite(const SqueezeExcite& op);

}  // namespace resnet_fused::cpu
