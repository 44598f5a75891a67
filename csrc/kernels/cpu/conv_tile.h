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
  std::int64_t residual;       // elements to its place there
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

// What a tile's sums become.
enum class End {
  kResult,    // relu?(bn(sum))
  kResidual,  // the same with the residual added, which has some of these channels
  kAdd,       // the same with the numbers of an earlier kKeep added
  kKeep,      // bn(sum), kept in fp32
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

// bn(sum) and what kEnd says; kWhole: all of the tile's channels are valid, the residual's too.
template <int kRows, int kHalves, End kEnd, bool kWhole>
ISA_INLINE void finish(const Vec (&sum)[kRows * kHalves][kVecs], const Conv& conv, const Tile& tile,
                       const Columns& columns, float* kept) {
  const TermsAt terms = columns.terms;  // copies: what follows may write anywhere
  const std::int64_t channels = conv.out_channels, all_valid = columns.valid;
  const Vec least = least_result(conv.relu && kEnd != End::kKeep);
#pragma GCC unroll 2
  for (int half = 0; half < kHalves; ++half) {
    const std::int64_t first = tile.halves[half].pixel * channels + columns.first;
    auto* out = static_cast<Element*>(conv.out) + first;
    const auto* residual = static_cast<const Element*>(conv.residual.data) +
                           tile.halves[half].residual + columns.first;
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r, out += channels) {
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j, kept += kLanes) {
        const int k = j * kLanes;
        const std::int64_t valid = kWhole ? kLanes : all_valid - k;
        if (valid <= 0) continue;
        const TermsAt at{terms.mean + k, terms.scale + k, terms.bias + k};
        const Vec v = sum[half * kRows + r][j];
        if constexpr (kEnd == End::kResult) {
          store(out + k, normalise(v, at, least), valid);
        } else if constexpr (kEnd == End::kResidual) {
          const std::int64_t left = kWhole ? kLanes : conv.residual.channels - columns.first - k;
          const Vec added = load(residual + r * conv.residual.pixel + k, left);
          store(out + k, normalise(v, at, added, least), valid);
        } else if constexpr (kEnd == End::kAdd) {
          store(out + k, normalise(v, at, load(kept), least), valid);
        } else {
          store(kept, normalise(v, at, least));
        }
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
  End end;

  int stretches() const {
    const int tensors = end == End::kKeep ? 0 : end == End::kResidual ? 2 : 1;
    return tensors * kHalves * kTileLines;
  }

  // A stretch of tile.rows lines: the first, and bytes from one to the next.
  std::pair<const char*, std::int64_t> stretch(int i) const {
    const Half& half = tile.halves[i / kTileLines % kHalves];
    const bool of_result = i < kHalves * kTileLines;
    const void* const base = of_result ? conv.out : conv.residual.data;
    const std::int64_t pitch = of_result ? conv.out_channels : conv.residual.pixel;
    const std::int64_t first = of_result ? half.pixel * pitch : half.residual;
    const std::int64_t size = sizeof(Element);
    return {static_cast<const char*>(base) + i % kTileLines * 64 + (first + column) * size,
            pitch * size};
  }
};

// One tile's sums over the whole window, and the epilogue.
template <int kRows, int kHalves>
ISA inline __attribute__((noinline)) void multiply(const Conv& conv, const Source& source,
                                                   Tile& tile, const Columns& columns, End end,
                                                   float* kept) {
  alignas(64) float sums[kRows * kHalves * kVecs * kLanes];
  Vec sum[kRows * kHalves][kVecs] = {};
  const std::int64_t row_words = source.segments * source.words;
  std::int64_t position = tile.first_row * row_words;  // in the sum
  const std::int64_t stop = tile.last_row * row_words;
  bool first_run = true;

  const EpilogueLines<kHalves> lines{conv, tile, columns.first, end};
  const int stretches = lines.stretches();
  int stretch = -3;  // before them, the lines ahead
  const char* line = nullptr;
  std::int64_t step = 64, lines_left = 0;
  std::int64_t spare = stop - position - std::int64_t{stretches} * kRows;

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
          if (stretch < stretches) {
            std::tie(line, step) = lines.stretch(stretch);
            lines_left = kRows;
          } else {
            line = a[0];
            step = 0;
            lines_left = stop;
          }
        }
        std::int64_t count = std::min({words, lines_left, kRun - position % kRun});
        accumulate_inside<kRows, kHalves>(outside, sum, a, source.pixel_pitch, b, count, line,
                                          step);
        words -= count;
        lines_left -= count;
        position += count;
        if (position % kRun == 0 || position == stop) {
          if (!first_run) {
#pragma GCC unroll 14
            for (int r = 0; r < kRows * kHalves; ++r) {
#pragma GCC unroll 2
              for (int j = 0; j < kVecs; ++j) sum[r][j] += load(sums + (r * kVecs + j) * kLanes);
            }
          }
          if (position == stop) break;
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
  constexpr std::int64_t kWide = kVecs * kLanes;
  const bool whole = columns.valid >= kWide &&
                     (end != End::kResidual || conv.residual.channels - columns.first >= kWide);
  switch (end) {
    case End::kResult:
      return whole ? finish<kRows, kHalves, End::kResult, true>(sum, conv, tile, columns, kept)
                   : finish<kRows, kHalves, End::kResult, false>(sum, conv, tile, columns, kept);
    case End::kResidual:
      return whole ? finish<kRows, kHalves, End::kResidual, true>(sum, conv, tile, columns, kept)
                   : finish<kRows, kHalves, End::kResidual, false>(sum, conv, tile, columns, kept);
    case End::kAdd:
      return whole ? finish<kRows, kHalves, End::kAdd, true>(sum, conv, tile, columns, kept)
                   : finish<kRows, kHalves, End::kAdd, false>(sum, conv, tile, columns, kept);
    case End::kKeep:
      return finish<kRows, kHalves, End::kKeep, true>(sum, conv, tile, columns, kept);
  }
}

using Multiply = void (*)(const Conv&, const Source&, Tile&, const Columns&, End, float* kept);

template <int kHalves, int... Indices>
constexpr std::array<Multiply, sizeof...(Indices)> multiplies(
    std::integer_sequence<int, Indices...>) {
  return {multiply<Indices + 1, kHalves>...};
}

constexpr int kHalfRows = half_rows(kLanes);
constexpr std::array<Multiply, kHalfRows> kMultiply[2] = {
    multiplies<1>(std::make_integer_sequence<int, kHalfRows>{}),
    multiplies<2>(std::make_integer_sequence<int, kHalfRows>{})};

// The tiles of a task's pixels; returns their number.
ISA_INLINE int make_tiles(const Pass& pass, const Operand& operand, std::int64_t begin,
                          std::int64_t end, Tile* tiles) {
  const auto& [conv, plan, terms] = pass;
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
      const std::int64_t pixel =
          (place.image * plan.out_height + place.y) * plan.out_width + place.x;
      tile.halves[tile.count++] = {operand.window(place), pixel, place.x,
                                   conv.residual.offset(pixel)};
    }
  }
  return count;
}

