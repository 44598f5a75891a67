// Implicit GEMM in integers: rows are output pixels of the whole batch, columns output channels,
// and the sum runs over the window, tap by tap and word by word of 4 channels.
//
// One task is a run of pixels times a run of strips of up to 64 columns, done by one thread: for
// each strip of weights (L2; the next one is prefetched meanwhile) and each tile of 6 pixels, sums
// stay in registers from bias and shortcut over the whole window to the requantised result, of
// which whole lines are stored. Each pixel of a tile has a pointer of its own into x, which is read
// where it lies; for a tap outside the image it points to the value of the padding. Pixels are
// taken in an order in which those at the same border follow each other: a tile skips the taps that
// are outside for all of it. (That saves 18% of a 3 x 3 convolution on a map of 7 x 7.) int8
// activations become unsigned on their way into the product by adding 128, which the bias takes
// back. Groups of few channels share a block of weights with zeros between them. A projection is a
// second pass over the same tile, made first: its rescaled sums, with the bias, are what the other
// pass starts from. With AVX2 alone, 3 x 3 convolutions go by quantized_winograd_tile.h instead.
//
// Memory traffic: x and the residual are read and the result is written once, the weights once per
// task. x is copied first where it is int8 or has channels that fill no whole words (images).
#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "batch_norm.h"
#include "isa.h"
#include "parallel.h"
#include "quantized.h"
#include "quantized_pack.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr std::int64_t kTaskBytes = 256 << 10;  // of x

// Output lines or columns [begin, end), whose windows have the taps [first, last) inside the image.
struct Run {
  std::int64_t begin, end, first, last;
};

// All of an axis: the windows inside in one run, those at a border one by one.
std::vector<Run> runs_of(const Window& window, int axis, std::int64_t size) {
  const std::int64_t kernel = window.kernel[axis], stride = window.stride[axis];
  const std::int64_t padding = window.padding[axis], dilation = window.dilation[axis];
  const std::int64_t out = conv_output_size(window, axis, size);
  const std::int64_t begin = std::min(ceil_div(padding, stride), out);
  const std::int64_t room = size + padding - dilation * (kernel - 1) - 1;
  const std::int64_t end = std::clamp(room < 0 ? 0 : room / stride + 1, begin, out);
  std::vector<Run> runs;
  const auto at_border = [&](std::int64_t i) {
    const std::int64_t start = i * stride - padding;
    const std::int64_t first =
        std::min(ceil_div(std::max<std::int64_t>(-start, 0), dilation), kernel);
    const std::int64_t last =
        std::min(ceil_div(std::max<std::int64_t>(size - start, 0), dilation), kernel);
    runs.push_back({i, i + 1, std::min(first, last), last});
  };
  for (std::int64_t i = 0; i < begin; ++i) at_border(i);
  if (begin < end) runs.push_back({begin, end, 0, kernel});
  for (std::int64_t i = end; i < out; ++i) at_border(i);
  return runs;
}

// A pixel of the result, and its window's place in x, part of which may lie outside.
struct Row {
  const std::uint8_t* window;
  std::int64_t pixel;
  std::int64_t border;  // the number of its taps inside: Pass::borders
};

struct Taps {
  std::int64_t rows[2], columns[2];  // first and last + 1
};

bool has(const Taps& taps, std::int64_t y, std::int64_t x) {
  return y >= taps.rows[0] && y < taps.rows[1] && x >= taps.columns[0] && x < taps.columns[1];
}

// The smallest rectangle that has the taps of both.
Taps union_of(const Taps& a, const Taps& b) {
  return {{std::min(a.rows[0], b.rows[0]), std::max(a.rows[1], b.rows[1])},
          {std::min(a.columns[0], b.columns[0]), std::max(a.columns[1], b.columns[1])}};
}

