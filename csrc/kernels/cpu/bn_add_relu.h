// out = relu?(bn(x) (+ residual)) over channels-last memory: what follows a convolution that
// another library computed.
#pragma once

#include <cstdint>

#include "batch_norm.h"
#include "isa.h"
#include "kernels/residual.h"

namespace resnet_fused::cpu {

struct BnAddRelu {
  const void* x;      // (pixels, channels), may be out itself
  Residual residual;  // may be out itself
  void* out;          // like x
  std::int64_t pixels, channels;
  BatchNorm bn;
  bool relu;
  Format format;  // computed in fp32
};

// Runs on every processor.
void bn_add_relu(const BnAddRelu& op);

}  // namespace resnet_fused::cpu
