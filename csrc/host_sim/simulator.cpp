#include "host_sim/simulator.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "host_sim/async.h"
#include "host_sim/banks.h"
#include "host_sim/cluster.h"
#include "host_sim/fiber.h"

namespace host_sim {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kNamedBarriers = 16;
constexpr int kMaxBlocks = 16;                                 // of a cluster
constexpr std::uint32_t kSwitchesOneIn = 32, kLandsOneIn = 8;  // of a random schedule

struct Buffer {
  std::uintptr_t first, last;  // [first, last)
  bool writable;
};

// cp.async of one thread, in order of issue; `groups` holds where each committed group ends.
struct Copy {
  Address to;
  const void* from;
  std::uint32_t bytes, source_bytes;
};

struct Thread {
  Dim3 index;
  int number, warp, lane, block;
  Context context;
  const char* waits_at;  // null: can run
  bool exited;
  int barriers, named_barriers, waits;
  int kernel_waits;
  bool may_touch_global;
  std::vector<Copy> copies;
  std::vector<std::size_t> groups;
  Time committed;  // groups so far
};

// Lanes of a warp or warpgroup that are at the same instruction.
struct Gathering {
  int arrived = 0;
  Instruction instruction = nullptr;
  const char* name = nullptr;
  void* operands[kWarpgroup];
};

struct NamedBarrier {
  char name[16];
  int count = 0;  // 0: nobody waits
  std::vector<int> threads;
  View view;
};

struct Block {
  Dim3 index;
  int alive, at_barrier;
  NamedBarrier named_barriers[kNamedBarriers];
};

struct Machine {
  std::mutex mutex;
  std::vector<Buffer> buffers;
  Plant planted;
  bool overlaps = false;
  Statistics statistics;
  int capability = 80;

  // The cluster that runs.
  Dim3 grid, block, cluster;
  std::vector<Block> blocks;
  int block_threads = 0;   // that each has,
  int thread_numbers = 0;  // and how far the numbers of the next block's threads lie ahead
  const std::function<void()>* kernel = nullptr;
  std::vector<Thread> threads;
  std::vector<std::uint32_t> ready;  // lanes that can run, by warp
  std::vector<Gathering> warps, warpgroups;
  std::unique_ptr<Stacks> stacks;
  Context scheduler;
  std::exception_ptr failure;
  int alive = 0;
  std::uint64_t seed = 0;
  std::mt19937 random;

