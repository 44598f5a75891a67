// Convolutions of a training step for sm_90a: forward, with the statistics of the result, and the
// gradient of the input where windows do not dilate.
//
// Algorithm: that of conv_sm90.cu, whose roles, turns, clusters and pipelines these are
// (persistent_conv.cuh); other endings. The gradient of the input is a convolution of the result's
// gradient with the window turned round, whose weight stands transposed: a step takes the rows of
// 64 of the convolution's output channels, 64 columns a panel, which wgmma reads by columns.
// Of windows that move by 2 the lines and columns of the input fall into classes, even and odd
// ones: positions of one class meet the same taps, and a tile has positions of one class. So 9 taps
// are 1, 2, 2 and 4 for the four of them. Their results, and what masks or is added, lie two apart,
// which im2col copies gather and scatter.
//
// Endings. Statistics: values are rounded, stored, and, as rounded, summed by channel: deviations
// from a pivot, the first row that a warp has, and their squares, which keeps the digits that a
// mean far from zero would take from the squares. Four warps' sums become mean and squared
// deviations of 128 rows. Mask: the tile of the pre-BN output below lies where the result will; a
// gradient stays where scale and shift make that positive, and it and its product with that value's
// deviation from the mean are summed. Add: what lies there is added. Folded: as Mask, and behind a
// second product, of the gradient's own operand, which the tile's sums begin with, and an offset.
// Sum: that second product and the offset alone.
// Of 8 sums that a thread has of two groups of columns, the 8 lanes that share columns each finish
// one (reduce): 7 shuffles. No sum depends on which warp comes first.
//
// Tiles (positions x channels x depth, stages, results): with turns, 128 x 64 x 64, 6, 2, and 128 x
// 128 x 64, 4, 2; of two blocks in a cluster, 256 x 128 x 64, 3, 1. A consumer has 128 rows in
// each, which are what a part of statistics or sums is about.
//
// Shared memory: as in conv_sm90.cu, but in place of scale and shift, for each consumer: three rows
// of sums for each warp, and 16 bytes a channel of mean, scale and shift below.
//
// Memory: x, weight, what is added or masks, and out once each, as there; 12 or 8 bytes a channel
// for 128 rows of statistics or sums.
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/cuda/batch_norm.cuh"
#include "kernels/cuda/conv_training_sm90.h"
#include "kernels/cuda/conv_training_sm90_lines.h"
#include "kernels/cuda/dtype.cuh"
#include "kernels/cuda/persistent_conv.cuh"

namespace resnet_fused {
namespace {

enum class Ending : int { kStatistics, kMask, kAdd, kFolded, kSum };

template <Ending kEnding>
constexpr bool kMasks = kEnding == Ending::kMask || kEnding == Ending::kFolded;

template <Ending kEnding>
constexpr bool kHasParts = kEnding == Ending::kStatistics || kMasks<kEnding>;

template <Ending kEnding>
constexpr bool kHasOperand = kEnding == Ending::kFolded || kEnding == Ending::kSum;

// Whether positions may fall into classes.
template <Ending kEnding>
constexpr bool kHasClasses = kEnding == Ending::kMask || kEnding == Ending::kAdd;

constexpr int kWarps = kWarpgroup / 32;

// Rows of a result, or of a class of a gradient's, that one part of its statistics or sums is
// about.
constexpr int kPartRows = 128;

template <int kM, int kN, int kStages, int kResults, int kCluster, bool kPingPong>
struct Tile : PersistentTile<kM, kN, kStages, kResults, 1, kCluster, 40, 232, kPingPong> {
  static_assert(Tile::kConsumerM == kPartRows);
  static constexpr int kSumsRow = (kN + 16) * 4;  // so that a warp's 8 sums are in other banks
  static constexpr int kSumsBytes = 3 * kWarps * kSumsRow;
};

using Tile128x64 = Tile<128, 64, 6, 2, 1, true>;
using Tile128x128 = Tile<128, 128, 4, 2, 1, true>;
using Tile256x128 = Tile<256, 128, 3, 1, 2, false>;

// What lies where in shared memory: the operands' stages from 0 on, and so forth.
template <typename Tile>
struct Shared {
  static constexpr int kResults = Tile::kStages * Tile::kStageBytes;
  static constexpr int kSums = kResults + Tile::kResults * Tile::kResultBytes;
  static constexpr int kBelow = kSums + kNumConsumers * Tile::kSumsBytes;
  static constexpr int kMbarriers = kBelow + kNumConsumers * Tile::kN * kScaleShiftBytes;
  using Operands = Pipeline<PipelineId::kTrainingOperands, kMbarriers, Tile::kStages>;
  using Results = Pipeline<PipelineId::kTrainingResult, Operands::kEnd, Tile::kResults>;
  using Turns = Pipeline<PipelineId::kTrainingTurns, Results::kEnd, 1>;
  static constexpr int kBytes = kMbarriers + 256;
  static_assert(Turns::kEnd <= kBytes);
};

constexpr int kMaxClasses = 4;

// The positions of a gradient whose line and column leave the same remainders after the strides.
struct Class {
  CUtensorMap before,
      out;                 // where there is more than one class: what masks or is added, the result
  int last_h, last_w;      // the last tap of the window that they meet; the next a stride before it
  int offset_h, offset_w;  // of the pixel that meets that tap; the next tap's is the next pixel
  int taps;
};

// Of a gradient the Product `conv` has the window's own size and strides, and the padding that its
// operands' box has; sizes of the result are those of a class.
struct Arguments : PersistentArguments {
  float* parts;                    // of statistics or sums; may be null
  const float* below_scale_shift;  // rows of out_channels: mean, scale, shift
  const float* offset;             // of out_channels, where there is a second product
  int positions, parts_of_class;
  unsigned num_classes;     // 1 or 4; 1 without a gradient
  unsigned class_channels;  // of a class's tiles, what is beyond the last channel included
  Class classes[kMaxClasses];
};

// The class of a tile and its first channel. Beside each other are tiles of all classes, which read
// the same operands; they change places from row to row, so that every block has tiles of each.
struct Place {
  int number, channel;

