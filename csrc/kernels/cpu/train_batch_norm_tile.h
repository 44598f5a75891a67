// The vector code of train_batch_norm.cpp, included once per instruction set by for_each_isa.h.
#include "vec.h"

// Vectors of channels that a pass with sums takes at once: their sums stay in registers.
constexpr int kStripVecs = kLanes == 16 ? 4 : 2;

// Half a vector's numbers in fp64.
typedef double Wide __attribute__((vector_size(ISA_LANES * 4)));

struct Halves {
  Wide low, high;
};

ISA_INLINE Halves widen(Vec v) {
#if ISA_LANES == 16
  const __m512 all = (__m512)v;
  return {(Wide)_mm512_cvtps_pd(_mm512_castps512_ps256(all)),
          (Wide)_mm512_cvtps_pd(_mm512_extractf32x8_ps(all, 1))};
#elif ISA_LANES == 8
  const __m256 all = (__m256)v;
  return {(Wide)_mm256_cvtps_pd(_mm256_castps256_ps128(all)),
          (Wide)_mm256_cvtps_pd(_mm256_extractf128_ps(all, 1))};
#else
  return {Wide{v[0], v[1]}, Wide{v[2], v[3]}};
#endif
}

ISA_INLINE void store(double* p, const Halves& v) {
  std::memcpy(p, &v.low, sizeof v.low);
  std::memcpy(p + kLanes / 2, &v.high, sizeof v.high);
}

// Mean, scale and shift of a vector of channels.
struct Scales {
  Vec mean, scale, shift;
};

ISA_INLINE Scales scales_at(const float* scale_shift, std::int64_t channels, std::int64_t c) {
  const std::int64_t valid = channels - c;
  return {load(scale_shift + c, valid), load(scale_shift + channels + c, valid),
          load(scale_shift + 2 * channels + c, valid)};
}

ISA_INLINE Vec normalised(Vec x, const Scales& at) { return (x - at.mean) * at.scale + at.shift; }

// What a number of this type in memory is.
ISA_INLINE Vec as_stored(Vec v, const float*) { return v; }
ISA_INLINE Vec as_stored(Vec v, const BFloat16*) {
  BFloat16 stored[kLanes];
  store(stored, v);
  return load(stored);
}

template <typename Number>
ISA_INLINE const Number* numbers(const void* p) {
  return static_cast<const Number*>(p);
}

// bfloat16 is summed in fp32 for a few rows at a time: converting each number to fp64 would take
// longer than reading it.
template <typename Number>
constexpr std::int64_t kShortRun = sizeof(Number) == 2 ? 8 : 1;

ISA_INLINE void add(Halves& sum, Vec v) {
  const Halves wide = widen(v);
  sum.low += wide.low;
  sum.high += wide.high;
}

// Deviations from the first row are summed, so that a large mean does not cancel.
template <typename Number, int kVecs>
ISA_INLINE void moments_strip(const Number* x, std::int64_t rows, std::int64_t channels,
                              std::int64_t valid, double* mean, double* squares) {
  constexpr std::int64_t kRun = kShortRun<Number>;
  Vec first[kVecs];
  Halves sum[kVecs] = {}, square[kVecs] = {};
  for (int j = 0; j < kVecs; ++j) first[j] = load(x + j * kLanes, valid - j * kLanes);
  for (std::int64_t row = 0; row < rows; row += kRun) {
    Vec short_sum[kVecs] = {}, short_square[kVecs] = {};
    for (std::int64_t i = row; i < std::min(row + kRun, rows); ++i, x += channels) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const Vec v = load(x + j * kLanes, valid - j * kLanes);
        if constexpr (kRun > 1) {
          const Vec apart = v - first[j];
          short_sum[j] += apart;
          short_square[j] += apart * apart;
        } else {
          Halves wide = widen(v);
          const Halves shift = widen(first[j]);
          wide.low -= shift.low;
          wide.high -= shift.high;
          sum[j].low += wide.low;
          sum[j].high += wide.high;
          square[j].low += wide.low * wide.low;
          square[j].high += wide.high * wide.high;
        }
      }
    }
    for (int j = 0; kRun > 1 && j < kVecs; ++j) {
      add(sum[j], short_sum[j]);
      add(square[j], short_square[j]);
    }
  }
  const double share = 1.0 / static_cast<double>(rows);
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) {
    const Halves average{sum[j].low * share, sum[j].high * share}, shift = widen(first[j]);
    store(mean + j * kLanes, {shift.low + average.low, shift.high + average.high});
    store(squares + j * kLanes,
          {square[j].low - sum[j].low * average.low, square[j].high - sum[j].high * average.high});
  }
}

