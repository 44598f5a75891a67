// A whole bottleneck block in one kernel, on mma.sync: both intermediates stay in shared memory.
//
// Algorithm: a block of threads makes 14 x 14 positions of the result, or 7 x 7 where the stride is
// 2. It multiplies the 16 x 16 pixels that these depend on by conv1's weights and stores the
// result, after batch norm and ReLU, in shared memory as 16-bit values, as a kernel of its own
// would round them; zeros where a pixel lies outside the image, since it is conv1's result that
// conv2 pads. conv2 takes its operand's rows from there, shifted by the tap; no row is copied. Its
// result replaces conv1's, and conv3 makes the output channels slice by slice, each with a
// projection's product of x's pixels in accumulators of its own, or with x itself added. Rows of 16
// positions (of 8 with stride 2) make every tap a constant distance; the last two (the last one) of
// each row are computed in vain, and so are as many rows. What conv1 makes for a neighbour's
// positions is the halo, computed by both.
//
// Tiles: 4 x 1 warps for 64 inner channels, 4 x 2 for 128; a warp makes 64 (16 with stride 2)
// positions x 64 channels, in conv3 with projection 2 x 32. Weights stream through a pipeline of
// stages (CpAsyncPipeline): of all blocks the same ones, they come from L2. The rows of a weight
// are permuted (channel_of), so that a lane's accumulators are 8 neighbouring channels, which it
// moves by 16 bytes: to shared memory, from x, to the result.
//
// Shared memory, from 0 on: the intermediate result, 290 rows (the idle ones of the last taps reach
// beyond 256) of 64 or 128 channels, their 16-byte chunks permuted against bank conflicts; a
// pipeline of 3 stages of 64 or 128 rows of 128 bytes for weights, over which lie 2 stages for the
// projection's pixels and weights; over both, before, 3 stages of pixels and conv1's weights, rows
// of 64 bytes; at the end scale and shift of bn1, bn2 and, twice, of a slice. In all 64 KiB for 64
// inner channels (76 with projection) and 129 for 128.
//
// Memory: x once, as far as L2 holds the halo (16 x 16 pixels for 14 x 14 positions, 1.3 times as
// much) and what is read again as shortcut; the result once. Writing and reading two intermediates
// is saved: of a ResNet-50's first stage, half of the memory traffic. The weights come from L2 once
// a block, 0.7 KiB a position there.
#include "kernels/cuda/bottleneck.h"
#include "kernels/cuda/bottleneck_sm90.h"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/mma_sync.cuh"

namespace resnet_fused {
namespace {

constexpr int kLine = 16;  // positions from one line of conv1's result to the next
constexpr int kPositions = kLine * kLine;
constexpr int kWarpsM = 4;
constexpr int kPixelRowBytes = 64, kWeightRowBytes = 128;

template <int kWidth_, int kStride_, bool kProjection_>
struct Tile {
  static constexpr int kWidth = kWidth_, kStride = kStride_;
  static constexpr bool kProjection = kProjection_;
  static constexpr int kWarpsN = kWidth / 64;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kBlocks = 256 / kThreads;          // that fit an SM's registers
  static constexpr int kPitch = kLine / kStride;          // from one line of the result to the next
  static constexpr int kOut = (kLine - 2) / kStride;      // lines and columns of it that count
  static constexpr int kUsed = (kOut - 1) * kStride + 3;  // the same of conv1's
  static constexpr int kRows = kPitch * kPitch;           // positions of the result
  static constexpr int kSlice = (kProjection ? 32 : 64) * kWarpsN;  // channels of conv3 at a time

