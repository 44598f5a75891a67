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
// registers (setmaxnreg), is made of producers: warp 0 copies operands, warp 1 computes scale and
// shift of the batch norms, warp 2 copies the residual (in im2col mode where its pixels lie apart),
// each as far ahead as its pipeline allows. Two warpgroups are consumers of 64 positions each, with
// fp32 accumulators: a step's four wgmma run while the next step is waited for. Their epilogue
// (epilogue.cuh) adds the residual where it lies in shared memory and writes the result in its
// place, from where a bulk store takes it while the next tile is multiplied. A block end with
// projection runs a second K loop over the shortcut into accumulators of its own.
//
// Tiles (positions x channels x depth, stages, blocks per SM): 128 x 64 x 64, 3, 2; 128 x 128 x 64,
// 4, 1. A block walks through tiles that are gridDim.x apart, channels first, so that those in
// flight share positions.
//
// Shared memory: kStages x (128 + channels) rows of 128 bytes; 2 results of 128 rows, in panels of
// 64 channels; 2 x scale and shift of one batch norm, or of two; mbarriers. Rows of 128 bytes have
// their 16-byte chunks permuted by the row's number modulo 8 (the 128-byte swizzle), which TMA
// writes, wgmma reads, and the epilogue's 8 rows x 4 lanes x 4 bytes need to fill all 32 banks
// once.
//
// Pipelines (arrivals that fill / that empty a stage): operands (1 and a stage's bytes / the 8
// consumer warps), scale and shift (32 lanes / 2 consumer warpgroups), result (1 and the residual's
// bytes / 2 consumer warpgroups, once a store has read it; without a residual never filled).
//
// Memory: x, weight, residual, shortcut and out once each, the floor, as far as L2 holds what the
// taps and the blocks of one row of tiles share.
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/conv_sm90.h"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pipeline.cuh"
#include "kernels/cuda/ptx_sm90.cuh"
#include "kernels/cuda/tensor_map.h"

namespace resnet_fused {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kNumConsumers = 2;  // warpgroups, behind the one of producers
constexpr int kThreads = (1 + kNumConsumers) * kWarpgroup;
constexpr int kM = 128;
constexpr int kConsumerM = kM / kNumConsumers;
constexpr int kRowBytes = 128;
constexpr int kPanel = kMapChannels;  // channels of a row of a result
constexpr int kPanelBytes = kM * kRowBytes;
constexpr int kBuffers = 2;  // of results, and of scale and shift

template <int kN_, int kStages_, int kBlocks_, int kNumProducerRegisters_,
          int kNumConsumerRegisters_>
struct Tile {
  static constexpr int kN = kN_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kNumProducerRegisters = kNumProducerRegisters_;
  static constexpr int kNumConsumerRegisters = kNumConsumerRegisters_;
  static constexpr int kNumLaunchRegisters = 65536 / (kThreads * kBlocks) / 8 * 8;
  static_assert(kNumProducerRegisters + kNumConsumers * kNumConsumerRegisters <=
                (1 + kNumConsumers) * kNumLaunchRegisters);
  static constexpr int kPanels = kN / kPanel;
  static constexpr int kStageBytes = (kM + kN) * kRowBytes;
  static constexpr int kResultBytes = kPanels * kPanelBytes;
  static constexpr int kScaleShiftBytes = kN * static_cast<int>(sizeof(ScaleShift));
};

using Tile128x64 = Tile<64, 3, 2, 40, 96>;
using Tile128x128 = Tile<128, 4, 1, 40, 232>;

// What lies where in shared memory: the operands' stages from 0 on, and so forth.
template <typename Tile, bool kProjection>
struct Shared {
  static constexpr int kResults = Tile::kStages * Tile::kStageBytes;
  static constexpr int kScaleShift = kResults + kBuffers * Tile::kResultBytes;
  static constexpr int kScaleShiftStage = (kProjection ? 2 : 1) * Tile::kScaleShiftBytes;
  static constexpr int kMbarriers = kScaleShift + kBuffers * kScaleShiftStage;
  using Operands = Pipeline<PipelineId::kConvOperands, kMbarriers, Tile::kStages>;
  using ScaleShifts = Pipeline<PipelineId::kConvScaleShift, Operands::kEnd, kBuffers>;
  using Results = Pipeline<PipelineId::kConvResult, ScaleShifts::kEnd, kBuffers>;
  static constexpr int kBytes = kMbarriers + 256;
  static_assert(Results::kEnd <= kBytes);
};

// One convolution as the kernel sees it.
struct Product {
  CUtensorMap x, weight;
  int channels, kernel_h, kernel_w, dilation_h, dilation_w;
  int stride_h, stride_w, padding_h, padding_w;
  bool matrix;  // x is one: a 1 x 1 window that moves by single pixels
  BatchNorm bn;
};

struct Arguments {
  Product conv, projection;
  CUtensorMap residual, out;
  unsigned out_height, out_width, tiles, tiles_across;
  int out_channels;
  bool has_residual, residual_in_line, relu;
  SpinLimit spin_limit;
};

// This block's tiles, gridDim.x apart, those of one row of positions behind one another.
template <typename Tile>
class TileScheduler {
 public:
  __device__ __forceinline__ explicit TileScheduler(const Arguments& a) : a_(a) {}