// The convolution or its projection, with what all tasks share.
struct Pass {
  const std::uint8_t* x;
  const std::int8_t* weights;
  const std::int32_t* start;  // of each column's sum
  const float* scale;
  const std::uint8_t* padding_value;
  PackedWeights layout;
  Window window;
  std::int64_t pixel_bytes, line_bytes, image_bytes;
  std::int64_t tap_words, tap_bytes, tap_line_bytes;  // of a tap, and from one to the next
  bool inside;                                        // no window reaches over the border
  bool skips;                                         // taps outside the image add nothing
  std::vector<Run> lines, columns;
  std::vector<Taps> borders;  // of each pair of runs, or one for all

  std::int64_t border(std::size_t line, std::size_t column) const {
    return line * columns.size() + column;
  }
  const std::uint8_t* place(std::int64_t image, std::int64_t y, std::int64_t x_) const {
    return at_offset(x, image * image_bytes +
                            (y * window.stride[0] - window.padding[0]) * line_bytes +
                            (x_ * window.stride[1] - window.padding[1]) * pixel_bytes);
  }
};

struct Shared {
  const QuantizedConv& op;
  std::array<Pass, 2> passes;  // the convolution and its projection
  int count;
  std::int64_t batch, height, width;  // of the result
  std::int64_t pixel_tasks, strip_tasks;
  bool fits;  // every sum times its multiplier, into int32

  std::int64_t pixels() const { return batch * height * width; }

  // Calls body(image, y, x, end of x, border) for the pixels [begin, end), line by line, those with
  // the same taps inside one after the other.
  template <typename Body>
  void for_each_line(std::int64_t begin, std::int64_t end, const Body& body) const {
    const Pass& pass = passes[0];
    const std::int64_t first_image = begin / (height * width);
    const std::int64_t last_image = (end - 1) / (height * width);
    for (std::size_t i = 0; i < pass.lines.size(); ++i) {
      for (std::size_t j = 0; j < pass.columns.size(); ++j) {
        for (std::int64_t image = first_image; image <= last_image; ++image) {
          for (std::int64_t y = pass.lines[i].begin; y < pass.lines[i].end; ++y) {
            const std::int64_t line = (image * height + y) * width;
            const std::int64_t first = std::max(pass.columns[j].begin, begin - line);
            const std::int64_t last = std::min(pass.columns[j].end, end - line);
            if (first < last) body(image, y, first, last, pass.border(i, j));
          }
        }
      }
    }
  }

  // The rows of the pixels [begin, end) in that order, for each pass.
  void fill_rows(std::int64_t begin, std::int64_t end, Row* const (&rows)[2]) const {
    for (int i = 0; i < count; ++i) {
      const Pass& pass = passes[i];
      const std::int64_t step = pass.window.stride[1] * pass.pixel_bytes;
      Row* to = rows[i];
      for_each_line(begin, end,
                    [&](std::int64_t image, std::int64_t y, std::int64_t x, std::int64_t last,
                        std::int64_t border) {
                      const std::int64_t line = (image * height + y) * width;
                      const std::uint8_t* window = pass.place(image, y, x);
                      for (; x < last; ++x, window = at_offset(window, step)) {
                        *to++ = {window, line + x, i == 0 ? border : 0};
                      }
                    });
    }
  }
};

// What winograd_serves: input channels that fill vectors, and not too many (the reason stands in
// quantized_winograd_tile.h); tiles in a task, on whose number the share of the weights' transform
// depends.
constexpr std::int64_t kWinogradChannels = 32, kMostWinogradChannels = 1024;
constexpr std::int64_t kWinogradTiles = 96;

// The output tiles of 2 x 2 of the whole batch.
std::int64_t winograd_tiles(const Shared& shared) {
  return shared.batch * ceil_div(shared.height, 2) * ceil_div(shared.width, 2);
}

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "quantized_conv_tile.h"
#define ISA_WITH_VNNI
#define ISA_WITH_AMX
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