  template <typename Tile>
  __device__ __forceinline__ Place(const Arguments& a, const TileScheduler<Tile>& at) {
    const unsigned column = at.channel() / a.class_channels;
    number = (column + at.row() / Tile::kCluster) & (a.num_classes - 1);
    channel = at.channel() - column * a.class_channels;
  }
  // Where there is one class.
  template <typename Tile>
  __device__ __forceinline__ explicit Place(const TileScheduler<Tile>& at)
      : number(0), channel(at.channel()) {}
};

// Asks for the weights of a step of the gradient: of a tap of the window, and of 64 output channels
// of the convolution from c on, all input channels of the tile, panel by panel.
template <typename Tile>
struct TransposedWeights {
  __device__ __forceinline__ static void load(const Product& product, std::uint32_t to,
                                              std::uint32_t mbarrier, int c, int tap, int channel) {
    constexpr int kShare =
        Tile::kN / kMapChannels / Tile::kCluster;  // panels that this block asks for
    const int first = blockIdx.x % Tile::kCluster * kShare;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int panel = first + i;
      const std::uint32_t at = to + panel * kMapChannels * kRowBytes;
      const int column = channel + panel * kMapChannels;
      if constexpr (Tile::kCluster == 1) {
        ptx::load_tile(at, product.weight, mbarrier, {column, tap, c});
      } else {
        constexpr std::uint16_t kAll = (1 << Tile::kCluster) - 1;
        ptx::load_tile_multicast(at, product.weight, mbarrier, {column, tap, c}, kAll);
      }
    }
  }
};

// Asks for all steps of a gradient's convolution of one tile.
template <typename Tile, typename Operands>
__device__ __forceinline__ void load_taps(const Arguments& a, const TileScheduler<Tile>& at,
                                          Operands& operands) {
  const Product& product = a.conv;
  const Place place(a, at);
  const Class& of = a.classes[place.number];
  const Pixel pixel(at.position(), a.out_height, a.out_width);
  const int h = pixel.h - product.padding_h, w = pixel.w - product.padding_w;
  int offset_h = of.offset_h;
#pragma unroll 1
  for (int r = of.last_h; r >= 0; r -= product.stride_h, ++offset_h) {
    int offset_w = of.offset_w;
#pragma unroll 1
    for (int s = of.last_w; s >= 0; s -= product.stride_w, ++offset_w) {
#pragma unroll 1
      for (int c = 0; c < product.channels; c += Tile::kStepChannels) {
        const std::uint32_t stage = operands.stage() * Tile::kStageBytes;
        operands.acquire(at.tile());
        operands.commit_bytes(Tile::kStageBytes);
        if (product.matrix) {
          ptx::load_tile(stage, product.x, operands.full(), {c, at.position()});
        } else {
          ptx::load_pixels(
              stage, product.x, operands.full(), {c, w, h, pixel.image},
              {static_cast<std::uint16_t>(offset_w), static_cast<std::uint16_t>(offset_h)});
        }
        TransposedWeights<Tile>::load(product, stage + Tile::kOperandBytes, operands.full(), c,
                                      r * product.kernel_w + s, place.channel);
        operands.advance();
      }
    }
  }
}

// The role of one thread where positions may fall into classes: as load_operands.
template <typename Tile, typename Operands>
__device__ __forceinline__ void load_classes(const Arguments& a) {
  Operands operands(a.spin_limit);
#pragma unroll 1
  for (TileScheduler<Tile> at(a); at.valid(); at.advance()) load_taps(a, at, operands);
}

// For move_results, as those of persistent_conv.cuh.
template <typename Tile>
__device__ __forceinline__ void store(const Arguments& a, const TileScheduler<Tile>& at,
                                      std::uint32_t result) {
  if (a.num_classes == 1)
    return store<Tile>(static_cast<const PersistentArguments&>(a), at, result);
  const Place place(a, at);
  const Pixel pixel(at.position(), a.out_height, a.out_width);
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    ptx::store_pixels(a.classes[place.number].out, result + panel * Tile::kPanelBytes,
                      {place.channel + panel * Tile::kPanel, pixel.w, pixel.h, pixel.image});
  }
  ptx::bulk_commit();
  ptx::bulk_wait_read<0>();
}

