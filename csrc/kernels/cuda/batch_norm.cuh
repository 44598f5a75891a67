// Batch norm in fp32 from the live parameters, whatever type they have.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/dtype.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/tensor.h"

namespace resnet_fused {

// A batch norm as scale and shift of one channel: (value - mean) * (scale + scale_low) + shift.
struct alignas(16) ScaleShift {
  float mean = 0.0f, scale = 0.0f, scale_low = 0.0f, shift = 0.0f;
};

// scale + scale_low = weight / sqrt(var + eps), by putting back the rounding errors of the sum, the
// root and the quotient.
__device__ __forceinline__ ScaleShift scale_shift_of(float mean, float var, float weight,
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
__device__ __forceinline__ float normalise(float value, const ScaleShift& of) {
  const float difference = value - of.mean;
  if constexpr (!kExact) return fmaf(difference, of.scale, of.shift);
  const float value_part = difference + of.mean;
  const float difference_low = (value - value_part) - (of.mean - (value_part - difference));
  const float product = difference * of.scale;
  const float product_low = fmaf(difference, of.scale, -product);
  const float total = product + of.shift;
  const float product_part = total - of.shift;
  float low = (product - product_part) + (of.shift - (total - product_part)) + product_low;
  low += fmaf(difference, of.scale_low, difference_low * of.scale);
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

__device__ __forceinline__ ScaleShift scale_shift_of(const BatchNorm& bn, std::int64_t channel) {
  return scale_shift_of(parameter(bn.mean, channel, 0.0f), parameter(bn.var, channel, 1.0f),
                        parameter(bn.weight, channel, 1.0f), parameter(bn.bias, channel, 0.0f),
                        bn.eps);
}

// The sum of two batch norms as one, of value + scale_low * other: `of` of the value, `added` of
// the other, for 16-bit results. Where `of` is nothing beside `added`, its scale is taken for the
// smallest that the ratio can be computed from, which 24 bits of the sum would not show.
__device__ __forceinline__ ScaleShift sum_of(const ScaleShift& of, const ScaleShift& added) {
  constexpr float kMostRatio = 1099511627776.0f;  // 2^40
  const bool negligible = fabsf(of.scale) * kMostRatio < fabsf(added.scale);
  const float scale = negligible ? added.scale / kMostRatio : of.scale;
  const float ratio = negligible ? kMostRatio : added.scale == 0.0f ? 0.0f : added.scale / scale;
  return {fmaf(ratio, added.mean, of.mean), scale, ratio, of.shift + added.shift};
}

constexpr std::uint32_t kScaleShiftBytes = sizeof(ScaleShift);

// Scale and shift of `stored` channels from `first` on go to shared memory at `to`, zeros beyond
// the first `count`; the i-th place takes those of channel first + channel_at(i). All `threads` of
// the block, or of the warp, call it, each with its own number `thread`.
template <typename ChannelAt>
__device__ __forceinline__ void load_scale_shift(std::uint32_t to, const BatchNorm& bn,
                                                 std::int64_t first, int count, int stored,
                                                 int thread, int threads, ChannelAt channel_at) {
#pragma unroll 1
  for (int i = thread; i < stored; i += threads) {
    const std::int64_t channel = first + channel_at(i);
    ScaleShift loaded{};
    if (channel_at(i) < count) loaded = scale_shift_of(bn, channel);
    ptx::store_shared(to + i * kScaleShiftBytes, loaded);
  }
}

__device__ __forceinline__ void load_scale_shift(std::uint32_t to, const BatchNorm& bn,
                                                 std::int64_t first, int count, int stored,
                                                 int thread, int threads) {
  load_scale_shift(to, bn, first, count, stored, thread, threads, [](int i) { return i; });
}

}  // namespace resnet_fused
