// The vector code of squeeze_excite.cpp, included once per instruction set by for_each_isa.h.
#include "vec.h"

// sums[c] = the sum over x[pixels][c]: kPixelGroup pixels at a time in registers, so that lines of
// memory are read one after another and a sum is touched once for the group.
template <typename Number>
ISA_INLINE void sum_pixels(const Number* x, std::int64_t pixels, std::int64_t channels,
                           float* sums) {
  std::fill(sums, sums + round_up(channels, kLanes), 0.0f);
  for (std::int64_t first = 0; first < pixels; first += kPixelGroup) {
    const Number* const group = x + first * channels;
    const std::int64_t count = std::min(kPixelGroup, pixels - first);
    for (std::int64_t c = 0; c < channels; c += kLanes) {
      const std::int64_t valid = channels - c;
      Vec sum = load(group + c, valid);
      if (count == kPixelGroup) {
#pragma GCC unroll 8
        for (std::int64_t pixel = 1; pixel < kPixelGroup; ++pixel) {
          sum += load(group + pixel * channels + c, valid);
        }
      } else {
        for (std::int64_t pixel = 1; pixel < count; ++pixel) {
          sum += load(group + pixel * channels + c, valid);
        }
      }
      store(sums + c, load(sums + c) + sum);
    }
  }
}

ISA_INLINE float lanes_sum(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// weight[row] · values + bias[row]; values are zero from `columns` on to a whole vector.
template <typename Number>
ISA_INLINE float linear(const void* weight, const void* bias, std::int64_t row,
                        std::int64_t columns, const float* values) {
  const Number* const w = static_cast<const Number*>(weight) + row * columns;
  Vec sum = {};
  for (std::int64_t c = 0; c < columns; c += kLanes) {
    sum += load(w + c, columns - c) * load(values + c);
  }
  const float added = bias == nullptr ? 0.0f : load(static_cast<const Number*>(bias) + row, 1)[0];
  return lanes_sum(sum) + added;
}

template <typename Number>
ISA_INLINE void find_gate(const SqueezeExcite& op, float* sums, std::int64_t parts,
                          std::int64_t stride, float* hidden, float* gate) {
  const Vec pixels = splat(static_cast<float>(op.pixels));
  for (std::int64_t c = 0; c < op.channels; c += kLanes) {
    Vec sum = load(sums + c);
    for (std::int64_t part = 1; part < parts; ++part) sum += load(sums + part * stride + c);
    store(sums + c, sum / pixels);
  }
  for (std::int64_t i = 0; i < op.hidden; ++i) {
    const float value = linear<Number>(op.reduce, op.reduce_bias, i, op.channels, sums);
    hidden[i] = value < 0.0f ? 0.0f : value;  // NaN stays NaN
  }
  std::fill(hidden + op.hidden, hidden + round_up(op.hidden, kLanes), 0.0f);
  for (std::int64_t c = 0; c < op.channels; ++c) {
    // In fp64, as this factor's error is that of a whole channel.
    const double value = linear<Number>(op.expand, op.expand_bias, c, op.hidden, hidden);
    gate[c] = static_cast<float>(1.0 / (1.0 + std::exp(-value)));
  }
}

template <typename Number>
ISA_INLINE void apply_gate(const SqueezeExcite& op, const float* gate, std::int64_t first,
                           std::int64_t last) {
  const Vec least = least_result(op.relu);
  for (std::int64_t pixel = first; pixel < last; ++pixel) {
    const std::int64_t offset = pixel * op.channels;
    const Number* const x = static_cast<const Number*>(op.x) + offset;
    Number* const out = static_cast<Number*>(op.out) + offset;
    const Number* const residual =
        static_cast<const Number*>(op.residual.data) + op.residual.offset(pixel);
    const std::int64_t added = op.residual.channels;
    for (std::int64_t c = 0; c < op.channels; c += kLanes) {
      const std::int64_t valid = op.channels - c;
      Vec value = load(x + c, valid) * load(gate + c);
      if (c < added) value += load(residual + c, added - c);
      store(out + c, at_least(value, least), valid);
    }
  }
}

ISA void squeeze_task(const SqueezeExcite& op, std::int64_t first, std::int64_t last, float* sums) {
  const std::int64_t offset = first * op.channels;
  if (op.format == Format::kFloat32) {
    sum_pixels(static_cast<const float*>(op.x) + offset, last - first, op.channels, sums);
  } else {
    sum_pixels(static_cast<const BFloat16*>(op.x) + offset, last - first, op.channels, sums);
  }
}

ISA void gate_task(const SqueezeExcite& op, float* sums, std::int64_t parts, std::int64_t stride,
                   float* hidden, float* gate) {
  if (op.format == Format::kFloat32) {
    find_gate<float>(op, sums, parts, stride, hidden, gate);
  } else {
    find_gate<BFloat16>(op, sums, parts, stride, hidden, gate);
  }
}

ISA void excite_task(const SqueezeExcite& op, const float* gate, std::int64_t first,
                     std::int64_t last) {
  if (op.format == Format::kFloat32) {
    apply_gate<float>(op, gate, first, last);
  } else {
    apply_gate<BFloat16>(op, gate, first, last);
  }
}