template <typename Number>
ISA_INLINE void moments_rows(const Moments& op, std::int64_t first, std::int64_t last,
                             double* part) {
  const std::int64_t channels = op.rows.channels, padded = round_up(channels, kPadding);
  const Number* const x = numbers<Number>(op.x) + first * channels;
  std::int64_t c = 0;
  for (; c + kStripVecs * kLanes <= channels; c += kStripVecs * kLanes) {
    moments_strip<Number, kStripVecs>(x + c, last - first, channels, kStripVecs * kLanes, part + c,
                                      part + padded + c);
  }
  for (; c < channels; c += kLanes) {
    moments_strip<Number, 1>(x + c, last - first, channels, channels - c, part + c,
                             part + padded + c);
  }
}

ISA void moments_task(const Moments& op, std::int64_t first, std::int64_t last, double* part) {
  if (op.rows.format == Format::kFloat32) {
    moments_rows<float>(op, first, last, part);
  } else {
    moments_rows<BFloat16>(op, first, last, part);
  }
}

template <typename Number, bool kOther, int kVecs>
ISA_INLINE void normalise_strip(const NormaliseAddRelu& op, std::int64_t first, std::int64_t last,
                                std::int64_t c) {
  const std::int64_t channels = op.rows.channels;
  const std::int64_t valid = kVecs > 1 ? kVecs * kLanes : channels - c;
  const std::int64_t added = kOther ? 0 : op.residual.channels - c;
  const Vec least = least_result(true);
  Scales main[kVecs], other[kVecs];
  for (int j = 0; j < kVecs; ++j) {
    main[j] = scales_at(op.main.scale_shift, channels, c + j * kLanes);
    if constexpr (kOther) other[j] = scales_at(op.other.scale_shift, channels, c + j * kLanes);
  }
  for (std::int64_t row = first; row < last; ++row) {
    const std::int64_t at = row * channels + c;
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      const std::int64_t place = at + j * kLanes, count = valid - j * kLanes;
      Vec v = normalised(load(numbers<Number>(op.main.x) + place, count), main[j]);
      if constexpr (kOther) {
        v += normalised(load(numbers<Number>(op.other.x) + place, count), other[j]);
      } else if (j * kLanes < added) {
        const auto* const residual = numbers<Number>(op.residual.data) + op.residual.offset(row);
        v += load(residual + c + j * kLanes, added - j * kLanes);
      }
      store(static_cast<Number*>(op.out) + place, at_least(v, least), count);
    }
  }
}

template <typename Number, bool kOther>
ISA_INLINE void normalise_rows(const NormaliseAddRelu& op, std::int64_t first, std::int64_t last) {
  // So few rows at once that memory is read and written in its order, so many that a strip's scales
  // are loaded once for several vectors.
  constexpr int kVecs = kOther ? kStripVecs / 2 : kStripVecs;
  const std::int64_t channels = op.rows.channels;
  const std::int64_t step = std::max<std::int64_t>(1024 / channels, 4);
  for (std::int64_t row = first; row < last; row += step) {
    const std::int64_t end = std::min(row + step, last);
    std::int64_t c = 0;
    for (; c + kVecs * kLanes <= channels; c += kVecs * kLanes) {
      normalise_strip<Number, kOther, kVecs>(op, row, end, c);
    }
    for (; c < channels; c += kLanes) normalise_strip<Number, kOther, 1>(op, row, end, c);
  }
}

ISA void normalise_task(const NormaliseAddRelu& op, std::int64_t first, std::int64_t last) {
  const bool other = op.other.x != nullptr;
  if (op.rows.format == Format::kFloat32) {
    other ? normalise_rows<float, true>(op, first, last)
          : normalise_rows<float, false>(op, first, last);
  } else {
    other ? normalise_rows<BFloat16, true>(op, first, last)
          : normalise_rows<BFloat16, false>(op, first, last);
  }
}