template <typename Tile>
__device__ __forceinline__ void load_residual(const Arguments& a, const TileScheduler<Tile>& at,
                                              std::uint32_t result, std::uint32_t mbarrier) {
  if (a.num_classes == 1) {
    return load_residual<Tile>(static_cast<const PersistentArguments&>(a), at, result, mbarrier);
  }
  const Place place(a, at);
  const Pixel pixel(at.position(), a.out_height, a.out_width);
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    ptx::load_pixels(result + panel * Tile::kPanelBytes, a.classes[place.number].before, mbarrier,
                     {place.channel + panel * Tile::kPanel, pixel.w, pixel.h, pixel.image}, {0, 0});
  }
}

// Of 8 values, the sum of the lane / 4-th one over the 8 lanes with the same lane % 4.
__device__ __forceinline__ float reduce(const float (&v)[8]) {
  const int lane = threadIdx.x % 32;
  float four[4], two[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool upper = lane & 16;
    four[i] = (upper ? v[i + 4] : v[i]) + ptx::shuffle_xor(upper ? v[i] : v[i + 4], 16);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool upper = lane & 8;
    two[i] = (upper ? four[i + 2] : four[i]) + ptx::shuffle_xor(upper ? four[i] : four[i + 2], 8);
  }
  const bool upper = lane & 4;
  return (upper ? two[1] : two[0]) + ptx::shuffle_xor(upper ? two[0] : two[1], 4);
}

// A warp's rows of sums in shared memory: sums, of squares or products, and pivots.
template <typename Tile>
__device__ __forceinline__ std::uint32_t sums_at(int consumer, int warp, int row) {
  return Shared<Tile>::kSums + consumer * Tile::kSumsBytes + (3 * warp + row) * Tile::kSumsRow;
}