  __device__ __forceinline__ bool valid() const { return tile_ < a_.tiles; }
  __device__ __forceinline__ void advance() { tile_ += gridDim.x; }
  __device__ __forceinline__ bool is_first() const { return tile_ == blockIdx.x; }
  __device__ __forceinline__ int tile() const { return static_cast<int>(tile_); }
  __device__ __forceinline__ int position() const { return tile_ / a_.tiles_across * kM; }
  __device__ __forceinline__ int channel() const { return tile_ % a_.tiles_across * Tile::kN; }

 private:
  const Arguments& a_;
  unsigned tile_ = blockIdx.x;
};

// The image, line and column of a position of the result.
struct Pixel {
  int image, h, w;

  __device__ __forceinline__ Pixel(const Arguments& a, unsigned position) {
    const unsigned line = position / a.out_width;
    image = line / a.out_height;
    h = line % a.out_height;
    w = position % a.out_width;
  }
};

// Asks for all steps of one product of one tile.
template <typename Tile, typename Operands>
__device__ __forceinline__ void load_product(const Arguments& a, const Product& product,
                                             const TileScheduler<Tile>& at, Operands& operands) {
  const Pixel pixel(a, at.position());
  const int h = pixel.h * product.stride_h - product.padding_h;
  const int w = pixel.w * product.stride_w - product.padding_w;
  int tap = 0;
#pragma unroll 1
  for (int r = 0; r < product.kernel_h; ++r) {
#pragma unroll 1
    for (int s = 0; s < product.kernel_w; ++s, ++tap) {
#pragma unroll 1
      for (int c = 0; c < product.channels; c += kMapChannels) {
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
        ptx::load_tile(stage + kM * kRowBytes, product.weight, operands.full(),
                       {c, tap, at.channel()});
        operands.advance();
      }
    }
  }
}

// The role of one thread: asks for the operands of every tile.
template <typename Tile, bool kProjection>
__device__ __forceinline__ void load_operands(const Arguments& a) {
  typename Shared<Tile, kProjection>::Operands operands(a.spin_limit);
#pragma unroll 1
  for (TileScheduler<Tile> at(a); at.valid(); at.advance()) {
    load_product(a, a.conv, at, operands);
    if constexpr (kProjection) load_product(a, a.projection, at, operands);
  }
}

// The role of one warp: computes scale and shift of every tile's channels.
template <typename Tile, bool kProjection>
__device__ __forceinline__ void load_scale_shifts(const Arguments& a) {
  using Shared = Shared<Tile, kProjection>;
  const int lane = threadIdx.x % 32;
  typename Shared::ScaleShifts scale_shifts(a.spin_limit);
#pragma unroll 1
  for (TileScheduler<Tile> at(a); at.valid(); at.advance()) {
    const int first = at.channel(), count = a.out_channels - first;
    const std::uint32_t to = Shared::kScaleShift + scale_shifts.stage() * Shared::kScaleShiftStage;
    scale_shifts.acquire(at.tile());
    load_scale_shift(to, a.conv.bn, first, count, Tile::kN, lane, 32);
    if constexpr (kProjection) {
      load_scale_shift(to + Tile::kScaleShiftBytes, a.projection.bn, first, count, Tile::kN, lane,
                       32);
    }
    scale_shifts.commit();
    scale_shifts.advance();
  }
}

// The role of one thread: copies every tile's residual to where the result will lie.
template <typename Tile, bool kProjection>
__device__ __forceinline__ void load_residuals(const Arguments& a) {
  using Shared = Shared<Tile, kProjection>;
  typename Shared::Results results(a.spin_limit);
#pragma unroll 1
  for (TileScheduler<Tile> at(a); at.valid(); at.advance()) {
    const std::uint32_t result = Shared::kResults + results.stage() * Tile::kResultBytes;
    results.acquire(at.tile());
    results.commit_bytes(Tile::kResultBytes);
    const Pixel pixel(a, at.position());
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const std::uint32_t to = result + panel * kPanelBytes;
      const int c = at.channel() + panel * kPanel;
      if (a.residual_in_line) {
        ptx::load_tile(to, a.residual, results.full(), {c, at.position()});
      } else {
        ptx::load_pixels(to, a.residual, results.full(), {c, pixel.w, pixel.h, pixel.image},
                         {0, 0});
      }
    }
    results.advance();
  }
}