  std::vector<unsigned char> shared;
  std::size_t shared_bytes = 0, shared_stride = 0;  // of a block, and from one to the next
  Banks banks;
  Races races;
  std::vector<std::string> agents;  // the first one follows the last thread
};

Machine machine;
Thread* running = nullptr;  // within launch, whose lock guards all of this

std::string text(const Dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

// Which threads of a block wait where, in runs of equal ones.
std::string whereabouts(int rank) {
  std::string all;
  const int begin = first_thread(rank), end = begin + machine.block_threads;
  const auto place = [](const Thread& t) {
    if (t.exited) return std::string("exited");
    return t.waits_at == nullptr ? std::string("can run") : "wait at " + std::string(t.waits_at);
  };
  for (int first = begin, next; first < end; first = next) {
    const std::string where = place(machine.threads[first]);
    for (next = first + 1; next < end && place(machine.threads[next]) == where;) ++next;
    all += (all.empty() ? "" : "; ") + ("threads " + std::to_string(first - begin) + "-") +
           std::to_string(next - 1 - begin) + " " + where;
  }
  return all;
}

std::string deadlock() {
  std::string all;
  for (int rank = 0; rank < cluster_size(); ++rank) {
    all += (rank == 0 ? "deadlock in block " : "; in block ") + text(machine.blocks[rank].index) +
           ": " + whereabouts(rank);
  }
  return all;
}

bool one_in(std::uint32_t count) { return machine.seed != 0 && machine.random() % count == 0; }

// Switches from `from` to a thread that can run: of the same warp where there is one, so that its
// lanes reach the next instruction together; under a seed, of a random one. Returns when `from` is
// switched to again, which for the scheduler is at the end of the block or at a fault.
void run_next(Context& from, int warp, int lane) {
  const int warps = static_cast<int>(machine.warps.size());
  if (machine.seed != 0) {
    warp = static_cast<int>(machine.random() % warps);
    lane = static_cast<int>(machine.random() % kWarp);
    if (one_in(kLandsOneIn)) async::land(machine.random());
  }
  do {
    for (int k = 0; k < warps; ++k) {
      const int w = warp + k < warps ? warp + k : warp + k - warps;
      std::uint32_t ready = machine.ready[w];
      if (ready == 0) continue;
      if (k == 0 && (ready & (~0u << lane)) != 0) ready &= ~0u << lane;
      running = &machine.threads[w * kWarp + __builtin_ctz(ready)];
      if (&running->context != &from) switch_context(from, running->context);
      return;
    }
  } while (machine.alive > 0 &&
           (async::land(machine.seed == 0 ? 0 : machine.random()) || async::end_bounded_wait()));
  if (machine.alive > 0) machine.failure = std::make_exception_ptr(Fault(deadlock()));
  switch_context(from, machine.scheduler);
}

void release(Thread& thread) {
  thread.waits_at = nullptr;
  machine.ready[thread.warp] |= 1u << thread.lane;
}

// Barriers wait for those that live, so the last arrival or the last exit completes one.
void complete_barrier(int rank) {
  Block& block = machine.blocks[rank];
  if (block.at_barrier == 0 || block.at_barrier < block.alive) return;
  block.at_barrier = 0;
  const int first = first_thread(rank);
  machine.races.join(first, machine.block_threads);
  for (int i = first; i < first + machine.block_threads; ++i) {
    if (!machine.threads[i].exited) release(machine.threads[i]);
    if (i % kWarp == 0) machine.banks.together(i / kWarp);
  }
}

void thread_main() {
  try {
    (*machine.kernel)();
    if (!running->copies.empty()) {
      fault("exits with %zu asynchronous copies that it never waited for", running->copies.size());
    }
    async::finish_thread();
    cluster::finish_thread();
  } catch (...) {
    machine.failure = std::current_exception();
  }
  if (machine.failure) switch_context(running->context, machine.scheduler);
  running->exited = true;
  machine.ready[running->warp] &= ~(1u << running->lane);
  --machine.alive;
  --machine.blocks[running->block].alive;
  complete_barrier(running->block);
  run_next(running->context, running->warp, running->lane);
  std::terminate();  // an exited thread is never switched to
}

void start_thread(int rank, int i) {
  const Dim3& block = machine.block;
  const int number = first_thread(rank) + i;
  Thread& thread = machine.threads[number];
  thread.index = Dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
  thread.number = number;
  thread.warp = number / kWarp;
  thread.lane = number % kWarp;
  thread.block = rank;
  thread.context = machine.stacks->start(number, &thread_main);
  thread.exited = false;
  thread.barriers = thread.named_barriers = thread.waits = thread.kernel_waits = 0;
  thread.may_touch_global = !machine.overlaps;
  thread.committed = 0;
  thread.copies.clear();
  thread.groups.clear();
  release(thread);
}

void start_block(int rank, const Dim3& index) {
  Block& block = machine.blocks[rank];
  block.index = index;
  block.alive = machine.block_threads;
  block.at_barrier = 0;
  for (int i = 0; i < kNamedBarriers; ++i) {
    NamedBarrier& named = block.named_barriers[i];
    std::snprintf(named.name, sizeof(named.name), "bar.sync %d", i);
    named.count = 0;
    named.threads.clear();
  }
  for (int i = 0; i < machine.block_threads; ++i) start_thread(rank, i);
}

// The cluster whose first block has this index.
void run_cluster(const Dim3& index) {
  const int count = static_cast<int>(machine.threads.size());
  for (Gathering& gathering : machine.warps) gathering.arrived = 0;
  for (Gathering& gathering : machine.warpgroups) gathering.arrived = 0;
  machine.ready.assign(machine.warps.size(), 0);
  machine.banks.start(static_cast<int>(machine.warps.size()));
  machine.agents.clear();
  machine.races.start(count, machine.shared_stride * machine.blocks.size());
  for (Thread& thread : machine.threads) thread.exited = true;  // also where no block has one
  const Dim3& cluster = machine.cluster;
  for (int rank = 0; rank < cluster_size(); ++rank) {
    start_block(rank, Dim3(index.x + rank % cluster.x, index.y + rank / cluster.x % cluster.y,
                           index.z + rank / (cluster.x * cluster.y)));
  }
  async::start(count);
  cluster::start();
  std::memset(machine.shared.data(), 0xff, machine.shared_stride * machine.blocks.size());
  machine.alive = cluster_size() * machine.block_threads;
  machine.failure = nullptr;
  run_next(machine.scheduler, 0, 0);
  running = nullptr;
  if (machine.failure) std::rethrow_exception(machine.failure);
  async::finish();
  for (std::size_t warp = 0; warp < machine.warps.size(); ++warp) {
    machine.banks.together(static_cast<int>(warp));
  }
}

// Where an address lies in machine.shared.
std::size_t place_of(Address address) {
  return rank_of(address) * machine.shared_stride + offset_of(address);
}

std::uint32_t word_of(Address address) {
  return static_cast<std::uint32_t>(place_of(address) / Races::kWord);
}

std::uint32_t check_shared(Address address, std::uint32_t bytes, const char* what) {
  const std::uint32_t offset = offset_of(address);
  if (offset > machine.shared_bytes || bytes > machine.shared_bytes - offset) {
    fault("%s %u bytes at %u of shared memory, which has %zu", what, bytes, offset,
          machine.shared_bytes);
  }
  if (offset % bytes != 0) {
    fault("%s %u bytes at %u of shared memory, which is no multiple of that", what, bytes, offset);
  }
  return word_of(address);
}

void check_global(const void* pointer, std::uint32_t bytes, bool write) {
  const char* what = write ? "writes" : "reads";
  if (!running->may_touch_global) {
    fault("%s global memory before it has waited for the kernel before this one", what);
  }
  const auto first = reinterpret_cast<std::uintptr_t>(pointer);
  const Buffer* nearest = nullptr;
  for (auto buffer = machine.buffers.rbegin(); buffer != machine.buffers.rend(); ++buffer) {
    if (first >= buffer->first && first + bytes <= buffer->last && buffer->writable >= write) {
      if (first % bytes != 0) {
        fault("%s %u bytes of global memory at byte %zu of a buffer, which is misaligned", what,
              bytes, first - buffer->first);
      }
      return;
    }
    const auto distance = [&](const Buffer& b) {
      return first < b.first ? b.first - first : first >= b.last ? first - b.last : 0;
    };
    if (nearest == nullptr || distance(*buffer) < distance(*nearest)) nearest = &*buffer;
  }
  if (nearest == nullptr) fault("%s global memory, none of which is registered", what);
  fault("%s %u bytes out of bounds of global memory: at byte %td of the nearest buffer, of %zu%s",
        what, bytes, static_cast<std::ptrdiff_t>(first - nearest->first),
        nearest->last - nearest->first, nearest->writable ? "" : " and read-only");
}

// Faults if an access, which `doing` names, has met another one.
void report(const Clash& clash, std::uint32_t word, const char* doing) {
  if (clash.kind == Clash::kNone) return;
  const std::size_t place = std::size_t{word} * Races::kWord;
  const std::size_t byte = place % machine.shared_stride;
  const std::string where = of_block(static_cast<int>(place / machine.shared_stride));
  const bool agent = clash.other >= static_cast<int>(machine.threads.size());
  const std::string who = name_of(clash.other);
  if (clash.kind == Clash::kUnfenced) {
    fault("%s byte %zu of shared memory%s, which %s wrote, with no fence.proxy.async between",
          doing, byte, where.c_str(), who.c_str());
  }
  const bool wrote = clash.kind == Clash::kWithWrite;
  if (agent) {
    fault("%s byte %zu of shared memory%s while %s %s it is in flight", doing, byte, where.c_str(),
          who.c_str(), wrote ? "to" : "from");
  }
  fault("races for byte %zu of shared memory%s: it %s what %s %s, with no barrier between", byte,
        where.c_str(), doing, who.c_str(), wrote ? "wrote" : "read");
}

std::uint32_t words_of(std::uint32_t bytes) { return (bytes + Races::kWord - 1) / Races::kWord; }

void land(const Copy& copy) {
  unsigned char* to = machine.shared.data() + place_of(copy.to);
  std::memcpy(to, copy.from, copy.source_bytes);
  std::memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

// Carries out the instruction for which the last of `lanes` threads has come.
void carry_out(Gathering& gathering, int first, int lanes) {
  gathering.instruction(gathering.operands);
  gathering.arrived = 0;
  for (int lane = 0; lane < lanes; ++lane) release(machine.threads[first + lane]);
  for (int warp = first / kWarp; warp < (first + lanes) / kWarp; ++warp) {
    machine.banks.together(warp);
  }
}

}  // namespace

void launch(Dim3 grid, Dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel,
            Dim3 cluster, bool overlaps) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.overlaps = overlaps;
  const unsigned count = block.x * block.y * block.z;
  if (count == 0 || count > kMaxThreads) {
    throw Fault("a block of " + std::to_string(count) + " threads; 1 to 1024 are possible");
  }
  const unsigned blocks = cluster.x * cluster.y * cluster.z;
  if (blocks == 0 || blocks > kMaxBlocks || grid.x % cluster.x != 0 || grid.y % cluster.y != 0 ||
      grid.z % cluster.z != 0) {
    throw Fault("clusters of " + text(cluster) + " in a grid of " + text(grid) +
                "; 1 to 16 blocks are possible, in grids that are multiples of them");
  }
  machine.grid = grid;
  machine.block = block;
  machine.cluster = cluster;
  machine.kernel = &kernel;
  machine.blocks.resize(blocks);
  machine.block_threads = static_cast<int>(count);
  machine.thread_numbers = blocks == 1
                               ? static_cast<int>(count)
                               : static_cast<int>(count + kWarpgroup - 1) / kWarpgroup * kWarpgroup;
  const int threads = static_cast<int>(blocks) * machine.thread_numbers;
  machine.threads.resize(threads);
  machine.warps.resize((threads + kWarp - 1) / kWarp);
  machine.warpgroups.resize((threads + kWarpgroup - 1) / kWarpgroup);
  if (machine.stacks == nullptr || machine.stacks->count() < threads) {
    machine.stacks = std::make_unique<Stacks>(threads);
  }
  constexpr std::size_t kAlignment = 1024;
  machine.shared_bytes = shared_bytes;
  machine.shared_stride = (shared_bytes + kAlignment - 1) / kAlignment * kAlignment;
  machine.shared.resize(std::max(machine.shared.size(), machine.shared_stride * blocks));
  machine.random.seed(static_cast<std::mt19937::result_type>(machine.seed));
  for (unsigned z = 0; z < grid.z; z += cluster.z) {
    for (unsigned y = 0; y < grid.y; y += cluster.y) {
      for (unsigned x = 0; x < grid.x; x += cluster.x) run_cluster(Dim3(x, y, z));
    }
  }
}

void set_schedule(std::uint64_t seed) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.seed = seed;
}

