// 3 x 3 convolutions of a training step for sm_90a, of whole lines: forward, with the statistics of
// the result, and the gradient of the input that masks. x is copied once, not nine times.
//
// Algorithm: a tile is lines of one image, or several small images, of all of its columns, and 64
// channels. For 64 channels of depth the lines that it needs are copied by im2col mode, one behind
// the other, each behind one pixel of zeros, with a line of zeros above each image. So the operand
// of any of the nine taps is the same rows of shared memory from another row on: the descriptor
// names another first row, while the swizzle goes by addresses, so that its base offset stays 0.
// Products are weights times pixels (rows are 64 output channels, columns the tile's positions, of
// which those between lines and images are computed in vain). The gradient of the input turns the
// window round and reads its weight by columns.
//
// Roles: blocks are persistent; one thread copies operands, one moves results, and two warpgroups
// of consumers take turns at tiles (persistent_conv.cuh), so that one's ending runs under the
// other's products.
//
// Endings: a lane has two channels, of a quarter of the positions. Statistics: values are rounded,
// stored, and, as rounded, summed: deviations from the tile's first position, which keeps the
// digits that a mean far from zero would take, and their squares. Mask: the tile of the pre-BN
// output below lies where the result will; a gradient stays where scale and shift make that
// positive, and it and its product with that value's deviation from the mean are summed. Positions
// in vain are left out of both. Four lanes make a channel's sums, and a part is a tile.
//
// Tiles (positions x channels): 216 x 64, which are 14 lines of 14 or 7 of 28; 248 x 64, which are
// 4 lines of 56 or 4 images of 7 x 7.
//
// Shared memory, from 0 on: 2 stages of 368 rows of x, 9 of 64 of the weight, all of 128 bytes; two
// results, of a row of 64 channels a position; mbarriers. 218 or 227 KiB.
//
// Pipelines (arrivals that fill / that empty a stage): pixels and weights (1 and their bytes / the
// 4 warps whose turn it is), results (1, and the bytes below / 1), turns (1 / 1).
//
// Memory: x, weight, what masks, and out once each; 12 or 8 bytes a channel for a tile's statistics
// or sums. Of L2 are asked, for 64 channels, (lines + 2) / lines times x, and all weights for every
// tile; but weights of 64 channels to 64 stay, and are asked for once a block.
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/channel_rows.cuh"
#include "kernels/cuda/conv_training_sm90_lines.h"
#include "kernels/cuda/persistent_conv.cuh"

namespace resnet_fused {
namespace {

constexpr int kSide = 3, kTaps = kSide * kSide;  // of the window
constexpr int kRows = 368;                       // of x, in a stage
constexpr int kPixelStages = 2;
constexpr int kShortestLine = 7;  // of a tile's lines, two do not begin within 8 positions
constexpr std::uint32_t kPixelBytes = kRows * kRowBytes, kWeightBytes = kProductM * kRowBytes;

template <int kPositions>
struct Tile : PersistentTile<kPositions, kProductM, kPixelStages, 2, 1, 1, 40, 232, true> {
  static constexpr int kRuns = kPositions / 8;
};

template <typename Tile>
struct Shared {
  static constexpr std::uint32_t kWeights = kPixelStages * kPixelBytes;
  static constexpr std::uint32_t kResults = kWeights + kTaps * kWeightBytes;
  static constexpr std::uint32_t kMbarriers = kResults + Tile::kResults * Tile::kResultBytes;
  using Pixels = Pipeline<PipelineId::kTrainingLinesPixels, kMbarriers, kPixelStages>;
  using Weights = Pipeline<PipelineId::kTrainingLinesWeights, Pixels::kEnd, kTaps>;
  using Results = Pipeline<PipelineId::kTrainingLinesResult, Weights::kEnd, Tile::kResults>;
  using Turns = Pipeline<PipelineId::kTrainingLinesTurns, Results::kEnd, 1>;
  static constexpr int kBytes = static_cast<int>(Turns::kEnd);
  static_assert(kPixelBytes % 1024 == 0 && Tile::kResultBytes % 1024 == 0 && kBytes <= 227 * 1024);
};

struct Arguments : PersistentArguments {
  float* parts;                    // of statistics or sums; may be null
  const float* below_scale_shift;  // rows of out_channels: mean, scale, shift
  int batch, lines, segments;      // lines of a tile in an image, and tiles of one
  int images;                      // of a tile
  int pitch;                       // positions from a line to the next
  unsigned image_bytes;            // of a result, from an image to the next
  unsigned copied_bytes, below_bytes;
  bool resident;  // weights
};

// What a tile has of images, and its part.
struct Place {
  int part, image, line;

