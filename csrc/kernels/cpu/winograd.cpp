// Winograd convolution F(2x2, 3x3) (Lavin & Gray 2015, arXiv:1509.09308, section 4.1) for the CPU.
//
// Every 2x2 output tile comes from a 4x4 input tile d and a 3x3 filter g through 16 products:
//   V = B^T d B      U = G g G^T      M_e = sum over c of V_e[c] U_e[c, k]      Y = A^T M A
// 2.25 times fewer multiplications than the direct sum. In fp32 it is also more accurate than
// oneDNN's direct convolution in NHWC for 64 to 512 channels (tests/test_cpu_kernels.py): a sum has
// C terms instead of 9 C, taken in chunks of kChunk. (Not so under 16 channels, or on maps of less
// than 5 pixels, where direct sums are short.) U holds quarters of integers when g holds integers,
// so that such inputs stay exact.
//
// One task is a run of consecutive tiles (rows and images simply follow each other) times a range
// of output channels, done by one thread without leaving its L2 cache:
//   1. V of all tiles and channels                     16 * tiles * C floats
//   2. for each block of 64 output channels: 16 matrix products into M (16 * tiles * 64 floats),
//      then Y, batch norm, residual, ReLU straight to the output.
// The micro-kernel keeps a tile of rows x columns of M in registers (AVX-512: 6 x 64, 24 of 32
// registers, or 8 x 48, 12 x 32, 12 x 16 of the last columns, so that enough sums are under way;
// AVX2: 6 x 16, 12 of 16; NEON: 6 x 16, 24 of 32) over kChunk input channels; the chunk of U (4 KB)
// stays in L1 for all tiles of the task. The transforms stay in registers. Before each plane of the
// first block a share of the lines of the result, of the residual, and of what the next task reads,
// is fetched: with few channels a task would otherwise wait for them as long as it computes. Memory
// traffic: x and the residual are read once (plus the tiles' borders), the output is written once,
// U (16/9 of the weights) is read once per task.
#include "winograd.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <utility>

#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr std::int64_t kBlock = 64;  // output channels per block of U and M
constexpr std::int64_t kChunk = 16;  // input channels summed in registers
// The same on AVX2, of layers with as many: its small tiles are added up less often.
constexpr std::int64_t kLongChunk = 64;
constexpr std::int64_t kRows = 12;      // tiles per task are a multiple of
constexpr std::int64_t kMaxTiles = 96;  // tiles per task, as far as V and M fit:
constexpr std::int64_t kScratchBytes = 192 << 10, kMostScratchBytes = 768 << 10;
constexpr std::int64_t kMaxTilesOfMany = 48;  // where the weights exceed
constexpr std::int64_t kFewWeightBytes = 256 << 10;
// Floats from a chunk of U to what is fetched meanwhile, a chunk at a time: a core that reads U
// from memory alone would wait for it.
constexpr std::int64_t kFetchAhead = 2 * kChunk * kBlock;
constexpr std::int64_t kLine = 16;  // floats
constexpr int kPlanes = 16;
constexpr std::int64_t kSkew = 16;  // floats between the 16 planes: not all in one cache set

// The tiles of the whole batch, and how tasks divide them and the output channels.
struct Plan {
  std::int64_t tile_rows, tile_columns, tiles;
  std::int64_t padded_channels;  // a row of V: in_channels, rounded up to whole vectors
  std::int64_t widest_block;     // a row of M
  std::int64_t tiles_per_task, tile_tasks;
  std::int64_t blocks_per_task, block_tasks;
};

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "winograd_tile.h"
#define ISA_WITH_NEON
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

