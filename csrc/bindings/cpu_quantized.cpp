// Bindings of the CPU's quantised kernels: tensors in, an exception out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/cpu/quantized.h"
#include "kernels/cpu/stem.h"
#include "program.h"
#include "register.h"
#include "residual.h"
#include "tensor_arg.h"

namespace py = pybind11;
namespace cpu = resnet_fused::cpu;

namespace {

using OptionalTensor = std::optional<TensorArg>;
using Pair = std::array<std::int64_t, 2>;
// Kernel size, stride, padding, dilation, groups.
using Window = std::tuple<Pair, Pair, Pair, Pair, std::int64_t>;
// x, packed weight, window.
using Layer = std::tuple<TensorArg, TensorArg, Window>;

template <typename Op>
struct WithIsa {
  Op op;
  cpu::QuantizedIsa isa;
};

struct Named {
  const char* name;
  cpu::QuantizedIsa isa;
};

constexpr Named kIsas[] = {{"avx512vnni", cpu::QuantizedIsa::kAvx512Vnni},
                           {"avxvnni", cpu::QuantizedIsa::kAvxVnni},
                           {"avx2", cpu::QuantizedIsa::kAvx2},
                           {"amx", cpu::QuantizedIsa::kAmx}};  // last: used only when named

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const auto& [name, isa] : kIsas) {
    if (cpu::supports(isa)) names.push_back(name);
  }
  return names;
}

// The instructions called `wanted`, "" for the best; throws where the processor lacks them.
cpu::QuantizedIsa choose_isa(const std::string& wanted) {
  std::string known;
  for (const auto& [name, isa] : kIsas) {
    known += std::string(", \"") + name + "\"";
    if ((wanted.empty() || wanted == name) && cpu::supports(isa)) return isa;
  }
  refuse("isa must be \"\"" + known + " and offered by this processor, found \"" + wanted +
         "\"; cpu_quantized_isas() lists what it has");
}

bool is_signed(const char* name, const TensorArg& tensor) {
  if (tensor.type == ScalarType::kInt8) return true;
  if (tensor.type != ScalarType::kUInt8) {
    refuse(std::string(name) + " must be uint8 or int8, found " + name_of(tensor.type));
  }
  return false;
}

template <typename Arguments, typename T>
void set_vector(Launch<Arguments>& launch, const T*& slot, const char* name,
                const TensorArg& tensor, std::int64_t count, ScalarType type) {
  check_type(name, tensor, type);
  check_sizes(name, tensor, {count});
  check_contiguous(name, tensor, 1);
  launch.reads(slot, name, tensor);
}

void check_packed(const TensorArg& packed, std::int64_t bytes) {
  check_type("packed", packed, ScalarType::kUInt8);
  check_sizes("packed", packed, {bytes});
  check_contiguous("packed", packed, 1);
  if (packed.address % sizeof(std::int32_t) != 0) refuse("packed is not aligned to 4 bytes");
}

template <typename Arguments>
void set_packed(Launch<Arguments>& launch, const void*& slot, const TensorArg& packed,
                std::int64_t bytes) {
  check_packed(packed, bytes);
  launch.reads(slot, "packed", packed);
}

void check_weight(const TensorArg& weight, int rank) {
  check_rank("weight", weight, rank);
  check_type("weight", weight, ScalarType::kInt8);
  if (weight.numel() == 0) refuse("weight is empty: " + listed(weight.sizes.data(), rank));
}

void check_groups(std::int64_t in_channels, std::int64_t out_channels, std::int64_t groups) {
  if (groups < 1 || in_channels % groups != 0 || out_channels % groups != 0) {
    refuse("groups must divide " + std::to_string(in_channels) + " and " +
           std::to_string(out_channels) + " channels, found " + std::to_string(groups));
  }
}

// The pointers of weight and packed memory of `bytes`.
struct Pointers {
  const std::int8_t* weight;
  void* packed;

  static Pointers of(const TensorArg& weight, const TensorArg& packed, std::int64_t bytes) {
    check_packed(packed, bytes);
    Launch<Pointers> checked;
    checked.reads(checked.arguments.weight, "weight", weight);
    checked.writes(checked.arguments.packed, "packed", packed);
    return checked.arguments;
  }
};

std::int64_t conv_packed_bytes(const TensorArg& weight, std::int64_t groups) {
  check_weight(weight, 4);
  const auto& [out_channels, group_in, height, width] = weight.sizes;
  check_groups(group_in * groups, out_channels, groups);
  return cpu::quantized_conv_packed_bytes(group_in * groups, out_channels, groups,
                                          weight.sizes.data() + 2);
}

