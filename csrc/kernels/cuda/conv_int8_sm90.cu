// Quantised implicit GEMM for sm_90a: wgmma of bytes on operands that TMA gathers.
//
// Algorithm: that of conv_sm90.cu, whose roles, clusters and pipelines these are. A step of the K
// loop takes one tap and 128 channels, 128 bytes as there, in four wgmma of depth 32; x is uint8 or
// int8, as wgmma takes both beside the weights' int8, and accumulators are int32.
//
// A block end with projection begins with the K loop over the shortcut; its sums are rounded to the
// accumulator's scale where they are, and the other K loop adds to them. A residual is added, in
// its scale, by the epilogue. Integers are added in any order; products of float32 are rounded
// once, so that the results are those of resnet_fused/reference/quantized.py, bit for bit.
//
// Weights come with each 16 output channels in another order (conv_int8_sm90.h), in which a
// thread's accumulators are those of four neighbours, and its part of a row of the result is a
// word.
//
// Tiles (positions x channels x depth, stages, results, blocks per SM), of one block or of two in a
// cluster: 128 x 64 x 128, 3, 2, 2; 128 x 128 x 128, 5, 2, 1; of two only: 128 x 256 x 128, 3, 2,
// 1. Where an image has fewer channels than a step, the rest of it is zeros.
//
// Shared memory: kStages x (positions + channels) rows of 128 bytes; the results, in panels of 128
// channels or, of the narrow tile, 64, rows of as many bytes; 2 x bias, multiplier and shortcut's
// scale; mbarriers. The 16-byte chunks of rows are permuted as tensor_map.h says, so that the
// epilogue's 8 rows x 4 lanes x 4 bytes fill all 32 banks once.
//
// Memory: a byte an element of x, weight, residual, shortcut and out, once each, as far as L2 holds
// what the taps and the blocks of one row of tiles share.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cuda/conv_int8_sm90.h"
#include "kernels/cuda/dtype.cuh"
#include "kernels/cuda/persistent_conv.cuh"

namespace resnet_fused {
namespace {

constexpr int kVectorBuffers = 2;  // of bias, multiplier and shortcut's scale

template <int kN, int kStages, int kBlocks, int kCluster, int kNumProducerRegisters,
          int kNumConsumerRegisters>
struct Tile : PersistentTile<128, kN, kStages, 2, kBlocks, kCluster, kNumProducerRegisters,
                             kNumConsumerRegisters, false, 1> {
  static constexpr int kVectorBytes = kN * 4;
};

using Tile128x64 = Tile<64, 3, 2, 1, 40, 96>;
template <int kCluster>
using Tile128x128 = Tile<128, 5, 1, kCluster, 40, 232>;
using Tile128x256 = Tile<256, 3, 1, 2, 40, 232>;

// What lies where in shared memory: the operands' stages from 0 on, and so forth.
template <typename Tile>
struct Shared {
  static constexpr int kResults = Tile::kStages * Tile::kStageBytes;
  static constexpr int kVectors = kResults + Tile::kResults * Tile::kResultBytes;
  static constexpr int kVectorsStage = 3 * Tile::kVectorBytes;
  static constexpr int kMbarriers = kVectors + kVectorBuffers * kVectorsStage;
  using Operands = Pipeline<PipelineId::kInt8Operands, kMbarriers, Tile::kStages>;
  using Vectors = Pipeline<PipelineId::kInt8Vectors, Operands::kEnd, kVectorBuffers>;
  using Results = Pipeline<PipelineId::kInt8Result, Vectors::kEnd, Tile::kResults>;
  static constexpr int kBytes = kMbarriers + 256;
  static_assert(Results::kEnd <= kBytes);
};

struct Arguments : PersistentArguments {
  const std::int32_t* bias;
  const float* multiplier;
  const float* shortcut_scale;
  bool residual_is_signed;
};

// The role of one warp: copies bias, multiplier and shortcut's scale of every tile's channels,
// zeros beyond the last one.
template <typename Tile>
__device__ __forceinline__ void load_vectors(const Arguments& a) {
  using Shared = Shared<Tile>;
  typename Shared::Vectors vectors(a.spin_limit);
#pragma unroll 1
  for (TileScheduler<Tile> at(a); at.valid(); at.advance()) {
    const std::uint32_t to = Shared::kVectors + vectors.stage() * Shared::kVectorsStage;
    vectors.acquire(at.tile());
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < Tile::kN; i += 32) {
      const int channel = at.channel() + i;
      const bool some = channel < a.out_channels, added = some && a.shortcut_scale != nullptr;
      ptx::store_shared(to + 4 * i, some ? ptx::load_global(a.bias + channel) : 0);
      ptx::store_shared(to + Tile::kVectorBytes + 4 * i,
                        some ? ptx::load_global(a.multiplier + channel) : 0.0f);
      ptx::store_shared(to + 2 * Tile::kVectorBytes + 4 * i,
                        added ? ptx::load_global(a.shortcut_scale + channel) : 0.0f);
    }
    vectors.commit();
    vectors.advance();
  }
}

// The four neighbouring channels of a group of 16 that a thread holds, as weights are permuted.
constexpr int kRun = 4;
using Integers = Pack<std::int32_t, kRun>;
using Floats = Pack<float, kRun>;

template <typename Acc>
__device__ __forceinline__ std::int32_t& value_of(Acc& acc, int i, int group, int e) {
  return acc.at(i, 2 * group + e / 2, e % 2);
}

// Where the vectors' values of these channels lie behind the tile's first one.
__device__ __forceinline__ std::uint32_t offset_of(int group) {
  return 4 * (16 * group + kRun * (threadIdx.x % 4));
}

// A projection's sums, rounded to the scale of the accumulator.
template <typename Tile, typename Acc>
__device__ __forceinline__ void rescale(Acc& acc, std::uint32_t shortcut_scale) {
#pragma unroll
  for (int group = 0; group < Tile::kN / 16; ++group) {
    const auto scale = ptx::load_shared<Floats>(shortcut_scale + offset_of(group));
#pragma unroll
    for (int i = 0; i < Acc::kRows; ++i) {
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        std::int32_t& value = value_of(acc, i, group, e);
        value = ptx::round_to_int(static_cast<float>(value) * scale.value[e]);
      }
    }
  }
}

