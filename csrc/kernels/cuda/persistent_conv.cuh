// What the persistent convolutions for sm_90a share: the shape of a tile and which blocks take it,
// the roles that copy operands and move results, turns, and the host's part of a launch.
//
// A kernel brings its epilogue and what that reads; its `Tile` is derived from PersistentTile, and
// its arguments from PersistentArguments.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/conv_sm90.cuh"
#include "kernels/cuda/launch.h"

namespace resnet_fused {

constexpr int kNumConsumers = 2;  // warpgroups, behind the one of producers
constexpr int kThreads = (1 + kNumConsumers) * kWarpgroup;
constexpr int kMaxM = 256;

template <int kM_, int kN_, int kStages_, int kResults_, int kBlocks_, int kCluster_,
          int kNumProducerRegisters_, int kNumConsumerRegisters_, bool kPingPong_ = false,
          int kElementBytes = 2>
struct PersistentTile {
  static constexpr int kM = kM_, kN = kN_, kStages = kStages_, kResults = kResults_;
  static constexpr int kBlocks = kBlocks_, kCluster = kCluster_;
  static constexpr int kNumProducerRegisters = kNumProducerRegisters_;
  static constexpr int kNumConsumerRegisters = kNumConsumerRegisters_;
  static constexpr int kNumLaunchRegisters = 65536 / (kThreads * kBlocks) / 8 * 8;
  static_assert(kNumProducerRegisters + kNumConsumers * kNumConsumerRegisters <=
                (1 + kNumConsumers) * kNumLaunchRegisters);
  // Whether consumers take turns at tiles; else each has its part of every tile.
  static constexpr bool kPingPong = kPingPong_;
  static constexpr int kOfTile = kPingPong ? 1 : kNumConsumers;  // consumers
  static constexpr int kConsumerM = kM / kOfTile;
  static constexpr int kStepChannels = kRowBytes / kElementBytes;
  static constexpr int kOperandBytes = kM * kRowBytes;  // of x, in a stage
  static constexpr int kWeightRows = kN / kCluster;     // that one block of a cluster copies
  static constexpr int kStageBytes = (kM + kN) * kRowBytes;
  static constexpr int kPanel = std::min(kN, kStepChannels);  // channels of a row of a result
  static constexpr int kPanels = kN / kPanel;
  static constexpr int kPanelRowBytes = kPanel * kElementBytes;
  static constexpr int kPanelBytes = kM * kPanelRowBytes;
  static constexpr int kResultBytes = kPanels * kPanelBytes;
};

struct PersistentArguments {
  Product conv, projection;
  CUtensorMap residual, out;
  unsigned out_height, out_width, tiles, tiles_across;
  int out_channels;
  bool has_residual, residual_in_line, relu;
  SpinLimit spin_limit;
};

// This block's tiles: those of one row of positions behind one another. Blocks of a cluster stay
// beside each other, at the same channels.
template <typename Tile>
class TileScheduler {
 public:
  __device__ __forceinline__ explicit TileScheduler(const PersistentArguments& a) : a_(a) {}

  __device__ __forceinline__ bool valid() const { return tile_ < a_.tiles; }
  __device__ __forceinline__ void advance() { tile_ += gridDim.x / Tile::kCluster; }
  __device__ __forceinline__ int tile() const { return static_cast<int>(tile_); }
  // The number of the tile's row of positions.
  __device__ __forceinline__ int row() const {
    return tile_ / a_.tiles_across * Tile::kCluster + blockIdx.x % Tile::kCluster;
  }
  __device__ __forceinline__ int position() const { return row() * Tile::kM; }
  __device__ __forceinline__ int channel() const { return tile_ % a_.tiles_across * Tile::kN; }

