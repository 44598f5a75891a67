// The vector code of conv.cpp, included once per instruction set by for_each_isa.h.
#include "vec.h"

constexpr int kVecs = 2;
constexpr std::int64_t kStrip = kVecs * kLanes;  // columns, of a tile and of packed weights
constexpr int kTileLines = kVecs * kLanes * sizeof(Element) / 64;  // cache lines of a pixel
// An fp32 sum runs through this many words in registers before it joins the others.
constexpr bool kInRuns = kFormat == Format::kFloat32;
constexpr std::int64_t kRun = 64;

#ifdef ISA_AMX
constexpr int kHalfRows = kTileRegisterRows;
#else
constexpr int kHalfRows = half_rows_of(kLanes);
#endif

// Up to kHalfRows neighbouring pixels of a line: where they are read and written.
struct Half {
  const char* x;               // the window of the first one
  std::int64_t pixel, column;  // of the result: its number in the batch, and along its line
  std::int64_t residual;       // elements to its place there
};

// Memory to be fetched while tiles are multiplied: two lines with each of `words` words.
struct Stretch {
  const char* line;
  std::int64_t second, step;  // bytes from a pair's first line to its second, and to the next pair
  std::int64_t words;
};

// One or two halves of `rows` pixels each, and the window's rows that meet the image.
struct Tile {
  Half halves[2];
  int count, rows;
  std::int64_t first_row, last_row;
  Stretch lines[4];  // of the result and the residual, in the first column
  int stretches;
};

// What a tile's sums become.
enum class End {
  kResult,    // relu?(bn(sum))
  kResidual,  // the same with the residual added, which has some of these channels
  kAdd,       // the same with the numbers of an earlier kKeep added
  kKeep,      // bn(sum), kept in fp32
};

// A strip of output channels.
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

