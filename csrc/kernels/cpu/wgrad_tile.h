// The vector code of wgrad.cpp, included once per instruction set by for_each_isa.h.
#include "wgrad_multiply.h"

ISA_INLINE void store_bits(std::uint32_t* p, VecBits v) { std::memcpy(p, &v, sizeof v); }

// `count` words of the operands: in fp32 the numbers of `a`, in bfloat16 pairs of `a` and `b`.
// nullptr stands for zeros.
ISA_INLINE void put_words(const Element* a, const Element* b, std::uint32_t* to,
                          std::int64_t count) {
  if constexpr (kFormat == Format::kFloat32) {
    if (a == nullptr) {
      std::memset(to, 0, 4 * count);
    } else {
      std::memcpy(to, a, 4 * count);
    }
  } else {
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      VecBits words = {};
      if (a != nullptr) words = (VecBits)load(a + i) >> 16;
      if (b != nullptr) words |= (VecBits)load(b + i);
      store_bits(to + i, words);
    }
    const auto half = [&](const Element* p) { return p != nullptr ? std::uint32_t(p[i]) : 0; };
    for (; i < count; ++i) to[i] = half(a) | half(b) << 16;
  }
}

// What a task copies of x for one block.
struct Copied {
  std::uint32_t* words;
  std::int64_t first_channel, channels;
};

// One line of the copy; `lines` are those of x in the band's two images, outside of it or not.
ISA_INLINE void copy_line(const ConvWgrad& conv, const Band& band, const std::int64_t (&lines)[2],
                          std::int64_t first_x, std::int64_t pixels, std::int64_t step,
                          const Copied& copied, std::uint32_t* to) {
  const Element* from[2];
  for (int i = 0; i < 2; ++i) {
    const bool inside = band.image[i] >= 0 && lines[i] >= 0 && lines[i] < conv.height;
    from[i] = inside
                  ? static_cast<const Element*>(conv.x) +
                        (band.image[i] * conv.height + lines[i]) * conv.width * conv.in_channels +
                        copied.first_channel
                  : nullptr;
  }
  const auto at = [&](int i, std::int64_t x) {
    return from[i] == nullptr ? nullptr : from[i] + x * conv.in_channels;
  };
  std::int64_t i = 0;
  const bool whole = step == 1 && copied.channels == conv.in_channels;
  while (i < pixels) {
    const std::int64_t x = first_x + i * step;
    std::int64_t run = 1;
    if (x < 0 || x >= conv.width) {
      std::memset(to, 0, 4 * copied.channels);
    } else {
      if (whole) run = std::min(pixels - i, conv.width - x);
      put_words(at(0, x), at(1, x), to, run * copied.channels);
    }
    to += run * copied.channels;
    i += run;
  }
}

// Copies what the block's windows cover, and lists each group's runs.
ISA_INLINE void prepare_x(const ConvWgrad& conv, const Plan& plan, const Block& block,
                          const Copied& copied, Runs& runs) {
  const Window& window = conv.window;
  runs.clear(plan.groups);
  std::int64_t pixel_words = conv.in_channels;  // of what is read
  std::uint32_t* to = copied.words;
  std::int64_t grad = 0;
  for (int piece = 0; piece < block.pieces; ++piece) {
    const Piece& at = block.piece[piece];
    const Band& band = plan.bands[at.band];
    const std::int64_t lines = at.last_line - at.first_line, count = at.last_x - at.first_x;
    const std::int64_t steps[2] = {window.kernel[0] == 1 ? 1 : window.stride[0],
                                   window.kernel[1] == 1 ? 1 : window.stride[1]};
    const std::int64_t x_step = window.kernel[1] == 1 ? window.stride[1] : 1;
    const std::int64_t pixels =
        (count - 1) * steps[1] + (window.kernel[1] - 1) * window.dilation[1] + 1;
    const std::int64_t copies =
        (lines - 1) * steps[0] + (window.kernel[0] - 1) * window.dilation[0] + 1;
    const std::int64_t copy_words = pixels * copied.channels;
    const std::int64_t left = at.first_x * window.stride[1] - window.padding[1];
    if (plan.copied) {
      pixel_words = copied.channels;
      const std::int64_t y_step = window.kernel[0] == 1 ? window.stride[0] : 1;
      for (std::int64_t i = 0; i < copies; ++i) {
        std::int64_t y[2];
        for (int half = 0; half < 2; ++half) {
          y[half] =
              (band.y[half] + at.first_line) * window.stride[0] - window.padding[0] + i * y_step;
        }
        copy_line(conv, band, y, left, pixels, x_step, copied, to + i * copy_words);
      }
    }
    for (std::int64_t line = 0; line < lines; ++line, grad += count) {
      for (std::int64_t row = 0; row < window.kernel[0]; ++row) {
        std::int64_t y[2];
        bool inside = false;
        for (int half = 0; half < 2; ++half) {
          y[half] = (band.y[half] + at.first_line + line) * window.stride[0] - window.padding[0] +
                    row * window.dilation[0];
          inside |= band.image[half] >= 0 && y[half] >= 0 && y[half] < conv.height;
        }
        if (!inside) continue;
        for (std::int64_t column = 0; column < (plan.merged ? 1 : window.kernel[1]); ++column) {
          const std::int64_t shift = column * window.dilation[1];
          // The first and last pixels whose tap lies in the line.
          std::int64_t first = 0, last = count;
          if (!plan.merged) {
            first = std::max<std::int64_t>(ceil_div(-(left + shift), window.stride[1]), 0);
            last = std::min(ceil_div(conv.width - left - shift, window.stride[1]), count);
          }
          if (first >= last) continue;
          std::int64_t word;
          if (plan.copied) {
            word = (to - copied.words) + (line * steps[0] + row * window.dilation[0]) * copy_words +
                   (first * steps[1] + shift) * copied.channels;
          } else {
            word = ((band.image[0] * conv.height + y[0]) * conv.width + left + shift +
                    first * window.stride[1]) *
                       conv.in_channels +
                   copied.first_channel;
          }
          runs.add(plan.merged ? row : row * window.kernel[1] + column,
                   {word, grad + first, last - first}, plan.x_pitch(pixel_words));
        }
      }
    }
    if (plan.copied) to += copies * copy_words;
  }
}

