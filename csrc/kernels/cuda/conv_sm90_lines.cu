// 3 x 3 convolutions for sm_90a of whole lines: x is copied three times, not nine.
//
// Algorithm: a tile is lines of one image, or several small images, of all of its columns. For 64
// channels x is copied once for each column s of the window, by im2col mode: the lines that the
// tile needs, moved by s, one behind the other without a gap, with zeros where the window leaves
// the image. The window's three lines are then the same rows of shared memory from row 0, W or 2 W
// on: the descriptor names another first row, while the swizzle goes by addresses, so that its base
// offset stays 0. Images lie one line apart, which is the one's padding below and the next one's
// above. Products are weights times pixels (rows are 64 output channels, columns the tile's
// positions, of which those between images and beyond the last line are computed in vain): N may be
// any multiple of 8, and scale and shift are a lane's own.
//
// Roles: blocks are persistent; one thread copies, two warpgroups of consumers have 64 channels
// each, finish them and store them.
//
// Tiles (positions x channels): 200 x 128, which are 14 lines of 14 or 7 of 28; 224 x 128, which
// are 4 images of 7 x 7.
//
// Shared memory, from 0 on: 3 stages of 256 rows of x, 4 of 128 of the weight, all of 128 bytes;
// the result, for each consumer a row of 64 channels a position; mbarriers. 211 or 217 KiB.
//
// Pipelines (arrivals that fill / that empty a stage): pixels and weights (1 and their bytes / the
// 8 consumer warps).
//
// Memory: the floor; of L2 are asked, for 128 channels, 3 (lines + 2) / lines times x and all
// weights for every tile: for 256 channels of 14 x 14, 26 KB for products of 860 cycles.
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/channel_rows.cuh"
#include "kernels/cuda/conv_sm90_lines.h"
#include "kernels/cuda/launch.h"

namespace resnet_fused {
namespace {

constexpr int kConsumers = 2;  // warpgroups, behind the one of the producer
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kSide = 3;  // of the window
constexpr int kChannels = kConsumers * kProductM;
constexpr int kRows = 256;  // of x, in a stage
constexpr int kPixelStages = 3, kWeightStages = 4;
constexpr std::uint32_t kPixelBytes = kRows * kRowBytes, kWeightBytes = kChannels * kRowBytes;
constexpr int kLaunchRegisters = 168, kProducerRegisters = 40, kConsumerRegisters = 232;

template <int kPositions>
struct Shared {
  static constexpr std::uint32_t kWeights = kPixelStages * kPixelBytes;
  static constexpr std::uint32_t kResult = kWeights + kWeightStages * kWeightBytes;
  static constexpr std::uint32_t kPanelBytes = kPositions * kRowBytes;
  static constexpr std::uint32_t kMbarriers = kResult + kConsumers * kPanelBytes;
  using Pixels = Pipeline<PipelineId::kConvLinesPixels, kMbarriers, kPixelStages>;
  using Weights = Pipeline<PipelineId::kConvLinesWeights, Pixels::kEnd, kWeightStages>;
  static constexpr int kBytes = static_cast<int>(Weights::kEnd);
  static_assert(kResult % 1024 == 0 && kPanelBytes % 1024 == 0 && kBytes <= 227 * 1024);
};

struct Arguments {
  CUtensorMap x, weight, out;
  BatchNorm bn;
  int channels, out_channels, width;
  int lines, segments;    // of a tile in an image, and tiles of one
  int images;             // of a tile
  unsigned image_bytes;   // of a result, from an image to the next
  unsigned copied_bytes;  // of x
  unsigned tiles, tiles_across;
  bool relu;
  SpinLimit spin_limit;
};

// This block's tiles, those of the same lines behind one another.
class TileScheduler {
 public:
  __device__ __forceinline__ explicit TileScheduler(const Arguments& a) : a_(a) {}

  __device__ __forceinline__ bool valid() const { return tile_ < a_.tiles; }
  __device__ __forceinline__ void advance() { tile_ += gridDim.x; }
  __device__ __forceinline__ int tile() const { return static_cast<int>(tile_); }
  __device__ __forceinline__ int image() const { return row() / a_.segments * a_.images; }
  __device__ __forceinline__ int line() const { return row() % a_.segments * a_.lines; }
  __device__ __forceinline__ int channel() const { return tile_ % a_.tiles_across * kChannels; }

 private:
  __device__ __forceinline__ unsigned row() const { return tile_ / a_.tiles_across; }

