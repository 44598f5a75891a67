// Implicit GEMM on tensor cores: mma.sync, ldmatrix and cp.async, as sm_80 and later have them.
//
// Algorithm: out[m, k] = sum over taps (r, s) and channels c of x[pixel(m) + (r, s), c] *
// weight[k, r, s, c], m running over batch x out_height x out_width. No matrix of pixels is ever
// formed: a step of the K loop takes one tap and one slice of channels, and each thread copies its
// 16-byte chunks of both operands straight from the NHWC and KRSC tensors to shared memory
// (cp.async, zero-filled beyond the image, the channels, the rows). kStages - 1 steps are in flight
// while the one before them is multiplied: ldmatrix and mma.m16n8k16 with fp32 accumulators; for
// fp32 tensors fused multiply-adds, each product and sum rounded as fp32, or, where the caller
// allows it, mma.m16n8k8 of operands rounded to TF32. The epilogue (epilogue.cuh) normalises, adds,
// rectifies and rounds once. A block end with projection runs a second K loop over the shortcut,
// with its own geometry and batch norm, and adds before the store. Channels per group that are no
// multiple of 16 bytes are loaded one by one into the same chunks.
//
// Tiles (positions x channels x bytes of depth, warps, stages): 64 x 64 x 128, 4, 3;
// 128 x 64 x 64, 4, 4; 128 x 128 x 64, 4, 4; fp32: 64 x 64 x 64, 8, 4; TF32: the first, and the
// second without projection. Blocks that share positions are neighbours in the grid, so that x
// comes from memory once and then from L2.
//
// Shared memory: kStages x (positions + channels) rows of 64 or 128 bytes, then the terms of one
// batch norm; the epilogue's staging lies over the stages. A row's 16-byte chunks are permuted
// (swizzle in mma_sync.cuh), against bank conflicts.
//
// Memory: x, weight, residual, shortcut and out once each, the floor, as far as L2 holds what the
// taps and the blocks of one row of tiles share; every access is 16 bytes a thread.
#include <limits>

#include "kernels/cuda/conv_sm80.h"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/mma_sync.cuh"

namespace resnet_fused {
namespace {

// kWarpsM x kWarpsN warps compute kM x kN results, kRowBytes of depth a step; registers are bounded
// so that kBlocks blocks fit a multiprocessor.
template <int kM_, int kN_, int kRowBytes_, int kWarpsM_, int kWarpsN_, int kStages_, int kBlocks_>
struct Tile {
  static constexpr int kM = kM_, kN = kN_, kRowBytes = kRowBytes_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kStages = kStages_,
                       kBlocks = kBlocks_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kChunks = kRowBytes / kChunkBytes;  // of a row
  static constexpr int kRowsAtOnce = kThreads / kChunks;   // that the block copies
  static constexpr int kStageBytes = (kM + kN) * kRowBytes;
  static_assert(kM % kRowsAtOnce == 0 && kN % kRowsAtOnce == 0);

