// The vector code of dgrad.cpp, included once per instruction set by for_each_isa.h.
#include "vec.h"

constexpr int kVecs = 2;
constexpr std::int64_t kStrip = kVecs * kLanes;  // columns, of a tile and of packed weights
constexpr int kHalfRows = half_rows_of(kLanes);
// An fp32 sum runs through this many words in registers before it joins the others.
constexpr std::int64_t kRun = kFormat == Format::kFloat32 ? 64 : std::int64_t{1} << 62;

// Where a tap lies: words in the gradient from the phase's pixel on, and in the strip's weights.
struct TapPlace {
  std::int64_t grad, weights;
};

// The pixels of one micro-tile: two runs of `rows` neighbours.
struct Tile {
  const std::uint32_t* grad[2];
  std::int64_t out[2];  // pixels of the input's gradient
  int count, rows;
};

// All that the micro-tiles of a task share.
struct Shared {
  const ConvDgrad& conv;
  const TapPlace *taps, *taps_end;
  std::int64_t words;  // of a pixel
  std::int64_t pitch;  // words from one pixel's to the next
};

// The sums of a micro-tile and the epilogue, for columns from `channel` on.
template <int kRows, int kHalves>
ISA inline __attribute__((noinline)) void multiply(const Shared& shared, const Tile& tile,
                                                   const std::uint32_t* weights,
                                                   std::int64_t channel) {
  constexpr int kAll = kRows * kHalves;
  alignas(64) float sums[kAll * kVecs * kLanes];
  Vec sum[kAll][kVecs] = {};
  bool first_run = true;
  std::int64_t left = kRun;  // words until the end of a run
  const std::int64_t stride = shared.pitch, three = 3 * stride, five = 5 * stride;
  for (const TapPlace* tap = shared.taps; tap != shared.taps_end; ++tap) {
    const std::uint32_t* low = tile.grad[0] + tap->grad;
    const std::uint32_t* high = tile.grad[kHalves - 1] + tap->grad;
    const std::uint32_t* b = weights + tap->weights;
    for (std::int64_t words = shared.words; words > 0;) {
      if (left == 0) {
#pragma GCC unroll 14
        for (int r = 0; r < kAll; ++r) {
#pragma GCC unroll 2
          for (int j = 0; j < kVecs; ++j) {
            float* const to = sums + (r * kVecs + j) * kLanes;
            store(to, first_run ? sum[r][j] : load(to) + sum[r][j]);
            sum[r][j] = Vec{};
          }
        }
        first_run = false;
        left = kRun;
      }
      const std::int64_t count = std::min(words, left);
      words -= count;
      left -= count;
      for (std::int64_t i = 0; i < count; ++i, ++low, ++high, b += kStrip) {
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) {
          if constexpr (kParts > 1) asm("" : "+r"(low), "+r"(high), "+r"(b));
          Vec columns[kVecs];
#pragma GCC unroll 2
          for (int j = 0; j < kVecs; ++j) columns[j] = load_factors(b + j * kLanes, part);
#pragma GCC unroll 14
          for (int r = 0; r < kAll; ++r) {
            const std::int64_t offsets[] = {0,          stride, 2 * stride, three,
                                            4 * stride, five,   2 * three};
            // Not `r % kRows`: GCC 12 counts wrong with it under
            // -fsanitize=signed-integer-overflow.
            const std::int64_t offset = offsets[r < kRows ? r : r - kRows];
            const std::uint32_t word = (r < kRows ? low : high)[offset];
#pragma GCC unroll 2
            for (int j = 0; j < kVecs; ++j) {
              sum[r][j] = multiply_add(word, columns[j], sum[r][j], part);
            }
          }
        }
      }
    }
  }
  if (!first_run) {
#pragma GCC unroll 14
    for (int r = 0; r < kAll; ++r) {
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) sum[r][j] += load(sums + (r * kVecs + j) * kLanes);
    }
  }
  const ConvDgrad& conv = shared.conv;
  const std::int64_t channels = conv.in_channels, step = conv.window.stride[1] * channels;
