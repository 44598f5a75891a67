// Implicit GEMM: rows are output pixels of the whole batch, columns output channels, and the sum
// runs over the window's numbers, tap by tap and channel by channel.
//
// One task is a run of rows times a run of strips of 32 columns, done by one thread. For each chunk
// of the sum (64 fp32 words or 256 words of two bfloat16 numbers) it
//   1. copies that part of each row's window side by side, zeros outside the image (L2),
//   2. for each tile of rows, which stays in L1, multiplies it strip by strip with the packed
//      weights, [strip][word][32 columns], adding to fp32 sums kept in L2;
// the last chunk's sums never leave the registers before batch norm, residual and ReLU, and that
// tile's lines of residual and result are prefetched while it is summed.
// The micro-kernel keeps rows x columns of sums in registers (AVX-512: 14 x 32, 28 of 32 registers;
// AVX2: 6 x 16, 12 of 16): two vectors of weights are loaded for 14 words broadcast from rows. In
// bfloat16 a step is one VDPBF16PS: exact products, fp32 sums.
//
// Summed in chunks, then over chunks, an fp32 sum's rounding error grows with 64 + terms / 64, not
// with the number of terms. It depends on neither tiles nor threads.
// Memory traffic: x and the residual are read and out is written once (the window's overlap comes
// from cache), the weights once per task. Copying costs one load and store per 64 bytes and task,
// against 32 multiply-adds a strip.
#include "conv.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr std::int64_t kStrip = 32;         // columns
constexpr std::int64_t kMaxTaskRows = 112;  // copied rows take 118 KB in bfloat16,
constexpr std::int64_t kMaxTaskStrips = 8;  // sums 115 KB, a chunk of weights 262 KB

struct Plan {
  std::int64_t out_height, out_width, rows;
  std::int64_t numbers, words;  // of one sum
  std::int64_t strips;
  std::int64_t row_tasks, strip_tasks;
};

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "conv_tile.h"
#define ISA_WITH_BF16
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

using Task = void (*)(const Conv&, const Plan&, const Terms&, std::int64_t row_task,
                      std::int64_t strip_task);

Task task_for(Format format, Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (format == Format::kBFloat16) return avx512bf16::conv_task;
  return isa == Isa::kAvx512 ? avx512::conv_task : avx2::conv_task;
#else
  (void)format, (void)isa;
  return nullptr;
#endif
}

constexpr std::int64_t words_of(std::int64_t numbers, Format format) {
  return format == Format::kFloat32 ? numbers : ceil_div(numbers, 2);
}

Plan make_plan(const Conv& conv, std::int64_t threads) {
  Plan plan;
  plan.out_height = conv_output_size(conv.window, 0, conv.height);
  plan.out_width = conv_output_size(conv.window, 1, conv.width);
  plan.rows = conv.batch * plan.out_height * plan.out_width;
  plan.numbers = conv.window.kernel[0] * conv.window.kernel[1] * conv.in_channels;
  plan.words = words_of(plan.numbers, conv.format);
  plan.strips = ceil_div(conv.out_channels, kStrip);
  // Equal tasks, a multiple of the threads in number. Few rows: the columns are divided instead, so
  // that each thread reads other weights.
  plan.row_tasks = ceil_div(plan.rows, kMaxTaskRows);
  plan.strip_tasks = ceil_div(plan.strips, kMaxTaskStrips);
  if (plan.row_tasks >= threads) {
    plan.row_tasks = round_up(plan.row_tasks, threads);
  } else if (plan.row_tasks * plan.strips >= threads) {
    plan.strip_tasks = std::min(plan.strips, round_up(plan.strip_tasks, threads));
  }
  return plan;
}

}  // namespace

std::int64_t conv_weight_words(std::int64_t in_channels, std::int64_t out_channels,
                               std::int64_t taps, Format format) {
  return words_of(taps * in_channels, format) * round_up(out_channels, kStrip);
}

void conv_transform_weights(const void* weight, const std::int64_t strides[4], void* packed,
                            std::int64_t in_channels, std::int64_t out_channels,
                            const std::int64_t kernel[2], Format format) {
  const std::size_t size = format == Format::kFloat32 ? 4 : 2;
  const std::int64_t per_word = 4 / size;
  const std::int64_t words = words_of(kernel[0] * kernel[1] * in_channels, format);
  const std::int64_t strips = ceil_div(out_channels, kStrip);
#pragma omp parallel for schedule(static)
  for (std::int64_t strip = 0; strip < strips; ++strip) {
    auto* const to = static_cast<unsigned char*>(packed) + 4 * strip * words * kStrip;
    std::memset(to, 0, 4 * words * kStrip);
    for (std::int64_t j = 0; j < std::min(kStrip, out_channels - strip * kStrip); ++j) {
      const auto* const from = static_cast<const unsigned char*>(weight) +
                               (strip * kStrip + j) * strides[0] * std::int64_t(size);
      for (std::int64_t y = 0, i = 0; y < kernel[0]; ++y) {
        for (std::int64_t x = 0; x < kernel[1]; ++x) {
          for (std::int64_t c = 0; c < in_channels; ++c, ++i) {
            const std::int64_t at = (i / per_word * kStrip + j) * per_word + i % per_word;
            const std::int64_t source = c * strides[1] + y * strides[2] + x * strides[3];
            std::memcpy(to + at * size, from + source * std::int64_t(size), size);
          }
        }
      }
    }
  }
}

void conv_bn(const Conv& conv, Isa isa) {
#ifdef _OPENMP
  const std::int64_t threads = omp_get_max_threads();
#else
  const std::int64_t threads = 1;
#endif
  const Plan plan = make_plan(conv, threads);
  if (plan.rows * conv.out_channels == 0) return;
  const Terms terms(conv.bn, conv.out_channels, kStrip);
  const Task task = task_for(conv.format, isa);
  const std::int64_t tasks = plan.row_tasks * plan.strip_tasks;
  // Tasks that share weights follow each other.
#pragma omp parallel for schedule(dynamic, 1) if (tasks > 1)
  for (std::int64_t i = 0; i < tasks; ++i) {
    task(conv, plan, terms, i % plan.row_tasks, i / plan.row_tasks);
  }
}

}  // namespace resnet_fused::cpu
