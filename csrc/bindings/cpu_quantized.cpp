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

#include "cpu_arguments.h"
#include "kernels/cpu/quantized.h"
#include "kernels/cpu/stem.h"
#include "program.h"
#include "register.h"
#include "residual.h"
#include "tensor_arg.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

// Kernel size, stride, padding, dilation, groups.
using GroupedWindow = std::tuple<Pair, Pair, Pair, Pair, std::int64_t>;
// x, packed weight, window.
using Layer = std::tuple<TensorArg, TensorArg, GroupedWindow>;
template <typename Op>
using QuantizedLaunch = Launch<WithIsa<Op, cpu::QuantizedIsa>>;

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
cpu::QuantizedIsa choose_quantized_isa(const std::string& wanted) {
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

void check_int8_weight(const TensorArg& weight, int rank) {
  check_weight(weight, rank);
  check_type("weight", weight, ScalarType::kInt8);
}

void check_groups(std::int64_t in_channels, std::int64_t out_channels, std::int64_t groups) {
  if (groups < 1 || in_channels % groups != 0 || out_channels % groups != 0) {
    refuse("groups must divide " + std::to_string(in_channels) + " and " +
           std::to_string(out_channels) + " channels, found " + std::to_string(groups));
  }
}

std::int64_t conv_packed_bytes(const TensorArg& weight, std::int64_t groups) {
  check_int8_weight(weight, 4);
  const auto& [out_channels, group_in, height, width] = weight.sizes;
  check_groups(group_in * groups, out_channels, groups);
  return cpu::quantized_conv_packed_bytes(group_in * groups, out_channels, groups,
                                          weight.sizes.data() + 2);
}

void conv_pack(const void* from, void* to, const TensorArg& weight, std::int64_t groups) {
  cpu::quantized_conv_pack(static_cast<const std::int8_t*>(from), weight.strides.data(), to,
                           weight.sizes[1] * groups, weight.sizes[0], groups,
                           weight.sizes.data() + 2);
}

std::int64_t stem_packed_bytes(const TensorArg& weight) {
  check_int8_weight(weight, 4);
  check_sizes("weight", weight, {weight.sizes[0], 3, 7, 7});
  return cpu::quantized_stem_packed_bytes(weight.sizes[0]);
}

void stem_pack(const void* from, void* to, const TensorArg& weight) {
  cpu::quantized_stem_pack(static_cast<const std::int8_t*>(from), weight.strides.data(), to,
                           weight.sizes[0]);
}

std::int64_t head_packed_bytes(const TensorArg& weight) {
  check_int8_weight(weight, 2);
  return cpu::quantized_head_packed_bytes(weight.sizes[1], weight.sizes[0]);
}

void head_pack(const void* from, void* to, const TensorArg& weight) {
  cpu::quantized_head_pack(static_cast<const std::int8_t*>(from), weight.strides.data(), to,
                           weight.sizes[1], weight.sizes[0]);
}

using ConvLaunch = QuantizedLaunch<cpu::QuantizedConv>;

// Fills in what a convolution and its projection have in common; `out` is (N, K, P, Q).
void set_conv(ConvLaunch& launch, cpu::QuantizedConvolution& conv, const Layer& layer,
              const TensorArg& out) {
  const auto& [x, packed, window] = layer;
  const auto& [kernel, stride, padding, dilation, groups] = window;
  check_nhwc("x", x);
  conv.x.is_signed = is_signed("x", x);
  conv.window = window_of({kernel, stride, padding, dilation});
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

void conv(const TensorArg& out, const Layer& layer, const TensorArg& bias,
          const TensorArg& multiplier, const OptionalTensor& shortcut_scale,
          const OptionalTensor& residual, const std::optional<Layer>& projection,
          const OptionalTensor& padding_value, const std::string& isa) {
  check_nhwc("out", out);
  check_shortcut(shortcut_scale.has_value(), residual.has_value(), projection.has_value());
  ConvLaunch launch;
  cpu::QuantizedConv& op = launch.arguments.op;
  launch.arguments.isa = choose_quantized_isa(isa);
  op.relu = !is_signed("out", out);
  if (out.numel() == 0) return;
  set_conv(launch, op.conv, layer, out);
  const std::int64_t channels = op.conv.out_channels;
  set_array(launch, op.bias, "bias", bias, ScalarType::kInt32, {channels});
  set_array(launch, op.multiplier, "multiplier", multiplier, ScalarType::kFloat32, {channels});
  set_array(launch, op.shortcut_scale, "shortcut_scale", shortcut_scale, ScalarType::kFloat32,
            {channels});
  set_array(launch, op.conv.padding_value, "padding_value", padding_value, std::get<0>(layer).type,
            {op.conv.x.channels});
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
    set_residual(launch, op.residual, residual, out, residual->type);
    if (is_like(residual, out)) launch.may_replace(op.residual.data);
  }
  launch.writes(op.out, "out", out);
  launch.run<&cpu::quantized_conv>();
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
  QuantizedLaunch<cpu::QuantizedStem> launch;
  cpu::QuantizedStem& op = launch.arguments.op;
  launch.arguments.isa = choose_quantized_isa(isa);
  op.is_signed = is_signed("x", x);
  if (out.numel() == 0) return;
  std::tie(op.batch, std::ignore, op.height, op.width) = std::tuple_cat(x.sizes);
  std::copy(x.strides.begin(), x.strides.end(), op.strides);
  op.out_channels = out.sizes[1];
  check_apart("out", out, "x", x);
  launch.reads(op.x, "x", x);
  set_packed(launch, op.packed, packed, cpu::quantized_stem_packed_bytes(op.out_channels));
  set_array(launch, op.bias, "bias", bias, ScalarType::kInt32, {op.out_channels});
  set_array(launch, op.multiplier, "multiplier", multiplier, ScalarType::kFloat32,
            {op.out_channels});
  set_array(launch, op.padding_value, "padding_value", padding_value, x.type, {3});
  launch.writes(op.out, "out", out);
  launch.run<&cpu::quantized_stem>();
}

void head(const TensorArg& out, const TensorArg& x, const TensorArg& packed, const TensorArg& bias,
          const TensorArg& multiplier, const std::string& isa) {
  check_nhwc("x", x);
  check_contiguous("out", out, 2);
  check_type("out", out, ScalarType::kFloat32);
  check_sizes("out", out, {x.sizes[0], out.sizes[1]});
  QuantizedLaunch<cpu::QuantizedHead> launch;
  cpu::QuantizedHead& op = launch.arguments.op;
  launch.arguments.isa = choose_quantized_isa(isa);
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
  set_array(launch, op.bias, "bias", bias, ScalarType::kFloat32, {op.classes});
  set_array(launch, op.multiplier, "multiplier", multiplier, ScalarType::kFloat32, {op.classes});
  launch.writes(op.out, "out", out);
  launch.run<&cpu::quantized_head>();
}

}  // namespace

