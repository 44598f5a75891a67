// Bindings of the CUDA kernels: tensors and a stream's handle in, an exception out.
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
#include <type_traits>
#include <vector>

#include "kernels/cuda/bn_add_relu.h"
#include "kernels/cuda/bottleneck.h"
#include "kernels/cuda/bottleneck_sm90.h"
#include "kernels/cuda/conv.h"
#include "kernels/cuda/conv_training_sm90.h"
#include "kernels/cuda/head.h"
#include "kernels/cuda/quantized_conv.h"
#include "kernels/cuda/spin_limit.h"
#include "kernels/cuda/stem.h"
#include "kernels/cuda/wgrad_sm90.h"
#include "kernels/cuda/window_rows.h"
#include "program.h"
#include "register.h"
#include "residual.h"
#include "tensor_arg.h"

namespace py = pybind11;
using resnet_fused::AveragePool;
using resnet_fused::BatchNorm;
using resnet_fused::BnAddRelu;
using resnet_fused::Bottleneck;
using resnet_fused::ConvBn;
using resnet_fused::ConvolutionBn;
using resnet_fused::ConvStats;
using resnet_fused::ConvTile;
using resnet_fused::Dgrad;
using resnet_fused::DType;
using resnet_fused::Layer;
using resnet_fused::Linear;
using resnet_fused::QuantizedConv;
using resnet_fused::QuantizedTile;
using resnet_fused::Stem;
using resnet_fused::TrainingTile;
using resnet_fused::Vector;
using resnet_fused::Wgrad;
using resnet_fused::WgradTile;
using resnet_fused::WindowRows;

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

using OptionalTensor = std::optional<TensorArg>;
// Of a folded end's gradient: operand, matrix, offset.
using OptionalTerm = std::optional<std::tuple<TensorArg, TensorArg, TensorArg>>;
using Pair = std::array<std::int64_t, 2>;
// Mean, variance (None: of 1), weight, bias, eps.
using BatchNormArg = std::tuple<TensorArg, OptionalTensor, OptionalTensor, OptionalTensor, double>;
// Stride, padding, dilation.
using WindowArg = std::tuple<Pair, Pair, Pair>;
// A convolution with its batch norm: x, weight, window, batch norm.
using LayerArg = std::tuple<TensorArg, TensorArg, WindowArg, BatchNormArg>;
// A quantised convolution: x, weight, window.
using QuantizedLayerArg = std::tuple<TensorArg, TensorArg, WindowArg>;
// Of a bottleneck: weight, batch norm.
using InnerLayerArg = std::tuple<TensorArg, BatchNormArg>;

// Of kernels that come in one tile.
struct NoTile {};

// What every launch has, and the arguments of its kernel.
template <typename Op, typename Tile = NoTile>
struct OnDevice {
  Op op;
  Tile tile;
  int device;
  const char* name;  // of the kernel, for errors

  template <auto kKernel>
  void call(std::uintptr_t stream) {
    const auto queue = reinterpret_cast<CUstream_st*>(stream);
    if constexpr (std::is_same_v<Tile, NoTile>) {
      check_cuda(name, kKernel(op, device, queue));
    } else {
      check_cuda(name, kKernel(op, tile, device, queue));
    }
  }
};
using ConvLaunch = Launch<OnDevice<ConvBn, ConvTile>>;
using QuantizedConvLaunch = Launch<OnDevice<QuantizedConv, QuantizedTile>>;
using ConvStatsLaunch = Launch<OnDevice<ConvStats, TrainingTile>>;
using DgradLaunch = Launch<OnDevice<Dgrad, TrainingTile>>;
using WgradLaunch = Launch<OnDevice<Wgrad, WgradTile>>;

// A whole block, by one of the kernels for it.
struct BlockTo {
  Bottleneck block;
  void* out;
};

DType dtype_of(const char* name, const TensorArg& tensor) {
  switch (tensor.type) {
    case ScalarType::kFloat32:
      return DType::kFloat32;
    case ScalarType::kFloat16:
      return DType::kFloat16;
    case ScalarType::kBFloat16:
      return DType::kBFloat16;
    default:
      refuse(std::string(name) + " must be float32, float16 or bfloat16, found " +
             name_of(tensor.type));
  }
}

// The kernels compute positions and channels in 32 bits, with room for a sum of two.
constexpr std::int64_t kMaxSize = std::int64_t{1} << 29;

int size(const char* name, std::int64_t value, std::int64_t least) {
  if (value < least || value >= kMaxSize) {
    refuse(std::string(name) + " must be at least " + std::to_string(least) +
           " and below 2^29, found " + std::to_string(value));
  }
  return static_cast<int>(value);
}

template <typename Arguments>
void set_vector(Launch<Arguments>& launch, Vector& slot, const char* name,
                const OptionalTensor& tensor, std::int64_t channels) {
  if (!tensor) return;
  check_sizes(name, *tensor, {channels});
  check_contiguous(name, *tensor, 1);
  slot.dtype = dtype_of(name, *tensor);
  launch.reads(slot.data, name, *tensor);
}

template <typename Arguments>
void set_batch_norm(Launch<Arguments>& launch, BatchNorm& slot, const BatchNormArg& bn,
                    std::int64_t channels) {
  const auto& [mean, var, weight, bias, eps] = bn;
  set_vector(launch, slot.mean, "mean", mean, channels);
  set_vector(launch, slot.var, "var", var, channels);
  set_vector(launch, slot.weight, "weight", weight, channels);
  set_vector(launch, slot.bias, "bias", bias, channels);
  slot.eps = static_cast<float>(eps);
}