  static constexpr int kSharedBytes = kStages * kStageBytes + kN * static_cast<int>(kTermBytes);
  static_assert(kM * kN * static_cast<int>(sizeof(float)) <= kStages * kStageBytes);
};

using Tile64x64 = Tile<64, 64, 128, 2, 2, 3, 3>;
using Tile128x64 = Tile<128, 64, 64, 2, 2, 4, 2>;
using Tile128x128 = Tile<128, 128, 64, 2, 2, 4, 2>;
using TileNarrow = Tile<64, 64, 64, 2, 2, 3, 2>;  // channels one by one
using TileTf32 = Tile<64, 64, 128, 2, 2, 3, 2>;
using TileFloat = Tile<64, 64, 64, 4, 2, 4, 2>;
using TileFloatProjection = Tile<64, 64, 64, 4, 2, 4, 1>;

// One thread's part of copying both operands: the chunk `column` of every kRowsAtOnce-th row.
template <typename T, typename Tile, bool kVectorised>
class Gather {
 public:
  __device__ __forceinline__ Gather(const ConvBn& a, const ConvolutionBn& conv,
                                    std::int64_t first_position, int group, int first_channel)
      : conv_(conv),
        channels_(conv.channels / a.groups),
        column_(threadIdx.x % Tile::kChunks),
        row_(threadIdx.x / Tile::kChunks) {
    const int area = a.out_height * a.out_width;
#pragma unroll
    for (int i = 0; i < kRowsM; ++i) {
      const std::int64_t position = first_position + row_ + i * Tile::kRowsAtOnce;
      const std::int64_t image = position / area;
      const int pixel = static_cast<int>(position - image * area);
      const int p = pixel / a.out_width;
      h_[i] = image < a.batch ? p * conv.stride_h - conv.padding_h : kOutside;
      w_[i] = (pixel - p * a.out_width) * conv.stride_w - conv.padding_w;
      x_[i] =
          ((image * conv.height + h_[i]) * conv.width + w_[i]) * conv.channels + group * channels_;
    }
    const int out_channels = a.out_channels / a.groups;
#pragma unroll
    for (int i = 0; i < kRowsN; ++i) {
      const int channel = first_channel + row_ + i * Tile::kRowsAtOnce;
      const std::int64_t k = std::int64_t(group) * out_channels + channel;
      weight_[i] = channel < out_channels ? k * conv.kernel_h * conv.kernel_w * channels_ : -1;
    }
  }

  // How many times `copy` is to be called.
  __device__ __forceinline__ int steps() const {
    return conv_.kernel_h * conv_.kernel_w * ((channels_ + kDepth - 1) / kDepth);
  }

  // Starts the copies of the next step, to the operands at `stage`.
  __device__ __forceinline__ void copy(std::uint32_t stage) {
    const T* const x = static_cast<const T*>(conv_.x);
    const T* const weight = static_cast<const T*>(conv_.weight);
    const int c = first_ + column_ * kLanes;
    const int h = r_ * conv_.dilation_h;
    const int w = s_ * conv_.dilation_w;
    const std::int64_t x_tap = (std::int64_t(h) * conv_.width + w) * conv_.channels + c;
    const std::int64_t weight_tap = std::int64_t(r_ * conv_.kernel_w + s_) * channels_ + c;
#pragma unroll
    for (int i = 0; i < kRowsM; ++i) {
      const bool inside = static_cast<unsigned>(h_[i] + h) < static_cast<unsigned>(conv_.height) &&
                          static_cast<unsigned>(w_[i] + w) < static_cast<unsigned>(conv_.width);
      copy_chunk(stage, i, x, x_[i] + x_tap, inside ? channels_ - c : 0);
    }
    stage += Tile::kM * Tile::kRowBytes;
#pragma unroll
    for (int i = 0; i < kRowsN; ++i) {
      copy_chunk(stage, i, weight, weight_[i] + weight_tap, weight_[i] >= 0 ? channels_ - c : 0);
    }
    first_ += kDepth;
    if (first_ >= channels_) {
      first_ = 0;
      if (++s_ == conv_.kernel_w) {
        s_ = 0;
        ++r_;
      }
    }
  }

 private:
  static constexpr int kLanes = kChunkBytes / sizeof(T);
  static constexpr int kDepth = Tile::kRowBytes / sizeof(T);
  static constexpr int kRowsM = Tile::kM / Tile::kRowsAtOnce;
  static constexpr int kRowsN = Tile::kN / Tile::kRowsAtOnce;
  static constexpr int kOutside = -(1 << 30);  // above which no tap brings it back

  // Row i of this thread takes `left` elements, at most a chunk, and zeros after them.
  __device__ __forceinline__ void copy_chunk(std::uint32_t operand, int i, const T* from,
                                             std::int64_t offset, int left) const {
    const std::uint32_t to =
        operand + swizzle<Tile::kRowBytes>(row_ + i * Tile::kRowsAtOnce, column_);
    if constexpr (kVectorised) {
      ptx::cp_async_16(to, left > 0 ? from + offset : from, left > 0);
    } else {
      Pack<T, kLanes> chunk{};
#pragma unroll
      for (int e = 0; e < kLanes; ++e) {
        if (e < left) chunk.value[e] = ptx::load_global(from + offset + e);
      }
      ptx::store_shared(to, chunk);
    }
  }