// A strip of the block's gradient, pixel by pixel.
ISA_INLINE void prepare_grad(const ConvWgrad& conv, const Plan& plan, const Block& block,
                             std::int64_t channel, std::uint32_t* to) {
  constexpr std::int64_t kStrip = kVecs * kLanes;
  const std::int64_t valid = std::min(kStrip, conv.out_channels - channel);
  if (valid < kStrip) std::memset(to, 0, 4 * kStrip * block.pixels);
  for (int piece = 0; piece < block.pieces; ++piece) {
    const Piece& at = block.piece[piece];
    const Band& band = plan.bands[at.band];
    for (std::int64_t line = at.first_line; line < at.last_line; ++line) {
      const Element* from[2];
      for (int i = 0; i < 2; ++i) {
        from[i] =
            band.image[i] < 0
                ? nullptr
                : static_cast<const Element*>(conv.grad) +
                      (((band.image[i] * plan.out_height + band.y[i] + line) * plan.out_width +
                        at.first_x) *
                           conv.out_channels +
                       channel);
      }
      for (std::int64_t x = at.first_x; x < at.last_x; ++x, to += kStrip) {
        if (valid == kStrip) {
          put_words(from[0], from[1], to, kStrip);
        } else {
          put_words(from[0], from[1], to, valid);
        }
        from[0] += conv.out_channels;
        if (from[1] != nullptr) from[1] += conv.out_channels;
      }
    }
  }
}

// What the block will read of x and of the gradient, pixel by pixel, as if it were one line.
ISA_INLINE void look_ahead(const ConvWgrad& conv, const Plan& plan, const Block& block,
                           std::int64_t first_channel, std::int64_t words, std::int64_t first_strip,
                           std::int64_t last_strip, Ahead& ahead) {
  constexpr std::int64_t kSize = sizeof(Element);
  const Window& window = conv.window;
  const Piece& at = block.piece[0];
  const Band& band = plan.bands[at.band];
  const std::int64_t first = first_strip * kVecs * kLanes;
  const std::int64_t last = std::min(last_strip * kVecs * kLanes, conv.out_channels);
  for (int i = 0; i < 2 && band.image[i] >= 0; ++i) {
    const std::int64_t line = band.y[i] + at.first_line;
    const std::int64_t pixel =
        (band.image[i] * plan.out_height + line) * plan.out_width + at.first_x;
    ahead.add(static_cast<const Element*>(conv.grad) + pixel * conv.out_channels + first,
              (last - first) * kSize, conv.out_channels * kSize);
    // Lines that only the taps above need were read by the block before.
    const std::int64_t y = std::min(
        line * window.stride[0] - window.padding[0] + (window.kernel[0] - 1) * window.dilation[0],
        conv.height - 1);
    const std::int64_t x =
        (band.image[i] * conv.height + std::max<std::int64_t>(y, 0)) * conv.width +
        std::min(at.first_x * window.stride[1], conv.width - 1);
    ahead.add(static_cast<const Element*>(conv.x) + x * conv.in_channels + first_channel,
              words * kSize, window.stride[1] * conv.in_channels * kSize);
  }
}

