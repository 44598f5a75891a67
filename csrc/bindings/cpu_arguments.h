// What the bindings of the CPU kernels share: instruction sets, windows, packed weights.
#pragma once

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/cpu/batch_norm.h"
#include "kernels/cpu/conv.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/winograd.h"
#include "program.h"
#include "tensor_arg.h"

namespace cpu = resnet_fused::cpu;

using OptionalTensor = std::optional<TensorArg>;
using Pair = std::array<std::int64_t, 2>;
// Kernel size, stride, padding, dilation.
using Window = std::tuple<Pair, Pair, Pair, Pair>;

// What a kernel takes besides the instructions to use.
template <typename Op, typename Isa = cpu::Isa>
struct WithIsa {
  Op op;
  Isa isa;

  template <auto kKernel>
  void call(std::uintptr_t) {
    kKernel(op, isa);
  }
};

inline cpu::Format format_of(const char* name, const TensorArg& tensor) {
  if (tensor.type == ScalarType::kBFloat16) return cpu::Format::kBFloat16;
  check_type(name, tensor, ScalarType::kFloat32);
  return cpu::Format::kFloat32;
}

template <typename Arguments>
void set_vector(Launch<Arguments>& launch, cpu::Vector& slot, const char* name,
                const OptionalTensor& tensor, std::int64_t channels) {
  slot = {nullptr, cpu::VectorType::kFloat32, 0};
  if (!tensor) return;
  check_sizes(name, *tensor, {channels});
  launch.reads(slot.data, name, *tensor);
  if (tensor->type == ScalarType::kBFloat16) {
    slot.type = cpu::VectorType::kBFloat16;
  } else if (tensor->type == ScalarType::kFloat64) {
    slot.type = cpu::VectorType::kFloat64;
  } else {
    check_type(name, *tensor, ScalarType::kFloat32);
  }
  slot.stride = tensor->strides[0];
}

// Throws where isa cannot convolve in this format.
inline void check_convolves(cpu::Format format, cpu::Isa isa) {
  if (!cpu::convolves(format, isa)) {
    refuse(
        "bfloat16 needs isa=\"avx2\", AVX512_BF16 or Arm's FEAT_BF16, isa=\"amx\" bfloat16 and "
        "AMX; "
        "ask cpu_convolves_bf16() and cpu_has_amx_bf16() first");
  }
}

inline const char* isa_name(cpu::Isa isa) {
  switch (isa) {
    case cpu::Isa::kAmx:
      return "amx";
    case cpu::Isa::kAvx512:
      return "avx512";
    case cpu::Isa::kAvx2:
      return "avx2";
    case cpu::Isa::kNeon:
      return "neon";
    case cpu::Isa::kNone:
      break;
  }
  return "";
}

// The instruction set called `name`, "" for the best; throws where the processor lacks it, or the
// kernel, which has those of x86 vectors and `more`.
inline cpu::Isa choose_isa(const std::string& name, std::initializer_list<cpu::Isa> more = {}) {
  std::vector<cpu::Isa> written(more);
  written.insert(written.end(), {cpu::Isa::kAvx2, cpu::Isa::kAvx512});
  const cpu::Isa best = cpu::best_isa();
  for (const cpu::Isa isa : written) {
    if (name.empty() ? isa != best : name != isa_name(isa)) continue;
    const bool offered = isa == cpu::Isa::kAmx    ? cpu::has_amx_bf16()
                         : isa == cpu::Isa::kNeon ? best == isa
                                                  : isa <= best;
    if (offered) return isa;
  }
  std::string names;
  for (const cpu::Isa isa : written) names += std::string(", \"") + isa_name(isa) + "\"";
  refuse("isa must be \"\"" + names + ", and offered by this processor, found \"" + name +
         "\"; cpu_isa() tells what it has");
}

inline void check_weight(const TensorArg& weight, int rank = 4) {
  check_rank("weight", weight, rank);
  if (weight.numel() == 0) refuse("weight is empty: " + listed(weight.sizes.data(), rank));
}

template <typename Arguments, typename T>
void set_packed(Launch<Arguments>& launch, const T*& slot, const TensorArg& packed,
                std::int64_t bytes) {
  check_array("packed", packed, ScalarType::kUInt8, {bytes});
  if (packed.address % sizeof(float) != 0) refuse("packed is not aligned to 4 bytes");
  launch.reads(slot, "packed", packed);
}

// Defines NAME_packed_bytes(weight, options) as `bytes`, and NAME_pack(weight, packed, options) by
// `pack`(weight's memory, packed memory, weight, options).
template <typename... Options, typename Pack, typename... Names>
void def_packing(pybind11::module_& module, const std::string& name,
                 std::int64_t (*bytes)(const TensorArg&, Options...), const Pack& pack,
                 const char* meaning, const Names&... names) {
  namespace py = pybind11;
  struct Pointers {
    const void *weight, *packed;
  };
  const auto checked_pack = [=](const TensorArg& weight, const TensorArg& packed,
                                Options... options) {
    Launch<Pointers> checked;
    auto& [from, to] = checked.arguments;
    set_packed(checked, to, packed, bytes(weight, options...));
    checked.reads(from, "weight", weight);
    const py::gil_scoped_release unlocked;
    pack(from, const_cast<void*>(to), weight, options...);
  };
  module.def((name + "_packed_bytes").c_str(), bytes, py::arg("weight"), names...,
             ("Bytes of what " + name + "_pack makes of such a weight.").c_str());
  module.def((name + "_pack").c_str(), checked_pack, py::arg("weight"), py::arg("packed"), names...,
             meaning);
}

inline cpu::Window window_of(const Window& window) {
  const auto& [kernel, stride, padding, dilation] = window;
  cpu::Window all;
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

// Window, format and sizes of a convolution of `x` with result `y`.
template <typename Conv>
void set_sizes(Conv& conv, const char* x_name, const TensorArg& x, const char* y_name,
               const TensorArg& y, const Window& window) {
  check_nhwc(x_name, x);
  check_nhwc(y_name, y);
  check_type(y_name, y, x.type);
  conv.window = window_of(window);
  conv.format = format_of(x_name, x);
  std::tie(conv.batch, conv.in_channels, conv.height, conv.width) = std::tuple_cat(x.sizes);
  conv.out_channels = y.sizes[1];
  check_sizes(y_name, y,
              {conv.batch, conv.out_channels, cpu::conv_output_size(conv.window, 0, conv.height),
               cpu::conv_output_size(conv.window, 1, conv.width)});
}