  const ConvolutionBn& conv_;
  const int channels_;  // of a group
  const int column_, row_;
  int h_[kRowsM], w_[kRowsM];      // the pixel under tap (0, 0)
  std::int64_t x_[kRowsM];         // its offset
  std::int64_t weight_[kRowsN];    // of the output channel; -1 beyond the last
  int r_ = 0, s_ = 0, first_ = 0;  // the next step's tap and channel
};

// A warp's part of the tile in the layout of mma.m16n8k16.
template <typename T, typename Tile>
class TensorCore : public WarpTile<T, Tile::kM / Tile::kWarpsM, Tile::kN / Tile::kWarpsN> {
 public:
  static constexpr int kWarpM = Tile::kM / Tile::kWarpsM, kWarpN = Tile::kN / Tile::kWarpsN;
  using Warp = WarpTile<T, kWarpM, kWarpN>;

  __device__ __forceinline__ int row(int i) const { return first_row() + 8 * i + lane() / 4; }
  __device__ __forceinline__ int column(int j) const {
    return first_column() + 8 * j + lane() % 4 * 2;
  }

  // Adds the product of the operands at `stage`.
  __device__ __forceinline__ void multiply(std::uint32_t stage) {
    const int a_row = first_row() + Warp::a_row(), b_row = first_column() + Warp::b_row();
    const std::uint32_t b_operand = stage + Tile::kM * Tile::kRowBytes;
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
      Warp::multiply_chunks(
          [&](int i) {
            return stage + swizzle<Tile::kRowBytes>(a_row + 16 * i, chunk + Warp::a_half());
          },
          [&](int j) {
            return b_operand + swizzle<Tile::kRowBytes>(b_row + 16 * j, chunk + Warp::b_half());
          });
    }
  }

 private:
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ static int first_row() {
    return threadIdx.x / 32 / Tile::kWarpsN * kWarpM;
  }
  __device__ __forceinline__ static int first_column() {
    return threadIdx.x / 32 % Tile::kWarpsN * kWarpN;
  }
};

template <typename Accumulators>
__device__ __forceinline__ void add(Accumulators& to, Accumulators& from) {
#pragma unroll
  for (int i = 0; i < Accumulators::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < Accumulators::kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < Accumulators::kRun; ++e) to.at(i, j, e) += from.at(i, j, e);
    }
  }
}

// The same for fp32 rounded to TF32. Each step is summed by itself first, which loses less than one
// long sum.
template <typename Tile>
class TensorCoreTf32 : public TensorCore<float, Tile> {
 public:
  __device__ __forceinline__ void multiply(std::uint32_t stage) {
    TensorCore<float, Tile> partial;
    partial.multiply(stage);
    add<TensorCore<float, Tile>>(*this, partial);
  }
};

// The same for exact fp32, in steps too: threads in a square, each with every 16th row and column.
template <typename Tile>
class MultiplyAdd {
 public:
  static constexpr int kSide = 16;
  static constexpr int kRows = Tile::kM / kSide, kColumns = Tile::kN / kSide, kRun = 1;
  static_assert(Tile::kThreads == kSide * kSide);

  __device__ __forceinline__ int row(int i) const { return kSide * i + threadIdx.x / kSide; }
  __device__ __forceinline__ int column(int j) const { return kSide * j + threadIdx.x % kSide; }
  __device__ __forceinline__ float& at(int i, int j, int) { return d_[i][j]; }

  __device__ __forceinline__ void multiply(std::uint32_t stage) {
    using Quad = Pack<float, 4>;
    const std::uint32_t b_operand = stage + Tile::kM * Tile::kRowBytes;
    float partial[kRows][kColumns] = {};
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      Quad b[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        b[j] = ptx::load_shared<Quad>(b_operand + swizzle<Tile::kRowBytes>(column(j), chunk));
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const Quad a = ptx::load_shared<Quad>(stage + swizzle<Tile::kRowBytes>(row(i), chunk));
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            partial[i][j] = fmaf(a.value[e], b[j].value[e], partial[i][j]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) d_[i][j] += partial[i][j];
    }
  }

