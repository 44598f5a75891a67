// An outer product of rows, the window's numbers of x tap by tap, and columns, the channels of the
// gradient, summed over pixels.
//
// A task owns one part of the pixels, some input channels of every tap and some strips of 32 output
// channels; its sums, at most kTileBytes, stay in L2. It goes through its pixels in blocks of about
// kRun. For each strip, the block's gradient is copied into L1 pixel by pixel; the micro-kernel
// then multiplies it with all taps' rows, 14 x 32 sums in registers (AVX-512; AVX2: 6 x 16): two
// vectors of the gradient are loaded for 14 words of x, or one for 28 of the last channels. A tap's
// pixels are lists of runs, made once a block, so that windows of any shape are read where they lie
// and pixels outside the image are skipped. A window of few channels is read row by row instead,
// from a copy with zeros around. In bfloat16 a step is one VDPBF16PS (on AVX2 two multiply-adds of
// fp32) over two pixels, whose numbers share words: pixels at the same place of two images, or of
// the two halves of an odd last one (Band), so that one interleaved copy of x, made for each block,
// serves all taps, strides and dilations.
//
// In fp32 sums pass from registers to L1 every kShortRun pixels, to L2 with every block, and a last
// pass adds up the parts, in order: the error grows with the root of these runs' lengths, not of
// their product. That pass also transposes the sums into the weight's layout. Parts, blocks and
// runs depend on the sizes alone, and so does the order of every sum.
//
// Memory traffic: x is read once for each run of strips (of 128 channels), the gradient once for
// each run of rows; what the next block needs is prefetched into L2 meanwhile. The parts' sums are
// written and read once.
#include "wgrad.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "parallel.h"
#include "wgrad_runs.h"
#include "wgrad_winograd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr std::int64_t kRun = 128;              // pixels of a block, about, at most
constexpr std::int64_t kTileBytes = 256 << 10;  // of a task's sums
constexpr std::int64_t kLeastPart = 1024;       // pixels
constexpr std::int64_t kTasks = 32;             // that there should be
constexpr std::int64_t kStripsTogether = 4;     // of a task, at most
constexpr std::int64_t kShortPixel = 16;        // words

// Some lines of an image's result, in bfloat16 with as many lines of another place; -1: of none.
struct Band {
  std::int64_t image[2], y[2];
  std::int64_t first_line, lines;
};

// Lines of a band, or a piece of a single one.
struct Piece {
  std::int64_t band, first_line, last_line, first_x, last_x;
};

struct Block {
  static constexpr int kMaxPieces = kRun + 1;
  Piece piece[kMaxPieces];
  int pieces = 0;
  std::int64_t pixels = 0;
};

struct TaskPlace {
  std::int64_t part, strip_task, row_task;
};

struct Plan {
  std::int64_t out_height, out_width;
  std::vector<Band> bands;
  std::int64_t lines;
  std::int64_t lines_per_block, blocks_per_line;
  std::int64_t blocks;
  bool merged;  // a row of the window is one group of words, taps are not
  bool copied;  // whether x is copied block by block
  std::int64_t groups, words, rows;
  std::int64_t strip, strips;
  std::int64_t parts, strip_tasks, row_tasks;
  std::int64_t step;  // pixels of the operand from one output to the next

  std::int64_t x_pitch(std::int64_t pixel_words) const { return step * pixel_words; }
  std::int64_t block_pixels() const {
    return lines_per_block * ceil_div(out_width, blocks_per_line);
  }
  std::int64_t partial_floats() const { return strips * rows * strip; }

  std::int64_t copy_words(const ConvWgrad& conv, std::int64_t channels) const {
    if (!copied) return 0;
    const Window& window = conv.window;
    const std::int64_t width = ceil_div(out_width, blocks_per_line);
    const std::int64_t reach[2] = {(window.kernel[0] - 1) * window.dilation[0] + 1,
                                   (window.kernel[1] - 1) * window.dilation[1] + 1};
    const std::int64_t row_step = window.kernel[0] == 1 ? 1 : window.stride[0];
    // Each piece of a block reaches over its own lines.
    const std::int64_t pieces =
        std::min<std::int64_t>({lines_per_block, std::int64_t(bands.size()),
                                lines_per_block / std::max<std::int64_t>(out_height / 2, 1) + 3});
    const std::int64_t copies =
        lines_per_block * row_step + pieces * std::max<std::int64_t>(reach[0] - row_step, 0);
    return copies * ((width - 1) * step + reach[1]) * channels;
  }

