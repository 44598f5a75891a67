// What the bindings of the CPU kernels share: how their arguments come, and what is checked of them.
#pragma once

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "kernels/cpu/batch_norm.h"
#include "kernels/cpu/conv.h"
#include "kernels/cpu/isa.h"
#include "program.h"
#include "tensor_arg.h"

using OptionalTensor = std::optional<TensorArg>;
using Pair = std::array<std::int64_t, 2>;
// Kernel size, stride, padding, dilation.
using Window = std::tuple<Pair, Pair, Pair, Pair>;

inline resnet_fused::cpu::Format format_of(const char* name, const TensorArg& tensor) {
  if (tensor.type == ScalarType::kBFloat16) return resnet_fused::cpu::Format::kBFloat16;
  check_type(name, tensor, ScalarType::kFloat32);
  return resnet_fused::cpu::Format::kFloat32;
}

template <typename Arguments>
void set_vector(Launch<Arguments>& launch, resnet_fused::cpu::Vector& slot, const char* name,
                const OptionalTensor& tensor, std::int64_t channels) {
  slot = {nullptr, resnet_fused::cpu::VectorType::kFloat32, 0};
  if (!tensor) return;
  check_sizes(name, *tensor, {channels});
  launch.reads(slot.data, name, *tensor);
  if (tensor->type == ScalarType::kBFloat16) {
    slot.type = resnet_fused::cpu::VectorType::kBFloat16;
  } else if (tensor->type == ScalarType::kFloat64) {
    slot.type = resnet_fused::cpu::VectorType::kFloat64;
  } else {
    check_type(name, *tensor, ScalarType::kFloat32);
  }
  slot.stride = tensor->strides[0];
}

// Throws where isa cannot convolve in this format.
inline void check_convolves(resnet_fused::cpu::Format format, resnet_fused::cpu::Isa isa) {
  if (!resnet_fused::cpu::convolves(format, isa)) {
    refuse("bfloat16 needs AVX512_BF16; ask cpu_convolves_bf16() first");
  }
}

// The instruction set called `name`, "" for the best; throws where the processor lacks it.
inline resnet_fused::cpu::Isa choose_isa(const std::string& name) {
  const resnet_fused::cpu::Isa best = resnet_fused::cpu::best_isa();
  resnet_fused::cpu::Isa chosen = best;
  if (name == "avx512") {
    chosen = resnet_fused::cpu::Isa::kAvx512;
  } else if (name == "avx2") {
    chosen = resnet_fused::cpu::Isa::kAvx2;
  } else if (!name.empty()) {
    refuse("isa must be \"\", \"avx2\" or \"avx512\", found \"" + name + "\"");
  }
  if (chosen == resnet_fused::cpu::Isa::kNone || chosen > best) {
    refuse("this processor offers neither AVX-512 nor what isa=\"" + name +
           "\" asks for; cpu_isa() tells what it has");
  }
  return chosen;
}

inline resnet_fused::cpu::Window window_of(const Window& window) {
  const auto& [kernel, stride, padding, dilation] = window;
  resnet_fused::cpu::Window all;
  for (int axis = 0; axis < 2; ++axis) {
    constexpr std::int64_t kLimit = std::int64_t{1} << 31;
    if (kernel[axis] < 1 || stride[axis] < 1 || dilation[axis] < 1 || padding[axis] < 0 ||
        std::max({kernel[axis], stride[axis], dilation[axis], padding[axis]}) > kLimit) {
      refuse(
          "kernel, stride and dilation must be at least 1 and padding at least 0, all at most "
          "2^31");
    }
    all.kernel[axis] = kernel[axis];
    all.stride[axis] = stride[axis];
    all.padding[axis] = padding[axis];
    all.dilation[axis] = dilation[axis];
  }
  return all;
}
