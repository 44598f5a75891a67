#include "host_sim/simulator.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "host_sim/async.h"
#include "host_sim/fiber.h"

namespace host_sim {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kNamedBarriers = 16;

struct Buffer {
  std::uintptr_t first, last;  // [first, last)
  bool writable;
};

// cp.async of one thread, in order of issue; `groups` holds where each committed group ends.
struct Copy {
  std::uint32_t to;
  const void* from;
  std::uint32_t bytes, source_bytes;
};

struct Thread {
  Dim3 index;
  int number, warp, lane;
  Context context;
  const char* waits_at;  // null: can run
  bool exited;
  int barriers, named_barriers, waits;
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

struct Machine {
  std::mutex mutex;
  std::vector<Buffer> buffers;
  Plant planted;
  Statistics statistics;
  int capability = 80;

  // The block that runs.
  Dim3 grid, block, block_index;
  const std::function<void()>* kernel = nullptr;
  std::vector<Thread> threads;
  std::vector<std::uint32_t> ready;  // lanes that can run, by warp
  std::vector<Gathering> warps, warpgroups;
  NamedBarrier named_barriers[kNamedBarriers];
  std::unique_ptr<Stacks> stacks;
  Context scheduler;
  std::exception_ptr failure;
  int alive = 0, at_barrier = 0;

