// A whole bottleneck block in one kernel for sm_90a: wgmma, the image taken line by line, weights
// in registers.
//
// Algorithm: persistent blocks take jobs: lines of an image, or of a strip of it where it is wider
// than 56 columns. Products are weights times pixels, so that their rows are 64 channels and their
// columns the 56 pixels of a line, which is the width of an image of stage 1 at 224 pixels. A
// warpgroup holds the weights of its convolution as operand A in registers for good, and a lane the
// batch norm of its two channels; shared memory is read for pixels alone, once a convolution. Three
// warpgroups work at different lines at once. The first makes conv1's lines, after batch norm and
// ReLU and as 16-bit values, in a ring of lines in shared memory, with zeros where a pixel lies
// outside the image, since it is conv1's result that conv2 pads. The second makes conv2's: a tap's
// operand is one of the three lines around it, from row 0, 1 or 2 on: the window moves by whole
// rows of 128 bytes, while the swizzle goes by addresses, so that the descriptors' base offset
// stays 0. The third makes conv3's lines, 64 channels at a time, the next 64's products under way
// while it adds x to the last ones, or a projection's product of x in accumulators of its own.
// Results pass through shared memory as rows of pixels, transposed on the way (stmatrix), and leave
// by bulk stores; where x is the shortcut, they take x's place there. Every line of conv1 is
// computed once a job: the halo is two lines.
//
// Roles: warp 0 copies x's lines (bulk copies, zeros outside the image); warpgroups 1 to 3 are
// conv1 to conv3.
//
// Shared memory, from 0 on: 6 lines of x, of up to 4 panels of 64 channels; 2 lines of conv2's
// result; with a projection, 2 lines of the block's result and the projection's weights; the ring
// of conv1's lines, of a column more at both ends; scale and shift of conv3; mbarriers. 222.5 KiB
// with x as shortcut (5 lines in the ring), 201.7 KiB with a projection (6).
//
// Of a line with x as shortcut, 256 channels, 261 KiB cross shared memory: 119 that products read,
// 28 that copies write, 14 from convolution to convolution, 84 of shortcut and result, 16 of scale
// and shift; 2,090 cycles, beside 1,904 of products.
//
// Pipelines (arrivals that fill / that empty a stage): pixels (1 and their bytes / 1: lines of the
// halo are done with conv1, the others with the result), lines (1 / the 4 warps of conv2, each
// behind its last product of the line), operand of conv3 (1 / the 4 warps of conv3).
//
// Memory: x and the result once, the floor, and the weights from L2 once a block.
#include <cstdint>
#include <cstring>

#include "kernels/cuda/bottleneck_sm90.h"
#include "kernels/cuda/channel_rows.cuh"
#include "kernels/cuda/conv_sm90.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/launch.h"

