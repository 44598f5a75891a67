// The instructions on operands of single bytes, beside those of ptx.cuh, as which they are
// modelled.
#pragma once

#include "kernels/cuda/ptx.cuh"

#ifdef RESNET_FUSED_HOST_SIM
#include "host_sim/ptx_bytes.h"
#else

namespace resnet_fused::ptx {

// "Matrix Fragments for mma.m16n8k32": d += a * b modulo 2^32, a (16, 32) by rows, of T =
// std::uint8_t or std::int8_t, b (32, 8) by columns, of std::int8_t; d (16, 8) as that of
// mma_m16n8k16. Registers hold four neighbours of a row of a, or of a column of b, the first one
// lowest:
//   a: (g, 4t), (g + 8, 4t), (g, 4t + 16), (g + 8, 4t + 16);
//   b: (4t, g), (4t + 16, g).
template <typename T>
__device__ __forceinline__ void mma_m16n8k32(std::int32_t (&d)[4], const std::uint32_t (&a)[4],
                                             const std::uint32_t* b) {
  if constexpr (std::is_same_v<T, std::uint8_t>) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, std::int8_t>);
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// "cvt", cvt.rn.satfinite.e4m3x2.f32 of sm_89 and later: e4m3 numbers, to nearest, ties to even,
// the first one lowest; what is beyond +-448 becomes that.
__device__ __forceinline__ std::uint32_t pack_e4m3(const float (&v)[4]) {
  std::uint16_t lower, upper;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(lower) : "f"(v[1]), "f"(v[0]));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(upper) : "f"(v[3]), "f"(v[2]));
  return lower | static_cast<std::uint32_t>(upper) << 16;
}

// "cvt", cvt.rn.f16x2.e4m3x2: what they stand for, which float16 holds.
__device__ __forceinline__ void unpack_e4m3(std::uint32_t bytes, float (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const auto two = static_cast<std::uint16_t>(bytes >> 8 * i);
    std::uint32_t bits;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(bits) : "h"(two));
    __half2 pair;
    memcpy(&pair, &bits, sizeof(pair));
    v[i] = __low2float(pair);
    v[i + 1] = __high2float(pair);
  }
}

}  // namespace resnet_fused::ptx

#endif  // RESNET_FUSED_HOST_SIM
