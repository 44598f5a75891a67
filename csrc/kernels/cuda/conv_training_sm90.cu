// Convolutions of a training step for sm_90a: forward, with the statistics of the result, and the
// gradient of the input where windows neither stride nor dilate.
//
// Algorithm: that of conv_sm90.cu, whose roles, turns, clusters and pipelines these are
// (persistent_conv.cuh); other endings. The gradient of the input is a convolution of the result's
// gradient with the window turned round, whose weight stands transposed: a step takes the rows of
// 64 of the convolution's output channels, 64 columns a panel, which wgmma reads by columns.
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

constexpr int kWarps = kWarpgroup / 32;

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

struct Arguments : PersistentArguments {
  float* parts;                    // of statistics or sums; may be null
  const float* below_scale_shift;  // rows of out_channels: mean, scale, shift
  const float* offset;             // of out_channels, where there is a second product
  int positions;
};

// Asks for the weights of a step of the gradient: of the window's tap turned round, and of 64
// output channels of the convolution from c on, all input channels of the tile, panel by panel.
template <typename Tile>
struct TransposedWeights {
  __device__ __forceinline__ static void load(const Product& product, std::uint32_t to,
                                              std::uint32_t mbarrier, int c, int tap, int channel) {
    const int turned = product.kernel_h * product.kernel_w - 1 - tap;
    constexpr int kShare =
        Tile::kN / kMapChannels / Tile::kCluster;  // panels that this block asks for
    const int first = blockIdx.x % Tile::kCluster * kShare;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int panel = first + i;
      const std::uint32_t at = to + panel * kMapChannels * kRowBytes;
      const int column = channel + panel * kMapChannels;
      if constexpr (Tile::kCluster == 1) {
        ptx::load_tile(at, product.weight, mbarrier, {column, turned, c});
      } else {
        constexpr std::uint16_t kAll = (1 << Tile::kCluster) - 1;
        ptx::load_tile_multicast(at, product.weight, mbarrier, {column, turned, c}, kAll);
      }
    }
  }
};

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
    if (Tile::kPingPong && turn++ % kNumConsumers != consumer) {
      operands.advance(steps_of(a.conv) + (kOperand ? steps_of(a.projection) : 0));
      results.advance();
      continue;
    }
    const std::uint32_t result = Shared::kResults + results.stage() * Tile::kResultBytes;
    const int channel = at.channel() + thread;
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
        steps_of(a.conv), part, at.tile(), operands, [&] {
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
        float* const to =
            a.parts + std::int64_t{position / kPartRows} * kRows * a.out_channels + channel;
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
  ptx::registers_at_launch<Tile::kNumLaunchRegisters>();
  if (threadIdx.x == 0) {
    Shared::Operands::init(1, Tile::kCluster * Tile::kOfTile * kWarps);
    Shared::Results::init(1, Tile::kOfTile);
    Shared::Turns::init(1, 1);
    ptx::fence_mbarrier_init();
  }
  meet<Tile::kCluster>();
  ptx::wait_for_earlier_kernels();

  const int warpgroup = ptx::uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 0) {
    ptx::decrease_registers<Tile::kNumProducerRegisters>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0 && lane == 0) {
      load_operands<Tile, typename Shared::Operands, kHasOperand<kEnding>, Weights>(a);
    } else if (warp == 2 && lane == 0) {
      move_results<Tile, typename Shared::Results, Shared::kResults>(a);
    }
  } else {
    ptx::increase_registers<Tile::kNumConsumerRegisters>();
    consume<T, Tile, kEnding>(a, warpgroup - 1);
  }
  // The other block copies into this one's shared memory, and releases its stages.
  if constexpr (Tile::kCluster > 1) meet<Tile::kCluster>();
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
std::int64_t cycles(const ConvBn& a, int num_sms) {
  constexpr std::int64_t kTensor = Tile::kM * Tile::kN * kMapChannels / 2048;
  constexpr std::int64_t kAsked = (Tile::kM + Tile::kWeightRows) * kRowBytes;
  constexpr int kL2BytesPerCycle = 64;  // of an SM
  constexpr std::int64_t kStep = std::max(kTensor, kAsked / kL2BytesPerCycle);
  constexpr std::int64_t kEnd = Tile::kM * Tile::kN / 8;
  const std::int64_t of_sm = ceil_div(tiles<Tile>(a) * Tile::kCluster, num_sms);
  const bool folded = a.projection.x != nullptr;
  const std::int64_t products = (steps_of(a.conv) + (folded ? steps_of(a.projection) : 0)) * kStep;
  if (Tile::kPingPong) return of_sm * std::max(products, (products + kEnd) / 2) + kEnd;
  return of_sm * (products + kEnd);
}

