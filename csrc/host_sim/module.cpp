// The Python module resnet_fused._C_sim: the bindings of the CUDA kernels, run on the host.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/register.h"
#include "host_sim/simulator.h"
#include "host_sim/tests/primitives.h"

namespace py = pybind11;

PYBIND11_MODULE(_C_sim, module) {
  py::register_exception<host_sim::Fault>(module, "Fault", PyExc_RuntimeError);

  module.def(
      "set_buffers",
      [](const std::vector<std::tuple<std::uintptr_t, std::size_t, bool>>& buffers) {
        host_sim::clear_buffers();
        for (const auto& [address, bytes, writable] : buffers) {
          host_sim::register_buffer(reinterpret_cast<const void*>(address), bytes, writable);
        }
      },
      py::arg("buffers"),
      "Makes these (address, bytes, writable) all of the global memory that kernels may touch.");

  module.def(
      "plant",
      [](int skipped_barrier, int skipped_wait) {
        host_sim::plant({skipped_barrier, skipped_wait});
      },
      py::kw_only(), py::arg("skipped_barrier") = -1, py::arg("skipped_wait") = -1,
      "Makes every thread of later launches skip its barrier, or its cp.async wait, of that\n"
      "number, counted from 0; none by default.");

  module.def(
      "take_statistics",
      [] {
        const host_sim::Statistics counts = host_sim::statistics();
        host_sim::statistics() = {};
        py::dict result;
        result["barriers"] = counts.barriers;
        result["waits"] = counts.waits;
        result["matrix_loads"] = counts.matrix_loads;
        result["bank_conflicts"] = counts.bank_conflicts;
        result["products"] = counts.products;
        return result;
      },
      "Counts since the last call: barriers and cp.async waits of thread 0 of each block, 8x8\n"
      "matrices read by ldmatrix, their rows that met another in a bank, mma instructions.");

  module.def("run_primitive", &host_sim::tests::run, py::arg("name"), py::arg("words"),
             py::arg("outputs"), "Runs a kernel of csrc/host_sim/tests/primitives.cu.");

  register_cuda_kernels(module);
}
