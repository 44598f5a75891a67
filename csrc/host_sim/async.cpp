#include "host_sim/async.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "host_sim/cluster.h"
#include "host_sim/layout.h"

namespace host_sim {
namespace {

constexpr std::uint64_t kMbarrierBits = 0x6d62617272696572;  // what an mbarrier's bytes hold
constexpr std::int64_t kMaxBytes = (1 << 20) - 1;            // that a phase can await
constexpr int kRows = 64;                                    // of a warpgroup's operands
template <typename T>
constexpr int kDepth = 32 / sizeof(T);
// The second operand of products of T.
template <typename T>
using Other = std::conditional_t<std::is_integral_v<T>, std::int8_t, T>;

struct Mbarrier {
  std::string place;
  char name[160];                      // the place and what is missing
  std::uint32_t count, awaited;        // arrivals of a phase; still missing in this one
  std::int64_t bytes = 0;              // announced and not yet here
  Time phases = 0;                     // that have ended
  View arriving, ended;                // what this phase's arrivals know, and the last one's:
  View arriving_across, ended_across;  // those of other blocks' threads, at the cluster's scope
  Access initialised;
  bool fenced = false;
  Actor agent;
  std::vector<int> waiting;
};

struct Load {
  Address mbarrier;
  std::uint32_t bytes;
  std::vector<Chunk> chunks;
};

// What a lane's four registers of an operand hold while products read them.
struct Held {
  int lane;
  const std::uint32_t* registers;
  std::array<std::uint32_t, 4> values;
};

// The results of products under way, for the registers that `d` points to, lane by lane, by their
// bits.
struct Products {
  std::array<std::uint32_t*, kWarpgroup> d;
  int n;
  std::vector<std::uint32_t> values;  // (64, n)
  Time group;
  int delivered;  // lanes that have them
  std::vector<Held> held = {};
};

struct Warpgroup {
  Actor agent = -1;
  std::vector<Products> products;
  int registers = 0, claimed = 0;  // of each thread; 0 before it is known
  char claim[96];                  // what messages call it
};

struct ThreadState {
  int arrivals = 0, mbarrier_waits = 0, product_waits = 0, store_waits = 0, proxy_fences = 0,
      releases = 0;
  Actor stores = -1;
  Time stores_committed = 0, stores_done = 0;
  bool stores_open = false;  // some belong to no group yet
  Time products_committed = 0;
  bool registers_fenced = false;
  bool waits_bounded = false;
};

struct Block {
  int free_registers = 0;
  std::deque<int> claims;  // warpgroups that wait for registers
};

struct State {
  std::vector<ThreadState> threads;
  std::vector<Warpgroup> warpgroups;
  std::vector<Block> blocks;
  std::map<Address, Mbarrier> mbarriers;
  std::deque<Load> loads;
} state;

ThreadState& self() { return state.threads[running_thread()]; }

// Counts what a thread does for the n-th time, and whether the plant lets it skip that.
bool skipped(int& count, std::int64_t& most, int plant) {
  most = std::max<std::int64_t>(most, count + 1);
  return count++ == plant;
}

void describe(Mbarrier& barrier) {
  const char* more = barrier.bytes < 0 ? "; more bytes than expected have come" : "";
  std::snprintf(barrier.name, sizeof(barrier.name),
                "%s (phase %u, %u arrivals and %lld bytes missing%s)", barrier.place.c_str(),
                barrier.phases, barrier.awaited,
                static_cast<long long>(std::max<std::int64_t>(barrier.bytes, 0)), more);
}

Mbarrier& mbarrier(Address at) {
  const std::uint32_t offset = offset_of(at);
  const auto found = state.mbarriers.find(at);
  if (found == state.mbarriers.end()) {
    fault("uses %u of shared memory%s, which is no mbarrier", offset,
          of_block(rank_of(at)).c_str());
  }
  std::uint64_t bits;
  std::memcpy(&bits, shared_bytes(at, sizeof(bits), "uses"), sizeof(bits));
  const std::string& place = found->second.place;
  if (bits != kMbarrierBits) fault("uses %s, which something has overwritten", place.c_str());
  const Access initialised = found->second.initialised;
  if (!races().knows(running_thread(), initialised)) {
    fault("uses %s, which %s initialised with no barrier between", place.c_str(),
          name_of(initialised.who).c_str());
  }
  return found->second;
}

void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.awaited == 0 && barrier.bytes == 0) {
    ++barrier.phases;
    barrier.awaited = barrier.count;
    barrier.ended = std::move(barrier.arriving);
    barrier.arriving = races().nothing();
    barrier.ended_across = std::move(barrier.arriving_across);
    barrier.arriving_across = races().nothing();
    for (const int thread : barrier.waiting) wake(thread);
    barrier.waiting.clear();
  }
  describe(barrier);
}

