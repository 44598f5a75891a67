// The instructions that only sm_90a has, beside those of ptx.cuh: bulk copies of tensors,
// mbarriers, matrix products of a warpgroup, clusters. Sections are those of NVIDIA's "Parallel
// Thread Execution ISA"; shared memory is named by byte offsets, as in ptx.cuh, but for other
// blocks', and the simulator models every function.
#pragma once

#include <cuda.h>

#include "kernels/cuda/ptx.cuh"

#ifdef RESNET_FUSED_HOST_SIM
#include "host_sim/ptx_sm90.h"
#else

namespace resnet_fused::ptx {

// "mbarrier": 8 bytes that count arrivals and bytes. A phase ends when `count` threads have arrived
// and the bytes are here that they announced; phases have parity 0, 1, 0, ...
__device__ __forceinline__ void mbarrier_init(std::uint32_t at, std::uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(count)
               : "memory");
}

// "fence.mbarrier_init": what this thread has initialised can count the bytes of bulk copies.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(std::uint32_t at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(at)) : "memory");
}

// "mbarrier.arrive.expect_tx": arrives, and announces `bytes` by bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect(std::uint32_t at, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)),
               "r"(bytes)
               : "memory");
}

// "mbarrier.try_wait.parity", until the phase of that parity has ended: the current one, or the one
// before it. Before the first phase the one of parity 1 counts as ended.
__device__ __forceinline__ void mbarrier_wait(std::uint32_t at, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra retry;\n"
      "}\n" ::"r"(shared_address(at)),
      "r"(parity)
      : "memory");
}

// "fence.proxy.async": what this thread has written to shared memory, or knows of, is what later
// asynchronous operations read.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// "cp.async.bulk.tensor": a tensor map's box from its first element's coordinates, fastest first;
// zeros where it leaves the tensor. The mbarrier counts the bytes of the whole box.
__device__ __forceinline__ void load_tile(std::uint32_t to, const CUtensorMap& map,
                                          std::uint32_t mbarrier, std::int32_t c0,
                                          std::int32_t c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(mbarrier)), "r"(c0), "r"(c1)
      : "memory");
}

__device__ __forceinline__ void load_tile(std::uint32_t to, const CUtensorMap& map,
                                          std::uint32_t mbarrier, std::int32_t c0, std::int32_t c1,
                                          std::int32_t c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(mbarrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// The same in "im2col mode", of an NHWC tensor: the map's number of pixels from (n, h, w) on,
// through its box line by line and image by image; the offsets, of a window's tap, move each.
__device__ __forceinline__ void load_pixels(std::uint32_t to, const CUtensorMap& map,
                                            std::uint32_t mbarrier, std::int32_t c, std::int32_t w,
                                            std::int32_t h, std::int32_t n, std::uint16_t offset_w,
                                            std::uint16_t offset_h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(mbarrier)), "r"(c), "r"(w), "r"(h), "r"(n), "h"(offset_w),
      "h"(offset_h)
      : "memory");
}

// The same with ".multicast::cluster": to the same offset of every block of the cluster whose
// rank's bit is set in `ranks`, where the mbarrier at the same offset counts the bytes.
__device__ __forceinline__ void load_tile_multicast(std::uint32_t to, const CUtensorMap& map,
                                                    std::uint32_t mbarrier, std::int32_t c0,
                                                    std::int32_t c1, std::uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(mbarrier)), "r"(c0), "r"(c1), "h"(ranks)
      : "memory");
}

__device__ __forceinline__ void load_tile_multicast(std::uint32_t to, const CUtensorMap& map,
                                                    std::uint32_t mbarrier, std::int32_t c0,
                                                    std::int32_t c1, std::int32_t c2,
                                                    std::uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(mbarrier)), "r"(c0), "r"(c1), "r"(c2), "h"(ranks)
      : "memory");
}

__device__ __forceinline__ void load_pixels_multicast(std::uint32_t to, const CUtensorMap& map,
                                                      std::uint32_t mbarrier, std::int32_t c,
                                                      std::int32_t w, std::int32_t h,
                                                      std::int32_t n, std::uint16_t offset_w,
                                                      std::uint16_t offset_h, std::uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8}, %9;" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(mbarrier)), "r"(c), "r"(w), "r"(h), "r"(n), "h"(offset_w),
      "h"(offset_h), "h"(ranks)
      : "memory");
}