void register_cpu_quantized_kernels(py::module_& module) {
  module.def(
      "cpu_quantized_isas", &isas,
      "The instructions that the quantised kernels can use here, the fastest first, but\n"
      "for \"amx\", whose convolution no processor has run yet; none where the processor has\n"
      "no AVX2: then they raise ValueError.");

  def_packing(module, "quantized_conv", &conv_packed_bytes, conv_pack,
              "packed = the weight (out_channels, in_channels / groups, height, width), int8, of\n"
              "any strides, reordered for quantized_conv, and its sums.",
              "groups"_a);
  def_packing(module, "quantized_stem", &stem_packed_bytes, stem_pack,
              "packed = the weight (out_channels, 3, 7, 7), int8, of any strides, reordered for\n"
              "quantized_stem, and its sums.");
  def_packing(module, "quantized_head", &head_packed_bytes, head_pack,
              "packed = the weight (classes, channels), int8, of any strides, reordered for\n"
              "quantized_head, and its sums.");

  // Meanings: resnet_fused/reference/quantized.py. Vectors are contiguous.
  module.def(
      "quantized_conv", &conv, "out"_a, "layer"_a, "bias"_a, "multiplier"_a,
      "shortcut_scale"_a = py::none(), "residual"_a = py::none(), "projection"_a = py::none(),
      "padding_value"_a = py::none(), "isa"_a = "",
      "out = relu?(conv(x) + bias (+ shortcut)), requantised. layer is (x, packed weight,\n"
      "(kernel, stride, padding, dilation, groups)), x uint8 or int8; out is uint8 with a ReLU\n"
      "and int8 without; both are dense and channels_last. bias is int32, multiplier and\n"
      "shortcut_scale float32. residual is uint8 or int8, of out's size and neighbouring\n"
      "channels, at most as many; it may be out, and overlaps it in no other way. projection,\n"
      "instead of a residual, is a layer without padding; then all have one group. padding_value\n"
      "has x's type and channels. isa names the instructions to use. Raises ValueError for what\n"
      "does not fit, and for a processor without the instructions.");

  module.def(
      "quantized_stem", &stem, "out"_a, "x"_a, "packed"_a, "bias"_a, "multiplier"_a,
      "padding_value"_a = py::none(), "isa"_a = "",
      "out = max_pool(relu(conv(x) + bias)), requantised, uint8: x of 3 channels and any\n"
      "strides, 7 x 7 convolution of stride 2 and padding 3, 3 x 3 max pool of stride 2 and\n"
      "padding 1. The rest is as in quantized_conv.");

  module.def("quantized_head", &head, "out"_a, "x"_a, "packed"_a, "bias"_a, "multiplier"_a,
             "isa"_a = "",
             "out = linear(sum of x over its pixels) * (multiplier / pixels) + bias, float32\n"
             "(batch, classes): x uint8 or int8, dense and channels_last, bias and multiplier\n"
             "float32.");
}
