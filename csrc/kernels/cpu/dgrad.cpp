// By phases: with strides (s, t), the input's pixels (p + s i, q + t j) of one (p, q) meet the same
// taps of the window, at the result's pixels (i + a, j + b), (a, b) depending on the tap alone. So
// each phase is a convolution of stride 1 with its own part of the window, an implicit GEMM: rows
// are the phase's pixels, columns input channels, and the sum runs over taps and output channels.
//
// One task is some lines of one phase times a run of strips of 32 columns, done by one thread. It
// reads the result's gradient where it lies if no tap of the phase leaves it, else from a copy of
// the lines that it needs, with zeros around (L2). The micro-kernel is that of conv.cpp: 14 x 32
// sums in registers (AVX2: 6 x 16), in fp32 added up in runs of kRun words, so that their rounding
// error grows with kRun + terms / kRun. The order of a sum depends on neither tiles nor threads.
//
// Memory traffic: the gradient is read once a phase, the result written once, a phase's weights
// read once a task.
#include "dgrad.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr std::int64_t kTaskBytes = 256 << 10;      // of the gradient
constexpr std::int64_t kTogetherBytes = 256 << 10;  // of weights
constexpr std::int64_t kMaxTaskHalves = 32;

constexpr int half_rows_of(int lanes) { return lanes == 16 ? 7 : 3; }

// A tap of a phase: its place in the window, and in the gradient from the phase's pixel on.
struct Tap {
  std::int64_t row, column;
  std::int64_t dy, dx;
};

struct Phase {
  std::int64_t y, x;           // of the first pixel
  std::int64_t height, width;  // in pixels of the phase
  std::vector<Tap> taps;
  std::int64_t first[2], last[2];  // the taps' extreme places
  bool copied;
  std::int64_t halves_per_line, lines;
  std::int64_t first_task, tasks;
};

struct Plan {
  std::int64_t grad_height, grad_width;
  std::int64_t pixel_words;
  std::int64_t strips, strip_tasks;
  std::vector<Phase> phases;
  std::int64_t tasks;
};

// Some neighbouring pixels of a phase's line.
struct HalfPlace {
  std::int64_t line, x, rows;
};

HalfPlace half_at(const Phase& phase, std::int64_t index) {
  const std::int64_t i = index % phase.halves_per_line;
  const std::int64_t rows = phase.width / phase.halves_per_line;
  const std::int64_t longer = phase.width % phase.halves_per_line;
  return {index / phase.halves_per_line, i * rows + std::min(i, longer), rows + (i < longer)};
}

// The gradient as a task reads it: where it lies, or a copy of some lines with zeros around.
class Operand {
 public:
  Operand(const ConvDgrad& conv, const Plan& plan, const Phase& phase, std::int64_t first_line,
          std::int64_t last_line)
      : phase_(phase) {
    pitch_ = plan.pixel_words;
    if (!phase.copied) {
      words_ = static_cast<const std::uint32_t*>(conv.grad);
      line_words_ = plan.grad_width * pitch_;
      image_words_ = plan.grad_height * line_words_;
      return;
    }
    first_image_ = first_line / phase.height;
    const std::int64_t last_image = (last_line - 1) / phase.height;
    const bool one = first_image_ == last_image;
    // Where there are several images, all get the place of a whole one.
    first_y_ = one ? first_line % phase.height : 0;
    const std::int64_t end_y = one ? (last_line - 1) % phase.height + 1 : phase.height;
    const std::int64_t lines = end_y - first_y_ + phase.last[0] - phase.first[0];
    const std::int64_t pixels = phase.width + phase.last[1] - phase.first[1];
    line_words_ = pixels * pitch_;
    image_words_ = lines * line_words_;
    const std::int64_t images = last_image - first_image_ + 1;
    auto* const copy =
        reinterpret_cast<std::uint32_t*>(thread_scratch().floats(images * image_words_));
    words_ = copy;
    for (std::int64_t image = 0; image < images; ++image) {
      const std::int64_t begin =
          std::max(first_line - (first_image_ + image) * phase.height, first_y_) - first_y_;
      const std::int64_t end = std::min(last_line - (first_image_ + image) * phase.height, end_y) -
                               first_y_ + phase.last[0] - phase.first[0];
      for (std::int64_t line = begin; line < end; ++line) {
        copy_line(conv, plan, first_image_ + image, first_y_ + line + phase.first[0],
                  copy + image * image_words_ + line * line_words_, pixels);
      }
    }
  }

