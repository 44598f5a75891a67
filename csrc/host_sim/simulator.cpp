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

#include "host_sim/fiber.h"

namespace host_sim {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kWord = 4;  // bytes: the grain of the race check

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
  int barriers, waits;
  std::vector<Copy> copies;
  std::vector<std::size_t> groups;
};

struct Warp {
  std::uint32_t ready;    // lanes that can run
  std::uint32_t arrived;  // lanes at `instruction`
  Instruction instruction;
  const char* name;
  void* operands[kWarp];
};

// Who last touched a word of shared memory, and in which epoch: between which barriers.
struct Word {
  std::uint64_t written = 0, read = 0;
  std::int16_t writer = 0, reader = 0;  // reader kSeveral: more than one thread
  bool in_flight = false;
};
constexpr std::int16_t kSeveral = -1;

struct Machine {
  std::mutex mutex;
  std::vector<Buffer> buffers;
  Plant planted;
  Statistics statistics;

  // The block that runs.
  Dim3 grid, block, block_index;
  const std::function<void()>* kernel = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<Stacks> stacks;
  Context scheduler;
  std::exception_ptr failure;
  int alive = 0, at_barrier = 0;

  std::vector<unsigned char> shared;
  std::size_t shared_bytes = 0;
  std::vector<Word> words;
  std::uint64_t epoch = 0;
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
  for (int k = 0; k < warps; ++k) {
    const int w = warp + k < warps ? warp + k : warp + k - warps;
    std::uint32_t ready = machine.warps[w].ready;
    if (ready == 0) continue;
    if (k == 0 && (ready & (~0u << lane)) != 0) ready &= ~0u << lane;
    running = &machine.threads[w * kWarp + __builtin_ctz(ready)];
    switch_context(from, running->context);
    return;
  }
  if (machine.alive > 0) {
    machine.failure = std::make_exception_ptr(
        Fault("deadlock in block " + text(machine.block_index) + ": " + whereabouts()));
  }
  switch_context(from, machine.scheduler);
}

void wait_at(const char* name) {
  running->waits_at = name;
  machine.warps[running->warp].ready &= ~(1u << running->lane);
  Thread& self = *running;
  run_next(self.context, self.warp, self.lane);
}

void release(Thread& thread) {
  thread.waits_at = nullptr;
  machine.warps[thread.warp].ready |= 1u << thread.lane;
}

// Barriers wait for those that live, so the last arrival or the last exit completes one.
void complete_barrier() {
  if (machine.at_barrier == 0 || machine.at_barrier < machine.alive) return;
  machine.at_barrier = 0;
  ++machine.epoch;
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
  } catch (...) {
    machine.failure = std::current_exception();
  }
  if (machine.failure) switch_context(running->context, machine.scheduler);
  running->exited = true;
  machine.warps[running->warp].ready &= ~(1u << running->lane);
  --machine.alive;
  complete_barrier();
  run_next(running->context, running->warp, running->lane);
  std::terminate();  // an exited thread is never switched to
}

void run_block() {
  const int count = static_cast<int>(machine.threads.size());
  std::fill(machine.warps.begin(), machine.warps.end(), Warp{});
  for (int i = 0; i < count; ++i) {
    Thread& thread = machine.threads[i];
    const Dim3& block = machine.block;
    thread.index = Dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
    thread.number = i;
    thread.warp = i / kWarp;
    thread.lane = i % kWarp;
    thread.context = machine.stacks->start(i, &thread_main);
    thread.exited = false;
    thread.barriers = thread.waits = 0;
    thread.copies.clear();
    thread.groups.clear();
    release(thread);
  }
  std::memset(machine.shared.data(), 0xff, machine.shared_bytes);
  ++machine.epoch;
  machine.alive = count;
  machine.at_barrier = 0;
  machine.failure = nullptr;
  run_next(machine.scheduler, 0, 0);
  running = nullptr;
  if (machine.failure) std::rethrow_exception(machine.failure);
}

