// The gradient of a convolution's weight for sm_90a: wgmma on operands that both lie by columns.
//
// Algorithm: out[k, tap, c] = sum over positions m of grad[m, k] * x[pixel(m) + tap, c], a product
// whose depth is positions: a step of the K loop takes 64 of them. Columns of the weight, 64
// channels of one tap a panel, are the rows of wgmma's D, and output channels its columns. A thread
// asks for each panel: of x in im2col mode, under the panel's tap, of 1 x 1 windows that move by
// single pixels in tiled mode; of grad in tiled mode. Positions fall into ranges, so that there are
// blocks for all SMs; a block writes the fp32 sums of its range, and a second kernel adds those of
// all ranges in their order: the same bits at each call.
//
// Roles: five or six threads of the first warp copy; two warpgroups are consumers of 128 columns of
// the weight each.
//
// Tiles (columns of the weight x output channels x positions, stages): 256 x 128 x 64, 4; 256 x 64
// x 64, 5. One block a SM.
//
// Shared memory: kStages x (256 + output channels) x 128 bytes, in panels of 64 positions, rows of
// 128 bytes with the 128-byte swizzle; mbarriers.
//
// Memory: x once for each tile of output channels, for each tap from L2; grad once for each tile of
// columns; 4 bytes an element of out and range, written and read.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cuda/conv_sm90.cuh"
#include "kernels/cuda/dtype.cuh"
#include "kernels/cuda/wgrad_sm90.h"

namespace resnet_fused {
namespace {

constexpr int kNumConsumers = 2;
constexpr int kThreads = (1 + kNumConsumers) * kWarpgroup;
constexpr int kStepPositions = 64;
constexpr int kPanelBytes = kStepPositions * kRowBytes;
constexpr int kNumLaunchRegisters = 168, kNumProducerRegisters = 40, kNumConsumerRegisters = 232;

template <int kN_, int kStages_>
struct Tile {
  static constexpr int kM = 256, kN = kN_, kStages = kStages_;
  static constexpr int kConsumerM = kM / kNumConsumers;
  static constexpr int kPanelsOfX = kM / kMapChannels, kPanels = kPanelsOfX + kN / kMapChannels;
  static constexpr int kStageBytes = (kM + kN) * kRowBytes;
  using Operands = Pipeline<PipelineId::kWgradOperands, kStages * kStageBytes, kStages>;
  static constexpr int kBytes = Operands::kEnd;
};

using Tile256x64 = Tile<64, 5>;
using Tile256x128 = Tile<128, 4>;

struct Arguments {
  Product conv;  // x alone, for panels
  CUtensorMap grad;
  float* parts;
  unsigned out_height, out_width, steps, steps_of_part, tiles, tiles_across;
  int out_channels, chunks, panels;  // chunks of 64 channels; panels: chunks of all taps
  SpinLimit spin_limit;
};

// A block's part of the work.
template <typename Tile>
struct Place {
  int first_panel, first_filter, first_step, steps;
  unsigned part;