// What to fetch while tile i meets the strips from `strip` on: the next tile, in the task's first
// round, and its share of the next round's weights.
ISA_INLINE void set_ahead(const Pass& pass, Tile* tiles, int i, int count, bool first_round,
                          std::int64_t next_strip, std::int64_t next_strips) {
  const Plan& plan = pass.plan;
  Lines(&ahead)[2] = tiles[i].ahead;
  ahead[0] = {};
  if (plan.in_place && first_round && i + 1 < count) {
    const Tile& next = tiles[i + 1];
    const char* const x = next.halves[0].x;
    ahead[0] = {x, x + plan.source.pixel_pitch * next.rows * next.count};
  }
  const std::int64_t strip_bytes = plan.words * kStrip * 4, bytes = next_strips * strip_bytes;
  const char* const weights = static_cast<const char*>(pass.conv.packed) + next_strip * strip_bytes;
  ahead[1] = {weights + bytes * i / count / 64 * 64, weights + bytes * (i + 1) / count / 64 * 64};
}

ISA void conv_task(const Pass* passes, int pass_count, std::int64_t half_task,
                   std::int64_t strip_task) {
  const auto& [conv, plan, terms] = passes[0];
  const std::int64_t begin = half_task * plan.halves / plan.half_tasks;
  const std::int64_t end = (half_task + 1) * plan.halves / plan.half_tasks;
  std::array<Tile, kMaxTaskHalves> tiles[2];
  int count = 0;
  for (int i = 0; i < pass_count; ++i) {
    const Operand operand(passes[i].conv, passes[i].plan, begin, end, thread_scratch(i));
    count = make_tiles(passes[i], operand, begin, end, tiles[i].data());
  }
  alignas(64) float kept[2 * kHalfRows * kVecs * kLanes];

  const std::int64_t first_strip = strip_task * plan.strips / plan.strip_tasks;
  const std::int64_t last_strip = (strip_task + 1) * plan.strips / plan.strip_tasks;
  const std::int64_t last =
      std::min(last_strip * kStrip, round_up(conv.out_channels, kVecs * kLanes));
  const std::int64_t together = plan.strips_together;
  for (std::int64_t strip = first_strip; strip < last_strip; strip += together) {
    const std::int64_t next = strip + together;
    const std::int64_t next_strips = std::clamp<std::int64_t>(last_strip - next, 0, together);
    for (int i = 0; i < count; ++i) {
      for (int pass = 0; pass < pass_count; ++pass) {
        set_ahead(passes[pass], tiles[pass].data(), i, count, strip == first_strip, next,
                  next_strips);
      }
      for (std::int64_t k = strip * kStrip; k < std::min(next * kStrip, last);
           k += kVecs * kLanes) {
        for (int pass = pass_count - 1; pass >= 0; --pass) {
          const auto& [pass_conv, pass_plan, pass_terms] = passes[pass];
          const Columns columns{static_cast<const std::uint32_t*>(pass_conv.packed) +
                                    k / kStrip * pass_plan.words * kStrip + k % kStrip,
                                pass_terms.at(k), k, conv.out_channels - k};
          const End end_of_pass = pass == 1                    ? End::kKeep
                                  : pass_count == 2            ? End::kAdd
                                  : k < conv.residual.channels ? End::kResidual
                                                               : End::kResult;
          Tile& tile = tiles[pass][i];
          kMultiply[tile.count - 1][tile.rows - 1](pass_conv, pass_plan.source, tile, columns,
                                                   end_of_pass, kept);
        }
      }
    }
  }
}
