// Runs a CUDA kernel's own source on the host, one block after the other, to prove its indexing,
// layouts and synchronisation. It says nothing about speed.
//
// The threads of a block are fibers. One runs until it waits: at a barrier, or at an instruction of
// the whole warp, which is carried out when its last lane arrives. Nothing else switches, so a run
// is the same every time. What hardware would leave to chance is made an error instead: every
// access to shared memory is checked for a race, and copies by cp.async land no earlier than the
// wait that asks for them.
//
// Every mistake of the kernel throws a Fault out of launch(), which names the block and the
// threads: accesses out of bounds or misaligned, data races, deadlocks, lanes of a warp at
// different instructions, copies that nobody waited for. Shared memory starts out as NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>

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

// Mistakes planted into whatever runs next, counted from 0 in each thread; -1 for none.
struct Plant {
  int skipped_barrier = -1;  // which this many-th barrier of a thread does not wait
  int skipped_wait = -1;     // the same for cp.async.wait_group
};
void plant(const Plant& mistakes);

// Counts since the last reset.
struct Statistics {
  std::int64_t barriers = 0;        // of a thread, by thread 0 of each block
  std::int64_t waits = 0;           // cp.async.wait_group, likewise
  std::int64_t matrix_loads = 0;    // 8x8 matrices that ldmatrix has read
  std::int64_t bank_conflicts = 0;  // rows of them that met another row in a bank
  std::int64_t products = 0;        // mma instructions
};
Statistics& statistics();

// ---- For the stand-ins of CUDA's and PTX's functions, which the running thread calls.

const Dim3& thread_index();
const Dim3& block_index();
const Dim3& block_dim();
const Dim3& grid_dim();

// Waits for all threads of the block that have not exited.
void barrier(const char* name);

// An instruction of the whole warp: the last lane to arrive carries it out on what all 32 have
// handed in. Lanes at different instructions are a Fault.
using Instruction = void (*)(void* const (&operands)[32]);
void collective(const char* name, Instruction instruction, void* operands);

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

}  // namespace host_sim