#pragma GCC unroll 2
  for (int half = 0; half < kHalves; ++half) {
    std::int64_t at = tile.out[half] * channels + channel;
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r, at += step) {
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) {
        const std::int64_t valid = channels - channel - j * kLanes;
        if (valid <= 0) continue;
        const std::int64_t i = at + j * kLanes;
        Vec v = sum[half * kRows + r][j];
        if (conv.add != nullptr) v += load(static_cast<const Element*>(conv.add) + i, valid);
        store(static_cast<Element*>(conv.out) + i, v, valid);
      }
    }
  }
}

using Multiply = void (*)(const Shared&, const Tile&, const std::uint32_t*, std::int64_t);

template <int kHalves, int... Indices>
constexpr std::array<Multiply, sizeof...(Indices)> multiplies(
    std::integer_sequence<int, Indices...>) {
  return {multiply<Indices + 1, kHalves>...};
}

constexpr std::array<Multiply, kHalfRows> kMultiply[2] = {
    multiplies<1>(std::make_integer_sequence<int, kHalfRows>{}),
    multiplies<2>(std::make_integer_sequence<int, kHalfRows>{})};

ISA void dgrad_task(const ConvDgrad& conv, const Plan& plan, const Phase& phase,
                    std::int64_t line_task, std::int64_t strip_task) {
  const Window& window = conv.window;
  const std::int64_t first_line = line_task * phase.lines / phase.tasks;
  const std::int64_t last_line = (line_task + 1) * phase.lines / phase.tasks;
  if (first_line == last_line) return;
  const Operand operand(conv, plan, phase, first_line, last_line);
  thread_local std::vector<TapPlace> taps;
  taps.clear();
  const std::int64_t all_taps = window.kernel[0] * window.kernel[1];
  for (const Tap& tap : phase.taps) {
    const std::int64_t packed = all_taps - 1 - (tap.row * window.kernel[1] + tap.column);
    taps.push_back({operand.tap(tap), packed * plan.pixel_words * kStrip});
  }
  const Shared shared{conv, taps.data(), taps.data() + taps.size(), plan.pixel_words,
                      operand.pitch()};

  const std::int64_t strip_words = all_taps * plan.pixel_words * kStrip;
  const auto* const packed = static_cast<const std::uint32_t*>(conv.packed);
  const std::int64_t phase_bytes =
      4 * std::max<std::int64_t>(taps.size(), 1) * plan.pixel_words * kStrip;
  const std::int64_t together = std::max<std::int64_t>(kTogetherBytes / phase_bytes, 1);
  const std::int64_t first_strip = strip_task * plan.strips / plan.strip_tasks;
  const std::int64_t last_strip = (strip_task + 1) * plan.strips / plan.strip_tasks;
  for (std::int64_t strip = first_strip; strip < last_strip; strip += together) {
    const std::int64_t end = std::min((strip + together), last_strip) * kStrip;
    std::int64_t half = first_line * phase.halves_per_line;
    while (half < last_line * phase.halves_per_line) {
      Tile tile{};
      for (; tile.count < 2 && half < last_line * phase.halves_per_line; ++half) {
        const HalfPlace place = half_at(phase, half);
        if (tile.count == 1 && place.rows != tile.rows) break;
        tile.rows = static_cast<int>(place.rows);
        const std::int64_t image = place.line / phase.height, y = place.line % phase.height;
        tile.grad[tile.count] = operand.at(place.line, place.x);
        tile.out[tile.count++] =
            (image * conv.height + phase.y + y * window.stride[0]) * conv.width + phase.x +
            place.x * window.stride[1];
      }
      for (std::int64_t k = strip * kStrip; k < std::min(end, conv.in_channels); k += kStrip) {
        kMultiply[tile.count - 1][tile.rows - 1](shared, tile, packed + k / kStrip * strip_words,
                                                 k);
      }
    }
  }
}