 private:
  const PersistentArguments& a_;
  unsigned tile_ = blockIdx.x / Tile::kCluster;  // the same for the blocks of a cluster
};

// Asks for a step's weights, of one tap and the channels from c on: rows of output channels.
template <typename Tile>
struct WeightRows {
  __device__ __forceinline__ static void load(const Product& product, std::uint32_t to,
                                              std::uint32_t mbarrier, int c, int tap, int channel) {
    // What this block of its cluster copies, to all of them.
    const int part = blockIdx.x % Tile::kCluster * Tile::kWeightRows;
    to += part * kRowBytes;
    if constexpr (Tile::kCluster == 1) {
      ptx::load_tile(to, product.weight, mbarrier, {c, tap, channel});
    } else {
      constexpr std::uint16_t kAll = (1 << Tile::kCluster) - 1;
      ptx::load_tile_multicast(to, product.weight, mbarrier, {c, tap, channel + part}, kAll);
    }
  }
};

// Asks for all steps of one product of one tile.
template <typename Tile, typename Weights = WeightRows<Tile>, typename Operands>
__device__ __forceinline__ void load_product(const PersistentArguments& a, const Product& product,
                                             const TileScheduler<Tile>& at, Operands& operands) {
  const Pixel pixel(at.position(), a.out_height, a.out_width);
  const int h = pixel.h * product.stride_h - product.padding_h;
  const int w = pixel.w * product.stride_w - product.padding_w;
  int tap = 0;
#pragma unroll 1
  for (int r = 0; r < product.kernel_h; ++r) {
#pragma unroll 1
    for (int s = 0; s < product.kernel_w; ++s, ++tap) {
#pragma unroll 1
      for (int c = 0; c < product.channels; c += Tile::kStepChannels) {
        const std::uint32_t stage = operands.stage() * Tile::kStageBytes;
        operands.acquire(at.tile());
        operands.commit_bytes(Tile::kStageBytes);
        if (product.matrix) {
          ptx::load_tile(stage, product.x, operands.full(), {c, at.position()});
        } else {
          ptx::load_pixels(stage, product.x, operands.full(), {c, w, h, pixel.image},
                           {static_cast<std::uint16_t>(s * product.dilation_w),
                            static_cast<std::uint16_t>(r * product.dilation_h)});
        }
        Weights::load(product, stage + Tile::kOperandBytes, operands.full(), c, tap, at.channel());
        operands.advance();
      }
    }
  }
}

// The role of one thread: asks for the operands of every tile.
template <typename Tile, typename Operands, bool kProjection, typename Weights = WeightRows<Tile>>
__device__ __forceinline__ void load_operands(const PersistentArguments& a) {
  Operands operands(a.spin_limit);
#pragma unroll 1
  for (TileScheduler<Tile> at(a); at.valid(); at.advance()) {
    if constexpr (kProjection) load_product<Tile, Weights>(a, a.projection, at, operands);
    load_product<Tile, Weights>(a, a.conv, at, operands);
  }
}

// Stores the result of a tile, and waits until it has been read.
template <typename Tile>
__device__ __forceinline__ void store(const PersistentArguments& a, const TileScheduler<Tile>& at,
                                      std::uint32_t result) {
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    ptx::store_tile(a.out, result + panel * Tile::kPanelBytes,
                    {at.channel() + panel * Tile::kPanel, at.position()});
  }
  ptx::bulk_commit();
  ptx::bulk_wait_read<0>();
}

// Of the residual of a tile.
template <typename Tile>
__device__ __forceinline__ unsigned residual_bytes(const PersistentArguments&,
                                                   const TileScheduler<Tile>&) {
  return Tile::kResultBytes;
}

// Copies the residual of a tile to where its result will lie.
template <typename Tile>
__device__ __forceinline__ void load_residual(const PersistentArguments& a,
                                              const TileScheduler<Tile>& at, std::uint32_t result,
                                              std::uint32_t mbarrier) {
  const Pixel pixel(at.position(), a.out_height, a.out_width);
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    const std::uint32_t to = result + panel * Tile::kPanelBytes;
    const int c = at.channel() + panel * Tile::kPanel;
    if (a.residual_in_line) {
      ptx::load_tile(to, a.residual, mbarrier, {c, at.position()});
    } else {
      ptx::load_pixels(to, a.residual, mbarrier, {c, pixel.w, pixel.h, pixel.image}, {0, 0});
    }
  }
}

// The role of one thread: stores every tile's result, which lies from kFirst on, and fills its
// place again with the residual of a later tile. To acquire a stage is to know that the result of
// an earlier one lies there. A kernel whose results lie otherwise brings `store`, `residual_bytes`
// and `load_residual` of its own Arguments.
template <typename Tile, typename Results, std::uint32_t kFirst, typename Arguments>
__device__ __forceinline__ void move_results(const Arguments& a) {
  Results results(a.spin_limit);
  const auto place = [&] { return kFirst + results.stage() * Tile::kResultBytes; };
  TileScheduler<Tile> stored(a);
  int filled = 0;
#pragma unroll 1
  for (TileScheduler<Tile> at(a); at.valid(); at.advance()) {
    results.acquire(at.tile());
    if (filled == Tile::kResults) {
      store(a, stored, place());
      stored.advance();
    } else {
      ++filled;
    }
    if (a.has_residual) {
      results.commit_bytes(residual_bytes(a, at));
      load_residual(a, at, place(), results.full());
    } else {
      results.commit();
    }
    results.advance();
  }
  for (; filled < Tile::kResults; ++filled) results.advance();  // to the oldest result
#pragma unroll 1
  for (; stored.valid(); stored.advance()) {
    results.acquire(stored.tile());
    store(a, stored, place());
    results.advance();
  }
}

// Consumers that take turns multiply one after the other, so that each knows, when its turn comes,
// that all stages before its own have been filled: it could not tell their phases apart otherwise.
// The first to go is the pipeline's producer.
template <typename Turns>
__device__ __forceinline__ void take_turn(int consumer, int tile, const Turns& turns) {
  if (consumer == 0) {
    turns.acquire(tile);
  } else {
    turns.wait(tile);
  }
}

template <typename Turns>
__device__ __forceinline__ void pass_turn(int consumer, Turns& turns) {
  if (threadIdx.x % kWarpgroup == 0) {
    if (consumer == 0) {
      turns.commit();
    } else {
      turns.release();
    }
  }
  turns.advance();
}

