// The weight gradient by the adjoint of Winograd's F(2x2, 3x3) (winograd.cpp): a 2x2 tile g of the
// result's gradient and the 4x4 tile d of x that it came from meet in 16 products,
//   V = B^T d B      M = A g A^T      dU_e[c, k] = sum over tiles of V_e[c] M_e[k]      dW = G^T dU
//   G
// where the direct sum has 36. Integers stay exact: dU holds integers, dW quarters of them.
//
// A task owns one part of the tiles, kChannels input channels and kStrips strips of output
// channels, so that its dU stays in L2. For each block of kTiles tiles it transforms x, and for
// each strip the gradient; then 16 matrix products, each a sum over tiles by wgrad_multiply.h,
// which fetches the next block meanwhile. A last pass adds up the parts in order and transforms dU
// into dW. The parts depend on the sizes alone, and so does the order of every sum.
#include "wgrad_winograd.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <utility>

#include "parallel.h"
#include "wgrad_runs.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr std::int64_t kTiles = 48;
constexpr std::int64_t kChannels = 64;
constexpr std::int64_t kStrips = 4;
constexpr std::int64_t kLeastPart = 256;  // tiles
constexpr std::int64_t kTasks = 32;
constexpr std::int64_t kMergedChannels = 16;
// Of PyTorch's sums: the pixels of a line, then the lines of the batch. With 126 (14 x 14, 8
// images) the error is 0.93 of PyTorch's, with 84 (28 x 28, 2 images) it exceeds it.
constexpr std::int64_t kFewestLines = 120;
constexpr std::int64_t kSkew = 16;  // words between the 16 planes: not all in one cache set

struct Plan {
  std::int64_t tile_rows, tile_columns, tiles;
  std::int64_t strip, strips;
  std::int64_t parts, blocks, strip_tasks, channel_tasks;

  std::int64_t partial_floats(const ConvWgrad& conv) const {
    return strips * 16 * conv.in_channels * strip;
  }
};

struct TaskPlace {
  std::int64_t part, strip_task, channel_task;
};

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "wgrad_winograd_tile.h"
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

using Task = void (*)(const ConvWgrad&, const Plan&, float* partials, const TaskPlace&);
using Merge = void (*)(const ConvWgrad&, const float* sums, std::int64_t plane, std::int64_t parts,
                       std::int64_t part_floats, std::int64_t strip, std::int64_t first_channel,
                       std::int64_t channels);

std::pair<Task, Merge> functions_for(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa == Isa::kAvx512) return {avx512::winograd_wgrad_task, avx512::winograd_wgrad_merge};
  return {avx2::winograd_wgrad_task, avx2::winograd_wgrad_merge};
#else
  (void)isa;
  return {nullptr, nullptr};
#endif
}

Plan make_plan(const ConvWgrad& conv, Isa isa) {
  Plan plan;
  plan.tile_rows = ceil_div(conv.height, 2);
  plan.tile_columns = ceil_div(conv.width, 2);
  plan.tiles = conv.batch * plan.tile_rows * plan.tile_columns;
  plan.blocks = ceil_div(plan.tiles, kTiles);
  plan.strip = isa == Isa::kAvx512 ? 32 : 16;
  plan.strips = ceil_div(conv.out_channels, plan.strip);
  plan.strip_tasks = ceil_div(plan.strips, kStrips * 32 / plan.strip);
  plan.channel_tasks = ceil_div(conv.in_channels, kChannels);
  plan.parts = std::clamp<std::int64_t>(
      std::min(ceil_div(kTasks, plan.strip_tasks * plan.channel_tasks), plan.tiles / kLeastPart), 1,
      plan.blocks);
  return plan;
}

bool all_are(const std::int64_t (&pair)[2], std::int64_t value) {
  return pair[0] == value && pair[1] == value;
}

}  // namespace

bool suits_winograd_wgrad(const ConvWgrad& conv) {
  const Window& window = conv.window;
  return conv.format == Format::kFloat32 && all_are(window.kernel, 3) &&
         all_are(window.stride, 1) && all_are(window.padding, 1) && all_are(window.dilation, 1) &&
         conv.in_channels >= 16 && conv.out_channels >= 16 &&
         conv.width + conv.batch * conv.height >= kFewestLines;
}

void winograd_wgrad(const ConvWgrad& conv, Isa isa) {
  const Plan plan = make_plan(conv, isa);
  thread_local Scratch scratch;
  float* const partials =
      plan.parts == 1 ? nullptr : scratch.floats(plan.parts * plan.partial_floats(conv));
  const auto [task, merge] = functions_for(isa);
  const std::int64_t per_part = plan.strip_tasks * plan.channel_tasks;
  parallel_for(plan.parts * per_part, [&, task = task](std::int64_t i) {
    task(conv, plan, partials,
         {i / per_part, i % per_part / plan.channel_tasks, i % plan.channel_tasks});
  });
  if (plan.parts == 1) return;  // then the tasks have ended it
  // A part holds, for each strip and range of channels, the planes of dU.
  const std::int64_t in_range = ceil_div(conv.in_channels, plan.channel_tasks);
  const std::int64_t chunks = ceil_div(in_range, kMergedChannels) * plan.channel_tasks;
  parallel_for(plan.strips * chunks, [&, merge = merge](std::int64_t i) {
    const std::int64_t strip = i / chunks, range = i % plan.channel_tasks;
    const std::int64_t first = range * conv.in_channels / plan.channel_tasks;
    const std::int64_t last = (range + 1) * conv.in_channels / plan.channel_tasks;
    const std::int64_t c = i % chunks / plan.channel_tasks * kMergedChannels;
    if (first + c >= last) return;
    const std::int64_t strip_floats = 16 * plan.strip;
    merge(conv, partials + strip_floats * (strip * conv.in_channels + first) + c * plan.strip,
          (last - first) * plan.strip, plan.parts, plan.partial_floats(conv), strip, first + c,
          std::min(kMergedChannels, last - first - c));
  });
}

}  // namespace resnet_fused::cpu