  static constexpr int kInnerBytes = (kPositions + 2 * kLine + 2) * kWidth * 2;
  using First = CpAsyncPipeline<0, (kPositions + kWidth) * kPixelRowBytes, 3>;
  using Weights = CpAsyncPipeline<kInnerBytes, kWidth * kWeightRowBytes, 3>;
  using Second = CpAsyncPipeline<kInnerBytes, (kRows + kSlice) * kPixelRowBytes, 2>;
  static constexpr int max(int a, int b) { return a > b ? a : b; }
  static constexpr int kScaleShift =
      max(max(First::kEnd, Weights::kEnd), kProjection ? Second::kEnd : 0);
  static constexpr int kSliceScaleShifts = kSlice * (kProjection ? 2 : 1);
  static constexpr int kSharedBytes =
      kScaleShift + (2 * kWidth + 2 * kSliceScaleShifts) * static_cast<int>(kScaleShiftBytes);
};

struct Arguments {
  Bottleneck block;
  void* out;
  int out_height, out_width;
  int tiles_h, tiles_w;
};

// The output channel whose weights are a row of the operand, and whose result a column of the mma
// instructions: lane % 4 = t holds columns 8 j + 2 t and the next, which in four j are the channels
// 8 t to 8 t + 7.
__device__ __forceinline__ int channel_of(int row) {
  return row / 32 * 32 + row % 8 / 2 * 8 + row % 32 / 8 * 2 + row % 2;
}

// The byte offset of a chunk of a position of the intermediate result. Neighbouring rows differ in
// bit 2 of the permutation: two rows of 4 chunks each, which 8 lanes store at a time, fill all
// banks once, as do 8 rows of one chunk.
template <int kWidth>
__device__ __forceinline__ std::uint32_t inner_offset(int row, int chunk) {
  return row * kWidth * 2 + (chunk ^ (row % 2 * 4 + row / 2 % 4)) * kChunkBytes;
}

// A producer: loads kColumns rows of a weight, from an output channel on, step by step: the taps in
// order, of each kRowBytes after kRowBytes of depth. Zeros beyond the channels.
template <typename T, int kThreads, int kColumns, int kRowBytes>
class WeightLoader {
 public:
  __device__ __forceinline__ WeightLoader(const void* weight, int out_channels, int taps, int depth)
      : weight_(static_cast<const T*>(weight)),
        out_channels_(out_channels),
        taps_(taps),
        depth_(depth) {}

  __device__ __forceinline__ void restart(int first_channel) {
    first_ = first_channel;
    tap_ = c_ = 0;
  }

  __device__ __forceinline__ int steps() const { return taps_ * ((depth_ + kDepth - 1) / kDepth); }

  // The first channel of depth of the next step.
  __device__ __forceinline__ int depth() const { return c_; }

  __device__ __forceinline__ void load(std::uint32_t stage) {
    const int column = threadIdx.x % kChunks, c = c_ + column * kLanes;
#pragma unroll
    for (int i = 0; i < kColumns / kRowsAtOnce; ++i) {
      const int row = threadIdx.x / kChunks + i * kRowsAtOnce, channel = first_ + channel_of(row);
      const bool inside = channel < out_channels_ && c < depth_;
      const std::int64_t at = (std::int64_t(channel) * taps_ + tap_) * depth_ + c;
      ptx::cp_async_16(stage + swizzle<kRowBytes>(row, column), inside ? weight_ + at : weight_,
                       inside);
    }
    c_ += kDepth;
    if (c_ >= depth_) {
      c_ = 0;
      ++tap_;
    }
  }

 private:
  static constexpr int kLanes = kChunkBytes / sizeof(T), kDepth = kRowBytes / sizeof(T);
  static constexpr int kChunks = kRowBytes / kChunkBytes, kRowsAtOnce = kThreads / kChunks;
  static_assert(kColumns % kRowsAtOnce == 0);

  const T* const weight_;
  const int out_channels_, taps_, depth_;
  int first_ = 0, tap_ = 0, c_ = 0;  // of the next step
};

// A producer: loads both operands of a 1 x 1 convolution of x: kPitch x kPitch pixels from (h, w)
// on, of which kUsed x kUsed count, and kColumns rows of its weight. Zeros outside the image.
template <typename T, int kThreads, int kPitch, int kUsed, int kColumns>
class PixelLoader {
 public:
  __device__ __forceinline__ PixelLoader(const Bottleneck& a, const Layer& layer, int out_channels,
                                         std::int64_t image, int h, int w, int stride)
      : x_(static_cast<const T*>(a.x)),
        weights_(layer.weight, out_channels, 1, a.channels),
        channels_(a.channels) {
    const int line = row() / kPitch, column = row() % kPitch;
    const int y = h + line * stride, x = w + column * stride;
    at_ = ((image * a.height + y) * a.width + x) * a.channels;
    down_ = std::int64_t(kLines * stride) * a.width * a.channels;
    const bool inside = static_cast<unsigned>(x) < static_cast<unsigned>(a.width) && column < kUsed;
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
      const bool counts =
          inside && line + i * kLines < kUsed &&
          static_cast<unsigned>(y + i * kLines * stride) < static_cast<unsigned>(a.height);
      inside_ |= unsigned{counts} << i;
    }
  }

  __device__ __forceinline__ void restart(int first_channel) { weights_.restart(first_channel); }

