// Runs a CUDA kernel's own source on the host, one block after the other, to prove its indexing,
// layouts and synchronisation. It says nothing about speed.
//
// The threads of a block are fibers. One runs until it waits: at a barrier, or at an instruction of
// the whole warp or warpgroup, which is carried out when its last lane arrives. Nothing else
// switches, so a run is the same every time. What hardware would leave to chance is made an error
// instead: every access to shared memory is checked for a race (race.h), copies by cp.async land no
// earlier than the wait that asks for them, and bulk copies when no thread can go on without them.
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

// Runs `kernel` once per thread of the grid. Kernels of several host threads run one by one.
void launch(Dim3 grid, Dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel);

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
  int skipped_mbarrier_wait = -1;     // for waits for a phase that somebody has to complete,
  int skipped_product_wait = -1;      // for wgmma.wait_group,
  int skipped_store_wait = -1;        // for cp.async.bulk.wait_group,
  int skipped_proxy_fence = -1;       // for fence.proxy.async,
  int skipped_register_release = -1;  // and for setmaxnreg.dec
  int bytes_not_expected = 0;         // that every mbarrier.arrive.expect_tx leaves out
};
void plant(const Plant& mistakes);

// Counts since the last reset.
struct Statistics {
  std::int64_t barriers = 0;        // of a thread, by thread 0 of each block
  std::int64_t waits = 0;           // cp.async.wait_group, likewise
  std::int64_t matrix_loads = 0;    // 8x8 matrices that ldmatrix has read
  std::int64_t bank_conflicts = 0;  // rows of them that met another row in a bank
  std::int64_t products = 0;        // mma and wgmma instructions
  std::int64_t bulk_copies = 0;     // cp.async.bulk.tensor, loads and stores
  // Of the thread with the most of them:
  std::int64_t named_barriers = 0, mbarrier_waits = 0, product_waits = 0, store_waits = 0,
               proxy_fences = 0;
};
Statistics& statistics();

// ---- For the stand-ins of CUDA's and PTX's functions, which the running thread calls.

const Dim3& thread_index();
const Dim3& block_index();
const Dim3& block_dim();
const Dim3& grid_dim();

// Waits for all threads of the block that have not exited.
void barrier(const char* name);
// "bar.sync number, count": waits until `count` threads have come to that barrier.
void named_barrier(int number, int count);

// An instruction of the whole warp, or of the 128 threads of a warpgroup: the last lane to arrive
// carries it out on what all have handed in. Lanes at different instructions are a Fault.
constexpr int kWarp = 32, kWarpgroup = 128;
using Instruction = void (*)(void* const* operands);
void collective(const char* name, Instruction instruction, void* operands, int lanes = kWarp);

// Checked pointers. Shared memory is addressed by its byte offset; `lane` is the lane of the
// running thread's warp on whose behalf it is read, -1 for the thread itself.
const void* shared_to_read(std::uint32_t offset, std::uint32_t bytes, int lane = -1);
void* shared_to_write(std::uint32_t offset, std::uint32_t bytes);
const void* global_to_read(const void* from, std::uint32_t bytes);
void* global_to_write(void* to, std::uint32_t bytes);

// cp.async: the destination is nobody's from the issue to the wait, when the data moves; of its
// `bytes`, the first `source_bytes` come from memory and the others are zero.
void copy_async(std::uint32_t to, const void* from, std::uint32_t bytes,
                std::uint32_t source_bytes);
void commit_copies();
void wait_for_copies(int pending_groups);

// Throws a Fault with the running thread's and block's place in front.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- For the models of asynchronous operations (async.cpp).

int running_thread();
// The running thread waits until another calls wake(). `name` must outlive that.
void wait_at(const char* name);
void wake(int thread);

Races& races();
const Plant& planted();
// An asynchronous actor, and what messages call it.
Actor add_agent(const std::string& name);
// Shared memory as it is, within bounds and aligned.
unsigned char* shared_bytes(std::uint32_t offset, std::uint32_t bytes, const char* doing);
// Accesses of an operation of `agent` that the running thread issues: all words of a range.
void agent_reads(std::uint32_t offset, std::uint32_t bytes, Access agent);
void agent_writes(std::uint32_t offset, std::uint32_t bytes, Access agent);

}  // namespace host_sim