// A warpgroup's part of the tile in the layout of wgmma's D.
template <int kN>
class Accumulators {
 public:
  static constexpr int kRows = 2, kColumns = kN / 8, kRun = 2;

  __device__ __forceinline__ int row(int i) const {
    return threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
  }
  __device__ __forceinline__ int column(int j) const { return 8 * j + threadIdx.x % 4 * 2; }
  __device__ __forceinline__ float& at(int i, int j, int e) { return d_[4 * j + 2 * i + e]; }

  // The sum of `steps` steps, at least one, of the consumer's positions. Each stage is released
  // once it has been multiplied.
  template <typename T, typename Tile, typename Operands>
  __device__ __forceinline__ void multiply(int steps, int consumer, int tile, Operands& operands) {
    const std::uint64_t first_x = ptx::matrix_descriptor(consumer * kConsumerM * kRowBytes);
    const unsigned to_weight = (kM - consumer * kConsumerM) * (kRowBytes / ptx::kDescriptorUnit);
    const bool releases = threadIdx.x % 32 == 0;  // one lane of each warp
    int last = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const unsigned stage = operands.stage() * (Tile::kStageBytes / ptx::kDescriptorUnit);
      const std::uint64_t x = first_x + stage, weight = x + to_weight;
      operands.wait(tile);
      ptx::wgmma_fence(d_);
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // 16 channels, 32 bytes
        const unsigned depth = k * (32 / ptx::kDescriptorUnit);
        ptx::wgmma<T>(d_, x + depth, weight + depth, step > 0 || k > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>(d_);
      if (step > 0 && releases) Operands::release(last);
      last = operands.stage();
      operands.advance();
    }
    ptx::wgmma_wait<0>(d_);
    if (releases) Operands::release(last);
  }

 private:
  float d_[kN / 2];
};

__device__ __forceinline__ int steps_of(const Product& product) {
  return product.kernel_h * product.kernel_w *
         ((product.channels + kMapChannels - 1) / kMapChannels);
}