// g and the sums of a strip: part (1 + kBranches, padded), of g and of g * (x - mean) of each.
template <typename Number, bool kMasks, int kBranches, int kVecs>
ISA_INLINE void gradient_strip(const ReluGradient& op, std::int64_t first, std::int64_t last,
                               std::int64_t c, double* part) {
  const std::int64_t channels = op.rows.channels, padded = round_up(channels, kPadding);
  Halves sum[kVecs] = {}, dot[kBranches + 1][kVecs] = {};
  Scales at[kBranches + 1][kVecs];
  for (int b = 0; b < kBranches; ++b) {
    for (int j = 0; j < kVecs; ++j) {
      at[b][j] = scales_at(op.branch[b].scale_shift, channels, c + j * kLanes);
    }
  }
  constexpr std::int64_t kRun = kShortRun<Number>;
  for (std::int64_t run = first; run < last; run += kRun) {
    Vec short_sum[kVecs] = {}, short_dot[kBranches + 1][kVecs] = {};
    for (std::int64_t row = run; row < std::min(run + kRun, last); ++row) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const std::int64_t place = row * channels + c + j * kLanes;
        const std::int64_t valid = kVecs > 1 ? kLanes : channels - c;
        Vec x[kBranches + 1];
        for (int b = 0; b < kBranches; ++b) {
          x[b] = load(numbers<Number>(op.branch[b].x) + place, valid);
        }
        const Vec value =
            kMasks ? load(numbers<Number>(op.y) + place, valid) : normalised(x[0], at[0][j]);
        const Vec grad = load(numbers<Number>(op.grad) + place, valid);
        const Vec g = value > 0.0f ? grad : Vec{};
        store(static_cast<Number*>(op.g) + place, g, valid);
        if constexpr (kBranches > 0 && kRun > 1) {
          short_sum[j] += g;
          for (int b = 0; b < kBranches; ++b) short_dot[b][j] += g * (x[b] - at[b][j].mean);
        } else if constexpr (kBranches > 0) {
          const Halves wide = widen(g);
          sum[j].low += wide.low;
          sum[j].high += wide.high;
          for (int b = 0; b < kBranches; ++b) {
            const Halves centred = widen(x[b]), mean = widen(at[b][j].mean);
            dot[b][j].low += wide.low * (centred.low - mean.low);
            dot[b][j].high += wide.high * (centred.high - mean.high);
          }
        }
      }
    }
    for (int j = 0; kRun > 1 && j < kVecs; ++j) {
      add(sum[j], short_sum[j]);
      for (int b = 0; b < kBranches; ++b) add(dot[b][j], short_dot[b][j]);
    }
  }
  for (int j = 0; kBranches > 0 && j < kVecs; ++j) {
    store(part + c + j * kLanes, sum[j]);
    for (int b = 0; b < kBranches; ++b) store(part + (1 + b) * padded + c + j * kLanes, dot[b][j]);
  }
}

template <typename Number, bool kMasks, int kBranches>
ISA_INLINE void gradient_rows(const ReluGradient& op, std::int64_t first, std::int64_t last,
                              double* part) {
  constexpr int kVecs = kBranches == 2 ? kStripVecs / 2 : kStripVecs;
  std::int64_t c = 0;
  for (; c + kVecs * kLanes <= op.rows.channels; c += kVecs * kLanes) {
    gradient_strip<Number, kMasks, kBranches, kVecs>(op, first, last, c, part);
  }
  for (; c < op.rows.channels; c += kLanes) {
    gradient_strip<Number, kMasks, kBranches, 1>(op, first, last, c, part);
  }
}

template <typename Number>
ISA_INLINE void gradient_of(const ReluGradient& op, std::int64_t first, std::int64_t last,
                            double* part) {
  if (op.y == nullptr) return gradient_rows<Number, false, 1>(op, first, last, part);
  switch (op.branches) {
    case 0:
      return gradient_rows<Number, true, 0>(op, first, last, part);
    case 1:
      return gradient_rows<Number, true, 1>(op, first, last, part);
    default:
      return gradient_rows<Number, true, 2>(op, first, last, part);
  }
}

ISA void gradient_task(const ReluGradient& op, std::int64_t first, std::int64_t last,
                       double* part) {
  if (op.rows.format == Format::kFloat32) {
    gradient_of<float>(op, first, last, part);
  } else {
    gradient_of<BFloat16>(op, first, last, part);
  }
}

