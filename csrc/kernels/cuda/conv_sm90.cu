// Implicit GEMM for sm_90a: wgmma on operands that TMA gathers.
//
// Algorithm: as in conv_sm80.cu, out[m, k] = sum over taps (r, s) and channels c of
// x[pixel(m) + (r, s), c] * weight[k, r, s, c]; a step of the K loop takes one tap and 64 channels.
// One thread asks for a whole step in two bulk copies. For x, im2col mode: 128 output positions'
// pixels under the tap, zeros in the padding and beyond the last image; stride and padding are
// encoded in the tensor map, the tap and its dilation are an offset. 1 x 1 windows that move by
// single pixels see a matrix, in tiled mode. For weight, tiled mode over (channels, taps,
// out_channels).
//
// Roles: blocks are persistent and their warps specialised. The first warpgroup, which keeps few
// registers (setmaxnreg), serves the others: warp 0 copies operands, warp 1 computes scale and
// shift of the batch norms, warp 2 copies each residual to where the result will lie (in im2col
// mode where its pixels lie apart) and stores results, each as far ahead as its pipeline allows.
// Two warpgroups are consumers of half of the positions each, with fp32 accumulators: a step's
// wgmma run while the next step is waited for. Their epilogue (epilogue.cuh) adds the residual
// where it lies in shared memory and writes the result in its place, from where a bulk store takes
// it while the next tile is multiplied. A block end with projection begins with the K loop over the
// shortcut; its sums are multiplied by the ratio of both batch norms' scales, and the other K loop
// adds to them, so that one scale and shift finish both (sum_of in batch_norm.cuh).
//
// Turns: of the ping-pong tile each consumer has all positions of every other tile, and its
// epilogue runs under the other's products.
//
// Clusters: two blocks may take tiles of the same channels and adjacent positions. Each then copies
// one half of the weights of a step to both (multicast), so that L2 is asked for them once. A stage
// is free once the consumers of both blocks have released it. Where the number of tiles of
// positions is odd, one of the last pair computes zeros, of which nothing is stored.
//
// Tiles (positions x channels x depth, stages, results, blocks per SM): 128 x 64 x 64, 3, 2, 2;
// 128 x 128 x 64, 4, 2, 1, with turns or without; of two blocks in a cluster: 128 x 256 x 64 and
// 256 x 128 x 64, 3, 1, 1. A cluster walks through tiles that are as many apart as there are
// clusters, channels first, so that those in flight share positions.
//
// Shared memory: kStages x (positions + channels) rows of 128 bytes; the results, in panels of 64
// channels; 2 x scale and shift; mbarriers. Rows of 128 bytes have their 16-byte chunks permuted by
// the row's number modulo 8 (the 128-byte swizzle), which TMA writes, wgmma reads, and the
// epilogue's 8 rows x 4 lanes x 4 bytes need to fill all 32 banks once.
//
// Signs: where the result's signs are asked for (conv.h), a consumer keeps a bit of each value that
// it rounds. Of 64 channels its 2 x 8 in a row are two of the row's 8 bytes, which it stores
// itself.
//
// Pipelines (arrivals that fill / that empty a stage): operands (1 and a stage's bytes / the 8
// consumer warps of each block), scale and shift (32 lanes / 2 consumer warpgroups), result (1, and
// the residual's bytes where there is one, once the result before it has been stored / 2 consumer
// warpgroups, which leave the result there).
//
// Memory: x, weight, residual, shortcut, out and signs once each, the floor, as far as L2 holds
// what the taps and the blocks of one row of tiles share.
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/conv_sm90.h"
#include "kernels/cuda/conv_sm90_lines.h"
#include "kernels/cuda/conv_sm90_split.h"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/persistent_conv.cuh"

