// The instructions that only sm_90a has, beside those of ptx.cuh: bulk copies of tensors,
// mbarriers, matrix products of a warpgroup, clusters. libcu++'s cuda::ptx (CUDA 12.5 and later)
// spells those that it has; the others are written out. Sections are those of NVIDIA's "Parallel
// Thread Execution ISA"; shared memory is named by byte offsets, as in ptx.cuh, but for other
// blocks', and the simulator models every function.
#pragma once

#include <cuda.h>
#include <cuda_fp8.h>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/spin_limit.h"

#ifdef RESNET_FUSED_HOST_SIM
#include "host_sim/ptx_sm90.h"
#else

#include <cuda/ptx>

namespace resnet_fused::ptx {

namespace cu = ::cuda::ptx;

__device__ __forceinline__ std::uint64_t* mbarrier_at(std::uint32_t offset) {
  return reinterpret_cast<std::uint64_t*>(shared_memory() + offset);
}

// "mbarrier": 8 bytes that count arrivals and bytes. A phase ends when `count` threads have arrived
// and the bytes are here that they announced; phases have parity 0, 1, 0, ...
__device__ __forceinline__ void mbarrier_init(std::uint32_t at, std::uint32_t count) {
  cu::mbarrier_init(mbarrier_at(at), count);
}

// "fence.mbarrier_init": what this thread has initialised can count the bytes of bulk copies.
__device__ __forceinline__ void fence_mbarrier_init() {
  cu::fence_mbarrier_init(cu::sem_release, cu::scope_cluster);
}

__device__ __forceinline__ void mbarrier_arrive(std::uint32_t at) {
  cu::mbarrier_arrive(mbarrier_at(at));
}

// "mbarrier.arrive.expect_tx": arrives, and announces `bytes` by bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect(std::uint32_t at, std::uint32_t bytes) {
  cu::mbarrier_arrive_expect_tx(cu::sem_release, cu::scope_cta, cu::space_shared, mbarrier_at(at),
                                bytes);
}

// "mbarrier.try_wait.parity", until the phase of that parity has ended: the current one, or the one
// before it. Before the first phase the one of parity 1 counts as ended. False if it has not ended
// after the limit's tries; nothing is counted where the first one succeeds.
__device__ __forceinline__ bool mbarrier_wait(std::uint32_t at, std::uint32_t parity,
                                              const SpinLimit& limit = {}) {
  if (cu::mbarrier_try_wait_parity(mbarrier_at(at), parity)) return true;
  std::uint32_t left = limit.tries;
  while (!cu::mbarrier_try_wait_parity(mbarrier_at(at), parity)) {
    left -= limit.step;
    if (left == 0) return false;
  }
  return true;
}

// Leaves a record for the host, and ends the kernel with an error.
__device__ __forceinline__ void give_up(const SpinLimit& limit, const StuckBarrier& stuck) {
  store_global(limit.record, stuck);
  cu::fence(cu::sem_acq_rel, cu::scope_sys);
  asm volatile("trap; exit;");
}

// "fence.proxy.async": what this thread has written to shared memory, or knows of, is what later
// asynchronous operations read.
__device__ __forceinline__ void fence_proxy_async() { cu::fence_proxy_async(cu::space_shared); }

// "cp.async.bulk.tensor": a tensor map's box from its first element's coordinates, fastest first;
// zeros where it leaves the tensor. The mbarrier counts the bytes of the whole box.
template <int kDimensions>
__device__ __forceinline__ void load_tile(std::uint32_t to, const CUtensorMap& map,
                                          std::uint32_t mbarrier,
                                          const std::int32_t (&at)[kDimensions]) {
  cu::cp_async_bulk_tensor(cu::space_cluster, cu::space_global, shared_memory() + to, &map, at,
                           mbarrier_at(mbarrier));
}

