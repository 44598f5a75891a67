// Stands in for NVIDIA's header of that name: binary16 in software, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  std::uint16_t bits;
};

inline float __half2float(__half value) {
  // The fields moved to their places in binary32, times 2^112 for the difference of the biases:
  // exact for normal and subnormal numbers alike.
  std::uint32_t bits = (value.bits & 0x7fffu) << 13;
  float magnitude;
  std::memcpy(&magnitude, &bits, sizeof(bits));
  magnitude *= 0x1p112f;
  std::memcpy(&bits, &magnitude, sizeof(bits));
  if ((value.bits & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  bits |= (value.bits & 0x8000u) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(bits));
  return result;
}

inline __half __float2half_rn(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {0x7fff};                                       // CUDA's NaN
  if (bits >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // from 65520 on
  std::uint32_t half;
  if (bits < 0x38800000u) {
    // Below 2^-14: to a multiple of 2^-24. Adding 1/2, whose last place that is, rounds.
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(bits));
    magnitude += 0.5f;
    std::memcpy(&half, &magnitude, sizeof(half));
    half -= 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | half)};
}

struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
