// Passes over tasks of whole rows. Sums are taken in fp64, in which PyTorch takes them on the CPU:
// each task's in the order of its rows, then the tasks' in their order; a task is as many rows as
// the channels' number says, whatever the threads. In fp64 a pass over fp32 is still bound by
// memory: 10 instructions for each 128 bytes.
//
// Memory traffic: every pass reads and writes each of its tensors once.
#include "train_batch_norm.h"

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

constexpr std::int64_t kPadding = 16;  // of channels, in partial sums: the most lanes
constexpr std::int64_t kTaskElements = 32 << 10;
constexpr std::int64_t kLeastRows = 32;  // of a task with sums
constexpr std::int64_t kPoolLines = 8;   // of a task

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "train_batch_norm_tile.h"
#define ISA_WITH_BASELINE
#define ISA_WITH_BF16
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

struct Tasks {
  decltype(&baseline::add_strided_task) add_strided;
  decltype(&baseline::moments_task) moments;
  decltype(&baseline::normalise_task) normalise;
  decltype(&baseline::gradient_task) gradient;
  decltype(&baseline::pre_bn_task) pre_bn;
  decltype(&baseline::pool_task) pool;
  decltype(&baseline::pool_gradient_task) pool_gradient;
};

#define TASKS(isa)                                                                     \
  Tasks {                                                                              \
    isa::add_strided_task, isa::moments_task, isa::normalise_task, isa::gradient_task, \
        isa::pre_bn_task, isa::pool_task, isa::pool_gradient_task                      \
  }

Tasks tasks_for(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (has_avx512_bf16(isa)) return TASKS(avx512bf16);
  if (isa == Isa::kAvx512) return TASKS(avx512);
  if (isa == Isa::kAvx2) return TASKS(avx2);
#endif
  (void)isa;
  return TASKS(baseline);
}

#undef TASKS

const Tasks& tasks() {
  static const Tasks found = tasks_for(best_isa());
  return found;
}

std::int64_t task_rows(const Rows& rows, std::int64_t least) {
  return std::max(kTaskElements / std::max<std::int64_t>(rows.channels, 1), least);
}

// body(first, last) over all rows.
template <typename Body>
void for_rows(const Rows& rows, const Body& body) {
  const std::int64_t step = task_rows(rows, 1);
  parallel_for(ceil_div(rows.rows, step),
               [&](std::int64_t i) { body(i * step, std::min((i + 1) * step, rows.rows)); });
}

// Partial sums of `tasks` tasks, `words` numbers each, of the calling thread.
double* partial_sums(std::int64_t tasks, std::int64_t words) {
  thread_local std::vector<double> sums;
  if (static_cast<std::int64_t>(sums.size()) < tasks * words) sums.resize(tasks * words);
  return sums.data();
}

constexpr std::int64_t kMergedChannels = 64;  // of a task that adds up parts

// body(first, last) over all channels.
template <typename Body>
void for_channels(std::int64_t channels, std::int64_t parts, const Body& body) {
  // A few parts are added up sooner than threads are woken.
  const std::int64_t step = parts * channels > 16 << 10 ? kMergedChannels : channels;
  parallel_for(ceil_div(channels, step),
               [&](std::int64_t i) { body(i * step, std::min((i + 1) * step, channels)); });
}

// out (vectors, channels) = the sums over all parts (parts, vectors, padded).
void add_parts(const double* part, std::int64_t parts, std::int64_t vectors, std::int64_t padded,
               std::int64_t channels, float* const* out) {
  for_channels(channels, parts * vectors, [&](std::int64_t first, std::int64_t last) {
    std::vector<double> sums(vectors * (last - first));
    for (std::int64_t i = 0; i < parts; ++i) {
      for (std::int64_t v = 0; v < vectors; ++v) {
        const double* const from = part + (i * vectors + v) * padded;
        double* const to = sums.data() + v * (last - first);
        for (std::int64_t c = first; c < last; ++c) to[c - first] += from[c];
      }
    }
    for (std::int64_t v = 0; v < vectors; ++v) {
      for (std::int64_t c = first; c < last; ++c) {
        out[v][c] = static_cast<float>(sums[v * (last - first) + c - first]);
      }
    }
  });
}

}  // namespace

void moments(const Moments& op) {
  const std::int64_t rows = op.rows.rows, channels = op.rows.channels;
  const std::int64_t padded = round_up(channels, kPadding), step = task_rows(op.rows, kLeastRows);
  const std::int64_t parts = ceil_div(rows, step);
  double* const part = partial_sums(parts, 2 * padded);
  const auto task = tasks().moments;
  parallel_for(parts, [&](std::int64_t i) {
    task(op, i * step, std::min((i + 1) * step, rows), part + 2 * padded * i);
  });
  const auto count = [&](std::int64_t i) {
    return static_cast<double>(std::min((i + 1) * step, rows) - i * step);
  };
  for_channels(channels, parts, [&](std::int64_t first, std::int64_t last) {
    // From the first part's mean: a large one would cancel.
    std::vector<double> mean(last - first), squares(last - first);
    for (std::int64_t i = 1; i < parts; ++i) {
      const double* const means = part + 2 * padded * i;
      for (std::int64_t c = first; c < last; ++c)
        mean[c - first] += count(i) * (means[c] - part[c]);
    }
    for (std::int64_t c = first; c < last; ++c) {
      mean[c - first] = part[c] + mean[c - first] / static_cast<double>(rows);
    }
    for (std::int64_t i = 0; i < parts; ++i) {
      const double* const means = part + 2 * padded * i;
      for (std::int64_t c = first; c < last; ++c) {
        const double apart = means[c] - mean[c - first];
        squares[c - first] += means[padded + c] + count(i) * apart * apart;
      }
    }
    for (std::int64_t c = first; c < last; ++c) {
      op.moments[c] = static_cast<float>(mean[c - first]);
      op.moments[channels + c] = static_cast<float>(squares[c - first]);
      op.moments[2 * channels + c] = static_cast<float>(rows);
    }
  });
}