// The weights that lie transposed, of a gradient and of its second product, and its operand.
struct Transposed {
  CUtensorMap weight, matrix;
  Residual operand;
};

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
cudaError_t run(const ConvBn& a, const Transposed* transposed, Arguments to, TrainingTile tile,
                int num_sms, cudaStream_t stream) {
  return with_tile(tile, [&](auto t) {
    using Tile = decltype(t);
    to.positions = static_cast<int>(positions(a));
    cudaError_t status = transposed == nullptr ? encode_arguments<Tile>(&to, a)
                                               : encode_x(&to.conv, a, a.conv, Tile::kM);
    if (transposed != nullptr && status == cudaSuccess) {
      to.conv.weight = transposed->weight;
      status = encode_result<Tile>(&to, a);
    }
    if (kHasOperand<kEnding> && status == cudaSuccess) {
      status = encode_operand<Tile>(&to.projection, a, transposed->operand);
      to.projection.weight = transposed->matrix;
    }
    if (status != cudaSuccess) return status;
    return launch(&conv_training_sm90_kernel<T, Tile, kEnding>,
                  persistent_shape<Tile>(to.tiles, num_sms, Shared<Tile>::kBytes), stream, to);
  });
}

template <Ending kEnding>
cudaError_t run(const ConvBn& a, const Transposed* transposed, const Arguments& to,
                TrainingTile tile, int device, cudaStream_t stream) {
  if (positions(a) * a.out_channels == 0) return cudaSuccess;
  cudaError_t status = set_device(device);
  bool sm90 = false;
  int num_sms = 0;
  if (status == cudaSuccess) status = runs_sm90(device, &sm90);
  if (status == cudaSuccess) status = get_num_sms(device, &num_sms);
  if (status != cudaSuccess) return status;
  if (!sm90) return cudaErrorInvalidValue;
  return a.dtype == DType::kFloat16
             ? run<__half, kEnding>(a, transposed, to, tile, num_sms, stream)
             : run<__nv_bfloat16, kEnding>(a, transposed, to, tile, num_sms, stream);
}

bool can_take(const ConvBn& a) {
  return a.dtype != DType::kFloat32 && a.groups == 1 && a.out_channels % 8 == 0 && aligned(a.out) &&
         can_read(a.conv) && (a.projection.x == nullptr || can_read(a.projection)) &&
         can_read(a.residual, 2) && tiles<Tile128x64>(a) + positions(a) + 2 * kMaxM <= kMaxGridX;
}

// The convolution that the gradient is: of the gradient of the result, the window turned round.
ConvBn as_convolution(const Dgrad& dgrad) {
  ConvBn a = dgrad.op;
  ConvolutionBn& conv = a.conv;
  conv.x = dgrad.grad;
  conv.padding_h = conv.kernel_h - 1 - conv.padding_h;
  conv.padding_w = conv.kernel_w - 1 - conv.padding_w;
  std::swap(conv.height, a.out_height);
  std::swap(conv.width, a.out_width);
  std::swap(conv.channels, a.out_channels);
  a.out = dgrad.out;
  const void* const before = dgrad.below != nullptr ? dgrad.below : dgrad.add;
  if (before != nullptr) {
    const std::int64_t pixel = a.out_channels, line = pixel * a.out_width;
    a.residual = {before, a.out_channels, a.out_height, a.out_width, line * a.out_height,
                  line,   pixel};
  }
  if (dgrad.operand.channels > 0) {
    a.projection.x = dgrad.operand.data;
    a.projection.weight = dgrad.operand_matrix;
    a.projection.height = a.out_height;
    a.projection.width = a.out_width;
    a.projection.channels = a.out_channels;
  }
  return a;
}

