// The instructions that the kernels use beyond plain C++. All PTX is here, for products of bytes in
// ptx_bytes.cuh and, for what only sm_90a has, in ptx_sm90.cuh.
//
// Quoted are the sections of NVIDIA's "Parallel Thread Execution ISA", whose numbers change between
// versions; those on data movement begin "Data Movement and Conversion Instructions". Shared memory
// is named by byte offsets into the block's dynamic shared memory, and every access goes through
// these functions, so that a kernel compiled against csrc/host_sim runs with each of its accesses
// checked.
#pragma once

#ifdef RESNET_FUSED_HOST_SIM
#include "host_sim/ptx.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace resnet_fused::ptx {

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char arena[];
  return arena;
}

// The address that instructions take ("Shared State Space").
__device__ __forceinline__ std::uint32_t shared_address(std::uint32_t offset) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared_memory())) + offset;
}

// Plain accesses of 2, 4, 8 or 16 bytes, aligned to their size.
template <typename V>
__device__ __forceinline__ V load_shared(std::uint32_t offset) {
  return *reinterpret_cast<const V*>(shared_memory() + offset);
}

template <typename V>
__device__ __forceinline__ void store_shared(std::uint32_t offset, const V& value) {
  *reinterpret_cast<V*>(shared_memory() + offset) = value;
}

template <typename V>
__device__ __forceinline__ V load_global(const V* from) {
  return *from;
}

// "st", spelled out for 16 bytes because the compiler splits such a store of 16-bit elements.
template <typename V>
__device__ __forceinline__ void store_global(V* to, const V& value) {
  if constexpr (sizeof(V) == 16) {
    uint4 bits;
    memcpy(&bits, &value, sizeof(bits));
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
  } else {
    *to = value;
  }
}

// "cp.async": 16 bytes from global to shared memory, past L1; zeros and no access to
// global memory where `valid` is false. Both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(std::uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
               : "memory");
}

// "cp.async.commit_group": what this thread has issued since the last one is a group.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// "cp.async.wait_group": all but this thread's `kPending` latest groups have landed.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// "shfl.sync", mode .bfly: what lane `lane ^ mask` of the warp hands in.
__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The same, mode .idx: what lane `lane` hands in.
__device__ __forceinline__ std::uint32_t shuffle(std::uint32_t value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// "max", max.NaN.f32: NaN where one of both is, as in PyTorch's ReLU.
__device__ __forceinline__ float max_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// The same of two 16-bit numbers each, max.NaN.f16x2 or max.NaN.bf16x2.
template <typename T>
__device__ __forceinline__ std::uint32_t max_nan_pair(std::uint32_t a, std::uint32_t b) {
  std::uint32_t larger;
  if constexpr (std::is_same_v<T, __half>) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  }
  return larger;
}

// "set", set.gt.u32.f16x2 or set.gt.u32.bf16x2: ones for each of two 16-bit numbers above zero,
// which NaN is not.
template <typename T>
__device__ __forceinline__ std::uint32_t positive_pair(std::uint32_t pair) {
  std::uint32_t ones;
  if constexpr (std::is_same_v<T, __half>) {
    asm("set.gt.u32.f16x2 %0, %1, %2;" : "=r"(ones) : "r"(pair), "r"(0));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm("set.gt.u32.bf16x2 %0, %1, %2;" : "=r"(ones) : "r"(pair), "r"(0));
  }
  return ones;
}

// "cvt", cvt.rni.s32.f32: the nearest integer, ties to even.
__device__ __forceinline__ std::int32_t round_to_int(float value) { return __float2int_rn(value); }

// "mul", mul.rn.f32: a product that no addition is fused with.
__device__ __forceinline__ float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }

// "prmt": byte number `byte` of `bytes`, added to 2^23.
__device__ __forceinline__ float float_behind_exponent(std::uint32_t bytes, int byte) {
  return __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440u + byte));
}

// "cvt.pack", cvt.pack.sat: integers as bytes of T = std::uint8_t or std::int8_t, each limited to
// that type's range, the first one lowest.
template <typename T>
__device__ __forceinline__ std::uint32_t pack_saturated(const std::int32_t (&v)[4]) {
  std::uint32_t upper, all;
  if constexpr (std::is_same_v<T, std::uint8_t>) {
    asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, 0;" : "=r"(upper) : "r"(v[3]), "r"(v[2]));
    asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;" : "=r"(all) : "r"(v[1]), "r"(v[0]), "r"(upper));
  } else {
    static_assert(std::is_same_v<T, std::int8_t>);
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;" : "=r"(upper) : "r"(v[3]), "r"(v[2]));
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(all) : "r"(v[1]), "r"(v[0]), "r"(upper));
  }
  return all;
}

// "griddepcontrol" of sm_90 and later, for a kernel whose LaunchShape overlaps: lets the stream's
// next kernel begin where there is room, then waits until all before this one have ended and what
// they wrote is here. Every thread calls it before its first access to global memory.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory");
#endif
}

// A value that all lanes of the warp have, known as such to the compiler.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// "Warp-level matrix load instruction: ldmatrix": four 8x8 matrices of 16-bit elements. Lane l
// names row l % 8 of matrix l / 8 and receives, of each matrix, elements 2 * (l % 4) and the next
// of row l / 4.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&to)[4], std::uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// "Matrix Fragments for mma.m16n8k16 with floating point type": d += a * b, a (16, 16) by rows, b
// (16, 8) by columns, of T = __half or __nv_bfloat16; d (16, 8) in fp32. With g = lane / 4 and t =
// lane % 4, registers hold
//   a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its right neighbour;
//   b: (2t, g), (2t + 8, g), each with the one below;
//   d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4],
                                             const std::uint32_t* b) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// "cvt", cvt.rna.tf32.f32: the fp32 number with those bits, rounded to the nearest one that has 10
// bits behind the point, ties away from zero.
__device__ __forceinline__ std::uint32_t round_to_tf32(std::uint32_t bits) {
  std::uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// "Matrix Fragments for mma.m16n8k8" of .tf32: d += a * b, a (16, 8) by rows, b (8, 8) by columns,
// of TF32 numbers; d as above. Registers hold
//   a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);
//   b: (t, g), (t + 4, g).
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const std::uint32_t (&a)[4],
                                            const std::uint32_t* b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace resnet_fused::ptx

#endif  // RESNET_FUSED_HOST_SIM
