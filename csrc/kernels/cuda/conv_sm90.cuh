// What the convolutions for sm_90a share: their operands in shared memory, and a warpgroup's
// products of them.
//
// A step of the K loop is one tap of the window and 64 channels: rows of 128 bytes for positions,
// and behind them for output channels, whose 16-byte chunks are permuted by the row's number modulo
// 8 (the 128-byte swizzle).
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/conv.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pipeline.cuh"
#include "kernels/cuda/ptx_sm90.cuh"
#include "kernels/cuda/tensor_map.h"

namespace resnet_fused {

constexpr int kWarpgroup = 128;
constexpr int kRowBytes = 128;
constexpr int kProductM = 64;  // rows of a wgmma

// One convolution as the kernel sees it.
struct Product {
  CUtensorMap x, weight;
  int channels, kernel_h, kernel_w, dilation_h, dilation_w;
  int stride_h, stride_w, padding_h, padding_w;
  bool matrix;  // x is one: a 1 x 1 window that moves by single pixels
  BatchNorm bn;
};

// The image, line and column of a position of the result.
struct Pixel {
  int image, h, w;

  __device__ __forceinline__ Pixel(unsigned position, unsigned height, unsigned width) {
    const unsigned line = position / width;
    image = line / height;
    h = line % height;
    w = position % width;
  }
};

// Which operands of a step lie by columns.
enum class Columns : int { kNone, kWeight, kBoth };

// A warpgroup's part of the tile, kRows / 2 products below one another, in the layout of wgmma's D.
template <int kM, int kN, typename Value = float>
class Accumulators {
 public:
  static constexpr int kProducts = kM / kProductM;
  static constexpr int kRows = 2 * kProducts, kColumns = kN / 8, kRun = 2;

  __device__ __forceinline__ static int row(int i) {
    return threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4 + i % 2 * 8 +
           i / 2 * kProductM;
  }
  __device__ __forceinline__ static int column(int j) { return 8 * j + threadIdx.x % 4 * 2; }
  __device__ __forceinline__ Value& at(int i, int j, int e) {
    return d_[i / 2][4 * j + i % 2 * 2 + e];
  }

  __device__ __forceinline__ Value (&product(int p)) [kN / 2] { return d_[p]; }

  // The sum of `steps` steps, at least one, of the `part`-th kM positions; kGoesOn: added to what
  // the accumulators hold. A stage holds a step's Tile::kM rows of x and kN of the weight; where
  // one lies by columns, 64 rows of depth for every 64 of them. It is released once it has been
  // multiplied, in all kBlocks blocks that it was copied to. `asked` is called when the last step's
  // products are under way.
  template <typename T, typename Tile, int kBlocks, bool kGoesOn = false,
            Columns kColumnsOf = Columns::kNone, typename Operands, typename Asked>
  __device__ __forceinline__
      void multiply(int steps, int part, int tile, Operands& operands, Asked asked) {
    constexpr unsigned kUnit = ptx::kDescriptorUnit;
    constexpr unsigned kStageUnits = (Tile::kM + kN) * kRowBytes / kUnit;
    constexpr std::uint32_t kPanelBytes = kMapChannels * kRowBytes;
    constexpr bool kTransposedX = kColumnsOf == Columns::kBoth;
    constexpr bool kTransposedWeight = kColumnsOf != Columns::kNone;
    const std::uint32_t x_at = part * kM * kRowBytes, weight_at = Tile::kM * kRowBytes;
    const std::uint64_t first_x =
        kTransposedX ? ptx::transposed_descriptor(x_at, kPanelBytes) : ptx::matrix_descriptor(x_at);
    const std::uint64_t first_weight = kTransposedWeight
                                           ? ptx::transposed_descriptor(weight_at, kPanelBytes)
                                           : first_x + (weight_at - x_at) / kUnit;
    int last = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const unsigned stage = operands.stage() * kStageUnits;
      const std::uint64_t x = first_x + stage, weight = first_weight + stage;
      operands.wait(tile);
      ptx::wgmma_fence(d_);
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // 16 channels, 32 bytes
        constexpr unsigned kRow = 32 / kUnit, kColumn = 16 * kRowBytes / kUnit;
        const unsigned x_depth = k * (kTransposedX ? kColumn : kRow);
        const unsigned weight_depth = k * (kTransposedWeight ? kColumn : kRow);
#pragma unroll
        for (int p = 0; p < kProducts; ++p) {
          const std::uint64_t rows = x + x_depth + p * (kProductM * kRowBytes / kUnit);
          const bool goes_on = kGoesOn || step > 0 || k > 0;
          if constexpr (kTransposedWeight) {
            ptx::wgmma<T, kTransposedX, true>(d_[p], rows, weight + weight_depth, goes_on);
          } else {
            ptx::wgmma<T>(d_[p], rows, weight + weight_depth, goes_on);
          }
        }
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>(d_);
      if (step > 0) release<kBlocks, Operands>(last);
      last = operands.stage();
      operands.advance();
    }
    asked();
    ptx::wgmma_wait<0>(d_);
    release<kBlocks, Operands>(last);
  }
  template <typename T, typename Tile, int kBlocks, bool kGoesOn = false, typename Operands>
  __device__ __forceinline__ void multiply(int steps, int part, int tile, Operands& operands) {
    multiply<T, Tile, kBlocks, kGoesOn>(steps, part, tile, operands, [] {});
  }

