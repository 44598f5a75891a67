// Stands in for NVIDIA's header of that name: e4m3 in software, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>

// 448 is the largest number; there are no infinities, and one NaN.
struct __nv_fp8_e4m3 {
  std::uint8_t __x;

  __nv_fp8_e4m3() = default;
  explicit __nv_fp8_e4m3(float value) : __x(std::signbit(value) ? 0x80 : 0) {
    const float magnitude = std::fabs(value);
    if (!(magnitude < 448.0f)) {
      __x |= magnitude >= 448.0f ? 0x7e : 0x7f;
      return;
    }
    int exponent;
    std::frexp(magnitude, &exponent);
    if (magnitude < 0x1p-6f) exponent = -5;  // subnormal: eighths of 2^-6
    // 8 to 16 of the last place, to which the biased exponent is added, less the leading 8.
    const long places = std::lrint(std::ldexp(magnitude, 4 - exponent));
    __x |= static_cast<std::uint8_t>(places + 8 * (exponent + 5));
  }
  explicit operator float() const {
    const int exponent = __x >> 3 & 15, places = __x & 7;
    const float magnitude = (__x & 0x7f) == 0x7f ? NAN
                            : exponent == 0      ? std::ldexp(static_cast<float>(places), -9)
                                                 : std::ldexp(8.0f + places, exponent - 10);
    return std::copysign(magnitude, __x & 0x80 ? -1.0f : 1.0f);
  }
};