namespace resnet_fused {
namespace {

constexpr int kThreads = 4 * kWarpgroup;
constexpr int kN = 56;         // pixels of a line: columns of a product
constexpr int kRuns = kN / 8;  // of 8 pixels, of which a lane holds two
constexpr int kTiles = 4;      // of 64 output channels, at most
constexpr int kTaps = 9;
constexpr int kDepths = 4;                   // products of depth 16 in a panel
constexpr int kPanelBytes = kN * kRowBytes;  // of 64 channels of a line
constexpr int kPitch = kN + 2;               // rows of a line of the ring
constexpr int kLineBytes = kPitch * kRowBytes;

// Registers of a thread: at launch, of the warps that copy, of each convolution.
constexpr int kLaunchRegisters = 128, kCopyRegisters = 24;
template <bool kProjection>
struct Registers {
  static constexpr int kConv1 = kProjection ? 80 : 120;
  static constexpr int kConv2 = 200;
  static constexpr int kConv3 = kProjection ? 208 : 168;
  static_assert(kCopyRegisters + kConv1 + kConv2 + kConv3 <= 4 * kLaunchRegisters);
};

// What lies where in shared memory.
template <bool kProjection>
struct Layout {
  static constexpr int kDepth = kProjection ? 1 : kTiles;  // panels of x's channels
  static constexpr int kPixelStages = 6, kOperandStages = 2;
  static constexpr int kLines = kProjection ? 6 : 5;
  // With a projection, its product reads a row behind the line's where strips have a halo.
  static constexpr std::uint32_t kPixelBytes =
      kProjection ? kPanelBytes + 8 * kRowBytes : kTiles * kPanelBytes;
  static constexpr std::uint32_t kResultBytes = kProjection ? kTiles * kPanelBytes : 0;
  static constexpr std::uint32_t kProjectedBytes = kProjection ? kTiles * 64 * kRowBytes : 0;
  static constexpr std::uint32_t kPixels = 0;
  static constexpr std::uint32_t kOperand = kPixels + kPixelStages * kPixelBytes;
  static constexpr std::uint32_t kResult = kOperand + kOperandStages * kPanelBytes;
  static constexpr std::uint32_t kProjected = kResult + 2 * kResultBytes;
  static constexpr std::uint32_t kRing = kProjected + kProjectedBytes;
  static constexpr std::uint32_t kScaleShift = kRing + kLines * kLineBytes;
  static constexpr std::uint32_t kProjectedScaleShift =
      kScaleShift + 64 * kTiles * kScaleShiftBytes;
  static constexpr std::uint32_t kMbarriers =
      kProjectedScaleShift + (kProjection ? 64 * kTiles * kScaleShiftBytes : 0);
  using Pixels = Pipeline<PipelineId::kBottleneckPixels, kMbarriers, kPixelStages>;
  using Lines = Pipeline<PipelineId::kBottleneckLines, Pixels::kEnd, kLines>;
  using Operand = Pipeline<PipelineId::kBottleneckOperand, Lines::kEnd, kOperandStages>;
  static constexpr int kBytes = static_cast<int>(Operand::kEnd);
  static_assert(kProjected % 1024 == 0 && kResult % 1024 == 0 && kBytes <= 227 * 1024);
};

struct Arguments {
  Bottleneck block;
  CUtensorMap x, out;
  int columns, strips;  // of the result: of a strip, across
  int halo;  // columns that conv1 makes beside a strip's at each end: 1, or 0 for one strip
  int lines, segments;  // of a job, down
  int tiles;            // of 64 output channels
  unsigned jobs;
  SpinLimit spin_limit;
};

// This block's jobs: lines of the result, of a strip of an image.
class JobScheduler {
 public:
  __device__ __forceinline__ explicit JobScheduler(const Arguments& a) : a_(a) { locate(); }

  __device__ __forceinline__ bool valid() const { return job_ < a_.jobs; }
  __device__ __forceinline__ void advance() {
    job_ += gridDim.x;
    locate();
  }
  __device__ __forceinline__ int job() const { return static_cast<int>(job_); }
  // Whether x has the line that many lines below the job's first one.
  __device__ __forceinline__ bool has(int i) const {
    return static_cast<unsigned>(line + i) < static_cast<unsigned>(a_.block.height);
  }

  int image, line, lines, column;

 private:
  __device__ __forceinline__ void locate() {
    const unsigned row = job_ / a_.strips;
    column = job_ % a_.strips * a_.columns;
    image = row / a_.segments;
    line = row % a_.segments * a_.lines;
    lines = a_.block.height - line < a_.lines ? a_.block.height - line : a_.lines;
  }

  const Arguments& a_;
  unsigned job_ = blockIdx.x;
};

// A lane's part of 64 x 16 weights, wgmma's operand A: `from` is that of channel 0, their rows lie
// `stride` elements apart, and `rows` and `depth` of them are there; zeros beyond.
template <typename T>
__device__ __forceinline__ void load_weights(std::uint32_t (&to)[4], const void* from,
                                             std::int64_t stride, int rows, int depth) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int k = threadIdx.x % 4 * 2 + i / 2 * 8;
    to[i] = 0;
    if (row(i % 2) < rows && k < depth) {
      to[i] = ptx::load_global(reinterpret_cast<const std::uint32_t*>(static_cast<const T*>(from) +
                                                                      row(i % 2) * stride + k));
    }
  }
}

