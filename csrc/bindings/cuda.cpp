// Bindings of the CUDA kernels: addresses, sizes and a stream's handle in, an exception out.
#include <cuda_runtime_api.h>
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
#include <vector>

#include "kernels/cuda/bn_add_relu.h"
#include "kernels/cuda/bottleneck.h"
#include "kernels/cuda/conv.h"
#include "kernels/cuda/head.h"
#include "kernels/cuda/stem.h"
#include "register.h"
#include "residual.h"

namespace py = pybind11;
using resnet_fused::BatchNorm;
using resnet_fused::BnAddRelu;
using resnet_fused::Bottleneck;
using resnet_fused::ConvBn;
using resnet_fused::ConvolutionBn;
using resnet_fused::ConvTile;
using resnet_fused::DType;
using resnet_fused::Layer;
using resnet_fused::Vector;

namespace {

void check_cuda(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  std::string message = std::string(what) + ": " + cudaGetErrorString(error);
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInvalidKernelImage:
      message +=
          ". The extension holds no code that this GPU can run: reinstall resnet_fused with "
          "RESNET_FUSED_CUDA_ARCHS set to its compute capability (for example \"90a\"), or use "
          "the triton backend";
      break;
    case cudaErrorInsufficientDriver:
      message +=
          ". The extension was built with a CUDA newer than this driver serves: update the driver, "
          "or reinstall resnet_fused with CUDACXX naming an older nvcc, or use the triton backend";
      break;
    default:
      break;
  }
  throw std::runtime_error(message);
}

template <typename T = void>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Vector vector(const char* name, const py::object& argument) {
  if (argument.is_none()) return {};
  const auto [address, dtype] = argument.cast<std::pair<std::uintptr_t, DType>>();
  if (address == 0) throw std::invalid_argument(std::string(name) + " is a null pointer");
  return {pointer<const void>(address), dtype};
}

BatchNorm batch_norm(const py::object& mean, const py::object& var, const py::object& weight,
                     const py::object& bias, double eps) {
  if (mean.is_none() || var.is_none()) throw std::invalid_argument("mean and var are needed");
  return {vector("mean", mean), vector("var", var), vector("weight", weight), vector("bias", bias),
          static_cast<float>(eps)};
}

using Pair = std::array<std::int64_t, 2>;

std::int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void check_elements(const char* name, std::initializer_list<std::int64_t> sizes) {
  std::int64_t elements = 1;
  for (const std::int64_t s : sizes) {
    if (s > 0 && elements > (std::int64_t{1} << 60) / s) {
      throw std::invalid_argument(std::string(name) + " has too many elements");
    }
    elements *= s;
  }
}

void bn_add_relu(std::uintptr_t out, std::uintptr_t x, const ResidualArgument& residual,
                 DType dtype, std::int64_t batch, const Pair& image, std::int64_t channels,
                 const py::object& mean, const py::object& var, const py::object& weight,
                 const py::object& bias, double eps, bool relu, int device, std::uintptr_t stream) {
  const auto [height, width] = image;
  if (std::min({batch, height, width, channels}) < 0) {
    throw std::invalid_argument("batch, image and channels must be >= 0");
  }
  check_elements("x", {batch, height, width, channels});
  const std::int64_t rows = batch * height * width;
  if (rows == 0 || channels == 0) return;
  if (out == 0 || x == 0) throw std::invalid_argument("out or x is a null pointer");
  const BnAddRelu arguments{
      pointer(out),
      pointer<const void>(x),
      residual_of(residual, out, {batch, height, width, channels}, size_of(dtype)),
      dtype,
      rows,
      channels,
      batch_norm(mean, var, weight, bias, eps),
      relu};
  if (!arguments.residual.in_line()) {
    throw std::invalid_argument("residual must have all pixels at one distance here");
  }
  py::gil_scoped_release unlocked;
  check_cuda("bn_add_relu",
             resnet_fused::bn_add_relu(arguments, device, pointer<CUstream_st>(stream)));
}

