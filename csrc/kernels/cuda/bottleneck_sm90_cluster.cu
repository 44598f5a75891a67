// A whole bottleneck block of up to 128 inner channels in one kernel for sm_90a: a cluster of four
// blocks holds its weights in registers, and lines pass from block to block.
//
// Algorithm: products are those of bottleneck_sm90.cu, weights times pixels, with the weights as
// operand A in registers for good. Of 512 -> 128 -> 512 channels these are 557 KB, four times what
// one SM has room for, so that each block has its convolutions: the two blocks of the ends, 64
// channels of conv1 and 256 of conv3 each, all of whose input they read; the two of the middle, 64
// channels of conv2 each. That is 65,536 multiply-adds a pixel for the former and 73,728 for the
// latter. Clusters are persistent and take jobs, lines of an image, two at a time: 56 pixels.
//
// conv1's pairs of lines begin one line above the job, so that the window of two lines of the
// result is two pairs. After batch norm and ReLU, with zeros outside the image, a pair goes to both
// blocks of the middle, into a ring whose first pair is there once more behind its last one: a
// window's pairs always follow each other. A tap's operand is then one run of rows: lines lie 36
// rows apart, so that the window of 28 + 36 = 64 columns moves by whole rows, and what columns 28
// to 35 compute is dropped. In the middle each of two warpgroups multiplies 64 of the 128 channels
// that conv2 sums over; the second one hands its accumulators to the first, which adds, finishes
// and sends the two lines to both blocks of the ends. conv3 adds x to them, which is copied a
// second time, from L2, to where the result will lie.
//
// Between blocks lines travel as bulk copies from shared memory to shared memory, which the
// receiving block's mbarrier counts; the same swizzle is in force at both ends, as both begin at
// multiples of 1,024 bytes. The receiver's release, an arrival at the sender's mbarrier, frees the
// place where lines lay as well as that to which they went.
//
// Roles: in the ends' first warpgroup one warp copies x for conv1, panel by panel, and one the
// shortcut; the others are conv1 and conv3. In the middle the first warpgroup is idle, and the
// others share conv2.
//
// Shared memory, from 0 on. Ends: 10 panels of x (64 channels of two lines), 3 stages of shortcut
// and result, 2 of conv2's result, 4 pairs of conv1's lines, scale and shift of conv3; 222.3 KiB
// with the mbarriers, which lie at the same place in all blocks. Middle: the ring of 4 pairs and
// one again, 2 stages of accumulators, 2 of conv2's result; 138 KiB.
//
// Of two lines of 28 pixels and 512 channels, 348 KiB cross shared memory in a block of the ends:
// 116 that products read, 102 that copies write, 100 of shortcut, result and scale and shift, 30 of
// conv1's lines; 2,780 cycles, beside 2,000 of products. In one of the middle it is 220 KiB, 1,760
// cycles beside 2,483.
//
// Pipelines (arrivals that fill / that empty a stage): pixels (1 and their bytes / the 4 warps of
// conv1), shortcut (1 and their bytes / 1), lines (both blocks of the ends, with their bytes / the
// 16 warps of conv2, at both ends), partials (1 / 1), operand of conv3 (both blocks of the middle,
// with their bytes / the 8 warps of conv3, at both).
//
// Memory: x and the result once, the floor; L2 is asked for x three times, and for the weights once
// a cluster.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "kernels/cuda/bottleneck_sm90.cuh"
#include "kernels/cuda/bottleneck_sm90_cluster.h"
#include "kernels/cuda/channel_rows.cuh"
#include "kernels/cuda/conv_sm90.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/launch.h"

