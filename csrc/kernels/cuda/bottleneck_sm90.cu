// A whole bottleneck block in one kernel for sm_90a: wgmma, the image taken line by line.
//
// Algorithm: persistent blocks take jobs: lines of an image, or of a strip of it where it is wider
// than 62 columns. Three warpgroups work at different lines at once. The first multiplies the 64
// pixels of a line that begin one column early by conv1's weights, and leaves the result, after
// batch norm and ReLU and as 16-bit values, in a ring of lines in shared memory; zeros where a
// pixel lies outside the image, since it is conv1's result that conv2 pads. The other two take
// turns at lines of the result. A tap of conv2 is a product whose operand is one of the three lines
// around it, from row 0, 1 or 2 on: the window moves by whole rows of 128 bytes, while the swizzle
// goes by addresses, so that the descriptors' base offset stays 0. conv2's result never leaves the
// registers: its accumulators, rounded in pairs, are the operand of conv3, which makes the output
// channels 64 at a time, with x itself added, or with a projection's product of x's pixels in
// accumulators of its own. Every line of conv1 is computed once a job: the halo is two lines.
//
// Roles: warp 0 copies x's lines for conv1 (bulk copies, zeros outside the image), warp 1 those for
// the projection; warpgroup 1 is conv1; warpgroups 2 and 3 are conv2 and what follows.
//
// Weights stay in shared memory, where all threads copy them once, and so do scale and shift of
// the batch norms. conv3's and the projection's rows are permuted (channel_of), so that a lane's
// accumulators are 8 neighbouring channels, which it moves by 16 bytes: from x, to the result.
//
// Shared memory, from 0 on: the weights of conv1, conv2 (by tap), conv3 and the projection, in
// panels of 64 rows of 64 channels; stages of 64 pixels of 64 channels for conv1, and for the
// projection; the ring of lines, of 66 rows each, as the last tap reaches two beyond 64; scale and
// shift; mbarriers. 224 KiB with x as shortcut of 256 channels (4 stages, 6 lines), 220 with a
// projection of 64 (1 and 2 stages, 5 lines).
//
// Pipelines (arrivals that fill / that empty a stage): pixels (1 and their bytes / the 4 warps of
// conv1), shortcut (the same / the 4 warps of one warpgroup), lines (1 / the 8 warps of both
// warpgroups, each behind its last product of the line).
//
// Memory: x once, as far as L2 still holds what is read again as shortcut two lines later, and the
// result once; both intermediates stay on chip, and the weights come from L2 once a block.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/cuda/bottleneck_sm90.h"
#include "kernels/cuda/conv_sm90.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/launch.h"

namespace resnet_fused {
namespace {

constexpr int kThreads = 4 * kWarpgroup;
constexpr int kExpanders = 2;            // warpgroups that take turns at lines of the result
constexpr int kColumns = kProductM - 2;  // of a line of the result that count
constexpr int kPitch = kProductM + 2;    // rows of a line of the ring
constexpr int kLineBytes = kPitch * kRowBytes;
constexpr int kPanelBytes = 64 * kRowBytes;  // of 64 rows of weights or pixels
constexpr int kSlice = 128;                  // output channels that are made at a time
constexpr int kSliceBytes = kSlice * kRowBytes;
constexpr int kSlices = 2;  // of 128 output channels, at most
constexpr int kTaps = 9;
// Registers of a thread: at launch, of the warps that copy, of conv1, of what follows.
constexpr int kLaunchRegisters = 128, kCopyRegisters = 24, kReduceRegisters = 88;
constexpr int kExpandRegisters = 200;
static_assert(kCopyRegisters + kReduceRegisters + kExpanders * kExpandRegisters <=
              4 * kLaunchRegisters);

// Batch norms in shared memory, from an offset on: means and scales of two channels, 16 bytes,
// behind one another; then their shifts, 8 bytes. A lane reads those of its run of a row.
template <int kChannels>
struct Terms {
  static constexpr std::uint32_t kBytes = kChannels * 12;