// Checks the box's place in shared memory, and returns its size.
std::uint32_t check_box(const CUtensorMap& map, Address at) {
  std::uint32_t bytes = static_cast<std::uint32_t>(map.stride[0]);
  for (int d = 0; d < (map.im2col ? 2 : map.rank); ++d) bytes *= map.box[d];
  if (at % 128 != 0) fault("copies a tensor to or from %u, no multiple of 128", offset_of(at));
  shared_bytes(at, bytes, "copies a tensor of");
  return bytes;
}

void check_global(const Chunk& chunk, std::uint32_t element, bool write) {
  const std::uint32_t step = chunk.bytes == kChunk ? kChunk : element;
  for (std::uint32_t k = 0; k < chunk.bytes; k += step) {
    write ? static_cast<void>(global_to_write(chunk.global + k, step))
          : static_cast<void>(global_to_read(chunk.global + k, step));
  }
}

float wide(__half v) { return __half2float(v); }
float wide(__nv_bfloat16 v) { return __bfloat162float(v); }
float wide(__nv_fp8_e4m3 v) { return static_cast<float>(v); }
std::int32_t wide(std::uint8_t v) { return v; }
std::int32_t wide(std::int8_t v) { return v; }

// An operand, as rows of kDepth<T> elements: K-major, or transposed.
template <typename T>
void read_operand(std::uint64_t descriptor, int rows, bool transposed, Access agent, Sum<T>* to) {
  constexpr int kElements = kChunk / sizeof(T);
  Matrix matrix = decode(descriptor);
  matrix.base += static_cast<std::uint32_t>(planted().base_offset);
  const int lines = transposed ? kDepth<T> : rows, length = transposed ? rows : kDepth<T>;
  for (int line = 0; line < lines; ++line) {
    for (int chunk = 0; chunk < length / kElements; ++chunk) {
      const Address at = own(transposed ? transposed_chunk_address(matrix, line, chunk)
                                        : chunk_address(matrix, line, chunk));
      const unsigned char* bytes = shared_bytes(at, kChunk, "multiplies");
      agent_reads(at, kChunk, agent);
      T values[kElements];
      std::memcpy(values, bytes, sizeof(values));
      for (int e = 0; e < kElements; ++e) {
        const int in_line = chunk * kElements + e;
        to[transposed ? in_line * kDepth<T> + line : line * length + in_line] = wide(values[e]);
      }
    }
  }
}

struct Product {
  void* d;
  int n;
  const std::uint32_t* registers;  // of a, or null
  std::uint64_t a, b;
  bool accumulate;
  Transposed transposed;
};

// "Register Fragments and Shared Memory Matrix Layouts", D of m64nNk16 and m64nNk32: its value i of
// a lane.
int row_of(int lane, int i) { return lane / 32 * 16 + lane % 32 / 4 + i / 2 % 2 * 8; }
int column_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

constexpr std::uint32_t kNanBits = 0x7fc00000;

float add(float a, float b) { return a + b; }
std::int32_t add(std::int32_t a, std::int32_t b) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) + static_cast<std::uint32_t>(b));
}