namespace resnet_fused {
namespace {

constexpr int kEnds = 2, kRanks = 2 * kEnds;  // blocks: the ends first, then the middle
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kWarps = kWarpgroup / 32;
constexpr int kLaunchRegisters = 168, kCopyRegisters = 40, kProductRegisters = 232;
constexpr int kTaps = 9;
constexpr int kDepth = 8;  // panels of x's channels
constexpr int kTiles = 4;  // of 64 output channels, of a block

constexpr int kColumns = 28;      // of a line
constexpr int kN = 2 * kColumns;  // columns of a product of conv1 and conv3
constexpr int kPitch = kColumns + 8;
constexpr int kMiddleN = kPitch + kColumns;  // the same of conv2
constexpr int kRuns = kN / 8, kMiddleRuns = kMiddleN / 8;
constexpr std::uint32_t kPanelBytes = kN * kRowBytes;  // of 64 channels of two lines
constexpr std::uint32_t kLineBytes = kPitch * kRowBytes;
constexpr std::uint32_t kPairBytes = 2 * kLineBytes;
// Of a pair, with a column of zeros at both ends of a line.
constexpr std::uint32_t kSentBytes = kLineBytes + (kColumns + 2) * kRowBytes;

constexpr int kPixelStages = 10, kShortcutStages = 3, kPairStages = 4, kPartialStages = 2,
              kOperandStages = 2;
constexpr std::uint32_t kResultBytes = kTiles * kPanelBytes;

struct Ends {
  static constexpr std::uint32_t kPixels = 0;
  static constexpr std::uint32_t kShortcut = kPixels + kPixelStages * kPanelBytes;
  static constexpr std::uint32_t kOperand = kShortcut + kShortcutStages * kResultBytes;
  static constexpr std::uint32_t kPairs = kOperand + kOperandStages * kEnds * kPanelBytes;
  static constexpr std::uint32_t kScaleShift = kPairs + kPairStages * kPairBytes;
  static constexpr std::uint32_t kEnd = kScaleShift + 64 * kTiles * kScaleShiftBytes;
};

struct Middle {
  static constexpr std::uint32_t kRingBytes = (kPairStages + 1) * kPairBytes;  // of 64 channels
  static constexpr std::uint32_t kPartialBytes = kMiddleRuns * kWarpgroup * 16;
  static constexpr std::uint32_t kResultBytes = 64 * kRowBytes;  // 56 rows, and those dropped
  static constexpr std::uint32_t kLines = 0;
  static constexpr std::uint32_t kPartials = kLines + kEnds * kRingBytes;
  static constexpr std::uint32_t kResult = kPartials + kPartialStages * kPartialBytes;
  static constexpr std::uint32_t kEnd = kResult + kOperandStages * kResultBytes;
};

constexpr std::uint32_t kMbarriers = std::max(Ends::kEnd, Middle::kEnd);
using Pixels = Pipeline<PipelineId::kClusterPixels, kMbarriers, kPixelStages>;
using Shortcut = Pipeline<PipelineId::kClusterShortcut, Pixels::kEnd, kShortcutStages>;
using Lines = Pipeline<PipelineId::kClusterLines, Shortcut::kEnd, kPairStages>;
using Partials = Pipeline<PipelineId::kClusterPartials, Lines::kEnd, kPartialStages>;
using Operand = Pipeline<PipelineId::kClusterOperand, Partials::kEnd, kOperandStages>;
constexpr int kBytes = static_cast<int>(Operand::kEnd);
static_assert(kPanelBytes % 1024 == 0 && kPairBytes % 1024 == 0 && Ends::kPairs % 1024 == 0 &&
              Ends::kOperand % 1024 == 0 && Middle::kResult % 1024 == 0 && kBytes <= 227 * 1024);

struct Arguments {
  Bottleneck block;
  CUtensorMap x, out;
  int lines, segments;  // of a job, an even number unless it is all; of an image
  unsigned jobs;
  SpinLimit spin_limit;
};

// This cluster's jobs.
class JobScheduler {
 public:
  __device__ __forceinline__ explicit JobScheduler(const Arguments& a) : a_(a) { locate(); }

  __device__ __forceinline__ bool valid() const { return job_ < a_.jobs; }
  __device__ __forceinline__ void advance() {
    job_ += gridDim.x / kRanks;
    locate();
  }
  __device__ __forceinline__ int job() const { return static_cast<int>(job_); }
  // The first line of the result's i-th pair; conv1's begin one line above.
  __device__ __forceinline__ int pair(int i) const { return line_ + 2 * i; }

