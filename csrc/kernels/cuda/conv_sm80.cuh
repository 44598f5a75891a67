// What the convolutions for sm_80 and later share: tiles, the copies of their operands, and the
// products of these, as conv_sm80.cu explains.
#pragma once

#include <cstdint>

#include "kernels/cuda/conv.h"
#include "kernels/cuda/dtype.cuh"
#include "kernels/cuda/mma_sync.cuh"

namespace resnet_fused {

// kWarpsM x kWarpsN warps compute kM x kN results, kRowBytes of depth a step; registers are bounded
// so that kBlocks blocks fit an SM.
template <int kM_, int kN_, int kRowBytes_, int kWarpsM_, int kWarpsN_, int kStages_, int kBlocks_>
struct CpAsyncTile {
  static constexpr int kM = kM_, kN = kN_, kRowBytes = kRowBytes_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kStages = kStages_,
                       kBlocks = kBlocks_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kChunks = kRowBytes / kChunkBytes;  // of a row
  static constexpr int kRowsAtOnce = kThreads / kChunks;   // that the block copies
  static constexpr int kStageBytes = (kM + kN) * kRowBytes;
  static_assert(kM % kRowsAtOnce == 0 && kN % kRowsAtOnce == 0);
};

// The producer: one thread's part of copying both operands, the chunk `column` of every
// kRowsAtOnce-th row.
template <typename T, typename Tile, bool kVectorised>
class OperandLoader {
 public:
  __device__ __forceinline__ OperandLoader(const ConvBn& a, const ConvolutionBn& conv,
                                           std::int64_t first_position, int group,
                                           int first_channel)
      : conv_(conv),
        channels_(conv.channels / a.groups),
        column_(threadIdx.x % Tile::kChunks),
        row_(threadIdx.x / Tile::kChunks) {
    const int area = a.out_height * a.out_width;
#pragma unroll
    for (int i = 0; i < kRowsM; ++i) {
      const std::int64_t position = first_position + row_ + i * Tile::kRowsAtOnce;
      const std::int64_t image = position / area;
      const int pixel = static_cast<int>(position - image * area);
      const int p = pixel / a.out_width;
      h_[i] = image < a.batch ? p * conv.stride_h - conv.padding_h : kOutside;
      w_[i] = (pixel - p * a.out_width) * conv.stride_w - conv.padding_w;
      x_[i] =
          ((image * conv.height + h_[i]) * conv.width + w_[i]) * conv.channels + group * channels_;
    }
    const int out_channels = a.out_channels / a.groups;
#pragma unroll
    for (int i = 0; i < kRowsN; ++i) {
      const int channel = first_channel + row_ + i * Tile::kRowsAtOnce;
      const std::int64_t k = std::int64_t(group) * out_channels + channel;
      weight_[i] = channel < out_channels ? k * conv.kernel_h * conv.kernel_w * channels_ : -1;
    }
  }

  __device__ __forceinline__ int steps() const {
    return conv_.kernel_h * conv_.kernel_w * ((channels_ + kDepth - 1) / kDepth);
  }

  // Starts the copies of the next step, to the operands at `stage`.
  __device__ __forceinline__ void load(std::uint32_t stage) {
    const T* const x = static_cast<const T*>(conv_.x);
    const T* const weight = static_cast<const T*>(conv_.weight);
    const int c = first_ + column_ * kLanes;
    const int h = r_ * conv_.dilation_h;
    const int w = s_ * conv_.dilation_w;
    const std::int64_t x_tap = (std::int64_t(h) * conv_.width + w) * conv_.channels + c;
    const std::int64_t weight_tap = std::int64_t(r_ * conv_.kernel_w + s_) * channels_ + c;
#pragma unroll
    for (int i = 0; i < kRowsM; ++i) {
      const bool inside = static_cast<unsigned>(h_[i] + h) < static_cast<unsigned>(conv_.height) &&
                          static_cast<unsigned>(w_[i] + w) < static_cast<unsigned>(conv_.width);
      copy_chunk(stage, i, x, x_[i] + x_tap, inside ? channels_ - c : 0);
    }
    stage += Tile::kM * Tile::kRowBytes;
#pragma unroll
    for (int i = 0; i < kRowsN; ++i) {
      copy_chunk(stage, i, weight, weight_[i] + weight_tap, weight_[i] >= 0 ? channels_ - c : 0);
    }
    first_ += kDepth;
    if (first_ >= channels_) {
      first_ = 0;
      if (++s_ == conv_.kernel_w) {
        s_ = 0;
        ++r_;
      }
    }
  }

