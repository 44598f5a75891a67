// Runs a CUDA kernel's own source on the host, one cluster of blocks after the other, to prove its
// indexing, layouts and synchronisation. It says nothing about speed.
//
// The threads of a cluster are fibers. One runs until it waits: at a barrier, or at an instruction
// of the whole warp or warpgroup, which is carried out when its last lane arrives. Nothing else
// switches, so a run is the same every time. What hardware would leave to chance is made an error
// instead: every access to shared memory is checked for a race (race.h), copies by cp.async land no
// earlier than the wait that asks for them, and bulk copies when no thread can go on without them.
//
// That check sees what is unordered in one run, but which arrivals end a phase, and who meets whom
// at a barrier, may depend on the order of the run. set_schedule() chooses others: the next thread
// at random, also where none waits, and bulk copies that land at random, early and late.
//
// Every mistake of the kernel throws a Fault out of launch(), which names the block and the
// threads: accesses out of bounds or misaligned, data races, deadlocks, lanes of a warp at
// different instructions, copies that nobody waited for. Shared memory starts out as NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "host_sim/race.h"

namespace host_sim {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ---- For whoever launches.

// Runs `kernel` once per thread of the grid, whose blocks form clusters. Kernels of several host
// threads run one by one. Where it `overlaps` the end of the kernel before it, a thread's access to
// global memory before it has waited for that is a Fault.
void launch(Dim3 grid, Dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel,
            Dim3 cluster = {}, bool overlaps = false);

// The order in which threads of later launches run and bulk copies land: the same for the same
// seed, and for 0 the fixed one.
void set_schedule(std::uint64_t seed);

// Global memory is what has been registered; the later one counts where two overlap.
void register_buffer(const void* data, std::size_t bytes, bool writable);
void clear_buffers();

// The compute capability that the simulated GPU reports, ten times; 80 at first.
int& capability();

// Mistakes planted into whatever runs next, counted from 0 in each thread; -1 for none.
struct Plant {
  int skipped_barrier = -1;           // which this many-th barrier of a thread does not wait
  int skipped_named_barrier = -1;     // the same for bar.sync with a number,
  int skipped_wait = -1;              // for cp.async.wait_group,
  int skipped_arrival = -1;           // for arrivals at mbarriers,
  int skipped_mbarrier_wait = -1;     // for waits for a phase that somebody has to complete,
  int skipped_product_wait = -1;      // for wgmma.wait_group,
  int skipped_store_wait = -1;        // for cp.async.bulk.wait_group,
  int skipped_proxy_fence = -1;       // for fence.proxy.async,
  int skipped_register_release = -1;  // for setmaxnreg.dec,
  int skipped_cluster_barrier = -1;   // for barrier.cluster, its arrival and its wait,
  int skipped_kernel_wait = -1;       // and for griddepcontrol.wait
  int bytes_not_expected = 0;         // that every mbarrier.arrive.expect_tx leaves out
  int base_offset = 0;                // added to that of every operand of wgmma
};
void plant(const Plant& mistakes);

// Counts since the last reset.
struct Statistics {
  std::int64_t barriers = 0;          // of a thread, by thread 0 of each block
  std::int64_t waits = 0;             // cp.async.wait_group, likewise
  std::int64_t matrix_loads = 0;      // 8x8 matrices that ldmatrix has read or stmatrix written
  std::int64_t bank_conflicts = 0;    // rows of them that met another row in a bank
  std::int64_t shared_requests = 0;   // ordinary accesses of a warp to shared memory (banks.h),
  std::int64_t shared_conflicts = 0;  // and the turns beyond the first that they take
  std::int64_t products = 0;          // mma and wgmma instructions
  std::int64_t bulk_copies = 0;       // cp.async.bulk.tensor, loads and stores
  // Of the thread with the most of them:
  std::int64_t named_barriers = 0, mbarrier_waits = 0, product_waits = 0, store_waits = 0,
               proxy_fences = 0, cluster_barriers = 0;
};
Statistics& statistics();
// The counts since the last call.
Statistics take_statistics();

// ---- For the stand-ins of CUDA's and PTX's functions, which the running thread calls.

const Dim3& thread_index();
const Dim3& block_index();
const Dim3& block_dim();
const Dim3& grid_dim();
// Of the running thread's block in its cluster, and of all blocks there: x first.
int cluster_rank();
int cluster_size();

// Waits for all threads of the block that have not exited.
void barrier(const char* name);
// "bar.sync number, count": waits until `count` threads have come to that barrier.
void named_barrier(int number, int count);

// An instruction of the whole warp, or of the 128 threads of a warpgroup: the last lane to arrive
// carries it out on what all have handed in. Lanes at different instructions are a Fault.
constexpr int kWarp = 32, kWarpgroup = 128;
using Instruction = void (*)(void* const* operands);
void collective(const char* name, Instruction instruction, void* operands, int lanes = kWarp);

// Checked pointers. The block's own shared memory is addressed by byte offsets; `lane` is the lane
// of the running thread's warp on whose behalf the access is, -1 for the thread itself.
const void* shared_to_read(std::uint32_t offset, std::uint32_t bytes, int lane = -1);
void* shared_to_write(std::uint32_t offset, std::uint32_t bytes, int lane = -1);
const void* global_to_read(const void* from, std::uint32_t bytes);
void* global_to_write(void* to, std::uint32_t bytes);

// cp.async: the destination is nobody's from the issue to the wait, when the data moves; of its
// `bytes`, the first `source_bytes` come from memory and the others are zero.
void copy_async(std::uint32_t to, const void* from, std::uint32_t bytes,
                std::uint32_t source_bytes);
void commit_copies();
void wait_for_copies(int pending_groups);

// griddepcontrol.wait
void wait_for_earlier_kernels();

// Throws a Fault with the running thread's and block's place in front.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- For the models of asynchronous operations (async.cpp) and clusters (cluster.cpp).

// Threads are numbered through the cluster; each block's begin at a multiple of a warpgroup.
int running_thread();
int first_thread(int rank);
int block_threads();
// "thread 3", or what an agent was named.
std::string name_of(Actor actor);
// " of block rank 1" where the cluster has more than one.
std::string of_block(int rank);
// The running thread waits until another calls wake(). `name` must outlive that.
void wait_at(const char* name);
void wake(int thread);
// A place at which a random schedule may go on with another thread.
void may_switch();

Races& races();
const Plant& planted();
// An asynchronous actor, and what messages call it.
Actor add_agent(const std::string& name);

// Shared memory of any block of the cluster: the block's rank + 1, and an offset in kWindow bytes.
using Address = std::uint32_t;
constexpr std::uint32_t kWindow = 1 << 24;
constexpr Address address_of(std::uint32_t offset, int rank) {
  return static_cast<std::uint32_t>(rank + 1) * kWindow + offset;
}
constexpr std::uint32_t offset_of(Address address) { return address % kWindow; }
int rank_of(Address address);
// The same as an offset of the running thread's block.
Address own(std::uint32_t offset);

// Checked pointers, as above.
const void* address_to_read(Address address, std::uint32_t bytes);
void* address_to_write(Address address, std::uint32_t bytes);
// Shared memory as it is, within bounds and aligned.
unsigned char* shared_bytes(Address address, std::uint32_t bytes, const char* doing);
// Accesses of an operation of `agent` that the running thread issues: all words of a range.
void agent_reads(Address address, std::uint32_t bytes, Access agent);
void agent_writes(Address address, std::uint32_t bytes, Access agent);

}  // namespace host_sim