// sum += a[rows][count] * b[count][kUsed vectors], moving both and `fetch` on. Rows whose bit is
// set in kOutside are left out.
template <int kRows, int kHalves, int kOutside = 0, int kUsed>
ISA_INLINE void accumulate(Vec (&sum)[kRows * kHalves][kUsed], const char* (&a)[2],
                           std::int64_t stride, const std::uint32_t*& b, std::int64_t count,
                           Stretch& fetch) {
  const std::int64_t three = 3 * stride, five = 5 * stride;
  const char *low = a[0], *high = a[1];
  const char *first = fetch.line, *second = fetch.line + fetch.second;
  const std::int64_t step = fetch.step;
  fetch.words -= count;
  fetch.line += count * step;
  for (; count > 0; --count, low += 4, high += 4, b += kStrip, first += step, second += step) {
    __builtin_prefetch(first);
    __builtin_prefetch(second);
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      if constexpr (kParts > 1) asm("" : "+r"(low), "+r"(high), "+r"(b));
      Vec columns[kUsed];
#pragma GCC unroll 2
      for (int j = 0; j < kUsed; ++j) columns[j] = load_factors(b + j * kLanes, part);
#pragma GCC unroll 14
      for (int r = 0; r < kRows * kHalves; ++r) {
        if (kOutside >> r & 1) continue;
        const std::int64_t offsets[] = {0, stride, 2 * stride, three, 4 * stride, five, 2 * three};
        const std::uint32_t word = word_at((r < kRows ? low : high) + offsets[r % kRows]);
#pragma GCC unroll 2
        for (int j = 0; j < kUsed; ++j) {
          sum[r][j] = multiply_add(word, columns[j], sum[r][j], part);
        }
      }
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
  if constexpr (kRows == kHalfRows && kHalves == 2) {
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
template <int kRows, int kHalves, End kEnd, bool kWhole, int kUsed>
ISA_INLINE void finish(const Vec (&sum)[kRows * kHalves][kUsed], const Conv& conv, const Tile& tile,
                       const Columns& columns, float* kept) {
  const std::int64_t channels = conv.out_channels, valid = columns.valid;
  const std::int64_t added = conv.residual.channels - columns.first, pitch = conv.residual.pixel;
  const Vec least = least_result(conv.relu);
  NormTerms terms[kUsed];  // in registers: what follows may write anywhere
#pragma GCC unroll 2
  for (int j = 0; j < kUsed; ++j) terms[j] = NormTerms(columns.terms, j * kLanes);
#pragma GCC unroll 2
  for (int half = 0; half < kHalves; ++half) {
    const std::int64_t first = tile.halves[half].pixel * channels + columns.first;
    auto* out = static_cast<Element*>(conv.out) + first;
    const auto* residual = static_cast<const Element*>(conv.residual.data) +
                           tile.halves[half].residual + columns.first;
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r, out += channels, residual += pitch, kept += kVecs * kLanes) {
      Vec v[kUsed], more[kUsed] = {};
      if constexpr (kEnd == End::kResidual) {
        if constexpr (kWhole) {
          load_row(residual, more);
        } else {
          for (int j = 0; j < kUsed && j * kLanes < added; ++j) {
            more[j] = load(residual + j * kLanes, added - j * kLanes);
          }
        }
      } else if constexpr (kEnd == End::kAdd) {
#pragma GCC unroll 2
        for (int j = 0; j < kUsed; ++j) more[j] = load(kept + j * kLanes);
      }
#pragma GCC unroll 2
      for (int j = 0; j < kUsed; ++j) {
        constexpr bool kAdds = kEnd == End::kResidual || kEnd == End::kAdd;
        v[j] = kAdds ? terms[j].normalise(sum[half * kRows + r][j], more[j])
                     : terms[j].normalise(sum[half * kRows + r][j]);
        if constexpr (kEnd != End::kKeep) v[j] = at_least(v[j], least);
      }
      if constexpr (kEnd == End::kKeep) {
#pragma GCC unroll 2
        for (int j = 0; j < kUsed; ++j) store(kept + j * kLanes, v[j]);
      } else if constexpr (kWhole) {
        store_row(out, v);
      } else {
        for (int j = 0; j < kUsed && j * kLanes < valid; ++j) {
          store(out + j * kLanes, v[j], valid - j * kLanes);
        }
      }
    }
  }
}

#ifdef ISA_AMX
#include "conv_amx.h"
#else
// What of a thread outlives a tile: nothing.
struct TileState {};

// One tile's sums over the whole window, and the epilogue. `fetch` ends with an endless stretch.
template <int kRows, int kHalves, int kUsed>
ISA inline __attribute__((noinline)) void multiply(const Conv& conv, const Source& source,
                                                   const Tile& tile, const Columns& columns,
                                                   End end, Stretch* fetch, float* kept) {
  const std::int64_t taps = (tile.last_row - tile.first_row) * source.segments;
  std::int64_t position = tile.first_row * source.segments * source.words;  // in the sum
  const std::int64_t stop = position + taps * source.words;
  alignas(64) float sums[kInRuns ? kRows * kHalves * kUsed * kLanes : 1];
  bool first_run = true;
  Vec sum[kRows * kHalves][kUsed] = {};
  const std::uint32_t* b = columns.weights + position * kStrip;
  std::int64_t line = tile.first_row * source.row_pitch, offset = line, segment = 0;
  for (std::int64_t tap = 0; tap < taps; ++tap) {
    const int outside = source.segments > 1 ? ends_outside<kRows, kHalves>(conv, tile, segment) : 0;
    const char* a[2] = {tile.halves[0].x + offset, tile.halves[kHalves - 1].x + offset};
    for (std::int64_t words = source.words; words > 0;) {
      while (fetch->words == 0) ++fetch;
      std::int64_t count = std::min(words, fetch->words);
      if constexpr (kInRuns) count = std::min(count, kRun - position % kRun);
      accumulate_inside<kRows, kHalves>(outside, sum, a, source.pixel_pitch, b, count, *fetch);
      words -= count;
      if constexpr (kInRuns) {
        position += count;
        if (position % kRun != 0 && position != stop) continue;
        if (!first_run) {
#pragma GCC unroll 14
          for (int r = 0; r < kRows * kHalves; ++r) {
#pragma GCC unroll 2
            for (int j = 0; j < kUsed; ++j) sum[r][j] += load(sums + (r * kUsed + j) * kLanes);
          }
        }
        if (position == stop) break;
        first_run = false;
#pragma GCC unroll 14
        for (int r = 0; r < kRows * kHalves; ++r) {
#pragma GCC unroll 2
          for (int j = 0; j < kUsed; ++j) {
            store(sums + (r * kUsed + j) * kLanes, sum[r][j]);
            sum[r][j] = Vec{};
          }
        }
      }
    }
    offset += source.segment_pitch;
    if (++segment == source.segments) {
      segment = 0;
      line += source.row_pitch;
      offset = line;
    }
  }
  constexpr std::int64_t kWide = kUsed * kLanes;
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

using Multiply = void (*)(const Conv&, const Source&, const Tile&, const Columns&, End, Stretch*,
                          float* kept);

template <int kHalves, int kUsed, int... Indices>
constexpr std::array<Multiply, sizeof...(Indices)> multiplies(
    std::integer_sequence<int, Indices...>) {
  return {multiply<Indices + 1, kHalves, kUsed>...};
}

// By halves, vectors of columns and rows.
using Rows = std::make_integer_sequence<int, kHalfRows>;
constexpr std::array<Multiply, kHalfRows> kMultiply[2][kVecs] = {
    {multiplies<1, 1>(Rows{}), multiplies<1, 2>(Rows{})},
    {multiplies<2, 1>(Rows{}), multiplies<2, 2>(Rows{})}};

ISA_INLINE void multiply_tile(TileState&, const Conv& conv, const Source& source, const Tile& tile,
                              const Columns& columns, End end, Stretch* fetch, float* kept) {
  const int vectors = columns.valid > kLanes ? kVecs : 1;
  kMultiply[tile.count - 1][vectors - 1][tile.rows - 1](conv, source, tile, columns, end, fetch,
                                                        kept);
}
#endif

// Adds the lines of a tile's pixels in one tensor, `pitch` elements apart, its halves from element
// `low` and `high` on.
ISA_INLINE void add_lines(Tile& tile, const void* data, std::int64_t pitch, std::int64_t low,
                          std::int64_t high) {
  const std::int64_t bytes = pitch * sizeof(Element);
  const bool in_line = tile.count == 2 && high == low + tile.rows * pitch;
  const std::int64_t rows = in_line ? 2 * tile.rows : tile.rows;
  for (int i = 0; i < (in_line ? 1 : tile.count); ++i) {
    const char* const line =
        static_cast<const char*>(data) + (i == 0 ? low : high) * sizeof(Element);
    tile.lines[tile.stretches++] = kTileLines == 2
                                       ? Stretch{line, 64, bytes, rows}
                                       : Stretch{line, bytes, 2 * bytes, (rows + 1) / 2};
  }
}

// Makes one tile of two that have a half each, of equally many rows; returns how many are left.
ISA_INLINE int join_halves(Tile* tiles, int count) {
  Tile* single[kHalfRows + 1] = {};  // by rows
  int left = 0;
  for (int i = 0; i < count; ++i) {
    const Tile tile = tiles[i];
    Tile*& partner = single[tile.rows];
    if (tile.count == 1 && partner != nullptr) {
      partner->halves[partner->count++] = tile.halves[0];
      partner->first_row = std::min(partner->first_row, tile.first_row);
      partner->last_row = std::max(partner->last_row, tile.last_row);
      for (int j = 0; j < tile.stretches; ++j) {
        partner->lines[partner->stretches++] = tile.lines[j];
      }
      partner = nullptr;
    } else {
      tiles[left] = tile;
      if (tile.count == 1) partner = &tiles[left];
      ++left;
    }
  }
  return left;
}

// The tiles of a task's pixels; returns their number.
ISA_INLINE int make_tiles(const Pass& pass, const Operand& operand, std::int64_t begin,
                          std::int64_t end, Tile* tiles) {
  const auto& [conv, plan, terms] = pass;
  int count = 0;
  HalfPlace place = plan.half(conv, begin);
  std::int64_t in_line = begin % plan.halves_per_line;
  auto [first, last] = rows_inside(conv, place.y);
  for (std::int64_t half = begin; half < end; ++count) {
    Tile& tile = tiles[count];
    tile.count = tile.stretches = 0;
    tile.rows = static_cast<int>(place.rows);
    tile.first_row = first;
    tile.last_row = last;
    for (; tile.count < 2 && half < end && place.rows == tile.rows;) {
      tile.first_row = std::min(tile.first_row, first);
      tile.last_row = std::max(tile.last_row, last);
      const std::int64_t pixel =
          (place.image * plan.out_height + place.y) * plan.out_width + place.x;
      tile.halves[tile.count++] = {operand.window(place), pixel, place.x,
                                   conv.residual.offset(pixel)};
      ++half;
      if (++in_line < plan.halves_per_line) {
        plan.advance(place, in_line);
      } else if (half < end) {
        in_line = 0;
        place = plan.half(conv, half);
        std::tie(first, last) = rows_inside(conv, place.y);
      }
    }
    const Half &low = tile.halves[0], &high = tile.halves[tile.count - 1];
    add_lines(tile, conv.out, conv.out_channels, low.pixel * conv.out_channels,
              high.pixel * conv.out_channels);
    if (conv.residual.channels > 0) {
      add_lines(tile, conv.residual.data, conv.residual.pixel, low.residual, high.residual);
    }
  }
  // Lines of 7 and 14 pixels are 3 + 2 + 2 and 3 + 3 + 3 + 3 + 2, and a half alone has too few sums
  // to hide the latency of a product.
  if constexpr (kLanes == 8) return join_halves(tiles, count);
  return count;
}

// What to fetch during one pass over a tile.
class Agenda {
 public:
  explicit Agenda(const void* anything) {
    stretches_[kAhead] = stretches_[kAhead + 1] = {};
    stretches_[kAhead + 2] = {static_cast<const char*>(anything), 0, 0, std::int64_t{1} << 62};
  }

  // What will be read next where it lies in line, whenever there is time: 0: the next tile, 1: the
  // next weights. `lines`: 1 or 2 with each word, as few as will do, because a core has few misses
  // under way at a time and what it multiplies waits behind them.
  ISA_INLINE void set_ahead(int which, const void* data, std::int64_t bytes, int lines = 2) {
    stretches_[kAhead + which] = {static_cast<const char*>(data), 64 * (lines - 1), 64 * lines,
                                  ceil_div(bytes, 64 * lines)};
  }

  // The stretches, first of all the lines of the epilogue that comes next: far apart, they are
  // foreseen by no prefetcher of the processor.
  ISA_INLINE Stretch* before(const Tile* tile, std::int64_t column) {
    Stretch* first = stretches_ + kAhead;
    if (tile == nullptr) return first;
    first -= tile->stretches;
    for (int i = 0; i < tile->stretches; ++i) {
      first[i] = tile->lines[i];
      first[i].line += column * sizeof(Element);
    }
    return first;
  }

 private:
  static constexpr int kAhead = 4;
  Stretch stretches_[kAhead + 3];
};

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
  Agenda agendas[2] = {Agenda(kept), Agenda(kept)};
  TileState state;

  const std::int64_t first_strip = strip_task * plan.strips / plan.strip_tasks;
  const std::int64_t last_strip = (strip_task + 1) * plan.strips / plan.strip_tasks;
  const std::int64_t together = plan.strips_together;
  for (std::int64_t strip = first_strip; strip < last_strip; strip += together) {
    const std::int64_t next = std::min(strip + together, last_strip);
    const std::int64_t next_strips = std::min(last_strip - next, together);
    const std::int64_t share = ceil_div(next_strips * kStrip, count);  // columns
    for (int i = 0; i < count; ++i) {
      for (int pass = 0; pass < pass_count; ++pass) {
        const Pass& at = passes[pass];
        const std::int64_t column_bytes = at.plan.words * 4;
        const std::int64_t from = std::min(share * i, next_strips * kStrip);
        const std::int64_t to = std::min(share * (i + 1), next_strips * kStrip);
        agendas[pass].set_ahead(
            1, static_cast<const char*>(at.conv.packed) + (next * kStrip + from) * column_bytes,
            (to - from) * column_bytes, count > 2 ? 1 : 2);
        const bool reads_next = at.plan.in_place && strip == first_strip && i + 1 < count;
        const Tile& coming = tiles[pass][reads_next ? i + 1 : i];
        agendas[pass].set_ahead(
            0, coming.halves[0].x,
            reads_next ? at.plan.source.pixel_pitch * coming.rows * coming.count : 0);
      }
      for (std::int64_t at_strip = strip; at_strip < next; ++at_strip) {
        const std::int64_t k = at_strip * kStrip;
        // The epilogue that follows this one's, or the projection.
        const bool stays = at_strip + 1 < next;
        const Tile* coming = stays ? &tiles[0][i] : i + 1 < count ? &tiles[0][i + 1] : nullptr;
        const std::int64_t column = stays ? k + kStrip : strip * kStrip;
        for (int pass = pass_count - 1; pass >= 0; --pass) {
          const Pass& at = passes[pass];
          const Columns columns{
              static_cast<const std::uint32_t*>(at.conv.packed) + k * at.plan.words, at.terms.at(k),
              k, conv.out_channels - k};
          const End end_of_pass = pass == 1                    ? End::kKeep
                                  : pass_count == 2            ? End::kAdd
                                  : k < conv.residual.channels ? End::kResidual
                                                               : End::kResult;
          const Tile& tile = tiles[pass][i];
          Stretch* const fetch = pass == 1         ? agendas[1].before(&tiles[0][i], k)
                                 : pass_count == 2 ? agendas[0].before(nullptr, 0)
                                                   : agendas[0].before(coming, column);
          multiply_tile(state, at.conv, at.plan.source, tile, columns, end_of_pass, fetch, kept);
        }
      }
    }
  }
}
