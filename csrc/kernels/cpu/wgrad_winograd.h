// conv_wgrad for 3x3 windows of stride, padding and dilation 1 in fp32, by the adjoint of
// Winograd's F(2x2, 3x3). Implementation and figures: wgrad_winograd.cpp.
#pragma once

#include "isa.h"
#include "wgrad.h"

namespace resnet_fused::cpu {

// Whether winograd_wgrad computes it, and faster than the direct sum.
bool suits_winograd_wgrad(const ConvWgrad& conv);

// Requires isa != Isa::kNone, isa <= best_isa(), and at least one pixel and channel.
void winograd_wgrad(const ConvWgrad& conv, Isa isa);

}  // namespace resnet_fused::cpu