// Batch norm, the projection's product with its own (scale and shift lie behind the first ones),
// the residual that lies in `result`, ReLU, rounding; the values go where the residual was. Columns
// one after the other, each stored before the next is loaded, so that few registers hold scale and
// shift.
template <typename T, bool kProjection, int kN>
__device__ __forceinline__ void store_result(Accumulators<kN>& acc, Accumulators<kN>& projected,
                                             std::uint32_t scale_shift, std::uint32_t result,
                                             int consumer, bool has_residual, bool relu) {
  using Acc = Accumulators<kN>;
  using Run = Pack<T, Acc::kRun>;
  const Epilogue<T> epilogue(relu);
  const int row = consumer * kConsumerM + acc.row(0);  // acc.row(1) is the same modulo 8
  const std::uint32_t first = result + row * kRowBytes + acc.column(0) * sizeof(T);
#pragma unroll
  for (int j = 0; j < Acc::kColumns; ++j) {
    float y[Acc::kRows][Acc::kRun];
#pragma unroll
    for (int e = 0; e < Acc::kRun; ++e) {
      const std::uint32_t place = scale_shift + (acc.column(j) + e) * kScaleShiftBytes;
      const auto of = ptx::load_shared<ScaleShift>(place);
#pragma unroll
      for (int i = 0; i < Acc::kRows; ++i) y[i][e] = epilogue.normalise(acc.at(i, j, e), of);
      if constexpr (kProjection) {
        const auto other = ptx::load_shared<ScaleShift>(place + kN * kScaleShiftBytes);
#pragma unroll
        for (int i = 0; i < Acc::kRows; ++i) {
          y[i][e] += epilogue.normalise(projected.at(i, j, e), other);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Acc::kRows; ++i) {
      const std::uint32_t to = first + j / 8 * kPanelBytes + (j % 8 ^ row % 8) * 16 +
                               (acc.row(i) - acc.row(0)) * kRowBytes;
      if (has_residual) epilogue.add(y[i], ptx::load_shared<Run>(to));
      ptx::store_shared(to, epilogue.pack(y[i]));
    }
  }
}

// The role of a warpgroup: multiplies, finishes and stores its positions of every tile.
template <typename T, typename Tile, bool kProjection>
__device__ __forceinline__ void consume(const Arguments& a, int consumer) {
  using Shared = Shared<Tile, kProjection>;
  const bool is_leader = threadIdx.x % kWarpgroup == 0;
  typename Shared::Operands operands(a.spin_limit);
  typename Shared::ScaleShifts scale_shifts(a.spin_limit);
  typename Shared::Results results(a.spin_limit);
#pragma unroll 1
  for (TileScheduler<Tile> at(a); at.valid(); at.advance()) {
    const std::uint32_t scale_shift =
        Shared::kScaleShift + scale_shifts.stage() * Shared::kScaleShiftStage;
    const std::uint32_t result = Shared::kResults + results.stage() * Tile::kResultBytes;
    Accumulators<Tile::kN> acc, projected;
    acc.template multiply<T, Tile>(steps_of(a.conv), consumer, at.tile(), operands);
    if constexpr (kProjection) {
      projected.template multiply<T, Tile>(steps_of(a.projection), consumer, at.tile(), operands);
    }
    scale_shifts.wait(at.tile());
    results.wait_or_acquire(a.has_residual, at.tile());
    store_result<T, kProjection>(acc, projected, scale_shift, result, consumer, a.has_residual,
                                 a.relu);
    ptx::fence_proxy_async();
    ptx::named_barrier(1 + consumer, kWarpgroup);
    if (is_leader) {
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        ptx::store_tile(a.out, result + panel * kPanelBytes + consumer * kConsumerM * kRowBytes,
                        {at.channel() + panel * kPanel, at.position() + consumer * kConsumerM});
      }
      ptx::bulk_commit();
      scale_shifts.release();
      ptx::bulk_wait_read<1>();
      if (!at.is_first()) results.release(results.stage() ^ 1);
    }
    scale_shifts.advance();
    results.advance();
  }
  if (is_leader) ptx::bulk_wait_read<0>();
}

template <typename T, typename Tile, bool kProjection>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks)
    conv_bn_sm90_kernel(const __grid_constant__ Arguments a) {
  using Shared = Shared<Tile, kProjection>;
  ptx::registers_at_launch<Tile::kNumLaunchRegisters>();
  if (threadIdx.x == 0) {
    Shared::Operands::init(1, kNumConsumers * kWarpgroup / 32);
    Shared::ScaleShifts::init(32, kNumConsumers);
    Shared::Results::init(1, kNumConsumers);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  const int warpgroup = ptx::uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 0) {
    ptx::decrease_registers<Tile::kNumProducerRegisters>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0 && lane == 0) {
      load_operands<Tile, kProjection>(a);
    } else if (warp == 1) {
      load_scale_shifts<Tile, kProjection>(a);
    } else if (warp == 2 && lane == 0 && a.has_residual) {
      load_residuals<Tile, kProjection>(a);
    }
    return;
  }
  ptx::increase_registers<Tile::kNumConsumerRegisters>();
  consume<T, Tile, kProjection>(a, warpgroup - 1);
}

