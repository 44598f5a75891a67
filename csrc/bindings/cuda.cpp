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
#include <vector>

#include "kernels/cuda/bn_add_relu.h"
#include "kernels/cuda/bottleneck.h"
#include "kernels/cuda/bottleneck_sm90.h"
#include "kernels/cuda/conv.h"
#include "kernels/cuda/conv_int8.h"
#include "kernels/cuda/conv_training_sm90.h"
#include "kernels/cuda/head.h"
#include "kernels/cuda/spin_limit.h"
#include "kernels/cuda/stem.h"
#include "kernels/cuda/wgrad_sm90.h"
#include "kernels/cuda/window_rows.h"
#include "program.h"
#include "register.h"
#include "residual.h"
#include "tensor_arg.h"

namespace py = pybind11;
using resnet_fused::BatchNorm;
using resnet_fused::BnAddRelu;
using resnet_fused::Bottleneck;
using resnet_fused::ConvBn;
using resnet_fused::ConvInt8;
using resnet_fused::ConvolutionBn;
using resnet_fused::ConvStats;
using resnet_fused::ConvTile;
using resnet_fused::Dgrad;
using resnet_fused::DType;
using resnet_fused::Int8Tile;
using resnet_fused::Layer;
using resnet_fused::TrainingTile;
using resnet_fused::Vector;
using resnet_fused::Wgrad;
using resnet_fused::WgradTile;

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
using Pair = std::array<std::int64_t, 2>;
// Mean, variance, weight, bias, eps.
using BatchNormArg = std::tuple<TensorArg, TensorArg, OptionalTensor, OptionalTensor, double>;
// Stride, padding, dilation.
using WindowArg = std::tuple<Pair, Pair, Pair>;
// A convolution with its batch norm: x, weight, window, batch norm.
using LayerArg = std::tuple<TensorArg, TensorArg, WindowArg, BatchNormArg>;
// A quantised convolution: x, weight, window.
using Int8LayerArg = std::tuple<TensorArg, TensorArg, WindowArg>;
// Of a bottleneck: weight, batch norm.
using InnerLayerArg = std::tuple<TensorArg, BatchNormArg>;

// What every launch has, and the arguments of its kernel.
template <typename Kernel>
struct OnDevice {
  Kernel op;
  int device;
};

struct ConvLaunch {
  ConvBn op;
  ConvTile tile;
  int device;
};

struct ConvInt8Launch {
  ConvInt8 op;
  Int8Tile tile;
  int device;
};

template <typename Op, typename Tile = TrainingTile>
struct TrainingLaunch {
  Op op;
  Tile tile;
  int device;
};
using WgradLaunch = TrainingLaunch<Wgrad, WgradTile>;

struct BottleneckLaunch {
  Bottleneck op;
  void* out;
  int device;
};

CUstream_st* stream_of(std::uintptr_t stream) { return reinterpret_cast<CUstream_st*>(stream); }

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
  slot = {};
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

void run_bn_add_relu(OnDevice<BnAddRelu>& launch, std::uintptr_t stream) {
  check_cuda("bn_add_relu", resnet_fused::bn_add_relu(launch.op, launch.device, stream_of(stream)));
}

