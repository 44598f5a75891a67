// Bindings of the CPU kernels: addresses and sizes in, an exception out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/cpu/batch_norm.h"
#include "kernels/cpu/bn_add_relu.h"
#include "kernels/cpu/conv.h"
#include "kernels/cpu/fingerprint.h"
#include "kernels/cpu/head.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/stem.h"
#include "kernels/cpu/winograd.h"
#include "register.h"
#include "residual.h"

namespace py = pybind11;
namespace cpu = resnet_fused::cpu;

namespace {

using Address = std::uintptr_t;
using Strides = std::array<std::int64_t, 4>;

using Pair = std::array<std::int64_t, 2>;
// Address, stride in elements, bytes of an element: 2 bfloat16, 4 fp32, 8 fp64.
using Vector = std::tuple<Address, std::int64_t, int>;
// Mean, variance, weight, bias, eps.
using BatchNorm = std::tuple<Vector, Vector, std::optional<Vector>, std::optional<Vector>, double>;

const void* pointer(Address address) { return reinterpret_cast<const void*>(address); }
void* mutable_pointer(Address address) { return reinterpret_cast<void*>(address); }
const float* floats(Address address) { return reinterpret_cast<const float*>(address); }
float* mutable_floats(Address address) { return reinterpret_cast<float*>(address); }

void check_address(const char* name, Address address, std::size_t alignment = sizeof(float)) {
  if (address == 0) throw std::invalid_argument(std::string(name) + " is a null pointer");
  if (address % alignment != 0) {
    throw std::invalid_argument(std::string(name) + " is not aligned to " +
                                std::to_string(alignment) + " bytes");
  }
}

// The product of the sizes, all >= 0; throws where one is negative or the product is no sane size.
std::int64_t element_count(const char* what, std::initializer_list<std::int64_t> sizes) {
  constexpr std::int64_t kLimit = std::int64_t{1} << 48;
  bool empty = false;
  for (const std::int64_t size : sizes) {
    if (size < 0) {
      throw std::invalid_argument(std::string(what) + ": negative size " + std::to_string(size));
    }
    empty |= size == 0;
  }
  if (empty) return 0;
  std::int64_t count = 1;
  for (const std::int64_t size : sizes) {
    if (size > kLimit / count) {
      throw std::invalid_argument(std::string(what) + ": more than 2^48 elements");
    }
    count *= size;
  }
  return count;
}

void check_apart(const char* a_name, Address a, std::int64_t a_bytes, const char* b_name, Address b,
                 std::int64_t b_bytes) {
  if (a < b + b_bytes && b < a + a_bytes) {
    throw std::invalid_argument(std::string(a_name) + " overlaps " + b_name);
  }
}

void check_channels(const char* name, std::int64_t channels) {
  if (channels < 1) {
    throw std::invalid_argument(std::string(name) + " must be at least 1, found " +
                                std::to_string(channels));
  }
}

cpu::Vector vector_of(const char* name, const Vector& vector) {
  const auto [address, stride, size] = vector;
  cpu::VectorType type = cpu::VectorType::kFloat32;
  if (size == 2) {
    type = cpu::VectorType::kBFloat16;
  } else if (size == 8) {
    type = cpu::VectorType::kFloat64;
  } else if (size != 4) {
    throw std::invalid_argument(std::string(name) + " has elements of " + std::to_string(size) +
                                " bytes, not 2 (bfloat16), 4 (fp32) or 8 (fp64)");
  }
  check_address(name, address, size);
  return {pointer(address), type, stride};
}

cpu::BatchNorm batch_norm_of(const BatchNorm& bn) {
  const auto& [mean, var, weight, bias, eps] = bn;
  const cpu::Vector absent{nullptr, cpu::VectorType::kFloat32, 0};
  return {vector_of("mean", mean), vector_of("var", var),
          weight ? vector_of("weight", *weight) : absent, bias ? vector_of("bias", *bias) : absent,
          eps};
}

cpu::Format format_of(bool bf16) { return bf16 ? cpu::Format::kBFloat16 : cpu::Format::kFloat32; }

// Throws where isa cannot convolve in this format.
void check_convolves(cpu::Format format, cpu::Isa isa) {
  if (!cpu::convolves(format, isa)) {
    throw std::invalid_argument("bfloat16 needs AVX512_BF16; ask cpu_convolves_bf16() first");
  }
}

const char* isa_name(cpu::Isa isa) {
  switch (isa) {
    case cpu::Isa::kAvx512:
      return "avx512";
    case cpu::Isa::kAvx2:
      return "avx2";
    case cpu::Isa::kNone:
      break;
  }
  return "";
}

// The instruction set called `name`, "" for the best; throws where the processor lacks it.
cpu::Isa choose_isa(const std::string& name) {
  const cpu::Isa best = cpu::best_isa();
  cpu::Isa chosen = best;
  if (name == "avx512") {
    chosen = cpu::Isa::kAvx512;
  } else if (name == "avx2") {
    chosen = cpu::Isa::kAvx2;
  } else if (!name.empty()) {
    throw std::invalid_argument("isa must be \"\", \"avx2\" or \"avx512\", found \"" + name + "\"");
  }
  if (chosen == cpu::Isa::kNone || chosen > best) {
    throw std::invalid_argument("this processor offers neither AVX-512 nor what isa=\"" + name +
                                "\" asks for; cpu_isa() tells what it has");
  }
  return chosen;
}

std::int64_t winograd_weight_floats(std::int64_t in_channels, std::int64_t out_channels) {
  check_channels("in_channels", in_channels);
  check_channels("out_channels", out_channels);
  element_count("packed", {16, in_channels, out_channels, 16});
  return cpu::winograd_weight_floats(in_channels, out_channels);
}

void winograd_transform_weights(Address weight, const Strides& strides, Address packed,
                                std::int64_t in_channels, std::int64_t out_channels) {
  winograd_weight_floats(in_channels, out_channels);
  check_address("weight", weight);
  check_address("packed", packed);
  py::gil_scoped_release unlocked;
  cpu::winograd_transform_weights(floats(weight), strides.data(), mutable_floats(packed),
                                  in_channels, out_channels);
}

void winograd_conv(Address x, Address packed, const BatchNorm& bn, const ResidualArgument& residual,
                   Address out, std::int64_t batch, std::int64_t height, std::int64_t width,
                   std::int64_t in_channels, std::int64_t out_channels, bool relu,
                   const std::string& isa_name) {
  check_channels("in_channels", in_channels);
  check_channels("out_channels", out_channels);
  const std::int64_t x_floats = element_count("x", {batch, height, width, in_channels});
  const std::int64_t out_floats = element_count("out", {batch, height, width, out_channels});
  const cpu::Isa isa = choose_isa(isa_name);
  if (out_floats == 0) return;
  check_address("x", x);
  check_address("packed", packed);
  check_address("out", out);
  check_apart("out", out, out_floats * sizeof(float), "x", x, x_floats * sizeof(float));
  const cpu::WinogradConv conv{
      floats(x),
      floats(packed),
      residual_of(residual, out, {batch, height, width, out_channels}, sizeof(float)),
      mutable_floats(out),
      batch,
      height,
      width,
      in_channels,
      out_channels,
      batch_norm_of(bn),
      relu};
  py::gil_scoped_release unlocked;
  cpu::winograd_conv(conv, isa);
}

std::int64_t stem_weight_bytes(std::int64_t out_channels, bool bf16) {
  element_count("packed", {out_channels, 147});
  if (out_channels < 1 || out_channels % cpu::kStemStrip != 0) {
    throw std::invalid_argument("out_channels must be a positive multiple of 32, found " +
                                std::to_string(out_channels));
  }
  return 4 * cpu::stem_weight_words(out_channels, format_of(bf16));
}

void stem_transform_weights(Address weight, const Strides& strides, Address packed,
                            std::int64_t out_channels, bool bf16) {
  stem_weight_bytes(out_channels, bf16);
  check_address("weight", weight, bf16 ? 2 : 4);
  check_address("packed", packed);
  py::gil_scoped_release unlocked;
  cpu::stem_transform_weights(reinterpret_cast<const void*>(weight), strides.data(),
                              reinterpret_cast<void*>(packed), out_channels, format_of(bf16));
}

void stem_conv_pool(Address x, Address packed, const BatchNorm& bn, Address out, std::int64_t batch,
                    std::int64_t height, std::int64_t width, std::int64_t out_channels, bool bf16,
                    const std::string& isa_name) {
  stem_weight_bytes(out_channels, bf16);
  const std::int64_t size = bf16 ? 2 : 4;
  const std::int64_t x_bytes = size * element_count("x", {batch, height, width, 3});
  const std::int64_t out_bytes =
      size * element_count("out", {batch, cpu::stem_halved(cpu::stem_halved(height)),
                                   cpu::stem_halved(cpu::stem_halved(width)), out_channels});
  const cpu::Isa isa = choose_isa(isa_name);
  check_convolves(format_of(bf16), isa);
  if (out_bytes == 0) return;
  check_address("x", x, size);
  check_address("packed", packed);
  check_address("out", out, size);
  check_apart("out", out, out_bytes, "x", x, x_bytes);
  const cpu::Stem stem{pointer(x), pointer(packed), mutable_pointer(out), batch,          height,
                       width,      out_channels,    batch_norm_of(bn),    format_of(bf16)};
  py::gil_scoped_release unlocked;
  cpu::stem_conv_pool(stem, isa);
}

std::int64_t conv_weight_bytes(std::int64_t in_channels, std::int64_t out_channels,
                               const Pair& kernel, bool bf16) {
  check_channels("in_channels", in_channels);
  check_channels("out_channels", out_channels);
  for (const std::int64_t size : kernel) {
    if (size < 1) throw std::invalid_argument("kernel sizes must be at least 1");
  }
  element_count("packed", {in_channels, out_channels, kernel[0], kernel[1], 32});
  return 4 *
         cpu::conv_weight_words(in_channels, out_channels, kernel[0] * kernel[1], format_of(bf16));
}

void conv_transform_weights(Address weight, const Strides& strides, Address packed,
                            std::int64_t in_channels, std::int64_t out_channels, const Pair& kernel,
                            bool bf16) {
  conv_weight_bytes(in_channels, out_channels, kernel, bf16);
  check_address("weight", weight, bf16 ? 2 : 4);
  check_address("packed", packed);
  py::gil_scoped_release unlocked;
  cpu::conv_transform_weights(pointer(weight), strides.data(), mutable_pointer(packed), in_channels,
                              out_channels, kernel.data(), format_of(bf16));
}

cpu::Window window_of(const Pair& kernel, const Pair& stride, const Pair& padding,
                      const Pair& dilation) {
  cpu::Window window;
  for (int axis = 0; axis < 2; ++axis) {
    constexpr std::int64_t kLimit = std::int64_t{1} << 31;
    if (stride[axis] < 1 || dilation[axis] < 1 || padding[axis] < 0 ||
        std::max({kernel[axis], stride[axis], dilation[axis], padding[axis]}) > kLimit) {
      throw std::invalid_argument(
          "stride and dilation must be at least 1 and padding at least 0, all at most 2^31");
    }
    window.kernel[axis] = kernel[axis];
    window.stride[axis] = stride[axis];
    window.padding[axis] = padding[axis];
    window.dilation[axis] = dilation[axis];
  }
  return window;
}

// x, packed, bn, height, width, in_channels, kernel, stride, padding, dilation.
using Projection = std::tuple<Address, Address, BatchNorm, std::int64_t, std::int64_t, std::int64_t,
                              Pair, Pair, Pair, Pair>;

void conv_bn(Address x, Address packed, const BatchNorm& bn, const ResidualArgument& residual,
             Address out, std::int64_t batch, std::int64_t height, std::int64_t width,
             std::int64_t in_channels, std::int64_t out_channels, const Pair& kernel,
             const Pair& stride, const Pair& padding, const Pair& dilation, bool relu, bool bf16,
             const std::string& isa_name, const std::optional<Projection>& projected) {
  const cpu::Isa isa = choose_isa(isa_name);
  check_convolves(format_of(bf16), isa);
  const std::int64_t size = bf16 ? 2 : 4;
  const auto conv_of = [&](Address x, Address packed, const BatchNorm& bn, std::int64_t height,
                           std::int64_t width, std::int64_t in_channels, const Pair& kernel,
                           const Pair& stride, const Pair& padding, const Pair& dilation) {
    conv_weight_bytes(in_channels, out_channels, kernel, bf16);
    const cpu::Window window = window_of(kernel, stride, padding, dilation);
    const std::int64_t x_bytes = size * element_count("x", {batch, height, width, in_channels});
    const std::array<std::int64_t, 4> shape = {batch, cpu::conv_output_size(window, 0, height),
                                               cpu::conv_output_size(window, 1, width),
                                               out_channels};
    const std::int64_t out_bytes =
        size * element_count("out", {shape[0], shape[1], shape[2], shape[3]});
    resnet_fused::Residual added;
    if (out_bytes > 0) {
      if (x_bytes > 0) check_address("x", x, size);
      check_address("packed", packed);
      check_address("out", out, size);
      check_apart("out", out, out_bytes, "x", x, x_bytes);
      added = residual_of(residual, out, shape, size);
    }
    return cpu::Conv{
        pointer(x),  pointer(packed), added,  mutable_pointer(out), batch, height,         width,
        in_channels, out_channels,    window, batch_norm_of(bn),    relu,  format_of(bf16)};
  };
  cpu::Conv conv =
      conv_of(x, packed, bn, height, width, in_channels, kernel, stride, padding, dilation);
  std::optional<cpu::Conv> projection;
  if (projected) {
    if (residual) throw std::invalid_argument("residual and projection exclude each other");
    projection = std::apply(conv_of, *projected);
    conv.projection = &*projection;
    const std::int64_t sizes[2] = {conv.height, conv.width};
    const std::int64_t projected_sizes[2] = {projection->height, projection->width};
    for (int axis = 0; axis < 2; ++axis) {
      if (cpu::conv_output_size(conv.window, axis, sizes[axis]) !=
          cpu::conv_output_size(projection->window, axis, projected_sizes[axis])) {
        throw std::invalid_argument("the projection's result has another size");
      }
    }
  }
  py::gil_scoped_release unlocked;
  cpu::conv_bn(conv, isa);
}

void bn_add_relu(Address x, const BatchNorm& bn, const ResidualArgument& residual, Address out,
                 std::int64_t batch, std::int64_t height, std::int64_t width, std::int64_t channels,
                 bool relu, bool bf16) {
  const std::int64_t size = bf16 ? 2 : 4;
  const std::int64_t bytes = size * element_count("x", {batch, height, width, channels});
  if (bytes == 0) return;
  check_address("x", x, size);
  check_address("out", out, size);
  if (x != out) check_apart("out", out, bytes, "x", x, bytes);
  const cpu::BnAddRelu op{pointer(x),
                          residual_of(residual, out, {batch, height, width, channels}, size),
                          mutable_pointer(out),
                          batch * height * width,
                          channels,
                          batch_norm_of(bn),
                          relu,
                          format_of(bf16)};
  py::gil_scoped_release unlocked;
  cpu::bn_add_relu(op);
}

void head(Address x, Address weight, std::int64_t weight_stride, Address bias, Address out,
          std::int64_t batch, std::int64_t pixels, std::int64_t channels, std::int64_t classes,
          bool bf16) {
  const std::int64_t size = bf16 ? 2 : 4;
  const std::int64_t x_bytes = size * element_count("x", {batch, pixels, channels});
  const std::int64_t out_bytes = size * element_count("out", {batch, classes});
  element_count("weight", {classes, weight_stride});
  if (out_bytes == 0) return;
  if (x_bytes == 0) throw std::invalid_argument("x has no pixels or no channels to average");
  check_address("x", x, size);
  check_address("weight", weight, size);
  check_address("out", out, size);
  if (bias != 0) check_address("bias", bias, size);
  check_apart("out", out, out_bytes, "x", x, x_bytes);
  const cpu::Head head{pointer(x),    pointer(weight), pointer(bias), mutable_pointer(out),
                       batch,         pixels,          channels,      classes,
                       weight_stride, format_of(bf16)};
  py::gil_scoped_release unlocked;
  cpu::head(head);
}

std::vector<std::uint64_t> fingerprints(
    const std::vector<std::pair<Address, std::int64_t>>& inputs) {
  std::vector<cpu::Bytes> bytes;
  bytes.reserve(inputs.size());
  for (const auto& [address, size] : inputs) {
    if (element_count("fingerprint", {size}) > 0) check_address("fingerprint", address, 1);
    bytes.push_back(
        {reinterpret_cast<const unsigned char*>(address), static_cast<std::size_t>(size)});
  }
  std::vector<std::uint64_t> out(inputs.size());
  py::gil_scoped_release unlocked;
  cpu::fingerprints(bytes.data(), bytes.size(), out.data());
  return out;
}

}  // namespace