  __device__ __forceinline__ int steps() const { return weights_.steps(); }

  __device__ __forceinline__ void load(std::uint32_t stage) {
    const int column = threadIdx.x % kChunks;
    const int c = weights_.depth() + column * static_cast<int>(kChunkBytes / sizeof(T));
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
      const bool valid = (inside_ >> i & 1) != 0 && c < channels_;
      ptx::cp_async_16(stage + swizzle<kPixelRowBytes>(row() + i * kRowsAtOnce, column),
                       valid ? x_ + (at_ + i * down_ + c) : x_, valid);
    }
    weights_.load(stage + kPitch * kPitch * kPixelRowBytes);
  }

 private:
  static constexpr int kChunks = kPixelRowBytes / kChunkBytes, kRowsAtOnce = kThreads / kChunks;
  static constexpr int kTimes = kPitch * kPitch / kRowsAtOnce, kLines = kRowsAtOnce / kPitch;
  static_assert(kPitch * kPitch % kRowsAtOnce == 0 && kRowsAtOnce % kPitch == 0);

  __device__ __forceinline__ static int row() { return threadIdx.x / kChunks; }

  const T* const x_;
  WeightLoader<T, kThreads, kColumns, kPixelRowBytes> weights_;
  const int channels_;
  std::int64_t at_, down_;  // this thread's first pixel, and from one of its pixels to the next
  unsigned inside_ = 0;     // which of them are copied, by bit
};

// A warp's kM positions x kN channels; `column` counts the columns of the mma instructions, as
// scale and shift in shared memory do.
template <typename T, int kWarpsN, int kM, int kN>
class Product : public WarpTile<T, kM, kN> {
 public:
  using Warp = WarpTile<T, kM, kN>;
  static constexpr int kGroups = kN / 32;

  __device__ __forceinline__ static int first_row() { return threadIdx.x / 32 / kWarpsN * kM; }
  __device__ __forceinline__ static int first_column() { return threadIdx.x / 32 % kWarpsN * kN; }
  __device__ __forceinline__ int row(int i) const {
    return first_row() + 8 * i + threadIdx.x % 32 / 4;
  }
  __device__ __forceinline__ int column(int j) const {
    return first_column() + 8 * j + threadIdx.x % 4 * 2;
  }
  // The first of the 8 channels that this lane has in a group of 32.
  __device__ __forceinline__ int channel(int group) const {
    return first_column() + 32 * group + threadIdx.x % 4 * 8;
  }
  __device__ __forceinline__ void copy_octet(int i, int group, float (&to)[8]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) to[e] = Warp::at(i, 4 * group + e / 2, e % 2);
  }

  // Adds the product of pixels and weights at `stage`.
  __device__ __forceinline__ void multiply_pixels(std::uint32_t stage) {
    const int a_row = first_row() + Warp::a_row(), b_row = first_column() + Warp::b_row();
    const std::uint32_t b_operand = stage + kM * kWarpsM * kPixelRowBytes;
#pragma unroll
    for (int chunk = 0; chunk < kPixelRowBytes / kChunkBytes; chunk += 2) {
      Warp::multiply_chunks(
          [&](int i) {
            return stage + swizzle<kPixelRowBytes>(a_row + 16 * i, chunk + Warp::a_half());
          },
          [&](int j) {
            return b_operand + swizzle<kPixelRowBytes>(b_row + 16 * j, chunk + Warp::b_half());
          });
    }
  }

  // Adds the product of positions of the intermediate result, from chunk `first` on, and the
  // weights at `stage`. `row` is the one that this lane names of the first 16.
  template <int kWidth>
  __device__ __forceinline__ void multiply_inner(int row, int first, std::uint32_t stage) {
    const int b_row = first_column() + Warp::b_row();
#pragma unroll
    for (int chunk = 0; chunk < kWeightRowBytes / kChunkBytes; chunk += 2) {
      Warp::multiply_chunks(
          [&](int i) { return inner_offset<kWidth>(row + 16 * i, first + chunk + Warp::a_half()); },
          [&](int j) {
            return stage + swizzle<kWeightRowBytes>(b_row + 16 * j, chunk + Warp::b_half());
          });
    }
  }
};