// Rounds the accumulators, which go to `result` of a tile of which the first `rows` of this
// consumer's are some of the tensor, and leaves its warps' sums.
template <typename T, typename Tile, Ending kEnding, typename Acc>
__device__ __forceinline__ void finish(Acc& acc, std::uint32_t result, int part, int consumer,
                                       int rows, bool adds) {
  using Run = Pack<T, Acc::kRun>;
  constexpr int kBatch = 2;  // groups of 8 columns, of which a thread has 2 each
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kWarpgroup / 32;
  const int row = part * Tile::kConsumerM + acc.row(0);  // the others are the same modulo 8
  const std::uint32_t first = result + row * kRowBytes + acc.column(0) * sizeof(T);
  const auto place = [&](int i, int j) {
    return first + j / 8 * Tile::kPanelBytes + (j % 8 ^ row % 8) * 16 +
           (acc.row(i) - acc.row(0)) * kRowBytes;
  };
#pragma unroll
  for (int begin = 0; begin < Acc::kColumns; begin += kBatch) {
    float sums[8] = {};  // of 4 columns, then of their squares or products
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int j = begin + b;
      float pivot[Acc::kRun], before[Acc::kRows][Acc::kRun];
      Run rounded[Acc::kRows];
      if (kMasks<kEnding> || (kEnding == Ending::kAdd && adds)) {
#pragma unroll
        for (int i = 0; i < Acc::kRows; ++i) {
          const auto run = ptx::load_shared<Run>(place(i, j));
#pragma unroll
          for (int e = 0; e < Acc::kRun; ++e) before[i][e] = to_float(run.value[e]);
        }
      }
      if constexpr (kMasks<kEnding> || kHasOperand<kEnding>) {
#pragma unroll
        for (int e = 0; e < Acc::kRun; ++e) {
          const auto below = ptx::load_shared<ScaleShift>(
              Shared<Tile>::kBelow + (consumer * Tile::kN + acc.column(j) + e) * kScaleShiftBytes);
#pragma unroll
          for (int i = 0; i < Acc::kRows; ++i) {
            if (kHasOperand<kEnding>) acc.at(i, j, e) += below.scale_low;  // the offset
            if constexpr (!kMasks<kEnding>) continue;
            if (!(normalise<false>(before[i][e], below) > 0.0f)) acc.at(i, j, e) = 0.0f;
            before[i][e] -= below.mean;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < Acc::kRows; ++i) {
        float y[Acc::kRun];
#pragma unroll
        for (int e = 0; e < Acc::kRun; ++e) {
          y[e] = acc.at(i, j, e);
          if (kEnding == Ending::kAdd && adds) y[e] += before[i][e];
        }
        rounded[i] = pack_floats<T>(y);
        ptx::store_shared(place(i, j), rounded[i]);
      }
      if constexpr (kEnding == Ending::kStatistics) {
        std::uint32_t word;
        memcpy(&word, &rounded[0], sizeof(word));
        word = ptx::shuffle(word, lane % 4);  // of the warp's first row
        Run run;
        memcpy(&run, &word, sizeof(word));
#pragma unroll
        for (int e = 0; e < Acc::kRun; ++e) pivot[e] = to_float(run.value[e]);
        if (lane < 4) {
          ptx::store_shared(sums_at<Tile>(consumer, warp, 2) + acc.column(j) * 4,
                            Pack<float, 2>{{pivot[0], pivot[1]}});
        }
      }
      if constexpr (kHasParts<kEnding>) {
#pragma unroll
        for (int i = 0; i < Acc::kRows; ++i) {
#pragma unroll
          for (int e = 0; e < Acc::kRun; ++e) {
            float value = to_float(rounded[i].value[e]), factor = 0.0f;
            if constexpr (kEnding == Ending::kStatistics) {
              value = acc.row(i) < rows ? value - pivot[e] : 0.0f;
              factor = value;
            } else {
              // Beyond the tensor's rows gradients are zero, but for the offset.
              if (kEnding == Ending::kFolded && acc.row(i) >= rows) value = 0.0f;
              factor = before[i][e];
            }
            sums[2 * b + e] += value;
            sums[4 + 2 * b + e] = fmaf(value, factor, sums[4 + 2 * b + e]);
          }
        }
      }
    }
    if constexpr (kHasParts<kEnding>) {
      const int of = lane / 4, column = acc.column(begin + of % 4 / 2) + of % 2;
      ptx::store_shared(sums_at<Tile>(consumer, warp, of / 4) + column * 4, reduce(sums));
    }
  }
}

// Writes what all warps' sums say of one channel to `to`, `apart` floats from row to row: of
// `rows`, at least 1, that are some of the tensor.
template <typename Tile, Ending kEnding>
__device__ __forceinline__ void write_part(float* to, std::int64_t apart, int consumer, int column,
                                           int rows) {
  float sum[kWarps], second[kWarps];
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    sum[warp] = ptx::load_shared<float>(sums_at<Tile>(consumer, warp, 0) + column * 4);
    second[warp] = ptx::load_shared<float>(sums_at<Tile>(consumer, warp, 1) + column * 4);
  }
  if constexpr (kMasks<kEnding>) {
    ptx::store_global(to, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    ptx::store_global(to + apart, (second[0] + second[1]) + (second[2] + second[3]));
  } else {
    float pivot[kWarps], count[kWarps], deviations = 0.0f, squares = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      pivot[warp] = ptx::load_shared<float>(sums_at<Tile>(consumer, warp, 2) + column * 4);
      int counted = 0;  // of each product's 16 rows
#pragma unroll
      for (int first = 16 * warp; first < kPartRows; first += kProductM) {
        const int left = rows - first;
        counted += left < 0 ? 0 : left < 16 ? left : 16;
      }
      count[warp] = static_cast<float>(counted);
      deviations += fmaf(count[warp], pivot[warp] - pivot[0], sum[warp]);
    }
    const float mean = pivot[0] + deviations / static_cast<float>(rows);
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const float from_mean = pivot[warp] - mean;
      squares += fmaf(from_mean, fmaf(count[warp], from_mean, 2.0f * sum[warp]), second[warp]);
    }
    ptx::store_global(to, mean);
    ptx::store_global(to + apart, squares);
    ptx::store_global(to + 2 * apart, static_cast<float>(rows));
  }
}

// The steps of a tile's convolution.
template <Ending kEnding>
__device__ __forceinline__ int steps_of_tile(const Arguments& a, const Place& place) {
  if constexpr (!kHasClasses<kEnding>) return steps_of(a.conv);
  return a.classes[place.number].taps * ((a.conv.channels + kMapChannels - 1) / kMapChannels);
}

