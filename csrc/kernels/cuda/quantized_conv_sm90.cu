// Quantised implicit GEMM for sm_90a: wgmma of bytes on operands that TMA gathers.
//
// Algorithm: that of conv_sm90.cu, whose roles, clusters and pipelines these are. A step of the K
// loop takes one tap and 128 channels, 128 bytes as there, in four wgmma of depth 32; x is uint8 or
// int8, as wgmma takes both beside the weights' int8, and accumulators are int32. Or all are e4m3.
//
// Sums of e4m3's products: within a step as wgmma adds them, which cuts them to about 14 bits;
// those of the steps, 128 products each, are added in float32, in order of the K loop (as the
// DeepSeek-V3 report advises, arXiv 2412.19437, 3.3.2). That takes a second set of accumulators, so
// that there are no turns, and no tile of 256 channels.
//
// A block end with projection begins with the K loop over the shortcut; its sums are rounded to the
// accumulator's scale where they are, and the other K loop adds to them. A residual is added, in
// its scale, by the epilogue. Integers are added in any order; products of float32 are rounded
// once, so that the results are those of resnet_fused/reference/quantized.py, bit for bit.
//
// Tiles (positions x channels x depth, stages, results, blocks per SM): 128 x 64 x 128, 3, 2, 2;
// with turns, of one block or of two in a cluster: 128 x 128 x 128, 5, 2, 1; of two only, without
// turns: 128 x 256 x 128, 3, 2, 1. Where an image has fewer channels than a step, the rest of it is
// zeros.
//
// Shared memory: kStages x (positions + channels) rows of 128 bytes; the results; 2 x bias,
// multiplier and shortcut's scale (quantized_epilogue.cuh has both); mbarriers. The 16-byte chunks
// of rows are permuted as tensor_map.h says.
//
// Memory: a byte an element of x, weight, residual, shortcut and out, once each, as far as L2 holds
// what the taps and the blocks of one row of tiles share.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cuda/persistent_conv.cuh"
#include "kernels/cuda/quantized_conv_sm90.h"
#include "kernels/cuda/quantized_epilogue.cuh"