 private:
  float d_[kRows][kColumns] = {};
};

// How the products of a kernel are formed, by its parameter `Number`: the elements' type, or Tf32
// for fp32 tensors whose operands may be rounded to TF32.
struct Tf32 {};
template <typename Number, typename Tile>
struct ProductsOf {
  using Element = Number;
  using Accumulators = TensorCore<Number, Tile>;
};
template <typename Tile>
struct ProductsOf<float, Tile> {
  using Element = float;
  using Accumulators = MultiplyAdd<Tile>;
};
template <typename Tile>
struct ProductsOf<Tf32, Tile> {
  using Element = float;
  using Accumulators = TensorCoreTf32<Tile>;
};

// Grid: (tiles of positions x tiles of channels, the latter first; groups).
template <typename Number, typename Tile, bool kVectorised, bool kProjection>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    conv_bn_kernel(const __grid_constant__ ConvBn a) {
  using T = typename ProductsOf<Number, Tile>::Element;
  using Accumulators = typename ProductsOf<Number, Tile>::Accumulators;
  using Copies = Gather<T, Tile, kVectorised>;
  using Stages = Ring<0, Tile::kStageBytes, Tile::kStages>;
  constexpr bool kExact = sizeof(T) == sizeof(float);
  constexpr int kLanes = kChunkBytes / sizeof(T);
  constexpr std::uint32_t kTerms = Stages::kEnd;

  const int group = blockIdx.y;
  const int columns = a.out_channels / a.groups;
  const unsigned tiles_across = (columns + Tile::kN - 1) / Tile::kN;
  const std::int64_t first_row = std::int64_t(blockIdx.x / tiles_across) * Tile::kM;
  const int first_column = blockIdx.x % tiles_across * Tile::kN;
  const std::int64_t channel = std::int64_t(group) * columns + first_column;
  const int count = columns - first_column;

  Copies copies(a, a.conv, first_row, group, first_column);
  start<Stages>(copies);
  load_terms(kTerms, a.conv.bn, channel, count, Tile::kN, threadIdx.x, Tile::kThreads);
  Accumulators acc;
  accumulate<Stages>(copies, [&](std::uint32_t stage) { acc.multiply(stage); });
  normalise<kExact>(acc, kTerms);
  __syncthreads();  // stages and terms are free
  if constexpr (kProjection) {
    Copies projection(a, a.projection, first_row, group, first_column);
    start<Stages>(projection);
    load_terms(kTerms, a.projection.bn, channel, count, Tile::kN, threadIdx.x, Tile::kThreads);
    Accumulators projected;
    accumulate<Stages>(projection, [&](std::uint32_t stage) { projected.multiply(stage); });
    normalise<kExact>(projected, kTerms);
    __syncthreads();
    add(acc, projected);
  }

  const std::int64_t offset = std::int64_t(group) * columns;
  const bool vectorised = columns % kLanes == 0 && aligned(a.out) && a.residual.in_chunks(kLanes);
  Output to{static_cast<T*>(a.out) + offset,
            a.residual,
            a.batch * a.out_height * a.out_width,
            a.out_channels,
            columns,
            a.relu,
            vectorised};
  to.residual.data = static_cast<const T*>(a.residual.data) + offset;
  to.residual.channels -= offset;
  store_tile<T, Tile::kM, Tile::kN, Tile::kThreads>(to, acc, 0, first_row, first_column);
}

using Kernel = void (*)(ConvBn);

// A kernel and the size of its blocks; `kernel` is null where there is none.
struct Choice {
  Kernel kernel = nullptr;
  int positions = 0, channels = 0, threads = 0, shared_bytes = 0;
};

template <typename Number, typename Tile, bool kVectorised, bool kProjection>
Choice choice_of() {
  return {&conv_bn_kernel<Number, Tile, kVectorised, kProjection>, Tile::kM, Tile::kN,
          Tile::kThreads, Tile::kSharedBytes};
}