std::int64_t positions(const ConvBn& a) { return a.batch * a.out_height * a.out_width; }

std::int64_t tiles(const ConvBn& a, int tile_n) {
  return ceil_div(positions(a), kM) * ceil_div(a.out_channels, tile_n);
}

// The larger tile where it still gives every SM one, and is not half empty.
ConvTile choose(const ConvBn& a, int num_sms) {
  constexpr int kLarge = Tile128x128::kN;
  return 2 * a.out_channels > kLarge && tiles(a, kLarge) >= num_sms ? ConvTile::k128x128Sm90
                                                                    : ConvTile::k128x64Sm90;
}

PixelBox pixel_box(const ConvolutionBn& conv) {
  return {{-conv.padding_w, -conv.padding_h},
          {conv.padding_w - conv.dilation_w * (conv.kernel_w - 1),
           conv.padding_h - conv.dilation_h * (conv.kernel_h - 1)},
          {static_cast<std::uint32_t>(conv.stride_w), static_cast<std::uint32_t>(conv.stride_h)}};
}

bool is_matrix(const ConvolutionBn& conv) {
  return conv.kernel_h * conv.kernel_w * conv.stride_h * conv.stride_w == 1 &&
         conv.padding_h + conv.padding_w == 0;
}

bool can_read(const ConvolutionBn& conv) {
  constexpr std::int64_t kMaxOffset = 255;  // of a tap (PTX ISA, im2col offsets of 4 dimensions)
  const std::int64_t window = std::int64_t{conv.kernel_h} * conv.kernel_w * conv.channels;
  const std::int64_t image = std::int64_t{conv.height} * conv.width * conv.channels;
  return conv.channels % 8 == 0 && aligned(conv.x) && aligned(conv.weight) &&
         std::int64_t{conv.dilation_h} * (conv.kernel_h - 1) <= kMaxOffset &&
         std::int64_t{conv.dilation_w} * (conv.kernel_w - 1) <= kMaxOffset &&
         encodable(pixel_box(conv)) && 2 * std::max(window, image) < std::int64_t{1} << 40;
}

cudaError_t encode(Product* to, const ConvBn& a, const ConvolutionBn& conv, int tile_n) {
  to->channels = conv.channels;
  to->kernel_h = conv.kernel_h;
  to->kernel_w = conv.kernel_w;
  to->dilation_h = conv.dilation_h;
  to->dilation_w = conv.dilation_w;
  to->stride_h = conv.stride_h;
  to->stride_w = conv.stride_w;
  to->padding_h = conv.padding_h;
  to->padding_w = conv.padding_w;
  to->matrix = is_matrix(conv);
  to->bn = conv.bn;
  const auto size = [](std::int64_t value) { return static_cast<std::uint64_t>(value); };
  const cudaError_t status =
      to->matrix
          ? encode_tiles(&to->x, a.dtype, conv.x, {size(conv.channels), size(positions(a))}, {kM})
          : encode_pixels(&to->x, a.dtype, conv.x,
                          {size(conv.channels), size(conv.width), size(conv.height), size(a.batch)},
                          pixel_box(conv), kM);
  if (status != cudaSuccess) return status;
  return encode_tiles(&to->weight, a.dtype, conv.weight,
                      {size(conv.channels), size(std::int64_t{conv.kernel_h} * conv.kernel_w),
                       size(a.out_channels)},
                      {1, static_cast<std::uint32_t>(tile_n)});
}

// A residual whose pixels lie apart is gathered by im2col mode too, under a window of one pixel.
cudaError_t encode_residual(CUtensorMap* to, const ConvBn& a) {
  const Residual& residual = a.residual;
  const auto size = [](std::int64_t value) { return static_cast<std::uint64_t>(value); };
  if (residual.in_line()) {
    return encode_tiles(to, a.dtype, residual.data, {size(residual.channels), size(positions(a))},
                        {kM}, {size(residual.pixel)});
  }
  return encode_pixels(
      to, a.dtype, residual.data,
      {size(residual.channels), size(residual.width), size(residual.height), size(a.batch)},
      {{0, 0}, {0, 0}, {1, 1}}, kM,
      {size(residual.pixel), size(residual.line), size(residual.image)});
}

