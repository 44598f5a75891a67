// Implicit GEMM on tensor cores: mma.sync, ldmatrix and cp.async, as sm_80 and later have them.
//
// Algorithm: out[m, k] = sum over taps (r, s) and channels c of x[pixel(m) + (r, s), c] *
// weight[k, r, s, c], m running over batch x out_height x out_width. No matrix of pixels is ever
// formed: a step of the K loop takes one tap and one slice of channels, and each thread copies its
// 16-byte chunks of both operands straight from the NHWC and KRSC tensors to shared memory
// (cp.async, zero-filled beyond the image, the channels, the rows). kStages - 1 steps are in flight
// while the one before them is multiplied: ldmatrix and mma.m16n8k16 with fp32 accumulators; for
// fp32 tensors fused multiply-adds, each product and sum rounded as fp32, or, where the caller
// allows it, mma.m16n8k8 of operands rounded to TF32. The epilogue (epilogue.cuh) applies batch
// norm, residual and ReLU and rounds once. A block end with projection runs a second K loop over
// the shortcut, with its own geometry and batch norm, and adds before the store. Channels per group
// that are no multiple of 16 bytes are loaded one by one into the same chunks.
//
// Tiles (positions x channels x bytes of depth, warps, stages): 64 x 64 x 128, 4, 3;
// 128 x 64 x 64, 4, 4; 128 x 128 x 64, 4, 4; fp32: 64 x 64 x 64, 8, 4; TF32: the first, and the
// second without projection. Blocks that share positions are neighbours in the grid, so that x
// comes from memory once and then from L2.
//
// Shared memory: kStages x (positions + channels) rows of 64 or 128 bytes, then scale and shift of
// one batch norm; the epilogue's staging lies over the stages. A row's 16-byte chunks are permuted
// (swizzle in mma_sync.cuh), against bank conflicts.
//
// Memory: x, weight, residual, shortcut and out once each, the floor, as far as L2 holds what the
// taps and the blocks of one row of tiles share; every access is 16 bytes a thread.
#include <utility>

#include "kernels/cuda/conv_sm80.cuh"
#include "kernels/cuda/conv_sm80.h"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/launch.h"

namespace resnet_fused {
namespace {

template <int kM, int kN, int kRowBytes, int kWarpsM, int kWarpsN, int kStages, int kBlocks>
struct Tile : CpAsyncTile<kM, kN, kRowBytes, kWarpsM, kWarpsN, kStages, kBlocks> {
  static constexpr int kStagesBytes = kStages * (kM + kN) * kRowBytes;
  static constexpr int kSharedBytes = kStagesBytes + kN * static_cast<int>(kScaleShiftBytes);
  static_assert(kM * kN * static_cast<int>(sizeof(float)) <= kStagesBytes);
};

using Tile64x64 = Tile<64, 64, 128, 2, 2, 3, 3>;
using Tile128x64 = Tile<128, 64, 64, 2, 2, 4, 2>;
using Tile128x128 = Tile<128, 128, 64, 2, 2, 4, 2>;
using TileNarrow = Tile<64, 64, 64, 2, 2, 3, 2>;  // channels one by one
using TileTf32 = Tile<64, 64, 128, 2, 2, 3, 2>;
using TileFloat = Tile<64, 64, 64, 4, 2, 4, 2>;
using TileFloatProjection = Tile<64, 64, 64, 4, 2, 4, 1>;

// The same for fp32 rounded to TF32. Each step is summed by itself first, which loses less than one
// long sum.
template <typename Tile>
class TensorCoreTf32 : public TensorCore<float, Tile> {
 public:
  __device__ __forceinline__ void multiply(std::uint32_t stage) {
    TensorCore<float, Tile> partial;
    partial.multiply(stage);
    this->add(partial);
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
    MultiplyAdd partial;
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
            partial.d_[i][j] = fmaf(a.value[e], b[j].value[e], partial.d_[i][j]);
          }
        }
      }
    }
    add(partial);
  }

  __device__ __forceinline__ void add(const MultiplyAdd& other) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) d_[i][j] += other.d_[i][j];
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
  using Operands = CpAsyncPipeline<0, Tile::kStageBytes, Tile::kStages>;
  constexpr std::uint32_t kScaleShift = Operands::kEnd;

  const int group = blockIdx.y;
  const int columns = a.out_channels / a.groups;
  const unsigned tiles_across = (columns + Tile::kN - 1) / Tile::kN;
  const std::int64_t first_row = std::int64_t(blockIdx.x / tiles_across) * Tile::kM;
  const int first_column = blockIdx.x % tiles_across * Tile::kN;

  const std::int64_t channel = std::int64_t(group) * columns + first_column;
  const int count = columns - first_column;
  const auto start = [&](auto& loader, const ConvolutionBn& conv) {
    Operands::start(loader);
    load_scale_shift(kScaleShift, conv.bn, channel, count, Tile::kN, threadIdx.x, Tile::kThreads);
  };
  const auto multiply = [&](auto& loader, Accumulators& acc) {
    Operands::run(loader, [&](std::uint32_t stage) { acc.multiply(stage); });
    Epilogue<T>::normalise(acc, kScaleShift);
    __syncthreads();  // the stages, scale and shift are free
  };
  using Loader = OperandLoader<T, Tile, kVectorised>;
  Loader loader(a, a.conv, first_row, group, first_column);
  start(loader, a.conv);
  Accumulators acc;
  multiply(loader, acc);
  if constexpr (kProjection) {
    Loader shortcut(a, a.projection, first_row, group, first_column);
    start(shortcut, a.projection);
    Accumulators projected;
    multiply(shortcut, projected);
    acc.add(projected);
  }

  constexpr int kLanes = Epilogue<T>::kLanes;
  const std::int64_t offset = std::int64_t(group) * columns;
  Output to{static_cast<T*>(a.out) + offset,
            a.residual,
            a.batch * a.out_height * a.out_width,
            a.out_channels,
            columns,
            a.relu,
            columns % kLanes == 0 && aligned(a.out) && a.residual.in_chunks(kLanes)};
  to.residual.data = static_cast<const T*>(a.residual.data) + offset;
  to.residual.channels -= offset;
  const Epilogue<T> epilogue(a.relu);
  epilogue.template store_tile<Tile::kM, Tile::kN, Tile::kThreads>(to, acc, 0, first_row,
                                                                   first_column);
}