  const Arguments& a_;
  unsigned tile_ = blockIdx.x;
};

// The role of one thread: asks for the operands of every tile.
template <int kPositions>
__device__ __forceinline__ void load_operands(const Arguments& a) {
  using Shared = Shared<kPositions>;
  typename Shared::Pixels pixels(a.spin_limit);
  typename Shared::Weights weights(a.spin_limit);
#pragma unroll 1
  for (TileScheduler at(a); at.valid(); at.advance()) {
#pragma unroll 1
    for (int c = 0; c < a.channels; c += kMapChannels) {
#pragma unroll 1
      for (int s = 0; s < kSide; ++s) {
        pixels.acquire(at.tile());
        pixels.commit_bytes(a.copied_bytes);
        ptx::load_pixels(pixels.stage() * kPixelBytes, a.x, pixels.full(),
                         {c, -1, at.line() - 1, at.image()}, {static_cast<std::uint16_t>(s), 0});
        pixels.advance();
#pragma unroll 1
        for (int r = 0; r < kSide; ++r) {
          weights.acquire(at.tile());
          weights.commit_bytes(kWeightBytes);
          ptx::load_tile(Shared::kWeights + weights.stage() * kWeightBytes, a.weight,
                         weights.full(), {c, r * kSide + s, at.channel()});
          weights.advance();
        }
      }
    }
  }
}

// The role of a warpgroup: 64 channels of every tile.
template <typename T, int kPositions>
__device__ __forceinline__ void consume(const Arguments& a, int consumer) {
  using Shared = Shared<kPositions>;
  constexpr unsigned kUnit = ptx::kDescriptorUnit;
  typename Shared::Pixels pixels(a.spin_limit);
  typename Shared::Weights weights(a.spin_limit);
  const std::uint64_t first_pixels = ptx::matrix_descriptor(0);
  const std::uint64_t first_weights =
      ptx::matrix_descriptor(Shared::kWeights + consumer * kProductM * kRowBytes);
  const unsigned line = a.width * (kRowBytes / kUnit);
  const std::uint32_t result = Shared::kResult + consumer * Shared::kPanelBytes;
  const bool leads = threadIdx.x % kWarpgroup == 0, releases = threadIdx.x % 32 == 0;
  const Epilogue<T> epilogue(a.relu);
  const int copies = kSide * ((a.channels + kMapChannels - 1) / kMapChannels);
#pragma unroll 1
  for (TileScheduler at(a); at.valid(); at.advance()) {
    const int channel = at.channel() + consumer * kProductM;
    const Channels channels = channels_of(a.bn, channel, a.out_channels);
    float acc[kPositions / 2];
    int last = -1;  // stages that are read, not known to be done with
    int last_pixels = -1;
#pragma unroll 1
    for (int copy = 0; copy < copies; ++copy) {
      pixels.wait(at.tile());
#pragma unroll
      for (int r = 0; r < kSide; ++r) {
        const std::uint64_t x = first_pixels + pixels.stage() * (kPixelBytes / kUnit) + r * line;
        const std::uint64_t weight = first_weights + weights.stage() * (kWeightBytes / kUnit);
        weights.wait(at.tile());
        ptx::wgmma_fence(acc);
#pragma unroll
        for (int k = 0; k < 4; ++k) {  // 16 channels, 32 bytes
          ptx::wgmma<T>(acc, weight + k * (32 / kUnit), x + k * (32 / kUnit), copy + r + k > 0);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>(acc);
        if (releases && last >= 0) Shared::Weights::release(last);
        if (r == 0 && releases && last_pixels >= 0) Shared::Pixels::release(last_pixels);
        last = weights.stage();
        weights.advance();
      }
      last_pixels = pixels.stage();
      pixels.advance();
    }
    ptx::wgmma_wait<0>(acc);
    if (releases) {
      Shared::Weights::release(last);
      Shared::Pixels::release(last_pixels);
    }
    if (leads) ptx::bulk_wait_read<0>();  // the last tile's result has left
    ptx::named_barrier(1 + consumer, kWarpgroup);
    store_line<kPositions / 8>(
        result, [&](int j, int half) { return finish<T>(acc, j, half, channels, epilogue); });
    ptx::fence_proxy_async();
    ptx::named_barrier(1 + consumer, kWarpgroup);
    if (leads) {
#pragma unroll 1
      for (int i = 0; i < a.images; ++i) {
        ptx::store_tile(a.out, result + i * a.image_bytes, {channel, 0, at.line(), at.image() + i});
      }
      ptx::bulk_commit();
    }
  }
  if (leads) ptx::bulk_wait_read<0>();
}

template <typename T, int kPositions>
__global__ void __launch_bounds__(kThreads, 1)
    conv_bn_sm90_lines_kernel(const __grid_constant__ Arguments a) {
  using Shared = Shared<kPositions>;
  ptx::registers_at_launch<kLaunchRegisters>();
  if (threadIdx.x == 0) {
    Shared::Pixels::init(1, kConsumers * kWarpgroup / 32);
    Shared::Weights::init(1, kConsumers * kWarpgroup / 32);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::wait_for_earlier_kernels();

  const int warpgroup = ptx::uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 0) {
    ptx::decrease_registers<kProducerRegisters>();
    if (threadIdx.x == 0) load_operands<kPositions>(a);
  } else {
    ptx::increase_registers<kConsumerRegisters>();
    consume<T, kPositions>(a, warpgroup - 1);
  }
}

template <int kPositions>
struct Tile {
  static constexpr int kOf = kPositions;
};

// Calls function(Tile()) of the type that `tile` names; false if it names none.
template <typename Function>
bool with_tile(ConvTile tile, Function&& function) {
  switch (tile) {
    case ConvTile::k200x128Sm90Lines:
      function(Tile<200>());
      return true;
    case ConvTile::k224x128Sm90Lines:
      function(Tile<224>());
      return true;
    default:
      return false;
  }
}

// The window's last rows are within a stage.
WholeLines lines_of(const ConvBn& a, int positions) {
  return {a, a.out_width, std::min(positions, kRows - 2 * a.out_width)};
}

template <typename T, int kPositions>
cudaError_t run(const ConvBn& a, int num_sms, cudaStream_t stream) {
  const WholeLines part = lines_of(a, kPositions);
  Arguments to{};
  to.bn = a.conv.bn;
  to.channels = a.conv.channels;
  to.out_channels = a.out_channels;
  to.width = a.out_width;
  to.lines = part.lines;
  to.segments = part.segments;
  to.images = part.images;
  to.image_bytes = static_cast<unsigned>((a.out_height + 1) * a.out_width * kRowBytes);
  const int copied = part.copied_lines * a.out_width;
  to.copied_bytes = static_cast<unsigned>(copied * kRowBytes);
  to.tiles = static_cast<unsigned>(part.tiles(a, kChannels));
  to.tiles_across = static_cast<unsigned>(ceil_div(a.out_channels, kChannels));
  to.relu = a.relu;
  to.spin_limit = spin_limit;
  // A line above each image, and none below.
  cudaError_t status =
      encode_pixels(&to.x, a.dtype, a.conv.x, {a.conv.channels, a.out_width, a.out_height, a.batch},
                    {{-1, -1}, {-1, 0}, {1, 1}}, copied);
  if (status == cudaSuccess) {
    status = encode_tiles(&to.weight, a.dtype, a.conv.weight,
                          {a.conv.channels, kSide * kSide, a.out_channels}, {1, kChannels});
  }
  if (status == cudaSuccess) {
    status =
        encode_tiles(&to.out, a.dtype, a.out, {a.out_channels, a.out_width, a.out_height, a.batch},
                     {a.out_width, part.lines, 1});
  }
  if (status != cudaSuccess) return status;
  return launch(&conv_bn_sm90_lines_kernel<T, kPositions>,
                persistent_shape(to.tiles, num_sms, kThreads, Shared<kPositions>::kBytes), stream,
                to);
}

}  // namespace

bool is_lines(ConvTile tile) {
  return with_tile(tile, [](auto) {});
}

bool conv_bn_sm90_lines_can_implement(const ConvBn& a, ConvTile tile) {
  bool fits = false;  // the last window's rows in a stage
  with_tile(tile, [&](auto t) { fits = 2 * a.out_width + t.kOf <= kRows; });
  return fits && a.projection.x == nullptr && a.residual.channels == 0 && is_padded_3x3(a.conv);
}

std::int64_t conv_bn_sm90_lines_cycles(const ConvBn& a, ConvTile tile, int num_sms) {
  std::int64_t cycles = 0;
  with_tile(tile, [&](auto t) {
    const WholeLines part = lines_of(a, t.kOf);
    const int copied = part.copied_lines * a.out_width / kSide + kChannels;  // rows of a step
    const std::int64_t of_sm = ceil_div(part.tiles(a, kChannels), num_sms);
    cycles = of_sm * (steps_of(a.conv) * step_cycles(kChannels, t.kOf, copied) +
                      t.kOf * kChannels / kEpilogueElements);
  });
  return cycles;
}

cudaError_t conv_bn_sm90_lines(const ConvBn& a, ConvTile tile, int num_sms, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  with_tile(tile, [&](auto t) {
    status = with_half(a.dtype, [&](auto half) {
      return run<decltype(half), decltype(t)::kOf>(a, num_sms, stream);
    });
  });
  return status;
}

}  // namespace resnet_fused