// All threads of the block, or of the cluster, have come.
template <int kCluster>
__device__ __forceinline__ void meet() {
  if constexpr (kCluster == 1) {
    __syncthreads();
  } else {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

// A kernel's roles. `init` begins its pipelines; of the first warpgroup one thread loads operands,
// one warp what else consumers read of channels (nullptr: nothing), and one thread moves results;
// the other warpgroups, by their number, consume.
template <typename Tile, typename Init, typename Load, typename LoadChannels, typename Move,
          typename Consume>
__device__ __forceinline__ void run_roles(Init init, Load load, LoadChannels load_channels,
                                          Move move, Consume consume) {
  constexpr bool kLoadsChannels = !std::is_null_pointer_v<LoadChannels>;
  ptx::registers_at_launch<Tile::kNumLaunchRegisters>();
  if (threadIdx.x == 0) {
    init();
    ptx::fence_mbarrier_init();
  }
  meet<Tile::kCluster>();
  ptx::wait_for_earlier_kernels();

  const int warpgroup = ptx::uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 0) {
    ptx::decrease_registers<Tile::kNumProducerRegisters>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0 && lane == 0) {
      load();
    } else if (kLoadsChannels && warp == 1) {
      if constexpr (kLoadsChannels) load_channels();
    } else if (warp == 2 && lane == 0) {
      move();
    }
  } else {
    ptx::increase_registers<Tile::kNumConsumerRegisters>();
    consume(warpgroup - 1);
  }
  // The other block copies into this one's shared memory, and releases its stages.
  if constexpr (Tile::kCluster > 1) meet<Tile::kCluster>();
}

// Tiles of a cluster's blocks together.
template <typename Tile>
std::int64_t tiles(const ConvBn& a) {
  return ceil_div(positions(a), Tile::kCluster * Tile::kM) * ceil_div(a.out_channels, Tile::kN);
}

// A residual whose pixels lie apart is gathered by im2col mode too, under a window of one pixel.
template <typename Tile>
cudaError_t encode_residual(CUtensorMap* to, const ConvBn& a) {
  const Residual& residual = a.residual;
  if (residual.in_line()) {
    return encode_tiles(to, a.dtype, residual.data, {residual.channels, positions(a)}, {Tile::kM},
                        {residual.pixel}, Tile::kPanelRowBytes);
  }
  return encode_pixels(to, a.dtype, residual.data,
                       {residual.channels, residual.width, residual.height, a.batch},
                       {{0, 0}, {0, 0}, {1, 1}}, Tile::kM,
                       {residual.pixel, residual.line, residual.image}, Tile::kPanelRowBytes);
}

inline bool can_read(const Residual& residual, int element_bytes) {
  if (residual.channels == 0) return true;
  if (!residual.in_chunks(16 / element_bytes) || residual.pixel < residual.channels) return false;
  if (residual.in_line()) return true;
  return residual.line >= residual.pixel && residual.line % residual.pixel == 0 &&
         residual.image >= residual.line && residual.image % residual.line == 0 &&
         element_bytes * residual.image < std::int64_t{1} << 40;
}

// The arguments, but for the operands' maps.
template <typename Tile>
cudaError_t encode_result(PersistentArguments* to, const ConvBn& a) {
  to->out_height = a.out_height;
  to->out_width = a.out_width;
  to->out_channels = a.out_channels;
  to->tiles = static_cast<unsigned>(tiles<Tile>(a));
  to->tiles_across = static_cast<unsigned>(ceil_div(a.out_channels, Tile::kN));
  to->has_residual = a.residual.channels > 0;
  to->residual_in_line = a.residual.in_line();
  to->relu = a.relu;
  to->spin_limit = spin_limit;
  if (to->has_residual) {
    const cudaError_t status = encode_residual<Tile>(&to->residual, a);
    if (status != cudaSuccess) return status;
  }
  return encode_tiles(&to->out, a.dtype, a.out, {a.out_channels, positions(a)}, {Tile::kM}, {},
                      Tile::kPanelRowBytes);
}

template <typename Tile>
cudaError_t encode_arguments(PersistentArguments* to, const ConvBn& a) {
  cudaError_t status = encode(&to->conv, a, a.conv, Tile::kM, Tile::kWeightRows);
  if (a.projection.x != nullptr && status == cudaSuccess) {
    status = encode(&to->projection, a, a.projection, Tile::kM, Tile::kWeightRows);
  }
  return status == cudaSuccess ? encode_result<Tile>(to, a) : status;
}

// Launches as many clusters as the SMs have room for, and no more than tiles.
template <typename Tile, typename Arguments>
cudaError_t launch_tiles(void (*kernel)(Arguments), const Arguments& arguments, int num_sms,
                         std::size_t shared_bytes, cudaStream_t stream) {
  const int most = std::max(1, num_sms / Tile::kCluster) * Tile::kBlocks;
  const LaunchShape shape =
      persistent_shape(arguments.tiles, most, kThreads, shared_bytes, Tile::kCluster);
  return launch(kernel, shape, stream, arguments);
}

}  // namespace resnet_fused