void register_buffer(const void* data, std::size_t bytes, bool writable) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  const auto first = reinterpret_cast<std::uintptr_t>(data);
  machine.buffers.push_back({first, first + bytes, writable});
}

void clear_buffers() {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.buffers.clear();
}

void plant(const Plant& mistakes) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.planted = mistakes;
}

int& capability() { return machine.capability; }

Statistics& statistics() { return machine.statistics; }

Statistics take_statistics() {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  Statistics counts = std::exchange(machine.statistics, Statistics{});
  counts.shared_requests = std::exchange(machine.banks.requests, 0);
  counts.shared_conflicts = std::exchange(machine.banks.conflicts, 0);
  return counts;
}

const Dim3& thread_index() { return running->index; }
const Dim3& block_index() { return machine.blocks[running->block].index; }
const Dim3& block_dim() { return machine.block; }
const Dim3& grid_dim() { return machine.grid; }
int cluster_rank() { return running->block; }
int cluster_size() { return static_cast<int>(machine.blocks.size()); }

void barrier(const char* name) {
  Block& block = machine.blocks[running->block];
  if (running->number == first_thread(running->block)) ++machine.statistics.barriers;
  if (running->barriers++ == machine.planted.skipped_barrier) return;
  may_switch();
  ++block.at_barrier;
  if (block.at_barrier == block.alive) {
    complete_barrier(running->block);
  } else {
    wait_at(name);
  }
}