// Those of 64 x 64.
template <typename T>
__device__ __forceinline__ void load_weights(std::uint32_t (&to)[kDepths][4], const void* from,
                                             std::int64_t stride, int rows, int depth) {
#pragma unroll
  for (int k = 0; k < kDepths; ++k) {
    load_weights<T>(to[k], static_cast<const T*>(from) + 16 * k, stride, rows, depth - 16 * k);
  }
}

// 16-bit values of a lane's channels, of two neighbouring pixels in each run of 8.
using Pairs = std::uint32_t[kRuns][2];

// The pixels of a panel from row `halo` on; behind the last one comes the last one again.
__device__ __forceinline__ void load_pairs(Pairs& pairs, std::uint32_t line, int halo) {
  const std::uint32_t from = matrix_row(line + halo * kRowBytes);
#pragma unroll
  for (int j = 0; j + 1 < kRuns; j += 2) {
    std::uint32_t loaded[4];
    ptx::ldmatrix_trans(loaded, from + j * 8 * kRowBytes);
#pragma unroll
    for (int k = 0; k < 4; ++k) pairs[j + k / 2][k % 2] = loaded[k];
  }
  const bool beyond = threadIdx.x % 8 + halo == 8;
  ptx::ldmatrix_trans(pairs[kRuns - 1], beyond ? matrix_row(line) + (kRuns - 1) * 8 * kRowBytes
                                               : from + (kRuns - 1) * 8 * kRowBytes);
}

using Acc = float[kN / 2];

// The role of one thread: copies the lines of x.
template <bool kProjection>
__device__ __forceinline__ void load_pixels(const Arguments& a) {
  using Shared = Layout<kProjection>;
  typename Shared::Pixels pixels(a.spin_limit);
#pragma unroll 1
  for (JobScheduler at(a); at.valid(); at.advance()) {
#pragma unroll 1
    for (int i = -1; i <= at.lines; ++i) {
      if (!at.has(i)) continue;
      pixels.acquire(at.job());
      pixels.commit_bytes(Shared::kDepth * kPanelBytes);
#pragma unroll 1
      for (int p = 0; p < Shared::kDepth; ++p) {
        ptx::load_tile(Shared::kPixels + pixels.stage() * Shared::kPixelBytes + p * kPanelBytes,
                       a.x, pixels.full(),
                       {p * kMapChannels, at.column - a.halo, at.line + i, at.image});
      }
      pixels.advance();
    }
  }
}