// The kernels compute positions and channels in 32 bits, with room for a sum of two.
constexpr std::int64_t kMaxSize = std::int64_t{1} << 29;

int size(const char* name, std::int64_t value, std::int64_t least) {
  if (value < least || value >= kMaxSize) {
    throw std::invalid_argument(std::string(name) + " must be at least " + std::to_string(least) +
                                " and below 2^29, found " + std::to_string(value));
  }
  return static_cast<int>(value);
}

ConvolutionBn convolution_bn(std::uintptr_t x, std::uintptr_t weight, const Pair& image,
                             std::int64_t channels, const Pair& kernel, const Pair& stride,
                             const Pair& padding, const Pair& dilation, const py::object& mean,
                             const py::object& var, const py::object& bn_weight,
                             const py::object& bias, double eps) {
  if (x == 0 || weight == 0) throw std::invalid_argument("x or weight is a null pointer");
  ConvolutionBn conv;
  conv.x = pointer<const void>(x);
  conv.weight = pointer<const void>(weight);
  conv.height = size("height", image[0], 0);
  conv.width = size("width", image[1], 0);
  conv.channels = size("channels", channels, 1);
  conv.kernel_h = size("kernel height", kernel[0], 1);
  conv.kernel_w = size("kernel width", kernel[1], 1);
  conv.stride_h = size("vertical stride", stride[0], 1);
  conv.stride_w = size("horizontal stride", stride[1], 1);
  conv.padding_h = size("vertical padding", padding[0], 0);
  conv.padding_w = size("horizontal padding", padding[1], 0);
  conv.dilation_h = size("vertical dilation", dilation[0], 1);
  conv.dilation_w = size("horizontal dilation", dilation[1], 1);
  conv.bn = batch_norm(mean, var, bn_weight, bias, eps);
  return conv;
}

// What one convolution must have in common with the result.
void check_convolution(const ConvolutionBn& conv, const ConvBn& result) {
  const auto positions = [](std::int64_t in, std::int64_t kernel, std::int64_t stride,
                            std::int64_t padding, std::int64_t dilation) {
    const std::int64_t reach = dilation * (kernel - 1) + 1;
    if (in + 2 * padding < reach) return std::int64_t{0};
    return (in + 2 * padding - reach) / stride + 1;
  };
  if (positions(conv.height, conv.kernel_h, conv.stride_h, conv.padding_h, conv.dilation_h) !=
          result.out_height ||
      positions(conv.width, conv.kernel_w, conv.stride_w, conv.padding_w, conv.dilation_w) !=
          result.out_width) {
    throw std::invalid_argument("the convolution of a " + std::to_string(conv.height) + " x " +
                                std::to_string(conv.width) + " image is not of size " +
                                std::to_string(result.out_height) + " x " +
                                std::to_string(result.out_width));
  }
  if (conv.channels % result.groups != 0 || result.out_channels % result.groups != 0) {
    throw std::invalid_argument("groups must divide channels and out_channels");
  }
  check_elements("x", {result.batch, conv.height, conv.width, conv.channels});
  check_elements("weight", {result.out_channels, conv.kernel_h, conv.kernel_w, conv.channels});
}