  std::vector<unsigned char> shared;
  std::size_t shared_bytes = 0;
  Races races;
  std::vector<std::string> agents;  // the first one follows the last thread
};

Machine machine;
Thread* running = nullptr;  // within launch, whose lock guards all of this

std::string text(const Dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

// Which threads wait where, in runs of equal ones.
std::string whereabouts() {
  std::string all;
  const auto place = [](const Thread& t) {
    if (t.exited) return std::string("exited");
    return t.waits_at == nullptr ? std::string("can run") : "wait at " + std::string(t.waits_at);
  };
  for (std::size_t first = 0, next; first < machine.threads.size(); first = next) {
    const std::string where = place(machine.threads[first]);
    for (next = first + 1;
         next < machine.threads.size() && place(machine.threads[next]) == where;) {
      ++next;
    }
    all += (all.empty() ? "" : "; ") + ("threads " + std::to_string(first) + "-") +
           std::to_string(next - 1) + " " + where;
  }
  return all;
}

// Switches from `from` to a thread that can run: of the same warp where there is one, so that its
// lanes reach the next instruction together. Returns when `from` is switched to again, which for
// the scheduler is at the end of the block or at a fault.
void run_next(Context& from, int warp, int lane) {
  const int warps = static_cast<int>(machine.warps.size());
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
  } while (async::land_one());
  if (machine.alive > 0) {
    machine.failure = std::make_exception_ptr(
        Fault("deadlock in block " + text(machine.block_index) + ": " + whereabouts()));
  }
  switch_context(from, machine.scheduler);
}

void release(Thread& thread) {
  thread.waits_at = nullptr;
  machine.ready[thread.warp] |= 1u << thread.lane;
}

// Barriers wait for those that live, so the last arrival or the last exit completes one.
void complete_barrier() {
  if (machine.at_barrier == 0 || machine.at_barrier < machine.alive) return;
  machine.at_barrier = 0;
  machine.races.join_all();
  for (Thread& thread : machine.threads) {
    if (!thread.exited) release(thread);
  }
}

void thread_main() {
  try {
    (*machine.kernel)();
    if (!running->copies.empty()) {
      fault("exits with %zu asynchronous copies that it never waited for", running->copies.size());
    }
    async::finish_thread();
  } catch (...) {
    machine.failure = std::current_exception();
  }
  if (machine.failure) switch_context(running->context, machine.scheduler);
  running->exited = true;
  machine.ready[running->warp] &= ~(1u << running->lane);
  --machine.alive;
  complete_barrier();
  run_next(running->context, running->warp, running->lane);
  std::terminate();  // an exited thread is never switched to
}

void run_block() {
  const int count = static_cast<int>(machine.threads.size());
  for (Gathering& gathering : machine.warps) gathering.arrived = 0;
  for (Gathering& gathering : machine.warpgroups) gathering.arrived = 0;
  for (int i = 0; i < kNamedBarriers; ++i) {
    NamedBarrier& named = machine.named_barriers[i];
    std::snprintf(named.name, sizeof(named.name), "bar.sync %d", i);
    named.count = 0;
    named.threads.clear();
  }
  machine.ready.assign(machine.warps.size(), 0);
  machine.agents.clear();
  machine.races.start(count, machine.shared_bytes);
  async::start_block(count);
  for (int i = 0; i < count; ++i) {
    Thread& thread = machine.threads[i];
    const Dim3& block = machine.block;
    thread.index = Dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
    thread.number = i;
    thread.warp = i / kWarp;
    thread.lane = i % kWarp;
    thread.context = machine.stacks->start(i, &thread_main);
    thread.exited = false;
    thread.barriers = thread.named_barriers = thread.waits = 0;
    thread.committed = 0;
    thread.copies.clear();
    thread.groups.clear();
    release(thread);
  }
  std::memset(machine.shared.data(), 0xff, machine.shared_bytes);
  machine.alive = count;
  machine.at_barrier = 0;
  machine.failure = nullptr;
  run_next(machine.scheduler, 0, 0);
  running = nullptr;
  if (machine.failure) std::rethrow_exception(machine.failure);
  async::finish_block();
}

std::uint32_t check_shared(std::uint32_t offset, std::uint32_t bytes, const char* what) {
  if (offset > machine.shared_bytes || bytes > machine.shared_bytes - offset) {
    fault("%s %u bytes at %u of shared memory, which has %zu", what, bytes, offset,
          machine.shared_bytes);
  }
  if (offset % bytes != 0) {
    fault("%s %u bytes at %u of shared memory, which is no multiple of that", what, bytes, offset);
  }
  return offset / Races::kWord;
}

void check_global(const void* pointer, std::uint32_t bytes, bool write) {
  const char* what = write ? "writes" : "reads";
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
  const std::uint32_t byte = word * Races::kWord;
  const int count = static_cast<int>(machine.threads.size());
  const bool agent = clash.other >= count;
  const std::string who =
      agent ? machine.agents[clash.other - count] : "thread " + std::to_string(clash.other);
  if (clash.kind == Clash::kUnfenced) {
    fault("%s byte %u of shared memory, which %s wrote, with no fence.proxy.async between", doing,
          byte, who.c_str());
  }
  const bool wrote = clash.kind == Clash::kWithWrite;
  if (agent) {
    fault("%s byte %u of shared memory while %s %s it is in flight", doing, byte, who.c_str(),
          wrote ? "to" : "from");
  }
  fault("races for byte %u of shared memory: it %s what %s %s, with no barrier between", byte,
        doing, who.c_str(), wrote ? "wrote" : "read");
}

std::uint32_t words_of(std::uint32_t bytes) { return (bytes + Races::kWord - 1) / Races::kWord; }

void land(const Copy& copy) {
  unsigned char* to = machine.shared.data() + copy.to;
  std::memcpy(to, copy.from, copy.source_bytes);
  std::memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

void check_aligned_range(std::uint32_t offset, std::uint32_t bytes, const char* doing) {
  if (offset % Races::kWord != 0 || offset > machine.shared_bytes ||
      bytes > machine.shared_bytes - offset) {
    fault("%s %u bytes at %u of shared memory, which has %zu", doing, bytes, offset,
          machine.shared_bytes);
  }
}

// Carries out the instruction for which the last of `lanes` threads has come.
void carry_out(Gathering& gathering, int first, int lanes) {
  gathering.instruction(gathering.operands);
  gathering.arrived = 0;
  for (int lane = 0; lane < lanes; ++lane) release(machine.threads[first + lane]);
}

}  // namespace

void launch(Dim3 grid, Dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  const unsigned count = block.x * block.y * block.z;
  if (count == 0 || count > kMaxThreads) {
    throw Fault("a block of " + std::to_string(count) + " threads; 1 to 1024 are possible");
  }
  machine.grid = grid;
  machine.block = block;
  machine.kernel = &kernel;
  machine.threads.resize(count);
  machine.warps.resize((count + kWarp - 1) / kWarp);
  machine.warpgroups.resize((count + kWarpgroup - 1) / kWarpgroup);
  if (machine.stacks == nullptr || machine.stacks->count() < static_cast<int>(count)) {
    machine.stacks = std::make_unique<Stacks>(count);
  }
  machine.shared_bytes = shared_bytes;
  machine.shared.resize(std::max(machine.shared.size(), shared_bytes));
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        machine.block_index = Dim3(x, y, z);
        run_block();
      }
    }
  }
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

