// Models of what sm_90 does asynchronously: mbarriers, bulk copies of tensors, matrix products of a
// warpgroup, registers handed over. Sections are those of NVIDIA's "Parallel Thread Execution ISA".
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "host_sim/simulator.h"

namespace host_sim {

// The type in which products of T are added.
template <typename T>
using Sum = std::conditional_t<std::is_integral_v<T>, std::int32_t, float>;

// "mbarrier": 8 bytes of shared memory that count arrivals and bytes, phase by phase. A phase ends
// when `count` threads have arrived and as many bytes have come as they announced.
void mbarrier_init(std::uint32_t offset, std::uint32_t count);
// "fence.mbarrier_init": initialisations become visible to asynchronous operations.
void fence_mbarrier_init();
// Of a release, an acquire: what other blocks' threads did is seen if both have the cluster's.
enum class Scope { kBlock, kCluster };
// At an mbarrier of any block of the cluster.
void mbarrier_arrive(Address at, std::uint32_t expected_bytes, Scope scope = Scope::kBlock);
// Waits for the end of the phase of that parity, the first phase having parity 0. Where the wait is
// `bounded` and no thread can run any more, it ends without it: false.
bool mbarrier_wait(std::uint32_t offset, unsigned parity, Scope scope, bool bounded);

// "fence.proxy.async".
void fence_proxy();

// "cp.async.bulk.tensor", one box: in shared memory the rows of its first dimension, one behind the
// other, their 16-byte chunks permuted as the map's swizzle says; zeros where it leaves the tensor.
// `coordinates` are the box's first element; for im2col the first pixel and channel, and `offsets`
// of width and height are added to every pixel. Lands when no thread can run, in order of issue, or
// as set_schedule() says. With `ranks`, ".multicast::cluster": the copy lands at the same offset of
// every block whose rank's bit is set, each on its own, and the mbarrier there counts its bytes.
void load_tensor(std::uint32_t to, const CUtensorMap& map, std::uint32_t mbarrier,
                 const std::int32_t* coordinates, const std::uint16_t* offsets);
void load_tensor(std::uint32_t to, const CUtensorMap& map, std::uint32_t mbarrier,
                 const std::int32_t* coordinates, const std::uint16_t* offsets,
                 std::uint16_t ranks);
void store_tensor(const CUtensorMap& map, std::uint32_t offset, const std::int32_t* coordinates,
                  bool im2col);
// "cp.async.bulk.commit_group", and "cp.async.bulk.wait_group.read" for all but the last groups.
void commit_stores();
void wait_for_stores(int pending_groups);

// "wgmma": d (64, n) = a (64, 16) * b (n, 16)^T, plus d where `accumulate` says so. A thread hands
// in its registers of d and both descriptors. The registers hold NaN from then until the wait for
// the product's group. Of bytes, T = std::uint8_t or std::int8_t, the depth is 32, b of
// std::int8_t, and d of integers, which wrap. Of T = __nv_fp8_e4m3 it is 32 too, and the products
// and d are added as kernels/cuda/ptx_sm90.cuh says: each cut off 13 bits behind the leading one of
// the largest, and so is their sum. Transposed, an operand lies by columns.
struct Transposed {
  bool a = false, b = false;
};
template <typename T>
void multiply_warpgroup(Sum<T>* d, int n, std::uint64_t a, std::uint64_t b, bool accumulate,
                        Transposed transposed = {});
// The same with a thread's four registers of a, which it may not change until that wait.
template <typename T>
void multiply_warpgroup(float* d, int n, const std::uint32_t* a, std::uint64_t b, bool accumulate);
void fence_products();
void commit_products();
void wait_for_products(int pending_groups);

// "setmaxnreg": registers a thread of a warpgroup, of those that the block was given at launch. All
// threads of the warpgroup come to it; a claim then waits until enough are free, in order of
// claims.
void registers_at_launch(int registers);
void increase_registers(int registers);
void decrease_registers(int registers);

namespace async {

void start(int threads);
// Faults if the running thread leaves anything behind that it must wait for.
void finish_thread();
void finish();
// Lets one of the bulk copies under way arrive, the first one for a choice of 0; false if there is
// none.
bool land(std::uint64_t choice);
// Ends a bounded wait; false if there is none.
bool end_bounded_wait();

}  // namespace async
}  // namespace host_sim
