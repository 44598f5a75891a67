// How the quantised kernels' weights lie in memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "parallel.h"

namespace resnet_fused::cpu {

constexpr std::int64_t kQuantizedStrip = 64;  // columns, at most
constexpr std::int64_t kQuantizedLanes = 16;  // a strip's width is a multiple

// Also from outside of what p points to.
inline const std::uint8_t* at_offset(const std::uint8_t* p, std::int64_t bytes) {
  return reinterpret_cast<const std::uint8_t*>(reinterpret_cast<std::uintptr_t>(p) + bytes);
}

// The matrix of a convolution's weights: blocks on a diagonal, rows summed over, columns output
// channels. A row is a word of 4 input channels of one tap. In memory a block is strips of columns,
// a strip is rows, and a row holds the 4 weights of each column. Behind all blocks follows, in
// int32, the sum of each column.
struct PackedWeights {
  std::int64_t blocks = 1;
  std::int64_t in_channels = 0, out_channels = 0;  // of one block
  std::int64_t taps = 1;

  // Groups of few channels share a block, in which the weights between them are zero, so that a row
  // is whole words and a strip whole vectors.
  static PackedWeights of_groups(std::int64_t in_channels, std::int64_t out_channels,
                                 std::int64_t groups, std::int64_t taps) {
    std::int64_t merged = 1;
    const auto fits = [&] {
      return merged == groups || (groups % merged == 0 && in_channels / groups * merged % 4 == 0 &&
                                  out_channels / groups * merged % kQuantizedLanes == 0);
    };
    while (!fits()) ++merged;
    return {groups / merged, in_channels / groups * merged, out_channels / groups * merged, taps};
  }

  std::int64_t tap_words() const { return ceil_div(in_channels, 4); }
  std::int64_t words() const { return taps * tap_words(); }
  std::int64_t padded() const { return round_up(out_channels, kQuantizedLanes); }
  std::int64_t strips_per_block() const { return ceil_div(out_channels, kQuantizedStrip); }
  std::int64_t strips() const { return blocks * strips_per_block(); }
  std::int64_t weight_bytes() const { return blocks * words() * padded() * 4; }
  std::int64_t bytes() const { return weight_bytes() + blocks * padded() * 4; }

  std::int64_t block(std::int64_t strip) const { return strip / strips_per_block(); }
  // Its first column in its block.
  std::int64_t column(std::int64_t strip) const {
    return strip % strips_per_block() * kQuantizedStrip;
  }
  std::int64_t width(std::int64_t strip) const {
    return std::min(padded() - column(strip), kQuantizedStrip);
  }
  std::int64_t offset(std::int64_t strip) const {
    return (block(strip) * padded() + column(strip)) * words() * 4;
  }
};

// Packs the int8 weights weight(k, tap, c), where k counts all columns and c a block's channels.
template <typename Weight>
void pack_weights(const PackedWeights& layout, void* packed, const Weight& weight) {
  auto* const bytes = static_cast<std::int8_t*>(packed);
  parallel_for(layout.strips(), [&](std::int64_t strip) {
    std::int8_t* const to = bytes + layout.offset(strip);
    const std::int64_t width = layout.width(strip), column = layout.column(strip);
    const std::int64_t first = layout.block(strip) * layout.out_channels + column;
    std::memset(to, 0, layout.words() * width * 4);
    for (std::int64_t j = 0; j < width; ++j) {
      std::int32_t sum = 0;
      if (column + j < layout.out_channels) {
        for (std::int64_t tap = 0; tap < layout.taps; ++tap) {
          for (std::int64_t c = 0; c < layout.in_channels; ++c) {
            const std::int8_t value = weight(first + j, tap, c);
            const std::int64_t row = tap * layout.tap_words() + c / 4;
            to[(row * width + j) * 4 + c % 4] = value;
            sum += value;
          }
        }
      }
      const std::int64_t padded_column = layout.block(strip) * layout.padded() + column + j;
      std::memcpy(bytes + layout.weight_bytes() + padded_column * 4, &sum, sizeof sum);
    }
  });
}

}  // namespace resnet_fused::cpu