 private:
  // By a lane of each warp for each of the blocks.
  template <int kBlocks, typename Operands>
  __device__ __forceinline__ static void release(int stage) {
    const int lane = threadIdx.x % 32;
    if constexpr (kBlocks == 1) {
      if (lane == 0) Operands::release(stage);
    } else {
      if (lane < kBlocks) Operands::release_of_cluster(stage, lane);
    }
  }

  Value d_[kProducts][kN / 2];
};

template <int kStepChannels = kMapChannels>
__device__ __forceinline__ int steps_of(const Product& product) {
  return product.kernel_h * product.kernel_w *
         ((product.channels + kStepChannels - 1) / kStepChannels);
}

inline std::int64_t positions(const ConvBn& a) { return a.batch * a.out_height * a.out_width; }

inline PixelBox pixel_box(const ConvolutionBn& conv) {
  return {{-conv.padding_w, -conv.padding_h},
          {conv.padding_w - conv.dilation_w * (conv.kernel_w - 1),
           conv.padding_h - conv.dilation_h * (conv.kernel_h - 1)},
          {conv.stride_w, conv.stride_h}};
}

inline bool is_matrix(const ConvolutionBn& conv) {
  return conv.kernel_h * conv.kernel_w * conv.stride_h * conv.stride_w == 1 &&
         conv.padding_h + conv.padding_w == 0;
}

inline bool is_padded_3x3(const ConvolutionBn& conv) {
  return conv.kernel_h == 3 && conv.kernel_w == 3 && conv.padding_h == 1 && conv.padding_w == 1 &&
         conv.stride_h * conv.stride_w * conv.dilation_h * conv.dilation_w == 1;
}

// What a tile of whole lines takes of the images, where so many `positions` fit and lines begin
// `pitch` of them apart: lines of an image, or whole images with a line between them, so far as
// bulk copies can begin at each (at multiples of 1024 bytes).
struct WholeLines {
  int lines, segments;  // of a tile in an image, and tiles of one
  int images;           // of a tile
  int copied_lines;     // of x
  std::int64_t parts;   // tiles of all images

  WholeLines(const ConvBn& a, int pitch, int positions) {
    const int most = positions / pitch;
    segments = static_cast<int>(ceil_div(a.out_height, most));
    lines = static_cast<int>(ceil_div(a.out_height, segments));
    const bool stacks = segments == 1 && (a.out_height + 1) * pitch % 8 == 0;
    images = stacks ? (most + 1) / (a.out_height + 1) : 1;
    copied_lines = images > 1 ? images * (a.out_height + 1) + 1 : lines + 2;
    parts = ceil_div(a.batch, images) * segments;
  }

  std::int64_t tiles(const ConvBn& a, int channels) const {
    return parts * ceil_div(a.out_channels, channels);
  }
};

inline bool can_read(const ConvolutionBn& conv) {
  constexpr std::int64_t kMaxOffset = 255;  // of a tap (PTX ISA, im2col offsets of 4 dimensions)
  const std::int64_t window = std::int64_t{conv.kernel_h} * conv.kernel_w * conv.channels;
  const std::int64_t image = std::int64_t{conv.height} * conv.width * conv.channels;
  return conv.channels % 8 == 0 && aligned(conv.x) && aligned(conv.weight) &&
         std::int64_t{conv.dilation_h} * (conv.kernel_h - 1) <= kMaxOffset &&
         std::int64_t{conv.dilation_w} * (conv.kernel_w - 1) <= kMaxOffset &&
         encodable(pixel_box(conv)) && 2 * std::max(window, image) < std::int64_t{1} << 40;
}

// A map of x for a step of `m` positions, and the window.
inline cudaError_t encode_x(Product* to, const ConvBn& a, const ConvolutionBn& conv, int m) {
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
  return to->matrix
             ? encode_tiles(&to->x, a.dtype, conv.x, {conv.channels, positions(a)}, {m})
             : encode_pixels(&to->x, a.dtype, conv.x,
                             {conv.channels, conv.width, conv.height, a.batch}, pixel_box(conv), m);
}

// Maps for a step of `m` positions, and of `n` output channels.
inline cudaError_t encode(Product* to, const ConvBn& a, const ConvolutionBn& conv, int m, int n) {
  const cudaError_t status = encode_x(to, a, conv, m);
  if (status != cudaSuccess) return status;
  return encode_tiles(&to->weight, a.dtype, conv.weight,
                      {conv.channels, std::int64_t{conv.kernel_h} * conv.kernel_w, a.out_channels},
                      {1, n});
}

// Cycles of a step of a tile of m x n, by which heuristics choose. Those of its products, at 8/9 of
// the tensor cores' rate, fitted to an H200's times: no large product passed 801 of 989 TFLOP/s
// there. Or those of shared memory, 128 bytes each: every 64 x n of the products reads both
// operands, and copies write `rows` of 128 bytes. For tiles of 128 x 128 and smaller these are
// more.
constexpr std::int64_t step_cycles(std::int64_t m, std::int64_t n, std::int64_t rows) {
  const std::int64_t products = m * n * kMapChannels / 2048 * 9 / 8;
  const std::int64_t shared = m / kProductM * (kProductM + n) + rows;
  return std::max(products, shared);
}

// Elements of an epilogue that heuristics take for a cycle: so many that it decides little where
// nothing is added, as times have it.
constexpr int kEpilogueElements = 64;

// Steps of the K loop.
template <int kStepChannels = kMapChannels>
std::int64_t steps_of(const ConvolutionBn& conv) {
  return conv.kernel_h * conv.kernel_w * ceil_div(conv.channels, kStepChannels);
}

}  // namespace resnet_fused
