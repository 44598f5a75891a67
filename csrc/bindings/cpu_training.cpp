// Bindings of training on the CPU. Vectors of a layer are named, and have the rows, as in
// resnet_fused/backends/training.py.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_arguments.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/train_batch_norm.h"
#include "kernels/cpu/train_conv.h"
#include "kernels/cpu/train_memory.h"
#include "program.h"
#include "register.h"
#include "residual.h"
#include "tensor_arg.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

// A pre-BN output and its scale_shift.
using Activation = std::tuple<TensorArg, TensorArg>;
// An activation and where the sums of its gradient go.
using Branch = std::tuple<TensorArg, TensorArg, TensorArg>;

// The rows of a (N, K, P, Q) tensor.
cpu::Rows rows_of(const char* name, const TensorArg& tensor) {
  check_nhwc(name, tensor);
  const auto& [batch, channels, height, width] = tensor.sizes;
  return {batch * height * width, channels, format_of(name, tensor)};
}

template <typename Arguments>
void set_activation(Launch<Arguments>& launch, cpu::Activation& slot, const TensorArg& x,
                    const TensorArg& scale_shift) {
  launch.reads(slot.x, "x", x);
  set_array(launch, slot.scale_shift, "scale_shift", scale_shift, ScalarType::kFloat32,
            {6, x.sizes[1]});
}

using ConvLaunch = WithIsa<cpu::TrainConv>;

// Sets all but the residual of a convolution of `x` with result `y`; one of them is written.
void set_conv(Launch<ConvLaunch>& launch, const TensorArg& x, const TensorArg& y,
              const TensorArg& weight, const Window& window, const std::string& isa) {
  cpu::TrainConv& conv = launch.arguments.op;
  check_type("x", x, y.type);
  if (weight.type != ScalarType::kFloat32) check_type("weight", weight, x.type);
  launch.arguments.isa = choose_isa(isa);
  const Pair kernel = std::get<0>(window);
  check_sizes("weight", weight, {y.sizes[1], x.sizes[1], kernel[0], kernel[1]});
  set_sizes(conv, "x", x, "y", y, window);
  check_convolves(conv.format, launch.arguments.isa);
  check_apart("x", x, "y", y);
  conv.weight_format = format_of("weight", weight);
  for (int i = 0; i < 4; ++i) conv.strides[i] = weight.strides[i];
  launch.reads(conv.weight, "weight", weight);
}

void train_conv(const TensorArg& out, const TensorArg& x, const TensorArg& weight,
                const Window& window, const std::string& isa) {
  Launch<ConvLaunch> launch;
  set_conv(launch, x, out, weight, window, isa);
  if (out.numel() == 0) return;
  if (x.sizes[1] < 1) refuse("x has no channels");
  launch.reads(launch.arguments.op.from, "x", x);
  launch.writes(launch.arguments.op.to, "out", out);
  launch.run<&cpu::train_conv>();
}

void train_dgrad(const TensorArg& out, const TensorArg& grad, const TensorArg& weight,
                 const Window& window, const OptionalTensor& add, const std::string& isa) {
  Launch<ConvLaunch> launch;
  set_conv(launch, out, grad, weight, window, isa);
  if (out.numel() == 0) return;
  if (grad.sizes[1] < 1) refuse("grad has no channels");
  launch.reads(launch.arguments.op.from, "grad", grad);
  if (add && !cpu::dgrad_turns(launch.arguments.op.window)) check_like("add", *add, out);
  set_residual(launch, launch.arguments.op.add, add, out);
  launch.writes(launch.arguments.op.to, "out", out);
  launch.run<&cpu::train_dgrad>();
}

void train_moments(const TensorArg& moments, const TensorArg& x) {
  Launch<cpu::Moments> launch;
  launch.arguments.rows = rows_of("x", x);
  launch.reads(launch.arguments.x, "x", x);
  set_array(launch, launch.arguments.moments, "moments", moments, ScalarType::kFloat32,
            {3, x.sizes[1]});
  launch.run<&cpu::moments>();
}

