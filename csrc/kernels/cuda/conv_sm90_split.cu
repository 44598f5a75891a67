// Implicit GEMM for sm_90a where a layer has fewer tiles than the GPU has SMs: the blocks of a
// cluster share a tile's K loop.
//
// Algorithm: products and operands are those of conv_sm90.cu, in tiles of 64 x 64. Each of the
// kSplits blocks of a cluster multiplies its part of the steps, of both products where there is a
// projection, into fp32 accumulators, and leaves these in its shared memory. Then every block adds
// up one part of the tile's channels, reading the other blocks' shared memory, always in the order
// of their ranks, so that the sum does not depend on who came first; and finishes and stores it.
//
// Roles: one thread copies operands, as far ahead as there are stages, and a warpgroup multiplies.
// While the first step is on its way, that computes scale and shift of the block's channels and
// loads its part of the residual. A block has one tile, and the kernel ends with it.
//
// Shared memory: 6 stages of (64 + 64) rows of 128 bytes; the accumulators of each product, 16
// bytes of every thread beside those of its neighbours, so that no access meets a bank conflict;
// scale and shift of each batch norm; mbarriers.
//
// Memory: as conv_sm90.cu, of which this kernel asks L2 for more bytes an operation, from more SMs.
#include "kernels/cuda/conv_sm90.cuh"
#include "kernels/cuda/conv_sm90_split.h"
#include "kernels/cuda/epilogue.cuh"

namespace resnet_fused {
namespace {

struct Tile {
  static constexpr int kM = 64, kN = 64;
};
constexpr int kStages = 6;
constexpr int kStageBytes = (Tile::kM + Tile::kN) * kRowBytes;
constexpr int kThreads = kWarpgroup + 32;
constexpr int kQuads = Tile::kN / 8;  // of a thread's accumulators, of 8 channels each
constexpr int kQuadBytes = kWarpgroup * 16;

// What lies where in shared memory: the operands' stages from 0 on, and so forth.
template <int kSplits, bool kProjection>
struct Shared {
  static constexpr int kProducts = kProjection ? 2 : 1;
  static constexpr int kOwnQuads = kQuads / kSplits;  // that a block adds up
  static constexpr int kOwnChannels = 8 * kOwnQuads;
  static constexpr int kPartials = kStages * kStageBytes;
  static constexpr int kPartialBytes = kQuads * kQuadBytes;
  static constexpr int kScaleShift = kPartials + kProducts * kPartialBytes;
  static constexpr int kScaleShiftStage = kOwnChannels * static_cast<int>(kScaleShiftBytes);
  static constexpr int kMbarriers = kScaleShift + kProducts * kScaleShiftStage;
  using Operands = Pipeline<PipelineId::kConvSplitOperands, kMbarriers, kStages>;
  static constexpr int kBytes = Operands::kEnd;
};

struct Arguments {
  Product conv, projection;
  Residual residual;
  void* out;
  unsigned out_height, out_width, positions, tiles_across;
  int out_channels;
  bool relu;
  SpinLimit spin_limit;
};

// The steps of one product that are this block's.
template <int kSplits>
struct Share {
  int first, last;

