// The vector code of conv.cpp, included once per instruction set by for_each_isa.h.
#include "vec.h"

constexpr int kRows = kLanes == 16 ? 14 : 6;  // of the micro-kernel
constexpr int kVecs = 2;
constexpr int kTileLines = kVecs * kLanes * sizeof(Element) / 64;  // cache lines of a tile's row
constexpr std::int64_t kChunk = kFormat == Format::kFloat32 ? 64 : 256;  // words
constexpr std::int64_t kRowWords = kChunk + 8;  // of a copied row: not all rows in one cache set
constexpr int kPerWord = 4 / sizeof(Element);

// Where an output pixel's window begins, in the padded image's terms.
struct Pixel {
  const Element* image;
  std::int64_t y, x;
};

// What one micro-kernel leaves behind: partial sums, or results.
struct Tile {
  float* sums;  // of the tile alone
  bool first, last;
  TermsAt<Precise<Element>> terms;  // from the tile's first channel on
  const Element* residual;          // at the tile's first pixel and channel, as out
  Element* out;
  std::int64_t channels;  // from one pixel to the next
  std::int64_t valid;     // channels of out from the tile's first on
  bool relu;
};

// sums (+)= a[Rows][depth] * b[depth][kVecs vectors]; after the last of them the epilogue.
template <int Rows>
ISA inline __attribute__((noinline)) void multiply(const std::uint32_t* a, const std::uint32_t* b,
                                                   std::int64_t depth, const Tile& tile) {
  if (tile.last) {
    for (int r = 0; r < Rows; ++r) {
      for (int line = 0; line < kTileLines; ++line) {
        const std::int64_t at = r * tile.channels + line * (64 / std::int64_t{sizeof(Element)});
        if (tile.residual != nullptr) __builtin_prefetch(tile.residual + at);
        __builtin_prefetch(tile.out + at, 1);
      }
    }
  }
  Vec sum[Rows][kVecs] = {};
  for (std::int64_t i = 0; i < depth; ++i, ++a, b += kStrip) {
    Vec columns[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) columns[j] = load_words(b + j * kLanes);
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) {
        sum[r][j] = multiply_add(a[r * kRowWords], columns[j], sum[r][j]);
      }
    }
  }
  if (!tile.first) {
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) sum[r][j] += load(tile.sums + (r * kVecs + j) * kLanes);
    }
  }
  if (!tile.last) {
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) store(tile.sums + (r * kVecs + j) * kLanes, sum[r][j]);
    }
    return;
  }
  const Element* residual = tile.residual;
  Element* out = tile.out;
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r, out += tile.channels) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) {
      const std::int64_t k = j * kLanes, valid = tile.valid - k;
      const Vec added = residual == nullptr ? Vec{} : load(residual + k, valid);
      const auto& [mean, scale, bias] = tile.terms;
      store(out + k, normalise(sum[r][j], {mean + k, scale + k, bias + k}, added, tile.relu),
            valid);
    }
    if (residual != nullptr) residual += tile.channels;
  }
}

using Multiply = void (*)(const std::uint32_t*, const std::uint32_t*, std::int64_t, const Tile&);

template <int... Indices>
constexpr std::array<Multiply, sizeof...(Indices)> multiplies(
    std::integer_sequence<int, Indices...>) {
  return {multiply<Indices + 1>...};
}

constexpr auto kMultiply = multiplies(std::make_integer_sequence<int, kRows>{});

ISA_INLINE void copy(const Element* from, std::int64_t count, Element* to) {
  constexpr std::int64_t kStep = sizeof(Vec) / sizeof(Element);
  std::int64_t i = 0;
  for (; i + kStep <= count; i += kStep) std::memcpy(to + i, from + i, sizeof(Vec));
  for (; i < count; ++i) to[i] = from[i];
}