__device__ __forceinline__ void store_tile(const CUtensorMap& map, std::uint32_t from,
                                           std::int32_t c0, std::int32_t c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
          &map),
      "r"(shared_address(from)), "r"(c0), "r"(c1)
      : "memory");
}

// "cp.async.bulk.commit_group": what this thread has stored since the last one is a group.
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// "cp.async.bulk.wait_group.read": shared memory has been read by all but the last groups.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// "Special Registers", %cluster_ctarank and %cluster_nctarank: this block's rank in its cluster, x
// first, and how many blocks there are.
__device__ __forceinline__ int cluster_rank() {
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ int cluster_size() {
  std::uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

// "barrier.cluster": all threads of the cluster arrive, and what they did before is seen by those
// that have waited. By whole warps, each wait behind its arrival.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// "mapa": the address of `offset` in the shared memory of the block of that rank, for the functions
// ..._cluster. That block must have started, which a barrier of the cluster makes sure of, and must
// not exit before it knows of the access.
__device__ __forceinline__ std::uint32_t cluster_address(std::uint32_t offset, int rank) {
  std::uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(offset)), "r"(rank));
  return address;
}

// "ld" and "st", .shared::cluster, of 4 or 16 bytes.
template <typename V>
__device__ __forceinline__ V load_cluster(std::uint32_t address) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 16);
  std::uint32_t words[sizeof(V) / 4];
  if constexpr (sizeof(V) == 16) {
    asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(words[0]) : "r"(address) : "memory");
  }
  V value;
  memcpy(&value, words, sizeof(V));
  return value;
}
template <typename V>
__device__ __forceinline__ void store_cluster(std::uint32_t address, const V& value) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 16);
  std::uint32_t words[sizeof(V) / 4];
  memcpy(words, &value, sizeof(V));
  if constexpr (sizeof(V) == 16) {
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  } else {
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address), "r"(words[0]) : "memory");
  }
}

// "mbarrier.arrive" at an mbarrier of any block of the cluster, with a release of a block's scope:
// what this thread has read may be overwritten, but another block need not see what it wrote.
__device__ __forceinline__ void mbarrier_arrive_cluster(std::uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}

// The same with the cluster's scope, and a wait for such arrivals: what the one wrote, the other
// sees. A release of that scope is a fence of the whole GPU's in machine code.
__device__ __forceinline__ void mbarrier_publish_cluster(std::uint32_t address) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(address)
               : "memory");
}
__device__ __forceinline__ void mbarrier_wait_cluster(std::uint32_t at, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra retry;\n"
      "}\n" ::"r"(shared_address(at)),
      "r"(parity)
      : "memory");
}

// "barrier", bar.sync: waits until `threads` threads, whole warps, have come to barrier `number`.
__device__ __forceinline__ void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// How many registers a thread has at launch: as many as __launch_bounds__ leaves, which the
// compiler gives to kernels that use setmaxnreg. For the simulator, which does not see them.
template <int kRegisters>
__device__ __forceinline__ void registers_at_launch() {}

// "setmaxnreg", by all warps of a warpgroup: registers a thread, a multiple of 8 from 24 to 256. A
// claim waits until other warpgroups of the block have released what it takes.
template <int kRegisters>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Keeps the compiler from moving uses of these registers to the other side.
template <int kValues>
__device__ __forceinline__ void pin(float (&d)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// "wgmma.fence": before the first product into these registers, and after any use of them.
template <int kValues>
__device__ __forceinline__ void wgmma_fence(float (&d)[kValues]) {
  pin(d);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// "wgmma.mma_async", m64nNk16 with N = 2 * kValues: d = a * b, plus d where `accumulate`; a (64,
// 16) and b (N, 16) lie in shared memory by rows. With g = lane / 4 and t = lane % 4, warp w of the
// warpgroup holds in values 4 j to 4 j + 3 of d: row 16 w + g, columns 8 j + 2 t and the next, then
// the same of row 16 w + g + 8. T = __half or __nv_bfloat16.
#define RESNET_FUSED_WGMMA_N64(type)                                                               \
  asm volatile(                                                                                    \
      "{\n"                                                                                        \
      ".reg .pred p;\n"                                                                            \
      "setp.ne.b32 p, %34, 0;\n"                                                                   \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                  \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, "                                                           \
      "%8, %9, %10, %11, %12, %13, %14, %15, "                                                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, "                                                   \
      "%24, %25, %26, %27, %28, %29, %30, %31}, "                                                  \
      "%32, %33, p, 1, 1, 0, 0;\n"                                                                 \
      "}\n"                                                                                        \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),        \
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),    \
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), \
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                         \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

