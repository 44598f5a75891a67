// The stem for sm_90a: wgmma on windows that lie ready in the rows of pixels, the maximum in
// registers.
//
// Algorithm: the product is weights times windows, so that its rows are 64 channels and its columns
// 112 positions of one line of the convolution's result, which is the width of an image of 224
// pixels. A window's row counts as 8 pixels of 4 channels: one pixel before the window and a
// channel, both with weights of zero, make it 4 chunks of 16 bytes. The window moves by two pixels,
// one chunk, so that the windows of neighbouring positions overlap in shared memory as they do in
// the image: position p's chunk k is the line's chunk p + k, and the descriptor of a matrix without
// swizzle names them all. No matrix of windows is formed. The pixel before the window must not be
// read, as an infinity times zero would be seen: of each pair of pixels stands a copy with zeros
// for the first one, which gives chunk 0. 7 x 2 products of depth 16 make a line.
//
// A block takes a strip of lines of one image and goes down it, two lines at a time, of which the
// first product's end is awaited while the second runs. A thread holds pairs of positions of two
// channels: batch norm, rounding to pairs of 16 bits, then the maximum with the line before (kept
// from the last two), the maximum of a pair and of the pair's left neighbour (one shuffle), ReLU.
// Maximum and ReLU do not change under rounding, nor where they stand. What lies outside counts as
// zero, which ReLU would leave of minus infinity. Where a strip does not begin with the image, the
// lines before it are computed once more; likewise two columns, where an image is wider.
//
// Roles: the first warpgroup reads pixels, 8 of a thread, 16 bytes at a time, of images whose
// channels lie together or apart, one group of 4 lines ahead of the group that it stores; bytes are
// normalised in fp32 on the way, zeros standing beside the image as ever. The second multiplies and
// pools. Two blocks share an SM, so that one's products run while the other
// pools.
//
// Shared memory: 4 groups of 4 lines of 240 pixels, twice, lines 16 bytes apart modulo 128 so that
// 4 lines x 2 threads of 64 bytes fill the banks; 28 chunks x 64 rows of weights; 56 x 64 of the
// result, chunks permuted by 2 * (position % 4); mbarriers.
//
// Memory: x and the result once, the floor, but for the lines and columns above; weights once a
// block.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pipeline.cuh"
#include "kernels/cuda/ptx_sm90.cuh"
#include "kernels/cuda/stem_sm90.h"

namespace resnet_fused {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kThreads = 2 * kWarpgroup;
constexpr int kBlocks = 2;  // of an SM
constexpr int kNumProducerRegisters = 56, kNumConsumerRegisters = 200, kNumLaunchRegisters = 128;
static_assert(kNumProducerRegisters + kNumConsumerRegisters <= 2 * kNumLaunchRegisters);

constexpr int kWindow = 7, kChannels = 3;
constexpr int kN = 64;                                 // channels of the result
constexpr int kColumns = 112, kPooled = kColumns / 2;  // positions of a line, and pooled
constexpr int kChunk = 16;                             // bytes: two pixels of 4 channels
constexpr int kWindowChunks = 4;

constexpr int kOctets = 30;  // of pixels, of a line
constexpr int kLines = 4;    // that are loaded together
constexpr int kGroups = 4;
constexpr int kLinePitch = kOctets * 4 * kChunk + 16;
constexpr int kGroupBytes = kLines * kLinePitch;
static_assert(kOctets * kLines <= kWarpgroup && kOctets * 8 >= 2 * kColumns + 6 + 4);

constexpr std::uint32_t kOdd = 0;                               // pixels of odd columns, alone
constexpr std::uint32_t kPairs = kOdd + kGroups * kGroupBytes;  // all
constexpr std::uint32_t kWeights = kPairs + kGroups * kGroupBytes;
constexpr std::uint32_t kWeightChunkBytes = kN * kChunk;
constexpr std::uint32_t kResult = kWeights + kWindow * kWindowChunks * kWeightChunkBytes;
constexpr std::uint32_t kMbarriers = kResult + kPooled * kN * 2;
constexpr int kSharedBytes = kMbarriers + 128;
using Pixels = Pipeline<PipelineId::kStemPixels, kMbarriers, kGroups>;
static_assert(Pixels::kEnd <= kSharedBytes && kMbarriers % 8 == 0);

constexpr int kRuns = kColumns / 8;  // pairs of positions that a thread holds of a channel
using Pairs = std::uint32_t[kRuns][2];

struct Arguments {
  Stem stem;
  int pooled_h, pooled_w;
  int tiles_w;                // across an image
  int segments, per_segment;  // strips down an image, and their pooled lines
  std::int64_t units;
  SpinLimit spin_limit;
};

// This block's strips, and the pooled lines of each: those of the last two lines of the convolution
// before it stand for a first one, unless the image begins there.
class Strips {
 public:
  __device__ __forceinline__ explicit Strips(const Arguments& a) : a_(a) { open(); }