ConvBn conv_bn_arguments(std::uintptr_t out, const ResidualArgument& residual, DType dtype,
                         std::int64_t batch, const Pair& out_image, std::int64_t out_channels,
                         std::int64_t groups, const ConvolutionBn& conv,
                         const std::optional<ConvolutionBn>& projection, bool relu, bool tf32) {
  ConvBn arguments{pointer(out),
                   {},
                   dtype,
                   size("batch", batch, 0),
                   size("out_height", out_image[0], 0),
                   size("out_width", out_image[1], 0),
                   size("out_channels", out_channels, 0),
                   size("groups", groups, 1),
                   conv,
                   projection.value_or(ConvolutionBn{}),
                   relu,
                   tf32};
  if (out == 0) throw std::invalid_argument("out is a null pointer");
  check_elements("out", {batch, out_image[0], out_image[1], out_channels});
  size("out_height * out_width", out_image[0] * out_image[1], 0);
  check_convolution(conv, arguments);
  if (projection) {
    if (groups != 1 || residual) {
      throw std::invalid_argument("a projection needs groups = 1 and excludes a residual");
    }
    check_convolution(*projection, arguments);
  }
  if (batch * out_image[0] * out_image[1] * out_channels > 0) {
    arguments.residual = residual_of(
        residual, out, {batch, out_image[0], out_image[1], out_channels}, size_of(dtype));
  }
  return arguments;
}

void conv_bn(std::uintptr_t out, const ResidualArgument& residual, DType dtype, std::int64_t batch,
             const Pair& out_image, std::int64_t out_channels, std::int64_t groups,
             const ConvolutionBn& conv, const std::optional<ConvolutionBn>& projection, bool relu,
             bool tf32, ConvTile tile, int device, std::uintptr_t stream) {
  const ConvBn arguments = conv_bn_arguments(out, residual, dtype, batch, out_image, out_channels,
                                             groups, conv, projection, relu, tf32);
  if (!resnet_fused::conv_bn_can_implement(arguments, tile)) {
    throw std::invalid_argument("this tile does not compute such a convolution; use automatic");
  }
  py::gil_scoped_release unlocked;
  check_cuda("conv_bn",
             resnet_fused::conv_bn(arguments, tile, device, pointer<CUstream_st>(stream)));
}

std::vector<ConvTile> conv_bn_tiles(std::uintptr_t out, const ResidualArgument& residual,
                                    DType dtype, std::int64_t batch, const Pair& out_image,
                                    std::int64_t out_channels, std::int64_t groups,
                                    const ConvolutionBn& conv,
                                    const std::optional<ConvolutionBn>& projection, bool relu,
                                    bool tf32, int device) {
  const ConvBn arguments = conv_bn_arguments(out, residual, dtype, batch, out_image, out_channels,
                                             groups, conv, projection, relu, tf32);
  py::gil_scoped_release unlocked;
  std::vector<ConvTile> tiles;
  check_cuda("conv_bn", resnet_fused::conv_bn_tiles(arguments, device, &tiles));
  return tiles;
}

Layer layer(const py::object& argument) {
  if (argument.is_none()) return {};
  using Fields = std::tuple<std::uintptr_t, py::object, py::object, py::object, py::object, double>;
  const auto [weight, mean, var, bn_weight, bias, eps] = argument.cast<Fields>();
  if (weight == 0) throw std::invalid_argument("a weight is a null pointer");
  return {pointer<const void>(weight), batch_norm(mean, var, bn_weight, bias, eps)};
}

Bottleneck bottleneck(std::uintptr_t x, DType dtype, std::int64_t batch, const Pair& image,
                      std::int64_t channels, std::int64_t inner, std::int64_t out_channels,
                      std::int64_t stride, const std::array<py::object, 3>& layers,
                      const py::object& projection) {
  if (x == 0) throw std::invalid_argument("x is a null pointer");
  const Bottleneck block{pointer<const void>(x),     dtype,
                         size("batch", batch, 0),    size("height", image[0], 0),
                         size("width", image[1], 0), size("channels", channels, 1),
                         size("inner", inner, 1),    size("out_channels", out_channels, 1),
                         size("stride", stride, 1),  layer(layers[0]),
                         layer(layers[1]),           layer(layers[2]),
                         layer(projection)};
  if (block.conv1.weight == nullptr || block.conv2.weight == nullptr ||
      block.conv3.weight == nullptr) {
    throw std::invalid_argument("three layers are needed");
  }
  check_elements("x", {batch, image[0], image[1], channels});
  check_elements("out", {batch, image[0], image[1], out_channels});
  size("3 * 3 * inner * inner", 9 * inner * inner, 0);
  return block;
}