// d plus the products of e4m3 numbers a and b, as async.h says.
float add_products(float d, const float* a, const float* b) {
  constexpr int kTerms = kDepth<__nv_fp8_e4m3> + 1, kBits = 13;  // behind the point
  float terms[kTerms] = {d}, largest = std::fabs(d), all = d;
  for (int i = 1; i < kTerms; ++i) {
    terms[i] = a[i - 1] * b[i - 1];
    largest = std::max(largest, std::fabs(terms[i]));
    all += terms[i];
  }
  if (largest == 0.0f || std::isnan(all)) return all;
  const float scale = std::ldexp(1.0f, kBits - std::ilogb(largest));
  int sum = 0;
  for (const float term : terms) sum += static_cast<int>(term * scale);  // cut towards zero
  int unit = 1;
  while (std::abs(sum / unit) >= 2 << kBits) unit *= 2;
  return static_cast<float>(sum / unit * unit) / scale;
}

template <typename T>
void multiply(void* const* operands) {
  using Value = Sum<T>;
  const auto lane_of = [&](int lane) { return *static_cast<const Product*>(operands[lane]); };
  const int group = running_thread() / kWarpgroup;
  Warpgroup& warpgroup = state.warpgroups[group];
  const Product first = lane_of(0);
  const Time time = self().products_committed + 1;
  if (warpgroup.agent < 0) {
    const int thread = group * kWarpgroup - first_thread(cluster_rank());
    warpgroup.agent = add_agent("wgmma of threads " + std::to_string(thread) + "-" +
                                std::to_string(thread + kWarpgroup - 1) + of_block(cluster_rank()));
  }
  std::vector<Products>& all = warpgroup.products;
  auto found = std::find_if(all.begin(), all.end(),
                            [&](const Products& p) { return p.d[0] == first.d && p.n == first.n; });
  if (found == all.end()) {
    found = all.insert(all.end(),
                       Products{{}, first.n, std::vector<std::uint32_t>(kRows * first.n), 0, 0});
    for (int lane = 0; lane < kWarpgroup; ++lane) {
      if (!state.threads[group * kWarpgroup + lane].registers_fenced) {
        fault("multiplies into registers that it has used since the last wgmma.fence");
      }
      std::uint32_t* const d = found->d[lane] = static_cast<std::uint32_t*>(lane_of(lane).d);
      for (int i = 0; i < first.n / 2; ++i) {
        std::uint32_t& value = found->values[row_of(lane, i) * first.n + column_of(lane, i)];
        std::memcpy(&value, d + i, sizeof(value));
        std::memcpy(d + i, &kNanBits, sizeof(kNanBits));
      }
    }
  }
  found->group = time;
  for (int lane = 0; lane < kWarpgroup; ++lane) {
    const Product p = lane_of(lane);
    if (p.d != found->d[lane] || p.n != first.n || p.a != first.a || p.b != first.b ||
        p.accumulate != first.accumulate || p.transposed.a != first.transposed.a ||
        p.transposed.b != first.transposed.b || !p.registers != !first.registers) {
      fault("multiplies other matrices than the rest of its warpgroup");
    }
  }

  std::vector<Value> a(kRows * kDepth<T>), b(first.n * kDepth<T>), column(first.n);
  if (first.registers == nullptr) {
    read_operand<T>(first.a, kRows, first.transposed.a, {warpgroup.agent, time}, a.data());
  }
  for (int lane = 0; first.registers != nullptr && lane < kWarpgroup; ++lane) {
    if (!state.threads[group * kWarpgroup + lane].registers_fenced) {
      fault("multiplies registers that it has used since the last wgmma.fence");
    }
    Held held{lane, lane_of(lane).registers, {}};
    std::memcpy(held.values.data(), held.registers, sizeof(held.values));
    found->held.push_back(held);
    for (int i = 0; i < 8; ++i) {  // two to a register
      T value;
      std::memcpy(&value, reinterpret_cast<const T*>(held.values.data()) + i, sizeof(value));
      const int row = lane / 32 * 16 + lane % 32 / 4 + i / 2 % 2 * 8;
      a[row * kDepth<T> + lane % 4 * 2 + i % 2 + i / 4 * 8] = wide(value);
    }
  }
  read_operand<Other<T>>(first.b, first.n, first.transposed.b, {warpgroup.agent, time}, b.data());
  std::vector<Value> sums(found->values.size());
  const std::size_t bytes = sums.size() * sizeof(Value);
  if (first.accumulate) std::memcpy(sums.data(), found->values.data(), bytes);
  if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) {
    for (std::size_t i = 0; i < sums.size(); ++i) {
      const Value* const row = a.data() + i / first.n * kDepth<T>;
      sums[i] = add_products(sums[i], row, b.data() + i % first.n * kDepth<T>);
    }
  } else {
    for (int depth = 0; depth < kDepth<T>; ++depth) {
      for (int k = 0; k < first.n; ++k) column[k] = b[k * kDepth<T> + depth];
      for (int row = 0; row < kRows; ++row) {
        const Value factor = a[row * kDepth<T> + depth];
        Value* const d = sums.data() + row * first.n;
        for (int k = 0; k < first.n; ++k) d[k] = add(d[k], factor * column[k]);
      }
    }
  }
  std::memcpy(found->values.data(), sums.data(), bytes);
  ++statistics().products;
}