  // Of `channel`, which is even, and the next.
  __device__ __forceinline__ static void store(std::uint32_t to, int channel,
                                               const ScaleShift (&of)[2]) {
    const Pack<float, 4> both{{of[0].mean, of[1].mean, of[0].scale, of[1].scale}};
    ptx::store_shared(to + channel * 8, both);
    const Pack<float, 2> shift{{of[0].shift, of[1].shift}};
    ptx::store_shared(to + kChannels * 8 + channel * 4, shift);
  }

  // Of the same; their shifts may come from elsewhere.
  __device__ __forceinline__ explicit Terms(std::uint32_t from, int channel)
      : Terms(from, channel, ptx::load_shared<Pack<float, 2>>(from + kChannels * 8 + channel * 4)) {
  }
  __device__ __forceinline__ Terms(std::uint32_t from, int channel, const Pack<float, 2>& shift)
      : both_(ptx::load_shared<Pack<float, 4>>(from + channel * 8)), shift_(shift) {}

  __device__ __forceinline__ float normalise(float value, int e) const {
    return normalise(value, e, shift_.value[e]);
  }
  __device__ __forceinline__ float normalise(float value, int e, float shift) const {
    return resnet_fused::normalise<false>(value, {both_.value[e], both_.value[2 + e], 0.0f, shift});
  }