void set_bn_add_relu(Launch<OnDevice<BnAddRelu>>& launch, const TensorArg& out, const TensorArg& x,
                     const BatchNormArg& bn, const OptionalTensor& residual, bool relu) {
  check_nhwc("x", x);
  check_type("x", x, out.type);
  check_like("out", out, x);
  const auto& [batch, channels, height, width] = x.sizes;
  BnAddRelu& op = launch.arguments.op;
  op.dtype = dtype_of("x", x);
  op.rows = batch * height * width;
  op.channels = channels;
  op.relu = relu;
  launch.reads(op.x, "x", x);
  set_batch_norm(launch, op.bn, bn, channels);
  if (out.numel() > 0) set_residual(launch, op.residual, residual, out);
  if (!op.residual.in_line()) refuse("residual must have all pixels at one distance here");
  launch.writes(op.out, "out", out);
}

// What the result's batch, channels and size are.
void set_result(ConvBn& op, const TensorArg& out, std::int64_t groups) {
  check_nhwc("out", out);
  op.batch = size("batch", out.sizes[0], 0);
  op.out_channels = size("out_channels", out.sizes[1], 0);
  op.out_height = size("out_height", out.sizes[2], 0);
  op.out_width = size("out_width", out.sizes[3], 0);
  size("out_height * out_width", out.sizes[2] * out.sizes[3], 0);
  op.groups = size("groups", groups, 1);
}

// What one convolution, the batch norm apart, must have in common with the result.
void set_sizes(const ConvBn& result, ConvolutionBn& conv, const TensorArg& x,
               const TensorArg& weight, const WindowArg& window, const TensorArg& out) {
  const auto& [stride, padding, dilation] = window;
  check_nhwc("x", x);
  check_nhwc("weight", weight);
  conv.height = size("height", x.sizes[2], 0);
  conv.width = size("width", x.sizes[3], 0);
  conv.channels = size("channels", x.sizes[1], 1);
  conv.kernel_h = size("kernel height", weight.sizes[2], 1);
  conv.kernel_w = size("kernel width", weight.sizes[3], 1);
  conv.stride_h = size("vertical stride", stride[0], 1);
  conv.stride_w = size("horizontal stride", stride[1], 1);
  conv.padding_h = size("vertical padding", padding[0], 0);
  conv.padding_w = size("horizontal padding", padding[1], 0);
  conv.dilation_h = size("vertical dilation", dilation[0], 1);
  conv.dilation_w = size("horizontal dilation", dilation[1], 1);
  if (conv.channels % result.groups != 0 || result.out_channels % result.groups != 0) {
    refuse("groups must divide channels and out_channels");
  }
  check_sizes("weight", weight,
              {out.sizes[1], conv.channels / result.groups, weight.sizes[2], weight.sizes[3]});
  const auto positions = [](std::int64_t in, std::int64_t kernel, std::int64_t stride,
                            std::int64_t padding, std::int64_t dilation) {
    const std::int64_t reach = dilation * (kernel - 1) + 1;
    if (in + 2 * padding < reach) return std::int64_t{0};
    return (in + 2 * padding - reach) / stride + 1;
  };
  check_sizes(
      "out", out,
      {x.sizes[0], out.sizes[1],
       positions(conv.height, conv.kernel_h, conv.stride_h, conv.padding_h, conv.dilation_h),
       positions(conv.width, conv.kernel_w, conv.stride_w, conv.padding_w, conv.dilation_w)});
}

template <typename Arguments>
void set_window(Launch<Arguments>& launch, const ConvBn& result, ConvolutionBn& conv,
                const TensorArg& x, const TensorArg& weight, const WindowArg& window,
                const TensorArg& out) {
  set_sizes(result, conv, x, weight, window, out);
  launch.reads(conv.x, "x", x);
  launch.reads(conv.weight, "weight", weight);
}

void set_convolution(ConvLaunch& launch, ConvolutionBn& conv, const LayerArg& layer,
                     const TensorArg& out) {
  const auto& [x, weight, window, bn] = layer;
  check_type("x", x, out.type);
  check_type("weight", weight, out.type);
  set_window(launch, launch.arguments.op, conv, x, weight, window, out);
  set_batch_norm(launch, conv.bn, bn, out.sizes[1]);
}

void set_conv_bn(ConvLaunch& launch, const TensorArg& out, const LayerArg& layer,
                 const std::optional<LayerArg>& projection, const OptionalTensor& residual,
                 std::int64_t groups, bool relu, bool tf32, const OptionalTensor& signs) {
  ConvBn& op = launch.arguments.op;
  set_result(op, out, groups);
  op.dtype = dtype_of("out", out);
  op.relu = relu;
  op.tf32 = tf32;
  set_convolution(launch, op.conv, layer, out);
  if (projection) {
    if (groups != 1 || residual) {
      refuse("a projection needs groups = 1 and excludes a residual");
    }
    set_convolution(launch, op.projection, *projection, out);
  }
  if (out.numel() > 0) set_residual(launch, op.residual, residual, out);
  launch.writes(op.out, "out", out);
  if (signs) {
    if (!relu) refuse("signs need a ReLU");
    check_nhwc("signs", *signs);
    check_type("signs", *signs, ScalarType::kUInt8);
    check_sizes("signs", *signs,
                {out.sizes[0], (out.sizes[1] + 63) / 64 * 8, out.sizes[2], out.sizes[3]});
    launch.writes(op.signs, "signs", *signs);
  }
}