Block& own_block() { return state.blocks[cluster_rank()]; }
Warpgroup& own_warpgroup() { return state.warpgroups[running_thread() / kWarpgroup]; }

// Gives free registers to those who wait for them, first come, first served.
void grant_registers() {
  const auto needed = [](const Warpgroup& w) { return (w.claimed - w.registers) * kWarpgroup; };
  Block& block = own_block();
  std::deque<int>& claims = block.claims;
  while (!claims.empty() && needed(state.warpgroups[claims.front()]) <= block.free_registers) {
    const int group = claims.front();
    Warpgroup& warpgroup = state.warpgroups[group];
    block.free_registers -= needed(warpgroup);
    warpgroup.registers = warpgroup.claimed;
    for (int lane = 0; lane < kWarpgroup; ++lane) wake(group * kWarpgroup + lane);
    claims.pop_front();
  }
  for (const int group : claims) {
    Warpgroup& warpgroup = state.warpgroups[group];
    std::snprintf(warpgroup.claim, sizeof(warpgroup.claim),
                  "setmaxnreg.inc to %d (which takes %d registers, and %d are free)",
                  warpgroup.claimed, needed(warpgroup), block.free_registers);
  }
}

template <bool kClaims>
void change_registers(void* const* operands) {
  const int registers = *static_cast<const int*>(operands[0]);
  Warpgroup& own = own_warpgroup();
  for (int lane = 1; lane < kWarpgroup; ++lane) {
    if (*static_cast<const int*>(operands[lane]) != registers) {
      fault("sets its registers to %d, and another thread of its warpgroup to %d", registers,
            *static_cast<const int*>(operands[lane]));
    }
  }
  if (registers < 24 || registers > 256 || registers % 8 != 0) {
    fault("sets its registers to %d, no multiple of 8 from 24 to 256", registers);
  }
  if (own.registers == 0) fault("sets its registers, whose number at launch is not known");
  if (kClaims ? registers < own.registers : registers > own.registers) {
    fault("%s %d registers and has %d", kClaims ? "claims" : "releases all but", registers,
          own.registers);
  }
  own.claimed = registers;
  if (kClaims) {
    own_block().claims.push_back(running_thread() / kWarpgroup);
  } else {
    own_block().free_registers += (own.registers - registers) * kWarpgroup;
    own.registers = registers;
  }
  grant_registers();
}

}  // namespace

void mbarrier_init(std::uint32_t offset, std::uint32_t count) {
  if (offset % 8 != 0) fault("initialises an mbarrier at %u, no multiple of 8", offset);
  if (count == 0 || count >= 1u << 20) fault("initialises an mbarrier for %u arrivals", count);
  const Address at = own(offset);
  std::memcpy(address_to_write(at, sizeof(kMbarrierBits)), &kMbarrierBits, sizeof(kMbarrierBits));
  Mbarrier barrier{};
  barrier.count = barrier.awaited = count;
  barrier.arriving = barrier.ended = races().nothing();
  barrier.arriving_across = barrier.ended_across = races().nothing();
  barrier.initialised = races().now(running_thread());
  barrier.place = "the mbarrier at " + std::to_string(offset) + of_block(cluster_rank());
  barrier.agent = add_agent("a bulk copy that " + barrier.place + " counts");
  describe(state.mbarriers[at] = std::move(barrier));
}

