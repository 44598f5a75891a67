// Bindings of the CPU kernels: tensors in, an exception out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu_arguments.h"
#include "kernels/cpu/batch_norm.h"
#include "kernels/cpu/bn_add_relu.h"
#include "kernels/cpu/conv.h"
#include "kernels/cpu/fingerprint.h"
#include "kernels/cpu/group_norm_add_relu.h"
#include "kernels/cpu/grouped.h"
#include "kernels/cpu/head.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/page_watch.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/squeeze_excite.h"
#include "kernels/cpu/stem.h"
#include "kernels/cpu/winograd.h"
#include "program.h"
#include "register.h"
#include "residual.h"
#include "tensor_arg.h"

namespace py = pybind11;
using namespace pybind11::literals;
namespace cpu = resnet_fused::cpu;

namespace {

// Mean, variance, weight, bias, eps.
using BatchNorm = std::tuple<TensorArg, TensorArg, OptionalTensor, OptionalTensor, double>;
// A convolution with its batch norm, if it has one: x, packed weight, window, batch norm.
using Layer = std::tuple<TensorArg, TensorArg, Window, std::optional<BatchNorm>>;

struct ConvLaunch {
  cpu::Conv conv, projection;
  bool projected;
  cpu::Isa isa;

  template <auto kKernel>
  void call(std::uintptr_t) {
    if (projected) conv.projection = &projection;
    kKernel(conv, isa);
  }
};

template <typename Arguments>
void set_batch_norm(Launch<Arguments>& launch, cpu::BatchNorm& slot,
                    const std::optional<BatchNorm>& bn, std::int64_t channels) {
  slot = {};
  if (!bn) return;
  const auto& [mean, var, weight, bias, eps] = *bn;
  set_vector(launch, slot.mean, "mean", mean, channels);
  set_vector(launch, slot.var, "var", var, channels);
  set_vector(launch, slot.weight, "weight", weight, channels);
  set_vector(launch, slot.bias, "bias", bias, channels);
  slot.eps = eps;
}

cpu::Isa choose_conv_isa(const std::string& isa) {
  return choose_isa(isa, {cpu::Isa::kNeon, cpu::Isa::kAmx});
}

// A weight as far as the size of its packed form depends on it.
TensorArg packed_from(ScalarType type, std::int64_t out_channels, std::int64_t in_channels,
                      const Pair& kernel) {
  TensorArg weight;
  weight.type = type;
  weight.rank = 4;
  weight.sizes = {out_channels, in_channels, kernel[0], kernel[1]};
  return weight;
}

std::int64_t conv_bytes(const TensorArg& weight, cpu::Isa isa) {
  check_weight(weight);
  const auto& [out_channels, in_channels, height, width] = weight.sizes;
  return 4 * cpu::conv_weight_words(in_channels, out_channels, height * width,
                                    format_of("weight", weight), isa);
}

std::int64_t conv_packed_bytes(const TensorArg& weight, const std::string& isa) {
  return conv_bytes(weight, choose_conv_isa(isa));
}

void conv_pack(const void* from, void* to, const TensorArg& weight, const std::string& isa) {
  cpu::conv_transform_weights(from, weight.strides.data(), to, weight.sizes[1], weight.sizes[0],
                              weight.sizes.data() + 2, format_of("weight", weight),
                              choose_conv_isa(isa));
}

std::int64_t winograd_packed_bytes(const TensorArg& weight) {
  check_weight(weight);
  check_type("weight", weight, ScalarType::kFloat32);
  check_sizes("weight", weight, {weight.sizes[0], weight.sizes[1], 3, 3});
  return 4 * cpu::winograd_weight_floats(weight.sizes[1], weight.sizes[0]);
}

void winograd_pack(const void* from, void* to, const TensorArg& weight) {
  cpu::winograd_transform_weights(static_cast<const float*>(from), weight.strides.data(),
                                  static_cast<float*>(to), weight.sizes[1], weight.sizes[0]);
}

std::int64_t stem_packed_bytes(const TensorArg& weight) {
  check_weight(weight);
  check_sizes("weight", weight, {weight.sizes[0], 3, 7, 7});
  if (weight.sizes[0] % cpu::kStemStrip != 0) {
    refuse("out_channels must be a positive multiple of 32, found " +
           std::to_string(weight.sizes[0]));
  }
  return 4 * cpu::stem_weight_words(weight.sizes[0], format_of("weight", weight));
}

void stem_pack(const void* from, void* to, const TensorArg& weight) {
  cpu::stem_transform_weights(from, weight.strides.data(), to, weight.sizes[0],
                              format_of("weight", weight));
}

// Throws unless the groups divide the weight's output channels; then its packed bytes.
std::int64_t grouped_packed_bytes(const TensorArg& weight, std::int64_t groups,
                                  const std::string& isa) {
  check_weight(weight);
  const auto& [out_channels, in_channels, height, width] = weight.sizes;
  if (groups < 1 || out_channels % groups != 0) {
    refuse("groups must divide the " + std::to_string(out_channels) + " output channels, found " +
           std::to_string(groups));
  }
  return 4 * cpu::grouped_weight_words(in_channels, out_channels, height * width, groups,
                                       format_of("weight", weight), choose_isa(isa));
}

void grouped_pack(const void* from, void* to, const TensorArg& weight, std::int64_t groups,
                  const std::string& isa) {
  cpu::grouped_transform_weights(from, weight.strides.data(), to, weight.sizes[1], weight.sizes[0],
                                 weight.sizes.data() + 2, groups, format_of("weight", weight),
                                 choose_isa(isa));
}

// Fills in what convolutions, grouped ones and projections have in common; `out` is (N, K, P, Q).
// `packed_bytes` of a weight with x's channels.
template <typename Arguments, typename PackedBytesOf>
void set_conv(Launch<Arguments>& launch, cpu::Conv& conv, const Layer& layer, const TensorArg& out,
              const PackedBytesOf& packed_bytes) {
  const auto& [x, packed, window, bn] = layer;
  check_type("x", x, out.type);
  set_sizes(conv, "x", x, "out", out, window);
  if (conv.in_channels < 1) refuse("x has no channels");
  check_apart("out", out, "x", x);
  launch.reads(conv.x, "x", x);
  set_packed(
      launch, conv.packed, packed,
      packed_bytes(packed_from(x.type, conv.out_channels, conv.in_channels, std::get<0>(window))));
  set_batch_norm(launch, conv.bn, bn, conv.out_channels);
}

void conv_bn(const TensorArg& out, const Layer& layer, const OptionalTensor& residual, bool relu,
             const std::optional<Layer>& projection, const std::string& isa) {
  check_nhwc("out", out);
  if (residual && projection) refuse("residual and projection exclude each other");
  Launch<ConvLaunch> launch;
  auto& [conv, projected, has_projection, chosen] = launch.arguments;
  chosen = choose_conv_isa(isa);
  check_convolves(format_of("out", out), chosen);
  if (out.numel() == 0) return;
  const auto packed_bytes = [&](const TensorArg& weight) {
    return conv_bytes(weight, launch.arguments.isa);
  };
  set_conv(launch, conv, layer, out, packed_bytes);
  if ((has_projection = projection.has_value())) {
    set_conv(launch, projected, *projection, out, packed_bytes);
  }
  set_residual(launch, conv.residual, residual, out);
  if (is_like(residual, out)) launch.may_replace(conv.residual.data);
  launch.writes(conv.out, "out", out);
  projected.out = nullptr;
  conv.relu = relu;
  launch.run<&cpu::conv_bn>();
}

void grouped_conv_bn(const TensorArg& out, const Layer& layer, std::int64_t groups,
                     const OptionalTensor& residual, bool relu, const std::string& isa) {
  check_nhwc("out", out);
  Launch<WithIsa<cpu::GroupedConv>> launch;
  cpu::GroupedConv& op = launch.arguments.op;
  launch.arguments.isa = choose_isa(isa);
  if (out.numel() == 0) return;
  set_conv(launch, op.conv, layer, out, [&](TensorArg weight) {
    if (groups < 1 || weight.sizes[1] % groups != 0) {
      refuse("groups must divide the " + std::to_string(weight.sizes[1]) +
             " channels of x, found " + std::to_string(groups));
    }
    weight.sizes[1] /= groups;
    return grouped_packed_bytes(weight, groups, isa);
  });
  op.groups = groups;
  set_residual(launch, op.conv.residual, residual, out);
  launch.writes(op.conv.out, "out", out);
  op.conv.relu = relu;
  launch.run<&cpu::grouped_conv_bn>();
}

void winograd_conv(const TensorArg& out, const Layer& layer, const OptionalTensor& residual,
                   bool relu, const std::string& isa) {
  const auto& [x, packed, window, bn] = layer;
  check_nhwc("x", x);
  check_nhwc("out", out);
  check_type("x", x, ScalarType::kFloat32);
  check_type("out", out, ScalarType::kFloat32);
  const Pair one = {1, 1};
  if (window != Window{{3, 3}, one, one, one}) {
    refuse("winograd_conv has a window of 3 x 3 with stride, padding and dilation 1 only");
  }
  check_sizes("out", out, {x.sizes[0], out.sizes[1], x.sizes[2], x.sizes[3]});
  Launch<WithIsa<cpu::WinogradConv>> launch;
  cpu::WinogradConv& conv = launch.arguments.op;
  launch.arguments.isa = choose_isa(isa, {cpu::Isa::kNeon});
  if (out.numel() == 0) return;
  if (x.numel() == 0) refuse("x has no channels");
  std::tie(conv.batch, conv.in_channels, conv.height, conv.width) = std::tuple_cat(x.sizes);
  conv.out_channels = out.sizes[1];
  check_apart("out", out, "x", x);
  launch.reads(conv.x, "x", x);
  set_packed(
      launch, conv.packed, packed,
      winograd_packed_bytes(packed_from(x.type, conv.out_channels, conv.in_channels, {3, 3})));
  set_batch_norm(launch, conv.bn, bn, conv.out_channels);
  set_residual(launch, conv.residual, residual, out);
  launch.writes(conv.out, "out", out);
  conv.relu = relu;
  launch.run<&cpu::winograd_conv>();
}

void stem_conv_pool(const TensorArg& out, const TensorArg& x, const TensorArg& packed,
                    const BatchNorm& bn, const std::string& isa) {
  check_nhwc("x", x);
  check_nhwc("out", out);
  check_type("x", x, out.type);
  const auto pooled = [](std::int64_t size) { return cpu::stem_halved(cpu::stem_halved(size)); };
  check_sizes("x", x, {x.sizes[0], 3, x.sizes[2], x.sizes[3]});
  check_sizes("out", out, {x.sizes[0], out.sizes[1], pooled(x.sizes[2]), pooled(x.sizes[3])});
  const std::int64_t packed_bytes = stem_packed_bytes(packed_from(x.type, out.sizes[1], 3, {7, 7}));
  Launch<WithIsa<cpu::Stem>> launch;
  cpu::Stem& stem = launch.arguments.op;
  launch.arguments.isa = choose_isa(isa, {cpu::Isa::kNeon});
  stem.format = format_of("x", x);
  check_convolves(stem.format, launch.arguments.isa);
  if (out.numel() == 0) return;
  std::tie(stem.batch, std::ignore, stem.height, stem.width) = std::tuple_cat(x.sizes);
  stem.out_channels = out.sizes[1];
  check_apart("out", out, "x", x);
  launch.reads(stem.x, "x", x);
  set_packed(launch, stem.packed, packed, packed_bytes);
  set_batch_norm(launch, stem.bn, bn, stem.out_channels);
  launch.writes(stem.out, "out", out);
  launch.run<&cpu::stem_conv_pool>();
}

void bn_add_relu(const TensorArg& out, const TensorArg& x, const BatchNorm& bn,
                 const OptionalTensor& residual, bool relu) {
  check_nhwc("x", x);
  check_like("out", out, x);
  const auto& [batch, channels, height, width] = x.sizes;
  Launch<cpu::BnAddRelu> launch;
  cpu::BnAddRelu& op = launch.arguments;
  op.format = format_of("x", x);
  if (out.numel() == 0) return;
  check_same_or_apart("out", out, "x", x);
  op.pixels = batch * height * width;
  op.channels = channels;
  op.relu = relu;
  launch.reads(op.x, "x", x);
  set_batch_norm(launch, op.bn, bn, channels);
  set_residual(launch, op.residual, residual, out);
  launch.writes(op.out, "out", out);
  launch.run<&cpu::bn_add_relu>();
}

void group_norm_add_relu(const TensorArg& out, const TensorArg& x, std::int64_t groups,
                         const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                         const OptionalTensor& residual, bool relu) {
  check_nhwc("x", x);
  check_like("out", out, x);
  const auto& [batch, channels, height, width] = x.sizes;
  if (groups < 1 || channels % groups != 0) {
    refuse("groups must divide the " + std::to_string(channels) + " channels, found " +
           std::to_string(groups));
  }
  Launch<cpu::GroupNormAddRelu> launch;
  cpu::GroupNormAddRelu& op = launch.arguments;
  op.format = format_of("x", x);
  if (out.numel() == 0) return;
  check_same_or_apart("out", out, "x", x);
  op.batch = batch;
  op.pixels = height * width;
  op.channels = channels;
  op.groups = groups;
  op.eps = eps;
  op.relu = relu;
  launch.reads(op.x, "x", x);
  launch.may_replace(op.x);
  set_vector(launch, op.weight, "weight", weight, channels);
  set_vector(launch, op.bias, "bias", bias, channels);
  set_residual(launch, op.residual, residual, out);
  launch.writes(op.out, "out", out);
  launch.run<&cpu::group_norm_add_relu>();
}

void head(const TensorArg& out, const TensorArg& x, const TensorArg& weight,
          const OptionalTensor& bias) {
  check_nhwc("x", x);
  check_rank("weight", weight, 2);
  check_contiguous("out", out, 2);
  const std::int64_t batch = x.sizes[0], channels = x.sizes[1], classes = weight.sizes[0];
  check_sizes("out", out, {batch, classes});
  check_sizes("weight", weight, {classes, channels});
  if (channels > 1 && weight.strides[1] != 1) refuse("weight must have contiguous rows");
  for (const TensorArg* const other : {&out, &weight}) check_type("x", x, other->type);
  Launch<cpu::Head> launch;
  cpu::Head& op = launch.arguments;
  op.format = format_of("x", x);
  if (out.numel() == 0) return;
  if (x.numel() == 0) refuse("x has no pixels or no channels to average");
  check_apart("out", out, "x", x);
  op.batch = batch;
  op.pixels = x.sizes[2] * x.sizes[3];
  op.channels = channels;
  op.classes = classes;
  op.weight_stride = weight.strides[0];
  launch.reads(op.x, "x", x);
  launch.reads(op.weight, "weight", weight);
  set_array(launch, op.bias, "bias", bias, x.type, {classes});
  launch.writes(op.out, "out", out);
  launch.run<&cpu::head>();
}

// Weight and bias.
using Linear = std::tuple<TensorArg, OptionalTensor>;

void set_linear(Launch<cpu::SqueezeExcite>& launch, const void*& weight_slot,
                const void*& bias_slot, const char* name, const Linear& linear, std::int64_t rows,
                std::int64_t columns, ScalarType type) {
  const auto& [weight, bias] = linear;
  set_array(launch, weight_slot, name, weight, type, {rows, columns});
  set_array(launch, bias_slot, "bias", bias, type, {rows});
}

void squeeze_excite(const TensorArg& out, const TensorArg& x, const Linear& reduce,
                    const Linear& expand, const OptionalTensor& residual, bool relu) {
  check_nhwc("x", x);
  check_like("out", out, x);
  const auto& [batch, channels, height, width] = x.sizes;
  check_rank("reduce", std::get<0>(reduce), 2);
  Launch<cpu::SqueezeExcite> launch;
  cpu::SqueezeExcite& op = launch.arguments;
  op.format = format_of("x", x);
  op.batch = batch;
  op.pixels = height * width;
  op.channels = channels;
  op.hidden = std::get<0>(reduce).sizes[0];
  op.relu = relu;
  if (op.hidden < 1) refuse("reduce has no rows");
  set_linear(launch, op.reduce, op.reduce_bias, "reduce", reduce, op.hidden, channels, x.type);
  set_linear(launch, op.expand, op.expand_bias, "expand", expand, channels, op.hidden, x.type);
  if (out.numel() == 0) return;
  check_same_or_apart("out", out, "x", x);
  launch.reads(op.x, "x", x);
  launch.may_replace(op.x);
  set_residual(launch, op.residual, residual, out);
  launch.writes(op.out, "out", out);
  launch.run<&cpu::squeeze_excite>();
}

// Tensors whose elements fill one span of memory each.
std::vector<cpu::Bytes> bytes_of(const std::vector<TensorArg>& tensors) {
  std::vector<cpu::Bytes> all;
  for (const TensorArg& tensor : tensors) {
    const Span span = tensor.span();
    if (static_cast<std::int64_t>(span.bytes()) != tensor.numel() * element_size(tensor.type)) {
      refuse("a fingerprint is of tensors whose elements fill one span of memory");
    }
    if (span.bytes() > 0 && span.first == 0) refuse("a tensor is a null pointer");
    all.push_back({reinterpret_cast<const unsigned char*>(span.first), span.bytes()});
  }
  return all;
}

std::vector<std::uint64_t> fingerprints(const std::vector<TensorArg>& tensors) {
  const cpu::Fingerprints inputs(bytes_of(tensors));
  const py::gil_scoped_release unlocked;
  return inputs.all();
}

// Tensors, which it does not keep alive, and the fingerprints that they had. Whether they still
// have them is known from their pages where those are watched, else from reading them.
class Contents {
 public:
  Contents(const std::vector<TensorArg>& tensors, std::vector<std::uint64_t> expected,
           bool watchable)
      : fingerprints_(bytes_of(tensors)), expected_(std::move(expected)) {
    if (tensors.size() != expected_.size()) refuse("each tensor needs one fingerprint");
    if (watchable) watch_.emplace(bytes_of(tensors));
    if (watch_) edges_.emplace(watch_->edges());
  }