// Throws ValueError where a tile is for other arguments.
template <typename Arguments>
void check_tile(const Arguments&) {}

void check_tile(const OnDevice<ConvBn, ConvTile>& launch) {
  if (!resnet_fused::conv_bn_can_implement(launch.op, launch.tile)) {
    refuse("this tile does not compute such a convolution; use automatic");
  }
}

// Of what goes with x: e4m3 with e4m3, and uint8 or int8 with either.
DType byte_dtype_of(const char* name, const TensorArg& tensor, const TensorArg& x) {
  if (x.type == ScalarType::kE4m3) {
    check_type(name, tensor, x.type);
    return DType::kE4m3;
  }
  if (tensor.type == ScalarType::kUInt8) return DType::kUInt8;
  if (tensor.type == ScalarType::kInt8) return DType::kInt8;
  refuse(std::string(name) + " must be uint8 or int8, found " + name_of(tensor.type));
}

void set_quantized_conv(QuantizedConvLaunch& launch, const TensorArg& out,
                        const QuantizedLayerArg& layer, const TensorArg& bias,
                        const TensorArg& multiplier, const OptionalTensor& shortcut_scale,
                        const OptionalTensor& residual,
                        const std::optional<QuantizedLayerArg>& projection, bool relu) {
  check_shortcut(shortcut_scale.has_value(), residual.has_value(), projection.has_value());
  QuantizedConv& op = launch.arguments.op;
  set_result(op.conv, out, 1);
  const TensorArg& first = std::get<0>(layer);
  op.conv.dtype = byte_dtype_of("x", first, first);
  const bool floats = op.conv.dtype == DType::kE4m3;
  check_type("out", out,
             floats ? ScalarType::kE4m3
             : relu ? ScalarType::kUInt8
                    : ScalarType::kInt8);
  op.conv.relu = relu;
  const auto set = [&](ConvolutionBn& conv, const QuantizedLayerArg& of) {
    const auto& [x, weight, window] = of;
    check_type("x", x, first.type);
    check_type("weight", weight, floats ? ScalarType::kE4m3 : ScalarType::kInt8);
    set_window(launch, op.conv, conv, x, weight, window, out);
  };
  set(op.conv.conv, layer);
  if (projection) set(op.conv.projection, *projection);
  const std::int64_t channels = op.conv.out_channels;
  set_array(launch, op.bias, "bias", bias, floats ? ScalarType::kFloat32 : ScalarType::kInt32,
            {channels});
  set_array(launch, op.multiplier, "multiplier", multiplier, ScalarType::kFloat32, {channels});
  set_array(launch, op.shortcut_scale, "shortcut_scale", shortcut_scale, ScalarType::kFloat32,
            {channels});
  if (residual && out.numel() > 0) {
    op.residual_dtype = byte_dtype_of("residual", *residual, first);
    set_residual(launch, op.conv.residual, residual, out, residual->type);
  }
  launch.writes(op.conv.out, "out", out);
}

void check_tile(const OnDevice<QuantizedConv, QuantizedTile>& launch) {
  if (!resnet_fused::quantized_conv_can_implement(launch.op, launch.tile)) {
    refuse("this tile does not compute such a quantised convolution; use one of those listed");
  }
}

// Of a training convolution: sizes and type, of x and its result.
void set_training(ConvBn& op, const TensorArg& x, const TensorArg& weight, const WindowArg& window,
                  const TensorArg& out) {
  set_result(op, out, 1);
  op.dtype = dtype_of("out", out);
  check_type("x", x, out.type);
  check_type("weight", weight, out.type);
  set_sizes(op, op.conv, x, weight, window, out);
}

// The statistics or sums of a result: `rows` of (parts, rows, channels), as many parts as the tile
// makes.
template <typename Arguments>
void set_parts(Launch<Arguments>& launch, float*& slot, const char* name,
               const OptionalTensor& parts, std::int64_t rows, const TensorArg& result) {
  if (!parts) return;
  const auto& [op, tile, device, kernel] = launch.arguments;
  set_array(launch, slot, name, parts, ScalarType::kFloat32,
            {resnet_fused::training_parts(op, tile), rows, result.sizes[1]});
}

void set_conv_stats(ConvStatsLaunch& launch, const TensorArg& out, const TensorArg& x,
                    const TensorArg& weight, const WindowArg& window,
                    const OptionalTensor& moments) {
  ConvStats& stats = launch.arguments.op;
  set_training(stats.op, x, weight, window, out);
  launch.reads(stats.op.conv.x, "x", x);
  launch.reads(stats.op.conv.weight, "weight", weight);
  set_parts(launch, stats.moments, "moments", moments, 3, out);
  launch.writes(stats.op.out, "out", out);
}

