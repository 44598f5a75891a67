// What the quantised convolutions do with the sums of a tile: bias, shortcut, requantisation,
// bytes.
//
// Weights come with each 16 output channels in another order (quantized_conv.h), in which the four
// values that a thread holds of a row of them are neighbours, and its part of the row is a word.
//
// Shared memory: a tile of the result, in panels of up to 128 channels, rows of as many bytes whose
// 16-byte chunks are permuted as tensor_map.h says, so that 8 rows x 4 lanes x 4 bytes fill all 32
// banks once; the residual lies there first. Bias, multiplier and shortcut's scale of the tile's
// channels, kN x 4 bytes each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/dtype.cuh"
#include "kernels/cuda/ptx_bytes.cuh"

namespace resnet_fused {

enum class Shortcut : int { kNone, kResidual, kProjection };

// Of the whole result; bias is in the type of the sums.
struct QuantizedVectors {
  const void* bias;
  const float* multiplier;
  const float* shortcut_scale;  // null where there is no shortcut
};

// `Sum` is the accumulators' type: int32, or of e4m3 numbers float, in which every product and
// every sum is rounded by itself.
template <int kM, int kN, typename Sum>
class QuantizedEpilogue {
 public:
  static constexpr int kPanel = std::min(kN, 128);  // channels
  static constexpr int kPanelBytes = kM * kPanel;
  static constexpr int kVectorBytes = kN * 4;  // of one of the three

  // Copies the vectors of the channels from `first` on to shared memory, zeros beyond the last one;
  // by `threads` threads, of which this is number `thread`.
  __device__ __forceinline__ static void load_vectors(const QuantizedVectors& from, int first,
                                                      int channels, std::uint32_t to, int thread,
                                                      int threads) {
    const Sum* const bias = static_cast<const Sum*>(from.bias);
#pragma unroll 1
    for (int i = thread; i < kN; i += threads) {
      const int channel = first + i;
      const bool some = channel < channels, added = some && from.shortcut_scale != nullptr;
      ptx::store_shared(to + 4 * i, some ? ptx::load_global(bias + channel) : Sum{0});
      ptx::store_shared(to + kVectorBytes + 4 * i,
                        some ? ptx::load_global(from.multiplier + channel) : 0.0f);
      ptx::store_shared(to + 2 * kVectorBytes + 4 * i,
                        added ? ptx::load_global(from.shortcut_scale + channel) : 0.0f);
    }
  }

  // Where chunk `chunk` of a row of the result lies, behind the result's first byte.
  __device__ __forceinline__ static std::uint32_t place(int row, int chunk) {
    constexpr int kChunks = kPanel / 16, kLines = 128 / kPanel;
    const int permuted = chunk % kChunks ^ row / kLines % kChunks;
    return chunk / kChunks * kPanelBytes + row * kPanel + permuted * 16;
  }

  // A projection's sums, rounded to the scale of the accumulator.
  template <typename Acc>
  __device__ __forceinline__ static void rescale(Acc& acc, std::uint32_t vectors) {
#pragma unroll
    for (int group = 0; group < kGroups<Acc>; ++group) {
      const auto scale =
          ptx::load_shared<Floats>(vectors + 2 * kVectorBytes + offset_of(acc, group));
#pragma unroll
      for (int i = 0; i < Acc::kRows; ++i) {
#pragma unroll
        for (int e = 0; e < kRun; ++e) {
          Sum& value = value_of(acc, i, group, e);
          value = scaled(static_cast<float>(value), scale.value[e]);
        }
      }
    }
  }

