// The vector code of conv.cpp, included once per instruction set by for_each_isa.h.
#include "vec.h"

constexpr int kVecs = 2;
constexpr int kTileLines = kVecs * kLanes * sizeof(Element) / 64;  // cache lines of a pixel
// An fp32 sum runs through this many words in registers before it joins the others.
constexpr std::int64_t kRun = kFormat == Format::kFloat32 ? 64 : std::int64_t{1} << 62;

// Up to kLanes == 16 ? 7 : 3 neighbouring pixels of a line: where they are read and written.
struct Half {
  const char* x;               // the window of the first one
  std::int64_t pixel, column;  // of the result: its number in the batch, and along its line
};

struct Lines {
  const char *next, *end;
};

// One or two halves of `rows` pixels each, and the window's rows that meet the image.
struct Tile {
  Half halves[2];
  int count, rows;
  std::int64_t first_row, last_row;
  Lines ahead[2];  // to be fetched meanwhile: the next tile's and the next weights
};

// 32 or 16 output channels.
struct Columns {
  const std::uint32_t* weights;
  TermsAt terms;
  std::int64_t first, valid;
};

ISA_INLINE std::uint32_t word_at(const char* p) {
  std::uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

// sum += a[rows][count] * b[count][kVecs vectors], moving both on; for each word one line is
// prefetched, `step` bytes apart. Rows whose bit is set in kOutside are left out.
template <int kRows, int kHalves, int kOutside = 0>
ISA_INLINE void accumulate(Vec (&sum)[kRows * kHalves][kVecs], const char* (&a)[2],
                           std::int64_t stride, const std::uint32_t*& b, std::int64_t count,
                           const char*& line, std::int64_t step) {
  const std::int64_t three = 3 * stride, five = 5 * stride;
  const char *low = a[0], *high = a[1];
  for (; count > 0; --count, low += 4, high += 4, b += kStrip, line += step) {
    __builtin_prefetch(line);
    Vec columns[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) columns[j] = load_words(b + j * kLanes);
#pragma GCC unroll 14
    for (int r = 0; r < kRows * kHalves; ++r) {
      if (kOutside >> r & 1) continue;
      const std::int64_t offsets[] = {0, stride, 2 * stride, three, 4 * stride, five, 2 * three};
      const std::uint32_t word = word_at((r < kRows ? low : high) + offsets[r % kRows]);
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) sum[r][j] = multiply_add(word, columns[j], sum[r][j]);
    }
  }
  a[0] = low;
  a[1] = high;
}

// Bits of a tile's rows at the ends of its halves.
template <int kRows>
struct Ends {
  static constexpr int kFirst[2] = {1, 1 << kRows};
  static constexpr int kLast[2] = {1 << (kRows - 1), 1 << (2 * kRows - 1)};
};

// The ends whose tap in this column of the window lies left or right of the image.
template <int kRows, int kHalves>
ISA_INLINE int ends_outside(const Conv& conv, const Tile& tile, std::int64_t tap) {
  const Window& window = conv.window;
  const std::int64_t shift = tap * window.dilation[1] - window.padding[1];
  int outside = 0;
  for (int half = 0; half < kHalves; ++half) {
    const std::int64_t first = tile.halves[half].column * window.stride[1] + shift;
    if (first < 0) outside |= Ends<kRows>::kFirst[half];
    if (first + (kRows - 1) * window.stride[1] >= conv.width) outside |= Ends<kRows>::kLast[half];
  }
  return outside;
}

// accumulate() without the rows in `outside`, where they are the ends of one line, of a half each
// or of the whole tile; the rest of them multiplies zeros.
template <int kRows, int kHalves, typename... Arguments>
ISA_INLINE void accumulate_inside(int outside, Arguments&&... arguments) {
  if constexpr (kRows == half_rows(kLanes) && kHalves == 2) {
    using E = Ends<kRows>;
    constexpr int kBothFirst = E::kFirst[0] | E::kFirst[1], kBothLast = E::kLast[0] | E::kLast[1];
    switch (outside) {
      case E::kFirst[0]:
        return accumulate<kRows, kHalves, E::kFirst[0]>(arguments...);
      case E::kLast[1]:
        return accumulate<kRows, kHalves, E::kLast[1]>(arguments...);
      case kBothFirst:
        return accumulate<kRows, kHalves, kBothFirst>(arguments...);
      case kBothLast:
        return accumulate<kRows, kHalves, kBothLast>(arguments...);
    }
  }
  accumulate<kRows, kHalves>(arguments...);
}