void set_dgrad(DgradLaunch& launch, const TensorArg& out, const TensorArg& grad,
               const TensorArg& weight, const WindowArg& window, const OptionalTensor& below,
               const OptionalTensor& scale_shift, const OptionalTensor& sums,
               const OptionalTensor& add, const OptionalTerm& term) {
  Dgrad& op = launch.arguments.op;
  if (below.has_value() != scale_shift.has_value() || (add && (below || term))) {
    refuse("below and its scale_shift go together, and neither they nor a term with add");
  }
  set_training(op.op, out, weight, window, grad);
  const auto set = [&](const void*& slot, const char* name, const OptionalTensor& tensor) {
    if (!tensor) return;
    check_like(name, *tensor, out);
    launch.reads(slot, name, *tensor);
  };
  launch.reads(op.grad, "grad", grad);
  launch.reads(op.op.conv.weight, "weight", weight);
  set(op.below, "below", below);
  set(op.add, "add", add);
  if (term) {
    const auto& [operand, matrix, offset] = *term;
    const std::int64_t channels = out.sizes[1];
    check_sizes("operand", operand, {out.sizes[0], channels, out.sizes[2], out.sizes[3]});
    if (out.numel() > 0) set_residual(launch, op.operand, operand, out);
    set_array(launch, op.operand_matrix, "matrix", matrix, out.type, {channels, channels});
    set_array(launch, op.operand_offset, "offset", offset, ScalarType::kFloat32, {channels});
  }
  set_array(launch, op.below_scale_shift, "scale_shift", scale_shift, ScalarType::kFloat32,
            {6, out.sizes[1]});
  set_parts(launch, op.sums, "sums", sums, 2, out);
  launch.writes(op.out, "out", out);
}

void set_wgrad(WgradLaunch& launch, const TensorArg& out, const TensorArg& grad, const TensorArg& x,
               const WindowArg& window) {
  Wgrad& op = launch.arguments.op;
  op.out_dtype = dtype_of("out", out);
  if (op.out_dtype != DType::kFloat32) check_type("out", out, x.type);
  set_result(op.op, grad, 1);
  op.op.dtype = dtype_of("grad", grad);
  check_type("x", x, grad.type);
  set_sizes(op.op, op.op.conv, x, out, window, grad);
  launch.reads(op.grad, "grad", grad);
  launch.reads(op.op.conv.x, "x", x);
  launch.writes(op.out, "out", out);
}

void set_wgrad_in_parts(WgradLaunch& launch, const TensorArg& out, const TensorArg& grad,
                        const TensorArg& x, const WindowArg& window, const TensorArg& parts) {
  set_wgrad(launch, out, grad, x, window);
  Wgrad& op = launch.arguments.op;
  op.count = size("parts", parts.sizes[0], 1);
  set_array(launch, op.parts, "parts", parts, ScalarType::kFloat32, {op.count, out.numel()});
}

int count_parts(const OnDevice<Wgrad, WgradTile>& launch) {
  int count = 0;
  check_cuda("wgrad", resnet_fused::wgrad_parts(launch.op, launch.tile, launch.device, &count));
  return count;
}

void check_tile(const OnDevice<Wgrad, WgradTile>& launch) {
  if (const int count = count_parts(launch); count != launch.op.count) {
    refuse("parts must be " + std::to_string(count) + ", as cuda_wgrad_parts says");
  }
}

void set_window_rows(Launch<OnDevice<WindowRows>>& launch, const TensorArg& out, const TensorArg& x,
                     std::int64_t kernel, std::int64_t stride, std::int64_t padding) {
  check_nhwc("x", x);
  check_nhwc("out", out);
  check_type("x", x, out.type);
  const auto& [batch, channels, height, width] = x.sizes;
  check_sizes("out", out, {batch, out.sizes[1], height, out.sizes[3]});
  if (dtype_of("x", x) == DType::kFloat32) refuse("x must be float16 or bfloat16");
  if (out.sizes[1] % 8 != 0 || out.sizes[1] < kernel * channels) {
    refuse("out must have a multiple of 8 channels, and room for the window's line");
  }
  WindowRows& op = launch.arguments.op;
  op.lines = batch * height;
  op.width = size("width", width, 0);
  op.channels = size("channels", channels, 1);
  size("width * channels", width * channels, 0);
  op.out_width = size("out_width", out.sizes[3], 0);
  op.row = size("channels of out", out.sizes[1], 8);
  op.kernel = size("kernel", kernel, 1);
  op.stride = size("stride", stride, 1);
  op.padding = size("padding", padding, 0);
  size("reach", (out.sizes[3] * stride + kernel) * channels, 0);
  launch.reads(op.x, "x", x);
  launch.writes(op.out, "out", out);
}

void set_layer(Launch<OnDevice<BlockTo>>& launch, Layer& slot, const InnerLayerArg& layer,
               std::initializer_list<std::int64_t> sizes, ScalarType type) {
  const auto& [weight, bn] = layer;
  check_nhwc("weight", weight);
  check_type("weight", weight, type);
  check_sizes("weight", weight, sizes);
  launch.reads(slot.weight, "weight", weight);
  set_batch_norm(launch, slot.bn, bn, weight.sizes[0]);
}