  // Of the tap at (0, 0) of the phase's pixel.
  const std::uint32_t* at(std::int64_t line, std::int64_t x) const {
    const std::int64_t image = line / phase_.height - first_image_;
    const std::int64_t y = line % phase_.height - first_y_;
    return words_ + image * image_words_ + y * line_words_ + x * pitch_;
  }

  std::int64_t tap(const Tap& tap) const {
    const std::int64_t dy = tap.dy - (phase_.copied ? phase_.first[0] : 0);
    const std::int64_t dx = tap.dx - (phase_.copied ? phase_.first[1] : 0);
    return dy * line_words_ + dx * pitch_;
  }

  std::int64_t pitch() const { return pitch_; }

 private:
  void copy_line(const ConvDgrad& conv, const Plan& plan, std::int64_t image, std::int64_t y,
                 std::uint32_t* to, std::int64_t pixels) const {
    const std::int64_t words = plan.pixel_words, channels = conv.out_channels;
    if (y < 0 || y >= plan.grad_height) {
      std::memset(to, 0, 4 * pixels * words);
      return;
    }
    const std::int64_t left = std::clamp<std::int64_t>(-phase_.first[1], 0, pixels);
    const std::int64_t right =
        std::clamp<std::int64_t>(plan.grad_width - phase_.first[1], left, pixels);
    const std::int64_t bytes = channels * (conv.format == Format::kFloat32 ? 4 : 2);
    const auto* from =
        static_cast<const char*>(conv.grad) +
        ((image * plan.grad_height + y) * plan.grad_width + phase_.first[1] + left) * bytes;
    std::memset(to, 0, 4 * left * words);
    if (bytes == 4 * words) {
      std::memcpy(to + left * words, from, 4 * (right - left) * words);
    } else {  // the odd half of a pixel's last word is zero
      for (std::int64_t x = left; x < right; ++x, from += bytes) {
        to[(x + 1) * words - 1] = 0;
        std::memcpy(to + x * words, from, bytes);
      }
    }
    std::memset(to + right * words, 0, 4 * (pixels - right) * words);
  }

  const Phase& phase_;
  const std::uint32_t* words_;
  std::int64_t pitch_, line_words_, image_words_;
  std::int64_t first_image_ = 0, first_y_ = 0;
};

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "dgrad_tile.h"
#define ISA_WITH_BF16
#define ISA_WITH_BF16_WORDS
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

using Task = void (*)(const ConvDgrad&, const Plan&, const Phase&, std::int64_t line_task,
                      std::int64_t strip_task);

Task task_for(Format format, Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa == Isa::kAvx2) {
    return format == Format::kBFloat16 ? avx2bf16::dgrad_task : avx2::dgrad_task;
  }
  return format == Format::kBFloat16 ? avx512bf16::dgrad_task : avx512::dgrad_task;
#else
  (void)format, (void)isa;
  return nullptr;
#endif
}