  int image, steps;  // pairs of lines

 private:
  __device__ __forceinline__ void locate() {
    image = job_ / a_.segments;
    line_ = job_ % a_.segments * a_.lines;
    const int left = a_.block.height - line_;
    steps = ((left < a_.lines ? left : a_.lines) + 1) / 2;
  }

  const Arguments& a_;
  unsigned job_ = blockIdx.x / kRanks;
  int line_;
};

// The role of one thread of the ends: copies x for conv1.
__device__ __forceinline__ void load_pixels(const Arguments& a) {
  Pixels pixels(a.spin_limit);
#pragma unroll 1
  for (JobScheduler at(a); at.valid(); at.advance()) {
#pragma unroll 1
    for (int i = 0; i <= at.steps; ++i) {
#pragma unroll 1
      for (int p = 0; p < kDepth; ++p) {
        pixels.acquire(at.job());
        pixels.commit_bytes(kPanelBytes);
        ptx::load_tile(Ends::kPixels + pixels.stage() * kPanelBytes, a.x, pixels.full(),
                       {p * kMapChannels, 0, at.pair(i) - 1, at.image});
        pixels.advance();
      }
    }
  }
}

// The role of another: copies x as the shortcut.
__device__ __forceinline__ void load_shortcut(const Arguments& a, int rank) {
  Shortcut shortcut(a.spin_limit);
#pragma unroll 1
  for (JobScheduler at(a); at.valid(); at.advance()) {
#pragma unroll 1
    for (int i = 0; i < at.steps; ++i) {
      shortcut.acquire(at.job());
      shortcut.commit_bytes(kResultBytes);
#pragma unroll 1
      for (int m = 0; m < kTiles; ++m) {
        ptx::load_tile(Ends::kShortcut + shortcut.stage() * kResultBytes + m * kPanelBytes, a.x,
                       shortcut.full(),
                       {(rank * kTiles + m) * kMapChannels, 0, at.pair(i), at.image});
      }
      shortcut.advance();
    }
  }
}

// The role of a warpgroup of the ends: 64 channels of conv1's lines, zeros outside the image.
template <typename T>
__device__ __forceinline__ void make_conv1(const Arguments& a, int rank) {
  constexpr unsigned kUnit = ptx::kDescriptorUnit;
  const Bottleneck& b = a.block;
  const int first = rank * kProductM;
  std::uint32_t weights[kDepth][kDepths][4];
#pragma unroll
  for (int p = 0; p < kDepth; ++p) {
    load_weights<T>(
        weights[p],
        static_cast<const T*>(b.conv1.weight) + std::int64_t{first} * b.channels + p * kMapChannels,
        b.channels, b.inner - first, b.channels - p * kMapChannels);
  }
  const Channels channels = channels_of(b.conv1.bn, first, b.inner);
  const std::uint64_t stages = ptx::matrix_descriptor(Ends::kPixels);
  const int lane = threadIdx.x % 32;
  const auto moved = [&](int j) {  // a lane's row of the second line
    const bool second = j >= 4 || (j == 2 && lane >= 16 && lane % 8 >= 4);
    return second ? kPitch - kColumns : 0;
  };
  Pixels pixels(a.spin_limit);
  Lines lines(a.spin_limit);
#pragma unroll 1
  for (JobScheduler at(a); at.valid(); at.advance()) {
#pragma unroll 1
    for (int i = 0; i <= at.steps; ++i) {
      float acc[kN / 2];
      int last = 0;  // stage that is read, not known to be done with
#pragma unroll
      for (int p = 0; p < kDepth; ++p) {
        const std::uint64_t stage = stages + pixels.stage() * (kPanelBytes / kUnit);
        pixels.wait(at.job());
        ptx::wgmma_fence(acc);
#pragma unroll
        for (int k = 0; k < kDepths; ++k) {
          ptx::wgmma<T>(acc, weights[p][k], stage + k * (32 / kUnit), p + k > 0);
        }
        ptx::wgmma_commit();
        if (p > 0) {
          ptx::wgmma_wait<1>(acc);
          if (lane == 0) Pixels::release(last);
        }
        last = pixels.stage();
        pixels.advance();
      }
      ptx::wgmma_wait<0>(acc);
      if (lane == 0) Pixels::release(last);
      lines.acquire(at.job());
      const std::uint32_t pair = Ends::kPairs + lines.stage() * kPairBytes;
      store_line<kRuns>(
          pair + kRowBytes,
          [&](int j, int half) {
            const int pixel = 8 * j + lane % 4 * 2, second = pixel >= kColumns;
            const unsigned line = at.pair(i) - 1 + second, height = b.height;
            const int count = line < height ? b.width : 0;
            const int column = pixel - second * kColumns;
            const unsigned mask =
                (column < count ? 0xffffu : 0u) | (column + 1 < count ? 0xffff0000u : 0u);
            return finish<T>(acc, j, half, channels) & mask;
          },
          moved);
      ptx::fence_proxy_async();
      ptx::named_barrier(1, kWarpgroup);
      if (threadIdx.x % kWarpgroup == 0) {
        const int stage = lines.stage(), copies = stage == 0 ? 2 : 1;
        const std::uint32_t ring = Middle::kLines + rank * Middle::kRingBytes;
#pragma unroll 1
        for (int to = kEnds; to < kRanks; ++to) {
          Lines::commit_bytes_of(stage, to, copies * kSentBytes);
          Lines::send(stage, to, ring + stage * kPairBytes, pair, kSentBytes);
          if (stage == 0) {
            Lines::send(stage, to, ring + kPairStages * kPairBytes, pair, kSentBytes);
          }
        }
      }
      lines.advance();
    }
  }
}

// The role of a warpgroup of the middle: what 64 of conv1's channels give to 64 of conv2's. The
// second one hands that to the first, which finishes and sends the lines.
template <typename T>
__device__ __forceinline__ void make_conv2(const Arguments& a, int rank, int part) {
  constexpr unsigned kUnit = ptx::kDescriptorUnit;
  const Bottleneck& b = a.block;
  const int first = rank * kProductM, depth = part * kMapChannels;
  std::uint32_t weights[kTaps][kDepths][4];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    load_weights<T>(weights[tap],
                    static_cast<const T*>(b.conv2.weight) +
                        (std::int64_t{first} * kTaps + tap) * b.inner + depth,
                    std::int64_t{kTaps} * b.inner, b.inner - first, b.inner - depth);
  }
  const Channels channels = channels_of(b.conv2.bn, first, b.inner);
  const std::uint64_t ring = ptx::matrix_descriptor(Middle::kLines + part * Middle::kRingBytes);
  const int lane = threadIdx.x % 32;
  const bool leads = threadIdx.x % kWarpgroup == 0;
  // The second line goes behind the first one, and what lies between behind both.
  const auto moved = [&](int j) {
    if (j == 2) return lane >= 16 && lane % 8 >= 4 ? 32 : 0;
    if (j == 4) return lane < 16 && lane % 8 < 4 ? 24 : kColumns - kPitch;
    return j > 4 ? kColumns - kPitch : 0;
  };
  Lines lines(a.spin_limit);
  Partials partials(a.spin_limit);
  Operand operand(a.spin_limit);
  const auto next = [&](int job) {
    const int stage = lines.stage();
    lines.wait(job);
    lines.advance();
    return stage;
  };
  const auto release = [&](int stage) {
    if (lane < kEnds) Lines::release_of_cluster(stage, lane);
  };
#pragma unroll 1
  for (JobScheduler at(a); at.valid(); at.advance()) {
    int stage = next(at.job());  // of the window's upper two lines
#pragma unroll 1
    for (int i = 0; i < at.steps; ++i) {
      const int lower = next(at.job());
      float acc[kMiddleN / 2];
      ptx::wgmma_fence(acc);
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const std::uint64_t pixels =
            ring + (stage * kPairBytes + tap / 3 * kLineBytes + tap % 3 * kRowBytes) / kUnit;
#pragma unroll
        for (int k = 0; k < kDepths; ++k) {
          ptx::wgmma<T>(acc, weights[tap][k], pixels + k * (32 / kUnit), tap + k > 0);
        }
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>(acc);
      release(stage);
      stage = lower;

      const std::uint32_t place = Middle::kPartials + partials.stage() * Middle::kPartialBytes +
                                  threadIdx.x % kWarpgroup * 16;
      if (part == 1) {
        partials.acquire(at.job());
#pragma unroll
        for (int j = 0; j < kMiddleRuns; ++j) {
          ptx::store_shared(
              place + j * kWarpgroup * 16,
              Pack<float, 4>{{acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]}});
        }
        ptx::named_barrier(2, kWarpgroup);
        if (leads) partials.commit();
      } else {
        partials.wait(at.job());
#pragma unroll
        for (int j = 0; j < kMiddleRuns; ++j) {
          const auto other = ptx::load_shared<Pack<float, 4>>(place + j * kWarpgroup * 16);
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[4 * j + e] += other.value[e];
        }
        operand.acquire(at.job());
        const std::uint32_t result = Middle::kResult + operand.stage() * Middle::kResultBytes;
        store_line<kMiddleRuns>(
            result, [&](int j, int half) { return finish<T>(acc, j, half, channels); }, moved);
        ptx::fence_proxy_async();
        ptx::named_barrier(1, kWarpgroup);
        if (leads) {
          partials.release();
#pragma unroll 1
          for (int to = 0; to < kEnds; ++to) {
            Operand::commit_bytes_of(operand.stage(), to, kPanelBytes);
            Operand::send(operand.stage(), to,
                          Ends::kOperand + (operand.stage() * kEnds + rank) * kPanelBytes, result,
                          kPanelBytes);
          }
        }
        operand.advance();
      }
      partials.advance();
    }
    release(stage);
  }
}