void run_bottleneck(std::uintptr_t out, const Bottleneck& block, int device,
                    std::uintptr_t stream) {
  if (out == 0) throw std::invalid_argument("out is a null pointer");
  if (!resnet_fused::bottleneck_can_implement(block, device)) {
    throw std::invalid_argument("there is no kernel for such a bottleneck on this device");
  }
  py::gil_scoped_release unlocked;
  check_cuda("bottleneck",
             resnet_fused::bottleneck(pointer(out), block, device, pointer<CUstream_st>(stream)));
}

void stem(std::uintptr_t out, std::uintptr_t x, std::uintptr_t weight, DType dtype,
          std::int64_t batch, const Pair& image, std::int64_t out_channels, const py::object& mean,
          const py::object& var, const py::object& bn_weight, const py::object& bias, double eps,
          int device, std::uintptr_t stream) {
  if (out == 0 || x == 0 || weight == 0) {
    throw std::invalid_argument("out, x or weight is a null pointer");
  }
  const resnet_fused::Stem arguments{pointer(out),
                                     pointer<const void>(x),
                                     pointer<const void>(weight),
                                     dtype,
                                     size("batch", batch, 0),
                                     size("height", image[0], 0),
                                     size("width", image[1], 0),
                                     size("out_channels", out_channels, 0),
                                     batch_norm(mean, var, bn_weight, bias, eps)};
  check_elements("x", {batch, image[0], image[1], 3});
  check_elements("out", {batch, image[0], image[1], out_channels});
  size("7 * 7 * 3 * out_channels", 7 * 7 * 3 * out_channels, 0);
  if (out_channels % 8 != 0 || dtype == DType::kFloat32) {
    throw std::invalid_argument(
        "the stem needs float16 or bfloat16, and out_channels that are a multiple of 8");
  }
  py::gil_scoped_release unlocked;
  check_cuda("stem", resnet_fused::stem(arguments, device, pointer<CUstream_st>(stream)));
}

void average_pool(std::uintptr_t out, DType out_dtype, std::uintptr_t x, DType dtype,
                  std::int64_t batch, std::int64_t positions, std::int64_t channels, int device,
                  std::uintptr_t stream) {
  const resnet_fused::AveragePool arguments{pointer(out),
                                            pointer<const void>(x),
                                            dtype,
                                            out_dtype,
                                            size("batch", batch, 0),
                                            size("positions", positions, 1),
                                            size("channels", channels, 0)};
  if (batch * channels > 0 && (out == 0 || x == 0)) {
    throw std::invalid_argument("out or x is a null pointer");
  }
  check_elements("x", {batch, positions, channels});
  if (out_dtype != dtype && out_dtype != DType::kFloat32) {
    throw std::invalid_argument("out_dtype must be dtype or float32");
  }
  py::gil_scoped_release unlocked;
  check_cuda("average_pool",
             resnet_fused::average_pool(arguments, device, pointer<CUstream_st>(stream)));
}

void linear(std::uintptr_t out, std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias,
            DType dtype, std::int64_t batch, std::int64_t channels, std::int64_t classes,
            int device, std::uintptr_t stream) {
  const resnet_fused::Linear arguments{pointer(out),
                                       pointer<const float>(x),
                                       pointer<const void>(weight),
                                       pointer<const void>(bias),
                                       dtype,
                                       size("batch", batch, 0),
                                       size("channels", channels, 1),
                                       size("classes", classes, 0)};
  if (batch * classes > 0 && (out == 0 || x == 0 || weight == 0)) {
    throw std::invalid_argument("out, x or weight is a null pointer");
  }
  check_elements("out", {batch, classes});
  check_elements("weight", {classes, channels});
  py::gil_scoped_release unlocked;
  check_cuda("linear", resnet_fused::linear(arguments, device, pointer<CUstream_st>(stream)));
}

}  // namespace

