// The vector code of grouped.cpp, included once per instruction set by for_each_isa.h.
#include "vec.h"

namespace grouped {
namespace {

// Columns of a tile of one line and one vector, and of one that has two lines or two vectors: its
// sums, the weights of three taps and a multiplicand fill the registers.
#if ISA_LANES == 16
constexpr int kWide[] = {8, 10, 12, 14}, kNarrow[] = {2, 4, 6, 7};
#else
constexpr int kWide[] = {6, 8, 9, 10}, kNarrow[] = {1, 2, 4, 5};
#endif
constexpr int kSizes = 4, kWidest = kWide[kSizes - 1], kWidestNarrow = kNarrow[kSizes - 1];
constexpr std::int64_t kAhead = 16;               // pixels from the one copied to the one fetched
constexpr std::int64_t kPixelBytes = kLanes * 4;  // of the operand
// An fp32 sum of this many products at most joins the others; a bfloat16 one need not.
constexpr std::int64_t kRun = kFormat == Format::kFloat32 ? 24 : std::int64_t{1} << 62;

// Where a tile's operand is: the window of its first pixel.
struct Tile {
  const char* x;
  std::int64_t line_step;            // bytes to the second line
  std::int64_t first_row, last_row;  // of the window
};

// A vector of output channels, or two: their weights, and what of a pixel they multiply.
struct Columns {
  const std::uint32_t* weights;
  std::int64_t first_word;  // where all lanes are of one group
  VecBits index;            // each lane's first word, where they are not
};

ISA_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
#ifdef ISA_BF16
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  return sum + a * b;
#endif
}

// The word at x in all lanes, or each lane's own of the vector at x.
template <bool kPermute>
ISA_INLINE Vec multiplicand(const char* x, VecBits index) {
  if constexpr (kPermute) {
    const Vec words = load(reinterpret_cast<const float*>(x));
#if ISA_LANES == 16
    // GCC 12 warns of the unmasked one (gcc.gnu.org/PR105593).
    return (Vec)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, (__m512)words);
#else
    return (Vec)_mm256_permutevar8x32_ps((__m256)words, (__m256i)index);
#endif
  } else {
    float word;
    std::memcpy(&word, x, sizeof word);
    return splat(word);
  }
}

// Adds `count` words of each pixel times the weights of kTaps taps, which lie a pixel apart: a
// multiplicand serves all taps that it meets.
template <int kTaps, bool kPermute, int kCols, int kLines, int kVecs>
ISA_INLINE void accumulate(Vec (&sum)[kLines][kVecs][kCols], const char* x, std::int64_t line_step,
                           const std::uint32_t* weights, std::int64_t tap_step,
                           std::int64_t vec_step, VecBits index, std::int64_t count) {
  for (; count > 0; --count, weights += kLanes) {
    Vec weight[kTaps][kVecs];
#pragma GCC unroll 3
    for (int tap = 0; tap < kTaps; ++tap) {
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        weight[tap][v] = load_words(weights + tap * tap_step + v * vec_step);
      }
    }
#pragma GCC unroll 2
    for (int line = 0; line < kLines; ++line) {
#pragma GCC unroll 16
      for (int i = 0; i < kCols + kTaps - 1; ++i) {
        const char* const from = x + (line == 0 ? 0 : line_step) + i * kPixelBytes;
        const Vec a = multiplicand<kPermute>(from, index);
#pragma GCC unroll 3
        for (int tap = 0; tap < kTaps; ++tap) {
          const int column = i - tap;
          if (column < 0 || column >= kCols) continue;
#pragma GCC unroll 2
          for (int v = 0; v < kVecs; ++v) {
            sum[line][v][column] = multiply_add(a, weight[tap][v], sum[line][v][column]);
          }
        }
      }
    }
    if constexpr (kPermute) {
      index += 1;
    } else {
      x += 4;
    }
  }
}

// Moves the sums to `sums`, added to what is there unless they are the first.
template <int kCols, int kLines, int kVecs>
ISA_INLINE void join(Vec (&sum)[kLines][kVecs][kCols], float* sums, bool first) {
#pragma GCC unroll 2
  for (int line = 0; line < kLines; ++line) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
#pragma GCC unroll 14
      for (int i = 0; i < kCols; ++i) {
        float* const at = sums + ((line * kVecs + v) * kCols + i) * kLanes;
        store(at, first ? sum[line][v][i] : load(at) + sum[line][v][i]);
        sum[line][v][i] = Vec{};
      }
    }
  }
}

