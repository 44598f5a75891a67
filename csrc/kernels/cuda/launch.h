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

// Whether this build holds code of sm_90a and `device` can run it.
inline cudaError_t runs_sm90(int device, bool* runs) {
#ifdef RESNET_FUSED_SM90
  int major = 0, minor = 0;
  cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return take_error(status);
  status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status != cudaSuccess) return take_error(status);
  *runs = major == 9 && minor == 0;
#else
  static_cast<void>(device);
  *runs = false;
#endif
  return cudaSuccess;
}

// What kernels are chosen by.
struct Machine {
  int num_sms = 0;
  bool sm90 = false;  // as runs_sm90 says
};

inline cudaError_t query(int device, Machine* machine) {
  const cudaError_t status = runs_sm90(device, &machine->sm90);
  return status == cudaSuccess ? get_num_sms(device, &machine->num_sms) : status;
}

// The same, and leaves `device` current.
inline cudaError_t set_device(int device, Machine* machine) {
  const cudaError_t status = set_device(device);
  return status == cudaSuccess ? query(device, machine) : status;
}

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
  bool overlaps = false;  // may begin, on sm_90, before what it waits for in the kernel has ended
};

// Blocks, or clusters of so many of them, that take jobs by turns: no more than jobs, nor than
// `most`.
inline LaunchShape persistent_shape(unsigned jobs, int most, int threads, std::size_t shared_bytes,
                                    unsigned cluster = 1) {
  const unsigned clusters = jobs < static_cast<unsigned>(most) ? jobs : most;
  return {dim3(clusters * cluster), dim3(threads), shared_bytes, dim3(cluster), true};
}

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
cudaError_t launch(void (*kernel)(Arguments), const LaunchShape& shape, cudaStream_t stream,
                   Arguments arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0) return cudaErrorInvalidConfiguration;
#ifdef RESNET_FUSED_HOST_SIM
  static_cast<void>(stream);
  host_sim::launch(
      shape.grid, shape.block, shape.shared_bytes, [&] { kernel(arguments); }, shape.cluster,
      shape.overlaps);
  return cudaSuccess;
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  constexpr std::size_t kDefaultSharedBytes = 48 * 1024;
  if (shape.shared_bytes > kDefaultSharedBytes) {
    const cudaError_t status =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shape.shared_bytes));
    if (status != cudaSuccess) return take_error(status);
  }
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (shape.cluster.x * shape.cluster.y * shape.cluster.z > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster.x;
    attribute.val.clusterDim.y = shape.cluster.y;
    attribute.val.clusterDim.z = shape.cluster.z;
  }
  if (shape.overlaps) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  void* parameters[] = {&arguments};
  return take_error(cudaLaunchKernelExC(&config, function, parameters));
#endif
}

template <typename Arguments>
cudaError_t launch(const LaunchPlan<Arguments>& plan, cudaStream_t stream) {
  if (plan.kernel == nullptr) return cudaErrorInvalidValue;
  return launch(plan.kernel, plan.shape, stream, plan.arguments);
}

}  // namespace resnet_fused