template <typename Number, bool kCentred>
ISA_INLINE void pre_bn_rows(const PreBnGradient& op, std::int64_t first, std::int64_t last) {
  const std::int64_t channels = op.rows.channels;
  const float* const a = op.coefficients;
  for (std::int64_t row = first; row < last; ++row) {
    const std::int64_t at = row * channels;
    for (std::int64_t c = 0; c < channels; c += kLanes) {
      const std::int64_t valid = channels - c;
      Vec v = load(a + c, valid) * load(numbers<Number>(op.g) + at + c, valid);
      if constexpr (kCentred) {
        const Vec x = load(numbers<Number>(op.x) + at + c, valid);
        v += load(a + channels + c, valid) * (x - load(a + 3 * channels + c, valid)) +
             load(a + 2 * channels + c, valid);
      }
      store(static_cast<Number*>(op.out) + at + c, v, valid);
    }
  }
}

ISA void pre_bn_task(const PreBnGradient& op, std::int64_t first, std::int64_t last) {
  const bool centred = op.x != nullptr;
  if (op.rows.format == Format::kFloat32) {
    centred ? pre_bn_rows<float, true>(op, first, last)
            : pre_bn_rows<float, false>(op, first, last);
  } else {
    centred ? pre_bn_rows<BFloat16, true>(op, first, last)
            : pre_bn_rows<BFloat16, false>(op, first, last);
  }
}

template <typename Number>
ISA_INLINE void add_strided_lines(const AddStrided& op, std::int64_t first, std::int64_t last) {
  const std::int64_t lines = ceil_div(op.height, op.stride), pixels = ceil_div(op.width, op.stride);
  for (std::int64_t i = first; i < last; ++i) {
    const std::int64_t line = i / lines * op.height + i % lines * op.stride;
    for (std::int64_t x = 0; x < pixels; ++x) {
      const Number* const add = numbers<Number>(op.add.data) + op.add.offset(i * pixels + x);
      Number* const out =
          static_cast<Number*>(op.out) + (line * op.width + x * op.stride) * op.channels;
      for (std::int64_t c = 0; c < op.add.channels; c += kLanes) {
        const std::int64_t valid = op.add.channels - c;
        store(out + c, load(out + c, valid) + load(add + c, valid), valid);
      }
    }
  }
}

// Lines of `add`, counted through the batch.
ISA void add_strided_task(const AddStrided& op, std::int64_t first, std::int64_t last) {
  op.format == Format::kFloat32 ? add_strided_lines<float>(op, first, last)
                                : add_strided_lines<BFloat16>(op, first, last);
}

// The largest number of a window and where it is: the tap, counted along lines. NaN is larger than
// all.
template <typename Number>
ISA_INLINE Vec window_maximum(const Pooling& op, std::int64_t image, std::int64_t p, std::int64_t q,
                              std::int64_t c, const Scales& at, VecBits& tap) {
  const std::int64_t valid = op.channels - c;
  Vec most = splat(-std::numeric_limits<float>::infinity());
  tap = VecBits{};
  for (std::int64_t r = 0; r < op.kernel; ++r) {
    const std::int64_t y = p * op.stride - op.padding + r;
    if (y < 0 || y >= op.height) continue;
    for (std::int64_t s = 0; s < op.kernel; ++s) {
      const std::int64_t x = q * op.stride - op.padding + s;
      if (x < 0 || x >= op.width) continue;
      const Number* const from = numbers<Number>(op.activation.x) +
                                 ((image * op.height + y) * op.width + x) * op.channels + c;
      const Vec v = as_stored(at_least(normalised(load(from, valid), at), Vec{}), from);
      const auto larger = v > most || v != v;
      most = larger ? v : most;
      tap = larger ? VecBits{} + static_cast<std::uint32_t>(r * op.kernel + s) : tap;
    }
  }
  return most;
}

typedef std::uint8_t Places __attribute__((vector_size(ISA_LANES)));

template <typename Number>
ISA_INLINE void pool_line(const Pooling& op, std::int64_t image, std::int64_t p, void* out,
                          std::uint8_t* argmax) {
  for (std::int64_t q = 0; q < op.out_width; ++q) {
    const std::int64_t place = ((image * op.out_height + p) * op.out_width + q) * op.channels;
    for (std::int64_t c = 0; c < op.channels; c += kLanes) {
      VecBits tap;
      const Scales at = scales_at(op.activation.scale_shift, op.channels, c);
      const Vec most = window_maximum<Number>(op, image, p, q, c, at, tap);
      store(static_cast<Number*>(out) + place + c, most, op.channels - c);
      const Places places = __builtin_convertvector(tap, Places);
      std::memcpy(argmax + place + c, &places, std::min<std::int64_t>(kLanes, op.channels - c));
    }
  }
}

