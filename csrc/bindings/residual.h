// A residual as Python gives it to the kernels.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "kernels/residual.h"

// Address, channels, and elements from an image, a line and a pixel to the next; None for none.
using ResidualArgument =
    std::optional<std::tuple<std::uintptr_t, std::int64_t, std::array<std::int64_t, 3>>>;

// Of a result at `out` of (batch, height, width, channels) elements of `size` bytes, none of them
// 0. Throws ValueError where it cannot be read, or where writing the result would change it: they
// may only be one tensor.
inline resnet_fused::Residual residual_of(const ResidualArgument& argument, std::uintptr_t out,
                                          const std::array<std::int64_t, 4>& shape,
                                          std::int64_t size) {
  if (!argument) return {};
  const auto& [address, channels, strides] = *argument;
  const auto& [batch, height, width, out_channels] = shape;
  const auto& [image, line, pixel] = strides;
  constexpr std::int64_t kLimit = std::int64_t{1} << 48;
  if (address == 0) throw std::invalid_argument("residual is a null pointer");
  if (address % size != 0) throw std::invalid_argument("residual is not aligned to its elements");
  if (channels < 1 || channels > out_channels) {
    throw std::invalid_argument("residual must have 1 to " + std::to_string(out_channels) +
                                " channels, found " + std::to_string(channels));
  }
  std::int64_t reach = channels;
  for (const auto& [count, stride] :
       {std::pair{batch, image}, std::pair{height, line}, std::pair{width, pixel}}) {
    if (stride < 0 || stride > kLimit / count) {
      throw std::invalid_argument("residual has a stride of " + std::to_string(stride));
    }
    reach += (count - 1) * stride;
  }
  const resnet_fused::Residual residual{
      reinterpret_cast<const void*>(address), channels, height, width, image, line, pixel};
  const bool same =
      address == out && channels == out_channels && pixel == channels && residual.in_line();
  const std::int64_t out_bytes = batch * height * width * out_channels * size;
  if (!same && out < address + reach * size && address < out + out_bytes) {
    throw std::invalid_argument("out overlaps residual");
  }
  return residual;
}