  template <typename Tile>
  __device__ __forceinline__ Place(const Arguments& a, const TileScheduler<Tile>& at)
      : part(at.row()), image(part / a.segments * a.images), line(part % a.segments * a.lines) {}
};

// The role of one thread: asks for the operands of every tile.
template <typename Tile, bool kGradient>
__device__ __forceinline__ void load_operands(const Arguments& a) {
  using Shared = Shared<Tile>;
  typename Shared::Pixels pixels(a.spin_limit);
  typename Shared::Weights weights(a.spin_limit);
  bool loads_weights = true;
#pragma unroll 1
  for (TileScheduler<Tile> at(a); at.valid(); at.advance()) {
    const Place place(a, at);
#pragma unroll 1
    for (int c = 0; c < a.conv.channels; c += kMapChannels) {
      pixels.acquire(at.tile());
      pixels.commit_bytes(a.copied_bytes);
      ptx::load_pixels(pixels.stage() * kPixelBytes, a.conv.x, pixels.full(),
                       {c, -1, place.line - 1, place.image}, {0, 0});
      pixels.advance();
      if (!loads_weights) continue;
#pragma unroll 1
      for (int tap = 0; tap < kTaps; ++tap) {
        const std::uint32_t to = Shared::kWeights + weights.stage() * kWeightBytes;
        weights.acquire(at.tile());
        weights.commit_bytes(kWeightBytes);
        if constexpr (kGradient) {
          ptx::load_tile(to, a.conv.weight, weights.full(), {at.channel(), kTaps - 1 - tap, c});
        } else {
          ptx::load_tile(to, a.conv.weight, weights.full(), {c, tap, at.channel()});
        }
        weights.advance();
      }
    }
    loads_weights = !a.resident;
  }
}

// For move_results, as those of persistent_conv.cuh.
template <typename Tile>
__device__ __forceinline__ void store(const Arguments& a, const TileScheduler<Tile>& at,
                                      std::uint32_t result) {
  const Place place(a, at);
#pragma unroll 1
  for (int i = 0; i < a.images; ++i) {
    ptx::store_tile(a.out, result + i * a.image_bytes,
                    {at.channel(), 0, place.line, place.image + i});
  }
  ptx::bulk_commit();
  ptx::bulk_wait_read<0>();
}

template <typename Tile>
__device__ __forceinline__ unsigned residual_bytes(const Arguments& a, const TileScheduler<Tile>&) {
  return a.below_bytes;
}

template <typename Tile>
__device__ __forceinline__ void load_residual(const Arguments& a, const TileScheduler<Tile>& at,
                                              std::uint32_t result, std::uint32_t mbarrier) {
  const Place place(a, at);
#pragma unroll 1
  for (int i = 0; i < a.images; ++i) {
    ptx::load_tile(result + i * a.image_bytes, a.residual, mbarrier,
                   {at.channel(), 0, place.line, place.image + i});
  }
}

// Which of a lane's positions are some of an image: bit 2 j + e is that of value e in run j.
class Positions {
 public:
  template <typename Tile>
  __device__ __forceinline__ static Positions of(const Arguments& a, const Tile&) {
    Positions found{0};
    const int first = 2 * (threadIdx.x % 4);
    int column[2] = {first, first + 1}, line[2] = {};
#pragma unroll
    for (int i = 0; i < 2 * Tile::kRuns; ++i) {
      int &w = column[i % 2], &h = line[i % 2];
      const bool is_one = w < a.pitch - 1 && h < static_cast<int>(a.out_height);
      found.bits_ |= std::uint64_t{is_one} << i;
      w += 8;
      if (w < a.pitch) continue;
      w -= a.pitch;
      h = h == static_cast<int>(a.out_height) ? 0 : h + 1;
    }
    return found;
  }