  // Bias, the residual that lies in `result` if there is one, requantisation; the bytes go where
  // the residual was. Rows from `first_row` of the tile on. Groups of channels by kBatch: what they
  // need is loaded before any of them is stored.
  template <bool kResidual, typename Acc>
  __device__ __forceinline__ static void store_result(Acc& acc, std::uint32_t vectors,
                                                      std::uint32_t result, int first_row,
                                                      bool residual_is_signed, bool relu) {
    constexpr int kBatch = 2;
    const int row = first_row + acc.row(0);  // the others are the same modulo 8
    const auto at = [&](int i, int group) {
      return result + place(row, acc.column(2 * group) / 16) + (acc.row(i) - acc.row(0)) * kPanel +
             kRun * (threadIdx.x % 4);
    };
#pragma unroll
    for (int begin = 0; begin < kGroups<Acc>; begin += kBatch) {
      std::uint32_t y[kBatch][Acc::kRows];
      if constexpr (kResidual) {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
#pragma unroll
          for (int i = 0; i < Acc::kRows; ++i) {
            y[b][i] = ptx::load_shared<std::uint32_t>(at(i, begin + b));
          }
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const std::uint32_t of = vectors + offset_of(acc, begin + b);
        const auto bias = ptx::load_shared<Sums>(of);
        const auto multiplier = ptx::load_shared<Floats>(of + kVectorBytes);
        Floats scale{};
        if constexpr (kResidual) scale = ptx::load_shared<Floats>(of + 2 * kVectorBytes);
#pragma unroll
        for (int i = 0; i < Acc::kRows; ++i) {
          float added[kRun] = {}, v[kRun];
          if constexpr (kResidual) unpack(y[b][i], residual_is_signed, added);
#pragma unroll
          for (int e = 0; e < kRun; ++e) {
            Sum sum = value_of(acc, i, begin + b, e) + bias.value[e];
            if constexpr (kResidual) sum += scaled(added[e], scale.value[e]);
            v[e] = static_cast<float>(sum) * multiplier.value[e];
          }
          y[b][i] = packed(v, relu);
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
#pragma unroll
        for (int i = 0; i < Acc::kRows; ++i) ptx::store_shared(at(i, begin + b), y[b][i]);
      }
    }
  }

 private:
  static constexpr int kRun = 4;
  static constexpr bool kIntegers = std::is_integral_v<Sum>;
  using Sums = Pack<Sum, kRun>;
  using Floats = Pack<float, kRun>;
  template <typename Acc>
  static constexpr int kGroups = Acc::kColumns / 2;  // of 16 channels

  template <typename Acc>
  __device__ __forceinline__ static Sum& value_of(Acc& acc, int i, int group, int e) {
    return acc.at(i, 2 * group + e / 2, e % 2);
  }

  // Where the vectors' values of these channels lie behind the tile's first one.
  template <typename Acc>
  __device__ __forceinline__ static std::uint32_t offset_of(const Acc& acc, int group) {
    return 4 * (acc.column(2 * group) / 16 * 16 + kRun * (threadIdx.x % 4));
  }

  __device__ __forceinline__ static Sum scaled(float value, float scale) {
    const float product = ptx::multiply_rounded(value, scale);
    if constexpr (kIntegers) {
      return ptx::round_to_int(product);
    } else {
      return product;
    }
  }

  __device__ __forceinline__ static void unpack(std::uint32_t bytes, bool is_signed,
                                                float (&to)[kRun]) {
    if constexpr (kIntegers) {
      // Of signed bytes as of unsigned ones: -128 to 127 become 0 to 255. The byte stands behind
      // the exponent of 2^23, from which what it began with is taken again.
      const std::uint32_t flipped = is_signed ? 0x80808080u : 0;
      const float offset = 8388608.0f + (is_signed ? 128.0f : 0.0f);
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        to[e] = ptx::float_behind_exponent(bytes ^ flipped, e) - offset;
      }
    } else {
      ptx::unpack_e4m3(bytes, to);
    }
  }

  __device__ __forceinline__ static std::uint32_t packed(float (&v)[kRun], bool relu) {
    if constexpr (kIntegers) {
      std::int32_t rounded[kRun];
#pragma unroll
      for (int e = 0; e < kRun; ++e) rounded[e] = ptx::round_to_int(v[e]);
      return relu ? ptx::pack_saturated<std::uint8_t>(rounded)
                  : ptx::pack_saturated<std::int8_t>(rounded);
    } else {
      if (relu) {
#pragma unroll
        for (int e = 0; e < kRun; ++e) v[e] = ptx::max_nan(v[e], 0.0f);
      }
      return ptx::pack_e4m3(v);
    }
  }
};

}  // namespace resnet_fused
