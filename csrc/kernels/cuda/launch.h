// Launch plans, and how to launch them: on a GPU, or in the host simulator.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#ifdef RESNET_FUSED_HOST_SIM
#include "host_sim/simulator.h"
#endif

namespace resnet_fused {

// The status of a call; clears what a failed one leaves behind for the next query.
inline cudaError_t take_error(cudaError_t status) {
  if (status != cudaSuccess) static_cast<void>(cudaGetLastError());
  return status;
}

// The runtime is linked statically, so it has a current device of its own to set.
inline cudaError_t set_device(int device) { return take_error(cudaSetDevice(device)); }

inline cudaError_t get_num_sms(int device, int* num_sms) {
  return take_error(cudaDeviceGetAttribute(num_sms, cudaDevAttrMultiProcessorCount, device));
}

// Whether this build holds code of sm_90a and `device` can run it (conv.cpp).
cudaError_t runs_sm90(int device, bool* runs);

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Blocks in one direction of a grid: 0, with which no plan is launched, for more than are possible.
constexpr std::int64_t kMaxGridX = 2147483647, kMaxGridY = 65535;
inline unsigned grid_size(std::int64_t blocks, std::int64_t most = kMaxGridX) {
  return blocks > most ? 0 : static_cast<unsigned>(blocks);
}

// Whether accesses of 16 bytes may start there.
__host__ __device__ __forceinline__ bool aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

struct LaunchShape {
  dim3 grid, block;
  std::size_t shared_bytes = 0;
  dim3 cluster = dim3(1);
};

// What host code computes before a launch, and can print and test without one.
template <typename Arguments>
struct LaunchPlan {
  void (*kernel)(Arguments) = nullptr;  // null: no kernel can implement this
  LaunchShape shape;
  Arguments arguments{};
};

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
  constexpr std::size_t kDefaultSharedBytes = 48 * 1024;
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t status = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return take_error(status);
  }
  void* parameters[] = {&arguments};
  if (cluster.x * cluster.y * cluster.z == 1) {
    return take_error(cudaLaunchKernel(function, grid, block, parameters, shared_bytes, stream));
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
  return take_error(cudaLaunchKernelExC(&config, function, parameters));
#endif
}

template <typename Arguments>
cudaError_t launch(const LaunchPlan<Arguments>& plan, cudaStream_t stream) {
  const LaunchShape& shape = plan.shape;
  if (plan.kernel == nullptr) return cudaErrorInvalidValue;
  if (shape.grid.x == 0 || shape.grid.y == 0) return cudaErrorInvalidConfiguration;
  return launch(plan.kernel, shape.grid, shape.block, shape.shared_bytes, stream, plan.arguments,
                shape.cluster);
}

}  // namespace resnet_fused