// `layers` are three and, where there is one, the projection.
void set_bottleneck(Launch<OnDevice<BlockTo>>& launch, const TensorArg& x,
                    const std::vector<InnerLayerArg>& layers, std::int64_t stride) {
  check_nhwc("x", x);
  if (layers.size() < 3 || layers.size() > 4) refuse("three layers, or four, are needed");
  for (const auto& [weight, bn] : layers) check_rank("weight", weight, 4);
  Bottleneck& op = launch.arguments.op.block;
  const std::int64_t inner = std::get<0>(layers[0]).sizes[0];
  const std::int64_t out_channels = std::get<0>(layers[2]).sizes[0];
  op.dtype = dtype_of("x", x);
  op.batch = size("batch", x.sizes[0], 0);
  op.channels = size("channels", x.sizes[1], 1);
  op.height = size("height", x.sizes[2], 0);
  op.width = size("width", x.sizes[3], 0);
  op.inner = size("inner", inner, 1);
  op.out_channels = size("out_channels", out_channels, 1);
  op.stride = size("stride", stride, 1);
  size("3 * 3 * inner * inner", 9 * inner * inner, 0);
  launch.reads(op.x, "x", x);
  set_layer(launch, op.conv1, layers[0], {inner, x.sizes[1], 1, 1}, x.type);
  set_layer(launch, op.conv2, layers[1], {inner, inner, 3, 3}, x.type);
  set_layer(launch, op.conv3, layers[2], {out_channels, inner, 1, 1}, x.type);
  if (layers.size() == 4) {
    set_layer(launch, op.projection, layers[3], {out_channels, x.sizes[1], 1, 1}, x.type);
  }
}

// One of the kernels for whole bottlenecks.
struct OnMmaSync {
  static constexpr auto kRun = &resnet_fused::bottleneck;
  static constexpr auto kCanImplement = &resnet_fused::bottleneck_can_implement;
  static constexpr auto kIsProfitable = &resnet_fused::bottleneck_is_profitable;
};
struct OnWgmma {
  static constexpr auto kRun = &resnet_fused::bottleneck_sm90;
  static constexpr auto kCanImplement = &resnet_fused::bottleneck_sm90_can_implement;
  static constexpr auto kIsProfitable = kCanImplement;
};

template <typename Kernel>
cudaError_t run_block(const BlockTo& to, int device, CUstream_st* stream) {
  return Kernel::kRun(to.out, to.block, device, stream);
}

template <typename Kernel>
void set_block(Launch<OnDevice<BlockTo>>& launch, const TensorArg& out, const TensorArg& x,
               const std::vector<InnerLayerArg>& layers, std::int64_t stride) {
  set_bottleneck(launch, x, layers, stride);
  const Bottleneck& op = launch.arguments.op.block;
  check_nhwc("out", out);
  check_type("out", out, x.type);
  check_sizes("out", out,
              {x.sizes[0], op.out_channels, resnet_fused::strided(op.height, op.stride),
               resnet_fused::strided(op.width, op.stride)});
  check_apart("out", out, "x", x);
  launch.writes(launch.arguments.op.out, "out", out);
  if (!Kernel::kCanImplement(op, launch.arguments.device)) {
    refuse("there is no kernel for such a bottleneck on this device");
  }
}

// Whether `ask` says so of the bottleneck.
template <bool (*ask)(const Bottleneck&, int)>
bool ask_bottleneck(const TensorArg& x, const std::vector<InnerLayerArg>& layers,
                    std::int64_t stride, int device) {
  Launch<OnDevice<BlockTo>> launch;
  set_bottleneck(launch, x, layers, stride);
  return ask(launch.arguments.op.block, device);
}

// Scale and shift of an image's channels.
using PixelScale = std::array<std::array<float, 3>, 2>;

void set_stem(Launch<OnDevice<Stem>>& launch, const TensorArg& out, const TensorArg& x,
              const TensorArg& weight, const BatchNormArg& bn,
              const std::optional<PixelScale>& bytes) {
  check_nhwc("out", out);
  check_rank("x", x, 4);
  const bool planar = x.dense({0, 1, 2, 3});
  if (!planar) check_nhwc("x", x);
  check_nhwc("weight", weight);
  check_type("x", x, bytes ? ScalarType::kUInt8 : out.type);
  check_type("weight", weight, out.type);
  const std::int64_t out_channels = out.sizes[1];
  Stem& op = launch.arguments.op;
  op.dtype = dtype_of("out", out);
  op.x_dtype = bytes ? DType::kUInt8 : op.dtype;
  if (bytes) {
    std::copy((*bytes)[0].begin(), (*bytes)[0].end(), op.scale);
    std::copy((*bytes)[1].begin(), (*bytes)[1].end(), op.shift);
  }
  op.batch = size("batch", x.sizes[0], 0);
  op.planar = planar;
  op.height = size("height", x.sizes[2], 0);
  op.width = size("width", x.sizes[3], 0);
  op.out_channels = size("out_channels", out_channels, 0);
  size("7 * 7 * 3 * out_channels", 7 * 7 * 3 * out_channels, 0);
  if (out_channels % 8 != 0 || op.dtype == DType::kFloat32) {
    refuse("the stem needs float16 or bfloat16, and out_channels that are a multiple of 8");
  }
  const auto pooled = [](int size) { return resnet_fused::halved(resnet_fused::halved(size)); };
  check_sizes("x", x, {op.batch, 3, op.height, op.width});
  check_sizes("weight", weight, {out_channels, 3, 7, 7});
  check_sizes("out", out, {op.batch, out_channels, pooled(op.height), pooled(op.width)});
  check_apart("out", out, "x", x);
  launch.reads(op.x, "x", x);
  launch.reads(op.weight, "weight", weight);
  set_batch_norm(launch, op.bn, bn, out_channels);
  launch.writes(op.out, "out", out);
}