template <typename T>
Choice choose_half(ConvTile tile, bool vectorised, bool projection) {
  switch (tile) {
    case ConvTile::k64x64:
      if (vectorised) {
        return projection ? choice_of<T, Tile64x64, true, true>()
                          : choice_of<T, Tile64x64, true, false>();
      }
      return projection ? choice_of<T, TileNarrow, false, true>()
                        : choice_of<T, TileNarrow, false, false>();
    case ConvTile::k128x64:
      if (!vectorised) return {};
      return projection ? choice_of<T, Tile128x64, true, true>()
                        : choice_of<T, Tile128x64, true, false>();
    case ConvTile::k128x128:
      if (!vectorised || projection) return {};
      return choice_of<T, Tile128x128, true, false>();
    default:
      return {};
  }
}

Choice choose_float(ConvTile tile, bool vectorised, bool projection) {
  if (tile != ConvTile::k64x64) return {};
  if (projection) {
    return vectorised ? choice_of<float, TileFloatProjection, true, true>()
                      : choice_of<float, TileFloatProjection, false, true>();
  }
  return vectorised ? choice_of<float, TileFloat, true, false>()
                    : choice_of<float, TileFloat, false, false>();
}

// Of whole chunks. Registers for the sums of a step and of the whole bound the tiles.
Choice choose_tf32(ConvTile tile, bool projection) {
  if (tile == ConvTile::k128x64 && !projection) return choice_of<Tf32, Tile128x64, true, false>();
  if (tile != ConvTile::k64x64) return {};
  return projection ? choice_of<Tf32, TileTf32, true, true>()
                    : choice_of<Tf32, TileTf32, true, false>();
}

bool vectorised(const ConvBn& a, const ConvolutionBn& conv) {
  const int bytes = conv.channels / a.groups * (a.dtype == DType::kFloat32 ? 4 : 2);
  return bytes % kChunkBytes == 0 && aligned(conv.x) && aligned(conv.weight);
}

Choice choose(const ConvBn& a, ConvTile tile) {
  const bool projection = a.projection.x != nullptr;
  const bool whole = vectorised(a, a.conv) && (!projection || vectorised(a, a.projection));
  switch (a.dtype) {
    case DType::kFloat16:
      return choose_half<__half>(tile, whole, projection);
    case DType::kBFloat16:
      return choose_half<__nv_bfloat16>(tile, whole, projection);
    default:
      return a.tf32 && whole ? choose_tf32(tile, projection)
                             : choose_float(tile, whole, projection);
  }
}

// Blocks in the grid's first dimension.
std::int64_t blocks(const ConvBn& a, const Choice& choice) {
  return ceil_div(a.batch * a.out_height * a.out_width, choice.positions) *
         ceil_div(a.out_channels / a.groups, choice.channels);
}

// The largest tile that still gives every multiprocessor a block, and is not half empty.
Choice choose_automatically(const ConvBn& a, int multiprocessors) {
  for (const ConvTile tile : {ConvTile::k128x128, ConvTile::k128x64}) {
    const Choice choice = choose(a, tile);
    if (choice.kernel != nullptr && 2 * a.out_channels / a.groups > choice.channels &&
        blocks(a, choice) * a.groups >= multiprocessors) {
      return choice;
    }
  }
  return choose(a, ConvTile::k64x64);
}

}  // namespace

bool conv_bn_sm80_offers(const ConvBn& arguments, ConvTile tile) {
  return tile == ConvTile::kAuto || choose(arguments, tile).kernel != nullptr;
}

cudaError_t conv_bn_sm80(const ConvBn& arguments, ConvTile tile, int device, cudaStream_t stream) {
  const ConvBn& a = arguments;
  int multiprocessors = 0;
  const cudaError_t status =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return settled(status);

  const Choice choice =
      tile == ConvTile::kAuto ? choose_automatically(a, multiprocessors) : choose(a, tile);
  if (choice.kernel == nullptr) return cudaErrorInvalidValue;
  const std::int64_t across = blocks(a, choice);
  if (across > std::numeric_limits<int>::max() || a.groups > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(a.groups));
  return launch(choice.kernel, grid, dim3(choice.threads), choice.shared_bytes, stream, a);
}

}  // namespace resnet_fused