// The sums of one part of the pixels, for some strips of output channels and some input channels of
// every tap.
ISA void wgrad_task(const ConvWgrad& conv, const Plan& plan, float* partials,
                    const TaskPlace& place) {
  constexpr std::int64_t kStrip = kVecs * kLanes;
  const std::int64_t first_channel = place.row_task * plan.words / plan.row_tasks;
  const std::int64_t last_channel = (place.row_task + 1) * plan.words / plan.row_tasks;
  const std::int64_t words = last_channel - first_channel;
  Copied copied{nullptr, plan.merged ? 0 : first_channel, plan.merged ? conv.in_channels : words};
  float* const scratch = thread_scratch().floats(plan.block_pixels() * kStrip +
                                                 plan.copy_words(conv, copied.channels));
  auto* const grad = reinterpret_cast<std::uint32_t*>(scratch);
  copied.words = grad + plan.block_pixels() * kStrip;
  thread_local Runs runs;

  const std::int64_t first_strip = place.strip_task * plan.strips / plan.strip_tasks;
  const std::int64_t last_strip = (place.strip_task + 1) * plan.strips / plan.strip_tasks;
  const std::int64_t begin = place.part * plan.blocks / plan.parts;
  const std::int64_t end = (place.part + 1) * plan.blocks / plan.parts;
  float* const sums = partials + place.part * plan.partial_floats();
  Ahead ahead;
  Block block = plan.block(begin);
  for (std::int64_t i = begin; i < end; ++i) {
    Block next;
    ahead.clear();
    if (i + 1 < end) {
      next = plan.block(i + 1);
      look_ahead(conv, plan, next, copied.first_channel, copied.channels, first_strip, last_strip,
                 ahead);
    }
    prepare_x(conv, plan, block, copied, runs);
    const std::int64_t pixel_words = plan.copied ? copied.channels : conv.in_channels;
    const std::int64_t pitch = plan.x_pitch(pixel_words);
    const auto* const x = plan.copied ? copied.words : static_cast<const std::uint32_t*>(conv.x);
    for (std::int64_t strip = first_strip; strip < last_strip; ++strip) {
      prepare_grad(conv, plan, block, strip * kStrip, grad);
      const bool narrow = conv.out_channels - strip * kStrip <= kLanes;
      for (std::int64_t group = 0; group < plan.groups; ++group) {
        float* const rows =
            sums + (strip * plan.rows + group * plan.words + first_channel) * kStrip;
        multiply_rows(runs.of(group), x, pitch, grad, rows, words, narrow, i == begin, ahead);
      }
    }
    block = next;
  }
}

// Adds up the parts' sums of some rows and one strip, and writes them where they belong.
template <typename Out>
ISA_INLINE void merge(const ConvWgrad& conv, const Plan& plan, const float* partials,
                      std::int64_t strip, std::int64_t first, std::int64_t last) {
  constexpr std::int64_t kStrip = kVecs * kLanes;
  const std::int64_t taps = conv.window.kernel[0] * conv.window.kernel[1];
  for (std::int64_t row = first; row < last; row += kLanes) {
    const std::int64_t rows = std::min<std::int64_t>(kLanes, last - row);
    for (int vec = 0; vec < kVecs; ++vec) {
      const std::int64_t channel = strip * kStrip + vec * kLanes;
      if (channel >= conv.out_channels) break;
      Vec sum[kLanes] = {};
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t m = row + r;
        const std::int64_t source = conv.channels_last ? m : m % taps * conv.in_channels + m / taps;
        const float* const from = partials + (strip * plan.rows + source) * kStrip + vec * kLanes;
        sum[r] = sum_of_parts(from, plan.parts, plan.partial_floats());
      }
      transpose(sum);
      const std::int64_t channels = std::min<std::int64_t>(kLanes, conv.out_channels - channel);
      Out* to = static_cast<Out*>(conv.out) + channel * plan.rows + row;
      for (std::int64_t k = 0; k < channels; ++k, to += plan.rows) store(to, sum[k], rows);
    }
  }
}

ISA void wgrad_merge(const ConvWgrad& conv, const Plan& plan, const float* partials,
                     std::int64_t strip, std::int64_t first, std::int64_t last) {
  if (conv.out_format == Format::kFloat32) {
    merge<float>(conv, plan, partials, strip, first, last);
  } else {
    merge<BFloat16>(conv, plan, partials, strip, first, last);
  }
}