void set_average_pool(Launch<OnDevice<AveragePool>>& launch, const TensorArg& out,
                      const TensorArg& x) {
  check_nhwc("x", x);
  check_contiguous("out", out, 2);
  check_sizes("out", out, {x.sizes[0], x.sizes[1]});
  AveragePool& op = launch.arguments.op;
  op.dtype = dtype_of("x", x);
  op.out_dtype = dtype_of("out", out);
  if (out.type != x.type) check_type("out", out, ScalarType::kFloat32);
  op.batch = size("batch", x.sizes[0], 0);
  op.positions = size("positions", x.sizes[2] * x.sizes[3], 1);
  op.channels = size("channels", x.sizes[1], 0);
  launch.reads(op.x, "x", x);
  launch.writes(op.out, "out", out);
}

void set_linear(Launch<OnDevice<Linear>>& launch, const TensorArg& out, const TensorArg& x,
                const TensorArg& weight, const OptionalTensor& bias) {
  check_contiguous("out", out, 2);
  check_contiguous("x", x, 2);
  check_contiguous("weight", weight, 2);
  check_type("x", x, ScalarType::kFloat32);
  check_type("weight", weight, out.type);
  check_sizes("out", out, {x.sizes[0], weight.sizes[0]});
  check_sizes("weight", weight, {weight.sizes[0], x.sizes[1]});
  Linear& op = launch.arguments.op;
  op.dtype = dtype_of("out", out);
  op.batch = size("batch", x.sizes[0], 0);
  op.channels = size("channels", x.sizes[1], 1);
  op.classes = size("classes", weight.sizes[0], 0);
  launch.reads(op.x, "x", x);
  launch.reads(op.weight, "weight", weight);
  set_array(launch, op.bias, "bias", bias, out.type, {weight.sizes[0]});
  launch.writes(op.out, "out", out);
}

template <typename Op, typename Tile>
void prepare(Launch<OnDevice<Op, Tile>>& launch, const char* name, int device) {
  launch.arguments.name = name;
  launch.arguments.device = device;
}

// Defines cuda_NAME(arguments, device, stream); `set` takes the arguments, which Python calls
// `names`, and throws ValueError where they do not fit.
template <auto kKernel, typename Op, typename... Arguments, typename... Names>
void def(py::module_& module, const char* name, void (*set)(Launch<OnDevice<Op>>&, Arguments...),
         const char* meaning, const Names&... names) {
  const auto function = [=](Arguments... arguments, int device, std::uintptr_t stream) {
    Launch<OnDevice<Op>> launch;
    prepare(launch, name, device);
    set(launch, arguments...);
    launch.template run<kKernel>(stream);
  };
  module.def(("cuda_" + std::string(name)).c_str(), function, py::arg(names)..., py::arg("device"),
             py::arg("stream"), meaning);
}

// The same with a tile: cuda_NAME(arguments, tile, device, stream).
template <auto kKernel, typename Op, typename Tile, typename... Arguments, typename... Names>
void def_tiled(py::module_& module, const char* name,
               void (*set)(Launch<OnDevice<Op, Tile>>&, Arguments...), const char* meaning,
               const Names&... names) {
  const auto function = [=](Arguments... arguments, Tile tile, int device, std::uintptr_t stream) {
    Launch<OnDevice<Op, Tile>> launch;
    prepare(launch, name, device);
    launch.arguments.tile = tile;
    set(launch, arguments...);
    check_tile(launch.arguments);
    launch.template run<kKernel>(stream);
  };
  module.def(("cuda_" + std::string(name)).c_str(), function, py::arg(names)..., py::arg("tile"),
             py::arg("device"), py::arg("stream"), meaning);
}

// Defines cuda_NAME_parts(arguments, tile): how many parts of statistics or sums that tile makes.
template <typename Op, typename... Arguments>
void def_parts(py::module_& module, const char* name,
               void (*set)(Launch<OnDevice<Op, TrainingTile>>&, Arguments...)) {
  const auto function = [=](Arguments... arguments, TrainingTile tile) {
    Launch<OnDevice<Op, TrainingTile>> launch;
    launch.arguments.tile = tile;
    set(launch, arguments...);
    return resnet_fused::training_parts(launch.arguments.op, tile);
  };
  module.def(("cuda_" + std::string(name) + "_parts").c_str(), function,
             "Into how many parts that tile's statistics or sums fall; those that it is given are\n"
             "None.");
}

// Defines cuda_NAME_tiles(arguments, device), which `list` answers.
template <typename Op, typename Tile, typename... Arguments>
void def_tiles(py::module_& module, const char* name,
               void (*set)(Launch<OnDevice<Op, Tile>>&, Arguments...),
               cudaError_t (*list)(const Op&, int, std::vector<Tile>*)) {
  const auto function = [=](Arguments... arguments, int device) {
    Launch<OnDevice<Op, Tile>> launch;
    prepare(launch, name, device);
    set(launch, arguments...);
    const py::gil_scoped_release unlocked;
    std::vector<Tile> tiles;
    check_cuda(name, list(launch.arguments.op, device, &tiles));
    return tiles;
  };
  module.def(("cuda_" + std::string(name) + "_tiles").c_str(), function,
             "The tiles by which these arguments are computed on `device`, the expected fastest\n"
             "first; none where there is no kernel for them.");
}

}  // namespace