// The role of a warpgroup: multiplies and finishes its positions of every tile, or every other
// tile.
template <typename T, typename Tile, Ending kEnding>
__device__ __forceinline__ void consume(const Arguments& a, int consumer) {
  using Shared = Shared<Tile>;
  typename Shared::Operands operands(a.spin_limit);
  typename Shared::Results results(a.spin_limit);
  typename Shared::Turns turns(a.spin_limit);
  constexpr bool kOperand = kHasOperand<kEnding>;
  const int part = Tile::kPingPong ? 0 : consumer;  // of a tile's positions
  const int thread = threadIdx.x % kWarpgroup;      // has one channel of the tile
  int turn = 0;
#pragma unroll 1
  for (TileScheduler<Tile> at(a); at.valid(); at.advance()) {
    const Place place = kHasClasses<kEnding> ? Place(a, at) : Place(at);
    const int steps = steps_of_tile<kEnding>(a, place);
    if (Tile::kPingPong && turn++ % kNumConsumers != consumer) {
      operands.advance(steps + (kOperand ? steps_of(a.projection) : 0));
      results.advance();
      continue;
    }
    const std::uint32_t result = Shared::kResults + results.stage() * Tile::kResultBytes;
    const int channel = place.channel + thread;
    const bool has_channel = thread < Tile::kN && channel < a.out_channels;
    ScaleShift below{};
    if constexpr (kOperand) {
      if (has_channel) below.scale_low = ptx::load_global(a.offset + channel);
    }
    if (kMasks<kEnding> && has_channel) {
      below.mean = ptx::load_global(a.below_scale_shift + channel);
      below.scale = ptx::load_global(a.below_scale_shift + a.out_channels + channel);
      below.shift = ptx::load_global(a.below_scale_shift + 2 * a.out_channels + channel);
    }
    Accumulators<Tile::kConsumerM, Tile::kN> acc;
    if constexpr (Tile::kPingPong) take_turn(consumer, at.tile(), turns);
    constexpr Columns kColumns = kEnding == Ending::kStatistics ? Columns::kNone : Columns::kWeight;
    if constexpr (kOperand) {
      acc.template multiply<T, Tile, Tile::kCluster, false, kColumns>(steps_of(a.projection), part,
                                                                      at.tile(), operands, [] {});
    }
    acc.template multiply<T, Tile, Tile::kCluster, kOperand, kColumns>(
        steps, part, at.tile(), operands, [&] {
          if constexpr (Tile::kPingPong) pass_turn(consumer, turns);
        });
    if constexpr (kMasks<kEnding> || kOperand) {
      if (thread < Tile::kN) {
        ptx::store_shared(Shared::kBelow + (consumer * Tile::kN + thread) * kScaleShiftBytes,
                          below);
      }
    }
    // All see that, and have read the sums of the tile before.
    if constexpr (kEnding != Ending::kAdd) ptx::named_barrier(1 + consumer, kWarpgroup);
    results.wait(at.tile());
    const int position = at.position() + part * Tile::kConsumerM;
    const int left = a.positions - position, rows = left < kPartRows ? left : kPartRows;
    finish<T, Tile, kEnding>(acc, result, part, consumer, rows, a.has_residual);
    ptx::fence_proxy_async();
    ptx::named_barrier(1 + consumer, kWarpgroup);
    if (thread == 0) results.release();
    if constexpr (kHasParts<kEnding>) {
      if (a.parts != nullptr && has_channel && rows > 0) {
        constexpr int kRows = kMasks<kEnding> ? 2 : 3;
        const int number = place.number * a.parts_of_class + position / kPartRows;
        float* const to = a.parts + std::int64_t{number} * kRows * a.out_channels + channel;
        write_part<Tile, kEnding>(to, a.out_channels, consumer, thread, rows);
      }
    }
    results.advance();
  }
}

template <typename T, typename Tile, Ending kEnding>
__global__ void __launch_bounds__(kThreads, 1)
    conv_training_sm90_kernel(const __grid_constant__ Arguments a) {
  using Shared = Shared<Tile>;
  using Weights =
      std::conditional_t<kEnding == Ending::kStatistics, WeightRows<Tile>, TransposedWeights<Tile>>;
  run_roles<Tile>(
      [] {
        Shared::Operands::init(1, Tile::kCluster * Tile::kOfTile * kWarps);
        Shared::Results::init(1, Tile::kOfTile);
        Shared::Turns::init(1, 1);
      },
      [&] {
        if constexpr (kHasClasses<kEnding>) {
          load_classes<Tile, typename Shared::Operands>(a);
        } else {
          load_operands<Tile, typename Shared::Operands, kHasOperand<kEnding>, Weights>(a);
        }
      },
      nullptr,
      [&] {
        using Results = typename Shared::Results;
        using OfEnding = std::conditional_t<kHasClasses<kEnding>, Arguments, PersistentArguments>;
        move_results<Tile, Results, Shared::kResults, OfEnding>(a);
      },
      [&](int consumer) { consume<T, Tile, kEnding>(a, consumer); });
}

// Calls function(Tile()) of the type that `tile` names.
template <typename Function>
auto with_tile(TrainingTile tile, Function&& function) {
  switch (tile) {
    case TrainingTile::k128x64:
      return function(Tile128x64());
    case TrainingTile::k128x128:
      return function(Tile128x128());
    default:
      return function(Tile256x128());
  }
}

