// The functions of kernels/cuda/ptx_bytes.cuh, modelled on the host: same names, same meaning.
#pragma once

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

}  // namespace resnet_fused::ptx
