// The element types: conversion to and from fp32, and packs that move in one access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <type_traits>

#include "kernels/cuda/tensor.h"

namespace resnet_fused {

// Calls function(T()) of the 16-bit type that `dtype` names.
template <typename Function>
auto with_half(DType dtype, Function&& function) {
  return dtype == DType::kFloat16 ? function(__half()) : function(__nv_bfloat16());
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// Rounded to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return __float2bfloat16_rn(v);
  }
}

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T value[kCount];
};

// Every value rounded as from_float does; two at a time where one instruction rounds both.
template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> pack_floats(const float (&v)[kCount]) {
  Pack<T, kCount> packed;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    if constexpr (std::is_same_v<T, float> || kCount % 2 != 0) {
      packed.value[i] = from_float<T>(v[i]);
      if (i + 1 < kCount) packed.value[i + 1] = from_float<T>(v[i + 1]);
    } else if constexpr (std::is_same_v<T, __half>) {
      const __half2 pair = __floats2half2_rn(v[i], v[i + 1]);
      memcpy(&packed.value[i], &pair, sizeof(pair));
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(v[i], v[i + 1]);
      memcpy(&packed.value[i], &pair, sizeof(pair));
    }
  }
  return packed;
}

}  // namespace resnet_fused