 private:
  const Pack<float, 4> both_;
  const Pack<float, 2> shift_;
};

// What lies where in shared memory.
template <bool kProjection>
struct Layout {
  static constexpr int kDepth =
      kProjection ? 1 : kSlices * kSlice / 64;  // panels of x's channels, at most
  static constexpr int kPixelStages = kProjection ? 1 : 4;
  static constexpr int kShortcutStages = kProjection ? 2 : 0;
  static constexpr int kLines = kProjection ? 5 : 6;
  static constexpr std::uint32_t kWeight1 = 0;
  static constexpr std::uint32_t kWeight2 = kWeight1 + kDepth * kPanelBytes;
  static constexpr std::uint32_t kWeight3 = kWeight2 + kTaps * kPanelBytes;
  static constexpr std::uint32_t kProjected = kWeight3 + kSlices * kSliceBytes;
  static constexpr std::uint32_t kPixels = kProjected + (kProjection ? kSlices : 0) * kSliceBytes;
  static constexpr std::uint32_t kShortcut = kPixels + kPixelStages * kPanelBytes;
  static constexpr std::uint32_t kRing = kShortcut + kShortcutStages * kPanelBytes;
  static constexpr std::uint32_t kTerms1 = kRing + kLines * kLineBytes;
  static constexpr std::uint32_t kTerms2 = kTerms1 + Terms<64>::kBytes;
  static constexpr std::uint32_t kTerms3 = kTerms2 + Terms<64>::kBytes;
  static constexpr std::uint32_t kProjectedTerms = kTerms3 + Terms<kSlices * kSlice>::kBytes;
  static constexpr std::uint32_t kMbarriers =
      kProjectedTerms + (kProjection ? Terms<kSlices * kSlice>::kBytes : 0);
  using Pixels = Pipeline<PipelineId::kBottleneckPixels, kMbarriers, kPixelStages>;
  using Shortcut = Pipeline<PipelineId::kBottleneckShortcut, Pixels::kEnd, kShortcutStages>;
  using Lines = Pipeline<PipelineId::kBottleneckLines, Shortcut::kEnd, kLines>;
  static constexpr int kBytes = static_cast<int>(Lines::kEnd);
};

struct Arguments {
  Bottleneck block;
  CUtensorMap x;
  void* out;
  int columns, strips;  // of the result: of a strip, across
  int lines, segments;  // of a job, down
  int depth, slices;    // panels of x's channels, of output channels
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

// The output channel whose weights are a row of conv3's operand, and whose result a column of the
// product: lane % 4 = t holds columns 8 j + 2 t and the next, which in four j are the channels 8 t
// to 8 t + 7.
__device__ __forceinline__ int channel_of(int row) {
  return row / 32 * 32 + row % 8 / 2 * 8 + row % 32 / 8 * 2 + row % 2;
}

// Copies panels of a weight to shared memory, for wgmma: row n of panel p takes 64 elements from
// `at(p, n)` on, as far as `left(p, n)` goes; zeros behind it. All threads call it.
template <typename T, typename At, typename Left>
__device__ __forceinline__ void load_panels(std::uint32_t to, const void* weight, int panels, At at,
                                            Left left) {
#pragma unroll 1
  for (int i = threadIdx.x; i < panels * 64 * 8; i += kThreads) {
    const int panel = i / 512, row = i / 8 % 64, chunk = i % 8;
    const bool inside = chunk * 8 < left(panel, row);
    const T* const from = static_cast<const T*>(weight);
    ptx::cp_async_16(to + panel * kPanelBytes + row * kRowBytes + (chunk ^ row % 8) * 16,
                     inside ? from + at(panel, row) + chunk * 8 : from, inside);
  }
}

constexpr int kSlicePanels = kSlice / 64;

// Terms of all batch norms, of the channels in the order of the products' columns. The sum of both
// shifts stands for conv3's where there is a projection.
template <bool kProjection>
__device__ __forceinline__ void load_terms(const Arguments& a) {
  using Shared = Layout<kProjection>;
  const Bottleneck& b = a.block;
  const auto pair_of = [](const BatchNorm& bn, int channel, int count, ScaleShift(&of)[2]) {
    if (channel >= count) return;
    for (int e = 0; e < 2; ++e) of[e] = scale_shift_of(bn, channel + e);
  };
  int i = 2 * threadIdx.x;
  if (i < kSlice * a.slices) {
    ScaleShift third[2], projected[2];
    pair_of(b.conv3.bn, channel_of(i), b.out_channels, third);
    if constexpr (kProjection) {
      pair_of(b.projection.bn, channel_of(i), b.out_channels, projected);
      for (int e = 0; e < 2; ++e) third[e].shift += projected[e].shift;
      Terms<kSlices * kSlice>::store(Shared::kProjectedTerms, i, projected);
    }
    Terms<kSlices * kSlice>::store(Shared::kTerms3, i, third);
  }
  i -= kThreads;  // for warps that had none of those
  if (i >= 0 && i < 64) {
    ScaleShift first[2], second[2];
    pair_of(b.conv1.bn, i, b.inner, first);
    pair_of(b.conv2.bn, i, b.inner, second);
    Terms<64>::store(Shared::kTerms1, i, first);
    Terms<64>::store(Shared::kTerms2, i, second);
  }
  static_assert(kSlice * kSlices <= kThreads && kThreads + 64 <= 2 * kThreads);
}

template <typename T, bool kProjection>
__device__ __forceinline__ void load_weights(const Arguments& a) {
  using Shared = Layout<kProjection>;
  const Bottleneck& b = a.block;
  load_panels<T>(
      Shared::kWeight1, b.conv1.weight, a.depth,
      [&](int p, int n) { return std::int64_t{n} * b.channels + 64 * p; },
      [&](int p, int n) { return n < b.inner ? b.channels - 64 * p : 0; });
  load_panels<T>(
      Shared::kWeight2, b.conv2.weight, kTaps,
      [&](int p, int n) { return (std::int64_t{n} * kTaps + p) * b.inner; },
      [&](int, int n) { return n < b.inner ? b.inner : 0; });
  const auto channel = [](int p, int n) { return 64 * p + channel_of(n); };
  load_panels<T>(
      Shared::kWeight3, b.conv3.weight, a.slices * kSlicePanels,
      [&](int p, int n) { return std::int64_t{channel(p, n)} * b.inner; },
      [&](int p, int n) { return channel(p, n) < b.out_channels ? b.inner : 0; });
  if constexpr (kProjection) {
    load_panels<T>(
        Shared::kProjected, b.projection.weight, a.slices * kSlicePanels,
        [&](int p, int n) { return std::int64_t{channel(p, n)} * b.channels; },
        [&](int p, int n) { return channel(p, n) < b.out_channels ? b.channels : 0; });
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

// The role of one thread: copies the lines of x that conv1 reads.
template <bool kProjection>
__device__ __forceinline__ void load_pixels(const Arguments& a) {
  using Shared = Layout<kProjection>;
  typename Shared::Pixels pixels(a.spin_limit);
#pragma unroll 1
  for (JobScheduler at(a); at.valid(); at.advance()) {
    const int end = at.line + at.lines;
#pragma unroll 1
    for (int h = at.line - 1; h <= end; ++h) {
      if (h < 0 || h >= a.block.height) continue;
#pragma unroll 1
      for (int p = 0; p < a.depth; ++p) {
        pixels.acquire(at.job());
        pixels.commit_bytes(kPanelBytes);
        ptx::load_tile(Shared::kPixels + pixels.stage() * kPanelBytes, a.x, pixels.full(),
                       {p * kMapChannels, at.column - 1, h, at.image});
        pixels.advance();
      }
    }
  }
}

// The role of one thread: copies the lines of x that the projection reads.
__device__ __forceinline__ void load_shortcut(const Arguments& a) {
  using Shared = Layout<true>;
  Shared::Shortcut shortcut(a.spin_limit);
#pragma unroll 1
  for (JobScheduler at(a); at.valid(); at.advance()) {
#pragma unroll 1
    for (int i = 0; i < at.lines; ++i) {
      shortcut.acquire(at.job());
      shortcut.commit_bytes(kPanelBytes);
      ptx::load_tile(Shared::kShortcut + shortcut.stage() * kPanelBytes, a.x, shortcut.full(),
                     {0, at.column, at.line + i, at.image});
      shortcut.advance();
    }
  }
}

using Acc = Accumulators<kProductM, 64>;
using SliceAcc = Accumulators<kProductM, kSlice>;

// d = the product of 64 rows from `a` on, or of that plus d, and as many weights as d has columns
// at `b`: 64 channels deep.
template <typename T, typename Acc>
__device__ __forceinline__ void multiply(Acc& acc, std::uint64_t a, std::uint64_t b,
                                         bool accumulate) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const unsigned depth = k * (32 / ptx::kDescriptorUnit);
    ptx::wgmma<T>(acc.product(0), a + depth, b + depth, accumulate || k > 0);
  }
}

// Batch norm of a run of both rows of a lane.
__device__ __forceinline__ void normalise_run(Acc& acc, int j, std::uint32_t terms,
                                              float (&y)[Acc::kRows][Acc::kRun]) {
  const Terms<64> of(terms, acc.column(j));
#pragma unroll
  for (int r = 0; r < Acc::kRows; ++r) {
#pragma unroll
    for (int e = 0; e < Acc::kRun; ++e) y[r][e] = of.normalise(acc.at(r, j, e), e);
  }
}

// Stores a line of conv1's result, after batch norm and ReLU, for wgmma: pixels from column `first`
// on, zeros outside the image.
template <typename T>
__device__ __forceinline__ void store_line(Acc& acc, std::uint32_t line, std::uint32_t terms,
                                           int first, int width) {
  using Run = Pack<T, Acc::kRun>;
  const Epilogue<T> epilogue(true);
  const std::uint32_t row = line + acc.row(0) * kRowBytes;  // the other is the same modulo 8
  const unsigned swizzle = row / kRowBytes % 8;
  const std::uint32_t to = row + acc.column(0) * static_cast<int>(sizeof(T));
  bool inside[Acc::kRows];
#pragma unroll
  for (int r = 0; r < Acc::kRows; ++r) {
    inside[r] = static_cast<unsigned>(first + acc.row(r)) < static_cast<unsigned>(width);
  }
#pragma unroll
  for (int j = 0; j < Acc::kColumns; ++j) {
    float y[Acc::kRows][Acc::kRun];
    normalise_run(acc, j, terms, y);
#pragma unroll
    for (int r = 0; r < Acc::kRows; ++r) {
      const Run run = epilogue.pack(y[r]);
      ptx::store_shared(to + (acc.row(r) - acc.row(0)) * kRowBytes + (j ^ swizzle) * 16,
                        inside[r] ? run : Run{});
    }
  }
}

// The role of a warpgroup: conv1's lines, zeros outside the image.
template <typename T, bool kProjection>
__device__ __forceinline__ void reduce(const Arguments& a) {
  using Shared = Layout<kProjection>;
  constexpr unsigned kPanel = kPanelBytes / ptx::kDescriptorUnit;
  const Bottleneck& b = a.block;
  typename Shared::Pixels pixels(a.spin_limit);
  typename Shared::Lines lines(a.spin_limit);
  const std::uint64_t stages = ptx::matrix_descriptor(Shared::kPixels);
  const std::uint64_t weights = ptx::matrix_descriptor(Shared::kWeight1);
#pragma unroll 1
  for (JobScheduler at(a); at.valid(); at.advance()) {
#pragma unroll 1
    for (int i = -1; i <= at.lines; ++i) {
      if (at.line + i < 0 || at.line + i >= b.height) {
        lines.acquire(at.job());
        const std::uint32_t line = Shared::kRing + lines.stage() * kLineBytes;
#pragma unroll
        for (int n = 0; n < kProductM * kRowBytes / 16; n += kWarpgroup) {
          ptx::store_shared(line + (n + threadIdx.x % kWarpgroup) * 16, Pack<T, 8>{});
        }
      } else {
        Acc acc;
        int last = 0;
#pragma unroll 1
        for (int p = 0; p < a.depth; ++p) {
          pixels.wait(at.job());
          ptx::wgmma_fence(acc.product(0));
          multiply<T>(acc, stages + pixels.stage() * kPanel, weights + p * kPanel, p > 0);
          ptx::wgmma_commit();
          ptx::wgmma_wait<1>(acc.product(0));
          if (p > 0 && threadIdx.x % 32 == 0) Shared::Pixels::release(last);
          last = pixels.stage();
          pixels.advance();
        }
        ptx::wgmma_wait<0>(acc.product(0));
        if (threadIdx.x % 32 == 0) Shared::Pixels::release(last);
        lines.acquire(at.job());
        store_line<T>(acc, Shared::kRing + lines.stage() * kLineBytes, Shared::kTerms1,
                      at.column - 1, b.width);
      }
      ptx::fence_proxy_async();
      ptx::named_barrier(1, kWarpgroup);
      if (threadIdx.x % kWarpgroup == 0) lines.commit();
      lines.advance();
    }
  }
}

// A line of the result, slice by slice; `h` holds conv2's result, an operand.
template <typename T, bool kProjection>
class Expansion {
 public:
  using Octet = Pack<T, 8>;

