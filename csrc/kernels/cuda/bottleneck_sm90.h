// The whole bottleneck block (bottleneck.h) for sm_90a.
#pragma once

#include "kernels/cuda/bottleneck.h"

namespace resnet_fused {

// Whether this build and `device` have the kernel and it computes `arguments`: 16-bit types,
// channels that are multiples of 8 and 16-byte aligned tensors, stride 1, inner up to 64,
// out_channels up to 256, and with a projection channels up to 64. Where it can it is also faster
// than a kernel for each layer (seen on an H200 at 1, 32 and 256 images).
bool bottleneck_sm90_can_implement(const Bottleneck& arguments, int device);

// As bottleneck.
cudaError_t bottleneck_sm90(void* out, const Bottleneck& arguments, int device,
                            cudaStream_t stream);

}  // namespace resnet_fused