// The role of a warpgroup of the ends: 256 channels of the result.
template <typename T>
class Conv3 {
 public:
  __device__ __forceinline__ Conv3(const Arguments& a, int rank) : a_(a), rank_(rank) {
    const Bottleneck& b = a.block;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const int first = (rank * kTiles + m) * kProductM;
#pragma unroll
      for (int p = 0; p < kEnds; ++p) {
        load_weights<T>(weights_[m][p],
                        static_cast<const T*>(b.conv3.weight) + std::int64_t{first} * b.inner +
                            p * kMapChannels,
                        b.inner, b.out_channels - first, b.inner - p * kMapChannels);
      }
    }
  }

  __device__ __forceinline__ void run() const {
    Shortcut shortcut(a_.spin_limit);
    Operand operand(a_.spin_limit);
    const bool leads = threadIdx.x % kWarpgroup == 0;
    int last = -1;  // stage whose result is not known to be stored
#pragma unroll 1
    for (JobScheduler at(a_); at.valid(); at.advance()) {
#pragma unroll 1
      for (int i = 0; i < at.steps; ++i) {
        const std::uint32_t out = Ends::kShortcut + shortcut.stage() * kResultBytes;
        shortcut.wait(at.job());
        operand.wait(at.job());
        make_lines(out, Ends::kOperand + operand.stage() * kEnds * kPanelBytes);
        if (threadIdx.x % 32 < kEnds) {
          Operand::release_of_cluster(operand.stage(), kEnds + threadIdx.x % 32);
        }
        operand.advance();
        if (leads) {
          ptx::bulk_wait_read<0>();
          if (last >= 0) Shortcut::release(last);
        }
        ptx::fence_proxy_async();
        ptx::named_barrier(2, kWarpgroup);
        if (leads) {
#pragma unroll 1
          for (int m = 0; m < kTiles; ++m) {
            ptx::store_tile(a_.out, out + m * kPanelBytes,
                            {(rank_ * kTiles + m) * kMapChannels, 0, at.pair(i), at.image});
          }
          ptx::bulk_commit();
        }
        last = shortcut.stage();
        shortcut.advance();
      }
    }
    if (leads) ptx::bulk_wait_read<0>();
  }

 private:
  using Acc = float[kN / 2];

  // The products of 64 channels, on their way.
  __device__ __forceinline__ void multiply(Acc& acc, int m, std::uint32_t operand) const {
    constexpr unsigned kUnit = ptx::kDescriptorUnit;
    ptx::wgmma_fence(acc);
#pragma unroll
    for (int p = 0; p < kEnds; ++p) {
#pragma unroll
      for (int k = 0; k < kDepths; ++k) {
        ptx::wgmma<T>(acc, weights_[m][p][k],
                      ptx::matrix_descriptor(operand + p * kPanelBytes) + k * (32 / kUnit),
                      p + k > 0);
      }
    }
    ptx::wgmma_commit();
  }

  // Of two lines, over the shortcut.
  __device__ __forceinline__ void make_lines(std::uint32_t out, std::uint32_t operand) const {
    const Epilogue<T> epilogue(true);
    Acc acc[2];
    multiply(acc[0], 0, operand);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      Acc& now = acc[m % 2];
      Pairs<kRuns> shortcut;
      load_pairs<kRuns>(shortcut, out + m * kPanelBytes, 0);
      ScaleShift of[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        of[half] = ptx::load_shared<ScaleShift>(Ends::kScaleShift +
                                                (64 * m + row(half)) * kScaleShiftBytes);
      }
      if (m + 1 < kTiles) {
        multiply(acc[(m + 1) % 2], m + 1, operand);
        ptx::wgmma_wait<1>(now);
      } else {
        ptx::wgmma_wait<0>(now);
      }
      store_line<kRuns>(out + m * kPanelBytes, [&](int j, int half) {
        float y[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          y[e] = Epilogue<T>::normalise(now[4 * j + 2 * half + e], of[half]);
        }
        Pack<T, 2> residual;
        memcpy(&residual, &shortcut[j][half], sizeof(residual));
        epilogue.add(y, residual);
        return bits_of(epilogue.pack(y));
      });
    }
  }

  const Arguments& a_;
  const int rank_;
  std::uint32_t weights_[kTiles][kEnds][kDepths][4];
};