  // Of the tile's first `count`.
  __device__ __forceinline__ Positions first(int count) const {
    const int left = count - static_cast<int>(2 * (threadIdx.x % 4));
    const int bits = left < 0 ? 0 : left / 8 * 2 + (left % 8 < 2 ? left % 8 : 2);
    return bits < 64 ? Positions(bits_ & ((std::uint64_t{1} << bits) - 1)) : *this;
  }

  __device__ __forceinline__ bool has(int i) const { return bits_ >> i & 1; }

 private:
  __device__ __forceinline__ explicit Positions(std::uint64_t bits) : bits_(bits) {}

  std::uint64_t bits_;
};

// The sum of the four lanes that share channels.
__device__ __forceinline__ float sum_of_lanes(float value) {
  value += ptx::shuffle_xor(value, 1);
  return value + ptx::shuffle_xor(value, 2);
}

// What matrix_row names of one run, or of two, as store_line has them.
__device__ __forceinline__ void load_runs(std::uint32_t (&to)[4], std::uint32_t row, bool two) {
  if (two) return ptx::ldmatrix_trans<4>(to, row);
  std::uint32_t one[2];
  ptx::ldmatrix_trans<2>(one, row);
  to[0] = one[0];
  to[1] = one[1];
}

// Rounds a tile's values, which go to `result`, and writes its `count` positions' statistics, or
// the sums of what remains of a gradient, to `part` of the lane's channels.
template <typename T, typename Tile, bool kGradient>
__device__ __forceinline__ void finish(const Arguments& a, const float (&acc)[Tile::kM / 2],
                                       std::uint32_t result, const Channels& below, int channel,
                                       const Positions& positions, int part, int count) {
  const int lane = threadIdx.x % 32;
  const std::uint32_t from = matrix_row(result);
  float pivot[2] = {}, sum[2] = {}, second[2] = {};
  std::uint32_t before[4];  // of two runs
  if constexpr (!kGradient) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // the first position is that of each four lanes' first
      const float first[2] = {acc[2 * half], acc[2 * half]};
      const std::uint32_t word = ptx::shuffle(bits_of(pack_floats<T>(first)), lane / 4 * 4);
      Pack<T, 2> rounded;
      memcpy(&rounded, &word, sizeof(word));
      pivot[half] = to_float(rounded.value[0]);
    }
  }
  store_line<Tile::kRuns>(result, [&](int j, int half) {
    Pack<T, 2> of_below;
    if constexpr (kGradient) {
      // As store_line will: each lane names the rows that it then writes.
      if (j % 2 == 0 && half == 0) load_runs(before, from + j * 8 * kRowBytes, j + 1 < Tile::kRuns);
      memcpy(&of_below, &before[j % 2 * 2 + half], sizeof(of_below));
    }
    float y[2], factor[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      y[e] = acc[4 * j + 2 * half + e];
      if constexpr (kGradient) {
        // In vain there may be anything, also NaN.
        const bool counts = positions.has(2 * j + e);
        const float value = to_float(of_below.value[e]);
        const bool stays = counts && normalise<false>(value, below.of[half]) > 0.0f;
        y[e] = stays ? y[e] : 0.0f;
        factor[e] = counts ? value - below.of[half].mean : 0.0f;
      }
    }
    const Pack<T, 2> rounded = pack_floats<T>(y);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float value = to_float(rounded.value[e]);
      if constexpr (!kGradient) {
        value = positions.has(2 * j + e) ? value - pivot[half] : 0.0f;
        factor[e] = value;
      }
      sum[half] += value;
      second[half] = fmaf(value, factor[e], second[half]);
    }
    return bits_of(rounded);
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = sum_of_lanes(sum[half]), other = sum_of_lanes(second[half]);
    if (a.parts == nullptr || lane % 4 != 0 || !below.exist[half]) continue;
    constexpr int kOfPart = kGradient ? 2 : 3;
    const std::int64_t apart = a.out_channels;
    float* const to = a.parts + part * kOfPart * apart + channel + row(half);
    if constexpr (kGradient) {
      ptx::store_global(to, total);
      ptx::store_global(to + apart, other);
    } else {
      const float positions_of_part = static_cast<float>(count);
      const float from_pivot = total / positions_of_part;
      ptx::store_global(to, pivot[half] + from_pivot);
      ptx::store_global(to + apart, fmaf(-total, from_pivot, other));
      ptx::store_global(to + 2 * apart, positions_of_part);
    }
  }
}