const Dim3& thread_index() { return running->index; }
const Dim3& block_index() { return machine.block_index; }
const Dim3& block_dim() { return machine.block; }
const Dim3& grid_dim() { return machine.grid; }

void barrier(const char* name) {
  if (running->number == 0) ++machine.statistics.barriers;
  if (running->barriers++ == machine.planted.skipped_barrier) return;
  ++machine.at_barrier;
  if (machine.at_barrier == machine.alive) {
    complete_barrier();
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
  NamedBarrier& named = machine.named_barriers[number];
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
  if (first + lanes > static_cast<int>(machine.threads.size())) {
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
  const std::uint32_t word = check_shared(offset, bytes, "reads");
  const int thread = lane < 0 ? running->number : running->warp * kWarp + lane;
  for (std::uint32_t k = word; k < word + words_of(bytes); ++k) {
    report(machine.races.read(k, thread), k, "reads");
  }
  return machine.shared.data() + offset;
}

void* shared_to_write(std::uint32_t offset, std::uint32_t bytes) {
  const std::uint32_t word = check_shared(offset, bytes, "writes");
  for (std::uint32_t k = word; k < word + words_of(bytes); ++k) {
    report(machine.races.write(k, running->number), k, "writes");
  }
  return machine.shared.data() + offset;
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
  const std::uint32_t word = check_shared(to, bytes, "copies asynchronously");
  if (source_bytes > 0) check_global(from, source_bytes, false);
  Races& races = machine.races;
  const Actor agent = races.copy_agent(running->number);
  const std::size_t known = agent - machine.threads.size();
  if (known == machine.agents.size()) {
    machine.agents.push_back("an asynchronous copy of thread " + std::to_string(running->number));
  }
  for (std::uint32_t k = word; k < word + words_of(bytes); ++k) {
    report(races.copy(k, {agent, running->committed + 1}, running->number), k, "writes");
  }
  running->copies.push_back({to, from, bytes, source_bytes});
}

void commit_copies() {
  running->groups.push_back(running->copies.size());
  ++running->committed;
}

void wait_for_copies(int pending_groups) {
  if (running->number == 0) ++machine.statistics.waits;
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

void wait_at(const char* name) {
  running->waits_at = name;
  machine.ready[running->warp] &= ~(1u << running->lane);
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

unsigned char* shared_bytes(std::uint32_t offset, std::uint32_t bytes, const char* doing) {
  check_aligned_range(offset, bytes, doing);
  return machine.shared.data() + offset;
}

void agent_reads(std::uint32_t offset, std::uint32_t bytes, Access agent) {
  for (std::uint32_t k = offset / Races::kWord; k < (offset + bytes) / Races::kWord; ++k) {
    const Clash clash = machine.races.read(k, agent, running->number);
    if (clash.kind != Clash::kNone) report(clash, k, "has an asynchronous operation read");
  }
}

void agent_writes(std::uint32_t offset, std::uint32_t bytes, Access agent) {
  for (std::uint32_t k = offset / Races::kWord; k < (offset + bytes) / Races::kWord; ++k) {
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
  throw Fault("thread " + text(running->index) + " of block " + text(machine.block_index) + " " +
              message);
}

}  // namespace host_sim