void train_bn_add_relu(const TensorArg& out, const Activation& main, const OptionalTensor& residual,
                       const std::optional<Activation>& other) {
  const auto& [x, scale_shift] = main;
  if (residual && other) refuse("residual and other exclude each other");
  Launch<cpu::NormaliseAddRelu> launch;
  cpu::NormaliseAddRelu& op = launch.arguments;
  op.rows = rows_of("x", x);
  check_like("out", out, x);
  if (out.numel() == 0) return;
  check_same_or_apart("out", out, "x", x);
  set_activation(launch, op.main, x, scale_shift);
  if (other) {
    check_like("other", std::get<0>(*other), x);
    check_same_or_apart("out", out, "other", std::get<0>(*other));
    set_activation(launch, op.other, std::get<0>(*other), std::get<1>(*other));
  }
  set_residual(launch, op.residual, residual, out);
  launch.writes(op.out, "out", out);
  launch.run<&cpu::normalise_add_relu>();
}

void train_relu_gradient(const TensorArg& g, const TensorArg& grad, const OptionalTensor& y,
                         const std::vector<Branch>& branches) {
  Launch<cpu::ReluGradient> launch;
  cpu::ReluGradient& op = launch.arguments;
  op.rows = rows_of("grad", grad);
  check_like("g", g, grad);
  if (branches.size() > 2) refuse("there are at most 2 branches");
  if (!y && branches.size() != 1) refuse("without y there is one branch, which masks");
  if (g.numel() == 0) return;
  check_same_or_apart("g", g, "grad", grad);
  launch.reads(op.grad, "grad", grad);
  if (y) {
    check_like("y", *y, grad);
    check_apart("g", g, "y", *y);
    launch.reads(op.y, "y", *y);
  }
  op.branches = static_cast<int>(branches.size());
  for (int i = 0; i < op.branches; ++i) {
    const auto& [x, scale_shift, sums] = branches[i];
    check_like("x", x, grad);
    check_apart("g", g, "x", x);
    set_activation(launch, op.branch[i], x, scale_shift);
    set_array(launch, op.sums[i], "sums", sums, ScalarType::kFloat32, {2, x.sizes[1]});
  }
  launch.writes(op.g, "g", g);
  launch.run<&cpu::relu_gradient>();
}

void train_pre_bn_gradient(const TensorArg& out, const TensorArg& g, const OptionalTensor& x,
                           const TensorArg& coefficients) {
  Launch<cpu::PreBnGradient> launch;
  cpu::PreBnGradient& op = launch.arguments;
  op.rows = rows_of("g", g);
  check_like("out", out, g);
  if (out.numel() == 0) return;
  check_same_or_apart("out", out, "g", g);
  launch.reads(op.g, "g", g);
  if (x) {
    check_like("x", *x, g);
    check_apart("out", out, "x", *x);
    launch.reads(op.x, "x", *x);
  }
  set_array(launch, op.coefficients, "coefficients", coefficients, ScalarType::kFloat32,
            {4, g.sizes[1]});
  launch.writes(op.out, "out", out);
  launch.run<&cpu::pre_bn_gradient>();
}

void train_add_strided(const TensorArg& out, const TensorArg& add, std::int64_t stride) {
  Launch<cpu::AddStrided> launch;
  cpu::AddStrided& op = launch.arguments;
  op.format = rows_of("out", out).format;
  if (stride < 1) refuse("stride must be at least 1");
  if (out.numel() == 0) return;
  std::tie(op.batch, op.channels, op.height, op.width) = std::tuple_cat(out.sizes);
  op.stride = stride;
  check_apart("out", out, "add", add);
  TensorArg sampled = out;  // the part of it that is added to
  sampled.sizes[2] = (op.height - 1) / stride + 1;
  sampled.sizes[3] = (op.width - 1) / stride + 1;
  set_residual(launch, op.add, add, sampled);
  launch.writes(op.out, "out", out);
  launch.run<&cpu::add_strided>();
}

// Of x (N, K, H, W) with the pooled size of `pooled`.
template <typename Op>
void set_pooling(Launch<Op>& launch, const Activation& activation,
                 const std::array<std::int64_t, 3>& pool, const TensorArg& pooled,
                 const TensorArg& argmax) {
  const auto& [x, scale_shift] = activation;
  cpu::Pooling& op = launch.arguments.pooling;
  op.format = rows_of("x", x).format;
  std::tie(op.batch, op.channels, op.height, op.width) = std::tuple_cat(x.sizes);
  std::tie(op.kernel, op.stride, op.padding) = std::tuple_cat(pool);
  if (op.kernel < 1 || op.stride < 1 || op.padding < 0 || 2 * op.padding > op.kernel) {
    refuse("a pool needs kernel and stride of at least 1, and a padding of at most half a window");
  }
  const auto size = [&](std::int64_t image) {
    return (image + 2 * op.padding - op.kernel) / op.stride + 1;
  };
  if (std::min(op.height, op.width) + 2 * op.padding < op.kernel) {
    refuse("the pool's window is larger than x with its padding");
  }
  op.out_height = size(op.height);
  op.out_width = size(op.width);
  check_nhwc("pooled", pooled);
  check_type("pooled", pooled, x.type);
  check_sizes("pooled", pooled, {op.batch, op.channels, op.out_height, op.out_width});
  check_nhwc("argmax", argmax);
  check_type("argmax", argmax, ScalarType::kUInt8);
  check_sizes("argmax", argmax, {op.batch, op.channels, op.out_height, op.out_width});
  set_activation(launch, op.activation, x, scale_shift);
}

