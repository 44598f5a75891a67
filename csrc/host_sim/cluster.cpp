#include "host_sim/cluster.h"

#include <algorithm>
#include <vector>

namespace host_sim {
namespace {

struct Barrier {
  int missing = 0;  // threads that live and have not arrived
  int alive = 0;
  Time phases = 0;  // that have ended
  View arriving, ended;
  std::vector<int> waiting;
};

struct ThreadState {
  Time arrivals = 0, waits = 0;
};

struct State {
  Barrier barrier;
  std::vector<ThreadState> threads;
  std::vector<int> alive;                     // threads, by block
  std::vector<std::vector<Access>> visitors;  // from other blocks, by block: the last of each
} state;

void complete_if_all_arrived() {
  Barrier& barrier = state.barrier;
  if (barrier.missing > 0) return;
  ++barrier.phases;
  barrier.missing = barrier.alive;
  barrier.ended = std::move(barrier.arriving);
  barrier.arriving = races().nothing();
  for (const int thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

bool anyone_knows(int rank, Access past) {
  const int first = first_thread(rank);
  for (int thread = first; thread < first + block_threads(); ++thread) {
    if (races().follows(thread, past)) return true;
  }
  return false;
}

bool has_started(int rank) {
  const int first = first_thread(rank);
  for (int thread = first; thread < first + block_threads(); ++thread) {
    if (races().follows(running_thread(), Access{thread, 1})) return true;
  }
  return false;
}

void meet(void* const*) {}

// Whether the plant lets the running thread skip its cluster barrier of this number.
bool skipped(Time number) {
  return static_cast<std::int64_t>(number) == planted().skipped_cluster_barrier;
}

}  // namespace

Address cluster_address(std::uint32_t offset, int rank) {
  if (rank < 0 || rank >= cluster_size()) {
    fault("maps an address to block rank %d of a cluster of %d", rank, cluster_size());
  }
  if (offset >= kWindow) fault("maps %u to another block, which is no offset", offset);
  return address_of(offset, rank);
}

void cluster_arrive() {
  int nothing = 0;
  collective("barrier.cluster.arrive", &meet, &nothing);
  ThreadState& self = state.threads[running_thread()];
  if (self.arrivals > self.waits) fault("arrives at barrier.cluster again without having waited");
  statistics().cluster_barriers =
      std::max<std::int64_t>(statistics().cluster_barriers, self.arrivals + 1);
  if (skipped(self.arrivals++)) return;
  Barrier& barrier = state.barrier;
  barrier.arriving = races().merge(barrier.arriving, races().publish(running_thread()));
  --barrier.missing;
  complete_if_all_arrived();
}

void cluster_wait() {
  ThreadState& self = state.threads[running_thread()];
  if (self.waits == self.arrivals) fault("waits at barrier.cluster without having arrived");
  const Time number = self.waits++;
  if (skipped(number)) return;
  const bool one_less = planted().skipped_cluster_barrier >= 0 &&
                        static_cast<std::int64_t>(number) > planted().skipped_cluster_barrier;
  Barrier& barrier = state.barrier;
  while (barrier.phases <= number - one_less) {
    barrier.waiting.push_back(running_thread());
    wait_at("barrier.cluster.wait");
  }
  races().learn(running_thread(), barrier.ended);
}

void visit(int rank, Access by) {
  if (rank == cluster_rank()) return;
  if (state.alive[rank] == 0) {
    fault("accesses shared memory of block rank %d, whose threads have exited", rank);
  }
  if (!has_started(rank)) {
    fault(
        "accesses shared memory of block rank %d, which need not have started: no cluster barrier "
        "between",
        rank);
  }
  std::vector<Access>& visitors = state.visitors[rank];
  const auto found = std::find_if(visitors.begin(), visitors.end(),
                                  [&](const Access& a) { return a.who == by.who; });
  if (found == visitors.end()) {
    visitors.push_back(by);
  } else {
    *found = by;
  }
}

const void* cluster_to_read(Address address, std::uint32_t bytes) {
  const void* from = address_to_read(address, bytes);
  visit(rank_of(address), races().now(running_thread()));
  return from;
}

void* cluster_to_write(Address address, std::uint32_t bytes) {
  void* to = address_to_write(address, bytes);
  visit(rank_of(address), races().now(running_thread()));
  return to;
}

namespace cluster {

void start() {
  const int blocks = cluster_size();
  state.threads.assign(first_thread(blocks), ThreadState{});
  state.alive.assign(blocks, block_threads());
  state.visitors.assign(blocks, {});
  state.barrier = Barrier{};
  state.barrier.alive = state.barrier.missing = blocks * block_threads();
  state.barrier.arriving = state.barrier.ended = races().nothing();
}

void finish_thread() {
  const int rank = cluster_rank();
  ThreadState& self = state.threads[running_thread()];
  if (self.arrivals > self.waits) fault("exits between barrier.cluster.arrive and its wait");
  if (--state.alive[rank] == 0) {
    for (const Access& visitor : state.visitors[rank]) {
      if (!anyone_knows(rank, visitor)) {
        fault("is the last of its block to exit while %s may still access its shared memory",
              name_of(visitor.who).c_str());
      }
    }
  }
  Barrier& barrier = state.barrier;
  --barrier.alive;
  --barrier.missing;
  complete_if_all_arrived();
}

}  // namespace cluster
}  // namespace host_sim