// out = relu?(bn(sum) + residual); kWhole: all of the tile's channels are valid.
template <int kRows, int kHalves, bool kWhole, bool kAdds>
ISA_INLINE void finish(const Vec (&sum)[kRows * kHalves][kVecs], const Conv& conv, const Tile& tile,
                       const Columns& columns) {
  const TermsAt terms = columns.terms;  // copies: what follows may write anywhere
  const std::int64_t channels = conv.out_channels, all_valid = columns.valid;
  const Vec least = least_result(conv.relu);
#pragma GCC unroll 2
  for (int half = 0; half < kHalves; ++half) {
    const std::int64_t first = tile.halves[half].pixel * channels + columns.first;
    auto* out = static_cast<Element*>(conv.out) + first;
    const auto* residual = static_cast<const Element*>(conv.residual) + (kAdds ? first : 0);
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r, out += channels) {
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) {
        const int k = j * kLanes;
        const std::int64_t valid = kWhole ? kLanes : all_valid - k;
        const TermsAt at{terms.mean + k, terms.scale + k, terms.bias + k};
        Vec v = sum[half * kRows + r][j];
        if constexpr (kAdds) {
          v = normalise(v, at, load(residual + r * channels + k, valid), least);
        } else {
          v = normalise(v, at, least);
        }
        store(out + k, v, valid);
      }
    }
  }
}

// The lines that the epilogue of a tile needs, one by one: all at once would hold up the weights.
template <int kHalves>
struct EpilogueLines {
  const Conv& conv;
  const Tile& tile;
  std::int64_t column;

  int stretches() const { return (conv.residual == nullptr ? 1 : 2) * kHalves * kTileLines; }

  // The first of a stretch of tile.rows lines, conv.out_channels numbers apart.
  const char* stretch(int i) const {
    const int half = i / kTileLines % kHalves;
    const void* const base = i < kHalves * kTileLines ? conv.out : conv.residual;
    return static_cast<const char*>(base) + i % kTileLines * 64 +
           (tile.halves[half].pixel * conv.out_channels + column) * std::int64_t{sizeof(Element)};
  }
};

// One tile's sums over the whole window, and the epilogue.
template <int kRows, int kHalves>
ISA inline __attribute__((noinline)) void multiply(const Conv& conv, const Source& source,
                                                   Tile& tile, const Columns& columns,
                                                   float* sums) {
  Vec sum[kRows * kHalves][kVecs] = {};
  const std::int64_t row_words = source.segments * source.words;
  std::int64_t position = tile.first_row * row_words;  // in the sum
  const std::int64_t end = tile.last_row * row_words;
  bool first_run = true;

  const EpilogueLines<kHalves> lines{conv, tile, columns.first};
  const int stretches = lines.stretches();
  int stretch = -3;  // before them, the lines ahead
  const char* line = nullptr;
  std::int64_t step = 64, lines_left = 0;
  std::int64_t spare = end - position - std::int64_t{stretches} * kRows;

  const std::uint32_t* b = columns.weights + position * kStrip;
  for (std::int64_t row = tile.first_row; row < tile.last_row; ++row) {
    for (std::int64_t segment = 0; segment < source.segments; ++segment) {
      const std::int64_t offset = row * source.row_pitch + segment * source.segment_pitch;
      const int outside =
          source.segments > 1 ? ends_outside<kRows, kHalves>(conv, tile, segment) : 0;
      const char* a[2] = {tile.halves[0].x + offset, tile.halves[kHalves - 1].x + offset};
      for (std::int64_t words = source.words; words > 0;) {
        while (lines_left <= 0) {
          ++stretch;
          if (stretch < 0) {
            Lines& ahead = tile.ahead[stretch + 2];
            line = ahead.next;
            lines_left = std::min((ahead.end - ahead.next) / 64, spare);
            if (lines_left > 0) {
              ahead.next += 64 * lines_left;
              spare -= lines_left;
            }
            continue;
          }
          step = conv.out_channels * std::int64_t{sizeof(Element)};
          if (stretch < stretches) {
            line = lines.stretch(stretch);
            lines_left = kRows;
          } else {
            line = a[0];
            step = 0;
            lines_left = end;
          }
        }
        std::int64_t count = std::min({words, lines_left, kRun - position % kRun});
        accumulate_inside<kRows, kHalves>(outside, sum, a, source.pixel_pitch, b, count, line,
                                          step);
        words -= count;
        lines_left -= count;
        position += count;
        if (position % kRun == 0 || position == end) {
          if (!first_run) {
#pragma GCC unroll 14
            for (int r = 0; r < kRows * kHalves; ++r) {
#pragma GCC unroll 2
              for (int j = 0; j < kVecs; ++j) sum[r][j] += load(sums + (r * kVecs + j) * kLanes);
            }
          }
          if (position == end) break;
          first_run = false;
#pragma GCC unroll 14
          for (int r = 0; r < kRows * kHalves; ++r) {
#pragma GCC unroll 2
            for (int j = 0; j < kVecs; ++j) {
              store(sums + (r * kVecs + j) * kLanes, sum[r][j]);
              sum[r][j] = Vec{};
            }
          }
        }
      }
    }
  }
  const bool whole = columns.valid >= kVecs * kLanes, adds = conv.residual != nullptr;
  if (whole && adds) return finish<kRows, kHalves, true, true>(sum, conv, tile, columns);
  if (whole) return finish<kRows, kHalves, true, false>(sum, conv, tile, columns);
  if (adds) return finish<kRows, kHalves, false, true>(sum, conv, tile, columns);
  finish<kRows, kHalves, false, false>(sum, conv, tile, columns);
}