  __device__ __forceinline__ bool valid() const { return unit_ < a_.units; }
  __device__ __forceinline__ void advance() {
    unit_ += gridDim.x;
    open();
  }

  __device__ __forceinline__ int unit() const { return static_cast<int>(unit_); }
  __device__ __forceinline__ std::int64_t image() const { return image_; }
  __device__ __forceinline__ int column() const { return column_; }  // pooled, of position 0
  __device__ __forceinline__ int first() const { return first_; }    // pooled line to be stored
  __device__ __forceinline__ int begin() const { return first_ - (first_ > 0); }
  __device__ __forceinline__ int end() const { return end_; }

 private:
  __device__ __forceinline__ void open() {
    const std::int64_t strip = unit_ / a_.segments;
    image_ = strip / a_.tiles_w;
    column_ = static_cast<int>(strip % a_.tiles_w) * (kPooled - 1);
    first_ = static_cast<int>(unit_ % a_.segments) * a_.per_segment;
    const int end = first_ + a_.per_segment;
    end_ = end < a_.pooled_h ? end : a_.pooled_h;
  }

  const Arguments& a_;
  std::int64_t unit_ = blockIdx.x, image_ = 0;
  int column_ = 0, first_ = 0, end_ = 0;
};

// 8 pixels of 3 channels as they lie in memory: 3 x 8 values behind one another, or 8 of each
// channel. A group of 4 lines is x's lines 4 g - 2 to 4 g + 1.
template <typename X>
struct Octet {
  Pack<X, 8> part[kChannels] = {};
};

// Goes through the groups of lines of all of a block's strips: two more than it has pooled lines.
template <typename T, typename X, bool kPlanar>
class Producer {
 public:
  __device__ __forceinline__ explicit Producer(const Arguments& a)
      : a_(a.stem), strips_(a), group_(strips_.begin() - 1) {}

  __device__ __forceinline__ bool valid() const { return strips_.valid(); }
  __device__ __forceinline__ int unit() const { return strips_.unit(); }
  __device__ __forceinline__ void advance() {
    if (group_++ < strips_.end()) return;
    strips_.advance();
    group_ = strips_.begin() - 1;
  }

  __device__ __forceinline__ void load() {
    octet_ = {};
    inside_ = false;
    const int first = (4 * strips_.column() - 4) & ~7;  // column of x
    const int h = 4 * group_ - 2 + line(), w = first + 8 * octet();
    if (!active() || static_cast<unsigned>(h) >= static_cast<unsigned>(a_.height) ||
        static_cast<unsigned>(w) >= static_cast<unsigned>(a_.width)) {
      return;
    }
    const std::int64_t image = strips_.image();
    const std::int64_t plane = std::int64_t{a_.height} * a_.width;
    const std::int64_t at = std::int64_t{h} * a_.width + w;
    const X* const x = static_cast<const X*>(a_.x) + image * plane * kChannels;
    inside_ = true;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const X* const from = kPlanar ? x + k * plane + at : x + at * kChannels + 8 * k;
      octet_.part[k] = ptx::load_global(reinterpret_cast<const Pack<X, 8>*>(from));
    }
  }