Phase make_phase(const ConvDgrad& conv, const Plan& plan, std::int64_t y, std::int64_t x,
                 int half_rows) {
  const Window& window = conv.window;
  Phase phase{};
  phase.y = y;
  phase.x = x;
  phase.height = ceil_div(conv.height - y, window.stride[0]);
  phase.width = ceil_div(conv.width - x, window.stride[1]);
  for (std::int64_t row = 0; row < window.kernel[0]; ++row) {
    const std::int64_t at_y = y + window.padding[0] - row * window.dilation[0];
    if (at_y % window.stride[0] != 0) continue;
    const std::int64_t dy = at_y / window.stride[0];
    if (dy + phase.height <= 0 || dy >= plan.grad_height) continue;
    for (std::int64_t column = 0; column < window.kernel[1]; ++column) {
      const std::int64_t at_x = x + window.padding[1] - column * window.dilation[1];
      if (at_x % window.stride[1] != 0) continue;
      const std::int64_t dx = at_x / window.stride[1];
      if (dx + phase.width <= 0 || dx >= plan.grad_width) continue;
      phase.taps.push_back({row, column, dy, dx});
    }
  }
  for (const Tap& tap : phase.taps) {
    const std::int64_t at[2] = {tap.dy, tap.dx};
    for (int axis = 0; axis < 2; ++axis) {
      const bool only = &tap == phase.taps.data();
      phase.first[axis] = only ? at[axis] : std::min(phase.first[axis], at[axis]);
      phase.last[axis] = only ? at[axis] : std::max(phase.last[axis], at[axis]);
    }
  }
  const bool odd = conv.format == Format::kBFloat16 && conv.out_channels % 2 != 0;
  phase.copied = !phase.taps.empty() && (odd || phase.first[0] < 0 || phase.first[1] < 0 ||
                                         phase.last[0] + phase.height > plan.grad_height ||
                                         phase.last[1] + phase.width > plan.grad_width);
  phase.halves_per_line = ceil_div(phase.width, half_rows);
  phase.lines = conv.batch * phase.height;
  const std::int64_t line_bytes = phase.halves_per_line * half_rows * plan.pixel_words * 4;
  const std::int64_t lines = std::max<std::int64_t>(
      std::min(kTaskBytes / line_bytes, kMaxTaskHalves / phase.halves_per_line), 1);
  phase.tasks = ceil_div(phase.lines, lines);
  return phase;
}

Plan make_plan(const ConvDgrad& conv, Isa isa, std::int64_t threads) {
  const int half_rows = half_rows_of(isa == Isa::kAvx512 ? 16 : 8);
  Plan plan;
  plan.grad_height = conv_output_size(conv.window, 0, conv.height);
  plan.grad_width = conv_output_size(conv.window, 1, conv.width);
  plan.pixel_words =
      conv.format == Format::kFloat32 ? conv.out_channels : ceil_div(conv.out_channels, 2);
  plan.strips = ceil_div(conv.in_channels, conv_strip(isa));
  for (std::int64_t y = 0; y < std::min(conv.window.stride[0], conv.height); ++y) {
    for (std::int64_t x = 0; x < std::min(conv.window.stride[1], conv.width); ++x) {
      plan.phases.push_back(make_phase(conv, plan, y, x, half_rows));
    }
  }
  // The longest first, so that threads end together.
  std::stable_sort(plan.phases.begin(), plan.phases.end(),
                   [](const Phase& a, const Phase& b) { return a.taps.size() > b.taps.size(); });
  plan.tasks = 0;
  for (Phase& phase : plan.phases) {
    phase.first_task = plan.tasks;
    plan.tasks += phase.tasks;
  }
  plan.strip_tasks =
      plan.tasks >= 4 * threads ? 1 : std::min(plan.strips, ceil_div(4 * threads, plan.tasks));
  return plan;
}

}  // namespace

void conv_dgrad(const ConvDgrad& conv, Isa isa) {
  if (conv.batch * conv.height * conv.width * conv.in_channels == 0) return;
  const Plan plan = make_plan(conv, isa, max_threads());
  const Task task = task_for(conv.format, isa);
  // Tasks that share weights follow each other.
  parallel_for(plan.tasks * plan.strip_tasks, [&](std::int64_t i) {
    const std::int64_t at = i % plan.tasks;
    const Phase* phase = plan.phases.data();
    while (at >= phase->first_task + phase->tasks) ++phase;
    task(conv, plan, *phase, at - phase->first_task, i / plan.tasks);
  });
}

}  // namespace resnet_fused::cpu