using Task = void (*)(const Shared& shared, std::int64_t pixel_task, std::int64_t strip_task);

Task task_for(QuantizedIsa isa, bool winograd) {
  (void)winograd;
#if defined(__x86_64__) && defined(__GNUC__)
#ifdef RESNET_FUSED_AMX
  if (isa == QuantizedIsa::kAmx) return amx::quantized_conv_task;
#endif
  if (isa == QuantizedIsa::kAvx512Vnni) return avx512vnni::quantized_conv_task;
  if (isa == QuantizedIsa::kAvxVnni) return avxvnni::quantized_conv_task;
  if (isa == QuantizedIsa::kAvx2) {
    return winograd ? avx2::quantized_winograd_task : avx2::quantized_conv_task;
  }
#endif
  (void)isa;
  return nullptr;
}

// x with the channels of each pixel padded to whole words, where what is added is multiplied by
// zero, and `flip`ped.
const std::uint8_t* copied_pixels(const Activations& x, std::int64_t pixel_bytes, std::uint8_t flip,
                                  Scratch& scratch) {
  const std::int64_t lines = x.batch * x.height;
  auto* const copy = reinterpret_cast<std::uint8_t*>(
      scratch.floats(lines * x.width * pixel_bytes / sizeof(float)));
  parallel_for(lines, [&](std::int64_t line) {
    const std::uint8_t* from = x.data + line * x.width * x.channels;
    std::uint8_t* to = copy + line * x.width * pixel_bytes;
    for (std::int64_t i = 0; i < x.width; ++i, from += x.channels, to += pixel_bytes) {
      for (std::int64_t c = 0; c < x.channels; ++c) to[c] = from[c] ^ flip;
      for (std::int64_t c = x.channels; c < pixel_bytes; ++c) to[c] = 0;
    }
  });
  return copy;
}

template <typename Number>
const Number* padded_vector(const Number* values, std::int64_t count, std::vector<Number>& copy) {
  if (count % kQuantizedLanes == 0) return values;
  copy.assign(round_up(count, kQuantizedLanes), Number{});
  std::copy(values, values + count, copy.begin());
  return copy.data();
}

// What passes point to, where it is not what they were given.
struct Copies {
  std::vector<std::uint8_t> padding_value;
  std::vector<std::int32_t> start;
  std::vector<float> scale;
};

Pass make_pass(const QuantizedConvolution& conv, const std::int32_t* bias, const float* scale,
               Copies& copies, Scratch& scratch) {
  const Window& window = conv.window;
  const Activations& x = conv.x;
  Pass pass;
  pass.layout = PackedWeights::of_groups(x.channels, conv.out_channels, conv.groups,
                                         window.kernel[0] * window.kernel[1]);
  const PackedWeights& layout = pass.layout;
  pass.window = window;
  pass.pixel_bytes = layout.blocks == 1 ? 4 * layout.tap_words() : x.channels;
  pass.line_bytes = x.width * pass.pixel_bytes;
  pass.image_bytes = x.height * pass.line_bytes;
  const std::uint8_t flip = x.is_signed ? 0x80 : 0;
  pass.x = pass.pixel_bytes == x.channels && flip == 0
               ? x.data
               : copied_pixels(x, pass.pixel_bytes, flip, scratch);
  pass.weights = static_cast<const std::int8_t*>(conv.packed);
  pass.scale = padded_vector(scale, conv.out_channels, copies.scale);

  if (bias == nullptr || x.is_signed) {
    copies.start.assign(round_up(conv.out_channels, kQuantizedLanes), 0);
    const auto* const sums =
        reinterpret_cast<const std::int32_t*>(pass.weights + layout.weight_bytes());
    for (std::int64_t k = 0; k < conv.out_channels; ++k) {
      // Blocks are padded only where there is one, so columns are channels.
      copies.start[k] = (bias == nullptr ? 0 : bias[k]) - (x.is_signed ? 128 * sums[k] : 0);
    }
    pass.start = copies.start.data();
  } else {
    pass.start = padded_vector(bias, conv.out_channels, copies.start);
  }

  pass.lines = runs_of(window, 0, x.height);
  pass.columns = runs_of(window, 1, x.width);
  for (const Run& line : pass.lines) {
    for (const Run& column : pass.columns) {
      pass.borders.push_back({{line.first, line.last}, {column.first, column.last}});
    }
  }
  pass.inside = window.padding[0] + window.padding[1] == 0;
  pass.tap_words = layout.tap_words();
  pass.tap_bytes = window.dilation[1] * pass.pixel_bytes;
  pass.tap_line_bytes = window.dilation[0] * pass.line_bytes;
  pass.skips = !x.is_signed && conv.padding_value == nullptr;
  pass.padding_value = nullptr;
  if (!pass.inside) {
    copies.padding_value.assign(pass.pixel_bytes, flip);
    for (std::int64_t c = 0; c < x.channels && conv.padding_value != nullptr; ++c) {
      copies.padding_value[c] = conv.padding_value[c] ^ flip;
    }
    pass.padding_value = copies.padding_value.data();
  }
  return pass;
}

