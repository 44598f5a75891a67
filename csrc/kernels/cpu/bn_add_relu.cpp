// One pass over memory: x and the residual are read once, out is written once, in fp32 in between.
#include "bn_add_relu.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr std::int64_t kMostLanes = 16;
constexpr std::int64_t kTaskElements = 64 << 10;

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "bn_add_relu_tile.h"
#define ISA_WITH_BASELINE
#define ISA_WITH_BF16
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

using Task = void (*)(const BnAddRelu&, const Terms&, std::int64_t first, std::int64_t last);

Task task_for(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (has_avx512_bf16(isa)) return avx512bf16::bn_add_relu_task;
  if (isa == Isa::kAvx512) return avx512::bn_add_relu_task;
  if (isa == Isa::kAvx2) return avx2::bn_add_relu_task;
#endif
  (void)isa;
  return baseline::bn_add_relu_task;
}

}  // namespace

void bn_add_relu(const BnAddRelu& op) {
  const Terms terms(op.bn, op.channels, kMostLanes);
  const Task task = task_for(best_isa());
  const std::int64_t tasks = std::clamp<std::int64_t>(op.pixels * op.channels / kTaskElements, 1,
                                                      std::max<std::int64_t>(op.pixels, 1));
  parallel_for(tasks, [&](std::int64_t i) {
    task(op, terms, i * op.pixels / tasks, (i + 1) * op.pixels / tasks);
  });
}

}  // namespace resnet_fused::cpu