// The same in "im2col mode", of an NHWC tensor: the map's number of pixels from (n, h, w) on,
// through its box line by line and image by image; the offsets, of a window's tap, move each. `at`
// is (c, w, h, n), and `offset` (w, h).
__device__ __forceinline__ void load_pixels(std::uint32_t to, const CUtensorMap& map,
                                            std::uint32_t mbarrier, const std::int32_t (&at)[4],
                                            const std::uint16_t (&offset)[2]) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(mbarrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
      "h"(offset[0]), "h"(offset[1])
      : "memory");
}

// The same with ".multicast::cluster": to the same offset of every block of the cluster whose
// rank's bit is set in `ranks`, where the mbarrier at the same offset counts the bytes.
template <int kDimensions>
__device__ __forceinline__ void load_tile_multicast(std::uint32_t to, const CUtensorMap& map,
                                                    std::uint32_t mbarrier,
                                                    const std::int32_t (&at)[kDimensions],
                                                    std::uint16_t ranks) {
  cu::cp_async_bulk_tensor(cu::space_cluster, cu::space_global, shared_memory() + to, &map, at,
                           mbarrier_at(mbarrier), ranks);
}

__device__ __forceinline__ void load_pixels_multicast(std::uint32_t to, const CUtensorMap& map,
                                                      std::uint32_t mbarrier,
                                                      const std::int32_t (&at)[4],
                                                      const std::uint16_t (&offset)[2],
                                                      std::uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8}, %9;" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(mbarrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
      "h"(offset[0]), "h"(offset[1]), "h"(ranks)
      : "memory");
}

// The other way: elements outside the tensor are left out.
template <int kDimensions>
__device__ __forceinline__ void store_tile(const CUtensorMap& map, std::uint32_t from,
                                           const std::int32_t (&at)[kDimensions]) {
  cu::cp_async_bulk_tensor(cu::space_global, cu::space_shared, &map, at, shared_memory() + from);
}

// The same in "im2col_no_offs mode", the pixels of load_pixels without a tap's offsets.
__device__ __forceinline__ void store_pixels(const CUtensorMap& map, std::uint32_t from,
                                             const std::int32_t (&at)[4]) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.im2col_no_offs.bulk_group "
      "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
      "r"(shared_address(from)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
      : "memory");
}

// "cp.async.bulk.commit_group": what this thread has stored since the last one is a group.
__device__ __forceinline__ void bulk_commit() { cu::cp_async_bulk_commit_group(); }

// "cp.async.bulk.wait_group.read": shared memory has been read by all but the last groups.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  cu::cp_async_bulk_wait_group_read(cu::n32_t<kPending>());
}

// "Special Registers", %cluster_ctarank and %cluster_nctarank: this block's rank in its cluster, x
// first, and how many blocks there are.
__device__ __forceinline__ int cluster_rank() {
  return static_cast<int>(cu::get_sreg_cluster_ctarank());
}
__device__ __forceinline__ int cluster_size() {
  return static_cast<int>(cu::get_sreg_cluster_nctarank());
}

// "barrier.cluster": all threads of the cluster arrive, and what they did before is seen by those
// that have waited. By whole warps, each wait behind its arrival.
__device__ __forceinline__ void cluster_arrive() { cu::barrier_cluster_arrive(cu::sem_release); }
__device__ __forceinline__ void cluster_wait() { cu::barrier_cluster_wait(cu::sem_acquire); }

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
  while (
      !cu::mbarrier_try_wait_parity(cu::sem_acquire, cu::scope_cluster, mbarrier_at(at), parity)) {
  }
}

// "barrier", bar.sync: waits until `threads` threads, whole warps, have come to barrier `number`.
__device__ __forceinline__ void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// "ldmatrix" and "stmatrix", .trans: two or four 8x8 matrices of 16-bit elements. Lane l names row
// l % 8 of matrix l / 8, 16 bytes, and holds, of each matrix, elements l / 4 of rows 2 * (l % 4)
// and the next: the rows in shared memory are the columns of what lanes hold as wgmma's D.
template <int kMatrices>
__device__ __forceinline__ void ldmatrix_trans(std::uint32_t (&to)[kMatrices], std::uint32_t row) {
  static_assert(kMatrices == 2 || kMatrices == 4);
  if constexpr (kMatrices == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(shared_address(row))
                 : "memory");
  }
}
template <int kMatrices>
__device__ __forceinline__ void stmatrix_trans(std::uint32_t row,
                                               const std::uint32_t (&from)[kMatrices]) {
  static_assert(kMatrices == 2 || kMatrices == 4);
  if constexpr (kMatrices == 4) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(row)),
                 "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
  } else {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
        "r"(from[0]), "r"(from[1])
        : "memory");
  }
}