// Equal tasks, a multiple of the threads in number. What is less, x or the weights, is read by
// every thread, and the other divided.
void divide(Shared& shared, std::int64_t threads) {
  std::int64_t x_bytes = 0, weight_bytes = 0;
  for (int i = 0; i < shared.count; ++i) {
    const Pass& pass = shared.passes[i];
    std::int64_t read = shared.pixels() * pass.pixel_bytes;
    for (int axis : {0, 1}) read *= std::min(pass.window.stride[axis], pass.window.kernel[axis]);
    x_bytes += read;
    weight_bytes += pass.layout.weight_bytes();
  }
  const std::int64_t strips = shared.passes[0].layout.strips();
  shared.strip_tasks = weight_bytes > x_bytes ? std::min(strips, threads) : 1;
  const std::int64_t wanted =
      std::max(ceil_div(x_bytes, kTaskBytes), ceil_div(threads, shared.strip_tasks));
  shared.pixel_tasks = shared.strip_tasks == 1 ? round_up(wanted, threads) : wanted;
  shared.pixel_tasks = std::min(shared.pixel_tasks, shared.pixels());
}

// Whether Winograd's transforms do a convolution in less time, and exactly. They take time, too, so
// that there must be 1.6 direct products for one of theirs, without those that the direct
// convolution skips and with those that the last tiles of an odd map waste.
bool winograd_serves(const Shared& shared) {
  const QuantizedConv& op = shared.op;
  const Residual& residual = op.residual;
  const Pass& pass = shared.passes[0];
  const auto is = [](const std::int64_t (&axes)[2], std::int64_t value) {
    return axes[0] == value && axes[1] == value;
  };
  const bool whole =
      residual.channels == 0 || (residual.channels == op.conv.out_channels && residual.in_line());
  if (!is(pass.window.kernel, 3) || !is(pass.window.stride, 1) || !is(pass.window.padding, 1) ||
      !is(pass.window.dilation, 1) || op.conv.groups != 1 || op.projected || !whole ||
      pass.pixel_bytes % kWinogradChannels != 0 || pass.pixel_bytes > kMostWinogradChannels ||
      op.conv.out_channels % kQuantizedLanes != 0) {
    return false;
  }
  const double direct = (3.0 * shared.height - 2) * (3.0 * shared.width - 2);
  return direct >= 1.6 * 16 * winograd_tiles(shared) / shared.batch;
}

