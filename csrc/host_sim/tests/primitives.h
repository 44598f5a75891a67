// Small kernels over single primitives, right and wrong, for the simulator's own tests.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace host_sim::tests {

// Launches a kernel over words of global memory.
using Launch = cudaError_t (*)(const std::uint32_t* in, std::uint32_t* out);
using Tests = std::map<std::string, Launch>;

const Tests& sm90_tests();
const Tests& cluster_tests();  // likewise for sm_90a only
const Tests& schedule_tests();

// Runs the kernel of that name over `in` and returns its `outputs` words. Every word that it leaves
// alone is 0xffffffff. Throws std::out_of_range for an unknown name, and what the kernel's run
// does.
std::vector<std::uint32_t> run(const std::string& name, const std::vector<std::uint32_t>& in,
                               std::size_t outputs);

}  // namespace host_sim::tests