bool can_read(const Residual& residual) {
  if (residual.channels == 0) return true;
  if (!residual.in_chunks(8) || residual.pixel < residual.channels) return false;
  if (residual.in_line()) return true;
  return residual.line >= residual.pixel && residual.line % residual.pixel == 0 &&
         residual.image >= residual.line && residual.image % residual.line == 0 &&
         2 * residual.image < std::int64_t{1} << 40;
}

template <typename T, typename Tile, bool kProjection>
cudaError_t make_plan(const ConvBn& a, int num_sms, LaunchPlan<Arguments>* plan) {
  Arguments& to = plan->arguments;
  to.out_height = a.out_height;
  to.out_width = a.out_width;
  to.out_channels = a.out_channels;
  to.tiles = static_cast<unsigned>(tiles(a, Tile::kN));
  to.tiles_across = static_cast<unsigned>(ceil_div(a.out_channels, Tile::kN));
  to.has_residual = a.residual.channels > 0;
  to.residual_in_line = a.residual.in_line();
  to.relu = a.relu;
  to.spin_limit = spin_limit;
  cudaError_t status = encode(&to.conv, a, a.conv, Tile::kN);
  if (kProjection && status == cudaSuccess) {
    status = encode(&to.projection, a, a.projection, Tile::kN);
  }
  if (to.has_residual && status == cudaSuccess) status = encode_residual(&to.residual, a);
  if (status == cudaSuccess) {
    const auto size = {static_cast<std::uint64_t>(a.out_channels),
                       static_cast<std::uint64_t>(positions(a))};
    status = encode_tiles(&to.out, a.dtype, a.out, size, {kConsumerM});
  }
  plan->kernel = &conv_bn_sm90_kernel<T, Tile, kProjection>;
  plan->shape = {dim3(std::min<unsigned>(to.tiles, num_sms * Tile::kBlocks)), dim3(kThreads),
                 Shared<Tile, kProjection>::kBytes};
  return status;
}

template <typename T>
cudaError_t make_plan(const ConvBn& a, ConvTile tile, int num_sms, LaunchPlan<Arguments>* plan) {
  const bool projection = a.projection.x != nullptr;
  if (tile == ConvTile::k128x128Sm90) {
    return projection ? make_plan<T, Tile128x128, true>(a, num_sms, plan)
                      : make_plan<T, Tile128x128, false>(a, num_sms, plan);
  }
  return projection ? make_plan<T, Tile128x64, true>(a, num_sms, plan)
                    : make_plan<T, Tile128x64, false>(a, num_sms, plan);
}

}  // namespace

bool conv_bn_sm90_can_implement(const ConvBn& a, ConvTile tile) {
  const bool known =
      tile == ConvTile::kAuto || tile == ConvTile::k128x64Sm90 || tile == ConvTile::k128x128Sm90;
  return known && a.dtype != DType::kFloat32 && a.groups == 1 && a.out_channels % 8 == 0 &&
         aligned(a.out) && can_read(a.residual) &&
         tiles(a, kPanel) + positions(a) + kM <= kMaxGridX && can_read(a.conv) &&
         (a.projection.x == nullptr || can_read(a.projection));
}

cudaError_t conv_bn_sm90(const ConvBn& a, ConvTile tile, int num_sms, cudaStream_t stream) {
  if (!conv_bn_sm90_can_implement(a, tile)) return cudaErrorInvalidValue;
  if (tile == ConvTile::kAuto) tile = choose(a, num_sms);
  LaunchPlan<Arguments> plan;
  const cudaError_t status = a.dtype == DType::kFloat16
                                 ? make_plan<__half>(a, tile, num_sms, &plan)
                                 : make_plan<__nv_bfloat16>(a, tile, num_sms, &plan);
  return status == cudaSuccess ? launch(plan, stream) : status;
}

}  // namespace resnet_fused
