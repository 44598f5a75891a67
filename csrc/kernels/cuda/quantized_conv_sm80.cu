// Quantised implicit GEMM for sm_80 and later: mma.sync of bytes.
//
// Algorithm: that of conv_sm80.cu, whose copies and pipeline these are, with products of bytes into
// int32 (mma.m16n8k32): x is uint8 or quantized, weights are quantized. A block end with projection
// begins with the K loop over the shortcut; its sums are rounded to the accumulator's scale where
// they are, and the other K loop adds to them. The residual is copied before the first operands, to
// where the result will lie. The epilogue (quantized_epilogue.cuh) is that of sm_90a, and so are
// the results: those of resnet_fused/reference/quantized.py, bit for bit.
//
// Tiles (positions x channels x depth, warps, stages): 64 x 64 x 128, 4, 3; 128 x 128 x 64, 4, 4.
// Blocks that share positions are neighbours in the grid.
//
// Shared memory: kStages x (positions + channels) rows of 128 or 64 bytes; the result; bias,
// multiplier and shortcut's scale.
//
// Memory: a byte an element of x, weight, residual, shortcut and out, once each, as far as L2 holds
// what the taps and the blocks of one row of tiles share; every access is 16 bytes a thread.
#include <cstdint>
#include <vector>

#include "kernels/cuda/conv_sm80.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/quantized_conv_sm80.h"
#include "kernels/cuda/quantized_epilogue.cuh"

namespace resnet_fused {
namespace {

template <int kM, int kN, int kRowBytes, int kWarpsM, int kWarpsN, int kStages, int kBlocks>
struct Tile : CpAsyncTile<kM, kN, kRowBytes, kWarpsM, kWarpsN, kStages, kBlocks> {
  using Epilogue = QuantizedEpilogue<kM, kN, std::int32_t>;
  static constexpr int kResult = kStages * (kM + kN) * kRowBytes;
  static constexpr int kVectors = kResult + kM * kN;
  static constexpr int kSharedBytes = kVectors + 3 * Epilogue::kVectorBytes;
};

using Tile64x64 = Tile<64, 64, 128, 2, 2, 3, 3>;
using Tile128x128 = Tile<128, 128, 64, 2, 2, 4, 2>;

// This thread's part of the chunks of a tile: move(row, chunk of the row).
template <typename Tile, typename Move>
__device__ __forceinline__ void for_each_chunk(Move move) {
  constexpr int kAcross = Tile::kN / kChunkBytes, kRowsAtOnce = Tile::kThreads / kAcross;
#pragma unroll 1
  for (int row = threadIdx.x / kAcross; row < Tile::kM; row += kRowsAtOnce) {
    move(row, threadIdx.x % kAcross);
  }
}

// Grid: tiles of positions x tiles of channels, the latter first.
template <typename T, typename Tile, Shortcut kShortcut>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    quantized_conv_kernel(const __grid_constant__ QuantizedConv quantized) {
  using Epilogue = typename Tile::Epilogue;
  using Operands = CpAsyncPipeline<0, Tile::kStageBytes, Tile::kStages>;
  using Byte = std::uint8_t;
  using Chunk = Pack<std::uint32_t, 4>;
  const ConvBn& a = quantized.conv;
  const unsigned tiles_across = (a.out_channels + Tile::kN - 1) / Tile::kN;
  const std::int64_t rows = a.batch * a.out_height * a.out_width;
  const std::int64_t first_row = std::int64_t(blockIdx.x / tiles_across) * Tile::kM;
  const int first_column = blockIdx.x % tiles_across * Tile::kN;

  if constexpr (kShortcut == Shortcut::kResidual) {
    for_each_chunk<Tile>([&](int row, int chunk) {
      const std::int64_t position = first_row + row;
      const int column = first_column + chunk * kChunkBytes;
      const bool some = position < rows && column < a.residual.channels;
      const Byte* const from = static_cast<const Byte*>(a.residual.data);
      ptx::cp_async_16(Tile::kResult + Epilogue::place(row, chunk),
                       some ? from + a.residual.offset(position) + column : from, some);
    });
  }
  Epilogue::load_vectors({quantized.bias, quantized.multiplier, quantized.shortcut_scale},
                         first_column, a.out_channels, Tile::kVectors, threadIdx.x, Tile::kThreads);
  TensorCore<T, Tile> acc;
  const auto multiply = [&](const ConvolutionBn& conv) {
    OperandLoader<T, Tile, true> loader(a, conv, first_row, 0, first_column);
    Operands::start(loader);
    Operands::run(loader, [&](std::uint32_t stage) { acc.multiply(stage); });
  };
  if constexpr (kShortcut == Shortcut::kProjection) {
    multiply(a.projection);
    Epilogue::rescale(acc, Tile::kVectors);
    __syncthreads();  // the stages are free
  }
  multiply(a.conv);

  Epilogue::template store_result<kShortcut == Shortcut::kResidual>(
      acc, Tile::kVectors, Tile::kResult, 0, quantized.residual_dtype == DType::kInt8, a.relu);
  __syncthreads();
  for_each_chunk<Tile>([&](int row, int chunk) {
    const std::int64_t position = first_row + row;
    const int column = first_column + chunk * kChunkBytes;
    if (position >= rows || column >= a.out_channels) return;
    Byte* const to = static_cast<Byte*>(a.out) + position * a.out_channels + column;
    const auto bytes = ptx::load_shared<Chunk>(Tile::kResult + Epilogue::place(row, chunk));
    ptx::store_global(reinterpret_cast<Chunk*>(to), bytes);
  });
}

template <typename Tile>
std::int64_t tiles(const ConvBn& a) {
  return ceil_div(a.batch * a.out_height * a.out_width, Tile::kM) *
         ceil_div(a.out_channels, Tile::kN);
}

template <typename T, typename Tile>
LaunchPlan<QuantizedConv> make_plan(const QuantizedConv& quantized) {
  const ConvBn& a = quantized.conv;
  const auto kernel =
      a.projection.x != nullptr ? &quantized_conv_kernel<T, Tile, Shortcut::kProjection>
      : a.residual.channels > 0 ? &quantized_conv_kernel<T, Tile, Shortcut::kResidual>
                                : &quantized_conv_kernel<T, Tile, Shortcut::kNone>;
  return {kernel,
          {dim3(grid_size(tiles<Tile>(a))), dim3(Tile::kThreads), Tile::kSharedBytes},
          quantized};
}

template <typename T>
LaunchPlan<QuantizedConv> make_plan(const QuantizedConv& quantized, QuantizedTile tile) {
  return tile == QuantizedTile::k64x64Sm80 ? make_plan<T, Tile64x64>(quantized)
                                           : make_plan<T, Tile128x128>(quantized);
}

}  // namespace

std::vector<QuantizedTile> quantized_conv_sm80_tiles(const QuantizedConv& quantized, int num_sms) {
  const ConvBn& a = quantized.conv;
  const bool large = tiles<Tile128x128>(a) >= num_sms && 2 * a.out_channels > Tile128x128::kN;
  if (large) return {QuantizedTile::k128x128Sm80, QuantizedTile::k64x64Sm80};
  return {QuantizedTile::k64x64Sm80, QuantizedTile::k128x128Sm80};
}

cudaError_t quantized_conv_sm80(const QuantizedConv& arguments, QuantizedTile tile,
                                cudaStream_t stream) {
  return launch(arguments.conv.dtype == DType::kUInt8 ? make_plan<std::uint8_t>(arguments, tile)
                                                      : make_plan<std::int8_t>(arguments, tile),
                stream);
}

}  // namespace resnet_fused