// The role of a warpgroup: conv1's lines, zeros outside the image.
template <typename T, bool kProjection>
__device__ __forceinline__ void make_conv1(const Arguments& a) {
  using Shared = Layout<kProjection>;
  constexpr unsigned kUnit = ptx::kDescriptorUnit;
  const Bottleneck& b = a.block;
  std::uint32_t weights[Shared::kDepth][kDepths][4];
#pragma unroll
  for (int p = 0; p < Shared::kDepth; ++p) {
    load_weights<T>(weights[p], static_cast<const T*>(b.conv1.weight) + 64 * p, b.channels, b.inner,
                    b.channels - 64 * p);
  }
  const Channels channels = channels_of(b.conv1.bn, 0, b.inner);
  const std::uint64_t stages = ptx::matrix_descriptor(Shared::kPixels);
  typename Shared::Pixels pixels(a.spin_limit);
  typename Shared::Lines lines(a.spin_limit);
#pragma unroll 1
  for (JobScheduler at(a); at.valid(); at.advance()) {
#pragma unroll 1
    for (int i = -1; i <= at.lines; ++i) {
      const bool inside = at.has(i);
      const auto to = [&] {
        lines.acquire(at.job());
        return Shared::kRing + lines.stage() * kLineBytes + (1 - a.halo) * kRowBytes;
      };
      if (inside) {
        Acc acc;
        const std::uint64_t stage = stages + pixels.stage() * (Shared::kPixelBytes / kUnit);
        pixels.wait(at.job());
        ptx::wgmma_fence(acc);
#pragma unroll
        for (int p = 0; p < Shared::kDepth; ++p) {
#pragma unroll
          for (int k = 0; k < kDepths; ++k) {
            ptx::wgmma<T>(acc, weights[p][k], stage + p * (kPanelBytes / kUnit) + k * (32 / kUnit),
                          p + k > 0);
          }
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>(acc);
        const int first = at.column - a.halo + threadIdx.x % 4 * 2;
        store_line<kRuns>(to(), [&](int j, int half) {
          const auto mask = [&](int e) {
            const unsigned column = first + 8 * j + e, width = b.width;
            return column < width ? 0xffffu << 16 * e : 0u;
          };
          return finish<T>(acc, j, half, channels) & (mask(0) | mask(1));
        });
      } else {
        store_line<kRuns>(to(), [](int, int) { return 0u; });
      }
      ptx::fence_proxy_async();
      ptx::named_barrier(1, kWarpgroup);
      if (threadIdx.x % kWarpgroup == 0) {
        lines.commit();
        if (inside && (i < 0 || i == at.lines)) pixels.release();
      }
      lines.advance();
      if (inside) pixels.advance();
    }
  }
}

// The role of a warpgroup: conv2's lines.
template <typename T, bool kProjection>
__device__ __forceinline__ void make_conv2(const Arguments& a) {
  using Shared = Layout<kProjection>;
  constexpr unsigned kUnit = ptx::kDescriptorUnit;
  const Bottleneck& b = a.block;
  std::uint32_t weights[kTaps][kDepths][4];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    load_weights<T>(weights[tap], static_cast<const T*>(b.conv2.weight) + tap * b.inner,
                    std::int64_t{kTaps} * b.inner, b.inner, b.inner);
  }
  const Channels channels = channels_of(b.conv2.bn, 0, b.inner);
  const std::uint64_t ring = ptx::matrix_descriptor(Shared::kRing);
  typename Shared::Lines lines(a.spin_limit);
  typename Shared::Operand operand(a.spin_limit);
  const auto release = [&](int stage) {
    if (threadIdx.x % 32 == 0) Shared::Lines::release(stage);
  };
#pragma unroll 1
  for (JobScheduler at(a); at.valid(); at.advance()) {
    int stages[3];  // of the lines around the one that is made
    const auto next = [&] {
      const int stage = lines.stage();
      lines.wait(at.job());
      lines.advance();
      return stage;
    };
    stages[0] = next();
    stages[1] = next();
#pragma unroll 1
    for (int i = 0; i < at.lines; ++i) {
      stages[2] = next();
      Acc acc;
      ptx::wgmma_fence(acc);
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const std::uint64_t pixels =
            ring + stages[tap / 3] * (kLineBytes / kUnit) + tap % 3 * (kRowBytes / kUnit);
#pragma unroll
        for (int k = 0; k < kDepths; ++k) {
          ptx::wgmma<T>(acc, weights[tap][k], pixels + k * (32 / kUnit), tap + k > 0);
        }
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>(acc);
      release(stages[0]);
      stages[0] = stages[1];
      stages[1] = stages[2];
      operand.acquire(at.job());
      store_line<kRuns>(Shared::kOperand + operand.stage() * kPanelBytes,
                        [&](int j, int half) { return finish<T>(acc, j, half, channels); });
      ptx::fence_proxy_async();
      ptx::named_barrier(2, kWarpgroup);
      if (threadIdx.x % kWarpgroup == 0) operand.commit();
      operand.advance();
    }
    release(stages[0]);
    release(stages[1]);
  }
}