// Stores `acc` after ReLU as the next convolution's operand: lines of kPitch positions from (h, w)
// on; zeros outside the image of height x width. Position n becomes row place(n).
template <typename T, int kWidth, int kPitch, typename Product, typename Place>
__device__ __forceinline__ void store_inner(Product& acc, int h, int w, int height, int width,
                                            Place place) {
  const Epilogue<T> epilogue(true);
#pragma unroll
  for (int i = 0; i < Product::kRows; ++i) {
    const int row = acc.row(i);
    const bool inside = static_cast<unsigned>(h + row / kPitch) < static_cast<unsigned>(height) &&
                        static_cast<unsigned>(w + row % kPitch) < static_cast<unsigned>(width);
#pragma unroll
    for (int group = 0; group < Product::kGroups; ++group) {
      float y[8];
      acc.copy_octet(i, group, y);
      const Pack<T, 8> values = epilogue.pack(y);
      ptx::store_shared(inner_offset<kWidth>(place(row), acc.channel(group) / 8),
                        inside ? values : Pack<T, 8>{});
    }
  }
}

// Adds x where it is the shortcut, and writes a slice of the result from channel `first` on.
template <typename T, typename Tile, typename Product>
__device__ __forceinline__ void store_slice(const Arguments& a, Product& acc, std::int64_t image,
                                            int p, int q, int first) {
  using Octet = Pack<T, 8>;
  const Epilogue<T> epilogue(true);
#pragma unroll
  for (int i = 0; i < Product::kRows; ++i) {
    const int line = acc.row(i) / Tile::kPitch, column = acc.row(i) % Tile::kPitch;
    if (line >= Tile::kOut || column >= Tile::kOut || p + line >= a.out_height ||
        q + column >= a.out_width) {
      continue;
    }
    const std::int64_t position = (image * a.out_height + p + line) * a.out_width + q + column;
#pragma unroll
    for (int group = 0; group < Product::kGroups; ++group) {
      const int channel = first + acc.channel(group);
      if (channel >= a.block.out_channels) continue;
      const std::int64_t at = position * a.block.out_channels + channel;
      float y[8];
      acc.copy_octet(i, group, y);
      if constexpr (!Tile::kProjection) {
        const T* const x = static_cast<const T*>(a.block.x) + at;
        epilogue.add(y, ptx::load_global(reinterpret_cast<const Octet*>(x)));
      }
      ptx::store_global(reinterpret_cast<Octet*>(static_cast<T*>(a.out) + at), epilogue.pack(y));
    }
  }
}

template <int kThreads>
__device__ __forceinline__ void load_permuted_scale_shift(std::uint32_t to, const BatchNorm& bn,
                                                          int first, int channels, int stored) {
  load_scale_shift(to, bn, first, channels - first, stored, threadIdx.x, kThreads,
                   [](int i) { return channel_of(i); });
}