// Tasks of few enough tiles, a multiple of the threads in number. Where tiles are few, the strips
// are divided too; each part transforms the input again.
void divide_tiles(Shared& shared, std::int64_t threads) {
  const std::int64_t tiles = winograd_tiles(shared);
  shared.pixel_tasks = ceil_div(tiles, kWinogradTiles);
  if (shared.pixel_tasks < threads) {
    shared.strip_tasks = std::min(shared.passes[0].layout.strips(), threads);
    shared.pixel_tasks = std::max(shared.pixel_tasks, ceil_div(threads, shared.strip_tasks));
  } else {
    shared.pixel_tasks = round_up(shared.pixel_tasks, threads);
  }
  shared.pixel_tasks = std::min(shared.pixel_tasks, tiles);
}

}  // namespace

bool supports(QuantizedIsa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (isa) {
    case QuantizedIsa::kAmx:
      return has_amx_int8() && supports(QuantizedIsa::kAvx512Vnni);
    case QuantizedIsa::kAvx512Vnni:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
    case QuantizedIsa::kAvxVnni: {  // CPUID leaf 7, subleaf 1, EAX bit 4 (Intel SDM)
      unsigned a = 0, b = 0, c = 0, d = 0;
      return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
    }
    case QuantizedIsa::kAvx2:
      return avx2;
    case QuantizedIsa::kNone:
      break;
  }
#endif
  (void)isa;
  return false;
}

std::int64_t quantized_conv_packed_bytes(std::int64_t in_channels, std::int64_t out_channels,
                                         std::int64_t groups, const std::int64_t kernel[2]) {
  return PackedWeights::of_groups(in_channels, out_channels, groups, kernel[0] * kernel[1]).bytes();
}

void quantized_conv_pack(const std::int8_t* weight, const std::int64_t strides[4], void* packed,
                         std::int64_t in_channels, std::int64_t out_channels, std::int64_t groups,
                         const std::int64_t kernel[2]) {
  const auto layout =
      PackedWeights::of_groups(in_channels, out_channels, groups, kernel[0] * kernel[1]);
  const std::int64_t group_in = in_channels / groups, group_out = out_channels / groups;
  pack_weights(layout, packed, [&](std::int64_t k, std::int64_t tap, std::int64_t c) {
    const std::int64_t channel = k / layout.out_channels * layout.in_channels + c;
    if (channel / group_in != k / group_out) return std::int8_t{0};
    return weight[k * strides[0] + channel % group_in * strides[1] + tap / kernel[1] * strides[2] +
                  tap % kernel[1] * strides[3]];
  });
}

void quantized_conv(const QuantizedConv& op, QuantizedIsa isa) {
  const Activations& x = op.conv.x;
  Copies copies[2];
  const bool fits = std::all_of(op.multiplier, op.multiplier + op.conv.out_channels,
                                [](float m) { return m > -1 && m < 1; });
  Shared shared{op, {}, op.projected ? 2 : 1, x.batch, 0, 0, 1, 1, fits};
  shared.height = conv_output_size(op.conv.window, 0, x.height);
  shared.width = conv_output_size(op.conv.window, 1, x.width);
  if (shared.pixels() * op.conv.out_channels == 0) return;
  shared.passes[0] = make_pass(op.conv, op.bias, op.multiplier, copies[0], thread_scratch(0));
  if (op.projected) {
    shared.passes[1] =
        make_pass(op.projection, nullptr, op.shortcut_scale, copies[1], thread_scratch(1));
  } else if (op.shortcut_scale != nullptr) {
    shared.passes[1].scale =
        padded_vector(op.shortcut_scale, op.conv.out_channels, copies[1].scale);
  }
  const bool winograd = isa == QuantizedIsa::kAvx2 && winograd_serves(shared);
  if (winograd) {
    divide_tiles(shared, max_threads());
  } else {
    divide(shared, max_threads());
  }
  const Task task = task_for(isa, winograd);
  // Tasks that share weights follow each other.
  parallel_for(shared.pixel_tasks * shared.strip_tasks, [&](std::int64_t i) {
    task(shared, i % shared.pixel_tasks, i / shared.pixel_tasks);
  });
}

}  // namespace resnet_fused::cpu