void register_cpu_kernels(py::module_& module) {
  module.def(
      "cpu_isa", [] { return isa_name(cpu::best_isa()); },
      "The vector instructions the CPU kernels use here: \"avx512\", \"avx2\", or \"\" where "
      "there\n"
      "are none; then the convolutions raise ValueError, and the rest works.");

  module.def(
      "cpu_convolves_bf16", [] { return cpu::convolves(cpu::Format::kBFloat16, cpu::best_isa()); },
      "Whether conv_bn and stem_conv_pool take bf16=True on this processor (AVX512_BF16).");

  module.def("cpu_has_amx_bf16", &cpu::has_amx_bf16,
             "Whether this processor multiplies bfloat16 in tiles (AMX), which oneDNN uses.");

  module.def(
      "conv_weight_bytes", &conv_weight_bytes, py::arg("in_channels"), py::arg("out_channels"),
      py::arg("kernel"), py::arg("bf16"),
      "Bytes that conv_transform_weights fills: the weight's own, with out_channels rounded\n"
      "up to 32 and, in bf16, an odd number of weights a channel up to an even one.");

  module.def("conv_transform_weights", &conv_transform_weights, py::arg("weight"),
             py::arg("strides"), py::arg("packed"), py::arg("in_channels"), py::arg("out_channels"),
             py::arg("kernel"), py::arg("bf16"),
             "packed = the weights reordered for conv_bn. weight is the address of a\n"
             "(out_channels, in_channels, *kernel) tensor, bf16 or else fp32, with any `strides`\n"
             "(in elements); packed that of conv_weight_bytes(...) bytes.");

  module.def(
      "conv_bn", &conv_bn, py::arg("x"), py::arg("packed"), py::arg("bn"), py::arg("residual"),
      py::arg("out"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("in_channels"),
      py::arg("out_channels"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
      py::arg("dilation"), py::arg("relu"), py::arg("bf16"), py::arg("isa") = "",
      py::arg("projection") = py::none(),
      "out = relu?(bn(conv(x)) (+ residual)) with one group. Addresses of x (batch, height,\n"
      "width, in_channels) and out (batch, output height, output width, out_channels), both\n"
      "bf16 or else fp32; x may not overlap out. residual is None or (address, channels,\n"
      "strides): of out's type and first channels, strides in elements from an image, a line\n"
      "and a pixel to the next; it may be out, and overlaps it in no other way.\n"
      "bn is (mean, var, weight, bias, eps), each vector (address, stride\n"
      "in elements, bytes of an element: 2 bf16, 4 fp32, 8 fp64), weight and bias None\n"
      "where absent. Sums and batch norm are fp32. projection, instead of a residual, is\n"
      "(x, packed, bn, height, width, in_channels, kernel, stride, padding, dilation) of a\n"
      "convolution whose normalised, unrounded result is added. isa=\"avx2\" forbids AVX-512.\n"
      "Raises ValueError for null pointers, impossible sizes, overlaps, or a processor\n"
      "without the instructions.");

  module.def(
      "bn_add_relu", &bn_add_relu, py::arg("x"), py::arg("bn"), py::arg("residual"), py::arg("out"),
      py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("channels"), py::arg("relu"),
      py::arg("bf16"),
      "out = relu?(bn(x) (+ residual)). Addresses of x and out (batch, height, width,\n"
      "channels), both bf16 or else fp32; x may be out. residual and bn as in conv_bn. Runs on\n"
      "every processor. Raises ValueError for null pointers, impossible sizes and overlaps.");

  module.def(
      "head", &head, py::arg("x"), py::arg("weight"), py::arg("weight_stride"), py::arg("bias"),
      py::arg("out"), py::arg("batch"), py::arg("pixels"), py::arg("channels"), py::arg("classes"),
      py::arg("bf16"),
      "out = linear(mean of x over its pixels). Addresses of x (batch, pixels, channels),\n"
      "weight (classes, channels), its rows weight_stride elements apart, bias (classes) or\n"
      "0, out (batch, classes), all bf16 or else fp32. Sums are fp32, rounded once. Runs on\n"
      "every processor. Raises ValueError for null pointers, impossible sizes, overlaps.");

  module.def("winograd_weight_floats", &winograd_weight_floats, py::arg("in_channels"),
             py::arg("out_channels"),
             "Floats that winograd_transform_weights fills: 16/9 of the weight's own number, with\n"
             "out_channels rounded up to 16.");

  module.def("winograd_transform_weights", &winograd_transform_weights, py::arg("weight"),
             py::arg("strides"), py::arg("packed"), py::arg("in_channels"), py::arg("out_channels"),
             "packed = the transformed weights of a 3x3 convolution, for winograd_conv. weight is\n"
             "the address of a fp32 (out_channels, in_channels, 3, 3) tensor with any `strides`\n"
             "(in elements); packed that of winograd_weight_floats(...) floats.");

  module.def("winograd_conv", &winograd_conv, py::arg("x"), py::arg("packed"), py::arg("bn"),
             py::arg("residual"), py::arg("out"), py::arg("batch"), py::arg("height"),
             py::arg("width"), py::arg("in_channels"), py::arg("out_channels"), py::arg("relu"),
             py::arg("isa") = "",
             "out = relu?(bn(conv(x)) (+ residual)) for a 3x3 convolution of stride,\n"
             "padding, dilation and groups 1, by Winograd's F(2x2, 3x3) (arXiv:1509.09308).\n"
             "Addresses of fp32 tensors: x (batch, height, width, in_channels) and out (batch,\n"
             "height, width, out_channels), apart; residual and bn as in conv_bn. A non-finite\n"
             "input reaches all of its 2x2 output tile. isa=\"avx2\" forbids AVX-512. Raises "
             "ValueError for null\n"
             "pointers, impossible sizes, overlaps, or a processor without the instructions.");

  module.def("stem_weight_bytes", &stem_weight_bytes, py::arg("out_channels"), py::arg("bf16"),
             "Bytes that stem_transform_weights fills; out_channels is a multiple of 32.");

  module.def("stem_transform_weights", &stem_transform_weights, py::arg("weight"),
             py::arg("strides"), py::arg("packed"), py::arg("out_channels"), py::arg("bf16"),
             "packed = the weights of a 7x7 convolution, reordered for stem_conv_pool. weight is\n"
             "the address of a (out_channels, 3, 7, 7) tensor, bf16 or else fp32, with any\n"
             "`strides` (in elements); packed that of stem_weight_bytes(...) bytes.");

  module.def("stem_conv_pool", &stem_conv_pool, py::arg("x"), py::arg("packed"), py::arg("bn"),
             py::arg("out"), py::arg("batch"), py::arg("height"), py::arg("width"),
             py::arg("out_channels"), py::arg("bf16"), py::arg("isa") = "",
             "out = max_pool(relu(bn(conv(x)))): 7x7 convolution of stride 2 and\n"
             "padding 3, 3x3 max pool of stride 2 and padding 1. Addresses of x (batch, height,\n"
             "width, 3), out (batch, pooled height, pooled width, out_channels), both bf16 or\n"
             "else fp32, bn as in conv_bn; a size n becomes (n + 1) // 2,\n"
             "twice. Sums are fp32. isa=\"avx2\" forbids AVX-512. Raises ValueError for null\n"
             "pointers, impossible sizes, overlaps, or a processor without the instructions.");

  module.def(
      "fingerprint",
      [](Address address, std::int64_t size) { return fingerprints({{address, size}}).front(); },
      py::arg("address"), py::arg("size"),
      "A 64-bit hash of `size` bytes at `address`. Certain to change when the bytes of one\n"
      "aligned 8-byte word change; the same for any number of threads. Not cryptographic.");

  module.def("fingerprints", &fingerprints, py::arg("inputs"),
             "[fingerprint(address, size) for address, size in inputs], in one parallel region.");
}
