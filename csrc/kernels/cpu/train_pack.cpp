// Blocks of 16 outputs, a few inputs at a time, all taps: transposed in registers into a stage in
// L1 whose rows are 16 outputs of one input and tap, and from there into the order of the kernel,
// rounded or, for Winograd, transformed in fp64. A task goes through the blocks of outputs or the
// steps of inputs, whichever lie together: of a weight read across its rows each line is in another
// page.
#include "train_pack.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "batch_norm.h"
#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr std::int64_t kBlock = 16;           // outputs
constexpr std::int64_t kWinogradBlock = 64;   // of winograd.cpp
constexpr std::int64_t kStageRows = 288;      // 18 KiB
constexpr std::int64_t kBlocksTogether = 16;  // whose outputs are neighbours in memory
constexpr std::int64_t kReadAhead = 32;       // elements, of each row that is transposed
constexpr std::int64_t kWriteAhead = 8;       // rows of packed words
constexpr std::int64_t kTaskElements = 64 << 10;

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "train_pack_tile.h"
#define ISA_WITH_BASELINE
#define ISA_WITH_BF16
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

using Task = decltype(&baseline::conv_pack_task);

struct Tasks {
  Task conv, winograd;
};

Tasks tasks_for(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (has_avx512_bf16(isa)) {
    return {avx512bf16::conv_pack_task, avx512bf16::winograd_pack_task};
  }
  if (isa == Isa::kAvx512) return {avx512::conv_pack_task, avx512::winograd_pack_task};
  if (isa == Isa::kAvx2) return {avx2::conv_pack_task, avx2::winograd_pack_task};
#endif
  (void)isa;
  return {baseline::conv_pack_task, baseline::winograd_pack_task};
}

void run(const Pack& pack, Task task, std::int64_t outputs) {
  const std::int64_t taps = pack.kernel[0] * pack.kernel[1];
  const std::int64_t step = std::max<std::int64_t>(kStageRows / taps / 2 * 2, 2);  // inputs
  const std::int64_t blocks = ceil_div(outputs, kBlock);
  const std::int64_t near = pack.strides[0] < pack.strides[1] ? kBlocksTogether : 1;
  const std::int64_t steps = ceil_div(pack.in_channels, step);
  const std::int64_t together =
      std::max<std::int64_t>(kTaskElements / (near * kBlock * step * taps), 1);
  const std::int64_t groups = ceil_div(steps, together);
  parallel_for(ceil_div(blocks, near) * groups, [&](std::int64_t i) {
    const std::int64_t first = i / groups * near, begin = i % groups * together;
    float* const stage = thread_scratch().floats(step * taps * kBlock);
    for (std::int64_t k = begin; k < std::min(begin + together, steps); ++k) {
      for (std::int64_t block = first; block < std::min(first + near, blocks); ++block) {
        task(pack, block * kBlock, k * step, std::min((k + 1) * step, pack.in_channels), stage);
      }
    }
  });
}

}  // namespace

void pack_for_conv(const Pack& pack) {
  run(pack, tasks_for(best_isa()).conv, round_up(pack.out_channels, pack.strip));
}

void pack_for_winograd(const Pack& pack) {
  run(pack, tasks_for(best_isa()).winograd, pack.out_channels);
}

}  // namespace resnet_fused::cpu