// The role of a warpgroup: every other tile.
template <typename T, typename Tile, bool kGradient>
__device__ __forceinline__ void consume(const Arguments& a, int consumer) {
  using Shared = Shared<Tile>;
  constexpr unsigned kUnit = ptx::kDescriptorUnit;
  constexpr unsigned kPixel = kRowBytes / kUnit, kDepth = 32 / kUnit;  // 16 channels, 32 bytes
  constexpr unsigned kWeightDepth = kGradient ? 16 * kRowBytes / kUnit : kDepth;
  typename Shared::Pixels pixels(a.spin_limit);
  typename Shared::Weights weights(a.spin_limit);
  typename Shared::Results results(a.spin_limit);
  typename Shared::Turns turns(a.spin_limit);
  const std::uint64_t first_pixels = ptx::matrix_descriptor(0);
  const std::uint64_t first_weights =
      kGradient ? ptx::transposed_descriptor(Shared::kWeights, kWeightBytes)
                : ptx::matrix_descriptor(Shared::kWeights);
  const bool leads = threadIdx.x % kWarpgroup == 0, releases = threadIdx.x % 32 == 0;
  const int chunks = (a.conv.channels + kMapChannels - 1) / kMapChannels;
  const Positions of_images = Positions::of(a, Tile());
  int turn = 0;
#pragma unroll 1
  for (TileScheduler<Tile> at(a); at.valid(); at.advance()) {
    if (turn++ % kNumConsumers != consumer) {
      pixels.advance(chunks);
      if (!a.resident) weights.advance(kTaps * chunks);
      results.advance();
      continue;
    }
    const Place place(a, at);
    Channels below;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int channel = at.channel() + row(half);
      below.exist[half] = channel < a.out_channels;
      if (!kGradient || !below.exist[half]) continue;
      const auto load = [&](int i) {
        return ptx::load_global(a.below_scale_shift + i * a.out_channels + channel);
      };
      below.of[half] = {load(0), load(1), 0.0f, load(2)};
    }
    float acc[Tile::kM / 2];
    int last = -1;  // a stage of weights that is read, not known to be done with
    int last_pixels = -1;
    take_turn(consumer, at.tile(), turns);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      pixels.wait(at.tile());
      std::uint64_t line = first_pixels + pixels.stage() * (kPixelBytes / kUnit);
#pragma unroll 1
      for (int r = 0; r < kSide; ++r, line += a.pitch * kPixel) {
#pragma unroll
        for (int s = 0; s < kSide; ++s) {
          const std::uint64_t x = line + s * kPixel;
          const std::uint64_t weight = first_weights + weights.stage() * (kWeightBytes / kUnit);
          weights.wait(at.tile());
          ptx::wgmma_fence(acc);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            ptx::wgmma<T, kGradient>(acc, weight + k * kWeightDepth, x + k * kDepth,
                                     chunk + r + s + k > 0);
          }
          ptx::wgmma_commit();
          ptx::wgmma_wait<1>(acc);
          if (releases && last >= 0 && !a.resident) Shared::Weights::release(last);
          if (s == 0 && releases && last_pixels >= 0) Shared::Pixels::release(last_pixels);
          if (s == 0) last_pixels = -1;
          last = weights.stage();
          weights.advance();
        }
      }
      last_pixels = pixels.stage();
      pixels.advance();
    }
    if (a.resident) weights.advance(kTaps);  // to the same stages' only phase
    pass_turn(consumer, turns);
    ptx::wgmma_wait<0>(acc);
    if (releases) {
      if (!a.resident) Shared::Weights::release(last);
      Shared::Pixels::release(last_pixels);
    }
    const std::uint32_t result = Shared::kResults + results.stage() * Tile::kResultBytes;
    const int images_left = a.batch - place.image, lines_left = a.out_height - place.line;
    const int images = images_left < a.images ? images_left : a.images;
    const int lines = lines_left < a.lines ? lines_left : a.lines;
    const int end = (a.images > 1 ? images * (a.lines + 1) : lines) * a.pitch;
    results.wait(at.tile());
    finish<T, Tile, kGradient>(a, acc, result, below, at.channel(), of_images.first(end),
                               place.part, images * lines * (a.pitch - 1));
    ptx::fence_proxy_async();
    ptx::named_barrier(1 + consumer, kWarpgroup);
    if (leads) results.release();
    results.advance();
  }
}

