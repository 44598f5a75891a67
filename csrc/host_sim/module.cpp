// The Python module resnet_fused._C_sim: the bindings of the CUDA kernels, run on the host.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/program.h"
#include "bindings/register.h"
#include "build_info.h"
#include "host_sim/layout.h"
#include "host_sim/simulator.h"
#include "host_sim/tests/primitives.h"
#include "kernels/cuda/ptx_sm90.cuh"
#include "kernels/cuda/spin_limit.h"
#include "kernels/cuda/tensor_map.h"

namespace py = pybind11;

namespace {

using Chunks = std::vector<std::tuple<std::uint32_t, std::int64_t, std::uint32_t>>;

alignas(16) unsigned char memory;  // stands for the tensor's, which is not touched

Chunks listed(const std::vector<host_sim::Chunk>& chunks) {
  Chunks all;
  for (const host_sim::Chunk& c : chunks) {
    all.emplace_back(c.shared, c.bytes == 0 ? -1 : c.global - &memory, c.bytes);
  }
  return all;
}

Chunks tile_chunks(const std::vector<std::uint64_t>& size, const std::vector<std::uint64_t>& stride,
                   const std::vector<std::uint32_t>& box, int swizzle,
                   const std::vector<std::int32_t>& first, std::uint32_t shared) {
  CUtensorMap map;
  const std::vector<cuuint32_t> steps(size.size(), 1);
  const CUresult status = cuTensorMapEncodeTiled(
      &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, static_cast<cuuint32_t>(size.size()), &memory,
      size.data(), stride.data(), box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
      static_cast<CUtensorMapSwizzle>(swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw py::value_error("no tensor map has these sizes");
  return listed(host_sim::tile_chunks(map, first.data(), shared));
}

std::optional<Chunks> pixel_chunks(const std::array<std::int64_t, 4>& size,
                                   const std::array<int, 2>& lower, const std::array<int, 2>& upper,
                                   const std::array<int, 2>& step, int pixels,
                                   const std::array<std::int32_t, 4>& first,
                                   const std::array<std::uint16_t, 2>& offsets) {
  const resnet_fused::PixelBox box{{lower[0], lower[1]}, {upper[0], upper[1]}, {step[0], step[1]}};
  CUtensorMap map;
  if (encode_pixels(&map, resnet_fused::DType::kFloat16, &memory,
                    {size[0], size[1], size[2], size[3]}, box, pixels) != cudaSuccess ||
      !host_sim::within_box(map, first.data())) {
    return std::nullopt;
  }
  return listed(host_sim::pixel_chunks(map, first.data(), offsets.data(), 0));
}

}  // namespace

PYBIND11_MODULE(_C_sim, module) {
  py::register_exception<host_sim::Fault>(module, "Fault", PyExc_RuntimeError);

  module.attr("INTERFACE") = RESNET_FUSED_INTERFACE;
  module.def(
      "set_buffers",
      [](const std::vector<std::tuple<std::uintptr_t, std::size_t, bool>>& buffers) {
        host_sim::clear_buffers();
        for (const auto& [address, bytes, writable] : buffers) {
          host_sim::register_buffer(reinterpret_cast<const void*>(address), bytes, writable);
        }
        buffers_given = true;
      },
      py::arg("buffers"),
      "Makes these (address, bytes, writable) all of the global memory that the next kernel may\n"
      "touch, in place of what the tensors among its arguments cover.");

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
            {"skipped_arrival", &plant.skipped_arrival},
            {"skipped_mbarrier_wait", &plant.skipped_mbarrier_wait},
            {"skipped_product_wait", &plant.skipped_product_wait},
            {"base_offset", &plant.base_offset},
            {"skipped_store_wait", &plant.skipped_store_wait},
            {"skipped_proxy_fence", &plant.skipped_proxy_fence},
            {"skipped_register_release", &plant.skipped_register_release},
            {"skipped_cluster_barrier", &plant.skipped_cluster_barrier},
            {"skipped_kernel_wait", &plant.skipped_kernel_wait},
            {"bytes_not_expected", &plant.bytes_not_expected},
        };
        for (const auto& [name, value] : mistakes) *fields.at(name) = value;
        host_sim::plant(plant);
      },
      py::arg("mistakes") = std::map<std::string, int>{},
      "Makes every thread of later launches skip its barrier, wait or fence of that number,\n"
      "counted from 0, as the fields of host_sim::Plant say; nothing by default.");

  module.def(
      "set_spin_limit", [](std::uint32_t tries) { resnet_fused::set_spin_limit(0, tries); },
      py::arg("tries") = 0,
      "Whether a thread gives up where none can run any more; a number of tries has no meaning\n"
      "here. 0: that is a deadlock.");

  module.def(
      "take_statistics",
      [] {
        const host_sim::Statistics counts = host_sim::take_statistics();
        py::dict result;
        result["barriers"] = counts.barriers;
        result["waits"] = counts.waits;
        result["matrix_loads"] = counts.matrix_loads;
        result["bank_conflicts"] = counts.bank_conflicts;
        result["shared_requests"] = counts.shared_requests;
        result["shared_conflicts"] = counts.shared_conflicts;
        result["products"] = counts.products;
        result["bulk_copies"] = counts.bulk_copies;
        result["named_barriers"] = counts.named_barriers;
        result["mbarrier_waits"] = counts.mbarrier_waits;
        result["product_waits"] = counts.product_waits;
        result["store_waits"] = counts.store_waits;
        result["proxy_fences"] = counts.proxy_fences;
        result["cluster_barriers"] = counts.cluster_barriers;
        return result;
      },
      "Counts since the last call, as host_sim::Statistics describes them.");

  module.def(
      "set_schedule", &host_sim::set_schedule, py::arg("seed") = 0,
      "Runs threads of later launches, and lands bulk copies, in the random order that this\n"
      "seed gives; in the fixed order for 0.");

  module.def(
      "swizzled",
      [](std::uint32_t address, int bits, std::uint32_t base) {
        return host_sim::swizzled(address, bits, base);
      },
      py::arg("address"), py::arg("bits"), py::arg("base") = 0, "host_sim::swizzled.");

  module.def(
      "matrix_descriptor",
      [](std::uint32_t offset, int row_bytes, std::uint32_t base_offset) {
        namespace ptx = resnet_fused::ptx;
        return row_bytes == 128  ? ptx::matrix_descriptor<128>(offset, base_offset)
               : row_bytes == 64 ? ptx::matrix_descriptor<64>(offset, base_offset)
                                 : ptx::matrix_descriptor<32>(offset, base_offset);
      },
      py::arg("offset"), py::arg("row_bytes"), py::arg("base_offset") = 0,
      "resnet_fused::ptx::matrix_descriptor of rows of 128, 64 or 32 bytes.");

  module.def(
      "chunk_address",
      [](std::uint64_t descriptor, int row, int chunk) {
        return host_sim::chunk_address(host_sim::decode(descriptor), row, chunk);
      },
      py::arg("descriptor"), py::arg("row"), py::arg("chunk"), "host_sim::chunk_address.");

  module.def("tile_chunks", &tile_chunks, py::arg("size"), py::arg("stride"), py::arg("box"),
             py::arg("swizzle"), py::arg("first"), py::arg("shared"),
             "The chunks of a box of 2-byte elements, as (shared, offset in bytes or -1, bytes).\n"
             "All dimensions fastest first; strides in bytes, of all but the first.");

  module.def(
      "pixel_chunks", &pixel_chunks, py::arg("size"), py::arg("lower"), py::arg("upper"),
      py::arg("step"), py::arg("pixels"), py::arg("first"), py::arg("offsets"),
      "The same of 64 channels in im2col mode, of a dense tensor of channels, width, height\n"
      "and batch; None where the map or the first pixel is refused.");

  module.def("run_primitive", &host_sim::tests::run, py::arg("name"), py::arg("words"),
             py::arg("outputs"), "Runs a kernel of csrc/host_sim/tests/primitives.cu.");

  register_programs(module);
  register_snapshots(module);
  register_cuda_kernels(module);
}