// How many registers a thread has at launch: as many as __launch_bounds__ leaves, which the
// compiler gives to kernels that use setmaxnreg. For the simulator, which does not see them.
template <int kRegisters>
__device__ __forceinline__ void registers_at_launch() {}

// "setmaxnreg", by all warps of a warpgroup: registers a thread, a multiple of 8 from 24 to 256. To
// have more, it waits until other warpgroups of the block do with fewer.
template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Keeps the compiler from moving uses of these registers to the other side.
template <int kValues>
__device__ __forceinline__ void pin(float (&d)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kProducts, int kValues>
__device__ __forceinline__ void pin(float (&d)[kProducts][kValues]) {
#pragma unroll
  for (int i = 0; i < kProducts; ++i) pin(d[i]);
}
template <typename Word, int kProducts, int kValues>
__device__ __forceinline__ void pin(Word (&a)[kProducts][kValues]) {
#pragma unroll
  for (int i = 0; i < kProducts * kValues; ++i) {
    asm volatile("" : "+r"(a[i / kValues][i % kValues])::"memory");
  }
}

// "wgmma.fence": before the first product into or of these registers, and after any use of them. D
// is an array of floats, or of such arrays, or one of `a` operands.
template <typename D>
__device__ __forceinline__ void wgmma_fence(D& d) {
  pin(d);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// "wgmma.mma_async", m64nNk16 with N = 2 * kValues: d = a * b, plus d where `accumulate`; a (64,
// 16) and b (N, 16) lie in shared memory by rows. With g = lane / 4 and t = lane % 4, warp w of the
// warpgroup holds in values 4 j to 4 j + 3 of d: row 16 w + g, columns 8 j + 2 t and the next, then
// the same of row 16 w + g + 8. T = __half or __nv_bfloat16.
// clang-format off
// One instruction string for every N: RF_Dt lists values 1 to 10 t - 1 of d, RF_Pk then 10 t to
// 10 t + k - 1, in which RF_S writes a value's number and RF_O binds it to its register. `type` is
// that of the operands and which of them are transposed.
#define RF_TYPE(type, transposed) type
#define RF_TRANSPOSED(type, transposed) transposed
#define RF_S(i) ", %" #i
#define RF_O(i) , "+f"(d[i])
#define RF_P0(F, t)
#define RF_P2(F, t) F(t##0) F(t##1)
#define RF_P4(F, t) RF_P2(F, t) F(t##2) F(t##3)
#define RF_P6(F, t) RF_P4(F, t) F(t##4) F(t##5)
#define RF_P8(F, t) RF_P6(F, t) F(t##6) F(t##7)
#define RF_P10(F, t) RF_P8(F, t) F(t##8) F(t##9)
#define RF_L4(F) F(1) F(2) F(3)
#define RF_L8(F) RF_L4(F) F(4) F(5) F(6) F(7)
#define RF_D1(F) RF_L8(F) F(8) F(9)
#define RF_D2(F) RF_D1(F) RF_P10(F, 1)
#define RF_D3(F) RF_D2(F) RF_P10(F, 2)
#define RF_D4(F) RF_D3(F) RF_P10(F, 3)
#define RF_D5(F) RF_D4(F) RF_P10(F, 4)
#define RF_D6(F) RF_D5(F) RF_P10(F, 5)
#define RF_D7(F) RF_D6(F) RF_P10(F, 6)
#define RF_D8(F) RF_D7(F) RF_P10(F, 7)
#define RF_D9(F) RF_D8(F) RF_P10(F, 8)
#define RF_D10(F) RF_D9(F) RF_P10(F, 9)
#define RF_D11(F) RF_D10(F) RF_P10(F, 10)
#define RF_D12(F) RF_D11(F) RF_P10(F, 11)
#define RF_WGMMA(type, N, count, next, last, D, P, t)                                 \
  if constexpr (kValues == count) {                                                   \
    asm volatile(                                                                     \
        "{\n"                                                                         \
        ".reg .pred p;\n"                                                             \
        "setp.ne.b32 p, %" #last ", 0;\n"                                             \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." RF_TYPE type "."            \
        RF_TYPE type " {%0" D(RF_S) P(RF_S, t) "}, %" #count ", %" #next               \
        ", p, 1, 1, " RF_TRANSPOSED type ";\n"                                        \
        "}\n"                                                                         \
        : "+f"(d[0]) D(RF_O) P(RF_O, t)                                               \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                         \
  }
#define RF_WGMMA_OF(type) \
  RF_WGMMA(type, 8, 4, 5, 6, RF_L4, RF_P0, ) \
  RF_WGMMA(type, 16, 8, 9, 10, RF_L8, RF_P0, ) \
  RF_WGMMA(type, 24, 12, 13, 14, RF_D1, RF_P2, 1) \
  RF_WGMMA(type, 32, 16, 17, 18, RF_D1, RF_P6, 1) \
  RF_WGMMA(type, 40, 20, 21, 22, RF_D2, RF_P0, ) \
  RF_WGMMA(type, 48, 24, 25, 26, RF_D2, RF_P4, 2) \
  RF_WGMMA(type, 56, 28, 29, 30, RF_D2, RF_P8, 2) \
  RF_WGMMA(type, 64, 32, 33, 34, RF_D3, RF_P2, 3) \
  RF_WGMMA(type, 72, 36, 37, 38, RF_D3, RF_P6, 3) \
  RF_WGMMA(type, 80, 40, 41, 42, RF_D4, RF_P0, ) \
  RF_WGMMA(type, 88, 44, 45, 46, RF_D4, RF_P4, 4) \
  RF_WGMMA(type, 96, 48, 49, 50, RF_D4, RF_P8, 4) \
  RF_WGMMA(type, 104, 52, 53, 54, RF_D5, RF_P2, 5) \
  RF_WGMMA(type, 112, 56, 57, 58, RF_D5, RF_P6, 5) \
  RF_WGMMA(type, 120, 60, 61, 62, RF_D6, RF_P0, ) \
  RF_WGMMA(type, 128, 64, 65, 66, RF_D6, RF_P4, 6) \
  RF_WGMMA(type, 136, 68, 69, 70, RF_D6, RF_P8, 6) \
  RF_WGMMA(type, 144, 72, 73, 74, RF_D7, RF_P2, 7) \
  RF_WGMMA(type, 152, 76, 77, 78, RF_D7, RF_P6, 7) \
  RF_WGMMA(type, 160, 80, 81, 82, RF_D8, RF_P0, ) \
  RF_WGMMA(type, 168, 84, 85, 86, RF_D8, RF_P4, 8) \
  RF_WGMMA(type, 176, 88, 89, 90, RF_D8, RF_P8, 8) \
  RF_WGMMA(type, 184, 92, 93, 94, RF_D9, RF_P2, 9) \
  RF_WGMMA(type, 192, 96, 97, 98, RF_D9, RF_P6, 9) \
  RF_WGMMA(type, 200, 100, 101, 102, RF_D10, RF_P0, ) \
  RF_WGMMA(type, 208, 104, 105, 106, RF_D10, RF_P4, 10) \
  RF_WGMMA(type, 216, 108, 109, 110, RF_D10, RF_P8, 10) \
  RF_WGMMA(type, 224, 112, 113, 114, RF_D11, RF_P2, 11) \
  RF_WGMMA(type, 232, 116, 117, 118, RF_D11, RF_P6, 11) \
  RF_WGMMA(type, 240, 120, 121, 122, RF_D12, RF_P0, ) \
  RF_WGMMA(type, 248, 124, 125, 126, RF_D12, RF_P4, 12) \
  RF_WGMMA(type, 256, 128, 129, 130, RF_D12, RF_P8, 12)
#define RF_I(i) , "+r"(d[i])
#define RF_WGMMA_BYTES(types, scales, R, O, N, count, next, last, D, P, t)              \
  if constexpr (kValues == count) {                                                    \
    asm volatile(                                                                      \
        "{\n"                                                                          \
        ".reg .pred p;\n"                                                              \
        "setp.ne.b32 p, %" #last ", 0;\n"                                              \
        "wgmma.mma_async.sync.aligned.m64n" #N "k32." types " {%0" D(RF_S) P(RF_S, t)   \
        "}, %" #count ", %" #next ", p" scales ";\n"                                   \
        "}\n"                                                                          \
        : R(d[0]) D(O) P(O, t)                                                         \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                          \
  }
#define RF_WGMMA_BYTES_OF(types, scales, R, O) \
  RF_WGMMA_BYTES(types, scales, R, O, 64, 32, 33, 34, RF_D3, RF_P2, 3) \
  RF_WGMMA_BYTES(types, scales, R, O, 128, 64, 65, 66, RF_D6, RF_P4, 6) \
  RF_WGMMA_BYTES(types, scales, R, O, 256, 128, 129, 130, RF_D12, RF_P8, 12)
// clang-format on

// A transposed operand lies by columns: of a (16, 64), of b (16, N), as transposed_descriptor says.
// Of T = __nv_fp8_e4m3 it is m64nNk32 with N = 64, 128 or 256, and sums keep but 13 bits behind the
// point, the rest is cut off (arXiv 2412.19437, 3.3.2; arXiv 2505.09343, 3.1.1).
template <typename T, bool kTransposedA = false, bool kTransposedB = false, int kValues>
__device__ __forceinline__ void wgmma(float (&d)[kValues], std::uint64_t a, std::uint64_t b,
                                      bool accumulate) {
  static_assert(kValues % 4 == 0 && kValues >= 4 && kValues <= 128);
  if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) {
    static_assert(!kTransposedA && !kTransposedB &&
                  (kValues == 32 || kValues == 64 || kValues == 128));
    RF_WGMMA_BYTES_OF("f32.e4m3.e4m3", ", 1, 1", "+f", RF_O)
  } else if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kTransposedA && kTransposedB) {
      RF_WGMMA_OF(("f16", "1, 1"))
    } else if constexpr (kTransposedA) {
      RF_WGMMA_OF(("f16", "1, 0"))
    } else if constexpr (kTransposedB) {
      RF_WGMMA_OF(("f16", "0, 1"))
    } else {
      RF_WGMMA_OF(("f16", "0, 0"))
    }
  } else if constexpr (kTransposedA && kTransposedB) {
    RF_WGMMA_OF(("bf16", "1, 1"))
  } else if constexpr (kTransposedA) {
    RF_WGMMA_OF(("bf16", "1, 0"))
  } else if constexpr (kTransposedB) {
    RF_WGMMA_OF(("bf16", "0, 1"))
  } else {
    RF_WGMMA_OF(("bf16", "0, 0"))
  }
}

// The same of bytes, m64nNk32 with N = 64, 128 or 256, into integers, modulo 2^32: a of T =
// std::uint8_t or std::int8_t, b of std::int8_t.
template <typename T, int kValues>
__device__ __forceinline__ void wgmma(std::int32_t (&d)[kValues], std::uint64_t a, std::uint64_t b,
                                      bool accumulate) {
  static_assert(kValues == 32 || kValues == 64 || kValues == 128);
  if constexpr (std::is_same_v<T, std::uint8_t>) {
    RF_WGMMA_BYTES_OF("s32.u8.s8", "", "+r", RF_I)
  } else {
    static_assert(std::is_same_v<T, std::int8_t>);
    RF_WGMMA_BYTES_OF("s32.s8.s8", "", "+r", RF_I)
  }
}

// The same with `a` in registers, and N = 56, 64 or 128: with g and t as above, warp w holds of a
// the pairs of columns 2 t and 2 t + 1 of rows 16 w + g and 16 w + g + 8, then of columns 2 t + 8
// and 2 t + 9. So packed pairs of d's values are an operand of the next product. They stay as they
// are until the wait.
// clang-format off
#define RF_WGMMA_A(type, N, count, A, next, last, D, P, t)                             \
  if constexpr (kValues == count) {                                                    \
    asm volatile(                                                                      \
        "{\n"                                                                          \
        ".reg .pred p;\n"                                                              \
        "setp.ne.b32 p, %" #last ", 0;\n"                                              \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {%0" D(RF_S)  \
        P(RF_S, t) "}, {" A "}, %" #next ", p, 1, 1, 0;\n"                             \
        "}\n"                                                                          \
        : "+f"(d[0]) D(RF_O) P(RF_O, t)                                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                          \
          "r"(static_cast<int>(accumulate)));                                          \
  }
#define RF_WGMMA_A_OF(type) \
  RF_WGMMA_A(type, 56, 28, "%28, %29, %30, %31", 32, 33, RF_D2, RF_P8, 2) \
  RF_WGMMA_A(type, 64, 32, "%32, %33, %34, %35", 36, 37, RF_D3, RF_P2, 3) \
  RF_WGMMA_A(type, 128, 64, "%64, %65, %66, %67", 68, 69, RF_D6, RF_P4, 6)
// clang-format on

template <typename T, int kValues>
__device__ __forceinline__ void wgmma(float (&d)[kValues], const std::uint32_t (&a)[4],
                                      std::uint64_t b, bool accumulate) {
  static_assert(kValues == 28 || kValues == 32 || kValues == 64);
  if constexpr (std::is_same_v<T, __half>) {
    RF_WGMMA_A_OF("f16")
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    RF_WGMMA_A_OF("bf16")
  }
}

// "wgmma.commit_group": the warpgroup's products since the last one are a group.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// "wgmma.wait_group": all but the last groups are complete; d may be used if its own are.
template <int kPending, typename D>
__device__ __forceinline__ void wgmma_wait(D& d) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  pin(d);
}

}  // namespace resnet_fused::ptx