void conv_pack(const TensorArg& weight, std::int64_t groups, const TensorArg& packed) {
  const auto [from, to] = Pointers::of(weight, packed, conv_packed_bytes(weight, groups));
  const py::gil_scoped_release unlocked;
  cpu::quantized_conv_pack(from, weight.strides.data(), to, weight.sizes[1] * groups,
                           weight.sizes[0], groups, weight.sizes.data() + 2);
}

std::int64_t stem_packed_bytes(const TensorArg& weight) {
  check_weight(weight, 4);
  check_sizes("weight", weight, {weight.sizes[0], 3, 7, 7});
  return cpu::quantized_stem_packed_bytes(weight.sizes[0]);
}

void stem_pack(const TensorArg& weight, const TensorArg& packed) {
  const auto [from, to] = Pointers::of(weight, packed, stem_packed_bytes(weight));
  const py::gil_scoped_release unlocked;
  cpu::quantized_stem_pack(from, weight.strides.data(), to, weight.sizes[0]);
}

std::int64_t head_packed_bytes(const TensorArg& weight) {
  check_weight(weight, 2);
  return cpu::quantized_head_packed_bytes(weight.sizes[1], weight.sizes[0]);
}

void head_pack(const TensorArg& weight, const TensorArg& packed) {
  const auto [from, to] = Pointers::of(weight, packed, head_packed_bytes(weight));
  const py::gil_scoped_release unlocked;
  cpu::quantized_head_pack(from, weight.strides.data(), to, weight.sizes[1], weight.sizes[0]);
}

using ConvLaunch = WithIsa<cpu::QuantizedConv>;

// Fills in what a convolution and its projection have in common; `out` is (N, K, P, Q).
void set_conv(Launch<ConvLaunch>& launch, cpu::QuantizedConvolution& conv, const Layer& layer,
              const TensorArg& out) {
  const auto& [x, packed, window] = layer;
  const auto& [kernel, stride, padding, dilation, groups] = window;
  check_nhwc("x", x);
  conv.x.is_signed = is_signed("x", x);
  for (int axis = 0; axis < 2; ++axis) {
    constexpr std::int64_t kLimit = std::int64_t{1} << 31;
    if (kernel[axis] < 1 || stride[axis] < 1 || dilation[axis] < 1 || padding[axis] < 0 ||
        std::max({kernel[axis], stride[axis], dilation[axis], padding[axis]}) > kLimit) {
      refuse(
          "kernel, stride and dilation must be at least 1 and padding at least 0, all at most "
          "2^31");
    }
    conv.window.kernel[axis] = kernel[axis];
    conv.window.stride[axis] = stride[axis];
    conv.window.padding[axis] = padding[axis];
    conv.window.dilation[axis] = dilation[axis];
  }
  check_sizes("out", out,
              {x.sizes[0], out.sizes[1], cpu::conv_output_size(conv.window, 0, x.sizes[2]),
               cpu::conv_output_size(conv.window, 1, x.sizes[3])});
  std::tie(conv.x.batch, conv.x.channels, conv.x.height, conv.x.width) = std::tuple_cat(x.sizes);
  conv.out_channels = out.sizes[1];
  conv.groups = groups;
  if (conv.x.channels < 1) refuse("x has no channels");
  check_groups(conv.x.channels, conv.out_channels, groups);
  check_apart("out", out, "x", x);
  launch.reads(conv.x.data, "x", x);
  set_packed(launch, conv.packed, packed,
             cpu::quantized_conv_packed_bytes(conv.x.channels, conv.out_channels, groups,
                                              conv.window.kernel));
}

void run_conv(ConvLaunch& launch, std::uintptr_t) { cpu::quantized_conv(launch.op, launch.isa); }