// The role of a warpgroup: lines of the result.
template <typename T, bool kProjection>
class Conv3 {
 public:
  __device__ __forceinline__ explicit Conv3(const Arguments& a) : a_(a) {
    const Bottleneck& b = a.block;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const int left = b.out_channels - 64 * m;
      load_weights<T>(weights_[m],
                      static_cast<const T*>(b.conv3.weight) + std::int64_t{64} * m * b.inner,
                      b.inner, left, b.inner);
    }
  }

  __device__ __forceinline__ void run() {
    typename Shared::Pixels pixels(a_.spin_limit);
    typename Shared::Operand operand(a_.spin_limit);
    const bool leads = threadIdx.x % kWarpgroup == 0;
    int last = -1;  // stage of x whose place the last result has taken, not known to be stored
    int result = 0;
#pragma unroll 1
    for (JobScheduler at(a_); at.valid(); at.advance()) {
      if (at.has(-1)) pixels.advance();
#pragma unroll 1
      for (int i = 0; i < at.lines; ++i) {
        pixels.wait(at.job());
        operand.wait(at.job());
        const std::uint32_t x = Shared::kPixels + pixels.stage() * Shared::kPixelBytes;
        const std::uint32_t out = kProjection ? Shared::kResult + result * Shared::kResultBytes : x;
        make_line(x, Shared::kOperand + operand.stage() * kPanelBytes, out);
        if (threadIdx.x % 32 == 0) operand.release();
        operand.advance();
        if (leads) {
          ptx::bulk_wait_read<0>();
          if (!kProjection && last >= 0) Shared::Pixels::release(last);
        }
        ptx::fence_proxy_async();
        ptx::named_barrier(3, kWarpgroup);
        if (leads) {
#pragma unroll 1
          for (int m = 0; m < a_.tiles; ++m) {
            ptx::store_tile(a_.out, out + m * kPanelBytes,
                            {m * kMapChannels, at.column, at.line + i, at.image});
          }
          ptx::bulk_commit();
          if constexpr (kProjection) pixels.release();
        }
        last = pixels.stage();
        result ^= 1;
        pixels.advance();
      }
      if (at.has(at.lines)) pixels.advance();
    }
    if (leads) ptx::bulk_wait_read<0>();
  }

 private:
  using Shared = Layout<kProjection>;
  static constexpr unsigned kUnit = ptx::kDescriptorUnit;

  // The products of 64 channels, on their way.
  __device__ __forceinline__ void multiply(Acc& acc, Acc& projected, int m, std::uint32_t x,
                                           std::uint32_t operand) const {
    ptx::wgmma_fence(acc);
    if constexpr (kProjection) ptx::wgmma_fence(projected);
#pragma unroll
    for (int k = 0; k < kDepths; ++k) {
      const unsigned depth = k * (32 / kUnit);
      ptx::wgmma<T>(acc, weights_[m][k], ptx::matrix_descriptor(operand) + depth, k > 0);
      if constexpr (kProjection) {
        ptx::wgmma<T>(projected,
                      ptx::matrix_descriptor(Shared::kProjected + m * 64 * kRowBytes) + depth,
                      ptx::matrix_descriptor(x + a_.halo * kRowBytes) + depth, k > 0);
      }
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void make_line(std::uint32_t x, std::uint32_t operand,
                                            std::uint32_t out) const {
    const Epilogue<T> epilogue(true);
    Acc acc[2], projected[kProjection ? 2 : 1];
    multiply(acc[0], projected[0], 0, x, operand);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      Acc& now = acc[m % 2];
      Acc& beside = projected[kProjection ? m % 2 : 0];
      Pairs shortcut;
      if constexpr (!kProjection) {
        load_pairs(shortcut, x + m * kPanelBytes, a_.halo);
        // The result's rows are others then, which lanes have read for each other.
        if (a_.halo > 0) ptx::named_barrier(4 + threadIdx.x % kWarpgroup / 32, 32);
      }
      ScaleShift of[2], added[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t terms = (64 * m + row(half)) * kScaleShiftBytes;
        of[half] = ptx::load_shared<ScaleShift>(Shared::kScaleShift + terms);
        if constexpr (kProjection) {
          added[half] = ptx::load_shared<ScaleShift>(Shared::kProjectedScaleShift + terms);
        }
      }
      if (m + 1 < kTiles) {
        multiply(acc[(m + 1) % 2], projected[kProjection ? (m + 1) % 2 : 0], m + 1, x, operand);
        ptx::wgmma_wait<1>(now);
      } else {
        ptx::wgmma_wait<0>(now);
      }
      if constexpr (kProjection) {
        if (m + 1 < kTiles) {
          ptx::wgmma_wait<1>(beside);
        } else {
          ptx::wgmma_wait<0>(beside);
        }
      }
      store_line<kRuns>(out + m * kPanelBytes, [&](int j, int half) {
        float y[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int n = 4 * j + 2 * half + e;
          y[e] = Epilogue<T>::normalise(now[n], of[half]);
          if constexpr (kProjection) {
            y[e] = Epilogue<T>::normalise(beside[n],
                                          {added[half].mean, added[half].scale, 0.0f, y[e]});
          }
        }
        if constexpr (!kProjection) {
          Pack<T, 2> residual;
          memcpy(&residual, &shortcut[j][half], sizeof(residual));
          epilogue.add(y, residual);
        }
        return bits_of(epilogue.pack(y));
      });
    }
  }

  const Arguments& a_;
  std::uint32_t weights_[kTiles][kDepths][4];
};