template <typename T, typename Tile, bool kGradient>
__global__ void __launch_bounds__(kThreads, 1)
    conv_training_sm90_lines_kernel(const __grid_constant__ Arguments a) {
  using Shared = Shared<Tile>;
  run_roles<Tile>(
      [] {
        Shared::Pixels::init(1, kWarpgroup / 32);
        Shared::Weights::init(1, kWarpgroup / 32);
        Shared::Results::init(1, 1);
        Shared::Turns::init(1, 1);
      },
      [&] { load_operands<Tile, kGradient>(a); }, nullptr,
      [&] { move_results<Tile, typename Shared::Results, Shared::kResults>(a); },
      [&](int consumer) { consume<T, Tile, kGradient>(a, consumer); });
}

// Calls function(Tile()) of the type that `tile` names; false if it names none.
template <typename Function>
bool with_tile(TrainingTile tile, Function&& function) {
  switch (tile) {
    case TrainingTile::k216x64Lines:
      function(Tile<216>());
      return true;
    case TrainingTile::k248x64Lines:
      function(Tile<248>());
      return true;
    default:
      return false;
  }
}

// Behind each line is a position that is none.
WholeLines lines_of(const ConvBn& a, int positions) { return {a, a.out_width + 1, positions}; }

template <typename T, typename Tile>
cudaError_t run(const ConvBn& a, const float* below_scale_shift, float* parts, int num_sms,
                cudaStream_t stream) {
  const WholeLines part = lines_of(a, Tile::kM);
  const int pitch = a.out_width + 1;
  const int copied = part.copied_lines * pitch + 1;  // the last pixel is behind the last line
  const bool gradient = below_scale_shift != nullptr;
  Arguments to{};
  to.parts = parts;
  to.below_scale_shift = below_scale_shift;
  to.batch = static_cast<int>(a.batch);
  to.lines = part.lines;
  to.segments = part.segments;
  to.images = part.images;
  to.pitch = pitch;
  to.image_bytes = static_cast<unsigned>((a.out_height + 1) * pitch * kRowBytes);
  to.copied_bytes = static_cast<unsigned>(copied * kRowBytes);
  to.below_bytes = static_cast<unsigned>(part.images * part.lines * pitch * kRowBytes);
  to.conv.channels = a.conv.channels;
  to.out_height = a.out_height;
  to.out_width = a.out_width;
  to.out_channels = a.out_channels;
  to.tiles = static_cast<unsigned>(part.tiles(a, kProductM));
  to.tiles_across = static_cast<unsigned>(ceil_div(a.out_channels, kProductM));
  to.resident = std::max(a.conv.channels, a.out_channels) <= kMapChannels;
  to.has_residual = gradient;
  to.spin_limit = spin_limit;
  // A pixel before each line and a line above each image, and none behind and below.
  cudaError_t status = encode_pixels(&to.conv.x, a.dtype, a.conv.x,
                                     {a.conv.channels, a.out_width, a.out_height, a.batch},
                                     {{-1, -1}, {0, 0}, {1, 1}}, copied);
  if (status == cudaSuccess) {
    const Sizes forward = {a.conv.channels, kTaps, a.out_channels};
    const Sizes turned = {a.out_channels, kTaps, a.conv.channels};
    status = encode_tiles(&to.conv.weight, a.dtype, a.conv.weight, gradient ? turned : forward,
                          {1, kProductM});
  }
  // Of a result and of what masks it the pixel behind each line is none.
  const auto encode_lines = [&](CUtensorMap* map, const void* data) {
    return encode_tiles(map, a.dtype, data, {a.out_channels, a.out_width, a.out_height, a.batch},
                        {pitch, part.lines, 1});
  };
  if (status == cudaSuccess) status = encode_lines(&to.out, a.out);
  if (gradient && status == cudaSuccess) status = encode_lines(&to.residual, a.residual.data);
  if (status != cudaSuccess) return status;
  const auto kernel = gradient ? &conv_training_sm90_lines_kernel<T, Tile, true>
                               : &conv_training_sm90_lines_kernel<T, Tile, false>;
  return launch_tiles<Tile>(kernel, to, num_sms, Shared<Tile>::kBytes, stream);
}

}  // namespace