  __device__ __forceinline__ explicit Place(const Arguments& a) {
    const unsigned tile = blockIdx.x % a.tiles;
    part = blockIdx.x / a.tiles;
    first_panel = tile / a.tiles_across * (Tile::kM / kMapChannels);
    first_filter = tile % a.tiles_across * Tile::kN;
    first_step = part * a.steps_of_part;
    const int left = a.steps - first_step, most = a.steps_of_part;
    steps = left < most ? left : most;
  }
};

// The role of a thread for each panel of a stage, x's first: asks for it in every step.
template <typename Tile>
__device__ __forceinline__ void load_panel(const Arguments& a, const Place<Tile>& place,
                                           int panel) {
  const Product& conv = a.conv;
  const bool is_of_x = panel < Tile::kPanelsOfX;
  // Beyond the last panel channels beyond the last one, which are zeros.
  const int wanted = place.first_panel + panel, last = a.panels - 1;
  const int tap = (wanted < last ? wanted : last) / a.chunks;
  const int r = tap / conv.kernel_w, s = tap % conv.kernel_w;
  const int c = is_of_x ? (wanted - tap * a.chunks) * kMapChannels
                        : place.first_filter + (panel - Tile::kPanelsOfX) * kMapChannels;
  typename Tile::Operands operands(a.spin_limit);
#pragma unroll 1
  for (int step = 0; step < place.steps; ++step) {
    const int position = (place.first_step + step) * kStepPositions;
    const std::uint32_t to = operands.stage() * Tile::kStageBytes + panel * kPanelBytes;
    const Pixel pixel(position, a.out_height, a.out_width);
    operands.acquire(blockIdx.x);
    operands.commit_bytes(kPanelBytes);
    if (!is_of_x) {
      ptx::load_tile(to, a.grad, operands.full(), {c, position});
    } else if (conv.matrix) {
      ptx::load_tile(to, conv.x, operands.full(), {c, position});
    } else {
      const int h = pixel.h * conv.stride_h - conv.padding_h;
      const int w = pixel.w * conv.stride_w - conv.padding_w;
      ptx::load_pixels(to, conv.x, operands.full(), {c, w, h, pixel.image},
                       {static_cast<std::uint16_t>(s * conv.dilation_w),
                        static_cast<std::uint16_t>(r * conv.dilation_h)});
    }
    operands.advance();
  }
}

// The role of a warpgroup: multiplies, and writes its sums.
template <typename T, typename Tile>
__device__ __forceinline__ void consume(const Arguments& a, const Place<Tile>& place,
                                        int consumer) {
  typename Tile::Operands operands(a.spin_limit);
  Accumulators<Tile::kConsumerM, Tile::kN> acc;
  acc.template multiply<T, Tile, 1, false, Columns::kBoth>(place.steps, consumer, blockIdx.x,
                                                           operands, [] {});
  const int taps = a.conv.kernel_h * a.conv.kernel_w;
  const std::int64_t row = std::int64_t{taps} * a.conv.channels;  // of one output channel
#pragma unroll
  for (int i = 0; i < acc.kRows; ++i) {
    const int in_tile = consumer * Tile::kConsumerM + acc.row(i);
    const int panel = place.first_panel + in_tile / kMapChannels, tap = panel / a.chunks;
    const int c = (panel - tap * a.chunks) * kMapChannels + in_tile % kMapChannels;
    if (tap >= taps || c >= a.conv.channels) continue;
    float* const to = a.parts + std::int64_t{place.part} * a.out_channels * row +
                      std::int64_t{tap} * a.conv.channels + c;
#pragma unroll
    for (int j = 0; j < acc.kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < acc.kRun; ++e) {
        const int filter = place.first_filter + acc.column(j) + e;
        if (filter < a.out_channels) ptx::store_global(to + filter * row, acc.at(i, j, e));
      }
    }
  }
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(kThreads, 1)
    wgrad_sm90_kernel(const __grid_constant__ Arguments a) {
  ptx::registers_at_launch<kNumLaunchRegisters>();
  if (threadIdx.x == 0) {
    Tile::Operands::init(Tile::kPanels, kNumConsumers * kWarpgroup / 32);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::wait_for_earlier_kernels();

  const Place<Tile> place(a);
  const int warpgroup = ptx::uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 0) {
    ptx::decrease_registers<kNumProducerRegisters>();
    if (threadIdx.x < Tile::kPanels) load_panel<Tile>(a, place, threadIdx.x);
  } else {
    ptx::increase_registers<kNumConsumerRegisters>();
    consume<T, Tile>(a, place, warpgroup - 1);
  }
}

struct SumArguments {
  const float* parts;
  void* out;
  std::int64_t quads;  // elements of out, by fours
  int count;
};

constexpr int kSumThreads = 256;

// out[i] = the sum of parts[:, i], in order; a thread has four neighbours.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) sum_parts_kernel(const SumArguments a) {
  using Quad = Pack<float, 4>;
  ptx::wait_for_earlier_kernels();
  const std::int64_t i = std::int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (i >= a.quads) return;
  const Quad* from = reinterpret_cast<const Quad*>(a.parts) + i;
  Quad sum = ptx::load_global(from);
#pragma unroll 4
  for (int part = 1; part < a.count; ++part) {
    const Quad more = ptx::load_global(from += a.quads);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.value[e] += more.value[e];
  }
  ptx::store_global(static_cast<Pack<T, 4>*>(a.out) + i, pack_floats<T>(sum.value));
}

std::int64_t elements(const ConvBn& a) {
  return std::int64_t{a.out_channels} * a.conv.kernel_h * a.conv.kernel_w * a.conv.channels;
}

std::int64_t panels(const ConvBn& a) { return steps_of(a.conv); }

std::int64_t steps(const ConvBn& a) { return ceil_div(positions(a), kStepPositions); }

template <typename Tile>
std::int64_t tiles(const ConvBn& a) {
  return ceil_div(panels(a), Tile::kM / kMapChannels) * ceil_div(a.out_channels, Tile::kN);
}

struct Plan {
  std::int64_t cycles;
  int count;  // of ranges
};

// The number of ranges with which all blocks, and adding up what they write, take the fewest
// cycles of the SM with the most to do; by arithmetic, nothing of it is fitted to times.
template <typename Tile>
Plan plan(const ConvBn& a, int num_sms) {
  constexpr int kL2BytesPerCycle = 48, kDramBytesPerCycle = 14, kStart = 1500;  // of an SM
  constexpr int kMostRanges = 64;
  constexpr std::int64_t kTensor = Tile::kM * Tile::kN * kStepPositions / 2048;
  constexpr std::int64_t kStep =
      std::max<std::int64_t>(kTensor, Tile::kStageBytes / kL2BytesPerCycle);
  Plan best{INT64_MAX, 1};
  for (int count = 1; count <= kMostRanges && count <= steps(a); ++count) {
    const std::int64_t of_part = ceil_div(steps(a), count);
    if (ceil_div(steps(a), of_part) != count) continue;  // the last ones would be empty
    const std::int64_t waves = ceil_div(tiles<Tile>(a) * count, num_sms);
    const std::int64_t moved = 8 * elements(a) * count / (kDramBytesPerCycle * num_sms);
    const std::int64_t cycles = waves * (of_part * kStep + kStart) + moved;
    if (cycles < best.cycles) best = {cycles, count};
  }
  return best;
}

// Calls function(Tile()) of the type that `tile` names.
template <typename Function>
auto with_tile(WgradTile tile, Function&& function) {
  return tile == WgradTile::k256x64 ? function(Tile256x64()) : function(Tile256x128());
}

bool can_implement(const Wgrad& arguments) {
  const ConvBn& a = arguments.op;
  ConvolutionBn conv = a.conv;
  conv.weight = arguments.grad;  // which has to be aligned like it
  return a.dtype != DType::kFloat32 && a.groups == 1 && a.out_channels % 8 == 0 && can_read(conv) &&
         elements(a) > 0 && positions(a) > 0 && positions(a) + kStepPositions <= kMaxGridX &&
         tiles<Tile256x64>(a) * steps(a) <= kMaxGridX;
}

template <typename T, typename Tile>
cudaError_t run(const Wgrad& arguments, cudaStream_t stream) {
  const ConvBn& a = arguments.op;
  Arguments to{};
  cudaError_t status = encode_x(&to.conv, a, a.conv, kStepPositions);
  if (status == cudaSuccess) {
    status = encode_tiles(&to.grad, a.dtype, arguments.grad, {a.out_channels, positions(a)},
                          {kStepPositions});
  }
  if (status != cudaSuccess) return status;
  to.parts = arguments.parts;
  to.out_height = a.out_height;
  to.out_width = a.out_width;
  to.steps = static_cast<unsigned>(steps(a));
  to.steps_of_part = static_cast<unsigned>(ceil_div(steps(a), arguments.count));
  to.tiles = static_cast<unsigned>(tiles<Tile>(a));
  to.tiles_across = static_cast<unsigned>(ceil_div(a.out_channels, Tile::kN));
  to.out_channels = a.out_channels;
  to.chunks = static_cast<int>(ceil_div(a.conv.channels, kMapChannels));
  to.panels = static_cast<int>(panels(a));
  to.spin_limit = spin_limit;
  const LaunchShape shape{dim3(to.tiles * arguments.count), dim3(kThreads), Tile::kBytes, dim3(1),
                          true};
  return launch(&wgrad_sm90_kernel<T, Tile>, shape, stream, to);
}

template <typename T>
cudaError_t sum_parts(const Wgrad& arguments, cudaStream_t stream) {
  const SumArguments to{arguments.parts, arguments.out, elements(arguments.op) / 4,
                        arguments.count};
  const LaunchShape shape{dim3(grid_size(ceil_div(to.quads, kSumThreads))), dim3(kSumThreads), 0,
                          dim3(1), true};
  return launch(&sum_parts_kernel<T>, shape, stream, to);
}

}  // namespace