Plan make_plan(const WinogradConv& conv, std::int64_t threads) {
  Plan plan;
  plan.tile_rows = ceil_div(conv.height, 2);
  plan.tile_columns = ceil_div(conv.width, 2);
  plan.tiles = conv.batch * plan.tile_rows * plan.tile_columns;
  plan.padded_channels = round_up(conv.in_channels, 16);

  plan.widest_block = std::min(kBlock, round_up(conv.out_channels, 16));

  const std::int64_t tile_bytes =
      kPlanes * sizeof(float) * (plan.padded_channels + plan.widest_block);
  // Weights that do not stay in L2 beside V and M come from L3 for each task: then tasks are large.
  const bool few = kPlanes * sizeof(float) * conv.in_channels * round_up(conv.out_channels, 16) <=
                   kFewWeightBytes;
  const std::int64_t scratch = few ? kScratchBytes : kMostScratchBytes;
  std::int64_t tiles = std::clamp(scratch / tile_bytes / kRows * kRows, 2 * kRows,
                                  few ? kMaxTiles : kMaxTilesOfMany);
  // Equal tasks, a multiple of the threads in number.
  const std::int64_t rounds = ceil_div(plan.tiles, tiles * threads);
  tiles = std::min(tiles, round_up(ceil_div(plan.tiles, rounds * threads), kRows));
  plan.tiles_per_task = tiles;
  plan.tile_tasks = ceil_div(plan.tiles, tiles);

  // Few tiles: divide the output channels too; each part transforms the input again.
  const std::int64_t blocks = ceil_div(conv.out_channels, kBlock);
  const std::int64_t parts = std::min(blocks, ceil_div(4 * threads, plan.tile_tasks));
  plan.blocks_per_task = ceil_div(blocks, parts);
  plan.block_tasks = ceil_div(blocks, plan.blocks_per_task);
  return plan;
}

using Task = void (*)(const WinogradConv&, const Plan&, const Terms&, std::int64_t tile_task,
                      std::int64_t block_task);

Task task_for(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  return isa == Isa::kAvx512 ? avx512::winograd_task : avx2::winograd_task;
#elif defined(RESNET_FUSED_NEON)
  (void)isa;
  return neon::winograd_task;
#else
  (void)isa;
  return nullptr;
#endif
}

}  // namespace

std::int64_t winograd_weight_floats(std::int64_t in_channels, std::int64_t out_channels) {
  return 16 * in_channels * round_up(out_channels, 16);
}

// Packed as [block of 64 k][16][c][k in block]; the last block is as wide as its channels, rounded
// up to 16, and filled with zeros.
void winograd_transform_weights(const float* weight, const std::int64_t strides[4], float* packed,
                                std::int64_t in_channels, std::int64_t out_channels) {
  const std::int64_t padded = round_up(out_channels, 16);
  parallel_for(padded, [&](std::int64_t k) {
    const std::int64_t first = k / kBlock * kBlock;
    const std::int64_t width = std::min(kBlock, padded - first);
    float* to = packed + 16 * in_channels * first + (k - first);
    for (std::int64_t c = 0; c < in_channels; ++c) {
      double half[4][3] = {};  // G g
      if (k < out_channels) {
        const float* g = weight + k * strides[0] + c * strides[1];
        for (int j = 0; j < 3; ++j) {
          const double g0 = g[j * strides[3]];
          const double g1 = g[strides[2] + j * strides[3]];
          const double g2 = g[2 * strides[2] + j * strides[3]];
          half[0][j] = g0;
          half[1][j] = (g0 + g1 + g2) / 2;
          half[2][j] = (g0 - g1 + g2) / 2;
          half[3][j] = g2;
        }
      }
      for (int i = 0; i < 4; ++i) {
        const double* h = half[i];
        const double u[4] = {h[0], (h[0] + h[1] + h[2]) / 2, (h[0] - h[1] + h[2]) / 2, h[2]};
        for (int j = 0; j < 4; ++j) {
          to[((4 * i + j) * in_channels + c) * width] = static_cast<float>(u[j]);
        }
      }
    }
  });
}

void winograd_conv(const WinogradConv& conv, Isa isa) {
  if (conv.batch * conv.height * conv.width * conv.out_channels == 0) return;
  const Plan plan = make_plan(conv, max_threads());
  const Terms terms(conv.bn, conv.out_channels, 16);
  const Task task = task_for(isa);
  const std::int64_t tasks = plan.tile_tasks * plan.block_tasks;
  // Tasks that share a part of U follow each other.
  parallel_for(tasks, [&](std::int64_t i) {
    task(conv, plan, terms, i % plan.tile_tasks, i / plan.tile_tasks);
  });
}

}  // namespace resnet_fused::cpu