void fence_mbarrier_init() {
  for (auto& [at, barrier] : state.mbarriers) {
    if (barrier.initialised.who == running_thread()) barrier.fenced = true;
  }
}

void mbarrier_arrive(Address at, std::uint32_t expected_bytes, Scope scope) {
  may_switch();
  Mbarrier& barrier = mbarrier(at);
  visit(rank_of(at), races().now(running_thread()));
  if (self().arrivals++ == planted().skipped_arrival) return;
  if (barrier.awaited == 0) fault("arrives at %s, whose arrivals are complete", barrier.name);
  if (expected_bytes > 0) {
    barrier.bytes += std::int64_t{expected_bytes} - planted().bytes_not_expected;
    if (barrier.bytes > kMaxBytes) {
      fault("expects %lld bytes at one mbarrier", static_cast<long long>(barrier.bytes));
    }
  }
  const bool across = rank_of(at) != cluster_rank();
  View view = races().publish(running_thread());
  if (across && scope == Scope::kBlock) view = races().weakened(view);
  View& arriving = across ? barrier.arriving_across : barrier.arriving;
  arriving = races().merge(arriving, view);
  --barrier.awaited;
  end_phase_if_complete(barrier);
}

bool mbarrier_wait(std::uint32_t offset, unsigned parity, Scope scope, bool bounded) {
  may_switch();
  Mbarrier& barrier = mbarrier(own(offset));
  if (barrier.phases == 0 && parity == 1) return true;  // the phase before the first
  if (skipped(self().mbarrier_waits, statistics().mbarrier_waits,
              planted().skipped_mbarrier_wait)) {
    return true;
  }
  while (barrier.phases % 2 == parity) {
    barrier.waiting.push_back(running_thread());
    self().waits_bounded = bounded;
    wait_at(barrier.name);
    if (std::exchange(self().waits_bounded, false) != bounded) return false;
  }
  races().learn(running_thread(), barrier.ended);
  const View& across = barrier.ended_across;
  races().learn(running_thread(), scope == Scope::kCluster ? across : races().weakened(across));
  races().learn(running_thread(), Access{barrier.agent, barrier.phases});
  return true;
}

void fence_proxy() {
  if (!skipped(self().proxy_fences, statistics().proxy_fences, planted().skipped_proxy_fence)) {
    races().fence(running_thread());
  }
}

namespace {

// The part of a load that lands in the block of that rank.
void load_to(int rank, std::uint32_t to, const CUtensorMap& map, std::uint32_t mbarrier_offset,
             const std::int32_t* coordinates, const std::uint16_t* offsets) {
  const Address place = address_of(to, rank), at = address_of(mbarrier_offset, rank);
  Mbarrier& barrier = mbarrier(at);
  if (!barrier.fenced) fault("counts bytes by %s, with no fence.mbarrier_init", barrier.name);
  Load load{at, check_box(map, place),
            map.im2col ? pixel_chunks(map, coordinates, offsets, place)
                       : tile_chunks(map, coordinates, place)};
  for (const Chunk& chunk : load.chunks) check_global(chunk, map.stride[0], false);
  const Access access{barrier.agent, barrier.phases + 1};
  visit(rank, access);
  agent_writes(place, load.bytes, access);
  state.loads.push_back(std::move(load));
}

void check_mode(const CUtensorMap& map, const std::int32_t* coordinates, bool im2col) {
  if (map.im2col != im2col) fault("copies in another mode than its tensor map's");
  if (im2col && !within_box(map, coordinates)) {
    fault("starts a copy at pixel (%d, %d), outside its tensor map's box", coordinates[2],
          coordinates[1]);
  }
}

}  // namespace

