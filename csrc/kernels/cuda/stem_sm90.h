// The stem for sm_90a. conv.h's tiles have no part in it: stem.h chooses.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/stem.h"

namespace resnet_fused {

// Whether the kernel can read these images and write this result: lines of whole 8 pixels, an even
// number of lines of the convolution's result, 16-byte aligned.
bool stem_sm90_can_implement(const Stem& arguments);

cudaError_t stem_sm90(const Stem& arguments, int num_sms, cudaStream_t stream);

}  // namespace resnet_fused