namespace resnet_fused {
namespace {

constexpr int kScaleShiftBuffers = 2;  // of scale and shift

template <int kM, int kN, int kStages, int kResults, int kBlocks, int kCluster,
          int kNumProducerRegisters, int kNumConsumerRegisters, int kEpilogueColumns_ = 4,
          bool kPingPong = false>
struct Tile : PersistentTile<kM, kN, kStages, kResults, kBlocks, kCluster, kNumProducerRegisters,
                             kNumConsumerRegisters, kPingPong> {
  static constexpr int kScaleShiftBytes = kN * static_cast<int>(sizeof(ScaleShift));
  // Of 8 channels, that an epilogue works at together.
  static constexpr int kEpilogueColumns = kEpilogueColumns_;
};

using Tile128x64 = Tile<128, 64, 3, 2, 2, 1, 40, 96>;
using Tile128x128 = Tile<128, 128, 4, 2, 1, 1, 40, 232>;
using Tile128x128PingPong = Tile<128, 128, 4, 2, 1, 1, 40, 232, 2, true>;
using Tile128x256 = Tile<128, 256, 3, 1, 1, 2, 40, 232>;
using Tile256x128 = Tile<256, 128, 3, 1, 1, 2, 40, 232>;

struct Arguments : PersistentArguments {
  std::uint8_t* signs;  // see conv.h
  int positions, sign_groups;
};

// What lies where in shared memory: the operands' stages from 0 on, and so forth.
template <typename Tile>
struct Shared {
  static constexpr int kResults = Tile::kStages * Tile::kStageBytes;
  static constexpr int kScaleShift = kResults + Tile::kResults * Tile::kResultBytes;
  static constexpr int kMbarriers = kScaleShift + kScaleShiftBuffers * Tile::kScaleShiftBytes;
  using Operands = Pipeline<PipelineId::kConvOperands, kMbarriers, Tile::kStages>;
  using ScaleShifts = Pipeline<PipelineId::kConvScaleShift, Operands::kEnd, kScaleShiftBuffers>;
  using Results = Pipeline<PipelineId::kConvResult, ScaleShifts::kEnd, Tile::kResults>;
  using Turns = Pipeline<PipelineId::kConvTurns, Results::kEnd, 1>;
  static constexpr int kBytes = kMbarriers + 256;
  static_assert(Turns::kEnd <= kBytes && kBytes <= 227 * 1024);
};

// The role of one warp: computes scale and shift of every tile's channels. With SMs by the dozen a
// block's tiles have the same channels again and again: what a stage holds already stays.
template <typename Tile, bool kProjection>
__device__ __forceinline__ void load_scale_shifts(const PersistentArguments& a) {
  using Shared = Shared<Tile>;
  const int lane = threadIdx.x % 32;
  typename Shared::ScaleShifts scale_shifts(a.spin_limit);
  int held = -1, held_next = -1;  // the first channels of this stage and of the other one
#pragma unroll 1
  for (TileScheduler<Tile> at(a); at.valid(); at.advance()) {
    const int first = at.channel(), count = a.out_channels - first;
    const std::uint32_t to = Shared::kScaleShift + scale_shifts.stage() * Tile::kScaleShiftBytes;
    scale_shifts.acquire(at.tile());
    const int begin = first == held ? Tile::kN : lane;
    static_assert(kScaleShiftBuffers == 2);
    held = held_next;
    held_next = first;
#pragma unroll 1
    for (int i = begin; i < Tile::kN; i += 32) {
      ScaleShift loaded{};
      if (i < count) {
        loaded = scale_shift_of(a.conv.bn, first + i);
        if constexpr (kProjection) {
          loaded = sum_of(loaded, scale_shift_of(a.projection.bn, first + i));
        }
      }
      ptx::store_shared(to + i * kScaleShiftBytes, loaded);
    }
    scale_shifts.commit();
    scale_shifts.advance();
  }
}

// Multiplies the projection's sums so that conv's can be added to them.
template <typename Acc>
__device__ __forceinline__ void scale_by_ratio(Acc& acc, std::uint32_t scale_shift) {
#pragma unroll
  for (int j = 0; j < Acc::kColumns; ++j) {
#pragma unroll
    for (int e = 0; e < Acc::kRun; ++e) {
      const float ratio =
          ptx::load_shared<ScaleShift>(scale_shift + (acc.column(j) + e) * kScaleShiftBytes)
              .scale_low;
#pragma unroll
      for (int i = 0; i < Acc::kRows; ++i) acc.at(i, j, e) *= ratio;
    }
  }
}

// A tile's signs.
struct Signs {
  static constexpr int kChannels = 64;  // of 8 bytes

  const Arguments& a;
  int position, channel;  // the tile's first