std::uint32_t check_shared(std::uint32_t offset, std::uint32_t bytes, const char* what) {
  if (offset > machine.shared_bytes || bytes > machine.shared_bytes - offset) {
    fault("%s %u bytes at %u of shared memory, which has %zu", what, bytes, offset,
          machine.shared_bytes);
  }
  if (offset % bytes != 0) {
    fault("%s %u bytes at %u of shared memory, which is no multiple of that", what, bytes, offset);
  }
  return offset / kWord;
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

[[noreturn]] void race(std::uint32_t word, const char* doing, int other, const char* did) {
  const std::string who = other == kSeveral ? "several threads" : "thread " + std::to_string(other);
  fault("races for byte %u of shared memory: it %s what %s %s, with no barrier between",
        word * kWord, doing, who.c_str(), did);
}

[[noreturn]] void in_flight(std::uint32_t word, const char* doing, int writer) {
  fault("%s byte %u of shared memory while an asynchronous copy of thread %d to it is in flight",
        doing, word * kWord, writer);
}

void note_read(std::uint32_t word, std::int16_t thread) {
  Word& w = machine.words[word];
  if (w.in_flight) in_flight(word, "reads", w.writer);
  if (w.written == machine.epoch && w.writer != thread) race(word, "reads", w.writer, "wrote");
  if (w.read != machine.epoch) {
    w.read = machine.epoch;
    w.reader = thread;
  } else if (w.reader != thread) {
    w.reader = kSeveral;
  }
}

void note_write(std::uint32_t word, std::int16_t thread) {
  Word& w = machine.words[word];
  if (w.in_flight) in_flight(word, "writes", w.writer);
  if (w.written == machine.epoch && w.writer != thread) race(word, "writes", w.writer, "wrote");
  if (w.read == machine.epoch && w.reader != thread) race(word, "writes", w.reader, "read");
  w.written = machine.epoch;
  w.writer = thread;
}

std::uint32_t words_of(std::uint32_t bytes) { return (bytes + kWord - 1) / kWord; }

void land(const Copy& copy) {
  unsigned char* to = machine.shared.data() + copy.to;
  std::memcpy(to, copy.from, copy.source_bytes);
  std::memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  for (std::uint32_t k = 0; k < words_of(copy.bytes); ++k) {
    Word& word = machine.words[copy.to / kWord + k];
    word.in_flight = false;
    word.written = machine.epoch;
  }
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
  if (machine.stacks == nullptr || machine.stacks->count() < static_cast<int>(count)) {
    machine.stacks = std::make_unique<Stacks>(count);
  }
  machine.shared_bytes = shared_bytes;
  machine.shared.resize(std::max(machine.shared.size(), shared_bytes));
  machine.words.assign(std::max<std::size_t>(machine.words.size(), words_of(shared_bytes)), Word{});
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

void collective(const char* name, Instruction instruction, void* operands) {
  Warp& warp = machine.warps[running->warp];
  if (warp.arrived == 0) {
    warp.instruction = instruction;
    warp.name = name;
  } else if (warp.instruction != instruction) {
    fault("is at %s while other lanes of its warp are at %s", name, warp.name);
  }
  warp.operands[running->lane] = operands;
  warp.arrived |= 1u << running->lane;
  if (warp.arrived != ~0u) {
    wait_at(name);
    return;
  }
  instruction(warp.operands);
  warp.arrived = 0;
  warp.ready = ~0u;
  Thread* lanes = &machine.threads[running->warp * kWarp];
  for (int lane = 0; lane < kWarp; ++lane) lanes[lane].waits_at = nullptr;
}

const void* shared_to_read(std::uint32_t offset, std::uint32_t bytes, int lane) {
  const std::uint32_t word = check_shared(offset, bytes, "reads");
  const int thread = lane < 0 ? running->number : running->warp * kWarp + lane;
  for (std::uint32_t k = 0; k < words_of(bytes); ++k) note_read(word + k, thread);
  return machine.shared.data() + offset;
}

void* shared_to_write(std::uint32_t offset, std::uint32_t bytes) {
  const std::uint32_t word = check_shared(offset, bytes, "writes");
  for (std::uint32_t k = 0; k < words_of(bytes); ++k) note_write(word + k, running->number);
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
  for (std::uint32_t k = 0; k < words_of(bytes); ++k) {
    note_write(word + k, running->number);
    machine.words[word + k].in_flight = true;
  }
  running->copies.push_back({to, from, bytes, source_bytes});
}

void commit_copies() { running->groups.push_back(running->copies.size()); }

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