// By all threads of a block of the ends.
__device__ __forceinline__ void prepare_ends(const Bottleneck& b, int rank) {
  const int channel = rank * kTiles * 64 + threadIdx.x;
  static_assert(64 * kTiles <= kThreads);
  if (threadIdx.x < 64 * kTiles) {
    const ScaleShift of =
        channel < b.out_channels ? scale_shift_of(b.conv3.bn, channel) : ScaleShift{};
    ptx::store_shared(Ends::kScaleShift + threadIdx.x * kScaleShiftBytes, of);
  }
  // What conv1 never writes of its pairs.
#pragma unroll 1
  for (int i = threadIdx.x; i < static_cast<int>(kPairStages * kPairBytes / 16); i += kThreads) {
    ptx::store_shared(Ends::kPairs + i * 16, Pack<float, 4>{});
  }
  ptx::fence_proxy_async();
}

__device__ __forceinline__ void cluster_barrier() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    bottleneck_sm90_cluster_kernel(const __grid_constant__ Arguments a) {
  ptx::registers_at_launch<kLaunchRegisters>();
  if (threadIdx.x == 0) {
    Pixels::init(1, kWarps);
    Shortcut::init(1, 1);
    Lines::init(kEnds, 2 * kEnds * kWarps);
    Partials::init(1, 1);
    Operand::init(kEnds, kEnds * kWarps);
    ptx::fence_mbarrier_init();
  }
  const int rank = blockIdx.x % kRanks;
  ptx::wait_for_earlier_kernels();
  if (rank < kEnds) prepare_ends(a.block, rank);
  cluster_barrier();

  const int warpgroup = ptx::uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 0) {
    ptx::decrease_registers<kCopyRegisters>();
    if (rank < kEnds && threadIdx.x == 0) load_pixels(a);
    if (rank < kEnds && threadIdx.x == 32) load_shortcut(a, rank);
  } else {
    ptx::increase_registers<kProductRegisters>();
    if (rank >= kEnds) {
      make_conv2<T>(a, rank - kEnds, warpgroup - 1);
    } else if (warpgroup == 1) {
      make_conv1<T>(a, rank);
    } else {
      Conv3<T>(a, rank).run();
    }
  }
  cluster_barrier();  // other blocks reach into this one's shared memory
}

