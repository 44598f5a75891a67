// The Python module resnet_fused._C: one register_<domain> per domain, and the build report.
// Bindings check tensors and forward raw pointers; they compute nothing and know no torch.
#include <pybind11/pybind11.h>

#include "build_info.h"
#include "register.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.attr("INTERFACE") = RESNET_FUSED_INTERFACE;
  module.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = RESNET_FUSED_VERSION;
        info["compiler"] = RESNET_FUSED_COMPILER;
#ifdef _OPENMP
        info["openmp"] = true;
#else
        info["openmp"] = false;
#endif
        info["cuda"] = bool(RESNET_FUSED_CUDA);
        info["cuda_note"] = RESNET_FUSED_CUDA_NOTE;
        info["cuda_architectures"] = RESNET_FUSED_CUDA_REAL;
        info["cuda_ptx"] = RESNET_FUSED_CUDA_PTX;
        return info;
      },
      "What this module was built with; cuda_note says why CUDA was left out.");
  register_programs(module);
  register_snapshots(module);
  register_cpu_kernels(module);
  register_cpu_gradients(module);
  register_cpu_quantized_kernels(module);
  register_cpu_training(module);
#if RESNET_FUSED_CUDA
  register_cuda_kernels(module);
#endif
}
