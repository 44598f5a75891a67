// The whole bottleneck block (bottleneck.h) for sm_90a, of more inner channels than one SM can hold
// weights for: over the blocks of a cluster.
#pragma once

#include "kernels/cuda/bottleneck.h"

namespace resnet_fused {

// Whether this build and `device` have the kernel and it computes `arguments`: 16-bit types,
// channels that are multiples of 8 and 16-byte aligned tensors, stride 1, x as shortcut, inner up
// to 128, out_channels up to 512, lines of up to 28 pixels.
bool bottleneck_sm90_cluster_can_implement(const Bottleneck& arguments, int device);

// Whether it can and, by the model of time, is faster than a kernel for each layer and than the one
// of a single block: more than 64 inner channels, and lines of more than half of what it computes.
bool bottleneck_sm90_cluster_is_profitable(const Bottleneck& arguments, int device);

// As bottleneck; cudaErrorInvalidConfiguration too where the device has no room for a cluster.
cudaError_t bottleneck_sm90_cluster(void* out, const Bottleneck& arguments, int device,
                                    cudaStream_t stream);

}  // namespace resnet_fused
