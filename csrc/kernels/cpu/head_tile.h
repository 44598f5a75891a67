// The vector code of head.cpp, included once per instruction set by for_each_isa.h.
#include "vec.h"

// pooled[c] = the mean over x[pixels][c], for one vector of channels.
template <typename Number>
ISA_INLINE void pool(const Head& head, const Number* x, std::int64_t valid, float* pooled) {
  Vec total = {};
  for (std::int64_t first = 0; first < head.pixels; first += kPixelGroup) {
    const std::int64_t last = std::min(first + kPixelGroup, head.pixels);
    Vec group = {};
    for (std::int64_t pixel = first; pixel < last; ++pixel) {
      group += load(x + pixel * head.channels, valid);
    }
    total += group;
  }
  store(pooled, total / splat(static_cast<float>(head.pixels)));
}

ISA_INLINE float sum_of(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// The dot products of one row of weights with kImages rows of pooled activations.
template <typename Number, int kImages>
ISA_INLINE void multiply_images(const Number* weight, const float* pooled, std::int64_t stride,
                                std::int64_t channels, float* sums) {
  Vec sum[kImages] = {};
  for (std::int64_t c = 0; c < channels; c += kLanes) {
    const Vec w = load(weight + c, channels - c);
#pragma GCC unroll 4
    for (int i = 0; i < kImages; ++i) sum[i] += w * load(pooled + i * stride + c);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kImages; ++i) sums[i] = sum_of(sum[i]);
}

template <typename Number>
ISA_INLINE void classify(const Head& head, const float* pooled, std::int64_t stride,
                         std::int64_t first, std::int64_t last) {
  for (std::int64_t k = first; k < last; ++k) {
    const Number* const weight = static_cast<const Number*>(head.weight) + k * head.weight_stride;
    const float bias =
        head.bias == nullptr ? 0.0f : load(static_cast<const Number*>(head.bias) + k, 1)[0];
    for (std::int64_t n = 0; n < head.batch;) {
      float sums[4];
      const float* const rows = pooled + n * stride;
      const std::int64_t images = head.batch - n >= 4 ? 4 : 1;
      if (images == 4) {
        multiply_images<Number, 4>(weight, rows, stride, head.channels, sums);
      } else {
        multiply_images<Number, 1>(weight, rows, stride, head.channels, sums);
      }
      for (std::int64_t i = 0; i < images; ++i, ++n) {
        store(static_cast<Number*>(head.out) + n * head.classes + k, splat(sums[i] + bias), 1);
      }
    }
  }
}

ISA void pool_task(const Head& head, std::int64_t image, std::int64_t c, float* pooled) {
  const std::int64_t offset = image * head.pixels * head.channels;
  for (const std::int64_t end = std::min(c + kPoolChannels, head.channels); c < end; c += kLanes) {
    if (head.format == Format::kFloat32) {
      pool(head, static_cast<const float*>(head.x) + offset + c, end - c, pooled + c);
    } else {
      pool(head, static_cast<const BFloat16*>(head.x) + offset + c, end - c, pooled + c);
    }
  }
}

ISA void classify_task(const Head& head, const float* pooled, std::int64_t stride,
                       std::int64_t first, std::int64_t last) {
  if (head.format == Format::kFloat32) {
    classify<float>(head, pooled, stride, first, last);
  } else {
    classify<BFloat16>(head, pooled, stride, first, last);
  }
}