// Grid: images x tiles down x tiles across.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    bottleneck_kernel(const __grid_constant__ Arguments a) {
  constexpr int kWidth = Tile::kWidth, kStride = Tile::kStride, kPitch = Tile::kPitch;
  constexpr int kThreads = Tile::kThreads, kWarpsN = Tile::kWarpsN, kSlice = Tile::kSlice;
  constexpr int kWarpRows = Tile::kRows / kWarpsM;
  constexpr std::uint32_t kScaleShift1 = Tile::kScaleShift;
  constexpr std::uint32_t kScaleShift2 = kScaleShift1 + kWidth * kScaleShiftBytes;
  constexpr std::uint32_t kScaleShift3 = kScaleShift2 + kWidth * kScaleShiftBytes;
  using First = typename Tile::First;
  using Weights = typename Tile::Weights;
  using Second = typename Tile::Second;

  const Bottleneck& b = a.block;
  const std::int64_t image = blockIdx.x / (a.tiles_h * a.tiles_w);
  const int tile = blockIdx.x % (a.tiles_h * a.tiles_w);
  const int p = tile / a.tiles_w * Tile::kOut, q = tile % a.tiles_w * Tile::kOut;
  const int h = p * kStride - 1, w = q * kStride - 1;

  WeightLoader<T, kThreads, kWidth, kWeightRowBytes> weights2(b.conv2.weight, b.inner, 9, b.inner);
  {
    PixelLoader<T, kThreads, kLine, Tile::kUsed, kWidth> pixels(b, b.conv1, b.inner, image, h, w,
                                                                1);
    First::start(pixels);
    load_permuted_scale_shift<kThreads>(kScaleShift1, b.conv1.bn, 0, b.inner, kWidth);
    load_permuted_scale_shift<kThreads>(kScaleShift2, b.conv2.bn, 0, b.inner, kWidth);
    Product<T, kWarpsN, kPositions / kWarpsM, 64> acc;
    First::run(pixels, [&](std::uint32_t stage) { acc.multiply_pixels(stage); });
    __syncthreads();  // the stages are read
    Weights::start(weights2);
    Epilogue<T>::normalise(acc, kScaleShift1);
    // With stride 2 a tap takes every other column: the even ones of a line, then the odd ones.
    store_inner<T, kWidth, kLine>(acc, h, w, b.height, b.width, [](int row) {
      return kStride == 1 ? row : row / kLine * kLine + row % 2 * kPitch + row % kLine / 2;
    });
  }

  WeightLoader<T, kThreads, kSlice, kWeightRowBytes> weights3(b.conv3.weight, b.out_channels, 1,
                                                              b.inner);
  PixelLoader<T, kThreads, kPitch, Tile::kOut, kSlice> projected_pixels(
      b, b.projection, b.out_channels, image, p * kStride, q * kStride, kStride);
  // Two sets of a slice's scale and shift: others may still use those of the slice before.
  const auto scale_shift_of_slice = [](int first) {
    return kScaleShift3 + first / kSlice % 2 * Tile::kSliceScaleShifts * kScaleShiftBytes;
  };
  const auto start_slice = [&](int first) {
    weights3.restart(first);
    if constexpr (Tile::kProjection) {
      projected_pixels.restart(first);
      Second::start(projected_pixels);
      load_permuted_scale_shift<kThreads>(scale_shift_of_slice(first) + kSlice * kScaleShiftBytes,
                                          b.projection.bn, first, b.out_channels, kSlice);
    } else {
      Weights::start(weights3);
    }
    load_permuted_scale_shift<kThreads>(scale_shift_of_slice(first), b.conv3.bn, first,
                                        b.out_channels, kSlice);
  };
  {
    Product<T, kWarpsN, kWarpRows, 64> acc;
    const int row = acc.first_row() + threadIdx.x % 16;
    const int under = row / kPitch * kStride * kLine + row % kPitch;  // the first tap
    int r = 0, s = 0, chunk = 0;
    Weights::run(weights2, [&](std::uint32_t stage) {
      const int tap = r * kLine + (kStride == 1 ? s : s % 2 * kPitch + s / 2);
      acc.template multiply_inner<kWidth>(under + tap, chunk, stage);
      chunk += kWeightRowBytes / kChunkBytes;
      if (chunk == kWidth / 8) {
        chunk = 0;
        if (++s == 3) {
          s = 0;
          ++r;
        }
      }
    });
    __syncthreads();  // conv1's result and the stages are read
    start_slice(0);
    Epilogue<T>::normalise(acc, kScaleShift2);
    store_inner<T, kWidth, kPitch>(acc, p, q, a.out_height, a.out_width,
                                   [](int row) { return row; });
  }

  using Slice = Product<T, kWarpsN, kWarpRows, kSlice / kWarpsN>;
#pragma unroll 1
  for (int first = 0; first < b.out_channels; first += kSlice) {
    Slice projected;
    if constexpr (Tile::kProjection) {
      Second::run(projected_pixels, [&](std::uint32_t stage) { projected.multiply_pixels(stage); });
      __syncthreads();  // the stages are read
      Weights::start(weights3);
      Epilogue<T>::normalise(projected, scale_shift_of_slice(first) + kSlice * kScaleShiftBytes);
    }
    Slice acc;
    const int row = acc.first_row() + threadIdx.x % 16;
    int chunk = 0;
    Weights::run(weights3, [&](std::uint32_t stage) {
      acc.template multiply_inner<kWidth>(row, chunk, stage);
      chunk += kWeightRowBytes / kChunkBytes;
    });
    Epilogue<T>::normalise(acc, scale_shift_of_slice(first));
    if (first + kSlice < b.out_channels) {
      __syncthreads();  // the stages are read
      start_slice(first + kSlice);
    }
    if constexpr (Tile::kProjection) acc.add(projected);
    store_slice<T, Tile>(a, acc, image, p, q, first);
  }
}

// A plan, and what the heuristic knows of its tiles.
struct Plan : LaunchPlan<Arguments> {
  int positions = 0;  // of the result that a block computes
  int width = 0;      // inner channels that it computes
};

