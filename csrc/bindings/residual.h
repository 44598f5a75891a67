// A residual as the kernels of the CPU and the GPU take it.
#pragma once

#include <optional>

#include "kernels/residual.h"
#include "program.h"
#include "tensor_arg.h"

// Whether element for element they lie alike: `out` is dense and channels_last.
inline bool is_like(const std::optional<TensorArg>& residual, const TensorArg& out) {
  return residual && residual->sizes == out.sizes && residual->dense({0, 2, 3, 1});
}

// Of a result `out` (N, K, P, Q) without empty sizes, dense and channels_last. Throws ValueError
// where the residual, of that type, cannot be read, or where writing `out` would change it: they
// may only be one tensor.
template <typename Arguments>
void set_residual(Launch<Arguments>& launch, resnet_fused::Residual& slot,
                  const std::optional<TensorArg>& residual, const TensorArg& out, ScalarType type) {
  slot = {};
  if (!residual) return;
  check_rank("residual", *residual, 4);
  check_type("residual", *residual, type);
  const auto& [batch, out_channels, height, width] = out.sizes;
  const std::int64_t channels = residual->sizes[1];
  if (channels < 1 || channels > out_channels) {
    refuse("residual must have 1 to " + std::to_string(out_channels) + " channels, found " +
           std::to_string(channels));
  }
  check_sizes("residual", *residual, {batch, channels, height, width});
  if (channels > 1 && residual->strides[1] != 1) refuse("residual must have adjacent channels");
  auto [image, unused, line, pixel] = residual->strides;
  // Along sizes of 1 a stride may be any; here it is that of a tensor without gaps.
  if (width == 1) pixel = height > 1 ? line : batch > 1 ? image : channels;
  if (height == 1) line = width * pixel;
  if (batch == 1) image = height * line;
  const bool same = residual->address == out.address && is_like(residual, out);
  if (!same) check_apart("out", out, "residual", *residual);
  launch.reads(slot.data, "residual", *residual);
  slot.channels = channels;
  slot.height = height;
  slot.width = width;
  slot.image = image;
  slot.line = line;
  slot.pixel = pixel;
}

template <typename Arguments>
void set_residual(Launch<Arguments>& launch, resnet_fused::Residual& slot,
                  const std::optional<TensorArg>& residual, const TensorArg& out) {
  set_residual(launch, slot, residual, out, out.type);
}

// Of a quantised convolution: which of them it has.
inline void check_shortcut(bool scale, bool residual, bool projection) {
  if (residual && projection) refuse("residual and projection exclude each other");
  if (scale != (residual || projection)) {
    refuse("shortcut_scale goes with a residual or a projection, and with nothing else");
  }
}