void load_tensor(std::uint32_t to, const CUtensorMap& map, std::uint32_t mbarrier,
                 const std::int32_t* coordinates, const std::uint16_t* offsets,
                 std::uint16_t ranks) {
  may_switch();
  check_mode(map, coordinates, offsets != nullptr);
  if (ranks >> cluster_size() != 0) {
    fault("multicasts to ranks %#x of a cluster of %d", ranks, cluster_size());
  }
  if (ranks == 0) fault("multicasts to no block");
  ++statistics().bulk_copies;
  for (int rank = 0; rank < cluster_size(); ++rank) {
    if ((ranks >> rank & 1) != 0) load_to(rank, to, map, mbarrier, coordinates, offsets);
  }
}

void load_tensor(std::uint32_t to, const CUtensorMap& map, std::uint32_t mbarrier,
                 const std::int32_t* coordinates, const std::uint16_t* offsets) {
  load_tensor(to, map, mbarrier, coordinates, offsets,
              static_cast<std::uint16_t>(1u << cluster_rank()));
}

void store_tensor(const CUtensorMap& map, std::uint32_t offset, const std::int32_t* coordinates,
                  bool im2col) {
  may_switch();
  check_mode(map, coordinates, im2col);
  ++statistics().bulk_copies;
  const Address from = own(offset);
  const std::uint32_t bytes = check_box(map, from);
  ThreadState& thread = self();
  if (thread.stores < 0) {
    thread.stores = add_agent("a bulk store of " + name_of(running_thread()));
  }
  agent_reads(from, bytes, {thread.stores, thread.stores_committed + 1});
  constexpr std::uint16_t kNone[2] = {};
  for (const Chunk& chunk :
       im2col ? pixel_chunks(map, coordinates, kNone, from) : tile_chunks(map, coordinates, from)) {
    check_global(chunk, map.stride[0], true);
    if (chunk.bytes > 0) {
      std::memcpy(chunk.global, shared_bytes(chunk.shared, kChunk, "stores"), chunk.bytes);
    }
  }
  thread.stores_open = true;
}

void commit_stores() {
  ++self().stores_committed;
  self().stores_open = false;
}

void wait_for_stores(int pending_groups) {
  ThreadState& thread = self();
  if (skipped(thread.store_waits, statistics().store_waits, planted().skipped_store_wait)) return;
  if (thread.stores < 0 || thread.stores_committed <= static_cast<Time>(pending_groups)) return;
  thread.stores_done = std::max(thread.stores_done, thread.stores_committed - pending_groups);
  races().learn(running_thread(), Access{thread.stores, thread.stores_done});
}

template <typename T>
void multiply_warpgroup(Sum<T>* d, int n, std::uint64_t a, std::uint64_t b, bool accumulate,
                        Transposed transposed) {
  Product product{d, n, nullptr, a, b, accumulate, transposed};
  collective("wgmma", &multiply<T>, &product, kWarpgroup);
}
template void multiply_warpgroup<__half>(float*, int, std::uint64_t, std::uint64_t, bool,
                                         Transposed);
template void multiply_warpgroup<__nv_bfloat16>(float*, int, std::uint64_t, std::uint64_t, bool,
                                                Transposed);
template void multiply_warpgroup<__nv_fp8_e4m3>(float*, int, std::uint64_t, std::uint64_t, bool,
                                                Transposed);
template void multiply_warpgroup<std::uint8_t>(std::int32_t*, int, std::uint64_t, std::uint64_t,
                                               bool, Transposed);
template void multiply_warpgroup<std::int8_t>(std::int32_t*, int, std::uint64_t, std::uint64_t,
                                              bool, Transposed);

template <typename T>
void multiply_warpgroup(float* d, int n, const std::uint32_t* a, std::uint64_t b, bool accumulate) {
  Product product{d, n, a, 0, b, accumulate, {}};
  collective("wgmma", &multiply<T>, &product, kWarpgroup);
}
template void multiply_warpgroup<__half>(float*, int, const std::uint32_t*, std::uint64_t, bool);
template void multiply_warpgroup<__nv_bfloat16>(float*, int, const std::uint32_t*, std::uint64_t,
                                                bool);

void fence_products() { self().registers_fenced = true; }
void commit_products() { ++self().products_committed; }