  __device__ __forceinline__ void store(int stage) const {
    if (!active()) return;
    const std::uint32_t to = stage * kGroupBytes + line() * kLinePitch + octet() * 4 * kChunk;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Pack<T, 8> both = pair(k);
      Pack<T, 8> odd = both;
#pragma unroll
      for (int e = 0; e < 4; ++e) odd.value[e] = from_float<T>(0.0f);
      ptx::store_shared(kPairs + to + k * kChunk, both);
      ptx::store_shared(kOdd + to + k * kChunk, odd);
    }
  }

 private:
  // Neighbouring threads take 4 lines of 2 octets.
  __device__ __forceinline__ static int line() { return threadIdx.x % kLines; }
  __device__ __forceinline__ static int octet() { return threadIdx.x / kLines; }
  __device__ __forceinline__ static bool active() { return octet() < kOctets; }

  // Pixels 2 k and 2 k + 1, of 4 channels, the last one zero.
  __device__ __forceinline__ Pack<T, 8> pair(int k) const {
    const auto value = [&](int e) {
      const int pixel = 2 * k + e / 4, channel = e % 4, n = pixel * kChannels + channel;
      return kPlanar ? octet_.part[channel].value[pixel] : octet_.part[n / 8].value[n % 8];
    };
    if constexpr (std::is_same_v<X, T>) {
      Pack<T, 8> both;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        both.value[e] = e % 4 == kChannels ? from_float<T>(0.0f) : value(e);
      }
      return both;
    } else {
      float both[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        both[e] = 0.0f;
        if (e % 4 < kChannels && inside_) {
          both[e] = fmaf(value(e), a_.scale[e % 4], a_.shift[e % 4]);
        }
      }
      return pack_floats<T>(both);
    }
  }

  const Stem& a_;
  Strips strips_;
  int group_;
  Octet<X> octet_;
  bool inside_;  // the image
};

// The role of the first warpgroup.
template <typename T, typename X, bool kPlanar>
__device__ __forceinline__ void load_pixels(const Arguments& a) {
  Pixels pixels(a.spin_limit);
  Producer<T, X, kPlanar> producer(a);
  if (!producer.valid()) return;
  producer.load();
#pragma unroll 1
  while (producer.valid()) {
    pixels.acquire(producer.unit());
    producer.store(pixels.stage());
    ptx::fence_proxy_async();
    pixels.commit();
    pixels.advance();
    producer.advance();
    if (producer.valid()) producer.load();
  }
}

// Weights as they lie in memory go to where the pixels will, and from there to their places: chunk
// 4 r + k of channel n has pixels 2 k - 1 and 2 k of row r. By all threads.
template <typename T>
__device__ __forceinline__ void load_weights(const Stem& a, int first) {
  constexpr int kPerChannel = kWindow * kWindow * kChannels;
  using Quad = Pack<std::uint32_t, 4>;
  const int left = a.out_channels - first, channels = left < kN ? left : kN;
  const T* const from = static_cast<const T*>(a.weight) + std::int64_t{first} * kPerChannel;
#pragma unroll 1
  for (int i = threadIdx.x; i < channels * kPerChannel / 8; i += kThreads) {
    ptx::store_shared(i * 16, ptx::load_global(reinterpret_cast<const Quad*>(from) + i));
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < kWindow * kWindowChunks * kN; i += kThreads) {
    const int n = i % kN, r = i / kN / kWindowChunks, k = i / kN % kWindowChunks;
    Pack<T, 8> chunk;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int s = 2 * k + e / 4 - 1, c = e % 4;
      chunk.value[e] = from_float<T>(0.0f);
      if (c < kChannels && s >= 0 && n < channels) {
        const int at = n * kPerChannel + (r * kWindow + s) * kChannels + c;
        chunk.value[e] = ptx::load_shared<T>(at * sizeof(T));
      }
    }
    ptx::store_shared(kWeights + i * kChunk, chunk);
  }
}

