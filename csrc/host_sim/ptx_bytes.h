// The functions of kernels/cuda/ptx_bytes.cuh, modelled on the host: same names, same meaning.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

namespace resnet_fused::ptx {

template <typename T>
void mma_m16n8k32(std::int32_t (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t* b);
template <>
void mma_m16n8k32<std::uint8_t>(std::int32_t (&d)[4], const std::uint32_t (&a)[4],
                                const std::uint32_t* b);
template <>
void mma_m16n8k32<std::int8_t>(std::int32_t (&d)[4], const std::uint32_t (&a)[4],
                               const std::uint32_t* b);

inline std::uint32_t pack_e4m3(const float (&v)[4]) {
  std::uint32_t all = 0;
  for (int i = 0; i < 4; ++i) all |= std::uint32_t{__nv_fp8_e4m3(v[i]).__x} << 8 * i;
  return all;
}

inline void unpack_e4m3(std::uint32_t bytes, float (&v)[4]) {
  for (int i = 0; i < 4; ++i) {
    __nv_fp8_e4m3 number;
    number.__x = static_cast<std::uint8_t>(bytes >> 8 * i);
    v[i] = static_cast<float>(number);
  }
}

}  // namespace resnet_fused::ptx
