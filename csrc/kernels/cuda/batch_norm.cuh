// Batch norm in fp32 from the live parameters, whatever type they have.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/tensor.h"

namespace resnet_fused {

// A batch norm's terms for one channel: (value - mean) * (scale + scale_low) + bias.
struct alignas(16) Terms {
  float mean = 0.0f, scale = 0.0f, scale_low = 0.0f, bias = 0.0f;
};

// scale + scale_low = weight / sqrt(var + eps), by putting back the rounding errors of the sum, the
// root and the quotient.
__device__ __forceinline__ Terms normalisation_terms(float mean, float var, float weight,
                                                     float bias, float eps) {
  const float sum = var + eps;
  const float var_part = sum - eps;
  const float sum_error = (var - var_part) + (eps - (sum - var_part));
  const float root = sqrtf(sum);
  const float root_error = (fmaf(-root, root, sum) + sum_error) / (2.0f * root);
  const float quotient = weight / root;
  const float correction = (fmaf(-quotient, root, weight) - quotient * root_error) / root;
  const float scale = quotient + correction;
  // Nothing is left to correct where var + eps is 0 or overflows.
  if (!(fabsf(scale) < INFINITY)) return {mean, quotient, 0.0f, bias};
  return {mean, scale, correction - (scale - quotient), bias};
}

// The mean comes off first: value * scale + (bias - mean * scale) cancels where the mean is large
// beside the deviation. For results in fp32, what each step's rounding lost is added back, so that
// the result is rounded once; 16-bit results would not show it.
template <bool kExact>
__device__ __forceinline__ float normalise(float value, const Terms& terms) {
  const float difference = value - terms.mean;
  if constexpr (!kExact) return fmaf(difference, terms.scale, terms.bias);
  const float value_part = difference + terms.mean;
  const float difference_low = (value - value_part) - (terms.mean - (value_part - difference));
  const float product = difference * terms.scale;
  const float product_low = fmaf(difference, terms.scale, -product);
  const float total = product + terms.bias;
  const float product_part = total - terms.bias;
  float low = (product - product_part) + (terms.bias - (total - product_part)) + product_low;
  low += fmaf(difference, terms.scale_low, difference_low * terms.scale);
  return low == low ? total + low : total;  // infinities leave no remainder
}

__device__ __forceinline__ float parameter(const Vector& vector, std::int64_t i, float absent) {
  if (vector.data == nullptr) return absent;
  switch (vector.dtype) {
    case DType::kFloat16:
      return to_float(ptx::load_global(static_cast<const __half*>(vector.data) + i));
    case DType::kBFloat16:
      return to_float(ptx::load_global(static_cast<const __nv_bfloat16*>(vector.data) + i));
    default:
      return ptx::load_global(static_cast<const float*>(vector.data) + i);
  }
}

constexpr std::uint32_t kTermBytes = sizeof(Terms);

__device__ __forceinline__ Terms channel_terms(const BatchNorm& bn, std::int64_t channel) {
  return normalisation_terms(parameter(bn.mean, channel, 0.0f), parameter(bn.var, channel, 1.0f),
                             parameter(bn.weight, channel, 1.0f), parameter(bn.bias, channel, 0.0f),
                             bn.eps);
}

// The terms of `stored` channels from `first` on go to shared memory at `to`, zeros after the first
// `count`; those of channel first + place(i) to the i-th place. Called by all `threads` of a block,
// each with its own number `thread`.
template <typename Place>
__device__ __forceinline__ void load_terms(std::uint32_t to, const BatchNorm& bn,
                                           std::int64_t first, int count, int stored, int thread,
                                           int threads, Place place) {
#pragma unroll 1
  for (int i = thread; i < stored; i += threads) {
    const int channel = place(i);
    ptx::store_shared(to + i * kTermBytes,
                      channel < count ? channel_terms(bn, first + channel) : Terms{});
  }
}

__device__ __forceinline__ void load_terms(std::uint32_t to, const BatchNorm& bn,
                                           std::int64_t first, int count, int stored, int thread,
                                           int threads) {
  load_terms(to, bn, first, count, stored, thread, threads, [](int i) { return i; });
}

}  // namespace resnet_fused