void bn_add_relu(const TensorArg& out, const TensorArg& x, const BatchNormArg& bn,
                 const OptionalTensor& residual, bool relu, int device, std::uintptr_t stream) {
  check_nhwc("x", x);
  check_nhwc("out", out);
  check_type("x", x, out.type);
  const auto& [batch, channels, height, width] = x.sizes;
  check_sizes("out", out, {batch, channels, height, width});
  if (out.numel() == 0) return;
  Launch<OnDevice<BnAddRelu>> launch;
  BnAddRelu& op = launch.arguments.op;
  launch.arguments.device = device;
  op.dtype = dtype_of("x", x);
  op.rows = batch * height * width;
  op.channels = channels;
  op.relu = relu;
  launch.reads(op.x, "x", x);
  set_batch_norm(launch, op.bn, bn, channels);
  set_residual(launch, op.residual, residual, out);
  if (!op.residual.in_line()) refuse("residual must have all pixels at one distance here");
  launch.writes(op.out, "out", out);
  launch.run<run_bn_add_relu>(stream);
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

void set_convolution(Launch<ConvLaunch>& launch, ConvolutionBn& conv, const LayerArg& layer,
                     const TensorArg& out) {
  const auto& [x, weight, window, bn] = layer;
  check_type("x", x, out.type);
  check_type("weight", weight, out.type);
  set_window(launch, launch.arguments.op, conv, x, weight, window, out);
  set_batch_norm(launch, conv.bn, bn, out.sizes[1]);
}

void set_conv_bn(Launch<ConvLaunch>& launch, const TensorArg& out, const LayerArg& layer,
                 const std::optional<LayerArg>& projection, const OptionalTensor& residual,
                 std::int64_t groups, bool relu, bool tf32, int device) {
  launch.arguments.device = device;
  ConvBn& op = launch.arguments.op;
  set_result(op, out, groups);
  op.dtype = dtype_of("out", out);
  op.relu = relu;
  op.tf32 = tf32;
  set_convolution(launch, op.conv, layer, out);
  op.projection = {};
  if (projection) {
    if (groups != 1 || residual) {
      refuse("a projection needs groups = 1 and excludes a residual");
    }
    set_convolution(launch, op.projection, *projection, out);
  }
  if (out.numel() > 0) set_residual(launch, op.residual, residual, out);
  launch.writes(op.out, "out", out);
}

void run_conv_bn(ConvLaunch& launch, std::uintptr_t stream) {
  check_cuda("conv_bn",
             resnet_fused::conv_bn(launch.op, launch.tile, launch.device, stream_of(stream)));
}

void conv_bn(const TensorArg& out, const LayerArg& layer, const std::optional<LayerArg>& projection,
             const OptionalTensor& residual, std::int64_t groups, bool relu, bool tf32,
             ConvTile tile, int device, std::uintptr_t stream) {
  Launch<ConvLaunch> launch;
  set_conv_bn(launch, out, layer, projection, residual, groups, relu, tf32, device);
  launch.arguments.tile = tile;
  if (!resnet_fused::conv_bn_can_implement(launch.arguments.op, tile)) {
    refuse("this tile does not compute such a convolution; use automatic");
  }
  launch.run<run_conv_bn>(stream);
}

std::vector<ConvTile> conv_bn_tiles(const TensorArg& out, const LayerArg& layer,
                                    const std::optional<LayerArg>& projection,
                                    const OptionalTensor& residual, std::int64_t groups, bool relu,
                                    bool tf32, int device) {
  Launch<ConvLaunch> launch;
  set_conv_bn(launch, out, layer, projection, residual, groups, relu, tf32, device);
  const py::gil_scoped_release unlocked;
  std::vector<ConvTile> tiles;
  check_cuda("conv_bn", resnet_fused::conv_bn_tiles(launch.arguments.op, device, &tiles));
  return tiles;
}

DType byte_dtype_of(const char* name, const TensorArg& tensor) {
  if (tensor.type == ScalarType::kUInt8) return DType::kUInt8;
  if (tensor.type == ScalarType::kInt8) return DType::kInt8;
  refuse(std::string(name) + " must be uint8 or int8, found " + name_of(tensor.type));
}

template <typename T>
void set_values(Launch<ConvInt8Launch>& launch, const T*& slot, const char* name,
                const TensorArg& tensor, ScalarType type) {
  check_type(name, tensor, type);
  check_sizes(name, tensor, {launch.arguments.op.conv.out_channels});
  check_contiguous(name, tensor, 1);
  launch.reads(slot, name, tensor);
}

void set_conv_int8(Launch<ConvInt8Launch>& launch, const TensorArg& out, const Int8LayerArg& layer,
                   const TensorArg& bias, const TensorArg& multiplier,
                   const OptionalTensor& shortcut_scale, const OptionalTensor& residual,
                   const std::optional<Int8LayerArg>& projection, int device) {
  if (residual && projection) refuse("residual and projection exclude each other");
  if (shortcut_scale.has_value() != (residual || projection)) {
    refuse("shortcut_scale goes with a residual or a projection, and with nothing else");
  }
  launch.arguments.device = device;
  ConvInt8& op = launch.arguments.op;
  set_result(op.conv, out, 1);
  op.conv.relu = byte_dtype_of("out", out) == DType::kUInt8;
  op.conv.dtype = byte_dtype_of("x", std::get<0>(layer));
  op.conv.projection = {};
  const auto set = [&](ConvolutionBn& conv, const Int8LayerArg& of) {
    const auto& [x, weight, window] = of;
    check_type("x", x, std::get<0>(layer).type);
    check_type("weight", weight, ScalarType::kInt8);
    set_window(launch, op.conv, conv, x, weight, window, out);
  };
  set(op.conv.conv, layer);
  if (projection) set(op.conv.projection, *projection);
  set_values(launch, op.bias, "bias", bias, ScalarType::kInt32);
  set_values(launch, op.multiplier, "multiplier", multiplier, ScalarType::kFloat32);
  if (shortcut_scale) {
    set_values(launch, op.shortcut_scale, "shortcut_scale", *shortcut_scale, ScalarType::kFloat32);
  }
  if (residual && out.numel() > 0) {
    op.residual_dtype = byte_dtype_of("residual", *residual);
    TensorArg as_out = out;  // set_residual wants one type, and both are single bytes
    as_out.type = residual->type;
    set_residual(launch, op.conv.residual, residual, as_out);
  }
  launch.writes(op.conv.out, "out", out);
}

void run_conv_int8(ConvInt8Launch& launch, std::uintptr_t stream) {
  check_cuda("conv_int8",
             resnet_fused::conv_int8(launch.op, launch.tile, launch.device, stream_of(stream)));
}

void conv_int8(const TensorArg& out, const Int8LayerArg& layer, const TensorArg& bias,
               const TensorArg& multiplier, const OptionalTensor& shortcut_scale,
               const OptionalTensor& residual, const std::optional<Int8LayerArg>& projection,
               Int8Tile tile, int device, std::uintptr_t stream) {
  Launch<ConvInt8Launch> launch;
  set_conv_int8(launch, out, layer, bias, multiplier, shortcut_scale, residual, projection, device);
  launch.arguments.tile = tile;
  if (!resnet_fused::conv_int8_can_implement(launch.arguments.op)) {
    refuse("there is no kernel for such a quantised convolution");
  }
  launch.run<run_conv_int8>(stream);
}

std::vector<Int8Tile> conv_int8_tiles(const TensorArg& out, const Int8LayerArg& layer,
                                      const TensorArg& bias, const TensorArg& multiplier,
                                      const OptionalTensor& shortcut_scale,
                                      const OptionalTensor& residual,
                                      const std::optional<Int8LayerArg>& projection, int device) {
  Launch<ConvInt8Launch> launch;
  set_conv_int8(launch, out, layer, bias, multiplier, shortcut_scale, residual, projection, device);
  const py::gil_scoped_release unlocked;
  std::vector<Int8Tile> tiles;
  check_cuda("conv_int8", resnet_fused::conv_int8_tiles(launch.arguments.op, device, &tiles));
  return tiles;
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

// The statistics or sums of a result: `rows` of (parts, rows, channels).
template <typename Arguments>
void set_parts(Launch<Arguments>& launch, float*& slot, const char* name,
               const OptionalTensor& parts, std::int64_t rows, const TensorArg& result) {
  if (!parts) return;
  const std::int64_t positions = result.sizes[0] * result.sizes[2] * result.sizes[3];
  const std::int64_t count = (positions + resnet_fused::kPartRows - 1) / resnet_fused::kPartRows;
  check_type(name, *parts, ScalarType::kFloat32);
  check_sizes(name, *parts, {count, rows, result.sizes[1]});
  check_contiguous(name, *parts, 3);
  launch.writes(slot, name, *parts);
}

void set_conv_stats(Launch<TrainingLaunch<ConvStats>>& launch, const TensorArg& out,
                    const TensorArg& x, const TensorArg& weight, const WindowArg& window,
                    const OptionalTensor& moments, int device) {
  ConvStats& stats = launch.arguments.op;
  launch.arguments.device = device;
  set_training(stats.op, x, weight, window, out);
  launch.reads(stats.op.conv.x, "x", x);
  launch.reads(stats.op.conv.weight, "weight", weight);
  set_parts(launch, stats.moments, "moments", moments, 3, out);
  launch.writes(stats.op.out, "out", out);
}

void set_dgrad(Launch<TrainingLaunch<Dgrad>>& launch, const TensorArg& out, const TensorArg& grad,
               const TensorArg& weight, const WindowArg& window, const OptionalTensor& below,
               const OptionalTensor& scale_shift, const OptionalTensor& sums,
               const OptionalTensor& add, int device) {
  Dgrad& op = launch.arguments.op;
  launch.arguments.device = device;
  if (below.has_value() != scale_shift.has_value() || (below && add)) {
    refuse("below and its scale_shift go together, and without add");
  }
  set_training(op.op, out, weight, window, grad);
  const auto set = [&](const void*& slot, const char* name, const OptionalTensor& tensor) {
    if (!tensor) return;
    check_nhwc(name, *tensor);
    check_type(name, *tensor, out.type);
    check_sizes(name, *tensor, {out.sizes[0], out.sizes[1], out.sizes[2], out.sizes[3]});
    launch.reads(slot, name, *tensor);
  };
  launch.reads(op.grad, "grad", grad);
  launch.reads(op.op.conv.weight, "weight", weight);
  set(op.below, "below", below);
  set(op.add, "add", add);
  if (scale_shift) {
    check_type("scale_shift", *scale_shift, ScalarType::kFloat32);
    check_sizes("scale_shift", *scale_shift, {6, out.sizes[1]});
    check_contiguous("scale_shift", *scale_shift, 2);
    launch.reads(op.below_scale_shift, "scale_shift", *scale_shift);
  }
  set_parts(launch, op.sums, "sums", sums, 2, out);
  launch.writes(op.out, "out", out);
}

template <typename Op>
std::vector<TrainingTile> training_tiles_of(const Launch<TrainingLaunch<Op>>& launch) {
  const py::gil_scoped_release unlocked;
  std::vector<TrainingTile> tiles;
  check_cuda("training",
             resnet_fused::training_tiles(launch.arguments.op, launch.arguments.device, &tiles));
  return tiles;
}

void run_conv_stats(TrainingLaunch<ConvStats>& launch, std::uintptr_t stream) {
  check_cuda("conv_stats",
             resnet_fused::conv_stats(launch.op, launch.tile, launch.device, stream_of(stream)));
}

void run_dgrad(TrainingLaunch<Dgrad>& launch, std::uintptr_t stream) {
  check_cuda("dgrad",
             resnet_fused::dgrad(launch.op, launch.tile, launch.device, stream_of(stream)));
}

void conv_stats(const TensorArg& out, const TensorArg& x, const TensorArg& weight,
                const WindowArg& window, const OptionalTensor& moments, TrainingTile tile,
                int device, std::uintptr_t stream) {
  Launch<TrainingLaunch<ConvStats>> launch;
  set_conv_stats(launch, out, x, weight, window, moments, device);
  launch.arguments.tile = tile;
  launch.run<run_conv_stats>(stream);
}

std::vector<TrainingTile> conv_stats_tiles(const TensorArg& out, const TensorArg& x,
                                           const TensorArg& weight, const WindowArg& window,
                                           const OptionalTensor& moments, int device) {
  Launch<TrainingLaunch<ConvStats>> launch;
  set_conv_stats(launch, out, x, weight, window, moments, device);
  return training_tiles_of(launch);
}

void dgrad(const TensorArg& out, const TensorArg& grad, const TensorArg& weight,
           const WindowArg& window, const OptionalTensor& below, const OptionalTensor& scale_shift,
           const OptionalTensor& sums, const OptionalTensor& add, TrainingTile tile, int device,
           std::uintptr_t stream) {
  Launch<TrainingLaunch<Dgrad>> launch;
  set_dgrad(launch, out, grad, weight, window, below, scale_shift, sums, add, device);
  launch.arguments.tile = tile;
  launch.run<run_dgrad>(stream);
}

std::vector<TrainingTile> dgrad_tiles(const TensorArg& out, const TensorArg& grad,
                                      const TensorArg& weight, const WindowArg& window,
                                      const OptionalTensor& below,
                                      const OptionalTensor& scale_shift, const OptionalTensor& sums,
                                      const OptionalTensor& add, int device) {
  Launch<TrainingLaunch<Dgrad>> launch;
  set_dgrad(launch, out, grad, weight, window, below, scale_shift, sums, add, device);
  return training_tiles_of(launch);
}

// `parts` is None where it is not known how many there are.
void set_wgrad(Launch<WgradLaunch>& launch, const TensorArg& out, const TensorArg& grad,
               const TensorArg& x, const WindowArg& window, const OptionalTensor& parts,
               int device) {
  Wgrad& op = launch.arguments.op;
  launch.arguments.device = device;
  op.out_dtype = dtype_of("out", out);
  if (op.out_dtype != DType::kFloat32) check_type("out", out, x.type);
  set_result(op.op, grad, 1);
  op.op.dtype = dtype_of("grad", grad);
  check_type("x", x, grad.type);
  set_sizes(op.op, op.op.conv, x, out, window, grad);
  launch.reads(op.grad, "grad", grad);
  launch.reads(op.op.conv.x, "x", x);
  if (parts) {
    op.count = size("parts", parts->sizes[0], 1);
    check_type("parts", *parts, ScalarType::kFloat32);
    check_sizes("parts", *parts, {op.count, out.numel()});
    check_contiguous("parts", *parts, 2);
    launch.writes(op.parts, "parts", *parts);
  }
  launch.writes(op.out, "out", out);
}

void run_wgrad(WgradLaunch& launch, std::uintptr_t stream) {
  check_cuda("wgrad",
             resnet_fused::wgrad(launch.op, launch.tile, launch.device, stream_of(stream)));
}

void wgrad(const TensorArg& out, const TensorArg& grad, const TensorArg& x, const WindowArg& window,
           const TensorArg& parts, WgradTile tile, int device, std::uintptr_t stream) {
  Launch<WgradLaunch> launch;
  set_wgrad(launch, out, grad, x, window, parts, device);
  launch.arguments.tile = tile;
  int count = 0;
  check_cuda("wgrad", resnet_fused::wgrad_parts(launch.arguments.op, tile, device, &count));
  if (count != launch.arguments.op.count) {
    refuse("parts must be " + std::to_string(count) + ", as cuda_wgrad_parts says");
  }
  launch.run<run_wgrad>(stream);
}

std::vector<WgradTile> wgrad_tiles(const TensorArg& out, const TensorArg& grad, const TensorArg& x,
                                   const WindowArg& window, int device) {
  Launch<WgradLaunch> launch;
  set_wgrad(launch, out, grad, x, window, {}, device);
  std::vector<WgradTile> tiles;
  check_cuda("wgrad", resnet_fused::wgrad_tiles(launch.arguments.op, device, &tiles));
  return tiles;
}

int wgrad_parts(const TensorArg& out, const TensorArg& grad, const TensorArg& x,
                const WindowArg& window, WgradTile tile, int device) {
  Launch<WgradLaunch> launch;
  set_wgrad(launch, out, grad, x, window, {}, device);
  int count = 0;
  check_cuda("wgrad", resnet_fused::wgrad_parts(launch.arguments.op, tile, device, &count));
  return count;
}

void run_window_rows(OnDevice<resnet_fused::WindowRows>& launch, std::uintptr_t stream) {
  check_cuda("window_rows", resnet_fused::window_rows(launch.op, launch.device, stream_of(stream)));
}

void window_rows(const TensorArg& out, const TensorArg& x, std::int64_t kernel, std::int64_t stride,
                 std::int64_t padding, int device, std::uintptr_t stream) {
  check_nhwc("x", x);
  check_nhwc("out", out);
  check_type("x", x, out.type);
  const auto& [batch, channels, height, width] = x.sizes;
  check_sizes("out", out, {batch, out.sizes[1], height, out.sizes[3]});
  if (dtype_of("x", x) == DType::kFloat32) refuse("x must be float16 or bfloat16");
  if (out.sizes[1] % 8 != 0 || out.sizes[1] < kernel * channels) {
    refuse("out must have a multiple of 8 channels, and room for the window's line");
  }
  Launch<OnDevice<resnet_fused::WindowRows>> launch;
  resnet_fused::WindowRows& op = launch.arguments.op;
  launch.arguments.device = device;
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
  launch.run<run_window_rows>(stream);
}

void set_layer(Launch<BottleneckLaunch>& launch, Layer& slot, const InnerLayerArg& layer,
               std::initializer_list<std::int64_t> sizes, ScalarType type) {
  const auto& [weight, bn] = layer;
  check_nhwc("weight", weight);
  check_type("weight", weight, type);
  check_sizes("weight", weight, sizes);
  launch.reads(slot.weight, "weight", weight);
  set_batch_norm(launch, slot.bn, bn, weight.sizes[0]);
}

// `layers` are three and, where there is one, the projection.
void set_bottleneck(Launch<BottleneckLaunch>& launch, const TensorArg& x,
                    const std::vector<InnerLayerArg>& layers, std::int64_t stride) {
  check_nhwc("x", x);
  if (layers.size() < 3 || layers.size() > 4) refuse("three layers, or four, are needed");
  for (const auto& [weight, bn] : layers) check_rank("weight", weight, 4);
  Bottleneck& op = launch.arguments.op;
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
  op.projection = {};
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
void run_bottleneck(BottleneckLaunch& launch, std::uintptr_t stream) {
  check_cuda("bottleneck", Kernel::kRun(launch.out, launch.op, launch.device, stream_of(stream)));
}

template <typename Kernel>
void bottleneck(const TensorArg& out, const TensorArg& x, const std::vector<InnerLayerArg>& layers,
                std::int64_t stride, int device, std::uintptr_t stream) {
  Launch<BottleneckLaunch> launch;
  set_bottleneck(launch, x, layers, stride);
  const Bottleneck& op = launch.arguments.op;
  launch.arguments.device = device;
  check_nhwc("out", out);
  check_type("out", out, x.type);
  check_sizes("out", out,
              {x.sizes[0], op.out_channels, resnet_fused::strided(op.height, op.stride),
               resnet_fused::strided(op.width, op.stride)});
  check_apart("out", out, "x", x);
  launch.writes(launch.arguments.out, "out", out);
  if (!Kernel::kCanImplement(op, device)) {
    refuse("there is no kernel for such a bottleneck on this device");
  }
  launch.run<run_bottleneck<Kernel>>(stream);
}

// Whether `ask` says so of the bottleneck.
template <bool (*ask)(const Bottleneck&, int)>
bool ask_bottleneck(const TensorArg& x, const std::vector<InnerLayerArg>& layers,
                    std::int64_t stride, int device) {
  Launch<BottleneckLaunch> launch;
  set_bottleneck(launch, x, layers, stride);
  return ask(launch.arguments.op, device);
}

void run_stem(OnDevice<resnet_fused::Stem>& launch, std::uintptr_t stream) {
  check_cuda("stem", resnet_fused::stem(launch.op, launch.device, stream_of(stream)));
}

// Scale and shift of an image's channels.
using PixelScale = std::array<std::array<float, 3>, 2>;

void stem(const TensorArg& out, const TensorArg& x, const TensorArg& weight, const BatchNormArg& bn,
          const std::optional<PixelScale>& bytes, int device, std::uintptr_t stream) {
  check_nhwc("out", out);
  check_rank("x", x, 4);
  const bool planar = x.dense({0, 1, 2, 3});
  if (!planar) check_nhwc("x", x);
  check_nhwc("weight", weight);
  check_type("x", x, bytes ? ScalarType::kUInt8 : out.type);
  check_type("weight", weight, out.type);
  const std::int64_t out_channels = out.sizes[1];
  Launch<OnDevice<resnet_fused::Stem>> launch;
  resnet_fused::Stem& op = launch.arguments.op;
  launch.arguments.device = device;
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
  launch.run<run_stem>(stream);
}

void run_average_pool(OnDevice<resnet_fused::AveragePool>& launch, std::uintptr_t stream) {
  check_cuda("average_pool",
             resnet_fused::average_pool(launch.op, launch.device, stream_of(stream)));
}

void average_pool(const TensorArg& out, const TensorArg& x, int device, std::uintptr_t stream) {
  check_nhwc("x", x);
  check_contiguous("out", out, 2);
  check_sizes("out", out, {x.sizes[0], x.sizes[1]});
  Launch<OnDevice<resnet_fused::AveragePool>> launch;
  resnet_fused::AveragePool& op = launch.arguments.op;
  launch.arguments.device = device;
  op.dtype = dtype_of("x", x);
  op.out_dtype = dtype_of("out", out);
  if (out.type != x.type) check_type("out", out, ScalarType::kFloat32);
  op.batch = size("batch", x.sizes[0], 0);
  op.positions = size("positions", x.sizes[2] * x.sizes[3], 1);
  op.channels = size("channels", x.sizes[1], 0);
  launch.reads(op.x, "x", x);
  launch.writes(op.out, "out", out);
  launch.run<run_average_pool>(stream);
}

void run_linear(OnDevice<resnet_fused::Linear>& launch, std::uintptr_t stream) {
  check_cuda("linear", resnet_fused::linear(launch.op, launch.device, stream_of(stream)));
}

void linear(const TensorArg& out, const TensorArg& x, const TensorArg& weight,
            const OptionalTensor& bias, int device, std::uintptr_t stream) {
  check_contiguous("out", out, 2);
  check_contiguous("x", x, 2);
  check_contiguous("weight", weight, 2);
  check_type("x", x, ScalarType::kFloat32);
  check_type("weight", weight, out.type);
  check_sizes("out", out, {x.sizes[0], weight.sizes[0]});
  check_sizes("weight", weight, {weight.sizes[0], x.sizes[1]});
  Launch<OnDevice<resnet_fused::Linear>> launch;
  resnet_fused::Linear& op = launch.arguments.op;
  launch.arguments.device = device;
  op.dtype = dtype_of("out", out);
  op.batch = size("batch", x.sizes[0], 0);
  op.channels = size("channels", x.sizes[1], 1);
  op.classes = size("classes", weight.sizes[0], 0);
  launch.reads(op.x, "x", x);
  launch.reads(op.weight, "weight", weight);
  op.bias = nullptr;
  if (bias) {
    check_sizes("bias", *bias, {weight.sizes[0]});
    check_contiguous("bias", *bias, 1);
    check_type("bias", *bias, out.type);
    launch.reads(op.bias, "bias", *bias);
  }
  launch.writes(op.out, "out", out);
  launch.run<run_linear>(stream);
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
      .value("m64n64_sm90_split8", ConvTile::k64x64Sm90Split8);

  // Of every kernel: tensors are as tensor_arg.h says, sizes those of NCHW; images and weights are
  // dense and channels_last, vectors contiguous, float32, float16 or bfloat16. A kernel is queued
  // on `stream` of `device`, and its tensors have to stay until it has run. ValueError is raised
  // for what does not fit, RuntimeError for what CUDA reports.
  module.def(
      "cuda_bn_add_relu", &bn_add_relu, py::arg("out"), py::arg("x"), py::arg("bn"),
      py::arg("residual"), py::arg("relu"), py::arg("device"), py::arg("stream"),
      "out = relu?((x - mean) / sqrt(var + eps) * weight + bias (+ residual)). bn is (mean, var,\n"
      "weight, bias, eps), weight and bias None where absent; residual is as in cuda_conv_bn,\n"
      "with all pixels at one distance; out may be x or residual.");

  module.def(
      "cuda_conv_bn", &conv_bn, py::arg("out"), py::arg("layer"), py::arg("projection"),
      py::arg("residual"), py::arg("groups"), py::arg("relu"), py::arg("tf32"), py::arg("tile"),
      py::arg("device"), py::arg("stream"),
      "out = relu?(bn(conv(x)) + residual), or relu?(bn(conv(x)) + bn(projection(x'))). layer and\n"
      "projection are (x, weight, (stride, padding, dilation), bn), all of out's type but bn. A\n"
      "projection or a residual may be None; a projection needs groups = 1. residual has out's\n"
      "size but maybe fewer channels, which are adjacent; it may be out, and overlaps it in no\n"
      "other way. tf32: whether products of float32 may round their operands. A tile that cannot\n"
      "compute this raises ValueError.");

  module.def("cuda_conv_bn_tiles", &conv_bn_tiles, py::arg("out"), py::arg("layer"),
             py::arg("projection"), py::arg("residual"), py::arg("groups"), py::arg("relu"),
             py::arg("tf32"), py::arg("device"),
             "The tiles by which cuda_conv_bn computes these arguments on `device`, `automatic`\n"
             "not among them; where it stands for one for sm_90a, that one first.");

  py::enum_<Int8Tile>(module, "Int8Tile", py::module_local(),
                      "Output positions x channels that a block of sm_90a computes.")
      .value("m128n64", Int8Tile::k128x64)
      .value("m128n128", Int8Tile::k128x128)
      .value("m128n128_cluster", Int8Tile::k128x128Cluster)
      .value("m128n256_cluster", Int8Tile::k128x256Cluster)
      .value("m64n64_sm80", Int8Tile::k64x64Sm80)
      .value("m128n128_sm80", Int8Tile::k128x128Sm80);

  module.def(
      "cuda_conv_int8", &conv_int8, py::arg("out"), py::arg("layer"), py::arg("bias"),
      py::arg("multiplier"), py::arg("shortcut_scale"), py::arg("residual"), py::arg("projection"),
      py::arg("tile"), py::arg("device"), py::arg("stream"),
      "out = requantised(conv(x) + bias (+ residual, or projection(x'))), as\n"
      "resnet_fused/reference/quantized.py says; clamped at zero where out is uint8, else it is\n"
      "int8. layer and projection are (x, weight, (stride, padding, dilation)): x uint8 or int8,\n"
      "the same of both, weights int8, packed: of each 16 output channels number 4 t + 2 h + e\n"
      "(t < 4) at place 8 h + 2 t + e. bias is int32, multiplier and shortcut_scale float32.\n"
      "residual is as in cuda_conv_bn, uint8 or int8.");

  module.def(
      "cuda_conv_int8_tiles", &conv_int8_tiles, py::arg("out"), py::arg("layer"), py::arg("bias"),
      py::arg("multiplier"), py::arg("shortcut_scale"), py::arg("residual"), py::arg("projection"),
      py::arg("device"),
      "The tiles by which cuda_conv_int8 computes these arguments on `device`, the expected\n"
      "fastest first.");

  py::enum_<TrainingTile>(module, "TrainingTile", py::module_local(),
                          "Positions x channels of a block of a training convolution's kernel.")
      .value("m128n64", TrainingTile::k128x64)
      .value("m128n128", TrainingTile::k128x128)
      .value("m256n128_cluster", TrainingTile::k256x128Cluster);

  module.def("cuda_conv_stats", &conv_stats, py::arg("out"), py::arg("x"), py::arg("weight"),
             py::arg("window"), py::arg("moments"), py::arg("tile"), py::arg("device"),
             py::arg("stream"),
             "out = conv(x), in float16 or bfloat16, and where moments is not None, (parts, 3, "
             "channels),\n"
             "of every 128 positions of out mean, sum of squared deviations and count. window is "
             "(stride,\n"
             "padding, dilation).");

  module.def(
      "cuda_conv_stats_tiles", &conv_stats_tiles, py::arg("out"), py::arg("x"), py::arg("weight"),
      py::arg("window"), py::arg("moments"), py::arg("device"),
      "The tiles by which cuda_conv_stats computes these arguments on `device`, the expected\n"
      "fastest first; none where it does not.");

  module.def("cuda_dgrad", &dgrad, py::arg("out"), py::arg("grad"), py::arg("weight"),
             py::arg("window"), py::arg("below"), py::arg("scale_shift"), py::arg("sums"),
             py::arg("add"), py::arg("tile"), py::arg("device"), py::arg("stream"),
             "out = the gradient of x, where grad is that of conv(x), + add. With below, x being\n"
             "relu((below - mean) * scale + shift): zero where that is, and sums, (parts, 2, "
             "channels), of\n"
             "out and of out * (below - mean) of every 128 positions. scale_shift is (6, "
             "channels), mean,\n"
             "scale and shift first.");

  module.def("cuda_dgrad_tiles", &dgrad_tiles, py::arg("out"), py::arg("grad"), py::arg("weight"),
             py::arg("window"), py::arg("below"), py::arg("scale_shift"), py::arg("sums"),
             py::arg("add"), py::arg("device"), "As cuda_conv_stats_tiles.");

  py::enum_<WgradTile>(module, "WgradTile", py::module_local(),
                       "Columns of the weight x output channels of a block of cuda_wgrad.")
      .value("m256n64", WgradTile::k256x64)
      .value("m256n128", WgradTile::k256x128);

  module.def("cuda_wgrad", &wgrad, py::arg("out"), py::arg("grad"), py::arg("x"), py::arg("window"),
             py::arg("parts"), py::arg("tile"), py::arg("device"), py::arg("stream"),
             "out = the gradient of conv(x)'s weight, of float32 or x's type, grad being that of\n"
             "conv(x). parts is workspace, (cuda_wgrad_parts, elements of out), float32.");

  module.def("cuda_wgrad_tiles", &wgrad_tiles, py::arg("out"), py::arg("grad"), py::arg("x"),
             py::arg("window"), py::arg("device"), "As cuda_conv_stats_tiles.");

  module.def("cuda_wgrad_parts", &wgrad_parts, py::arg("out"), py::arg("grad"), py::arg("x"),
             py::arg("window"), py::arg("tile"), py::arg("device"),
             "Into how many ranges of positions that tile's sums fall.");

  module.def(
      "cuda_window_rows", &window_rows, py::arg("out"), py::arg("x"), py::arg("kernel"),
      py::arg("stride"), py::arg("padding"), py::arg("device"), py::arg("stream"),
      "out[n, s * channels + c, h, q] = x[n, c, h, q * stride - padding + s] for s < kernel,\n"
      "zeros beside x and behind that, in float16 or bfloat16.");

  const auto def_bottleneck = [&](const std::string& name, auto kernel, const char* meaning) {
    using Kernel = decltype(kernel);
    module.def(name.c_str(), &bottleneck<Kernel>, py::arg("out"), py::arg("x"), py::arg("layers"),
               py::arg("stride"), py::arg("device"), py::arg("stream"), meaning);
    const auto ask = [&](const char* question, auto function, const char* asked) {
      module.def((name + question).c_str(), function, py::arg("x"), py::arg("layers"),
                 py::arg("stride"), py::arg("device"), asked);
    };
    ask("_can_implement", &ask_bottleneck<Kernel::kCanImplement>,
        "Whether there is such a kernel for this on that device.");
    ask("_is_profitable", &ask_bottleneck<Kernel::kIsProfitable>,
        "Whether there is one that is expected to be faster than a kernel for each layer.");
  };
  def_bottleneck(
      "cuda_bottleneck", OnMmaSync{},
      "out = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut): layers are "
      "(weight,\n"
      "bn) of the three convolutions and, where x is not the shortcut itself, of its projection;\n"
      "conv2 is 3 x 3 with padding 1, the others 1 x 1; conv2 and the projection have the stride.\n"
      "out is no part of x.");
  def_bottleneck("cuda_bottleneck_sm90", OnWgmma{}, "The same, by the kernel for sm_90a.");

  module.def("cuda_stem", &stem, py::arg("out"), py::arg("x"), py::arg("weight"), py::arg("bn"),
             py::arg("bytes"), py::arg("device"), py::arg("stream"),
             "out = max_pool(relu(bn(conv(x))), 3, stride 2, padding 1), conv being 7 x 7 of 3\n"
             "channels with stride 2 and padding 3, in float16 or bfloat16. x may also be\n"
             "contiguous, as NCHW, and uint8: bytes are then scale and shift of its channels, by\n"
             "which pixels are multiplied and moved, in float32, and rounded.");

  module.def("cuda_average_pool", &average_pool, py::arg("out"), py::arg("x"), py::arg("device"),
             py::arg("stream"), "out[n, c] = the mean of x[n, c], in x's type or float32.");

  module.def("cuda_linear", &linear, py::arg("out"), py::arg("x"), py::arg("weight"),
             py::arg("bias"), py::arg("device"), py::arg("stream"),
             "out[n, k] = sum of x[n, :] * weight[k, :], + bias[k] unless bias is None. x is\n"
             "float32, the others are of one type; all are contiguous.");

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