template <typename T, typename Tile>
Plan plan_of(void* out, const Bottleneck& a) {
  Plan plan;
  Arguments& to = plan.arguments;
  to = {a, out, strided(a.height, a.stride), strided(a.width, a.stride), 0, 0};
  to.tiles_h = static_cast<int>(ceil_div(to.out_height, Tile::kOut));
  to.tiles_w = static_cast<int>(ceil_div(to.out_width, Tile::kOut));
  plan.kernel = &bottleneck_kernel<T, Tile>;
  plan.shape = {dim3(grid_size(a.batch * to.tiles_h * to.tiles_w)), dim3(Tile::kThreads),
                Tile::kSharedBytes};
  plan.positions = Tile::kRows;
  plan.width = Tile::kWidth;
  return plan;
}

template <typename T, int kWidth>
Plan plan_width(void* out, const Bottleneck& a) {
  const bool projection = a.projection.weight != nullptr;
  if (a.stride == 1) {
    return projection ? plan_of<T, Tile<kWidth, 1, true>>(out, a)
                      : plan_of<T, Tile<kWidth, 1, false>>(out, a);
  }
  return a.stride == 2 && projection ? plan_of<T, Tile<kWidth, 2, true>>(out, a) : Plan{};
}

template <typename T>
Plan plan_dtype(void* out, const Bottleneck& a) {
  return a.inner > 64 ? plan_width<T, 128>(out, a) : plan_width<T, 64>(out, a);
}

// Without a kernel where none can implement it on `device`. On sm_90 a kernel for each layer, on
// wgmma, is faster: an H200 takes 546 us for those of a block of stage 1 and 974 for this one.
Plan make_plan(void* out, const Bottleneck& a, int device) {
  bool sm90 = false;
  if (runs_sm90(device, &sm90) != cudaSuccess || sm90) return {};
  if (a.channels % 8 != 0 || a.inner % 8 != 0 || a.out_channels % 8 != 0) return {};
  if (a.projection.weight == nullptr && a.channels != a.out_channels) return {};
  for (const void* pointer :
       {a.x, a.conv1.weight, a.conv2.weight, a.conv3.weight, a.projection.weight}) {
    if (!aligned(pointer)) return {};
  }
  if (a.inner > 128 || a.dtype == DType::kFloat32) return {};
  const Plan plan =
      a.dtype == DType::kFloat16 ? plan_dtype<__half>(out, a) : plan_dtype<__nv_bfloat16>(out, a);
  int most = 0;  // bytes of shared memory of a block
  const cudaError_t status =
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const bool fits = take_error(status) == cudaSuccess &&
                    plan.shape.shared_bytes <= static_cast<std::size_t>(most);
  return fits ? plan : Plan{};
}

}  // namespace

#ifndef RESNET_FUSED_SM90
bool bottleneck_sm90_can_implement(const Bottleneck&, int) { return false; }
cudaError_t bottleneck_sm90(void*, const Bottleneck&, int, cudaStream_t) {
  return cudaErrorInvalidValue;
}
#endif

bool bottleneck_can_implement(const Bottleneck& arguments, int device) {
  return make_plan(nullptr, arguments, device).kernel != nullptr;
}

bool bottleneck_is_profitable(const Bottleneck& arguments, int device) {
  const Bottleneck& a = arguments;
  const Plan plan = make_plan(nullptr, a, device);
  int num_sms = 0;
  if (plan.kernel == nullptr || get_num_sms(device, &num_sms) != cudaSuccess) return false;
  // Of what the kernel computes, and elements that kernels for each layer move.
  constexpr double kMultiplyAddsPerElement = 128;
  const double pixels = double(a.batch) * a.height * a.width;
  const double positions = double(a.batch) * plan.arguments.out_height * plan.arguments.out_width;
  const bool projection = a.projection.weight != nullptr;
  const double width = plan.width, channels = a.channels, out_channels = a.out_channels;
  const double products =
      kPositions * channels * width +
      plan.positions * (9 * width * width + (width + (projection ? channels : 0)) * out_channels);
  const double moved =
      pixels * (channels + 2 * a.inner) + positions * (2 * a.inner + a.channels + a.out_channels);
  const double tiles = plan.shape.grid.x;
  return tiles >= num_sms && products * tiles <= kMultiplyAddsPerElement * moved;
}

cudaError_t bottleneck(void* out, const Bottleneck& arguments, int device, cudaStream_t stream) {
  const Plan plan = make_plan(out, arguments, device);
  if (plan.kernel == nullptr || !aligned(out)) return cudaErrorInvalidValue;
  if (arguments.batch == 0 || arguments.height == 0 || arguments.width == 0) return cudaSuccess;
  const cudaError_t status = set_device(device);
  return status == cudaSuccess ? launch(plan, stream) : status;
}

}  // namespace resnet_fused
