// The 3 x 3 convolutions of a training step on sm_90a whose tiles are whole lines.
#pragma once

#include <cstdint>

#include "kernels/cuda/conv_training_sm90.h"

namespace resnet_fused {

// Whether `tile` is one of this kernel's.
bool is_lines(TrainingTile tile);

// Whether `tile` can compute the convolution `a`, of which conv_training_sm90.cu knows that tensor
// maps can express it: a 3 x 3 window that moves by single pixels, with a padding of 1, on lines of
// 7 pixels or more that are short enough.
bool training_lines_can_implement(const ConvBn& a, TrainingTile tile);

// As for the other tiles (conv_training_sm90.cu), cycles of the SM with the most tiles.
std::int64_t training_lines_cycles(const ConvBn& a, TrainingTile tile, int num_sms);

// Parts of statistics or sums.
int training_lines_parts(const ConvBn& a, TrainingTile tile);

// Queues `a`, which `tile` can implement. With below_scale_shift it is a gradient, as
// as_convolution says: the window is turned round, the weight lies as (channels of a, 9,
// out_channels), and a.residual masks.
cudaError_t training_lines(const ConvBn& a, const float* below_scale_shift, float* parts,
                           TrainingTile tile, int num_sms, cudaStream_t stream);

}  // namespace resnet_fused