  // Of the tile's `row`-th position and its `group`-th 64 channels: the low half of `bits` has
  // those of the first of this thread's 2 values in each 8 columns, the high half of the second.
  __device__ __forceinline__ void store(int row, int group, std::uint32_t bits) const {
    const int from = channel + group * kChannels;
    if (position + row >= a.positions || from >= a.out_channels) return;
    const std::int64_t place = std::int64_t{position + row} * a.sign_groups + from / kChannels;
    const auto pair = static_cast<std::uint16_t>(bits | bits >> 8);
    ptx::store_global(reinterpret_cast<std::uint16_t*>(a.signs) + place * 4 + threadIdx.x % 4,
                      pair);
  }
};

// Batch norm, the residual that lies in `result`, ReLU, rounding; the values go where the residual
// was. Columns by kBatch: what a batch needs is loaded before any of it is stored, so that loads
// wait for each other no more often than the registers ask for.
template <typename T, typename Tile, bool kSigns, typename Acc>
__device__ __forceinline__ void store_result(Acc& acc, std::uint32_t scale_shift,
                                             std::uint32_t result, int part, bool has_residual,
                                             bool relu, const Signs& signs) {
  using Run = Pack<T, Acc::kRun>;
  constexpr int kBatch = Tile::kEpilogueColumns;
  const Epilogue<T> epilogue(relu);
  const int row = part * Tile::kConsumerM + acc.row(0);  // the others are the same modulo 8
  const std::uint32_t first = result + row * kRowBytes + acc.column(0) * sizeof(T);
  const auto place = [&](int i, int j) {
    return first + j / 8 * Tile::kPanelBytes + (j % 8 ^ row % 8) * 16 +
           (acc.row(i) - acc.row(0)) * kRowBytes;
  };
  constexpr int kGroup = Signs::kChannels / 8;  // columns
  static_assert(kGroup % kBatch == 0 && Acc::kColumns % kGroup == 0);
  std::uint32_t positive[Acc::kRows];
#pragma unroll
  for (int begin = 0; begin < Acc::kColumns; begin += kBatch) {
    Run residual[kBatch][Acc::kRows];
    if (has_residual) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
#pragma unroll
        for (int i = 0; i < Acc::kRows; ++i) {
          residual[b][i] = ptx::load_shared<Run>(place(i, begin + b));
        }
      }
    }
    float y[kBatch][Acc::kRows][Acc::kRun];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int e = 0; e < Acc::kRun; ++e) {
        const auto of = ptx::load_shared<ScaleShift>(scale_shift + (acc.column(begin + b) + e) *
                                                                       kScaleShiftBytes);
#pragma unroll
        for (int i = 0; i < Acc::kRows; ++i) {
          y[b][i][e] = epilogue.normalise(acc.at(i, begin + b, e), of);
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int i = 0; i < Acc::kRows; ++i) {
        if (has_residual) epilogue.add(y[b][i], residual[b][i]);
        const Run run = epilogue.pack(y[b][i]);
        ptx::store_shared(place(i, begin + b), run);
        if constexpr (kSigns) {
          constexpr std::uint32_t kFirst = 0x10001;
          std::uint32_t pair;
          memcpy(&pair, &run, sizeof(pair));
          if ((begin + b) % kGroup == 0) positive[i] = 0;
          positive[i] |= ptx::positive_pair<T>(pair) & kFirst << (begin + b) % kGroup;
        }
      }
    }
    if (kSigns && (begin + kBatch) % kGroup == 0) {
#pragma unroll
      for (int i = 0; i < Acc::kRows; ++i) {
        signs.store(part * Tile::kConsumerM + Acc::row(i), begin / kGroup, positive[i]);
      }
    }
  }
}