// A tile's sums over the whole window: sums[kLines][kVecs][kCols][kLanes].
template <int kCols, int kLines, int kVecs, bool kPermute>
ISA inline __attribute__((noinline)) void multiply(const Plan& plan, const Tile& tile,
                                                   const Columns& columns, float* sums) {
  Vec sum[kLines][kVecs][kCols] = {};
  const std::int64_t words = plan.channels.group_words, tap_words = words * kLanes;
  const std::int64_t row_taps = plan.conv.window.kernel[1];
  const std::int64_t vec_step = plan.conv.window.kernel[0] * row_taps * tap_words;
  const std::int64_t tap_step = plan.axes[1].period * tap_words, line_step = tile.line_step;
  const VecBits index = columns.index;
  const std::int64_t vec_bytes = plan.vec_bytes;
  const std::int64_t* const row_offsets = plan.row_offsets.data();
  const Run* const runs = plan.runs.data();
  const Run* const runs_end = runs + plan.runs.size();
  std::int64_t products = 0;
  bool first = true;
  for (std::int64_t row = tile.first_row; row < tile.last_row; ++row) {
    const char* const line = tile.x + row_offsets[row] + 4 * columns.first_word;
    const std::uint32_t* const line_weights = columns.weights + row * row_taps * tap_words;
    for (const Run* run = runs; run != runs_end; ++run) {
      const std::uint32_t* weights = line_weights + run->first_tap * tap_words;
      const char* x = line + run->offset;
      const int taps = run->taps;
      for (std::int64_t left = words; left > 0; left -= kLanes) {
        const std::int64_t count = std::min<std::int64_t>(left, kLanes);
        if (products + count * taps > kRun) {
          join(sum, sums, first);
          first = false;
          products = 0;
        }
        products += count * taps;
        if (taps == 3) {
          accumulate<3, kPermute>(sum, x, line_step, weights, tap_step, vec_step, index, count);
        } else if (taps == 2) {
          accumulate<2, kPermute>(sum, x, line_step, weights, tap_step, vec_step, index, count);
        } else {
          accumulate<1, kPermute>(sum, x, line_step, weights, tap_step, vec_step, index, count);
        }
        weights += count * kLanes;
        x += vec_bytes;
      }
    }
  }
  join(sum, sums, first);
}

using Multiply = void (*)(const Plan&, const Tile&, const Columns&, float* sums);
// By size: tiles of one line, of two, and of one line and two vectors.
struct Multiplies {
  Multiply wide[2][kSizes], line[2][kSizes], lines[2][kSizes], vecs[kSizes];  // [permute]
};

template <int... kIndices>
constexpr Multiplies multiplies(std::integer_sequence<int, kIndices...>) {
  return {
      {{multiply<kWide[kIndices], 1, 1, false>...}, {multiply<kWide[kIndices], 1, 1, true>...}},
      {{multiply<kNarrow[kIndices], 1, 1, false>...}, {multiply<kNarrow[kIndices], 1, 1, true>...}},
      {{multiply<kNarrow[kIndices], 2, 1, false>...}, {multiply<kNarrow[kIndices], 2, 1, true>...}},
      {multiply<kNarrow[kIndices], 1, 2, false>...}};
}

constexpr Multiplies kMultiplies = multiplies(std::make_integer_sequence<int, kSizes>{});

// Some neighbouring pixels of a line: batch norm, residual and ReLU of `count` lanes of their sums.
template <typename Number>
ISA inline __attribute__((noinline)) void finish(const float* sums, const Conv& conv,
                                                 const TermsAt& terms, std::int64_t pixel,
                                                 std::int64_t pixels, std::int64_t channel,
                                                 std::int64_t count) {
  const Vec least = least_result(conv.relu);
  const Vec mean = load(terms.mean), scale = load(terms.scale), bias = load(terms.bias);
  auto* out = static_cast<Number*>(conv.out) + pixel * conv.out_channels + channel;
  const std::int64_t added = std::min(count, conv.residual.channels - channel);
  if (added <= 0) {
    for (std::int64_t i = 0; i < pixels; ++i, out += conv.out_channels) {
      store(out, at_least((load(sums + i * kLanes) - mean) * scale + bias, least), count);
    }
    return;
  }
  const auto* residual =
      static_cast<const Number*>(conv.residual.data) + conv.residual.offset(pixel) + channel;
  for (std::int64_t i = 0; i < pixels; ++i, out += conv.out_channels) {
    const Vec sum = load(sums + i * kLanes);
    const Vec shift = bias + load(residual + i * conv.residual.pixel, added);
    store(out, at_least((sum - mean) * scale + shift, least), count);
  }
}