// Bias, the residual that lies in `result`, requantisation; the bytes go where the residual was.
// Groups of channels by kBatch: what they need is loaded before any of them is stored.
template <typename Tile, typename Acc>
__device__ __forceinline__ void store_result(const Arguments& a, Acc& acc, std::uint32_t vectors,
                                             std::uint32_t result, int consumer) {
  constexpr int kBatch = 2;
  constexpr int kChunks = Tile::kPanel / 16, kLines = kRowBytes / Tile::kPanel;
  const int row = consumer * Tile::kConsumerM + acc.row(0);  // the other is the same modulo 8
  const std::uint32_t first = result + row * Tile::kPanel + kRun * (threadIdx.x % 4);
  const auto place = [&](int i, int group) {
    const int chunk = group % kChunks ^ row / kLines % kChunks;
    return first + group / kChunks * Tile::kPanelBytes + chunk * 16 +
           (acc.row(i) - acc.row(0)) * Tile::kPanel;
  };
  // Of signed bytes as of unsigned ones: -128 to 127 become 0 to 255, and then numbers again.
  const std::uint32_t flipped = a.residual_is_signed ? 0x80808080u : 0;
  const float offset = a.residual_is_signed ? 128.0f : 0.0f;
#pragma unroll
  for (int begin = 0; begin < Tile::kN / 16; begin += kBatch) {
    if (a.has_residual) {
      std::uint32_t residual[kBatch][Acc::kRows];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
#pragma unroll
        for (int i = 0; i < Acc::kRows; ++i) {
          residual[b][i] = ptx::load_shared<std::uint32_t>(place(i, begin + b)) ^ flipped;
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const auto scale =
            ptx::load_shared<Floats>(vectors + 2 * Tile::kVectorBytes + offset_of(begin + b));
#pragma unroll
        for (int i = 0; i < Acc::kRows; ++i) {
#pragma unroll
          for (int e = 0; e < kRun; ++e) {
            const auto byte = static_cast<std::uint8_t>(residual[b][i] >> 8 * e);
            value_of(acc, i, begin + b, e) +=
                ptx::round_to_int((static_cast<float>(byte) - offset) * scale.value[e]);
          }
        }
      }
    }
    std::uint32_t y[kBatch][Acc::kRows];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const std::uint32_t at = vectors + offset_of(begin + b);
      const auto bias = ptx::load_shared<Integers>(at);
      const auto multiplier = ptx::load_shared<Floats>(at + Tile::kVectorBytes);
#pragma unroll
      for (int i = 0; i < Acc::kRows; ++i) {
        std::int32_t v[kRun];
#pragma unroll
        for (int e = 0; e < kRun; ++e) {
          const std::int32_t sum = value_of(acc, i, begin + b, e) + bias.value[e];
          v[e] = ptx::round_to_int(static_cast<float>(sum) * multiplier.value[e]);
        }
        y[b][i] =
            a.relu ? ptx::pack_saturated<std::uint8_t>(v) : ptx::pack_saturated<std::int8_t>(v);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int i = 0; i < Acc::kRows; ++i) ptx::store_shared(place(i, begin + b), y[b][i]);
    }
  }
}