 private:
  static constexpr int kLanes = kChunkBytes / sizeof(T);
  static constexpr int kDepth = Tile::kRowBytes / sizeof(T);
  static constexpr int kRowsM = Tile::kM / Tile::kRowsAtOnce;
  static constexpr int kRowsN = Tile::kN / Tile::kRowsAtOnce;
  static constexpr int kOutside = -(1 << 30);  // above which no tap brings it back

  // Row i of this thread takes `left` elements, at most a chunk, and zeros after them.
  __device__ __forceinline__ void copy_chunk(std::uint32_t operand, int i, const T* from,
                                             std::int64_t offset, int left) const {
    const std::uint32_t to =
        operand + swizzle<Tile::kRowBytes>(row_ + i * Tile::kRowsAtOnce, column_);
    if constexpr (kVectorised) {
      ptx::cp_async_16(to, left > 0 ? from + offset : from, left > 0);
    } else {
      Pack<T, kLanes> chunk{};
#pragma unroll
      for (int e = 0; e < kLanes; ++e) {
        if (e < left) chunk.value[e] = ptx::load_global(from + offset + e);
      }
      ptx::store_shared(to, chunk);
    }
  }

  const ConvolutionBn& conv_;
  const int channels_;  // of a group
  const int column_, row_;
  int h_[kRowsM], w_[kRowsM];      // the pixel under tap (0, 0)
  std::int64_t x_[kRowsM];         // its offset
  std::int64_t weight_[kRowsN];    // of the output channel; -1 beyond the last
  int r_ = 0, s_ = 0, first_ = 0;  // the next step's tap and channel
};

// A warp's part of the tile, as WarpTile in mma_sync.cuh lays it out.
template <typename T, typename Tile>
class TensorCore : public WarpTile<T, Tile::kM / Tile::kWarpsM, Tile::kN / Tile::kWarpsN> {
 public:
  static constexpr int kWarpM = Tile::kM / Tile::kWarpsM, kWarpN = Tile::kN / Tile::kWarpsN;
  using Warp = WarpTile<T, kWarpM, kWarpN>;

  __device__ __forceinline__ int row(int i) const { return first_row() + 8 * i + lane() / 4; }
  __device__ __forceinline__ int column(int j) const {
    return first_column() + 8 * j + lane() % 4 * 2;
  }

  // Adds the product of the operands at `stage`.
  __device__ __forceinline__ void multiply(std::uint32_t stage) {
    const int a_row = first_row() + Warp::a_row(), b_row = first_column() + Warp::b_row();
    const std::uint32_t b_operand = stage + Tile::kM * Tile::kRowBytes;
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
      Warp::multiply_chunks(
          [&](int i) {
            return stage + swizzle<Tile::kRowBytes>(a_row + 16 * i, chunk + Warp::a_half());
          },
          [&](int j) {
            return b_operand + swizzle<Tile::kRowBytes>(b_row + 16 * j, chunk + Warp::b_half());
          });
    }
  }

 private:
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ static int first_row() {
    return threadIdx.x / 32 / Tile::kWarpsN * kWarpM;
  }
  __device__ __forceinline__ static int first_column() {
    return threadIdx.x / 32 % Tile::kWarpsN * kWarpN;
  }
};

}  // namespace resnet_fused
