// The functions of kernels/cuda/ptx.cuh, modelled on the host: same names, same meaning.
//
// Memory accesses are checked by the simulator. The PTX ISA leaves open in which order and with
// which intermediate precision mma adds; here each product is exact and added to the fp32
// accumulator in order of depth, rounded to nearest.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "host_sim/simulator.h"

namespace resnet_fused::ptx {

template <typename V>
V load_shared(std::uint32_t offset) {
  V value;
  std::memcpy(&value, host_sim::shared_to_read(offset, sizeof(V)), sizeof(V));
  return value;
}

template <typename V>
void store_shared(std::uint32_t offset, const V& value) {
  std::memcpy(host_sim::shared_to_write(offset, sizeof(V)), &value, sizeof(V));
}

template <typename V>
V load_global(const V* from) {
  V value;
  std::memcpy(&value, host_sim::global_to_read(from, sizeof(V)), sizeof(V));
  return value;
}

template <typename V>
void store_global(V* to, const V& value) {
  std::memcpy(host_sim::global_to_write(to, sizeof(V)), &value, sizeof(V));
}

inline void cp_async_16(std::uint32_t to, const void* from, bool valid) {
  host_sim::copy_async(to, from, 16, valid ? 16 : 0);
}

inline void cp_async_commit() { host_sim::commit_copies(); }

template <int kPending>
void cp_async_wait() {
  host_sim::wait_for_copies(kPending);
}

float shuffle_xor(float value, int mask);

std::uint32_t shuffle(std::uint32_t value, int lane);

inline float max_nan(float a, float b) { return a != a || a > b ? a : b; }

template <typename T>
std::uint32_t max_nan_pair(std::uint32_t a, std::uint32_t b);
template <typename T>
std::uint32_t positive_pair(std::uint32_t pair);

inline std::int32_t round_to_int(float value) {
  constexpr float kMost = 2147483648.0f;
  const long long nearest = std::llrintf(std::clamp(value, -kMost, kMost));
  return static_cast<std::int32_t>(std::min(nearest, 2147483647LL));
}

inline float multiply_rounded(float a, float b) { return a * b; }

inline float float_behind_exponent(std::uint32_t bytes, int byte) {
  return 8388608.0f + static_cast<float>(bytes >> 8 * byte & 0xff);
}

template <typename T>
std::uint32_t pack_saturated(const std::int32_t (&v)[4]) {
  using Limits = std::numeric_limits<T>;
  std::uint32_t all = 0;
  for (int i = 0; i < 4; ++i) {
    const auto byte = std::clamp<std::int32_t>(v[i], Limits::min(), Limits::max()) & 0xff;
    all |= static_cast<std::uint32_t>(byte) << 8 * i;
  }
  return all;
}

inline void wait_for_earlier_kernels() { host_sim::wait_for_earlier_kernels(); }

inline int uniform(int value) { return value; }

void ldmatrix_x4(std::uint32_t (&to)[4], std::uint32_t row);

template <typename T>
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t* b);
template <>
void mma_m16n8k16<__half>(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t* b);
template <>
void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const std::uint32_t (&a)[4],
                                 const std::uint32_t* b);

inline std::uint32_t round_to_tf32(std::uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;  // the instruction's NaN
  return (bits + 0x1000u) & ~0x1fffu;
}
// Operands that are not rounded are a Fault.
void mma_m16n8k8(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t* b);

}  // namespace resnet_fused::ptx