  // Of the line that begins at this position of the result, with so many columns.
  __device__ __forceinline__ Expansion(const Arguments& a, std::int64_t position, int columns)
      : a_(a), position_(position), columns_(columns) {}

  // `shortcut`: the descriptor of x's pixels for the projection.
  __device__ __forceinline__ void make(std::uint32_t (&h)[4][4], std::uint64_t shortcut) const {
#pragma unroll 1
    for (int slice = 0; slice < a_.slices; ++slice) make_slice(h, shortcut, slice);
  }

 private:
  using Shared = Layout<kProjection>;
  using Acc = SliceAcc;
  static constexpr int kGroups = kSlice / 32;

  __device__ __forceinline__ void make_slice(std::uint32_t (&h)[4][4], std::uint64_t shortcut,
                                             int slice) const {
    const Epilogue<T> epilogue(true);
    const unsigned units = slice * (kSliceBytes / ptx::kDescriptorUnit);
    Acc acc, projected;
    ptx::wgmma_fence(h);
    ptx::wgmma_fence(acc.product(0));
    if constexpr (kProjection) {
      ptx::wgmma_fence(projected.product(0));
      multiply<T>(projected, shortcut, ptx::matrix_descriptor(Shared::kProjected) + units, false);
    }
    const std::uint64_t weights = ptx::matrix_descriptor(Shared::kWeight3) + units;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      ptx::wgmma<T>(acc.product(0), h[k], weights + k * (32 / ptx::kDescriptorUnit), k > 0);
    }
    ptx::wgmma_commit();