  Block block(std::int64_t index) const {
    Block block;
    if (blocks_per_line > 1) {
      const std::int64_t line = index / blocks_per_line, i = index % blocks_per_line;
      add_lines(block, line, line + 1, i * out_width / blocks_per_line,
                (i + 1) * out_width / blocks_per_line);
    } else {
      add_lines(block, index * lines / blocks, (index + 1) * lines / blocks, 0, out_width);
    }
    return block;
  }

 private:
  void add_lines(Block& block, std::int64_t first, std::int64_t last, std::int64_t first_x,
                 std::int64_t last_x) const {
    auto band =
        std::upper_bound(bands.begin(), bands.end(), first,
                         [](std::int64_t line, const Band& b) { return line < b.first_line; }) -
        bands.begin() - 1;
    block.pixels = (last - first) * (last_x - first_x);
    for (; first < last; ++band) {
      const Band& b = bands[band];
      const std::int64_t until = std::min(last, b.first_line + b.lines);
      block.piece[block.pieces++] = {band, first - b.first_line, until - b.first_line, first_x,
                                     last_x};
      first = until;
    }
  }
};

// The runs of a block, group by group.
class Runs {
 public:
  void clear(std::int64_t groups) {
    if (static_cast<std::int64_t>(runs_.size()) < groups) runs_.resize(groups);
    for (auto& runs : runs_) runs.clear();
  }

  void add(std::int64_t group, const Run& run, std::int64_t pitch) {
    auto& runs = runs_[group];
    if (!runs.empty()) {
      Run& last = runs.back();
      if (last.x + last.count * pitch == run.x && last.grad + last.count == run.grad) {
        last.count += run.count;
        return;
      }
    }
    runs.push_back(run);
  }

  RunList of(std::int64_t group) const {
    const auto& runs = runs_[group];
    return {runs.data(), runs.data() + runs.size()};
  }

 private:
  std::vector<std::vector<Run>> runs_;
};

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "wgrad_tile.h"
#define ISA_WITH_BF16
#define ISA_WITH_BF16_WORDS
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

using Task = void (*)(const ConvWgrad&, const Plan&, float* partials, const TaskPlace&);
using Merge = void (*)(const ConvWgrad&, const Plan&, const float* partials, std::int64_t strip,
                       std::int64_t first, std::int64_t last);

std::pair<Task, Merge> functions_for(Format format, Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  const bool halves = format == Format::kBFloat16;
  if (isa == Isa::kAvx2) {
    if (halves) return {avx2bf16::wgrad_task, avx2bf16::wgrad_merge};
    return {avx2::wgrad_task, avx2::wgrad_merge};
  }
  if (halves) return {avx512bf16::wgrad_task, avx512bf16::wgrad_merge};
  return {avx512::wgrad_task, avx512::wgrad_merge};
#else
  (void)format, (void)isa;
  return {nullptr, nullptr};
#endif
}