// The products of one line: its window begins with line `first` of those that begin with the last
// of the group at `before`, go on with the 4 at `own` and end with those at `behind`.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[kColumns / 2], int first, std::uint64_t odd,
                                         std::uint64_t pairs, std::uint64_t weights, int before,
                                         int own, int behind) {
  constexpr unsigned kUnit = ptx::kDescriptorUnit;
#pragma unroll
  for (int r = 0; r < kWindow; ++r) {
    const int line = first + r;
    const unsigned at =
        line == 0 ? before * (kGroupBytes / kUnit) + 3 * (kLinePitch / kUnit)
        : line <= kLines
            ? own * (kGroupBytes / kUnit) + (line - 1) * (kLinePitch / kUnit)
            : behind * (kGroupBytes / kUnit) + (line - 1 - kLines) * (kLinePitch / kUnit);
    const std::uint64_t of_weights = weights + r * (kWindowChunks * kWeightChunkBytes / kUnit);
    ptx::wgmma<T>(d, of_weights, odd + at, r > 0);
    ptx::wgmma<T>(d, of_weights + 2 * kWeightChunkBytes / kUnit, pairs + at, true);
  }
}

// Batch norm and rounding of a line.
template <typename T>
__device__ __forceinline__ void normalise(const float (&d)[kColumns / 2], const ScaleShift (&of)[2],
                                          Pairs& line) {
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float y[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) y[e] = Epilogue<T>::normalise(d[4 * j + 2 * c + e], of[c]);
      const Pack<T, 2> rounded = pack_floats<T>(y);
      std::memcpy(&line[j][c], &rounded, sizeof(rounded));
    }
  }
}

template <typename T>
__device__ __forceinline__ void take_larger(Pairs& line, const Pairs& other) {
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) line[j][c] = ptx::max_nan_pair<T>(line[j][c], other[j][c]);
  }
}

// The maximum of each pair and of the second of the pair before it, and ReLU; to shared memory.
template <typename T>
__device__ __forceinline__ void pool_across(const Pairs& line) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kWarpgroup / 32;
  const int g = lane / 4, t = lane % 4;
  const bool second = g % 2 != 0;
  // Channels g and g + 1 of the warp's 16, or 8 more: an even g keeps the former, an odd g the
  // latter, and hands the others to its neighbour.
  const int chunk = 2 * warp + second;
  const std::uint32_t to =
      kResult + t * (kN * 2) + (chunk ^ 2 * t) * kChunk + g / 2 * sizeof(std::uint32_t);
  std::uint32_t last = 0;
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    const std::uint32_t a = line[j][0], b = line[j][1];
    const std::uint32_t right = a >> 16 | (b & 0xffff0000u);
    const std::uint32_t handed = t == 3 ? last : right;
    const std::uint32_t left = ptx::shuffle(handed, lane & ~3 | (t + 3 & 3));
    std::uint32_t most = ptx::max_nan_pair<T>((a & 0xffffu) | b << 16, right);
    most = ptx::max_nan_pair<T>(most, left);
    most = ptx::max_nan_pair<T>(most, 0);
    last = right;
    const std::uint32_t other = ptx::shuffle(most, lane ^ 4);
    const std::uint32_t channels =
        second ? other >> 16 | (most & 0xffff0000u) : (most & 0xffffu) | other << 16;
    ptx::store_shared(to + 4 * j * (kN * 2), channels);
  }
}