    // A lane's two rows and, of each 32 channels, 8.
    const int channel = slice * kSlice + threadIdx.x % 4 * 8;
    const auto counts = [&](int r, int group) {
      return Acc::row(r) < columns_ && channel + 32 * group < a_.block.out_channels;
    };
    const auto at = [&](int r, int group) {
      return (position_ + Acc::row(r)) * a_.block.out_channels + channel + 32 * group;
    };
    Octet residual[2][kGroups];
    if constexpr (!kProjection) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          if (!counts(r, group)) continue;
          const T* const x = static_cast<const T*>(a_.block.x) + at(r, group);
          residual[r][group] = ptx::load_global(reinterpret_cast<const Octet*>(x));
        }
      }
    }
    ptx::wgmma_wait<0>(acc.product(0));
    if constexpr (kProjection) ptx::wgmma_wait<0>(projected.product(0));

#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float y[2][8];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        using Terms = Terms<kSlices * kSlice>;
        const int j = 4 * group + pair, column = slice * kSlice + Acc::column(j);
        const Terms of(Shared::kTerms3, column);
        if constexpr (kProjection) {
          const Terms other(Shared::kProjectedTerms, column, {});
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const int r = n / 2, e = n % 2;
            y[r][2 * pair + e] =
                other.normalise(projected.at(r, j, e), e, of.normalise(acc.at(r, j, e), e));
          }
        } else {
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const int r = n / 2, e = n % 2;
            y[r][2 * pair + e] = of.normalise(acc.at(r, j, e), e);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (!counts(r, group)) continue;
        if constexpr (!kProjection) epilogue.add(y[r], residual[r][group]);
        ptx::store_global(reinterpret_cast<Octet*>(static_cast<T*>(a_.out) + at(r, group)),
                          epilogue.pack(y[r]));
      }
    }
  }

  const Arguments& a_;
  const std::int64_t position_;
  const int columns_;
};