void train_pool(const TensorArg& out, const TensorArg& argmax, const Activation& activation,
                const std::array<std::int64_t, 3>& pool) {
  Launch<cpu::PoolActivation> launch;
  set_pooling(launch, activation, pool, out, argmax);
  check_apart("out", out, "x", std::get<0>(activation));
  launch.writes(launch.arguments.out, "out", out);
  launch.writes(launch.arguments.argmax, "argmax", argmax);
  launch.run<&cpu::pool_activation>();
}

void train_pool_gradient(const TensorArg& g, const TensorArg& sums, const TensorArg& grad,
                         const Activation& activation, const TensorArg& argmax,
                         const std::array<std::int64_t, 3>& pool) {
  Launch<cpu::PoolGradient> launch;
  cpu::PoolGradient& op = launch.arguments;
  const TensorArg& x = std::get<0>(activation);
  set_pooling(launch, activation, pool, grad, argmax);
  check_like("g", g, x);
  check_apart("g", g, "x", x);
  check_apart("g", g, "grad", grad);
  launch.reads(op.grad, "grad", grad);
  launch.reads(op.argmax, "argmax", argmax);
  launch.writes(op.g, "g", g);
  set_array(launch, op.sums, "sums", sums, ScalarType::kFloat32, {2, x.sizes[1]});
  launch.run<&cpu::pool_gradient>();
}

// Sets `slot` to an array of (parts, rows, channels) and `parts` to how many it has.
template <typename Op>
void set_parts(Launch<Op>& launch, const float*& slot, std::int64_t& parts, const char* name,
               const TensorArg& tensor, std::int64_t rows) {
  parts = tensor.sizes[0];
  set_array(launch, slot, name, tensor, ScalarType::kFloat32,
            {parts, rows, launch.arguments.channels});
}

void train_scale_shift(const TensorArg& scale_shift, const TensorArg& moments,
                       const TensorArg& weight, const TensorArg& bias, double eps) {
  Launch<cpu::BnScaleShift> launch;
  cpu::BnScaleShift& op = launch.arguments;
  op.channels = scale_shift.sizes[1];
  op.eps = eps;
  set_parts(launch, op.moments, op.parts, "moments", moments, 3);
  set_vector(launch, op.weight, "weight", weight, op.channels);
  set_vector(launch, op.bias, "bias", bias, op.channels);
  set_array(launch, op.scale_shift, "scale_shift", scale_shift, ScalarType::kFloat32,
            {6, op.channels});
  launch.run<&cpu::bn_scale_shift>();
}

void train_coefficients(const TensorArg& coefficients, const TensorArg& weight_grad,
                        const TensorArg& bias_grad, const TensorArg& sums, const TensorArg& total,
                        const TensorArg& scale_shift, bool frozen) {
  Launch<cpu::BnBackwardCoefficients> launch;
  cpu::BnBackwardCoefficients& op = launch.arguments;
  op.channels = scale_shift.sizes[1];
  op.frozen = frozen;
  set_parts(launch, op.sums, op.parts, "sums", sums, 2);
  set_parts(launch, op.total, op.total_parts, "total", total, 2);
  set_array(launch, op.scale_shift, "scale_shift", scale_shift, ScalarType::kFloat32,
            {6, op.channels});
  set_array(launch, op.coefficients, "coefficients", coefficients, ScalarType::kFloat32,
            {4, op.channels});
  set_array(launch, op.weight_grad, "weight_grad", weight_grad, ScalarType::kFloat32,
            {op.channels});
  set_array(launch, op.bias_grad, "bias_grad", bias_grad, ScalarType::kFloat32, {op.channels});
  launch.run<&cpu::bn_backward_coefficients>();
}