void named_barrier(int number, int count) {
  Statistics& statistics = machine.statistics;
  statistics.named_barriers =
      std::max<std::int64_t>(statistics.named_barriers, running->named_barriers + 1);
  if (running->named_barriers++ == machine.planted.skipped_named_barrier) return;
  if (number < 0 || number >= kNamedBarriers || count <= 0 || count % kWarp != 0) {
    fault("waits for %d threads at barrier %d; there are 16, for whole warps", count, number);
  }
  may_switch();
  NamedBarrier& named = machine.blocks[running->block].named_barriers[number];
  if (named.count == 0) {
    named.count = count;
    named.view = machine.races.nothing();
  }
  if (named.count != count) {
    fault("waits for %d threads at barrier %d while others wait there for %d", count, number,
          named.count);
  }
  named.view = machine.races.merge(named.view, machine.races.publish(running->number));
  named.threads.push_back(running->number);
  if (static_cast<int>(named.threads.size()) < count) {
    wait_at(named.name);
    return;
  }
  for (const int thread : named.threads) {
    machine.races.learn(thread, named.view);
    release(machine.threads[thread]);
  }
  named.threads.clear();
  named.count = 0;
}

void collective(const char* name, Instruction instruction, void* operands, int lanes) {
  const int group = running->number / lanes, first = group * lanes;
  if (first + lanes > first_thread(running->block) + machine.block_threads) {
    fault("is at %s in a group of fewer than %d threads", name, lanes);
  }
  Gathering& gathering = lanes == kWarp ? machine.warps[group] : machine.warpgroups[group];
  if (gathering.arrived == 0) {
    gathering.instruction = instruction;
    gathering.name = name;
  } else if (gathering.instruction != instruction) {
    fault("is at %s while other lanes of its %s are at %s", name,
          lanes == kWarp ? "warp" : "warpgroup", gathering.name);
  }
  gathering.operands[running->number - first] = operands;
  if (++gathering.arrived < lanes) {
    wait_at(name);
  } else {
    carry_out(gathering, first, lanes);
  }
}