// The role of a warpgroup: multiplies and finishes its positions of every tile, or every other
// tile.
template <typename T, typename Tile, bool kProjection, bool kSigns>
__device__ __forceinline__ void consume(const Arguments& a, int consumer) {
  using Shared = Shared<Tile>;
  typename Shared::Operands operands(a.spin_limit);
  typename Shared::ScaleShifts scale_shifts(a.spin_limit);
  typename Shared::Results results(a.spin_limit);
  typename Shared::Turns turns(a.spin_limit);
  const int part = Tile::kPingPong ? 0 : consumer;  // of a tile's positions
  int turn = 0;
#pragma unroll 1
  for (TileScheduler<Tile> at(a); at.valid(); at.advance()) {
    if (Tile::kPingPong && turn++ % kNumConsumers != consumer) {
      operands.advance(steps_of(a.conv) + (kProjection ? steps_of(a.projection) : 0));
      scale_shifts.advance();
      results.advance();
      continue;
    }
    const std::uint32_t scale_shift =
        Shared::kScaleShift + scale_shifts.stage() * Tile::kScaleShiftBytes;
    const std::uint32_t result = Shared::kResults + results.stage() * Tile::kResultBytes;
    Accumulators<Tile::kConsumerM, Tile::kN> acc;
    if constexpr (Tile::kPingPong) take_turn(consumer, at.tile(), turns);
    if constexpr (kProjection) {
      acc.template multiply<T, Tile, Tile::kCluster>(steps_of(a.projection), part, at.tile(),
                                                     operands);
      scale_shifts.wait(at.tile());
      scale_by_ratio(acc, scale_shift);
    }
    const auto asked = [&] {
      if constexpr (Tile::kPingPong) pass_turn(consumer, turns);
    };
    acc.template multiply<T, Tile, Tile::kCluster, kProjection>(steps_of(a.conv), part, at.tile(),
                                                                operands, asked);
    if constexpr (!kProjection) scale_shifts.wait(at.tile());
    results.wait(at.tile());
    store_result<T, Tile, kSigns>(acc, scale_shift, result, part, a.has_residual, a.relu,
                                  Signs{a, at.position(), at.channel()});
    ptx::fence_proxy_async();
    ptx::named_barrier(1 + consumer, kWarpgroup);
    if (threadIdx.x % kWarpgroup == 0) {
      results.release();
      scale_shifts.release();
    }
    scale_shifts.advance();
    results.advance();
  }
}

template <typename T, typename Tile, bool kProjection, bool kSigns>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks)
    conv_bn_sm90_kernel(const __grid_constant__ Arguments a) {
  using Shared = Shared<Tile>;
  run_roles<Tile>(
      [] {
        Shared::Operands::init(1, Tile::kCluster * Tile::kOfTile * kWarpgroup / 32);
        Shared::ScaleShifts::init(32, Tile::kOfTile);
        Shared::Results::init(1, Tile::kOfTile);
        Shared::Turns::init(1, 1);
      },
      [&] { load_operands<Tile, typename Shared::Operands, kProjection>(a); },
      [&] { load_scale_shifts<Tile, kProjection>(a); },
      [&] { move_results<Tile, typename Shared::Results, Shared::kResults>(a); },
      [&](int consumer) { consume<T, Tile, kProjection, kSigns>(a, consumer); });
}

// Calls function(Tile()) of the type that `tile` names; false if it names none.
template <typename Function>
bool with_tile(ConvTile tile, Function&& function) {
  switch (tile) {
    case ConvTile::k128x64Sm90:
      function(Tile128x64());
      return true;
    case ConvTile::k128x128Sm90:
      function(Tile128x128());
      return true;
    case ConvTile::k128x128Sm90PingPong:
      function(Tile128x128PingPong());
      return true;
    case ConvTile::k128x256Sm90Cluster:
      function(Tile128x256());
      return true;
    case ConvTile::k256x128Sm90Cluster:
      function(Tile256x128());
      return true;
    default:
      return false;
  }
}

// For the heuristic. 128 x 256 is a little faster in few layers, which measuring finds.
constexpr ConvTile kTiles[] = {
    ConvTile::k128x64Sm90,         ConvTile::k128x128Sm90,      ConvTile::k128x128Sm90PingPong,
    ConvTile::k256x128Sm90Cluster, ConvTile::k64x64Sm90Split2,  ConvTile::k64x64Sm90Split4,
    ConvTile::k64x64Sm90Split8,    ConvTile::k200x128Sm90Lines, ConvTile::k224x128Sm90Lines,
};

bool can_take(const ConvBn& a, ConvTile tile) {
  if (is_split(tile)) return a.signs == nullptr && conv_bn_sm90_split_can_implement(a, tile);
  if (is_lines(tile)) return a.signs == nullptr && conv_bn_sm90_lines_can_implement(a, tile);
  return with_tile(tile, [](auto) {});
}