  bool run(const Program& program, const std::vector<std::uintptr_t>& tensors,
           std::uintptr_t arena) {
    if (kernels_are_stubbed()) {
      program.run(tensors, arena, 0);
      return true;
    }
    const bool unwritten = watch_ && watch_->unwritten();
    const std::int64_t unmarked = runs_unmarked_++;
    std::optional<std::uint64_t> watched_from;
    std::vector<std::uint64_t> edges;
    if (watch_ && !unwritten) {
      const bool mark = unmarked >= kRunsUnmarked;
      if (mark) runs_unmarked_ = 0;
      watched_from = watch_->begin(mark);
      if (watched_from) edges = edges_->all();  // before what they belong to is found unchanged
    }
    const cpu::Fingerprints& read = unwritten ? *edges_ : fingerprints_;
    std::vector<std::uint64_t> hashes(read.chunks());
    cpu::with_team([&] {
      std::size_t next = 0;
      program.run(tensors, arena, 0, [&](std::size_t launch) {
        // The tensors are read between the launches, a part at a time.
        const std::size_t last = hashes.size() * (launch + 1) / program.size();
        read.hash(next, last, hashes.data());
        next = last;
      });
    });
    const std::vector<std::uint64_t> found = read.fold(hashes.data());
    if (unwritten) return found == edges_expected_;
    if (found != expected_) return false;
    if (watched_from) {
      const std::lock_guard lock(mutex_);
      if (edges_expected_.empty()) edges_expected_ = std::move(edges);
      watch_->keep(*watched_from);
    }
    return true;
  }

