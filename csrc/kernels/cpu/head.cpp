// The pooled activations stay in fp32, and each logit's sum runs in as many parts as a vector has
// lanes, which are added pairwise: its error is a quarter of a running sum's over 2048 channels.
// Memory traffic: x and the weights are read once; the batch shares a row of weights in L1.
#include "head.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr std::int64_t kPixelGroup = 8;      // pixels of a partial sum
constexpr std::int64_t kPoolChannels = 128;  // of a pooling task
constexpr std::int64_t kClasses = 50;        // of a task
constexpr std::int64_t kMostLanes = 16;

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "head_tile.h"
#define ISA_WITH_BASELINE
#define ISA_WITH_BF16
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

struct Tasks {
  void (*pool)(const Head&, std::int64_t image, std::int64_t c, float* pooled);
  void (*classify)(const Head&, const float* pooled, std::int64_t stride, std::int64_t first,
                   std::int64_t last);
};

Tasks tasks_for(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (has_avx512_bf16(isa)) return {avx512bf16::pool_task, avx512bf16::classify_task};
  if (isa == Isa::kAvx512) return {avx512::pool_task, avx512::classify_task};
  if (isa == Isa::kAvx2) return {avx2::pool_task, avx2::classify_task};
#endif
  (void)isa;
  return {baseline::pool_task, baseline::classify_task};
}

}  // namespace

void head(const Head& head) {
  const Tasks tasks = tasks_for(best_isa());
  const std::int64_t stride = round_up(head.channels, kMostLanes);
  std::vector<float> pooled(head.batch * stride);
  const std::int64_t parts = ceil_div(head.channels, kPoolChannels);
  const std::int64_t blocks = ceil_div(head.classes, kClasses);
  parallel_for(head.batch * parts, [&](std::int64_t i) {
    const std::int64_t image = i / parts;
    tasks.pool(head, image, i % parts * kPoolChannels, pooled.data() + image * stride);
  });
  parallel_for(blocks, [&](std::int64_t i) {
    tasks.classify(head, pooled.data(), stride, i * kClasses,
                   std::min((i + 1) * kClasses, head.classes));
  });
}

}  // namespace resnet_fused::cpu