// The role of a warpgroup: every other line of the result.
template <typename T, bool kProjection>
__device__ __forceinline__ void expand(const Arguments& a, int expander) {
  using Shared = Layout<kProjection>;
  constexpr unsigned kUnit = ptx::kDescriptorUnit, kPanel = kPanelBytes / kUnit;
  const Bottleneck& b = a.block;
  const Epilogue<T> epilogue(true);
  typename Shared::Lines lines(a.spin_limit);
  typename Shared::Shortcut shortcut(a.spin_limit);
  const std::uint64_t ring = ptx::matrix_descriptor(Shared::kRing);
  const std::uint64_t weights = ptx::matrix_descriptor(Shared::kWeight2);
  int turn = 0;   // whose the next line is
  int first = 0;  // stage of the job's first line
#pragma unroll 1
  for (JobScheduler at(a); at.valid(); at.advance()) {
    const int count = at.lines;
    int known = 0, released = 0;  // of the job's count + 2 lines of conv1
    const auto wait_for = [&](int end) {
      for (; known < end; ++known) {
        lines.wait(at.job());
        lines.advance();
      }
    };
    const auto release = [&](int end) {
      for (; released < end; ++released) {
        if (threadIdx.x % 32 == 0) Shared::Lines::release((first + released) % Shared::kLines);
      }
    };
#pragma unroll 1
    for (int i = 0; i < count; ++i, turn ^= 1) {
      if (turn != expander) {
        if constexpr (kProjection) shortcut.advance();
        continue;
      }
      wait_for(i + 3);
      std::uint32_t h[4][4];
      {
        Acc acc;
        ptx::wgmma_fence(acc.product(0));
#pragma unroll
        for (int r = 0; r < 3; ++r) {
          const std::uint64_t line = ring + (first + i + r) % Shared::kLines * (kLineBytes / kUnit);
#pragma unroll
          for (int s = 0; s < 3; ++s) {
            multiply<T>(acc, line + s * (kRowBytes / kUnit), weights + (3 * r + s) * kPanel,
                        r + s > 0);
          }
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>(acc.product(0));
        release(i + 2);
#pragma unroll
        for (int j = 0; j < Acc::kColumns; ++j) {
          float y[Acc::kRows][Acc::kRun];
          normalise_run(acc, j, Shared::kTerms2, y);
#pragma unroll
          for (int r = 0; r < Acc::kRows; ++r) {
            const auto pair = epilogue.pack(y[r]);
            memcpy(&h[j / 2][j % 2 * 2 + r], &pair, sizeof(pair));
          }
        }
      }
      const std::int64_t position =
          (std::int64_t{at.image} * b.height + at.line + i) * b.width + at.column;
      const Expansion<T, kProjection> expansion(
          a, position, at.column + a.columns < b.width ? a.columns : b.width - at.column);
      if constexpr (kProjection) {
        shortcut.wait(at.job());
        expansion.make(h, ptx::matrix_descriptor(Shared::kShortcut) + shortcut.stage() * kPanel);
        if (threadIdx.x % 32 == 0) shortcut.release();
        shortcut.advance();
      } else {
        expansion.make(h, 0);
      }
    }
    wait_for(count + 2);
    release(count + 2);
    first = (first + count + 2) % Shared::kLines;
  }
}

template <typename T, bool kProjection>
__global__ void __launch_bounds__(kThreads, 1)
    bottleneck_sm90_kernel(const __grid_constant__ Arguments a) {
  using Shared = Layout<kProjection>;
  ptx::registers_at_launch<kLaunchRegisters>();
  if (threadIdx.x == 0) {
    Shared::Pixels::init(1, kWarpgroup / 32);
    Shared::Shortcut::init(1, kWarpgroup / 32);
    Shared::Lines::init(1, kExpanders * kWarpgroup / 32);
    ptx::fence_mbarrier_init();
  }
  ptx::wait_for_earlier_kernels();
  load_weights<T, kProjection>(a);
  load_terms<kProjection>(a);
  // The two rows of a line that conv1 never writes.
  if (threadIdx.x < Shared::kLines * 16) {
    const std::uint32_t line = Shared::kRing + threadIdx.x / 16 * kLineBytes;
    ptx::store_shared(line + kProductM * kRowBytes + threadIdx.x % 16 * 16, Pack<T, 8>{});
  }
  ptx::fence_proxy_async();
  __syncthreads();

  const int warpgroup = ptx::uniform(threadIdx.x / kWarpgroup);
  if (warpgroup > 1) {
    ptx::increase_registers<kExpandRegisters>();
    expand<T, kProjection>(a, warpgroup - 2);
  } else if (warpgroup > 0) {
    ptx::decrease_registers<kReduceRegisters>();
    reduce<T, kProjection>(a);
  } else {
    ptx::decrease_registers<kCopyRegisters>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0 && lane == 0) load_pixels<kProjection>(a);
    if constexpr (kProjection) {
      if (warp == 1 && lane == 0) load_shortcut(a);
    }
  }
}