void train_run(const Program& program, const std::vector<std::uintptr_t>& tensors) {
  const cpu::Memory arena(program.arena_bytes());
  cpu::with_team([&] { program.run(tensors, reinterpret_cast<std::uintptr_t>(arena.data()), 0); });
}

}  // namespace

void register_cpu_training(py::module_& module) {
  py::class_<cpu::Memory>(module, "TrainMemory", py::module_local(), py::buffer_protocol(),
                          "Uninitialised memory, a buffer of bytes. Freed, it is kept for the next "
                          "of its size.")
      .def(py::init<std::size_t>(), "bytes"_a)
      .def_buffer([](cpu::Memory& memory) {
        return py::buffer_info(static_cast<std::uint8_t*>(memory.data()),
                               static_cast<py::ssize_t>(memory.bytes()));
      });
  module.def("train_memory_kept", &cpu::kept_memory,
             "Bytes that were freed and are kept for the next TrainMemory.");
  module.def("train_memory_release", &cpu::release_memory, "Returns them to the system.");

  module.def(
      "train_run", &train_run, "program"_a, "tensors"_a, py::call_guard<py::gil_scoped_release>(),
      "program.run(tensors, arena) of this module's CPU kernels, in one parallel region, with\n"
      "kept memory as the arena.");
  module.def("train_conv", &train_conv, "out"_a, "x"_a, "weight"_a, "window"_a, "isa"_a = "",
             "out = conv(x) of one group, float32 or bfloat16; weight (out_channels, in_channels,\n"
             "height, width) of any strides, of that type or float32, which is rounded to it;\n"
             "window is as of conv_bn.");
  module.def("train_dgrad", &train_dgrad, "out"_a, "grad"_a, "weight"_a, "window"_a,
             "add"_a = py::none(), "isa"_a = "",
             "out = the gradient (+ add) of the input of that convolution, of its result's\n"
             "gradient; add is as a residual of conv_bn, and like out with a stride above 1.");
  module.def("train_moments", &train_moments, "moments"_a, "x"_a,
             "moments (3, K): mean, sum of squared deviations and count of x (N, K, P, Q). Sums\n"
             "are float64, in an order that threads do not change; so everywhere below.");
  module.def("train_bn_add_relu", &train_bn_add_relu, "out"_a, "main"_a, "residual"_a, "other"_a,
             "out = relu(normalisation of main (+ residual, or + normalisation of other)). main\n"
             "and other are (x, scale_shift), residual is as of conv_bn.");
  module.def("train_relu_gradient", &train_relu_gradient, "g"_a, "grad"_a, "y"_a, "branches"_a,
             "g = grad where y > 0, else 0; without y, where the activation of the only branch\n"
             "is. Of each branch (x, scale_shift, sums) the sums (2, K) of g and g * (x - mean).\n"
             "g may be grad.");
  module.def("train_pre_bn_gradient", &train_pre_bn_gradient, "out"_a, "g"_a, "x"_a,
             "coefficients"_a,
             "out = a * g + b * (x - mean) + d of coefficients (4, K), or a * g without x. out\n"
             "may be g.");
  module.def("train_add_strided", &train_add_strided, "out"_a, "add"_a, "stride"_a,
             "out (N, K, P, Q) += add at every `stride`-th line and pixel, in the channels that\n"
             "add has.");
  module.def("train_pool", &train_pool, "out"_a, "argmax"_a, "activation"_a, "pool"_a,
             "out = max_pool(activation) of (x, scale_shift); pool is (kernel, stride, padding).\n"
             "argmax, uint8, is where in its window each maximum stands, counted along lines.");
  module.def("train_pool_gradient", &train_pool_gradient, "g"_a, "sums"_a, "grad"_a, "activation"_a,
             "argmax"_a, "pool"_a,
             "g: the pooled result's gradient through pooling and ReLU, and its sums, as of\n"
             "train_relu_gradient.");
  module.def("train_scale_shift", &train_scale_shift, "scale_shift"_a, "moments"_a, "weight"_a,
             "bias"_a, "eps"_a,
             "scale_shift (6, K) of the moments (T, 3, K), merged in their order.");
  module.def("train_coefficients", &train_coefficients, "coefficients"_a, "weight_grad"_a,
             "bias_grad"_a, "sums"_a, "total"_a, "scale_shift"_a, "frozen"_a,
             "coefficients (4, K) of the sums `total` (T, 2, K) of all ranks, and the gradients\n"
             "(K,) of the normalisation's weight and bias of this rank's `sums`.");
}