// Writes a pooled line from shared memory.
template <typename T>
__device__ __forceinline__ void store_line(const Arguments& a, const Strips& strip, int p,
                                           int first) {
  using Octet = Pack<T, 8>;
  constexpr int kAcross = kN / 8, kAtOnce = kWarpgroup / kAcross;
  const int thread = threadIdx.x % kWarpgroup;
  const int column = thread % kAcross, place = thread / kAcross;
  const int channel = first + 8 * column;
  T* const line =
      static_cast<T*>(a.stem.out) +
      ((strip.image() * a.pooled_h + p) * a.pooled_w + strip.column()) * a.stem.out_channels +
      channel;
  const int begin = strip.column() > 0, end = a.pooled_w - strip.column();
#pragma unroll
  for (int i = 0; i < kPooled; i += kAtOnce) {
    const int q = place + i;
    if (q < begin || q >= end || q >= kPooled || channel >= a.stem.out_channels) continue;
    const auto values =
        ptx::load_shared<Octet>(kResult + q * (kN * 2) + (column ^ 2 * (q % 4)) * kChunk);
    ptx::store_global(reinterpret_cast<Octet*>(line + std::int64_t{q} * a.stem.out_channels),
                      values);
  }
}

__device__ __forceinline__ ScaleShift scale_shift_of(const Stem& a, int channel) {
  if (channel >= a.out_channels) return {};
  return resnet_fused::scale_shift_of(
      parameter(a.bn.mean, channel, 0.0f), parameter(a.bn.var, channel, 1.0f),
      parameter(a.bn.weight, channel, 1.0f), parameter(a.bn.bias, channel, 0.0f), a.bn.eps);
}

// The role of the second warpgroup.
template <typename T>
__device__ __forceinline__ void consume(const Arguments& a, int first) {
  const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
  const int channel = first + 16 * warp + lane / 4;
  const ScaleShift of[2] = {scale_shift_of(a.stem, channel), scale_shift_of(a.stem, channel + 8)};
  const std::uint64_t weights = ptx::plain_descriptor(kWeights, kWeightChunkBytes);
  Pixels pixels(a.spin_limit);
  const auto next = [&](const Strips& strip) {
    const int stage = pixels.stage();
    pixels.wait(strip.unit());
    pixels.advance();
    return stage;
  };
  const auto release = [&](int stage) {
    if (lane == 0) Pixels::release(stage);
  };
#pragma unroll 1
  for (Strips strip(a); strip.valid(); strip.advance()) {
    // Position 0's window begins with the first or third chunk of a line.
    const std::uint32_t moved = strip.column() % 2 == 0 ? 2 * kChunk : 0;
    const std::uint64_t odd = ptx::plain_descriptor(kOdd + moved, kPairs - kOdd + kChunk);
    const std::uint64_t pairs = ptx::plain_descriptor(kPairs + moved + 2 * kChunk, kChunk);
    int before = next(strip), own = next(strip);
    Pairs kept = {};
#pragma unroll 1
    for (int p = strip.begin(); p < strip.end(); ++p) {
      const int behind = next(strip);
      float upper[kColumns / 2], lower[kColumns / 2];
      ptx::wgmma_fence(upper);
      multiply<T>(upper, 0, odd, pairs, weights, before, own, behind);
      ptx::wgmma_commit();
      ptx::wgmma_fence(lower);
      multiply<T>(lower, 2, odd, pairs, weights, before, own, behind);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>(upper);
      release(before);
      before = own;
      own = behind;
      Pairs line;
      normalise<T>(upper, of, line);
      take_larger<T>(line, kept);
      ptx::wgmma_wait<0>(lower);
      normalise<T>(lower, of, kept);
      take_larger<T>(line, kept);
      if (p < strip.first()) continue;
      ptx::named_barrier(1, kWarpgroup);  // the line before has been read
      pool_across<T>(line);
      ptx::named_barrier(1, kWarpgroup);
      store_line<T>(a, strip, p, first);
    }
    release(before);
    release(own);
  }
}