void normalise_add_relu(const NormaliseAddRelu& op) {
  const auto task = tasks().normalise;
  for_rows(op.rows, [&](std::int64_t first, std::int64_t last) { task(op, first, last); });
}

void relu_gradient(const ReluGradient& op) {
  const std::int64_t rows = op.rows.rows, channels = op.rows.channels;
  const std::int64_t padded = round_up(channels, kPadding), step = task_rows(op.rows, kLeastRows);
  const std::int64_t parts = ceil_div(rows, step), words = (1 + op.branches) * padded;
  double* const part = partial_sums(parts, words);
  const auto task = tasks().gradient;
  parallel_for(parts, [&](std::int64_t i) {
    task(op, i * step, std::min((i + 1) * step, rows), part + words * i);
  });
  if (op.branches == 0) return;
  float* out[3] = {op.sums[0], op.sums[0] + channels, nullptr};
  if (op.branches == 2) out[2] = op.sums[1] + channels;
  add_parts(part, parts, 1 + op.branches, padded, channels, out);
  if (op.branches == 2) std::copy_n(op.sums[0], channels, op.sums[1]);
}

void pre_bn_gradient(const PreBnGradient& op) {
  const auto task = tasks().pre_bn;
  for_rows(op.rows, [&](std::int64_t first, std::int64_t last) { task(op, first, last); });
}

void add_strided(const AddStrided& op) {
  const auto task = tasks().add_strided;
  const std::int64_t lines = op.batch * ceil_div(op.height, op.stride);
  const std::int64_t step =
      std::max(kTaskElements / std::max<std::int64_t>(op.width * op.channels, 1), std::int64_t{1});
  parallel_for(ceil_div(lines, step),
               [&](std::int64_t i) { task(op, i * step, std::min((i + 1) * step, lines)); });
}

void pool_activation(const PoolActivation& of) {
  const Pooling& op = of.pooling;
  const auto task = tasks().pool;
  parallel_for(op.batch * op.out_height, [&](std::int64_t i) {
    task(op, i / op.out_height, i % op.out_height, of.out, of.argmax);
  });
}

void pool_gradient(const PoolGradient& of) {
  const Pooling& op = of.pooling;
  const std::int64_t bands = ceil_div(op.height, kPoolLines), parts = op.batch * bands;
  const std::int64_t padded = round_up(op.channels, kPadding);
  double* const part = partial_sums(parts, 2 * padded);
  const auto task = tasks().pool_gradient;
  parallel_for(parts, [&](std::int64_t i) {
    const std::int64_t first = i % bands * kPoolLines;
    task(op, of, i / bands, first, std::min(first + kPoolLines, op.height), part + 2 * padded * i);
  });
  float* const out[2] = {of.sums, of.sums + op.channels};
  add_parts(part, parts, 2, padded, op.channels, out);
}

void bn_scale_shift(const BnScaleShift& op) {
  for (std::int64_t c = 0; c < op.channels; ++c) {
    const auto value = [&](std::int64_t part, int row) {
      return static_cast<double>(op.moments[(3 * part + row) * op.channels + c]);
    };
    double total = 0, shift = 0, squares = 0;
    for (std::int64_t i = 0; i < op.parts; ++i) {
      total += value(i, 2);
      shift += value(i, 2) * (value(i, 0) - value(0, 0));
    }
    const double mean = value(0, 0) + shift / total;
    for (std::int64_t i = 0; i < op.parts; ++i) {
      const double apart = value(i, 0) - mean;
      squares += value(i, 1) + value(i, 2) * apart * apart;
    }
    const double invstd = 1.0 / std::sqrt(squares / total + op.eps);
    const double values[6] = {mean,   element(op.weight, c) * invstd,     element(op.bias, c),
                              invstd, squares / std::max(total - 1, 1.0), total};
    for (int row = 0; row < 6; ++row) {
      op.scale_shift[row * op.channels + c] = static_cast<float>(values[row]);
    }
  }
}

void bn_backward_coefficients(const BnBackwardCoefficients& op) {
  const auto sum_of = [&](const float* all, std::int64_t count, std::int64_t at) {
    double sum = 0;
    for (std::int64_t i = 0; i < count; ++i) sum += all[2 * op.channels * i + at];
    return sum;
  };
  for (std::int64_t c = 0; c < op.channels; ++c) {
    const double scale = op.scale_shift[op.channels + c],
                 invstd = op.scale_shift[3 * op.channels + c];
    const double count = op.scale_shift[5 * op.channels + c];
    const double b =
        -scale * invstd * invstd * sum_of(op.total, op.total_parts, op.channels + c) / count;
    const double d = -scale * sum_of(op.total, op.total_parts, c) / count;
    op.coefficients[c] = static_cast<float>(scale);
    op.coefficients[op.channels + c] = op.frozen ? 0.0f : static_cast<float>(b);
    op.coefficients[2 * op.channels + c] = op.frozen ? 0.0f : static_cast<float>(d);
    op.coefficients[3 * op.channels + c] = op.scale_shift[c];
    op.weight_grad[c] = static_cast<float>(invstd * sum_of(op.sums, op.parts, op.channels + c));
    op.bias_grad[c] = static_cast<float>(sum_of(op.sums, op.parts, c));
  }
}

}  // namespace resnet_fused::cpu