// Cycles of the SM with the most tiles, as conv_sm90.cu has them of tiles with turns and of those
// in clusters; an ending is longer than the one there. Its numbers are fitted to times, and nothing
// of training is.
template <typename Tile>
std::int64_t cycles(const ConvBn& a, int num_sms, int num_classes) {
  constexpr std::int64_t kTensor = Tile::kM * Tile::kN * kMapChannels / 2048;
  constexpr std::int64_t kAsked = (Tile::kM + Tile::kWeightRows) * kRowBytes;
  constexpr int kL2BytesPerCycle = 64;  // of an SM
  constexpr std::int64_t kStep = std::max(kTensor, kAsked / kL2BytesPerCycle);
  constexpr std::int64_t kEnd = Tile::kM * Tile::kN / 8;
  const std::int64_t of_sm = ceil_div(num_classes * tiles<Tile>(a) * Tile::kCluster, num_sms);
  const std::int64_t steps = steps_of(a.conv) + (a.projection.x ? steps_of(a.projection) : 0);
  const std::int64_t products = steps * kStep / num_classes;  // of their tiles, on average
  if (Tile::kPingPong) return of_sm * std::max(products, (products + kEnd) / 2) + kEnd;
  return of_sm * (products + kEnd);
}

// The convolution whose gradient this is, the weights that lie transposed, of it and of a second
// product, and the operand of that.
struct Gradient {
  ConvolutionBn conv;
  CUtensorMap weight, matrix;
  Residual operand;
};

// Of what lies like a gradient the lines from h on and the columns from w on, as its convolution's
// window moves.
Residual view_of(const void* data, const ConvolutionBn& conv, int h = 0, int w = 0) {
  const std::int64_t pixel = conv.channels, line = conv.width * pixel;
  const auto* const first = static_cast<const std::uint16_t*>(data) + h * line + w * pixel;
  return {first,
          pixel,
          conv.height / conv.stride_h,
          conv.width / conv.stride_w,
          conv.height * line,
          conv.stride_h * line,
          conv.stride_w * pixel};
}

// The gradient's operands, classes, and where they lie. `a` is what as_convolution says.
template <typename Tile>
cudaError_t encode_gradient(Arguments* to, const ConvBn& a, const Gradient& gradient) {
  const ConvolutionBn& conv = gradient.conv;
  cudaError_t status = encode_x(&to->conv, a, a.conv, Tile::kM);
  if (status == cudaSuccess) status = encode_result<Tile>(to, a);
  to->conv.weight = gradient.weight;
  to->conv.stride_h = conv.stride_h;
  to->conv.stride_w = conv.stride_w;
  to->num_classes = conv.stride_h * conv.stride_w;
  to->class_channels = to->tiles_across * Tile::kN;
  to->tiles *= to->num_classes;
  to->tiles_across *= to->num_classes;
  for (unsigned i = 0; i < to->num_classes && status == cudaSuccess; ++i) {
    Class& of = to->classes[i];
    const int stride = conv.stride_w, h = i / stride, w = i % stride;
    const auto last = [](int at, int kernel, int stride) {
      return kernel - 1 - (kernel - 1 - at % stride) % stride;
    };
    const int at_h = h + conv.padding_h, at_w = w + conv.padding_w;  // what the first tap would be
    of.last_h = last(at_h, conv.kernel_h, conv.stride_h);
    of.last_w = last(at_w, conv.kernel_w, conv.stride_w);
    of.offset_h = (at_h - of.last_h) / conv.stride_h + a.conv.padding_h;
    of.offset_w = (at_w - of.last_w) / conv.stride_w + a.conv.padding_w;
    of.taps = (of.last_h / conv.stride_h + 1) * (of.last_w / conv.stride_w + 1);
    if (to->num_classes == 1) break;
    ConvBn view = a;
    view.residual = view_of(a.out, conv, h, w);
    status = encode_residual<Tile>(&of.out, view);
    if (!to->has_residual || status != cudaSuccess) continue;
    view.residual = view_of(a.residual.data, conv, h, w);
    status = encode_residual<Tile>(&of.before, view);
  }
  if (to->num_classes == 1 || status != cudaSuccess) return status;
  const ConvolutionBn& x = a.conv;
  return encode_pixels(
      &to->conv.x, a.dtype, x.x, {x.channels, x.width, x.height, a.batch},
      {{-x.padding_w, -x.padding_h},
       {a.out_width - x.width - x.padding_w, a.out_height - x.height - x.padding_h},
       {1, 1}},
      Tile::kM);
}