cudaError_t wgrad_tiles(const Wgrad& arguments, int device, std::vector<WgradTile>* found) {
  Machine machine;
  const cudaError_t status = query(device, &machine);
  if (status != cudaSuccess || !machine.sm90 || !can_implement(arguments)) return status;
  const auto time = [&](WgradTile tile) {
    return with_tile(
        tile, [&](auto t) { return plan<decltype(t)>(arguments.op, machine.num_sms).cycles; });
  };
  *found = {WgradTile::k256x64, WgradTile::k256x128};
  if (time(found->back()) < time(found->front())) std::swap(found->front(), found->back());
  return cudaSuccess;
}

cudaError_t wgrad_parts(const Wgrad& arguments, WgradTile tile, int device, int* count) {
  Machine machine;
  const cudaError_t status = query(device, &machine);
  if (status != cudaSuccess) return status;
  if (!can_implement(arguments)) return cudaErrorInvalidValue;
  *count = with_tile(
      tile, [&](auto t) { return plan<decltype(t)>(arguments.op, machine.num_sms).count; });
  return cudaSuccess;
}

cudaError_t wgrad(const Wgrad& arguments, WgradTile tile, int device, cudaStream_t stream) {
  Machine machine;
  const cudaError_t status = set_device(device, &machine);
  if (status != cudaSuccess) return status;
  if (!machine.sm90 || !can_implement(arguments)) return cudaErrorInvalidValue;
  return with_half(arguments.op.dtype, [&](auto half) {
    using T = decltype(half);
    const cudaError_t status =
        with_tile(tile, [&](auto t) { return run<T, decltype(t)>(arguments, stream); });
    if (status != cudaSuccess) return status;
    return arguments.out_dtype == DType::kFloat32 ? sum_parts<float>(arguments, stream)
                                                  : sum_parts<T>(arguments, stream);
  });
}

}  // namespace resnet_fused