// Cycles that the SM with the most tiles takes: steps, and epilogues so far as no other products
// hide them, those of another block of the SM or of the other warpgroup where they take turns; its
// last one and the other's last one run under nothing. The numbers are fitted to an H200's times of
// ResNet-50's layers in all tiles, at 256 images, 32 and one: a residual's element takes 1/8 of a
// cycle; a cluster's blocks, which wait for each other, 9/8 of the time; a projection 64 cycles for
// each of the tile's channels, as products pause while its sums are multiplied, unless the SM's
// other block has some.
template <typename Tile>
std::int64_t cycles(const ConvBn& a, int num_sms) {
  constexpr std::int64_t kAlone = step_cycles(Tile::kM, Tile::kN, Tile::kM + Tile::kN);
  constexpr std::int64_t kStep = Tile::kCluster > 1 ? kAlone * 9 / 8 : kAlone;
  constexpr int kHidden = Tile::kPingPong ? 2 : Tile::kBlocks;  // one of so many epilogues is seen
  const bool projects = a.projection.x != nullptr;
  const std::int64_t steps = steps_of(a.conv) + (projects ? steps_of(a.projection) : 0);
  const std::int64_t products = steps * kStep + (projects ? 64 * Tile::kN / Tile::kBlocks : 0);
  const std::int64_t epilogue =
      Tile::kM * Tile::kN / kEpilogueElements * (a.residual.channels > 0 ? 9 : 1);
  const std::int64_t of_sm = ceil_div(tiles<Tile>(a) * Tile::kCluster, num_sms);
  return of_sm * products + (ceil_div(of_sm, kHidden) + (Tile::kPingPong ? 2 : 0)) * epilogue;
}

template <typename T, typename Tile, bool kProjection>
cudaError_t run(const ConvBn& a, int num_sms, cudaStream_t stream) {
  Arguments to{};
  const cudaError_t status = encode_arguments<Tile>(&to, a);
  if (status != cudaSuccess) return status;
  to.signs = a.signs;
  to.positions = static_cast<int>(positions(a));
  to.sign_groups = static_cast<int>(ceil_div(a.out_channels, Signs::kChannels));
  return launch_tiles<Tile>(a.signs == nullptr ? &conv_bn_sm90_kernel<T, Tile, kProjection, false>
                                               : &conv_bn_sm90_kernel<T, Tile, kProjection, true>,
                            to, num_sms, Shared<Tile>::kBytes, stream);
}

}  // namespace

bool conv_bn_sm90_can_implement(const ConvBn& a, ConvTile tile) {
  return (tile == ConvTile::kAuto || can_take(a, tile)) && a.dtype != DType::kFloat32 &&
         a.groups == 1 && a.out_channels % 8 == 0 && aligned(a.out) && can_read(a.residual, 2) &&
         tiles<Tile128x64>(a) + positions(a) + 2 * kMaxM <= kMaxGridX && can_read(a.conv) &&
         (a.projection.x == nullptr || can_read(a.projection));
}

ConvTile conv_bn_sm90_choose(const ConvBn& a, int num_sms) {
  ConvTile chosen = ConvTile::kAuto;
  std::int64_t least = 0;
  for (const ConvTile tile : kTiles) {
    if (!can_take(a, tile)) continue;
    std::int64_t found = is_split(tile)   ? conv_bn_sm90_split_cycles(a, tile, num_sms)
                         : is_lines(tile) ? conv_bn_sm90_lines_cycles(a, tile, num_sms)
                                          : 0;
    with_tile(tile, [&](auto t) { found = cycles<decltype(t)>(a, num_sms); });
    if (chosen == ConvTile::kAuto || found < least) {
      chosen = tile;
      least = found;
    }
  }
  return chosen;
}

cudaError_t conv_bn_sm90(const ConvBn& a, ConvTile tile, int num_sms, cudaStream_t stream) {
  if (!conv_bn_sm90_can_implement(a, tile)) return cudaErrorInvalidValue;
  if (tile == ConvTile::kAuto) tile = conv_bn_sm90_choose(a, num_sms);
  if (is_split(tile)) return conv_bn_sm90_split(a, tile, stream);
  if (is_lines(tile)) return conv_bn_sm90_lines(a, tile, num_sms, stream);
  cudaError_t status = cudaErrorInvalidValue;
  with_tile(tile, [&](auto t) {
    using Tile = decltype(t);
    status = with_half(a.dtype, [&](auto half) {
      using T = decltype(half);
      return a.projection.x == nullptr ? run<T, Tile, false>(a, num_sms, stream)
                                       : run<T, Tile, true>(a, num_sms, stream);
    });
  });
  return status;
}

}  // namespace resnet_fused