void register_cuda_kernels(py::module_& module) {
  // Types local to the module, as the simulator's module has the same ones in the same process.
  py::enum_<DType>(module, "DType", py::module_local())
      .value("float32", DType::kFloat32)
      .value("float16", DType::kFloat16)
      .value("bfloat16", DType::kBFloat16);

  module.def(
      "cuda_bn_add_relu", &bn_add_relu, py::arg("out"), py::arg("x"), py::arg("residual"),
      py::arg("dtype"), py::arg("batch"), py::arg("image"), py::arg("channels"), py::arg("mean"),
      py::arg("var"), py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("relu"),
      py::arg("device"), py::arg("stream"),
      "out = relu?((x - mean) / sqrt(var + eps) * weight + bias (+ residual)), queued on\n"
      "`stream` of `device`. out and x are addresses of (batch, *image, channels) tensors\n"
      "of `dtype`; residual is as in cuda_conv_bn, with all pixels at one distance; out may be x\n"
      "or residual. The others are (address, DType), weight and bias or None. Raises ValueError\n"
      "for impossible sizes, RuntimeError for what CUDA reports.");

  py::enum_<ConvTile>(module, "ConvTile", py::module_local(),
                      "Output positions x channels that a block computes, and for which GPUs.")
      .value("automatic", ConvTile::kAuto)
      .value("m64n64", ConvTile::k64x64)
      .value("m128n64", ConvTile::k128x64)
      .value("m128n128", ConvTile::k128x128)
      .value("m128n64_sm90", ConvTile::k128x64Sm90)
      .value("m128n128_sm90", ConvTile::k128x128Sm90);

  py::class_<ConvolutionBn>(module, "ConvolutionBn", py::module_local(),
                            "A convolution with zero padding and its batch norm: addresses of x\n"
                            "(batch, *image, channels) and weight (out_channels, *kernel,\n"
                            "channels / groups); mean, var, bn_weight and bias are (address,\n"
                            "DType), the last two or None.")
      .def(py::init(&convolution_bn), py::arg("x"), py::arg("weight"), py::arg("image"),
           py::arg("channels"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
           py::arg("dilation"), py::arg("mean"), py::arg("var"), py::arg("bn_weight"),
           py::arg("bias"), py::arg("eps"));

  module.def(
      "cuda_conv_bn", &conv_bn, py::arg("out"), py::arg("residual"), py::arg("dtype"),
      py::arg("batch"), py::arg("out_image"), py::arg("out_channels"), py::arg("groups"),
      py::arg("conv"), py::arg("projection"), py::arg("relu"), py::arg("tf32"), py::arg("tile"),
      py::arg("device"), py::arg("stream"),
      "out = relu?(bn(conv(x)) + residual), or relu?(bn(conv(x)) + bn(projection(x'))),\n"
      "queued on `stream` of `device`. out is the address of a (batch, *out_image,\n"
      "out_channels) tensor of `dtype`, which x, weight and residual have too. residual is\n"
      "None or (address, channels, strides): out's first channels, strides in elements from\n"
      "an image, a line and a pixel to the next; it may be out, and overlaps it in no other\n"
      "way. projection is a ConvolutionBn, with groups = 1, or None. Raises ValueError for\n"
      "impossible sizes or a tile that does not serve them, RuntimeError for what CUDA\n"
      "reports.");

  module.def("cuda_conv_bn_tiles", &conv_bn_tiles, py::arg("out"), py::arg("residual"),
             py::arg("dtype"), py::arg("batch"), py::arg("out_image"), py::arg("out_channels"),
             py::arg("groups"), py::arg("conv"), py::arg("projection"), py::arg("relu"),
             py::arg("tf32"), py::arg("device"),
             "The tiles by which cuda_conv_bn computes these arguments on `device`, `automatic`\n"
             "not among them. Raises as cuda_conv_bn does.");

  py::class_<Bottleneck>(
      module, "Bottleneck", py::module_local(),
      "relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut): the address of x\n"
      "(batch, *image, channels), the channels within and after the block, the stride of conv2\n"
      "(3 x 3, padding 1) and of the projection; the layers, each the address of a weight\n"
      "(out_channels, *kernel, channels), then mean, var, weight, bias as (address, DType), the\n"
      "last two or None, and eps; projection is such a layer, or None where x is the shortcut.\n"
      "Raises ValueError for impossible sizes.")
      .def(py::init(&bottleneck), py::arg("x"), py::arg("dtype"), py::arg("batch"),
           py::arg("image"), py::arg("channels"), py::arg("inner"), py::arg("out_channels"),
           py::arg("stride"), py::arg("layers"), py::arg("projection"))
      .def("offered", &resnet_fused::bottleneck_can_implement, py::arg("device"),
           "Whether there is a kernel for it on that device.")
      .def("pays", &resnet_fused::bottleneck_is_profitable, py::arg("device"),
           "Whether there is one that is expected to be faster than a kernel for each layer.");

  module.def("cuda_bottleneck", &run_bottleneck, py::arg("out"), py::arg("block"),
             py::arg("device"), py::arg("stream"),
             "Queues `block` on `stream` of `device`; out is the address of (batch, *image /\n"
             "stride rounded up, out_channels) and no part of x. Raises ValueError where it is\n"
             "not offered, RuntimeError for what CUDA reports.");

  module.def(
      "cuda_stem", &stem, py::arg("out"), py::arg("x"), py::arg("weight"), py::arg("dtype"),
      py::arg("batch"), py::arg("image"), py::arg("out_channels"), py::arg("mean"), py::arg("var"),
      py::arg("bn_weight"), py::arg("bias"), py::arg("eps"), py::arg("device"), py::arg("stream"),
      "out = max_pool(relu(bn(conv(x))), 3, stride 2, padding 1), conv being 7 x 7 with\n"
      "stride 2 and padding 3, queued on `stream` of `device`. Addresses of x (batch, *image,\n"
      "3), weight (out_channels, 7, 7, 3) and out (batch, *image / 4 rounded up,\n"
      "out_channels), of `dtype`; the vectors are (address, DType), the last two or None.\n"
      "Raises ValueError for impossible sizes, RuntimeError for what CUDA reports.");

  module.def("cuda_average_pool", &average_pool, py::arg("out"), py::arg("out_dtype"), py::arg("x"),
             py::arg("dtype"), py::arg("batch"), py::arg("positions"), py::arg("channels"),
             py::arg("device"), py::arg("stream"),
             "out[n, c] = the mean of x[n, :, c], queued on `stream` of `device`. Addresses of x\n"
             "(batch, positions, channels) of `dtype`, and of out (batch, channels), of that type\n"
             "or float32. Raises ValueError for impossible sizes, RuntimeError for what CUDA\n"
             "reports.");

  module.def("cuda_linear", &linear, py::arg("out"), py::arg("x"), py::arg("weight"),
             py::arg("bias"), py::arg("dtype"), py::arg("batch"), py::arg("channels"),
             py::arg("classes"), py::arg("device"), py::arg("stream"),
             "out[n, k] = sum of x[n, :] * weight[k, :], + bias[k], queued on `stream` of\n"
             "`device`. Addresses of x (batch, channels) of float32, and of `dtype`: weight\n"
             "(classes, channels), bias (classes), 0 for none, and out (batch, classes). Raises\n"
             "ValueError for impossible sizes, RuntimeError for what CUDA reports.");

  module.def(
      "cuda_check_device",
      [](int device) {
        py::gil_scoped_release unlocked;
        check_cuda("loading the CUDA kernels", resnet_fused::bn_add_relu_loadable(device));
      },
      py::arg("device"), "Raises RuntimeError if the kernels cannot run on that device.");
}