using Multiply = void (*)(const Conv&, const Source&, Tile&, const Columns&, float*);

template <int kHalves, int... Indices>
constexpr std::array<Multiply, sizeof...(Indices)> multiplies(
    std::integer_sequence<int, Indices...>) {
  return {multiply<Indices + 1, kHalves>...};
}

constexpr int kHalfRows = half_rows(kLanes);
constexpr std::array<Multiply, kHalfRows> kMultiply[2] = {
    multiplies<1>(std::make_integer_sequence<int, kHalfRows>{}),
    multiplies<2>(std::make_integer_sequence<int, kHalfRows>{})};

ISA void conv_task(const Conv& conv, const Plan& plan, const Terms& terms, std::int64_t half_task,
                   std::int64_t strip_task) {
  const std::int64_t begin = half_task * plan.halves / plan.half_tasks;
  const std::int64_t end = (half_task + 1) * plan.halves / plan.half_tasks;
  const Operand operand(conv, plan, begin, end);

  std::array<Tile, kMaxTaskHalves> tiles;
  int count = 0;
  for (std::int64_t half = begin; half < end; ++count) {
    Tile& tile = tiles[count];
    tile = {};
    for (; tile.count < 2 && half < end; ++half) {
      const HalfPlace place = plan.half(conv, half);
      if (tile.count == 1 && place.rows != tile.rows) break;
      const auto [first, last] = rows_inside(conv, place.y);
      tile.first_row = tile.count == 0 ? first : std::min(tile.first_row, first);
      tile.last_row = tile.count == 0 ? last : std::max(tile.last_row, last);
      tile.rows = static_cast<int>(place.rows);
      tile.halves[tile.count++] = {
          operand.window(place),
          (place.image * plan.out_height + place.y) * plan.out_width + place.x, place.x};
    }
  }
  alignas(64) float sums[2 * kHalfRows * kVecs * kLanes];

  const std::int64_t first_strip = strip_task * plan.strips / plan.strip_tasks;
  const std::int64_t last_strip = (strip_task + 1) * plan.strips / plan.strip_tasks;
  const std::int64_t last =
      std::min(last_strip * kStrip, round_up(conv.out_channels, kVecs * kLanes));
  for (std::int64_t strip = first_strip; strip < last_strip; strip += plan.strips_together) {
    const std::int64_t together = std::min((strip + plan.strips_together) * kStrip, last);
    const std::int64_t strip_bytes = plan.words * kStrip * 4;
    const auto* const next_weights =
        static_cast<const char*>(conv.packed) + (strip + plan.strips_together) * strip_bytes;
    const std::int64_t next_bytes =
        strip_bytes * std::clamp<std::int64_t>(last_strip - strip - plan.strips_together, 0,
                                               plan.strips_together);
    for (int i = 0; i < count; ++i) {
      Tile& tile = tiles[i];
      tile.ahead[0] = tile.ahead[1] = {};
      if (plan.in_place && strip == first_strip && i + 1 < count) {
        const Tile& next = tiles[i + 1];
        tile.ahead[0] = {next.halves[0].x,
                         next.halves[0].x + plan.source.pixel_pitch * next.rows * next.count};
      }
      tile.ahead[1] = {next_weights + next_bytes * i / count / 64 * 64,
                       next_weights + next_bytes * (i + 1) / count / 64 * 64};
      for (std::int64_t k = strip * kStrip; k < together; k += kVecs * kLanes) {
        const Columns columns{static_cast<const std::uint32_t*>(conv.packed) +
                                  k / kStrip * plan.words * kStrip + k % kStrip,
                              terms.at(k), k, conv.out_channels - k};
        kMultiply[tile.count - 1][tile.rows - 1](conv, plan.source, tile, columns, sums);
      }
    }
  }
}
