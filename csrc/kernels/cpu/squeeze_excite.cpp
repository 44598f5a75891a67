// As many images at a time as there are threads, so that the second reading of x finds in a cache
// what the first one brought. For these images: sums of every channel over runs of kRun pixels, the
// gates, and one pass that scales, adds and clamps. A sum adds kPixelGroup pixels, then these over
// a run, then the runs, in an order that does not depend on the threads.
// Memory traffic: x and the residual are read from memory once, out is written once.
#include "squeeze_excite.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "batch_norm.h"  // whose terms vec.h applies
#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr std::int64_t kPixelGroup = 8;  // pixels that are added in registers
constexpr std::int64_t kRun = 256;       // pixels of a task
constexpr std::int64_t kMostLanes = 16;

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "squeeze_excite_tile.h"
#define ISA_WITH_BASELINE
#define ISA_WITH_BF16
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

struct Tasks {
  void (*squeeze)(const SqueezeExcite&, std::int64_t first, std::int64_t last, float* sums);
  void (*gate)(const SqueezeExcite&, float* sums, std::int64_t parts, std::int64_t stride,
               float* hidden, float* gate);
  void (*excite)(const SqueezeExcite&, const float* gate, std::int64_t first, std::int64_t last);
};

#define RESNET_FUSED_TASKS(isa) \
  Tasks { isa::squeeze_task, isa::gate_task, isa::excite_task }

Tasks tasks_for(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (has_avx512_bf16(isa)) return RESNET_FUSED_TASKS(avx512bf16);
  if (isa == Isa::kAvx512) return RESNET_FUSED_TASKS(avx512);
  if (isa == Isa::kAvx2) return RESNET_FUSED_TASKS(avx2);
#endif
  (void)isa;
  return RESNET_FUSED_TASKS(baseline);
}

#undef RESNET_FUSED_TASKS

}  // namespace

void squeeze_excite(const SqueezeExcite& op) {
  const Tasks tasks = tasks_for(best_isa());
  const std::int64_t stride = round_up(op.channels, kMostLanes);
  const std::int64_t inner = round_up(op.hidden, kMostLanes);
  const std::int64_t runs = ceil_div(op.pixels, kRun);
  const std::int64_t group = std::min(op.batch, max_threads());
  std::vector<float> sums(group * runs * stride), hidden(group * inner), gates(group * stride);
  for (std::int64_t first = 0; first < op.batch; first += group) {
    const std::int64_t images = std::min(group, op.batch - first);
    parallel_for(images * runs, [&](std::int64_t i) {
      const std::int64_t start = first + i / runs, run = i % runs * kRun;
      tasks.squeeze(op, start * op.pixels + run,
                    start * op.pixels + std::min(run + kRun, op.pixels), sums.data() + i * stride);
    });
    parallel_for(images, [&](std::int64_t i) {
      tasks.gate(op, sums.data() + i * runs * stride, runs, stride, hidden.data() + i * inner,
                 gates.data() + i * stride);
    });
    parallel_for(images * runs, [&](std::int64_t i) {
      const std::int64_t start = first + i / runs, run = i % runs * kRun;
      tasks.excite(op, gates.data() + i / runs * stride, start * op.pixels + run,
                   start * op.pixels + std::min(run + kRun, op.pixels));
    });
  }
}

}  // namespace resnet_fused::cpu