  // Whether the next run() need not read the tensors.
  bool watched() const { return watch_ && watch_->unwritten(); }

 private:
  // A first write to a page that is marked costs a fault: to be paid once in so many runs at most.
  static constexpr std::int64_t kRunsUnmarked = 8;

  cpu::Fingerprints fingerprints_;
  std::vector<std::uint64_t> expected_;
  std::optional<cpu::PageWatch> watch_;
  std::optional<cpu::Fingerprints> edges_;
  std::mutex mutex_;
  std::vector<std::uint64_t> edges_expected_;  // set once, before the first keep()
  std::atomic<std::int64_t> runs_unmarked_{0};
};

}  // namespace

void register_cpu_kernels(py::module_& module) {
  module.def(
      "cpu_isa", [] { return isa_name(cpu::best_isa()); },
      "The vector instructions the CPU kernels use here: \"avx512\", \"avx2\", \"neon\", or \"\"\n"
      "where there are none. Kernels that have no code for them raise ValueError: all "
      "convolutions\n"
      "for \"\", grouped ones and gradients for \"neon\".");

  module.def(
      "cpu_convolves_bf16", [] { return cpu::convolves(cpu::Format::kBFloat16, cpu::best_isa()); },
      "Whether conv_bn and stem_conv_pool take bfloat16 with what cpu_isa() names: AVX2, AVX-512\n"
      "with AVX512_BF16, or NEON with FEAT_BF16.");

  module.def("cpu_has_amx_bf16", &cpu::has_amx_bf16,
             "Whether this processor multiplies bfloat16 in tiles (AMX) and the system lets this\n"
             "process use them, which the first call asks for. oneDNN does too, and conv_bn with\n"
             "isa=\"amx\".");

  // Of every kernel: tensors are as tensor_arg.h says, sizes those of NCHW; x and out are dense
  // and channels_last, of one type.
  def_packing(
      module, "conv", &conv_packed_bytes, conv_pack,
      "packed = the weight (out_channels, in_channels, height, width), float32 or bfloat16, of\n"
      "any strides, reordered for conv_bn with the same isa: out_channels rounded up to whole\n"
      "tiles and, in bfloat16, an odd number of weights a channel up to an even one.",
      "isa"_a = "");
  def_packing(module, "winograd", &winograd_packed_bytes, winograd_pack,
              "packed = the transformed weight (out_channels, in_channels, 3, 3), float32, of any\n"
              "strides, for winograd_conv: 16/9 of its size, with out_channels rounded up to 16.");
  def_packing(module, "stem", &stem_packed_bytes, stem_pack,
              "packed = the weight (out_channels, 3, 7, 7), float32 or bfloat16, of any strides,\n"
              "reordered for stem_conv_pool; out_channels is a multiple of 32.");
  def_packing(
      module, "grouped", &grouped_packed_bytes, grouped_pack,
      "packed = the weight (out_channels, in_channels / groups, height, width), float32 or\n"
      "bfloat16, of any strides, reordered for grouped_conv_bn with the same isa.",
      "groups"_a, "isa"_a = "");

  module.def(
      "conv_bn", &conv_bn, "out"_a, "layer"_a, "residual"_a, "relu"_a, "projection"_a = py::none(),
      "isa"_a = "",
      "out = relu?(bn(conv(x)) (+ residual)) with one group, float32 or bfloat16. layer is (x,\n"
      "packed weight, (kernel, stride, padding, dilation), bn), and bn is (mean, var, weight,\n"
      "bias, eps) with vectors of any stride, float32, bfloat16 or float64, weight and bias None\n"
      "where absent, or is None where nothing normalises. residual is None or has out's type,\n"
      "size and neighbouring channels, at most as many; it may be out, and overlaps it in no\n"
      "other way. projection, instead of a residual, is a layer whose normalised, unrounded\n"
      "result is added. Sums and batch norm are float32. isa=\"avx2\" forbids AVX-512,\n"
      "isa=\"amx\" multiplies bfloat16 in tiles. Raises\n"
      "ValueError for what does not fit, and for a processor without the instructions.");

  module.def("grouped_conv_bn", &grouped_conv_bn, "out"_a, "layer"_a, "groups"_a, "residual"_a,
             "relu"_a, "isa"_a = "",
             "conv_bn with any number of groups, without a projection. A number of x reaches its\n"
             "own group's results only. bfloat16 is multiplied in float32, as exactly, where the\n"
             "processor lacks AVX512_BF16.");

  module.def("winograd_conv", &winograd_conv, "out"_a, "layer"_a, "residual"_a, "relu"_a,
             "isa"_a = "",
             "conv_bn for windows of 3 x 3 with stride, padding and dilation 1, in float32, by\n"
             "Winograd's F(2x2, 3x3) (arXiv:1509.09308). A non-finite input reaches all of its\n"
             "2 x 2 output tile.");

  module.def("stem_conv_pool", &stem_conv_pool, "out"_a, "x"_a, "packed"_a, "bn"_a, "isa"_a = "",
             "out = max_pool(relu(bn(conv(x)))) of 3 channels, float32 or bfloat16: 7 x 7\n"
             "convolution of stride 2 and padding 3, 3 x 3 max pool of stride 2 and padding 1.\n"
             "Sums are float32. The rest is as in conv_bn.");

  module.def("bn_add_relu", &bn_add_relu, "out"_a, "x"_a, "bn"_a, "residual"_a, "relu"_a,
             "out = relu?(bn(x) (+ residual)), as in conv_bn; out may be x. Runs on every\n"
             "processor.");

  module.def("group_norm_add_relu", &group_norm_add_relu, "out"_a, "x"_a, "groups"_a, "weight"_a,
             "bias"_a, "eps"_a, "residual"_a, "relu"_a,
             "out = relu?(group_norm(x) (+ residual)), float32 or bfloat16; out may be x, and the\n"
             "residual is as in conv_bn. weight and bias have a value a channel, or are None; of\n"
             "any stride, float32, bfloat16 or float64. Statistics and result are computed in\n"
             "float32 or better, rounded once. Runs on every processor.");

  module.def("head", &head, "out"_a, "x"_a, "weight"_a, "bias"_a,
             "out = linear(mean of x over its pixels): weight (classes, channels) with contiguous\n"
             "rows, bias (classes) or None, out (batch, classes), all of one type, float32 or\n"
             "bfloat16. Sums are float32, rounded once. Runs on every processor.");

  module.def("squeeze_excite", &squeeze_excite, "out"_a, "x"_a, "reduce"_a, "expand"_a,
             "residual"_a, "relu"_a,
             "out = relu?(x * sigmoid(expand(relu(reduce(mean of x over its pixels)))) (+\n"
             "residual)); out may be x. reduce and expand are (weight, bias or None), of (hidden,\n"
             "channels) and (channels, hidden), dense and of x's type, float32 or bfloat16.\n"
             "Computed in float32, rounded once. Runs on every processor.");

  module.def(
      "fingerprints", &fingerprints, "tensors"_a,
      "A 64-bit hash of each tensor's bytes, in one parallel region. Certain to change when\n"
      "the bytes of one aligned 8-byte word change; the same for any number of threads. Not\n"
      "cryptographic.");

  py::class_<Contents>(module, "Contents", py::module_local(),
                       "Tensors, which it does not keep alive, and fingerprints that they had.")
      .def(py::init<const std::vector<TensorArg>&, std::vector<std::uint64_t>, bool>(), "tensors"_a,
           "fingerprints"_a, "watchable"_a)
      .def_property_readonly("watched", &Contents::watched,
                             "Whether run() knows from the system's page tables that the tensors\n"
                             "are unchanged, and need not read them.")
      .def("run", &Contents::run, "program"_a, "tensors"_a, "arena"_a,
           py::call_guard<py::gil_scoped_release>(),
           "program.run(tensors, arena), for launches of this module's CPU kernels, in one\n"
           "parallel region; whether all tensors still have their fingerprints, else the output\n"
           "means nothing. After some runs the system is asked to watch their pages (Linux 6.7\n"
           "and later), if they are `watchable`: written through page tables alone, so not pinned\n"
           "for a device.");
}