// The role of a warpgroup: multiplies and finishes its positions of every tile.
template <typename T, typename Tile, bool kProjection>
__device__ __forceinline__ void consume(const Arguments& a, int consumer) {
  using Shared = Shared<Tile>;
  typename Shared::Operands operands(a.spin_limit);
  typename Shared::Vectors vectors(a.spin_limit);
  typename Shared::Results results(a.spin_limit);
#pragma unroll 1
  for (TileScheduler<Tile> at(a); at.valid(); at.advance()) {
    const std::uint32_t of_tile = Shared::kVectors + vectors.stage() * Shared::kVectorsStage;
    const std::uint32_t result = Shared::kResults + results.stage() * Tile::kResultBytes;
    Accumulators<Tile::kConsumerM, Tile::kN, std::int32_t> acc;
    if constexpr (kProjection) {
      acc.template multiply<T, Tile, Tile::kCluster>(steps_of<Tile::kStepChannels>(a.projection),
                                                     consumer, at.tile(), operands);
      vectors.wait(at.tile());
      rescale<Tile>(acc, of_tile + 2 * Tile::kVectorBytes);
    }
    acc.template multiply<T, Tile, Tile::kCluster, kProjection>(
        steps_of<Tile::kStepChannels>(a.conv), consumer, at.tile(), operands);
    if constexpr (!kProjection) vectors.wait(at.tile());
    results.wait(at.tile());
    store_result<Tile>(a, acc, of_tile, result, consumer);
    ptx::fence_proxy_async();
    ptx::named_barrier(1 + consumer, kWarpgroup);
    if (threadIdx.x % kWarpgroup == 0) {
      results.release();
      vectors.release();
    }
    vectors.advance();
    results.advance();
  }
}

template <typename T, typename Tile, bool kProjection>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks)
    conv_int8_sm90_kernel(const __grid_constant__ Arguments a) {
  using Shared = Shared<Tile>;
  ptx::registers_at_launch<Tile::kNumLaunchRegisters>();
  if (threadIdx.x == 0) {
    Shared::Operands::init(1, Tile::kCluster * kNumConsumers * kWarpgroup / 32);
    Shared::Vectors::init(32, kNumConsumers);
    Shared::Results::init(1, kNumConsumers);
    ptx::fence_mbarrier_init();
  }
  meet<Tile::kCluster>();
  ptx::wait_for_earlier_kernels();

  const int warpgroup = ptx::uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 0) {
    ptx::decrease_registers<Tile::kNumProducerRegisters>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0 && lane == 0) {
      load_operands<Tile, typename Shared::Operands, kProjection>(a);
    } else if (warp == 1) {
      load_vectors<Tile>(a);
    } else if (warp == 2 && lane == 0) {
      move_results<Tile, typename Shared::Results, Shared::kResults>(a);
    }
  } else {
    ptx::increase_registers<Tile::kNumConsumerRegisters>();
    consume<T, Tile, kProjection>(a, warpgroup - 1);
  }
  // The other block copies into this one's shared memory, and releases its stages.
  if constexpr (Tile::kCluster > 1) meet<Tile::kCluster>();
}

constexpr Int8Tile kTiles[] = {Int8Tile::k128x64, Int8Tile::k128x128, Int8Tile::k128x128Cluster,
                               Int8Tile::k128x256Cluster};

// Calls function(Tile()) of the type that `tile` names.
template <typename Function>
auto with_tile(Int8Tile tile, Function&& function) {
  switch (tile) {
    case Int8Tile::k128x64:
      return function(Tile128x64());
    case Int8Tile::k128x128:
      return function(Tile128x128<1>());
    case Int8Tile::k128x128Cluster:
      return function(Tile128x128<2>());
    default:
      return function(Tile128x256());
  }
}