const void* shared_to_read(std::uint32_t offset, std::uint32_t bytes, int lane) {
  const Address address = own(offset);
  const std::uint32_t word = check_shared(address, bytes, "reads");
  int thread = running->number;
  if (lane < 0) {
    machine.banks.access(running->warp, running->lane, __builtin_return_address(0), offset, bytes);
    if (one_in(kSwitchesOneIn)) may_switch();
  } else {
    thread = running->warp * kWarp + lane;
  }
  for (std::uint32_t k = word; k < word + words_of(bytes); ++k) {
    report(machine.races.read(k, thread), k, "reads");
  }
  return machine.shared.data() + place_of(address);
}

void* shared_to_write(std::uint32_t offset, std::uint32_t bytes, int lane) {
  const Address address = own(offset);
  if (lane < 0) {
    machine.banks.access(running->warp, running->lane, __builtin_return_address(0), offset, bytes);
    if (one_in(kSwitchesOneIn)) may_switch();
    return address_to_write(address, bytes);
  }
  const std::uint32_t word = check_shared(address, bytes, "writes");
  for (std::uint32_t k = word; k < word + words_of(bytes); ++k) {
    report(machine.races.write(k, running->warp * kWarp + lane), k, "writes");
  }
  return machine.shared.data() + place_of(address);
}

const void* address_to_read(Address address, std::uint32_t bytes) {
  const std::uint32_t word = check_shared(address, bytes, "reads");
  for (std::uint32_t k = word; k < word + words_of(bytes); ++k) {
    report(machine.races.read(k, running->number), k, "reads");
  }
  return machine.shared.data() + place_of(address);
}

void* address_to_write(Address address, std::uint32_t bytes) {
  const std::uint32_t word = check_shared(address, bytes, "writes");
  for (std::uint32_t k = word; k < word + words_of(bytes); ++k) {
    report(machine.races.write(k, running->number), k, "writes");
  }
  return machine.shared.data() + place_of(address);
}

const void* global_to_read(const void* from, std::uint32_t bytes) {
  check_global(from, bytes, false);
  return from;
}

void* global_to_write(void* to, std::uint32_t bytes) {
  check_global(to, bytes, true);
  return to;
}

void copy_async(std::uint32_t to, const void* from, std::uint32_t bytes,
                std::uint32_t source_bytes) {
  const std::uint32_t word = check_shared(own(to), bytes, "copies asynchronously");
  if (source_bytes > 0) check_global(from, source_bytes, false);
  Races& races = machine.races;
  const Actor agent = races.copy_agent(running->number);
  const std::size_t known = agent - machine.threads.size();
  if (known == machine.agents.size()) {
    machine.agents.push_back("an asynchronous copy of " + name_of(running->number));
  }
  for (std::uint32_t k = word; k < word + words_of(bytes); ++k) {
    report(races.copy(k, {agent, running->committed + 1}, running->number), k, "writes");
  }
  running->copies.push_back({own(to), from, bytes, source_bytes});
}

