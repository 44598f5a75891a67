// Implicit GEMM for sm_90a: wgmma on operands that TMA gathers.
//
// Algorithm: as in conv_sm80.cu, out[m, k] = sum over taps (r, s) and channels c of
// x[pixel(m) + (r, s), c] * weight[k, r, s, c]; a step of the K loop takes one tap and 64 channels.
// Here one thread asks for a whole step in two bulk copies. For x, im2col mode: 128 output
// positions' pixels under the tap, zeros in the padding and beyond the last image, stride and
// padding encoded in the tensor map, the tap and its dilation given as an offset; tiled mode for
// 1 x 1 windows, which see a matrix. For weight, tiled mode over (channels, taps, out_channels).
// Blocks are persistent and their warps specialised. Of the first warpgroup, which keeps few
// registers (setmaxnreg), warp 0 copies operands, warp 1 computes the batch norms' terms, warp 2
// copies the residual (in im2col mode where its pixels lie apart), each as far ahead as its buffers
// allow. Two warpgroups multiply, 64 positions each, with fp32 accumulators: a step's four wgmma
// run while the next step is waited for. They normalise (batch_norm.cuh), add the residual where it
// lies in shared memory, rectify, round once, write in its place, and a bulk store takes it from
// there while the next tile is multiplied. A block end with projection runs a second K loop over
// the shortcut into accumulators of its own.
//
// Tiles (positions x channels x depth, stages, blocks per multiprocessor): 128 x 64 x 64, 3, 2;
// 128 x 128 x 64, 4, 1. A block walks through tiles that are gridDim.x apart, channels first, so
// that those in flight share positions.
//
// Shared memory: kStages x (128 + channels) rows of 128 bytes; 2 results of 128 rows, in panels of
// 64 channels; 2 x the terms of one batch norm, or of two; mbarriers. Rows of 128 bytes have their
// 16-byte chunks permuted by the row's number modulo 8 (the 128-byte swizzle), which TMA writes,
// wgmma reads, and the epilogue's 8 rows x 4 lanes x 4 bytes need to fill all 32 banks once.
//
// mbarriers: full (1 arrival and a stage's bytes) and empty (the 8 multiplying warps) for each
// stage; full (32 lanes) and empty (2 warpgroups) for the terms; full (1 arrival and the residual's
// bytes) and empty (2 warpgroups, once a store has read it) for the results.
//
// Memory: x, weight, residual, shortcut and out once each, the floor, as far as L2 holds what the
// taps and the blocks of one row of tiles share.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels/cuda/batch_norm.cuh"
#include "kernels/cuda/conv_sm90.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx_sm90.cuh"
#include "kernels/cuda/tensor_map.h"

namespace resnet_fused {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kMultipliers = 2;  // warpgroups, behind the one that copies
constexpr int kThreads = (1 + kMultipliers) * kWarpgroup;
constexpr int kM = 128;
constexpr int kGroupM = kM / kMultipliers;
constexpr int kRowBytes = 128;
constexpr int kPanel = kMapChannels;  // channels of a row of a result
constexpr int kPanelBytes = kM * kRowBytes;
constexpr int kBuffers = 2;  // of results and of terms

template <int kN_, int kStages_, int kBlocks_, int kCopyRegisters_, int kMultiplyRegisters_>
struct Tile {
  static constexpr int kN = kN_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kCopyRegisters = kCopyRegisters_, kMultiplyRegisters = kMultiplyRegisters_;
  static constexpr int kLaunchRegisters = 65536 / (kThreads * kBlocks) / 8 * 8;
  static_assert(kCopyRegisters + kMultipliers * kMultiplyRegisters <=
                (1 + kMultipliers) * kLaunchRegisters);
  static constexpr int kPanels = kN / kPanel;
  static constexpr int kStageBytes = (kM + kN) * kRowBytes;
  static constexpr int kResultBytes = kPanels * kPanelBytes;
  static constexpr int kTermsBytes = kN * static_cast<int>(kTermBytes);

  static constexpr int kResults = kStages * kStageBytes;
  static constexpr int kTerms = kResults + kBuffers * kResultBytes;
  static constexpr int shared_bytes(bool projection) { return barriers(projection) + 256; }
  static constexpr int barriers(bool projection) {
    return kTerms + kBuffers * (projection ? 2 : 1) * kTermsBytes;
  }
};

using Tile128x64 = Tile<64, 3, 2, 40, 96>;
using Tile128x128 = Tile<128, 4, 1, 40, 232>;

// The place of each mbarrier in shared memory.
template <typename Tile, bool kProjection>
struct Mbarriers {
  static constexpr std::uint32_t kFirst = Tile::barriers(kProjection);
  static_assert((2 * Tile::kStages + 4 * kBuffers) * 8 <= 256);