void conv(const TensorArg& out, const Layer& layer, const TensorArg& bias,
          const TensorArg& multiplier, const OptionalTensor& shortcut_scale,
          const OptionalTensor& residual, const std::optional<Layer>& projection,
          const OptionalTensor& padding_value, const std::string& isa) {
  check_nhwc("out", out);
  if (residual && projection) refuse("residual and projection exclude each other");
  if (shortcut_scale.has_value() != (residual || projection)) {
    refuse("shortcut_scale goes with a residual or a projection, and with nothing else");
  }
  Launch<ConvLaunch> launch;
  cpu::QuantizedConv& op = launch.arguments.op;
  launch.arguments.isa = choose_isa(isa);
  op.relu = !is_signed("out", out);
  if (out.numel() == 0) return;
  set_conv(launch, op.conv, layer, out);
  const std::int64_t channels = op.conv.out_channels;
  set_vector(launch, op.bias, "bias", bias, channels, ScalarType::kInt32);
  set_vector(launch, op.multiplier, "multiplier", multiplier, channels, ScalarType::kFloat32);
  if (shortcut_scale) {
    set_vector(launch, op.shortcut_scale, "shortcut_scale", *shortcut_scale, channels,
               ScalarType::kFloat32);
  }
  if (padding_value) {
    set_vector(launch, op.conv.padding_value, "padding_value", *padding_value, op.conv.x.channels,
               std::get<0>(layer).type);
  }
  if ((op.projected = projection.has_value())) {
    set_conv(launch, op.projection, *projection, out);
    const cpu::Window& window = op.projection.window;
    if (op.conv.groups != 1 || op.projection.groups != 1 ||
        window.padding[0] + window.padding[1] != 0) {
      refuse("a projection has no padding, and beside it all convolutions have one group");
    }
  }
  if (residual) {
    op.residual_is_signed = is_signed("residual", *residual);
    TensorArg as_out = out;  // set_residual wants one type, and both are single bytes
    as_out.type = residual->type;
    set_residual(launch, op.residual, residual, as_out);
    if (is_like(residual, as_out)) launch.may_replace(op.residual.data);
  }
  launch.writes(op.out, "out", out);
  launch.run<run_conv>();
}

void run_stem(WithIsa<cpu::QuantizedStem>& launch, std::uintptr_t) {
  cpu::quantized_stem(launch.op, launch.isa);
}

void stem(const TensorArg& out, const TensorArg& x, const TensorArg& packed, const TensorArg& bias,
          const TensorArg& multiplier, const OptionalTensor& padding_value,
          const std::string& isa) {
  check_rank("x", x, 4);
  check_nhwc("out", out);
  check_type("out", out, ScalarType::kUInt8);
  const auto pooled = [](std::int64_t size) { return cpu::stem_halved(cpu::stem_halved(size)); };
  check_sizes("x", x, {x.sizes[0], 3, x.sizes[2], x.sizes[3]});
  check_sizes("out", out, {x.sizes[0], out.sizes[1], pooled(x.sizes[2]), pooled(x.sizes[3])});
  Launch<WithIsa<cpu::QuantizedStem>> launch;
  cpu::QuantizedStem& op = launch.arguments.op;
  launch.arguments.isa = choose_isa(isa);
  op.is_signed = is_signed("x", x);
  if (out.numel() == 0) return;
  std::tie(op.batch, std::ignore, op.height, op.width) = std::tuple_cat(x.sizes);
  std::copy(x.strides.begin(), x.strides.end(), op.strides);
  op.out_channels = out.sizes[1];
  check_apart("out", out, "x", x);
  launch.reads(op.x, "x", x);
  set_packed(launch, op.packed, packed, cpu::quantized_stem_packed_bytes(op.out_channels));
  set_vector(launch, op.bias, "bias", bias, op.out_channels, ScalarType::kInt32);
  set_vector(launch, op.multiplier, "multiplier", multiplier, op.out_channels,
             ScalarType::kFloat32);
  if (padding_value) {
    set_vector(launch, op.padding_value, "padding_value", *padding_value, 3, x.type);
  }
  launch.writes(op.out, "out", out);
  launch.run<run_stem>();
}

void run_head(WithIsa<cpu::QuantizedHead>& launch, std::uintptr_t) {
  cpu::quantized_head(launch.op, launch.isa);
}