// Grid: (blocks that share the strips; tiles of channels).
template <typename T, typename X, bool kPlanar>
__global__ void __launch_bounds__(kThreads, kBlocks)
    stem_sm90_kernel(const __grid_constant__ Arguments a) {
  const int first = blockIdx.y * kN;
  ptx::registers_at_launch<kNumLaunchRegisters>();
  if (threadIdx.x == 0) {
    Pixels::init(kWarpgroup, kWarpgroup / 32);
    ptx::fence_mbarrier_init();
  }
  ptx::wait_for_earlier_kernels();
  load_weights<T>(a.stem, first);
  ptx::fence_proxy_async();
  __syncthreads();

  if (ptx::uniform(threadIdx.x / kWarpgroup) == 0) {
    ptx::decrease_registers<kNumProducerRegisters>();
    load_pixels<T, X, kPlanar>(a);
  } else {
    ptx::increase_registers<kNumConsumerRegisters>();
    consume<T>(a, first);
  }
}

// Pooled lines of a strip: few, so that all blocks have some, or many, as each strip begins with
// two or three groups of lines of which nothing comes.
int lines_of_strip(std::int64_t strips, int pooled_h, std::int64_t blocks) {
  int best = pooled_h;
  std::int64_t least = 0;
  for (int lines = 1; lines <= pooled_h; ++lines) {
    const std::int64_t segments = ceil_div(pooled_h, lines);
    const std::int64_t found = ceil_div(strips * segments, blocks) * (lines + 2 + (segments > 1));
    if (least == 0 || found <= least) {
      least = found;
      best = lines;
    }
  }
  return best;
}

template <typename T, typename X>
LaunchPlan<Arguments> make_plan(const Stem& stem, int num_sms) {
  Arguments a{};
  a.stem = stem;
  a.pooled_h = halved(halved(stem.height));
  a.pooled_w = halved(halved(stem.width));
  a.tiles_w = a.pooled_w <= kPooled ? 1 : static_cast<int>(ceil_div(a.pooled_w - 1, kPooled - 1));
  const std::int64_t strips = stem.batch * a.tiles_w;
  const std::int64_t across = ceil_div(stem.out_channels, kN);
  const std::int64_t blocks = std::max<std::int64_t>(1, kBlocks * num_sms / across);
  a.per_segment = lines_of_strip(strips, a.pooled_h, blocks);
  a.segments = static_cast<int>(ceil_div(a.pooled_h, a.per_segment));
  a.units = strips * a.segments;
  a.spin_limit = spin_limit;
  const dim3 grid(grid_size(std::min(a.units, blocks)), grid_size(across, kMaxGridY));
  return {stem.planar ? &stem_sm90_kernel<T, X, true> : &stem_sm90_kernel<T, X, false>,
          {a.units > kMaxGridX ? dim3(0) : grid, dim3(kThreads), kSharedBytes, dim3(1), true},
          a};
}

template <typename T>
LaunchPlan<Arguments> make_plan(const Stem& stem, int num_sms) {
  return stem.x_dtype == DType::kUInt8 ? make_plan<T, std::uint8_t>(stem, num_sms)
                                       : make_plan<T, T>(stem, num_sms);
}

}  // namespace

bool stem_sm90_can_implement(const Stem& stem) {
  return stem.width % 8 == 0 && halved(stem.height) % 2 == 0 && aligned(stem.x) &&
         aligned(stem.weight) && aligned(stem.out);
}

cudaError_t stem_sm90(const Stem& stem, int num_sms, cudaStream_t stream) {
  if (!stem_sm90_can_implement(stem)) return cudaErrorInvalidValue;
  return with_half(stem.dtype, [&](auto half) {
    return launch(make_plan<decltype(half)>(stem, num_sms), stream);
  });
}

}  // namespace resnet_fused