bool can_read(const Bottleneck& a) {
  const bool projection = a.projection.weight != nullptr;
  for (const void* pointer :
       {a.x, a.conv1.weight, a.conv2.weight, a.conv3.weight, a.projection.weight}) {
    if (!aligned(pointer)) return false;
  }
  return a.dtype != DType::kFloat32 && a.stride == 1 && a.inner <= 64 && a.inner % 8 == 0 &&
         a.channels % 8 == 0 && a.out_channels % 8 == 0 && a.out_channels <= kSlice * kSlices &&
         (projection ? a.channels <= 64 : a.channels == a.out_channels) &&
         std::int64_t{a.height} * a.width * a.channels < std::int64_t{1} << 39;
}

// Lines of a job: with which the busiest SM makes the fewest of conv1, of which each job computes
// two more than of the result.
int choose_lines(const Bottleneck& a, std::int64_t strips, int num_sms) {
  int chosen = a.height;
  std::int64_t least = 0;
  for (int segments = 1; segments <= a.height; ++segments) {
    const int lines = static_cast<int>(ceil_div(a.height, segments));
    const std::int64_t jobs = a.batch * strips * ceil_div(a.height, lines);
    const std::int64_t made = ceil_div(jobs, num_sms) * (lines + 2);
    if (segments == 1 || made < least) {
      chosen = lines;
      least = made;
    }
  }
  return chosen;
}