void commit_copies() {
  running->groups.push_back(running->copies.size());
  ++running->committed;
}

void wait_for_earlier_kernels() {
  if (running->kernel_waits++ != machine.planted.skipped_kernel_wait) {
    running->may_touch_global = true;
  }
}

void wait_for_copies(int pending_groups) {
  if (running->number == first_thread(running->block)) ++machine.statistics.waits;
  if (running->waits++ == machine.planted.skipped_wait) return;
  std::vector<std::size_t>& groups = running->groups;
  if (groups.size() <= static_cast<std::size_t>(pending_groups)) return;
  const std::size_t landing = groups.size() - pending_groups;
  const std::size_t end = groups[landing - 1];
  std::vector<Copy>& copies = running->copies;
  for (std::size_t k = 0; k < end; ++k) land(copies[k]);
  copies.erase(copies.begin(), copies.begin() + end);
  groups.erase(groups.begin(), groups.begin() + landing);
  for (std::size_t& later : groups) later -= end;
  machine.races.learn_copies(running->number, running->committed - pending_groups);
}

int running_thread() { return running->number; }
int first_thread(int rank) { return rank * machine.thread_numbers; }
int block_threads() { return machine.block_threads; }

std::string of_block(int rank) {
  return cluster_size() == 1 ? "" : " of block rank " + std::to_string(rank);
}

std::string name_of(Actor actor) {
  const int count = static_cast<int>(machine.threads.size());
  if (actor >= count) return machine.agents[actor - count];
  const int rank = actor / machine.thread_numbers;
  return "thread " + std::to_string(actor - first_thread(rank)) + of_block(rank);
}

int rank_of(Address address) {
  const std::uint32_t rank = address / kWindow - 1;
  if (address < kWindow || rank >= machine.blocks.size()) {
    fault("uses %u as an address of the cluster's shared memory, which mapa has not made", address);
  }
  return static_cast<int>(rank);
}

Address own(std::uint32_t offset) {
  if (offset >= kWindow) {
    fault("uses an address that mapa has made where an offset of its own shared memory stands");
  }
  return address_of(offset, running->block);
}

void wait_at(const char* name) {
  running->waits_at = name;
  machine.ready[running->warp] &= ~(1u << running->lane);
  Thread& self = *running;
  run_next(self.context, self.warp, self.lane);
}

void may_switch() {
  if (machine.seed == 0) return;
  Thread& self = *running;
  run_next(self.context, self.warp, self.lane);
}

void wake(int thread) { release(machine.threads[thread]); }

Races& races() { return machine.races; }

const Plant& planted() { return machine.planted; }

Actor add_agent(const std::string& name) {
  machine.agents.push_back(name);
  return machine.races.add_agent();
}

unsigned char* shared_bytes(Address address, std::uint32_t bytes, const char* doing) {
  const std::uint32_t offset = offset_of(address);
  if (offset % Races::kWord != 0 || offset > machine.shared_bytes ||
      bytes > machine.shared_bytes - offset) {
    fault("%s %u bytes at %u of shared memory, which has %zu", doing, bytes, offset,
          machine.shared_bytes);
  }
  return machine.shared.data() + place_of(address);
}

void agent_reads(Address address, std::uint32_t bytes, Access agent) {
  const std::uint32_t first = word_of(address);
  for (std::uint32_t k = first; k < first + bytes / Races::kWord; ++k) {
    const Clash clash = machine.races.read(k, agent, running->number);
    if (clash.kind != Clash::kNone) report(clash, k, "has an asynchronous operation read");
  }
}

void agent_writes(Address address, std::uint32_t bytes, Access agent) {
  const std::uint32_t first = word_of(address);
  for (std::uint32_t k = first; k < first + bytes / Races::kWord; ++k) {
    const Clash clash = machine.races.write(k, agent, running->number);
    if (clash.kind != Clash::kNone) report(clash, k, "has an asynchronous operation write");
  }
}

void fault(const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  throw Fault("thread " + text(running->index) + " of block " + text(block_index()) + " " +
              message);
}

}  // namespace host_sim