// The projection's weights, as panels for wgmma. By all threads.
template <typename T>
__device__ __forceinline__ void load_projection(const Bottleneck& b) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kTiles * 64 * 8; i += kThreads) {
    const int n = i / 8, chunk = i % 8;
    const bool inside = n < b.out_channels && chunk * 8 < b.channels;
    const T* const from = static_cast<const T*>(b.projection.weight);
    ptx::cp_async_16(Layout<true>::kProjected + n * kRowBytes + (chunk ^ n % 8) * 16,
                     inside ? from + std::int64_t{n} * b.channels + chunk * 8 : from, inside);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

// Scale and shift of conv3's channels; with a projection, of both, and their shifts' sum as
// conv3's.
template <bool kProjection>
__device__ __forceinline__ void load_scale_shifts(const Bottleneck& b) {
  using Shared = Layout<kProjection>;
  const int channel = threadIdx.x;
  static_assert(64 * kTiles <= kThreads);
  if (channel >= 64 * kTiles) return;
  ScaleShift of{}, added{};
  if (channel < b.out_channels) of = scale_shift_of(b.conv3.bn, channel);
  if constexpr (kProjection) {
    if (channel < b.out_channels) added = scale_shift_of(b.projection.bn, channel);
    of.shift += added.shift;
    ptx::store_shared(Shared::kProjectedScaleShift + channel * kScaleShiftBytes, added);
  }
  ptx::store_shared(Shared::kScaleShift + channel * kScaleShiftBytes, of);
}

template <typename T, bool kProjection>
__global__ void __launch_bounds__(kThreads, 1)
    bottleneck_sm90_kernel(const __grid_constant__ Arguments a) {
  using Shared = Layout<kProjection>;
  using Registers = Registers<kProjection>;
  ptx::registers_at_launch<kLaunchRegisters>();
  if (threadIdx.x == 0) {
    Shared::Pixels::init(1, 1);
    Shared::Lines::init(1, kWarpgroup / 32);
    Shared::Operand::init(1, kWarpgroup / 32);
    ptx::fence_mbarrier_init();
  }
  ptx::wait_for_earlier_kernels();
  if constexpr (kProjection) load_projection<T>(a.block);
  load_scale_shifts<kProjection>(a.block);
  // The rows of a line of the ring that conv1 never writes, with a halo or without.
  if (threadIdx.x < Shared::kLines * 3 * 8) {
    const int line = threadIdx.x / 24, n = threadIdx.x / 8 % 3, row = n == 0 ? 0 : kN - 1 + n;
    ptx::store_shared(Shared::kRing + line * kLineBytes + row * kRowBytes + threadIdx.x % 8 * 16,
                      Pack<T, 8>{});
  }
  ptx::fence_proxy_async();
  __syncthreads();

  const int warpgroup = ptx::uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 1) {
    ptx::decrease_registers<Registers::kConv1>();
    make_conv1<T, kProjection>(a);
  } else if (warpgroup == 2) {
    ptx::increase_registers<Registers::kConv2>();
    make_conv2<T, kProjection>(a);
  } else if (warpgroup == 3) {
    ptx::increase_registers<Registers::kConv3>();
    Conv3<T, kProjection>(a).run();
  } else {
    ptx::decrease_registers<kCopyRegisters>();
    if (threadIdx.x == 0) load_pixels<kProjection>(a);
  }
}