// How many clusters the current device runs at once: fewer than a quarter of its SMs, as a cluster
// has all of its SMs from one group of them.
cudaError_t count_clusters(int device, int* clusters) {
#ifdef RESNET_FUSED_HOST_SIM
  const cudaError_t status = get_num_sms(device, clusters);
  *clusters /= kRanks;
  return status;
#else
  static std::atomic<int> known[64];
  std::atomic<int>& of_device = known[device % 64];
  *clusters = of_device;
  if (*clusters > 0) return cudaSuccess;
  const auto kernel = &bottleneck_sm90_cluster_kernel<__nv_bfloat16>;
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t status =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kRanks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kRanks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (status == cudaSuccess) status = cudaOccupancyMaxActiveClusters(clusters, function, &config);
  if (status == cudaSuccess) of_device = *clusters;
  return take_error(status);
#endif
}

template <typename T>
cudaError_t run(void* out, const Bottleneck& a, int clusters, cudaStream_t stream) {
  Arguments to{};
  to.block = a;
  to.lines = 2 * choose_steps(a.batch, static_cast<int>(ceil_div(a.height, 2)), 1, clusters);
  to.segments = static_cast<int>(ceil_div(a.height, to.lines));
  const std::int64_t jobs = a.batch * to.segments;
  // A job's number must not overflow where a cluster advances.
  if (jobs > kMaxGridX - clusters) return cudaErrorInvalidConfiguration;
  to.jobs = static_cast<unsigned>(jobs);
  to.spin_limit = spin_limit;
  const auto encode = [&](CUtensorMap* map, const void* data) {
    return encode_tiles(map, a.dtype, data, {a.channels, a.width, a.height, a.batch},
                        {kColumns, 2, 1});
  };
  cudaError_t status = encode(&to.x, a.x);
  if (status == cudaSuccess) status = encode(&to.out, out);
  if (status != cudaSuccess) return status;
  return launch(&bottleneck_sm90_cluster_kernel<T>,
                persistent_shape(to.jobs, clusters, kThreads, kBytes, kRanks), stream, to);
}

}  // namespace