// a[row] = the numbers [begin, begin + count) of each row's window, taps outside the image zero.
ISA_INLINE void gather(const Conv& conv, const Plan& plan, const Pixel* pixels, std::int64_t rows,
                       std::int64_t begin, std::int64_t count, std::uint32_t* a) {
  const Window& window = conv.window;
  const std::int64_t channels = conv.in_channels;
  const std::int64_t end = std::min(begin + count, plan.numbers);
  for (std::int64_t i = begin; i < end;) {
    const std::int64_t tap = i / channels, c = i % channels;
    const std::int64_t length = std::min(channels - c, end - i);
    const std::int64_t dy = tap / window.kernel[1] * window.dilation[0];
    const std::int64_t dx = tap % window.kernel[1] * window.dilation[1];
    for (std::int64_t row = 0; row < rows; ++row) {
      const Pixel& pixel = pixels[row];
      const std::int64_t y = pixel.y + dy, x = pixel.x + dx;
      Element* const to = reinterpret_cast<Element*>(a + row * kRowWords) + (i - begin);
      if (y >= 0 && y < conv.height && x >= 0 && x < conv.width) {
        copy(pixel.image + (y * conv.width + x) * channels + c, length, to);
      } else {
        std::memset(to, 0, length * sizeof(Element));
      }
    }
    i += length;
  }
  if (end < begin + count) {  // the odd half of the last word
    for (std::int64_t row = 0; row < rows; ++row) {
      reinterpret_cast<Element*>(a + row * kRowWords)[end - begin] = Element{};
    }
  }
}

ISA void conv_task(const Conv& conv, const Plan& plan, const Terms& terms, std::int64_t row_task,
                   std::int64_t strip_task) {
  const std::int64_t first_row = row_task * plan.rows / plan.row_tasks;
  const std::int64_t rows = (row_task + 1) * plan.rows / plan.row_tasks - first_row;
  const std::int64_t first_strip = strip_task * plan.strips / plan.strip_tasks;
  const std::int64_t strips = (strip_task + 1) * plan.strips / plan.strip_tasks - first_strip;
  const std::int64_t tiles = ceil_div(rows, kRows);

  const std::int64_t pixel_floats = ceil_div(rows * sizeof(Pixel), sizeof(float));
  float* const scratch =
      thread_scratch().floats(rows * (kRowWords + strips * kStrip) + pixel_floats + 16);
  auto* const a = reinterpret_cast<std::uint32_t*>(scratch);
  float* const sums = scratch + rows * kRowWords;
  auto* const pixels = reinterpret_cast<Pixel*>(
      scratch + round_up(rows * (kRowWords + strips * kStrip), alignof(Pixel) / sizeof(float)));
  const std::int64_t image = conv.height * conv.width * conv.in_channels;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t at = first_row + row, line = at / plan.out_width;
    pixels[row] = {static_cast<const Element*>(conv.x) + line / plan.out_height * image,
                   line % plan.out_height * conv.window.stride[0] - conv.window.padding[0],
                   at % plan.out_width * conv.window.stride[1] - conv.window.padding[1]};
  }

  for (std::int64_t begin = 0; begin < plan.words; begin += kChunk) {
    const std::int64_t depth = std::min(kChunk, plan.words - begin);
    gather(conv, plan, pixels, rows, begin * kPerWord, depth * kPerWord, a);
    for (std::int64_t t = 0; t < tiles; ++t) {
      const std::int64_t row = t * rows / tiles, height = (t + 1) * rows / tiles - row;
      for (std::int64_t j = 0; j < strips * kStrip; j += kVecs * kLanes) {
        const std::int64_t k = first_strip * kStrip + j;
        const std::int64_t offset = (first_row + row) * conv.out_channels + k;
        const Tile tile{sums + j * rows + row * kVecs * kLanes,
                        begin == 0,
                        begin + depth == plan.words,
                        terms.at<Precise<Element>>(k),
                        conv.residual == nullptr
                            ? nullptr
                            : static_cast<const Element*>(conv.residual) + offset,
                        static_cast<Element*>(conv.out) + offset,
                        conv.out_channels,
                        conv.out_channels - k,
                        conv.relu};
        const auto* const b = static_cast<const std::uint32_t*>(conv.packed) +
                              (k / kStrip * plan.words + begin) * kStrip + k % kStrip;
        kMultiply[height - 1](a + row * kRowWords, b, depth, tile);
      }
    }
  }
}