bool is_lines(TrainingTile tile) {
  return with_tile(tile, [](auto) {});
}

bool training_lines_can_implement(const ConvBn& a, TrainingTile tile) {
  bool fits = false;  // the last window's rows in a stage
  with_tile(tile, [&](auto t) {
    const int pitch = a.out_width + 1;
    fits = a.out_width >= kShortestLine && pitch <= t.kM && t.kM + 2 * pitch + 2 <= kRows;
  });
  return fits && is_padded_3x3(a.conv);
}

// A step's products, as of the other tiles, with as much off them as of those of inference's lines
// (conv_sm90_lines.cu).
std::int64_t training_lines_cycles(const ConvBn& a, TrainingTile tile, int num_sms) {
  std::int64_t cycles = 0;
  with_tile(tile, [&](auto t) {
    constexpr std::int64_t kStep = t.kM * kProductM * kMapChannels / 2048;
    constexpr std::int64_t kEnd = t.kM * kProductM / 8;
    const std::int64_t of_sm = ceil_div(lines_of(a, t.kM).tiles(a, kProductM), num_sms);
    const std::int64_t products = steps_of(a.conv) * kStep;
    cycles = (of_sm * std::max(products, (products + kEnd) / 2) + kEnd) * 3 / 4;
  });
  return cycles;
}

int training_lines_parts(const ConvBn& a, TrainingTile tile) {
  int count = 0;
  with_tile(tile, [&](auto t) { count = static_cast<int>(lines_of(a, t.kM).parts); });
  return count;
}

cudaError_t training_lines(const ConvBn& a, const float* below_scale_shift, float* parts,
                           TrainingTile tile, int num_sms, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  with_tile(tile, [&](auto t) {
    status = with_half(a.dtype, [&](auto half) {
      return run<decltype(half), decltype(t)>(a, below_scale_shift, parts, num_sms, stream);
    });
  });
  return status;
}

}  // namespace resnet_fused
