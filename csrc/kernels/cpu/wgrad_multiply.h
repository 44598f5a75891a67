// The products of wgrad.cpp and wgrad_winograd.cpp: sums over pixels, in registers.
#include "vec.h"

constexpr int kVecs = 2;
constexpr int kMaxRows = kLanes == 16 ? 14 : 6;  // of two vectors; twice as many of one

// Pixels that an fp32 sum runs through in registers before it joins the others: PyTorch's run
// through a line of the image, of 7 in the smallest maps of a ResNet. In bfloat16 PyTorch's error
// is that of the rounded result, so a sum runs through the whole block.
constexpr bool kInRuns = kFormat == Format::kFloat32;
constexpr std::int64_t kShortRun = kInRuns ? 12 : std::int64_t{1} << 62;

// sums[kRows][2 vectors] (+)= the sum over the runs' pixels of x[kRows] times grad[kUsed vectors].
template <int kRows, int kUsed>
ISA inline __attribute__((noinline)) void multiply(const RunList& runs, const std::uint32_t* x,
                                                   std::int64_t pitch, const std::uint32_t* grad,
                                                   float* sums, bool first, Ahead::Column ahead) {
  alignas(64) float kept[kInRuns ? kRows * kUsed * kLanes : 1];
  Vec sum[kRows][kUsed] = {};
  std::int64_t left = kShortRun;
  bool any_kept = false;
  for (const Run* run = runs.begin; run != runs.end; ++run) {
    const std::uint32_t* a = x + run->x;
    const std::uint32_t* b = grad + run->grad * (kVecs * kLanes);
    for (std::int64_t pixels = run->count; pixels > 0;) {
      if (kInRuns && left == 0) {
#pragma GCC unroll 28
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
          for (int j = 0; j < kUsed; ++j) {
            float* const to = kept + (r * kUsed + j) * kLanes;
            store(to, any_kept ? load(to) + sum[r][j] : sum[r][j]);
            sum[r][j] = Vec{};
          }
        }
        any_kept = true;
        left = kShortRun;
      }
      const std::int64_t count = std::min(pixels, left);
      pixels -= count;
      left -= count;
      for (std::int64_t i = 0; i < count; ++i, a += pitch, b += kVecs * kLanes) {
        __builtin_prefetch(ahead.line, 0, 2);
        ahead.line += ahead.pitch;
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) {
          if constexpr (kParts > 1) asm("" : "+r"(a), "+r"(b));
          Vec columns[kUsed];
#pragma GCC unroll 2
          for (int j = 0; j < kUsed; ++j) columns[j] = load_factors(b + j * kLanes, part);
#pragma GCC unroll 28
          for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
            for (int j = 0; j < kUsed; ++j) {
              sum[r][j] = multiply_add(a[r], columns[j], sum[r][j], part);
            }
          }
        }
      }
    }
  }
#pragma GCC unroll 28
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kUsed; ++j) {
      float* const to = sums + r * (kVecs * kLanes) + j * kLanes;
      Vec v = sum[r][j];
      if (kInRuns && any_kept) v += load(kept + (r * kUsed + j) * kLanes);
      store(to, first ? v : load(to) + v);
    }
  }
}

using Multiply = void (*)(const RunList&, const std::uint32_t*, std::int64_t, const std::uint32_t*,
                          float*, bool, Ahead::Column);

template <int kUsed, int... Indices>
constexpr std::array<Multiply, sizeof...(Indices)> multiplies(
    std::integer_sequence<int, Indices...>) {
  return {multiply<Indices + 1, kUsed>...};
}

constexpr auto kNarrow = multiplies<1>(std::make_integer_sequence<int, 2 * kMaxRows>{});
constexpr auto kWide = multiplies<2>(std::make_integer_sequence<int, kMaxRows>{});

// multiply() for `rows` rows, in tiles of equal height.
ISA_INLINE void multiply_rows(const RunList& runs, const std::uint32_t* x, std::int64_t pitch,
                              const std::uint32_t* grad, float* sums, std::int64_t rows,
                              bool narrow, bool first, Ahead& ahead) {
  const Multiply* const multiply = narrow ? kNarrow.data() : kWide.data();
  const std::int64_t tiles = ceil_div(rows, narrow ? 2 * kMaxRows : kMaxRows);
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t from = tile * rows / tiles, to = (tile + 1) * rows / tiles;
    multiply[to - from - 1](runs, x + from, pitch, grad, sums + from * (kVecs * kLanes), first,
                            ahead.next(x));
  }
}

// The sum of one vector of each part, in runs, so that its error grows with the square root of
// their number.
ISA_INLINE Vec sum_of_parts(const float* from, std::int64_t parts, std::int64_t part_floats) {
  constexpr std::int64_t kRun = 6;
  Vec sum = {};
  for (std::int64_t first = 0; first < parts; first += kRun) {
    Vec run = load(from);
    for (std::int64_t i = 1; i < std::min(kRun, parts - first); ++i) {
      run += load(from + i * part_floats);
    }
    from += kRun * part_floats;
    sum = first == 0 ? run : sum + run;
  }
  return sum;
}

// Swaps rows and columns.
template <int kBlock>
ISA_INLINE void transpose_blocks(Vec (&v)[kLanes]) {
  typedef std::int32_t Index __attribute__((vector_size(ISA_LANES * 4)));
  Index low = {}, high = {};
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j) {
    low[j] = (j & kBlock) == 0 ? j : kLanes + j - kBlock;
    high[j] = (j & kBlock) == 0 ? j + kBlock : kLanes + j;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kBlock) != 0) continue;
    const Vec a = v[i], b = v[i + kBlock];
    v[i] = __builtin_shuffle(a, b, low);
    v[i + kBlock] = __builtin_shuffle(a, b, high);
  }
}

ISA_INLINE void transpose(Vec (&v)[kLanes]) {
  transpose_blocks<1>(v);
  transpose_blocks<2>(v);
  transpose_blocks<4>(v);
  if constexpr (kLanes == 16) transpose_blocks<8>(v);
}