ISA void pool_task(const Pooling& op, std::int64_t image, std::int64_t p, void* out,
                   std::uint8_t* argmax) {
  if (op.format == Format::kFloat32) {
    pool_line<float>(op, image, p, out, argmax);
  } else {
    pool_line<BFloat16>(op, image, p, out, argmax);
  }
}

// The windows that meet a position: from the first to before the end.
struct Windows {
  std::int64_t first, end;
};

inline Windows windows_at(const Pooling& op, std::int64_t position, std::int64_t count) {
  const std::int64_t padded = position + op.padding;
  return {padded < op.kernel ? 0 : (padded - op.kernel) / op.stride + 1,
          std::min(padded / op.stride + 1, count)};
}

ISA_INLINE VecBits load_places(const std::uint8_t* p, std::int64_t count) {
  Places places{};
  if (count >= kLanes) {
    std::memcpy(&places, p, kLanes);
  } else {
    std::memcpy(&places, p, count);
  }
  return __builtin_convertvector(places, VecBits);
}

// Lines [first, last) of an image: each pixel gathers from the windows that meet it.
template <typename Number>
ISA_INLINE void pool_gradient_lines(const Pooling& op, const PoolGradient& of, std::int64_t image,
                                    std::int64_t first, std::int64_t last, double* part) {
  const std::int64_t channels = op.channels, padded = round_up(channels, kPadding);
  thread_local std::vector<Windows> all_columns;  // dividing for each pixel would take longest
  all_columns.clear();
  for (std::int64_t x = 0; x < op.width; ++x) {
    all_columns.push_back(windows_at(op, x, op.out_width));
  }
  for (std::int64_t c = 0; c < channels; c += kLanes) {
    const std::int64_t valid = channels - c;
    const Scales at = scales_at(op.activation.scale_shift, channels, c);
    const Halves mean = widen(at.mean);
    Halves total{}, dot{};
    for (std::int64_t y = first; y < last; ++y) {
      const Windows rows = windows_at(op, y, op.out_height);
      const std::int64_t line = ((image * op.height + y) * op.width) * channels + c;
      constexpr std::int64_t kRun = kShortRun<Number>;
      for (std::int64_t run = 0; run < op.width; run += kRun) {
        Vec short_total{}, short_dot{};
        for (std::int64_t x = run; x < std::min(run + kRun, op.width); ++x) {
          const Windows columns = all_columns[x];
          Vec sum{};
          for (std::int64_t p = rows.first; p < rows.end; ++p) {
            const std::int64_t tap_of_first =
                (y - p * op.stride + op.padding) * op.kernel + x + op.padding;
            for (std::int64_t q = columns.first; q < columns.end; ++q) {
              const std::int64_t window =
                  ((image * op.out_height + p) * op.out_width + q) * channels + c;
              const auto tap = static_cast<std::uint32_t>(tap_of_first - q * op.stride);
              sum += load_places(of.argmax + window, valid) == tap
                         ? load(numbers<Number>(of.grad) + window, valid)
                         : Vec{};
            }
          }
          const Number* const from = numbers<Number>(op.activation.x) + line + x * channels;
          const Vec value = load(from, valid);
          sum = as_stored(normalised(value, at) > 0.0f ? sum : Vec{}, from);
          store(static_cast<Number*>(of.g) + line + x * channels, sum, valid);
          if constexpr (kRun > 1) {
            short_total += sum;
            short_dot += sum * (value - at.mean);
          } else {
            const Halves wide = widen(sum), centred = widen(value);
            total.low += wide.low;
            total.high += wide.high;
            dot.low += wide.low * (centred.low - mean.low);
            dot.high += wide.high * (centred.high - mean.high);
          }
        }
        if constexpr (kRun > 1) {
          add(total, short_total);
          add(dot, short_dot);
        }
      }
    }
    store(part + c, total);
    store(part + padded + c, dot);
  }
}

ISA void pool_gradient_task(const Pooling& op, const PoolGradient& of, std::int64_t image,
                            std::int64_t first, std::int64_t last, double* part) {
  if (op.format == Format::kFloat32) {
    pool_gradient_lines<float>(op, of, image, first, last, part);
  } else {
    pool_gradient_lines<BFloat16>(op, of, image, first, last, part);
  }
}