#endif  // RESNET_FUSED_HOST_SIM

namespace resnet_fused::ptx {

// Bytes by which an operand begins later whose descriptor is larger by 1.
constexpr unsigned kDescriptorUnit = 16;

// An address as matrix descriptors have it. In a cluster the bits above those 18 name the block,
// and would be added to the next field, the leading byte offset.
__device__ __forceinline__ std::uint64_t descriptor_address(std::uint32_t offset) {
  return (shared_address(offset) & 0x3ffff) / kDescriptorUnit;
}

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
         descriptor_address(offset);
}

// The same of a transposed operand of 16-bit elements ("Leading/Stride Dimension Byte Offset" of
// MN-major): a row of 128 bytes holds 64 elements of one depth, permuted as above, the next one
// those of the next depth; the next 64 elements lie `panels_apart` bytes behind. `offset` names the
// row of the first depth.
__device__ __forceinline__ std::uint64_t transposed_descriptor(std::uint32_t offset,
                                                               std::uint32_t panels_apart) {
  return matrix_descriptor(offset) + (std::uint64_t{panels_apart >> 4} - 1 << 16);
}

// The same without a swizzle: 8 rows of one 16-byte chunk lie one behind the other, the next 8 rows
// `rows_apart` bytes behind those, and a row's second chunk `chunks_apart` behind its first.
// Multiples of 16; nothing forbids that rows overlap.
__device__ __forceinline__ std::uint64_t plain_descriptor(std::uint32_t offset,
                                                          std::uint32_t chunks_apart,
                                                          std::uint32_t rows_apart = 128) {
  return std::uint64_t{rows_apart >> 4} << 32 | std::uint64_t{chunks_apart >> 4} << 16 |
         descriptor_address(offset);
}

}  // namespace resnet_fused::ptx
