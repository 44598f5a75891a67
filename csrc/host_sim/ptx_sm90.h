// The functions of kernels/cuda/ptx_sm90.cuh, modelled on the host (async.h): same names, same
// meaning. wgmma adds as mma does here, exact products to fp32 in order of depth.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_sim/async.h"
#include "host_sim/cluster.h"

namespace resnet_fused::ptx {

// As in a cluster, where the bits above an offset name the block ("Shared State Space"): whatever
// takes an offset must leave them out.
inline std::uint32_t shared_address(std::uint32_t offset) {
  return host_sim::address_of(offset, 0);
}

inline void mbarrier_init(std::uint32_t at, std::uint32_t count) {
  host_sim::mbarrier_init(at, count);
}
inline void fence_mbarrier_init() { host_sim::fence_mbarrier_init(); }
inline void mbarrier_arrive(std::uint32_t at) { host_sim::mbarrier_arrive(host_sim::own(at), 0); }
inline void mbarrier_arrive_expect(std::uint32_t at, std::uint32_t bytes) {
  host_sim::mbarrier_arrive(host_sim::own(at), bytes);
}
inline bool mbarrier_wait(std::uint32_t at, std::uint32_t parity, const SpinLimit& limit = {}) {
  return host_sim::mbarrier_wait(at, parity, host_sim::Scope::kBlock, limit.step > 0);
}
[[noreturn]] inline void give_up(const SpinLimit&, const StuckBarrier& stuck) {
  host_sim::fault("traps: %s", to_string(stuck).c_str());
}

inline void fence_proxy_async() { host_sim::fence_proxy(); }

template <int kDimensions>
void load_tile(std::uint32_t to, const CUtensorMap& map, std::uint32_t mbarrier,
               const std::int32_t (&at)[kDimensions]) {
  host_sim::load_tensor(to, map, mbarrier, at, nullptr);
}
inline void load_pixels(std::uint32_t to, const CUtensorMap& map, std::uint32_t mbarrier,
                        const std::int32_t (&at)[4], const std::uint16_t (&offset)[2]) {
  host_sim::load_tensor(to, map, mbarrier, at, offset);
}
template <int kDimensions>
void load_tile_multicast(std::uint32_t to, const CUtensorMap& map, std::uint32_t mbarrier,
                         const std::int32_t (&at)[kDimensions], std::uint16_t ranks) {
  host_sim::load_tensor(to, map, mbarrier, at, nullptr, ranks);
}
inline void load_pixels_multicast(std::uint32_t to, const CUtensorMap& map, std::uint32_t mbarrier,
                                  const std::int32_t (&at)[4], const std::uint16_t (&offset)[2],
                                  std::uint16_t ranks) {
  host_sim::load_tensor(to, map, mbarrier, at, offset, ranks);
}
template <int kDimensions>
void store_tile(const CUtensorMap& map, std::uint32_t from, const std::int32_t (&at)[kDimensions]) {
  host_sim::store_tensor(map, from, at, false);
}
inline void store_pixels(const CUtensorMap& map, std::uint32_t from, const std::int32_t (&at)[4]) {
  host_sim::store_tensor(map, from, at, true);
}
inline void bulk_commit() { host_sim::commit_stores(); }
template <int kPending>
void bulk_wait_read() {
  host_sim::wait_for_stores(kPending);
}

inline int cluster_rank() { return host_sim::cluster_rank(); }
inline int cluster_size() { return host_sim::cluster_size(); }
inline void cluster_arrive() { host_sim::cluster_arrive(); }
inline void cluster_wait() { host_sim::cluster_wait(); }
inline std::uint32_t cluster_address(std::uint32_t offset, int rank) {
  return host_sim::cluster_address(offset, rank);
}
template <typename V>
V load_cluster(std::uint32_t address) {
  V value;
  std::memcpy(&value, host_sim::cluster_to_read(address, sizeof(V)), sizeof(V));
  return value;
}
template <typename V>
void store_cluster(std::uint32_t address, const V& value) {
  std::memcpy(host_sim::cluster_to_write(address, sizeof(V)), &value, sizeof(V));
}
inline void mbarrier_arrive_cluster(std::uint32_t address) {
  host_sim::mbarrier_arrive(address, 0);
}
inline void mbarrier_publish_cluster(std::uint32_t address) {
  host_sim::mbarrier_arrive(address, 0, host_sim::Scope::kCluster);
}
inline void mbarrier_wait_cluster(std::uint32_t at, std::uint32_t parity) {
  host_sim::mbarrier_wait(at, parity, host_sim::Scope::kCluster, false);
}

inline void named_barrier(int number, int threads) { host_sim::named_barrier(number, threads); }
// The matrices of ptx.h's ldmatrix_x4, as columns.
void move_matrices_trans(std::uint32_t* registers, int matrices, std::uint32_t row, bool store);
template <int kMatrices>
void ldmatrix_trans(std::uint32_t (&to)[kMatrices], std::uint32_t row) {
  move_matrices_trans(to, kMatrices, row, false);
}
template <int kMatrices>
void stmatrix_trans(std::uint32_t row, const std::uint32_t (&from)[kMatrices]) {
  move_matrices_trans(const_cast<std::uint32_t*>(from), kMatrices, row, true);
}

template <int kRegisters>
void registers_at_launch() {
  host_sim::registers_at_launch(kRegisters);
}
template <int kRegisters>
void increase_registers() {
  host_sim::increase_registers(kRegisters);
}
template <int kRegisters>
void decrease_registers() {
  host_sim::decrease_registers(kRegisters);
}

template <typename D>
void wgmma_fence(D&) {
  host_sim::fence_products();
}
template <typename T, bool kTransposedA = false, bool kTransposedB = false, int kValues>
void wgmma(float (&d)[kValues], std::uint64_t a, std::uint64_t b, bool accumulate) {
  host_sim::multiply_warpgroup<T>(d, 2 * kValues, a, b, accumulate, {kTransposedA, kTransposedB});
}
template <typename T, int kValues>
void wgmma(float (&d)[kValues], const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate) {
  host_sim::multiply_warpgroup<T>(d, 2 * kValues, a, b, accumulate);
}
template <typename T, int kValues>
void wgmma(std::int32_t (&d)[kValues], std::uint64_t a, std::uint64_t b, bool accumulate) {
  host_sim::multiply_warpgroup<T>(d, 2 * kValues, a, b, accumulate);
}
inline void wgmma_commit() { host_sim::commit_products(); }
template <int kPending, typename D>
void wgmma_wait(D&) {
  host_sim::wait_for_products(kPending);
}

}  // namespace resnet_fused::ptx