template <typename T, bool kProjection>
cudaError_t make_plan(void* out, const Bottleneck& a, int num_sms, LaunchPlan<Arguments>* plan) {
  const std::int64_t strips = ceil_div(a.width, kColumns);
  Arguments& to = plan->arguments;
  to.block = a;
  to.out = out;
  to.columns = static_cast<int>(ceil_div(a.width, strips));
  to.strips = static_cast<unsigned>(strips);
  to.lines = choose_lines(a, strips, num_sms);
  to.segments = static_cast<unsigned>(ceil_div(a.height, to.lines));
  to.depth = static_cast<int>(ceil_div(a.channels, 64));
  to.slices = static_cast<int>(ceil_div(a.out_channels, kSlice));
  const std::int64_t jobs = a.batch * strips * to.segments;
  // A job's number must not overflow where a block advances.
  if (jobs > kMaxGridX - num_sms) return cudaErrorInvalidConfiguration;
  to.jobs = static_cast<unsigned>(jobs);
  to.spin_limit = spin_limit;
  const auto size = [](std::int64_t value) { return static_cast<std::uint64_t>(value); };
  plan->kernel = &bottleneck_sm90_kernel<T, kProjection>;
  plan->shape = {dim3(std::min<unsigned>(to.jobs, num_sms)), dim3(kThreads),
                 Layout<kProjection>::kBytes, dim3(1), true};
  return encode_tiles(&to.x, a.dtype, a.x,
                      {size(a.channels), size(a.width), size(a.height), size(a.batch)},
                      {kProductM, 1, 1});
}

template <typename T>
cudaError_t make_plan(void* out, const Bottleneck& a, int num_sms, LaunchPlan<Arguments>* plan) {
  return a.projection.weight != nullptr ? make_plan<T, true>(out, a, num_sms, plan)
                                        : make_plan<T, false>(out, a, num_sms, plan);
}

}  // namespace

bool bottleneck_sm90_can_implement(const Bottleneck& arguments, int device) {
  bool sm90 = false;
  return runs_sm90(device, &sm90) == cudaSuccess && sm90 && can_read(arguments);
}

cudaError_t bottleneck_sm90(void* out, const Bottleneck& arguments, int device,
                            cudaStream_t stream) {
  const Bottleneck& a = arguments;
  if (!bottleneck_sm90_can_implement(a, device) || !aligned(out)) return cudaErrorInvalidValue;
  if (a.batch == 0 || a.height == 0 || a.width == 0) return cudaSuccess;
  LaunchPlan<Arguments> plan;
  int num_sms = 0;
  cudaError_t status = get_num_sms(device, &num_sms);
  if (status == cudaSuccess) {
    status = a.dtype == DType::kFloat16 ? make_plan<__half>(out, a, num_sms, &plan)
                                        : make_plan<__nv_bfloat16>(out, a, num_sms, &plan);
  }
  if (status == cudaSuccess) status = set_device(device);
  return status == cudaSuccess ? launch(plan, stream) : status;
}

}  // namespace resnet_fused