using Plan = LaunchPlan<ConvBn>;

template <typename Number, typename Tile, bool kVectorised, bool kProjection>
Plan plan_of(const ConvBn& a) {
  const std::int64_t tiles = ceil_div(a.batch * a.out_height * a.out_width, Tile::kM) *
                             ceil_div(a.out_channels / a.groups, Tile::kN);
  return {&conv_bn_kernel<Number, Tile, kVectorised, kProjection>,
          {dim3(grid_size(tiles), grid_size(a.groups, kMaxGridY)), dim3(Tile::kThreads),
           Tile::kSharedBytes},
          a};
}

template <typename T>
Plan plan_half(const ConvBn& a, ConvTile tile, bool vectorised, bool projection) {
  switch (tile) {
    case ConvTile::k64x64:
      if (vectorised) {
        return projection ? plan_of<T, Tile64x64, true, true>(a)
                          : plan_of<T, Tile64x64, true, false>(a);
      }
      return projection ? plan_of<T, TileNarrow, false, true>(a)
                        : plan_of<T, TileNarrow, false, false>(a);
    case ConvTile::k128x64:
      if (!vectorised) return {};
      return projection ? plan_of<T, Tile128x64, true, true>(a)
                        : plan_of<T, Tile128x64, true, false>(a);
    case ConvTile::k128x128:
      if (!vectorised || projection) return {};
      return plan_of<T, Tile128x128, true, false>(a);
    default:
      return {};
  }
}

Plan plan_float(const ConvBn& a, ConvTile tile, bool vectorised, bool projection) {
  if (tile != ConvTile::k64x64) return {};
  if (projection) {
    return vectorised ? plan_of<float, TileFloatProjection, true, true>(a)
                      : plan_of<float, TileFloatProjection, false, true>(a);
  }
  return vectorised ? plan_of<float, TileFloat, true, false>(a)
                    : plan_of<float, TileFloat, false, false>(a);
}

// Of whole chunks. Registers for the sums of a step and of the whole bound the tiles.
Plan plan_tf32(const ConvBn& a, ConvTile tile, bool projection) {
  if (tile == ConvTile::k128x64 && !projection) return plan_of<Tf32, Tile128x64, true, false>(a);
  if (tile != ConvTile::k64x64) return {};
  return projection ? plan_of<Tf32, TileTf32, true, true>(a)
                    : plan_of<Tf32, TileTf32, true, false>(a);
}

bool is_vectorised(const ConvBn& a, const ConvolutionBn& conv) {
  const int bytes = conv.channels / a.groups * (a.dtype == DType::kFloat32 ? 4 : 2);
  return bytes % kChunkBytes == 0 && aligned(conv.x) && aligned(conv.weight);
}

Plan make_plan(const ConvBn& a, ConvTile tile) {
  const bool projection = a.projection.x != nullptr;
  const bool vectorised =
      is_vectorised(a, a.conv) && (!projection || is_vectorised(a, a.projection));
  switch (a.dtype) {
    case DType::kFloat16:
      return plan_half<__half>(a, tile, vectorised, projection);
    case DType::kBFloat16:
      return plan_half<__nv_bfloat16>(a, tile, vectorised, projection);
    default:
      return a.tf32 && vectorised ? plan_tf32(a, tile, projection)
                                  : plan_float(a, tile, vectorised, projection);
  }
}

// The largest tile that still gives every SM a block, and is not half empty.
Plan choose(const ConvBn& a, int num_sms) {
  constexpr std::pair<ConvTile, int> kLarge[] = {{ConvTile::k128x128, 128},
                                                 {ConvTile::k128x64, 64}};
  for (const auto& [tile, tile_n] : kLarge) {
    const Plan plan = make_plan(a, tile);
    if (plan.kernel != nullptr && 2 * a.out_channels / a.groups > tile_n &&
        std::int64_t{plan.shape.grid.x} * plan.shape.grid.y >= num_sms) {
      return plan;
    }
  }
  return make_plan(a, ConvTile::k64x64);
}

}  // namespace

bool conv_bn_sm80_can_implement(const ConvBn& a, ConvTile tile) {
  return tile == ConvTile::kAuto || make_plan(a, tile).kernel != nullptr;
}

cudaError_t conv_bn_sm80(const ConvBn& a, ConvTile tile, int num_sms, cudaStream_t stream) {
  return launch(tile == ConvTile::kAuto ? choose(a, num_sms) : make_plan(a, tile), stream);
}

}  // namespace resnet_fused