namespace resnet_fused {
namespace {

constexpr int kVectorBuffers = 2;  // of bias, multiplier and shortcut's scale

template <int kN, int kStages, int kBlocks, int kCluster, int kNumProducerRegisters,
          int kNumConsumerRegisters, bool kPingPong>
struct Tile : PersistentTile<128, kN, kStages, 2, kBlocks, kCluster, kNumProducerRegisters,
                             kNumConsumerRegisters, kPingPong, 1> {};

// Operands are of integers, or of e4m3.
template <typename T>
constexpr bool kIntegers = std::is_integral_v<T>;
template <typename T>
using Sum = std::conditional_t<kIntegers<T>, std::int32_t, float>;
template <typename T, typename Tile>
using Epilogue = QuantizedEpilogue<128, Tile::kN, Sum<T>>;

using Tile128x64 = Tile<64, 3, 2, 1, 40, 96, false>;
template <typename T, int kCluster>
using Tile128x128 = Tile<128, 5, 1, kCluster, 40, 232, kIntegers<T>>;
using Tile128x256 = Tile<256, 3, 1, 2, 40, 232, false>;

// What lies where in shared memory: the operands' stages from 0 on, and so forth.
template <typename Tile>
struct Shared {
  static constexpr int kResults = Tile::kStages * Tile::kStageBytes;
  static constexpr int kVectors = kResults + Tile::kResults * Tile::kResultBytes;
  static constexpr int kVectorsStage = 3 * Epilogue<std::uint8_t, Tile>::kVectorBytes;
  static constexpr int kMbarriers = kVectors + kVectorBuffers * kVectorsStage;
  using Operands = Pipeline<PipelineId::kQuantizedOperands, kMbarriers, Tile::kStages>;
  using Vectors = Pipeline<PipelineId::kQuantizedVectors, Operands::kEnd, kVectorBuffers>;
  using Results = Pipeline<PipelineId::kQuantizedResult, Vectors::kEnd, Tile::kResults>;
  using Turns = Pipeline<PipelineId::kQuantizedTurns, Results::kEnd, 1>;
  static constexpr int kBytes = kMbarriers + 256;
  static_assert(Turns::kEnd <= kBytes);
};

struct Arguments : PersistentArguments {
  QuantizedVectors vectors;
  bool residual_is_signed;
};

// The role of one warp: copies bias, multiplier and shortcut's scale of every tile's channels.
template <typename T, typename Tile>
__device__ __forceinline__ void load_vectors(const Arguments& a) {
  using Shared = Shared<Tile>;
  typename Shared::Vectors vectors(a.spin_limit);
#pragma unroll 1
  for (TileScheduler<Tile> at(a); at.valid(); at.advance()) {
    vectors.acquire(at.tile());
    Epilogue<T, Tile>::load_vectors(a.vectors, at.channel(), a.out_channels,
                                    Shared::kVectors + vectors.stage() * Shared::kVectorsStage,
                                    threadIdx.x % 32, 32);
    vectors.commit();
    vectors.advance();
  }
}

// The sum of `steps` steps, or, where it goes on, added to what the accumulators hold; the other
// arguments are those of Accumulators::multiply.
template <typename T, typename Tile, bool kGoesOn, typename Acc, typename Operands, typename Asked>
__device__ __forceinline__ void multiply(Acc& acc, int steps, int part, int tile,
                                         Operands& operands, Asked asked) {
  if constexpr (kIntegers<T>) {
    acc.template multiply<T, Tile, Tile::kCluster, kGoesOn>(steps, part, tile, operands, asked);
  } else {
    if constexpr (!kGoesOn) acc = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      Acc of_step;
      of_step.template multiply<T, Tile, Tile::kCluster>(1, part, tile, operands);
#pragma unroll
      for (int p = 0; p < Acc::kProducts; ++p) {
#pragma unroll
        for (int i = 0; i < Tile::kN / 2; ++i) acc.product(p)[i] += of_step.product(p)[i];
      }
    }
  }
}

// The role of a warpgroup: multiplies and finishes its positions of every tile, or every other
// tile.
template <typename T, typename Tile, Shortcut kShortcut>
__device__ __forceinline__ void consume(const Arguments& a, int consumer) {
  using Shared = Shared<Tile>;
  using Epilogue = Epilogue<T, Tile>;
  constexpr bool kProjection = kShortcut == Shortcut::kProjection;
  typename Shared::Operands operands(a.spin_limit);
  typename Shared::Vectors vectors(a.spin_limit);
  typename Shared::Results results(a.spin_limit);
  typename Shared::Turns turns(a.spin_limit);
  const int part = Tile::kPingPong ? 0 : consumer;  // of a tile's positions
  const int steps = steps_of<Tile::kStepChannels>(a.conv);
  const int before = kProjection ? steps_of<Tile::kStepChannels>(a.projection) : 0;
  int turn = 0;
#pragma unroll 1
  for (TileScheduler<Tile> at(a); at.valid(); at.advance()) {
    if (Tile::kPingPong && turn++ % kNumConsumers != consumer) {
      operands.advance(before + steps);
      vectors.advance();
      results.advance();
      continue;
    }
    const std::uint32_t of_tile = Shared::kVectors + vectors.stage() * Shared::kVectorsStage;
    const std::uint32_t result = Shared::kResults + results.stage() * Tile::kResultBytes;
    Accumulators<Tile::kConsumerM, Tile::kN, Sum<T>> acc;
    if constexpr (Tile::kPingPong) take_turn(consumer, at.tile(), turns);
    if constexpr (kProjection) {
      multiply<T, Tile, false>(acc, before, part, at.tile(), operands, [] {});
      vectors.wait(at.tile());
      Epilogue::rescale(acc, of_tile);
    }
    multiply<T, Tile, kProjection>(acc, steps, part, at.tile(), operands, [&] {
      if constexpr (Tile::kPingPong) pass_turn(consumer, turns);
    });
    if constexpr (!kProjection) vectors.wait(at.tile());
    results.wait(at.tile());
    Epilogue::template store_result<kShortcut == Shortcut::kResidual>(
        acc, of_tile, result, part * Tile::kConsumerM, a.residual_is_signed, a.relu);
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

template <typename T, typename Tile, Shortcut kShortcut>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks)
    quantized_conv_sm90_kernel(const __grid_constant__ Arguments a) {
  using Shared = Shared<Tile>;
  run_roles<Tile>(
      [] {
        Shared::Operands::init(1, Tile::kCluster * Tile::kOfTile * kWarpgroup / 32);
        Shared::Vectors::init(32, Tile::kOfTile);
        Shared::Results::init(1, Tile::kOfTile);
        Shared::Turns::init(1, 1);
      },
      [&] {
        load_operands<Tile, typename Shared::Operands, kShortcut == Shortcut::kProjection>(a);
      },
      [&] { load_vectors<T, Tile>(a); },
      [&] { move_results<Tile, typename Shared::Results, Shared::kResults>(a); },
      [&](int consumer) { consume<T, Tile, kShortcut>(a, consumer); });
}

constexpr QuantizedTile kTiles[] = {QuantizedTile::k128x64, QuantizedTile::k128x128,
                                    QuantizedTile::k128x128Cluster, QuantizedTile::k128x256Cluster};

// Calls function(Tile()) of the type that `tile` names for operands of T.
template <typename T, typename Function>
auto with_tile(QuantizedTile tile, Function&& function) {
  switch (tile) {
    case QuantizedTile::k128x64:
      return function(Tile128x64());
    case QuantizedTile::k128x128:
      return function(Tile128x128<T, 1>());
    case QuantizedTile::k128x256Cluster:
      if constexpr (kIntegers<T>) return function(Tile128x256());
      [[fallthrough]];
    default:
      return function(Tile128x128<T, 2>());
  }
}

// Cycles that the SM with the most tiles takes, as conv_sm90.cu has them: a step as long as its
// products or what it asks of L2 takes, and the epilogue. Its numbers for 16 bits are fitted to
// times; of int8 nothing is, and the epilogue is as long as its instructions take, by their number
// of an element of a tile (in 1/1000 of a cycle).
template <typename Tile>
std::int64_t cycles(const ConvBn& a, int num_sms) {
  constexpr std::int64_t kTensor = Tile::kM * Tile::kN * Tile::kStepChannels / 4096;
  constexpr std::int64_t kAsked = (Tile::kM + Tile::kWeightRows) * kRowBytes;
  constexpr int kL2BytesPerCycle = 64;  // of an SM
  constexpr std::int64_t kStep = std::max(kTensor, kAsked / kL2BytesPerCycle);
  const bool projects = a.projection.x != nullptr;
  const int of_element = 60 + (a.residual.channels > 0 ? 50 : 0) + (projects ? 35 : 0);
  const std::int64_t epilogue = std::int64_t{Tile::kM} * Tile::kN * of_element / 1000;
  std::int64_t steps = steps_of<Tile::kStepChannels>(a.conv);
  if (projects) steps += steps_of<Tile::kStepChannels>(a.projection);
  const std::int64_t of_sm = ceil_div(tiles<Tile>(a) * Tile::kCluster, num_sms);
  if (Tile::kPingPong) {
    const std::int64_t alone = epilogue * 5 / 3;
    return of_sm * std::max(steps * kStep, steps * kStep / 2 + alone) + alone;
  }
  return of_sm * steps * kStep + ceil_div(of_sm, Tile::kBlocks) * epilogue;
}

template <typename T, typename Tile, Shortcut kShortcut>
cudaError_t run(const QuantizedConv& quantized, int num_sms, cudaStream_t stream) {
  Arguments to{};
  to.vectors = {quantized.bias, quantized.multiplier, quantized.shortcut_scale};
  to.residual_is_signed = quantized.residual_dtype == DType::kInt8;
  const cudaError_t status = encode_arguments<Tile>(&to, quantized.conv);
  if (status != cudaSuccess) return status;
  return launch_tiles<Tile>(&quantized_conv_sm90_kernel<T, Tile, kShortcut>, to, num_sms,
                            Shared<Tile>::kBytes, stream);
}

// Calls function(T()) of the operands' type.
template <typename Function>
auto with_type(DType dtype, Function&& function) {
  return dtype == DType::kE4m3    ? function(__nv_fp8_e4m3())
         : dtype == DType::kUInt8 ? function(std::uint8_t())
                                  : function(std::int8_t());
}

}  // namespace

bool quantized_conv_sm90_can_implement(const QuantizedConv& arguments) {
  const ConvBn& a = arguments.conv;
  return quantized_conv_can_implement(arguments, QuantizedTile::k128x64) &&
         can_read(a.residual, 1) &&
         tiles<Tile128x64>(a) + positions(a) + 4 * Tile128x64::kM <= kMaxGridX &&
         can_read(a.conv) && (a.projection.x == nullptr || can_read(a.projection));
}

std::vector<QuantizedTile> quantized_conv_sm90_tiles(const QuantizedConv& arguments, int num_sms) {
  std::vector<QuantizedTile> found(std::begin(kTiles), std::end(kTiles));
  const auto time = [&](QuantizedTile tile) {
    return with_type(arguments.conv.dtype, [&](auto zero) {
      return with_tile<decltype(zero)>(
          tile, [&](auto t) { return cycles<decltype(t)>(arguments.conv, num_sms); });
    });
  };
  const auto best =
      std::min_element(found.begin(), found.end(),
                       [&](QuantizedTile a, QuantizedTile b) { return time(a) < time(b); });
  std::rotate(found.begin(), best, best + 1);
  return found;
}

cudaError_t quantized_conv_sm90(const QuantizedConv& a, QuantizedTile tile, int num_sms,
                                cudaStream_t stream) {
  return with_type(a.conv.dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_tile<T>(tile, [&](auto t) {
      using Tile = decltype(t);
      if (a.conv.projection.x != nullptr) {
        return run<T, Tile, Shortcut::kProjection>(a, num_sms, stream);
      }
      return a.conv.residual.channels > 0 ? run<T, Tile, Shortcut::kResidual>(a, num_sms, stream)
                                          : run<T, Tile, Shortcut::kNone>(a, num_sms, stream);
    });
  });
}

}  // namespace resnet_fused