Plan make_plan(const ConvWgrad& conv, Isa isa) {
  const Window& window = conv.window;
  Plan plan;
  plan.out_height = conv_output_size(window, 0, conv.height);
  plan.out_width = conv_output_size(window, 1, conv.width);
  plan.lines = 0;
  const auto add = [&](Band band) {
    band.first_line = plan.lines;
    if (band.lines == 0) return;
    plan.lines += band.lines;
    plan.bands.push_back(band);
  };
  if (conv.format == Format::kFloat32) {
    for (std::int64_t i = 0; i < conv.batch; ++i) add({{i, -1}, {0, 0}, 0, plan.out_height});
  } else {
    std::int64_t i = 0;
    for (; i + 1 < conv.batch; i += 2) add({{i, i + 1}, {0, 0}, 0, plan.out_height});
    if (i < conv.batch) {
      const std::int64_t half = plan.out_height / 2;
      add({{i, i}, {0, half}, 0, half});
      add({{i, -1}, {2 * half, 0}, 0, plan.out_height % 2});
    }
  }
  // On AVX2 PyTorch's sums err less than on AVX-512, so ours are shorter there.
  const std::int64_t run = isa == Isa::kAvx2 ? kRun / 2 : kRun;
  plan.blocks_per_line = ceil_div(plan.out_width, run);
  const std::int64_t nominal = std::max<std::int64_t>(run / plan.out_width, 1);
  plan.blocks =
      plan.blocks_per_line > 1 ? plan.lines * plan.blocks_per_line : ceil_div(plan.lines, nominal);
  plan.lines_per_block = plan.blocks_per_line > 1 ? 1 : ceil_div(plan.lines, plan.blocks);

  plan.merged = window.kernel[1] > 1 && window.dilation[1] == 1 && conv.in_channels < kShortPixel;
  plan.copied = plan.merged || conv.format == Format::kBFloat16;
  plan.groups = window.kernel[0] * (plan.merged ? 1 : window.kernel[1]);
  plan.words = conv.in_channels * (plan.merged ? window.kernel[1] : 1);
  plan.rows = plan.groups * plan.words;
  plan.step = plan.copied && window.kernel[1] == 1 ? 1 : window.stride[1];
  plan.strip = isa == Isa::kAvx512 ? 32 : 16;
  plan.strips = ceil_div(conv.out_channels, plan.strip);

  plan.strip_tasks = ceil_div(plan.strips, kStripsTogether);
  const std::int64_t strips = ceil_div(plan.strips, plan.strip_tasks);
  plan.row_tasks = plan.merged ? 1
                               : std::min(ceil_div(plan.rows * plan.strip * strips * 4, kTileBytes),
                                          ceil_div(plan.words, 16));
  const std::int64_t pixels = plan.lines * plan.out_width;
  const std::int64_t per_part = plan.strip_tasks * plan.row_tasks;
  plan.parts = std::clamp<std::int64_t>(std::min(ceil_div(kTasks, per_part), pixels / kLeastPart),
                                        1, std::max<std::int64_t>(plan.blocks, 1));
  // An even number of tasks: of 3, two threads take as long as of 4.
  if (plan.parts * per_part % 2 != 0 && plan.parts < plan.blocks) ++plan.parts;
  return plan;
}

}  // namespace

void conv_wgrad(const ConvWgrad& conv, Isa isa) {
  const Window& window = conv.window;
  const std::int64_t weights =
      conv.out_channels * conv.in_channels * window.kernel[0] * window.kernel[1];
  if (weights == 0) return;
  if (conv.batch * conv_output_size(window, 0, conv.height) *
          conv_output_size(window, 1, conv.width) ==
      0) {
    std::memset(conv.out, 0, weights * (conv.out_format == Format::kFloat32 ? 4 : 2));
    return;
  }
  if (suits_winograd_wgrad(conv)) return winograd_wgrad(conv, isa);
  const Plan plan = make_plan(conv, isa);
  thread_local Scratch scratch;
  float* const partials = scratch.floats(plan.parts * plan.partial_floats());
  const auto [task, merge] = functions_for(conv.format, isa);
  const std::int64_t per_part = plan.strip_tasks * plan.row_tasks;
  parallel_for(plan.parts * per_part, [&, task = task](std::int64_t i) {
    task(conv, plan, partials, {i / per_part, i % per_part / plan.row_tasks, i % plan.row_tasks});
  });
  constexpr std::int64_t kRowsTogether = 512;
  const std::int64_t chunks = ceil_div(plan.rows, kRowsTogether);
  parallel_for(plan.strips * chunks, [&, merge = merge](std::int64_t i) {
    const std::int64_t first = i % chunks * kRowsTogether;
    merge(conv, plan, partials, i / chunks, first, std::min(first + kRowsTogether, plan.rows));
  });
}

}  // namespace resnet_fused::cpu
