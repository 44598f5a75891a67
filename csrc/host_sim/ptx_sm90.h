// The functions of kernels/cuda/ptx_sm90.cuh, modelled on the host (async.h): same names, same
// meaning. wgmma adds as mma does here, exact products to fp32 in order of depth.
#pragma once

#include <cstdint>

#include "host_sim/async.h"

namespace resnet_fused::ptx {

inline std::uint32_t shared_address(std::uint32_t offset) { return offset; }

inline void mbarrier_init(std::uint32_t at, std::uint32_t count) {
  host_sim::mbarrier_init(at, count);
}
inline void fence_mbarrier_init() { host_sim::fence_mbarrier_init(); }
inline void mbarrier_arrive(std::uint32_t at) { host_sim::mbarrier_arrive(at, 0); }
inline void mbarrier_arrive_expect(std::uint32_t at, std::uint32_t bytes) {
  host_sim::mbarrier_arrive(at, bytes);
}
inline void mbarrier_wait(std::uint32_t at, std::uint32_t parity) {
  host_sim::mbarrier_wait(at, parity);
}

inline void fence_proxy_async() { host_sim::fence_proxy(); }

inline void load_tile(std::uint32_t to, const CUtensorMap& map, std::uint32_t mbarrier,
                      std::int32_t c0, std::int32_t c1) {
  const std::int32_t coordinates[] = {c0, c1};
  host_sim::load_tensor(to, map, mbarrier, coordinates, nullptr);
}
inline void load_tile(std::uint32_t to, const CUtensorMap& map, std::uint32_t mbarrier,
                      std::int32_t c0, std::int32_t c1, std::int32_t c2) {
  const std::int32_t coordinates[] = {c0, c1, c2};
  host_sim::load_tensor(to, map, mbarrier, coordinates, nullptr);
}
inline void load_pixels(std::uint32_t to, const CUtensorMap& map, std::uint32_t mbarrier,
                        std::int32_t c, std::int32_t w, std::int32_t h, std::int32_t n,
                        std::uint16_t offset_w, std::uint16_t offset_h) {
  const std::int32_t coordinates[] = {c, w, h, n};
  const std::uint16_t offsets[] = {offset_w, offset_h};
  host_sim::load_tensor(to, map, mbarrier, coordinates, offsets);
}
inline void store_tile(const CUtensorMap& map, std::uint32_t from, std::int32_t c0,
                       std::int32_t c1) {
  const std::int32_t coordinates[] = {c0, c1};
  host_sim::store_tensor(map, from, coordinates);
}
inline void bulk_commit() { host_sim::commit_stores(); }
template <int kPending>
void bulk_wait_read() {
  host_sim::wait_for_stores(kPending);
}

inline void named_barrier(int number, int threads) { host_sim::named_barrier(number, threads); }
template <int kRegisters>
void registers_at_launch() {
  host_sim::registers_at_launch(kRegisters);
}
template <int kRegisters>
void claim_registers() {
  host_sim::claim_registers(kRegisters);
}
template <int kRegisters>
void release_registers() {
  host_sim::release_registers(kRegisters);
}

template <int kValues>
void wgmma_fence(float (&)[kValues]) {
  host_sim::fence_products();
}
template <typename T, int kValues>
void wgmma(float (&d)[kValues], std::uint64_t a, std::uint64_t b, bool accumulate) {
  host_sim::multiply_warpgroup<T>(d, 2 * kValues, a, b, accumulate);
}
inline void wgmma_commit() { host_sim::commit_products(); }
template <int kPending, int kValues>
void wgmma_wait(float (&)[kValues]) {
  host_sim::wait_for_products(kPending);
}

}  // namespace resnet_fused::ptx