  __device__ __forceinline__ explicit Share(const Product& product) {
    const int steps = steps_of(product), rank = blockIdx.x % kSplits;
    first = steps * rank / kSplits;
    last = steps * (rank + 1) / kSplits;
  }
};

template <int kSplits, typename Operands>
__device__ __forceinline__ void load_product(const Arguments& a, const Product& product,
                                             int position, int channel, Operands& operands) {
  const Share<kSplits> share(product);
  const Pixel pixel(position, a.out_height, a.out_width);
  const int h = pixel.h * product.stride_h - product.padding_h;
  const int w = pixel.w * product.stride_w - product.padding_w;
  const int chunks = (product.channels + kMapChannels - 1) / kMapChannels;
  int tap = share.first / chunks, c = share.first % chunks * kMapChannels;
#pragma unroll 1
  for (int step = share.first; step < share.last; ++step) {
    const std::uint32_t stage = operands.stage() * kStageBytes;
    operands.acquire(position / Tile::kM);
    operands.commit_bytes(kStageBytes);
    if (product.matrix) {
      ptx::load_tile(stage, product.x, operands.full(), {c, position});
    } else {
      const int r = tap / product.kernel_w, s = tap % product.kernel_w;
      ptx::load_pixels(stage, product.x, operands.full(), {c, w, h, pixel.image},
                       {static_cast<std::uint16_t>(s * product.dilation_w),
                        static_cast<std::uint16_t>(r * product.dilation_h)});
    }
    ptx::load_tile(stage + Tile::kM * kRowBytes, product.weight, operands.full(),
                   {c, tap, channel});
    operands.advance();
    c += kMapChannels;
    if (c >= product.channels) {
      c = 0;
      ++tap;
    }
  }
}

using Acc = Accumulators<Tile::kM, Tile::kN>;
using Quad = Pack<float, 4>;  // rows 0 and 1, two channels each

// Multiplies this block's steps of a product, and leaves the accumulators in shared memory.
template <typename T, int kSplits, typename Operands>
__device__ __forceinline__ void multiply(const Product& product, int tile, Operands& operands,
                                         std::uint32_t partials) {
  const Share<kSplits> share(product);
  Acc acc;
  acc.template multiply<T, Tile, 1>(share.last - share.first, 0, tile, operands);
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const Quad quad{{acc.at(0, j, 0), acc.at(0, j, 1), acc.at(1, j, 0), acc.at(1, j, 1)}};
    ptx::store_shared(partials + j * kQuadBytes + threadIdx.x * 16, quad);
  }
}

// The sum over the cluster's blocks of the accumulators at `partials`, batch norm behind it.
template <typename T, int kSplits>
__device__ __forceinline__ Quad sum(std::uint32_t partials, std::uint32_t scale_shift) {
  Quad of[kSplits];
#pragma unroll
  for (int rank = 0; rank < kSplits; ++rank) {
    of[rank] = ptx::load_cluster<Quad>(ptx::cluster_address(partials + threadIdx.x * 16, rank));
  }
  Quad y = of[0];
#pragma unroll
  for (int rank = 1; rank < kSplits; ++rank) {
#pragma unroll
    for (int e = 0; e < 4; ++e) y.value[e] += of[rank].value[e];
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const auto scale =
        ptx::load_shared<ScaleShift>(scale_shift + (threadIdx.x % 4 * 2 + e) * kScaleShiftBytes);
    y.value[e] = Epilogue<T>::normalise(y.value[e], scale);
    y.value[2 + e] = Epilogue<T>::normalise(y.value[2 + e], scale);
  }
  return y;
}

// The role of the warpgroup.
template <typename T, int kSplits, bool kProjection>
__device__ __forceinline__ void consume(const Arguments& a, int position, int channel) {
  using Shared = Shared<kSplits, kProjection>;
  using Run = Pack<T, 2>;
  const int rank = blockIdx.x % kSplits;
  const int own = channel + rank * Shared::kOwnChannels;  // the first of this block's channels
  const int count = a.out_channels - own;
  load_scale_shift(Shared::kScaleShift, a.conv.bn, own, count, Shared::kOwnChannels, threadIdx.x,
                   kWarpgroup);
  if constexpr (kProjection) {
    load_scale_shift(Shared::kScaleShift + Shared::kScaleShiftStage, a.projection.bn, own, count,
                     Shared::kOwnChannels, threadIdx.x, kWarpgroup);
  }
  Run residual[Acc::kRows][Shared::kOwnQuads] = {};
#pragma unroll
  for (int i = 0; i < Acc::kRows; ++i) {
    const unsigned row = position + Acc::row(i);
    if (row >= a.positions || a.residual.channels == 0) continue;
    const T* const from = static_cast<const T*>(a.residual.data) + a.residual.offset(row) + own;
#pragma unroll
    for (int j = 0; j < Shared::kOwnQuads; ++j) {
      if (own + Acc::column(j) >= a.residual.channels) continue;
      residual[i][j] = ptx::load_global(reinterpret_cast<const Run*>(from + Acc::column(j)));
    }
  }

  typename Shared::Operands operands(a.spin_limit);
  const int tile = position / Tile::kM;
  multiply<T, kSplits>(a.conv, tile, operands, Shared::kPartials);
  if constexpr (kProjection) {
    multiply<T, kSplits>(a.projection, tile, operands, Shared::kPartials + Shared::kPartialBytes);
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();

  const Epilogue<T> epilogue(a.relu);
#pragma unroll
  for (int j = 0; j < Shared::kOwnQuads; ++j) {
    const std::uint32_t partials = Shared::kPartials + (rank * Shared::kOwnQuads + j) * kQuadBytes;
    const std::uint32_t scale_shift = Shared::kScaleShift + 8 * j * kScaleShiftBytes;
    Quad y = sum<T, kSplits>(partials, scale_shift);
    if constexpr (kProjection) {
      const Quad other =
          sum<T, kSplits>(partials + Shared::kPartialBytes, scale_shift + Shared::kScaleShiftStage);
#pragma unroll
      for (int e = 0; e < 4; ++e) y.value[e] += other.value[e];
    }
#pragma unroll
    for (int i = 0; i < Acc::kRows; ++i) {
      const std::int64_t row = position + Acc::row(i);
      float of_row[2] = {y.value[2 * i], y.value[2 * i + 1]};
      epilogue.add(of_row, residual[i][j]);
      if (row >= a.positions || Acc::column(j) >= count) continue;
      T* const to = static_cast<T*>(a.out) + row * a.out_channels + own + Acc::column(j);
      ptx::store_global(reinterpret_cast<Run*>(to), epilogue.pack(of_row));
    }
  }
}

// Grid: tiles, those of one row of positions behind one another, x kSplits.
template <typename T, int kSplits, bool kProjection>
__global__ void __launch_bounds__(kThreads)
    conv_bn_sm90_split_kernel(const __grid_constant__ Arguments a) {
  using Operands = typename Shared<kSplits, kProjection>::Operands;
  if (threadIdx.x == 0) {
    Operands::init(1, kWarpgroup / 32);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::wait_for_earlier_kernels();
  const unsigned tile = blockIdx.x / kSplits;
  const int position = tile / a.tiles_across * Tile::kM;
  const int channel = tile % a.tiles_across * Tile::kN;
  if (ptx::uniform(threadIdx.x / kWarpgroup) == 0) {
    consume<T, kSplits, kProjection>(a, position, channel);
  } else {
    if (threadIdx.x == kWarpgroup) {
      Operands operands(a.spin_limit);
      load_product<kSplits>(a, a.conv, position, channel, operands);
      if constexpr (kProjection) {
        load_product<kSplits>(a, a.projection, position, channel, operands);
      }
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  // The other blocks read this one's accumulators.
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

std::int64_t tiles(const ConvBn& a) {
  return ceil_div(positions(a), Tile::kM) * ceil_div(a.out_channels, Tile::kN);
}

int splits_of(ConvTile tile) {
  switch (tile) {
    case ConvTile::k64x64Sm90Split2:
      return 2;
    case ConvTile::k64x64Sm90Split4:
      return 4;
    case ConvTile::k64x64Sm90Split8:
      return 8;
    default:
      return 0;
  }
}

template <typename T, int kSplits, bool kProjection>
cudaError_t run(const ConvBn& a, cudaStream_t stream) {
  Arguments to{};
  to.residual = a.residual;
  to.out = a.out;
  to.out_height = a.out_height;
  to.out_width = a.out_width;
  to.positions = static_cast<unsigned>(positions(a));
  to.tiles_across = static_cast<unsigned>(ceil_div(a.out_channels, Tile::kN));
  to.out_channels = a.out_channels;
  to.relu = a.relu;
  to.spin_limit = spin_limit;
  cudaError_t status = encode(&to.conv, a, a.conv, Tile::kM, Tile::kN);
  if (kProjection && status == cudaSuccess) {
    status = encode(&to.projection, a, a.projection, Tile::kM, Tile::kN);
  }
  if (status != cudaSuccess) return status;
  const LaunchShape shape{dim3(grid_size(tiles(a) * kSplits)), dim3(kThreads),
                          Shared<kSplits, kProjection>::kBytes, dim3(kSplits), true};
  return launch(&conv_bn_sm90_split_kernel<T, kSplits, kProjection>, shape, stream, to);
}

template <int kSplits>
cudaError_t run(const ConvBn& a, cudaStream_t stream) {
  return with_half(a.dtype, [&](auto half) {
    using T = decltype(half);
    return a.projection.x == nullptr ? run<T, kSplits, false>(a, stream)
                                     : run<T, kSplits, true>(a, stream);
  });
}

}  // namespace

bool is_split(ConvTile tile) { return splits_of(tile) > 0; }

bool conv_bn_sm90_split_can_implement(const ConvBn& a, ConvTile tile) {
  const int splits = splits_of(tile);
  return splits > 0 && steps_of(a.conv) >= splits &&
         (a.projection.x == nullptr || steps_of(a.projection) >= splits) &&
         a.residual.in_chunks(2) && tiles(a) * splits <= kMaxGridX;
}

std::int64_t conv_bn_sm90_split_cycles(const ConvBn& a, ConvTile tile, int num_sms) {
  constexpr std::int64_t kStep = step_cycles(Tile::kM, Tile::kN, Tile::kM + Tile::kN);
  // Of a cluster's blocks, and what each adds up of a product: fitted to an H200's times.
  constexpr int kMeeting = 2500;
  const int splits = splits_of(tile);
  const std::int64_t blocks = tiles(a) * splits;
  std::int64_t steps = ceil_div(steps_of(a.conv), splits);
  std::int64_t meeting = kMeeting;
  if (a.projection.x != nullptr) {
    steps += ceil_div(steps_of(a.projection), splits);
    meeting *= 2;
  }
  return ceil_div(blocks, num_sms) * (steps * kStep + meeting);
}

cudaError_t conv_bn_sm90_split(const ConvBn& a, ConvTile tile, cudaStream_t stream) {
  switch (splits_of(tile)) {
    case 2:
      return run<2>(a, stream);
    case 4:
      return run<4>(a, stream);
    default:
      return run<8>(a, stream);
  }
}

}  // namespace resnet_fused
