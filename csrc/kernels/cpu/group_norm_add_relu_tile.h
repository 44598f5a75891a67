// The vector code of group_norm_add_relu.cpp, included once per instruction set by for_each_isa.h.
#include "vec.h"

// Merges kCount pixels, `origins` taken off, with the moments of the `before` ones.
template <int kCount, typename Number>
ISA_INLINE void add_pixels(const Number* x, std::int64_t before, std::int64_t channels,
                           const float* origins, float* means, float* squares) {
  const Vec part = splat(kCount / static_cast<float>(before + kCount));
  const Vec apart = part * splat(static_cast<float>(before));
  for (std::int64_t c = 0; c < channels; c += kLanes) {
    const Vec origin = load(origins + c);
    Vec values[kCount], sum = {}, square = {};
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      values[i] = load(x + i * channels + c, channels - c) - origin;
      sum += values[i];
    }
    const Vec mean = sum * splat(1.0f / kCount);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const Vec deviation = values[i] - mean;
      square += deviation * deviation;
    }
    const Vec old = load(means + c), distance = mean - old;
    store(means + c, old + distance * part);
    store(squares + c, load(squares + c) + (square + distance * distance * apart));
  }
}

// The moments of every group in x[first..last][channels].
template <typename Number>
ISA_INLINE void run_moments(const GroupNormAddRelu& op, std::int64_t first, std::int64_t last,
                            Moments* groups) {
  const std::int64_t channels = op.channels, stride = round_up(channels, kLanes);
  const Number* const x = static_cast<const Number*>(op.x) + first * channels;
  const std::int64_t pixels = last - first;
  float* const origins = thread_scratch(2).floats(3 * stride);
  float *const means = origins + stride, *const squares = means + stride;
  const std::int64_t count = std::min<std::int64_t>(pixels, kPixelGroup);
  for (std::int64_t c = 0; c < channels; c += kLanes) {
    Vec sum = {};
    for (std::int64_t i = 0; i < count; ++i) sum += load(x + i * channels + c, channels - c);
    store(origins + c, sum / splat(static_cast<float>(count)));
  }
  std::fill(means, means + 2 * stride, 0.0f);
  std::int64_t pixel = 0;
  for (; pixel + kPixelGroup <= pixels; pixel += kPixelGroup) {
    add_pixels<kPixelGroup>(x + pixel * channels, pixel, channels, origins, means, squares);
  }
  for (; pixel < pixels; ++pixel) {
    add_pixels<1>(x + pixel * channels, pixel, channels, origins, means, squares);
  }
  const std::int64_t size = channels / op.groups;
  for (std::int64_t g = 0; g < op.groups; ++g) {
    const std::int64_t begin = g * size, end = begin + size;
    double mean = 0, square = 0;
    for (std::int64_t c = begin; c < end; ++c) mean += double{origins[c]} + double{means[c]};
    mean /= static_cast<double>(size);
    for (std::int64_t c = begin; c < end; ++c) {
      const double distance = double{origins[c]} + double{means[c]} - mean;
      square += squares[c] + static_cast<double>(pixels) * distance * distance;
    }
    groups[g] = {static_cast<double>(pixels * size), mean, square};
  }
}

template <typename Number>
ISA_INLINE void finish_pixels(const GroupNormAddRelu& op, const TermsAt& terms, std::int64_t first,
                              std::int64_t last) {
  const Vec least = least_result(op.relu);
  for (std::int64_t pixel = first; pixel < last; ++pixel) {
    const std::int64_t offset = pixel * op.channels;
    const Number* const residual =
        static_cast<const Number*>(op.residual.data) + op.residual.offset(pixel);
    const std::int64_t added = op.residual.channels;
    for (std::int64_t c = 0; c < op.channels; c += kLanes) {
      const std::int64_t valid = op.channels - c;
      const Vec x = load(static_cast<const Number*>(op.x) + offset + c, valid);
      const TermsAt at{terms.mean + c, terms.scale + c, terms.bias + c};
      store(static_cast<Number*>(op.out) + offset + c,
            c < added ? normalise(x, at, load(residual + c, added - c), least)
                      : normalise(x, at, least),
            valid);
    }
  }
}

ISA void moments_task(const GroupNormAddRelu& op, std::int64_t first, std::int64_t last,
                      Moments* groups) {
  if (op.format == Format::kFloat32) {
    run_moments<float>(op, first, last, groups);
  } else {
    run_moments<BFloat16>(op, first, last, groups);
  }
}

ISA void finish_task(const GroupNormAddRelu& op, const TermsAt& terms, std::int64_t first,
                     std::int64_t last) {
  if (op.format == Format::kFloat32) {
    finish_pixels<float>(op, terms, first, last);
  } else {
    finish_pixels<BFloat16>(op, terms, first, last);
  }
}
