// The Python module resnet_fused._C_sim: the bindings of the CUDA kernels, run on the host.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "bindings/register.h"
#include "host_sim/simulator.h"
#include "host_sim/tests/primitives.h"

namespace py = pybind11;

PYBIND11_MODULE(_C_sim, module) {
  py::register_exception<host_sim::Fault>(module, "Fault", PyExc_RuntimeError);

  module.attr("INTERFACE") = kInterface;
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
      "set_capability", [](int capability) { host_sim::capability() = capability; },
      py::arg("capability"), "The compute capability of the simulated GPU, as in 90.");

  module.def(
      "plant",
      [](const std::map<std::string, int>& mistakes) {
        host_sim::Plant plant;
        const std::map<std::string, int*> fields = {
            {"skipped_barrier", &plant.skipped_barrier},
            {"skipped_named_barrier", &plant.skipped_named_barrier},
            {"skipped_wait", &plant.skipped_wait},
            {"skipped_mbarrier_wait", &plant.skipped_mbarrier_wait},
            {"skipped_product_wait", &plant.skipped_product_wait},
            {"skipped_store_wait", &plant.skipped_store_wait},
            {"skipped_proxy_fence", &plant.skipped_proxy_fence},
            {"skipped_register_release", &plant.skipped_register_release},
            {"bytes_not_expected", &plant.bytes_not_expected},
        };
        for (const auto& [name, value] : mistakes) *fields.at(name) = value;
        host_sim::plant(plant);
      },
      py::arg("mistakes") = std::map<std::string, int>{},
      "Makes every thread of later launches skip its barrier, wait or fence of that number,\n"
      "counted from 0, as the fields of host_sim::Plant say; nothing by default.");

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
        result["bulk_copies"] = counts.bulk_copies;
        result["named_barriers"] = counts.named_barriers;
        result["mbarrier_waits"] = counts.mbarrier_waits;
        result["product_waits"] = counts.product_waits;
        result["store_waits"] = counts.store_waits;
        result["proxy_fences"] = counts.proxy_fences;
        return result;
      },
      "Counts since the last call, as host_sim::Statistics describes them.");

  module.def("run_primitive", &host_sim::tests::run, py::arg("name"), py::arg("words"),
             py::arg("outputs"), "Runs a kernel of csrc/host_sim/tests/primitives.cu.");

  register_cuda_kernels(module);
}
