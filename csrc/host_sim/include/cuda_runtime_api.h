// Stands in for NVIDIA's header of that name where kernels and launchers are compiled for the host
// simulator: the parts of CUDA's C++ and runtime that they use. Put this folder before CUDA's.
#pragma once

#include <cmath>

#include "host_sim/simulator.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (host_sim::thread_index())
#define blockIdx (host_sim::block_index())
#define blockDim (host_sim::block_dim())
#define gridDim (host_sim::grid_dim())

inline void __syncthreads() { host_sim::barrier("__syncthreads"); }

using dim3 = host_sim::Dim3;
using CUstream_st = struct HostSimStream;
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidKernelImage = 200,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "an error that the simulator does not raise";
  }
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }

// A small GPU, so that every way to choose a tile is taken by small tensors.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = host_sim::capability() / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = host_sim::capability() % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:  // CUDA programming guide, technical data
      *value = 1024 * (host_sim::capability() == 80   ? 163
                       : host_sim::capability() == 90 ? 227
                                                      : 99);
      break;
    default:
      *value = 4;
      break;
  }
  return cudaSuccess;
}

// The driver's functions are those of this folder's cuda.h.
#define CUDART_VERSION 12050
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
constexpr unsigned long long cudaEnableDefault = 0;
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result);
