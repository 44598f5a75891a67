// Bindings of the CUDA kernels: addresses, sizes and a stream's handle in, an exception out.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels/cuda/bn_add_relu.h"
#include "register.h"

namespace py = pybind11;
using resnet_fused::BnAddRelu;
using resnet_fused::DType;
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

void bn_add_relu(std::uintptr_t out, std::uintptr_t x, std::uintptr_t residual, DType dtype,
                 std::int64_t rows, std::int64_t channels, const py::object& mean,
                 const py::object& var, const py::object& weight, const py::object& bias,
                 double eps, bool relu, int device, std::uintptr_t stream) {
  if (rows < 0 || channels < 0) throw std::invalid_argument("rows and channels must be >= 0");
  if (channels > 0 && rows > std::numeric_limits<std::int64_t>::max() / (4 * channels)) {
    throw std::invalid_argument("rows * channels overflows");
  }
  if (rows == 0 || channels == 0) return;
  if (out == 0 || x == 0) throw std::invalid_argument("out or x is a null pointer");
  if (mean.is_none() || var.is_none()) throw std::invalid_argument("mean and var are needed");
  const BnAddRelu arguments{pointer(out),
                            pointer<const void>(x),
                            pointer<const void>(residual),
                            dtype,
                            rows,
                            channels,
                            vector("mean", mean),
                            vector("var", var),
                            vector("weight", weight),
                            vector("bias", bias),
                            static_cast<float>(eps),
                            relu};
  py::gil_scoped_release unlocked;
  check_cuda("bn_add_relu",
             resnet_fused::bn_add_relu(arguments, device, pointer<CUstream_st>(stream)));
}

}  // namespace

void register_cuda_kernels(py::module_& module) {
  py::enum_<DType>(module, "DType")
      .value("float32", DType::kFloat32)
      .value("float16", DType::kFloat16)
      .value("bfloat16", DType::kBFloat16);

  module.def("cuda_bn_add_relu", &bn_add_relu, py::arg("out"), py::arg("x"), py::arg("residual"),
             py::arg("dtype"), py::arg("rows"), py::arg("channels"), py::arg("mean"),
             py::arg("var"), py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("relu"),
             py::arg("device"), py::arg("stream"),
             "out[r, c] = relu?((x[r, c] - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c]\n"
             "(+ residual[r, c])), queued on `stream` of `device`. out, x and residual are\n"
             "addresses of (rows, channels) matrices of `dtype`; residual is 0 for none; out may\n"
             "be x or residual. The others are (address, DType), weight and bias or None.\n"
             "Raises ValueError for impossible sizes, RuntimeError for what CUDA reports.");

  module.def(
      "cuda_check_device",
      [](int device) {
        py::gil_scoped_release unlocked;
        check_cuda("loading the CUDA kernels", resnet_fused::bn_add_relu_loadable(device));
      },
      py::arg("device"), "Raises RuntimeError if the kernels cannot run on that device.");
}