#define RESNET_FUSED_WGMMA_N128(type)                                                              \
  asm volatile(                                                                                    \
      "{\n"                                                                                        \
      ".reg .pred p;\n"                                                                            \
      "setp.ne.b32 p, %66, 0;\n"                                                                   \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                 \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, "                                                           \
      "%8, %9, %10, %11, %12, %13, %14, %15, "                                                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, "                                                   \
      "%24, %25, %26, %27, %28, %29, %30, %31, "                                                   \
      "%32, %33, %34, %35, %36, %37, %38, %39, "                                                   \
      "%40, %41, %42, %43, %44, %45, %46, %47, "                                                   \
      "%48, %49, %50, %51, %52, %53, %54, %55, "                                                   \
      "%56, %57, %58, %59, %60, %61, %62, %63}, "                                                  \
      "%64, %65, p, 1, 1, 0, 0;\n"                                                                 \
      "}\n"                                                                                        \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),        \
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),    \
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), \
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), \
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), \
        "+f"(d[63])                                                                                \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

template <typename T, int kValues>
__device__ __forceinline__ void wgmma(float (&d)[kValues], std::uint64_t a, std::uint64_t b,
                                      bool accumulate) {
  static_assert(kValues == 32 || kValues == 64);
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kHalf || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (kValues == 32 && kHalf) {
    RESNET_FUSED_WGMMA_N64("f16");
  } else if constexpr (kValues == 32) {
    RESNET_FUSED_WGMMA_N64("bf16");
  } else if constexpr (kHalf) {
    RESNET_FUSED_WGMMA_N128("f16");
  } else {
    RESNET_FUSED_WGMMA_N128("bf16");
  }
}

#undef RESNET_FUSED_WGMMA_N64
#undef RESNET_FUSED_WGMMA_N128

// "wgmma.commit_group": the warpgroup's products since the last one are a group.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// "wgmma.wait_group": all but the last groups are complete; d may be used if its own are.
template <int kPending, int kValues>
__device__ __forceinline__ void wgmma_wait(float (&d)[kValues]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  pin(d);
}

}  // namespace resnet_fused::ptx

#endif  // RESNET_FUSED_HOST_SIM

namespace resnet_fused::ptx {

// "Matrix Descriptor Format" of an operand of wgmma: rows of kRowBytes (128, 64 or 32), one behind
// the other, whose 16-byte chunks are permuted as a tensor map's swizzle of that many bytes does.
// `offset` names the first row, plus 32 bytes for each 16 elements of depth. The pattern repeats
// after 8 rows; `base_offset` is 0 where it counts them from an address that is a multiple of that,
// as bulk copies do, and otherwise the 128-byte row, modulo 8, from which it does.
template <int kRowBytes = 128>
__device__ __forceinline__ std::uint64_t matrix_descriptor(std::uint32_t offset,
                                                           std::uint32_t base_offset = 0) {
  static_assert(kRowBytes == 128 || kRowBytes == 64 || kRowBytes == 32);
  constexpr std::uint64_t kSwizzle = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
  constexpr std::uint64_t kEightRows = 8 * kRowBytes >> 4;  // stride byte offset
  constexpr std::uint64_t kLeading = 1;                     // unused with a swizzle
  return kSwizzle << 62 | std::uint64_t{base_offset} << 49 | kEightRows << 32 | kLeading << 16 |
         (shared_address(offset) & 0x3ffff) >> 4;
}

}  // namespace resnet_fused::ptx