// A map of the operand of a second product, and its window of one pixel.
template <typename Tile>
cudaError_t encode_operand(Product* to, const ConvBn& a, const Residual& operand) {
  ConvBn beside = a;
  beside.residual = operand;
  *to = {};
  to->channels = a.out_channels;
  to->kernel_h = to->kernel_w = to->stride_h = to->stride_w = 1;
  to->matrix = operand.in_line();
  static_assert(Tile::kPanelRowBytes == kRowBytes);  // so that what a residual asks for is a step
  return encode_residual<Tile>(&to->x, beside);
}

template <typename T, Ending kEnding>
cudaError_t run(const ConvBn& a, const Gradient* gradient, Arguments to, TrainingTile tile,
                int num_sms, cudaStream_t stream) {
  return with_tile(tile, [&](auto t) {
    using Tile = decltype(t);
    to.positions = static_cast<int>(positions(a));
    to.parts_of_class = static_cast<int>(ceil_div(positions(a), kPartRows));
    to.num_classes = 1;
    cudaError_t status = gradient == nullptr ? encode_arguments<Tile>(&to, a)
                                             : encode_gradient<Tile>(&to, a, *gradient);
    if (kHasOperand<kEnding> && status == cudaSuccess) {
      status = encode_operand<Tile>(&to.projection, a, gradient->operand);
      to.projection.weight = gradient->matrix;
    }
    if (status != cudaSuccess) return status;
    return launch_tiles<Tile>(&conv_training_sm90_kernel<T, Tile, kEnding>, to, num_sms,
                              Shared<Tile>::kBytes, stream);
  });
}

template <Ending kEnding>
cudaError_t run(const ConvBn& a, const Gradient* gradient, const Arguments& to, TrainingTile tile,
                int device, cudaStream_t stream) {
  if (positions(a) * a.out_channels == 0) return cudaSuccess;
  Machine machine;
  const cudaError_t status = set_device(device, &machine);
  if (status != cudaSuccess) return status;
  if (!machine.sm90) return cudaErrorInvalidValue;
  if (is_lines(tile)) {
    return training_lines(a, to.below_scale_shift, to.parts, tile, machine.num_sms, stream);
  }
  return with_half(a.dtype, [&](auto half) {
    return run<decltype(half), kEnding>(a, gradient, to, tile, machine.num_sms, stream);
  });
}

bool can_take(const ConvBn& a) {
  return a.dtype != DType::kFloat32 && a.groups == 1 && a.out_channels % 8 == 0 && aligned(a.out) &&
         can_read(a.conv) && (a.projection.x == nullptr || can_read(a.projection)) &&
         can_read(a.residual, 2) &&
         kMaxClasses * (tiles<Tile128x64>(a) + positions(a) + 2 * kMaxM) <= kMaxGridX;
}

// The convolution that the gradient of a class is: of the gradient of the result, the window turned
// round, by single pixels.
ConvBn as_convolution(const Dgrad& dgrad) {
  ConvBn a = dgrad.op;
  const ConvolutionBn& of = dgrad.op.conv;
  ConvolutionBn& conv = a.conv;
  conv.x = dgrad.grad;
  conv.stride_h = conv.stride_w = 1;
  conv.padding_h = (of.kernel_h - 1 - of.padding_h) / of.stride_h;
  conv.padding_w = (of.kernel_w - 1 - of.padding_w) / of.stride_w;
  conv.height = dgrad.op.out_height;
  conv.width = dgrad.op.out_width;
  conv.channels = dgrad.op.out_channels;
  a.out_height = of.height / of.stride_h;
  a.out_width = of.width / of.stride_w;
  a.out_channels = of.channels;
  a.out = dgrad.out;
  const void* const before = dgrad.below != nullptr ? dgrad.below : dgrad.add;
  if (before != nullptr) a.residual = view_of(before, of);
  if (dgrad.operand.channels > 0) {
    a.projection.x = dgrad.operand.data;
    a.projection.weight = dgrad.operand_matrix;
    a.projection.height = a.out_height;
    a.projection.width = a.out_width;
    a.projection.channels = a.out_channels;
  }
  return a;
}

// Whether it has the endings of whole lines.
bool may_take_lines(const Dgrad& arguments) {
  return arguments.below != nullptr && arguments.operand.channels == 0 &&
         arguments.op.conv.stride_h == 1;
}

bool can_implement(const ConvStats& arguments) { return can_take(arguments.op); }

bool can_implement(const Dgrad& arguments) {
  const ConvolutionBn& conv = arguments.op.conv;
  const int stride = conv.stride_h;
  return conv.dilation_h * conv.dilation_w == 1 && stride == conv.stride_w &&
         stride * stride <= kMaxClasses && stride <= conv.kernel_h && stride <= conv.kernel_w &&
         conv.height % stride == 0 && conv.width % stride == 0 && conv.padding_h < conv.kernel_h &&
         conv.padding_w < conv.kernel_w &&
         (arguments.operand.channels == 0 ||
          (is_matrix(conv) && arguments.add == nullptr && can_read(arguments.operand, 2))) &&
         can_take(as_convolution(arguments));
}

