// Launching a kernel that takes one structure: on a GPU, or in the host simulator; and what
// launchers compute.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#ifdef RESNET_FUSED_HOST_SIM
#include "host_sim/simulator.h"
#endif

namespace resnet_fused {

// The status of a call; clears what a failed one leaves behind for the next query.
inline cudaError_t settled(cudaError_t status) {
  if (status != cudaSuccess) static_cast<void>(cudaGetLastError());
  return status;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Whether accesses of 16 bytes may start there.
__host__ __device__ __forceinline__ bool aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

// `cluster` blocks run at once and reach each other's shared memory, of which sm_90 and later have
// up to 8; the grid is a multiple of it.
template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), dim3 grid, dim3 block, std::size_t shared_bytes,
                   cudaStream_t stream, Arguments arguments, dim3 cluster = dim3(1)) {
#ifdef RESNET_FUSED_HOST_SIM
  static_cast<void>(stream);
  host_sim::launch(grid, block, shared_bytes, [&] { kernel(arguments); }, cluster);
  return cudaSuccess;
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  constexpr std::size_t kWithoutAsking = 48 * 1024;  // of dynamic shared memory
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t status = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return settled(status);
  }
  void* parameters[] = {&arguments};
  if (cluster.x * cluster.y * cluster.z == 1) {
    return settled(cudaLaunchKernel(function, grid, block, parameters, shared_bytes, stream));
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster.x;
  attribute.val.clusterDim.y = cluster.y;
  attribute.val.clusterDim.z = cluster.z;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return settled(cudaLaunchKernelExC(&config, function, parameters));
#endif
}

}  // namespace resnet_fused
