// The one way in which the CPU kernels use threads.
#pragma once

#include <cstdint>

namespace resnet_fused::cpu {

// How many threads parallel_for may use here.
std::int64_t max_threads();

void run_tasks(std::int64_t tasks, void (*task)(const void* body, std::int64_t index),
               const void* body);

// Calls body(i) for each i from 0 to before `tasks`, in any order and by any threads, and returns
// when all are done. Where one task's result does not depend on another's, the result does not
// depend on the threads. Within a task, it calls them one by one. Throws what a task threw.
template <typename Body>
void parallel_for(std::int64_t tasks, const Body& body) {
  run_tasks(
      tasks, [](const void* erased, std::int64_t i) { (*static_cast<const Body*>(erased))(i); },
      &body);
}

void run_with_team(void (*run)(const void* body), const void* body);

// Calls body() in this thread, with a team of threads at hand for all of its parallel_for: they are
// woken once, and between two of them they wait awake for a while.
template <typename Body>
void with_team(const Body& body) {
  run_with_team([](const void* erased) { (*static_cast<const Body*>(erased))(); }, &body);
}

}  // namespace resnet_fused::cpu