void head(const TensorArg& out, const TensorArg& x, const TensorArg& packed, const TensorArg& bias,
          const TensorArg& multiplier, const std::string& isa) {
  check_nhwc("x", x);
  check_contiguous("out", out, 2);
  check_type("out", out, ScalarType::kFloat32);
  check_sizes("out", out, {x.sizes[0], out.sizes[1]});
  Launch<WithIsa<cpu::QuantizedHead>> launch;
  cpu::QuantizedHead& op = launch.arguments.op;
  launch.arguments.isa = choose_isa(isa);
  op.x.is_signed = is_signed("x", x);
  if (out.numel() == 0) return;
  if (x.numel() == 0) refuse("x has no pixels or no channels to average");
  std::tie(op.x.batch, op.x.channels, op.x.height, op.x.width) = std::tuple_cat(x.sizes);
  constexpr std::int64_t kMostChannels = 65536, kMostPixels = std::int64_t{1} << 23;
  if (op.x.channels > kMostChannels || op.x.height * op.x.width > kMostPixels) {
    refuse("x must have at most 65536 channels and 2^23 pixels, whose sums fit in 32 bits");
  }
  op.classes = out.sizes[1];
  check_apart("out", out, "x", x);
  launch.reads(op.x.data, "x", x);
  set_packed(launch, op.packed, packed,
             cpu::quantized_head_packed_bytes(op.x.channels, op.classes));
  set_vector(launch, op.bias, "bias", bias, op.classes, ScalarType::kFloat32);
  set_vector(launch, op.multiplier, "multiplier", multiplier, op.classes, ScalarType::kFloat32);
  launch.writes(op.out, "out", out);
  launch.run<run_head>();
}

}  // namespace

void register_cpu_quantized_kernels(py::module_& module) {
  module.def(
      "cpu_quantized_isas", &isas,
      "The instructions that the quantised kernels can use here, the fastest first, but\n"
      "for \"amx\", whose convolution no processor has run yet; none where the processor has\n"
      "no AVX2: then they raise ValueError.");

  module.def("quantized_conv_packed_bytes", &conv_packed_bytes, py::arg("weight"),
             py::arg("groups"), "Bytes of what quantized_conv_pack makes of such a weight.");
  module.def("quantized_conv_pack", &conv_pack, py::arg("weight"), py::arg("groups"),
             py::arg("packed"),
             "packed = the weight (out_channels, in_channels / groups, height, width), int8, of\n"
             "any strides, reordered for quantized_conv, and its sums.");
  module.def("quantized_stem_packed_bytes", &stem_packed_bytes, py::arg("weight"),
             "Bytes of what quantized_stem_pack makes of such a weight.");
  module.def("quantized_stem_pack", &stem_pack, py::arg("weight"), py::arg("packed"),
             "packed = the weight (out_channels, 3, 7, 7), int8, of any strides, reordered for\n"
             "quantized_stem, and its sums.");
  module.def("quantized_head_packed_bytes", &head_packed_bytes, py::arg("weight"),
             "Bytes of what quantized_head_pack makes of such a weight.");
  module.def("quantized_head_pack", &head_pack, py::arg("weight"), py::arg("packed"),
             "packed = the weight (classes, channels), int8, of any strides, reordered for\n"
             "quantized_head, and its sums.");

  // Meanings: resnet_fused/reference/quantized.py. Vectors are contiguous.
  module.def(
      "quantized_conv", &conv, py::arg("out"), py::arg("layer"), py::arg("bias"),
      py::arg("multiplier"), py::arg("shortcut_scale") = py::none(),
      py::arg("residual") = py::none(), py::arg("projection") = py::none(),
      py::arg("padding_value") = py::none(), py::arg("isa") = "",
      "out = relu?(conv(x) + bias (+ shortcut)), requantised. layer is (x, packed weight,\n"
      "(kernel, stride, padding, dilation, groups)), x uint8 or int8; out is uint8 with a ReLU\n"
      "and int8 without; both are dense and channels_last. bias is int32, multiplier and\n"
      "shortcut_scale float32. residual is uint8 or int8, of out's size and neighbouring\n"
      "channels, at most as many; it may be out, and overlaps it in no other way. projection,\n"
      "instead of a residual, is a layer without padding; then all have one group. padding_value\n"
      "has x's type and channels. isa names the instructions to use. Raises ValueError for what\n"
      "does not fit, and for a processor without the instructions.");

  module.def(
      "quantized_stem", &stem, py::arg("out"), py::arg("x"), py::arg("packed"), py::arg("bias"),
      py::arg("multiplier"), py::arg("padding_value") = py::none(), py::arg("isa") = "",
      "out = max_pool(relu(conv(x) + bias)), requantised, uint8: x of 3 channels and any\n"
      "strides, 7 x 7 convolution of stride 2 and padding 3, 3 x 3 max pool of stride 2 and\n"
      "padding 1. The rest is as in quantized_conv.");

  module.def("quantized_head", &head, py::arg("out"), py::arg("x"), py::arg("packed"),
             py::arg("bias"), py::arg("multiplier"), py::arg("isa") = "",
             "out = linear(sum of x over its pixels) * (multiplier / pixels) + bias, float32\n"
             "(batch, classes): x uint8 or int8, dense and channels_last, bias and multiplier\n"
             "float32.");
}
