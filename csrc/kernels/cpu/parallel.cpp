// Threads are OpenMP's, of whose pool PyTorch's own ops are served too: its settings hold, and
// there is no second pool. A team lives as long as one parallel region.
#include "parallel.h"

#include <atomic>
#include <exception>
#include <thread>

#include "team.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif

namespace resnet_fused::cpu {
namespace {

// About 0.1 ms: longer than the leader needs from one layer to the next.
constexpr int kSpins = 4000;
// About 10 us: longer than a thread that is awake needs to come.
constexpr int kArrivalSpins = 500;

thread_local Team* led_team = nullptr;  // by this thread
thread_local bool in_task = false;

// Sets a variable for as long as it lives.
template <typename T>
class Setting {
 public:
  Setting(T& variable, T value) : variable_(variable), before_(variable) { variable = value; }
  Setting(const Setting&) = delete;
  Setting& operator=(const Setting&) = delete;
  ~Setting() { variable_ = before_; }

 private:
  T& variable_;
  const T before_;
};

// Sees to it that the members of a team do not share one core while others are idle. Linux may put
// a woken thread behind the one that woke it, where the core that it ran on before has gone to
// sleep (in a virtual machine such a core counts as preempted), and leave it there for its whole
// time slice of some milliseconds: longer than a forward.
class Arrival {
 public:
  // For the leader, before the region.
  explicit Arrival(int others) : others_(others), core_(current_core()) {}

  // For the leader: goes on at once where all have come, and else lets run who waits for this core.
  void await() {
    for (int i = 0; i < kArrivalSpins && arrived_.load() < others_; ++i) Team::pause();
    if (arrived_.load() < others_) std::this_thread::yield();
  }

  // For the others: leaves the leader's core.
  void arrive() {
    ++arrived_;
#ifdef __linux__
    cpu_set_t allowed;
    if (core_ < 0 || current_core() != core_ || core_ >= CPU_SETSIZE ||
        sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) {
      return;
    }
    cpu_set_t others = allowed;
    CPU_CLR(core_, &others);
    if (sched_setaffinity(0, sizeof others, &others) == 0) {
      sched_setaffinity(0, sizeof allowed, &allowed);
    }
#endif
  }

 private:
  static int current_core() {
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
  }

  const int others_, core_;
  std::atomic<int> arrived_{0};
};

}  // namespace

std::int64_t max_threads() {
  if (in_task) return 1;
  if (led_team != nullptr) return led_team->size();
#ifdef _OPENMP
  // Within somebody else's region there are no more threads, unless regions may be nested.
  return omp_get_active_level() < omp_get_max_active_levels() ? omp_get_max_threads() : 1;
#else
  return 1;
#endif
}

void run_tasks(std::int64_t tasks, void (*task)(const void* body, std::int64_t index),
               const void* body) {
  if (tasks <= 1 || max_threads() == 1) {
    for (std::int64_t i = 0; i < tasks; ++i) task(body, i);
  } else if (led_team != nullptr) {
    const Setting within(in_task, true);
    led_team->run(tasks, task, body);
  } else {
    with_team([&] { run_tasks(tasks, task, body); });
  }
}

void run_with_team(void (*run)(const void* body), const void* body) {
  const auto threads = static_cast<int>(max_threads());
  if (led_team != nullptr || threads == 1) return run(body);
#ifdef _OPENMP
  // With fewer cores than threads, who spins holds up who works.
  Team team(threads, threads <= omp_get_num_procs() ? kSpins : 0);
  Arrival arrival(threads - 1);
  std::exception_ptr error;  // none may leave the region
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_thread_num() == 0) {
      const Setting leads(led_team, &team);
      arrival.await();
      try {
        run(body);
      } catch (...) {
        error = std::current_exception();
      }
      team.dismiss();
    } else {
      const Setting within(in_task, true);
      arrival.arrive();
      team.work(omp_get_thread_num());
    }
  }
  if (error) std::rethrow_exception(error);
#endif
}

}  // namespace resnet_fused::cpu
