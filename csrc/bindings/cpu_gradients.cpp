// Bindings of the CPU kernels for the gradients of convolutions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "cpu_arguments.h"
#include "kernels/cpu/wgrad.h"
#include "register.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

void conv_wgrad(const TensorArg& out, const TensorArg& x, const TensorArg& grad,
                const Window& window, const std::string& isa) {
  Launch<WithIsa<cpu::ConvWgrad>> launch;
  cpu::ConvWgrad& conv = launch.arguments.op;
  launch.arguments.isa = choose_isa(isa);
  set_sizes(conv, "x", x, "grad", grad, window);
  check_convolves(conv.format, launch.arguments.isa);
  check_sizes("out", out,
              {conv.out_channels, conv.in_channels, conv.window.kernel[0], conv.window.kernel[1]});
  if (out.type != ScalarType::kFloat32) check_type("out", out, x.type);
  conv.out_format = format_of("out", out);
  conv.channels_last = !out.dense({0, 1, 2, 3});
  if (conv.channels_last && !out.dense({0, 2, 3, 1})) {
    refuse("out must be dense, contiguous or channels_last");
  }
  if (out.numel() == 0) return;
  check_apart("out", out, "x", x);
  check_apart("out", out, "grad", grad);
  launch.reads(conv.x, "x", x);
  launch.reads(conv.grad, "grad", grad);
  launch.writes(conv.out, "out", out);
  launch.run<&cpu::conv_wgrad>();
}

}  // namespace

void register_cpu_gradients(py::module_& module) {
  module.def(
      "conv_wgrad", &conv_wgrad, "out"_a, "x"_a, "grad"_a, "window"_a, "isa"_a = "",
      "out = the gradient with respect to the weight (out_channels, in_channels, height, width)\n"
      "of a convolution with one group, of x and the gradient of its result, float32 or bfloat16.\n"
      "out is float32 or of their type, contiguous or channels_last; window is (kernel, stride,\n"
      "padding, dilation). Sums are float32. isa=\"avx2\" forbids AVX-512. Raises ValueError for\n"
      "what does not fit, and for a processor without the instructions.");
}