  __device__ static std::uint32_t full(int stage) { return kFirst + 8 * stage; }
  __device__ static std::uint32_t empty(int stage) { return full(Tile::kStages + stage); }
  __device__ static std::uint32_t terms_full(int buffer) { return empty(Tile::kStages + buffer); }
  __device__ static std::uint32_t terms_empty(int buffer) { return terms_full(kBuffers + buffer); }
  __device__ static std::uint32_t result_full(int buffer) { return terms_empty(kBuffers + buffer); }
  __device__ static std::uint32_t result_empty(int buffer) {
    return result_full(kBuffers + buffer);
  }
};

// A place in a ring of kSlots, and the parity of its mbarriers' phase.
template <int kSlots>
struct Ring {
  int slot = 0;
  std::uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
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
  int area, out_width, out_channels;
  int tiles, tiles_across;
  bool adds_residual, residual_in_line, relu;
};

__device__ __forceinline__ int steps_of(const Product& product) {
  return product.kernel_h * product.kernel_w *
         ((product.channels + kMapChannels - 1) / kMapChannels);
}

// Asks for all steps of one product, for the tile at (first_position, first_channel).
template <typename Tile, typename Mbarriers>
__device__ __forceinline__ void copy_operands(const Arguments& a, const Product& product,
                                              int first_position, int first_channel,
                                              Ring<Tile::kStages>& ring) {
  const int image = first_position / a.area;
  const int pixel = first_position - image * a.area;
  const int p = pixel / a.out_width;
  const int h = p * product.stride_h - product.padding_h;
  const int w = (pixel - p * a.out_width) * product.stride_w - product.padding_w;
  int tap = 0;
#pragma unroll 1
  for (int r = 0; r < product.kernel_h; ++r) {
#pragma unroll 1
    for (int s = 0; s < product.kernel_w; ++s, ++tap) {
#pragma unroll 1
      for (int c = 0; c < product.channels; c += kMapChannels) {
        const std::uint32_t stage = ring.slot * Tile::kStageBytes;
        const std::uint32_t full = Mbarriers::full(ring.slot);
        ptx::mbarrier_wait(Mbarriers::empty(ring.slot), ring.parity ^ 1);
        ptx::mbarrier_arrive_expect(full, Tile::kStageBytes);
        if (product.matrix) {
          ptx::load_tile(stage, product.x, full, c, first_position);
        } else {
          ptx::load_pixels(stage, product.x, full, c, w, h, image,
                           static_cast<std::uint16_t>(s * product.dilation_w),
                           static_cast<std::uint16_t>(r * product.dilation_h));
        }
        ptx::load_tile(stage + kM * kRowBytes, product.weight, full, c, tap, first_channel);
        ring.advance();
      }
    }
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

  // The sum of `steps` steps, at least one. Each stage is given back once it has been multiplied.
  template <typename T, typename Tile, typename Mbarriers>
  __device__ __forceinline__ void multiply(int steps, int group, Ring<Tile::kStages>& ring) {
    int last = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const std::uint32_t stage = ring.slot * Tile::kStageBytes;
      const std::uint64_t x = ptx::matrix_descriptor(stage + group * kGroupM * kRowBytes);
      const std::uint64_t weight = ptx::matrix_descriptor(stage + kM * kRowBytes);
      ptx::mbarrier_wait(Mbarriers::full(ring.slot), ring.parity);
      ptx::wgmma_fence(d_);
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // 16 channels, 32 bytes, 2 units of a descriptor's address
        ptx::wgmma<T>(d_, x + 2 * k, weight + 2 * k, step > 0 || k > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>(d_);
      if (step > 0) give_back<Mbarriers>(last);
      last = ring.slot;
      ring.advance();
    }
    ptx::wgmma_wait<0>(d_);
    give_back<Mbarriers>(last);
  }

 private:
  template <typename Mbarriers>
  __device__ __forceinline__ static void give_back(int stage) {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(Mbarriers::empty(stage));
  }

  float d_[kN / 2];
};

// Normalises, adds what `projected` points to (normalised with the terms behind the first ones, or
// null) and the residual that lies in `result`, rectifies, rounds, and puts the values there.
// Columns one after the other, each stored before the next is loaded, so that few registers hold
// terms.
template <typename T, bool kProjection, int kN>
__device__ __forceinline__ void finish(Accumulators<kN>& acc, Accumulators<kN>& projected,
                                       std::uint32_t terms, std::uint32_t result, int group,
                                       bool adds_residual, bool relu) {
  using Acc = Accumulators<kN>;
  using Run = Pack<T, Acc::kRun>;
  // Written so that a NaN passes, as it does through PyTorch's ReLU.
  const float floor = relu ? 0.0f : -INFINITY;
  const int row = group * kGroupM + acc.row(0);  // the other one has the same number modulo 8
  const std::uint32_t first = result + row * kRowBytes + acc.column(0) * sizeof(T);
#pragma unroll
  for (int j = 0; j < Acc::kColumns; ++j) {
    const std::uint32_t at = first + j / 8 * kPanelBytes + (j % 8 ^ row % 8) * 16;
    float y[Acc::kRows][Acc::kRun];
#pragma unroll
    for (int e = 0; e < Acc::kRun; ++e) {
      const std::uint32_t place = terms + (acc.column(j) + e) * kTermBytes;
      const Terms column = ptx::load_shared<Terms>(place);
#pragma unroll
      for (int i = 0; i < Acc::kRows; ++i) y[i][e] = normalise<false>(acc.at(i, j, e), column);
      if constexpr (kProjection) {
        const Terms other = ptx::load_shared<Terms>(place + kN * kTermBytes);
#pragma unroll
        for (int i = 0; i < Acc::kRows; ++i) {
          y[i][e] += normalise<false>(projected.at(i, j, e), other);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Acc::kRows; ++i) {
      const std::uint32_t to = at + (acc.row(i) - acc.row(0)) * kRowBytes;
      Run run;
      if (adds_residual) run = ptx::load_shared<Run>(to);
#pragma unroll
      for (int e = 0; e < Acc::kRun; ++e) {
        float value = y[i][e];
        if (adds_residual) value += to_float(run.value[e]);
        run.value[e] = from_float<T>(value < floor ? floor : value);
      }
      ptx::store_shared(to, run);
    }
  }
}

template <typename T, typename Tile, bool kProjection>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks)
    conv_bn_sm90_kernel(const __grid_constant__ Arguments a) {
  using Barriers = Mbarriers<Tile, kProjection>;
  constexpr int kTermsBuffer = (kProjection ? 2 : 1) * Tile::kTermsBytes;

  ptx::registers_at_launch<Tile::kLaunchRegisters>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      ptx::mbarrier_init(Barriers::full(i), 1);
      ptx::mbarrier_init(Barriers::empty(i), kMultipliers * kWarpgroup / 32);
    }
    for (int i = 0; i < kBuffers; ++i) {
      ptx::mbarrier_init(Barriers::terms_full(i), 32);
      ptx::mbarrier_init(Barriers::terms_empty(i), kMultipliers);
      ptx::mbarrier_init(Barriers::result_full(i), 1);
      ptx::mbarrier_init(Barriers::result_empty(i), kMultipliers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  const int first_tile = blockIdx.x, step = gridDim.x;
  const auto position_of = [&](int tile) { return tile / a.tiles_across * kM; };
  const auto channel_of = [&](int tile) { return tile % a.tiles_across * Tile::kN; };

  if (threadIdx.x < kWarpgroup) {
    ptx::release_registers<Tile::kCopyRegisters>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0 && lane == 0) {
      Ring<Tile::kStages> ring;
#pragma unroll 1
      for (int tile = first_tile; tile < a.tiles; tile += step) {
        copy_operands<Tile, Barriers>(a, a.conv, position_of(tile), channel_of(tile), ring);
        if constexpr (kProjection) {
          copy_operands<Tile, Barriers>(a, a.projection, position_of(tile), channel_of(tile), ring);
        }
      }
    } else if (warp == 1) {
      Ring<kBuffers> ring;
#pragma unroll 1
      for (int tile = first_tile; tile < a.tiles; tile += step) {
        const int first = channel_of(tile), count = a.out_channels - first;
        const std::uint32_t terms = Tile::kTerms + ring.slot * kTermsBuffer;
        ptx::mbarrier_wait(Barriers::terms_empty(ring.slot), ring.parity ^ 1);
        load_terms(terms, a.conv.bn, first, count, Tile::kN, lane, 32);
        if constexpr (kProjection) {
          load_terms(terms + Tile::kTermsBytes, a.projection.bn, first, count, Tile::kN, lane, 32);
        }
        ptx::mbarrier_arrive(Barriers::terms_full(ring.slot));
        ring.advance();
      }
    } else if (warp == 2 && lane == 0 && a.adds_residual) {
      Ring<kBuffers> ring;
#pragma unroll 1
      for (int tile = first_tile; tile < a.tiles; tile += step) {
        const std::uint32_t result = Tile::kResults + ring.slot * Tile::kResultBytes;
        const std::uint32_t full = Barriers::result_full(ring.slot);
        ptx::mbarrier_wait(Barriers::result_empty(ring.slot), ring.parity ^ 1);
        ptx::mbarrier_arrive_expect(full, Tile::kResultBytes);
        const int position = position_of(tile), image = position / a.area;
        const int pixel = position - image * a.area, h = pixel / a.out_width;
        for (int panel = 0; panel < Tile::kPanels; ++panel) {
          const std::uint32_t to = result + panel * kPanelBytes;
          const int c = channel_of(tile) + panel * kPanel;
          if (a.residual_in_line) {
            ptx::load_tile(to, a.residual, full, c, position);
          } else {
            ptx::load_pixels(to, a.residual, full, c, pixel - h * a.out_width, h, image, 0, 0);
          }
        }
        ring.advance();
      }
    }
    return;
  }

  ptx::claim_registers<Tile::kMultiplyRegisters>();
  const int group = threadIdx.x / kWarpgroup - 1;
  const bool leads = threadIdx.x % kWarpgroup == 0;
  Ring<Tile::kStages> ring;
  Ring<kBuffers> buffer;
#pragma unroll 1
  for (int tile = first_tile; tile < a.tiles; tile += step) {
    const std::uint32_t terms = Tile::kTerms + buffer.slot * kTermsBuffer;
    const std::uint32_t result = Tile::kResults + buffer.slot * Tile::kResultBytes;
    Accumulators<Tile::kN> acc, projected;
    acc.template multiply<T, Tile, Barriers>(steps_of(a.conv), group, ring);
    if constexpr (kProjection) {
      projected.template multiply<T, Tile, Barriers>(steps_of(a.projection), group, ring);
    }
    ptx::mbarrier_wait(Barriers::terms_full(buffer.slot), buffer.parity);
    if (a.adds_residual) {
      ptx::mbarrier_wait(Barriers::result_full(buffer.slot), buffer.parity);
    } else {
      ptx::mbarrier_wait(Barriers::result_empty(buffer.slot), buffer.parity ^ 1);
    }
    finish<T, kProjection>(acc, projected, terms, result, group, a.adds_residual, a.relu);
    ptx::fence_proxy_async();
    ptx::named_barrier(1 + group, kWarpgroup);
    if (leads) {
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        ptx::store_tile(a.out, result + panel * kPanelBytes + group * kGroupM * kRowBytes,
                        channel_of(tile) + panel * kPanel, position_of(tile) + group * kGroupM);
      }
      ptx::bulk_commit();
      ptx::mbarrier_arrive(Barriers::terms_empty(buffer.slot));
      ptx::bulk_wait_read<1>();
      if (tile != first_tile) ptx::mbarrier_arrive(Barriers::result_empty(buffer.slot ^ 1));
    }
    buffer.advance();
  }
  if (leads) ptx::bulk_wait_read<0>();
}

using Kernel = void (*)(Arguments);

// A kernel and what its launch needs; `kernel` is null where there is none.
struct Choice {
  Kernel kernel = nullptr;
  int channels = 0, blocks = 0, shared_bytes = 0;
};

template <typename T, typename Tile>
Choice choice_of(bool projection) {
  return {projection ? &conv_bn_sm90_kernel<T, Tile, true> : &conv_bn_sm90_kernel<T, Tile, false>,
          Tile::kN, Tile::kBlocks, Tile::shared_bytes(projection)};
}

template <typename T>
Choice choose(ConvTile tile, bool projection) {
  return tile == ConvTile::k128x128Sm90 ? choice_of<T, Tile128x128>(projection)
                                        : choice_of<T, Tile128x64>(projection);
}

Choice choose(const ConvBn& a, ConvTile tile) {
  const bool projection = a.projection.x != nullptr;
  return a.dtype == DType::kFloat16 ? choose<__half>(tile, projection)
                                    : choose<__nv_bfloat16>(tile, projection);
}

std::int64_t positions(const ConvBn& a) { return a.batch * a.out_height * a.out_width; }

std::int64_t tiles(const ConvBn& a, int channels) {
  return ceil_div(positions(a), kM) * ceil_div(a.out_channels, channels);
}

// The larger tile where it still gives every multiprocessor one, and is not half empty.
ConvTile choose_automatically(const ConvBn& a, int multiprocessors) {
  constexpr int kLarge = Tile128x128::kN;
  return 2 * a.out_channels > kLarge && tiles(a, kLarge) >= multiprocessors ? ConvTile::k128x128Sm90
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

bool serves(const ConvolutionBn& conv) {
  constexpr std::int64_t kMaxOffset = 255;  // of a tap (PTX ISA, im2col offsets of 4 dimensions)
  const std::int64_t window = std::int64_t{conv.kernel_h} * conv.kernel_w * conv.channels;
  const std::int64_t image = std::int64_t{conv.height} * conv.width * conv.channels;
  return conv.channels % 8 == 0 && aligned(conv.x) && aligned(conv.weight) &&
         std::int64_t{conv.dilation_h} * (conv.kernel_h - 1) <= kMaxOffset &&
         std::int64_t{conv.dilation_w} * (conv.kernel_w - 1) <= kMaxOffset &&
         encodable(pixel_box(conv)) && 2 * std::max(window, image) < std::int64_t{1} << 40;
}

cudaError_t encode(Product* to, const ConvBn& a, const ConvolutionBn& conv, int channels) {
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
                      {1, static_cast<std::uint32_t>(channels)});
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

bool serves(const Residual& residual) {
  if (residual.channels == 0) return true;
  if (!residual.in_chunks(8) || residual.pixel < residual.channels) return false;
  if (residual.in_line()) return true;
  return residual.line >= residual.pixel && residual.line % residual.pixel == 0 &&
         residual.image >= residual.line && residual.image % residual.line == 0 &&
         2 * residual.image < std::int64_t{1} << 40;
}

}  // namespace

bool conv_bn_sm90_offers(const ConvBn& a, ConvTile tile) {
  const bool known =
      tile == ConvTile::kAuto || tile == ConvTile::k128x64Sm90 || tile == ConvTile::k128x128Sm90;
  return known && a.dtype != DType::kFloat32 && a.groups == 1 && a.out_channels % 8 == 0 &&
         aligned(a.out) && serves(a.residual) &&
         tiles(a, kPanel) + positions(a) + kM <= std::numeric_limits<int>::max() &&
         serves(a.conv) && (a.projection.x == nullptr || serves(a.projection));
}

cudaError_t conv_bn_sm90(const ConvBn& a, ConvTile tile, int device, cudaStream_t stream) {
  int multiprocessors = 0;
  cudaError_t status =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return settled(status);
  if (!conv_bn_sm90_offers(a, tile)) return cudaErrorInvalidValue;
  const Choice choice =
      choose(a, tile == ConvTile::kAuto ? choose_automatically(a, multiprocessors) : tile);

  Arguments arguments{};
  arguments.area = a.out_height * a.out_width;
  arguments.out_width = a.out_width;
  arguments.out_channels = a.out_channels;
  arguments.tiles = static_cast<int>(tiles(a, choice.channels));
  arguments.tiles_across = static_cast<int>(ceil_div(a.out_channels, choice.channels));
  arguments.adds_residual = a.residual.channels > 0;
  arguments.residual_in_line = a.residual.in_line();
  arguments.relu = a.relu;
  status = encode(&arguments.conv, a, a.conv, choice.channels);
  if (status == cudaSuccess && a.projection.x != nullptr) {
    status = encode(&arguments.projection, a, a.projection, choice.channels);
  }
  const auto result = {static_cast<std::uint64_t>(a.out_channels),
                       static_cast<std::uint64_t>(positions(a))};
  if (status == cudaSuccess && arguments.adds_residual) {
    status = encode_residual(&arguments.residual, a);
  }
  if (status == cudaSuccess) {
    status = encode_tiles(&arguments.out, a.dtype, a.out, result, {kGroupM});
  }
  if (status != cudaSuccess) return status;
  const int blocks = std::min(arguments.tiles, multiprocessors * choice.blocks);
  return launch(choice.kernel, dim3(blocks), dim3(kThreads), choice.shared_bytes, stream,
                arguments);
}

}  // namespace resnet_fused
