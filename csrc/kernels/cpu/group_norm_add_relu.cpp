// As many images at a time as there are threads, so that the second reading of x finds in a cache
// what the first one brought. For these images: moments of every group over runs of pixels, the
// terms that each channel is normalised by, and one pass that normalises, adds and clamps.
// Moments are a mean and a sum of squared deviations from it (sums of squares would cancel where
// the mean is large): of kPixelGroup pixels of a channel and then of a run, less the channel's mean
// in the first of them, in fp32; of a run's channels and of the runs in fp64. The order does not
// depend on the threads. Terms come from them in fp64, as batch norm's do.
// Memory traffic: x and the residual are read from memory once, out is written once.
#include "group_norm_add_relu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr int kPixelGroup = 8;  // pixels that are held in registers
constexpr std::int64_t kRunElements = 32 << 10;
constexpr std::int64_t kMostLanes = 16;

struct Moments {
  double count, mean;
  double squares;  // the sum of those of the deviations from the mean

  // Merges in those of other numbers (Chan, Golub and LeVeque, 1979).
  void add(const Moments& other) {
    const double total = count + other.count, distance = other.mean - mean;
    const double part = other.count / total;
    squares += other.squares + distance * distance * count * part;
    mean += distance * part;
    count = total;
  }
};

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "group_norm_add_relu_tile.h"
#define ISA_WITH_BASELINE
#define ISA_WITH_BF16
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

struct Tasks {
  void (*moments)(const GroupNormAddRelu&, std::int64_t first, std::int64_t last, Moments* groups);
  void (*finish)(const GroupNormAddRelu&, const TermsAt&, std::int64_t first, std::int64_t last);
};

#define RESNET_FUSED_TASKS(isa) \
  Tasks { isa::moments_task, isa::finish_task }

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

// The terms of an image's channels from the moments of its runs, which lie run by run.
void set_terms(const GroupNormAddRelu& op, const double* weight, const double* bias,
               const Moments* runs, std::int64_t count, float* terms, std::int64_t stride) {
  const std::int64_t size = op.channels / op.groups;
  for (std::int64_t g = 0; g < op.groups; ++g) {
    Moments all = runs[g];
    for (std::int64_t run = 1; run < count; ++run) all.add(runs[run * op.groups + g]);
    const auto mean = static_cast<float>(all.mean);
    const double inverse = 1 / std::sqrt(all.squares / all.count + op.eps);
    for (std::int64_t c = g * size; c < (g + 1) * size; ++c) {
      const double scale = weight[c] * inverse;
      terms[c] = mean;
      terms[stride + c] = static_cast<float>(scale);
      terms[2 * stride + c] = static_cast<float>(bias[c] - (all.mean - mean) * scale);
    }
  }
}

}  // namespace

void group_norm_add_relu(const GroupNormAddRelu& op) {
  const Tasks tasks = tasks_for(best_isa());
  const std::int64_t stride = round_up(op.channels, kMostLanes);
  const std::int64_t length =
      std::max<std::int64_t>(round_up(kRunElements / op.channels, kPixelGroup), kPixelGroup);
  const std::int64_t runs = ceil_div(op.pixels, length);
  const std::int64_t together = std::min(op.batch, max_threads());
  std::vector<double> weight(op.channels), bias(op.channels);
  for (std::int64_t c = 0; c < op.channels; ++c) {
    weight[c] = element(op.weight, c, 1);
    bias[c] = element(op.bias, c, 0);
  }
  std::vector<Moments> moments(together * runs * op.groups);
  std::vector<float> terms(together * 3 * stride);
  for (std::int64_t first = 0; first < op.batch; first += together) {
    const std::int64_t images = std::min(together, op.batch - first);
    parallel_for(images * runs, [&](std::int64_t i) {
      const std::int64_t start = (first + i / runs) * op.pixels, run = i % runs * length;
      tasks.moments(op, start + run, start + std::min(run + length, op.pixels),
                    moments.data() + i * op.groups);
    });
    parallel_for(images, [&](std::int64_t i) {
      set_terms(op, weight.data(), bias.data(), moments.data() + i * runs * op.groups, runs,
                terms.data() + i * 3 * stride, stride);
    });
    parallel_for(images * runs, [&](std::int64_t i) {
      const std::int64_t start = (first + i / runs) * op.pixels, run = i % runs * length;
      const float* const at = terms.data() + i / runs * 3 * stride;
      tasks.finish(op, {at, at + stride, at + 2 * stride}, start + run,
                   start + std::min(run + length, op.pixels));
    });
  }
}

}  // namespace resnet_fused::cpu