void register_cuda_kernels(py::module_& module) {
  // Local to the module, as the simulator's module has the same one in the same process.
  py::enum_<ConvTile>(module, "ConvTile", py::module_local(),
                      "Output positions x channels that a block computes, and for which GPUs.")
      .value("automatic", ConvTile::kAuto)
      .value("m64n64", ConvTile::k64x64)
      .value("m128n64", ConvTile::k128x64)
      .value("m128n128", ConvTile::k128x128)
      .value("m128n64_sm90", ConvTile::k128x64Sm90)
      .value("m128n128_sm90", ConvTile::k128x128Sm90)
      .value("m128n128_sm90_pingpong", ConvTile::k128x128Sm90PingPong)
      .value("m128n256_sm90_cluster", ConvTile::k128x256Sm90Cluster)
      .value("m256n128_sm90_cluster", ConvTile::k256x128Sm90Cluster)
      .value("m64n64_sm90_split2", ConvTile::k64x64Sm90Split2)
      .value("m64n64_sm90_split4", ConvTile::k64x64Sm90Split4)
      .value("m64n64_sm90_split8", ConvTile::k64x64Sm90Split8)
      .value("m200n128_sm90_lines", ConvTile::k200x128Sm90Lines)
      .value("m224n128_sm90_lines", ConvTile::k224x128Sm90Lines);

  // Of every kernel: tensors are as tensor_arg.h says, sizes those of NCHW; images and weights are
  // dense and channels_last, vectors contiguous, float32, float16 or bfloat16. A kernel is queued
  // on `stream` of `device`, and its tensors have to stay until it has run. ValueError is raised
  // for what does not fit, RuntimeError for what CUDA reports.
  def<&resnet_fused::bn_add_relu>(
      module, "bn_add_relu", &set_bn_add_relu,
      "out = relu?((x - mean) / sqrt(var + eps) * weight + bias (+ residual)). bn is (mean, var,\n"
      "weight, bias, eps), weight and bias None where absent; residual is as in cuda_conv_bn,\n"
      "with all pixels at one distance; out may be x or residual.",
      "out", "x", "bn", "residual", "relu");

  def_tiled<&resnet_fused::conv_bn>(
      module, "conv_bn", &set_conv_bn,
      "out = relu?(bn(conv(x)) + residual), or relu?(bn(conv(x)) + bn(projection(x'))). layer and\n"
      "projection are (x, weight, (stride, padding, dilation), bn), all of out's type but bn. A\n"
      "projection or a residual may be None; a projection needs groups = 1. residual has out's\n"
      "size but maybe fewer channels, which are adjacent; it may be out, and overlaps it in no\n"
      "other way. tf32: whether products of float32 may round their operands. signs, or None:\n"
      "uint8, 8 bytes for each 64 channels of a position, whose b-th has in bit j whether channel\n"
      "8 j + b of out is positive. A tile that cannot compute this raises ValueError.",
      "out", "layer", "projection", "residual", "groups", "relu", "tf32", "signs");
  // `automatic` is not among them; where it stands for one for sm_90a, that one is the first.
  def_tiles(module, "conv_bn", &set_conv_bn, &resnet_fused::conv_bn_tiles);

  py::enum_<QuantizedTile>(module, "QuantizedTile", py::module_local(),
                           "Output positions x channels that a block of sm_90a computes.")
      .value("m128n64", QuantizedTile::k128x64)
      .value("m128n128", QuantizedTile::k128x128)
      .value("m128n128_cluster", QuantizedTile::k128x128Cluster)
      .value("m128n256_cluster", QuantizedTile::k128x256Cluster)
      .value("m64n64_sm80", QuantizedTile::k64x64Sm80)
      .value("m128n128_sm80", QuantizedTile::k128x128Sm80);

  def_tiled<&resnet_fused::quantized_conv>(
      module, "quantized_conv", &set_quantized_conv,
      "out = requantised(conv(x) + bias (+ residual, or projection(x'))), as\n"
      "resnet_fused/reference/quantized.py says; with relu clamped at zero, and out is uint8, "
      "else\n"
      "int8. layer and projection are (x, weight, (stride, padding, dilation)): x uint8 or int8,\n"
      "the same of both, weights int8, packed: of each 16 output channels number 4 t + 2 h + e\n"
      "(t < 4) at place 8 h + 2 t + e. bias is int32, multiplier and shortcut_scale float32.\n"
      "residual is as in cuda_conv_bn, uint8 or int8. Where x is float8_e4m3fn, so are weights,\n"
      "residual and out, and bias is float32; only tiles of sm_90a compute that.",
      "out", "layer", "bias", "multiplier", "shortcut_scale", "residual", "projection", "relu");
  def_tiles(module, "quantized_conv", &set_quantized_conv, &resnet_fused::quantized_conv_tiles);

  py::enum_<TrainingTile>(module, "TrainingTile", py::module_local(),
                          "Positions x channels of a block of a training convolution's kernel.")
      .value("m128n64", TrainingTile::k128x64)
      .value("m128n128", TrainingTile::k128x128)
      .value("m256n128_cluster", TrainingTile::k256x128Cluster)
      .value("m216n64_lines", TrainingTile::k216x64Lines)
      .value("m248n64_lines", TrainingTile::k248x64Lines);

  def_tiled<&resnet_fused::conv_stats>(module, "conv_stats", &set_conv_stats,
                                       "out = conv(x), in float16 or bfloat16, and where moments "
                                       "is not None, (cuda_conv_stats_parts,\n"
                                       "3, channels), of every 128 positions of out, or of a tile "
                                       "of whole lines, mean, sum of\n"
                                       "squared deviations and count. window is (stride, padding, "
                                       "dilation).",
                                       "out", "x", "weight", "window", "moments");
  def_tiles(module, "conv_stats", &set_conv_stats, &resnet_fused::training_tiles);
  def_parts(module, "conv_stats", &set_conv_stats);

  def_tiled<&resnet_fused::dgrad>(
      module, "dgrad", &set_dgrad,
      "out = the gradient of x, where grad is that of conv(x), + add. With below, x being\n"
      "relu((below - mean) * scale + shift): zero where that is, and sums, (cuda_dgrad_parts, 2,\n"
      "channels), of out and of out * (below - mean) of every 128 positions, or of a tile of\n"
      "whole lines. scale_shift is (6, channels), mean, scale and shift first. term, of a 1 x 1\n"
      "convolution without add, is (x, matrix, offset): matrix * x + offset is added before the\n"
      "mask; matrix (channels, channels) is symmetric.",
      "out", "grad", "weight", "window", "below", "scale_shift", "sums", "add", "term");
  def_tiles(module, "dgrad", &set_dgrad, &resnet_fused::training_tiles);
  def_parts(module, "dgrad", &set_dgrad);

  py::enum_<WgradTile>(module, "WgradTile", py::module_local(),
                       "Columns of the weight x output channels of a block of cuda_wgrad.")
      .value("m256n64", WgradTile::k256x64)
      .value("m256n128", WgradTile::k256x128);

  def_tiled<&resnet_fused::wgrad>(
      module, "wgrad", &set_wgrad_in_parts,
      "out = the gradient of conv(x)'s weight, of float32 or x's type, grad being that of\n"
      "conv(x). parts is workspace, (cuda_wgrad_parts, elements of out), float32.",
      "out", "grad", "x", "window", "parts");
  def_tiles(module, "wgrad", &set_wgrad, &resnet_fused::wgrad_tiles);
  module.def(
      "cuda_wgrad_parts",
      [](const TensorArg& out, const TensorArg& grad, const TensorArg& x, const WindowArg& window,
         WgradTile tile, int device) {
        WgradLaunch launch;
        launch.arguments.tile = tile;
        launch.arguments.device = device;
        set_wgrad(launch, out, grad, x, window);
        return count_parts(launch.arguments);
      },
      "Into how many ranges of positions that tile's sums fall.");

  def<&resnet_fused::window_rows>(
      module, "window_rows", &set_window_rows,
      "out[n, s * channels + c, h, q] = x[n, c, h, q * stride - padding + s] for s < kernel,\n"
      "zeros beside x and behind that, in float16 or bfloat16.",
      "out", "x", "kernel", "stride", "padding");

  const auto def_bottleneck = [&](const char* name, auto kernel, const char* meaning) {
    using Kernel = decltype(kernel);
    def<&run_block<Kernel>>(module, name, &set_block<Kernel>, meaning, "out", "x", "layers",
                            "stride");
    const auto ask = [&](const char* question, auto function, const char* asked) {
      module.def(("cuda_" + std::string(name) + question).c_str(), function, py::arg("x"),
                 py::arg("layers"), py::arg("stride"), py::arg("device"), asked);
    };
    ask("_can_implement", &ask_bottleneck<Kernel::kCanImplement>,
        "Whether there is such a kernel for this on that device.");
    ask("_is_profitable", &ask_bottleneck<Kernel::kIsProfitable>,
        "Whether there is one that is expected to be faster than a kernel for each layer.");
  };
  def_bottleneck(
      "bottleneck", OnMmaSync{},
      "out = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut): layers are "
      "(weight,\n"
      "bn) of the three convolutions and, where x is not the shortcut itself, of its projection;\n"
      "conv2 is 3 x 3 with padding 1, the others 1 x 1; conv2 and the projection have the stride.\n"
      "out is no part of x.");
  def_bottleneck("bottleneck_sm90", OnWgmma{}, "The same, by the kernel for sm_90a.");

  def<&resnet_fused::stem>(
      module, "stem", &set_stem,
      "out = max_pool(relu(bn(conv(x))), 3, stride 2, padding 1), conv being 7 x 7 of 3\n"
      "channels with stride 2 and padding 3, in float16 or bfloat16. x may also be\n"
      "contiguous, as NCHW, and uint8: bytes are then scale and shift of its channels, by\n"
      "which pixels are multiplied and moved, in float32, and rounded.",
      "out", "x", "weight", "bn", "bytes");

  def<&resnet_fused::average_pool>(module, "average_pool", &set_average_pool,
                                   "out[n, c] = the mean of x[n, c], in x's type or float32.",
                                   "out", "x");

  def<&resnet_fused::linear>(
      module, "linear", &set_linear,
      "out[n, k] = sum of x[n, :] * weight[k, :], + bias[k] unless bias is None. x is\n"
      "float32, the others are of one type; all are contiguous.",
      "out", "x", "weight", "bias");

  module.def(
      "cuda_check_device",
      [](int device) {
        py::gil_scoped_release unlocked;
        check_cuda("loading the CUDA kernels", resnet_fused::bn_add_relu_loadable(device));
      },
      py::arg("device"), "Raises RuntimeError if the kernels cannot run on that device.");

  module.def(
      "cuda_set_spin_limit",
      [](int device, std::uint32_t tries) {
        check_cuda("set_spin_limit", resnet_fused::set_spin_limit(device, tries));
      },
      py::arg("device"), py::arg("tries"),
      "Kernels launched later give up after so many tries of a barrier, which ends the GPU's\n"
      "context; 0: they wait for ever.");

  module.def("cuda_stuck_barrier", &resnet_fused::stuck_barrier,
             "What a kernel gave up at since cuda_set_spin_limit, in one sentence; \"\" for none.");
}