bool can_implement(const ConvStats& arguments, TrainingTile tile) {
  return can_implement(arguments) &&
         (!is_lines(tile) || training_lines_can_implement(arguments.op, tile));
}

bool can_implement(const Dgrad& arguments, TrainingTile tile) {
  return can_implement(arguments) &&
         (!is_lines(tile) || (may_take_lines(arguments) &&
                              training_lines_can_implement(as_convolution(arguments), tile)));
}

int parts_of(const ConvBn& a, int num_classes, TrainingTile tile) {
  if (is_lines(tile)) return training_lines_parts(a, tile);
  return static_cast<int>(num_classes * ceil_div(positions(a), kPartRows));
}

cudaError_t list_tiles(const ConvBn& a, int num_classes, bool may_take_lines, int device,
                       std::vector<TrainingTile>* found) {
  Machine machine;
  const cudaError_t status = query(device, &machine);
  if (status != cudaSuccess || !machine.sm90) return status;
  const int num_sms = machine.num_sms;
  *found = {TrainingTile::k128x64, TrainingTile::k128x128, TrainingTile::k256x128Cluster};
  for (const TrainingTile tile : {TrainingTile::k216x64Lines, TrainingTile::k248x64Lines}) {
    if (may_take_lines && training_lines_can_implement(a, tile)) found->push_back(tile);
  }
  const auto time = [&](TrainingTile tile) {
    if (is_lines(tile)) return training_lines_cycles(a, tile, num_sms);
    return with_tile(tile, [&](auto t) { return cycles<decltype(t)>(a, num_sms, num_classes); });
  };
  std::stable_sort(found->begin(), found->end(),
                   [&](TrainingTile b, TrainingTile c) { return time(b) < time(c); });
  return cudaSuccess;
}

}  // namespace

cudaError_t training_tiles(const ConvStats& arguments, int device,
                           std::vector<TrainingTile>* found) {
  return can_implement(arguments) ? list_tiles(arguments.op, 1, true, device, found) : cudaSuccess;
}

cudaError_t training_tiles(const Dgrad& arguments, int device, std::vector<TrainingTile>* found) {
  if (!can_implement(arguments)) return cudaSuccess;
  const ConvolutionBn& conv = arguments.op.conv;
  return list_tiles(as_convolution(arguments), conv.stride_h * conv.stride_w,
                    may_take_lines(arguments), device, found);
}

int training_parts(const ConvStats& arguments, TrainingTile tile) {
  return parts_of(arguments.op, 1, tile);
}

int training_parts(const Dgrad& arguments, TrainingTile tile) {
  const ConvolutionBn& conv = arguments.op.conv;
  return parts_of(as_convolution(arguments), conv.stride_h * conv.stride_w, tile);
}

cudaError_t conv_stats(const ConvStats& arguments, TrainingTile tile, int device,
                       cudaStream_t stream) {
  if (!can_implement(arguments, tile)) return cudaErrorInvalidValue;
  Arguments to{};
  to.parts = arguments.moments;
  return run<Ending::kStatistics>(arguments.op, nullptr, to, tile, device, stream);
}

cudaError_t dgrad(const Dgrad& arguments, TrainingTile tile, int device, cudaStream_t stream) {
  if (!can_implement(arguments, tile)) return cudaErrorInvalidValue;
  const ConvBn a = as_convolution(arguments);
  Arguments to{};
  to.parts = arguments.sums;
  to.below_scale_shift = arguments.below_scale_shift;
  to.offset = arguments.operand_offset;
  Gradient gradient{};
  gradient.conv = arguments.op.conv;
  gradient.operand = arguments.operand;
  const auto encode_weight = [&](CUtensorMap* map, const ConvolutionBn& conv) {
    return encode_tiles(
        map, a.dtype, conv.weight,
        {a.out_channels, std::int64_t{conv.kernel_h} * conv.kernel_w, conv.channels},
        {1, kMapChannels});
  };
  const bool folded = arguments.operand.channels > 0, masks = arguments.below != nullptr;
  cudaError_t status = encode_weight(&gradient.weight, a.conv);
  if (folded && status == cudaSuccess) status = encode_weight(&gradient.matrix, a.projection);
  if (status != cudaSuccess) return status;
  if (folded) {
    return masks ? run<Ending::kFolded>(a, &gradient, to, tile, device, stream)
                 : run<Ending::kSum>(a, &gradient, to, tile, device, stream);
  }
  return masks ? run<Ending::kMask>(a, &gradient, to, tile, device, stream)
               : run<Ending::kAdd>(a, &gradient, to, tile, device, stream);
}

}  // namespace resnet_fused
