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

template <typename Kernel>
struct WithIsa {
  Kernel op;
  cpu::Isa isa;
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

inline void check_weight(const TensorArg& weight) {
  check_rank("weight", weight, 4);
  if (weight.numel() == 0) refuse("weight is empty: " + listed(weight.sizes.data(), 4));
}

inline std::int64_t conv_packed_bytes(const TensorArg& weight, cpu::Isa isa) {
  check_weight(weight);
  const auto& [out_channels, in_channels, height, width] = weight.sizes;
  return 4 * cpu::conv_weight_words(in_channels, out_channels, height * width,
                                    format_of("weight", weight), isa);
}

inline std::int64_t winograd_packed_bytes(const TensorArg& weight) {
  check_weight(weight);
  check_type("weight", weight, ScalarType::kFloat32);
  check_sizes("weight", weight, {weight.sizes[0], weight.sizes[1], 3, 3});
  return 4 * cpu::winograd_weight_floats(weight.sizes[1], weight.sizes[0]);
}

inline void check_packed(const TensorArg& packed, std::int64_t bytes) {
  check_type("packed", packed, ScalarType::kUInt8);
  check_sizes("packed", packed, {bytes});
  check_contiguous("packed", packed, 1);
  if (packed.address % sizeof(float) != 0) refuse("packed is not aligned to 4 bytes");
}

// The pointers to weight and packed memory.
inline std::pair<const void*, void*> weights_of(const TensorArg& weight, const TensorArg& packed,
                                                std::int64_t bytes) {
  check_packed(packed, bytes);
  struct Pointers {
    const void* weight;
    void* packed;
  };
  Launch<Pointers> checked;
  checked.reads(checked.arguments.weight, "weight", weight);
  checked.writes(checked.arguments.packed, "packed", packed);
  return {checked.arguments.weight, checked.arguments.packed};
}

// The size of a convolution's weight, as far as its packed form depends on it.
inline TensorArg packed_from(ScalarType type, std::int64_t out_channels, std::int64_t in_channels,
                             const Pair& kernel) {
  TensorArg weight;
  weight.type = type;
  weight.rank = 4;
  weight.sizes = {out_channels, in_channels, kernel[0], kernel[1]};
  return weight;
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