void wait_for_products(int pending_groups) {
  ThreadState& thread = self();
  if (skipped(thread.product_waits, statistics().product_waits, planted().skipped_product_wait)) {
    return;
  }
  if (thread.products_committed <= static_cast<Time>(pending_groups)) return;
  const Time done = thread.products_committed - pending_groups;
  const int lane = running_thread() % kWarpgroup;
  Warpgroup& warpgroup = state.warpgroups[running_thread() / kWarpgroup];
  for (Products& products : warpgroup.products) {
    if (products.group > done || products.d[lane] == nullptr) continue;
    for (const Held& held : products.held) {
      if (held.lane == lane &&
          std::memcmp(held.registers, held.values.data(), sizeof(held.values)) != 0) {
        fault("has changed registers that a product under way reads");
      }
    }
    for (int i = 0; i < products.n / 2; ++i) {
      std::memcpy(products.d[lane] + i,
                  &products.values[row_of(lane, i) * products.n + column_of(lane, i)],
                  sizeof(std::uint32_t));
    }
    products.d[lane] = nullptr;
    ++products.delivered;
    thread.registers_fenced = false;
  }
  warpgroup.products.erase(
      std::remove_if(warpgroup.products.begin(), warpgroup.products.end(),
                     [](const Products& p) { return p.delivered == kWarpgroup; }),
      warpgroup.products.end());
  if (warpgroup.agent >= 0) races().learn(running_thread(), Access{warpgroup.agent, done});
}

void registers_at_launch(int registers) {
  for (Warpgroup& warpgroup : state.warpgroups) {
    if (warpgroup.registers == 0) warpgroup.registers = warpgroup.claimed = registers;
  }
}

void increase_registers(int registers) {
  collective("setmaxnreg.inc", &change_registers<true>, &registers, kWarpgroup);
  const Warpgroup& own = own_warpgroup();
  while (own.registers < own.claimed) wait_at(own.claim);
}

void decrease_registers(int registers) {
  if (self().releases++ == planted().skipped_register_release) return;
  collective("setmaxnreg.dec", &change_registers<false>, &registers, kWarpgroup);
}

namespace async {

void start(int threads) {
  state.threads.assign(threads, ThreadState{});
  state.warpgroups.assign((threads + kWarpgroup - 1) / kWarpgroup, Warpgroup{});
  state.mbarriers.clear();
  state.loads.clear();
  state.blocks.assign(cluster_size(), Block{});
}

void finish_thread() {
  const ThreadState& thread = self();
  if (thread.stores_open || thread.stores_done < thread.stores_committed) {
    fault("exits with bulk stores that it never waited for");
  }
  for (const Products& products : state.warpgroups[running_thread() / kWarpgroup].products) {
    if (products.d[running_thread() % kWarpgroup] != nullptr) {
      fault("exits with wgmma that it never waited for");
    }
  }
}

void finish() {
  if (!state.loads.empty()) {
    throw Fault("a block ends with " + std::to_string(state.loads.size()) +
                " bulk copies that nobody waited for");
  }
}

bool land(std::uint64_t choice) {
  if (state.loads.empty()) return false;
  const auto landing =
      state.loads.begin() + static_cast<std::ptrdiff_t>(choice % state.loads.size());
  const Load load = std::move(*landing);
  state.loads.erase(landing);
  for (const Chunk& chunk : load.chunks) {
    unsigned char* to = shared_bytes(chunk.shared, kChunk, "copies to");
    if (chunk.bytes > 0) std::memcpy(to, chunk.global, chunk.bytes);
    std::memset(to + chunk.bytes, 0, kChunk - chunk.bytes);
  }
  Mbarrier& barrier = state.mbarriers.at(load.mbarrier);
  barrier.bytes -= load.bytes;
  end_phase_if_complete(barrier);
  return true;
}

bool end_bounded_wait() {
  for (std::size_t thread = 0; thread < state.threads.size(); ++thread) {
    if (!std::exchange(state.threads[thread].waits_bounded, false)) continue;
    wake(static_cast<int>(thread));
    return true;
  }
  return false;
}

}  // namespace async
}  // namespace host_sim
