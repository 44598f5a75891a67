// The whole bottleneck block (bottleneck.h) for sm_90a.
#pragma once

#include "kernels/cuda/bottleneck.h"

namespace resnet_fused {

// Whether this build and `device` have the kernel and it computes `arguments`: 16-bit types,
// channels that are multiples of 8 and 16-byte aligned tensors, stride 1, inner up to 64,
// out_channels up to 256, and with a projection channels up to 64.
bool bottleneck_sm90_can_implement(const Bottleneck& arguments, int device);

// Whether it can and, by the model of time, is faster than other kernels: where every block has
// lines enough.
bool bottleneck_sm90_is_profitable(const Bottleneck& arguments, int device);

// As bottleneck.
cudaError_t bottleneck_sm90(void* out, const Bottleneck& arguments, int device,
                            cudaStream_t stream);

}  // namespace resnet_fused