// Cycles that the SM with the most tiles takes, as conv_sm90.cu has them: a step as long as its
// products or what it asks of L2 takes, and the epilogue. Its numbers for 16 bits, which are fitted
// to times; nothing of int8 is.
template <typename Tile>
std::int64_t cycles(const ConvBn& a, int num_sms) {
  constexpr std::int64_t kTensor = Tile::kM * Tile::kN * Tile::kStepChannels / 4096;
  constexpr std::int64_t kAsked = (Tile::kM + Tile::kWeightRows) * kRowBytes;
  constexpr int kL2BytesPerCycle = 64;  // of an SM
  constexpr std::int64_t kStep = std::max(kTensor, kAsked / kL2BytesPerCycle);
  constexpr std::int64_t kEpilogue = Tile::kM * Tile::kN / 20;
  std::int64_t steps = steps_of<Tile::kStepChannels>(a.conv);
  if (a.projection.x != nullptr) steps += steps_of<Tile::kStepChannels>(a.projection);
  const std::int64_t of_sm = ceil_div(tiles<Tile>(a) * Tile::kCluster, num_sms);
  return of_sm * steps * kStep + ceil_div(of_sm, Tile::kBlocks) * kEpilogue;
}

template <typename T, typename Tile, bool kProjection>
cudaError_t make_plan(const ConvInt8& int8, int num_sms, LaunchPlan<Arguments>* plan) {
  Arguments& to = plan->arguments;
  to.bias = int8.bias;
  to.multiplier = int8.multiplier;
  to.shortcut_scale = int8.shortcut_scale;
  to.residual_is_signed = int8.residual_dtype == DType::kInt8;
  const cudaError_t status = encode_arguments<Tile>(&to, int8.conv);
  plan->kernel = &conv_int8_sm90_kernel<T, Tile, kProjection>;
  plan->shape = persistent_shape<Tile>(to.tiles, num_sms, Shared<Tile>::kBytes);
  return status;
}

template <typename T>
cudaError_t make_plan(const ConvInt8& a, Int8Tile tile, int num_sms, LaunchPlan<Arguments>* plan) {
  return with_tile(tile, [&](auto t) {
    using Tile = decltype(t);
    return a.conv.projection.x == nullptr ? make_plan<T, Tile, false>(a, num_sms, plan)
                                          : make_plan<T, Tile, true>(a, num_sms, plan);
  });
}

bool can_read_bytes(const ConvolutionBn& conv) { return can_read(conv) && conv.channels % 16 == 0; }

}  // namespace

bool conv_int8_can_implement(const ConvInt8& int8) {
  const ConvBn& a = int8.conv;
  return a.groups == 1 && a.out_channels % 16 == 0 && aligned(a.out) && can_read(a.residual, 1) &&
         tiles<Tile128x64>(a) + positions(a) + 4 * Tile128x64::kM <= kMaxGridX &&
         can_read_bytes(a.conv) && (a.projection.x == nullptr || can_read_bytes(a.projection));
}

cudaError_t conv_int8_tiles(const ConvInt8& arguments, int device, std::vector<Int8Tile>* found) {
  bool sm90 = false;
  int num_sms = 0;
  cudaError_t status = runs_sm90(device, &sm90);
  if (status == cudaSuccess) status = get_num_sms(device, &num_sms);
  if (status != cudaSuccess || !sm90 || !conv_int8_can_implement(arguments)) return status;
  found->assign(std::begin(kTiles), std::end(kTiles));
  const auto time = [&](Int8Tile tile) {
    return with_tile(tile, [&](auto t) { return cycles<decltype(t)>(arguments.conv, num_sms); });
  };
  const auto best = std::min_element(found->begin(), found->end(),
                                     [&](Int8Tile a, Int8Tile b) { return time(a) < time(b); });
  std::rotate(found->begin(), best, best + 1);
  return cudaSuccess;
}

cudaError_t conv_int8(const ConvInt8& arguments, Int8Tile tile, int device, cudaStream_t stream) {
  const ConvBn& a = arguments.conv;
  if (positions(a) * a.out_channels == 0) return cudaSuccess;
  cudaError_t status = set_device(device);
  bool sm90 = false;
  int num_sms = 0;
  if (status == cudaSuccess) status = runs_sm90(device, &sm90);
  if (status == cudaSuccess) status = get_num_sms(device, &num_sms);
  if (status != cudaSuccess) return status;
  if (!sm90 || !conv_int8_can_implement(arguments)) return cudaErrorInvalidValue;
  LaunchPlan<Arguments> plan;
  status = a.dtype == DType::kUInt8 ? make_plan<std::uint8_t>(arguments, tile, num_sms, &plan)
                                    : make_plan<std::int8_t>(arguments, tile, num_sms, &plan);
  return status == cudaSuccess ? launch(plan, stream) : status;
}

}  // namespace resnet_fused
