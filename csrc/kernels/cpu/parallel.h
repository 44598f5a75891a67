// The one way in which the CPU kernels use threads.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace resnet_fused::cpu {

// How many threads parallel_for may use here.
inline std::int64_t max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Calls body(i) for each i from 0 to before `tasks`, in any order and by any threads, and returns
// when all are done. Where one task's result does not depend on another's, the result does not
// depend on the threads.
template <typename Body>
void parallel_for(std::int64_t tasks, const Body& body) {
#pragma omp parallel for schedule(dynamic, 1) if (tasks > 1)
  for (std::int64_t i = 0; i < tasks; ++i) body(i);
}

}  // namespace resnet_fused::cpu
