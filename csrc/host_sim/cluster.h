// Clusters: blocks that run at once and reach into each other's shared memory. Sections are those
// of NVIDIA's "Parallel Thread Execution ISA": "Cluster of Cooperative Thread Arrays", "mapa",
// "barrier.cluster".
#pragma once

#include <cstdint>

#include "host_sim/simulator.h"

namespace host_sim {

// "mapa": the address of an offset into the shared memory of the block of that rank.
Address cluster_address(std::uint32_t offset, int rank);

// "barrier.cluster.arrive", by whole warps, and "barrier.cluster.wait": for all threads of the
// cluster that have not exited.
void cluster_arrive();
void cluster_wait();

// Checked pointers for ld and st .shared::cluster.
const void* cluster_to_read(Address address, std::uint32_t bytes);
void* cluster_to_write(Address address, std::uint32_t bytes);

// An access by `by` to the shared memory of the block of that rank, on behalf of the running
// thread. Another block must have started before, and must not exit before it knows of the access.
void visit(int rank, Access by);

namespace cluster {

void start();
// The running thread is about to exit.
void finish_thread();

}  // namespace cluster
}  // namespace host_sim