// One unit of a pixel as the operand has it: `groups` of its groups, each as whole words.
template <typename Number>
ISA_INLINE void copy_pixel(const Plan& plan, const Number* from, std::int64_t groups, char* to) {
  const std::int64_t vec_bytes = plan.vec_bytes, channels = groups * plan.channels.group_channels;
  constexpr bool kConverts = !std::is_same_v<Number, Element>;
  constexpr std::int64_t kNumbers = kConverts ? kLanes : kPixelBytes / sizeof(Number);
  if (kNumbers > kLanes && groups > 1 && plan.channels.group_channels % 2 == 1) {
    Number words[kNumbers] = {};
    for (std::int64_t group = 0, at = 0; group < groups; ++group, at = (at + 1) / 2 * 2) {
      for (std::int64_t i = 0; i < plan.channels.group_channels; ++i) words[at++] = *from++;
    }
    std::memcpy(to, words, sizeof words);
    return;
  }
  for (std::int64_t done = 0; done < channels; done += kNumbers, to += vec_bytes) {
    const std::int64_t left = channels - done;
    if constexpr (kConverts) {
      store(reinterpret_cast<float*>(to), load(from + done, left));
    } else if (left >= kNumbers) {
      std::memcpy(to, from + done, kPixelBytes);
    } else {
      std::memset(to, 0, kPixelBytes);
      std::memcpy(to, from + done, left * sizeof(Number));
    }
  }
}

// The lines of x that a task reads, with zeros around.
template <typename Number>
ISA inline __attribute__((noinline)) void copy_operand(const Plan& plan, const Part& part,
                                                       char* operand) {
  const Conv& conv = plan.conv;
  const Channels& channels = plan.channels;
  const auto [vertical, horizontal] = plan.axes;
  const std::int64_t units = part.last_unit - part.first_unit, vecs = units * channels.unit_planes;
  const std::int64_t part_bytes = units * channels.unit_groups * channels.group_channels *
                                  static_cast<std::int64_t>(sizeof(Number));
  const auto* const x = static_cast<const Number*>(conv.x) +
                        part.first_unit * channels.unit_groups * channels.group_channels;
  for (std::int64_t plane = 0; plane < vertical.planes; ++plane) {
    const std::int64_t lines = part.last_row - part.first_row + vertical.reach;
    for (std::int64_t line = 0; line < lines; ++line) {
      char* const to = operand + (plane * plan.lines + line) * plan.line_bytes;
      const std::int64_t y = vertical.coordinate(plane, part.first_row + line);
      if (y < 0 || y >= conv.height) {
        for (std::int64_t v = 0; v < vecs; ++v)
          std::memset(to + v * plan.vec_bytes, 0, plan.line_bytes);
        continue;
      }
      const Number* const from = x + (part.image * conv.height + y) * conv.width * conv.in_channels;
      for (std::int64_t side = 0; side < horizontal.planes; ++side) {
        char* const row = to + side * plan.columns * kPixelBytes;
        const auto [first, last] = horizontal.inside(side, conv.width, plan.columns);
        for (std::int64_t v = 0; v < vecs; ++v) {
          char* const vec = row + v * plan.vec_bytes;
          std::memset(vec, 0, first * kPixelBytes);
          std::memset(vec + last * kPixelBytes, 0, (plan.columns - last) * kPixelBytes);
        }
        for (std::int64_t i = first; i < last; ++i) {
          const Number* pixel = from + horizontal.coordinate(side, i) * conv.in_channels;
          const char* const ahead =
              reinterpret_cast<const char*>(pixel + kAhead * conv.in_channels);
          for (std::int64_t byte = 0; byte < part_bytes; byte += 64)
            __builtin_prefetch(ahead + byte);
          for (std::int64_t unit = 0; unit < units; ++unit) {
            const std::int64_t groups = channels.groups_of(part.first_unit + unit);
            copy_pixel(plan, pixel, groups,
                       row + unit * channels.unit_planes * plan.vec_bytes + i * kPixelBytes);
            pixel += groups * channels.group_channels;
          }
        }
      }
    }
  }
}

// The smallest size of at least `columns`.
ISA_INLINE int size_for(const int (&sizes)[kSizes], std::int64_t columns) {
  int size = 0;
  while (sizes[size] < columns) ++size;
  return size;
}