bool bottleneck_sm90_cluster_can_implement(const Bottleneck& a, int device) {
  return can_take(a, device) && a.projection.weight == nullptr && a.inner <= 2 * kProductM &&
         a.channels <= kDepth * kMapChannels && a.width <= kColumns;
}

bool bottleneck_sm90_cluster_is_profitable(const Bottleneck& arguments, int device) {
  return bottleneck_sm90_cluster_can_implement(arguments, device) && arguments.inner > kProductM &&
         2 * arguments.width > kColumns;
}

cudaError_t bottleneck_sm90_cluster(void* out, const Bottleneck& a, int device,
                                    cudaStream_t stream) {
  if (!bottleneck_sm90_cluster_can_implement(a, device) || !aligned(out)) {
    return cudaErrorInvalidValue;
  }
  if (a.batch == 0 || a.height == 0 || a.width == 0) return cudaSuccess;
  int clusters = 0;
  cudaError_t status = set_device(device);
  if (status == cudaSuccess) status = count_clusters(device, &clusters);
  if (status != cudaSuccess) return status;
  if (clusters == 0) return cudaErrorInvalidConfiguration;
  return with_half(a.dtype,
                   [&](auto half) { return run<decltype(half)>(out, a, clusters, stream); });
}

}  // namespace resnet_fused
