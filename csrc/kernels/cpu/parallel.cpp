// Threads are OpenMP's, of whose pool PyTorch's own ops are served too: its settings hold, and
// there is no second pool. A team lives as long as one parallel region.
#include "parallel.h"

#include <exception>

#include "team.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace resnet_fused::cpu {
namespace {

// About 0.1 ms: longer than the leader needs from one layer to the next.
constexpr int kSpins = 4000;

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
  std::exception_ptr error;  // none may leave the region
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_thread_num() == 0) {
      const Setting leads(led_team, &team);
      team.await();
      try {
        run(body);
      } catch (...) {
        error = std::current_exception();
      }
      team.dismiss();
    } else {
      const Setting within(in_task, true);
      team.work(omp_get_thread_num());
    }
  }
  if (error) std::rethrow_exception(error);
#endif
}

}  // namespace resnet_fused::cpu