// One vector of output channels of a unit, or two, at all of a task's pixels.
template <typename Number>
ISA_INLINE void convolve(const Plan& plan, const Part& part, const char* x, std::int64_t unit,
                         std::int64_t vec) {
  const Conv& conv = plan.conv;
  const Channels& channels = plan.channels;
  const std::int64_t unit_out = channels.groups_of(unit) * channels.group_out;
  const std::int64_t vecs = channels.vecs_together(unit, vec), first = vec * kLanes;
  const std::int64_t channel = unit * channels.unit_groups * channels.group_out + first;
  Columns columns{static_cast<const std::uint32_t*>(conv.packed) +
                      (unit * channels.unit_vecs + vec) * plan.vec_words,
                  first / channels.group_out * channels.group_words, VecBits{}};
  const bool permute = !channels.one_group(unit, vec);
  for (int lane = 0; permute && lane < kLanes; ++lane) {
    const std::int64_t group = std::min(first + lane, unit_out - 1) / channels.group_out;
    columns.index[lane] = static_cast<std::uint32_t>(group * channels.group_words);
  }
  if (permute) columns.first_word = 0;
  alignas(64) float terms[2][3][kLanes] = {};
  for (int v = 0; v < vecs; ++v) {
    const TermsAt at = plan.terms.at(channel + v * kLanes);
    const std::int64_t valid = std::min<std::int64_t>(unit_out - first - v * kLanes, kLanes);
    std::copy_n(at.mean, valid, terms[v][0]);
    std::copy_n(at.scale, valid, terms[v][1]);
    std::copy_n(at.bias, valid, terms[v][2]);
  }

  const bool narrow = plan.out_width <= kWidestNarrow;
  const std::int64_t tile_columns = vecs == 2 || narrow ? kWidestNarrow : kWidest;
  const std::int64_t tiles = ceil_div(plan.out_width, tile_columns);
  const std::int64_t even = plan.out_width / tiles, longer = plan.out_width % tiles;
  const int size = size_for(tile_columns == kWidest ? kWide : kNarrow, even + (longer > 0));
  const int columns_of_tile = (tile_columns == kWidest ? kWide : kNarrow)[size];
  alignas(64) float sums[kWidest * kLanes];
  for (std::int64_t y = part.first_row; y < part.last_row;) {
    const std::int64_t lines = narrow && vecs == 1 && y + 1 < part.last_row ? 2 : 1;
    const auto [first_row, last_row] = plan.rows_inside(y, y + lines - 1);
    const Multiply multiply = vecs == 2    ? kMultiplies.vecs[size]
                              : lines == 2 ? kMultiplies.lines[permute][size]
                              : narrow     ? kMultiplies.line[permute][size]
                                           : kMultiplies.wide[permute][size];
    for (std::int64_t i = 0; i < tiles; ++i) {
      const std::int64_t begin = i * even + std::min(i, longer), pixels = even + (i < longer);
      multiply(plan,
               {x + (y - part.first_row) * plan.line_bytes + begin * kPixelBytes, plan.line_bytes,
                first_row, last_row},
               columns, sums);
      for (std::int64_t line = 0; line < lines; ++line) {
        const std::int64_t pixel =
            ((part.image * plan.out_height) + y + line) * plan.out_width + begin;
        for (int v = 0; v < vecs; ++v) {
          finish<Number>(sums + (line * vecs + v) * columns_of_tile * kLanes, conv,
                         {terms[v][0], terms[v][1], terms[v][2]}, pixel, pixels,
                         channel + v * kLanes,
                         std::min<std::int64_t>(unit_out - first - v * kLanes, kLanes));
        }
      }
    }
    y += lines;
  }
}

template <typename Number>
ISA void task(const Plan& plan, std::int64_t index) {
  const Part part = plan.part(index);
  const std::int64_t unit_bytes = plan.channels.unit_planes * plan.vec_bytes;
  // Tiles may read, not use, pixels beyond the last.
  const std::int64_t bytes =
      (part.last_unit - part.first_unit) * unit_bytes + kWidest * kPixelBytes;
  char* const operand = reinterpret_cast<char*>(thread_scratch().floats(bytes / 4));
  copy_operand<Number>(plan, part, operand);
  for (std::int64_t unit = part.first_unit; unit < part.last_unit; ++unit) {
    const char* const x = operand + (unit - part.first_unit) * unit_bytes;
    const std::int64_t vecs =
        ceil_div(plan.channels.groups_of(unit) * plan.channels.group_out, kLanes);
    for (std::int64_t vec = 0; vec < vecs; vec += plan.channels.vecs_together(unit, vec)) {
      convolve<Number>(plan, part, x, unit, vec);
    }
  }
}

}  // namespace
}  // namespace grouped