// Lines of a job: with which the busiest SM makes the fewest of conv1, of which each job computes
// two more than of the result.
int choose_lines(const Bottleneck& a, std::int64_t strips, int num_sms) {
  int chosen = a.height;
  std::int64_t least = 0;
  for (int segments = 1; segments <= a.height; ++segments) {
    const std::int64_t lines = ceil_div(a.height, segments);
    const std::int64_t jobs = a.batch * strips * ceil_div(a.height, lines);
    const std::int64_t made = ceil_div(jobs, num_sms) * (lines + 2);
    if (segments == 1 || made < least) {
      chosen = static_cast<int>(lines);
      least = made;
    }
  }
  return chosen;
}

template <typename T, bool kProjection>
cudaError_t run(void* out, const Bottleneck& a, int num_sms, cudaStream_t stream) {
  const std::int64_t strips = a.width <= kN ? 1 : ceil_div(a.width, kN - 2);
  Arguments to{};
  to.block = a;
  to.columns = static_cast<int>(ceil_div(a.width, strips));
  to.strips = static_cast<unsigned>(strips);
  to.halo = strips > 1;
  to.lines = choose_lines(a, strips, num_sms);
  to.segments = static_cast<unsigned>(ceil_div(a.height, to.lines));
  to.tiles = static_cast<int>(ceil_div(a.out_channels, kMapChannels));
  const std::int64_t jobs = a.batch * strips * to.segments;
  // A job's number must not overflow where a block advances.
  if (jobs > kMaxGridX - num_sms) return cudaErrorInvalidConfiguration;
  to.jobs = static_cast<unsigned>(jobs);
  to.spin_limit = spin_limit;
  const auto encode = [&](CUtensorMap* map, const void* data, int channels, int columns) {
    return encode_tiles(map, a.dtype, data, {channels, a.width, a.height, a.batch},
                        {columns, 1, 1});
  };
  cudaError_t status = encode(&to.x, a.x, a.channels, kN);
  if (status == cudaSuccess) status = encode(&to.out, out, a.out_channels, to.columns);
  if (status != cudaSuccess) return status;
  return launch(&bottleneck_sm90_kernel<T, kProjection>,
                persistent_shape(to.jobs, num_sms, kThreads, Layout<kProjection>::kBytes), stream,
                to);
}

}  // namespace

bool bottleneck_sm90_can_implement(const Bottleneck& a, int device) {
  bool sm90 = false;
  if (runs_sm90(device, &sm90) != cudaSuccess || !sm90) return false;
  for (const void* pointer :
       {a.x, a.conv1.weight, a.conv2.weight, a.conv3.weight, a.projection.weight}) {
    if (!aligned(pointer)) return false;
  }
  const bool projection = a.projection.weight != nullptr;
  return a.dtype != DType::kFloat32 && a.stride == 1 && a.inner <= 64 && a.inner % 8 == 0 &&
         a.channels % 8 == 0 && a.out_channels % 8 == 0 && a.out_channels <= 64 * kTiles &&
         (projection ? a.channels <= 64 : a.channels == a.out_channels) &&
         std::int64_t{a.height} * a.width * a.channels < std::int64_t{1} << 39;
}

cudaError_t bottleneck_sm90(void* out, const Bottleneck& a, int device, cudaStream_t stream) {
  if (!bottleneck_sm90_can_implement(a, device) || !aligned(out)) return cudaErrorInvalidValue;
  if (a.batch == 0 || a.height == 0 || a.width == 0) return cudaSuccess;
  Machine machine;
  const cudaError_t status = set_device(device, &machine);
  if (status != cudaSuccess) return status;
  return with_half(a.dtype, [&](auto half) {
    using T = decltype(half);
    return a.projection.weight != nullptr ? run<T, true>(out, a, machine.num_sms, stream)
                                          : run<T, false>(out, a, machine.num_sms, stream);
  });
}

}  // namespace resnet_fused