bool can_implement(const ConvStats& arguments) { return can_take(arguments.op); }

bool can_implement(const Dgrad& arguments) {
  const ConvolutionBn& conv = arguments.op.conv;
  return conv.stride_h * conv.stride_w * conv.dilation_h * conv.dilation_w == 1 &&
         conv.padding_h < conv.kernel_h && conv.padding_w < conv.kernel_w &&
         (arguments.operand.channels == 0 ||
          (is_matrix(conv) && arguments.add == nullptr && can_read(arguments.operand, 2))) &&
         can_take(as_convolution(arguments));
}

cudaError_t list_tiles(const ConvBn& a, int device, std::vector<TrainingTile>* found) {
  bool sm90 = false;
  int num_sms = 0;
  cudaError_t status = runs_sm90(device, &sm90);
  if (status == cudaSuccess) status = get_num_sms(device, &num_sms);
  if (status != cudaSuccess || !sm90) return status;
  *found = {TrainingTile::k128x64, TrainingTile::k128x128, TrainingTile::k256x128Cluster};
  const auto time = [&](TrainingTile tile) {
    return with_tile(tile, [&](auto t) { return cycles<decltype(t)>(a, num_sms); });
  };
  std::stable_sort(found->begin(), found->end(),
                   [&](TrainingTile b, TrainingTile c) { return time(b) < time(c); });
  return cudaSuccess;
}

}  // namespace

cudaError_t training_tiles(const ConvStats& arguments, int device,
                           std::vector<TrainingTile>* found) {
  return can_implement(arguments) ? list_tiles(arguments.op, device, found) : cudaSuccess;
}

cudaError_t training_tiles(const Dgrad& arguments, int device, std::vector<TrainingTile>* found) {
  if (!can_implement(arguments)) return cudaSuccess;
  return list_tiles(as_convolution(arguments), device, found);
}

cudaError_t conv_stats(const ConvStats& arguments, TrainingTile tile, int device,
                       cudaStream_t stream) {
  if (!can_implement(arguments)) return cudaErrorInvalidValue;
  Arguments to{};
  to.parts = arguments.moments;
  return run<Ending::kStatistics>(arguments.op, nullptr, to, tile, device, stream);
}

cudaError_t dgrad(const Dgrad& arguments, TrainingTile tile, int device, cudaStream_t stream) {
  if (!can_implement(arguments)) return cudaErrorInvalidValue;
  const ConvBn a = as_convolution(arguments);
  Arguments to{};
  to.parts = arguments.sums;
  to.below_scale_shift = arguments.below_scale_shift;
  to.offset = arguments.operand_offset;
  Transposed transposed{};
  transposed.operand = arguments.operand;
  const auto encode_weight = [&](CUtensorMap* map, const ConvolutionBn& conv) {
    const auto size = [](std::int64_t value) { return static_cast<std::uint64_t>(value); };
    return encode_tiles(map, a.dtype, conv.weight,
                        {size(a.out_channels), size(std::int64_t{conv.kernel_h} * conv.kernel_w),
                         size(conv.channels)},
                        {1, kMapChannels});
  };
  const bool folded = arguments.operand.channels > 0, masks = arguments.below != nullptr;
  cudaError_t status = encode_weight(&transposed.weight, a.conv);
  if (folded && status == cudaSuccess) status = encode_weight(&transposed.matrix, a.projection);
  if (status != cudaSuccess) return status;
  if (folded) {
    return masks ? run<Ending::kFolded>(a, &transposed, to, tile, device, stream)
                 : run<Ending::kSum>(a, &transposed, to, tile, device, stream);
  }
  return masks ? run<Ending::kMask>(a, &transposed, to, tile, device, stream)
               : run<Ending::kAdd>(a, &transposed, to, tile, device, stream);
}

}  // namespace resnet_fused
